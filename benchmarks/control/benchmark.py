"""Tuned PPO, R2VPO and their kin on ten tasks of the DeepMind Control Suite.

    python benchmarks/control/benchmark.py study              an Optuna study of each main method, on three tasks
    python benchmarks/control/benchmark.py final              settings of each on five tasks, whole runs
    python benchmarks/control/benchmark.py coefficients       the other methods' own coefficient, on the studies' tasks
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

# Before NumPy and PyTorch are loaded, here and in the workers: one thread for each process
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import pandas as pd
from experiment import (
    COMPILED,
    HARD_TASKS,
    MAIN_METHODS,
    METHODS,
    TASKS,
    Method,
    Row,
    Settings,
    in_our_loop,
    last_quarter,
    train,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tqdm import tqdm

from sb3_r2vpo import R2VPO, R2VPOOff

RESULTS = Path(__file__).parent / "results"
EVALUATIONS, STUDIES, FINALS = RESULTS / "evaluations.csv", RESULTS / "studies.log", RESULTS / "finals.csv"
COEFFICIENT_RUNS = RESULTS / "coefficients.csv"
N_SEEDS = {method: 5 if method in MAIN_METHODS else 3 for method in METHODS}
N_TIMESTEPS = 1_000_000

STUDY_TASKS = ("cheetah-run", "ball_in_cup-catch", "reacher-hard")
STUDY_TIMESTEPS = 300_000
#: Seeds of the studies, which the comparison does not use
STUDY_SEED = 1000

FINAL_TASKS = (
    "finger-spin",
    "cartpole-swingup_sparse",
    "cartpole-swingup",
    "cheetah-run",
    "reacher-hard",
)
FINAL_SEED = 100


def floor(min_var_coef: float) -> Settings:
    """The multiplier's lower bound, without what came after the final round."""
    return {"var_coef": "auto", "objective_kwargs": {"min_var_coef": min_var_coef, "compensate_entropy": False}}


#: What studies and the final round begin with: PPO's shipped settings, and nothing that was found after them
TUNED = {
    "ppo": METHODS["ppo"],
    "r2vpo": Method(R2VPO, own=floor(0.0)),
    "r2vpo_off": Method(R2VPOOff, own={**floor(0.0), "utd_ratio": 2}),
}

#: The kind of a run: a named tuple of what tells it from others, columns of its CSV
RunT = TypeVar("RunT", bound=NamedTuple)


class Run(NamedTuple):
    """One training run. The order of fields is that of priority: all methods and tasks with a first seed, then a second."""

    seed: int
    task: str
    method: str


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append all rows or, if the process is killed before, none; several processes may do so at a time."""
    rows = list(rows)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def finished(path: Path, kind: type[RunT]) -> set[RunT]:
    """The runs that a CSV has rows of."""
    if not path.exists():
        return set()
    return {kind(*run) for run in pd.read_csv(path)[list(kind._fields)].itertuples(index=False)}


def planned_runs(methods: Iterable[str], tasks: Iterable[str], seeds: int | None) -> list[Run]:
    return sorted(
        Run(seed, task, method)
        for method, task in product(methods, tasks)
        for seed in range(N_SEEDS[method] if seeds is None else seeds)
    )


def fresh_processes(workers: int) -> ProcessPoolExecutor:
    """A new process for each run: EnvPool does not give back all memory of the environments that it has closed."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def execute_all(
    planned: Sequence[RunT], done: set[RunT], execute: Callable[[RunT], list[Row]], path: Path, workers: int
) -> None:
    """Execute all planned runs that are not done, each in a process of its own, and append the rows of each as it ends."""
    open_runs = [run for run in planned if run not in done]
    with (
        fresh_processes(workers) as pool,
        tqdm(total=len(planned), initial=len(planned) - len(open_runs), unit="run") as progress,
    ):
        futures = {pool.submit(execute, run): run for run in open_runs}
        for future in as_completed(futures):
            rows = future.result()
            append_rows(path, rows)
            progress.set_postfix_str(f"{' '.join(map(str, futures[future]))}: {rows[-1]['mean_return']}")
            progress.update()


