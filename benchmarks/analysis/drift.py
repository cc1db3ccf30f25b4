"""Where R2VPO balances the pole of cartpole-swingup, in the course of training, for two values of `gae_lambda`.

    python benchmarks/analysis/drift.py record      trains, and writes results/drift.csv (eight minutes on one core)
    python benchmarks/analysis/drift.py report      draws figures/drift.png from it

Swung up and at rest, the return differs by the place of the cart only: best in the middle, worst at the ends, 1.8 m away.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch as th
from commands import run_command
from matplotlib import pyplot as plt
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

HERE = Path(__file__).parent
DRIFT = HERE / "results" / "drift.csv"
sys.path.insert(0, str(HERE.parent / "control"))
from experiment import (  # noqa: E402
    METHODS,
    N_EVAL_EPISODES,
    N_EVALUATIONS,
    Evaluations,
    make_model,
    package_versions,
    processor,
)

from sb3_r2vpo.envs import EnvPoolVecEnv  # noqa: E402

TASK, N_TIMESTEPS = "cartpole-swingup", 1_000_000
METHOD_NAMES, GAE_LAMBDAS, SEED = ("r2vpo_joint", "r2vpo_off_short"), (0.95, 0.98), 2


class CartPositions(VecEnvWrapper):
    """Keeps the cart's positions, which are the first number of an observation."""

    def reset(self) -> np.ndarray:
        self.positions: list[np.ndarray] = []
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        # When an episode ends, the observation is the next one's first
        if not dones.any():
            self.positions.append(np.abs(observations[:, 0]))
        return observations, rewards, dones, infos


class RestingPlaces(Evaluations):
    """Adds to each evaluation the distance of the cart from the middle over the second half of its episodes, in metres."""

    def evaluate(self) -> None:
        super().evaluate()
        positions = self.eval_env.venv.positions
        self.rows[-1]["distance"] = round(float(np.mean(positions[len(positions) // 2 :])), 3)


def record() -> None:
    th.set_num_threads(1)
    rows = []
    for name in METHOD_NAMES:
        for gae_lambda in GAE_LAMBDAS:
            method = METHODS[name]
            settings = {**method.settings(TASK), "gae_lambda": gae_lambda}
            model = make_model(method.algorithm, settings, TASK, SEED)
            env = CartPositions(EnvPoolVecEnv(f"dm_control/{TASK}-v0", N_EVAL_EPISODES, seed=10_000 + SEED, num_threads=1))
            places = RestingPlaces(VecNormalize(env, training=False, norm_reward=False), N_TIMESTEPS // N_EVALUATIONS)
            model.learn(N_TIMESTEPS, callback=places, progress_bar=True)
            model.get_env().close()
            env.close()
            rows += [{"method": name, "gae_lambda": gae_lambda, "seed": SEED, **row} for row in places.rows]
    table = pd.DataFrame(rows)
    table["versions"], table["processor"] = package_versions(), processor()
    table.to_csv(DRIFT, index=False)


def report() -> None:
    rows = pd.read_csv(DRIFT)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), sharex=True, sharey="row", layout="constrained")
    for column, name in zip(axes.T, METHOD_NAMES, strict=True):
        for ax, quantity in zip(column, ("mean_return", "distance"), strict=True):
            for gae_lambda, part in rows[rows["method"] == name].groupby("gae_lambda"):
                ax.plot(part["timesteps"] / 1e6, part[quantity], label=f"gae_lambda={gae_lambda:g}")
            ax.grid(alpha=0.3)
        column[0].set_title(METHODS[name].algorithm.__name__)
        column[1].set_xlabel("million steps")
    axes[0, 0].set_ylabel("return")
    axes[1, 0].set_ylabel("cart from the middle, m")
    axes[0, 0].legend()
    figure.savefig(HERE / "figures" / "drift.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run_command(__doc__, record, report)
