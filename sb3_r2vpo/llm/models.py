"""Hugging Face models: how they are loaded, in which precision they are trained, what they have to have."""

import warnings
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


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


def set_precision(model: PreTrainedModel, frozen: bool) -> th.dtype:
    """
    Hold all weights that are to be trained in float32.

    A bfloat16 number has 8 significant bits: steps of AdamW at a learning rate of 1e-6 are rounded away. So weights are
    trained in float32, and a bfloat16 model computes in bfloat16 (autocast), as in TRL. A float16 model would need its loss
    scaled, or its gradients underflow: it computes in float32 as well, and a warning says so.

    :param model: Changed in place
    :param frozen: Whether its weights are not trained, as with LoRA, whose adapters are in float32: they stay in bfloat16
    :return: What to compute in
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if th.float16 in dtypes:
        warnings.warn(
            "The model is in float16, whose gradients overflow and underflow: it is trained in float32. For half of the "
            'memory, pass `model_kwargs={"dtype": torch.bfloat16}`.',
            stacklevel=2,
        )
        model.float()
    elif th.bfloat16 in dtypes and not frozen:
        model.float()
    return th.bfloat16 if th.bfloat16 in dtypes else th.float32


def stop_tokens(config: GenerationConfig | None) -> list[int]:
    """
    :param config: A model's ``generation_config``
    :return: The tokens that end its responses, often several; none if the file is only made up from the model's sizes
    """
    if config is None or config._from_model_config or config.eos_token_id is None:
        return []
    return [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id)


def stop_tokens_beside(tokenizer: Any) -> list[int]:
    """
    :param tokenizer: A tokenizer
    :return: :func:`stop_tokens` of the model that lies where it has been loaded from, if there is one
    """
    if not (tokenizer.name_or_path or "").strip():
        return []
    try:
        return stop_tokens(GenerationConfig.from_pretrained(tokenizer.name_or_path))
    # Not every folder has such a file, and a tokenizer's name may be that of no folder
    except (OSError, ValueError):
        return []


def check_cache(model: PreTrainedModel) -> None:
    """
    :param model: A model
    :raises ValueError: It keeps no cache of keys and values whose rows can be selected: responses are generated with one.
    """
    try:
        with th.no_grad():
            outputs = model(input_ids=th.zeros(1, 2, dtype=th.long, device=model.device), use_cache=True)
            outputs.past_key_values.batch_select_indices(th.zeros(1, dtype=th.long, device=model.device))
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} keeps no cache of keys and values whose rows can be selected, with which responses "
            "are generated: models with recurrent layers, such as Mamba, RWKV and Qwen3-Next, are not supported. Take a model "
            "whose layers are attention, such as Qwen3 or Llama, or train this one with TRL (`sb3_r2vpo.llm.trl`)."
        ) from error


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
