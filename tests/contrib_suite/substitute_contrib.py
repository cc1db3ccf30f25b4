"""Pytest plugin that puts one of our algorithms in the place of one of sb3-contrib's, in sb3-contrib's own tests."""

import inspect
import os
from importlib import import_module
from typing import Any

import pytest
import sb3_contrib
from stable_baselines3.common.base_class import BaseAlgorithm

#: Such as "MaskablePPO" and "sb3_r2vpo.maskable.MaskableR2VPO"
REPLACED = os.environ["CONTRIB_SUITE_REPLACED"]
MODULE, _, NAME = os.environ["CONTRIB_SUITE_ALGORITHM"].rpartition(".")


class Substitute(getattr(import_module(MODULE), NAME)):
    """The algorithm, but for the clip range that `test_identity` passes."""

    def __init__(self, *args: Any, clip_range: float = 0.2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


# After our own module has taken from sb3-contrib what it needs
setattr(sb3_contrib, REPLACED, Substitute)


def _exercises_it(item: pytest.Function) -> bool:
    """Whether a test runs the algorithm: by its parameters, or else by its source."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    algorithms = [p for p in parameters if isinstance(p, type) and issubclass(p, BaseAlgorithm)]
    return Substitute in algorithms if algorithms else REPLACED in inspect.getsource(item.function)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    selected = [item for item in items if _exercises_it(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
