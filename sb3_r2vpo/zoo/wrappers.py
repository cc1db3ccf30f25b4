"""Wrappers that a settings file can name, where its plain mappings can't hold a function."""

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class VecRewardScale(VecEnvWrapper):
    """
    Multiply rewards by a constant.

    It wraps the vectorized environment, so that it serves EnvPool as well, and comes after ``Monitor``, so that logged and
    evaluated returns stay in the task's own units. ``r2vpo enjoy`` alone sums scaled rewards, as with any wrapper.

    :param venv: The vectorized environment to wrap
    :param scale: What rewards are multiplied by
    """

    def __init__(self, venv: VecEnv, scale: float) -> None:
        super().__init__(venv)
        self.scale = scale

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards * self.scale, dones, infos
