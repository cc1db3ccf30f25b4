"""The paper's comparison in miniature: policy objectives on the biased teacher's chains, on-policy and with replay.

    python benchmarks/llm/biased_teacher.py tune        each method's learning rate and coefficient, from grids of equal size
    python benchmarks/llm/biased_teacher.py run         the chosen settings on the seeds of the comparison
    python benchmarks/llm/biased_teacher.py report      the tables and figures in results/

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
from sb3_r2vpo.common.rollout import Rollout
from sb3_r2vpo.llm import CausalLMPolicy, Sampling, TokenVecEnv
from sb3_r2vpo.llm.evaluation import evaluate_responses
from sb3_r2vpo.llm.tasks.biased_teacher import BiasedTeacherTask, imitate, tiny_model

RESULTS = Path(__file__).parent / "results"
CHECKPOINT = Path(__file__).parent / "checkpoints" / "biased_teacher"
TUNING, RUNS, TOKENS = (RESULTS / f"biased_teacher{suffix}.csv" for suffix in ("_tuning", "", "_tokens"))

N_PROMPTS, GROUP_SIZE, N_MINIBATCHES = 32, 8, 4
IMITATION_UPDATES = 1500

#: The budget of generated responses is that of 50 iterations; the claim is about half of it.
N_ITERATIONS = 50
HALF = N_ITERATIONS // 2

#: With replay, runs have half of the budget. They are tuned at the paper's capacity, and the others take the same settings.
#: The two best ones at that capacity go on to the end, to see how many responses they need.
REPLAY_CAPACITIES = [1, 2, 4, 8]
TUNED_CAPACITY = 4
WHOLE_BUDGET = ("topr", "r2vpo_sequence_fixed")
UTD_RATIO = 4.0

#: The first seed tries all settings of a grid, the other ones the best ``N_FINALISTS`` of them.
TUNING_SEEDS, N_FINALISTS = [100, 101, 102], 2
SEEDS = [0, 1, 2, 3, 4]

#: Learning rates of methods without and with a coefficient, which has two values to try: four settings for each method
GRIDS = {
    "ON": {1: (1e-4, 2e-4, 4e-4, 6e-4), 2: (2e-4, 4e-4)},
    "OFF": {1: (5e-5, 1e-4, 2e-4, 4e-4), 2: (1e-4, 2e-4)},
}

N_HELD_OUT, HELD_OUT_BATCH = 2000, 500

#: Updates after which tokens of stored rollouts are looked at, how old those are, and bins of their log-ratios and behaviour
#: probabilities
MEASURED_ITERATIONS, MEASURED_STALENESS = (5, HALF), (1, 3, 5, 7)
LOG_RATIO_BINS = np.linspace(-2, 2, 41)
PROBABILITY_BINS = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0])


@dataclass(frozen=True)
class Method:
    """An objective, its coefficient's grid, and in which of the two comparisons it takes part."""

    coefficients: tuple[float, ...] = (0.0,)
    off_policy: bool = False
    on_policy: bool = True

    def arguments(self, name: str, coefficient: float) -> dict[str, Any]:
        """Arguments of R2VPO for a coefficient of the grid."""
        match name:
            # eta times epsilon. A token whose ratio is 100 lifts the variance of a minibatch a thousandfold: at 0.03, a few of
            # them drove lambda from 0.3 to 35. Variances of whole responses are larger, and closer to their target.
            case "r2vpo" | "r2vpo_sequence":
                eta = 0.001 if name == "r2vpo" else 0.01
                return {
                    "objective": name,
                    "var_coef": "auto_0.3",
                    "target_variance": coefficient,
                    "objective_kwargs": {"dual_learning_rate": eta / coefficient},
                }
            case "r2vpo_fixed" | "r2vpo_sequence_fixed":
                return {"objective": name.removesuffix("_fixed"), "var_coef": coefficient}
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
    "r2vpo_sequence_fixed": Method((0.1, 0.3), off_policy=True, on_policy=False),
    "r2vpo_sequence": Method((0.25, 0.5), off_policy=True, on_policy=False),
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


def make_env(task: BiasedTeacherTask, n_prompts: int, group_size: int) -> TokenVecEnv:
    """Environments of the task, of any size."""
    return TokenVecEnv(
        task, n_prompts, group_size, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens
    )


