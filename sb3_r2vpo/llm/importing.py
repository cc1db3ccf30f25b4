"""Functions by name, as settings files have them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(name: str, folder: Path | None = None) -> Callable[..., Any]:
    """
    :param name: ``module:function``
    :param folder: Where the module may lie, beside Python's own path
    :return: The function
    :raises ValueError: There is no such module or function, or the name is not of this form.
    """
    module_name, _, function_name = str(name).partition(":")
    if not module_name or not function_name:
        raise ValueError(f"`reward_function` is {name!r}; it must be module:function, such as rewards:correct.")
    path = list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that it imports in turn is another matter
        if error.name not in (module_name, module_name.partition(".")[0]):
            raise
        places = "Python's path" if folder is None else f"{folder.resolve()} and on Python's path"
        raise ValueError(f"`reward_function` is {name!r}, but there is no module {module_name!r} in {places}.") from error
    finally:
        sys.path[:] = path
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"`reward_function` is {name!r}, but {module.__file__} has no function {function_name!r}.")
    return function
