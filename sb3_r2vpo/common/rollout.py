"""A finished rollout, whose advantages can be computed anew, and the replay of the last few (R2VPO-OFF)."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_r2vpo.common.checks import check_whole_number
from sb3_r2vpo.common.sampler import bytes_a_step, map_field, shuffled_minibatches, split
from sb3_r2vpo.core.batch import Minibatch

Observation = np.ndarray | dict[str, np.ndarray]

#: Steps in one forward pass without gradient, as many as are fast; fewer where they would take more than `EVALUATION_BYTES`
EVALUATION_STEPS, EVALUATION_BYTES = 2048, 2 * 2**20

#: The `get`s that hand out every step once, in an order drawn by `np.random.permutation`, as :func:`passes` does. A variant
#: whose buffers have another one of that kind adds it.
SHUFFLED_STEPS: set[Callable[..., Any]] = {RolloutBuffer.get, DictRolloutBuffer.get}

#: What a rollout buffer keeps in time order, (n_steps, n_envs), for GAE
TIME_MAJOR = ("rewards", "episode_starts")


class PaddedSamples:
    """A rollout buffer whose samples are padded, as its sequences have different lengths."""

    def minibatch(self, samples: Any) -> Minibatch:
        """
        :param samples: Some of the buffer's
        :return: The same with their mask
        """
        raise NotImplementedError


def draws_its_own_minibatches(buffer: RolloutBuffer) -> bool:
    """:return: Whether a buffer's class has a ``get`` that :func:`passes` can't stand in for"""
    return type(buffer).get not in SHUFFLED_STEPS and not isinstance(buffer, PaddedSamples)


class Timeouts:
    """
    The steps of a rollout at which an episode was cut off by a time limit.

    SB3 adds ``gamma * V(terminal observation)`` to the reward of such a step as it collects (GH issue #633). With the
    observation at hand, that part can be brought up to date as the critic learns.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.envs: list[int] = []
        self.observations: list[Observation] = []
        #: What the rewards contain of the critic: the values of the observations, times this discount factor
        self.values = np.zeros(0, dtype=np.float32)
        self.gamma = 0.0

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, env: int, observation: Observation) -> None:
        """
        :param step: Step of the rollout, from 0
        :param env: Index of the environment
        :param observation: The terminal observation
        """
        self.steps.append(step)
        self.envs.append(env)
        self.observations.append(observation)

    def predict(self, predict_values: Callable[[Observation], th.Tensor]) -> np.ndarray:
        """
        :param predict_values: From a batch of observations to their values
        :return: The values of the terminal observations, of as many at a time as a rollout's
        """
        if len(self) == 0:
            return np.zeros(0, dtype=np.float32)
        chunk_steps, values = _chunk_steps(_n_bytes(self.observations[0])), []
        for start in range(0, len(self), chunk_steps):
            batch = map_field(lambda *arrays: np.stack(arrays), *self.observations[start : start + chunk_steps])
            values.append(predict_values(batch).flatten().cpu().numpy())
        return np.concatenate(values)


def _n_bytes(observation: Observation) -> int:
    return sum(np.asarray(part).nbytes for part in (observation.values() if isinstance(observation, dict) else [observation]))


