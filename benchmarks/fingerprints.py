"""SHA-256 of the final weights of short training runs that cover the options: a change of the code leaves training as it is.

    python benchmarks/fingerprints.py -o after.csv     # with --old on commit e70198e, whose arguments had other names

Weights agree bit for bit only on one processor with one version of PyTorch: record before and after on the same machine.
"""

import argparse
import csv
import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
warnings.filterwarnings("ignore")

from helpers import RandomEnv  # noqa: E402

from sb3_r2vpo import R2VPO, R2VPOOff  # noqa: E402
from sb3_r2vpo.r2vpo import CensoredMlpPolicy, LayerNormMlpPolicy  # noqa: E402

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "seed": 0, "device": "cpu"}
BOX = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
DM_CONTROL = {
    "gae_lambda": 0.7,
    "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "ent_coef": LinearSchedule(0.01, 0.0, 1.0),
    "noise_exponent": "auto",
    "critic_kwargs": {"n_rollouts": 2, "n_epochs": 4, "gae_lambda": 0.99, "std_scaled_learning_rate": True},
    "objective_kwargs": {"min_var_coef": 0.3},
}


def random_env(observations: spaces.Space, actions: spaces.Space, n_envs: int = 2) -> Any:
    return make_vec_env(lambda: RandomEnv(observations, actions), n_envs=n_envs, seed=0)


