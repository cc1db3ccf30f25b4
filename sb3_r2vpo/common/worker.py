"""A process with one environment, which may raise, hang or die: both ends of it."""

import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import register_after_fork
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common import monitor
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

# Seconds that a worker has for `env.close()` before it is killed
GRACE = 5.0
# Seconds in which `max_restarts` are counted
RESTART_WINDOW = 3600.0
# Seconds that workers still have when one of them has used up the timeout: they began at the same time
_LAST_CHANCE = 1.0


class WorkerError(RuntimeError):
    """
    An environment of a :class:`WorkerVecEnv` has raised, died or not answered in time. The message names the environment's
    index and the call, and has the worker's traceback if there was one; ``__cause__`` is then the original exception, if
    it can be pickled.

    :param message: The message
    :param raised: Whether the environment has raised an exception
    """

    def __init__(self, message: str, raised: bool = False) -> None:
        super().__init__(message)
        self.raised = raised


@dataclass
class _Failure:
    """An exception on its way from a worker to the caller."""

    text: str
    exception: bytes | None


# === In the worker ===


def _run(remote: Connection, parent_remote: Connection, env_fn: bytes, first_start: float | None) -> None:
    """SB3's worker, which here reports exceptions, closes its environment in any case, and ends when the parent has ended."""
    _follow_parent(remote)
    envs: list[gym.Env] = []

    def build() -> gym.Env:
        if first_start is not None:
            _keep_monitor_files()
        envs.append(cloudpickle.loads(env_fn)())
        monitored = unwrap_wrapper(envs[0], monitor.Monitor) if first_start is not None else None
        if isinstance(monitored, monitor.Monitor):
            # The file's header has the start of the first worker, to which its times are relative
            monitored.t_start = first_start  # type: ignore[assignment]
        return envs[0]

    try:
        _worker(remote, parent_remote, CloudpickleWrapper(build))
    except Exception as error:
        exception = None
        with suppress(Exception):
            exception = pickle.dumps(error)
        # The parent does not listen any more if it is closing
        with suppress(OSError):
            remote.send(_Failure(traceback.format_exc(), exception))
    finally:
        if envs:
            with suppress(Exception):
                envs[0].close()


def _follow_parent(remote: Connection) -> None:
    """Leave Ctrl-C and SIGTERM, which terminals and clusters send to all processes, to the parent, and end when it has."""

    def parent_has_closed(timeout: int | None) -> bool:
        poll = select.poll()
        poll.register(remote, 0)
        return bool(poll.poll(timeout))

    def end_if_closed(*_: Any) -> None:
        if parent_has_closed(0):
            raise SystemExit(1)

    def end_in_any_case() -> None:
        parent_has_closed(None)
        time.sleep(GRACE)
        os._exit(1)

    # Functions, as SIG_IGN would be inherited by programs that the environment starts
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, end_if_closed)
    threading.Thread(target=end_in_any_case, daemon=True).start()


def _keep_monitor_files() -> None:
    """`Monitor` empties its file by default, which has the episodes of the worker before."""
    init = monitor.ResultsWriter.__init__

    def append(
        self: Any, filename: str = "", header: Any = None, extra_keys: tuple = (), override_existing: bool = True
    ) -> None:
        init(self, filename, header, extra_keys, override_existing=False)

    monitor.ResultsWriter.__init__ = append  # type: ignore[method-assign]


# === In the parent ===


@dataclass
class Group:
    """What the workers of a `WorkerVecEnv` share."""

    context: BaseContext
    timeout: float | None
    start_timeout: float | None
    # 0 until all environments have been built: what fails at once would fail again
    max_restarts: int = 0
    workers: list["Worker"] = field(default_factory=list)


