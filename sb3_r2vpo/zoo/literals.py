"""What a string of a settings file or a command line stands for: read by a small grammar, where the Zoo evaluates it."""

import argparse
import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from rl_zoo3.utils import StoreDict
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn, optim

from sb3_r2vpo.common.allowed import UntrustedError, find

#: Classes that the Zoo's settings files name
CLASSES: dict[str, Any] = {"HerReplayBuffer": HerReplayBuffer, "RMSpropTFLike": RMSpropTFLike}

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
#: A word that is no Python stands for itself, as in `-params objective:ppo_clip`; `1e6` and `True` are Python
_WORD = re.compile(r"[A-Za-z_][\w./:-]*")


def parse_literal(text: str, *_: Any) -> Any:
    """
    Read a Python expression of data: numbers and arithmetic with them, strings, ``True``, ``False``, ``None``, tuples, lists,
    dicts, ``dict(...)``, and classes that settings have a use for, such as ``nn.Tanh``, ``th.optim.AdamW``,
    ``HerReplayBuffer``. It stands where the Zoo has ``eval``, to which namespaces may be passed.

    :param text: Such as ``dict(net_arch=[256, 256], activation_fn=nn.Tanh)``
    :return: The value
    :raises ValueError: It is something else.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = "it is not a Python expression" if isinstance(error, SyntaxError) else str(error)
        raise ValueError(
            f"{text!r} is not data that settings may hold: {reason}. Write numbers, strings, lists, dicts, `dict(...)`, or "
            "the name of a class such as `nn.Tanh`. If it is yours, `--trust` evaluates it as Python code, as the Zoo does."
        ) from error


def parse_option(text: str) -> Any:
    """
    Read a value of ``-params`` or ``--env-kwargs``: as :func:`parse_literal`, and words that need no quotes, as ``auto_0.5``.

    :param text: What follows the colon
    :return: The value
    :raises ValueError: It is neither.
    """
    is_name = text in ("True", "False", "None") or re.fullmatch(r"(th\.|torch\.)?(nn|optim)\.\w+", text)
    return text if _WORD.fullmatch(text) and not is_name else parse_literal(text)


class StoreLiterals(StoreDict):
    """The Zoo's way to read ``key:value key:value``, by :func:`parse_option`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        options = {}
        for argument in values:
            name, colon, text = argument.partition(":")
            if not colon:
                raise ValueError(f"{option_string} takes name:value, not {argument!r}.")
            options[name] = parse_option(text)
        setattr(namespace, self.dest, options)


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Tuple():
            return tuple(map(_value, node.elts))
        case ast.List():
            return [*map(_value, node.elts)]
        case ast.Dict() if None not in node.keys:
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[arg-type]
        case ast.Call(func=ast.Name(id="dict"), args=[]) if all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() | int() | float())], keywords=[]):
            return float(node.args[0].value)  # type: ignore[attr-defined]
        case ast.UnaryOp():
            return _computed(node.op, _value(node.operand))
        case ast.BinOp():
            return _computed(node.op, _value(node.left), _value(node.right))
        case ast.Name() | ast.Attribute():
            return _named(ast.unparse(node))
    raise ValueError(f"`{ast.unparse(node)}` is not allowed")


def _computed(operation: ast.AST, *numbers: Any) -> Any:
    compute = _OPERATORS.get(type(operation))
    if compute is None or not all(type(number) in (int, float) for number in numbers):
        raise ValueError("only numbers can be computed with, by + - * / // and **")
    # A number such as 9**9**9 would take for ever
    if isinstance(operation, ast.Pow) and not all(abs(number) <= 1024 for number in numbers):
        raise ValueError("the power is too large")
    result = compute(*numbers)
    if isinstance(result, complex) or (isinstance(result, int) and abs(result) > 2**63) or not math.isfinite(result):
        raise ValueError("the number is too large")
    return result


def _named(name: str) -> Any:
    if name in CLASSES:
        return CLASSES[name]
    *parents, attribute = name.split(".")
    path = ".".join(parents).removeprefix("th.").removeprefix("torch.")
    for module, kind in ((nn, nn.Module), (optim, optim.Optimizer)):
        found = vars(module).get(attribute)
        if path == module.__name__.removeprefix("torch.") and isinstance(found, type) and issubclass(found, kind):
            return found
    if path:
        return find_class(name)
    raise ValueError(f"`{name}` is not a name that is known here; a string has quotes")


def find_class(name: str) -> Any:
    """
    A class that a settings file names by its module.

    :param name: Such as ``torch.nn.modules.activation.Tanh``
    :return: The class, if it is one of those that files may name, see :func:`~sb3_r2vpo.common.allowed.allow`
    :raises ValueError: It is not.
    """
    module, _, attribute = name.rpartition(".")
    if module.startswith("torch.nn.") and isinstance(found := vars(nn).get(attribute), type) and found.__module__ == module:
        return found
    try:
        return find(f"{module}:{attribute}")
    except UntrustedError as error:
        raise ValueError(
            f"`{name}` is not among the classes that settings may name. If you trust it, name its package in `--gym-packages`"
        ) from error
