"""PPO's default arguments swapped for R2VPO's on eighteen Gymnasium and MinAtar tasks, and nothing else changed.

    python benchmarks/swap/benchmark.py run --methods ppo --seeds 5 --jobs 1      all runs that results/ppo.csv lacks
    python benchmarks/swap/benchmark.py run --methods r2vpo --tasks Hopper-v5     one task
    python benchmarks/swap/benchmark.py status                                    what is done and what is missing

A run's rows are written when it ends: what was stopped begins anew, what is finished is kept.
"""

import argparse
import csv
import fcntl
import functools
import io
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Before NumPy and PyTorch are loaded, here and in the workers: one thread for each process
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.wrappers import DtypeObservation, FlattenObservation
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import DummyVecEnv

RESULTS = Path(__file__).parent / "results"
#: The three that are compared, and R2VPO with fixed multipliers
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "r2vpo": {},
    "r2vpo_off": {},
    "r2vpo_fixed": {"var_coef": 0.3},
    "r2vpo_fixed_1": {"var_coef": 1.0},
}
COMPARED = ("ppo", "r2vpo", "r2vpo_off")
#: Environment steps of each task, cheap tasks first
TASKS = {
    "CartPole-v1": 60_000,
    "MountainCarContinuous-v0": 100_000,
    "Acrobot-v1": 150_000,
    "Pendulum-v1": 200_000,
    "MinAtar/Asterix-v1": 300_000,
    "MinAtar/Breakout-v1": 300_000,
    "MinAtar/Freeway-v1": 300_000,
    "MinAtar/Seaquest-v1": 300_000,
    "MinAtar/SpaceInvaders-v1": 300_000,
    "LunarLander-v3": 300_000,
    "LunarLanderContinuous-v3": 300_000,
    "Swimmer-v5": 300_000,
    "Hopper-v5": 300_000,
    "HalfCheetah-v5": 300_000,
    "Walker2d-v5": 300_000,
    "Ant-v5": 300_000,
    "Humanoid-v5": 300_000,
    "BipedalWalker-v3": 500_000,
}
#: Far apart: environments of neighbouring seeds could share their initial states
SEEDS = (1000, 2000, 3000, 4000, 5000)
N_EVALUATIONS, N_EVAL_EPISODES, N_FINAL_EPISODES = 10, 10, 20
PACKAGES = ("stable-baselines3", "torch", "numpy", "gymnasium", "mujoco", "box2d", "minatar")

COLUMNS = ("method", "task", "seed", "step", "return_mean", "return_std", "train_return")
RUN_COLUMNS = ("method", "task", "seed", "steps", "cpu_seconds", "wall_seconds", "versions", "processor")
Row = dict[str, Any]


class Run(NamedTuple):
    """One training run. The order of fields is that of priority: all tasks with a first seed, then a second."""

    seed: int
    task: str
    method: str


def algorithm(method: str) -> type[OnPolicyAlgorithm]:
    """The class of a method. Runs of PPO don't depend on our package, which they don't import."""
    if method == "ppo":
        return PPO
    import sb3_r2vpo

    return sb3_r2vpo.R2VPOOff if method == "r2vpo_off" else sb3_r2vpo.R2VPO


def make_env(task: str) -> gym.Env:
    """The task as `gym.make` has it; MinAtar's 10x10 planes, too small for `CnnPolicy`, as a vector of floats."""
    if not task.startswith("MinAtar/"):
        return Monitor(gym.make(task))
    if task not in gym.registry:
        from minatar.gym import register_envs

        register_envs()
    # The checker would only warn of MinAtar's types
    env = gym.make(task, disable_env_checker=True)
    return Monitor(DtypeObservation(FlattenObservation(env), np.float32))


def evaluation_seed(run: Run, number: int) -> int:
    """Other initial states for each evaluation and training seed; the same ones for all methods."""
    return int(np.random.SeedSequence([run.seed, number]).generate_state(1)[0] >> 1)


class Evaluations(BaseCallback):
    """Evaluate the deterministic policy at even intervals, the last time when training ends, and time the rest."""

    def __init__(self, run: Run, n_timesteps: int) -> None:
        super().__init__()
        self.run, self.n_timesteps = run, n_timesteps
        self.env = DummyVecEnv([lambda: make_env(run.task)])
        self.rows: list[Row] = []
        #: Seconds of evaluations, of the processor and of the wall
        self.seconds = np.zeros(2)

    def _on_step(self) -> bool:
        number = len(self.rows) + 1
        if number < N_EVALUATIONS and self.num_timesteps >= number * self.n_timesteps / N_EVALUATIONS:
            self.evaluate(N_EVAL_EPISODES)
        return True

    def _on_training_end(self) -> None:
        self.evaluate(N_FINAL_EPISODES)
        self.env.close()

    def evaluate(self, n_episodes: int) -> None:
        start = clocks()
        self.env.seed(evaluation_seed(self.run, len(self.rows) + 1))
        returns, _ = evaluate_policy(self.model, self.env, n_episodes, deterministic=True, return_episode_rewards=True)
        # Empty until a first episode has ended
        train_returns = [episode["r"] for episode in self.model.ep_info_buffer]
        row = {
            "method": self.run.method,
            "task": self.run.task,
            "seed": self.run.seed,
            "step": self.num_timesteps,
            "return_mean": round(float(np.mean(returns)), 3),
            "return_std": round(float(np.std(returns)), 3),
            "train_return": round(float(safe_mean(train_returns)), 3) if train_returns else "",
        }
        self.rows.append(row)
        print(*row.values(), flush=True)
        self.seconds += clocks() - start


