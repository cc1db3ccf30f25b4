"""
What memory costs: RecurrentR2VPO beside sb3-contrib's RecurrentPPO, and beside R2VPO without memory.

    python benchmarks/speed/recurrent.py

One thread, 8 environments of random observations (17 numbers) and rewards whose steps cost nothing, rollouts of 128 steps,
minibatches of 128 steps, 10 epochs: the defaults of RecurrentPPO. All arms have two layers of one width, of which the first is
an LSTM where there is memory. Episodes end "often", after 20 steps in the mean, or "never", within these rollouts. The arms
take turns (A-B-C-D-D-C-B-A); medians of process time, for one minibatch of the update and for one step of all environments.
"""

import csv
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_r2vpo import R2VPO
from sb3_r2vpo.recurrent import RecurrentR2VPO

RESULTS = Path(__file__).parent / "results" / "recurrent.csv"
N_ENVS, N_STEPS, BATCH_SIZE, N_EPOCHS, N_ROUNDS = 8, 128, 128, 10, 3
EPISODES = {"often": 20.0, "never": np.inf}
WIDTHS = (64, 256)
#: Algorithm and `sequence_length`
ARMS: dict[str, tuple[Any, int | None]] = {
    "R2VPO": (R2VPO, None),
    "RecurrentPPO": (RecurrentPPO, None),
    "RecurrentR2VPO": (RecurrentR2VPO, None),
    "RecurrentR2VPO, cut to 32": (RecurrentR2VPO, 32),
    "RecurrentR2VPO, cut to 16": (RecurrentR2VPO, 16),
}


class RandomEnv(gym.Env):
    """Episodes end at each step with the same probability."""

    observation_space = spaces.Box(-1, 1, (17,), np.float32)
    action_space = spaces.Box(-1, 1, (6,), np.float32)

    def __init__(self, mean_length: float) -> None:
        self.end = 1 / mean_length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(17, np.float32), {}

    def step(self, action):
        ends = self.np_random.random() < self.end
        return self.np_random.random(17, np.float32), float(self.np_random.normal()), ends, False, {}


class Learner:
    """An algorithm that has collected a rollout that begins within episodes."""

    def __init__(self, arm: str, width: int, mean_length: float) -> None:
        algorithm, sequence_length = ARMS[arm]
        env = make_vec_env(lambda: RandomEnv(mean_length), n_envs=N_ENVS, seed=0)
        kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [width, width]}}
        if algorithm is not R2VPO:
            kwargs["policy_kwargs"] = {"net_arch": [width], "lstm_hidden_size": width}
        if sequence_length is not None:
            kwargs["rollout_buffer_kwargs"] = {"sequence_length": sequence_length}
        self.model = algorithm(
            "MlpPolicy" if algorithm is R2VPO else "MlpLstmPolicy",
            env, n_steps=N_STEPS, batch_size=BATCH_SIZE, n_epochs=N_EPOCHS, learning_rate=1e-5, seed=0, device="cpu", **kwargs,
        )  # fmt: skip
        self.callback = self.model._setup_learn(10**9)[1]
        self.collect_times: list[float] = []
        self.update_times: list[float] = []
        self.measure()
        self.measure()
        self.collect_times.clear()
        self.update_times.clear()

    def measure(self) -> None:
        model = self.model
        start = time.process_time()
        model.collect_rollouts(model.env, self.callback, model.rollout_buffer, N_STEPS)
        collected = time.process_time()
        model.train()
        self.collect_times.append((collected - start) / N_STEPS)
        self.update_times.append((time.process_time() - collected) / (N_EPOCHS * N_STEPS * N_ENVS / BATCH_SIZE))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    th.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    versions = [version(name) for name in ("torch", "stable-baselines3", "sb3-contrib")]
    columns = [
        "episodes_end",
        "width",
        "arm",
        "ms_per_minibatch",
        "ms_per_collected_step",
        "times_r2vpo",
        "recurrent_ppo_over_it",
    ]
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "torch", "stable-baselines3", "sb3-contrib", "processor", "cpus", "load"])
        for episodes, mean_length in EPISODES.items():
            for width in WIDTHS:
                learners = {arm: Learner(arm, width, mean_length) for arm in ARMS}
                for _ in range(N_ROUNDS):
                    for learner in [*learners.values(), *reversed(learners.values())]:
                        learner.measure()
                update = {arm: 1000 * median(learner.update_times) for arm, learner in learners.items()}
                for arm, learner in learners.items():
                    collect = 1000 * median(learner.collect_times)
                    ratios = update[arm] / update["R2VPO"], update["RecurrentPPO"] / update[arm]
                    row = [episodes, width, arm, *(round(number, 2) for number in (update[arm], collect, *ratios))]
                    writer.writerow([*row, *versions, processor(), os.cpu_count(), round(os.getloadavg()[0], 1)])
                    print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
