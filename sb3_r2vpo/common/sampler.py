"""Minibatches of steps, cut from tensors that are made once an update and shuffled once an epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th

#: Most memory that the shuffled copy of a rollout takes at a time: large copies are fast, but one of a whole rollout of images
#: would double its memory.
SHUFFLED_BYTES = 4 * 2**20


def map_field(function: Callable[..., Any], *fields: Any) -> Any:
    """Apply a function to a field of one or several samples: to arrays or tensors, or to those within dicts and tuples."""
    first = fields[0]
    if isinstance(first, dict):
        return {key: map_field(function, *(field[key] for field in fields)) for key in first}
    if isinstance(first, tuple):
        parts = (map_field(function, *parts) for parts in zip(*fields, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return function(*fields)


def _split_field(field: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(field, dict):
        parts = zip(*(tensor.split(batch_size) for tensor in field.values()), strict=True)
        return (dict(zip(field, part, strict=True)) for part in parts)
    return field.split(batch_size)


def split(samples: Any, batch_size: int) -> Iterator[Any]:
    """
    :param samples: A named tuple of tensors, any number of steps
    :param batch_size: Steps in a batch; the last one may be smaller
    :return: Consecutive batches; their tensors are views
    """
    batches = [_split_field(field, batch_size) for field in samples]
    yield from map(type(samples), *batches)


def bytes_a_step(samples: Any) -> int:
    """
    :param samples: A named tuple of tensors
    :return: Memory that one step takes in them
    """
    sizes: list[int] = []
    for field in samples:
        map_field(lambda tensor: sizes.append(tensor[:1].numel() * tensor.element_size()), field)
    return max(1, sum(sizes))


def shuffled_minibatches(rollouts: Sequence[Any], batch_size: int) -> Iterator[Any]:
    """
    One pass over all steps of all rollouts in random order, without replacement.

    The shuffled steps are copied one rollout's worth at a time, or ``SHUFFLED_BYTES`` where that is less, and the minibatches
    cut from that: few large copies instead of many small ones, and never a copy of the whole replay.

    :param rollouts: Their steps as named tuples of tensors, of any lengths
    :param batch_size: Steps in a minibatch; the last one may be smaller
    :return: Minibatches, each uniform over all rollouts; those of one rollout are the minibatches of ``RolloutBuffer.get``,
        drawn by the same call to NumPy's global generator
    """
    lengths = [len(rollout.old_log_prob) for rollout in rollouts]
    order = np.random.permutation(sum(lengths))
    # At least one minibatch, should a rollout have nothing to train on
    n_minibatches = max(1, min(-(-lengths[-1] // batch_size), SHUFFLED_BYTES // (batch_size * bytes_a_step(rollouts[-1]))))
    chunk_size = batch_size * n_minibatches
    for start in range(0, len(order), chunk_size):
        yield from split(_gather(rollouts, lengths, order[start : start + chunk_size]), batch_size)


def _gather(rollouts: Sequence[Any], lengths: list[int], indices: np.ndarray) -> Any:
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
