"""
The state of environments as plain values, from which they go on bit by bit.

An environment with methods ``get_state`` and ``set_state`` of its own is asked these. Of the others, Gymnasium's classic
control, toy text and MuJoCo environments, DM Control's suite through Shimmy, and MinAtar are known, and all wrappers whose
attributes are plain values (numbers, strings, arrays, containers of these). An attribute of any other kind is no reason to
guess: :class:`NotCapturedError` names it.
"""

import sys
import warnings
from collections.abc import Iterator
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

from sb3_r2vpo.common.attribute_state import NotCapturedError, get_attributes, set_attributes
from sb3_r2vpo.common.finite import CheckedEnv
from sb3_r2vpo.common.mujoco_state import get_mujoco_state, set_mujoco_state
from sb3_r2vpo.common.serialization import encode

#: Where environments come from whose whole state is in plain attributes
KNOWN_MODULES = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.", "minatar.")
#: Attributes of simulated environments that lead to the simulator, whose state is captured by itself
SIMULATOR = {"model", "data", "mujoco_renderer", "viewer", "_env", "env_type"}


# === All environments ===


def get_env_state(env: VecEnv) -> dict[str, Any]:
    """
    Capture environments between two steps. Nothing is changed, and no random numbers are drawn.

    :param env: The environments, with their wrappers
    :return: Values that :func:`~sb3_r2vpo.common.serialization.encode` takes. ``not_captured`` is ``None``, or says why the
        environments have to go on from a reset; the state of the wrappers around them, such as the statistics of
        ``VecNormalize``, is there in any case.
    """
    layers, not_captured = [], None
    for layer in _layers(env):
        name, state = type(layer).__name__, None
        try:
            state = get_attributes(layer) if isinstance(layer, VecEnvWrapper) else _get_base_state(layer)
        except NotCapturedError as error:
            not_captured = not_captured or str(error)
        layers.append({"class": name, "state": state})
    return {"n_envs": env.num_envs, "layers": layers, "not_captured": not_captured}


def set_env_state(env: VecEnv, state: dict[str, Any]) -> None:
    """
    :param env: Environments made and wrapped as those of :func:`get_env_state`; they need not have been reset
    :param state: What it returned
    :raises ValueError: These are other environments, or the state is not one of them.
    """
    layers = list(_layers(env))
    found, needed = [type(layer).__name__ for layer in layers], [layer["class"] for layer in state["layers"]]
    if (found, env.num_envs) != (needed, state["n_envs"]):
        raise ValueError(
            f"The state is that of {state['n_envs']} environments in {' in '.join(reversed(needed))}, but this is "
            f"{env.num_envs} environments in {' in '.join(reversed(found))}: make and wrap them as for the training that is "
            "to go on."
        )
    for layer, saved in zip(layers, state["layers"], strict=True):
        if saved["state"] is None:
            continue
        if isinstance(layer, VecEnvWrapper):
            set_attributes(layer, saved["state"])
        else:
            _set_base_state(layer, saved["state"])
        # What `seed` has left for the next reset is for a training that begins
        layer._reset_seeds()
        layer._reset_options()


def _layers(env: VecEnv) -> Iterator[VecEnv]:
    """The wrappers, from the outermost one, and the environments that they wrap."""
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
        if type(env) is CheckedEnv:
            # It stands there only while a rollout is collected
            env = env._env
    yield env


def _get_base_state(env: VecEnv) -> Any:
    if _has_state_methods(env):
        return _own_state(env)
    if isinstance(env, DummyVecEnv):
        return [get_single_state(single) for single in env.envs]
    if isinstance(env, SubprocVecEnv):
        return [_result(answer) for answer in _call_workers(env, "get", [()] * env.num_envs)]
    raise NotCapturedError(f"{type(env).__name__} has no `get_state` and `set_state`.")


def _set_base_state(env: VecEnv, state: Any) -> None:
    if _has_state_methods(env):
        env.set_state(state)  # type: ignore[attr-defined]
    elif isinstance(env, DummyVecEnv):
        for single, single_state in zip(env.envs, state, strict=True):
            set_single_state(single, single_state)
    else:
        assert isinstance(env, SubprocVecEnv)
        for answer in _call_workers(env, "set", [(single_state,) for single_state in state]):
            _result(answer)


def _call_workers(env: SubprocVecEnv, action: str, arguments: list[tuple]) -> list[Any]:
    env.set_attr("_r2vpo_state", _in_worker)
    return [env.env_method("_r2vpo_state", action, *arguments[i], indices=i)[0] for i in range(env.num_envs)]


def _in_worker(action: str, *arguments: Any) -> tuple[bool, Any]:
    """
    Called by the loop of SB3's workers, which takes it for a method of its environment: that one is the caller's ``env``.

    :return: Whether it went well, and the state or the error's message: an exception would end the worker
    """
    env = sys._getframe(1).f_locals["env"]
    try:
        if action == "get":
            return True, get_single_state(env)
        set_single_state(env, *arguments)
        return True, None
    except Exception as error:
        return False, str(error)


