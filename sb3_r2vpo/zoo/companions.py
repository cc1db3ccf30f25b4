"""Files that belong to a saved model: the statistics and the replay buffer of the very moment when it was saved."""

import glob
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rl_zoo3.enjoy
import rl_zoo3.utils
from stable_baselines3.common.vec_env import VecEnv


def find_companion(model_path: str, kind: str, must_exist: bool = True) -> Path | None:
    """
    The file saved together with a best model or a checkpoint.

    The Zoo knows one such file a run, ``<env>/vecnormalize.pkl``, which ends up with the statistics of the last step: those of
    an earlier model were other ones.

    :param model_path: ``best_model.zip``, or ``rl_model_<steps>_steps.zip`` as SB3's ``CheckpointCallback`` names it
    :param kind: ``vecnormalize`` or ``replay_buffer``
    :param must_exist: Whether to return only a file that exists
    :return: The file, or None where there is none, as for the final model
    """
    path = Path(model_path)
    if path.stem == "best_model":
        companion = path.parent / "best_model" / f"{kind}.pkl"
    else:
        companion = path.with_name(f"{path.stem.replace('rl_model_', f'rl_model_{kind}_')}.pkl")
    return companion if companion.is_file() or not must_exist else None


def runs_of(folder: Path, env_name: str) -> list[Path]:
    """
    :param folder: An algorithm's, such as ``logs/r2vpo``
    :param env_name: The environment's name in those of folders
    :return: Its runs, ``<environment>_<number>``, the latest first
    """
    runs = {
        path: path.name.removeprefix(f"{env_name}_") for path in folder.glob(f"{glob.escape(env_name)}_*") if path.is_dir()
    }
    numbered = [path for path, number in runs.items() if number.isdecimal()]
    return sorted(numbered, key=lambda path: int(runs[path]), reverse=True)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """
    Give a module or a class other attributes for a while. A module may get some that hide builtins, such as ``eval``.

    :param owner: The module or class
    :param attributes: By name
    """
    absent = object()
    originals = {name: vars(owner).get(name, absent) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, original in originals.items():
            delattr(owner, name) if original is absent else setattr(owner, name, original)


@contextmanager
def matching_statistics() -> Iterator[None]:
    """
    Make the Zoo's ``enjoy`` and ``record_video`` run a best model or a checkpoint with its own statistics, and take the latest
    run that has a model: one that was killed early has none.
    """
    zoo_get_model_path, zoo_create_test_env = rl_zoo3.utils.get_model_path, rl_zoo3.utils.create_test_env
    model_path = ""

    def get_model_path(exp_id: int, folder: str, algo: str, env_name: str, *args: Any, **kwargs: Any) -> tuple[str, str, str]:
        nonlocal model_path
        if exp_id == 0:
            for run in runs_of(Path(folder, algo), env_name):
                with suppress(ValueError):
                    number = int(run.name.rpartition("_")[2])
                    name_prefix, model_path, log_path = zoo_get_model_path(number, folder, algo, env_name, *args, **kwargs)
                    print(f"Loading latest run with such a model, {run}")
                    return name_prefix, model_path, log_path
        name_prefix, model_path, log_path = zoo_get_model_path(exp_id, folder, algo, env_name, *args, **kwargs)
        return name_prefix, model_path, log_path

    def create_test_env(env_id: str, *, stats_path: str | None, **kwargs: Any) -> VecEnv:
        statistics = find_companion(model_path, "vecnormalize")
        with TemporaryDirectory() as folder:
            if statistics is None and Path(model_path).stem.startswith(("best_model", "rl_model_")) and stats_path is not None:
                # As in the Zoo, whose runs have no others
                if (Path(stats_path) / "vecnormalize.pkl").is_file():
                    print(f"{model_path} has no statistics of its own: it runs with those of the run's end.")
            elif statistics is not None:
                # The Zoo looks for a file of this name in a folder that it is given
                shutil.copy(statistics, Path(folder) / "vecnormalize.pkl")
                stats_path = folder
            return zoo_create_test_env(env_id, stats_path=stats_path, **kwargs)

    with ExitStack() as stack:
        # `enjoy` has imported the functions by name, `record_video` will
        for module in (rl_zoo3.enjoy, rl_zoo3.utils):
            stack.enter_context(replaced(module, get_model_path=get_model_path, create_test_env=create_test_env))
        yield
