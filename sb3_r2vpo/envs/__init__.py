"""Environments: the DeepMind Control Suite through Shimmy, and the same tasks on EnvPool."""

from typing import TYPE_CHECKING, Any

from sb3_r2vpo.envs.dm_control import DM_CONTROL_IDS, register

if TYPE_CHECKING:
    from sb3_r2vpo.envs.envpool_vec_env import EnvPoolVecEnv

__all__ = ["DM_CONTROL_IDS", "EnvPoolVecEnv", "register"]

register()


def __getattr__(name: str) -> Any:
    # On first use: it needs Stable-Baselines3, which may be what is importing Gymnasium, and so this module, right now
    if name == "EnvPoolVecEnv":
        from sb3_r2vpo.envs.envpool_vec_env import EnvPoolVecEnv

        return EnvPoolVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
