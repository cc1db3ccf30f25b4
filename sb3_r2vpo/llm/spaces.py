"""The spaces of token generation: prompts as observations, whole responses as actions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_r2vpo.llm.sequence_buffer import PADDING, SequenceRolloutBuffer


class ResponseSpace(spaces.MultiDiscrete):
    """
    Whole responses: ``max_new_tokens`` token ids, of which those after the end of the response are ``PADDING`` (-1).

    A padding that is no token needs no pad token of the tokenizer, and tells an end-of-sequence token that the policy wrote
    from one that only fills the row. Policies find here all that they have to know about the end of a response.

    :param vocab_size: Number of token ids.
    :param max_new_tokens: Longest response, in tokens.
    :param eos_token_ids: Tokens that end a response; they are its last token.
    :param allowed_tokens: Which tokens may be generated, boolean, shape ``(vocab_size,)``. ``None`` allows all.
    """

    #: The rollout buffer that R2VPO takes for such actions unless told otherwise
    rollout_buffer_class = SequenceRolloutBuffer

    def __init__(
        self,
        vocab_size: int,
        max_new_tokens: int,
        eos_token_ids: Iterable[int],
        allowed_tokens: np.ndarray | None = None,
    ) -> None:
        super().__init__([vocab_size + 1] * max_new_tokens, start=[PADDING] * max_new_tokens)
        self.vocab_size = vocab_size
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = tuple(eos_token_ids)
        self.allowed_tokens = allowed_tokens

    def lengths(self, responses: np.ndarray) -> np.ndarray:
        """
        :param responses: Shape ``(..., max_new_tokens)``
        :return: Tokens in each response, shape ``(...)``
        """
        return (responses != PADDING).sum(axis=-1)

    def contains(self, x: Any) -> bool:
        """
        :param x: A candidate
        :return: Whether it is a response: tokens, then only padding, an end-of-sequence token nowhere but at the end
        """
        if not super().contains(x):
            return False
        x = np.asarray(x)
        length = self.lengths(x)
        return bool((x[:length] != PADDING).all() and not np.isin(x[: max(length - 1, 0)], self.eos_token_ids).any())

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        """
        :param mask: Not supported
        :param probability: Not supported
        :return: A random response that ends at its first end-of-sequence token
        """
        if mask is not None or probability is not None:
            raise ValueError("ResponseSpace.sample() takes no mask and no probability.")
        choices = np.arange(self.vocab_size) if self.allowed_tokens is None else np.flatnonzero(self.allowed_tokens)
        response = self.np_random.choice(choices, size=self.max_new_tokens)
        after_end = np.cumsum(np.isin(response, self.eos_token_ids)) - np.isin(response, self.eos_token_ids) > 0
        return np.where(after_end, PADDING, response).astype(self.dtype)


def prompt_space(vocab_size: int, max_length: int) -> spaces.Dict:
    """
    Observations: token ids so far, padded on the left, and the mask that tells them from padding, by Hugging Face's names.

    ``MultiDiscrete`` ids are one-hot encoded by SB3's own policies, which learn from them if the vocabulary is small.

    :param vocab_size: Number of token ids.
    :param max_length: Longest observation, in tokens.
    :return: A space with the keys ``input_ids`` and ``attention_mask``
    """
    return spaces.Dict(
        {"input_ids": spaces.MultiDiscrete([vocab_size] * max_length), "attention_mask": spaces.MultiBinary(max_length)}
    )


def pad_left(sequences: Iterable[list[int]], max_length: int) -> dict[str, np.ndarray]:
    """
    Stack token ids into an observation of :func:`prompt_space`.

    :param sequences: Token ids; an empty list becomes a row of padding
    :param max_length: Length of the rows
    :return: ``input_ids`` and ``attention_mask``, each of shape ``(n_sequences, max_length)``
    """
    sequences = list(sequences)
    input_ids = np.zeros((len(sequences), max_length), dtype=np.int64)
    attention_mask = np.zeros((len(sequences), max_length), dtype=np.int8)
    for row, sequence in enumerate(sequences):
        if sequence:
            input_ids[row, -len(sequence) :] = sequence
            attention_mask[row, -len(sequence) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
