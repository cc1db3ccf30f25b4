"""The Lagrange multiplier of the ratio-variance constraint: a constant, a schedule, or adapted by dual ascent."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch as th
from torch import nn

Schedule = Callable[[float], float]

#: Initial value of an adaptive multiplier unless "auto_<value>" says otherwise, in units of normalised advantage.
DEFAULT_INITIAL_VAR_COEF = 1.0

#: Largest constraint violation that one dual step acts upon. A single ratio of ``exp(10)`` would otherwise add millions to a
#: multiplier that comes down again by no more than ``eta * epsilon`` a step; one is already far outside any trust region.
MAX_VIOLATION = 1.0


def scheduled(value: float | Schedule, progress_remaining: float) -> float:
    """
    :param value: A number, or a schedule of the remaining progress
    :param progress_remaining: From 1 (start of training) to 0; below 0, where the last rollout overshoots the total number of
        steps, a schedule stays at its end
    :return: The value at this point of training
    """
    return float(value(max(0.0, progress_remaining))) if callable(value) else float(value)


def check_coefficient(name: str, value: Any) -> None:
    """
    :param name: Of an argument
    :param value: Its value
    :raises ValueError: It is not a finite number of at least zero.
    """
    if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
        raise ValueError(f"`{name}` is {value!r}; it must be a number, finite and not negative.")


def _initial_value(var_coef: str) -> float:
    """The initial value in "auto" or "auto_<value>", as in SAC's ``ent_coef``."""
    prefix, separator, number = var_coef.partition("_")
    try:
        value = float(number) if separator else DEFAULT_INITIAL_VAR_COEF
    except ValueError:
        value = math.nan
    if prefix != "auto" or not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"`var_coef` is {var_coef!r}; a string must be 'auto', or 'auto_<value>' with the multiplier's initial value, "
            "finite and not negative, such as 'auto_0.5'. Pass a number or a schedule to fix the multiplier."
        )
    return value


class Multiplier(nn.Module):
    """
    The multiplier ``lambda`` of R2VPO's Lagrangian (Theorem 4.3).

    It is a module so that its value is saved, restored and moved between devices with the model's other tensors.

    :param var_coef: A number or a schedule of the remaining progress fixes the multiplier; "auto" adapts it from
        ``DEFAULT_INITIAL_VAR_COEF``, "auto_0.5" from 0.5.
    :param minimum: Lower bound of an adaptive multiplier, from its initial value on; zero (default) is Eq. 10.
    :raises ValueError: ``var_coef`` is negative, infinite or NaN, or a string that is not "auto..."; ``minimum`` is negative,
        infinite or NaN.
    """

    value: th.Tensor

    def __init__(self, var_coef: float | Schedule | str = "auto", minimum: float = 0.0) -> None:
        super().__init__()
        check_coefficient("min_var_coef", minimum)
        self.minimum = minimum
        self.adaptive = isinstance(var_coef, str)
        self.fixed: float | Schedule | None = None
        initial_value = 0.0
        if isinstance(var_coef, str):
            initial_value = max(minimum, _initial_value(var_coef))
        elif callable(var_coef) or (isinstance(var_coef, Real) and math.isfinite(var_coef) and var_coef >= 0):
            self.fixed = var_coef
        else:
            raise ValueError(
                f"`var_coef` is {var_coef!r}; it must be a finite number that is not negative, a schedule, or 'auto'."
            )
        self.register_buffer("value", th.tensor(initial_value, dtype=th.float32))

    def follow_schedule(self, progress_remaining: float) -> None:
        """
        Set a fixed multiplier to its schedule's value; an adaptive one is left as it is.

        :param progress_remaining: From 1 (start of training) to 0. The last rollout may overshoot the total number of steps
            and make it negative; the multiplier is kept at zero or above, as a negative one would reward variance.
        :raises ValueError: The schedule returned NaN or infinity.
        """
        if self.fixed is None:
            return
        value = scheduled(self.fixed, progress_remaining)
        if not math.isfinite(value):
            raise ValueError(f"The `var_coef` schedule returned {value} at progress_remaining={progress_remaining:.4f}.")
        self.value.fill_(max(0.0, value))

    def set_value(self, value: th.Tensor) -> None:
        """
        Let an adaptive multiplier go on from a value; a fixed one is left as it is.

        :param value: A scalar
        """
        if self.adaptive:
            self.value.copy_(value.clamp(min=self.minimum))

    def step(self, ratio_variance: th.Tensor, target_variance: float | th.Tensor, learning_rate: float) -> None:
        """
        One step of dual ascent, Eq. 10: ``lambda <- max(minimum, lambda + eta (V - epsilon))``; a fixed multiplier is left as
        it is.

        The violation ``V - epsilon`` counts for at most ``MAX_VIOLATION``.

        :param ratio_variance: ``V``, the minibatch's mean of ``(rho - 1)^2``, a scalar.
        :param target_variance: ``epsilon``.
        :param learning_rate: ``eta``, in units of normalised advantage per unit of variance.
        """
        if self.adaptive:
            violation = (ratio_variance.detach() - target_variance).clamp(max=MAX_VIOLATION)
            self.value.add_(violation, alpha=learning_rate).clamp_(min=self.minimum)

    def extra_repr(self) -> str:
        return f"value={self.value.item():.4g}, adaptive={self.adaptive}"
