"""The policies of R2VPO: SB3's, by the names that SB3's algorithms give them and with their state dicts, and two more."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_r2vpo.common.distributions import (
    CensoredGaussianDistribution,
    CorrelatedGaussianDistribution,
    gaussian_sample,
)
from sb3_r2vpo.common.mlp import MlpEvaluation, ValueRegression, is_changed, networks
from sb3_r2vpo.core.update import Backward, Evaluation


class MlpPolicy(ActorCriticPolicy):
    """
    SB3's ``MlpPolicy``, which acts, and is trained by R2VPO, with its forward and backward pass written out: the same numbers
    bit for bit, in half of the time of an update of two layers of 64. That is for linear layers with tanh or ReLU and a
    Gaussian or categorical distribution; anything else, and compiled code, goes through modules and autograd, as do
    ``evaluate_actions`` and ``predict_values`` for any other algorithm.

    Takes the arguments of ``ActorCriticPolicy``.
    """

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: Observations
        :param deterministic: Whether to take the most probable action
        :return: actions, values of shape ``(batch_size, 1)``, and log-probabilities of shape ``(batch_size,)``
        """
        net = None if deterministic or th.is_grad_enabled() else networks(self)
        if net is None:
            return super().forward(obs, deterministic)  # type: ignore[arg-type]
        features = self._flat_features(obs)
        (outputs, _), (values, _) = net.actor.forward(features), net.critic.forward(features)
        if net.log_std is None:
            logits = outputs - outputs.logsumexp(dim=-1, keepdim=True)
            actions = th.multinomial(F.softmax(logits, dim=-1), 1, replacement=True)
            log_prob = logits.gather(-1, actions).flatten()
        else:
            distribution = self.action_dist
            noise = distribution.take_noise(outputs) if isinstance(distribution, CorrelatedGaussianDistribution) else None
            actions, log_prob = gaussian_sample(outputs, net.log_std.exp(), th.randn_like(outputs) if noise is None else noise)
        return actions.reshape((-1, *self.action_space.shape)), values, log_prob  # type: ignore[misc]

    def evaluate(self, obs: PyTorchObs, actions: th.Tensor, with_values: bool) -> Evaluation | None:
        """
        ``evaluate_actions`` with a backward pass that is written out.

        :param obs: Observations
        :param actions: Actions
        :param with_values: Whether values are needed
        :return: The evaluation, ``None`` for values that are not needed; ``None`` in all where autograd is to do it
        """
        net = networks(self)
        if net is None or is_changed(self, "evaluate_actions") or not th.is_grad_enabled() or not net.are_trained():
            return None
        written = MlpEvaluation(net, self._flat_features(obs), actions, with_values)
        return Evaluation(written.values, written.log_prob, written.entropy, written.backward)

    def regress_values(self, obs: PyTorchObs, returns: th.Tensor) -> tuple[th.Tensor, Backward] | None:
        """
        The mean squared error of ``predict_values`` with a backward pass that is written out.

        :param obs: Observations
        :param returns: What their values should be, shape ``(batch_size,)``
        :return: The error and its backward pass; ``None`` where autograd is to do it
        """
        net = networks(self)
        if net is None or is_changed(self, "predict_values") or not net.are_trained():
            return None
        regression = ValueRegression(net.critic, self._flat_features(obs), returns)
        return regression.loss, regression.backward

    def _flat_features(self, obs: PyTorchObs) -> th.Tensor:
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images).flatten(1)  # type: ignore[union-attr]


CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


def stored_actions(action_space: spaces.Space, actions: th.Tensor) -> th.Tensor:
    """
    :param action_space: The action space
    :param actions: As rollout buffers store them
    :return: As policies take them: discrete ones as integers in one dimension
    """
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions


def evaluate(
    policy: ActorCriticPolicy,
    obs: PyTorchObs,
    actions: th.Tensor,
    with_values: bool = True,
    written_out: bool = True,
    **inputs: Any,
) -> Evaluation:
    """
    ``policy.evaluate_actions`` of any policy, with the backward pass that belongs to it.

    :param policy: Any policy
    :param obs: Observations
    :param actions: Actions
    :param with_values: Whether values are needed
    :param written_out: Whether a written-out backward pass may be used: not in compiled code
    :param inputs: What the policy takes besides, such as action masks
    :return: The evaluation; ``None`` for values that are not needed
    """
    if written_out and isinstance(policy, MlpPolicy):
        evaluation = policy.evaluate(obs, actions, with_values)
        if evaluation is not None:
            return evaluation
    values, log_prob, entropy = policy.evaluate_actions(obs, actions, **inputs)
    # SB3 leaves the distribution in the policy, with its graph: it would break compiled code in two, and can't be copied.
    # Whether there is one is not asked: compiled code would depend on the answer.
    policy.action_dist.distribution = None  # type: ignore[assignment]
    return Evaluation(values if with_values else None, log_prob, entropy)


def regress_values(
    policy: ActorCriticPolicy, obs: PyTorchObs, returns: th.Tensor, written_out: bool = True
) -> tuple[th.Tensor, Backward]:
    """
    :param policy: Any policy
    :param obs: Observations
    :param returns: What their values should be, shape ``(batch_size,)``
    :param written_out: Whether a written-out backward pass may be used: not in compiled code
    :return: The mean squared error of the policy's values, and its backward pass
    """
    if written_out and isinstance(policy, MlpPolicy):
        regression = policy.regress_values(obs, returns)
        if regression is not None:
            return regression
    return F.mse_loss(policy.predict_values(obs).flatten(), returns), th.Tensor.backward


class CensoredMlpPolicy(ActorCriticPolicy):
    """
    MlpPolicy with a Gaussian that is censored at the bounds of the action space: log-probabilities are those of the clipped
    actions that the environment receives, and a sample beyond a bound counts as the bound. For any on-policy algorithm.

    SB3 clips a Gaussian's samples to the bounds of the action space, while ``MlpPolicy`` goes on to tell apart what has become
    one action; with a standard deviation of one and bounds of plus and minus one, that is a third of all samples. See
    :func:`~sb3_r2vpo.common.distributions.censored_gaussian` for what it is good for. R2VPO's ``compensate_entropy`` is
    derived for a Gaussian that is not censored; here it is an approximation.

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