class HeldOut:
    """Accuracy on problems that are the same for all runs, one response each at temperature 1."""

    def __init__(self, task: BiasedTeacherTask) -> None:
        self.env = make_env(task, HELD_OUT_BATCH, 1)
        rng = np.random.default_rng(2**32)
        self.problems = [task.sample(rng) for _ in range(N_HELD_OUT)]

    def __call__(self, policy: CausalLMPolicy) -> float:
        with th.random.fork_rng():
            th.manual_seed(0)
            return evaluate_responses(policy, self.env, self.problems, Sampling())[0].mean_at_k


class Recorder(BaseCallback):
    """
    One row for each iteration: the rollout's accuracy, and what the update before it logged. After half of the budget, and at
    the end, the accuracy on held-out problems as well. Neither that nor other measurements count as CPU seconds.
    """

    STATISTICS = ("ratio_variance", "ratio_max", "var_coef", "clip_fraction", "ess")

    def __init__(self, held_out: HeldOut) -> None:
        super().__init__()
        self.held_out = held_out
        self.rows: list[dict[str, Any]] = []
        self.start = time.process_time()

    def _on_rollout_start(self) -> None:
        if len(self.rows) == HALF:
            self._evaluate()

    def _on_training_end(self) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        start = time.process_time()
        self.rows[-1]["held_out"] = round(self.held_out(self.model.policy), 5)  # type: ignore[arg-type]
        self.start += time.process_time() - start

    def _on_step(self) -> bool:
        episodes = [info["episode"] for info in self.locals["infos"]]
        logged = self.logger.name_to_value
        n_tokens = sum(episode["l"] for episode in episodes)
        self.rows.append(
            {
                "iteration": len(self.rows),
                "responses": self.num_timesteps,
                "cpu_seconds": round(time.process_time() - self.start, 2),
                "accuracy": round(float(np.mean([episode["r"] for episode in episodes])), 5),
                "length": round(n_tokens / len(episodes), 3),
                "entropy": round(float(-self.locals["log_probs"].sum() / n_tokens), 5),
                **{name: f"{logged[f'train/{name}']:.4g}" if f"train/{name}" in logged else "" for name in self.STATISTICS},
                "held_out": "",
            }
        )
        return True


class MeasuredOff(R2VPOOff):
    """
    Looks at stored tokens after a few updates only. `R2VPOOff` does so before each update, which here would only be a third
    more of the computation: advantages relative to a group need no refreshing.
    """

    def _setup_model(self) -> None:
        super()._setup_model()
        self.token_rows: list[dict[str, Any]] = []

    def _renew_replayed(self, rollouts: list[Rollout]) -> None:
        n_iterations = self.num_timesteps // self.env.num_envs  # type: ignore[union-attr]
        if n_iterations not in MEASURED_ITERATIONS:
            return
        for staleness, rollout in enumerate(reversed(rollouts[:-1]), start=1):
            rows = self._count_tokens(rollout)
            self.token_rows += [{"iteration": n_iterations, "staleness": staleness, **row} for row in rows]

    @th.no_grad()
    def _count_tokens(self, rollout: Rollout) -> list[dict[str, Any]]:
        """How many tokens have which ratio, by sign of the advantage and probability under the behaviour policy."""
        samples = rollout.training_samples
        if not len(samples.old_log_prob):
            return []
        log_prob = self.evaluate_actions(samples, with_values=False).log_prob
        log_ratio = (log_prob - samples.old_log_prob)[samples.mask].numpy()
        probability = samples.old_log_prob[samples.mask].exp().numpy()
        positive = (samples.advantages > 0).expand_as(samples.mask)[samples.mask].numpy()
        bins = np.digitize(log_ratio, LOG_RATIO_BINS), np.digitize(probability, PROBABILITY_BINS[1:-1])
        table: dict[tuple[bool, int, int], int] = {}
        for cell in zip(positive.tolist(), bins[1].tolist(), bins[0].tolist(), strict=True):
            table[cell] = table.get(cell, 0) + 1
        return [
            {"positive": int(cell[0]), "probability_bin": cell[1], "log_ratio_bin": cell[2], "tokens": count}
            for cell, count in sorted(table.items())
        ]


