"""
Saving and loading: the model, the replay of rollouts, and the statistics of ``VecNormalize``.

Files are archives of JSON and tensors, see :mod:`~sb3_r2vpo.common.archive`: none can run code when it is loaded, damage is
noticed, and a save that fails leaves the older file as it was. Files of SB3 are read as well, as far as they hold nothing but
such values; ``trust=True`` reads whatever they hold, and runs the code in it.
"""

import inspect
import os
import shutil
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import recursive_setattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info

from sb3_r2vpo.common.allowed import UntrustedError, refuse_code
from sb3_r2vpo.common.archive import PathOrFile, describe, write_archive, written_atomically
from sb3_r2vpo.common.model_file import SavedModel, read_model, refuse_unread
from sb3_r2vpo.common.normalization import load_normalization, save_normalization
from sb3_r2vpo.common.replay_file import fitting, read_replay
from sb3_r2vpo.common.rollout import RolloutReplayBuffer

__all__ = ["ReplaySaving", "load_normalization", "replace_by_copy", "save_normalization"]

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="ReplaySaving")


class ReplaySaving(BaseAlgorithm):
    """What an algorithm with a multiplier and a replay of rollouts saves and loads."""

    replay_buffer: RolloutReplayBuffer | None
    replay_capacity: int

    def _excluded_save_params(self) -> list[str]:
        # Made anew by `_setup_model`
        made = ["policy_loss", "critic", "noise", "_timeouts", "_snapshot", "_made"]
        return [*super()._excluded_save_params(), *made]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "policy_loss.multiplier"], tensors

    def save(self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save all the attributes of the object and the model parameters in one file: as JSON and safetensors, with checksums,
        complete or not at all.

        Your own classes and functions are saved by name, see :func:`sb3_r2vpo.allow` for loading them. A function without a
        name of its own, such as ``learning_rate=lambda p: 3e-4 * p``, can't be: of a schedule, 1001 values are saved, between
        which the loaded one is linear; anything else has to be given again to :meth:`load`. Both with a warning.

        A critic that is optimised separately takes its rollouts with it; those of a replay are saved by
        :meth:`save_replay_buffer`.

        :param path: path to the file where the rl agent should be saved; ".zip" is added to one without a suffix
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises ValueError: An attribute can't be written; the message names it, and an older file is as before.
        :raises OSError: The disk is full, for instance; an older file is as before.
        """
        write_archive(path, self.sections(exclude, include), suffix="zip")

    def sections(self, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> dict[str, Any]:
        """
        :param exclude: see :meth:`save`
        :param include: see :meth:`save`
        :return: What :meth:`save` writes, by the name of the file's section
        """
        exclude, include = set(exclude or ()), set(include or ())
        names, variable_names = self._get_torch_save_params()
        # Of the learning rate's schedule, the argument is enough
        excluded = (exclude | {*self._excluded_save_params(), "lr_schedule"}) - include
        excluded |= {name.split(".")[0] for name in (*names, *variable_names)}
        variant = _variant(type(self)).__name__
        sections: dict[str, Any] = {
            "about": {
                "saved_by": type(self).__name__,
                "variant": variant,
                "system_info": get_system_info(print_info=False)[1],
            },
            "data": {name: value for name, value in vars(self).items() if name not in excluded},
            "parameters": self.get_parameters(),
            "variables": {name: reduce(getattr, name.split("."), self) for name in variable_names},
        }
        if self.replay_buffer is not None and self.replay_capacity == 1 and "replay_buffer" not in exclude:
            sections["rollouts"] = list(self.replay_buffer.rollouts)
        return sections

    def export_sb3(self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save a zip as SB3 writes them, with pickles in it, for tools that read those. :meth:`load` reads it, too.

        :param path: see :meth:`save`; an older file stays if this fails
        :param exclude: see :meth:`save`
        :param include: see :meth:`save`
        """
        with written_atomically(path, "zip") as file:
            super().save(file, exclude, include)  # type: ignore[arg-type]

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """
        Save the rollouts that are kept after their own update, for replay or for the critic, complete or not at all.

        :param path: Path to the file where the replay buffer should be saved.
            if path is a str or pathlib.Path, the path is automatically created if necessary; ".pkl" is added to one without a
            suffix, as SB3 does, though the file is no pickle.
        :raises ValueError: No rollouts are kept.
        """
        if self.replay_buffer is None:
            raise ValueError(f"This {type(self).__name__} keeps no rollouts after their own update: there is nothing to save.")
        write_archive(path, {"replay_buffer": self.replay_buffer}, suffix="pkl")

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True, trust: bool = False) -> None:
        """
        Load a replay buffer, also from a pickle of an earlier version, which has no checksums.

        :param path: Path to the replay buffer. If it holds more rollouts than this model keeps, the newest stay.
        :param truncate_last_traj: For compatibility with SB3's off-policy algorithms; stored rollouts are always whole.
        :param trust: see :meth:`load`
        :raises ValueError: The file holds something else, or rollouts of other spaces, or this model keeps no rollouts; the
            buffer is as before.
        :raises CorruptFileError: The file is damaged.
        :raises UntrustedError: It names a class that is not on the list.
        """
        if self.replay_buffer is None:
            raise ValueError(f"This {type(self).__name__} keeps no rollouts after their own update: it can't load any.")
        rollouts = fitting(read_replay(path, trust), self, describe(path))
        self.replay_buffer = RolloutReplayBuffer(self.replay_buffer.capacity, rollouts)

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto", trust: bool = False
    ) -> None:
        """
        Load parameters from a given file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: Location of the saved data (path or file-like, see :meth:`save`), or a nested dictionary as
            of ``get_parameters``
        :param exact_match: If True, the given parameters should include parameters for each
            module and each of their parameters, otherwise raises an Exception. If set to False, this
            can be used to update only specific parameters.
        :param device: Device on which the code should run.
        :param trust: see :meth:`load`
        """
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = read_model(load_path_or_dict, trust=trust, with_data=False).parameters
        super().set_parameters(load_path_or_dict, exact_match, device)

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: PathOrFile,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust: bool = False,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """
        Load the model from a file of :meth:`save`, or a zip of SB3's code (:meth:`export_sb3`, earlier versions).
        Warning: ``load`` re-creates the model from scratch, it does not update it in-place!
        For an in-place load use ``set_parameters`` instead.

        Loading runs no code that the file chooses. It may name the classes of SB3, sb3-contrib and this package, and yours if
        you have called :func:`sb3_r2vpo.allow` for them; anything else is refused, unless it is replaced by an argument.

        A file loads with the class that saved it, or a subclass of your own of that class. ``R2VPOOff`` goes on from a file of
        ``R2VPO``, with or without masks, where one of its own arguments says so, such as ``replay_capacity=2``; the other one
        then has its default.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on
            (can be None if you only need prediction from a trained model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace
            upon loading. If a variable is present in this dictionary as a
            key, it will not be deserialized and the corresponding item
            will be used instead.
        :param print_system_info: Whether to print system info from the saved model
            and the current system info (useful to debug loading issues)
        :param force_reset: Force call to ``reset()`` before training
            to avoid unexpected behavior.
            See https://github.com/DLR-RM/stable-baselines3/issues/597
        :param trust: Whether to import, unpickle and call whatever the file asks for, which may run any code: only for files
            whose maker you trust
        :param kwargs: Arguments of the constructor to change them on loading. An adaptive multiplier goes on from its saved
            value; ``var_coef=0.3`` fixes it.
        :return: new model instance with loaded parameters
        :raises ValueError: An argument is unknown, the file was saved by another algorithm, or a function that could not be
            saved, such as a lambda, is not given again.
        :raises CorruptFileError: The file is damaged, or another one.
        :raises UntrustedError: The file names a class or function that is not on the list.
        """
        known = {name for base in cls.__mro__ if issubclass(base, ReplaySaving) for name in _arguments(base)}
        if unknown := set(kwargs) - known:
            raise ValueError(
                f"Unknown arguments {sorted(unknown)} for {cls.__name__}.load(); see the arguments of {cls.__name__}()."
            )
        if custom_objects is not None and not isinstance(custom_objects, dict):
            raise ValueError("custom_objects argument must be a dict or None")
        custom_objects = custom_objects or {}
        # Given policy_kwargs are compared with the stored ones; a given environment has priority over a stored one
        replaced = (kwargs.keys() - {"policy_kwargs"}) | custom_objects.keys() | ({"env"} if env is not None else set())
        saved = read_model(path, replaced, trust)
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
            print("== SAVED MODEL SYSTEM INFO ==")
            print(saved.system_info)
        # One that could not be read is replaced without being compared
        if "policy_kwargs" in kwargs and saved.unread.pop("policy_kwargs", None) is not None:
            saved.data["policy_kwargs"] = kwargs["policy_kwargs"]
        refuse_unread(cls.__name__, saved.unread)
        if not trust:
            refuse_code(saved.data)
            if saved.data.get("env") is not None:
                raise UntrustedError(f"{describe(path)} brings an environment: load it with `trust=True` if you trust it.")
        data = saved.data | {name: custom_objects[name] for name in saved.names & custom_objects.keys()}
        _check_saved_by(cls, saved, data, {*kwargs, *custom_objects}, describe(path))
        return cls._from(saved, data, env, device, force_reset, kwargs, describe(path))

    @classmethod
    def _from(
        cls: type[SelfAlgorithm],
        saved: SavedModel,
        data: dict[str, Any],
        env: GymEnv | None,
        device: th.device | str,
        force_reset: bool,
        kwargs: dict[str, Any],
        where: str,
    ) -> SelfAlgorithm:
        """The second half of ``BaseAlgorithm.load``, but for models of SB3 before 1.7."""
        data.get("policy_kwargs", {}).pop("device", None)
        if "policy_kwargs" in kwargs and kwargs["policy_kwargs"] != data["policy_kwargs"]:
            raise ValueError(
                f"The specified policy kwargs do not equal the stored policy kwargs."
                f"Stored kwargs: {data['policy_kwargs']}, specified kwargs: {kwargs['policy_kwargs']}"
            )
        if "observation_space" not in data or "action_space" not in data:
            raise KeyError("The observation_space and action_space were not given, can't verify new environments")
        if env is not None:
            # Wrap first if needed
            env = cls._wrap_env(env, kwargs.get("verbose", data.get("verbose", 0)))
            # Check if given env is valid
            check_for_correct_spaces(env, data["observation_space"], data["action_space"])
            # Discard `_last_obs`, this will force the env to reset before training
            # See issue https://github.com/DLR-RM/stable-baselines3/issues/597
            if force_reset:
                data["_last_obs"] = None
            # `n_envs` must be updated. See issue https://github.com/DLR-RM/stable-baselines3/issues/1018
            data["n_envs"] = env.num_envs
        else:
            env = data.get("env")
        model = cls(policy=data["policy_class"], env=env, device=device, _init_setup_model=False)  # type: ignore[call-arg]
        vars(model).update(data)
        vars(model).update(kwargs)
        model._setup_model()
        model.set_parameters(saved.parameters, exact_match=True, device=device)
        for name, value in saved.variables.items():
            if value is not None:
                recursive_setattr(model, f"{name}.data", value.data.to(model.device))
        if model.replay_buffer is not None and model.replay_capacity == 1:
            model.replay_buffer = RolloutReplayBuffer(model.replay_buffer.capacity, fitting(saved.rollouts, model, where))
        # Sample gSDE exploration matrix, so it uses the right device
        # see issue #44
        if model.use_sde:
            model.policy.reset_noise()  # type: ignore[operator]
        return model


