"""An objective with its coefficients: R2VPO's, which owns the multiplier and the entropy correction, and the baselines."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_r2vpo.core.multiplier import Multiplier, Schedule, check_coefficient, scheduled
from sb3_r2vpo.core.objectives import OBJECTIVES, entropy_compensation

#: Arguments of the functions that no user gives: the multiplier's value, and a sum over the tokens of a response
_COMPUTED = {"var_coef", "sequence_log_ratio"}


class PolicyLoss:
    """
    A baseline: a function of ``OBJECTIVES`` with its coefficients. R2VPO's is :class:`RatioVarianceLoss`.

    :param name: Key of ``OBJECTIVES``
    :param coefficients: The function's, numbers or schedules; those left out have its defaults
    :raises ValueError: One of the coefficients is missing or unknown.
    """

    def __init__(self, name: str, /, **coefficients: float | Schedule) -> None:
        self.function = OBJECTIVES[name]
        options = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        self.takes_sequence_ratio = any(p.name == "sequence_log_ratio" for p in options)
        known = {p.name for p in options} - _COMPUTED
        required = {p.name for p in options if p.default is p.empty} & known
        if set(coefficients) - known or required - set(coefficients):
            raise ValueError(
                f"The objective {name!r} got `objective_kwargs` {sorted(coefficients)}; "
                f"it takes {sorted(known) or 'none'}, of which it needs {sorted(required) or 'none'}."
            )
        self._coefficients = coefficients
        #: At the current progress of training
        self.coefficients: dict[str, Any] = {}
        #: Of no use to a baseline. Models of any objective have one, so that either loads the other's weights.
        self.multiplier = Multiplier(0.0)

    def follow_schedules(self, progress_remaining: float, as_value: Callable[[float], Any] = float) -> None:
        """
        Set the coefficients to their values at this point of training.

        :param progress_remaining: From 1 (start of training) to 0
        :param as_value: Makes a coefficient of a number. Compiled code needs a tensor: a number would be a constant of it.
        """
        values = {name: scheduled(value, progress_remaining) for name, value in self._coefficients.items()}
        self.coefficients = {name: as_value(value) for name, value in values.items()}

    def __call__(self, log_ratio: th.Tensor, advantages: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param log_ratio: Shape ``(n,)``, or ``(n, n_tokens)`` of responses, with zeros at padding
        :param advantages: Broadcasts to it
        :return: Per-sample loss and deviation ``rho - 1``, see ``sb3_r2vpo.core.objectives``
        """
        if self.takes_sequence_ratio and log_ratio.ndim > 1:
            sequence_log_ratio = log_ratio.sum(-1, keepdim=True)
            return self.function(log_ratio, advantages, sequence_log_ratio=sequence_log_ratio, **self.coefficients)
        return self.function(log_ratio, advantages, **self.coefficients)

    def entropy_bonus(self, ratio_variance: th.Tensor) -> th.Tensor | None:
        """
        :param ratio_variance: Of the minibatch
        :return: What is added to the entropy coefficient; ``None`` for nothing
        """
        return None

    def dual_step(self, ratio_variance: th.Tensor, accepted: th.Tensor | bool) -> None:
        """
        Adapt the multiplier, if there is one.

        :param ratio_variance: Of the minibatch
        :param accepted: Whether the gradient step was made; if not, the multiplier is left as it is
        """

    def logged(self) -> dict[str, float]:
        """:return: The coefficients at the end of an update, by the names that they are logged with"""
        return {name: float(value) for name, value in self.coefficients.items()}