class Worker:
    """
    A process with one environment. To `SubprocVecEnv` it is the connection to it; what is more, `recv` raises a
    `WorkerError` instead of waiting for an answer that does not come, or starts the process anew.
    """

    def __init__(self, index: int, env_fn: bytes, group: Group) -> None:
        self.index, self.env_fn, self.group = index, env_fn, group
        self.restarts: list[float] = []
        self.first_start: float | None = None
        # For a worker that takes over
        self.seed: int | None = None
        self.options: dict[str, Any] = {}
        self.attributes: dict[str, Any] = {}
        self.last_obs: Any = None
        # The end of an episode that broke off between two steps, until the next step
        self.broken_episode: tuple | None = None
        self.message: tuple[str, Any] = ("get_spaces", None)
        self.awaiting = False
        self.start()

    def start(self) -> None:
        self.connection, child_end = self.group.context.Pipe()
        # A forked process (of this or another `VecEnv`) that held this end would keep the worker alive after our end
        register_after_fork(self.connection, Connection.close)
        self._limit(self.group.start_timeout)
        arguments = (child_end, self.connection, self.env_fn, self.first_start)
        self.process: BaseProcess = self.group.context.Process(  # type: ignore[attr-defined]
            target=_run, args=arguments, daemon=True, name=f"environment-{self.index}"
        )
        self.first_start = self.first_start or time.time()
        self.ended = False
        try:
            self.process.start()
        except (OSError, EOFError) as error:
            raise WorkerError(f"The process of environment {self.index} could not be started: {error!r}.") from error
        finally:
            child_end.close()

    def send(self, message: tuple[str, Any]) -> None:
        if self.connection.closed:
            raise WorkerError("These environments have ended, after an error or `close()`: make a new `WorkerVecEnv`.")
        if self.awaiting:
            # Ctrl-C came between question and answer
            self.recv()
        command, data = self.message = message
        if command == "reset":
            self.broken_episode = None
            self.seed, self.options = (self.seed if data[0] is None else data[0]), data[1]
        elif command == "set_attr":
            self.attributes[data[0]] = data[1]
        if command == "step" and self.broken_episode is not None:
            return
        self._send(message)

    def recv(self) -> Any:
        if self.message[0] == "step" and self.broken_episode is not None:
            reply, self.broken_episode = self.broken_episode, None
        else:
            try:
                reply = self._recv(self.message[0])
            except WorkerError as error:
                reply = self._recover(error)
        if self.message[0] in ("step", "reset"):
            self.last_obs = reply[0]
        return reply

    def _send(self, message: tuple[str, Any]) -> None:
        self.awaiting = True
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            # `recv` finds out why
            pass
        except Exception:
            # It cannot be pickled
            self.awaiting = False
            raise

    def _recv(self, command: str) -> Any:
        try:
            reply = self.connection.recv()
        except Exception as error:
            self.awaiting = False
            cause = None if isinstance(error, EOFError | OSError) else error
            raise self._diagnosis(error, command) from cause
        self.awaiting = False
        if isinstance(reply, _Failure):
            cause = None
            with suppress(Exception):
                cause = pickle.loads(reply.exception)  # type: ignore[arg-type]
            during = "while it was built" if command == "get_spaces" else f"in `{command}`"
            raise WorkerError(f"Environment {self.index} raised an exception {during}:\n{reply.text}", True) from cause
        if self.limit != self.group.timeout:
            self._limit(self.group.timeout)
        return reply

    def _limit(self, seconds: float | None) -> None:
        """
        Let sends and receives that take longer raise `BlockingIOError`. As an option of the socket, it costs nothing, holds
        in the middle of a message too, and starts again when the process was suspended (Ctrl-Z) meanwhile.
        """
        self.limit = seconds
        value = struct.pack("@ll", int(seconds or 0), max(int((seconds or 0) % 1 * 1e6), seconds is not None))
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def _diagnosis(self, error: Exception, command: str) -> WorkerError:
        doing = "building the environment" if command == "get_spaces" else f"`{command}`"
        hangs = isinstance(error, BlockingIOError)
        if not isinstance(error, EOFError | OSError):
            return WorkerError(f"The answer of environment {self.index} to {doing} cannot be read: {error!r}.")
        if hangs and self.process.is_alive():
            argument = "start_timeout" if command == "get_spaces" else "timeout"
            for worker in self.group.workers:
                if worker.awaiting:
                    worker._limit(_LAST_CHANCE)
            return WorkerError(
                f"Environment {self.index} hangs: {doing} took longer than {self.limit:g} s, and its process is ended. Look "
                f"for a deadlock or an endless loop in it; if it needs more time, give a longer `{argument}`."
            )
        self.process.join(GRACE)
        code = self.process.exitcode
        if code is not None and code < 0:
            with suppress(ValueError):
                code = signal.Signals(-code).name  # type: ignore[assignment]
        ended = f"was killed by {code}" if isinstance(code, str) else f"ended with exit code {code}"
        if code == "SIGKILL":
            advice = "Most often, the memory was used up: see `dmesg`, and use fewer or smaller environments."
        elif isinstance(code, str):
            advice = "It crashed in compiled code; with `PYTHONFAULTHANDLER=1` in the environment it prints where."
        else:
            advice = (
                "Something in it calls `os._exit` or `sys.exit`, or it printed an error above; a script needs "
                "`if __name__ == '__main__':` around what it runs, as with all processes of Python."
            )
        return WorkerError(f"The process of environment {self.index} {ended} during {doing}. {advice}")

    def _recover(self, error: WorkerError) -> Any:
        """Start the process anew, and answer in its place; or end all and raise the error."""
        command, data = self.message
        # What other calls raise is a mistake of the caller, and would be raised again
        restart = command in ("step", "reset") or not error.raised
        restart = restart and (command != "step" or self.last_obs is not None)
        while True:
            recent = [moment for moment in self.restarts if time.monotonic() - moment < RESTART_WINDOW]
            if not restart or len(recent) >= self.group.max_restarts:
                end_workers(self.group.workers)
                raise error
            self.restarts.append(time.monotonic())
            warnings.warn(f"{error}\nIt is started anew, for time {len(recent) + 1} of {self.group.max_restarts} in an hour.")
            try:
                obs, reset_info = self._start_anew()
                break
            except WorkerError as next_error:
                error = next_error
        if command == "reset":
            return obs, reset_info
        info = {"TimeLimit.truncated": True, "terminal_observation": self.last_obs, "worker_restarted": True}
        end_of_episode = (obs, 0.0, True, info, reset_info)
        if command == "step":
            return end_of_episode
        if self.last_obs is not None:
            self.broken_episode = end_of_episode
        self._send((command, data))
        return self.recv()

    def _start_anew(self) -> tuple[Any, dict[str, Any]]:
        end_workers([self], grace=0.0)
        self.start()
        self._ask("get_spaces", None)
        for attribute in self.attributes.items():
            self._ask("set_attr", attribute)
        # Not the seed from before, which might lead to the same failure
        entropy = None if self.seed is None else [self.seed, len(self.restarts)]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
        return self._ask("reset", (seed, self.options))

    def _ask(self, command: str, data: Any) -> Any:
        self._send((command, data))
        return self._recv(command)


def end_workers(workers: Sequence[Worker], grace: float | None = None) -> None:
    """
    End processes in bounded time: closing their pipe lets them close their environments and end; then SIGTERM, SIGKILL.

    :param workers: The workers
    :param grace: Seconds until SIGTERM. Default: `GRACE`
    """
    for worker in workers:
        worker.connection.close()
        worker.awaiting = False
    started = [worker for worker in workers if not worker.ended and worker.process.pid is not None]
    processes = [worker.process for worker in started]
    first = GRACE if grace is None else grace
    for seconds, insist in ((first, BaseProcess.terminate), (1.0, BaseProcess.kill), (1.0, BaseProcess.kill)):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        processes = [process for process in processes if process.is_alive()]
        for process in processes:
            insist(process)
    for worker in started:
        if not worker.process.is_alive():
            # Its pipes are given back now, and not when garbage is collected at some time
            worker.process.close()
            worker.ended = True
