"""Files are data: what the Zoo and SB3 would evaluate, import or unpickle is read by ways that can run nothing."""

import importlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import gymnasium as gym
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.train
import rl_zoo3.utils
import yaml
from stable_baselines3.common import save_util
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, vec_normalize

from sb3_r2vpo.common import allowed
from sb3_r2vpo.common.saving import ReplaySaving, load_normalization
from sb3_r2vpo.common.serialization import safe_loads
from sb3_r2vpo.zoo.companions import replaced
from sb3_r2vpo.zoo.literals import StoreLiterals, find_class, parse_literal

#: Whose wrappers, callbacks and policies settings may name, modules that only define things; `--gym-packages` adds to them.
#: Minigrid's wrappers are in the Zoo's own settings, and the Zoo imports it where it is installed.
PACKAGES = (
    *("gymnasium.wrappers", "stable_baselines3", "sb3_contrib", "sb3_r2vpo", "minigrid.wrappers"),
    *("rl_zoo3.wrappers", "rl_zoo3.callbacks", "rl_zoo3.gym_patches"),
)

#: Settings that name a class of a package, and what it has to be
KINDS: dict[str, type] = {
    "env_wrapper": gym.Wrapper,
    "vec_env_wrapper": VecEnvWrapper,
    "callback": BaseCallback,
    "policy": BasePolicy,
    "replay_buffer_class": BaseBuffer,
    "rollout_buffer_class": BaseBuffer,
}
#: Settings that the Zoo evaluates, and what they may then be
EVALUATED: dict[str, Any] = {
    "normalize": (bool, dict, type(None)),
    "policy_kwargs": (dict, type(None)),
    "monitor_kwargs": (dict, type(None)),
    "replay_buffer_kwargs": (dict, type(None)),
}


class SettingsLoader(yaml.SafeLoader):
    """
    YAML as data, with what the Zoo's ``config.yml`` and ``args.yml`` hold besides: tuples, ordered dicts, and names of classes
    that settings may name.
    """

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        mark = node.start_mark
        raise ValueError(
            f"{mark.name}, line {mark.line + 1}, asks to make an object by `{node.tag}`, which may run any code: settings are "
            "data. If you trust whoever made the file, `--trust` loads it as the Zoo does."
        )

    def _tuple(self, node: Any) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))

    def _ordered_dict(self, node: Any) -> OrderedDict[Any, Any]:
        return OrderedDict(*self.construct_sequence(node, deep=True))

    def _class(self, name: str, node: yaml.Node) -> Any:
        return find_class(name)


SettingsLoader.add_constructor("tag:yaml.org,2002:python/tuple", SettingsLoader._tuple)
SettingsLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", SettingsLoader._ordered_dict)
SettingsLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", SettingsLoader._class)
SettingsLoader.add_constructor(None, SettingsLoader.construct_undefined)


def check_settings(hyperparams: dict[str, Any], packages: Sequence[str] = ()) -> None:
    """
    Refuse settings that would run code: by a string that is no data, or by the name of a class that is not of its kind or of a
    package that nobody has said to trust.

    :param hyperparams: As in a settings file
    :param packages: Trusted besides :data:`PACKAGES`
    :raises ValueError: One of them would; the message names it, and what to do.
    """
    for key, kinds in EVALUATED.items():
        value = hyperparams.get(key)
        value = parse_literal(value) if isinstance(value, str) else value
        if not isinstance(value, kinds):
            raise ValueError(f"`{key}` is {hyperparams[key]!r}; it must be a mapping, such as {{name: value}}.")
    for key, kind in KINDS.items():
        value = hyperparams.get(key)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError(f"`{key}` has {entry!r}, which must be one name with its arguments. Check the indentation.")
            name = next(iter(entry)) if isinstance(entry, dict) else entry
            if isinstance(name, str) and "." in name:
                _check_class(key, kind, name, packages)
            elif key.endswith("_class") and isinstance(name, str):
                parse_literal(name)


