"""Hugging Face models: how they are loaded, what they are given and give, how far one is from another."""

from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class Generation(NamedTuple):
    """
    Sampled responses, each field of shape ``(n, max_new_tokens)``; after the end ``PADDING`` and zeros.

    :param tokens: Token ids
    :param log_probs: Their log-probabilities
    :param entropies: Entropies of the distributions that they were sampled from, in nats
    """

    tokens: th.Tensor
    log_probs: th.Tensor
    entropies: th.Tensor


def load_model(model: str | Path | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """
    :param model: A model, a folder or a name on the Hugging Face hub, or a GGUF file
    :param kwargs: Arguments of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``
    :return: The model
    """
    if isinstance(model, PreTrainedModel):
        return model
    if str(model).endswith(".gguf"):
        path = Path(model)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **kwargs)
        # transformers has dequantized the weights, but still refuses to save what it marked as quantized
        loaded.hf_quantizer = None  # type: ignore[assignment]
        loaded.config.__dict__.pop("quantization_config", None)
        return loaded
    return AutoModelForCausalLM.from_pretrained(model, **kwargs)


def mask_prompts(obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
    """Token ids and their mask. A row of padding only, a conversation that is over, attends to one token: none gives NaN."""
    input_ids, attention_mask = obs["input_ids"].long(), obs["attention_mask"].long()  # type: ignore[index]
    return input_ids, nn.functional.pad(attention_mask[:, :-1], (0, 1), value=1)


def kl_divergence(logits: th.Tensor, reference_logits: th.Tensor) -> th.Tensor:
    """
    ``KL(pi || pi_ref)`` over the vocabulary, exact, in float32.

    :param logits: Of ``pi``, shape ``(..., vocab_size)``; ``-inf`` where ``pi`` is zero.
    :param reference_logits: Of ``pi_ref``, same shape.
    :return: Shape ``(...)``, not negative.
    """
    log_prob, reference = logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1)
    # -inf in both: a token that is not allowed has no part in it; the difference would be NaN
    allowed = log_prob > -th.inf
    difference = th.where(allowed, log_prob, 0.0) - th.where(allowed, reference, 0.0)
    return (log_prob.exp() * difference).sum(-1)
