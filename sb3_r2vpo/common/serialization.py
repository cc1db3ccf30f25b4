"""Values as JSON and tensors, and back: without code, so that a file can be loaded wherever it comes from."""

from typing import Any

import torch as th

from sb3_r2vpo.common.allowed import UntrustedError, allow
from sb3_r2vpo.common.decoding import Decoder, LostError
from sb3_r2vpo.common.encoding import Encoder
from sb3_r2vpo.common.unpickling import safe_loads

__all__ = ["LostError", "UntrustedError", "allow", "decode", "encode", "safe_loads"]


def encode(value: Any) -> tuple[Any, dict[str, th.Tensor]]:
    """
    Write a value as JSON and tensors.

    Plain JSON stands for itself; whatever else there is becomes an object with one key, such as ``{"$tuple": [...]}``. Classes
    and functions are written by name. A function that has no name to find it by, such as a lambda, is left out with a warning.
    Instances of classes are written as their attributes.

    :param value: None, numbers, strings, bytes, containers, NumPy's scalars, arrays (of all types but objects) and random
        generators, tensors, spaces, schedules, and instances whose attributes are of these kinds
    :return: What ``json.dumps`` takes, and the tensors that it refers to by name. These may share the value's memory.
    :raises ValueError: A part of it can't be written; the message says where.
    """
    encoder = Encoder()
    try:
        return encoder.encode(value, ""), encoder.tensors
    except RecursionError as error:
        raise ValueError("The value can't be written: its parts are nested too deeply.") from error


def decode(tree: Any, tensors: dict[str, th.Tensor], trust: bool = False) -> Any:
    """
    Read what :func:`encode` has written.

    :param tree: The JSON
    :param tensors: Its tensors, whose memory the value may share
    :param trust: Whether to import whatever classes and functions are named, which may run any code; by default, only those
        on the list, see :func:`~sb3_r2vpo.common.allowed.allow`
    :return: The value
    :raises UntrustedError: A class or function is not on the list.
    :raises LostError: A function in it could not be written.
    :raises ValueError: It was not written by :func:`encode`.
    """
    try:
        return Decoder(tensors, trust).decode(tree)
    except (UntrustedError, LostError):
        raise
    except Exception as error:
        raise ValueError(f"This is not what was once written: {type(error).__name__}: {error}.") from error
