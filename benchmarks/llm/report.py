"""Tables and figures of the comparison, from the CSV files in results/ alone: `biased_teacher.py report`."""

from io import BytesIO
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
from biased_teacher import (
    GROUP_SIZE,
    HALF,
    LOG_RATIO_BINS,
    N_ITERATIONS,
    N_PROMPTS,
    PROBABILITY_BINS,
    REPLAY_CAPACITIES,
    RESULTS,
    RUNS,
    TOKENS,
    TUNED_CAPACITY,
)
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt

#: Names for people, and one colour for each method in all figures
NAMES = {
    "ppo_clip": "GRPO",
    "clip_higher": "GRPO-CH",
    "gppo": "GPPO",
    "topr": "TOPR",
    "exact_kl": "exact KL",
    "spo": "SPO",
    "no_penalty": "no penalty",
    "r2vpo_fixed": "R2VPO, fixed λ",
    "r2vpo": "R2VPO, adaptive λ",
    "r2vpo_sequence_fixed": "R2VPO-sequence, fixed λ",
    "r2vpo_sequence": "R2VPO-sequence, adaptive λ",
}
COLOURS = dict(zip(NAMES, [plt.get_cmap("tab20")(i) for i in (14, 15, 12, 4, 8, 10, 17, 0, 1, 6, 7)], strict=True))

#: With replay of ``TUNED_CAPACITY``, the method that the others are compared with
BEST = "r2vpo_sequence_fixed"

#: Iterations over which a rollouts' accuracy, of 32 prompts, is averaged
SMOOTHING = 5
RESPONSES = N_PROMPTS * GROUP_SIZE


