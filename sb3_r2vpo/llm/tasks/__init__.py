"""Tasks for language models."""

from sb3_r2vpo.llm.tasks.biased_teacher import BiasedTeacherTask
from sb3_r2vpo.llm.tasks.math import MathTask
from sb3_r2vpo.llm.tasks.reasoning_gym import ReasoningGymTask
from sb3_r2vpo.llm.tasks.reward import RewardTask
from sb3_r2vpo.llm.tasks.text import TextTask

__all__ = ["BiasedTeacherTask", "MathTask", "ReasoningGymTask", "RewardTask", "TextTask"]
