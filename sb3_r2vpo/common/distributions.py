"""Log-probabilities and entropies without distribution objects, and two distributions that SB3 does not have."""

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.preprocessing import get_action_dim
from torch.nn import functional as F

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def gaussian(distance: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Log-probability of a diagonal Gaussian, bit for bit that of ``torch.distributions.Normal``.

    Factors of two are where there are fewest of them, not where ``Normal`` has them: they are exact anywhere.

    :param distance: Squared deviation of actions from their mean, over the variance; shape ``(batch_size, action_dim)``
    :param std: The same shape, or ``(action_dim,)`` if it is the same for all
    :return: Shape ``(batch_size,)``
    """
    log_prob = th.sub(-std.log(), distance, alpha=0.5) - math.log(math.sqrt(2 * math.pi))
    return log_prob.sum(dim=-1)


def gaussian_sample(mean: th.Tensor, std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Actions of a diagonal Gaussian and their log-probabilities, operation by operation those of ``torch.distributions.Normal``.

    :param mean: Shape ``(batch_size, action_dim)``
    :param std: Shape ``(action_dim,)``
    :param noise: What makes the actions, in standard deviations; the shape of ``mean``
    :return: Actions, and log-probabilities of shape ``(batch_size,)``
    """
    actions = mean + noise * std
    deviation = actions - mean
    return actions, gaussian(deviation * deviation / (std * std), std)


def gaussian_entropy(std: th.Tensor) -> th.Tensor:
    """
    Entropy of a diagonal Gaussian, operation by operation that of ``torch.distributions.Normal``.

    :param std: Shape ``(..., action_dim)``
    :return: Shape ``(...)``
    """
    return (0.5 + 0.5 * math.log(2 * math.pi) + th.log(std)).sum(dim=-1)


def gaussian_backward(
    deviation: th.Tensor,
    distance: th.Tensor,
    std: th.Tensor,
    log_prob_grad: th.Tensor,
    entropy_grad: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    The gradient of :func:`gaussian` and :func:`gaussian_entropy`, bit for bit that of autograd.

    :param deviation: Actions minus their mean, shape ``(batch_size, action_dim)``
    :param distance: Its square over the variance
    :param std: Shape ``(action_dim,)``
    :param log_prob_grad: Gradient of the log-probabilities, shape ``(batch_size,)``
    :param entropy_grad: Gradient of the entropies, same shape; ``None`` for zero
    :return: Gradients of the mean and of ``std``
    """
    variance, gradient = std * std, log_prob_grad.unsqueeze(1)
    std_grad = gradient / std
    if entropy_grad is not None:
        std_grad = std_grad - entropy_grad.unsqueeze(1) / std
    std_grad = distance / variance * gradient * std - std_grad
    return gradient / variance * deviation, std_grad.sum(dim=0)


def categorical(logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-probability and entropy of a categorical distribution, operation by operation those of ``torch.distributions``.

    :param logits: Shape ``(batch_size, n_actions)``
    :param actions: Integers of shape ``(batch_size,)``
    :return: Log-probability and entropy, each of shape ``(batch_size,)``
    """
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    log_prob = logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    # An impossible action, of logit minus infinity, adds zero to the entropy
    entropy = -(th.clamp(logits, min=th.finfo(logits.dtype).min) * F.softmax(logits, dim=-1)).sum(-1)
    return log_prob, entropy


def categorical_backward(
    logits: th.Tensor, actions: th.Tensor, log_prob_grad: th.Tensor, entropy_grad: th.Tensor | None
) -> th.Tensor:
    """
    The gradient of :func:`categorical`, operation by operation that of autograd.

    :param logits: As the forward function's, like the next one
    :param log_prob_grad: Gradient of its log-probability, shape ``(batch_size,)``
    :param entropy_grad: Gradient of its entropy, same shape; ``None`` for zero
    :return: Gradient of the logits
    """
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    gradient = th.zeros_like(logits).scatter_add_(-1, actions.unsqueeze(-1), log_prob_grad.unsqueeze(-1))
    if entropy_grad is not None:
        probs, minimum = F.softmax(logits, dim=-1), th.finfo(logits.dtype).min
        product_grad = -entropy_grad.unsqueeze(-1)
        probs_grad = product_grad * logits.clamp(min=minimum)
        through_softmax = th.ops.aten._softmax_backward_data(probs_grad, probs, -1, logits.dtype)
        gradient = through_softmax + th.where(logits >= minimum, product_grad * probs, 0.0) + gradient
    return gradient - gradient.sum(dim=-1, keepdim=True) * logits.exp()


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


class CorrelatedGaussianDistribution(DiagGaussianDistribution):
    """
    Diagonal Gaussian whose samples are correlated over the steps of a rollout, while each of them is distributed as ever.

    :param action_dim: Dimension of the actions
    """

    #: Noise of unit variance for each step of the rollout, shape ``(n_steps, n_envs, action_dim)``; ``None`` between rollouts
    noise: th.Tensor | None = None
    #: The current step, and whether its noise is still to be used
    step, unused = 0, False

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as a callback may make of the policy, acts with white noise
        return {name: value for name, value in vars(self).items() if name != "noise"}

    def start(self, noise: th.Tensor) -> None:
        """
        :param noise: For each step of the rollout that begins, shape ``(n_steps, n_envs, action_dim)``
        """
        self.noise, self.step, self.unused = noise, 0, True

    def advance(self) -> None:
        """Go on to the next step of the rollout."""
        self.step, self.unused = self.step + 1, True

    def take_noise(self, mean: th.Tensor) -> th.Tensor | None:
        """
        :param mean: Of the actions, shape ``(batch_size, action_dim)``
        :return: The noise of this step of the rollout, once; then, as between rollouts, ``None`` for white noise: an
            evaluation in the middle of a rollout must not get the same noise at each of its steps
        """
        if self.noise is None or not self.unused or self.step >= len(self.noise) or self.noise.shape[1:] != mean.shape:
            return None
        self.unused = False
        return self.noise[self.step]

    def sample(self) -> th.Tensor:
        noise = self.take_noise(self.distribution.mean)
        return super().sample() if noise is None else self.distribution.mean + noise * self.distribution.stddev
