"""Files that belong to a saved model: the statistics and the replay buffer of the very moment when it was saved."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import rl_zoo3.enjoy
import rl_zoo3.utils
from stable_baselines3.common.vec_env import VecEnv


def find_companion(model_path: str, kind: str) -> Path | None:
    """
    The file saved together with a best model or a checkpoint.

    The Zoo knows one such file a run, ``<env>/vecnormalize.pkl``, which ends up with the statistics of the last step: those of
    an earlier model were other ones.

    :param model_path: ``best_model.zip``, or ``rl_model_<steps>_steps.zip`` as SB3's ``CheckpointCallback`` names it
    :param kind: ``vecnormalize`` or ``replay_buffer``
    :return: The file, or None where there is none, as for the final model
    """
    path = Path(model_path)
    if path.stem == "best_model":
        companion = path.parent / "best_model" / f"{kind}.pkl"
    else:
        companion = path.with_name(f"{path.stem.replace('rl_model_', f'rl_model_{kind}_')}.pkl")
    return companion if companion.is_file() else None


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """
    Give a module other attributes for a while.

    :param module: The module
    :param attributes: By the names of attributes that it has
    """
    originals = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(originals)


@contextmanager
def matching_statistics() -> Iterator[None]:
    """Make the Zoo's ``enjoy`` and ``record_video`` run a best model or a checkpoint with its own statistics."""
    zoo_get_model_path, zoo_create_test_env = rl_zoo3.utils.get_model_path, rl_zoo3.utils.create_test_env
    model_path = ""

    def get_model_path(*args: Any, **kwargs: Any) -> tuple[str, str, str]:
        nonlocal model_path
        name_prefix, model_path, log_path = zoo_get_model_path(*args, **kwargs)
        return name_prefix, model_path, log_path

    def create_test_env(env_id: str, *, stats_path: str | None, **kwargs: Any) -> VecEnv:
        statistics = find_companion(model_path, "vecnormalize")
        with TemporaryDirectory() as folder:
            if statistics is not None:
                # The Zoo looks for a file of this name in a folder that it is given
                shutil.copy(statistics, Path(folder) / "vecnormalize.pkl")
                stats_path = folder
            return zoo_create_test_env(env_id, stats_path=stats_path, **kwargs)

    with ExitStack() as stack:
        # `enjoy` has imported the functions by name, `record_video` will
        for module in (rl_zoo3.enjoy, rl_zoo3.utils):
            stack.enter_context(replaced(module, get_model_path=get_model_path, create_test_env=create_test_env))
        yield
