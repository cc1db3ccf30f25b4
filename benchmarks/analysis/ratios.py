"""What the probability ratios of a training run look like: Figures 2, 4c, 5 and 9 and Theorem 4.4 of the paper, measured.

    python benchmarks/analysis/ratios.py record      trains, and writes results/ratios.csv (ten minutes on one core)
    python benchmarks/analysis/ratios.py report      draws figures/ from it

After each update of PPO, R2VPO and R2VPOOff on cheetah-run, the ratios between the new policy and those that collected the
stored rollouts are taken over all their steps: divergences, what clipping would have cut off, and quantiles.
"""

import copy
import csv
import os
import sys
from collections import deque
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch as th
from commands import run_command
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_r2vpo import R2VPO
from sb3_r2vpo.common.rollout import Rollout
from sb3_r2vpo.core.divergences import CHI_SQUARE, F_DIVERGENCES, alpha_divergence, clipping_error, clipping_error_bound

HERE = Path(__file__).parent
RATIOS = HERE / "results" / "ratios.csv"
sys.path.insert(0, str(HERE.parent / "control"))
from experiment import METHODS, Settings, in_our_loop, make_model  # noqa: E402

TASK, N_TIMESTEPS, SEED = "cheetah-run", 500_000, 0
CLIP_RANGE = 0.2
DIVERGENCES = {**F_DIVERGENCES, "alpha_1.5": alpha_divergence(1.5)}
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
#: Number of last rollouts that are measured
CAPACITY = 4


@th.no_grad()
def measure(model: R2VPO, rollout: Rollout) -> dict[str, float]:
    """The ratios between the current policy and the one that collected a rollout."""
    samples = rollout.samples
    log_prob = model.evaluate_actions(samples, with_values=False).log_prob
    log_ratio = log_prob - samples.old_log_prob
    advantages = (samples.advantages - samples.advantages.mean()) / samples.advantages.std()
    variance = CHI_SQUARE.per_sample(log_ratio).mean()
    error = clipping_error(log_ratio, advantages, CLIP_RANGE)
    ratio = log_ratio.exp()
    return {
        "variance": variance.item(),
        **{name: divergence.per_sample(log_ratio).mean().item() for name, divergence in DIVERGENCES.items()},
        "clipping_error": error.mean().abs().item(),
        "pessimistic_clipping_error": error.relu().mean().item(),
        "bound": clipping_error_bound(variance, advantages.abs().max(), CLIP_RANGE).item(),
        "clip_fraction": ((ratio - 1).abs() > CLIP_RANGE).float().mean().item(),
        "ess": (ratio.mean().square() / ratio.square().mean()).item(),
        **{f"q{q}": value for q, value in zip(QUANTILES, np.quantile(ratio.numpy(), QUANTILES).tolist(), strict=True)},
    }


