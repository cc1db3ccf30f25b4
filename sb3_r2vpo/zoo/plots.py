"""Learning curves of training runs, and plots of tuning studies, as PNG files; matplotlib is all they need."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization import matplotlib as optuna_plots

#: Where a run's returns are: SB3's ``Monitor`` files of its training episodes, ``EvalCallback``'s file of its evaluations.
SOURCES = {"train": "*monitor.csv", "eval": "evaluations.npz"}

#: Points of the curve that averages several runs.
N_GRID_POINTS = 200

Curve = tuple[np.ndarray, np.ndarray]


def read_training_curve(run: Path, window: int) -> Curve:
    """
    Returns of training episodes, in the order in which the episodes ended; SB3 logs the same as ``rollout/ep_rew_mean``.

    :param run: Folder with ``Monitor`` files, one for each environment
    :param window: Number of episodes of the rolling mean; as many as there are, in the beginning
    :return: Steps in all environments, and the mean return
    """
    episodes = []
    for file in run.glob(SOURCES["train"]):
        header, _, *rows = file.read_text().splitlines()
        t_start = json.loads(header.removeprefix("#"))["t_start"]
        for row in rows:
            episode_return, length, seconds = map(float, row.split(",")[:3])
            episodes.append((t_start + seconds, length, episode_return))
    if not episodes:
        return np.zeros(0), np.zeros(0)
    _, lengths, returns = np.array(sorted(episodes)).T
    ends = np.arange(1, len(returns) + 1)
    starts = np.maximum(ends - window, 0)
    totals = np.concatenate([[0.0], returns.cumsum()])
    return lengths.cumsum(), (totals[ends] - totals[starts]) / (ends - starts)


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


def average(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The mean and the standard deviation of several curves, at each step over those that have come that far.

    :param curves: Steps and returns of each
    :return: Steps, mean, standard deviation
    """
    start, end = min(steps[0] for steps, _ in curves), max(steps[-1] for steps, _ in curves)
    grid = np.linspace(start, end, N_GRID_POINTS)
    returns = np.stack([np.interp(grid, *curve, left=np.nan, right=np.nan) for curve in curves])
    # Runs of very different lengths may leave a gap between them
    covered = ~np.isnan(returns).all(axis=0)
    returns = returns[:, covered]
    return grid[covered], np.nanmean(returns, axis=0), np.nanstd(returns, axis=0)


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
        for name, runs in groups.items():
            curves = [read_training_curve(run, window) if source == "train" else read_evaluation_curve(run) for run in runs]
            _draw(ax, [curve for curve in curves if len(curve[0]) > 0], label=str(name.relative_to(common)))
        if not ax.lines:
            raise ValueError(f"No episode has ended yet in the runs on {environment}.")
        ax.set_title(environment)
        ax.set_xlabel("Steps in all environments")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel(f"Training return, mean of {window} episodes" if source == "train" else "Evaluation return")
        ax.grid(alpha=0.3)
        ax.legend()
    for ax in axes.flat[len(plots) :]:
        ax.remove()
    return figure


def _draw(ax: Axes, curves: list[Curve], label: str) -> None:
    if len(curves) == 1:
        ax.plot(*curves[0], label=label)
    elif curves:
        steps, mean, std = average(curves)
        (line,) = ax.plot(steps, mean, label=f"{label} (mean ± std of {len(curves)} runs)")
        ax.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)


def plot_study(study: optuna.Study, folder: Path) -> None:
    """
    Draw a study's history, its trials in parallel coordinates, and the importance of each hyperparameter.

    :param study: A study with a finished trial
    :param folder: Where to write ``<study>_<plot>.png``
    """
    n_completed = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = {"history": optuna_plots.plot_optimization_history(study)}
        if n_completed > 1:
            axes["parallel_coordinate"] = optuna_plots.plot_parallel_coordinate(study)
            # Optuna 4's default evaluator needs scikit-learn
            evaluator = PedAnovaImportanceEvaluator()
            axes["importances"] = optuna_plots.plot_param_importances(study, evaluator=evaluator)
    for name, ax in axes.items():
        path = folder / f"{study.study_name.replace('/', '-')}_{name}.png"
        assert isinstance(ax.figure, Figure)
        if name == "parallel_coordinate":
            # An axis for each hyperparameter, with the room for its labels
            ax.figure.set_size_inches(1.6 * (len(study.best_trial.params) + 1), 6)
        ax.figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(ax.figure)
        print(f"Wrote {path}")