class RatioVarianceLoss(PolicyLoss):
    """
    R2VPO's objective, its multiplier and its entropy correction (Theorem 4.3 and Eq. 10 of the paper).

    :param name: "r2vpo" or "r2vpo_sequence"
    :param var_coef: The multiplier ``lambda``, see :class:`~sb3_r2vpo.core.multiplier.Multiplier`
    :param target_variance: The tolerance ``epsilon``, a number or a schedule
    :param n_actions: Dimensions of a Gaussian policy's actions; ``None`` for other policies, which need no correction
    :param dual_learning_rate: The step size ``eta`` of an adaptive multiplier, per minibatch. 0.02 is small enough for the
        multiplier to hardly move within one update, whose first minibatches have ratios near one and whose last have not.
    :param min_var_coef: Lower bound of an adaptive multiplier; zero (default) is Eq. 10. Above zero, the tolerance is an upper
        bound of the ratio variance and no longer the value that it is driven to.
    :param compensate_entropy: Whether to add :func:`~sb3_r2vpo.core.objectives.entropy_compensation` to the entropy
        coefficient of a Gaussian policy (default). Without it, the constraint itself makes standard deviations fall.
    :raises ValueError: A coefficient is out of its range.
    """

    def __init__(
        self,
        name: str,
        var_coef: float | Schedule | str,
        target_variance: float | Schedule,
        n_actions: int | None = None,
        *,
        dual_learning_rate: float = 0.02,
        min_var_coef: float = 0.0,
        compensate_entropy: bool = True,
    ) -> None:
        super().__init__(name)
        if not callable(target_variance) and not 0 < target_variance < math.inf:
            raise ValueError(
                f"`target_variance` is {target_variance!r}; it must be positive and finite, such as 0.02, a schedule, or "
                "'auto'."
            )
        check_coefficient("dual_learning_rate", dual_learning_rate)
        self.multiplier = Multiplier(var_coef, min_var_coef)
        self.dual_learning_rate = dual_learning_rate
        # Of a whole response, the entropy has no such closed form
        self.n_actions = n_actions if compensate_entropy and name == "r2vpo" else None
        self._target_variance = target_variance

    def follow_schedules(self, progress_remaining: float, as_value: Callable[[float], Any] = float) -> None:
        self.multiplier.follow_schedule(progress_remaining)
        self.coefficients = {"var_coef": self.multiplier.value}
        target_variance = scheduled(self._target_variance, progress_remaining)
        if not 0 <= target_variance < math.inf:
            raise ValueError(f"The `target_variance` schedule returned {target_variance} at {progress_remaining=:.4f}.")
        self.target_variance = th.as_tensor(target_variance, device=self.multiplier.value.device)

    def entropy_bonus(self, ratio_variance: th.Tensor) -> th.Tensor | None:
        if self.n_actions is None:
            return None
        return entropy_compensation(ratio_variance, self.n_actions, var_coef=self.multiplier.value)

    def dual_step(self, ratio_variance: th.Tensor, accepted: th.Tensor | bool) -> None:
        if isinstance(accepted, th.Tensor):
            # Known to the device only: no violation where there was no step
            ratio_variance = th.where(accepted, ratio_variance, self.target_variance)
        elif not accepted:
            return
        self.multiplier.step(ratio_variance, self.target_variance, self.dual_learning_rate)

    def logged(self) -> dict[str, float]:
        adaptive = {"target_variance": float(self.target_variance)} if self.multiplier.adaptive else {}
        return {**super().logged(), **adaptive}


def make_policy_loss(
    name: str,
    var_coef: float | Schedule | str,
    target_variance: float | Schedule,
    n_actions: int | None = None,
    options: dict[str, Any] | None = None,
) -> PolicyLoss:
    """
    :param name: Key of ``OBJECTIVES``
    :param var_coef: Of R2VPO's objectives, see :class:`RatioVarianceLoss`; baselines have no use for it
    :param target_variance: As above
    :param n_actions: As above
    :param options: Further ones of the objective, by name
    :return: The objective with its coefficients
    :raises ValueError: There is no such objective, or one of its options is missing, unknown or out of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"Unknown `objective` {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    options = options or {}
    if not name.startswith("r2vpo"):
        return PolicyLoss(name, **options)
    parameters = inspect.signature(RatioVarianceLoss).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if set(options) - known:
        raise ValueError(f"The objective {name!r} got `objective_kwargs` {sorted(options)}; it takes {sorted(known)}.")
    return RatioVarianceLoss(name, var_coef, target_variance, n_actions, **options)
