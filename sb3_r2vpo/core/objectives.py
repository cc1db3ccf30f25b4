"""Policy objectives in ratio space, as pure functions. R2VPO's own is :func:`r2vpo`; the others are baselines.

Every function has the form ``objective(log_ratio, advantages, *, <coefficients>) -> (loss, deviation)``:

- ``log_ratio``: ``log pi(a|s) - log pi_b(a|s)``, any shape. ``pi_b`` is the policy that generated the sample.
- ``advantages``: same shape, or one that broadcasts to it (one advantage for all tokens of a response).
- ``loss``: to be minimised, one value per sample, of the shape of ``log_ratio``. Neither reduced nor masked.
- ``deviation``: ``rho - 1``, detached, same shape. The mean of its square is the variance estimate of Proposition 4.1, and
  :func:`ratio_statistics` tells what else follows from it.

Half-precision inputs are computed, and returned, in float32. In float32 ``exp`` overflows at a log-ratio of 88 and its
square at 44, so every ratio is continued by its tangent beyond ``MAX_LOG_RATIO``: see :func:`ratio_minus_one`. Loss and
gradient then stay finite, and keep their direction, for log-ratios up to 100 and far beyond. A NaN is passed through,
never replaced: the caller has to refuse it.
"""

import math
from collections.abc import Callable

import torch as th

Objective = Callable[..., tuple[th.Tensor, th.Tensor]]

#: Log-ratio beyond which the ratio is continued by its tangent. No ratio that a trust region should ever see is changed
#: (``exp(10)`` is 22026), and the gradient of the squared deviation stays small enough (below 1e11 at a log-ratio of 100) for
#: the *square* of its norm, which gradient clipping needs, to be finite in float32.
MAX_LOG_RATIO = 10.0


def _in_float32(x: th.Tensor) -> th.Tensor:
    return x.float() if x.dtype in (th.float16, th.bfloat16) else x


def importance_ratio(log_ratio: th.Tensor) -> th.Tensor:
    """
    ``rho = exp(log_ratio)``, continued by its tangent above ``MAX_LOG_RATIO``.

    Clamping there instead would zero the gradient, and so let go of just those samples that have drifted farthest.

    :param log_ratio: Any shape.
    :return: The ratio, same shape; exactly ``exp(log_ratio)`` up to ``MAX_LOG_RATIO``.
    """
    log_ratio = _in_float32(log_ratio)
    return th.exp(log_ratio.clamp(max=MAX_LOG_RATIO)) * (1.0 + th.relu(log_ratio - MAX_LOG_RATIO))


def ratio_minus_one(log_ratio: th.Tensor) -> th.Tensor:
    """
    ``rho - 1``, accurate to the last digit near one (``expm1``), continued by its tangent above ``MAX_LOG_RATIO``.

    ``exp(x) - 1`` loses half of float32's digits at ``x = 1e-4``, a usual log-ratio early in an update.

    :param log_ratio: Any shape.
    :return: ``rho - 1``, same shape.
    """
    log_ratio = _in_float32(log_ratio)
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


def r2vpo(log_ratio: th.Tensor, advantages: th.Tensor, *, var_coef: float | th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Ratio-variance regularized objective, R2VPO Theorem 4.3: ``-(rho A) + lambda (rho - 1)^2``.

    Its gradient is ``-rho grad log pi (A - 2 lambda (rho - 1))``: nothing is cut off, the advantage is reduced in
    proportion to the deviation, and the optimum of one sample is ``rho = 1 + A / (2 lambda)``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param var_coef: ``lambda``, in units of the advantage.
    :return: Per-sample loss and deviation.
    """
    deviation = ratio_minus_one(log_ratio)
    # -rho A + lambda (rho - 1)^2 with rho = 1 + deviation, multiplied out: fewer operations, and no digit of a small deviation
    # is lost in a sum with one
    loss = deviation * (var_coef * deviation - advantages) - advantages
    return loss, deviation.detach()


def entropy_compensation(ratio_variance: th.Tensor, n_actions: int, *, var_coef: float | th.Tensor) -> th.Tensor:
    """
    The entropy coefficient that cancels the pull of :func:`r2vpo`'s penalty on the entropy of a Gaussian policy.

    The ratio variance is not even-handed about the spread. A Gaussian that moves its means by ``d`` standard deviations and
    scales all of these by ``s`` has ``E[rho^2] = (s^2 (2 - s^2))^(-n/2) exp(d^2 / (2 - s^2))``, which is least below
    ``s = 1``: its slope there is ``2 d^2 E[rho^2]``, about ``2 V``. So wherever the policy moves, the penalty narrows it, by a
    gradient of ``2 lambda V`` on the logarithm of its ``n`` standard deviations, although nothing speaks for less
    exploration. (KL(pi || pi_b) has no such pull, and KL(pi_b || pi) one that widens.) The entropy's gradient is ``n``: with
    the coefficient ``2 lambda V / n`` the two cancel.

    :param ratio_variance: ``V``, the minibatch's mean of ``(rho - 1)^2``. It counts for at most 1: more is outliers, not a
        step.
    :param n_actions: ``n``, number of the policy's action dimensions.
    :param var_coef: ``lambda``.
    :return: The coefficient, a scalar, to be added to the entropy bonus's own.
    """
    return 2 * var_coef * ratio_variance.clamp(max=1.0) / n_actions


def r2vpo_sequence(
    log_ratio: th.Tensor,
    advantages: th.Tensor,
    *,
    var_coef: float | th.Tensor,
    sequence_log_ratio: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`r2vpo` with whole responses for actions: both ``rho A`` and the constraint take the ratio ``pi(y) / pi_b(y)`` of the
    response, the product of its tokens' ratios, which is the exact importance weight of its reward.

    All tokens of a response get the loss of the response: they stop being pushed once the response as a whole has moved to
    ``1 + A / (2 lambda)``, where :func:`r2vpo` lets each uncertain token move that far.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param var_coef: ``lambda``, in units of the advantage.
    :param sequence_log_ratio: The sum over the tokens of each response, broadcasting to ``log_ratio``; ``None`` where each
        sample is an action of its own, and this is :func:`r2vpo`.
    :return: Per-sample loss and deviation, both of the whole response's ratio.
    """
    action_log_ratio = log_ratio if sequence_log_ratio is None else sequence_log_ratio.expand_as(log_ratio)
    return r2vpo(action_log_ratio, advantages, var_coef=var_coef)


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
    log_prob_gradient = th.exp(_in_float32(log_ratio - log_ratio.detach()))
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
    :return: Per-sample loss and deviation.
    """
    weight_log_ratio = log_ratio if sequence_log_ratio is None else sequence_log_ratio
    taper = th.exp(_in_float32(weight_log_ratio.detach()).clamp(max=0.0))
    weight = th.where(advantages >= 0, th.ones_like(taper), taper)
    loss = -weight * advantages * _in_float32(log_ratio)
    return loss, ratio_minus_one(log_ratio.detach())


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
    return r2vpo(log_ratio, advantages, var_coef=advantages.abs() / (2 * clip_range))


#: The functions by the names that ``R2VPO(objective=...)`` takes.
OBJECTIVES: dict[str, Objective] = {
    "r2vpo": r2vpo,
    "r2vpo_sequence": r2vpo_sequence,
    "ppo_clip": ppo_clip,
    "clip_higher": clip_higher,
    "gppo": gppo,
    "topr": topr,
    "topr_token": topr_token,
    "exact_kl": exact_kl,
    "spo": spo,
}
