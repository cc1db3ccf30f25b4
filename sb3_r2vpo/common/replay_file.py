"""Reading stored rollouts, and whether they are rollouts that a model can learn from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_r2vpo.common.archive import CorruptFileError, PathOrFile, decode_section, describe, opened, read_zip, sections_of
from sb3_r2vpo.common.rollout import Rollout, RolloutReplayBuffer, Timeouts
from sb3_r2vpo.common.unpickling import UntrustedError, safe_loads

if TYPE_CHECKING:
    from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm


def read_value(path: PathOrFile, section: str, trust: bool, suffix: str | None = None) -> Any:
    """
    :param path: An archive, or a pickle that SB3's code has written
    :param section: Of the archive
    :param trust: see :func:`~sb3_r2vpo.common.serialization.decode`
    :param suffix: Added to the path where there is no such file without it
    :return: The section's value, or what was pickled
    :raises CorruptFileError: The file is damaged, or another one.
    :raises UntrustedError: It names a class or function that is not on the list.
    """
    where = describe(path)
    with opened(path, suffix) as file:
        start = file.read(2)
        file.seek(-len(start), 1)
        # Zip archives begin so; pickles do not
        if start == b"PK":
            sections = sections_of(read_zip(file, where), where)
            if section not in sections:
                raise CorruptFileError(f"{where} holds {sorted(sections)}, not {section}.")
            return decode_section(path, *sections[section], trust)
        data = file.read()
    try:
        return safe_loads(data, trust)
    except UntrustedError as error:
        raise UntrustedError(f"{where}: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"{where} can't be read: {error}") from error


def read_replay(path: PathOrFile, trust: bool) -> Iterable[Rollout]:
    """
    :param path: A file of ``save_replay_buffer``
    :param trust: see :func:`read_value`
    :return: Its rollouts
    :raises ValueError: see :func:`read_value`; or it holds something else.
    """
    loaded = read_value(path, "replay_buffer", trust, "pkl")
    if not isinstance(loaded, RolloutReplayBuffer):
        raise ValueError(
            f"{describe(path)} holds a {type(loaded).__name__}, not a RolloutReplayBuffer of `save_replay_buffer`."
        )
    return vars(loaded).get("rollouts", [None])


def fitting(rollouts: Iterable[Rollout], model: "RatioVarianceAlgorithm | Any", where: str) -> list[Rollout]:
    """
    :param rollouts: As they were stored
    :param model: The model that is to learn from them
    :param where: The file, for errors
    :return: The rollouts, on the model's device
    :raises ValueError: They are of other spaces, or of another kind of buffer.
    :raises CorruptFileError: They lack something.
    """
    expected, checked = model.rollout_buffer, []
    try:
        for rollout in rollouts:
            buffer = rollout.buffer
            theirs, ours = ((given.observation_space, given.action_space) for given in (buffer, model))
            if theirs != ours:
                raise ValueError(
                    f"{where} holds rollouts of {theirs[0]} and {theirs[1]}, "
                    f"but this model's spaces are {ours[0]} and {ours[1]}."
                )
            if type(buffer) is not type(expected):
                raise ValueError(
                    f"{where} holds rollouts of a {type(buffer).__name__}, but this model has a {type(expected).__name__}: "
                    "another algorithm has saved them."
                )
            if type(rollout) is not Rollout or not _is_whole(rollout, vars(expected)):
                raise TypeError("a rollout lacks something, or has it in another shape")
            buffer.device = model.device
            checked.append(rollout)
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{where} is damaged: {error}. Load an older copy, or go on without it.") from error
    return checked


def _is_whole(rollout: Rollout, expected: dict[str, Any]) -> bool:
    """Whether a rollout has all that one collected now would have."""
    buffer, timeouts = vars(rollout.buffer), rollout.timeouts
    n_steps, n_envs = buffer["buffer_size"], buffer["n_envs"]
    if not (buffer["generator_ready"] is True and type(timeouts) is Timeouts and type(rollout.fixed) is bool):
        return False
    steps = [*timeouts.steps, *timeouts.envs]
    if not (len(timeouts.steps) == len(timeouts.envs) == len(timeouts.observations) == len(timeouts.values)):
        return False
    ratio = n_steps * n_envs / (expected["buffer_size"] * expected["n_envs"])

    def alike(ours: Any, theirs: Any) -> bool:
        if isinstance(ours, dict):
            return ours.keys() == theirs.keys() and all(alike(ours[key], theirs[key]) for key in ours)
        if not isinstance(ours, np.ndarray):
            return True
        return isinstance(theirs, np.ndarray) and theirs.dtype == ours.dtype and theirs.size == round(ours.size * ratio)

    last = rollout.last_obs.values() if isinstance(rollout.last_obs, dict) else [rollout.last_obs]
    return (
        all(type(step) is int and 0 <= step < n_steps for step in steps[: len(timeouts)])
        and all(type(env) is int and 0 <= env < n_envs for env in steps[len(timeouts) :])
        and all(len(array) == n_envs for array in (*last, rollout.last_dones))
        and all(alike(value, buffer[name]) for name, value in expected.items())
    )
