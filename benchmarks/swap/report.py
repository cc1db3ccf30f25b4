"""The tables and the figure of results/*.csv, in the manner of rliable (https://arxiv.org/abs/2108.13264).

    python benchmarks/swap/report.py

Rewrites the tables in README.md beside this file, and figures/swap.png. A score is 0 at the return of random actions
(results/random.csv, written anew if it is missing) and 1 at the mean final return of the best of the methods compared.
"""

import sys
from pathlib import Path

import numpy as np
from benchmark import METHODS, TASKS, make_env, paths, read_rows, write_rows
from matplotlib import pyplot as plt
from rliable import library, metrics

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from readme_tables import write_tables  # noqa: E402

RANDOM = HERE / "results" / "random.csv"
N_RANDOM_EPISODES = 20
N_BOOTSTRAPS = 2_000
LABELS = {"ppo": "PPO", "r2vpo": "R2VPO", "r2vpo_off": "R2VPOOff", "r2vpo_fixed": "R2VPO, λ 0.3"}
DISCRETE = tuple(task for task in TASKS if task.startswith(("MinAtar", "CartPole", "Acrobot")) or task == "LunarLander-v3")

#: Return of each evaluation, an array of shape (seeds, evaluations) for each task
Curves = dict[str, np.ndarray]


def random_returns() -> dict[str, float]:
    """:return: For each task, the mean return of an episode of random actions"""
    if not RANDOM.exists():
        rows = []
        for task in TASKS:
            env = make_env(task)
            env.action_space.seed(0)
            returns = []
            for episode in range(N_RANDOM_EPISODES):
                env.reset(seed=0 if episode == 0 else None)
                done = False
                while not done:
                    *_, terminated, truncated, info = env.step(env.action_space.sample())
                    done = terminated or truncated
                returns.append(info["episode"]["r"])
            rows.append({"task": task, "episodes": N_RANDOM_EPISODES, "return_mean": round(float(np.mean(returns)), 3)})
        write_rows(RANDOM, ("task", "episodes", "return_mean"), rows)
    return {row["task"]: float(row["return_mean"]) for row in read_rows(RANDOM)}


def curves_of(method: str) -> Curves:
    """:return: All finished runs of a method, in the order of their seeds"""
    curves: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    for row in read_rows(paths(method)[0]):
        curves[row["task"]].setdefault(row["seed"], []).append(float(row["return_mean"]))
    return {task: np.array([runs[seed] for seed in sorted(runs)]) for task, runs in curves.items() if runs}


def scores(curves: dict[str, Curves], tasks: list[str]) -> dict[str, np.ndarray]:
    """:return: Final scores of each method, of shape (seeds, tasks); the seeds that all tasks and methods have"""
    low = random_returns()
    high = {task: max(float(runs[task][:, -1].mean()) for runs in curves.values()) for task in tasks}
    n_seeds = min(len(runs[task]) for runs in curves.values() for task in tasks)
    return {
        method: np.array([(runs[task][:n_seeds, -1] - low[task]) / (high[task] - low[task]) for task in tasks]).T
        for method, runs in curves.items()
    }


def interval(statistic, *arrays: np.ndarray) -> tuple[float, float, float]:
    """:return: A statistic with the ends of its 95% stratified bootstrap interval"""
    # rliable draws from the global generator
    np.random.seed(0)
    data = {"": arrays if len(arrays) > 1 else arrays[0]}
    values, ends = library.get_interval_estimates(data, lambda *x: np.array([statistic(*x)]), reps=N_BOOTSTRAPS)
    return float(values[""][0]), float(ends[""][0, 0]), float(ends[""][1, 0])


def better(curves: dict[str, Curves], method: str, task: str) -> float:
    """:return: The probability that a run of the method ends above one of PPO's"""
    ours, ppo = curves[method][task][:, -1, None], curves["ppo"][task][None, :, -1]
    return float(((ours > ppo) + 0.5 * (ours == ppo)).mean())


