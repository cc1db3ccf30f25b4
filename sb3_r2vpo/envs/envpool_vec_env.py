"""The DeepMind Control Suite on EnvPool, which steps all environments at once in C++ threads, as an SB3 `VecEnv`."""

import ctypes
import difflib
import time
from contextlib import suppress
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from sb3_r2vpo.common.checks import check_whole_number
from sb3_r2vpo.envs.dm_control import DM_CONTROL_IDS, MAX_EPISODE_STEPS

# EnvPool gives all tasks of a domain the same keys: those that a task does not observe, mostly zeros, are left out.
_DOG = ("ball_state", "target_position")
_HUMANOID = ("position",)
_QUADRUPED = ("ball_state", "origin", "rangefinder", "target_position")
_UNOBSERVED_KEYS: dict[tuple[str, str], tuple[str, ...]] = {
    ("dog", "run"): _DOG,
    ("dog", "stand"): _DOG,
    ("dog", "trot"): _DOG,
    ("dog", "walk"): _DOG,
    ("finger", "spin"): ("dist_to_target", "target_position"),
    ("fish", "upright"): ("target",),
    ("humanoid", "run"): _HUMANOID,
    ("humanoid", "run_pure_state"): ("com_velocity", "extremities", "head_height", "joint_angles", "torso_vertical"),
    ("humanoid", "stand"): _HUMANOID,
    ("humanoid", "walk"): _HUMANOID,
    ("quadruped", "escape"): ("ball_state", "target_position"),
    ("quadruped", "fetch"): ("origin", "rangefinder"),
    ("quadruped", "run"): _QUADRUPED,
    ("quadruped", "walk"): _QUADRUPED,
}


def _ball_in_cup_rewards(obs: dict[str, np.ndarray]) -> np.ndarray:
    """
    dm_control's reward of `ball_in_cup-catch`: 1 where the ball (radius 25 mm) is inside the target (a square of 100 mm).

    EnvPool 1.2.5 takes the radius from `geom_size` at the index of the ball's *body*, which is a part of the cup, 8 mm
    thick: it also rewards a ball that is still sticking out by up to 17 mm.
    """
    cup_x, cup_z, ball_x, ball_z = obs["position"].T
    # At zero the ball's joint is 0.2 m above the ground, the cup's 0.6 m, and the target's centre 0.05 m below it.
    offset = np.stack([cup_x - ball_x, (0.6 + cup_z - 0.05) - (0.2 + ball_z)])
    return (np.abs(offset) < 0.05 - 0.025).all(axis=0).astype(np.float32)


