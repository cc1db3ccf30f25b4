"""The shipped settings of R2VPO beside the RL Zoo's tuned ones of PPO, on the Zoo's tasks.

    python benchmarks/swap/shipped.py --tasks CartPole-v1 --seeds 20            all runs that results/shipped.csv lacks
    python benchmarks/swap/shipped.py --methods ppo --tasks Pendulum-v1 --seeds 5

What `r2vpo train --env TASK` does with `hyperparams/r2vpo.yml`, and SB3's PPO with the Zoo's own file. A row for each of five
evaluations at even intervals, each of 20 episodes of the deterministic policy, the last one of 100.
"""

import argparse
import sys
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from benchmark import RESULTS, Row, Run, clocks, evaluation_seed, locked, package_versions, processor, read_rows, write_rows
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

from sb3_r2vpo import R2VPO
from sb3_r2vpo.zoo.settings import split_schedules

PATH = RESULTS / "shipped.csv"
ALGORITHMS = {"ppo": (PPO, "rl_zoo3.hyperparams"), "r2vpo": (R2VPO, "sb3_r2vpo.hyperparams")}
TASKS = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3")
N_EVALUATIONS, N_EVAL_EPISODES, N_FINAL_EPISODES = 5, 20, 100
COLUMNS = (
    *("method", "task", "seed", "step", "return_mean", "return_std", "cpu_seconds"),
    *("settings", "versions", "processor"),
)


def shipped_settings(method: str, task: str) -> dict[str, Any]:
    path = Path(str(files(ALGORITHMS[method][1]).joinpath(f"{method}.yml")))
    return yaml.safe_load(path.read_text())[task]


class Evaluations(BaseCallback):
    """Evaluate at even intervals, the last time after the last update."""

    def __init__(self, run: Run, env: VecNormalize, every: float) -> None:
        super().__init__()
        self.run, self.env, self.every = run, env, every
        self.rows: list[Row] = []
        self.pauses = 0.0

    def _on_training_start(self) -> None:
        self.start = clocks()[0]

    def _on_step(self) -> bool:
        number = len(self.rows) + 1
        if number < N_EVALUATIONS and self.num_timesteps >= number * self.every:
            self.evaluate(N_EVAL_EPISODES)
        return True

    def _on_training_end(self) -> None:
        self.evaluate(N_FINAL_EPISODES)

    def evaluate(self, n_episodes: int) -> None:
        start = clocks()[0]
        sync_envs_normalization(self.training_env, self.env)
        self.env.seed(evaluation_seed(self.run, len(self.rows) + 1))
        returns, _ = evaluate_policy(self.model, self.env, n_episodes, return_episode_rewards=True)
        self.rows.append(
            {
                "method": self.run.method,
                "task": self.run.task,
                "seed": self.run.seed,
                "step": self.num_timesteps,
                "return_mean": round(float(np.mean(returns)), 2),
                "return_std": round(float(np.std(returns)), 2),
                "cpu_seconds": round(start - self.start - self.pauses, 1),
            }
        )
        self.pauses += clocks()[0] - start


def train(run: Run) -> list[Row]:
    settings = shipped_settings(run.method, run.task)
    schedules, arguments = split_schedules(settings)
    n_timesteps, n_envs = int(arguments.pop("n_timesteps")), arguments.pop("n_envs", 1)
    normalize = arguments.pop("normalize", False)
    on = {"norm_obs": bool(normalize), "norm_reward": bool(normalize)}
    env = VecNormalize(make_vec_env(run.task, n_envs, seed=run.seed), gamma=arguments.get("gamma", 0.99), **on)
    eval_env = VecNormalize(make_vec_env(run.task, 10), training=False, norm_obs=on["norm_obs"], norm_reward=False)
    model = ALGORITHMS[run.method][0](env=env, seed=run.seed, device="cpu", **arguments, **schedules)
    evaluations = Evaluations(run, eval_env, n_timesteps / N_EVALUATIONS)
    model.learn(n_timesteps, callback=evaluations)
    env.close()
    eval_env.close()
    constants = {"settings": yaml.safe_dump(settings, default_flow_style=True, width=1000).strip()}
    constants |= {"versions": package_versions(run.method), "processor": processor()}
    return [row | constants for row in evaluations.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds: 1000, 2000, ...")
    args = parser.parse_args()
    th.set_num_threads(1)
    for number, task, method in product(range(1, args.seeds + 1), args.tasks, args.methods):
        run = Run(1000 * number, task, method)
        if any((row["method"], row["task"], int(row["seed"])) == (method, task, run.seed) for row in read_rows(PATH)):
            continue
        rows = train(run)
        print(method, task, run.seed, *(row["return_mean"] for row in rows), f"{rows[-1]['cpu_seconds']} s", flush=True)
        with locked():
            write_rows(PATH, COLUMNS, [*read_rows(PATH), *rows])


if __name__ == "__main__":
    sys.exit(main())
