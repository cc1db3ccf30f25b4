"""
Kill training by SIGKILL at random moments, resume it until it is done, and compare its weights with those of a training that
was left alone; and kill it inside of saving.

    python benchmarks/faults/kills.py                       all cases, about half an hour
    python benchmarks/faults/kills.py --case save           one of them

One row a case is appended to ``results/kills.csv``; cases that have one are left out, so that it can be run again.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing as mp
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kills.csv"
COLUMNS = ["case", "kills", "resumed", "equal", "seconds", "versions"]

#: Steps of about a minute's training on one core
STEPS = {
    "R2VPO, defaults": 60_000,
    "R2VPOOff, defaults": 45_000,
    "R2VPO, DM Control settings": 80_000,
    "R2VPOOff, DM Control settings": 65_000,
    "R2VPO, language model": 27_000,
}


def make(case: str, folder: Path) -> tuple[type, Any, dict[str, Any]]:
    """
    :param case: Key of :data:`STEPS`
    :param folder: For what the case needs on disk
    :return: Algorithm, environments, and its arguments
    """
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    import sb3_r2vpo.envs  # noqa: F401
    from sb3_r2vpo import R2VPO, R2VPOOff, presets

    if case == "R2VPO, language model":
        return R2VPO, *_language_model(folder)
    policy = {"policy": "MlpPolicy"}
    if case == "R2VPO, defaults":
        return R2VPO, make_vec_env("CartPole-v1", seed=0), policy
    if case == "R2VPOOff, defaults":
        return R2VPOOff, make_vec_env("Pendulum-v1", seed=0), policy
    off = case.startswith("R2VPOOff")
    env = make_vec_env("Hopper-v5" if off else "dm_control/cheetah-run-v0", n_envs=4, seed=0)
    settings = presets.dm_control_off() if off else presets.dm_control()
    return R2VPOOff if off else R2VPO, VecNormalize(env, gamma=0.99), policy | settings


def _language_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch as th

    from sb3_r2vpo.llm import CausalLMPolicy, TokenVecEnv
    from sb3_r2vpo.llm.tasks import BiasedTeacherTask
    from sb3_r2vpo.llm.tasks.biased_teacher import tiny_model

    task = BiasedTeacherTask(n_operations=1)
    base = folder / "base"
    if not base.is_dir():
        th.manual_seed(0)
        tiny_model(task).save_pretrained(folder / "base.partial")
        (folder / "base.partial").rename(base)
    env = TokenVecEnv(task, 8, 4, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens)
    arguments = {"n_steps": 1, "batch_size": 16, "n_epochs": 1, "normalize_advantage": False}
    return env, {"policy": CausalLMPolicy, "policy_kwargs": {"model": str(base)}, **arguments}


def train(case: str, folder: Path, n_timesteps: int, every: float | None, base: Path) -> None:
    """
    Train, or go on, to the end; then write a checksum of the weights.

    :param case: Key of :data:`STEPS`
    :param folder: For checkpoints and the result
    :param n_timesteps: Steps
    :param every: Seconds between two checkpoints; ``None`` for none at all
    :param base: For what the case needs on disk
    """
    import torch as th

    from sb3_r2vpo.common.checkpoint import CheckpointCallback, list_checkpoints, remaining_timesteps, resume

    th.set_num_threads(1)
    algorithm, env, arguments = make(case, base)
    goes_on = bool(list_checkpoints(folder))
    model = resume(folder, env, device="cpu") if goes_on else algorithm(env=env, seed=1, device="cpu", **arguments)
    print("resumed" if goes_on else "begun", flush=True)
    n_steps = remaining_timesteps(model) if goes_on else n_timesteps
    callback = None if every is None else CheckpointCallback(folder, every=every)
    model.learn(n_steps, callback=callback, reset_num_timesteps=not goes_on)
    weights = hashlib.sha256()
    for tensor in (*model.policy.state_dict().values(), *model.policy_loss.multiplier.state_dict().values()):
        weights.update(tensor.cpu().numpy().tobytes())
    result = {"weights": weights.hexdigest(), "num_timesteps": model.num_timesteps}
    (folder / "result.json").write_text(json.dumps(result))


def start(case: str, folder: Path, n_timesteps: int, every: float | None, base: Path) -> subprocess.Popen:
    """:return: A process that calls :func:`train`"""
    arguments = [case, str(folder), str(n_timesteps), str(every or 0), str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_training(case: str, n_kills: int, n_timesteps: int, every: float = 1.0) -> dict[str, Any]:
    """
    :param case: Key of :data:`STEPS`
    :param n_kills: How often to kill it, at most
    :param n_timesteps: Steps of the training
    :param every: Seconds between two checkpoints
    :return: A row
    """
    begin, generator = time.monotonic(), random.Random(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, killed = folder / "alone", folder / "killed"
        alone.mkdir()
        killed.mkdir()
        process = start(case, alone, n_timesteps, None, folder)
        assert process.stdout is not None
        process.stdout.readline()
        training_begin = time.monotonic()
        if process.wait() != 0:
            raise RuntimeError(f"The training of {case!r} has failed.")
        seconds = time.monotonic() - training_begin
        kills = resumed = 0
        while not (killed / "result.json").exists():
            process = start(case, killed, n_timesteps, every, folder)
            assert process.stdout is not None
            if process.stdout.readline() == "resumed\n":
                resumed += 1
            try:
                # On average, it is nearly done with the last kill
                process.wait(generator.uniform(0, 2 * seconds / (n_kills + 1)) if kills < n_kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            if process.wait() > 0:
                raise RuntimeError(f"The training of {case!r} can't go on.")
        results = [json.loads((path / "result.json").read_text()) for path in (alone, killed)]
    return _row(case, kills, resumed, results[0] == results[1], begin)


def save_again_and_again(folder: str, started: Connection) -> None:
    """Save checkpoints until killed; send whether it goes on from one."""
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_r2vpo import R2VPOOff
    from sb3_r2vpo.common.checkpoint import CheckpointCallback, list_checkpoints, remaining_timesteps, resume

    goes_on = bool(list_checkpoints(folder))
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    # Most of the time is that of writing
    options: dict[str, Any] = {"n_steps": 4, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [256, 256]}}
    model = resume(folder, env) if goes_on else R2VPOOff("MlpPolicy", env, **options)
    started.send(goes_on)
    steps = remaining_timesteps(model) if goes_on else 10**6
    model.learn(steps, callback=CheckpointCallback(folder, save_freq=1, every=None), reset_num_timesteps=not goes_on)


def kill_saving(n_kills: int) -> dict[str, Any]:
    """
    :param n_kills: How often to kill it while a checkpoint is being written, which a part of a file shows that is left behind
    :return: A row; ``resumed`` counts the starts that could go on from a checkpoint, all but the first, and ``equal`` says
        that each time the newest checkpoint was whole
    """
    # All that the forked processes import: it would take most of their time
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env  # noqa: F401

    from sb3_r2vpo import R2VPOOff  # noqa: F401
    from sb3_r2vpo.common.checkpoint import list_checkpoints, newest_readable

    th.set_num_threads(1)
    begin, generator, context = time.monotonic(), random.Random("save"), mp.get_context("fork")
    starts = resumed = inside = whole = 0
    with tempfile.TemporaryDirectory() as name:

        def parts() -> set[Path]:
            return set(Path(name).glob(".checkpoint*.partial"))

        while inside < n_kills:
            starts, left = starts + 1, parts()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=save_again_and_again, args=(name, sender))
            process.start()
            sender.close()
            resumed += receiver.recv()
            # The first save shows how long one takes, the second is broken off
            while not (first := parts() - left):
                time.sleep(0.001)
            start = time.monotonic()
            while parts() & first:
                time.sleep(0.001)
            duration = time.monotonic() - start
            while not (second := parts() - left - first):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, duration))
            process.kill()
            process.join()
            inside += bool(parts() & second)
            whole += newest_readable(name) == list_checkpoints(name)[-1]
    return _row("inside of saving", inside, resumed, whole == starts and resumed == starts - 1, begin)


def _row(case: str, kills: int, resumed: int, equal: bool, begin: float) -> dict[str, Any]:
    packages = ("sb3-r2vpo", "stable-baselines3", "gymnasium", "torch", "numpy", "mujoco")
    versions = " ".join(f"{package} {version(package)}" for package in packages)
    seconds = round(time.monotonic() - begin)
    return {"case": case, "kills": kills, "resumed": resumed, "equal": equal, "seconds": seconds, "versions": versions}


def main() -> None:
    """Run the cases that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*STEPS, "save"], action="append", help="all by default")
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        case, folder, n_timesteps, every, base = options.train
        train(case, Path(folder), int(n_timesteps), float(every) or None, Path(base))
        return
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for case in options.case or [*STEPS, "save"]:
        label = "inside of saving" if case == "save" else case
        if label in {row["case"] for row in rows}:
            continue
        row = kill_saving(50) if case == "save" else kill_training(case, options.kills, STEPS[case])
        print(row, flush=True)
        rows.append(row)
        RESULTS.parent.mkdir(exist_ok=True)
        partial = RESULTS.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        shutil.move(partial, RESULTS)


if __name__ == "__main__":
    main()
