"""How much the coefficients matter: heat maps of R2VPO over tolerance and eta, R2VPOOff over tolerance, capacity and UTD.

    python benchmarks/analysis/sensitivity.py run        all runs that are not in results/sensitivity.csv yet
    python benchmarks/analysis/sensitivity.py report     draws figures/sensitivity.png

All else is as shipped in `hyperparams/`, but for `BEFORE`. The return is that of the last quarter of a short run's
evaluations on cheetah-run.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "control"))
from benchmark import execute_all, finished  # noqa: E402
from experiment import METHODS, last_quarter, train  # noqa: E402

SENSITIVITY = HERE / "results" / "sensitivity.csv"
TASK, N_TIMESTEPS, SEEDS = "cheetah-run", 300_000, (0, 1)

#: What R2VPO and R2VPOOff had when these runs were made: no compensation of the entropy, and a constant bonus
BEFORE = {"ent_coef": 0.01, "critic_kwargs": {"recompute_advantages": True}}
OBJECTIVE = {"min_var_coef": 0.3, "compensate_entropy": False}
#: For each map: the method, and the values of the coefficient on either axis. With the six actions of cheetah-run, the
#: automatic tolerance is 0.0245
MAPS: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "R2VPO, adaptive": (
        "r2vpo_joint",
        {"target_variance": (0.006, 0.025, 0.1), "dual_learning_rate": (0.002, 0.02, 0.2)},
    ),
    "R2VPO, fixed": ("r2vpo_joint", {"var_coef": (0.1, 0.3, 1.0, 3.0), "n_epochs": (5, 10)}),
    "R2VPOOff, tolerance": (
        "r2vpo_off_short",
        {"target_variance": (0.006, 0.025, 0.1), "replay_capacity": (1, 4, 8)},
    ),
    "R2VPOOff, updates": ("r2vpo_off_short", {"utd_ratio": (0.5, 1, 2), "replay_capacity": (1, 4)}),
}


class Cell(NamedTuple):
    """One run: the seed first, so that all maps get their first seed before any gets a second."""

    seed: int
    map: str
    x: float
    y: float


def cells() -> Iterator[Cell]:
    for seed, (name, (_, axes)) in product(SEEDS, MAPS.items()):
        yield from (Cell(seed, name, x, y) for x, y in product(*axes.values()))


def execute(cell: Cell) -> list[dict[str, Any]]:
    name, axes = MAPS[cell.map]
    method = METHODS[name]
    coefficients = dict(zip(axes, (cell.x, cell.y), strict=True))
    of_objective = {name: coefficients.pop(name) for name in ("dual_learning_rate",) if name in coefficients}
    settings = {**method.settings(TASK), **BEFORE, "objective_kwargs": {**OBJECTIVE, **of_objective}, **coefficients}
    rows = train(method.algorithm, settings, TASK, cell.seed, N_TIMESTEPS)
    constants = {name: rows[-1][name] for name in ("std", "var_coef", "ratio_variance", "settings", "versions", "processor")}
    return [{**cell._asdict(), "mean_return": last_quarter(rows), **constants}]


def run(workers: int) -> None:
    SENSITIVITY.parent.mkdir(exist_ok=True)
    execute_all(list(cells()), finished(SENSITIVITY, Cell), execute, SENSITIVITY, workers)


def report() -> None:
    rows = pd.read_csv(SENSITIVITY)
    figure, axes = plt.subplots(1, len(MAPS), figsize=(4 * len(MAPS), 3.6), layout="constrained")
    for ax, (name, (_, coefficients)) in zip(axes, MAPS.items(), strict=True):
        grid = rows[rows["map"] == name].pivot_table(index="y", columns="x", values="mean_return")
        ax.imshow(grid, cmap="viridis", vmin=0, vmax=rows["mean_return"].max(), origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white")
        ax.set_xticks(range(grid.shape[1]), [f"{x:g}" for x in grid.columns])
        ax.set_yticks(range(grid.shape[0]), [f"{y:g}" for y in grid.index])
        x_label, y_label = coefficients
        ax.set(title=name, xlabel=x_label, ylabel=y_label)
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / "sensitivity.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread (default: one a core)")
    args = parser.parse_args()
    if args.command == "run":
        run(args.workers)
    else:
        report()


if __name__ == "__main__":
    main()