def _result(answer: tuple[bool, Any]) -> Any:
    if not answer[0]:
        raise NotCapturedError(answer[1])
    return answer[1]


def _own_state(env: Any) -> Any:
    """What an environment's ``get_state`` returns, if it can be written."""
    state = deepcopy(env.get_state())
    with warnings.catch_warnings():
        # Of functions that have no name
        warnings.simplefilter("error")
        try:
            encode(state)
        except (ValueError, UserWarning) as error:
            raise NotCapturedError(f"The state of {type(env).__name__} can't be written: {error}") from error
    return state


def _has_state_methods(env: Any) -> bool:
    """Whether an environment has ``get_state()`` and ``set_state(state)``; MuJoCo's ``set_state(qpos, qvel)`` is none."""

    def n_needed(name: str) -> int | None:
        method = getattr(env, name, None)
        parameters = signature(method).parameters.values() if callable(method) else None
        if parameters is None:
            return None
        return sum(p.default is p.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in parameters)

    return (n_needed("get_state"), n_needed("set_state")) == (0, 1)


# === One environment ===


def get_single_state(env: gym.Env) -> list[Any]:
    """
    :param env: An environment with its wrappers
    :return: The state of each of them, the outermost one first
    :raises NotCapturedError: One can't be captured.
    """
    return [{"class": type(layer).__name__, "state": _get_layer_state(layer)} for layer in _single_layers(env)]


def set_single_state(env: gym.Env, state: list[Any]) -> None:
    """
    :param env: An environment with the same wrappers
    :param state: From :func:`get_single_state`
    :raises ValueError: It is another environment, or has other wrappers.
    """
    layers = list(_single_layers(env))
    found, needed = [type(layer).__name__ for layer in layers], [layer["class"] for layer in state]
    if found != needed:
        raise ValueError(f"The state is that of {' in '.join(reversed(needed))}, but this is {' in '.join(reversed(found))}.")
    # The environment first: a wrapper's `set_state` may ask it
    for layer, saved in reversed(list(zip(layers, state, strict=True))):
        if _has_state_methods(layer):
            layer.set_state(saved["state"])
            continue
        set_attributes(layer, saved["state"]["attributes"])
        parts = _simulated(layer)
        if saved["state"].get("one_generator"):
            parts["rules"].random = parts["game"].random
        for name, part in parts.items():
            set_attributes(part, saved["state"][name])
        if (physics := _physics(layer)) is not None:
            set_mujoco_state(*physics, saved["state"]["physics"])


def _single_layers(env: gym.Env) -> Iterator[gym.Env]:
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def _get_layer_state(env: gym.Env) -> Any:
    if _has_state_methods(env):
        return _own_state(env)
    modules = [cls.__module__ + "." for cls in type(env).__mro__]
    physics = _physics(env)
    if not isinstance(env, gym.Wrapper) and physics is None and not any(m.startswith(KNOWN_MODULES) for m in modules):
        raise NotCapturedError(f"{type(env).__name__} has no `get_state` and `set_state`.")
    state: dict[str, Any] = {"attributes": get_attributes(env, SIMULATOR if _physics(env) is not None else ())}
    parts = _simulated(env)
    state |= {name: get_attributes(part) for name, part in parts.items()}
    if "rules" in parts:
        # Only since a reset with a seed
        state["one_generator"] = parts["rules"].random is parts["game"].random
    if physics is not None:
        state["physics"] = get_mujoco_state(*physics)
    return state


def _simulated(env: gym.Env) -> dict[str, Any]:
    """The objects behind an environment that have a state of their own."""
    if _is_dm_control(env):
        return {"control": env._env, "task": env._env.task}  # type: ignore[attr-defined]
    if type(env).__module__ == "minatar.gym":
        return {"game": env.game, "rules": env.game.env}  # type: ignore[attr-defined]
    return {}


def _physics(env: gym.Env) -> tuple[Any, Any] | None:
    """MuJoCo's model and data."""
    if _is_dm_control(env):
        physics = env._env.physics  # type: ignore[attr-defined]
        return physics.model.ptr, physics.data.ptr
    # Not imported here: without MuJoCo there is no such environment
    module = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    is_mujoco = module is not None and isinstance(env, module.MujocoEnv)
    return (env.model, env.data) if is_mujoco else None  # type: ignore[attr-defined]


def _is_dm_control(env: gym.Env) -> bool:
    shimmy, control = (sys.modules.get(name) for name in ("shimmy", "dm_control.rl.control"))
    if shimmy is None or control is None or not isinstance(env, shimmy.DmControlCompatibilityV0):
        return False
    # A task of the composer is a tree of objects
    return isinstance(env._env, control.Environment)
