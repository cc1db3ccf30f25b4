"""An environment that fails on demand: in one worker, one call, and a window of its calls, as RLlib tests its workers."""

import ctypes
import faulthandler
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

# What ends or stops the process of the environment
DEADLY = ("raise", "unpicklable_error", "unpicklable_info", "hang", "spin", "exit", "sys_exit", "kill", "segfault")
# What it reports instead of numbers
POISON = ("nan_reward", "inf_reward", "huge_reward", "nan_observation", "inf_observation")


class UnpicklableError(Exception):
    """An exception that cannot be sent to another process."""

    def __init__(self) -> None:
        super().__init__("boom")
        self.lock = lambda: None


def fail(fault: str) -> None:
    """
    :param fault: One of `DEADLY`
    :raises ValueError: The fault is "raise".
    """
    if fault == "raise":
        raise ValueError("boom")
    if fault == "unpicklable_error":
        raise UnpicklableError
    if fault == "hang":
        time.sleep(3600)
    elif fault == "spin":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    elif fault == "exit":
        os._exit(3)
    elif fault == "sys_exit":
        sys.exit(4)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "segfault":
        # Of pytest: its report of a crash that is meant to be
        faulthandler.disable()
        ctypes.string_at(0)


class FaultyEnv(gym.Wrapper):
    """
    :param env: The environment
    :param fault: One of `DEADLY` or `POISON`
    :param index: Number of this environment
    :param worker: Number of the environment that fails
    :param call: In which call: "init", "reset", "step", "render", "attribute" (of its name) or "method" (of its name)
    :param window: First and last number, counted from 1, of the calls that fail
    :param once: A file that the fault leaves behind, and if it is there, nothing fails: so that a restart helps
    """

    def __init__(
        self,
        env: gym.Env,
        fault: str,
        index: int = 0,
        worker: int = 0,
        call: str = "step",
        window: tuple[float, float] = (1, math.inf),
        once: Path | None = None,
    ) -> None:
        super().__init__(env)
        if fault not in DEADLY + POISON:
            raise ValueError(f"{fault!r} is not a fault; choose one of {', '.join(DEADLY + POISON)}.")
        self.fault, self.call, self.window, self.once = fault, call, window, once
        self.active, self.n_calls = index == worker, 0
        self._maybe_fail("init")

    def _fails(self, call: str) -> bool:
        if not self.active or call != self.call:
            return False
        self.n_calls += 1
        if not self.window[0] <= self.n_calls <= self.window[1] or (self.once is not None and self.once.exists()):
            return False
        if self.once is not None:
            self.once.touch()
        return True

    def _maybe_fail(self, call: str) -> bool:
        fails = self._fails(call)
        if fails and self.fault in DEADLY:
            fail(self.fault)
        return fails

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._maybe_fail("reset")
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        fails = self._maybe_fail("step")
        obs, reward, terminated, truncated, info = self.env.step(action)
        if fails:
            if self.fault == "unpicklable_info":
                info = {**info, "function": lambda: None}
            number = {"nan": math.nan, "inf": math.inf, "huge": 1e30}.get(self.fault.split("_")[0])
            if self.fault.endswith("_reward"):
                reward = number
            elif self.fault.endswith("_observation"):
                obs = np.full_like(obs, number)
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        self._maybe_fail("render")
        return self.env.render()

    @property
    def attribute(self) -> int:
        self._maybe_fail("attribute")
        return 1

    def method(self) -> int:
        self._maybe_fail("method")
        return 2
