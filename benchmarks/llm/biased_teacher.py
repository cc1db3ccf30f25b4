"""The paper's comparison in miniature: policy objectives on the biased teacher's chains, on-policy and with replay.

    python benchmarks/llm/biased_teacher.py tune        each method's learning rate and coefficient, from the same grid
    python benchmarks/llm/biased_teacher.py run         the chosen settings on the seeds of the comparison
    python benchmarks/llm/biased_teacher.py report      the tables of results/README.md, and the figures

All commands go on where they stopped: a run whose rows are in the CSV is not repeated.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from transformers import LlamaForCausalLM

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.llm import CausalLMPolicy, TokenVecEnv
from sb3_r2vpo.llm.tasks.biased_teacher import BiasedTeacherTask, imitate, tiny_model

RESULTS = Path(__file__).parent / "results"
CHECKPOINT = Path(__file__).parent / "checkpoints" / "biased_teacher"
TUNING, RUNS = RESULTS / "biased_teacher_tuning.csv", RESULTS / "biased_teacher.csv"

N_PROMPTS, GROUP_SIZE, N_MINIBATCHES, N_ITERATIONS = 32, 8, 4, 60
IMITATION_UPDATES = 1500
TUNING_SEEDS, SEEDS = [100], [0, 1, 2, 3, 4]
LEARNING_RATES = [1e-4, 2e-4, 4e-4]
REPLAY_CAPACITIES = [1, 2, 4, 8]
UTD_RATIO = 2.0

#: eta times epsilon. Token variances are tiny, but single tokens whose ratio reaches 100 make that of a minibatch exceed one:
#: at 0.03, a few of them drove lambda from 0.3 to 35, and learning stopped.
RELATIVE_DUAL_LEARNING_RATE = 0.001


@dataclass(frozen=True)
class Method:
    """An objective, its coefficient's grid, and whether it takes part in the off-policy comparison."""

    coefficients: tuple[float, ...] = (0.0,)
    off_policy: bool = False
    on_policy: bool = True

    def arguments(self, name: str, coefficient: float) -> dict[str, Any]:
        """Arguments of R2VPO for a coefficient of the grid."""
        match name:
            case "r2vpo":
                return {
                    "var_coef": "auto_0.1",
                    "target_variance": coefficient,
                    "dual_learning_rate": RELATIVE_DUAL_LEARNING_RATE / coefficient,
                }
            case "r2vpo_fixed":
                return {"var_coef": coefficient}
            case "no_penalty":
                return {"var_coef": 0.0}
            case "exact_kl":
                return {"objective": name, "objective_kwargs": {"kl_coef": coefficient}}
            case _:
                return {"objective": name}


METHODS = {
    "ppo_clip": Method(off_policy=True),
    "clip_higher": Method(),
    "gppo": Method(off_policy=True),
    "topr": Method(off_policy=True),
    "exact_kl": Method((0.2, 0.6)),
    "spo": Method(),
    "r2vpo_fixed": Method((0.1, 0.3), off_policy=True),
    "r2vpo": Method((4e-3, 1.6e-2), off_policy=True),
    "no_penalty": Method(off_policy=True, on_policy=False),
}


@dataclass(frozen=True)
class Run:
    """One training run. ``replay`` counts rollouts; 0 is on-policy."""

    method: str
    replay: int
    learning_rate: float
    coefficient: float
    seed: int


def base_model(task: BiasedTeacherTask) -> LlamaForCausalLM:
    """The model that imitates the teacher; trained once, then read from its checkpoint."""
    if not (CHECKPOINT / "config.json").exists():
        th.manual_seed(0)
        model = tiny_model(task)
        print(f"Imitation ended at {imitate(model, task, IMITATION_UPDATES):.4f} nats a token")
        model.save_pretrained(CHECKPOINT)
    return LlamaForCausalLM.from_pretrained(CHECKPOINT)


