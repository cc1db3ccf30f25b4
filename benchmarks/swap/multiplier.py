"""R2VPO with fixed and adaptive multipliers on five tasks, default arguments otherwise.

    python benchmarks/swap/multiplier.py                            all runs that results/multiplier.csv lacks
    python benchmarks/swap/multiplier.py --values 0.3 auto --seeds 1

A row for each run: the mean training return of the last 100 episodes at a quarter, half, three quarters and the end of the
training, CPU seconds, the median over updates of the ratio variance at their end. Shorter than in benchmark.py, whose first
seeds these are.
"""

import argparse
import sys
from itertools import product
from typing import Any

import numpy as np
import torch as th
from benchmark import RESULTS, SEEDS, Row, clocks, locked, make_env, read_rows, write_rows
from stable_baselines3.common.callbacks import BaseCallback

PATH = RESULTS / "multiplier.csv"
TASKS = {
    "CartPole-v1": 60_000,
    "LunarLander-v3": 200_000,
    "HalfCheetah-v5": 150_000,
    "Hopper-v5": 150_000,
    "Pendulum-v1": 100_000,
}
VALUES: dict[str, Any] = {"0.15": 0.15, "0.3": 0.3, "0.6": 0.6, "auto": "auto"}
COLUMNS = (
    *("task", "steps", "seed", "var_coef", "return_at_25%", "return_at_50%", "return_at_75%", "train_return"),
    *("cpu_seconds", "median_ratio_variance"),
)


class Progress(BaseCallback):
    """Training return and ratio variance at the start of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.variances: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.ep_info_buffer:
            self.returns.append(self.current_return())
        if "train/ratio_variance" in self.logger.name_to_value:
            self.variances.append(self.logger.name_to_value["train/ratio_variance"])

    def current_return(self) -> float:
        return float(np.mean([episode["r"] for episode in self.model.ep_info_buffer]))


def train(task: str, seed: int, value: str) -> Row:
    from sb3_r2vpo import R2VPO

    model = R2VPO("MlpPolicy", make_env(task), var_coef=VALUES[value], seed=seed, device="cpu")
    progress, (start, _) = Progress(), clocks()
    model.learn(TASKS[task], callback=progress)
    returns = [progress.returns[int(len(progress.returns) * share)] for share in (0.25, 0.5, 0.75)]
    returns = [*returns, progress.current_return()]
    cpu_seconds, variance = clocks()[0] - start, float(np.median(progress.variances))
    cells = [task, TASKS[task], seed, value, *np.round(returns, 1).tolist(), round(cpu_seconds, 1), round(variance, 4)]
    return dict(zip(COLUMNS, cells, strict=True))


def key(row: Row) -> tuple[str, int, str]:
    return row["task"], int(row["seed"]), row["var_coef"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed, value, task in product(SEEDS[: args.seeds], args.values, args.tasks):
        if (task, seed, value) in map(key, read_rows(PATH)):
            continue
        row = train(task, seed, value)
        print(*row.values(), flush=True)
        with locked():
            write_rows(PATH, COLUMNS, [*read_rows(PATH), row])


if __name__ == "__main__":
    sys.exit(main())