def aggregate_table(curves: dict[str, Curves], groups: dict[str, list[str]]) -> list[list[str]]:
    rows = [["tasks", "method", "seeds", "IQM", "over PPO", "P(better than PPO)"]]
    for group, tasks in groups.items():
        final = scores(curves, tasks)
        ppo = metrics.aggregate_iqm(final["ppo"])
        for method, values in final.items():
            mean, low, high = interval(metrics.aggregate_iqm, values)
            row = [group, LABELS[method], str(len(values)), f"{mean:.3f} ({low:.3f} to {high:.3f})"]
            if method == "ppo":
                rows.append([*row, "", ""])
            else:
                p, p_low, p_high = interval(metrics.probability_of_improvement, values, final["ppo"])
                rows.append([*row, f"{mean / ppo:.2f}", f"{p:.2f} ({p_low:.2f} to {p_high:.2f})"])
    return rows


def task_table(curves: dict[str, Curves], tasks: list[str]) -> list[list[str]]:
    """Final return of each method, how far its best evaluation was above it, and how likely a run is better than PPO's."""
    columns = [
        name for method in curves for name in (LABELS[method], "best - final", "P(better)")[: 2 if method == "ppo" else 3]
    ]
    rows = [["task", "steps", *columns]]
    for task in tasks:
        row = [task, f"{TASKS[task]:,}"]
        for method, runs in curves.items():
            if task not in runs:
                row += ["", "", ""]
                continue
            final = runs[task][:, -1]
            row += [f"{final.mean():.4g} ± {final.std():.3g} ({len(final)})", f"{(runs[task].max(1) - final).mean():.3g}"]
            row += [] if method == "ppo" else [f"{better(curves, method, task):.2f}"]
        rows.append(row)
    return rows


def multiplier_table() -> list[list[str]]:
    """:return: Training returns of R2VPO with each multiplier, one number for each seed, from results/multiplier.csv"""
    rows = read_rows(HERE / "results" / "multiplier.csv")
    values = sorted({row["var_coef"] for row in rows})
    table = [["task", "steps", *(f"λ {value}" for value in values)]]
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows):
        runs = {value: [row for row in rows if (row["task"], row["var_coef"]) == (task, value)] for value in values}
        cells = [", ".join(f"{float(row['train_return']):.0f}" for row in runs[value]) for value in values]
        table.append([task, f"{int(steps):,}", *cells])
    return table


def plot(curves: dict[str, Curves], tasks: list[str]) -> None:
    """A panel for each task: the mean of the seeds, and the range of their evaluations."""
    n_columns = 6
    figure, axes = plt.subplots(-(-len(tasks) // n_columns), n_columns, figsize=(16, 8), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for method, style in zip(curves, ("--", "-", "-.", ":"), strict=False):
            if task not in curves[method]:
                continue
            returns = curves[method][task]
            steps = np.arange(1, returns.shape[1] + 1) / returns.shape[1] * TASKS[task] / 1000
            (line,) = axis.plot(steps, returns.mean(0), style, label=LABELS[method])
            axis.fill_between(steps, returns.min(0), returns.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(task, fontsize=9)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("thousand steps", fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / "swap.png", dpi=80)
    plt.close(figure)


def main() -> None:
    curves = {method: runs for method in METHODS if (runs := curves_of(method))}
    tasks = [task for task in TASKS if all(task in runs for runs in curves.values())]
    begun = [task for task in curves["ppo"] if any(task in runs for method, runs in curves.items() if method != "ppo")]
    groups = {
        "all": tasks,
        "discrete actions": [task for task in tasks if task in DISCRETE],
        "continuous actions": [task for task in tasks if task not in DISCRETE],
    }
    groups = {f"{name} ({len(group)})": group for name, group in groups.items() if group}
    tables = {"aggregates": aggregate_table(curves, groups), "tasks": task_table(curves, begun)}
    tables["multipliers"] = multiplier_table()
    write_tables(HERE / "README.md", tables)
    plot(curves, begun)


if __name__ == "__main__":
    main()