class Recorder(BaseCallback):
    """One row for each iteration: the rollout's accuracy, and what the update before it logged."""

    STATISTICS = ("ratio_variance", "ratio_max", "var_coef", "clip_fraction", "ess")

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        episodes = [info["episode"] for info in self.locals["infos"]]
        logged = self.logger.name_to_value
        self.rows.append(
            {
                "iteration": len(self.rows),
                "responses": self.num_timesteps,
                "seconds": round(time.perf_counter() - self.start, 3),
                "accuracy": round(float(np.mean([episode["r"] for episode in episodes])), 5),
                "length": round(float(np.mean([episode["l"] for episode in episodes])), 3),
                "entropy": round(float(-self.locals["log_probs"].sum() / sum(e["l"] for e in episodes)), 5),
                **{name: f"{logged[f'train/{name}']:.6g}" if f"train/{name}" in logged else "" for name in self.STATISTICS},
            }
        )
        return True


def train(run: Run, n_iterations: int = N_ITERATIONS) -> list[dict[str, Any]]:
    """Train once; return its rows."""
    task = BiasedTeacherTask()
    env = TokenVecEnv(
        task, N_PROMPTS, GROUP_SIZE, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens
    )
    arguments = METHODS[run.method].arguments(run.method, run.coefficient)
    if run.replay:
        arguments |= {"replay_capacity": run.replay, "utd_ratio": UTD_RATIO, "recompute_advantages": False}
    model = (R2VPOOff if run.replay else R2VPO)(
        CausalLMPolicy,
        env,
        learning_rate=run.learning_rate,
        n_steps=1,
        batch_size=env.num_envs // N_MINIBATCHES,
        n_epochs=1,
        normalize_advantage=False,
        max_grad_norm=1.0,
        policy_kwargs={"model": base_model(task)},
        seed=run.seed,
        device="cpu",
        **arguments,
    )
    recorder = Recorder()
    # The values of an update are logged until the next rollout has been recorded
    model.learn(env.num_envs * n_iterations, callback=recorder, log_interval=None)
    return recorder.rows


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> Run:
    """The run that a row belongs to."""
    return Run(row["method"], int(row["replay"]), float(row["learning_rate"]), float(row["coefficient"]), int(row["seed"]))


def append(path: Path, run: Run, rows: list[dict[str, Any]]) -> None:
    """Append a finished run's rows, at once, so that an interrupted one leaves none."""
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*vars(run), *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({**vars(run), **row} for row in rows)


def arms() -> Iterator[tuple[str, int]]:
    """All (method, replay) pairs of the comparison."""
    for name, method in METHODS.items():
        if method.on_policy:
            yield name, 0
        if method.off_policy:
            yield from ((name, capacity) for capacity in REPLAY_CAPACITIES)


def tune(selected: list[tuple[str, int]]) -> None:
    """Run the grid; off-policy settings are tuned with the paper's replay of 4 and shared by all capacities."""
    for name, replay in selected:
        if replay not in (0, 4):
            continue
        for rate, coefficient, seed in itertools.product(LEARNING_RATES, METHODS[name].coefficients, TUNING_SEEDS):
            execute(TUNING, Run(name, replay, rate, coefficient, seed))


def chosen(name: str, replay: int) -> tuple[float, float]:
    """Learning rate and coefficient with the best mean accuracy over the last ten iterations, averaged over tuning seeds."""
    scores: dict[tuple[float, float], list[float]] = {}
    for row in read(TUNING):
        run = key(row)
        if (run.method, run.replay) == (name, 4 if replay else 0) and int(row["iteration"]) >= N_ITERATIONS - 10:
            scores.setdefault((run.learning_rate, run.coefficient), []).append(float(row["accuracy"]))
    if not scores:
        raise SystemExit(f"{name} with replay {replay} is not tuned yet: run `tune` first.")
    return max(scores, key=lambda setting: float(np.mean(scores[setting])))


def execute(path: Path, run: Run) -> None:
    """Train and record, unless that was done before."""
    if run in {key(row) for row in read(path)}:
        return
    rows = train(run)
    append(path, run, rows)
    print(f"{run}: {rows[-1]['seconds']:.0f} s, accuracy {np.mean([row['accuracy'] for row in rows[-10:]]):.3f}", flush=True)


