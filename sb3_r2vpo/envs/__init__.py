"""Environments: the DeepMind Control Suite through Shimmy, and the same tasks on EnvPool."""

from sb3_r2vpo.envs.dm_control import DM_CONTROL_IDS, register
from sb3_r2vpo.envs.envpool_vec_env import EnvPoolVecEnv

__all__ = ["DM_CONTROL_IDS", "EnvPoolVecEnv", "register"]

register()
