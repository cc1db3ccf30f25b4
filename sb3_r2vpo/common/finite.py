"""NaN, infinity and what 32 bits can't hold, refused before they can act: from environments, in actions, rollouts, weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

if TYPE_CHECKING:
    from sb3_r2vpo.common.collection import RolloutCollection

#: Rollouts and networks have 32-bit numbers: what is beyond them becomes infinite there, and so may VecNormalize's variance
_LARGEST = float(np.finfo(np.float32).max)

#: What an update learns from; squares of all but log-probabilities are part of it
#: Actions as well: SB3 clips them to the bounds before they are sent, infinite ones to finite ones
ROLLOUT_FIELDS = ("actions", "rewards", "values", "log_probs", "advantages", "returns")

_UNTOUCHED = "weights, multiplier, replay and normalization statistics are as before"
_OVERFLOW = (
    "Observations and weights are finite: a network overflows. Observations far from one do this, which `VecNormalize` of "
    "`stable_baselines3.common.vec_env` scales, and so does a `learning_rate` that is too large: go on from an earlier "
    "checkpoint."
)
#: Of PyTorch's messages, as it draws from a categorical and from a Bernoulli distribution
_IMPOSSIBLE_PROBABILITIES = ("probability tensor contains", "Expected p_in >= 0", "Expected parameter logits")


def _is_suspicious(value: Any) -> bool:
    """
    :param value: What may be an array
    :return: Whether to look for NaN, infinity and numbers beyond 32 bits in it: an array may hold some, or is no array. As it
        runs at each step of the environments, it takes a third of the time of ``np.isfinite(value).all()``.
    """
    if type(value) is not np.ndarray:
        return True
    if value.dtype.kind != "f":
        return False
    # A handful of numbers is added up faster by Python, as Python's own
    if value.size <= 16:
        return not sum(map(abs, value.ravel().tolist())) <= _LARGEST
    return not float(np.vdot(value, value)) <= _LARGEST**2


def _find(value: Any, name: str) -> tuple[str, tuple[int, ...], float] | None:
    """
    :param value: An array, or several in a dict or a tuple
    :param name: Of the value
    :return: Of the first number that is NaN, infinite or too large: the name of its array, its index, and the number
    """
    if not _is_suspicious(value) or value is None:
        return None
    if isinstance(value, dict | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return next((found for key, part in parts if (found := _find(part, f"{name}[{key!r}]")) is not None), None)
    array = np.asarray(value)
    # NaN compares as false
    if array.dtype.kind != "f" or (within := np.abs(array) <= _LARGEST).all():
        return None
    index = tuple(np.argwhere(~within)[0].tolist())
    return name, index, float(array[index])


class CheckedEnv:
    """
    Stands for environments while a rollout is collected, and refuses NaN and infinity on the way in and out. In all else, also
    for ``isinstance``, it is the environments that it stands for.

    :param env: The environments
    :param model: The algorithm, which knows the step
    """

    def __init__(self, env: VecEnv, model: "RolloutCollection") -> None:
        vars(self).update(_env=env, _model=model)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._env)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._env, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # SB3 leaves the variables of its loop in callbacks, which may be copied
        return CheckedEnv, (self._env, self._model)

    def reset(self) -> Any:
        return self.first(self._env.reset())

    def first(self, obs: Any) -> Any:
        """:return: The observations of a reset, which have been checked"""
        if (found := _find(obs, "observation")) is not None:
            self._refuse(found, "after a reset")
        return obs

    def step(self, actions: np.ndarray) -> Any:
        if _is_suspicious(actions) and (found := _find(actions, "action")) is not None:
            raise ValueError(
                f"The policy's {_described(found)}, {_at_step(self._model)}. It was not sent to the environment; "
                f"{_UNTOUCHED}. {_OVERFLOW}"
            )
        return self._checked(self._env.step(actions))

    def step_wait(self) -> Any:
        return self._checked(self._env.step_wait())

    def _checked(self, results: Any) -> Any:
        obs, rewards, dones, infos = results
        found = None
        if _is_suspicious(rewards) or _is_suspicious(obs):
            found = _find(rewards, "reward") or _find(obs, "observation")
        for env, info in enumerate(infos):
            if "terminal_observation" in info and found is None:
                at_end = _find(info["terminal_observation"], "terminal observation")
                found = at_end and (at_end[0], (env, *at_end[1]), at_end[2])
        if found is not None:
            starts = found[0].startswith("observation") and dones[found[1][0]]
            self._refuse(found, f"{_at_step(self._model)}{', as the first one of an episode' * bool(starts)}")
        return results

    def _refuse(self, found: tuple[str, tuple[int, ...], float], when: str) -> None:
        # What the environments are at now, nobody has seen: the next `learn` begins with a reset
        self._model._last_obs = None
        raise ValueError(
            f"The environment's {_described(found)}, {when}. It was refused before anything used it; {_UNTOUCHED}. Correct "
            "the environment, or clean what it returns in a wrapper, such as `gymnasium.wrappers.TransformReward(env, "
            "np.nan_to_num)` or `TransformObservation`. The next `learn` begins with a reset of all environments."
        )


def _described(found: tuple[str, tuple[int, ...], float]) -> str:
    name, (env, *rest), value = found
    too_large = ", more than 32 bits hold" if math.isfinite(value) else ""
    return f"{name}{rest or ''} in environment {env} is {value}{too_large}"


def _at_step(model: "RolloutCollection", step: int | None = None) -> str:
    """The step of the present rollout, or the one that the model is at."""
    buffer = model.rollout_buffer
    at = buffer.pos if step is None else step
    return f"at step {at} of the rollout (num_timesteps={model.num_timesteps - (buffer.pos - at) * buffer.n_envs} before it)"


@contextmanager
def checked(env: VecEnv, model: "RolloutCollection") -> Iterator[CheckedEnv]:
    """
    Check what environments return, also beneath ``VecNormalize``, whose statistics would keep it for good. Afterwards, all is
    as it was: no wrapper is left.

    :param env: The environments
    :param model: The algorithm
    :return: What stands for the environments meanwhile
    :raises ValueError: A policy's probabilities of discrete actions are not finite, so that PyTorch has drawn none.
    """
    normalizers, inner = [], env
    while isinstance(inner, VecEnvWrapper):
        if isinstance(inner, VecNormalize):
            normalizers.append((inner, inner.venv))
        inner = inner.venv
    try:
        for normalizer, venv in normalizers:
            normalizer.venv = CheckedEnv(venv, model)  # type: ignore[assignment]
        yield CheckedEnv(env, model)
    except (RuntimeError, ValueError) as error:
        if not any(text in str(error) for text in _IMPOSSIBLE_PROBABILITIES):
            raise
        obs: Any = model._last_obs
        parts = obs.values() if isinstance(obs, dict) else [obs]
        largest = np.max([np.abs(np.asarray(part, dtype=float)).reshape(len(part), -1).max(1) for part in parts], axis=0)
        raise ValueError(
            f"The policy's probabilities of actions have NaN or infinity, {_at_step(model)}, so that none was drawn; "
            f"{_UNTOUCHED}. {_OVERFLOW} Largest observations, by environment: {largest.tolist()}."
        ) from error
    finally:
        for normalizer, venv in normalizers:
            normalizer.venv = venv


def refuse_nonfinite_weights(policy: th.nn.Module) -> None:
    """
    :param policy: The policy that is about to act
    :raises ValueError: One of its parameters is NaN or infinite.
    """
    parameters = dict(policy.named_parameters())
    norms = th.stack(th._foreach_norm([parameter.detach() for parameter in parameters.values()]))
    if not norms.isfinite().all():
        for name, parameter in parameters.items():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"The policy's parameter `{name}` has NaN or infinity, so no action was taken. Load a checkpoint whose "
                    "weights are finite."
                )


def refuse_nonfinite_rollout(model: "RolloutCollection") -> None:
    """
    Refuse a rollout before anything learns from it: SB3 notices a NaN reward only once the weights are lost (GH issue #1593).

    What is finite but has a square that is not, such as a reward of 1e30, would make infinite losses.

    :param model: The algorithm; its rollout may be in time order or in sampling order
    :raises ValueError: There is NaN, infinity or such a number in it.
    """
    buffer = model.rollout_buffer
    for name in ROLLOUT_FIELDS:
        array = getattr(buffer, name)
        if math.isfinite(np.vdot(array, array)):
            continue
        bad = ~np.isfinite(array)
        problem = "NaN or infinity"
        if not bad.any():
            if name in ("actions", "log_probs"):
                continue
            bad, problem = np.abs(array) >= np.abs(array).max(), "numbers whose squares overflow"
        first = np.argwhere(bad)[0].tolist()
        in_time_order = array.shape[:2] == (buffer.buffer_size, buffer.n_envs)
        step, env = first[:2] if in_time_order else divmod(first[0], buffer.buffer_size)[::-1]
        raise ValueError(
            f"The rollout's {name} have {problem}: {array[tuple(first)]} in environment {env}, {_at_step(model, step)}. No "
            f"update was made, and the rollout was not stored; {_UNTOUCHED}. If rewards or observations there are as they "
            "should be, scale them, for instance with `VecNormalize` of `stable_baselines3.common.vec_env`."
        )


class NonFiniteGradient(ValueError):
    """A gradient was NaN or infinite, and the step was not made."""


def finite_minibatches(norms: th.Tensor, names: Sequence[str], droppable_share: float = 0.0) -> list[bool] | None:
    """
    Look for minibatches whose gradient was not finite: :class:`~sb3_r2vpo.core.optim.Descent` has left weights, optimizer
    and multiplier alone on each of them.

    :param norms: Norms of the gradients, shape ``(n_minibatches, n_parameters)``
    :param names: Of the parameters
    :param droppable_share: The largest share of the minibatches that may be left out, below one; 0 (default) is none
    :return: Whether each minibatch counts; ``None``, the common case, if all do
    :raises NonFiniteGradient: More minibatches have to be left out than may be.
    """
    is_finite = norms.isfinite()
    if is_finite.all():
        return None
    counts = is_finite.all(dim=-1).tolist()
    n_dropped = len(counts) - sum(counts)
    if n_dropped > droppable_share * len(counts):
        first = counts.index(False)
        wrong = [name for name, finite in zip(names, is_finite[first].tolist(), strict=True) if not finite]
        others = f" and {len(wrong) - 1} other parameters" * (len(wrong) > 1)
        more = f", and in {n_dropped - 1} other minibatches" * (n_dropped > 1)
        raise NonFiniteGradient(
            f"The gradient is non-finite (NaN or infinite) in minibatch {first + 1} of {len(counts)}, for `{wrong[0]}`{others}"
            f"{more}. No step was made on it, nor one of the multiplier: the weights are "
            "finite. Extreme rewards or observations do this: wrap the environment in "
            "`stable_baselines3.common.vec_env.VecNormalize`. To leave out such minibatches and go on, pass "
            "`callback=DropNonFiniteMinibatches()` to `learn`."
        )
    return counts
