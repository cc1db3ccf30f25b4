"""Tables and figures of results/evaluations.csv in the manner of rliable (https://arxiv.org/abs/2108.13264).

    python benchmarks/control/report.py

Rewrites the tables in README.md and TUNING.md beside this file, and figures/. Scores are returns divided by 1000, the most
a task of the Control Suite can give.
"""

import csv
import json
import sys
from collections import defaultdict
from itertools import product
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from experiment import HARD_TASKS, MAIN_METHODS, METHODS, N_EVALUATIONS, TASKS
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rliable import library, metrics

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from readme_tables import write_tables  # noqa: E402

N_BOOTSTRAPS = 2_000
MAX_RETURN = 1000.0
#: Of each evaluation, in millions
STEPS = np.arange(1, N_EVALUATIONS + 1) / N_EVALUATIONS
LABELS = {
    "ppo": "PPO",
    "ppo_annealed": "PPO, annealed entropy bonus",
    "r2vpo": "R2VPO",
    "r2vpo_off": "R2VPOOff",
    "uncompensated": "R2VPOOff, short rollouts, entropy not compensated",
    "constant": "R2VPOOff, short rollouts, constant entropy bonus",
    "annealed": "R2VPO, critic with the policy, entropy compensated and annealed, advantages not recomputed",
    "r2vpo_fixed": "R2VPO, fixed λ",
    "r2vpo_off_short": "R2VPOOff, short rollouts",
    "r2vpo_off_short_critic": "R2VPOOff, short rollouts, critic apart",
    "r2vpo_joint": "R2VPO, critic with the policy",
    "r2vpo_critic": "R2VPO, rate not scaled",
    "ppo_annealed_scaled": "PPO, annealed entropy bonus, R2VPO's critic and rate",
    "r2vpo_twenty_epochs": "R2VPO, 20 epochs of the critic",
    "r2vpo_white": "R2VPO, white noise",
    "r2vpo_colored": "R2VPO, noise colored by a schedule",
    "ppo_annealed_noise": "PPO, annealed entropy bonus, R2VPO's noise",
    "ppo_annealed_scaled_noise": "PPO, annealed entropy bonus, R2VPO's critic, rate and noise",
    "ppo_recompute": "PPO, advantages recomputed",
    "spo": "SPO",
    "exact_kl": "exact KL",
    "trpo": "TRPO",
}
POLICY_LABELS = {
    "censored": "`CensoredMlpPolicy`",
    "layer_norm": "`LayerNormMlpPolicy`",
    "layer_norm_half_rate": "`LayerNormMlpPolicy`, half of the learning rate",
    "three_layers": "three layers",
}
LABELS |= {
    f"{method}_{policy}": f"{LABELS[method]}, {label}"
    for policy, label in POLICY_LABELS.items()
    for method in ("ppo_annealed", "r2vpo", "r2vpo_off_short")
}

#: Rows with other settings: those that R2VPOOff had before, and what was tried for R2VPO
VARIANTS = {
    "uncompensated": ("r2vpo_off_short", "without_compensation.csv"),
    "constant": ("r2vpo_off_short", "constant_entropy.csv"),
    "annealed": ("r2vpo_joint", "annealed_r2vpo.csv"),
}

#: Of which methods, two by two, it is said how probably the first is better
PAIRS = (
    ("r2vpo", "ppo"),
    ("r2vpo_off", "ppo"),
    ("r2vpo", "ppo_annealed"),
    ("r2vpo_off", "ppo_annealed"),
    ("r2vpo_off", "r2vpo"),
    ("r2vpo_off", "r2vpo_twenty_epochs"),
    ("r2vpo", "r2vpo_twenty_epochs"),
    ("r2vpo", "ppo_annealed_scaled_noise"),
    ("r2vpo_twenty_epochs", "ppo"),
    ("ppo_annealed", "ppo"),
    ("r2vpo_off", "r2vpo_off_short"),
    ("r2vpo_off_short", "ppo"),
    ("r2vpo_off_short", "ppo_annealed"),
    ("r2vpo_off_short_critic", "ppo"),
    ("r2vpo_off_short_critic", "r2vpo_off_short"),
    ("r2vpo_twenty_epochs", "r2vpo_white"),
    ("r2vpo_twenty_epochs", "r2vpo_colored"),
    ("r2vpo_twenty_epochs", "ppo_annealed_noise"),
    ("ppo_annealed_noise", "ppo_annealed"),
    ("r2vpo_white", "ppo"),
    ("r2vpo_white", "ppo_annealed"),
    ("r2vpo_white", "r2vpo_joint"),
    ("r2vpo_white", "r2vpo_critic"),
    ("r2vpo_white", "ppo_annealed_scaled"),
    ("r2vpo_colored", "ppo"),
    ("r2vpo_colored", "r2vpo_white"),
    ("r2vpo_joint", "ppo"),
    ("ppo_annealed_scaled", "ppo_annealed"),
    ("ppo_annealed_scaled_noise", "ppo_annealed"),
    ("r2vpo_layer_norm", "ppo_annealed_layer_norm"),
    ("r2vpo_layer_norm", "r2vpo"),
    ("r2vpo_off_short_layer_norm", "ppo_annealed_layer_norm"),
)

