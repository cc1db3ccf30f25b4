"""Language models: token generation as a Gymnasium environment, and causal language models as policies of R2VPO.

task = RewardTask(prompts, reward_function, tokenizer)
env = TokenVecEnv(task, n_prompts=16, group_size=8, max_prompt_tokens=128, max_new_tokens=64)
model = R2VPO(
    CausalLMPolicy,
    env,
    n_steps=1,                   # batches of responses in a rollout
    n_epochs=1,
    batch_size=32,               # responses in a minibatch
    normalize_advantage=False,   # groups of responses have done that
    learning_rate=1e-5,
    policy_kwargs={"model": "path/to/model"},
)
model.learn(10_000)              # responses
"""

import gymnasium as gym

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    message = f"sb3_r2vpo.llm needs {error.name}, an extra: pip install 'sb3-r2vpo[llm]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from sb3_r2vpo.llm.policy import CausalLMPolicy
from sb3_r2vpo.llm.sampling import Sampling
from sb3_r2vpo.llm.sequence_buffer import PADDING, SequenceRolloutBuffer
from sb3_r2vpo.llm.spaces import ResponseSpace
from sb3_r2vpo.llm.task import Conversation, Problem, Task
from sb3_r2vpo.llm.token_env import TokenEnv
from sb3_r2vpo.llm.token_vec_env import TokenVecEnv

__all__ = [
    "PADDING",
    "CausalLMPolicy",
    "Conversation",
    "Problem",
    "ResponseSpace",
    "Sampling",
    "SequenceRolloutBuffer",
    "Task",
    "TokenEnv",
    "TokenVecEnv",
]

if "TokenEnv-v0" not in gym.registry:
    gym.register(id="TokenEnv-v0", entry_point="sb3_r2vpo.llm.token_env:TokenEnv")
