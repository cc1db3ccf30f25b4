"""Saving and loading: the model's own state besides SB3's, and the replay of rollouts."""

import inspect
import io
import pathlib
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from sb3_r2vpo.common.rollout import RolloutReplayBuffer

SelfAlgorithm = TypeVar("SelfAlgorithm", bound=BaseAlgorithm)


class ReplaySaving(BaseAlgorithm):
    """What an algorithm with a multiplier and a replay of rollouts saves and loads."""

    replay_buffer: RolloutReplayBuffer | None

    def _excluded_save_params(self) -> list[str]:
        # Made anew by `_setup_model`
        made = ["policy_loss", "critic", "noise", "_timeouts", "_snapshot", "_made"]
        return [*super()._excluded_save_params(), *made]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "policy_loss.multiplier"], tensors

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the rollouts that are kept after their own update, for replay or for the critic, as a pickle file.

        :param path: Path to the file where the replay buffer should be saved.
            if path is a str or pathlib.Path, the path is automatically created if necessary.
        :raises ValueError: No rollouts are kept.
        """
        if self.replay_buffer is None:
            raise ValueError(f"This {type(self).__name__} keeps no rollouts after their own update: there is nothing to save.")
        save_to_pkl(path, self.replay_buffer, self.verbose)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. Pickle can run code: load only files that you trust.

        :param path: Path to the pickled replay buffer. If it holds more rollouts than this model keeps, the newest stay.
        :param truncate_last_traj: For compatibility with SB3's off-policy algorithms; stored rollouts are always whole.
        :raises ValueError: The file holds something else, or rollouts of other spaces, or this model keeps no rollouts; the
            buffer is as before.
        """
        if self.replay_buffer is None:
            raise ValueError(f"This {type(self).__name__} keeps no rollouts after their own update: it can't load any.")
        loaded = load_from_pkl(path, self.verbose)
        if not isinstance(loaded, RolloutReplayBuffer):
            raise ValueError(
                f"{path} holds a {type(loaded).__name__}, not a RolloutReplayBuffer: "
                f"it was not saved by {type(self).__name__}.save_replay_buffer()."
            )
        replay_buffer = RolloutReplayBuffer(self.replay_buffer.capacity)
        for rollout in loaded.rollouts:
            if (rollout.buffer.observation_space, rollout.buffer.action_space) != (self.observation_space, self.action_space):
                raise ValueError(
                    f"{path} holds rollouts of {rollout.buffer.observation_space} and {rollout.buffer.action_space}, "
                    f"but this model's spaces are {self.observation_space} and {self.action_space}."
                )
            rollout.buffer.device = self.device
            replay_buffer.add(rollout)
        self.replay_buffer = replay_buffer

    @classmethod
    def load(cls: type[SelfAlgorithm], path: Any, *args: Any, **kwargs: Any) -> SelfAlgorithm:
        """
        Load the model from a zip-file, see ``BaseAlgorithm.load``, whose arguments these are.

        :param path: path to the file (or a file-like) where to load the agent from
        :param kwargs: Arguments of ``BaseAlgorithm.load``, or of the constructor to change them on loading. An adaptive
            multiplier goes on from its saved value; ``var_coef=0.3`` fixes it.
        :return: new model instance with loaded parameters
        :raises ValueError: An argument is unknown, or the file was saved by another algorithm.
        """
        functions: list[Any] = [BaseAlgorithm.load]
        functions += [vars(base).get("__init__", BaseAlgorithm.load) for base in cls.__mro__ if issubclass(base, ReplaySaving)]
        known = {name for function in functions for name in inspect.signature(function).parameters} - {"args", "kwargs"}
        if unknown := set(kwargs) - known:
            raise ValueError(
                f"Unknown arguments {sorted(unknown)} for {cls.__name__}.load(); see the arguments of {cls.__name__}()."
            )
        return super().load(path, *args, **kwargs)
