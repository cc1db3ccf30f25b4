"""R2VPO: policy optimization with a trust region on the variance of the probability ratio, for Stable-Baselines3."""

from pathlib import Path

from sb3_r2vpo import envs as _envs  # noqa: F401  registers dm_control/<domain>-<task>-v0 with Gymnasium
from sb3_r2vpo.r2vpo import R2VPO, R2VPOOff

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["R2VPO", "R2VPOOff", "__version__"]
