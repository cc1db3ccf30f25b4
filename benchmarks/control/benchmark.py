"""Tuned PPO, R2VPO and their kin on ten tasks of the DeepMind Control Suite.

    python benchmarks/control/benchmark.py study ppo          an Optuna study of one method, on three tasks
    python benchmarks/control/benchmark.py run                all runs that are not in results/evaluations.csv yet
    python benchmarks/control/benchmark.py status             what is done and what is missing
    python benchmarks/control/report.py                       tables and figures

Every command goes on where it was stopped: finished trials and runs are kept, a run that was killed begins anew. Rows made on
several machines are merged by putting the lines of their CSV files together.
"""

import argparse
import csv
import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

# Before NumPy and PyTorch are loaded, here and in the workers: one thread for each process
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from experiment import METHODS, TASKS, Settings, train
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tqdm import tqdm

from sb3_r2vpo import R2VPO

RESULTS = Path(__file__).parent / "results"
EVALUATIONS, TRIALS, STUDIES = RESULTS / "evaluations.csv", RESULTS / "trials.csv", RESULTS / "studies.log"
MAIN_METHODS = ("ppo", "r2vpo", "r2vpo_off")
N_SEEDS = {method: 5 if method in MAIN_METHODS else 3 for method in METHODS}
N_TIMESTEPS = 1_000_000

STUDY_TASKS = ("walker-run", "cheetah-run", "reacher-hard")
STUDY_TIMESTEPS = 300_000
#: Seeds of the studies, which the comparison does not use
STUDY_SEED = 1000


