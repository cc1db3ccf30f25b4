"""Policy objectives in ratio space, as pure functions: R2VPO's own, and the registry of all.

The objectives that the paper compares with are in ``baselines.py``, newer ones for language models in ``relatives.py``. Every
function has the form ``objective(log_ratio, advantages, *, <coefficients>) -> (loss, deviation)``:

- ``log_ratio``: ``log pi(a|s) - log pi_b(a|s)``, any shape. ``pi_b`` is the policy that generated the sample.
- ``advantages``: same shape, or one that broadcasts to it (one advantage for all tokens of a response).
- ``loss``: to be minimised, one value per sample, of the shape of ``log_ratio``. Neither reduced nor masked.
- ``deviation``: ``rho - 1``, detached, same shape; of the response's ratio where the objective takes that one. The mean of its
  square is the variance estimate of Proposition 4.1, and :func:`~sb3_r2vpo.core.ratio.ratio_statistics` tells what else
  follows from it.

Some functions take more than the samples' own log-ratios, in keyword arguments that are no coefficients:

- ``sequence_log_ratio``, ``mean_log_ratio``: sum and mean of the log-ratio over the tokens of each response, broadcasting to
  ``log_ratio``. By default (``None``) each sample is an action of its own.
- ``old_log_prob``: ``log pi_b(a|s)``, where probabilities themselves are compared.

:class:`~sb3_r2vpo.core.policy_loss.PolicyLoss` passes them to functions that have such an argument.

Half-precision inputs are computed, and returned, in float32. A NaN is passed through, never replaced: the caller has to refuse
it.
"""

from collections.abc import Callable

import torch as th

from sb3_r2vpo.core.baselines import clip_higher, exact_kl, gppo, ppo_clip, spo, topr, topr_token
from sb3_r2vpo.core.ratio import ratio_minus_one
from sb3_r2vpo.core.ratio import ratio_statistics as ratio_statistics
from sb3_r2vpo.core.relatives import cispo, dppo, dro, dro_token, gipo, gspo, m2po, sapo, vespo

Objective = Callable[..., tuple[th.Tensor, th.Tensor]]


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

    **Responses that the policy has left behind are neither trained nor pulled back.** The gradient of the loss with respect to
    the log-ratio is ``-rho (A - 2 lambda (rho - 1))``. Below ``rho = 1`` its size is at most ``rho (|A| + 2 lambda)``: 4.5e-5
    ``(|A| + 2 lambda)`` at a log-ratio of -10, 6e-16 ``(|A| + 2 lambda)`` at -35. (In float32 it is exactly zero from -18 on,
    where ``rho - 1`` rounds to -1.) This is the paper's objective, and is left as it is: such a response adds as little to
    ``E_b[rho A]``, and a variance under ``pi_b`` counts it as one, however far it is gone. Sums over tokens get there sooner
    than single tokens: 128 tokens of -0.27 each make -35. Some old or long responses then no longer teach anything, yet each
    adds one to the sum whose mean the multiplier holds; ``ess`` and ``approx_kl``, of whole responses here, show it. Replay
    fewer rollouts then, or use :func:`r2vpo`, in whose reach each token stays for longer, or an objective that pulls back from
    below, :func:`~sb3_r2vpo.core.relatives.dro` or :func:`~sb3_r2vpo.core.baselines.exact_kl`.

    :param log_ratio: Any shape.
    :param advantages: Broadcasts to ``log_ratio``.
    :param var_coef: ``lambda``, in units of the advantage.
    :param sequence_log_ratio: The sum over the tokens of each response, broadcasting to ``log_ratio``; ``None`` where each
        sample is an action of its own, and this is :func:`r2vpo`.
    :return: Per-sample loss and deviation, both of the whole response's ratio.
    """
    action_log_ratio = log_ratio if sequence_log_ratio is None else sequence_log_ratio.expand_as(log_ratio)
    return r2vpo(action_log_ratio, advantages, var_coef=var_coef)


#: The functions by the names that ``R2VPO(objective=...)`` takes.
OBJECTIVES: dict[str, Objective] = {
    function.__name__: function
    for function in (
        *(r2vpo, r2vpo_sequence),
        *(ppo_clip, clip_higher, gppo, topr, topr_token, exact_kl, spo),
        *(m2po, gspo, cispo, sapo, dppo, vespo, gipo, dro, dro_token),
    )
}
