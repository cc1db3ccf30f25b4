"""
The package against the one that it was before its modules were rewritten, commit e70198e: interleaved in one process.

    python benchmarks/speed/before.py               # half an hour
    python benchmarks/speed/before.py --rounds 1 --only "MLP 64x64, batch 64"

Times updates of the settings of benchmark.py, a minibatch, and whole training with the shipped settings on DM Control's
cheetah-run, an environment step. Writes results/before.csv; ratios are of CPU time, and above one where it is faster now.
"""

import argparse
import atexit
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

# Before NumPy and PyTorch are loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch as th
from benchmark import HERE, SETTINGS, interleave, load, make_update, write_rows

sys.path.insert(0, str(HERE.parent / "control"))
from experiment import METHODS, make_model, old_names, package_versions, processor

PACKAGES = {"before": "sb3_r2vpo_before", "after": "sb3_r2vpo"}
ARMS = ("R2VPO", "R2VPO, PPO's objective", "R2VPOOff")
MODES = ("eager", "compiled")
TASK, TRAINING = "cheetah-run", "training, DM Control's cheetah-run"
#: Two rollouts of each
N_TIMESTEPS = 2 * 4096

Timed = Callable[[], tuple[float, float]]


@cache
def package_before(ref: str = "e70198e") -> Path:
    """
    Make an earlier version importable as ``sb3_r2vpo_before``, beside the current one.

    :param ref: A commit, at which ``hyperparams/`` stands beside the package
    :return: The folder that it is in until the process ends
    """
    command = ["git", "-C", str(HERE.parents[1]), "archive", "--format=tar", ref, "sb3_r2vpo", "hyperparams"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    folder = Path(tempfile.mkdtemp(prefix="sb3_r2vpo_before_"))
    atexit.register(shutil.rmtree, folder)
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    package = (folder / "sb3_r2vpo").rename(folder / "sb3_r2vpo_before")
    (folder / "hyperparams").rename(package / "hyperparams")
    for path in package.rglob("*"):
        if path.suffix in (".py", ".yml"):
            path.write_text(re.sub(r"\bsb3_r2vpo\b", "sb3_r2vpo_before", path.read_text()))
    sys.path.insert(0, str(folder))
    return folder


def make_training(arm: str, compiled: bool, package: str) -> Timed:
    """:return: A function that times training, all of it, in microseconds of wall and of CPU time an environment step"""
    method = METHODS[{"R2VPO": "r2vpo", "R2VPOOff": "r2vpo_off"}[arm]]
    settings: dict[str, Any] = {**method.settings(TASK), "compile": compiled}
    algorithm = method.algorithm
    if package != "sb3_r2vpo":
        algorithm, settings = getattr(__import__(package), arm), old_names(settings)
    model = make_model(algorithm, settings, TASK, seed=0)
    model.learn(N_TIMESTEPS)

    def training() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        model.learn(N_TIMESTEPS, reset_num_timesteps=False)
        return 1e6 * (time.perf_counter() - wall) / N_TIMESTEPS, 1e6 * (time.process_time() - cpu) / N_TIMESTEPS

    return training


def compare(setting: str, arm: str, mode: str, make: Callable[[str], Timed], rounds: int) -> dict[str, Any]:
    """:return: A row of the table"""
    times = interleave({name: make(package) for name, package in PACKAGES.items()}, rounds)
    before, after = (median(cpu for _, cpu in times[name]) for name in PACKAGES)
    row = {
        "setting": setting, "arm": arm, "mode": mode, "before_us": round(before, 1), "after_us": round(after, 1),
        "ratio": round(before / after, 3), "rounds": rounds, "load": load(),
    }  # fmt: skip
    print(row, flush=True)
    return row | {"versions": f"{package_versions()} numpy={version('numpy')}", "processor": processor()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ref", default="e70198e", help="commit to compare with (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS, TRAINING], default=[*SETTINGS, TRAINING])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    args = parser.parse_args()
    package_before(args.ref)
    th.set_num_threads(1)
    rows = []
    for setting in args.only:
        for arm in args.arms:
            for mode in args.modes:
                compiled = mode == "compiled"
                if setting != TRAINING:
                    name = f"{arm}, compiled" if compiled else arm

                    def make(package: str, name: str = name, setting: str = setting) -> Timed:
                        return make_update(name, setting, package=package)
                elif arm == "R2VPO, PPO's objective":
                    continue
                else:

                    def make(package: str, arm: str = arm, compiled: bool = compiled) -> Timed:
                        return make_training(arm, compiled, package)

                rows.append(compare(setting, arm, mode, make, args.rounds))
                # Written each time, as a table of an interrupted run is of use as well
                write_rows("before", rows)
                # Code that no other row uses
                th.compiler.reset()


if __name__ == "__main__":
    main()
