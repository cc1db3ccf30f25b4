"""The distribution of the actions that an environment sees: a Gaussian, censored at the bounds of the action space."""

import math

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.preprocessing import get_action_dim

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def censored_gaussian(
    actions: th.Tensor, mean: th.Tensor, std: th.Tensor, low: th.Tensor, high: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-probability and entropy of a diagonal Gaussian whose samples are clipped to bounds.

    All beyond a bound is one and the same action, the bound, which has the whole tail's probability. So a sample far outside
    says no more about the policy than one on the bound, which makes policy gradients less noisy (clipped action policy
    gradient, https://arxiv.org/abs/1802.07564), and the ratio variance is that of the actions taken: by the data processing
    inequality it is at most the Gaussian's. The entropy, too, counts what is seen of the noise only: it grows with the
    standard deviation up to 1.5 half ranges (at a mean of zero), not for ever. Its gradient is that of the standard deviation
    alone: through the mean, a bonus would reward actions on the bounds wherever the noise is small.

    Densities are per half range of an action, so that nothing depends on the units of the action space.

    :param actions: Shape ``(..., action_dim)``; clipped or not, which makes no difference
    :param mean: Of the Gaussian, same shape
    :param std: Its standard deviation, same shape
    :param low: Lower bounds of the actions, shape ``(action_dim,)``
    :param high: Upper bounds
    :return: Log-probability and entropy, each of shape ``(...)``; the entropy is minus the mean of the log-probability
    """
    log_scale = (2 * std / (high - low)).log() + _HALF_LOG_TWO_PI
    # Both distances are positive where the mean is outside
    below, above = (low - mean) / std, (mean - high) / std
    log_below, log_above = th.special.log_ndtr(below), th.special.log_ndtr(above)
    log_density = -0.5 * ((actions - mean) / std) ** 2 - log_scale
    log_prob = th.where(actions <= low, log_below, th.where(actions >= high, log_above, log_density))

    # Of the noise alone: where it is small, the entropy is larger with the mean outside than inside
    below, above = (low - mean.detach()) / std, (mean.detach() - high) / std
    log_below, log_above = th.special.log_ndtr(below), th.special.log_ndtr(above)
    prob_below, prob_above = log_below.exp(), log_above.exp()
    # What the second moment within the bounds lacks of the whole Gaussian's, besides the tails' share
    moment = below * th.exp(-0.5 * below**2 - _HALF_LOG_TWO_PI) + above * th.exp(-0.5 * above**2 - _HALF_LOG_TWO_PI)
    inside = (1 - prob_below - prob_above) * (log_scale + 0.5) + 0.5 * moment
    entropy = inside - prob_below * log_below - prob_above * log_above
    return log_prob.sum(dim=-1), entropy.sum(dim=-1)


class CensoredGaussianDistribution(DiagGaussianDistribution):
    """
    Diagonal Gaussian whose samples are clipped to the bounds of the action space; see :func:`censored_gaussian`.

    :param action_space: A bounded Box
    :raises ValueError: It is another space, or a bound is infinite.
    """

    def __init__(self, action_space: spaces.Space) -> None:
        if not (isinstance(action_space, spaces.Box) and action_space.is_bounded()):
            raise ValueError(
                f"A censored Gaussian is for actions of a Box with finite bounds, not for {action_space}. Take `MlpPolicy`."
            )
        super().__init__(get_action_dim(action_space))
        self.low, self.high = (
            th.as_tensor(bound.ravel(), dtype=th.float32) for bound in (action_space.low, action_space.high)
        )

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "CensoredGaussianDistribution":
        # Distributions are no modules: nothing else moves them with the policy
        if self.low.device != mean_actions.device:
            self.low, self.high = self.low.to(mean_actions.device), self.high.to(mean_actions.device)
        super().proba_distribution(mean_actions, log_std)
        return self

    def evaluate(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param actions: Shape ``(batch_size, action_dim)``
        :return: Log-probability and entropy, each of shape ``(batch_size,)``
        """
        return censored_gaussian(actions, self.distribution.mean, self.distribution.stddev, self.low, self.high)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.evaluate(actions)[0]

    def entropy(self) -> th.Tensor:
        return self.evaluate(self.distribution.mean)[1]

    def sample(self) -> th.Tensor:
        return super().sample().clamp(self.low, self.high)

    def mode(self) -> th.Tensor:
        return super().mode().clamp(self.low, self.high)
