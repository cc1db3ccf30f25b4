"""All that the next steps of a training depend on, besides what a saved model has."""

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback

from sb3_r2vpo.common.env_state import get_env_state, set_env_state
from sb3_r2vpo.common.random_state import random_state
from sb3_r2vpo.common.replay_file import fitting
from sb3_r2vpo.common.rollout import RolloutReplayBuffer

#: Attributes of a model that a rollout or an update changes, besides its weights
CHANGING = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num", "_current_progress_remaining"),
    *("_n_updates", "_unexplained_variance", "_last_obs", "_last_original_obs", "_last_episode_starts", "_last_lstm_states"),
    *("ep_info_buffer", "ep_success_buffer"),
)
#: Of gSDE: what was drawn just before the rollout's start
NOISE = ("exploration_mat", "exploration_matrices")
#: Counters and results of SB3's callbacks
COUNTED = (
    *("n_calls", "last_mean_reward", "best_mean_reward", "last_best_mean_reward", "no_improvement_evals", "n_episodes"),
    *("last_time_trigger", "evaluations_timesteps", "evaluations_results", "evaluations_length", "evaluations_successes"),
)


def get_training_state(model: Any) -> dict[str, Any]:
    """
    Copy a model's state between two rollouts, or at the start of one. Nothing is changed, and no random numbers are drawn.

    :param model: A model whose training has begun
    :return: All that its next steps depend on, but for what only an update changes: the weights, the optimizer's state, the
        multiplier, and the contents of replayed rollouts
    """
    kept = model.replay_buffer
    return {
        "attributes": {name: _copied(getattr(model, name)) for name in CHANGING if hasattr(model, name)},
        "rollouts": [] if kept is None else list(kept.rollouts),
        "env": get_env_state(model.get_env()),
        "noise": {name: getattr(model.policy.action_dist, name) for name in NOISE} if model.use_sde else None,
        "generators": {
            "random": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": th.get_rng_state(),
            "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],
        },
    }


def set_training_state(model: Any, state: dict[str, Any], reset_env: bool, where: str) -> None:
    """
    :param model: A model that was loaded from the same checkpoint, with its environments
    :param state: From :func:`get_training_state`
    :param reset_env: Whether the environments are to be reset
    :param where: The checkpoint, for messages
    :raises ValueError: The environments are others, or the model does not keep the rollouts that the saved one kept.
    """
    rollouts = fitting(state["rollouts"], model, where)
    if rollouts and model.replay_buffer is None:
        raise ValueError(
            f"The training of {where} kept rollouts for later updates; go on with its `replay_capacity` and `critic_kwargs`."
        )
    # One by one: what else a file may have is not taken
    for name in CHANGING:
        if name in state["attributes"]:
            setattr(model, name, state["attributes"][name])
    if rollouts:
        model.replay_buffer = RolloutReplayBuffer(model.replay_buffer.capacity, rollouts)
    _set_env_state(model, state["env"], reset_env, where)
    if state["noise"] is not None:
        _keep_noise(model, state["noise"])
    generators = state["generators"]
    random.setstate(generators["random"])
    np.random.set_state(random_state(generators["numpy"]).get_state())
    th.set_rng_state(generators["torch"])
    for device, generator in enumerate(generators["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(generator, device)


def _copied(value: Any) -> Any:
    """Environments may write into the arrays of observations again, and lists of statistics grow."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        # In the same order of memory: convolutions of transposed images are rounded differently
        return value.copy(order="K")
    return value.copy() if hasattr(value, "copy") else value


def _set_env_state(model: Any, state: dict[str, Any], reset_env: bool, where: str) -> None:
    env, not_captured = model.get_env(), state["not_captured"]
    if not reset_env:
        set_env_state(env, state)
        if not_captured is None:
            return
        warnings.warn(
            f"{where} does not have the state of the environments: {not_captured} Training goes on from their reset, with all "
            "else as it was.",
            stacklevel=4,
        )
    model._last_obs = None
    # With the seed of the beginning, the first episodes would come once more; and `seed(None)` would draw a number
    entropy = None if model.seed is None else [model.seed, model.num_timesteps]
    env.seed(int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1))


def _keep_noise(model: Any, noise: dict[str, th.Tensor]) -> None:
    """gSDE draws its noise before a rollout's start: for the checkpoint's rollout, it has been drawn already."""

    def keep(n_envs: int = 1) -> None:
        del model.policy.reset_noise
        for name in NOISE:
            setattr(model.policy.action_dist, name, noise[name].to(model.device))

    model.policy.reset_noise = keep


# === What a training has besides its model ===


def get_companions(model: Any, callback: BaseCallback) -> dict[str, Any]:
    """
    :param model: A model within ``learn``
    :param callback: The outermost of its callbacks
    :return: Counters and results of the callbacks, and what was logged for the next line
    """
    found = {}
    for name, part in _named(callback):
        found[name] = {key: vars(part)[key] for key in COUNTED if key in vars(part)}
        found[name] = {key: list(value) if isinstance(value, list) else value for key, value in found[name].items()}
    logger = model.logger
    numbers = {key: value for key, value in logger.name_to_value.items() if isinstance(value, int | float | np.number)}
    counts, excluded = logger.name_to_count, logger.name_to_excluded
    logged = {key: (value, counts.get(key, 0), excluded.get(key)) for key, value in numbers.items()}
    return {"callbacks": found, "logged": logged}


def set_companions(model: Any, callback: BaseCallback, state: dict[str, Any]) -> None:
    """
    :param model: A model within ``learn``
    :param callback: The outermost of its callbacks; those which were not there before are left alone
    :param state: From :func:`get_companions`
    """
    for name, part in _named(callback):
        counted = state["callbacks"].get(name, {})
        vars(part).update({key: counted[key] for key in COUNTED if key in counted and key in vars(part)})
    logger = model.logger
    for key, (value, count, excluded) in state["logged"].items():
        logger.name_to_value[key], logger.name_to_count[key], logger.name_to_excluded[key] = value, count, excluded


def _named(callback: BaseCallback) -> Iterator[tuple[str, BaseCallback]]:
    """All callbacks, with a name that is the same in the next process."""
    count: dict[str, int] = {}
    for part in _all_callbacks(callback):
        kind = type(part).__name__
        count[kind] = count.get(kind, 0) + 1
        yield f"{kind} {count[kind]}", part


def _all_callbacks(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    if callback is None:
        return
    yield callback
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children += callback.callbacks
    elif isinstance(callback, EventCallback):
        children += [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for index, child in enumerate(children):
        if child not in children[:index]:
            yield from _all_callbacks(child)