def execute(run: Run, n_timesteps: int) -> list[Row]:
    method = METHODS[run.method]
    rows = train(*in_our_loop(method.algorithm, method.settings(run.task)), run.task, run.seed, n_timesteps)
    return [{"method": run.method, **row} for row in rows]


def run(args: argparse.Namespace) -> None:
    planned = planned_runs(args.methods, args.tasks, args.seeds)
    execute_all(planned, finished(EVALUATIONS, Run), partial(execute, n_timesteps=args.timesteps), EVALUATIONS, args.workers)


def status(args: argparse.Namespace) -> None:
    done = finished(EVALUATIONS, Run)
    for method in args.methods:
        counts = {task: sum(Run(seed, task, method) in done for seed in range(N_SEEDS[method])) for task in args.tasks}
        print(f"{method:12} {sum(counts.values()):3} of {N_SEEDS[method] * len(counts):3}  {counts}")


def shared_space(trial: optuna.Trial) -> Settings:
    """What every method is tuned over: how much is collected for an update, and what is made of it."""
    return {
        "n_envs": trial.suggest_categorical("n_envs", [16, 32, 64]),
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512]),
        "n_epochs": trial.suggest_categorical("n_epochs", [5, 10, 20]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        "gamma": trial.suggest_categorical("gamma", [0.98, 0.99]),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.9, 0.95]),
        "ent_coef": trial.suggest_categorical("ent_coef", [0.0, 0.003, 0.01]),
    }


