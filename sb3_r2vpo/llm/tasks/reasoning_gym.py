"""The generated and verified tasks of reasoning-gym."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from sb3_r2vpo.llm.tasks.text import TextTask


class ReasoningGymTask(TextTask):
    """
    A task of reasoning-gym (https://github.com/open-thought/reasoning-gym), such as "chain_sum", with its own verifier, whose
    scores lie between 0 and 1.

    The answer is what stands between ``<answer>`` and ``</answer>``; without these tags, the whole response.

    :param name: The name of the task.
    :param tokenizer: see :class:`TextTask`
    :param size: Number of problems to generate.
    :param seed: Of the problems.
    :param config: The task's own settings, such as ``{"min_terms": 2}``.
    :param kwargs: see :class:`TextTask`
    :raises ValueError: There is no task of that name.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        size: int = 10_000,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("ReasoningGymTask needs reasoning-gym: pip install sb3-r2vpo[llm]") from error
        self.dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **(config or {}))
        super().__init__([(entry["question"], entry) for entry in self.dataset], tokenizer, **kwargs)

    def score(self, prompt: str, response: str, answer: Any) -> float:
        from reasoning_gym.utils import extract_answer

        extracted = extract_answer(response)
        return self.dataset.score_answer(answer=response.strip() if extracted is None else extracted, entry=answer)
