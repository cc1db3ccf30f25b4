"""Which classes and functions a file may name: what a file says must be unable to run code that it has chosen itself."""

import importlib
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

#: Whose modules may be imported because a file names one of their classes. All of them only define things.
PACKAGES = ("stable_baselines3", "sb3_contrib", "sb3_r2vpo")

#: Which classes of these packages a file may name: those that an argument of an algorithm may be, not algorithms themselves,
#: as these make environments from strings
KINDS = (BasePolicy, BaseFeaturesExtractor, BaseBuffer, Distribution, spaces.Space, th.optim.Optimizer)

#: Which single classes and functions it may name besides. Schedules are called later, with a number: each is without effects.
SINGLE = {
    "stable_baselines3.common.utils:FloatSchedule",
    "stable_baselines3.common.utils:LinearSchedule",
    "stable_baselines3.common.utils:ConstantSchedule",
    "rl_zoo3.utils:SimpleLinearSchedule",
    "stable_baselines3.common.running_mean_std:RunningMeanStd",
    "stable_baselines3.common.vec_env.vec_normalize:VecNormalize",
    "sb3_contrib.common.recurrent.type_aliases:RNNStates",
    "sb3_r2vpo.common.encoding:TabulatedSchedule",
    "sb3_r2vpo.common.rollout:Rollout",
    "sb3_r2vpo.common.rollout:RolloutReplayBuffer",
    "sb3_r2vpo.common.rollout:Timeouts",
    "sb3_r2vpo.core.batch:token_mean",
    "sb3_r2vpo.core.batch:sequence_mean",
    "sb3_r2vpo.core.batch:constant_length_mean",
    "torch.nn.modules.linear:Identity",
    "builtins:bool",
    "builtins:int",
    "builtins:float",
    "builtins:str",
}

_allowed: dict[str, Any] = {}


class UntrustedError(ValueError):
    """A file names a class or function that is not on the list of those that files may name."""


def name_of(thing: Any) -> str:
    """
    :param thing: A class or function
    :return: The name that files have for it, ``module:qualified_name``
    """
    return f"{thing.__module__}:{thing.__qualname__}"


def allow(*things: Any) -> Any:
    """
    Let files name your own classes and functions, such as a policy, a features extractor or a schedule: loading takes them
    from here, and never imports what a file asks for. To be called before loading, or as a decorator.

    By default a file may name the policies, features extractors, buffers and distributions of SB3, sb3-contrib and this
    package, their schedules, Gymnasium's spaces, PyTorch's activations and optimizers, and NumPy's types; nothing else.
    Example::

        @allow
        class MyExtractor(BaseFeaturesExtractor):
            ...

    :param things: Classes, whose instances a file may then hold, or functions. What they do when they are called, with
        arguments that the file may choose, is up to you.
    :return: The one that was given, or all of them
    :raises ValueError: One of them has no name of its own, as a lambda or an instance.
    """
    for thing in things:
        if "<lambda>" in getattr(thing, "__qualname__", "<lambda>") or not getattr(thing, "__module__", None):
            raise ValueError(f"`allow` takes classes and functions with a name of their own, not {thing!r}.")
    _allowed.update({name_of(thing): thing for thing in things})
    return things[0] if len(things) == 1 else things


def find(name: str, trust: bool = False) -> Any:
    """
    :param name: As :func:`name_of` writes it
    :param trust: Whether to import whatever is named
    :return: The class or function
    :raises UntrustedError: It is not on the list.
    :raises ValueError: It does not exist.
    """
    if name in _allowed:
        return _allowed[name]
    module_name, _, qualified_name = name.partition(":")
    if trust:
        try:
            thing: Any = importlib.import_module(module_name)
            for part in qualified_name.split("."):
                thing = getattr(thing, part)
            return thing
        except (ImportError, AttributeError) as error:
            raise ValueError(f"The file names `{module_name}.{qualified_name}`, which can't be imported: {error}.") from error
    if _may_be_imported(module_name) or name in SINGLE:
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"The file names `{module_name}.{qualified_name}`, which can't be imported: {error}.") from error
    # Not `getattr`, as modules may run code there; and no dotted names, which would lead from one module into another
    thing = vars(sys.modules[module_name]).get(qualified_name) if module_name in sys.modules else None
    if thing is None or not is_listed(thing) or name_of(thing) != name:
        raise UntrustedError(
            f"The file names `{module_name}.{qualified_name}`, which is not among the classes and functions that files may "
            f"name by default. If it is yours, call `sb3_r2vpo.allow({qualified_name})` before loading; if you trust whoever "
            "made the file, load it with `trust=True`, which imports what the file names and may run any code."
        )
    return thing


def _may_be_imported(module_name: str) -> bool:
    parts = module_name.split(".")
    return parts[0] in PACKAGES and "__main__" not in parts


def is_listed(thing: Any) -> bool:
    """
    :param thing: A class or function
    :return: Whether a file may name it
    """
    module_name = getattr(thing, "__module__", None) or ""
    name = f"{module_name}:{getattr(thing, '__qualname__', '')}"
    if name in SINGLE or _allowed.get(name) is thing:
        return True
    if not isinstance(thing, type):
        return False
    if module_name.partition(".")[0] in PACKAGES:
        return issubclass(thing, KINDS)
    return (
        (issubclass(thing, spaces.Space) and module_name.startswith("gymnasium.spaces"))
        or (issubclass(thing, th.optim.Optimizer) and module_name.startswith("torch.optim."))
        or (issubclass(thing, th.nn.Module) and module_name == "torch.nn.modules.activation")
        or (issubclass(thing, np.generic) and module_name == "numpy")
    )


def may_be_stored(thing: Any) -> bool:
    """
    :param thing: A class
    :return: Whether a file may hold an instance of it, given by its attributes. Not of policies and optimizers, whose tensors
        are stored.
    """
    if thing in _allowed.values():
        return True
    return isinstance(thing, type) and is_listed(thing) and not issubclass(thing, _ONLY_NAMED)


_ONLY_NAMED = (th.nn.Module, th.optim.Optimizer, Distribution, np.generic, bool, int, float, str)


#: Options of Transformers and peft that import or download code; `attn_implementation` does with the name of a repository
_CODE_OPTIONS = ("trust_remote_code", "use_kernels", "megatron_core", "auto_mapping")


def refuse_code(value: Any, seen: set[int] | None = None) -> None:
    """
    Options by which a language model would bring code with it.

    :param value: Attributes of a model, or its configuration
    :param seen: Objects that need not be looked into again
    :raises UntrustedError: One is set, somewhere in it.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            if (key in _CODE_OPTIONS and item) or ("attn_implementation" in str(key) and "/" in str(item)):
                raise UntrustedError(
                    f"The file asks for a language model that brings its own code with it: it sets `{key}`. Load it with "
                    "`trust=True` if you trust whoever made it, or pass `custom_objects={'policy_kwargs': ...}`."
                )
            refuse_code(item, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            refuse_code(item, seen)
    elif not isinstance(value, type | th.nn.Module):
        refuse_code(getattr(value, "__dict__", None), seen)
