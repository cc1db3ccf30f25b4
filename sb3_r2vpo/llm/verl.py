"""R2VPO's objectives as policy losses of verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=r2vpo`` or ``r2vpo_sequence``.

verl imports this module by itself, through the entry point ``verl.plugins``. Coefficients are those of
:class:`R2VPOPolicyLossConfig`, which the command line has to name, see ``docs/llm/verl.md``.
"""

from dataclasses import dataclass
from typing import Any

import torch as th

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.workers.config import PolicyLossConfig
except ModuleNotFoundError as error:
    message = f"sb3_r2vpo.llm.verl needs {error.name}, an extra: pip install 'sb3-r2vpo[verl]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from sb3_r2vpo.core import token_mean
from sb3_r2vpo.core.policy_loss import RatioVarianceLoss


@dataclass
class R2VPOPolicyLossConfig(PolicyLossConfig):
    """
    verl's ``policy_loss`` with R2VPO's coefficients.

    :param loss_mode: "r2vpo" (default), or "r2vpo_sequence", whose ratio is that of a whole response
    :param var_coef: The multiplier ``lambda``, in units of the advantage. A number (default 0.3, the best one in
        ``benchmarks/llm``) fixes it. "auto_0.3" adapts it, in each process by itself: verl gives a loss its micro-batch and no
        process group, and has no place in its checkpoints for it, so that a resumed run starts from 0.3 again.
    :param target_variance: The tolerance ``epsilon`` of an adaptive multiplier. 0.016 is the best one in ``benchmarks/llm``
        for "r2vpo"; for "r2vpo_sequence" that is 0.5.
    :param dual_learning_rate: The step size ``eta`` of an adaptive multiplier, per optimizer step
    """

    loss_mode: str = "r2vpo"
    var_coef: float | str = 0.3
    target_variance: float = 0.016
    dual_learning_rate: float = 0.02


def _ratio_variance_loss(name: str, config: Any) -> RatioVarianceLoss:
    """The objective with its multiplier, which lives as long as the worker's configuration does."""
    loss = vars(config).get("_r2vpo")
    if loss is None:
        # With verl's own `PolicyLossConfig`, the defaults
        options = {key: config.get(key, getattr(R2VPOPolicyLossConfig, key)) for key in ("var_coef", "target_variance")}
        eta = config.get("dual_learning_rate", R2VPOPolicyLossConfig.dual_learning_rate)
        loss = RatioVarianceLoss(name, **options, dual_learning_rate=eta)
        # Not by `setattr`, of which an OmegaConf configuration would make a key
        vars(config)["_r2vpo"] = loss
    return loss


def _policy_loss(
    name: str,
    old_log_prob: th.Tensor,
    log_prob: th.Tensor,
    advantages: th.Tensor,
    response_mask: th.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: th.Tensor | None = None,
) -> tuple[th.Tensor, dict[str, Any]]:
    """
    :param name: Of the objective
    :param old_log_prob: Log-probabilities of the policy that generated the tokens, shape ``(n, n_tokens)``
    :param log_prob: Those of the current policy
    :param advantages: The same shape
    :param response_mask: The same shape
    :param loss_agg_mode: How verl averages
    :param config: The actor's configuration
    :param rollout_is_weights: verl's weights for the mismatch of its inference engine, which multiply the losses; not to be
        used where ``old_log_prob`` already is the inference engine's
    :return: The loss of a micro-batch, and what is logged
    """
    objective = _ratio_variance_loss(name, config.policy_loss)
    objective.multiplier.to(log_prob.device)
    objective.follow_schedules(1.0)
    mask = response_mask.bool()
    log_ratio = th.where(mask, log_prob - old_log_prob, 0.0)
    # A copy, as the dual step comes before the backward pass
    objective.coefficients = {"var_coef": objective.multiplier.value.clone()}
    losses, deviation = objective(log_ratio, advantages)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)

    ratio_variance = token_mean(deviation.square(), mask)
    if objective.multiplier.adaptive:
        # The micro-batch's share of the tokens of an optimizer step: the shares of its steps add up to one step of Eq. 10
        share = agg_loss(th.ones_like(losses), response_mask, "token-mean", **config.global_batch_info)
        target = objective.target_variance
        objective.multiplier.step(target + (ratio_variance - target) * share, target, objective.dual_learning_rate)
    return loss, {
        "actor/ppo_kl": token_mean(-log_ratio.detach(), mask).item(),
        "actor/ratio_variance": ratio_variance.item(),
        "actor/ratio_max": deviation.max().item() + 1.0,
        "actor/var_coef": objective.coefficients["var_coef"].item(),
    }


@register_policy_loss("r2vpo")
def r2vpo(*args: Any, **kwargs: Any) -> tuple[th.Tensor, dict[str, Any]]:
    """:func:`sb3_r2vpo.core.objectives.r2vpo` as a policy loss of verl; arguments as in its other losses"""
    return _policy_loss("r2vpo", *args, **kwargs)


@register_policy_loss("r2vpo_sequence")
def r2vpo_sequence(*args: Any, **kwargs: Any) -> tuple[th.Tensor, dict[str, Any]]:
    """:func:`sb3_r2vpo.core.objectives.r2vpo_sequence` as a policy loss of verl"""
    return _policy_loss("r2vpo_sequence", *args, **kwargs)
