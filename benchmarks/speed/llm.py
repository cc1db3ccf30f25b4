"""How much whole sequences save over one row for each token: generation and update, as ratios of tokens a second.

    python benchmarks/speed/llm.py

One thread, a model of 0.1 million parameters, 64 prompts with 4 responses of 24 tokens each. The slow arm re-reads the prefix
for each token, as the step path does: one row holds one token and all that was written before it. Both arms run alternately
(A-B-B-A); medians, and tokens a second of process time.
"""

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_r2vpo.llm import CausalLMPolicy, TokenVecEnv
from sb3_r2vpo.llm.spaces import pad_left, prompt_space
from sb3_r2vpo.llm.tasks.biased_teacher import BiasedTeacherTask, tiny_model

RESULTS = Path(__file__).parent / "results" / "llm.csv"
N_PROMPTS, GROUP_SIZE, N_ROUNDS, ROWS_PER_PASS = 64, 4, 3, 512


class NeverEnding(BiasedTeacherTask):
    """The same prompts without an end-of-sequence token that an untrained model would write: all responses are full length."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed_tokens = np.arange(self.vocab_size) != self.eos_token_ids[0]


def process_time(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(fast: Callable[[], None], slow: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of both, alternating, after one round of warming up."""
    fast()
    slow()
    times: dict[str, list[float]] = {"fast": [], "slow": []}
    for _ in range(N_ROUNDS):
        for name, function in (("fast", fast), ("slow", slow), ("slow", slow), ("fast", fast)):
            times[name].append(process_time(function))
    return statistics.median(times["fast"]), statistics.median(times["slow"])


def main() -> None:
    th.set_num_threads(1)
    th.manual_seed(0)
    task = NeverEnding()
    env = TokenVecEnv(
        task, N_PROMPTS, GROUP_SIZE, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens, seed=0
    )
    model = tiny_model(task)
    policy = CausalLMPolicy(env.observation_space, env.action_space, lambda _: 0.0, model=model)
    step_space = prompt_space(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens)
    step_policy = CausalLMPolicy(step_space, spaces.Discrete(task.vocab_size), lambda _: 0.0, model=model)
    observations = {key: th.as_tensor(value) for key, value in env.reset().items()}
    tokens = policy.generate(observations).tokens
    n_tokens = tokens.numel()

    def generate_by_rereading() -> None:
        ids = observations["input_ids"]
        for _ in range(task.max_new_tokens):
            new_tokens = step_policy.generate({"input_ids": ids, "attention_mask": th.ones_like(ids)}).tokens
            ids = th.cat([ids, new_tokens], dim=1)

    prefixes = [
        [*prompt, *response[:end]]
        for prompt, response in zip(observations["input_ids"].tolist(), tokens.tolist(), strict=True)
        for end in range(task.max_new_tokens)
    ]
    rows = {key: th.as_tensor(value) for key, value in pad_left(prefixes, step_space["input_ids"].shape[0]).items()}

    def update_sequences() -> None:
        model.zero_grad()
        policy.evaluate_actions(observations, tokens)[1].mean().backward()

    def update_rows() -> None:
        model.zero_grad()
        # All rows in one pass would take gigabytes
        for part in th.randperm(n_tokens).split(ROWS_PER_PASS):
            part_rows = {key: value[part] for key, value in rows.items()}
            step_policy.evaluate_actions(part_rows, tokens.flatten()[part])[1].sum().div(n_tokens).backward()

    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "sequences_tokens_per_second", "rows_tokens_per_second", "ratio", "torch", "machine"])
        comparisons = {
            "generation": (lambda: policy.generate(observations), generate_by_rereading),
            "update": (update_sequences, update_rows),
        }
        for name, (fast, slow) in comparisons.items():
            fast_time, slow_time = compare(fast, slow)  # type: ignore[arg-type]
            row = [name, round(n_tokens / fast_time), round(n_tokens / slow_time), round(slow_time / fast_time, 2)]
            writer.writerow([*row, th.__version__, platform.machine()])
            print(*row)


if __name__ == "__main__":
    main()
