"""The statistics of ``VecNormalize`` in a file that can run no code, with the returns that SB3 leaves out."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import check_shape_equal
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_r2vpo.common.archive import CorruptFileError, PathOrFile, describe, write_archive
from sb3_r2vpo.common.replay_file import read_value

#: Of the environments that are wrapped, or made with them
_OF_THE_ENVIRONMENTS = {"reset_infos", "_seeds", "_options", "metadata", "render_mode", "num_envs", "venv", "class_attributes"}
_NUMBERS = ("clip_obs", "clip_reward", "gamma", "epsilon")
_FLAGS = ("training", "norm_obs", "norm_reward")
_NEEDED = {*_NUMBERS, *_FLAGS, "observation_space", "action_space", "norm_obs_keys", "ret_rms", "old_reward"}


def save_normalization(vec_normalize: VecNormalize, path: PathOrFile) -> None:
    """
    Save what ``VecNormalize.save`` does, and the discounted returns of the running episodes, without which training does not
    go on as it would have. Complete or not at all, with checksums.

    :param vec_normalize: The wrapper
    :param path: Where to save it
    :raises ValueError: It can't be written.
    """
    state = {name: value for name, value in vars(vec_normalize).items() if name not in _OF_THE_ENVIRONMENTS}
    write_archive(path, {"normalization": {"class": type(vec_normalize), "state": state}})


def load_normalization(path: PathOrFile, venv: VecEnv, trust: bool = False) -> VecNormalize:
    """
    Load a file of :func:`save_normalization`, or a pickle of ``VecNormalize.save``, which has no checksums.

    :param path: The file
    :param venv: The environments to wrap. If there are as many as before, their returns go on; else these begin at zero.
    :param trust: Whether to import and unpickle whatever the file asks for, which may run any code
    :return: The wrapper
    :raises CorruptFileError: The file is damaged, or another one.
    :raises UntrustedError: It names a class that is not on the list.
    :raises ValueError: The environments have other observations.
    """
    loaded = read_value(path, "normalization", trust)
    try:
        if isinstance(loaded, VecNormalize):
            cls, state = type(loaded), vars(loaded)
        else:
            cls, state = loaded["class"], loaded["state"]
        state = {name: value for name, value in state.items() if name not in _OF_THE_ENVIRONMENTS}
        _check(cls, state)
    except Exception as error:
        raise CorruptFileError(
            f"{describe(path)} is damaged, or holds no VecNormalize ({error}). Load an older copy, such as that of the "
            "checkpoint before it."
        ) from error
    try:
        check_shape_equal(state["observation_space"], venv.observation_space)
    except AssertionError as error:
        raise ValueError(f"{describe(path)} is of other environments: {error}") from error
    returns = state.pop("returns", None)
    wrapper = cls.__new__(cls)
    VecEnvWrapper.__init__(wrapper, venv, state["observation_space"], state["action_space"])
    vars(wrapper).update(state)
    fits = isinstance(returns, np.ndarray) and returns.shape == (venv.num_envs,)
    wrapper.returns = returns if fits else np.zeros(venv.num_envs)
    return wrapper


def _check(cls: Any, state: dict[str, Any]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, VecNormalize)):
        raise ValueError(f"it is of {cls}")
    if missing := sorted(_NEEDED - state.keys()):
        raise ValueError(f"it lacks {missing}")
    if not (isinstance(state["observation_space"], spaces.Space) and isinstance(state["action_space"], spaces.Space)):
        raise ValueError("its spaces are none")
    if wrong := [name for name in _FLAGS if type(state[name]) is not bool]:
        raise ValueError(f"{wrong} are not True or False")
    if wrong := [name for name in _NUMBERS if not (np.isscalar(state[name]) and state[name] >= 0)]:
        raise ValueError(f"{wrong} are not numbers")
    statistics: dict[str, tuple[Any, Any]] = {"rewards": (state["ret_rms"], ())}
    if state["norm_obs"]:
        space: Any = state["observation_space"]
        of_observations = state["obs_rms"]
        if isinstance(of_observations, dict):
            if of_observations.keys() != set(state["norm_obs_keys"]):
                raise ValueError("it lacks statistics")
            statistics |= {f"observations {key}": (rms, space[key].shape) for key, rms in of_observations.items()}
        else:
            statistics["observations"] = of_observations, space.shape
    for name, (rms, shape) in statistics.items():
        if type(rms) is not RunningMeanStd or not (np.shape(rms.mean) == np.shape(rms.var) == shape):
            raise ValueError(f"the statistics of {name} have another shape")
        if not (np.isfinite(rms.mean).all() and np.isfinite(rms.var).all() and np.min(rms.var) >= 0 and rms.count > 0):
            raise ValueError(f"the statistics of {name} are NaN, infinite or negative")