def confidence_interval(values: np.ndarray, n_resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over seeds."""
    resampled = np.random.default_rng(0).choice(values, size=(n_resamples, len(values))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def difference(a: np.ndarray, b: np.ndarray, n_resamples: int = 10_000) -> str:
    """``mean(a) - mean(b)`` and its 95% percentile bootstrap interval, for independent seeds, as text."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, size=(n_resamples, len(values))).mean(axis=1) for values in (a, b)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return f"{a.mean() - b.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def with_interval(values: np.ndarray) -> str:
    """Mean and interval as text; no interval of one value, a dash where there is none."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if len(values) else "–"
    low, high = confidence_interval(values)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def arm_name(method: str, replay: int) -> str:
    """A method with ON, or OFF and the capacity."""
    return f"{NAMES[method]} {f'OFF {replay}' if replay else 'ON'}"


def held_out(rows: pd.DataFrame, n_iterations: int) -> np.ndarray:
    """Accuracies on held-out problems after so many iterations, one for each seed."""
    return rows.loc[rows["iteration"] == n_iterations - 1, "held_out"].dropna().to_numpy()


def smoothed(rows: pd.DataFrame, column: str = "accuracy") -> pd.Series:
    """Mean over seeds by iteration, smoothed; the index counts responses."""
    means = rows.groupby("iteration")[column].mean().rolling(SMOOTHING).mean()
    return means.set_axis((means.index + 1) * RESPONSES)


def responses_to(rows: pd.DataFrame, accuracy: float) -> str:
    """Responses until the smoothed mean over seeds reaches an accuracy."""
    curve = smoothed(rows)
    reached = curve.index[curve >= accuracy]
    return f"{reached[0]:,}" if len(reached) else f"> {curve.index[-1]:,}"


def write_table(runs: pd.DataFrame) -> None:
    """The table of all arms, those with the best accuracy after half of the responses first, and the test of the claim."""
    arms = dict(tuple(runs.groupby(["method", "replay"])))
    grpo = arms["ppo_clip", 0]
    goal = held_out(grpo, N_ITERATIONS)
    rollout_goal = smoothed(grpo).iloc[-1]
    header = ["method", "lr", "coefficient", "seeds", f"accuracy at {HALF * RESPONSES:,}", f"at {N_ITERATIONS * RESPONSES:,}"]
    header += ["responses to GRPO-ON's end", "CPU s for half"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (method, replay), rows in sorted(arms.items(), key=lambda arm: -held_out(arm[1], HALF).mean()):
        half = held_out(rows, HALF)
        seconds = rows.loc[rows["iteration"] == HALF - 1, "cpu_seconds"].mean()
        cells = [arm_name(method, replay), f"{rows['learning_rate'].iloc[0]:g}", f"{rows['coefficient'].iloc[0]:g}", len(half)]
        cells += [with_interval(half), with_interval(held_out(rows, N_ITERATIONS))]
        cells += [responses_to(rows, rollout_goal), f"{seconds:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    best = held_out(arms[BEST, TUNED_CAPACITY], HALF)
    lines += [
        "",
        f"The claim: with half of the responses, as accurate as GRPO-ON with all of them ({with_interval(goal)}).",
        "",
        f"| replay of {TUNED_CAPACITY}, half of the responses | less GRPO-ON with all | {NAMES[BEST]}, less this |",
        "|---|---|---|",
    ]
    for (method, replay), rows in arms.items():
        if replay == TUNED_CAPACITY:
            half = held_out(rows, HALF)
            against_best = "–" if method == BEST else difference(best, half)
            lines.append(f"| {NAMES[method]} | {difference(half, goal)} | {against_best} |")
    ends = {arm: held_out(rows, N_ITERATIONS) for arm, rows in arms.items() if arm != (BEST, TUNED_CAPACITY)}
    best = held_out(arms[BEST, TUNED_CAPACITY], N_ITERATIONS)
    lines += ["", f"| all responses | {arm_name(BEST, TUNED_CAPACITY)}, less this |", "|---|---|"]
    lines += [f"| {arm_name(*arm)} | {difference(best, end)} |" for arm, end in ends.items() if len(end)]
    (RESULTS / "biased_teacher.md").write_text("\n".join(lines) + "\n")


def save(figure: plt.Figure, name: str) -> None:
    """As a small file: few flat colours need no more than a palette."""
    rendered = BytesIO()
    figure.savefig(rendered, dpi=90)
    plt.close(figure)
    Image.open(rendered).convert("RGB").quantize(200).save(RESULTS / f"{name}.png", optimize=True)


def plot_curves(runs: pd.DataFrame) -> None:
    """Figures 7 and 8 of the paper: reward and length, by responses; and reward by computing time."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for (method, replay), rows in runs.groupby(["method", "replay"]):
        if replay not in (0, TUNED_CAPACITY):
            continue
        style = {"color": COLOURS[method], "label": NAMES[method], "lw": 1.8 if "r2vpo" in method else 1.2}
        column = 0 if replay == 0 else 1
        axes[0, column].plot(smoothed(rows), **style)
        if method in ("ppo_clip", "topr", "r2vpo_fixed", "r2vpo_sequence_fixed"):
            seconds = rows.groupby("iteration")["cpu_seconds"].mean()
            style["label"] = arm_name(method, replay)
            axes[1, 0].plot(seconds, smoothed(rows), ls="-" if replay else "--", **style)
            axes[1, 1].plot(smoothed(rows, "length"), ls="-" if replay else "--", **style)
    reference = smoothed(runs[(runs["method"] == "ppo_clip") & (runs["replay"] == 0)])
    axes[0, 1].plot(reference, color="black", ls=":", label="GRPO ON")
    for axis, title, label in (
        (axes[0, 0], "on-policy", "generated responses"),
        (axes[0, 1], f"replay of {TUNED_CAPACITY}", "generated responses"),
        (axes[1, 0], "by computing time", "CPU seconds"),
        (axes[1, 1], "length of responses", "generated responses"),
    ):
        axis.set(title=title, xlabel=label, ylabel="tokens" if axis is axes[1, 1] else "accuracy of rollouts")
        axis.legend(fontsize=7)
    save(figure, "curves")


def plot_multiplier(runs: pd.DataFrame) -> None:
    """Figure 4c: the path of the adaptive multiplier, one thin line for each seed, and the variance it is to hold."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, colour in (("r2vpo", "tab:blue"), ("r2vpo_sequence", "tab:red")):
        for replay, style in ((0, "--"), (TUNED_CAPACITY, "-")):
            rows = runs[(runs["method"] == method) & (runs["replay"] == replay)]
            if rows.empty:
                continue
            for axis, column in zip(axes, ("var_coef", "ratio_variance"), strict=True):
                for _, seed in rows.groupby("seed"):
                    axis.plot(seed["responses"], seed[column], color=colour, ls=style, lw=0.5, alpha=0.5)
                mean = rows.groupby("responses")[column].median()
                axis.plot(mean, color=colour, ls=style, lw=2, label=arm_name(method, replay))
            axes[1].axhline(rows["coefficient"].iloc[0], color=colour, ls=":" if replay else "-.", lw=0.8)
    axes[0].set(title="multiplier λ (thick: median of the seeds)", xlabel="generated responses")
    axes[1].set(title="ratio variance of updates, and its targets", xlabel="generated responses", yscale="log")
    axes[1].set_ylim(bottom=1e-5)
    axes[0].legend(fontsize=8)
    save(figure, "multiplier")


def plot_staleness(runs: pd.DataFrame, tokens: pd.DataFrame) -> None:
    """Figures 9 and 4b: distribution of token ratios by staleness, and accuracy by capacity of the replay."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    centres = (LOG_RATIO_BINS[1:] + LOG_RATIO_BINS[:-1]) / 2
    longest = tokens[tokens["replay"] == REPLAY_CAPACITIES[-1]]
    for axis, method in zip(axes, ("ppo_clip", "r2vpo_sequence_fixed"), strict=False):
        rows = longest[(longest["method"] == method) & (longest["iteration"] == HALF)]
        for staleness in (1, 3, 5, 7):
            counts = rows[rows["staleness"] == staleness].groupby("log_ratio_bin")["tokens"].sum()
            density = counts.reindex(range(len(LOG_RATIO_BINS) + 1), fill_value=0) / counts.sum()
            axis.plot(
                centres, density.iloc[1:-1], label=f"{staleness} rollouts old", color=plt.get_cmap("viridis")(staleness / 8)
            )
        axis.axvline(0, color="red", lw=0.8)
        axis.set(
            title=f"{NAMES[method]}, replay of 8, after {HALF * RESPONSES:,}", xlabel="log ratio of a token", yscale="log"
        )
        axis.set(ylabel="share of tokens", ylim=(1e-5, 1.5))
        axis.legend(fontsize=8)
    for index, (method, rows) in enumerate(runs[runs["replay"] > 0].groupby("method")):
        at_half = {capacity: held_out(rows[rows["replay"] == capacity], HALF) for capacity in REPLAY_CAPACITIES}
        at_half = {capacity: values for capacity, values in at_half.items() if len(values)}
        means = np.array([values.mean() for values in at_half.values()])
        intervals = np.array([confidence_interval(values) for values in at_half.values()]).T
        axes[2].errorbar(
            np.array(list(at_half)) * (0.93 + 0.02 * index),  # side by side
            means,
            yerr=np.abs(intervals - means),
            color=COLOURS[method],
            label=NAMES[method],
            capsize=2,
        )
    axes[2].set(title=f"accuracy after {HALF * RESPONSES:,} responses", xlabel="replay capacity (rollouts)", xscale="log")
    # GPPO, which collapses, would leave the others no room
    axes[2].set_ylim(0.55, 0.85)
    axes[2].set_xticks(REPLAY_CAPACITIES, [str(capacity) for capacity in REPLAY_CAPACITIES])
    axes[2].minorticks_off()
    axes[2].legend(fontsize=7)
    save(figure, "staleness")


def plot_clipped_tokens(tokens: pd.DataFrame) -> None:
    """Figure 4a: which tokens of good responses have ratios beyond PPO's clip range, where GRPO gives them no gradient."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    methods = ("ppo_clip", "topr", "r2vpo_fixed", "r2vpo_sequence_fixed")
    rows = tokens[(tokens["replay"] == TUNED_CAPACITY) & (tokens["positive"] == 1)]
    # Bins have a width of 0.1: those from 0.2 on, a ratio of 1.22
    beyond = np.append(-np.inf, LOG_RATIO_BINS)[rows["log_ratio_bin"]] > 0.15
    rows = rows.assign(beyond=rows["tokens"] * beyond)
    for index, method in enumerate(methods):
        sums = rows[rows["method"] == method].groupby("probability_bin")[["tokens", "beyond"]].sum()
        axis.bar(
            sums.index + 0.2 * (index - 1.5), sums["beyond"] / sums["tokens"], 0.2, color=COLOURS[method], label=NAMES[method]
        )
    labels = [f"{low:g}–{high:g}" for low, high in pairwise(PROBABILITY_BINS)]
    axis.set_xticks(range(len(labels)), labels)
    axis.set(title="tokens with positive advantage and ρ > 1.22, replay of 4", xlabel="probability under the behaviour policy")
    axis.set_ylabel("share of such tokens")
    axis.legend(fontsize=8)
    save(figure, "clipped_tokens")


def plot_kl_penalty(runs: pd.DataFrame) -> None:
    """Figure 6: a penalty on the exact KL divergence, and R2VPO's, on-policy."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in ("exact_kl", "r2vpo_fixed", "ppo_clip"):
        rows = runs[(runs["method"] == method) & (runs["replay"] == 0)]
        axes[0].plot(smoothed(rows), color=COLOURS[method], label=f"{NAMES[method]}, {rows['coefficient'].iloc[0]:g}")
        axes[1].plot(smoothed(rows, "ratio_variance"), color=COLOURS[method])
    axes[0].set(title="accuracy of rollouts, on-policy", xlabel="generated responses")
    axes[1].set(title="ratio variance of updates", xlabel="generated responses", yscale="log")
    axes[0].legend(fontsize=8)
    save(figure, "kl_penalty")


def report() -> None:
    """Write all tables and figures."""
    runs, tokens = pd.read_csv(RUNS), pd.read_csv(TOKENS)
    write_table(runs)
    plot_curves(runs)
    plot_multiplier(runs)
    plot_staleness(runs, tokens)
    plot_clipped_tokens(tokens)
    plot_kl_penalty(runs)
