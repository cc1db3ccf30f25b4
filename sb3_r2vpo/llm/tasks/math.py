"""Mathematics with known answers, verified symbolically."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sb3_r2vpo.llm.tasks.text import TextTask


@dataclass(frozen=True)
class HubDataset:
    """Where a data set lies on the Hugging Face hub, and which columns hold prompt and answer."""

    path: str
    split: str
    prompt: str
    answer: str
    name: str | None = None


#: The paper's training set, and those of its tests that are public, by short names.
MATH_DATASETS = {
    "dapo-math-17k": HubDataset("open-r1/DAPO-Math-17k-Processed", "train", "prompt", "solution", name="en"),
    "aime24": HubDataset("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": HubDataset("math-ai/aime25", "test", "problem", "answer"),
    "amc23": HubDataset("math-ai/amc23", "test", "question", "answer"),
    "gsm8k": HubDataset("openai/gsm8k", "train", "question", "answer", name="main"),
}


def load_problems(source: str | Path, prompt: str = "problem", answer: str = "answer") -> list[tuple[str, str]]:
    """
    Read prompts and answers from a file of JSON lines, or from a data set on the hub.

    :param source: Path of a file that ends in ``.jsonl``, or one of ``MATH_DATASETS``
    :param prompt: Column of the prompts, in a file
    :param answer: Column of the answers, in a file
    :return: Pairs of prompt and answer
    :raises ValueError: The source is neither, or a line lacks a column.
    :raises RuntimeError: The hub can't be reached, or no longer has the data set.
    """
    if str(source).endswith(".jsonl"):
        rows = [json.loads(line) for line in Path(source).read_text().splitlines() if line.strip()]
    elif source in MATH_DATASETS:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(f"Loading {source!r} from the hub needs: pip install datasets") from error
        dataset = MATH_DATASETS[str(source)]
        prompt, answer = dataset.prompt, dataset.answer
        try:
            rows = list(load_dataset(dataset.path, dataset.name, split=dataset.split))
        # What the hub's client raises depends on its version and on how the connection fails
        except Exception as error:
            raise RuntimeError(
                f"{source!r}, the data set {dataset.path!r}, could not be loaded from the Hugging Face hub: {error}. "
                "Without a connection, pass the path of a .jsonl file with the columns `prompt` and `answer` name."
            ) from error
    else:
        raise ValueError(f"{source!r} is neither the path of a .jsonl file nor one of {', '.join(MATH_DATASETS)}.")
    for number, row in enumerate(rows, start=1):
        if missing := {prompt, answer} - set(row):
            raise ValueError(f"Row {number} of {source} has no {sorted(missing)}; its columns are {sorted(row)}.")
    # GSM8K writes the reasoning, then #### and the answer
    return [(str(row[prompt]), str(row[answer]).rpartition("####")[2].strip()) for row in rows]


class MathTask(TextTask):
    """
    Mathematics with known answers; reward 1 if math-verify finds the response's final answer equal to the known one, else 0.

    :param source: see :func:`load_problems`, as the next two
    :param tokenizer: see :class:`TextTask`
    :param prompt: Column of the prompts
    :param answer: Column of the answers
    :param kwargs: see :class:`TextTask`
    :raises ValueError: An answer has nothing that can be verified.
    """

    def __init__(
        self,
        source: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str = "problem",
        answer: str = "answer",
        **kwargs: Any,
    ) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ImportError("MathTask needs math-verify: pip install sb3-r2vpo[llm]") from error
        problems = []
        for text, expected in load_problems(source, prompt, answer):
            # In dollars: bare LaTeX such as \frac{1}{2} is not recognised
            parsed = math_verify.parse(f"${expected}$")
            if not parsed:
                raise ValueError(f"math-verify can't read the answer {expected!r} to {text!r}.")
            problems.append((text, parsed))
        super().__init__(problems, tokenizer, **kwargs)

    def score(self, prompt: str, response: str, answer: Any) -> float:
        import math_verify

        return float(math_verify.verify(answer, math_verify.parse(response)))
