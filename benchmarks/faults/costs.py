"""
What reliability costs: the time and size of a checkpoint, and the time of the checks for NaN and infinity.

    python benchmarks/faults/costs.py       some minutes; writes `results/costs.csv`

Times are CPU times of this process, so that others on the machine hardly matter. All with the default settings on CartPole,
whose environment and network are so small that the checks weigh as much as they can.
"""

import csv
import os
import platform
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch as th
from stable_baselines3 import PPO

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.checkpoint import save_checkpoint

RESULTS = Path(__file__).parent / "results" / "costs.csv"
#: Seconds between two checkpoints by default
EVERY = 300
PACKAGES = ("sb3-r2vpo", "stable-baselines3", "torch", "numpy")


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def size(path: Path) -> int:
    """:return: Bytes of a saved model in its file, without the rollouts of a replay"""
    with zipfile.ZipFile(path) as archive:
        return sum(entry.compress_size for entry in archive.infolist() if not entry.filename.startswith("rollouts"))


def checkpoints(folder: Path) -> dict[str, float]:
    """:return: Time and size of checkpoints"""
    ppo = PPO("MlpPolicy", "CartPole-v1", device="cpu").learn(2048)
    ppo.save(folder / "ppo.zip")
    results: dict[str, float] = {"size of SB3 PPO's zip, bytes": size(folder / "ppo.zip")}
    for algorithm in (R2VPO, R2VPOOff):
        name, path = algorithm.__name__, folder / f"{algorithm.__name__}.zip"
        model = algorithm("MlpPolicy", "CartPole-v1", device="cpu").learn(4096)
        times = [cpu_time(partial(save_checkpoint, model, path)) for _ in range(9)]
        results |= {
            f"{name}: checkpoint, seconds": statistics.median(times),
            f"{name}: checkpoint, % of five minutes": 100 * statistics.median(times) / EVERY,
            f"{name}: checkpoint without replay, bytes": size(path),
            f"{name}: checkpoint without replay, times SB3 PPO's zip": size(path) / results["size of SB3 PPO's zip, bytes"],
        }
    return results


@contextmanager
def unchecked() -> Iterator[None]:
    """Training without the checks of what environments return, of actions, rollouts, weights and gradients."""

    @contextmanager
    def as_it_is(env, model):
        # It is still asked for the first observations
        with mock.patch.object(type(env), "first", lambda self, obs: obs, create=True):
            yield env

    with ExitStack() as stack:
        for target, replacement in {
            "collection.checked": as_it_is,
            "collection.refuse_nonfinite_weights": lambda policy: None,
            "algorithm.refuse_nonfinite_rollout": lambda model: None,
            "algorithm.finite_minibatches": lambda *arguments: None,
        }.items():
            stack.enter_context(mock.patch(f"sb3_r2vpo.common.{target}", replacement))
        yield


def checks(n_rounds: int = 8) -> dict[str, float]:
    """:return: By how much the checks slow training down, in the order with, without, without, with"""
    model = R2VPO("MlpPolicy", "CartPole-v1", device="cpu").learn(2048)

    def train() -> float:
        return cpu_time(lambda: model.learn(2048, reset_num_timesteps=False))

    slowdowns = []
    for _ in range(n_rounds):
        first = train()
        with unchecked():
            without = train() + train()
        slowdowns.append(100 * ((first + train()) / without - 1))
    # Two standard errors
    error = 2 * float(np.std(slowdowns, ddof=1)) / n_rounds**0.5
    return {
        "checks: slowdown of training, %": statistics.mean(slowdowns),
        "checks: two standard errors of it": error,
        "checks: iterations of 2048 steps measured": 4 * n_rounds,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = checkpoints(Path(folder)) | checks()
    versions = " ".join(f"{package} {version(package)}" for package in PACKAGES)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measured", "value", "versions", "hardware"])
        for name, value in results.items():
            print(f"{name}: {value:.4g}")
            writer.writerow([name, f"{value:.4g}" if isinstance(value, float) else value, versions, hardware])


if __name__ == "__main__":
    main()
