"""How well a language model does: mean@k, pass@k, length, entropy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import indent

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EventCallback
from stable_baselines3.common.utils import obs_as_tensor

from sb3_r2vpo.llm.policy import CausalLMPolicy
from sb3_r2vpo.llm.sampling import Sampling
from sb3_r2vpo.llm.sequence_buffer import PADDING
from sb3_r2vpo.llm.task import Conversation, Problem
from sb3_r2vpo.llm.token_vec_env import TokenVecEnv

#: The paper's settings for tests (Table 3).
TEST_SAMPLING = Sampling(temperature=0.6, top_k=20, top_p=0.95)

#: Logger outputs whose tables have no room for a text.
NOT_FOR_TEXT = ("stdout", "log", "csv")

#: Rewards from here on count as solved, for pass@k.
SOLVED = 1.0


@dataclass(frozen=True)
class Evaluation:
    """
    Averages over problems.

    :param mean_at_k: Mean reward of ``k`` responses
    :param pass_at_k: Share of problems that at least one of ``k`` responses solves
    :param length: Tokens that the policy wrote in a conversation
    :param truncated: Share of conversations that a length limit cut off
    :param entropy: In nats a token, of the distribution that was sampled from: of the temperature, top-k and top-p of the test
    """

    mean_at_k: float
    pass_at_k: float
    length: float
    truncated: float
    entropy: float


@th.no_grad()
def evaluate_responses(
    policy: CausalLMPolicy, env: TokenVecEnv, problems: Sequence[Problem], sampling: Sampling = TEST_SAMPLING
) -> tuple[Evaluation, list[Conversation]]:
    """
    Let a policy respond ``k`` times to each problem.

    :param policy: The policy
    :param env: Environments to do it in: ``k`` is their ``group_size``, and ``n_prompts`` problems are done at once.
    :param problems: The problems; each one once
    :param sampling: How to sample; by default as in the paper's tests
    :return: The evaluation, and all conversations in the order of the problems
    :raises ValueError: There are no problems.
    """
    if not problems:
        raise ValueError("There are no problems to evaluate on.")
    policy.set_training_mode(False)
    scores, truncated, conversations = [], [], []
    entropy, n_tokens = 0.0, 0
    for start in range(0, len(problems), env.n_prompts):
        batch = list(problems[start : start + env.n_prompts])
        # The last batch is filled up; what fills it is not counted
        env.set_options({"problems": batch + [batch[0]] * (env.n_prompts - len(batch))})
        observations = env.reset()
        n_rows = len(batch) * env.group_size
        for _ in range(env.max_turns):
            tokens, _, entropies = policy.generate(obs_as_tensor(observations, policy.device), sampling)
            observations, _, _, infos = env.step(tokens.cpu().numpy())  # type: ignore[assignment]
            entropy += entropies[:n_rows].sum().item()
            n_tokens += int((tokens[:n_rows] != PADDING).sum())
        scores += [info["episode"]["r"] for info in infos[:n_rows]]
        truncated += [info["truncated"] for info in infos[:n_rows]]
        conversations += [info["conversation"] for info in infos[:n_rows]]
    by_problem = np.array(scores).reshape(len(problems), env.group_size)
    evaluation = Evaluation(
        mean_at_k=float(by_problem.mean()),
        pass_at_k=float((by_problem >= SOLVED).any(axis=1).mean()),
        length=n_tokens / len(scores),
        truncated=float(np.mean(truncated)),
        entropy=entropy / n_tokens,
    )
    return evaluation, conversations


class ResponseEvalCallback(EventCallback):
    """
    Evaluate on the same problems every ``eval_freq`` batches of responses; log the averages as ``eval/...``, and one
    conversation, another one each time, as text: TensorBoard shows it under ``eval/conversation``.

    :param env: Environments to evaluate in, others than those of training; see :func:`evaluate_responses`
    :param problems: The problems
    :param eval_freq: Batches of responses between two evaluations
    :param sampling: How to sample; by default as in the paper's tests
    :param verbose: 1 prints the averages and the conversation
    """

    def __init__(
        self,
        env: TokenVecEnv,
        problems: Sequence[Problem],
        eval_freq: int,
        sampling: Sampling = TEST_SAMPLING,
        verbose: int = 1,
    ) -> None:
        super().__init__(verbose=verbose)
        self.env = env
        self.problems = problems
        self.eval_freq = eval_freq
        self.sampling = sampling

    def _on_step(self) -> bool:
        # Not `n_calls`, which starts anew when training is resumed
        n_batches = self.num_timesteps // self.training_env.num_envs
        if n_batches % self.eval_freq:
            return True
        evaluation, conversations = evaluate_responses(self.model.policy, self.env, self.problems, self.sampling)  # type: ignore[arg-type]
        self.last_evaluation = evaluation
        for name, value in asdict(evaluation).items():
            self.logger.record(f"eval/{name}", value)
        text = self.env.task.decode(conversations[n_batches // self.eval_freq % len(conversations)].tokens)
        # Indented, TensorBoard's Markdown shows it as it is
        self.logger.record("eval/conversation", indent(text, "    ", lambda line: True), exclude=NOT_FOR_TEXT)
        if self.verbose:
            print(f"After {self.num_timesteps} responses: {evaluation}", text, sep="\n")
        return True
