"""R2VPO's objectives for engines that take a loss by its import path: prime-rl and slime, see ``docs/llm/verl.md``.

The multiplier is fixed: neither gives a loss a place to keep one.
"""

from typing import Any

import torch as th

from sb3_r2vpo.core.multiplier import check_coefficient
from sb3_r2vpo.core.objectives import OBJECTIVES

#: The best one in `benchmarks/llm` for token ratios
VAR_COEF = 0.3


def _losses(
    objective: str, var_coef: float, log_ratio: th.Tensor, advantages: th.Tensor, mask: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """Losses and deviations of the tokens of one response."""
    if objective not in ("r2vpo", "r2vpo_sequence"):
        raise ValueError(f"`objective` is {objective!r}; choose 'r2vpo' or 'r2vpo_sequence'.")
    check_coefficient("var_coef", var_coef)
    options: dict[str, Any] = {"var_coef": var_coef}
    if mask is not None:
        log_ratio = th.where(mask.bool(), log_ratio, 0.0)
        if objective == "r2vpo_sequence":
            options["sequence_log_ratio"] = log_ratio.sum()
    return OBJECTIVES[objective](log_ratio, advantages, **options)


def prime_rl_loss(inputs: Any, objective: str = "r2vpo", var_coef: float = VAR_COEF) -> Any:
    """
    For prime-rl: ``trainer.loss.import_path = "sb3_r2vpo.llm.by_path.prime_rl_loss"``; ``trainer.loss.kwargs`` takes the rest.

    :param inputs: prime-rl's ``LossInputs`` of one response: ``trainer_logprobs``, ``inference_logprobs``, ``advantages``,
        ``loss_mask``, ``loss_weights``
    :param objective: "r2vpo" (default) or "r2vpo_sequence"
    :param var_coef: The multiplier ``lambda``, in units of the advantage
    :return: prime-rl's ``LossOutputs``: the sum over the tokens, which the trainer divides by the number of all tokens
    :raises ValueError: The objective is another one, or the coefficient negative or infinite.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    mask = inputs.loss_mask
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    losses, deviation = _losses(objective, var_coef, log_ratio, inputs.advantages, mask)
    if inputs.loss_weights is not None:
        losses = losses * inputs.loss_weights
    count = mask.sum().clamp(min=1)
    metrics = {
        "ratio_variance": th.where(mask, deviation.square(), 0.0).sum() / count,
        "ratio_max": th.where(mask, deviation, -1.0).max() + 1.0,
    }
    return LossOutputs(loss=th.where(mask, losses, 0.0).sum(), metrics=metrics)


def slime_loss(
    args: Any, batch: dict[str, Any], logits: th.Tensor, sum_of_sample_mean: Any
) -> tuple[th.Tensor, dict[str, Any]]:
    """
    For slime: ``--loss-type custom_loss --custom-loss-function-path sb3_r2vpo.llm.by_path.slime_loss``.

    :param args: slime's arguments. ``r2vpo_objective`` and ``r2vpo_var_coef`` are read from the file of
        ``--custom-config-path``.
    :param batch: Lists with an entry for each response: ``advantages``, ``loss_masks``, ``log_probs`` or, with
        ``--use-rollout-logprobs``, ``rollout_log_probs``, and what slime needs to find the tokens
    :param logits: Of the packed responses
    :param sum_of_sample_mean: slime's way of averaging
    :return: The loss and what is logged
    :raises ValueError: An option of slime's own policy loss is on that this one leaves out; the ratio of whole responses is
        asked for with context parallelism, where no process has a whole one; or the batch has no behaviour log-probabilities.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    objective = getattr(args, "r2vpo_objective", "r2vpo")
    var_coef = getattr(args, "r2vpo_var_coef", VAR_COEF)
    left_out = ("use_kl_loss", "use_opsm", "use_tis", "entropy_coef", "custom_pg_loss_reducer_function_path")
    used = [name for name in left_out if getattr(args, name, None)]
    if used:
        raise ValueError(f"slime_loss leaves out what {used} stand for: turn them off, or pass --loss-type policy_loss.")
    if objective == "r2vpo_sequence" and getattr(args, "context_parallel_size", 1) > 1:
        raise ValueError("r2vpo_sequence needs whole responses: use --context-parallel-size 1, or objective 'r2vpo'.")
    _, computed = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    log_probs = computed["log_probs"]
    behaviour = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    if not behaviour:
        raise ValueError(
            "The batch has no log-probabilities of the policy that generated it, so that all ratios would be one: pass "
            "--use-rollout-logprobs."
        )
    # Of token ratios, slime's average leaves out what is masked; with context parallelism a process has a part of the tokens
    masks = batch["loss_masks"] if objective == "r2vpo_sequence" else [None] * len(log_probs)
    rows = zip(log_probs, behaviour, batch["advantages"], masks, strict=True)
    results = [_losses(objective, var_coef, new - old, advantages, mask) for new, old, advantages, mask in rows]
    losses, deviation = (th.cat(parts) for parts in zip(*results, strict=True))
    loss = sum_of_sample_mean(losses)
    if losses.numel() == 0:
        # Of a process without any tokens, which has to take part in the backward pass
        loss = loss + 0 * logits.sum()
    return loss, {"loss": loss.detach().clone(), "ratio_variance": sum_of_sample_mean(deviation.square())}
