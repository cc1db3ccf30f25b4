"""First-in-first-out replay of whole rollouts, with the log-probabilities under the policies that generated them."""

import math
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice, repeat

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_r2vpo.minibatches import flatten, map_field, rollout_tensors, shuffled_minibatches, split

Observation = np.ndarray | dict[str, np.ndarray]


def drop_padding(values: th.Tensor, rollout_data: RolloutBufferSamples) -> th.Tensor:
    """
    :param values: One for each step of a minibatch, or for each token if it holds sequences
    :param rollout_data: The minibatch
    :return: The values; of sequences, in one dimension those of tokens that are not padding
    """
    mask = getattr(rollout_data, "mask", None)
    return values if mask is None else values[mask]


def check_whole_number(name: str, value: object) -> None:
    """
    :param name: Name of an argument
    :param value: Its value
    :raises ValueError: It is not a whole number of at least 1.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number, at least 1.")


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
        self.values = np.zeros(0, dtype=np.float32)

    def append(self, step: int, env: int, observation: Observation) -> None:
        """
        :param step: Step of the rollout, from 0
        :param env: Index of the environment
        :param observation: The terminal observation
        """
        self.steps.append(step)
        self.envs.append(env)
        self.observations.append(observation)

    def __len__(self) -> int:
        return len(self.steps)

    def stacked_observations(self) -> Observation:
        """:return: The terminal observations as one batch, in the order of ``steps``"""
        if isinstance(self.observations[0], dict):
            return {key: np.stack([obs[key] for obs in self.observations]) for key in self.observations[0]}
        return np.stack(self.observations)  # type: ignore[arg-type]


class StoredRollout:
    """
    A finished rollout, ready to be sampled from at any later time.

    The arrays of the rollout buffer are taken over, not copied: ``RolloutBuffer.reset`` allocates new ones.
    Observations, actions and behaviour log-probabilities are put into sampling order once and never change afterwards;
    values, advantages and returns may be brought up to date by :meth:`update_values`.

    :param rollout_buffer: A full buffer, before any call to its ``get``
    :param last_obs: Observations after the last step, one for each environment
    :param last_dones: Whether the last step ended an episode, for each environment
    :param timeouts: Where episodes were cut off, with the critic's values at collection
    """

    def __init__(
        self, rollout_buffer: RolloutBuffer, last_obs: Observation, last_dones: np.ndarray, timeouts: Timeouts
    ) -> None:
        self.buffer = flatten(rollout_buffer)
        self.last_obs = last_obs
        self.last_dones = last_dones
        self.timeouts = timeouts

    def __len__(self) -> int:
        return self.buffer.buffer_size * self.buffer.n_envs

    def goes_on_in(self, following: "StoredRollout") -> bool:
        """
        :param following: Another rollout
        :return: Whether it begins where this one ends, in every environment: not after a reset by a new call to ``learn``
        """
        first_obs = map_field(lambda array: array[:: following.buffer.buffer_size], following.buffer.observations)
        ends, begins = (obs if isinstance(obs, dict) else {"": obs} for obs in (self.last_obs, first_obs))
        return all(np.array_equal(ends[key].reshape(begins[key].shape), begins[key]) for key in ends)

    def tensors(self) -> RolloutBufferSamples:
        """:return: All steps in sampling order; on the CPU, observations and actions are not copied"""
        return rollout_tensors(self.buffer)

    def training_tensors(self) -> RolloutBufferSamples:
        """:return: The steps to train on: all, unless the rollout buffer selects some, as that of sequences does"""
        samples = self.tensors()
        selected = getattr(self.buffer, "selected_indices", None)
        if selected is None:
            return samples
        return type(samples)(*(map_field(lambda tensor: tensor[selected], field) for field in samples))

    def batches(self, batch_size: int) -> Iterator[RolloutBufferSamples]:
        """
        :param batch_size: Steps in a batch; the last one may be smaller
        :return: The whole rollout in sampling order, unshuffled
        """
        return split(self.tensors(), batch_size)

    def update_values(
        self,
        values: np.ndarray,
        timeout_values: np.ndarray,
        last_values: th.Tensor,
        following: "StoredRollout | None" = None,
    ) -> None:
        """
        Replace the critic's values and recompute advantages and returns from them.

        GAE does not break off at the end of a rollout whose continuation is stored as well: short rollouts get the advantages
        of long ones.

        :param values: Values of the stored observations, in sampling order
        :param timeout_values: Values of the terminal observations of the timeouts
        :param last_values: Values of ``last_obs``
        :param following: The rollout that was collected next, its advantages up to date already
        """
        buffer, timeouts = self.buffer, self.timeouts
        buffer.rewards[timeouts.steps, timeouts.envs] += buffer.gamma * (timeout_values - timeouts.values)
        timeouts.values = timeout_values
        # GAE runs along time, over (n_steps, n_envs)
        buffer.values = values.reshape(buffer.n_envs, buffer.buffer_size).T
        buffer.advantages = np.empty_like(buffer.rewards)
        if following is not None and self.goes_on_in(following):
            # With this for a value, the last step's TD error is the error and all later ones of the sum of GAE
            first_advantages = th.as_tensor(following.buffer.advantages[:: following.buffer.buffer_size]).flatten()
            last_values = last_values.flatten().cpu() + buffer.gae_lambda * first_advantages
        buffer.compute_returns_and_advantage(last_values=last_values, dones=self.last_dones)
        for name in ("values", "advantages", "returns"):
            setattr(buffer, name, RolloutBuffer.swap_and_flatten(getattr(buffer, name)))


class RolloutReplayBuffer:
    """
    The last ``capacity`` rollouts, first in, first out, sampled uniformly (R2VPO-OFF, section 4.3 of the paper).

    :param capacity: Number of rollouts to keep. With 1 there is only the current one: on-policy training.
    :raises ValueError: ``capacity`` is not a whole number of at least 1.
    """

    def __init__(self, capacity: int) -> None:
        check_whole_number("replay_capacity", capacity)
        self.rollouts: deque[StoredRollout] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def capacity(self) -> int:
        """Number of rollouts that are kept at most"""
        assert self.rollouts.maxlen is not None
        return self.rollouts.maxlen

    def add(self, rollout: StoredRollout) -> None:
        """
        Add the newest rollout; the oldest one goes if there is no room.

        :param rollout: A finished rollout
        """
        self.rollouts.append(rollout)

    def newest(self, n_rollouts: int) -> list[StoredRollout]:
        """
        :param n_rollouts: Number of rollouts
        :return: So many of the rollouts, or all if there are fewer, the oldest of them first
        """
        return list(self.rollouts)[-n_rollouts:]

    def passes(
        self, batch_size: int, n_passes: int, n_rollouts: int | None = None
    ) -> Iterator[Iterator[RolloutBufferSamples]]:
        """
        Minibatches of rollouts in random order: no step a second time before all have been drawn.

        :param batch_size: Steps in a minibatch; the last one of all steps may be smaller
        :param n_passes: Number of passes, each of as many minibatches as the newest rollout has
        :param n_rollouts: Number of rollouts to draw from, the newest ones; ``None`` for the whole buffer
        :return: For each pass its minibatches, uniform over the rollouts; to be drawn before those of the next
        """
        # Made once, however many passes there are
        rollouts = [rollout.training_tensors() for rollout in self.newest(n_rollouts or self.capacity)]
        per_pass = math.ceil(len(rollouts[-1].old_log_prob) / batch_size)
        minibatches = chain.from_iterable(shuffled_minibatches(rollouts, batch_size) for _ in repeat(None))
        return (islice(minibatches, per_pass) for _ in range(n_passes))
