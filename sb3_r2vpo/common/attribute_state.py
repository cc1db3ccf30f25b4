"""The state of an object that is in its plain attributes."""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_r2vpo.common.random_state import bit_generator, random_state

NUMBERS = (type(None), bool, int, float, complex, str, bytes, np.generic)
#: Objects within wrappers and environments that are captured as these are, by their attributes
KNOWN_PARTS = ("RunningMeanStd", "StackedObservations")
#: Attributes that are not state: what is captured by itself, arguments, time of day, and tables that never change
SKIPPED = {
    *("env", "venv", "envs", "spec", "metadata", "class_attributes", "render_mode", "t_start", "reset_infos", "waiting"),
    *("closed", "P", "_cached_spec", "_metadata", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"),
}


class NotCapturedError(ValueError):
    """The state of an environment can't be captured; the message says why."""


def get_attributes(owner: Any, besides: Collection[str] = ()) -> dict[str, Any]:
    """
    :param owner: An object
    :param besides: Attributes to leave out
    :return: Its plain attributes, copied; the states of its random generators; its parts, the same way
    :raises NotCapturedError: Another attribute is neither of these nor of a kind that does not change.
    """
    state: dict[str, Any] = {"values": {}, "generators": {}, "parts": {}}
    for name, value in vars(owner).items():
        if name in SKIPPED or name in besides or _is_not_state(value):
            continue
        if isinstance(value, np.random.Generator | np.random.RandomState):
            state["generators"][name] = _generator_state(value)
        elif isinstance(value, spaces.Space):
            generators = {str(i): s._np_random for i, s in enumerate(_subspaces(value)) if s._np_random is not None}
            if generators:
                state["generators"][name] = {key: _generator_state(generator) for key, generator in generators.items()}
        elif _is_part(value):
            state["parts"][name] = {"": get_attributes(value)}
        elif isinstance(value, dict) and value and all(map(_is_part, value.values())):
            state["parts"][name] = {key: get_attributes(part) for key, part in value.items()}
        else:
            try:
                state["values"][name] = _copy(value)
            except NotCapturedError as error:
                raise NotCapturedError(f"Attribute `{name}` of {type(owner).__name__} holds a {error}.") from None
    return state


def set_attributes(owner: Any, state: dict[str, Any]) -> None:
    """
    :param owner: An object of the same class
    :param state: From :func:`get_attributes`
    :raises ValueError: The state names a method.
    """
    attributes = vars(owner)
    for name, value in state["values"].items():
        if callable(getattr(type(owner), name, None)) or name in SKIPPED:
            raise ValueError(f"`{name}` is no attribute of {type(owner).__name__} that could be restored.")
        attributes[name] = _copy(value)
    for name, generator in state["generators"].items():
        current = attributes.get(name)
        if isinstance(current, spaces.Space):
            subspaces = list(_subspaces(current))
            for index, subspace_generator in generator.items():
                subspaces[int(index)]._np_random = _restored_generator(None, subspace_generator)
        else:
            attributes[name] = _restored_generator(current, generator)
    for name, parts in state["parts"].items():
        for key, part in parts.items():
            set_attributes(attributes[name] if key == "" else attributes[name][key], part)


def _is_not_state(value: Any) -> bool:
    """Whether a value is a function, a class, a file, a window: nothing that a later step depends on and that can change."""
    if callable(value) or isinstance(value, EnvSpec | ResultsWriter | VecEnv | gym.Env):
        return True
    # The parts of an environment that are captured by themselves, and what draws it
    return type(value).__module__.startswith(("pygame", "dm_control.", "minatar.", "mujoco."))


def _is_part(value: Any) -> bool:
    return isinstance(value, RunningMeanStd | StackedObservations) or type(value).__name__ in KNOWN_PARTS


def _copy(value: Any) -> Any:
    """
    A copy of a plain value.

    :raises NotCapturedError: It is of another type, which the message names.
    """
    kind = type(value)
    if isinstance(value, NUMBERS):
        return value
    if kind is np.ndarray and value.dtype != object:
        return value.copy(order="K")
    if kind in (list, tuple, set, frozenset, deque):
        # Most lists are of numbers, and long
        items = value if {*map(type, value)} <= {bool, int, float, str} else map(_copy, value)
        return deque(items, value.maxlen) if isinstance(value, deque) else kind(items)
    if kind in (dict, OrderedDict):
        return kind((_copy(key), _copy(item)) for key, item in value.items())
    raise NotCapturedError(f"{kind.__module__}.{kind.__qualname__}")


def _subspaces(space: spaces.Space) -> Iterator[spaces.Space]:
    yield space
    children = getattr(space, "spaces", ())
    for child in children.values() if isinstance(children, dict) else children:
        yield from _subspaces(child)


def _generator_state(generator: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
    if isinstance(generator, np.random.RandomState):
        return _copy(generator.get_state(legacy=False))
    return _copy(generator.bit_generator.state)


def _restored_generator(current: Any, state: dict[str, Any]) -> Any:
    """A generator in a state: the current one if it is of that kind, as several objects may share it."""
    restored = random_state(state) if "gauss" in state else np.random.Generator(bit_generator(state))
    if isinstance(current, np.random.RandomState) and isinstance(restored, np.random.RandomState):
        current.set_state(state)
        return current
    if isinstance(current, np.random.Generator) and isinstance(restored, np.random.Generator):
        # Another kind of bit generator does not take the state
        if type(current.bit_generator) is not type(restored.bit_generator):
            return restored
        current.bit_generator.state = state
        return current
    return restored
