"""What a language model and an algorithm have to have, asked before anything is trained."""

import warnings
from typing import TYPE_CHECKING, Any

from gymnasium import spaces
from transformers import PreTrainedModel

from sb3_r2vpo.llm.models import check_cache, stop_tokens
from sb3_r2vpo.llm.sequence_buffer import SequenceRolloutBuffer
from sb3_r2vpo.llm.spaces import ResponseSpace

if TYPE_CHECKING:
    from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm

#: Passes over a batch of responses up to which there is no warning; R2VPO's default for robots is 10.
MANY_EPOCHS = 4


def check_model(model: PreTrainedModel, observation_space: spaces.Dict, action_space: spaces.Space) -> None:
    """
    :param model: A model
    :param observation_space: The task's
    :param action_space: The task's
    :raises ValueError: The model knows fewer tokens than the task, has too short a context, or no cache of keys and values.
    """
    is_response = isinstance(action_space, ResponseSpace)
    vocab_size = action_space.vocab_size if is_response else int(action_space.n)  # type: ignore[attr-defined]
    model_vocab_size = model.config.vocab_size
    if vocab_size > model_vocab_size:
        raise ValueError(
            f"The task has {vocab_size} token ids, but the model knows {model_vocab_size}: they do not belong together. "
            "Load the tokenizer from where the model comes from, or call `model.resize_token_embeddings()`."
        )
    longest = observation_space["input_ids"].shape[0] + (action_space.max_new_tokens if is_response else 1)  # type: ignore[index,attr-defined]
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"Prompt and response may take {longest} tokens, but the model's context is {context}: "
            "lower `max_prompt_tokens` or `max_new_tokens`."
        )
    check_cache(model)
    ends = {token for token in stop_tokens(model.generation_config) if token < vocab_size}
    known = set(action_space.eos_token_ids) if is_response else ends  # type: ignore[attr-defined]
    if ends - known:
        warnings.warn(
            f"The model ends its responses with one of the tokens {sorted(ends)} (`generation_config.eos_token_id`), but the "
            f"task knows {sorted(known)} only: responses that end otherwise run on to the length limit. Pass "
            f"`eos_token_ids={sorted(ends | known)}` to the task.",
            stacklevel=2,
        )


def check_training(algorithm: "RatioVarianceAlgorithm") -> None:
    """
    Refuse settings from which no response teaches anything, warn of those that are for robots, and let ``ep_rew_mean`` cover
    at least one rollout.

    :param algorithm: That trains on whole responses; others are left alone
    :raises ValueError: Groups have one response, or ``advantage="gae"`` has no value head.
    """
    buffer = algorithm.rollout_buffer
    if not isinstance(buffer, SequenceRolloutBuffer):
        return
    if buffer.advantage == "gae":
        if algorithm.policy.value_net is None:
            raise ValueError(
                '`advantage="gae"` needs values: pass `value_head=True` in `policy_kwargs`, or take "group", which needs none.'
            )
    elif _group_size(algorithm) == 1:
        raise ValueError(
            f'`advantage="{buffer.advantage}"` compares responses to the same prompt, but `group_size` is 1: all advantages '
            'would be zero. Take groups of 4 or more, or `advantage="gae"` with `value_head=True` in `policy_kwargs`.'
        )
    elif algorithm.normalize_advantage:
        warnings.warn(
            "Advantages of responses are relative to their group; `normalize_advantage=True`, a default for robots, changes "
            "them once more, by each minibatch's mean and spread. Pass `normalize_advantage=False`, as "
            "`presets.language_model()` does.",
            stacklevel=2,
        )
    if algorithm.n_epochs > MANY_EPOCHS:
        warnings.warn(
            f"`n_epochs` is {algorithm.n_epochs}: so many passes over the same responses are for robots. Pass `n_epochs=1`, "
            "as `presets.language_model()` does, and replay rollouts with R2VPOOff to use them more often.",
            stacklevel=2,
        )
    algorithm._stats_window_size = max(algorithm._stats_window_size, algorithm.n_steps * algorithm.n_envs)


def _group_size(algorithm: Any) -> int | None:
    """Responses to each prompt, where the environments tell."""
    try:
        return int(algorithm.env.get_attr("group_size")[0])
    except AttributeError:
        return None
