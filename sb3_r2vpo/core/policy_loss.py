"""An objective with its coefficients: R2VPO's, which owns the multiplier and the entropy correction, and the baselines."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch as th

from sb3_r2vpo.core.multiplier import Multiplier, Schedule, check_coefficient, scheduled
from sb3_r2vpo.core.objectives import OBJECTIVES, entropy_compensation
from sb3_r2vpo.core.ratio import in_float32

#: Arguments of the functions for the log-ratio of a whole response: its sum and its mean over the tokens
_OF_RESPONSES = ("sequence_log_ratio", "mean_log_ratio")

#: Arguments of the functions that no user gives
_COMPUTED = {"var_coef", "old_log_prob", *_OF_RESPONSES}

#: Coefficients that something is divided by
_DIVISORS = {"clip_range", "sigma", "temperature_pos", "temperature_neg"}

#: Range against which ``train/clip_fraction`` is counted of objectives that do not clip: SB3 PPO's default.
PPO_CLIP_RANGE = 0.2


class PolicyLoss:
    """
    A baseline: a function of ``OBJECTIVES`` with its coefficients. R2VPO's is :class:`RatioVarianceLoss`.

    :param name: Key of ``OBJECTIVES``
    :param coefficients: The function's, numbers or schedules; those left out have its defaults
    :raises ValueError: One of the coefficients is missing, unknown or out of its range.
    """

    def __init__(self, name: str, /, **coefficients: float | Schedule) -> None:
        self.function = OBJECTIVES[name]
        options = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        names = {p.name for p in options}
        #: The function's argument for the log-ratio of a whole response; ``None``, where it takes those of tokens only
        self.response_argument = next((name for name in _OF_RESPONSES if name in names), None)
        self.takes_old_log_prob = "old_log_prob" in names
        known = names - _COMPUTED
        required = {p.name for p in options if p.default is p.empty} & known
        if set(coefficients) - known or required - set(coefficients):
            raise ValueError(
                f"The objective {name!r} got `objective_kwargs` {sorted(coefficients)}; "
                f"it takes {sorted(known) or 'none'}, of which it needs {sorted(required) or 'none'}."
            )
        for option, value in coefficients.items():
            if not callable(value):
                check_coefficient(option, value)
                if option in _DIVISORS and value == 0:
                    raise ValueError(f"`{option}` of the objective {name!r} is {value!r}; it must be positive.")
        self._coefficients = coefficients
        self._defaults = {p.name: p.default for p in options if p.name in known}
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

    @property
    def clip_range(self) -> tuple[Any, Any]:
        """How far below and above one the objective clips the ratio; PPO's default where it has no such coefficients."""
        values = self._defaults | self.coefficients
        either = values.get("clip_range", PPO_CLIP_RANGE)
        return values.get("clip_low", either), values.get("clip_high", either)

    def __call__(
        self,
        log_ratio: th.Tensor,
        advantages: th.Tensor,
        *,
        mask: th.Tensor | None = None,
        old_log_prob: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param log_ratio: Shape ``(n,)``, or ``(n, n_tokens)`` of responses
        :param advantages: Broadcasts to it
        :param mask: Shape of ``log_ratio``, boolean or 0/1: which entries are no padding; log-ratios elsewhere do not count.
            ``None``, if all are to count. Lengths of responses are read from it.
        :param old_log_prob: Log-probabilities under the behaviour policy, of the shape of ``log_ratio``; DPPO needs them
        :return: Per-sample loss and deviation ``rho - 1``, see ``sb3_r2vpo.core.objectives``
        :raises ValueError: The objective needs ``old_log_prob``.
        """
        if mask is not None:
            log_ratio = th.where(mask.bool(), log_ratio, 0.0)
        arguments = dict(self.coefficients)
        if self.response_argument is not None and log_ratio.ndim > 1:
            arguments[self.response_argument] = self._of_responses(log_ratio, mask)
        if self.takes_old_log_prob:
            if old_log_prob is None:
                raise ValueError(f"The objective {self.function.__name__!r} needs `old_log_prob`, a keyword argument.")
            arguments["old_log_prob"] = old_log_prob
        return self.function(log_ratio, advantages, **arguments)

    def action_log_ratio(self, log_ratio: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        """
        Log-ratios of what is an action to the objective, for statistics: of whole responses, where it takes their ratios
        (GSPO's is the mean over the tokens), else of tokens or steps.

        :param log_ratio: As above
        :param mask: As above
        :return: One dimension, without padding and without responses that are empty
        """
        counted = None if mask is None else mask.bool()
        if self.response_argument is not None and log_ratio.ndim > 1:
            if counted is not None:
                log_ratio, counted = th.where(counted, log_ratio, 0.0), counted.any(-1)
            log_ratio = self._of_responses(log_ratio, mask).squeeze(-1)
        return log_ratio.flatten() if counted is None else log_ratio[counted]

    def _of_responses(self, log_ratio: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """:return: Sum or mean over the tokens of each response, as the function takes it, shape ``(n, 1)``"""
        total = in_float32(log_ratio).sum(-1, keepdim=True)
        if self.response_argument == "sequence_log_ratio":
            return total
        return total / (log_ratio.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1))

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
    :raises ValueError: There is no such objective, it is not one for these actions, or one of its options is missing, unknown
        or out of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"Unknown `objective` {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    options = options or {}
    if not name.startswith("r2vpo"):
        policy_loss = PolicyLoss(name, **options)
        if n_actions is not None and policy_loss.takes_old_log_prob:
            raise ValueError(
                f"The objective {name!r} compares probabilities of tokens or discrete actions; continuous actions have none, "
                "only a density. Choose another `objective`."
            )
        return policy_loss
    parameters = inspect.signature(RatioVarianceLoss).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if set(options) - known:
        raise ValueError(f"The objective {name!r} got `objective_kwargs` {sorted(options)}; it takes {sorted(known)}.")
    return RatioVarianceLoss(name, var_coef, target_variance, n_actions, **options)
