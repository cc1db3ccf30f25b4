"""Pytest plugin that puts one of our algorithms in PPO's place in Stable-Baselines3's own tests."""

import inspect
import os

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_r2vpo

ALGORITHM = getattr(sb3_r2vpo, os.environ["SB3_SUITE_ALGORITHM"])

# Both the package and the module: the tests import it from either
stable_baselines3.PPO = stable_baselines3.ppo.PPO = ALGORITHM
# `test_ppo_warnings` expects this name in a warning
ALGORITHM.__name__ = "PPO"

#: Tests about clipping itself: they pass, or look for, a `clip_range`
ABOUT_CLIPPING = {"test_save_load_backward_compatible", "test_save_load_clip_range_portable"}

#: Looks for a pickle within the file, of which ours has none
ABOUT_PICKLES = {"test_load_invalid_object"}


def _exercises_ppo(item: pytest.Function) -> bool:
    """Whether a test runs the algorithm: by its parameters, or else by its source."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    algorithms = [p for p in parameters if isinstance(p, type) and issubclass(p, BaseAlgorithm)]
    return ALGORITHM in algorithms if algorithms else "PPO" in inspect.getsource(item.function)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    selected = [item for item in items if _exercises_ppo(item) and item.originalname not in ABOUT_CLIPPING | ABOUT_PICKLES]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