def ppo_space(trial: optuna.Trial) -> Settings:
    return {**shared_space(trial), "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3])}


def r2vpo_space(trial: optuna.Trial) -> Settings:
    target_variance = trial.suggest_float("target_variance", 0.003, 0.05, log=True)
    return {**shared_space(trial), "var_coef": "auto", "target_variance": target_variance}


def r2vpo_off_space(trial: optuna.Trial) -> Settings:
    return {
        **shared_space(trial),
        "var_coef": "auto",
        "target_variance": trial.suggest_float("target_variance", 0.01, 0.2, log=True),
        "replay_capacity": trial.suggest_categorical("replay_capacity", [2, 4, 8]),
    }


SPACES: dict[str, Callable[[optuna.Trial], Settings]] = {
    "ppo": ppo_space,
    "r2vpo": r2vpo_space,
    "r2vpo_off": r2vpo_off_space,
}
#: Where every study begins: the settings of the first runs, and smaller rollouts in smaller minibatches
STARTS = (
    {
        "n_envs": 64,
        "batch_size": 512,
        "n_epochs": 10,
        "learning_rate": 3e-4,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "ent_coef": 0.0,
    },
    {
        "n_envs": 16,
        "batch_size": 256,
        "n_epochs": 20,
        "learning_rate": 3e-4,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "ent_coef": 0.003,
    },
)
OWN_STARTS = {
    "ppo": {"clip_range": 0.2},
    "r2vpo": {"target_variance": 0.01},
    "r2vpo_off": {"target_variance": 0.05, "replay_capacity": 4},
}

#: The final round is of whole runs: what wins after 300,000 steps with many updates of small rollouts collapses before 1M.
#: Policies begin with a standard deviation of one, SB3's default: with 0.6, PPO never finds a reward on finger-spin.
SHARED: Settings = {
    "policy_kwargs": {"net_arch": [128, 128]},
    "n_envs": 32,
    "n_steps": 128,
    "batch_size": 512,
    "learning_rate": "lin_3e-4",
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
}
ON_POLICY: Settings = {**SHARED, "n_epochs": 20}
#: 10 epochs with `utd_ratio=2`: as many gradient steps as 20 epochs on-policy
REPLAY: Settings = {**SHARED, "n_epochs": 10, "target_variance": 0.05, "replay_capacity": 2}
#: Advantages in units of the normalised rewards, about a tenth of what they are with a standard deviation of one; so is what
#: is weighed against them
RAW: Settings = {"normalize_advantage": False, "learning_rate": "lin_1e-3", "ent_coef": 0.003}
FINALISTS: dict[str, dict[str, Settings]] = {
    "ppo": {
        "rate 3e-4": {**ON_POLICY, "clip_range": 0.2},
        "rate 6e-4": {**ON_POLICY, "clip_range": 0.2, "learning_rate": "lin_6e-4"},
        "rate 1e-3": {**ON_POLICY, "clip_range": 0.2, "learning_rate": "lin_1e-3"},
        "rate 1e-3, 10 epochs": {**ON_POLICY, "clip_range": 0.2, "learning_rate": "lin_1e-3", "n_epochs": 10},
        "rate 1e-3, raw advantages": {**ON_POLICY, "clip_range": 0.2, **RAW},
    },
    "r2vpo": {
        "no floor": {**ON_POLICY, **floor(0.0), "target_variance": 0.02},
        "no floor, rate 6e-4": {**ON_POLICY, **floor(0.0), "target_variance": 0.02, "learning_rate": "lin_6e-4"},
        "floor 1, rate 6e-4": {
            **ON_POLICY,
            "target_variance": 0.02,
            **floor(1.0),
            "learning_rate": "lin_6e-4",
        },
        "floor 0.3, rate 1e-3, 10 epochs": {
            **ON_POLICY,
            "target_variance": 0.02,
            **floor(0.3),
            "learning_rate": "lin_1e-3",
            "n_epochs": 10,
        },
        "floor 0.1, rate 1e-3, 10 epochs, raw advantages": {
            **ON_POLICY,
            "target_variance": 0.05,
            **floor(0.1),
            "n_epochs": 10,
            **RAW,
            "ent_coef": 0.002,
        },
    },
    "r2vpo_off": {
        "no floor": {**REPLAY, **floor(0.0)},
        "no floor, rate 6e-4": {**REPLAY, **floor(0.0), "learning_rate": "lin_6e-4"},
        "floor 1, rate 6e-4": {**REPLAY, **floor(1.0), "learning_rate": "lin_6e-4"},
        "floor 0.3, rate 6e-4": {**REPLAY, **floor(0.3), "learning_rate": "lin_6e-4"},
        "floor 0.1, rate 1e-3, raw advantages": {**REPLAY, **floor(0.1), **RAW},
    },
}


def trial_score(trial: optuna.Trial, method_name: str, workers: int) -> float:
    """Mean return over the study's tasks and the last quarter of the evaluations."""
    method = TUNED[method_name]
    tuned = {**SPACES[method_name](trial), **COMPILED}
    seed = STUDY_SEED + trial.number
    with fresh_processes(workers) as pool:
        futures = {
            task: pool.submit(
                train, *in_our_loop(method.algorithm, {**method.settings(task), **tuned}), task, seed, STUDY_TIMESTEPS
            )
            for task in STUDY_TASKS
        }
    scores = []
    for task, future in futures.items():
        rows = future.result()
        scores.append(last_quarter(rows))
        trial.set_user_attr(task, scores[-1])
        trial.set_user_attr(f"{task} cpu_seconds", rows[-1]["cpu_seconds"])
    return float(np.mean(scores))


def open_study(method: str, seed: int) -> optuna.Study:
    """The study of a method in ``results/studies.log``, to begin or to go on with."""
    storage = JournalStorage(JournalFileBackend(str(STUDIES)))
    optuna_study = optuna.create_study(study_name=method, storage=storage, direction="maximize", load_if_exists=True)
    # Another one after each restart: the sampler would draw the same settings again
    sampler_seed = seed + len(optuna_study.trials)
    optuna_study.sampler = optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True, seed=sampler_seed)
    for start in STARTS:
        optuna_study.enqueue_trial({**start, **OWN_STARTS[method]}, skip_if_exists=True)
    return optuna_study


