"""Responses, sampled with a cache of keys and values."""

from typing import TYPE_CHECKING, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_r2vpo.llm.sampling import Sampling, token_log_prob, truncate_logits
from sb3_r2vpo.llm.sequence_buffer import PADDING

if TYPE_CHECKING:
    from sb3_r2vpo.llm.policy import CausalLMPolicy


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


def generate(policy: "CausalLMPolicy", obs: PyTorchObs, sampling: Sampling) -> Generation:
    """
    Sample responses.

    Equal prompts are read once, and responses leave the batch when they end, so that nothing is computed for padding. Rows of
    padding only get empty responses.

    :param policy: The policy
    :param obs: Prompts, padded on the left
    :param sampling: How to sample
    :return: The responses
    """
    prompts, attention_mask = obs["input_ids"].long(), obs["attention_mask"].long()  # type: ignore[index]
    tokens = th.full((len(prompts), policy.max_new_tokens), PADDING, device=prompts.device)
    responses = Generation(tokens, *th.zeros(2, *tokens.shape, device=prompts.device))
    rows = attention_mask.any(-1).nonzero().flatten()
    if len(rows):
        width = int(attention_mask.sum(-1).max())
        prompts, attention_mask = prompts[:, -width:], attention_mask[:, -width:]
        limit = policy.max_cache_tokens
        n_rows = len(rows) if limit is None else max(1, limit // (width + policy.max_new_tokens))
        for chunk in rows.split(n_rows):
            _generate_rows(policy, prompts, attention_mask, chunk, sampling, responses)
    return responses


def _generate_rows(
    policy: "CausalLMPolicy",
    prompts: th.Tensor,
    attention_mask: th.Tensor,
    rows: th.Tensor,
    sampling: Sampling,
    responses: Generation,
) -> None:
    """Write the responses of some rows, whose cache fits into memory, into their place."""
    eos_token_ids = th.tensor(getattr(policy.action_space, "eos_token_ids", ()), device=prompts.device)
    unique, owners = th.stack([prompts, attention_mask])[:, rows].unique(dim=1, return_inverse=True)
    features, _, cache = policy.readout(policy.model, policy.model_inputs(unique[0], unique[1]), use_cache=True)
    features, attention_mask = features[owners, -1], unique[1][owners]
    cache.batch_select_indices(owners)
    for step in range(policy.max_new_tokens):
        logits = truncate_logits(policy.token_logits(policy.readout.logits(policy.model, features)), sampling)
        probabilities = logits.softmax(-1)
        new_tokens = th.multinomial(probabilities, num_samples=1)
        responses.tokens[rows, step] = new_tokens.flatten()
        responses.log_probs[rows, step] = token_log_prob(logits, new_tokens.flatten())
        responses.entropies[rows, step] = th.special.entr(probabilities).sum(-1)
        unfinished = (~th.isin(new_tokens.flatten(), eos_token_ids)).nonzero().flatten()
        if step + 1 == policy.max_new_tokens or len(unfinished) == 0:
            break
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
        if len(unfinished) < len(rows):
            rows, new_tokens, attention_mask = rows[unfinished], new_tokens[unfinished], attention_mask[unfinished]
            cache.batch_select_indices(unfinished)
        inputs = policy.model_inputs(new_tokens, attention_mask)
        features = policy.readout(policy.model, {**inputs, "past_key_values": cache}, use_cache=True).features[:, -1]
