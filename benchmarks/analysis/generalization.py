"""How much of an update's surrogate gain is there on data that the update has not seen.

    python benchmarks/analysis/generalization.py record    trains, and writes results/generalization.csv (ten minutes)
    python benchmarks/analysis/generalization.py report    the table in README.md

A policy is trained up to some step and then left as it is, while rollouts are collected. Each of some of them is given to one
update of the algorithm, always from that same policy; all others tell what the new policy's surrogate gain is, the mean of
(rho - 1) times the normalised advantage.
"""

import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch as th
from commands import run_command
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "generalization.csv"
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "control"))
from experiment import COMPILED, METHODS, in_our_loop, make_model, package_versions, processor  # noqa: E402
from readme_tables import write_tables  # noqa: E402

from sb3_r2vpo import R2VPO  # noqa: E402
from sb3_r2vpo.common.rollout import Rollout  # noqa: E402
from sb3_r2vpo.core.objectives import ratio_minus_one  # noqa: E402

TASKS, METHOD_NAMES, SEED = ("cheetah-run", "walker-run"), ("ppo", "r2vpo_joint"), 100
N_TIMESTEPS, STOPS = 1_000_000, (100_000, 300_000)
N_ROLLOUTS, N_UPDATES = 30, 10


class StopAt(BaseCallback):
    """Ends training early, with the schedules of all of its steps."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.n_steps


def train_until(stop: int, name: str, task: str, seed: int) -> R2VPO:
    """A method's model after some of the steps of its training, in our loop, compiled."""
    algorithm, settings = in_our_loop(METHODS[name].algorithm, {**METHODS[name].settings(task), **COMPILED})
    model = make_model(algorithm, settings, task, seed)
    return model.learn(N_TIMESTEPS, callback=StopAt(stop))


def collect(model: R2VPO) -> list[dict]:
    """Rollouts of the policy as it is: what of a model `train` uses, before that has changed it."""
    model.env.training = False
    _, callback = model._setup_learn(0, None, reset_num_timesteps=False)
    rollouts = []
    for _ in range(N_ROLLOUTS):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        names = ("rollout_buffer", "_last_obs", "_last_episode_starts", "_timeouts")
        rollouts.append({name: copy.deepcopy(getattr(model, name)) for name in names})
    return rollouts


@th.no_grad()
def gain(model: R2VPO, rollout: dict) -> tuple[float, float]:
    """The surrogate gain of a model's policy on a rollout of the policy before it, and the ratio variance."""
    buffer, last_obs, last_dones, timeouts = copy.deepcopy(list(rollout.values()))
    samples = Rollout(buffer, last_obs, last_dones, timeouts).samples
    log_prob = model.evaluate_actions(samples, with_values=False).log_prob
    deviation = ratio_minus_one(log_prob - samples.old_log_prob)
    advantages = (samples.advantages - samples.advantages.mean()) / samples.advantages.std()
    return (deviation * advantages).mean().item(), deviation.square().mean().item()


def updates(model: R2VPO) -> list[dict[str, float]]:
    """Updates from one policy, each on another rollout."""
    rollouts = collect(model)
    modules = (model.policy, model.policy.optimizer, model.policy_loss.multiplier)
    states = [copy.deepcopy(module.state_dict()) for module in modules]
    rows = []
    for i in tqdm(range(N_UPDATES), desc="updates", leave=False):
        for name, value in rollouts[i].items():
            setattr(model, name, copy.deepcopy(value))
        # No callback has changed them
        model._snapshot.arrays = model.rollout_buffer.advantages, model.rollout_buffer.returns
        model.train()
        trained, variance = gain(model, rollouts[i])
        # Not the two neighbours, whose first or last steps belong to the same stretch of an episode
        others = [gain(model, rollout) for j, rollout in enumerate(rollouts) if abs(i - j) > 1]
        held_out, held_out_variance = np.mean(others, axis=0)
        rows.append({"gain": trained, "held_out_gain": held_out, "variance": variance, "held_out_variance": held_out_variance})
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(copy.deepcopy(state))
    return rows


def record() -> None:
    th.set_num_threads(1)
    rows = []
    for task in TASKS:
        for name in METHOD_NAMES:
            for stop in STOPS:
                model = train_until(stop, name, task, SEED)
                run = {"task": task, "method": name, "seed": SEED, "timesteps": model.num_timesteps}
                rows += [{**run, **row} for row in updates(model)]
                model.env.close()
    table = pd.DataFrame(rows)
    table["versions"], table["processor"] = package_versions(), processor()
    table.to_csv(RESULTS, index=False)


def report() -> None:
    columns = ["gain", "held_out_gain", "held_out_variance"]
    table = [["task", "steps", "method", "gain on its own rollout", "on others", "part", "ratio variance on others"]]
    for (task, _, name), part in pd.read_csv(RESULTS).groupby(["task", "timesteps", "method"], sort=False):
        own, others, variance = part[columns].mean()
        error = part["held_out_gain"].std() / np.sqrt(len(part))
        steps = f"{part['timesteps'].iloc[0] / 1000:.0f}k"
        cells = [f"{own:.4f}", f"{others:.4f} ± {error:.4f}", f"{others / own:.1%}", f"{variance:.3f}"]
        table.append([task, steps, {"ppo": "PPO", "r2vpo_joint": "R2VPO"}[name], *cells])
    write_tables(HERE / "README.md", {"generalization": table})


if __name__ == "__main__":
    run_command(__doc__, record, report)