class Recorder(BaseCallback):
    """A row for each update and each of the last ``CAPACITY`` rollouts, whether or not the model trains on them."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm = arm
        self.rollouts: deque[Rollout] = deque(maxlen=CAPACITY)
        self.rows: list[dict[str, object]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model = self.model
        # Copies, as the model is about to train on them
        parts = model.rollout_buffer, model._last_obs, model._last_episode_starts, model._timeouts
        self.rollouts.append(Rollout(*copy.deepcopy(parts)))

    def _on_rollout_start(self) -> None:
        # The first call comes before the first update, and has nothing to measure
        for staleness, rollout in enumerate(reversed(self.rollouts)):
            row = {
                "arm": self.arm,
                "timesteps": self.num_timesteps,
                "staleness": staleness,
                "var_coef": self.logger.name_to_value.get("train/var_coef", ""),
                "std": self.model.policy.log_std.exp().mean().item(),
                **measure(self.model, rollout),
            }
            self.rows.append({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})


def arms() -> dict[str, tuple[type[OnPolicyAlgorithm], Settings]]:
    methods = {"PPO": METHODS["ppo"], "R2VPO": METHODS["r2vpo_joint"], "R2VPOOff": METHODS["r2vpo_off_short"]}
    return {name: in_our_loop(method.algorithm, method.settings(TASK)) for name, method in methods.items()}


def record() -> None:
    th.set_num_threads(1)
    rows = []
    for name, (algorithm, settings) in arms().items():
        recorder = Recorder(name)
        model = make_model(algorithm, settings, TASK, SEED)
        model.learn(N_TIMESTEPS, callback=recorder, progress_bar=True)
        rows += recorder.rows
        model.get_env().close()
    RATIOS.parent.mkdir(exist_ok=True)
    with RATIOS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_divergences(rows: pd.DataFrame) -> Figure:
    """Figures 2 and 5: each divergence against the ratio variance, and its approximation of Proposition 4.1."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, layout="constrained")
    for ax, (name, divergence) in zip(axes.flat, DIVERGENCES.items(), strict=True):
        for staleness, part in rows.groupby("staleness"):
            ax.loglog(part["variance"], part[name], ".", markersize=2, label=f"{staleness} rollouts old")
        variance = np.geomspace(rows["variance"].min(), rows["variance"].max())
        ax.loglog(variance, divergence.quadratic(th.as_tensor(variance)), "k-", linewidth=1, label="f''(1)/2 · variance")
        ax.set_title(name.replace("_", " "))
        ax.grid(alpha=0.3)
    axes[0, 0].legend(markerscale=5, fontsize="small")
    figure.supxlabel("ratio variance")
    figure.supylabel("divergence of the current policy from the one that collected the rollout")
    return figure


def draw_clipping_error(rows: pd.DataFrame) -> Figure:
    """Theorem 4.4: what clipping at 0.2 removes from the surrogate, and its bound."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained")
    for ax, (arm, part) in zip(axes, rows[rows["staleness"] == 0].groupby("arm", sort=False), strict=True):
        for column, label in (("clipping_error", "|J - J_clip|"), ("pessimistic_clipping_error", "of PPO's minimum")):
            ax.semilogy(part["timesteps"], part[column].clip(lower=1e-6), label=label)
        ax.semilogy(part["timesteps"], part["bound"], "k", label="bound, max|A| / (4c) · variance")
        ax.set(title=arm, xlabel="steps")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def draw_paths(rows: pd.DataFrame) -> Figure:
    """Figure 4c: the multiplier, and what it goes with."""
    columns = {"var_coef": "λ", "variance": "ratio variance after the update", "std": "action standard deviation"}
    figure, axes = plt.subplots(1, len(columns), figsize=(11, 3.4), layout="constrained")
    for arm, part in rows[rows["staleness"] == 0].groupby("arm", sort=False):
        for ax, (column, label) in zip(axes, columns.items(), strict=True):
            ax.plot(part["timesteps"], part[column], label=arm)
            ax.set(xlabel="steps", title=label)
            ax.grid(alpha=0.3)
    axes[2].legend()
    return figure


def draw_ratios(rows: pd.DataFrame) -> Figure:
    """Figure 9: quantiles of the ratio by staleness, over the second half of training."""
    late = rows[rows["timesteps"] > rows["timesteps"].max() / 2].groupby(["arm", "staleness"], sort=False).mean()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, arm in zip(axes, rows["arm"].unique(), strict=True):
        part = late.loc[arm]
        for low, high in zip(QUANTILES[:4], QUANTILES[:4:-1], strict=True):
            ax.fill_between(part.index, part[f"q{low}"], part[f"q{high}"], color="C0", alpha=0.2, label=f"{low:g} to {high:g}")
        ax.plot(part.index, part["q0.5"], "C0", label="median")
        ax.axhspan(1 - CLIP_RANGE, 1 + CLIP_RANGE, fill=False, linestyle=":", label="clip range")
        ax.set(title=arm, xlabel="rollouts old", xticks=part.index, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ratio")
    axes[0].legend(fontsize="small")
    return figure


def report() -> None:
    rows = pd.read_csv(RATIOS)
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for draw in (draw_divergences, draw_clipping_error, draw_paths, draw_ratios):
        figure = draw(rows)
        figure.savefig(folder / f"{draw.__name__.removeprefix('draw_')}.png", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    run_command(__doc__, record, report)
