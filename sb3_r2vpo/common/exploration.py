"""Exploration noise that is correlated over time, and how much there is to explore."""

import math
from numbers import Real

import numpy as np
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_r2vpo.common.distributions import CorrelatedGaussianDistribution
from sb3_r2vpo.common.policies import MlpPolicy


def colored_noise(exponent: float, n_steps: int, *shape: int, device: th.device | str = "cpu") -> th.Tensor:
    """
    Gaussian noise of unit variance whose power falls with frequency: white noise, filtered in the frequency domain.

    At each step the noise is standard normal, whatever the exponent is; the larger it is, the stronger the correlation of
    neighbouring steps. The lowest frequency is that of one period in ``n_steps``; the mean over all steps has the power of
    that one.

    :param exponent: Power is proportional to ``frequency ** -exponent``: 0 for white noise, 1 for pink, 2 for brown
    :param n_steps: Number of steps
    :param shape: Shape of a step's noise, whose numbers are independent of each other
    :param device: Where it is made, from PyTorch's random numbers
    :return: Shape ``(n_steps, *shape)``
    """
    frequencies = th.fft.fftfreq(n_steps, device=device).abs()
    frequencies[0] = 1 / n_steps
    amplitudes = frequencies ** (-exponent / 2)
    amplitudes /= amplitudes.square().mean().sqrt()
    white = th.randn(n_steps, *shape, device=device)
    return th.fft.ifft(th.fft.fft(white, dim=0) * amplitudes.reshape(-1, *(1 for _ in shape)), dim=0).real


def unexplained_variance(rewards: np.ndarray, td_errors: np.ndarray, dones: np.ndarray, gamma: float) -> float:
    """
    Which share of the variance of a rollout's discounted sums of rewards the critic has not predicted.

    The sums are those to the end of the episode or of the rollout, without a bootstrap: SB3's ``explained_variance`` has
    targets that the critic itself is part of, and is high where there has been no reward at all. The critic's prediction of
    such a sum is its value less the discounted value of where the sum ends; the difference is the discounted sum of TD errors.

    :param rewards: Shape ``(n_steps, n_envs)``
    :param td_errors: ``reward + gamma * next_value - value``; shape ``(n_steps, n_envs)``
    :param dones: Whether a step was the last one of its episode; shape ``(n_steps, n_envs)``
    :param gamma: Discount factor
    :return: Between 0 and 1; 1 where all sums are alike, so that there is nothing to predict
    """
    sums = np.stack([rewards, td_errors])
    for step in reversed(range(len(rewards) - 1)):
        sums[:, step] += gamma * (1 - dones[step]) * sums[:, step + 1]
    total, unexplained = sums.var(axis=(1, 2), dtype=np.float64)
    return float(unexplained / total) if unexplained < total else 1.0


def auto_exponent(unexplained: float) -> float:
    """
    The exponent that ``noise_exponent="auto"`` stands for: 1, pink noise, while the critic predicts nothing of the rewards,
    falling to 0, white noise, as it predicts all.

    Pink noise finds rare rewards that white noise does not find in 1M steps, and makes quick corrections harder; so it fades
    as soon as there is something to learn from. Chosen on DM Control (``benchmarks/control/TUNING.md``, step 22).

    :param unexplained: see :func:`unexplained_variance`
    :return: ``unexplained * (1 + unexplained) / 2``
    """
    return unexplained * (1 + unexplained) / 2


class CorrelatedNoise:
    """
    Noise of a Gaussian policy that is correlated over the steps of a rollout.

    :param exponent: ``noise_exponent`` of the algorithm: a number, a schedule, or "auto"
    :raises ValueError: It is negative, not finite, or another string.
    """

    def __init__(self, exponent: float | Schedule | str) -> None:
        number = isinstance(exponent, Real) and 0 <= exponent < math.inf
        if not (number or callable(exponent) or exponent == "auto"):
            raise ValueError(
                f"`noise_exponent` is {exponent!r}; it must be finite and not negative, such as 0.5, a schedule, or 'auto'."
            )
        self.adaptive = exponent == "auto"
        self.schedule = None if self.adaptive else FloatSchedule(exponent)  # type: ignore[arg-type]
        #: White noise needs nothing of all this
        self.is_white = exponent == 0

    def check(self, policy: ActorCriticPolicy) -> None:
        """
        :param policy: A policy
        :raises ValueError: Its actions are not drawn as SB3's Gaussian policies draw them.
        """
        draws_itself = type(policy).forward not in (ActorCriticPolicy.forward, MlpPolicy.forward)
        gaussian = type(policy.action_dist) in (DiagGaussianDistribution, CorrelatedGaussianDistribution)
        if not self.is_white and (draws_itself or not gaussian):
            raise ValueError(
                "`noise_exponent` is for Gaussian policies that act as SB3's: with continuous actions, without `use_sde`, and "
                "without a `forward` of their own."
            )

    def start(
        self, policy: ActorCriticPolicy, n_steps: int, n_envs: int, progress_remaining: float, unexplained: float
    ) -> float:
        """
        Draw the noise of a rollout, and let the policy's distribution take it.

        :param policy: The policy
        :param n_steps: Steps of the rollout
        :param n_envs: Number of environments
        :param progress_remaining: From 1 (start of training) to 0
        :param unexplained: Of the last rollout, see :func:`unexplained_variance`
        :return: The noise's exponent
        """
        exponent = auto_exponent(unexplained) if self.schedule is None else self.schedule(progress_remaining)
        n_actions = policy.action_dist.action_dim  # type: ignore[attr-defined]
        if type(policy.action_dist) is not CorrelatedGaussianDistribution:
            policy.action_dist = CorrelatedGaussianDistribution(n_actions)
        policy.action_dist.start(colored_noise(exponent, n_steps, n_envs, n_actions, device=policy.device))
        return exponent

    def advance(self, policy: ActorCriticPolicy) -> None:
        """
        :param policy: The policy, which has made a step of the rollout
        """
        if isinstance(policy.action_dist, CorrelatedGaussianDistribution):
            policy.action_dist.advance()

    def stop(self, policy: ActorCriticPolicy) -> None:
        """
        :param policy: The policy, whose rollout has ended: its noise is white again
        """
        if isinstance(policy.action_dist, CorrelatedGaussianDistribution):
            policy.action_dist.noise = None
