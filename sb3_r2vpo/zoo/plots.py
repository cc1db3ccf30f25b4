"""``r2vpo plot``: learning curves of training runs as PNG files; matplotlib is all they need."""

import argparse
import inspect
import json
import os
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

#: Where a run's returns are: SB3's ``Monitor`` files of its training episodes, ``EvalCallback``'s file of its evaluations.
SOURCES = {"train": "*monitor.csv", "eval": "evaluations.npz"}

#: In the header of a run's monitor file: the lengths at which first episodes were cut off
CUT_OFF = "cut_off"

#: Points of the curve that averages several runs.
N_GRID_POINTS = 200

#: How often runs are drawn for an interval, and the share of the means that it holds
N_RESAMPLES, CONFIDENCE = 2000, 0.95

#: Told apart with any colour vision (Okabe and Ito, https://jfly.uni-koeln.de/color/), without the yellow, which white hides
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = tuple((colour, style) for style in ("-", "--", ":", "-.") for colour in COLOURS)

Curve = tuple[np.ndarray, np.ndarray]


def main(arguments: Sequence[str]) -> None:
    """Draw learning curves of runs, as a PNG file.

    examples:
      r2vpo plot logs                                           each environment, algorithms compared, runs averaged
      r2vpo plot logs/r2vpo/CartPole-v1_1 logs/ppo/CartPole-v1_1                         a curve for each of these
      r2vpo plot logs --source eval -o evaluations.png

    The band around the mean of several runs is its 95% bootstrap interval over runs. Episodes that EnvPool has cut off, to
    spread its environments over all phases of an episode, are left out.

    For tables, and metrics over many tasks: pip install 'sb3-r2vpo[plots]', then `rl_zoo3 all_plots` and `plot_from_file`.
    """
    parser = argparse.ArgumentParser(
        prog="r2vpo plot", description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders with runs below them")
    parser.add_argument("-o", "--output", type=Path, default=Path("learning_curve.png"), help="file to write (%(default)s)")
    parser.add_argument("--source", choices=SOURCES, default="train", help="training episodes, or evaluations (%(default)s)")
    parser.add_argument("-w", "--window", type=int, default=100, help="training episodes in the rolling mean (%(default)s)")
    options = parser.parse_args(arguments)
    if options.window < 1:
        parser.error(f"--window is {options.window}; it must be at least 1")
    plot_learning_curves(options.folders, options.source, options.window).savefig(options.output, dpi=150)
    print(f"Wrote {options.output}")


def read_training_curve(run: Path, window: int) -> Curve:
    """
    Returns of training episodes, in the order in which the episodes ended; SB3 logs the same as ``rollout/ep_rew_mean``.

    :param run: Folder with ``Monitor`` files, one for each environment
    :param window: Number of episodes of the rolling mean; as many as there are, in the beginning
    :return: Steps in all environments, and the mean return, at the end of each episode that was not cut off
    """
    episodes: list[tuple[float, float, float, bool]] = []
    for file in run.glob(SOURCES["train"]):
        episodes += _read_monitor(file)
    if not episodes:
        return np.zeros(0), np.zeros(0)
    _, lengths, returns, whole = np.array(sorted(episodes)).T
    counted = whole.astype(bool)
    steps, returns = lengths.cumsum()[counted], returns[counted]
    ends = np.arange(1, len(returns) + 1)
    starts = np.maximum(ends - window, 0)
    totals = np.concatenate([[0.0], returns.cumsum()])
    return steps, (totals[ends] - totals[starts]) / (ends - starts)


def _read_monitor(file: Path) -> list[tuple[float, float, float, bool]]:
    """:return: Of each episode when it ended, its length, its return, and whether it was not cut off"""
    # A run that was killed leaves a torn last line, or nothing
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if len(lines) < 2:
        return []
    header = json.loads(lines[0].removeprefix("#"))
    episodes = []
    for row in lines[2:]:
        episode_return, length, seconds = map(float, row.split(",")[:3])
        episodes.append((header["t_start"] + seconds, length, episode_return, length not in header.get(CUT_OFF, ())))
    return episodes


def read_evaluation_curve(run: Path) -> Curve:
    """
    Returns of evaluations, the mean over the episodes of each.

    :param run: Folder with ``evaluations.npz``
    :return: Training steps, and the mean return
    """
    with np.load(run / SOURCES["eval"]) as evaluations:
        return evaluations["timesteps"], evaluations["results"].mean(axis=1)


def environment_of(run: Path) -> str:
    """The environment in the name of a run's folder, ``<environment>_<number>`` in the Zoo, with or without a unique id."""
    return re.sub(r"_\d+(_[0-9a-f]{8}-[0-9a-f-]{27})?$", "", run.name)


def find_runs(folders: list[Path], pattern: str) -> dict[str, dict[Path, list[Path]]]:
    """
    Sort the runs in folders into plots and their curves.

    :param folders: A folder that is a run makes a curve of its own; the runs somewhere below any other folder make one for
        each environment and each folder that they stand in, which in the Zoo is an algorithm
    :param pattern: The files that make a folder a run
    :return: For each environment the runs of each curve, by the folder that names the curve
    """
    plots: dict[str, dict[Path, list[Path]]] = {}
    for folder in folders:
        # Resolved, as the name of the folder `.` says nothing
        runs = sorted({file.parent for file in folder.resolve().rglob(pattern)})
        if not runs:
            raise ValueError(f"There is no {pattern} in {folder} or below it.")
        for run in runs:
            curve = run if run == folder.resolve() else run.parent
            plots.setdefault(environment_of(run), {}).setdefault(curve, []).append(run)
    return plots


def average(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    The mean of several curves, at each step over those that have come that far, and its bootstrap interval: runs are drawn
    again and again from these, with replacement, and 95% of their means lie within (Efron's percentile interval; with few
    runs it is too narrow, see Agarwal et al., https://arxiv.org/abs/2108.13264).

    :param curves: Steps and returns of each
    :return: Steps, mean, and the interval's lower and upper end
    """
    start, end = min(steps[0] for steps, _ in curves), max(steps[-1] for steps, _ in curves)
    grid = np.linspace(start, end, N_GRID_POINTS)
    returns = np.stack([np.interp(grid, *curve, left=np.nan, right=np.nan) for curve in curves])
    # Runs of very different lengths may leave a gap between them
    covered = ~np.isnan(returns).all(axis=0)
    returns = returns[:, covered]
    mean = np.nanmean(returns, axis=0)
    interval = np.stack([mean, mean])
    random = np.random.default_rng(0)
    present = ~np.isnan(returns)
    for runs in np.unique(present, axis=1).T:
        n_runs = int(runs.sum())
        columns = (present == runs[:, None]).all(axis=0)
        draws = random.integers(n_runs, size=(N_RESAMPLES, n_runs))
        means = returns[np.ix_(runs, columns)][draws].mean(axis=1)
        interval[:, columns] = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return grid[covered], mean, *interval


def plot_learning_curves(folders: list[Path], source: str = "train", window: int = 100) -> Figure:
    """
    Draw return against steps, a plot for each environment.

    :param folders: Runs and folders of runs, see :func:`find_runs`
    :param source: ``train`` for training episodes, ``eval`` for evaluations
    :param window: Number of training episodes of the rolling mean
    :return: The figure
    :raises ValueError: There is nothing to draw
    """
    plots = find_runs(folders, SOURCES[source])
    n_columns = min(3, len(plots))
    n_rows = -(-len(plots) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(max(6.4, 4.5 * n_columns), 4.2 * n_rows), squeeze=False, layout="constrained"
    )
    common = Path(os.path.commonpath([curve.parent for curves in plots.values() for curve in curves]))
    for ax, (environment, groups) in zip(axes.flat, plots.items(), strict=False):
        for (name, runs), style in zip(groups.items(), cycle(STYLES), strict=False):
            curves = [read_training_curve(run, window) if source == "train" else read_evaluation_curve(run) for run in runs]
            _draw(ax, [curve for curve in curves if len(curve[0]) > 0], str(name.relative_to(common)), *style)
        if not ax.lines:
            raise ValueError(f"No episode has ended yet in the runs on {environment}, or none that was not cut off.")
        ax.set_title(environment)
        ax.set_xlabel("Steps in all environments")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel(f"Training return, mean of {window} episodes" if source == "train" else "Evaluation return")
        ax.grid(alpha=0.3)
        ax.legend()
    for ax in axes.flat[len(plots) :]:
        ax.remove()
    return figure


def _draw(ax: Axes, curves: list[Curve], label: str, colour: str, linestyle: str) -> None:
    if len(curves) == 1:
        ax.plot(*curves[0], label=label, color=colour, linestyle=linestyle)
    elif curves:
        steps, mean, low, high = average(curves)
        label = f"{label} (mean of {len(curves)} runs, {CONFIDENCE:.0%} interval)"
        ax.plot(steps, mean, label=label, color=colour, linestyle=linestyle)
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
