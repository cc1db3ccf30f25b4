"""Checks of arguments."""

import warnings

import numpy as np


def check_whole_number(name: str, value: object) -> None:
    """
    :param name: Name of an argument
    :param value: Its value
    :raises ValueError: It is not a whole number of at least 1.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number, at least 1.")


def check_batch_size(batch_size: int, n_steps: int, n_envs: int, normalize_advantage: bool) -> None:
    """
    Refuse what would make normalised advantages NaN, warn of truncated minibatches; as SB3's PPO does.

    :param batch_size: Steps in a minibatch
    :param n_steps: Steps of each environment in a rollout
    :param n_envs: Number of environments
    :param normalize_advantage: Whether advantages are normalised
    :raises AssertionError: A minibatch has one step, and advantages are normalised.
    """
    buffer_size = n_envs * n_steps
    if normalize_advantage:
        assert batch_size > 1, (
            "`batch_size` must be greater than 1 to normalize advantages. "
            "See https://github.com/DLR-RM/stable-baselines3/issues/440"
        )
        assert buffer_size > 1, (
            "`n_steps * n_envs` must be greater than 1 to normalize advantages. "
            f"Currently n_steps={n_steps} and n_envs={n_envs}"
        )
    truncated = buffer_size % batch_size
    if truncated > 0:
        warnings.warn(
            f"With n_steps={n_steps} and n_envs={n_envs}, a rollout has {buffer_size} steps, so that after every "
            f"{buffer_size // batch_size} minibatches of size {batch_size}, "
            f"there will be a truncated mini-batch of size {truncated}. "
            "We recommend using a `batch_size` that is a factor of `n_steps * n_envs`."
        )