#: Score of each evaluation of each run: an array of shape (seeds, tasks, evaluations) for each method
Scores = dict[str, np.ndarray]


def read_evaluations(file: str = "evaluations.csv") -> list[dict[str, str]]:
    with (HERE / "results" / file).open(newline="") as rows:
        return list(csv.DictReader(rows))


def complete_scores(rows: list[dict[str, str]]) -> Scores:
    """Methods with at least two seeds on every task; seeds beyond those that all of its tasks have are left out."""
    curves: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        curves[row["method"], row["task"]][int(row["seed"])].append(float(row["mean_return"]) / MAX_RETURN)
    scores = {}
    for method in METHODS:
        seeds = sorted(set.intersection(*(set(curves[method, task]) for task in TASKS)))
        # One has no interval
        if len(seeds) > 1:
            scores[method] = np.array([[curves[method, task][seed][:N_EVALUATIONS] for task in TASKS] for seed in seeds])
    return scores


def interval(scores: dict[str, np.ndarray], statistic) -> dict[str, tuple[float, float, float]]:
    """A statistic of each, with the ends of its 95% stratified bootstrap interval: the same whatever else is asked for."""
    estimates = {}
    for name, score in scores.items():
        # rliable draws from the global generator, whatever `random_state` it is given
        np.random.seed(0)
        values, ends = library.get_interval_estimates({name: score}, lambda *x: np.array([statistic(*x)]), reps=N_BOOTSTRAPS)
        estimates[name] = (float(values[name][0]), *map(float, ends[name][:, 0]))
    return estimates


def iqm_path(curves: np.ndarray) -> np.ndarray:
    """The IQM of each evaluation."""
    return np.array([metrics.aggregate_iqm(curves[..., i]) for i in range(curves.shape[-1])])


def with_interval(estimate: tuple[float, float, float], digits: int) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in estimate)
    return f"{value} ({low} to {high})"


def against(scores: Scores, baseline: str) -> dict[str, list[str]]:
    """Of each method: its IQM over the baseline's, how probably it is better, and after how many steps it has that IQM."""
    if baseline not in scores:
        return {method: ["", "", ""] for method in scores}
    final = {method: curves[..., -1] for method, curves in scores.items()}
    target = metrics.aggregate_iqm(final[baseline])
    pairs = {method: (score, final[baseline]) for method, score in final.items() if method != baseline}
    improvement = interval(pairs, metrics.probability_of_improvement) if pairs else {}
    columns = {}
    for method, curves in scores.items():
        path = iqm_path(curves)
        reached = np.flatnonzero(path >= target)
        columns[method] = [
            f"{path[-1] / target:.2f}",
            with_interval(improvement[method], 2) if method in improvement else "",
            f"{(reached[0] + 1) / len(path):.0%}" if len(reached) else "not reached",
        ]
    return columns


