"""The reading half of :mod:`~sb3_r2vpo.common.serialization`."""

import base64
import math
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch as th

from sb3_r2vpo.common.allowed import UntrustedError, find, may_be_stored, refuse_code
from sb3_r2vpo.common.encoding import TabulatedSchedule, dtype_from_json
from sb3_r2vpo.common.random_state import bit_generator, random_state, seed_sequence


class LostError(ValueError):
    """A file should hold a function that could not be written, such as a lambda."""


class Decoder:
    """
    Reads one value.

    :param tensors: Those that it refers to
    :param trust: Whether to import whatever it names
    """

    def __init__(self, tensors: dict[str, th.Tensor], trust: bool) -> None:
        self.tensors = tensors
        self.trust = trust
        # By name of the tensor: what was one object is one again
        self.made: dict[str, Any] = {}

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            ((kind, content),) = node.items()
            if kind.startswith("$"):
                return _READERS[kind](self, content)
        return {key: self.decode(item) for key, item in node.items()}

    def _pairs(self, pairs: Any) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(item)) for key, item in pairs]

    def _ordered_dict(self, content: Any) -> OrderedDict[Any, Any]:
        value = OrderedDict(self._pairs(content[0]))
        vars(value).update(self.decode(content[1]))
        return value

    def _once(self, content: Any, make: Callable[[Any], Any]) -> Any:
        name = content["tensor"]
        if name not in self.made:
            self.made[name] = make(content)
        return self.made[name]

    def _array(self, content: Any) -> np.ndarray:
        dtype, shape = dtype_from_json(content["dtype"]), tuple(content["shape"])
        flat = self.tensors[content["tensor"]].numpy().reshape(-1)
        size = math.prod(shape)
        if flat.dtype != dtype:
            flat = np.ndarray((size,), dtype, buffer=flat)
        return flat.reshape(shape).transpose(np.argsort(content["order"]))

    def _scalar(self, content: Any) -> Any:
        return np.ndarray((), dtype_from_json(content[0]), base64.b64decode(content[1]) or bytes(1))[()]

    def _tensor(self, content: Any) -> th.Tensor:
        tensor, dtype = self.tensors[content["tensor"]], _torch_dtype(content["dtype"])
        if tensor.dtype != dtype:
            tensor = tensor.view(dtype)
        return tensor.reshape(content["shape"]).permute(np.argsort(content["order"]).tolist())

    def _name(self, content: Any) -> Any:
        return find(content, self.trust)

    def _lost(self, content: Any) -> Any:
        raise LostError(f"{content} was there when the file was saved; it has no name to find it by, and was not written.")

    def _tabulated(self, content: Any) -> TabulatedSchedule:
        name, values = content[0], self.decode(content[1])
        if not (values.ndim == 1 and len(values) > 1 and values.dtype == np.float64):
            raise ValueError("the values of a schedule are none")
        warnings.warn(
            f"The file holds {len(values)} values of the schedule {name}, which could not be written itself: it goes on "
            "along straight lines between them. For exact values pass it again, as in `load(path, learning_rate=...)`.",
            stacklevel=2,
        )
        return TabulatedSchedule(name, values)

    def _partial(self, content: Any) -> Any:
        function, args, keywords = map(self.decode, content)
        # What names a class, and what calls it, are not the same
        if not (self.trust or isinstance(function, FunctionType)):
            raise UntrustedError(f"The file has a partial call of {function!r}: load it with `trust=True` if you trust it.")
        return partial(function, *args, **keywords)

    def _class(self, name: str) -> Any:
        cls = find(name, self.trust)
        if not (self.trust or may_be_stored(cls)):
            raise UntrustedError(
                f"The file holds an instance of `{name.replace(':', '.')}`, which files may name only. Load it with "
                "`trust=True` if you trust whoever made it."
            )
        return cls

    def _named(self, content: Any) -> Any:
        cls = self._class(content[0])
        return cls._make(self.decode(content[1]))

    def _object(self, content: Any) -> Any:
        cls, state = self._class(content[0]), self.decode(content[1])
        value = cls.__new__(cls)
        if hasattr(value, "__setstate__"):
            value.__setstate__(state)
            return value
        attributes, slots = state if isinstance(state, tuple) else (state, None)
        vars(value).update(attributes or {})
        for name, item in (slots or {}).items():
            object.__setattr__(value, name, item)
        return value


def _torch_dtype(name: str) -> th.dtype:
    dtype = vars(th)[name]
    if not isinstance(dtype, th.dtype):
        raise ValueError(f"{name} is no type of tensors")
    return dtype


def _causal_lm(decoder: Decoder, content: Any) -> Any:
    """A language model with random weights, for a policy to load its own into."""
    import transformers

    settings = decoder.decode(content)
    if not decoder.trust:
        # Code of the hub
        settings.pop("auto_map", None)
        refuse_code(settings)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def _random(decoder: Decoder, content: Any) -> random.Random:
    generator = random.Random()
    generator.setstate(decoder.decode(content))
    return generator


_READERS: dict[str, Callable[[Decoder, Any], Any]] = {
    "$int": lambda decoder, content: int(content, 16),
    "$float": lambda decoder, content: float(content),
    "$complex": lambda decoder, content: complex(*decoder.decode(content)),
    "$bytes": lambda decoder, content: base64.b64decode(content, validate=True),
    "$bytearray": lambda decoder, content: bytearray(base64.b64decode(content, validate=True)),
    "$tuple": lambda decoder, content: tuple(decoder.decode(content)),
    "$set": lambda decoder, content: set(decoder.decode(content)),
    "$frozenset": lambda decoder, content: frozenset(decoder.decode(content)),
    "$dict": lambda decoder, content: dict(decoder._pairs(content)),
    "$ordered": Decoder._ordered_dict,
    "$deque": lambda decoder, content: deque(decoder.decode(content[0]), maxlen=content[1]),
    "$size": lambda decoder, content: th.Size(content),
    "$device": lambda decoder, content: th.device(content),
    "$torch_dtype": lambda decoder, content: _torch_dtype(content),
    "$dtype": lambda decoder, content: dtype_from_json(content),
    "$generator": lambda decoder, content: np.random.Generator(decoder.decode(content)),
    "$bits": lambda decoder, content: bit_generator(*decoder.decode(content)),
    "$seeds": lambda decoder, content: seed_sequence(decoder.decode(content)),
    "$random_state": lambda decoder, content: random_state(decoder.decode(content)),
    "$random": _random,
    "$causal_lm": _causal_lm,
    "$path": lambda decoder, content: Path(content),
    "$scalar": Decoder._scalar,
    "$array": lambda decoder, content: decoder._once(content, decoder._array),
    "$tensor": lambda decoder, content: decoder._once(content, decoder._tensor),
    "$name": Decoder._name,
    "$lost": Decoder._lost,
    "$tabulated": Decoder._tabulated,
    "$partial": Decoder._partial,
    "$named": Decoder._named,
    "$object": Decoder._object,
}
