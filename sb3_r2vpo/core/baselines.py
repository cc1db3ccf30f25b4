"""The objectives that R2VPO's paper compares with, and SPO: pure functions of the form in ``sb3_r2vpo.core.objectives``."""

import torch as th

from sb3_r2vpo.core.ratio import importance_ratio, in_float32, ratio_minus_one


def clip_higher(
    log_ratio: th.Tensor, advantages: th.Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[th.Tensor, th.Tensor]:
    """
    Clipped surrogate with a looser upper bound (GRPO-CH), DAPO (https://arxiv.org/abs/2503.14476), whose defaults these are:
    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_low: The ratio is clipped below at ``1 - clip_low``.
    :param clip_high: The ratio is clipped above at ``1 + clip_high``.
    :return: Per-sample loss and deviation.
    """
    ratio = importance_ratio(log_ratio)
    loss = -th.min(advantages * ratio, advantages * th.clamp(ratio, 1 - clip_low, 1 + clip_high))
    return loss, ratio_minus_one(log_ratio.detach())


def ppo_clip(log_ratio: th.Tensor, advantages: th.Tensor, *, clip_range: float = 0.2) -> tuple[th.Tensor, th.Tensor]:
    """
    PPO's clipped surrogate (https://arxiv.org/abs/1707.06347, Eq. 7), also GRPO's:
    ``-min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A)``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_range: PPO's epsilon; 0.2 as in SB3.
    :return: Per-sample loss and deviation.
    """
    return clip_higher(log_ratio, advantages, clip_low=clip_range, clip_high=clip_range)


def gppo(
    log_ratio: th.Tensor, advantages: th.Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradient-preserving clipping, GPPO (https://arxiv.org/abs/2508.07629): the value of the clipped surrogate, but a clipped
    sample keeps a gradient of size ``1 - clip_low`` or ``1 + clip_high`` times ``A grad log pi``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_low: The ratio is clipped below at ``1 - clip_low``.
    :param clip_high: The ratio is clipped above at ``1 + clip_high``.
    :return: Per-sample loss and deviation.
    """
    ratio = importance_ratio(log_ratio)
    # exp(x - sg(x)) is one, and its gradient is that of log pi
    log_prob_gradient = th.exp(in_float32(log_ratio - log_ratio.detach()))
    clipped_ratio = th.clamp(ratio.detach(), 1 - clip_low, 1 + clip_high) * log_prob_gradient
    loss = -th.min(advantages * ratio, advantages * clipped_ratio)
    return loss, ratio_minus_one(log_ratio.detach())


def topr(
    log_ratio: th.Tensor, advantages: th.Tensor, *, sequence_log_ratio: th.Tensor | None = None
) -> tuple[th.Tensor, th.Tensor]:
    """
    Tapered off-policy REINFORCE, TOPR (https://arxiv.org/abs/2503.14286): ``-w A log pi`` with ``w = 1`` for samples to be
    made more likely, and ``w = sg(clip(rho, 0, 1))`` for those to be made less likely.

    ``log_ratio`` stands in for ``log pi`` in the loss: they differ by a constant, the gradient is the same.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``; their sign decides on ``w``.
    :param sequence_log_ratio: Log-ratio that sets ``w``, broadcasting to ``log_ratio``. Pass the sum over the tokens of each
        response for the paper's form; the default, ``None``, takes each sample's own (the token form).
    :return: Per-sample loss and deviation, the latter of the ratio that sets ``w``.
    """
    weight_log_ratio = log_ratio if sequence_log_ratio is None else sequence_log_ratio.expand_as(log_ratio)
    taper = th.exp(in_float32(weight_log_ratio.detach()).clamp(max=0.0))
    weight = th.where(advantages >= 0, th.ones_like(taper), taper)
    loss = -weight * advantages * in_float32(log_ratio)
    return loss, ratio_minus_one(weight_log_ratio.detach())


def topr_token(log_ratio: th.Tensor, advantages: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    TOPR's other form: each token of a response is tapered by its own ratio, not by that of the whole response.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :return: Per-sample loss and deviation.
    """
    return topr(log_ratio, advantages)


def exact_kl(log_ratio: th.Tensor, advantages: th.Tensor, *, kl_coef: float | th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Penalty on KL(pi_b || pi), estimated without bias from samples of ``pi_b``: ``-(rho A) + beta (rho - 1 - log rho)``.

    Close to ``rho = 1`` it agrees with :func:`r2vpo` at ``beta = 2 lambda`` (Proposition 4.1); its pull on the log-ratio
    grows as ``rho`` where R2VPO's grows as ``rho^2``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param kl_coef: ``beta``, in units of the advantage.
    :return: Per-sample loss and deviation.
    """
    deviation = ratio_minus_one(log_ratio)
    loss = -(deviation + 1.0) * advantages + kl_coef * (deviation - log_ratio)
    return loss, deviation.detach()


def spo(log_ratio: th.Tensor, advantages: th.Tensor, *, clip_range: float = 0.2) -> tuple[th.Tensor, th.Tensor]:
    """
    Simple policy optimization, SPO (https://arxiv.org/abs/2401.16025): ``-(rho A) + |A| (rho - 1)^2 / (2 c)``, whose optimum
    for one sample is ``rho = 1 + c sign(A)``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_range: ``c``, the deviation at the optimum; 0.2 as in the paper.
    :return: Per-sample loss and deviation.
    """
    deviation = ratio_minus_one(log_ratio)
    loss = deviation * (advantages.abs() / (2 * clip_range) * deviation - advantages) - advantages
    return loss, deviation.detach()
