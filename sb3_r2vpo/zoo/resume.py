"""`r2vpo train --resume`: which run, with which of its options, and how its logs go on."""

import argparse
import json
import os
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_sb3 import EnvironmentName
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from sb3_r2vpo.common.checkpoint import list_checkpoints
from sb3_r2vpo.zoo.companions import runs_of

#: Where a run keeps its checkpoints, below its folder
CHECKPOINTS = "checkpoints"

#: What is read from the run's own files instead, or has had its effect
_NOT_REPEATED = (
    *("hyperparams", "conf_file", "trained_agent", "trial_id", "storage", "study_name", "log_folder", "uuid", "trust"),
    *("gym_packages", "command", "saved_hyperparams", "optimize_hyperparameters"),
)


def read_settings(path: Path, trust: bool = False) -> dict[str, Any]:
    """
    Read ``config.yml`` or ``args.yml`` of a run.

    :param path: The file
    :param trust: Whether to make whatever objects it names
    :return: Its contents
    :raises ValueError: There is none, it is torn, or it would run code.
    """
    from sb3_r2vpo.zoo.trust import SettingsLoader

    try:
        with path.open() as file:
            settings = yaml.load(file, Loader=yaml.UnsafeLoader if trust else SettingsLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read, so that it is not known what to resume: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: the run ended before they were written. Start it anew.")
    return settings


def find_run(algo: str, env: str, folder: Path) -> Path:
    """
    The latest run that can go on: one that has checkpoints, or was killed before the first.

    :param algo: The algorithm
    :param env: The environment
    :param folder: ``--log-folder``
    :return: The run's folder
    :raises ValueError: There is none.
    """
    name = EnvironmentName(env)
    for run in runs_of(folder / algo, name):
        has_settings = all((run / name / file).is_file() for file in ("config.yml", "args.yml"))
        if has_settings and (list_checkpoints(run / CHECKPOINTS) or not (run / f"{name}.zip").is_file()):
            return run
    raise ValueError(f"There is no run of {algo} on {env} in {folder} that could be resumed: none has a checkpoint.")


def resumed_command(arguments: Sequence[str], trust: bool) -> tuple[Path, list[str]]:
    """
    The command line with which a run goes on: its own options, with those that may change.

    :param arguments: Options beside ``--resume``, and its value
    :param trust: See :func:`read_settings`
    :return: The run's folder, and options for the Zoo and us
    :raises ValueError: There is no such run, or an option is one that can't change.
    """
    parser = argparse.ArgumentParser(prog="r2vpo train --resume", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", type=Path)
    parser.add_argument("--algo", default="r2vpo")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("-f", "--log-folder", type=Path, default=Path("logs"))
    # These may change
    parser.add_argument("-n", "--n-timesteps", type=int)
    for name in ("--device", "--num-threads", "--verbose", "--log-interval", "--env-timeout"):
        parser.add_argument(name)
    parser.add_argument("-P", "--progress", action="store_true")
    parser.add_argument("--restart-envs", action="store_true")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    options, others = parser.parse_known_args(arguments)
    if others:
        raise ValueError(
            f"`--resume` goes on with the run's own settings: leave out {' '.join(others)}. What may change is --n-timesteps, "
            "--device, --num-threads, --verbose, --log-interval, --progress, --env-timeout and --restart-envs."
        )
    run: Path = options.resume or find_run(options.algo, options.env, options.log_folder)
    if not run.is_dir():
        raise ValueError(f"There is no run {run}. `--resume` takes a run's folder, such as logs/r2vpo/CartPole-v1_1, or none.")
    saved = read_settings(_args_file(run), trust)
    if missing := set(saved.get("gym_packages") or []) - set(options.gym_packages):
        raise ValueError(
            f"The run imports {', '.join(sorted(missing))}, and what a file asks for is not imported unless you say so: add "
            f"`--gym-packages {' '.join(saved['gym_packages'])}`."
        )
    changed = {
        name: value
        for name, value in vars(options).items()
        if value not in (None, False, []) and name not in ("resume", "algo", "env", "log_folder")
    }
    changed["log_folder"] = str(run.resolve().parent.parent)
    return run, _as_options({name: value for name, value in saved.items() if name not in _NOT_REPEATED} | changed)


def _args_file(run: Path) -> Path:
    files = [*run.glob("*/args.yml")]
    if len(files) != 1:
        raise ValueError(f"{run} is no run that could be resumed: it has {len(files)} files args.yml. Start it anew.")
    return files[0]


def _as_options(arguments: dict[str, Any]) -> list[str]:
    options: list[str] = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            options += [option, *(f"{key}:{item!r}" for key, item in value.items())]
        elif isinstance(value, list | tuple):
            options += [option, *map(str, value)] if value else []
        elif value is True and name != "truncate_last_trajectory":
            options.append(option)
        elif value is not None and value is not False and value != "":
            options.append(f"{option}={value}")
    return options


# === Logs ===


class RolloutClock(BaseCallback):
    """
    Notes on the model when its rollout began: a checkpoint is that of a rollout's start, and the episodes that ended later,
    which the run's monitor files have as well, will come again.
    """

    def _on_rollout_start(self) -> None:
        self.model.rollout_began = time.time()  # type: ignore[attr-defined]

    def _on_training_end(self) -> None:
        # As of the rollout that would come next
        self._on_rollout_start()

    def _on_step(self) -> bool:
        return True


def _start(header: bytes) -> float:
    return json.loads(header.removeprefix(b"#"))["t_start"]


def monitors_are_whole(run: Path) -> bool:
    """
    :param run: The run's folder
    :return: Whether its monitor files have what they begin with, so that they can be appended to
    """
    try:
        for path in run.glob("*monitor.csv"):
            header, columns = path.read_bytes().split(b"\n")[:2]
            if not (_start(header) and columns.startswith(b"r,l,t")):
                return False
    except (ValueError, KeyError):
        return False
    return True


def continue_monitors(env: VecEnv, run: Path, until: float) -> None:
    """
    Take from a run's monitor files the episodes that will come again, and a torn last line; and let the times of the next ones
    go on from those in the files, which count from when the run was started.

    :param env: The training's environments, whose monitors append to the files
    :param run: The run's folder
    :param until: When the checkpoint's rollout began, in seconds since the epoch
    """
    for path in run.glob("*monitor.csv"):
        header, columns, *rows = path.read_bytes().splitlines(keepends=True)
        t_start, column = _start(header), columns.strip().split(b",").index(b"t")
        size = len(header) + len(columns)
        for row in rows:
            if not row.endswith(b"\n") or t_start + float(row.split(b",")[column]) > until:
                break
            size += len(row)
        # In place, as it is open already
        os.truncate(path, size)
        monitor: Any = env
        while monitor is not None and not isinstance(monitor, VecMonitor):
            monitor = getattr(monitor, "venv", None)
        if monitor is not None:
            monitor.t_start = t_start
        else:
            # "3.monitor.csv" is that of the fourth environment
            env.env_method("set_wrapper_attr", "t_start", t_start, indices=int(path.name.partition(".")[0]))


def continue_evaluations(callback: EvalCallback, run: Path, num_timesteps: int) -> None:
    """
    Give an evaluation callback what it has written so far, to which it appends.

    :param callback: The callback
    :param run: The run's folder
    :param num_timesteps: Steps at the checkpoint: evaluations after it will come again
    """
    path = run / "evaluations.npz"
    if not path.is_file():
        return
    try:
        with np.load(path) as saved:
            kept = saved["timesteps"] <= num_timesteps
            callback.evaluations_timesteps = saved["timesteps"][kept].tolist()
            callback.evaluations_results = saved["results"][kept].tolist()
            callback.evaluations_length = saved["ep_lengths"][kept].tolist()
            if "successes" in saved:
                callback.evaluations_successes = saved["successes"][kept].tolist()
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        warnings.warn(f"{path} is torn, and begins anew: {error}", stacklevel=2)
