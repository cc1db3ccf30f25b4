"""Checkpoints of language-model training from which it goes on exactly: bit by bit as if it had not been interrupted."""

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_r2vpo.llm.token_vec_env import TokenVecEnv
from sb3_r2vpo.r2vpo import R2VPO
from sb3_r2vpo.r2vpo_off import R2VPOOff

AlgorithmT = TypeVar("AlgorithmT", bound=R2VPO)


def save_checkpoint(model: R2VPO, folder: Path) -> None:
    """
    Save a model between two rollouts, with all that its next steps depend on: replay, random generators, environments.

    The folder appears complete or not at all: it is written beside its place, and then renamed.

    :param model: A model whose environments are a ``TokenVecEnv``
    :param folder: Where to save; replaced if it exists
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save(partial / "model.zip")
    if isinstance(model, R2VPOOff):
        model.save_replay_buffer(partial / "replay_buffer.pkl")
    state = {
        "env": model.get_env().get_state(),  # type: ignore[union-attr]
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
    }
    with (partial / "state.pkl").open("wb") as file:
        pickle.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_checkpoint(algorithm: type[AlgorithmT], folder: Path, env: TokenVecEnv, **kwargs: Any) -> AlgorithmT:
    """
    Load what :func:`save_checkpoint` saved. Its files can run code, as SB3's own: load only what you trust.

    :param algorithm: The algorithm's class
    :param folder: The checkpoint
    :param env: Environments with the same arguments as those of the training
    :param kwargs: Arguments of ``load``, such as ``device``
    :return: The model; go on with ``learn(..., reset_num_timesteps=False)``
    """
    model = algorithm.load(folder / "model.zip", env=env, force_reset=False, **kwargs)
    if isinstance(model, R2VPOOff):
        model.load_replay_buffer(folder / "replay_buffer.pkl")
    with (folder / "state.pkl").open("rb") as file:
        state = pickle.load(file)
    env.set_state(state["env"])
    # `load` has seeded all generators: these last
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"]:
        th.cuda.set_rng_state_all(state["cuda"])
    return model


def list_checkpoints(folder: Path) -> list[Path]:
    """
    :param folder: Where :class:`CheckpointCallback` saves
    :return: Its complete checkpoints, the oldest first
    """
    numbers = {path: path.name.removeprefix("checkpoint_") for path in folder.glob("checkpoint_*")}
    return sorted((path for path, number in numbers.items() if number.isdigit()), key=lambda path: int(numbers[path]))


class CheckpointCallback(BaseCallback):
    """
    Save a checkpoint every ``save_freq`` rollouts, before a rollout begins.

    :param folder: Where to save ``checkpoint_<responses>``
    :param save_freq: Rollouts between two checkpoints
    :param keep: How many to keep, the newest ones
    """

    def __init__(self, folder: Path, save_freq: int, keep: int = 2) -> None:
        super().__init__()
        self.folder = folder
        self.save_freq = save_freq
        self.keep = keep

    def _on_rollout_start(self) -> None:
        rollout_size = self.model.n_steps * self.training_env.num_envs  # type: ignore[attr-defined]
        n_rollouts = self.model.num_timesteps // rollout_size
        if n_rollouts == 0 or n_rollouts % self.save_freq:
            return
        save_checkpoint(self.model, self.folder / f"checkpoint_{self.model.num_timesteps}")  # type: ignore[arg-type]
        for path in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(path)

    def _on_step(self) -> bool:
        return True