def clocks() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


def package_versions(method: str) -> str:
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    if method != "ppo":
        versions["sb3-r2vpo"] = f"{version('sb3-r2vpo')}@{source_state()}"
    return " ".join(f"{name}={number}" for name, number in versions.items())


@functools.cache
def source_state() -> str:
    """The last commit of the package's source, and whether there are changes on top of it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *arguments, "--", "sb3_r2vpo"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("-dirty" if git("status", "--porcelain") else "")


def processor() -> str:
    """The processor's name, which `platform.processor()` leaves empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def train(run: Run, n_timesteps: int) -> tuple[list[Row], Row]:
    """
    Train once on one thread, with the default arguments but for those of the method.

    :return: A row for each evaluation, and one for the run
    """
    th.set_num_threads(1)
    make_model = algorithm(run.method)
    versions = package_versions(run.method)
    model = make_model("MlpPolicy", make_env(run.task), seed=run.seed, device="cpu", **METHODS[run.method])
    evaluations = Evaluations(run, n_timesteps)
    start = clocks()
    model.learn(n_timesteps, callback=evaluations)
    cpu_seconds, wall_seconds = clocks() - start - evaluations.seconds
    model.get_env().close()
    return evaluations.rows, {
        "method": run.method,
        "task": run.task,
        "seed": run.seed,
        "steps": model.num_timesteps,
        "cpu_seconds": round(cpu_seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "versions": versions,
        "processor": processor(),
    }


def paths(method: str) -> tuple[Path, Path]:
    return RESULTS / f"{method}.csv", RESULTS / f"{method}_runs.csv"


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time reads and writes the results."""
    RESULTS.mkdir(exist_ok=True)
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace a file by another one that is complete, whenever the process is killed."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    new = path.with_suffix(".tmp")
    new.write_text(text.getvalue())
    new.replace(path)


def run_of(row: Row) -> Run:
    return Run(int(row["seed"]), row["task"], row["method"])


def finished(method: str) -> set[Run]:
    """The runs that both files of a method have all rows of."""
    evaluations, runs = map(read_rows, paths(method))
    n_rows = Counter(map(run_of, evaluations))
    return {run for run in map(run_of, runs) if n_rows[run] == N_EVALUATIONS}


def save(run: Run, rows: list[Row], run_row: Row) -> None:
    """Append a run to both files, without rows that a run which was interrupted may have left there."""
    with locked():
        done = finished(run.method)
        if run in done:
            return
        for path, columns, new_rows in zip(paths(run.method), (COLUMNS, RUN_COLUMNS), (rows, [run_row]), strict=True):
            kept = [row for row in read_rows(path) if run_of(row) in done]
            write_rows(path, columns, [*kept, *new_rows])


def planned_runs(methods: Iterable[str], tasks: Iterable[str], n_seeds: int) -> list[Run]:
    """Seed by seed, in the order of `TASKS`, and the methods in turn."""
    tasks = sorted(tasks, key=list(TASKS).index)
    return [Run(seed, task, method) for seed in SEEDS[:n_seeds] for task in tasks for method in methods]


def execute(run: Run, n_timesteps: int) -> str:
    """Train and save, unless another process has done so in the meantime."""
    with locked():
        if run in finished(run.method):
            return "done before"
    rows, run_row = train(run, n_timesteps)
    save(run, rows, run_row)
    return f"{rows[-1]['return_mean']} in {run_row['wall_seconds']} s, {run_row['cpu_seconds']} s of CPU"


def fresh_processes(jobs: int) -> Executor:
    """A new process for each run."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def run_all(planned: Sequence[Run], jobs: int) -> bool:
    """
    Execute all planned runs that are not done; the others go on if one fails.

    :return: Whether none has failed
    """
    with locked():
        done = set().union(*(finished(method) for method in {run.method for run in planned}))
    open_runs = [run for run in planned if run not in done]
    print(f"{len(planned) - len(open_runs)} of {len(planned)} runs are done", flush=True)
    succeeded = True
    with fresh_processes(jobs) as pool:
        futures = {pool.submit(execute, run, TASKS[run.task]): run for run in open_runs}
        for future in as_completed(futures):
            run = futures[future]
            try:
                print(f"{run.method} {run.task} {run.seed}: {future.result()}", flush=True)
            except Exception:
                succeeded = False
                print(f"{run.method} {run.task} {run.seed} failed:\n{traceback.format_exc()}", flush=True)
    return succeeded


def status(methods: Iterable[str], tasks: Iterable[str], n_seeds: int) -> None:
    for method in methods:
        done = finished(method)
        planned = planned_runs([method], tasks, n_seeds)
        counts = {task: sum(run in done for run in planned if run.task == task) for task in tasks}
        print(f"{method:10} {sum(counts.values()):3} of {len(planned):3}  {counts}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "status"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=COMPARED)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS), help="number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args(arguments)
    if args.command == "status":
        status(args.methods, args.tasks, args.seeds)
        return 0
    return 0 if run_all(planned_runs(args.methods, args.tasks, args.seeds), args.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
