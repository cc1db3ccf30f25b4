"""Minibatches of rollouts, cut from tensors that are made once an update and shuffled once an epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples


def map_field(function: Callable[..., Any], *fields: Any) -> Any:
    """Apply a function to a field of one or several samples: to arrays or tensors, or key by key to dicts of them."""
    if isinstance(fields[0], dict):
        return {key: function(*(field[key] for field in fields)) for key in fields[0]}
    return function(*fields)


def flatten(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    :param buffer: A full buffer
    :return: A shallow copy with the arrays that ``RolloutBuffer.get`` draws from in its order, (n_envs * n_steps, ...)
    """
    flat = copy(buffer)
    if not flat.generator_ready:
        for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
            setattr(flat, name, map_field(RolloutBuffer.swap_and_flatten, getattr(flat, name)))
        flat.generator_ready = True
    return flat


def rollout_tensors(buffer: RolloutBuffer) -> RolloutBufferSamples:
    """
    All steps of a rollout as tensors on the buffer's device, in the order of ``RolloutBuffer.get`` before it shuffles.

    :param buffer: A full buffer
    :return: One sample; on the CPU, observations and actions of a flat buffer share its arrays' memory
    """
    flat = flatten(buffer)
    flat.to_torch = partial(flat.to_torch, copy=False)  # type: ignore[method-assign]
    return flat._get_samples(slice(None))  # type: ignore[arg-type]


def _split_field(field: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(field, dict):
        parts = zip(*(tensor.split(batch_size) for tensor in field.values()), strict=True)
        return (dict(zip(field, part, strict=True)) for part in parts)
    return field.split(batch_size)


def split(samples: RolloutBufferSamples, batch_size: int) -> Iterator[RolloutBufferSamples]:
    """
    :param samples: Any number of steps
    :param batch_size: Steps in a batch; the last one may be smaller
    :return: Consecutive batches; their tensors are views
    """
    batches = [_split_field(field, batch_size) for field in samples]
    yield from map(type(samples), *batches)


def shuffled_minibatches(rollouts: Sequence[RolloutBufferSamples], batch_size: int) -> Iterator[RolloutBufferSamples]:
    """
    One pass over all steps of all rollouts in random order, without replacement.

    The shuffled steps are copied one rollout's worth at a time, and the minibatches cut from that: few large copies instead
    of many small ones, and never a copy of the whole replay.

    :param rollouts: Rollouts, of any lengths
    :param batch_size: Steps in a minibatch; the last one may be smaller
    :return: Minibatches, each uniform over all rollouts; those of one rollout are the minibatches of ``RolloutBuffer.get``,
        drawn by the same call to NumPy's global generator
    """
    lengths = [len(rollout.old_log_prob) for rollout in rollouts]
    order = np.random.permutation(sum(lengths))
    # At least one minibatch, should a rollout have nothing to train on
    chunk_size = batch_size * max(1, -(-lengths[-1] // batch_size))
    for start in range(0, len(order), chunk_size):
        yield from split(_gather(rollouts, lengths, order[start : start + chunk_size]), batch_size)


def _gather(rollouts: Sequence[RolloutBufferSamples], lengths: list[int], indices: np.ndarray) -> RolloutBufferSamples:
    """The steps of these indices, which number the steps of all rollouts consecutively."""
    device = rollouts[0].old_log_prob.device
    if len(rollouts) == 1:
        steps = th.as_tensor(indices, device=device)
        return type(rollouts[0])(*(map_field(lambda tensor: tensor.index_select(0, steps), field) for field in rollouts[0]))
    # For each rollout: which of its steps, and where they go
    moves = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        targets = np.flatnonzero((indices >= end - length) & (indices < end))
        moves.append((th.as_tensor(indices[targets] - (end - length), device=device), th.as_tensor(targets, device=device)))

    def gather(*tensors: th.Tensor) -> th.Tensor:
        gathered = tensors[0].new_empty((len(indices), *tensors[0].shape[1:]))
        for tensor, (steps, targets) in zip(tensors, moves, strict=True):
            gathered.index_copy_(0, targets, tensor.index_select(0, steps))
        return gathered

    return type(rollouts[0])(*(map_field(gather, *fields) for fields in zip(*rollouts, strict=True)))
