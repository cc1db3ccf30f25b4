"""A minibatch that knows which of its entries count, and how a loss is averaged over them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th


def mean(values: th.Tensor) -> th.Tensor:
    """
    Plain mean over all samples.

    :param values: Any shape.
    :return: A scalar.
    """
    return values.mean()


def token_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Mean over all tokens where ``mask`` is set: a long response weighs more than a short one (DAPO's normalisation).

    Masked entries take no part in the mean, even if they are NaN; their gradient is zero where what they come from is finite.
    With nothing left, the result is zero.

    :param values: Shape ``(n_sequences, n_tokens)``.
    :param mask: Same shape, boolean or 0/1.
    :return: A scalar.
    """
    return th.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Mean over each sequence, then over the sequences that have at least one token: every response weighs the same (GRPO).

    :param values: Shape ``(n_sequences, n_tokens)``.
    :param mask: Same shape, boolean or 0/1.
    :return: A scalar; zero where no sequence has a token.
    """
    lengths = mask.sum(dim=-1)
    means = th.where(mask.bool(), values, 0.0).sum(dim=-1) / lengths.clamp(min=1)
    return means.sum() / (lengths > 0).sum().clamp(min=1)


def constant_length_mean(values: th.Tensor, mask: th.Tensor, max_length: int) -> th.Tensor:
    """
    Sum over each sequence divided by a constant, then the mean over sequences: no bias by length (Dr. GRPO,
    https://arxiv.org/abs/2503.20783).

    :param values: Shape ``(n_sequences, n_tokens)``.
    :param mask: Same shape, boolean or 0/1.
    :param max_length: The constant: the longest response that the sampler may produce, in tokens.
    :return: A scalar.
    """
    return th.where(mask.bool(), values, 0.0).sum(dim=-1).mean() / max_length


@dataclass
class Minibatch:
    """
    What one gradient step learns from.

    :param samples: The rollout buffer's own tuple of tensors: ``observations``, ``actions``, ``old_values``, ``old_log_prob``,
        ``advantages``, ``returns``, and whatever the policy needs besides, such as action masks
    :param mask: Boolean, of the shape of ``old_log_prob``: which entries count. ``None``, where all do: steps of a robot. A
        language model's responses are padded to one length, and have a mask.
    :param average: How masked values are averaged, such as :func:`token_mean`; without a mask it is the plain mean.
    """

    samples: Any
    mask: th.Tensor | None = None
    average: Callable[[th.Tensor, th.Tensor], th.Tensor] = token_mean

    def mean(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: A loss, one value for each entry of ``old_log_prob``
        :return: Its average, a scalar
        """
        return mean(values) if self.mask is None else self.average(values, self.mask)

    def select(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: One for each entry of ``old_log_prob``, or one for each sequence
        :return: Those that count, in one dimension; values of whole sequences, which have no padding, as they are
        """
        return values if self.mask is None or self.mask.shape != values.shape else values[self.mask]

    def normalized_advantages(self) -> th.Tensor:
        """:return: The advantages, less their mean and over their standard deviation, as in SB3's PPO"""
        advantages = self.samples.advantages
        counted = self.select(advantages)
        # Normalization does not make sense if mini batchsize == 1, see SB3's GH issue #325
        if len(counted) <= 1:
            return advantages
        return (advantages - counted.mean()) / (counted.std() + 1e-8)
