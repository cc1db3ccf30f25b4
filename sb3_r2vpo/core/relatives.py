"""
Recent objectives for language models, as pure functions of the form in ``sb3_r2vpo.core.objectives``.

Each follows its paper's equation; where the published codes differ, the docstring says so. Of all of them the gradient at a
ratio of one is the policy gradient, ``-A grad log pi``. Where the paper averages over each response first, that is the
``average`` of the minibatch, such as :func:`~sb3_r2vpo.core.batch.sequence_mean`.

:func:`truncated_importance_sampling` and :func:`masked_importance_sampling` wrap any objective.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch as th

from sb3_r2vpo.core.ratio import importance_ratio, in_float32, ratio_minus_one


def m2po(log_ratio: th.Tensor, advantages: th.Tensor, *, threshold: float = 0.04) -> tuple[th.Tensor, th.Tensor]:
    """
    Second-moment trust policy optimization, M2PO (https://arxiv.org/abs/2510.01161, Algorithm 1): ``-M rho A``, where ``M``
    leaves out samples until the second moment of the log-ratio is within the threshold.

    Only samples that move on in the direction of their advantage can be left out, ``H = {A > 0, rho > 1} + {A < 0, rho < 1}``:
    those with the largest ``(log rho)^2`` first, until the mean of ``(log rho)^2`` over the rest of ``H`` is at most the
    threshold. Of equal ones, later samples are left out first. What is kept is not clipped. The loss of a sample that is left
    out is zero, and the sample still counts where the loss is averaged.

    The samples are those of the call: one minibatch on one device. Padding has a log-ratio of zero, is not in ``H``, and so
    does not count.

    The authors' code solves for a band of log-ratios instead and clips to it; AReaL's masks by the log-ratio between ``pi_b``
    and the policy at the start of the update, over both directions.

    :param log_ratio: Any shape, zero at padding.
    :param advantages: Broadcasts to ``log_ratio``; their sign decides on ``H``.
    :param threshold: ``tau``, largest mean of ``(log rho)^2``; 0.04 in all of the paper's experiments.
    :return: Per-sample loss and deviation.
    """
    detached = in_float32(log_ratio.detach())
    outward = advantages.sign() * detached.sign() > 0
    # Ascending, and all that is not in H behind it
    ordered, order = th.where(outward, detached.square(), math.inf).flatten().sort(stable=True)
    ranks = th.arange(len(ordered), device=ordered.device)
    # The mean over the smallest ones grows with their number
    n_kept = (ordered.cumsum(0) / (ranks + 1) <= threshold).sum()
    kept = th.zeros_like(ordered, dtype=th.bool).scatter(0, order, ranks < n_kept).view_as(outward)
    loss = -importance_ratio(log_ratio) * advantages * (kept | ~outward)
    return loss, ratio_minus_one(log_ratio.detach())


def gspo(
    log_ratio: th.Tensor,
    advantages: th.Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    mean_log_ratio: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Group sequence policy optimization, GSPO (https://arxiv.org/abs/2507.18071):
    ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` with the length-normalised ratio of the response,
    ``s = (pi(y) / pi_b(y))^(1 / |y|)``. All tokens of a response get its loss.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_low: ``s`` is clipped below at ``1 - clip_low``; the paper's value, as is the next. Means over many tokens are
        close to one; samples that are actions of their own need the ranges of :func:`~sb3_r2vpo.core.baselines.clip_higher`.
    :param clip_high: ``s`` is clipped above at ``1 + clip_high``.
    :param mean_log_ratio: ``log s``, the mean over the tokens of each response, broadcasting to ``log_ratio``; ``None`` where
        each sample is an action of its own.
    :return: Per-sample loss and deviation, both of the whole response's ``s``.
    """
    action_log_ratio = log_ratio if mean_log_ratio is None else mean_log_ratio.expand_as(log_ratio)
    ratio = importance_ratio(action_log_ratio)
    loss = -th.min(advantages * ratio, advantages * th.clamp(ratio, 1 - clip_low, 1 + clip_high))
    return loss, ratio_minus_one(action_log_ratio.detach())


def cispo(
    log_ratio: th.Tensor, advantages: th.Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[th.Tensor, th.Tensor]:
    """
    Clipped importance sampling policy optimization, CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585, Eq. 4 and 5):
    ``-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi``. The weight is clipped, no gradient is.

    ``log_ratio`` stands in for ``log pi`` in the loss: they differ by a constant, the gradient is the same. The paper has no
    lower bound, and neither has TRL; verl's default is PPO's 0.2 on both sides.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param clip_low: The weight is clipped below at ``1 - clip_low``; 1, for no lower bound.
    :param clip_high: The weight is clipped above at ``1 + clip_high``. The paper tunes it without naming a value: 4 is the
        upper bound of 5 of ScaleRL (https://arxiv.org/abs/2510.13786).
    :return: Per-sample loss and deviation.
    """
    deviation = ratio_minus_one(log_ratio.detach())
    weight = th.clamp(deviation + 1.0, 1 - clip_low, 1 + clip_high)
    return -weight * advantages * in_float32(log_ratio), deviation


def sapo(
    log_ratio: th.Tensor, advantages: th.Tensor, *, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> tuple[th.Tensor, th.Tensor]:
    """
    Soft adaptive policy optimization, SAPO (https://arxiv.org/abs/2511.20347): ``-(4 / tau) sigmoid(tau (rho - 1)) A``, a
    smooth gate in place of the clip. Its gradient is ``4 p (1 - p) rho A grad log pi`` with ``p`` the sigmoid's value: it is
    largest near one, and fades on both sides.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``; their sign decides on ``tau``.
    :param temperature_pos: ``tau`` of positive advantages; these values are the paper's.
    :param temperature_neg: ``tau`` of the others: a little higher, as they spread probability over many other tokens.
    :return: Per-sample loss and deviation.
    """
    deviation = ratio_minus_one(log_ratio)
    is_positive = (advantages > 0).to(deviation.dtype)
    temperature = temperature_pos * is_positive + temperature_neg * (1.0 - is_positive)
    loss = -4.0 / temperature * th.sigmoid(temperature * deviation) * advantages
    return loss, deviation.detach()


def dppo(
    log_ratio: th.Tensor,
    advantages: th.Tensor,
    *,
    old_log_prob: th.Tensor,
    delta_low: float = 0.15,
    delta_high: float = 0.15,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Divergence proximal policy optimization with the binary total variation, DPPO (https://arxiv.org/abs/2602.04879):
    ``-M rho A``. ``M`` leaves out samples that move on in the direction of their advantage although their *probability* is
    ``delta`` from where it was: a rare token may change its ratio by a lot, a frequent one may not.

    verl truncates ``rho`` at 20 besides, with a gradient through ``log pi`` alone; prime-rl takes a ``delta`` of 0.2 and adds
    ``0.001 (log rho)^2``.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param old_log_prob: ``log pi_b``, of discrete actions or tokens, same shape as ``log_ratio``: a density has no such scale.
    :param delta_low: Left out are samples with ``A < 0`` and ``pi - pi_b < -delta_low``; 0.15 as in the authors' runs.
    :param delta_high: Left out are samples with ``A > 0`` and ``pi - pi_b > delta_high``.
    :return: Per-sample loss and deviation.
    """
    old, detached = in_float32(old_log_prob.detach()), in_float32(log_ratio.detach())
    change = th.exp(old + detached) - th.exp(old)
    kept = th.where(advantages > 0, change <= delta_high, change >= -delta_low)
    loss = -importance_ratio(log_ratio) * advantages * kept
    return loss, ratio_minus_one(detached)


def vespo(
    log_ratio: th.Tensor,
    advantages: th.Tensor,
    *,
    power_pos: float = 2.0,
    decay_pos: float = 3.0,
    power_neg: float = 3.0,
    decay_neg: float = 2.0,
    sequence_log_ratio: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Variational sequence-level soft policy optimization, VESPO (https://arxiv.org/abs/2602.10693):
    ``-sg(w^k exp(lambda (1 - w))) A log pi`` with ``w`` the ratio of the whole response, not normalised by its length. The
    weight is one at ``w = 1``, largest at ``w = k / lambda``, and goes to zero on both sides.

    ``log_ratio`` stands in for ``log pi`` in the loss: they differ by a constant, the gradient is the same.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``; their sign decides on ``k`` and ``lambda``.
    :param power_pos: ``k`` of advantages of zero and above; these four values are TRL's, from the paper.
    :param decay_pos: ``lambda`` of advantages of zero and above.
    :param power_neg: ``k`` of negative advantages.
    :param decay_neg: ``lambda`` of negative advantages.
    :param sequence_log_ratio: ``log w``, the sum over the tokens of each response, broadcasting to ``log_ratio``; ``None``
        where each sample is an action of its own.
    :return: Per-sample loss and deviation, the latter of ``w``.
    """
    log_weight = log_ratio if sequence_log_ratio is None else sequence_log_ratio.expand_as(log_ratio)
    log_weight = in_float32(log_weight.detach())
    deviation = ratio_minus_one(log_weight)
    is_negative = (advantages < 0).to(deviation.dtype)
    power = power_neg * is_negative + power_pos * (1.0 - is_negative)
    decay = decay_neg * is_negative + decay_pos * (1.0 - is_negative)
    weight = th.exp(power * log_weight - decay * deviation)
    return -weight * advantages * in_float32(log_ratio), deviation


def gipo(log_ratio: th.Tensor, advantages: th.Tensor, *, sigma: float = 1.0) -> tuple[th.Tensor, th.Tensor]:
    """
    Gaussian importance sampling policy optimization, GIPO (https://arxiv.org/abs/2603.03955):
    ``-sg(exp(-(log rho / sigma)^2 / 2)) rho A``. Ratios of ``r`` and ``1 / r`` are trusted alike.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param sigma: Standard deviation of the trust weight, in log-ratios; 1 as in the paper's MetaWorld runs.
    :return: Per-sample loss and deviation.
    """
    trust = th.exp(-0.5 * (in_float32(log_ratio.detach()) / sigma).square())
    return -trust * importance_ratio(log_ratio) * advantages, ratio_minus_one(log_ratio.detach())


def dro(
    log_ratio: th.Tensor,
    advantages: th.Tensor,
    *,
    kl_coef: float | th.Tensor = 1.0,
    sequence_log_ratio: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Squared log-ratio: direct reward optimization, DRO (https://arxiv.org/abs/2405.19107), and Kimi k1.5
    (https://arxiv.org/abs/2501.12599): ``-A log pi(y) + beta / 2 (log rho(y))^2`` with ``y`` the whole response. No
    importance weight: it pulls back in proportion to the log-ratio, from both sides, and its optimum is
    ``log rho(y) = A / beta``.

    The loss of a response is spread over its tokens as ``-A log rho_t + beta / 2 log rho_t log rho(y)``. ``log_ratio`` stands
    in for ``log pi``: they differ by a constant, the gradient is the same. DRO also learns a value function; here the
    advantage comes from outside. verl squares each token's own log-ratio: :func:`dro_token`.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param kl_coef: ``beta``, in units of the advantage; the papers' ``tau``. 1: a response of advantage one moves to a ratio
        of e.
    :param sequence_log_ratio: ``log rho(y)``, the sum over the tokens of each response, broadcasting to ``log_ratio``;
        ``None`` where each sample is an action of its own.
    :return: Per-sample loss and deviation, the latter of ``rho(y)``.
    """
    own = in_float32(log_ratio)
    whole = own if sequence_log_ratio is None else in_float32(sequence_log_ratio).expand_as(log_ratio)
    return own * (0.5 * kl_coef * whole - advantages), ratio_minus_one(whole.detach())


def dro_token(log_ratio: th.Tensor, advantages: th.Tensor, *, kl_coef: float | th.Tensor = 1.0) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`dro` for each token of a response by itself, as in verl: ``-A log pi + beta / 2 (log rho)^2``. Kimi K2.5
    (https://arxiv.org/abs/2602.02276) has the same squared term.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param kl_coef: ``beta``, in units of the advantage.
    :return: Per-sample loss and deviation.
    """
    return dro(log_ratio, advantages, kl_coef=kl_coef)


def truncated_importance_sampling(
    objective: Callable[..., tuple[th.Tensor, th.Tensor]], cap: float = 2.0
) -> Callable[..., tuple[th.Tensor, th.Tensor]]:
    """
    Weigh an objective's losses by ``min(pi_b / pi_sampler, cap)``, TIS (https://fengyao.notion.site/off-policy-rl): for
    responses that an inference engine generated whose probabilities are not quite those of the trainer's model.

    :param objective: A function of ``OBJECTIVES``, or a :class:`~sb3_r2vpo.core.policy_loss.PolicyLoss`
    :param cap: Largest weight; 2 as in verl (TRL has 3). Infinite: exact importance sampling.
    :return: The same objective with a further keyword argument ``sampler_log_ratio``: ``log pi_b - log pi_sampler``,
        broadcasting to the log-ratio. Pass sums over the tokens of each response to weigh whole responses. The deviation is
        times the root of the weight: the mean of its square estimates the same variance from the sampler's responses, and is
        what a multiplier's penalty in the weighed loss constrains.
    """
    return _weighted(objective, lambda ratio: ratio.clamp(max=cap))


def masked_importance_sampling(
    objective: Callable[..., tuple[th.Tensor, th.Tensor]], low: float = 0.5, high: float = 5.0
) -> Callable[..., tuple[th.Tensor, th.Tensor]]:
    """
    :func:`truncated_importance_sampling` that leaves out what it can't correct, MIS or IcePop (https://arxiv.org/abs/2510.18855):
    losses are weighed by ``pi_b / pi_sampler`` within the bounds, by zero outside.

    :param objective: As above
    :param low: Smallest ratio that counts; these values are IcePop's.
    :param high: Largest ratio that counts.
    :return: As above
    """
    return _weighted(objective, lambda ratio: ratio * ((ratio >= low) & (ratio <= high)))


def _weighted(
    objective: Callable[..., tuple[th.Tensor, th.Tensor]], weigh: Callable[[th.Tensor], th.Tensor]
) -> Callable[..., tuple[th.Tensor, th.Tensor]]:
    @wraps(objective, assigned=("__doc__",), updated=())
    def weighted(
        log_ratio: th.Tensor, advantages: th.Tensor, *, sampler_log_ratio: th.Tensor, **coefficients: object
    ) -> tuple[th.Tensor, th.Tensor]:
        loss, deviation = objective(log_ratio, advantages, **coefficients)
        weight = weigh(importance_ratio(sampler_log_ratio.detach()))
        return weight * loss, weight.sqrt() * deviation

    return weighted
