"""One training run of a method on a task, and its evaluations: what `benchmark.py` repeats."""

import copy
import json
import platform
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch as th
import yaml
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.envs import EnvPoolVecEnv
from sb3_r2vpo.zoo.settings import split_schedules

TASKS = (
    "cartpole-swingup",
    "cartpole-swingup_sparse",
    "ball_in_cup-catch",
    "walker-run",
    "cheetah-run",
    "finger-spin",
    "reacher-hard",
    "hopper-hop",
    "fish-swim",
    "acrobot-swingup",
)
#: Beyond the ten that scores are aggregated over: many joints, and networks of their own (`LayerNormMlpPolicy`)
HARD_TASKS = ("humanoid-run", "dog-run")
N_EVALUATIONS, N_EVAL_EPISODES = 20, 10
PACKAGES = ("sb3-r2vpo", "stable-baselines3", "torch", "envpool")

Settings = dict[str, Any]
Row = dict[str, Any]


@cache
def shipped_settings(algo: str) -> dict[str, Settings]:
    return yaml.safe_load(Path(str(files("sb3_r2vpo.hyperparams").joinpath(f"{algo}.yml"))).read_text())


@dataclass(frozen=True)
class Method:
    """An algorithm, the shipped settings it starts from, and what it has of its own."""

    algorithm: type[OnPolicyAlgorithm]
    shipped: str = "ppo"
    #: Shipped settings that the algorithm does not have
    without: tuple[str, ...] = ("clip_range",)
    own: Settings = field(default_factory=dict)

    def settings(self, task: str) -> Settings:
        """What `r2vpo train --algo ALGO --env dm_control/TASK-v0` takes, and the method's own."""
        shipped = shipped_settings(self.shipped)[f"dm_control/{task}-v0"]
        return {**{name: value for name, value in shipped.items() if name not in self.without}, **self.own}


