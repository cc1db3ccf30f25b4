"""Checks of arguments, made before anything is changed."""

import math
import sys
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import FloatSchedule

from sb3_r2vpo.core.multiplier import Schedule, scheduled

#: Whole numbers that are arguments of an algorithm, with the least value of each
WHOLE_NUMBERS = {
    "n_steps": 1,
    "batch_size": 1,
    "n_epochs": 1,
    "replay_capacity": 1,
    "_stats_window_size": 1,
    "sde_sample_freq": -1,
    "seed": 0,
}
#: Numbers, with the interval of each
NUMBERS = {"gamma": (0.0, 1.0), "gae_lambda": (0.0, 1.0), "vf_coef": (0.0, math.inf)}
#: Numbers that may be schedules, with the least value of each
SCHEDULES = {"learning_rate": 0.0, "ent_coef": -math.inf}
FLAGS = ("normalize_advantage", "use_sde", "compile")
MAPPINGS = ("objective_kwargs", "critic_kwargs", "policy_kwargs", "rollout_buffer_kwargs")


def is_number(value: object) -> bool:
    """:return: Whether a value is a number of Python's or NumPy's: ``True`` and ``False`` are not"""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _as_float(value: Any) -> float:
    """A number as Python's own; NaN for what is no number, or too large for a float."""
    try:
        return float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.nan


def check_whole_number(name: str, value: Any, minimum: int = 1) -> int:
    """
    :param name: Name of an argument
    :param value: Its value
    :param minimum: The least value that it may have
    :return: The value, as Python's own number
    :raises ValueError: It is not a whole number of at least ``minimum``, or larger than lists can be.
    """
    if not (is_number(value) and isinstance(value, Integral) and minimum <= int(value) <= sys.maxsize):
        bound = f" and at most {sys.maxsize}" if is_number(value) and value > sys.maxsize else ""
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number, at least {minimum}{bound}.")
    return int(value)


def check_number(name: str, value: Any, minimum: float = 0.0, maximum: float = math.inf) -> float:
    """
    :param name: Name of an argument
    :param value: Its value
    :param minimum: The least value that it may have
    :param maximum: The largest one
    :return: The value, as Python's own number
    :raises ValueError: It is not a number, not finite, or out of its range.
    """
    number = _as_float(value)
    if not (math.isfinite(number) and minimum <= number <= maximum):
        bounds = [f"at least {minimum:g}"] * math.isfinite(minimum) + [f"at most {maximum:g}"] * math.isfinite(maximum)
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number{', ' * bool(bounds)}{' and '.join(bounds)}.")
    return number


def check_positive(name: str, value: Any, otherwise: str = "", maximum: float = sys.float_info.max) -> float:
    """
    :param name: Name of an argument
    :param value: Its value
    :param otherwise: What else it may be, for the message
    :param maximum: The largest value that it may have; by default all but infinity
    :return: The value, as Python's own number
    :raises ValueError: It is not a number, or out of its range.
    """
    number = _as_float(value)
    if not 0 < number <= maximum:
        finite = "" if maximum == math.inf else " and finite"
        raise ValueError(f"`{name}` is {value!r}; it must be positive{finite}{otherwise}.")
    return number


def check_flag(name: str, value: Any) -> None:
    """
    :param name: Name of an argument
    :param value: Its value
    :raises ValueError: It is not ``True`` or ``False`` (0 and 1 are): every string, also "False", would count as true.
    """
    if not isinstance(value, bool | np.bool_ | Integral) or value not in (0, 1):
        raise ValueError(f"`{name}` is {value!r}; it must be True or False.")


class CheckedSchedule:
    """
    A schedule whose values are checked where they are asked for: one NaN would otherwise be found in a gradient.

    :param name: Name of the argument
    :param schedule: The schedule; what it raises passes through unchanged
    :param minimum: The least value that it may return
    """

    def __init__(self, name: str, schedule: Schedule, minimum: float = 0.0) -> None:
        # SB3's own wrapper makes a TypeError of a value that is no number
        schedule = schedule.value_schedule if isinstance(schedule, FloatSchedule) else schedule
        self.name, self.schedule, self.minimum = name, schedule, minimum

    def __repr__(self) -> str:
        return repr(self.schedule)

    def __call__(self, progress_remaining: float) -> float:
        """
        :param progress_remaining: From 1 (start of training) to 0; below 0, where the last rollout overshoots the total number
            of steps, the schedule stays at its end: the Zoo's linear ones would go below zero
        :return: Its value
        :raises ValueError: It is not a number, not finite, or too small.
        """
        progress_remaining = max(0.0, progress_remaining)
        value: Any = self.schedule(progress_remaining)
        # Tensors and arrays of one number are taken, as SB3 does by `float`
        number = np.asarray(value) if hasattr(value, "__array__") else value
        if not (is_number(value) or (isinstance(number, np.ndarray) and number.size == 1 and number.dtype.kind in "iuf")):
            raise ValueError(f"The schedule of `{self.name}` returned {value!r} at {progress_remaining=:.4f}, not a number.")
        number = float(number.item() if isinstance(number, np.ndarray) else number)
        if not (math.isfinite(number) and number >= self.minimum):
            least = f" of at least {self.minimum:g}" if math.isfinite(self.minimum) else ""
            raise ValueError(
                f"The schedule of `{self.name}` returned {number} at {progress_remaining=:.4f}; it must return a finite number"
                f"{least}. No step was made with it."
            )
        return number