def summary_table(scores: Scores, cpu_seconds: dict[str, float]) -> list[list[str]]:
    final = {method: curves[..., -1] for method, curves in scores.items()}
    iqm = interval(final, metrics.aggregate_iqm)
    columns = against(scores, "ppo")
    header = [
        "method", "seeds", "IQM (95% interval)", "over PPO", "P(better than PPO)", "steps to PPO's IQM",
        "IQM half of the way", "IQM of the last quarter", "mean", "best minus final", "CPU seconds a run",
    ]  # fmt: skip
    table = [header]
    for method, curves in scores.items():
        table.append(
            [
                LABELS[method],
                str(len(curves)),
                with_interval(iqm[method], 3),
                *columns[method],
                f"{metrics.aggregate_iqm(curves[..., N_EVALUATIONS // 2 - 1]):.3f}",
                f"{metrics.aggregate_iqm(curves[..., -N_EVALUATIONS // 4 :].mean(axis=-1)):.3f}",
                f"{final[method].mean():.3f}",
                f"{(curves.max(axis=-1) - final[method]).mean():.3f}",
                f"{cpu_seconds[method]:.0f}",
            ]
        )
    return table


def annealed_table(scores: Scores) -> list[list[str]]:
    """The main methods against PPO with an entropy bonus that falls as R2VPOOff's does."""
    columns = against({method: scores[method] for method in MAIN_METHODS if method in scores}, "ppo_annealed")
    header = ["method", "over annealed PPO", "P(better than annealed PPO)", "steps to annealed PPO's IQM"]
    return [header, *([LABELS[method], *cells] for method, cells in columns.items())]


def pairs_table(scores: Scores) -> list[list[str]]:
    """How probably the first of two methods is better, a draw counting half: on each task, and on one drawn at random."""
    final = {method: curves[..., -1] for method, curves in scores.items()}
    pairs = {f"{LABELS[a]} better than {LABELS[b]}": (final[a], final[b]) for a, b in PAIRS if a in final and b in final}
    overall = interval(pairs, metrics.probability_of_improvement)
    by_task = [
        [task, *(f"{metrics.probability_of_improvement(x[:, [i]], y[:, [i]]):.0%}" for x, y in pairs.values())]
        for i, task in enumerate(TASKS)
    ]
    return [["task", *pairs], *by_task, ["all (95% interval)", *(with_interval(estimate, 2) for estimate in overall.values())]]


def task_table(scores: Scores) -> list[list[str]]:
    """Final return, mean and standard deviation over seeds."""
    table = [["task", *(LABELS[method] for method in scores)]]
    for i, task in enumerate(TASKS):
        finals = [MAX_RETURN * curves[:, i, -1] for curves in scores.values()]
        best = max(final.mean() for final in finals)
        cells = [f"{final.mean():.0f} ± {final.std():.0f}" for final in finals]
        table.append(
            [task, *(f"**{cell}**" if final.mean() == best else cell for cell, final in zip(cells, finals, strict=True))]
        )
    return table


def transposed(table: list[list[str]]) -> list[list[str]]:
    """A row for each of what are columns: tasks are ten, methods and pairs of them more, with long names."""
    return [list(column) for column in zip(*table, strict=True)]


def variants_table(scores: Scores) -> list[list[str]]:
    """R2VPOOff, and R2VPO as it was, with other settings, and how probably they are better as they are."""
    variants: Scores = {}
    for method in ("r2vpo_off_short", "r2vpo_joint"):
        files = {name: file for name, (of, file) in VARIANTS.items() if of == method}
        variants |= {name: complete_scores(read_evaluations(file))[method] for name, file in files.items()}
        variants[method] = scores[method]
    final = {name: curves[..., -1] for name, curves in variants.items()}
    iqm = interval(final, metrics.aggregate_iqm)
    improvement = interval(
        {name: (final[method], final[name]) for name, (method, _) in VARIANTS.items()}, metrics.probability_of_improvement
    )
    return [
        *task_table(variants),
        ["IQM (95% interval)", *(with_interval(iqm[name], 3) for name in variants)],
        ["P(better as it is)", *(with_interval(improvement[name], 2) if name in improvement else "" for name in variants)],
    ]


def tuning_table(file: str, setting: str) -> list[list[str]]:
    """A round of tuning: the score of each method's settings on each task, and their mean where none is missing."""
    runs = pd.read_csv(HERE / "results" / file)
    scores = runs.pivot_table(index=["method", setting], columns="task", values="mean_return", sort=False)
    table = [["method", setting, *map(str, scores.columns), "mean"]]
    for (method, value), row in scores.iterrows():
        mean = f"{row.mean():.0f}" if row.notna().all() else ""
        table.append([LABELS[method], str(value), *("" if np.isnan(score) else f"{score:.0f}" for score in row), mean])
    return [table[0], *sorted(table[1:])]


