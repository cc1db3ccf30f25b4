"""The biased teacher: a model that is confidently wrong, and has to find the right answers that it holds unlikely."""

from collections.abc import Sequence

import numpy as np
import torch as th
from transformers import LlamaConfig, LlamaForCausalLM

from sb3_r2vpo.llm.sampling import token_log_prob
from sb3_r2vpo.llm.spaces import pad_left
from sb3_r2vpo.llm.task import Conversation, Problem, Task

CHARACTERS = "0123456789+-*=;>."
OPERATIONS = {"+": np.add, "-": np.subtract, "*": np.multiply}
END_OF_PROMPT, EOS = ">", "."

#: How often each fact was taught correctly: some are confidently wrong, some known, most in between.
TRUTH_PROBABILITIES = (0.2, 0.55, 0.8, 0.97)


class BiasedTeacherTask(Task):
    """
    Chains of one-digit arithmetic modulo 10, to be written out: ``7+5*3>`` asks for ``7+5=2;2*3=6.``

    A teacher that :meth:`demonstrate` comes from knows each of the 300 facts with a probability of its own, one of
    ``truth_probabilities``, and otherwise gives one fixed wrong answer. A model that imitates it is confidently wrong on some
    facts: the right tokens of low probability are those that clipping discards, the paper's argument in miniature. The
    verifier wants the right result at the end of a chain.

    :param n_operations: Length of a chain.
    :param truth_probabilities: Each fact's probability to be taught correctly is drawn from these.
    :param seed: Of the facts; not of the prompts.
    """

    def __init__(
        self, n_operations: int = 4, truth_probabilities: Sequence[float] = TRUTH_PROBABILITIES, seed: int = 0
    ) -> None:
        super().__init__(vocab_size=len(CHARACTERS), eos_token_ids=[CHARACTERS.index(EOS)])
        self.n_operations = n_operations
        rng = np.random.default_rng(seed)
        facts = [(a, operation, b) for a in range(10) for operation in OPERATIONS for b in range(10)]
        self.truth = {fact: int(OPERATIONS[fact[1]](fact[0], fact[2])) % 10 for fact in facts}
        self.truth_probability = {fact: float(rng.choice(truth_probabilities)) for fact in facts}
        self.wrong_answer = {fact: (self.truth[fact] + int(rng.integers(1, 10))) % 10 for fact in facts}

    @property
    def max_prompt_tokens(self) -> int:
        """Length of all prompts"""
        return 2 * self.n_operations + 2

    @property
    def max_new_tokens(self) -> int:
        """Length of all well-formed responses"""
        return 6 * self.n_operations

    def encode(self, text: str) -> list[int]:
        """
        :param text: Of ``CHARACTERS`` only
        :return: Token ids
        """
        return [CHARACTERS.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(CHARACTERS[token] for token in tokens)

    def sample(self, rng: np.random.Generator) -> Problem:
        number = start = int(rng.integers(10))
        chain = [(str(rng.choice(list(OPERATIONS))), int(rng.integers(10))) for _ in range(self.n_operations)]
        for operation, operand in chain:
            number = self.truth[number, operation, operand]
        prompt = f"{start}{''.join(f'{operation}{operand}' for operation, operand in chain)}{END_OF_PROMPT}"
        return Problem(self.encode(prompt), answer=number)

    def reward(self, conversation: Conversation) -> float:
        return float(self.decode(conversation.response).endswith(f"={conversation.problem.answer}{EOS}"))

    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> list[int]:
        """
        :param problem: A problem
        :param rng: Source of randomness
        :return: Token ids of the teacher's response
        """
        prompt = self.decode(problem.prompt)
        number, steps = int(prompt[0]), []
        for operation, operand in zip(prompt[1:-1:2], map(int, prompt[2:-1:2]), strict=True):
            fact = (number, operation, operand)
            is_right = rng.random() < self.truth_probability[fact]
            result = self.truth[fact] if is_right else self.wrong_answer[fact]
            steps.append(f"{number}{operation}{operand}={result}")
            number = result
        return self.encode(";".join(steps) + EOS)


def tiny_model(task: BiasedTeacherTask) -> LlamaForCausalLM:
    """
    :param task: The task
    :return: A Llama of 0.1 million parameters, untrained
    """
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=task.eos_token_ids[0],
    )
    return LlamaForCausalLM(config)


def imitate(
    model: LlamaForCausalLM,
    task: BiasedTeacherTask,
    n_updates: int,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """
    Train a model to imitate the teacher, on fresh demonstrations, with a learning rate that falls linearly to zero.

    :param model: Trained in place
    :param task: The task
    :param n_updates: Number of minibatches
    :param batch_size: Demonstrations in a minibatch
    :param learning_rate: Of AdamW, at the start
    :param seed: Of the demonstrations
    :return: The last minibatch's loss, in nats a token
    """
    rng = np.random.default_rng(seed)
    optimizer = th.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = th.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_updates)
    for _ in range(n_updates):
        problems = [task.sample(rng) for _ in range(batch_size)]
        rows = [[*problem.prompt, *task.demonstrate(problem, rng)] for problem in problems]
        batch = pad_left(rows, task.max_prompt_tokens + task.max_new_tokens)
        input_ids = th.as_tensor(batch["input_ids"])
        logits = model(input_ids=input_ids).logits[:, task.max_prompt_tokens - 1 : -1]
        loss = -token_log_prob(logits, input_ids[:, task.max_prompt_tokens :]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()
