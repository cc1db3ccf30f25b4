"""What several tests of the algorithms share."""

import copy
import math
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
VECTOR = spaces.Box(-1, 1, (3,), dtype=np.float32)


class RandomEnv(gym.Env):
    """Random observations and rewards of any spaces; episodes of 7 steps, cut off by a time limit or ended in turn."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, nan_reward_at: int | None = None) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observation_space), action_space
        self.nan_reward_at, self.steps = nan_reward_at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        reward = math.nan if self.steps == self.nan_reward_at else float(self.np_random.normal())
        ends = self.steps % 7 == 0
        return self.observation_space.sample(), reward, ends and self.steps % 2 == 0, ends, {}


def weights(model) -> th.Tensor:
    """All weights of a model's policy in one dimension, copied"""
    return th.cat([tensor.flatten().float() for tensor in model.policy.state_dict().values()])


def logged(model) -> dict[str, float]:
    """Values recorded by the last update, before the next dump clears them"""
    return dict(model.logger.name_to_value)


def download_tests(package: str, folder: Path) -> Path:
    """The tests of a package's installed version, from its source package on PyPI (a wheel has none)."""
    requirement = f"{package}=={version(package)}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, requirement]
    download = subprocess.run(pip, cwd=folder, capture_output=True, text=True)
    if download.returncode != 0:
        message = f"The source package of {requirement} could not be downloaded: {download.stderr[-500:]}"
        # A machine without a network may skip it; CI may not
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        # Python 3.11.4 and 3.10.12 are the first with filters
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.glob("*/tests"))
