"""Tasks on text: prompts go through a tokenizer and its chat template, responses are judged as text."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sb3_r2vpo.llm.models import stop_tokens_beside
from sb3_r2vpo.llm.task import Conversation, Problem, Task

#: What is appended to the prompt, by the way of thinking (Table 3 of the paper); ``None`` appends nothing.
THINKING = {None: "", "fast": "<think></think>", "slow": "<think>"}

#: A text, or the messages of a chat, each with ``role`` and ``content``
Prompt = str | Sequence[Mapping[str, Any]]


class TextTask(Task):
    """
    Prompts as text, drawn uniformly. Subclasses implement :meth:`score`.

    :param problems: Pairs of a prompt, a text or a list of chat messages, and whatever the verifier needs to judge the
        response.
    :param tokenizer: The model's tokenizer. Its chat template is applied if it has one; it needs no pad token.
    :param system_prompt: System message of the chat template; only for tokenizers that have one.
    :param thinking: "fast" appends ``<think></think>`` to the prompt, "slow" ``<think>``, as in the paper; ``None`` (default)
        nothing.
    :param chat_template_kwargs: Further arguments of the chat template, such as ``{"enable_thinking": False}``.
    :param eos_token_ids: Tokens that end a response. ``None`` (default) takes the tokenizer's, and those that the
        ``generation_config`` beside it has: chat models end their turn with another token than a text.
    :param drop_long_prompts: Whether to leave out prompts that are longer than the environment's ``max_prompt_tokens``, and to
        count them in ``n_dropped``. By default they are refused, before anything is generated.
    :raises ValueError: There are no problems, an empty prompt or one of another type, no end-of-sequence token, or an unknown
        way of thinking; or messages without a chat template.
    """

    def __init__(
        self,
        problems: Sequence[tuple[Prompt, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        thinking: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        eos_token_ids: Sequence[int] | None = None,
        drop_long_prompts: bool = False,
    ) -> None:
        if not len(problems):
            raise ValueError(f"{type(self).__name__} got no problems.")
        has_template = tokenizer.chat_template is not None
        for index, (prompt, _) in enumerate(problems):
            check_prompt(prompt, f"{type(self).__name__} got, at index {index},", has_template)
        if thinking not in THINKING:
            raise ValueError(f"`thinking` is {thinking!r}; it must be 'fast', 'slow' or None.")
        if (system_prompt is not None or chat_template_kwargs) and not has_template:
            raise ValueError("`system_prompt` and `chat_template_kwargs` need a tokenizer with a chat template.")
        # Not `len(tokenizer)`: ids may have gaps
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        if eos_token_ids is None:
            own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            eos_token_ids = [*dict.fromkeys([*own, *(end for end in stop_tokens_beside(tokenizer) if end < vocab_size)])]
        super().__init__(vocab_size, eos_token_ids, drop_long_prompts=drop_long_prompts)
        self.problems = problems
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.thinking = thinking
        self.chat_template_kwargs = chat_template_kwargs or {}

    def score(self, prompt: Any, response: str, answer: Any) -> float:
        """
        :param prompt: As in ``problems``, without template
        :param response: The response as it was written, special tokens such as ``<think>`` included, without what ended it
        :param answer: As in ``problems``
        :return: The reward
        """
        raise NotImplementedError

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], answers: Sequence[Any]) -> Sequence[Any]:
        """
        Judge responses that have ended together; by default one by one.

        :param prompts: As for :meth:`score`, one for each response
        :param responses: As above
        :param answers: As above
        :return: The reward of each
        :raises RuntimeError: :meth:`score` raised; the message has the response.
        """
        rewards = []
        for prompt, response, answer in zip(prompts, responses, answers, strict=True):
            try:
                rewards.append(self.score(prompt, response, answer))
            except Exception as error:
                raise RuntimeError(
                    f"The reward of {type(self).__name__} failed on the response {response!r} to {prompt!r}."
                ) from error
        return rewards

    def problem(self, index: int) -> Problem:
        """
        :param index: Into ``problems``
        :return: That problem in token ids
        """
        prompt, answer = self.problems[index]
        return Problem(self.encode(prompt), answer=(prompt, answer))

    def encode(self, prompt: Prompt) -> list[int]:
        """
        :param prompt: A text, or messages; the response goes on with the last one if the role of that is "assistant".
        :return: Token ids of the prompt in its template
        """
        suffix = THINKING[self.thinking]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{prompt}{suffix}")["input_ids"]
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        continues = messages[-1]["role"] == "assistant"
        text = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **self.chat_template_kwargs,
        )
        # The template has written the special tokens
        return self.tokenizer(f"{text}{suffix}", add_special_tokens=False)["input_ids"]

    def check_prompts(self, max_prompt_tokens: int) -> None:
        lengths = np.array([len(self.encode(prompt)) for prompt, _ in self.problems])
        fits = lengths <= max_prompt_tokens
        if fits.all():
            return
        found = f"{(~fits).sum()} of {len(lengths)} prompts are longer than `max_prompt_tokens={max_prompt_tokens}`"
        if not self.drop_long_prompts or not fits.any():
            raise ValueError(
                f"{found}, the longest, at index {lengths.argmax()}, has {lengths.max()} tokens: raise it to that, or "
                f"leave out long prompts with `drop_long_prompts=True` of {type(self).__name__}, which needs one that fits."
            )
        warnings.warn(f"{found}, and are left out.", stacklevel=2)
        self.n_dropped += int((~fits).sum())
        self.problems = [problem for problem, keep in zip(self.problems, fits, strict=True) if keep]

    def sample(self, rng: np.random.Generator) -> Problem:
        return self.problem(int(rng.integers(len(self.problems))))

    def reward(self, conversation: Conversation) -> float:
        return self.rewards([conversation])[0]

    def rewards(self, conversations: Sequence[Conversation]) -> Sequence[Any]:
        prompts, answers = zip(*(conversation.problem.answer for conversation in conversations), strict=True)
        return self.scores(prompts, [self.response_text(conversation.response) for conversation in conversations], answers)

    def response_text(self, response: Sequence[int]) -> str:
        """
        :param response: Token ids of a response
        :return: Its text, without the token that ended it
        """
        ended = len(response) > 0 and response[-1] in self.eos_token_ids
        return self.decode(response[:-1] if ended else response)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))


def check_prompt(prompt: Any, found: str, has_template: bool) -> None:
    """
    :param prompt: A prompt
    :param found: Who has got it, for the message
    :param has_template: Whether the tokenizer has a chat template
    :raises ValueError: It is neither a text nor messages, or empty; or there is no template for messages.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{found} an empty prompt; a language model needs at least one token to go on from.")
        return
    is_chat = isinstance(prompt, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt)
    if not is_chat or not prompt:
        raise ValueError(f"{found} the prompt {prompt!r}; it must be a text, or a list of messages with `role` and `content`.")
    if not has_template:
        raise ValueError(f"{found} chat messages, but the tokenizer has no chat template: pass texts, or set one.")
