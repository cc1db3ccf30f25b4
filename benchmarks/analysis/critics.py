"""How much of a policy gradient is signal, with which critic and which lambda of the advantages.

    python benchmarks/analysis/critics.py record    trains, and writes results/critics.csv (half an hour)
    python benchmarks/analysis/critics.py report    the table in README.md

A policy is trained up to some step and then left as it is. Critics of one architecture are fitted to many steps of that
policy; each of them, and the one that was trained with the policy, gives advantages of batches of steps that no critic has
seen. What such batches' gradients have in common with the mean gradient of the best critic is their signal.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch as th
from commands import run_command
from generalization import train_until
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "critics.csv"
sys.path.insert(0, str(HERE.parent / "control"))
from experiment import package_versions, processor  # noqa: E402
from readme_tables import write_tables  # noqa: E402

from sb3_r2vpo import R2VPOOff  # noqa: E402
from sb3_r2vpo.common.rollout import Rollout  # noqa: E402

TASKS, SEED = ("cheetah-run", "walker-run"), 401
NETWORKS = {"r2vpo_off_short": "two layers of tanh", "r2vpo_off_short_layer_norm": "`LayerNormMlpPolicy`"}
STOP = 300_000
#: Steps that critics are fitted to, and passes over them; the last one is the reference, with the lambda of training
FITTED = {65_536: 24, 524_288: 12}
N_BATCHES, BATCH_SIZE = 32, 4096
LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95)
ITERATIONS, MINIBATCH_SIZE, LEARNING_RATE = 4, 512, 1e-3


def collect(model: R2VPOOff, n_steps: int) -> Rollout:
    """One long rollout of the policy as it is."""
    model.env.training = False
    _, callback = model._setup_learn(0, None, reset_num_timesteps=False)
    per_env = n_steps // model.n_envs
    model.rollout_buffer = RolloutBuffer(
        per_env, model.observation_space, model.action_space, gamma=model.gamma, n_envs=model.n_envs
    )
    model.collect_rollouts(model.env, callback, model.rollout_buffer, per_env)
    return Rollout(model.rollout_buffer, model._last_obs, model._last_episode_starts, model._timeouts)


def compute_advantages(model: R2VPOOff, critic: nn.Module | None, rollout: Rollout, gae_lambda: float) -> None:
    """Values, advantages and returns of a rollout by a critic; ``None`` for the model's own."""

    def predict_values(observations: th.Tensor | np.ndarray) -> th.Tensor:
        return critic(th.as_tensor(observations))

    rollout.renew(model.predict_values if critic is None else predict_values, model.gamma, gae_lambda)


def fit(model: R2VPOOff, rollout: Rollout, n_passes: int) -> nn.Module:
    """A critic fitted to the returns of a rollout, those of lambda 0.95, which it gives anew three times."""
    width, n_inputs = 256, get_flattened_obs_dim(model.observation_space)
    critic = nn.Sequential(
        *(nn.Linear(n_inputs, width), nn.LayerNorm(width), nn.Tanh()),
        *(nn.Linear(width, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 1)),
    )
    optimizer = th.optim.Adam(critic.parameters(), lr=LEARNING_RATE)
    decay = th.optim.lr_scheduler.LinearLR(optimizer, 1, 0, n_passes * (len(rollout) // MINIBATCH_SIZE))
    for iteration in range(ITERATIONS):
        compute_advantages(model, critic if iteration else None, rollout, 0.95)
        samples = rollout.samples
        for _ in range(n_passes // ITERATIONS):
            for steps in th.randperm(len(rollout)).split(MINIBATCH_SIZE):
                loss = F.mse_loss(critic(samples.observations[steps]).flatten(), samples.returns[steps])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
    return critic


def gradients(model: R2VPOOff, rollout: Rollout) -> th.Tensor:
    """The policy gradients of the batches of a rollout, one in each row: of the mean's weights, advantages normalised."""
    unused = ("value_net", "vf_features_extractor", "log_std")
    parameters = [p for name, p in model.policy.named_parameters() if not any(part in name for part in unused)]
    samples = rollout.samples
    # Rollouts are stored environment by environment; a batch is all environments for some time
    batches = np.split(np.arange(len(rollout)).reshape(model.n_envs, -1), N_BATCHES, axis=1)
    rows = []
    for steps in batches:
        batch = type(samples)(*(field[steps.ravel()] for field in samples))
        log_prob = model.evaluate_actions(batch, with_values=False).log_prob
        advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
        gradient = th.autograd.grad((log_prob * advantages).mean(), parameters)
        rows.append(th.cat([part.flatten() for part in gradient]))
    return th.stack(rows)


def between_batches(one: th.Tensor, other: th.Tensor) -> float:
    """The inner product of two mean gradients, without bias: of no batch with itself."""
    products = one @ other.T
    return ((products.sum() - products.trace()) / (len(one) * (len(one) - 1))).item()


def signal(one: th.Tensor, reference: th.Tensor) -> dict[str, float]:
    """
    :param one: Gradients of batches, one in each row
    :param reference: Those of the same batches with the best critic
    :return: Cosines with the mean reference, of a batch's gradient and of the mean of infinitely many
    """
    common = between_batches(one, reference) / between_batches(reference, reference) ** 0.5
    squared = one.square().sum(dim=1).mean().item()
    mean_squared = max(between_batches(one, one), 0)
    return {"cosine_of_batch": common / squared**0.5, "cosine_of_mean": common / mean_squared**0.5 if mean_squared else np.nan}


def measure(model: R2VPOOff) -> list[dict]:
    """Rows of all critics and lambdas, for the policy of a model."""
    critics: dict[str, nn.Module | None] = {"of training": None}
    for n_steps, n_passes in FITTED.items():
        critics[f"fitted to {n_steps:,} steps"] = fit(model, collect(model, n_steps), n_passes)
    unseen = collect(model, N_BATCHES * BATCH_SIZE)
    found = {}
    for name, critic in critics.items():
        for gae_lambda in LAMBDAS:
            compute_advantages(model, critic, unseen, gae_lambda)
            found[name, gae_lambda] = gradients(model, unseen)
    reference = found[name, 0.95]
    return [{"critic": name, "gae_lambda": value, **signal(rows, reference)} for (name, value), rows in found.items()]


def record() -> None:
    th.set_num_threads(1)
    rows = []
    for task in tqdm(TASKS, desc="tasks"):
        for name in NETWORKS:
            model = train_until(STOP, name, task, SEED)
            run = {"task": task, "method": name, "seed": SEED, "timesteps": model.num_timesteps}
            rows += [{**run, **row} for row in measure(model)]
            model.env.close()
            table = pd.DataFrame(rows)
            table["versions"], table["processor"] = package_versions(), processor()
            table.round(4).to_csv(RESULTS, index=False)


def report() -> None:
    table = [["task", "network", "critic", *(f"lambda {value:g}" for value in LAMBDAS)]]
    for (task, method, critic), part in pd.read_csv(RESULTS).groupby(["task", "method", "critic"], sort=False):
        part = part.set_index("gae_lambda")
        cells = [f"{part.cosine_of_batch[value]:.2f} ({part.cosine_of_mean[value]:.2f})" for value in LAMBDAS]
        table.append([task, NETWORKS[method], critic, *cells])
    write_tables(HERE / "README.md", {"critics": table})


if __name__ == "__main__":
    run_command(__doc__, record, report)
