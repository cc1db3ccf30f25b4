"""Tasks on text: prompts go through a tokenizer and its chat template, responses are judged as text."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sb3_r2vpo.llm.task import Conversation, Problem, Task

#: What is appended to the prompt, by the way of thinking (Table 3 of the paper); ``None`` appends nothing.
THINKING = {None: "", "fast": "<think></think>", "slow": "<think>"}


class TextTask(Task):
    """
    Prompts as text, drawn uniformly. Subclasses implement :meth:`score`.

    :param problems: Pairs of a prompt and whatever the verifier needs to judge the response.
    :param tokenizer: The model's tokenizer. Its chat template is applied if it has one; it needs no pad token.
    :param system_prompt: System message of the chat template; only for tokenizers that have one.
    :param thinking: "fast" appends ``<think></think>`` to the prompt, "slow" ``<think>``, as in the paper; ``None`` (default)
        nothing.
    :param eos_token_ids: Tokens that end a response. ``None`` (default) takes the tokenizer's.
    :raises ValueError: There are no problems, an empty prompt, no end-of-sequence token, or an unknown way of thinking.
    """

    def __init__(
        self,
        problems: Sequence[tuple[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        thinking: str | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        if not len(problems):
            raise ValueError(f"{type(self).__name__} got no problems.")
        if empty := [index for index, (prompt, _) in enumerate(problems) if not prompt.strip()]:
            raise ValueError(f"{type(self).__name__} got empty prompts, the first one at index {empty[0]}.")
        if thinking not in THINKING:
            raise ValueError(f"`thinking` is {thinking!r}; it must be 'fast', 'slow' or None.")
        if system_prompt is not None and tokenizer.chat_template is None:
            raise ValueError("`system_prompt` needs a tokenizer with a chat template.")
        if eos_token_ids is None:
            eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # Not `len(tokenizer)`: ids may have gaps
        super().__init__(max(tokenizer.get_vocab().values()) + 1, eos_token_ids)
        self.problems = problems
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.thinking = thinking

    @abstractmethod
    def score(self, prompt: str, response: str, answer: Any) -> float:
        """
        :param prompt: As in ``problems``, without template
        :param response: The response, without special tokens
        :param answer: As in ``problems``
        :return: The reward
        """

    def problem(self, index: int) -> Problem:
        """
        :param index: Into ``problems``
        :return: That problem in token ids
        """
        prompt, answer = self.problems[index]
        return Problem(self.encode(prompt), answer=(prompt, answer))

    def encode(self, prompt: str) -> list[int]:
        """
        :param prompt: Text
        :return: Token ids of the prompt in its template
        """
        suffix = THINKING[self.thinking]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt + suffix)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens
        return self.tokenizer(f"{text}{suffix}", add_special_tokens=False)["input_ids"]

    def sample(self, rng: np.random.Generator) -> Problem:
        return self.problem(int(rng.integers(len(self.problems))))

    def reward(self, conversation: Conversation) -> float:
        prompt, answer = conversation.problem.answer
        response = self.decode(conversation.response, skip_special_tokens=True)
        try:
            return self.score(prompt, response, answer)
        except Exception as error:
            raise RuntimeError(
                f"The reward of {type(self).__name__} failed on the response {response!r} to {prompt!r}."
            ) from error

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


class RewardTask(TextTask):
    """
    Prompts and a reward function of one's own.

    :param prompts: Prompts as text.
    :param reward_function: ``reward_function(prompt, response) -> float``
    :param tokenizer: see :class:`TextTask`, as all other arguments
    """

    def __init__(
        self,
        prompts: Sequence[str],
        reward_function: Callable[[str, str], float],
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        super().__init__([(prompt, None) for prompt in prompts], tokenizer, **kwargs)
        self.reward_function = reward_function

    def score(self, prompt: str, response: str, answer: Any) -> float:
        return self.reward_function(prompt, response)
