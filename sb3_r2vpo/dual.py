"""The multiplier of the ratio-variance constraint: a constant, a schedule, or adapted by dual ascent."""

import math
from numbers import Real

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import nn

#: Initial value of an adaptive multiplier unless "auto_<value>" says otherwise, in units of normalised advantage.
DEFAULT_INITIAL_VAR_COEF = 1.0

#: Largest constraint violation that one dual step acts upon. A single ratio of ``exp(10)`` would otherwise add millions to a
#: multiplier that comes down again by no more than ``eta * epsilon`` a step; one is already far outside any trust region.
MAX_VIOLATION = 1.0


def default_target_variance(action_space: spaces.Space) -> float:
    """
    The tolerance that ``target_variance="auto"`` stands for: ``0.01 * sqrt(n_actions)``.

    A Gaussian policy that moves each of its means by ``d`` standard deviations has a ratio variance of about
    ``n_actions * d**2``: one tolerance for all tasks would be a long step where there is one action, and a short one where
    there are many. Ratios that PPO's clip at 0.2 holds grow with the root only (0.007 to 0.015 with one action, 0.02 with
    two, 0.03 to 0.04 with six, measured on DM Control, see ``benchmarks/control``), and so does this tolerance.

    :param action_space: The environment's
    :return: The tolerance; of whole responses of a language model, that of one action
    """
    n_actions = 1 if getattr(action_space, "rollout_buffer_class", None) else get_action_dim(action_space)
    return 0.01 * math.sqrt(n_actions)


def _parse_initial_value(var_coef: str) -> float:
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


class DualVariable(nn.Module):
    """
    The multiplier ``lambda`` of R2VPO's Lagrangian (Theorem 4.3).

    It is a module so that its value is saved, restored and moved between devices with the model's other tensors.

    :param var_coef: A number or a schedule of the remaining progress fixes the multiplier; "auto" adapts it from
        ``DEFAULT_INITIAL_VAR_COEF``, "auto_0.5" from 0.5.
    :param minimum: What an adaptive multiplier never falls below, from its initial value on.
    :raises ValueError: ``var_coef`` is negative, infinite or NaN, or a string that is not "auto..."; ``minimum`` is negative,
        infinite or NaN.
    """

    value: th.Tensor

    def __init__(self, var_coef: float | Schedule | str = "auto", minimum: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(minimum) and minimum >= 0):
            raise ValueError(f"`min_var_coef` is {minimum}; it must be finite and not negative.")
        self.minimum = minimum
        self.adaptive = isinstance(var_coef, str)
        self.schedule: FloatSchedule | None = None
        initial_value = 0.0
        if isinstance(var_coef, str):
            initial_value = max(minimum, _parse_initial_value(var_coef))
        elif callable(var_coef):
            self.schedule = FloatSchedule(var_coef)
        elif isinstance(var_coef, Real) and math.isfinite(var_coef) and var_coef >= 0:
            self.schedule = FloatSchedule(float(var_coef))
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
        if self.schedule is None:
            return
        value = self.schedule(progress_remaining)
        if not math.isfinite(value):
            raise ValueError(f"The `var_coef` schedule returned {value} at progress_remaining={progress_remaining:.4f}.")
        self.value.fill_(max(0.0, value))

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