#: What PPO, which is compared bit for bit, does without
COMPILED = {"compile": True}
# R2VPOOff's schedule of the entropy bonus, with PPO's own bonus as its mean
ANNEALED = {"ent_coef": "lin_0.02"}
# Three layers, the first one normalised, and `MlpPolicy`'s initial standard deviation
LAYER_NORM = {
    "policy": "sb3_r2vpo.r2vpo.LayerNormMlpPolicy",
    "policy_kwargs": {"net_arch": [128, 128], "features_extractor_kwargs": {"features_dim": 128}, "log_std_init": 0.0},
}
# R2VPO's critic, optimised separately, and its policy's rate, which falls with the standard deviation; TUNING.md, steps 18, 19
CRITIC = {"n_rollouts": 2, "gae_lambda": 0.99, "std_scaled_learning_rate": True}
SCALED = {"critic_kwargs": CRITIC, "gae_lambda": 0.7}
# What R2VPO had before
JOINT = {
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
    "objective_kwargs": {"min_var_coef": 0.3, "compensate_entropy": False},
    "critic_kwargs": {"recompute_advantages": True},
}
# What R2VPOOff had before: four rollouts of a quarter of the length, white noise, and a critic that learns with the policy
SHORT = {"n_steps": 32, "replay_capacity": 4, "gae_lambda": 0.95}
#: Other policies than the comparison's, for annealed PPO and R2VPOOff as it was alike, by what the names of both end with
POLICIES: dict[str, Settings] = {
    # Probabilities of the clipped actions; so far on walker-run and cheetah-run only
    "censored": {"policy": "sb3_r2vpo.r2vpo.CensoredMlpPolicy"},
    # So far two seeds
    "layer_norm": LAYER_NORM,
    # The rate was tuned with two layers of tanh; so far one seed with half of it
    "layer_norm_half_rate": {**LAYER_NORM, "learning_rate": "lin_5e-4"},
    # `MlpPolicy` has two; so far on cartpole-swingup_sparse only
    "three_layers": {"policy_kwargs": {"net_arch": [128, 128, 128]}},
}
METHODS: dict[str, Method] = {
    "ppo": Method(PPO, without=()),
    "ppo_annealed": Method(PPO, without=(), own=ANNEALED),
    "r2vpo": Method(R2VPO, "r2vpo", without=(), own=COMPILED),
    "r2vpo_off": Method(R2VPOOff, "r2vpo_off", without=(), own=COMPILED),
}
#: Those with five seeds
MAIN_METHODS = tuple(METHODS)
METHODS |= {
    "r2vpo_off_short": Method(R2VPOOff, "r2vpo_off", without=("noise_exponent", *SCALED), own={**SHORT, **COMPILED}),
}
METHODS |= {
    f"{name}_{policy}": replace(METHODS[name], own={**METHODS[name].own, **own, **COMPILED})
    for policy, own in POLICIES.items()
    for name in ("ppo_annealed", "r2vpo_off_short")
}
METHODS |= {
    "r2vpo_layer_norm": replace(METHODS["r2vpo"], own={**LAYER_NORM, **COMPILED}),
    # A separately optimised critic, step 17 of TUNING.md
    "r2vpo_off_short_critic": replace(
        METHODS["r2vpo_off_short"],
        own={**SHORT, "critic_kwargs": {"n_rollouts": 8, "gae_lambda": 0.95}, "gae_lambda": 0.7, **COMPILED},
    ),
    # R2VPO's settings before: more steps of the critic; white noise; a critic that learns with the policy
    "r2vpo_twenty_epochs": Method(R2VPO, "r2vpo", without=(), own={"critic_kwargs": CRITIC, **COMPILED}),
    "r2vpo_white": Method(R2VPO, "r2vpo", without=("noise_exponent",), own={"critic_kwargs": CRITIC, **COMPILED}),
    "r2vpo_joint": Method(R2VPO, "r2vpo", without=("noise_exponent",), own={**JOINT, **COMPILED}),
    # Between the two: the critic apart, one learning rate for both
    "r2vpo_critic": Method(
        R2VPO,
        "r2vpo",
        without=("noise_exponent",),
        own={"critic_kwargs": {"n_rollouts": 2, "gae_lambda": 0.99}, **COMPILED},
    ),
    # PPO with the same: what of it is the critic's and the rate's, and what the objective's
    "ppo_annealed_scaled": Method(PPO, without=(), own={**ANNEALED, **SCALED, **COMPILED}),
    # By a schedule, in place of the critic
    "r2vpo_colored": Method(
        R2VPO, "r2vpo", without=(), own={"critic_kwargs": CRITIC, "noise_exponent": "lin_0.5", **COMPILED}
    ),
    # PPO with R2VPO's noise
    "ppo_annealed_noise": Method(PPO, without=(), own={**ANNEALED, "noise_exponent": "auto", **COMPILED}),
    # With all that R2VPO's settings have besides its objective
    "ppo_annealed_scaled_noise": Method(
        PPO,
        without=(),
        own={**ANNEALED, **SCALED, "critic_kwargs": {**CRITIC, "n_epochs": 15}, "noise_exponent": "auto", **COMPILED},
    ),
    # With what R2VPO's settings had besides it at first
    "ppo_recompute": Method(PPO, without=(), own={"critic_kwargs": {"recompute_advantages": True}}),
    # As in the paper, but for the coefficient
    "r2vpo_fixed": Method(R2VPO, own={"var_coef": 0.3, "objective_kwargs": {"compensate_entropy": False}, **COMPILED}),
    "spo": Method(R2VPO, own={"objective": "spo", "objective_kwargs": {"clip_range": 0.4}, **COMPILED}),
    "exact_kl": Method(R2VPO, own={"objective": "exact_kl", "objective_kwargs": {"kl_coef": 1.0}, **COMPILED}),
    "trpo": Method(TRPO, without=("clip_range", "n_epochs", "ent_coef"), own={"target_kl": 0.01}),
}


def in_our_loop(algorithm: type[OnPolicyAlgorithm], settings: Settings) -> tuple[type[OnPolicyAlgorithm], Settings]:
    """PPO as R2VPO with PPO's objective: bit for bit the weights and returns of SB3's class, in half of the time."""
    if algorithm is not PPO:
        return algorithm, settings
    arguments = dict(settings)
    clip_range = arguments.pop("clip_range")
    return R2VPO, {**arguments, "objective": "ppo_clip", "objective_kwargs": {"clip_range": clip_range}}


def old_names(settings: Settings) -> Settings:
    """
    Settings by the names that arguments had up to commit e70198e.

    The column ``settings`` of results that were recorded before then has these, and that commit's package takes them.
    """
    arguments = dict(settings)
    critic = arguments.pop("critic_kwargs", {})
    critic_names = {"n_rollouts": "critic_capacity", "n_epochs": "critic_epochs", "gae_lambda": "critic_gae_lambda"}
    arguments |= {critic_names.get(name, name): value for name, value in critic.items()}
    if arguments.get("objective", "r2vpo").startswith("r2vpo"):
        arguments |= arguments.pop("objective_kwargs", {})
    # The default then
    if arguments.get("var_coef") == "auto":
        del arguments["var_coef"]
    return arguments


