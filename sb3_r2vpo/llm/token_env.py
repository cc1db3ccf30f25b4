"""Token generation as a Gymnasium environment: one step is one token."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_r2vpo.llm.spaces import pad_left, prompt_space
from sb3_r2vpo.llm.task import Conversation, Task, checked_reward, checked_rewards, draw_problem


class TokenEnv(gym.Env[dict[str, Any], np.int64]):
    """
    Write a response token by token.

    The action is a token id. The observation holds all token ids so far, prompt first, padded on the left. An
    end-of-sequence token ends the turn, and so do ``max_new_tokens``. Between turns, the task's reply is appended, which the
    policy reads but did not write. After the last turn the task's verifier rewards the episode, which is *terminated*; if that
    turn was cut off by the length limit, it is *truncated as well*. Not truncated alone: the verifier has judged the response
    as it stands, and an algorithm that added the value of what might have come next would reward rambling.

    It serves any SB3 algorithm, and small vocabularies. Language models are trained on whole responses instead,
    see :class:`~sb3_r2vpo.llm.token_vec_env.TokenVecEnv`: there each response is read once, not once for each of its tokens.

    :param task: Prompts and verifier.
    :param max_prompt_tokens: Longest prompt, in tokens.
    :param max_new_tokens: Longest turn of the policy, in tokens.
    :param max_turns: Turns of the policy, at most; 1 unless the task replies.
    :param max_reply_tokens: Longest reply of the task, in tokens; 0 for tasks that do not reply.
    :param render_mode: "ansi" for text, or ``None``.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  Gymnasium's own declaration

    def __init__(
        self,
        task: Task,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_turns: int = 1,
        max_reply_tokens: int = 0,
        render_mode: str | None = None,
    ) -> None:
        task.check_prompts(max_prompt_tokens)
        self.task = task
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.max_turns = max_turns
        self.max_reply_tokens = max_reply_tokens
        self.render_mode = render_mode
        self.max_length = max_prompt_tokens + max_turns * max_new_tokens + (max_turns - 1) * max_reply_tokens
        self.observation_space = prompt_space(task.vocab_size, self.max_length)
        self.action_space = spaces.Discrete(task.vocab_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.conversation = Conversation(draw_problem(self.task, self.np_random, self.max_prompt_tokens), turns=[[]])
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        conversation = self.conversation
        conversation.response.append(int(action))
        reward = checked_reward(self.task.token_reward(conversation), conversation, self.task)
        ended = int(action) in self.task.eos_token_ids
        if not ended and len(conversation.response) < self.max_new_tokens:
            return self._observation(), reward, False, False, {}
        reply = next_reply(self.task, conversation, self.max_turns, self.max_reply_tokens)
        if reply is not None:
            conversation.replies.append(reply)
            conversation.turns.append([])
            return self._observation(), reward, False, False, {}
        reward += checked_rewards(self.task, [conversation])[0]
        return self._observation(), reward, True, not ended, {}

    def action_masks(self) -> np.ndarray:
        """:return: Which tokens may come next, boolean, as sb3-contrib's MaskablePPO asks for"""
        return self.task.action_mask(self.conversation)

    def render(self) -> str:
        return self.task.decode(self.conversation.tokens)

    def _observation(self) -> dict[str, np.ndarray]:
        batch = pad_left([self.conversation.tokens], self.max_length)
        return {key: value[0] for key, value in batch.items()}


def next_reply(task: Task, conversation: Conversation, max_turns: int, max_reply_tokens: int) -> list[int] | None:
    """
    Ask the task for its answer to the policy's turn.

    :param task: The task
    :param conversation: As it stands after the turn
    :param max_turns: Turns of the policy, at most
    :param max_reply_tokens: Longest reply that has room
    :return: Its tokens, or ``None`` if the conversation is over
    :raises ValueError: The reply is too long.
    """
    reply = task.reply(conversation) if len(conversation.turns) < max_turns else None
    if reply is not None and len(reply) > max_reply_tokens:
        raise ValueError(
            f"{type(task).__name__} replied with {len(reply)} tokens, but `max_reply_tokens` is {max_reply_tokens}: raise it."
        )
    return None if reply is None else list(reply)
