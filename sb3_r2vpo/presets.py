"""
Settings that were tuned, as arguments: what ``hyperparams/`` has for the command line.

    model = R2VPO("MlpPolicy", env, **presets.dm_control())

Environments are not part of them: each function says how many it was tuned with, and how these were normalised.
"""

from typing import Any

from stable_baselines3.common.utils import LinearSchedule
from torch import nn


def _to_zero(start: float) -> LinearSchedule:
    """``lin_<start>`` of the settings files."""
    return LinearSchedule(start, end=0.0, end_fraction=1.0)


def dm_control() -> dict[str, Any]:
    """
    Robots with up to some dozen joints, trained for a million steps: ``hyperparams/r2vpo.yml``, all tasks of DM Control but
    the humanoid's and the dog's.

    For 32 environments with staggered episodes (``EnvPoolVecEnv(..., n_envs=32, stagger=True)``) in
    ``VecNormalize(env, gamma=0.99)``, which normalises observations and rewards. Over ten tasks and five seeds, the
    interquartile mean of the score is 0.608 (95% interval 0.558 to 0.650), and that of SB3's PPO, tuned for the same budget,
    0.402 (0.347 to 0.455), see ``benchmarks/control/README.md``.

    :return: Arguments of :class:`~sb3_r2vpo.r2vpo.R2VPO`, a new dictionary at each call
    """
    return {
        "policy_kwargs": {"net_arch": [128, 128]},
        "n_steps": 128,
        "batch_size": 512,
        "n_epochs": 10,
        "learning_rate": _to_zero(1e-3),
        "gamma": 0.99,
        "gae_lambda": 0.7,
        "critic_kwargs": {"n_rollouts": 2, "n_epochs": 15, "gae_lambda": 0.99, "std_scaled_learning_rate": True},
        "ent_coef": _to_zero(0.01),
        "noise_exponent": "auto",
        "var_coef": "auto",
        "objective_kwargs": {"min_var_coef": 0.3},
    }


def dm_control_off() -> dict[str, Any]:
    """
    :func:`dm_control` with each rollout a second time: ``hyperparams/r2vpo_off.yml``.

    For the same environments. Over the same tasks and as many seeds, the interquartile mean of the score is 0.622 (0.589 to
    0.652), see ``benchmarks/control/README.md``.

    :return: Arguments of :class:`~sb3_r2vpo.r2vpo_off.R2VPOOff`, a new dictionary at each call
    """
    critic_kwargs = {"n_rollouts": 2, "gae_lambda": 0.99, "std_scaled_learning_rate": True}
    return {**dm_control(), "replay_capacity": 2, "utd_ratio": 1, "critic_kwargs": critic_kwargs}


def paper() -> dict[str, Any]:
    """
    The paper's settings for control (its Table 3), with a fixed multiplier: ``hyperparams/r2vpo_paper.yml``, which says what
    of them is MuJoCo Playground's, as the paper does not state it.

    For 2048 environments whose rewards are multiplied by 10 (:class:`~sb3_r2vpo.zoo.wrappers.VecRewardScale`), in
    ``VecNormalize(env, norm_reward=False, gamma=0.995)``, and 60 million steps. The paper's results are of another simulator;
    there is no run of this length in ``benchmarks/`` yet.

    :return: Arguments of :class:`~sb3_r2vpo.r2vpo.R2VPO`, a new dictionary at each call
    """
    layers = [256] * 5
    return {
        "policy_kwargs": {"net_arch": {"pi": layers, "vf": [*layers]}, "activation_fn": nn.SiLU},
        "n_steps": 480,
        "batch_size": 30720,
        "n_epochs": 16,
        "learning_rate": 1e-3,
        "gamma": 0.995,
        "gae_lambda": 0.95,
        "var_coef": 0.06,
        "objective_kwargs": {"compensate_entropy": False},
        "ent_coef": 0.01,
        "vf_coef": 0.25,
        "max_grad_norm": 2.0,
    }


def language_model() -> dict[str, Any]:
    """
    Language models with rewards for whole responses, with replay: the best arm of ``benchmarks/llm``, R2VPO on whole responses
    with a fixed multiplier.

    For 32 prompts with 8 responses each (:class:`~sb3_r2vpo.llm.token_vec_env.TokenVecEnv`). After 12,800 responses it was at
    an accuracy of 0.930 (95% interval 0.924 to 0.935), and GRPO on-policy at 0.838 (0.835 to 0.842), see
    ``benchmarks/llm/README.md``. The model there has 0.08 million parameters: for a large one, pass a ``learning_rate`` of
    your own, which has to be far lower.

    :return: Arguments of :class:`~sb3_r2vpo.r2vpo_off.R2VPOOff`, a new dictionary at each call. Without ``replay_capacity``
        and ``utd_ratio`` they are those of :class:`~sb3_r2vpo.r2vpo.R2VPO`, for which they were not tuned.
    """
    return {
        "objective": "r2vpo_sequence",
        "var_coef": 0.1,
        "replay_capacity": 4,
        "utd_ratio": 4.0,
        "n_steps": 1,
        "n_epochs": 1,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "normalize_advantage": False,
        "max_grad_norm": 1.0,
        "rollout_buffer_kwargs": {"filter_uniform_groups": True, "loss_normalization": "sequence"},
    }
