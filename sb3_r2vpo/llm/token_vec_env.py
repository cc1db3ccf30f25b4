"""Token generation in batches: one step is one whole response in each environment."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_r2vpo.common.random_state import bit_generator
from sb3_r2vpo.llm.spaces import PADDING, ResponseSpace, pad_left, prompt_space
from sb3_r2vpo.llm.task import Conversation, Problem, Task, checked_reward, checked_rewards, draw_problem
from sb3_r2vpo.llm.token_env import next_reply


class TokenVecEnv(VecEnv):
    """
    ``n_prompts * group_size`` of :class:`~sb3_r2vpo.llm.token_env.TokenEnv`, stepped by whole responses.

    The observation is the prompt (later, the conversation so far), the action a response, and the reward that of the whole
    response. ``group_size`` neighbours share a prompt. ``num_timesteps`` of an algorithm counts responses.

    An episode takes ``max_turns`` steps for all environments alike. Where a conversation is over sooner, the rest of its
    observations are padding only, and nothing is generated for it.

    :param task: Prompts and verifier.
    :param n_prompts: Prompts in a batch.
    :param group_size: Responses to each prompt; 8 in the paper.
    :param max_prompt_tokens: Longest prompt, in tokens.
    :param max_new_tokens: Longest response of one turn, in tokens.
    :param max_turns: Turns of the policy, at most; 1 unless the task replies.
    :param max_reply_tokens: Longest reply of the task, in tokens; 0 for tasks that do not reply.
    :param seed: Of the prompts; an algorithm's own ``seed`` replaces it.
    :raises ValueError: A number is out of its range, a prompt is known to be too long, or the task's ``action_mask`` depends
        on the conversation.
    """

    action_space: ResponseSpace

    def __init__(
        self,
        task: Task,
        n_prompts: int,
        group_size: int = 8,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_turns: int = 1,
        max_reply_tokens: int = 0,
        seed: int | None = None,
    ) -> None:
        for name, number in (
            ("n_prompts", n_prompts),
            ("group_size", group_size),
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_new_tokens", max_new_tokens),
            ("max_turns", max_turns),
        ):
            if number < 1:
                raise ValueError(f"`{name}` is {number}; it must be at least 1.")
        if type(task).action_mask is not Task.action_mask:
            raise ValueError(
                f"{type(task).__name__} overrides `action_mask`, which is asked token by token: use a TokenEnv. "
                "Whole responses are generated with one mask for all tokens; pass it to the task as `allowed_tokens`."
            )
        task.check_prompts(max_prompt_tokens)
        self.task = task
        self.n_prompts = n_prompts
        self.group_size = group_size
        self.max_prompt_tokens = max_prompt_tokens
        self.max_turns = max_turns
        self.max_reply_tokens = max_reply_tokens
        self.render_mode = None
        self.rng = np.random.default_rng(seed)
        self.max_length = max_prompt_tokens + (max_turns - 1) * (max_new_tokens + max_reply_tokens)
        super().__init__(
            n_prompts * group_size,
            prompt_space(task.vocab_size, self.max_length),
            ResponseSpace(task.vocab_size, max_new_tokens, task.eos_token_ids, task.allowed_tokens),
        )

    def reset(self) -> dict[str, np.ndarray]:
        """
        Start a batch; with ``set_options({"problems": [...]})`` before it, on ``n_prompts`` problems of one's own choice.

        :return: Observations
        """
        if self._seeds[0] is not None:
            self.rng = np.random.default_rng(self._seeds[0])
        problems = self._options[0].get("problems") or self._draw_problems()
        self._reset_seeds()
        self._reset_options()
        return self._start_batch(problems)

    def _draw_problems(self) -> list[Problem]:
        return [draw_problem(self.task, self.rng, self.max_prompt_tokens) for _ in range(self.n_prompts)]

    def _start_batch(self, problems: list[Problem]) -> dict[str, np.ndarray]:
        self.conversations = [Conversation(problem) for problem in problems for _ in range(self.group_size)]
        self.turn = 0
        self.active = [True] * self.num_envs
        self.scores = np.zeros(self.num_envs, dtype=np.float32)
        self.start_time = time.time()
        return self._observations()

    def _observations(self) -> dict[str, np.ndarray]:
        tokens = (c.tokens if active else [] for c, active in zip(self.conversations, self.active, strict=True))
        return pad_left(tokens, self.max_length)

    def get_state(self) -> dict[str, Any]:
        """:return: All that a later :meth:`set_state` needs to go on with the same prompts, as plain values"""
        first = self.conversations[:: self.group_size]
        return {
            "shape": self._shape(),
            "rng": self.rng.bit_generator.state,
            # The same object for a group: answers may be large
            "problems": [(list(conversation.problem.prompt), conversation.problem.answer) for conversation in first],
            "turns": [(list(conversation.turns), list(conversation.replies)) for conversation in self.conversations],
            "turn": self.turn,
            "active": list(self.active),
            "scores": self.scores.copy(),
            "elapsed": time.time() - self.start_time,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """
        :param state: From :meth:`get_state` of environments with the same arguments
        :raises ValueError: They have others.
        """
        different = {key: (old, self._shape()[key]) for key, old in state["shape"].items() if self._shape()[key] != old}
        if different:
            changes = ", ".join(f"`{key}` was {old}, and is {new}" for key, (old, new) in different.items())
            raise ValueError(f"The training that is to go on had other environments: {changes}. Set what it had.")
        self.rng = np.random.Generator(bit_generator(state["rng"]))
        problems = [Problem(prompt, answer) for prompt, answer in state["problems"] for _ in range(self.group_size)]
        self.conversations = [
            Conversation(problem, turns, replies) for problem, (turns, replies) in zip(problems, state["turns"], strict=True)
        ]
        self.turn, self.active, self.scores = state["turn"], state["active"], state["scores"]
        self.start_time = time.time() - state["elapsed"]

    def _shape(self) -> dict[str, int]:
        names = ("n_prompts", "group_size", "max_prompt_tokens", "max_turns", "max_reply_tokens", "max_length")
        return {name: getattr(self, name) for name in names}

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        conversations, active = list(self.conversations), list(self.active)
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        for index, response in enumerate(self.actions):
            if active[index]:
                tokens = response[response != PADDING].tolist()
                conversations[index], rewards[index], active[index] = self._continue(conversations[index], tokens)
        ended = [index for index in range(self.num_envs) if self.active[index] and not active[index]]
        if ended:
            rewards[ended] += checked_rewards(self.task, [conversations[index] for index in ended])
        is_last_turn = self.turn + 1 == self.max_turns
        problems = self._draw_problems() if is_last_turn else []
        # Only now is anything changed: a reward function that raised would have left everything as it was
        self.conversations, self.active = conversations, active
        self.scores += rewards
        self.turn += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        observations = self._observations()
        if is_last_turn:
            infos = [
                {
                    **self._episode_info(index),
                    "terminal_observation": {key: value[index] for key, value in observations.items()},
                }
                for index in range(self.num_envs)
            ]
            observations = self._start_batch(problems)
        return observations, rewards, np.full(self.num_envs, is_last_turn), infos

    def _continue(self, conversation: Conversation, response: list[int]) -> tuple[Conversation, float, bool]:
        """The conversation with a response and what the task replied, the reward of its tokens, and whether it goes on."""
        task = self.task
        conversation = Conversation(conversation.problem, [*conversation.turns, response], conversation.replies)
        reward = token_rewards(task, conversation)
        reply = next_reply(task, conversation, self.max_turns, self.max_reply_tokens)
        if reply is None:
            return conversation, reward, False
        conversation.replies = [*conversation.replies, reply]
        return conversation, reward, True

    def _episode_info(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        return {
            "episode": {
                "r": float(self.scores[index]),
                "l": sum(map(len, conversation.turns)),
                "t": round(time.time() - self.start_time, 6),
            },
            # Not "TimeLimit.truncated": a critic is not asked for the value of what would have come next
            "truncated": conversation.response[-1] not in self.task.eos_token_ids,
            "conversation": conversation,
        }

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*method_args, **method_kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs


def token_rewards(task: Task, conversation: Conversation) -> float:
    """
    Sum of a task's rewards for the single tokens of the last response.

    :param task: The task
    :param conversation: As it stands after the response
    :return: The sum; zero at once for tasks without such rewards
    """
    if type(task).token_reward is Task.token_reward:
        return 0.0
    response = conversation.response
    total = 0.0
    for end in range(1, len(response) + 1):
        prefix = Conversation(conversation.problem, [*conversation.turns[:-1], response[:end]], conversation.replies)
        total += checked_reward(task.token_reward(prefix), prefix, task)
    return total
