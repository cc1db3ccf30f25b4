"""What a language model is trained on: prompts, and a verifier of the responses."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch as th

from sb3_r2vpo.common.checks import check_flag


@dataclass(frozen=True)
class Problem:
    """
    :param prompt: Token ids that the policy is given
    :param answer: Whatever the verifier needs besides; the policy never sees it
    """

    prompt: Sequence[int]
    answer: Any = None


@dataclass
class Conversation:
    """
    :param problem: What it began with
    :param turns: Token ids that the policy wrote, one list for each turn, including the end-of-sequence token
    :param replies: Token ids that the task answered with, one list after each turn but the last
    """

    problem: Problem
    turns: list[list[int]] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)

    @property
    def response(self) -> list[int]:
        """The policy's last turn"""
        return self.turns[-1]

    @property
    def tokens(self) -> list[int]:
        """All token ids so far, in order"""
        tokens = list(self.problem.prompt)
        for index, turn in enumerate(self.turns):
            tokens += turn
            tokens += self.replies[index] if index < len(self.replies) else []
        return tokens


class Task(ABC):
    """
    Prompts and rewards, in token ids; text tasks are :class:`~sb3_r2vpo.llm.tasks.TextTask`.

    :param vocab_size: Number of token ids.
    :param eos_token_ids: Tokens that end a response. A length limit ends it as well.
    :param allowed_tokens: Which tokens may be generated, boolean, shape ``(vocab_size,)``. ``None`` (default) allows all.
    :param drop_long_prompts: Whether to leave out prompts that are longer than the environment's ``max_prompt_tokens``, and to
        count them in ``n_dropped``. By default they are refused: a prompt that is cut off is another prompt.
    :raises ValueError: There is no end-of-sequence token, or a token lies outside the vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        allowed_tokens: np.ndarray | None = None,
        drop_long_prompts: bool = False,
    ) -> None:
        check_flag("drop_long_prompts", drop_long_prompts)
        if not eos_token_ids:
            raise ValueError(
                "There is no end-of-sequence token, so that no response could ever end by itself: "
                "set `tokenizer.eos_token`, or pass `eos_token_ids`."
            )
        if outside := [token for token in eos_token_ids if not 0 <= token < vocab_size]:
            raise ValueError(f"The end-of-sequence tokens {outside} lie outside the vocabulary of {vocab_size} tokens.")
        if allowed_tokens is not None and (allowed_tokens.shape != (vocab_size,) or not allowed_tokens.any()):
            raise ValueError(f"`allowed_tokens` must have shape ({vocab_size},), and allow at least one token.")
        self.drop_long_prompts = drop_long_prompts
        #: Prompts that were left out, as they were too long
        self.n_dropped = 0
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.allowed_tokens = allowed_tokens

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Problem:
        """
        :param rng: The only source of randomness to use
        :return: A problem drawn at random
        """

    @abstractmethod
    def reward(self, conversation: Conversation) -> float:
        """
        :param conversation: A finished one
        :return: Its reward
        """

    def rewards(self, conversations: Sequence[Conversation]) -> Sequence[Any]:
        """
        Reward conversations that have ended together; by default one by one. Tasks that judge in batches override this.

        :param conversations: Finished ones, at least one
        :return: The reward of each
        """
        return [self.reward(conversation) for conversation in conversations]

    def check_prompts(self, max_prompt_tokens: int) -> None:  # noqa: B027  most tasks draw prompts that they do not list
        """
        Asked once by environments, before anything is generated. By default nothing is known of prompts before they are drawn.

        :param max_prompt_tokens: Longest prompt that has room
        :raises ValueError: A prompt is too long, and such prompts are not to be left out; or all are.
        """

    def token_reward(self, conversation: Conversation) -> float:
        """
        :param conversation: As it stands after the newest token, which is the last one of ``conversation.response``
        :return: Reward of that token, on top of the final one; zero unless overridden
        """
        return 0.0

    def reply(self, conversation: Conversation) -> Sequence[int] | None:
        """
        Answer a finished turn with tokens that the policy reads but did not write: a tool's output, the next question.

        :param conversation: As it stands after the policy's turn
        :return: Token ids, or ``None`` (always, unless overridden) to end the conversation
        """
        return None

    def action_mask(self, conversation: Conversation) -> np.ndarray:
        """
        A mask of its own for each token, if overridden, is for :class:`~sb3_r2vpo.llm.token_env.TokenEnv` only.

        :param conversation: As it stands; its last turn is the unfinished one, if any
        :return: Which tokens may come next, boolean, shape ``(vocab_size,)``
        """
        return np.ones(self.vocab_size, dtype=bool) if self.allowed_tokens is None else self.allowed_tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """
        :param tokens: Token ids
        :return: Text for people to read
        """
        return " ".join(map(str, tokens))


#: Draws after which no prompt is hoped for that has room
MAX_DRAWS = 1000


def draw_problem(task: Task, rng: np.random.Generator, max_prompt_tokens: int) -> Problem:
    """
    Draw a problem from a task, and check it.

    :param task: The task; with ``drop_long_prompts``, another one is drawn in place of a prompt that is too long
    :param rng: Source of randomness
    :param max_prompt_tokens: Longest prompt that has room
    :return: A problem
    :raises ValueError: Its prompt is empty, too long, or outside the vocabulary.
    """
    problem = task.sample(rng)
    for _ in range(MAX_DRAWS):
        if not task.drop_long_prompts or len(problem.prompt) <= max_prompt_tokens:
            break
        task.n_dropped += 1
        problem = task.sample(rng)
    if not len(problem.prompt):
        raise ValueError(
            f"{type(task).__name__} drew an empty prompt; a language model needs at least one token to go on from."
        )
    if len(problem.prompt) > max_prompt_tokens:
        raise ValueError(
            f"{type(task).__name__} drew a prompt of {len(problem.prompt)} tokens, but `max_prompt_tokens` is "
            f"{max_prompt_tokens}: raise it, or leave out long prompts (`drop_long_prompts=True` of the task). It begins: "
            f"{task.decode(problem.prompt[:50])!r}"
        )
    if not all(0 <= token < task.vocab_size for token in problem.prompt):
        raise ValueError(f"{type(task).__name__} drew a prompt with tokens outside its vocabulary of {task.vocab_size}.")
    return problem


def finite_number(reward: Any) -> float | None:
    """
    :param reward: What a verifier returned: a number, or an array or a tensor without dimensions
    :return: The same as a float; ``None`` if it is anything else, or not finite
    """
    if isinstance(reward, th.Tensor) and reward.ndim == 0:
        reward = reward.item()
    if not isinstance(reward, Real | np.ndarray | np.generic) or getattr(reward, "ndim", 0) != 0:
        return None
    try:
        number = float(reward)
    except (TypeError, ValueError):
        # An array of text
        return None
    return number if math.isfinite(number) else None


def checked_reward(reward: Any, conversation: Conversation, task: Task) -> float:
    """
    :param reward: What a task returned
    :param conversation: For which conversation
    :param task: The task
    :return: The reward as a float
    :raises ValueError: It is not a finite number.
    """
    number = finite_number(reward)
    if number is None:
        raise ValueError(
            f"{type(task).__name__} returned the reward {reward!r} for the response {task.decode(conversation.response)!r}; "
            "it must be one finite number."
        )
    return number


def checked_rewards(task: Task, conversations: Sequence[Conversation]) -> list[float]:
    """
    :param task: The task
    :param conversations: Finished ones
    :return: Their rewards
    :raises ValueError: They are not one finite number for each conversation.
    """
    rewards = task.rewards(conversations) if conversations else []
    if len(rewards) != len(conversations):
        raise ValueError(
            f"{type(task).__name__} returned {len(rewards)} rewards for {len(conversations)} responses; it must be one each."
        )
    return [checked_reward(reward, conversation, task) for reward, conversation in zip(rewards, conversations, strict=True)]
