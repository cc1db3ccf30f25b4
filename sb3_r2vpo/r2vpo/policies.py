"""The policies of R2VPO: SB3's actor-critic policies, by the names that SB3's algorithms give them, and two of its own."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_r2vpo.r2vpo.distributions import CensoredGaussianDistribution

MlpPolicy = ActorCriticPolicy
CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


class CensoredMlpPolicy(ActorCriticPolicy):
    """
    MlpPolicy for continuous actions that has the probabilities of the actions that the environment gets: those within the
    bounds, where a sample beyond counts as the bound itself. With any on-policy algorithm.

    SB3 clips a Gaussian's samples to the bounds of the action space, while ``MlpPolicy`` goes on to tell apart what has become
    one action; with a standard deviation of one and bounds of plus and minus one, that is a third of all samples. See
    :func:`~sb3_r2vpo.r2vpo.distributions.censored_gaussian` for what it is good for. R2VPO's ``compensate_entropy`` is derived
    for a Gaussian that is not censored; here it is an approximation.

    Takes the arguments of ``ActorCriticPolicy``.

    :raises ValueError: The action space is not a Box, a bound of it is infinite, or ``use_sde`` is set.
    """

    def _build(self, lr_schedule: Schedule) -> None:
        if self.use_sde:
            raise ValueError("`CensoredMlpPolicy` has noise of its own: pass `use_sde=False`, or take `MlpPolicy`.")
        self.action_dist = CensoredGaussianDistribution(self.action_space)
        super()._build(lr_schedule)


class LayerNormTanh(BaseFeaturesExtractor):
    """
    A first layer whose outputs are bounded whatever the observations are: linear, layer normalization, tanh.

    :param observation_space: A Box, which is flattened
    :param features_dim: Number of outputs
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 256) -> None:
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(get_flattened_obs_dim(observation_space), features_dim),
            nn.LayerNorm(features_dim),
            nn.Tanh(),
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


class LayerNormMlpPolicy(ActorCriticPolicy):
    """
    MlpPolicy stabilised for many degrees of freedom, such as the humanoid's and the dog's, with any on-policy algorithm.

    The paper stabilises its actor-critic on humanoid-run and dog-run in a 'WPO-inspired' way and says no more. These are the
    networks of WPO (https://arxiv.org/abs/2505.00663, acme's ``agents/jax/wpo``): actor and critic apart, each with
    :class:`LayerNormTanh` before layers of ELU, and an action head that starts at nearly zero with a standard deviation of
    0.6. Its target networks and its KL penalty are not among them: R2VPO brings a constraint of its own.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Layers after the first one
    :param activation_fn: Their activation function
    :param log_std_init: Initial log standard deviation
    :param features_extractor_class: First layer of actor and critic
    :param share_features_extractor: Whether they have the first layer in common
    :param kwargs: Other arguments of ``ActorCriticPolicy``
    """

    #: What remains of the action head's initial weights: SB3's gain of 0.01 becomes WPO's 1e-4.
    ACTION_HEAD_SCALE = 0.01

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ELU,
        log_std_init: float = -0.5,
        features_extractor_class: type[BaseFeaturesExtractor] = LayerNormTanh,
        share_features_extractor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[256, 256] if net_arch is None else net_arch,
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            features_extractor_class=features_extractor_class,
            share_features_extractor=share_features_extractor,
            **kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for parameter in self.action_net.parameters():
            parameter.data.mul_(self.ACTION_HEAD_SCALE)