def final_accuracies(name: str, replay: int) -> dict[int, float]:
    """Mean accuracy over the last ten iterations, by seed."""
    accuracies: dict[int, list[float]] = {}
    for row in read(RUNS):
        run = key(row)
        if (run.method, run.replay) == (name, replay) and int(row["iteration"]) >= N_ITERATIONS - 10:
            accuracies.setdefault(run.seed, []).append(float(row["accuracy"]))
    return {seed: float(np.mean(values)) for seed, values in accuracies.items()}


def responses_to(name: str, replay: int, accuracy: float) -> float:
    """Responses until the mean over seeds, smoothed over five iterations, reaches an accuracy; NaN if it never does."""
    rows = [row for row in read(RUNS) if (row["method"], int(row["replay"])) == (name, replay)]
    curve = [
        np.mean([float(row["accuracy"]) for row in rows if int(row["iteration"]) in range(i - 4, i + 1)])
        for i in range(4, N_ITERATIONS)
    ]
    reached = np.flatnonzero(np.array(curve) >= accuracy)
    return float((reached[0] + 5) * N_PROMPTS * GROUP_SIZE) if len(reached) else float("nan")


def confidence_interval(values: list[float], n_resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over seeds."""
    resampled = np.random.default_rng(0).choice(values, size=(n_resamples, len(values))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def report() -> None:
    """Write the table of all arms, best first, and plot the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms_run = sorted({(row["method"], int(row["replay"])) for row in read(RUNS)})
    grpo = final_accuracies("ppo_clip", 0)
    goal = float(np.mean(list(grpo.values()))) if grpo else float("nan")
    lines = [
        "| method | replay | lr | coefficient | seeds | final accuracy | 95% interval | responses to GRPO-ON's | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table = []
    for name, replay in arms_run:
        accuracies = list(final_accuracies(name, replay).values())
        rows = [row for row in read(RUNS) if (row["method"], int(row["replay"])) == (name, replay)]
        seconds = np.mean([float(row["seconds"]) for row in rows if int(row["iteration"]) == N_ITERATIONS - 1])
        low, high = confidence_interval(accuracies)
        cells = [name, "ON" if replay == 0 else f"OFF {replay}", rows[0]["learning_rate"], rows[0]["coefficient"]]
        cells += [len(accuracies), f"{np.mean(accuracies):.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{responses_to(name, replay, goal):.0f}", f"{seconds:.0f}"]
        table.append((float(np.mean(accuracies)), "| " + " | ".join(map(str, cells)) + " |"))
    lines += [line for _, line in sorted(table, reverse=True)]
    (RESULTS / "biased_teacher.md").write_text("\n".join(lines) + "\n")

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name, replay in arms_run:
        rows = [row for row in read(RUNS) if (row["method"], int(row["replay"])) == (name, replay)]
        iterations = range(N_ITERATIONS)

        def mean_of(column: str, rows: list[dict[str, str]] = rows, iterations: range = iterations) -> list[float]:
            values = [[float(row[column]) for row in rows if int(row["iteration"]) == i and row[column]] for i in iterations]
            return [float(np.mean(v)) if v else float("nan") for v in values]

        if replay in (0, 4):
            axes[min(replay, 1)].plot(mean_of("responses"), mean_of("accuracy"), label=name)
        if name == "r2vpo":
            axes[2].plot(mean_of("responses"), mean_of("var_coef"), label="ON" if replay == 0 else f"OFF, replay of {replay}")
    for axis, title in zip(axes, ("on-policy", "replay of 4", "multiplier of the adaptive R2VPO"), strict=True):
        axis.set(title=title, xlabel="generated responses")
        if axis.has_data():
            axis.legend(fontsize="small")
    axes[0].set_ylabel("accuracy")
    figure.savefig(RESULTS / "biased_teacher.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tune", "run", "report"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--replay", nargs="+", type=int, default=[0, *REPLAY_CAPACITIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    selected = [arm for arm in arms() if arm[0] in arguments.methods and arm[1] in arguments.replay]
    if arguments.command == "tune":
        tune(selected)
    elif arguments.command == "run":
        for seed, (name, replay) in itertools.product(arguments.seeds, selected):
            execute(RUNS, Run(name, replay, *chosen(name, replay), seed))
    else:
        report()


if __name__ == "__main__":
    main()
