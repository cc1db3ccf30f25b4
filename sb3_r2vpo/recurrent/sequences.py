"""Rollouts of a recurrent policy: minibatches of whole sequences, through which an LSTM runs in one call."""

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_r2vpo.common.checks import check_whole_number
from sb3_r2vpo.common.rollout import flatten
from sb3_r2vpo.common.sampler import map_field

#: What a further call of an LSTM costs on a CPU, in steps times hidden units squared: 15 steps of 256 units
PART_COST = 10**6


class SequenceSamples(NamedTuple):
    """
    A minibatch of ``n`` steps, which are those of ``n_seq`` sequences, the longest first: their first steps, their second
    steps, and so on, as an LSTM reads them. Nothing of it is padded: losses count each step once.

    :param lstm_states: Before the first step of each sequence, shape ``(n_layers, n_seq, hidden_size)``; zero where an
        episode begins
    :param parts: ``(n_steps, n_seq)`` of the LSTM's calls, one after the other, each for those sequences that are not over.
        One call for all steps, padded to the longest sequence, unless sequences are of very different lengths.
    :param padded: Which step is where in these calls. Padding repeats some step: it is valid input, whose outputs are not
        looked at. ``None`` where there is no padding.
    :param kept: Where each step is in ``padded``, shape ``(n,)``, or ``None``
    :param action_masks: Which actions are valid, shape ``(n, n_masks)``, or ``None``
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    lstm_states: RNNStates
    parts: list[tuple[int, int]]
    padded: th.Tensor | None
    kept: th.Tensor | None
    action_masks: th.Tensor | None = None


class _Steps(NamedTuple):
    """All steps of a rollout in sampling order; states in their second dimension."""

    fields: tuple[Any, ...]
    states: tuple[th.Tensor, ...]


def _parts(lengths: np.ndarray, cost: float) -> list[tuple[int, int]]:
    """
    :param lengths: Of sequences, the longest first
    :param cost: Of a further call, in padded steps
    :return: ``(n_steps, n_seq)`` of each call: one ends where half of its sequences are over, if that saves enough padding
    """
    parts, start, n_seq = [], 0, len(lengths)
    while True:
        end, n_next = lengths[0], 0
        if n_seq > 1:
            half = lengths[n_seq // 2]
            n_going_on = int((lengths > half).sum())
            if (end - half) * (n_seq - n_going_on) > cost:
                end, n_next = half, n_going_on
        parts.append((int(end - start), n_seq))
        if n_next == 0:
            return parts
        start, n_seq = end, n_next


class SequenceSampling(RolloutBuffer):
    """
    The part of :class:`SequenceRolloutBuffer` that does not depend on the observations; takes the place of its states, which
    stay on the device, and of its ``get``.

    :param args: Of ``RolloutBuffer``: size, spaces
    :param sequence_length: Most steps of a sequence. ``None`` (default): sequences are whole, from the start of an episode or
        of the rollout to its end. Shorter ones are faster, as an LSTM takes the steps of a sequence one after the other, and
        different sequences side by side; but what an earlier part of the episode should have stored is not learned through
        the state at the cut, which is that of collection (truncated backpropagation through time, with the stored states of
        R2D2, https://openreview.net/forum?id=r1lyTjAqYX). A cut is elsewhere in each epoch.
    :param kwargs: Of ``RolloutBuffer``
    """

    #: Whose ``add`` puts observations where they belong
    base: type[RolloutBuffer] = RolloutBuffer

    def __init__(self, *args: Any, sequence_length: int | None = None, **kwargs: Any) -> None:
        if sequence_length is not None:
            check_whole_number("sequence_length", sequence_length)
        self.sequence_length = sequence_length
        # sb3-contrib's arrays of states are left empty
        super().__init__(*args, hidden_state_shape=(0, 0, 0, 0), **kwargs)  # type: ignore[call-arg]

    def reset(self) -> None:
        super().reset()
        self._states: list[RNNStates] = []
        #: Of each step, ``(n_envs, ...)``, where there are any
        self.action_masks: list[np.ndarray] = []
        self._steps: _Steps | None = None

    def add(self, *args: Any, lstm_states: RNNStates, **kwargs: Any) -> None:  # type: ignore[override]
        """
        :param args: Of ``RolloutBuffer.add``
        :param lstm_states: Before this step, shape ``(n_layers, n_envs, hidden_size)``; kept, not copied
        :param kwargs: Of ``RolloutBuffer.add``
        """
        self._states.append(lstm_states)
        self.base.add(self, *args, **kwargs)

    def get(self, batch_size: int | None = None) -> Generator[SequenceSamples, None, None]:  # type: ignore[override]
        """
        One pass over all steps of the rollout, in sequences in random order.

        :param batch_size: Steps in a minibatch: about so many, as sequences stay whole, which are cut to so many steps before;
            ``None`` for all in one
        :return: Minibatches, as many as there would be of single steps
        """
        assert self.full, "Rollout buffer must be full before sampling from it"
        steps = self._all_steps()
        batch_size = batch_size or self.buffer_size * self.n_envs
        starts, lengths = self._sequences(min(batch_size, self.sequence_length or batch_size))
        order = np.random.permutation(len(starts))
        starts, lengths = starts[order], lengths[order]
        # Each sequence is of the minibatch that its middle falls into
        ends, n_batches = lengths.cumsum(), -(-lengths.sum() // batch_size)
        batches = ((ends - lengths / 2) * n_batches / ends[-1]).astype(int)
        for part in np.split(np.arange(len(order)), np.flatnonzero(np.diff(batches)) + 1):
            yield self._minibatch(steps, starts[part], lengths[part])

    def _sequences(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """First steps, in sampling order, and lengths of the parts of episodes, cut to a length."""
        step = np.arange(self.buffer_size)
        offset = np.random.randint(max_length) if max_length < self.buffer_size else 0
        cut = (step == 0) | ((step + offset) % max_length == 0)
        starts = np.flatnonzero((cut[:, None] | (self.episode_starts != 0)).T)
        return starts, np.diff(starts, append=self.buffer_size * self.n_envs)

    def _minibatch(self, steps: _Steps, starts: np.ndarray, lengths: np.ndarray) -> SequenceSamples:
        order = np.argsort(-lengths, kind="stable")
        starts, lengths = starts[order], lengths[order]
        parts = _parts(lengths, PART_COST / steps.states[0].shape[-1] ** 2 if self.device.type == "cpu" else np.inf)
        places, is_step, begin = [], [], 0
        for n_steps, n_seq in parts:
            time = np.arange(begin, begin + n_steps)[:, None]
            places.append((starts[:n_seq] + time).ravel())
            is_step.append((time < lengths[:n_seq]).ravel())
            begin += n_steps
        steps_only = np.concatenate(is_step)
        rows = np.concatenate(places)[steps_only]
        padding = () if steps_only.all() else (steps_only.cumsum() - 1, np.flatnonzero(steps_only))
        index, firsts, *padded_kept = (th.as_tensor(array, device=self.device) for array in (rows, starts, *padding))
        padded, kept = padded_kept or (None, None)
        fields = [map_field(lambda tensor: tensor.index_select(0, index), field) for field in steps.fields]
        hidden_pi, cell_pi, hidden_vf, cell_vf = (state.index_select(1, firsts) for state in steps.states)
        lstm_states = RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf))
        return SequenceSamples(*(*fields[:6], lstm_states, parts, padded, kept, *fields[6:]))

    def _all_steps(self) -> _Steps:
        """The rollout as tensors; made once."""
        if self._steps is None:
            flatten(self)
            # As SB3 does: a Bernoulli distribution fails with MultiBinary's integers
            actions = self.actions.astype(np.float32, copy=False)
            fields = (self.observations, actions, self.values, self.log_probs, self.advantages, self.returns)
            obs_tensor, actions_tensor, *numbers = (
                map_field(lambda array: th.as_tensor(array, device=self.device), field) for field in fields
            )
            # The state before the first step of an episode is the last of the episode before
            goes_on = th.as_tensor(self.episode_starts == 0, device=self.device)[:, None, :, None]
            states = []
            for kind in zip(*((*states.pi, *states.vf) for states in self._states), strict=True):
                by_step = th.stack(kind) * goes_on
                states.append(by_step.permute(1, 2, 0, 3).flatten(1, 2))
            self._states = []
            steps = [obs_tensor, actions_tensor, *(number.flatten() for number in numbers)]
            if self.action_masks:
                masks = np.stack(self.action_masks, 1).reshape(len(actions), -1)
                steps.append(th.as_tensor(masks, device=self.device))
            self._steps = _Steps(tuple(steps), tuple(states))
        return self._steps


class SequenceRolloutBuffer(SequenceSampling, RecurrentRolloutBuffer):  # type: ignore[misc]
    """
    Rollout buffer of :class:`~sb3_r2vpo.recurrent.RecurrentR2VPO`, see :class:`SequenceSampling`.

    ``RecurrentRolloutBuffer`` cuts minibatches at any step and restarts the LSTM within its sequences; its policy then loops
    over the steps in Python (https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/113). Here a sequence
    begins where an episode does, so that nothing is to be reset within it.
    """


class SequenceDictRolloutBuffer(SequenceSampling, RecurrentDictRolloutBuffer):  # type: ignore[misc]
    """:class:`SequenceRolloutBuffer` for dict observations."""

    base = DictRolloutBuffer