def study(args: argparse.Namespace) -> None:
    """Trials of all methods in turn, so that their budgets are equal whenever it is stopped; those cut off do not count."""
    studies = {method: open_study(method, args.seed) for method in args.methods}
    for n_trials in range(1, args.trials + 1):
        for method, optuna_study in studies.items():
            if len(optuna_study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < n_trials:
                score = partial(trial_score, method_name=method, workers=args.workers)
                optuna_study.optimize(score, n_trials=1, catch=(RuntimeError, ValueError))


class Final(NamedTuple):
    """One run of the final round; the seed first, as in :class:`Run`."""

    seed: int
    task: str
    method: str
    finalist: str


def tuning_rows(run: "Final | Coefficient", method: Method, settings: Settings, n_timesteps: int) -> list[Row]:
    """Train with settings in place of the method's own, and score the run by the last quarter of its evaluations."""
    arguments = in_our_loop(method.algorithm, {**method.settings(run.task), **settings})
    rows = train(*arguments, run.task, run.seed, n_timesteps)
    return [{**run._asdict(), **rows[-1], "mean_return": last_quarter(rows)}]


def execute_final(final: Final) -> list[Row]:
    settings = {**FINALISTS[final.method][final.finalist], **COMPILED}
    return tuning_rows(final, TUNED[final.method], settings, N_TIMESTEPS)


def final(args: argparse.Namespace) -> None:
    """The finalists of each method on five tasks, over all steps, with the learning rate annealed."""
    planned = [
        Final(seed, task, method, finalist)
        for seed in range(FINAL_SEED, FINAL_SEED + args.seeds)
        for task in FINAL_TASKS
        for method in args.methods
        for finalist in FINALISTS[method]
    ]
    execute_all(planned, finished(FINALS, Final), execute_final, FINALS, args.workers)


#: What methods without a study are tuned over, all else as PPO has it
COEFFICIENTS: dict[str, dict[float, Settings]] = {
    "r2vpo_fixed": {value: {"var_coef": value} for value in (0.3, 1.0, 3.0)},
    "spo": {value: {"objective_kwargs": {"clip_range": value}} for value in (0.1, 0.2, 0.4)},
    "exact_kl": {value: {"objective_kwargs": {"kl_coef": value}} for value in (0.3, 1.0, 3.0)},
    "trpo": {value: {"target_kl": value} for value in (0.003, 0.01, 0.03)},
}


class Coefficient(NamedTuple):
    """One run with a value of a method's own coefficient; the seed first, as in :class:`Run`."""

    seed: int
    task: str
    method: str
    coefficient: float


def execute_coefficient(run: Coefficient) -> list[Row]:
    return tuning_rows(run, METHODS[run.method], COEFFICIENTS[run.method][run.coefficient], STUDY_TIMESTEPS)


def coefficients(args: argparse.Namespace) -> None:
    """Runs of the studies' length and tasks for each value."""
    planned = [
        Coefficient(STUDY_SEED, task, method, value)
        for method in args.methods
        for task in STUDY_TASKS
        for value in COEFFICIENTS[method]
    ]
    execute_all(planned, finished(COEFFICIENT_RUNS, Coefficient), execute_coefficient, COEFFICIENT_RUNS, args.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (run, status):
        subparser = commands.add_parser(command.__name__)
        subparser.set_defaults(command=command)
        subparser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        subparser.add_argument("--tasks", nargs="+", choices=(*TASKS, *HARD_TASKS), default=TASKS)
    runner = commands.choices["run"]
    runner.add_argument("--seeds", type=int, help="seeds of each method (default: 5 of the main methods, 3 of the others)")
    runner.add_argument("--timesteps", type=int, default=N_TIMESTEPS)
    tuner = commands.add_parser("study")
    tuner.set_defaults(command=study)
    tuner.add_argument("--methods", nargs="+", choices=SPACES, default=list(SPACES))
    tuner.add_argument("--trials", type=int, default=10)
    tuner.add_argument("--seed", type=int, default=0, help="of the sampler; processes that share a study take different ones")
    finalist = commands.add_parser("final")
    finalist.set_defaults(command=final)
    finalist.add_argument("--methods", nargs="+", choices=FINALISTS, default=list(FINALISTS))
    finalist.add_argument("--seeds", type=int, default=1)
    coefficient = commands.add_parser("coefficients")
    coefficient.set_defaults(command=coefficients)
    coefficient.add_argument("--methods", nargs="+", choices=COEFFICIENTS, default=list(COEFFICIENTS))
    for subparser in (runner, tuner, finalist, coefficient):
        subparser.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="processes of one thread each (default: one a core)"
        )
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
