"""Noise of exploration that is correlated over time."""

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
