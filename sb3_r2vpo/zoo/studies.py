"""What a tuning study has found: its best trials as a table, its history, importances and slices as PNG files."""

import warnings
from pathlib import Path

import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState
from optuna.visualization import matplotlib as optuna_plots

#: Rows of a table, and hyperparameters in a figure, that can be read at a glance
N_BEST, N_SLICES = 5, 6


def table_of_best(study: optuna.Study) -> str:
    """
    :param study: A study with a completed trial
    :return: Its best trials as the columns of a table, the best one first: number, value, and the hyperparameters
    """
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    best = sorted(completed, key=lambda trial: trial.value or 0.0, reverse=True)[:N_BEST]
    names = list(dict.fromkeys(name for trial in best for name in trial.params))
    rows = [["trial", *(str(trial.number) for trial in best)], ["value", *(_short(trial.value) for trial in best)]]
    rows += [[name, *(_short(trial.params.get(name, "")) for trial in best)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot_study(study: optuna.Study, folder: Path) -> None:
    """
    Draw a study's history, the importance of each hyperparameter, and trials along each of the most important ones.

    :param study: A study with a completed trial
    :param folder: Where to write ``<study>_<plot>.png``
    """
    n_completed = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        figures = {"history": optuna_plots.plot_optimization_history(study).figure}
        if n_completed > 1:
            # Optuna 4's default evaluator needs scikit-learn
            evaluator = PedAnovaImportanceEvaluator()
            figures["importances"] = optuna_plots.plot_param_importances(study, evaluator=evaluator).figure
            # The most important ones first
            names = list(get_param_importances(study, evaluator=evaluator))[:N_SLICES]
            if names:
                # One axis, or an array of them
                axes = np.atleast_1d(np.asarray(optuna_plots.plot_slice(study, params=names)))
                figures["slices"] = axes[0].figure
    for name, figure in figures.items():
        path = folder / f"{study.study_name.replace('/', '-')}_{name}.png"
        assert isinstance(figure, Figure)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
        print(f"Wrote {path}")
