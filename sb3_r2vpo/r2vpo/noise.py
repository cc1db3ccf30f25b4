"""Noise of exploration that is correlated over time, and how much there is to explore."""

import numpy as np
import torch as th


def colored_noise(exponent: float, n_steps: int, *shape: int, device: th.device | str = "cpu") -> th.Tensor:
    """
    Gaussian noise of unit variance whose power falls with frequency: white noise, filtered in the frequency domain.

    At each step the noise is standard normal, whatever the exponent is; neighbouring steps are the more alike the larger it
    is. The lowest frequency is that of one period in ``n_steps``; the mean over all steps has the power of that one.

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
    Which share of the variance of a rollout's discounted sums of rewards the critic has not foreseen.

    The sums are those to the end of the episode or of the rollout, without a bootstrap: SB3's ``explained_variance`` has
    targets that the critic itself is part of, and is high where there has been no reward at all. What the critic says of
    such a sum is its value less the discounted value of where the sum ends; the difference is the discounted sum of TD errors.

    :param rewards: Shape ``(n_steps, n_envs)``
    :param td_errors: ``reward + gamma * next_value - value``; shape ``(n_steps, n_envs)``
    :param dones: Whether a step was the last one of its episode; shape ``(n_steps, n_envs)``
    :param gamma: Discount factor
    :return: Between 0 and 1; 1 where all sums are alike, so that there is nothing to foresee
    """
    sums = np.stack([rewards, td_errors])
    for step in reversed(range(len(rewards) - 1)):
        sums[:, step] += gamma * (1 - dones[step]) * sums[:, step + 1]
    total, unexplained = sums.var(axis=(1, 2), dtype=np.float64)
    return float(unexplained / total) if unexplained < total else 1.0


def auto_exponent(unexplained: float) -> float:
    """
    The exponent that ``noise_exponent="auto"`` stands for: from 1, pink noise, to half of what the critic leaves unexplained.

    Pink noise finds rewards that white noise does not in 1M steps, and costs what has to be done within a few steps; so it
    goes as soon as there is something to learn from. Chosen on DM Control (``benchmarks/control/TUNING.md``, step 22).

    :param unexplained: see :func:`unexplained_variance`
    :return: ``unexplained * (1 + unexplained) / 2``
    """
    return unexplained * (1 + unexplained) / 2
