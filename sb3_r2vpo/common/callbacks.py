"""Callbacks that the algorithms put before and behind the user's."""

from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_r2vpo.common.checks import check_positive


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


class DropNonFiniteMinibatches(BaseCallback):
    """
    Leaves out minibatches whose gradient is NaN or infinite, and counts them as ``train/dropped_minibatches``, for as long as
    one ``learn`` takes. Without this callback, ``learn`` ends with an error after the first update that has one.

    No step is made on such a minibatch in either case: weights, the optimizer's state and the multiplier are as if it had not
    been drawn. It takes no part in the logged statistics.

    :param max_share: The largest share of an update's minibatches that may be left out: more of them is no accident. 0.1 by
        default.
    :raises ValueError: ``max_share`` is not above 0 and below 1.
    """

    def __init__(self, max_share: float = 0.1) -> None:
        super().__init__()
        self.max_share = check_positive("max_share", max_share)
        if max_share >= 1:
            raise ValueError(f"`max_share` is {max_share}; it must be below 1, as something has to be left to train on.")

    def _on_training_start(self) -> None:
        self.model._droppable_share = self.max_share  # type: ignore[attr-defined]

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