def train(run: Run, n_iterations: int, held_out: HeldOut) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train once; return the rows of its iterations and of its stored tokens."""
    task = BiasedTeacherTask()
    env = make_env(task, N_PROMPTS, GROUP_SIZE)
    arguments = METHODS[run.method].arguments(run.method, run.coefficient)
    if run.replay:
        arguments |= {"replay_capacity": run.replay, "utd_ratio": UTD_RATIO, "critic_kwargs": {"recompute_advantages": False}}
    # Responses are weighed alike: a whole response's ratio has one gradient, however many tokens it has
    normalization = "sequence" if "sequence" in run.method else "token"
    model = (MeasuredOff if run.replay else R2VPO)(
        CausalLMPolicy,
        env,
        learning_rate=run.learning_rate,
        n_steps=1,
        batch_size=env.num_envs // N_MINIBATCHES,
        n_epochs=1,
        normalize_advantage=False,
        max_grad_norm=1.0,
        rollout_buffer_kwargs={"filter_uniform_groups": True, "loss_normalization": normalization},
        policy_kwargs={"model": base_model(task)},
        seed=run.seed,
        device="cpu",
        **arguments,
    )
    recorder = Recorder(held_out)
    # The values of an update are logged until the next rollout has been recorded
    model.learn(env.num_envs * n_iterations, callback=recorder, log_interval=None)
    return recorder.rows, getattr(model, "token_rows", [])


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
    if not rows:
        return
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


def settings(name: str, replay: int) -> list[tuple[float, float]]:
    """The grid of a method: learning rates and coefficients."""
    coefficients = METHODS[name].coefficients
    return list(itertools.product(GRIDS["OFF" if replay else "ON"][len(coefficients)], coefficients))


def scores(name: str, replay: int) -> dict[tuple[float, float], list[float]]:
    """Accuracies on held-out problems at the end of the tuning runs, by setting."""
    results: dict[tuple[float, float], list[float]] = {}
    for row in read(TUNING):
        run = key(row)
        if (run.method, run.replay) == (name, TUNED_CAPACITY if replay else 0):
            results.setdefault((run.learning_rate, run.coefficient), []).append(float(row["held_out"]))
    return results


def tune(selected: list[tuple[str, int]], held_out: HeldOut) -> None:
    """Run the grid with one seed, and its best settings with the other seeds; one row for each run."""
    for name, replay in selected:
        if replay not in (0, TUNED_CAPACITY):
            continue
        candidates = settings(name, replay)
        for seed in TUNING_SEEDS:
            for setting in candidates:
                run = Run(name, replay, *setting, seed)
                if run in {key(row) for row in read(TUNING)}:
                    continue
                rows, _ = train(run, HALF if replay else N_ITERATIONS, held_out)
                append(TUNING, run, rows[-1:])
                print(f"{run}: {rows[-1]['cpu_seconds']:.0f} s, accuracy {rows[-1]['held_out']:.3f}", flush=True)
            if seed == TUNING_SEEDS[0]:
                first = scores(name, replay)
                candidates = sorted(candidates, key=lambda setting: -first[setting][0])[:N_FINALISTS]


def chosen(name: str, replay: int) -> tuple[float, float]:
    """Learning rate and coefficient with the best mean accuracy, of those that all tuning seeds tried."""
    complete = {s: np.mean(values) for s, values in scores(name, replay).items() if len(values) == len(TUNING_SEEDS)}
    if not complete:
        raise SystemExit(f"{name} with replay {replay} is not tuned yet: run `tune` first.")
    return max(complete, key=lambda setting: complete[setting])


def compare(seed: int, name: str, replay: int, held_out: HeldOut) -> None:
    """Train with the chosen setting and record all, unless that was done before."""
    run = Run(name, replay, *chosen(name, replay), seed)
    if run in {key(row) for row in read(RUNS)}:
        return
    goes_on = replay == 0 or (replay == TUNED_CAPACITY and name in WHOLE_BUDGET)
    rows, token_rows = train(run, N_ITERATIONS if goes_on else HALF, held_out)
    append(RUNS, run, rows)
    # One seed has tokens enough for a histogram
    append(TOKENS, run, token_rows if seed == SEEDS[0] else [])
    print(f"{run}: {rows[-1]['cpu_seconds']:.0f} s, accuracy {rows[-1]['held_out']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tune", "run", "report"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--replay", nargs="+", type=int, default=[0, *REPLAY_CAPACITIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    if arguments.command == "report":
        from report import report

        report()
        return
    th.set_num_threads(1)
    held_out = HeldOut(BiasedTeacherTask())
    selected = [arm for arm in arms() if arm[0] in arguments.methods and arm[1] in arguments.replay]
    if arguments.command == "tune":
        tune(selected, held_out)
    else:
        for seed, (name, replay) in itertools.product(arguments.seeds, selected):
            compare(seed, name, replay, held_out)


if __name__ == "__main__":
    main()
