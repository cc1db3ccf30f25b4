"""Arguments of :class:`~sb3_r2vpo.llm.trl.R2VPOTrainer`."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from sb3_r2vpo.core.policy_loss import PolicyLoss, make_policy_loss

#: How TRL averages the tokens of a batch. Its other loss types are objectives of their own.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")

#: Tolerances of responses and of tokens that were the best ones in `benchmarks/llm`
SEQUENCE_TARGET_VARIANCE, TARGET_VARIANCE = 0.5, 0.016


@dataclass
class R2VPOConfig(GRPOConfig):
    """
    Arguments of :class:`R2VPOTrainer`: those of TRL's ``GRPOConfig``, and R2VPO's.

    What belongs to other objectives (``epsilon``, ``epsilon_high``, ``delta``) has no effect.

    :param objective: "r2vpo" (default), "r2vpo_sequence", whose ratio is that of a whole response, or another one of
        ``sb3_r2vpo.core.OBJECTIVES``
    :param var_coef: The multiplier ``lambda``, in units of the advantage: a number fixes it, "auto_0.3" (default) adapts it
        from 0.3. There is one for all processes.
    :param target_variance: The tolerance ``epsilon`` of an adaptive multiplier; ``None`` (default) for 0.016, or 0.5 with
        "r2vpo_sequence", the best ones in ``benchmarks/llm``.
    :param objective_kwargs: Further options, such as ``{"dual_learning_rate": 0.02}``; see
        :class:`~sb3_r2vpo.core.policy_loss.RatioVarianceLoss`
    :param replay_capacity: Number of generated batches to sample from, of which the oldest is dropped; the paper's number is
        4. The default is 1, on-policy: TRL's own passes over the newest batch.
    :param utd_ratio: How many batches' worth of responses to train on for each generated batch: the paper's name for
        ``num_iterations``, which it sets
    :param num_iterations: As in TRL. The default is 2, the paper's UTD ratio, and not TRL's 1, with which all ratios would be
        one.
    :param vllm_importance_sampling_correction: Must stay off: the ratios are those to the policy that vLLM sampled from.
    :param use_bias_correction_kl: Must stay off: TRL's KL penalty (``beta``) is without a ratio here.
    :raises ValueError: An option is out of its range or has no meaning here, or every ratio would be one.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective_kwargs"]  # noqa: RUF012 (no field of the data class)

    objective: str = field(default="r2vpo", metadata={"help": "'r2vpo', 'r2vpo_sequence' or another objective."})
    # With `None` for the sake of the command line, which would otherwise take numbers only
    var_coef: float | str | None = field(
        default="auto_0.3", metadata={"help": "Multiplier: a number, or 'auto_<initial value>'."}
    )
    target_variance: float | None = field(default=None, metadata={"help": "Tolerance of an adaptive multiplier."})
    objective_kwargs: dict | str | None = field(default=None, metadata={"help": "Further options of the objective, as JSON."})
    replay_capacity: int = field(default=1, metadata={"help": "Generated batches to sample from; 1 is on-policy."})
    utd_ratio: int | None = field(default=None, metadata={"help": "The paper's name for num_iterations."})
    num_iterations: int = field(default=2, metadata={"help": "Passes for each generated batch; the UTD ratio."})
    vllm_importance_sampling_correction: bool = field(default=False, metadata={"help": "Must stay off."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Must stay off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.utd_ratio is not None:
            self.num_iterations = self.utd_ratio
        for name in ("replay_capacity", "num_iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"`loss_type` is {self.loss_type!r}, an objective of its own. R2VPO takes only the way of averaging from it: "
                f"choose one of {', '.join(LOSS_TYPES)}."
            )
        if self.importance_sampling_level != "token":
            raise ValueError("For ratios of whole responses pass objective='r2vpo_sequence', not `importance_sampling_level`.")
        if self.off_policy_mask_threshold is not None:
            raise ValueError(
                "R2VPO pulls stale responses back instead of masking them: leave `off_policy_mask_threshold` out."
            )
        if self.vllm_importance_sampling_correction:
            raise ValueError(
                "With R2VPO the ratio is taken to the policy that vLLM sampled from: a second correction would count the "
                "mismatch twice. Leave `vllm_importance_sampling_correction` off."
            )
        if self.use_bias_correction_kl:
            raise ValueError("R2VPO gives TRL's KL penalty no ratio to be multiplied by: leave `use_bias_correction_kl` off.")
        n_minibatches: Any = self.steps_per_generation  # which `GRPOConfig` has set by now
        one_step = n_minibatches * self.num_iterations <= self.gradient_accumulation_steps
        if one_step and self.replay_capacity == 1 and not self.use_vllm:
            raise ValueError(
                f"There is one optimizer step for each generated batch (steps_per_generation={self.steps_per_generation}, "
                f"num_iterations={self.num_iterations}, gradient_accumulation_steps={self.gradient_accumulation_steps}), so "
                "that all ratios would be one and R2VPO's penalty zero. Raise `num_iterations` or `steps_per_generation`, or "
                "pass a `replay_capacity` above 1."
            )
        self.policy_loss()

    def policy_loss(self) -> PolicyLoss:
        """:return: The objective with its coefficients and its multiplier"""
        var_coef: Any = self.var_coef
        target_variance = self.target_variance
        # The command line gives strings. What is no number either is for `make_policy_loss` to refuse
        with suppress(ValueError, TypeError):
            var_coef = float(var_coef)
        if target_variance is None:
            target_variance = SEQUENCE_TARGET_VARIANCE if self.objective == "r2vpo_sequence" else TARGET_VARIANCE
        options: Any = self.objective_kwargs
        return make_policy_loss(self.objective, var_coef, target_variance, options=options)
