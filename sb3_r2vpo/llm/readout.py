"""From a model's last hidden states to what is needed of its logits, in slices over tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

#: Logits of fewer bytes, in float32, are computed at once; else those of one slice have at most ``SLICE_BYTES``, and there are
#: at least ``N_SLICES``: about a slice's logits four times, eight with top-p, is what an update needs memory for.
WHOLE_BYTES, SLICE_BYTES, N_SLICES = 2**24, 2**27, 8


class Features(NamedTuple):
    """
    What a model makes of its inputs.

    :param features: That :meth:`Readout.logits` makes logits of, shape ``(n, n_tokens, ...)``
    :param hidden: Last hidden states, shape ``(n, n_tokens, hidden_size)``; ``None`` if they were not asked for
    :param cache: Of keys and values, if asked for
    """

    features: th.Tensor
    hidden: th.Tensor | None
    cache: Any


class Readout:
    """
    A causal language model as a backbone and a head, so that the logits of a whole response never exist at once.

    Some models do more than that: Gemma 2 caps its logits, Cohere and Granite scale them. It is tried out once, when this is
    made, whether the head alone makes the logits. If not, the features are the logits themselves, and no memory is saved.

    :param model: A model, without adapters
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.splits = head_makes_logits(model)

    def __call__(self, model: Any, inputs: dict[str, Any], use_cache: bool = False, with_hidden: bool = False) -> Features:
        """
        :param model: The model, with or without adapters, or its reference
        :param inputs: Its arguments
        :param use_cache: Whether to keep keys and values
        :param with_hidden: Whether hidden states are needed
        :return: Features of all positions
        """
        model = without_adapters(model)
        if self.splits:
            outputs = model.base_model(**inputs, use_cache=use_cache)
            return Features(outputs.last_hidden_state, outputs.last_hidden_state, outputs.past_key_values)
        outputs = model(**inputs, use_cache=use_cache, output_hidden_states=with_hidden)
        return Features(outputs.logits, outputs.hidden_states[-1] if with_hidden else None, outputs.past_key_values)

    def logits(self, model: Any, features: th.Tensor, adapted: bool = True) -> th.Tensor:
        """
        :param model: As above
        :param features: Of some positions
        :param adapted: Whether a head with adapters uses them
        :return: Logits over the model's vocabulary
        """
        if not self.splits:
            return features
        head = without_adapters(model).get_output_embeddings()
        return (head if adapted else getattr(head, "base_layer", head))(features)


def without_adapters(model: Any) -> Any:
    """:return: The transformers model within a peft model, in whose layers the adapters are"""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@th.no_grad()
def head_makes_logits(model: PreTrainedModel) -> bool:
    """
    :param model: A model
    :return: Whether its logits are what its output embedding makes of the last hidden states of its base model
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    seen: list[th.Tensor] = []

    def replace(module: nn.Module, args: tuple[th.Tensor, ...], output: th.Tensor) -> th.Tensor:
        seen.append(args[0])
        # So large that a cap or a scale would show
        seen.append(th.linspace(-1e3, 1e3, output.numel(), device=output.device, dtype=output.dtype).view_as(output))
        return seen[1]

    handle = head.register_forward_hook(replace)
    try:
        input_ids = th.zeros(1, 2, dtype=th.long, device=model.device)
        logits, hidden = model(input_ids=input_ids).logits, model.base_model(input_ids=input_ids)[0]
    finally:
        handle.remove()
    return len(seen) == 2 and th.equal(seen[0], hidden) and th.equal(seen[1].to(logits.dtype), logits)


def slice_size(n_tokens: int, vocab_size: int) -> int:
    """
    :param n_tokens: Number of tokens
    :param vocab_size: Number of logits of each
    :return: How many tokens' logits are to exist at once
    """
    n_bytes = 4 * vocab_size
    if n_tokens * n_bytes <= WHOLE_BYTES:
        return max(1, n_tokens)
    return max(1, min(SLICE_BYTES // n_bytes, -(-n_tokens // N_SLICES)))


def in_slices(
    function: Callable[..., tuple[th.Tensor, ...]], tensors: tuple[th.Tensor, ...], vocab_size: int
) -> tuple[th.Tensor, ...]:
    """
    Evaluate a function slice by slice over tokens; what it computes on the way is computed anew in the backward pass.

    :param function: From tensors of some tokens to results of these, each of shape ``(n_tokens,)``
    :param tensors: Its arguments, each of shape ``(n_tokens, ...)``
    :param vocab_size: Number of logits of a token
    :return: Its results for all tokens
    """
    size = slice_size(len(tensors[0]), vocab_size)
    if size >= len(tensors[0]):
        return function(*tensors)
    if th.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    results = [function(*parts) for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True)]
    return tuple(th.cat(parts) for parts in zip(*results, strict=True))