def number_or_schedule(name: str, value: Any, minimum: float = 0.0) -> float | CheckedSchedule:
    """
    :param name: Name of an argument
    :param value: Its value
    :param minimum: The least value that it may have
    :return: Python's own number, or a schedule that is checked whenever it is asked
    :raises ValueError: It is neither a number nor a schedule, not finite, or too small.
    """
    if callable(value):
        return CheckedSchedule(name, value, minimum)
    if not is_number(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a number or a schedule.")
    return check_number(name, value, minimum)


def evaluate_argument(name: str, value: Any, progress_remaining: float) -> float:
    """
    :param name: Key of ``SCHEDULES``
    :param value: A number or a schedule
    :param progress_remaining: From 1 (start of training) to 0
    :return: The value at this point of training
    :raises ValueError: see :func:`number_or_schedule` and :class:`CheckedSchedule`
    """
    return scheduled(number_or_schedule(name, value, SCHEDULES[name]), progress_remaining)


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space, flattens: bool = True) -> None:
    """
    Refuse spaces for which SB3 has no code, or sends actions that are not in them: SB3's PPO notices that late or never.

    :param observation_space: The environment's
    :param action_space: The environment's
    :param flattens: Whether observations are flattened, as all of SB3's feature extractors do
    :raises ValueError: One of the spaces is not supported; the message says how to convert it.
    """
    _check_space("action", action_space)
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    if not parts:
        raise ValueError("The observation space is an empty Dict; there is nothing to learn from. Add a constant, if need be.")
    for key, part in parts.items():
        name = f"observation[{key!r}]" if key else "observation"
        if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise ValueError(
                f"The {name} space is {part}, which SB3's networks do not take: flatten it, for instance by "
                "`gymnasium.wrappers.FlattenObservation`."
            )
        _check_space(name, part)
        if flattens and part.shape == () and isinstance(part, spaces.Box):
            raise ValueError(
                f"The {name} space is {part}, a number without a dimension: make it one of shape (1,), for instance by "
                "`gymnasium.wrappers.FlattenObservation`."
            )


def _check_space(name: str, space: spaces.Space) -> None:
    if np.any(getattr(space, "start", 0) != np.zeros(1)):
        raise ValueError(
            f"The {name} space is {space}; SB3's networks and actions count from 0. Shift it in a wrapper, such as "
            f"`gymnasium.wrappers.Transform{'Action' if name == 'action' else 'Observation'}`."
        )
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
        raise ValueError(f"The {name} space has {space.nvec.ndim} dimensions, {space.nvec.tolist()}: flatten it in a wrapper.")
    if 0 in (space.shape or ()):
        raise ValueError(f"The {name} space is {space}, of shape {space.shape}: it holds no number.")


def check_arguments(model: Any) -> None:
    """
    Check the arguments that need no other object, and turn NumPy's numbers into Python's, as PyTorch, ``deque`` and SB3's
    schedules refuse them.

    :param model: An algorithm, whose attributes they are
    :raises ValueError: One of them is of another type, or out of its range; nothing has been changed.
    """
    for name in FLAGS:
        check_flag(name, getattr(model, name))
    for name in MAPPINGS:
        if not isinstance(value := getattr(model, name), Mapping | None):
            raise ValueError(f"`{name}` is {value!r}; it must be a dict, or None.")
        for key in value or ():
            if not isinstance(key, str):
                raise ValueError(f"`{name}` has the key {key!r}; its keys must be names of options.")
    for name, number in _checked_numbers(model).items():
        if type(getattr(model, name)) is not type(number):
            setattr(model, name, number)


def _checked_numbers(model: Any) -> dict[str, float | None]:
    """The arguments that are numbers, by the names of the attributes."""
    numbers: dict[str, float | None] = {}
    for name, minimum in WHOLE_NUMBERS.items():
        value = getattr(model, name)
        optional = name == "seed" and value is None
        numbers[name] = None if optional else check_whole_number(name.lstrip("_"), value, minimum)
    for name, interval in NUMBERS.items():
        numbers[name] = check_number(name, getattr(model, name), *interval)
    for name, least in SCHEDULES.items():
        number = number_or_schedule(name, getattr(model, name), least)
        if not callable(number):
            numbers[name] = number
    numbers["utd_ratio"] = check_positive("utd_ratio", model.utd_ratio)
    for name in ("max_grad_norm", "target_kl"):
        value = getattr(model, name)
        numbers[name] = None if value is None else check_positive(name, value, ", or None for no limit", math.inf)
    return numbers


def check_batch_size(batch_size: int, n_steps: int, n_envs: int, normalize_advantage: bool, warn: bool = True) -> None:
    """
    Refuse what would make normalised advantages NaN, warn of truncated minibatches; as SB3's PPO does.

    :param batch_size: Steps in a minibatch
    :param n_steps: Steps of each environment in a rollout
    :param n_envs: Number of environments
    :param normalize_advantage: Whether advantages are normalised
    :param warn: Whether to warn
    :raises AssertionError: A minibatch has one step, and advantages are normalised.
    """
    buffer_size = n_envs * n_steps
    if normalize_advantage:
        assert batch_size > 1, (
            "`batch_size` must be greater than 1 to normalize advantages. "
            "See https://github.com/DLR-RM/stable-baselines3/issues/440"
        )
        assert buffer_size > 1, (
            "`n_steps * n_envs` must be greater than 1 to normalize advantages. "
            f"Currently n_steps={n_steps} and n_envs={n_envs}"
        )
    truncated = buffer_size % batch_size
    if truncated > 0 and warn:
        warnings.warn(
            f"With n_steps={n_steps} and n_envs={n_envs}, a rollout has {buffer_size} steps, so that after every "
            f"{buffer_size // batch_size} minibatches of size {batch_size}, "
            f"there will be a truncated mini-batch of size {truncated}. "
            "We recommend using a `batch_size` that is a factor of `n_steps * n_envs`."
        )
