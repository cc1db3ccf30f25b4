"""A task of prompts and reward functions of one's own."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sb3_r2vpo.common.checks import check_flag
from sb3_r2vpo.llm.task import finite_number
from sb3_r2vpo.llm.tasks.text import Prompt, TextTask

RewardFunction = Callable[..., Any]


class RewardTask(TextTask):
    """
    Prompts and reward functions of one's own.

        def correct(prompt, response, answer):
            return float(response.strip() == answer)

        task = RewardTask(["1+1", "2+3"], correct, tokenizer, answers=["2", "5"])

    :param prompts: Prompts: texts or lists of chat messages; or a ``datasets`` data set with a column ``prompt``, whose other
        columns the functions may ask for.
    :param reward_function: ``reward_function(prompt, response) -> float``, or several. A function that has an argument
        ``answer``, or one of the name of a column, gets that of the prompt.
    :param tokenizer: see :class:`TextTask`
    :param answers: What the functions need to judge the response to each prompt; for data sets, a column.
    :param batched: Whether the functions judge all responses of a batch at once, as those of TRL: they get lists in the
        arguments ``prompts`` and ``completions`` and, by name, of each column; completions to chat messages are messages. A
        ``None`` among their rewards says that the function does not apply.
    :param reward_weights: Of several functions, whose weighted sum is the reward; ``None`` (default) for 1 each.
    :param kwargs: see :class:`TextTask`
    :raises ValueError: There are not as many answers as prompts, or weights as functions; or the data set has no ``prompt``.
    """

    def __init__(
        self,
        prompts: Any,
        reward_function: RewardFunction | Sequence[RewardFunction],
        tokenizer: PreTrainedTokenizerBase,
        *,
        answers: Sequence[Any] | None = None,
        batched: bool = False,
        reward_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_flag("batched", batched)
        self.reward_functions = [reward_function] if callable(reward_function) else list(reward_function)
        self.reward_weights = [1.0] * len(self.reward_functions) if reward_weights is None else list(reward_weights)
        if not self.reward_functions or len(self.reward_weights) != len(self.reward_functions):
            raise ValueError(
                f"There are {len(self.reward_functions)} reward functions and {len(self.reward_weights)} `reward_weights`; "
                "pass at least one function, and one weight for each."
            )
        self.batched = batched
        columns: dict[str, list[Any]] = {} if answers is None else {"answer": list(answers)}
        if hasattr(prompts, "column_names"):
            columns |= {name: list(prompts[name]) for name in prompts.column_names}
            if "prompt" not in columns:
                raise ValueError(f"The data set has the columns {sorted(columns)}, but no `prompt`: rename one.")
            prompts = columns.pop("prompt")
        for name, values in columns.items():
            if len(values) != len(prompts):
                raise ValueError(f"There are {len(prompts)} prompts, but {len(values)} of `{name}`; pass one for each.")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [{}] * len(prompts)
        super().__init__(list(zip(prompts, rows, strict=True)), tokenizer, **kwargs)

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], answers: Sequence[Any]) -> Sequence[Any]:
        judge = self._of_batch if self.batched else self._one_by_one
        by_function = [judge(function, prompts, responses, answers) for function in self.reward_functions]
        return [self._weighted(rewards) for rewards in zip(*by_function, strict=True)]

    def _one_by_one(
        self, function: RewardFunction, prompts: Sequence[Prompt], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        rewards = []
        for prompt, response, row in zip(prompts, responses, rows, strict=True):
            try:
                rewards.append(function(prompt, response, **_taken(function, row)))
            except Exception as error:
                raise RuntimeError(f"{_name(function)} failed on the response {response!r} to {prompt!r}.") from error
        return rewards

    def _of_batch(
        self, function: RewardFunction, prompts: Sequence[Prompt], responses: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        completions = [
            response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        try:
            rewards = function(**_taken(function, {"prompts": list(prompts), "completions": completions, **columns}))
        except Exception as error:
            raise RuntimeError(
                f"{_name(function)} failed on {len(responses)} responses, the first one {responses[0]!r} to {prompts[0]!r}."
            ) from error
        if not hasattr(rewards, "__len__") or len(rewards) != len(responses):
            raise ValueError(
                f"{_name(function)} returned {rewards!r} for {len(responses)} responses; with `batched=True` it must be a "
                "list with one reward for each."
            )
        return rewards

    def _weighted(self, rewards: Sequence[Any]) -> Any:
        """The weighted sum of one response's rewards; one that is no finite number is returned, and then refused."""
        given = [(weight, reward) for weight, reward in zip(self.reward_weights, rewards, strict=True) if reward is not None]
        if not given:
            return None
        total = 0.0
        for weight, reward in given:
            number = finite_number(reward)
            if number is None:
                return reward
            total += weight * number
        return total


def _name(function: RewardFunction) -> str:
    return f"The reward function {getattr(function, '__name__', type(function).__name__)!r}"


def _taken(function: RewardFunction, columns: dict[str, Any]) -> dict[str, Any]:
    """Those that a function has arguments for."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}
