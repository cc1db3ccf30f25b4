"""Environments in processes of their own, as with SB3's `SubprocVecEnv`, that may raise, hang or die."""

import multiprocessing as mp
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_r2vpo.common.checks import check_flag, check_whole_number, is_number
from sb3_r2vpo.common.worker import Group, Worker, WorkerError, end_workers

__all__ = ["WorkerError", "WorkerVecEnv", "WorkerVecMonitor"]


class WorkerVecEnv(SubprocVecEnv):
    """
    SB3's `SubprocVecEnv`, which bears environments that raise, hang or die. While none does, results are the same.

    It builds on `SubprocVecEnv`, not on Gymnasium's `AsyncVectorEnv`, as that one is not a `VecEnv` (other autoreset and
    infos), waits for ever for a killed worker's error, and has no step around which a worker could be replaced, while
    SB3's worker loop and calls are used here as they are.

    If an environment raises (when it is built, too), its process dies, or it does not answer in time, all processes are
    ended and a :class:`WorkerError` says which environment, in which call, and why, with the original traceback; where
    `SubprocVecEnv` raises an empty `EOFError` and hangs in `close()`
    (https://github.com/DLR-RM/stable-baselines3/issues/1814, 1890, 1956, 1397). No process outlives this one, however
    it ends. Ctrl-C and SIGTERM act on this process only, so that the model can be saved.

    With `restart=True`, the process of an environment that fails in `step` or `reset`, or dies at any time, is started anew.
    For the algorithm, the broken episode is truncated at its last observation: that step has reward 0, and in its info
    `terminal_observation`, from whose value SB3 bootstraps, `TimeLimit.truncated` and `worker_restarted`. The new
    environment gets the options of the last `reset()`, what was set with `set_attr` (not what `env_method` did), and
    a seed derived from the last one and the number of restarts. A `Monitor` inside of it goes on in the same file and
    does not report the broken episode; outside, use :class:`WorkerVecMonitor` in place of `VecMonitor`.

    Linux and macOS, as it relies on their sockets.

    :param env_fns: Functions that make an environment each
    :param start_method: Of `multiprocessing`. Default: 'forkserver' where available, as in SB3.
    :param timeout: Seconds for an answer, above which an environment is taken to hang. None waits for ever. The default
        is long for a step, as it has to do for a reset, too.
    :param restart: Whether to start failed environments anew. Default False, as a failure may be a mistake to be mended.
    :param max_restarts: Restarts of one environment in an hour, above which the error is raised after all. Default 10:
        by then it fails at once, every time.
    :param start_timeout: Seconds in which all processes have to start and build their environments. None waits for ever. The
        default leaves 64 processes that import PyTorch on two cores their time.
    :raises ValueError: An argument is out of range, or a function cannot be sent to another process. Nothing was started.
    :raises WorkerError: From all methods, see above

    .. attribute:: n_restarts

        Number of restarts so far, of all environments; the algorithms of this package log it as `rollout/env_restarts`
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        start_method: str | None = None,
        timeout: float | None = 60.0,
        restart: bool = False,
        max_restarts: int = 10,
        start_timeout: float | None = 600.0,
    ) -> None:
        check_whole_number("max_restarts", max_restarts)
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if seconds is not None and not (is_number(seconds) and 0 < seconds < 1e9):
                raise ValueError(f"`{name}` is {seconds!r}; it must be a positive number of seconds, or None for no limit.")
        check_flag("restart", restart)
        if len(env_fns) == 0:
            raise ValueError("`env_fns` is empty; it must have a function for each environment.")
        pickled = [_pickled(index, env_fn) for index, env_fn in enumerate(env_fns)]
        if start_method is None:
            start_method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        group = Group(mp.get_context(start_method), timeout, start_timeout)
        self.waiting, self.closed = False, False
        self.remotes = group.workers
        # When this object is collected, or Python exits. With a priority, it comes before multiprocessing waits for daemons
        Finalize(self, end_workers, (group.workers,), exitpriority=0)
        try:
            for index, env_fn in enumerate(pickled):
                group.workers.append(Worker(index, env_fn, group))
            for worker in group.workers:
                worker.send(("get_spaces", None))
            observation_space, action_space = [worker.recv() for worker in group.workers][0]  # noqa: RUF015
            VecEnv.__init__(self, len(env_fns), observation_space, action_space)
        except BaseException:
            self.close()
            raise
        group.max_restarts = max_restarts if restart else 0

    @property
    def processes(self) -> list[BaseProcess]:  # type: ignore[override]
        """The processes, one for each environment, without those that have been ended"""
        return [worker.process for worker in self.remotes if not worker.ended]

    @property
    def n_restarts(self) -> int:
        """Number of restarts so far, of all environments"""
        return sum(len(worker.restarts) for worker in self.remotes)

    def close(self) -> None:
        """Close all environments and end their processes, within about seven seconds whatever they do. Again: nothing."""
        end_workers(self.remotes)
        self.closed = True


def _pickled(index: int, env_fn: Any) -> bytes:
    if not callable(env_fn):
        raise ValueError(
            f"`env_fns[{index}]` is a {type(env_fn).__name__}; it must be a function that makes an environment, such as "
            "`lambda: gym.make('CartPole-v1')`."
        )
    try:
        return cloudpickle.dumps(env_fn)
    except Exception as error:
        raise ValueError(
            f"`env_fns[{index}]` cannot be sent to another process, as it holds something that cannot be pickled: {error}. "
            "Make such things (locks, open files, simulators) inside of the function, or use a `DummyVecEnv`."
        ) from error


class WorkerVecMonitor(VecMonitor):
    """
    SB3's `VecMonitor`, which does not report an episode that broke off because its worker was started anew: neither in
    `info["episode"]`, nor in its file. Arguments are those of `VecMonitor`.
    """

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        broken = np.array(["worker_restarted" in info for info in infos])
        venv = self.venv
        # VecMonitor's own step, to which broken episodes are not over
        self.venv = SimpleNamespace(step_wait=lambda: (obs, rewards, dones & ~broken, infos))  # type: ignore[assignment]
        try:
            *_, infos = super().step_wait()
        finally:
            self.venv = venv
        self.episode_returns[broken], self.episode_lengths[broken] = 0, 0
        return obs, rewards, dones, infos
