"""Callbacks that the algorithms put before and behind the user's."""

from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback


class AdvantageSnapshot(BaseCallback):
    """
    Remembers the advantages of a rollout before other callbacks see it: what one of them sets in its ``_on_rollout_end``
    (https://github.com/DLR-RM/stable-baselines3/pull/2000) is not to be computed anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrays: tuple[np.ndarray, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # It belongs to the model, and is copied with it: unlike the variables of a training, which SB3 leaves in callbacks
        return {**vars(self), "locals": {}, "globals": {}}

    def _on_rollout_end(self) -> None:
        self.arrays = tuple(array.copy() for array in self._current())

    def changed(self) -> bool:
        """:return: Whether advantages or returns of the rollout have changed since"""
        return not all(map(np.array_equal, self.arrays, self._current()))

    def _current(self) -> tuple[np.ndarray, np.ndarray]:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        return buffer.advantages, buffer.returns

    def _on_step(self) -> bool:
        return True


class AfterRolloutStart:
    """
    A callback with something to do after its ``on_rollout_start``, before the first step.

    :param callback: The callback
    :param action: What is to be done
    """

    def __init__(self, callback: BaseCallback, action: Callable[[], None]) -> None:
        self.callback, self.action = callback, action

    def on_rollout_start(self) -> None:
        self.callback.on_rollout_start()
        self.action()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)