def hard_table(rows: list[dict[str, str]]) -> list[list[str]]:
    """The tasks beyond the ten: all of the seeds' best and last evaluations."""
    table = [["task", "method", "best", "last"]]
    for task, method in product(HARD_TASKS, METHODS):
        curves: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if (row["task"], row["method"]) == (task, method):
                curves[row["seed"]].append(float(row["mean_return"]))
        if curves:
            best, last = (", ".join(f"{pick(curve):.0f}" for curve in curves.values()) for pick in (max, itemgetter(-1)))
            table.append([task, LABELS[method], best, last])
    return table


def with_seeds(returns: np.ndarray | pd.Series) -> str:
    """The mean of the seeds, and those."""
    return f"{returns.mean():.0f} ({', '.join(f'{value:.0f}' for value in returns)})"


def policies_table(rows: list[dict[str, str]], columns: dict[str, str]) -> list[list[str]]:
    """
    Final returns with one policy and with others, of the same seeds, on tasks that were run with all.

    :param rows: Of `evaluations.csv`
    :param columns: Their heads, and what the names of methods with that policy end with
    """
    final: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        final[row["task"], row["method"]][row["seed"]] = float(row["mean_return"])
    table = [["task", "method", "seeds", *columns]]
    for task, method in product(TASKS, METHODS):
        runs = [final[task, method + suffix] for suffix in columns.values()]
        seeds = sorted(set.intersection(*map(set, runs)))
        if seeds:
            returns = (np.array([of[seed] for seed in seeds]) for of in runs)
            cells = [with_seeds(values) for values in returns]
            table.append([task, LABELS[method], ", ".join(seeds), *cells])
    for method in METHODS:
        names = [method + suffix for suffix in columns.values()]
        seeds = sorted(set.intersection(*(set(final[task, name]) for task, name in product(TASKS, names))))
        if seeds:
            scores = ([[final[task, name][seed] / MAX_RETURN for task in TASKS] for seed in seeds] for name in names)
            cells = [f"{metrics.aggregate_iqm(np.array(score)):.3f}" for score in scores]
            table.append(["IQM", LABELS[method], ", ".join(seeds), *cells])
    return table