def _chunk_steps(n_bytes: int) -> int:
    """How many steps of so many bytes one forward pass takes."""
    return max(1, min(EVALUATION_STEPS, EVALUATION_BYTES // max(1, n_bytes)))


def flatten(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    Put the arrays of a full buffer into sampling order, ``(n_envs * n_steps, ...)``, as ``RolloutBuffer.get`` does: in place,
    so that there is no second copy of the rollout.

    All that the buffer has for each step takes part, also what a subclass has added, such as action masks.

    :param buffer: A full buffer
    :return: A shallow copy, to which the arrays belong: the buffer's next ``reset`` allocates new ones
    """
    if not buffer.generator_ready:
        # Names, not arrays: each old array has to be gone before the next one is copied
        for name in _per_step_fields(buffer):
            field = vars(buffer).pop(name)
            for key in [*field] if isinstance(field, dict) else ():
                field[key] = RolloutBuffer.swap_and_flatten(field[key])
            setattr(buffer, name, field if isinstance(field, dict) else RolloutBuffer.swap_and_flatten(field))
        buffer.generator_ready = True
    return copy(buffer)


def _per_step_fields(buffer: RolloutBuffer) -> list[str]:
    """Names of the arrays, and of the dicts of arrays, that a buffer is to hand out by steps."""
    shape = (buffer.buffer_size, buffer.n_envs)
    names = []
    for name in vars(buffer).keys() - {*getattr(buffer, "time_major", TIME_MAJOR)}:
        field = getattr(buffer, name)
        arrays = [*field.values()] if isinstance(field, dict) else [field]
        if arrays and all(isinstance(array, np.ndarray) and array.shape[:2] == shape for array in arrays):
            names.append(name)
    return names


class Rollout:
    """
    A finished rollout, ready to be sampled from at any later time.

    Observations, actions and behaviour log-probabilities never change; values, advantages and returns may be brought up to
    date by :meth:`renew`.

    :param rollout_buffer: A full buffer, whose arrays are put into sampling order
    :param last_obs: Observations after the last step, one for each environment
    :param last_dones: Whether the last step ended an episode, for each environment
    :param timeouts: Where episodes were cut off, with the critic's values at collection
    :param fixed: Whether advantages and returns stay as they are, as a callback has set them
    """

    def __init__(
        self,
        rollout_buffer: RolloutBuffer,
        last_obs: Observation,
        last_dones: np.ndarray,
        timeouts: Timeouts,
        fixed: bool = False,
    ) -> None:
        self.buffer = flatten(rollout_buffer)
        self.last_obs, self.last_dones = last_obs, last_dones
        self.timeouts = timeouts
        self.fixed = fixed
        self._samples: Any = None

    def __len__(self) -> int:
        return self.buffer.buffer_size * self.buffer.n_envs

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_samples": None}

    @property
    def samples(self) -> Any:
        """All steps in sampling order, as the buffer's named tuple of tensors; on the CPU they share its arrays' memory"""
        if self._samples is None:
            flat = copy(self.buffer)
            # Without a copy; and not a method of `flat`, which would then live until the garbage collector comes
            flat.to_torch = partial(th.as_tensor, device=flat.device)  # type: ignore[method-assign]
            self._samples = flat._get_samples(slice(None))  # type: ignore[arg-type]
        return self._samples

    @property
    def n_training_samples(self) -> int:
        """Number of steps to train on"""
        selected = getattr(self.buffer, "selected_indices", None)
        return len(self) if selected is None else len(selected)

    @property
    def training_samples(self) -> Any:
        """The steps to train on: all, unless the buffer selects some, as that of responses does"""
        selected = getattr(self.buffer, "selected_indices", None)
        if selected is None:
            return self.samples
        return type(self.samples)(*(map_field(lambda tensor: tensor[selected], field) for field in self.samples))

    def batches(self) -> Iterator[Any]:
        """:return: The whole rollout in sampling order, in parts of a size for passes without gradient"""
        return split(self.samples, _chunk_steps(bytes_a_step(self.samples)))

    def continues_in(self, following: "Rollout") -> bool:
        """
        :param following: Another rollout
        :return: Whether it begins where this one ends, in every environment: not after a reset by a new call to ``learn``
        """
        if not np.array_equal(self.last_dones, following.buffer.episode_starts[0]):
            return False
        first_obs = map_field(lambda array: array[:: following.buffer.buffer_size], following.buffer.observations)
        ends, begins = (obs if isinstance(obs, dict) else {"": obs} for obs in (self.last_obs, first_obs))
        return all(
            ends[key].size == begins[key].size and np.array_equal(ends[key].reshape(begins[key].shape), begins[key])
            for key in ends
        )

    @th.no_grad()
    def renew(
        self,
        predict_values: Callable[[Any], th.Tensor],
        gamma: float,
        gae_lambda: float,
        following: "Rollout | None" = None,
        values: th.Tensor | None = None,
    ) -> None:
        """
        Bring values, advantages and returns up to date with the current critic.

        GAE does not break off at the end of a rollout whose continuation is stored as well: short rollouts get the advantages
        of long ones.

        :param predict_values: From a batch of observations to their values, with the current critic
        :param gamma: Discount factor
        :param gae_lambda: GAE's lambda
        :param following: The rollout that was collected next, its advantages up to date already
        :param values: The values of all steps, in any shape, if they are at hand
        """
        if self.fixed:
            return
        if values is None:
            values = th.cat([predict_values(batch.observations).flatten() for batch in self.batches()])
        buffer, timeouts = self.buffer, self.timeouts
        timeout_values = timeouts.predict(predict_values)
        # The second term is zero unless the discount factor has changed
        change = gamma * (timeout_values - timeouts.values) + (gamma - timeouts.gamma) * timeouts.values
        buffer.rewards[timeouts.steps, timeouts.envs] += change
        timeouts.values, timeouts.gamma = timeout_values, gamma
        # GAE runs along time, over (n_steps, n_envs)
        buffer.values = values.cpu().numpy().reshape(buffer.n_envs, buffer.buffer_size).T
        buffer.advantages = np.empty_like(buffer.rewards)
        buffer.gamma, buffer.gae_lambda = gamma, gae_lambda
        last_values = predict_values(self.last_obs)
        if following is not None and self.continues_in(following):
            # GAE goes on: to bootstrap with V + lambda * A adds gamma * lambda * A, of the next step, to the last TD error
            first_advantages = th.as_tensor(following.buffer.advantages[:: following.buffer.buffer_size]).flatten()
            last_values = last_values.flatten().cpu() + gae_lambda * first_advantages
        buffer.compute_returns_and_advantage(last_values=last_values, dones=self.last_dones)
        for name in ("values", "advantages", "returns"):
            setattr(buffer, name, RolloutBuffer.swap_and_flatten(getattr(buffer, name)))
        self._samples = None


class RolloutReplayBuffer:
    """
    The last ``capacity`` rollouts, first in, first out, sampled uniformly (R2VPO-OFF, section 4.3 of the paper).

    :param capacity: Number of rollouts to keep. With 1 there is only the current one: on-policy training.
    :param rollouts: What it begins with, the oldest first; the newest of them stay
    :raises ValueError: ``capacity`` is not a whole number of at least 1.
    """

    def __init__(self, capacity: int, rollouts: Iterable[Rollout] = ()) -> None:
        self.rollouts: deque[Rollout] = deque(rollouts, maxlen=check_whole_number("replay_capacity", capacity))

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def capacity(self) -> int:
        """Number of rollouts that are kept at most"""
        assert self.rollouts.maxlen is not None
        return self.rollouts.maxlen

    def make_room(self) -> None:
        """Let go of the rollout that the next one takes the place of, before that one is collected."""
        if len(self) == self.capacity:
            self.rollouts.popleft()

    def add(self, rollout: Rollout) -> None:
        """
        Add the newest rollout; the oldest one goes if there is no room.

        :param rollout: A finished rollout
        """
        self.rollouts.append(rollout)

    def newest(self, n_rollouts: int) -> list[Rollout]:
        """
        :param n_rollouts: Number of rollouts
        :return: So many of the rollouts, or all if there are fewer, the oldest of them first
        """
        return list(self.rollouts)[-n_rollouts:]


def passes(rollouts: list[Rollout], batch_size: int, n_passes: int) -> Iterator[Iterator[Any]]:
    """
    Minibatches of rollouts in random order: no step a second time before all have been drawn.

    :param rollouts: The rollouts to draw from, the oldest of them first
    :param batch_size: Steps in a minibatch; the last one of all steps may be smaller
    :param n_passes: Number of passes, each of as many minibatches as the newest rollout has
    :return: For each pass its minibatches, uniform over the rollouts; to be drawn before those of the next
    """
    lengths = [rollout.n_training_samples for rollout in rollouts]
    # A rollout of responses may leave nothing to train on
    per_pass = math.ceil((lengths[-1] or max(lengths)) / batch_size)
    shuffles = (shuffled_minibatches([rollout.training_samples for rollout in rollouts], batch_size) for _ in repeat(None))
    minibatches = chain.from_iterable(shuffles)
    return (islice(minibatches, per_pass) for _ in range(n_passes))