class Evaluations(BaseCallback):
    """Evaluates at even intervals, the last time after the last update, and keeps what the update before it logged."""

    STATISTICS = ("std", "ratio_variance", "ratio_max", "ess", "var_coef", "approx_kl", "clip_fraction", "explained_variance")

    def __init__(self, eval_env: VecNormalize, every: int) -> None:
        super().__init__()
        self.eval_env, self.every = eval_env, every
        self.rows: list[Row] = []

    def _on_step(self) -> bool:
        # The last one has its place in `_on_training_end`
        if self.num_timesteps // self.every > len(self.rows) and len(self.rows) < N_EVALUATIONS - 1:
            self.evaluate()
        return True

    def _on_training_end(self) -> None:
        self.evaluate()

    def evaluate(self) -> None:
        sync_envs_normalization(self.training_env, self.eval_env)
        returns, _ = evaluate_policy(self.model, self.eval_env, N_EVAL_EPISODES, return_episode_rewards=True)
        logged = self.logger.name_to_value
        self.rows.append(
            {
                "timesteps": self.num_timesteps,
                "mean_return": round(float(np.mean(returns)), 2),
                "std_return": round(float(np.std(returns)), 2),
                **{name: f"{logged[f'train/{name}']:.4g}" if f"train/{name}" in logged else "" for name in self.STATISTICS},
                "cpu_seconds": round(time.process_time() - self.start_cpu, 1),
            }
        )

    def _on_training_start(self) -> None:
        self.start_cpu = time.process_time()


def package_versions() -> str:
    return " ".join(f"{name}={version(name)}" for name in PACKAGES)


def processor() -> str:
    """The processor's name, which `platform.processor()` leaves empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def make_model(algorithm: type[OnPolicyAlgorithm], settings: Settings, task: str, seed: int) -> OnPolicyAlgorithm:
    """
    :param algorithm: The algorithm's class
    :param settings: Its arguments, ``n_envs`` and ``normalize``, as in ``hyperparams/``
    :param task: A task of the DeepMind Control Suite, such as "cheetah-run"
    :param seed: Seed of the training
    :return: A new model and its environments
    """
    warnings.filterwarnings("ignore", message=".*truncated mini-batch")
    arguments = copy.deepcopy(settings)
    n_envs, normalize = arguments.pop("n_envs"), arguments.pop("normalize")
    arguments.pop("n_timesteps", None)
    if "." in arguments["policy"]:
        arguments["policy"] = resolve_name(arguments["policy"])
    env = VecNormalize(
        EnvPoolVecEnv(f"dm_control/{task}-v0", n_envs, seed=seed, num_threads=1, stagger=True),
        gamma=arguments["gamma"],
        **normalize,
    )
    schedules, arguments = split_schedules(arguments)
    return algorithm(env=env, seed=seed, device="cpu", **arguments, **schedules)


def train(algorithm: type[OnPolicyAlgorithm], settings: Settings, task: str, seed: int, n_timesteps: int) -> list[Row]:
    """
    Train once, on one thread; see :func:`make_model`. Evaluations have episodes of their own.

    :param n_timesteps: Environment steps, over all environments
    :return: A row for each evaluation
    """
    th.set_num_threads(1)
    model = make_model(algorithm, settings, task, seed)
    eval_env = VecNormalize(
        EnvPoolVecEnv(f"dm_control/{task}-v0", N_EVAL_EPISODES, seed=10_000 + seed, num_threads=1),
        training=False,
        norm_reward=False,
    )
    evaluations = Evaluations(eval_env, n_timesteps // N_EVALUATIONS)
    model.learn(n_timesteps, callback=evaluations)
    model.get_env().close()
    eval_env.close()
    constants = {
        "settings": json.dumps(settings, sort_keys=True),
        "versions": package_versions(),
        "processor": processor(),
    }
    return [{"task": task, "seed": seed, **row, **constants} for row in evaluations.rows]


def last_quarter(rows: list[Row]) -> float:
    """The score of a run in tuning: its mean return over the last quarter of the evaluations."""
    return round(float(np.mean([row["mean_return"] for row in rows[-len(rows) // 4 :]])), 1)
