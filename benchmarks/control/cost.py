"""What a step of training costs: the shipped settings of each method on cheetah-run, side by side in one process.

    python benchmarks/control/cost.py

Writes results/cost.csv. Each arm trains for a few updates and is then timed in turn with the others, forwards and
backwards, so that the load of other programs falls on all of them. Environment steps, updates and all else of `learn()` are
in it.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# Before NumPy and PyTorch are loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch as th
from experiment import COMPILED, METHODS, Settings, in_our_loop, make_model, package_versions, processor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))
from benchmark import interleave, load  # noqa: E402

TASK = "cheetah-run"
#: Four rollouts of each
N_TIMESTEPS = 4 * 4096


def arm(name: str, **settings: Any) -> tuple[type[OnPolicyAlgorithm], Settings]:
    """A method's algorithm and its settings, with others in their place."""
    return METHODS[name].algorithm, {**METHODS[name].settings(TASK), **settings}


def make_arms() -> dict[str, OnPolicyAlgorithm]:
    arms = {
        "PPO, SB3's class": arm("ppo"),
        "PPO, our loop": in_our_loop(*arm("ppo")),
        "PPO, our loop, compiled": in_our_loop(*arm("ppo", **COMPILED)),
        "R2VPO": arm("r2vpo", compile=False),
        "R2VPO, compiled": arm("r2vpo"),
        "R2VPO, 20 epochs of the critic, compiled": arm("r2vpo_twenty_epochs"),
        "R2VPO, 20 epochs, white noise, compiled": arm("r2vpo_white"),
        "R2VPO, critic with the policy, compiled": arm("r2vpo_joint"),
        "R2VPOOff, compiled": arm("r2vpo_off"),
    }
    return {label: make_model(*arguments, TASK, seed=0) for label, arguments in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    th.set_num_threads(1)
    models = make_arms()
    for model in tqdm(models.values(), desc="first updates"):
        model.learn(N_TIMESTEPS)

    progress = tqdm(total=args.rounds * len(models), desc="timed")

    def train(model: OnPolicyAlgorithm) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        model.learn(N_TIMESTEPS, reset_num_timesteps=False)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        progress.update()
        return seconds

    times = interleave({arm: partial(train, model) for arm, model in models.items()}, args.rounds)
    progress.close()
    rows = pd.DataFrame(
        [(arm, *(1e6 / N_TIMESTEPS * np.median(seconds, axis=0)).round(1)) for arm, seconds in times.items()],
        columns=["arm", "wall_us_a_step", "cpu_us_a_step"],
    )
    for column in ("wall", "cpu"):
        rows[f"over_sb3_ppo_{column}"] = (rows[f"{column}_us_a_step"] / rows[f"{column}_us_a_step"][0]).round(2)
    rows["rounds"], rows["load"] = args.rounds, load()
    rows["versions"] = package_versions()
    rows["processor"] = processor()
    rows.to_csv(HERE / "results" / "cost.csv", index=False)
    print(rows.to_string(index=False))


if __name__ == "__main__":
    main()
