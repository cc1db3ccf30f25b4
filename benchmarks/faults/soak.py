"""
Train for an hour, and see whether memory, open files, threads or processes grow.

    python benchmarks/faults/soak.py --minutes 60     writes `results/soak.csv`, and the verdict to `results/soak.json`
    python benchmarks/faults/soak.py --verdict        the verdict on `results/soak.csv` again

One process trains, in turn: R2VPO with VecNormalize, checkpoints and resuming; R2VPOOff with replay, its replay file and
model saved and loaded; a separately optimised critic with correlated noise; gSDE; and environments in worker processes, of
which one is killed and started anew. Each training makes everything anew, so that what an earlier one has left behind adds up.
Another process samples that one.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "soak.csv"
#: Seconds between two samples
INTERVAL = 30.0
#: Share of the time, at its beginning, that is not looked at: imports and caches fill the memory
WARM_UP = 0.25
SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "device": "cpu"}


def checkpointed(folder: Path) -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_r2vpo import R2VPO
    from sb3_r2vpo.common.checkpoint import CheckpointCallback, resume

    def make_env() -> VecNormalize:
        return VecNormalize(make_vec_env("CartPole-v1", n_envs=4))

    model = R2VPO("MlpPolicy", make_env(), **SMALL)
    with CheckpointCallback(folder, save_freq=512) as checkpoints:
        model.learn(2048, callback=checkpoints)
    model = resume(folder, make_env())
    with CheckpointCallback(folder, save_freq=512) as checkpoints:
        model.learn(2048, callback=checkpoints, reset_num_timesteps=False)


def replayed(folder: Path) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_r2vpo import R2VPOOff

    env = make_vec_env("Pendulum-v1", n_envs=2)
    model = R2VPOOff("MlpPolicy", env, replay_capacity=4, **SMALL)
    model.learn(1024)
    model.save(folder / "model.zip")
    model.save_replay_buffer(folder / "replay.zip")
    model = R2VPOOff.load(folder / "model.zip", env=env)
    model.load_replay_buffer(folder / "replay.zip")
    model.learn(1024, reset_num_timesteps=False)


def separate_critic(folder: Path) -> None:
    from sb3_r2vpo import R2VPO

    critic = {"n_rollouts": 2, "n_epochs": 4, "std_scaled_learning_rate": True}
    R2VPO("MlpPolicy", "Pendulum-v1", critic_kwargs=critic, noise_exponent="auto", **SMALL).learn(1024)


def state_dependent(folder: Path) -> None:
    from sb3_r2vpo import R2VPO

    R2VPO("MlpPolicy", "Pendulum-v1", use_sde=True, **SMALL).learn(1024)


def restarted(folder: Path) -> None:
    import gymnasium as gym
    from faulty_env import FaultyEnv

    from sb3_r2vpo import R2VPO
    from sb3_r2vpo.common.worker_vec_env import WorkerVecEnv

    def make(index: int) -> Callable[[], gym.Env]:
        once = {"once": folder / "once", "window": (20, 20)}
        return lambda: FaultyEnv(gym.make("CartPole-v1"), "kill", index=index, **once)

    env = WorkerVecEnv([make(0), make(1)], restart=True)
    R2VPO("MlpPolicy", env, **SMALL).learn(512)
    assert env.n_restarts == 1
    env.close()


def train(seconds: float, progress: Path) -> None:
    """
    :param seconds: How long
    :param progress: A file for the number of rounds that are over
    """
    sys.path.insert(0, str(Path(__file__).parent))
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for part in (checkpointed, replayed, separate_critic, state_dependent, restarted):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder))
        rounds += 1
        progress.write_text(str(rounds))


# === Looking at it ===


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split()[0] for key, _, value in (line.partition(":") for line in lines) if value.strip()}


def descendants(pid: int) -> list[int]:
    """:return: Processes below one, also those whose parent is a fork server"""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in path.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def sample(pid: int) -> dict[str, float]:
    own = status(pid)
    return {
        "rss_mb": round(int(own["VmRSS"]) / 1024, 1),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(own["Threads"]),
        "processes": len(descendants(pid)),
    }


def soak(minutes: float) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "rounds"
        progress.write_text("0")
        command = [sys.executable, __file__, "--train", str(60 * minutes), str(progress)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["minutes", "rounds", "rss_mb", "open_files", "threads", "processes"])
            writer.writeheader()
            while True:
                try:
                    process.wait(INTERVAL)
                    break
                except subprocess.TimeoutExpired:
                    pass
                try:
                    now = sample(process.pid)
                except (FileNotFoundError, ProcessLookupError):
                    # A process of it has just ended
                    continue
                passed = round((time.monotonic() - start) / 60, 2)
                writer.writerow({"minutes": passed, "rounds": progress.read_text() or 0, **now})
                file.flush()
        if process.returncode != 0:
            raise RuntimeError(f"The training ended with exit status {process.returncode}.")


def slope(minutes: np.ndarray, values: np.ndarray, n_blocks: int = 9) -> tuple[float, float]:
    """
    :param minutes: Times
    :param values: What was measured then
    :param n_blocks: Blocks of equal length, over which is averaged first: neighbouring samples are alike
    :return: Growth in an hour, by least squares, and half of its 95% interval by Student's t
    """
    blocks = [block.mean(axis=0) for block in np.array_split(np.stack([minutes / 60, values], axis=1), n_blocks)]
    hours, means = np.array(blocks).T
    hours = hours - hours.mean()
    growth = (hours * means).sum() / (hours**2).sum()
    residuals = means - means.mean() - growth * hours
    error = np.sqrt((residuals**2).sum() / (n_blocks - 2) / (hours**2).sum())
    # The 97.5% quantile of t with 7 degrees of freedom
    return float(growth), float(2.365 * error)


def verdict() -> dict[str, Any]:
    with RESULTS.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    samples = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    late = samples["minutes"] > WARM_UP * samples["minutes"][-1]
    result = {
        "minutes": samples["minutes"][-1],
        "rounds": samples["rounds"][-1],
        "looked at from minute": samples["minutes"][late][0],
    }
    for name in ("rss_mb", "open_files", "threads", "processes"):
        growth, error = slope(samples["minutes"][late], samples[name][late])
        result[name] = {
            "mean": round(samples[name][late].mean(), 1),
            "largest": samples[name][late].max(),
            "growth in an hour": round(growth, 2),
            "95% interval": [round(growth - error, 2), round(growth + error, 2)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--verdict", action="store_true", help="on the samples that are there")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(float(options.train[0]), Path(options.train[1]))
        return
    if not options.verdict:
        soak(options.minutes)
    text = json.dumps(verdict(), indent=2)
    print(text)
    RESULTS.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