class EnvPoolVecEnv(VecEnv):
    """
    Tasks of the DeepMind Control Suite on EnvPool (https://github.com/sail-sg/envpool), equal step by step to the
    environments that `gym.make(env_id)` makes: the same float32 observation (component for component), action, reward
    and end of episode, so that a policy trained on one runs on the other.

    It follows SB3's conventions, not EnvPool's: a finished environment is reset within the same step, and its `info`
    holds `terminal_observation`, `TimeLimit.truncated` and, as with `make_vec_env`, the `episode` statistics of
    `Monitor` (return of the raw rewards, length, seconds since construction). `VecMonitor` is only needed for its file.

    Environment `i` draws its initial states from `seed + i`: other states than dm_control draws from that seed, as the
    generators differ, but of the same distribution. As everywhere in SB3, `seed()` acts at the next `reset()`; as
    EnvPool takes seeds at construction only, that `reset()` builds the pool anew (40 ms an environment for walker).

    Equality is tested transition by transition, for all domains but dog, humanoid_CMU, lqr, manipulator, quadruped,
    stacker and swimmer. Two differences are known. EnvPool 1.2.5 contains MuJoCo 3.6; under dm_control with MuJoCo 3.7
    or later, two capsules in contact move differently (the finger on its spinner, the humanoid against itself). And
    where dm_control raises `PhysicsError` because the simulation diverged, for instance on NaN actions, MuJoCo here
    prints a warning and goes on: `VecCheckNan` finds such actions.

    Frames, videos and the physics itself are for `gym.make(env_id, render_mode="rgb_array")`.

    :param env_id: A key of `sb3_r2vpo.envs.DM_CONTROL_IDS`, such as `dm_control/walker-run-v0`
    :param n_envs: Number of environments. EnvPool's speed comes with tens of them.
    :param seed: Seed of the first environment. None draws it from NumPy's global generator, as `VecEnv.seed` does.
    :param num_threads: Number of threads. None is EnvPool's own choice, one per CPU and at most `n_envs`.
    :param stagger: Whether to cut off the first episodes at evenly spaced lengths, so that from then on the environments
        are spread over all phases of an episode (as `init_at_random_ep_len` of rsl_rl does). Without it, all episodes of a
        task with a time limit begin and end at the same step, and a rollout of 128 steps shows one phase of the task only:
        on-policy learners then forget the others. It is meant for training; the default is dm_control's own episodes.
    :raises ValueError: When the id is unknown, or a number is out of range
    :raises ImportError: When EnvPool is not installed
    """

    _no_python_objects = "EnvPool's environments are not Python objects. Use `gym.make(env_id)` and a `DummyVecEnv`."

    def __init__(
        self,
        env_id: str,
        n_envs: int = 1,
        seed: int | None = None,
        num_threads: int | None = None,
        stagger: bool = False,
    ):
        if env_id not in DM_CONTROL_IDS:
            matches = difflib.get_close_matches(env_id, DM_CONTROL_IDS, n=5)
            raise ValueError(
                f"{env_id!r} is not a task of the DeepMind Control Suite; its ids are `dm_control/<domain>-<task>-v0`. "
                f"Close matches: {', '.join(matches) or 'none'}."
            )
        n_envs = check_whole_number("n_envs", n_envs)
        if num_threads is not None:
            num_threads = check_whole_number("num_threads", num_threads)
        try:
            import envpool
        except ModuleNotFoundError as error:
            raise ImportError("EnvPoolVecEnv needs EnvPool, an extra: pip install 'sb3-r2vpo[envpool]'") from error

        domain, task = DM_CONTROL_IDS[env_id]
        envpool_id = "".join(part[0].upper() + part[1:] for part in f"{domain}_{task}".split("_")) + "-v1"
        spec = envpool.make_spec(envpool_id)
        unobserved = _UNOBSERVED_KEYS.get((domain, task), ())
        # Sorted, because `gymnasium.spaces.Dict` is: that is the order in which `FlattenObservation` concatenates.
        self._keys = sorted(key for key in spec.observation_space if key not in unobserved)
        observation_size = sum(int(np.prod(spec.observation_space[key].shape)) for key in self._keys)
        action_space = spec.action_space
        self._actions_shape = (n_envs, *action_space.shape)
        super().__init__(
            n_envs,
            spaces.Box(-np.inf, np.inf, (observation_size,), np.float32),
            spaces.Box(action_space.low.astype(np.float32), action_space.high.astype(np.float32)),
        )
        self._rewards_of = _ball_in_cup_rewards if domain == "ball_in_cup" else None
        self._pool: Any = None
        self._make_pool = partial(envpool.make_gymnasium, envpool_id, num_envs=n_envs, num_threads=num_threads or 0)
        self._start_time = time.time()
        self._returns = np.zeros(n_envs)
        self._stagger = stagger
        self._first_limits = np.zeros(n_envs)
        self.seed(seed)

    def reset(self) -> np.ndarray:
        """
        Reset all environments, with new seeds if `seed()` was called since the last time.

        :return: First observations, `(n_envs, observation_size)`
        """
        seeds = [seed % 2**31 for seed in self._seeds if seed is not None]  # EnvPool's are int32
        if seeds:
            # The old environments first: those of a large pool take gigabytes
            self.close()
            self._pool = self._make_pool(seed=seeds)
            self._reset_seeds()
        if self._pool is None:
            raise RuntimeError("The environments have been closed: call `seed()` before `reset()` to make them anew.")
        obs, _ = self._pool.reset()
        self._returns[:] = 0
        if self._stagger:
            self._first_limits = np.ceil(np.arange(1, self.num_envs + 1) * MAX_EPISODE_STEPS / self.num_envs)
        return self._flatten(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Start a step in EnvPool's threads.

        :param actions: `(n_envs, action_size)`; MuJoCo clips them to the bounds of the action space
        """
        if self._pool is None:
            raise RuntimeError("The environments are not running: call `reset()` first.")
        if actions.shape != self._actions_shape:
            # EnvPool checks the first actions only; later ones of another shape it misreads, or aborts the process.
            raise ValueError(f"Actions must be of shape {self._actions_shape}, got {actions.shape}.")
        self._pool.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the step to end, and reset the environments that it finished.

        :return: Observations `(n_envs, observation_size)`, rewards `(n_envs,)`, dones `(n_envs,)`, infos
        """
        obs, rewards, terminated, truncated, info = self._pool.recv()
        if self._rewards_of is not None:
            rewards = self._rewards_of(obs)
        observations = self._flatten(obs)
        if self._stagger:
            # The last environment's limit is the task's own: by then all have begun their second episode
            truncated = truncated | (info["elapsed_step"] == self._first_limits)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self._returns += rewards
        if dones.any():
            finished = np.flatnonzero(dones)
            for i in finished:
                infos[i] = {
                    "terminal_observation": observations[i].copy(),
                    "TimeLimit.truncated": bool(truncated[i]),
                    "episode": {
                        "r": round(float(self._returns[i]), 6),
                        "l": int(info["elapsed_step"][i]),
                        "t": round(time.time() - self._start_time, 6),
                    },
                }
            # Left alone, EnvPool would reset in the next step: a transition that never was, with a stale reward.
            obs, _ = self._pool.reset(finished.astype(np.int32))
            observations[finished] = self._flatten(obs)
            self._returns[finished] = 0
            self._first_limits[finished] = 0
        return observations, rewards, dones, infos

    def close(self) -> None:
        """Stop EnvPool's threads, and give the environments' memory back."""
        if self._pool is not None:
            self._pool = None
            # The C library (glibc) keeps what threads have freed: 64 humanoids grew from 0.9 to 1.6 GB in ten resets
            with suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _flatten(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        n_rows = len(obs[self._keys[0]])
        return np.concatenate([obs[key].reshape(n_rows, -1) for key in self._keys], axis=1, dtype=np.float32)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # `evaluate_policy` asks for `Monitor` to learn whether `info["episode"]` is there; it is.
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        raise AttributeError(f"No attribute {attr_name!r}: {self._no_python_objects}")

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError(f"Cannot set {attr_name!r}: {self._no_python_objects}")

    def env_method(self, method_name: str, *method_args, indices: VecEnvIndices = None, **method_kwargs) -> list[Any]:
        raise NotImplementedError(f"Cannot call {method_name!r}: {self._no_python_objects}")

    def render(self, mode: str | None = None) -> np.ndarray | None:
        raise NotImplementedError('EnvPoolVecEnv has no frames: use `gym.make(env_id, render_mode="rgb_array")`.')
