"""From logits to the distribution that tokens are sampled from; pure functions."""

import math
from dataclasses import dataclass

import torch as th


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are sampled. The defaults are the paper's for training: the model's own distribution.

    :param temperature: The logits are divided by it; 0 takes the most probable token, of several the one with the lowest id.
    :param top_k: Sample from the ``top_k`` most probable tokens only; ``None`` for all.
    :param top_p: Sample from the smallest set of most probable tokens whose probability reaches ``top_p`` only; 1 for all.
    :raises ValueError: A number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"`temperature` is {self.temperature}; it must be finite and not negative.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k}; it must be at least 1, or None.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it must be in (0, 1].")


def truncate_logits(logits: th.Tensor, sampling: Sampling, keep: th.Tensor | None = None) -> th.Tensor:
    """
    Apply temperature, then top-k, then top-p: the usual order.

    :param logits: Shape ``(..., vocab_size)``.
    :param sampling: How tokens are sampled.
    :param keep: Tokens, shape ``(...)``, that are never removed. Stored tokens have to be kept when they are evaluated with a
        newer policy: outside its top-k, their log-probability would be ``-inf``, and the update NaN.
    :return: Float32 logits, same shape; those of removed tokens are ``-inf``.
    """
    # The softmax of 50 000 logits in half precision loses the digits that a ratio close to one needs
    logits = logits.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.temperature > 0 and sampling.top_k is None and sampling.top_p == 1:
        return logits
    removed = th.zeros_like(logits, dtype=th.bool)
    # By index, not by value: ties are common in bfloat16, and of equal logits only so many are to stay
    if sampling.temperature == 0:
        removed = ~removed.scatter(-1, logits.argmax(-1, keepdim=True), True)
    elif sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        removed = ~removed.scatter(-1, logits.topk(sampling.top_k).indices, True)
    if sampling.top_p < 1:
        probabilities, order = logits.masked_fill(removed, -math.inf).softmax(-1).sort(-1, descending=True)
        # A token stays if those before it have not reached top_p; the first one always does
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        removed = removed | th.zeros_like(removed).scatter(-1, order, beyond)
    if keep is not None:
        removed = removed.scatter(-1, keep.unsqueeze(-1), False)
    return logits.masked_fill(removed, -math.inf)


def token_log_prob(logits: th.Tensor, tokens: th.Tensor) -> th.Tensor:
    """
    ``log_softmax(logits)`` at the tokens, without a tensor of all log-probabilities.

    :param logits: Shape ``(..., vocab_size)``.
    :param tokens: Shape ``(...)``.
    :return: Shape ``(...)``.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