def _variant(cls: type) -> type:
    """The class of this package that a class is or inherits from."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("sb3_r2vpo."))


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class's own constructor."""
    if "__init__" not in vars(cls):
        return {}
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _check_saved_by(cls: type, saved: SavedModel, data: dict[str, Any], given: set[str], where: str) -> None:
    """
    :raises ValueError: Another algorithm saved the file, unless it is one with a ``clip_range``, for which there is a sentence
        of its own.
    """
    variant = _variant(cls)
    if "clip_range" in data:
        return
    if "var_coef" not in data and "var_coef" not in given:
        raise ValueError(f"{where} was saved by another algorithm than those of sb3_r2vpo: it has no `var_coef`.")
    if saved.variant == variant.__name__ and saved.saved_by in {base.__name__ for base in cls.__mro__}:
        return
    if f"{saved.variant}Off" == variant.__name__ and saved.saved_by == saved.variant:
        parameters = inspect.signature(variant.__init__).parameters  # type: ignore[misc]
        own = {name: parameters[name].default for name in ("replay_capacity", "utd_ratio")}
        if own.keys() & given:
            data.update(own | data)
            return
        raise ValueError(
            f"{where} was saved by {saved.saved_by}: load it with {saved.saved_by}.load(), or go on off-policy by "
            f"{cls.__name__}.load(path, replay_capacity=2)."
        )
    raise ValueError(
        f"{where} was saved by {saved.saved_by}, not by {cls.__name__}: load it with {saved.saved_by}.load(). To go on from "
        "its weights, create a new model and copy them by `new.policy.load_state_dict(old.policy.state_dict())`."
    )


def replace_by_copy(source: Path, target: Path) -> None:
    """
    Give a file a second name, in the place of the file that had it.

    :param source: The file
    :param target: The other name
    :raises OSError: The disk is full, for instance. A file of that name is as before.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        # A file system without links
        shutil.copyfile(source, partial)
    os.replace(partial, target)
