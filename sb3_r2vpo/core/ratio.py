"""The probability ratio from its logarithm: exact near one, finite far from it.

In float32 ``exp`` overflows at a log-ratio of 88 and its square at 44, so every ratio is continued by its tangent beyond
``MAX_LOG_RATIO``. Losses and gradients then stay finite, and keep their direction, for log-ratios up to 100 and far beyond.
"""

import math

import torch as th

#: Log-ratio beyond which the ratio is continued by its tangent. No ratio that a trust region should ever see is changed
#: (``exp(10)`` is 22026), and the gradient of the squared deviation stays small enough (below 1e11 at a log-ratio of 100) for
#: the *square* of its norm, which gradient clipping needs, to be finite in float32.
MAX_LOG_RATIO = 10.0


def in_float32(x: th.Tensor) -> th.Tensor:
    """:return: Half precision in float32; single and double precision as they are"""
    return x.float() if x.dtype in (th.float16, th.bfloat16) else x


def importance_ratio(log_ratio: th.Tensor) -> th.Tensor:
    """
    ``rho = exp(log_ratio)``, continued by its tangent above ``MAX_LOG_RATIO``.

    Clamping there instead would zero the gradient, and so let go of just those samples that have drifted farthest.

    :param log_ratio: Any shape.
    :return: The ratio, same shape; exactly ``exp(log_ratio)`` up to ``MAX_LOG_RATIO``.
    """
    log_ratio = in_float32(log_ratio)
    return th.exp(log_ratio.clamp(max=MAX_LOG_RATIO)) * (1.0 + th.relu(log_ratio - MAX_LOG_RATIO))


def ratio_minus_one(log_ratio: th.Tensor) -> th.Tensor:
    """
    ``rho - 1``, accurate to the last digit near one (``expm1``), continued by its tangent above ``MAX_LOG_RATIO``.

    ``exp(x) - 1`` loses half of float32's digits at ``x = 1e-4``, a usual log-ratio early in an update.

    :param log_ratio: Any shape.
    :return: ``rho - 1``, same shape.
    """
    log_ratio = in_float32(log_ratio)
    excess = th.relu(log_ratio - MAX_LOG_RATIO)
    return th.add(th.expm1(log_ratio - excess), excess, alpha=math.exp(MAX_LOG_RATIO))


def ratio_statistics(log_ratio: th.Tensor) -> dict[str, th.Tensor]:
    """
    What can be reported of ratios, detached, one value per sample.

    :param log_ratio: Any shape.
    :return: ``ratio``, ``ratio_variance`` = ``(rho - 1)^2`` and ``approx_kl`` = ``rho - 1 - log rho``
        (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = log_ratio.detach()
    deviation = ratio_minus_one(log_ratio)
    return {"ratio": deviation + 1.0, "ratio_variance": deviation.square(), "approx_kl": deviation - log_ratio}