class Run(NamedTuple):
    """One training run. The order of fields is that of priority: all methods and tasks with a first seed, then a second."""

    seed: int
    task: str
    method: str


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append all rows or, if the process is killed before, none; several processes may do so at a time."""
    rows = list(rows)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def finished_runs() -> set[Run]:
    if not EVALUATIONS.exists():
        return set()
    with EVALUATIONS.open(newline="") as file:
        return {Run(int(row["seed"]), row["task"], row["method"]) for row in csv.DictReader(file)}


def planned_runs(methods: Iterable[str], tasks: Iterable[str], seeds: int | None) -> list[Run]:
    return sorted(
        Run(seed, task, method)
        for method, task in product(methods, tasks)
        for seed in range(N_SEEDS[method] if seeds is None else seeds)
    )


def execute(run: Run, n_timesteps: int) -> tuple[Run, list[Settings]]:
    method = METHODS[run.method]
    return run, train(method.algorithm, method.settings, run.task, run.seed, n_timesteps)


def run(args: argparse.Namespace) -> None:
    done = finished_runs()
    planned = planned_runs(args.methods, args.tasks, args.seeds)
    open_runs = [run for run in planned if run not in done]
    print(f"{len(planned) - len(open_runs)} of {len(planned)} runs are done.")
    with (
        ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as workers,
        tqdm(total=len(planned), initial=len(planned) - len(open_runs), unit="run") as progress,
    ):
        futures = [workers.submit(execute, run, args.timesteps) for run in open_runs]
        for future in as_completed(futures):
            finished, rows = future.result()
            append_rows(EVALUATIONS, ({"method": finished.method, **row} for row in rows))
            progress.set_postfix_str(f"{finished.method} {finished.task} {finished.seed}: {rows[-1]['mean_return']}")
            progress.update()


def status(args: argparse.Namespace) -> None:
    done = finished_runs()
    for method in args.methods:
        counts = {task: sum(Run(seed, task, method) in done for seed in range(N_SEEDS[method])) for task in args.tasks}
        print(f"{method:12} {sum(counts.values()):3} of {N_SEEDS[method] * len(counts):3}  {counts}")


def shared_space(trial: optuna.Trial) -> Settings:
    """What every method is tuned over: the size of a rollout and what is made of it."""
    return {
        "n_envs": trial.suggest_categorical("n_envs", [16, 32, 64]),
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512]),
        "n_epochs": trial.suggest_categorical("n_epochs", [5, 10, 20]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        "gamma": trial.suggest_categorical("gamma", [0.98, 0.99, 0.995]),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.9, 0.95, 0.98]),
    }


def ppo_space(trial: optuna.Trial) -> Settings:
    return {**shared_space(trial), "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3])}


def r2vpo_space(trial: optuna.Trial) -> Settings:
    return {**shared_space(trial), "target_variance": trial.suggest_float("target_variance", 0.01, 0.1, log=True)}


def r2vpo_off_space(trial: optuna.Trial) -> Settings:
    return {
        **shared_space(trial),
        "target_variance": trial.suggest_float("target_variance", 0.02, 0.2, log=True),
        "replay_capacity": trial.suggest_categorical("replay_capacity", [2, 4, 8]),
    }


SPACES: dict[str, Callable[[optuna.Trial], Settings]] = {
    "ppo": ppo_space,
    "r2vpo": r2vpo_space,
    "r2vpo_off": r2vpo_off_space,
}


def trial_score(trial: optuna.Trial, method_name: str) -> float:
    """Mean return over the study's tasks and the last quarter of the evaluations."""
    method = METHODS[method_name]
    settings = {**method.settings, **SPACES[method_name](trial)}
    algorithm = method.algorithm
    if method_name == "ppo":
        # Bit for bit SB3's PPO, up to rounding where it is compiled, in half of the time
        algorithm = R2VPO
        settings |= {"objective": "ppo_clip", "objective_kwargs": {"clip_range": settings.pop("clip_range")}}
    if issubclass(algorithm, R2VPO):
        settings["compile"] = True
    scores = []
    for task in STUDY_TASKS:
        rows = train(algorithm, settings, task, STUDY_SEED + trial.number, STUDY_TIMESTEPS)
        scores.append(float(np.mean([row["mean_return"] for row in rows[-len(rows) // 4 :]])))
        trial.set_user_attr(task, round(scores[-1], 1))
    trial.set_user_attr("cpu_seconds", rows[-1]["cpu_seconds"])
    return float(np.mean(scores))


def study(args: argparse.Namespace) -> None:
    (method,) = args.methods
    RESULTS.mkdir(exist_ok=True)
    optuna_study = optuna.create_study(
        study_name=method,
        storage=JournalStorage(JournalFileBackend(str(STUDIES))),
        sampler=optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True, seed=args.seed),
        direction="maximize",
        load_if_exists=True,
    )
    # Both starting points are every method's: the settings of the first runs, and smaller rollouts in smaller minibatches
    shared = {"n_epochs": 10, "learning_rate": 3e-4, "gamma": 0.99, "gae_lambda": 0.95}
    own = {
        name: METHODS[method].settings[name] for name in ("clip_range", "target_variance") if name in METHODS[method].settings
    }
    for start in ({"n_envs": 64, "batch_size": 512}, {"n_envs": 16, "batch_size": 256}):
        optuna_study.enqueue_trial({**start, **shared, **own}, skip_if_exists=True)
    remaining = args.trials - sum(trial.state.is_finished() for trial in optuna_study.trials)
    if remaining > 0:
        optuna_study.optimize(partial(trial_score, method_name=method), n_trials=remaining, catch=(RuntimeError, ValueError))
    print(f"Best of {args.trials} trials: {optuna_study.best_value:.1f}, {optuna_study.best_params}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (run, status):
        subparser = commands.add_parser(command.__name__)
        subparser.set_defaults(command=command)
        subparser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        subparser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    runner = commands.choices["run"]
    runner.add_argument("--seeds", type=int, help="seeds of each method (default: 5 of the main methods, 3 of the others)")
    runner.add_argument("--timesteps", type=int, default=N_TIMESTEPS)
    runner.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread (default: one a core)")
    tuner = commands.add_parser("study")
    tuner.set_defaults(command=study)
    tuner.add_argument("methods", nargs=1, choices=SPACES)
    tuner.add_argument("--trials", type=int, default=16)
    tuner.add_argument("--seed", type=int, default=0, help="of the sampler; processes that share a study take different ones")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