def old_arguments(algorithm: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for commit e70198e."""
    arguments = dict(arguments)
    critic = dict(arguments.pop("critic_kwargs", {}))
    names = {"n_rollouts": "critic_capacity", "n_epochs": "critic_epochs", "gae_lambda": "critic_gae_lambda"}
    arguments |= {names.get(name, name): value for name, value in critic.items()}
    if arguments.get("objective", "r2vpo").startswith("r2vpo"):
        arguments |= arguments.pop("objective_kwargs", {})
    return arguments


def language_model(**kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
    from test_llm import Echo, tiny_model, vec_env

    from sb3_r2vpo.llm import CausalLMPolicy

    th.manual_seed(0)
    return CausalLMPolicy, vec_env(Echo()), {"policy_kwargs": {"model": tiny_model(), **kwargs}}


SEQUENCES = {"n_steps": 1, "batch_size": 8, "n_epochs": 2, "normalize_advantage": False, "n_timesteps": 64}
IMAGES = spaces.Box(0, 255, (36, 36, 1), np.uint8)
DICT = spaces.Dict({"a": BOX, "b": spaces.Box(-1, 1, (2, 2), np.float32)})

#: Name: algorithm, policy and environment, arguments
CASES: dict[str, tuple[type, Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "r2vpo_box": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {}),
    "r2vpo_off_box": (R2VPOOff, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {}),
    "r2vpo_discrete": (R2VPO, lambda: ("MlpPolicy", "CartPole-v1"), {"ent_coef": 0.01}),
    "r2vpo_off_discrete": (R2VPOOff, lambda: ("MlpPolicy", random_env(BOX, spaces.Discrete(3))), {"replay_capacity": 3}),
    "r2vpo_multidiscrete": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, spaces.MultiDiscrete([2, 3]))), {}),
    "r2vpo_off_multibinary": (R2VPOOff, lambda: ("MlpPolicy", random_env(BOX, spaces.MultiBinary(3))), {}),
    "r2vpo_dict": (R2VPO, lambda: ("MultiInputPolicy", random_env(DICT, ACTIONS)), {}),
    "r2vpo_off_dict": (R2VPOOff, lambda: ("MultiInputPolicy", random_env(DICT, spaces.Discrete(3))), {}),
    "r2vpo_images": (R2VPO, lambda: ("CnnPolicy", random_env(IMAGES, spaces.Discrete(3))), {}),
    "r2vpo_off_images": (R2VPOOff, lambda: ("CnnPolicy", random_env(IMAGES, spaces.Discrete(3))), {}),
    "r2vpo_sde": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"use_sde": True, "sde_sample_freq": 4}),
    "r2vpo_target_kl": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"target_kl": 1e-4, "learning_rate": 1e-3}),
    "r2vpo_fixed": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"var_coef": 0.3, "clip_range_vf": 0.1}),
    "r2vpo_schedules": (
        R2VPO,
        lambda: ("MlpPolicy", "Pendulum-v1"),
        {"target_variance": LinearSchedule(0.05, 0.0, 1.0), "objective_kwargs": {"compensate_entropy": False}},
    ),
    "ppo_clip": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"objective": "ppo_clip", "clip_range_vf": 0.2}),
    "ppo_clip_discrete": (R2VPO, lambda: ("MlpPolicy", "CartPole-v1"), {"objective": "ppo_clip"}),
    "spo": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"objective": "spo", "objective_kwargs": {"clip_range": 0.4}}),
    "exact_kl": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"objective": "exact_kl", "objective_kwargs": {"kl_coef": 1.0}}),
    "r2vpo_relu": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"policy_kwargs": {"activation_fn": th.nn.ReLU}}),
    "r2vpo_elu": (R2VPO, lambda: ("MlpPolicy", "Pendulum-v1"), {"policy_kwargs": {"activation_fn": th.nn.ELU}}),
    "r2vpo_recompute": (
        R2VPO,
        lambda: ("MlpPolicy", random_env(BOX, ACTIONS)),
        {"critic_kwargs": {"recompute_advantages": True}},
    ),
    "r2vpo_off_stale": (
        R2VPOOff,
        lambda: ("MlpPolicy", random_env(BOX, ACTIONS)),
        {"critic_kwargs": {"recompute_advantages": False}},
    ),
    "r2vpo_dm_control": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), DM_CONTROL),
    "r2vpo_off_dm_control": (R2VPOOff, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {**DM_CONTROL, "replay_capacity": 2}),
    "r2vpo_critic_discrete": (
        R2VPO,
        lambda: ("MlpPolicy", random_env(BOX, spaces.Discrete(3))),
        {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 4}, "target_kl": 0.01},
    ),
    "r2vpo_noise": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {"noise_exponent": 0.5}),
    "r2vpo_censored": (R2VPO, lambda: (CensoredMlpPolicy, random_env(BOX, ACTIONS)), {"ent_coef": 0.01}),
    "r2vpo_layer_norm": (
        R2VPO,
        lambda: (LayerNormMlpPolicy, random_env(BOX, ACTIONS), {"policy_kwargs": {"net_arch": [32]}}),
        {"critic_kwargs": {"n_rollouts": 2, "n_epochs": 4, "std_scaled_learning_rate": True}},
    ),
    "r2vpo_compiled": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {"compile": True}),
    "r2vpo_dm_control_compiled": (R2VPO, lambda: ("MlpPolicy", random_env(BOX, ACTIONS)), {**DM_CONTROL, "compile": True}),
    "r2vpo_off_compiled_discrete": (R2VPOOff, lambda: ("MlpPolicy", "CartPole-v1"), {"compile": True}),
    "llm": (R2VPO, language_model, SEQUENCES),
    "llm_off": (
        R2VPOOff,
        lambda: language_model(reference_kl=True),
        {
            **SEQUENCES,
            "objective": "r2vpo_sequence",
            "var_coef": 0.1,
            "ent_coef": 0.01,
            "critic_kwargs": {"recompute_advantages": False},
        },
    ),
    "llm_value_head": (
        R2VPO,
        lambda: language_model(value_head=True),
        {**SEQUENCES, "rollout_buffer_kwargs": {"advantage": "gae", "loss_normalization": "sequence"}},
    ),
}


def fingerprint(name: str, old: bool) -> str:
    algorithm, make, own = CASES[name]
    policy, env, *more = make()
    if isinstance(env, str):
        env = gym.make(env)
    arguments = {**SMALL, **own, **(more[0] if more else {})}
    n_timesteps = arguments.pop("n_timesteps", None)
    if "dm_control" in name:
        env = VecNormalize(env, gamma=0.99)
    model = algorithm(policy, env, **(old_arguments(algorithm, arguments) if old else arguments))
    model.learn(n_timesteps or 4 * model.n_steps * model.n_envs)
    digest = hashlib.sha256()
    for key, tensor in model.policy.state_dict().items():
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--old", action="store_true", help="for commit e70198e")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    for name in args.cases:
        rows.append((name, fingerprint(name, args.old)))
        print(*rows[-1], flush=True)
    with args.output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("case", "sha256"), *rows])


if __name__ == "__main__":
    main()