def _check_class(key: str, kind: type, name: str, packages: Sequence[str]) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(_import(module, packages, f"`{key}` names `{name}`"), attribute, None)
    if callable(found) and _is_below(module, packages):
        # Code that is trusted: the Zoo takes a function as well
        return
    if not (isinstance(found, type) and issubclass(found, kind) and _is_below(found.__module__, (*PACKAGES, *packages))):
        raise ValueError(f"`{key}` names `{name}`, which is not a {kind.__name__} of {module}.")


def _is_below(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _import(module: str, packages: Sequence[str], what: str) -> Any:
    if not _is_below(module, (*PACKAGES, *packages)) or "__main__" in module.split("."):
        package = module.partition(".")[0]
        raise ValueError(
            f"{what}, and to import a package is to run its code. If you trust it, name it: `--gym-packages {package}`."
        )
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}, which can't be imported: {error}.") from error


@contextmanager
def code_free(trust: bool, packages: Sequence[str] = ()) -> Iterator[None]:
    """
    Read the files of the Zoo and SB3 as data, for a while: settings, models, statistics, replay buffers.

    :param trust: Whether to run any code that a file holds, as the Zoo does
    :param packages: What ``--gym-packages`` names: imported anyway, and free to be named by files
    """

    def load_statistics(load_path: str, venv: VecEnv) -> VecNormalize:
        return load_normalization(load_path, venv, trust)

    if trust:
        load_model, load_replay = ReplaySaving.load.__func__, ReplaySaving.load_replay_buffer  # type: ignore[attr-defined]
        trusting = {
            "load": classmethod(lambda cls, *args, **kwargs: load_model(cls, *args, **{"trust": True, **kwargs})),
            "load_replay_buffer": lambda model, *args, **kwargs: load_replay(model, *args, **{"trust": True, **kwargs}),
        }
        with replaced(VecNormalize, load=staticmethod(load_statistics)), replaced(ReplaySaving, **trusting):
            yield
        return

    zoo_saved_hyperparams = rl_zoo3.utils.get_saved_hyperparams

    def get_saved_hyperparams(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
        hyperparams, stats_path = zoo_saved_hyperparams(*args, **kwargs)
        check_settings(hyperparams, packages)
        return hyperparams, stats_path

    def load(file: io.BufferedIOBase) -> Any:
        return safe_loads(file.read())

    def import_module(name: str, package: str | None = None) -> Any:
        return _import(name, packages, f"The settings name `{name}`")

    roots = tuple(package.partition(".")[0] for package in packages)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(replaced(yaml, UnsafeLoader=SettingsLoader))
        for module in (rl_zoo3.utils, rl_zoo3.exp_manager):
            enter(
                replaced(module, eval=parse_literal, exec=_refuse_code, importlib=SimpleNamespace(import_module=import_module))
            )
        for module in (rl_zoo3.train, rl_zoo3.enjoy, rl_zoo3.utils):
            enter(replaced(module, StoreDict=StoreLiterals))
        for module in (rl_zoo3.enjoy, rl_zoo3.utils):
            enter(replaced(module, get_saved_hyperparams=get_saved_hyperparams))
        # Models of SB3's own algorithms as well
        pickles = SimpleNamespace(**{**vars(save_util.pickle), "load": load, "loads": safe_loads})
        clouds = SimpleNamespace(**{**vars(save_util.cloudpickle), "load": load, "loads": safe_loads})
        enter(replaced(save_util, pickle=pickles, cloudpickle=clouds))
        enter(replaced(vec_normalize, pickle=pickles))
        enter(replaced(VecNormalize, load=staticmethod(load_statistics)))
        enter(replaced(allowed, PACKAGES=(*allowed.PACKAGES, *roots)))
        yield


def _refuse_code(code: str, *_: Any) -> NoReturn:
    raise ValueError(
        "`--conf-file` names a Python program. Settings are data: write them as a YAML file. If you trust it, `--trust` runs "
        "the program, as the Zoo does."
    )
