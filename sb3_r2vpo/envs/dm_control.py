"""The DeepMind Control Suite as Gymnasium environments for `MlpPolicy`: `gym.make("dm_control/walker-run-v0")`.

Shimmy converts dm_control to Gymnasium and registers these very ids, but what it gives are dictionaries of float64
arrays, which `MlpPolicy` rejects, and no `max_episode_steps`. The ids registered here give Shimmy's environment behind
Gymnasium's `FlattenObservation`, in float32.

MuJoCo is imported by the first environment made, not by importing this module.
"""

import ctypes.util
import os
import sys
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation

if TYPE_CHECKING:
    from shimmy import DmControlCompatibilityV0

MAX_EPISODE_STEPS = 1000
"""Every task of the suite sets its time limit to this many steps, but for `lqr`, which sets none and gets this one."""

SUITE: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "three_poles", "two_poles"),
    "cheetah": ("run",),
    "dog": ("fetch", "run", "stand", "trot", "walk"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("swim", "upright"),
    "hopper": ("hop", "stand"),
    "humanoid": ("run", "run_pure_state", "stand", "walk"),
    "humanoid_CMU": ("run", "stand", "walk"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("escape", "fetch", "run", "walk"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer15", "swimmer6"),
    "walker": ("run", "stand", "walk"),
}
"""The suite's tasks by domain, written out so that registering them does not import dm_control."""

DM_CONTROL_IDS: dict[str, tuple[str, str]] = {
    f"dm_control/{domain}-{task}-v0": (domain, task) for domain, tasks in SUITE.items() for task in tasks
}
"""Environment id to (domain, task), for every task of the suite."""


def register() -> None:
    """
    Register the suite's tasks with Gymnasium; importing `sb3_r2vpo.envs` does so.

    A later `import shimmy` puts Shimmy's raw environments back under the same ids, and Gymnasium warns
    'Overriding environment'; calling this function afterwards takes them over again.

    Worker processes that start afresh know only the ids they import: SB3's `SubprocVecEnv` needs the id with its
    module, `sb3_r2vpo.envs:dm_control/walker-run-v0`. RL Zoo sends its workers the specification itself.
    """
    for env_id, (domain, task) in DM_CONTROL_IDS.items():
        gym.registry.pop(env_id, None)
        gym.register(
            env_id,
            entry_point="sb3_r2vpo.envs.dm_control:make_dm_control",
            max_episode_steps=MAX_EPISODE_STEPS,
            # It would look at Shimmy's dictionaries, below the wrapper that makes them ready for SB3.
            disable_env_checker=True,
            kwargs={"domain_name": domain, "task_name": task},
            additional_wrappers=(FlattenObservation.wrapper_spec(),),
        )


def make_dm_control(
    domain_name: str,
    task_name: str,
    render_mode: str | None = None,
    render_kwargs: dict[str, Any] | None = None,
    **suite_kwargs: Any,
) -> "DmControlCompatibilityV0":
    """
    Load one task through Shimmy: the entry point of the registered ids, which flatten its observations. Use `gym.make`.

    On a Linux machine without a display the first environment made sets `MUJOCO_GL`, unless it is set already: to
    `egl`, or to `osmesa` where only that library is installed. Where neither is, training works and `render()` raises
    'No OpenGL rendering backend is available': install one (Debian: `libegl1` or `libosmesa6`).

    :param domain_name: Domain, such as `walker`
    :param task_name: Task, such as `run`
    :param render_mode: None, or one of Shimmy's: `rgb_array`, `depth_array`, `multi_camera`, `human`
    :param render_kwargs: Arguments of dm_control's `Physics.render`. The default is camera 0 at 480 x 480 pixels:
        every task has that camera, and those of the robots that walk away follow them, which dm_control's free camera
        does not.
    :param suite_kwargs: Further arguments of `dm_control.suite.load`, such as `task_kwargs` and `environment_kwargs`
    :return: Shimmy's environment, with spaces in float32
    :raises ImportError: Shimmy or dm_control is not installed.
    """
    try:
        if "shimmy" not in sys.modules:
            _import_shimmy()
        from dm_control import suite
        from shimmy import DmControlCompatibilityV0
    except ModuleNotFoundError as error:
        # Any other error of theirs, such as one of OpenGL, is told as it is
        raise ImportError(f"DM Control's tasks need {error.name}, an extra: pip install 'sb3-r2vpo[dm_control]'") from error

    if render_kwargs is None and render_mode != "multi_camera":
        render_kwargs = {"camera_id": 0, "height": 480, "width": 480}
    env = DmControlCompatibilityV0(suite.load(domain_name, task_name, **suite_kwargs), render_mode, render_kwargs)
    # `FlattenObservation` casts to the dtype of the space, so that this is all that float32 takes.
    env.observation_space = spaces.Dict({key: _float32(space) for key, space in env.observation_space.items()})
    env.action_space = _float32(env.action_space)
    # Shimmy writes 1000 times the timestep, and into a dictionary that all its environments share.
    env.metadata = {**env.metadata, "render_fps": round(1 / env.dt)}
    return env


def _float32(box: spaces.Box) -> spaces.Box:
    return spaces.Box(box.low.astype(np.float32), box.high.astype(np.float32))


def _import_shimmy() -> None:
    """Import Shimmy, and with it dm_control and MuJoCo, keeping our ids."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & os.environ.keys():
        # dm_control chooses once, at import, and by itself takes GLFW, which fails without a display.
        libraries = {"egl": "EGL", "osmesa": "OSMesa"}
        available = (name for name, library in libraries.items() if ctypes.util.find_library(library))
        os.environ["MUJOCO_GL"] = next(available, "disable")
    for env_id in DM_CONTROL_IDS:
        gym.registry.pop(env_id, None)  # or Gymnasium warns of 51 overridden ids
    try:
        import shimmy  # noqa: F401
    finally:
        register()