def command_line_table(rows: list[dict[str, str]]) -> list[list[str]]:
    """Runs of `r2vpo train`, and those of the comparison with the same seeds: last evaluations, means of the last quarter."""

    def ends(runs: pd.DataFrame, *by: str) -> pd.DataFrame:
        returns = runs.groupby([*by], sort=False)["mean_return"]
        return pd.DataFrame({"last": returns.last(), "quarter": returns.agg(lambda run: run[-N_EVALUATIONS // 4 :].mean())})

    run = ["method", "task", "seed"]
    by_hand = pd.read_csv(HERE / "results" / "command_line.csv").rename(columns={"algo": "method"})
    by_hand["task"] = by_hand["env"].str.removeprefix("dm_control/").str.removesuffix("-v0")
    compared = pd.DataFrame(rows)[[*run, "mean_return"]].astype({"seed": int, "mean_return": float})
    both = ends(by_hand, "hyperparams", *run).join(ends(compared, *run), on=run, rsuffix="_compared").reset_index()
    table = [["method", "task", "`--hyperparams`", "seeds", "last", "in the comparison", "last quarter", "in the comparison"]]
    for (method, task, hyperparams), seeds in both.groupby(["method", "task", "hyperparams"], sort=False):
        arguments = " ".join(f"{name}:{value}" for name, value in json.loads(hyperparams).items())
        columns = (seeds[name] for name in ("last", "last_compared", "quarter", "quarter_compared"))
        cells = [with_seeds(returns) for returns in columns]
        table.append([LABELS[method], task, arguments, ", ".join(map(str, seeds["seed"])), *cells])
    return table


def cost_table() -> list[list[str]]:
    cost = pd.read_csv(HERE / "results" / "cost.csv")
    header = ["arm", "microseconds a step, wall", "CPU", "over SB3's PPO, wall", "CPU"]
    rows = [
        [row.arm, f"{row.wall_us_a_step:.0f}", f"{row.cpu_us_a_step:.0f}"]
        + [f"{ratio:.2f}" for ratio in (row.over_sb3_ppo_wall, row.over_sb3_ppo_cpu)]
        for row in cost.itertuples()
    ]
    return [header, *rows]


def draw_tasks(scores: Scores) -> None:
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.2), sharex=True, layout="constrained")
    for i, (ax, task) in enumerate(zip(axes.flat, TASKS, strict=True)):
        for method, curves in scores.items():
            mean, std = MAX_RETURN * curves[:, i].mean(axis=0), MAX_RETURN * curves[:, i].std(axis=0)
            draw_curve(ax, method, STEPS, mean, mean - std, mean + std)
        ax.set_title(task)
    draw_legend(figure)
    for ax in axes[-1]:
        ax.set_xlabel("million steps")
    figure.supylabel("return, mean ± standard deviation of seeds")
    save(figure, "tasks")


def draw_aggregates(scores: Scores) -> None:
    figure, (curve_ax, profile_ax) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for method, curves in scores.items():
        # `draw_curve` shows no other methods' bands, which take most of a report's time
        points = {str(i): curves[..., i] for i in range(curves.shape[-1])} if method in MAIN_METHODS else {}
        band = np.array([ends for _, *ends in interval(points, metrics.aggregate_iqm).values()]).T
        draw_curve(curve_ax, method, STEPS, iqm_path(curves), *band)
    curve_ax.set(xlabel="million steps", ylabel="IQM of scores, 95% interval", title="Sample efficiency")
    thresholds = np.linspace(0.0, 1.0, 101)
    final = {method: curves[..., -1] for method, curves in scores.items()}
    np.random.seed(0)
    profiles, bands = library.create_performance_profile(final, thresholds, reps=N_BOOTSTRAPS)
    for method, profile in profiles.items():
        draw_curve(profile_ax, method, thresholds, profile, *bands[method])
    draw_legend(figure)
    profile_ax.set(xlabel="score", ylabel="part of runs with more than this score", title="Performance profiles")
    save(figure, "aggregates")


def draw_curve(ax: Axes, method: str, x: np.ndarray, middle: np.ndarray, *band: np.ndarray) -> None:
    """The main methods with their band, the others as thin lines: ten bands could not be told apart."""
    main = method in MAIN_METHODS
    label = LABELS[method].replace("`", "")
    (line,) = ax.plot(x, middle, label=label, linestyle="-" if main else "--", linewidth=1.8 if main else 1.0)
    if main:
        ax.fill_between(x, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.grid(alpha=0.3)


def draw_legend(figure: plt.Figure) -> None:
    """One for all axes, beside them: in one of them it would hide curves."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")


def save(figure: plt.Figure, name: str) -> None:
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close(figure)


def main() -> None:
    rows = read_evaluations()
    scores = complete_scores(rows)
    # Not the hard tasks, which only some methods have
    last = {(row["method"], row["task"], row["seed"]): float(row["cpu_seconds"]) for row in rows if row["task"] in TASKS}
    cpu_seconds = {method: float(np.mean([s for key, s in last.items() if key[0] == method])) for method in scores}
    write_tables(
        HERE / "TUNING.md",
        {
            "finals": tuning_table("finals.csv", "finalist"),
            "coefficients": tuning_table("coefficients.csv", "coefficient"),
            "networks": tuning_table("networks.csv", "network"),
            "exploration": tuning_table("exploration.csv", "exploration"),
            "critics": tuning_table("critics.csv", "critic"),
        },
    )
    write_tables(
        HERE / "README.md",
        {
            "summary": summary_table(scores, cpu_seconds),
            "tasks": transposed(task_table(scores)),
            "variants": variants_table(scores),
            "annealed": annealed_table(scores),
            "pairs": transposed(pairs_table(scores)),
            "hard tasks": hard_table(rows),
            **{
                policy.replace("_", " "): policies_table(rows, {"`MlpPolicy`": "", POLICY_LABELS[policy]: f"_{policy}"})
                for policy in ("censored", "three_layers", "layer_norm")
            },
            "half rate": policies_table(rows, {"from 1e-3": "_layer_norm", "from 5e-4": "_layer_norm_half_rate"}),
            "cost": cost_table(),
            "command line": command_line_table(rows),
        },
    )
    draw_tasks(scores)
    draw_aggregates(scores)


if __name__ == "__main__":
    main()
