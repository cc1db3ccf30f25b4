"""The writing half of :mod:`~sb3_r2vpo.common.serialization`."""

import base64
import copyreg
import math
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch as th

from sb3_r2vpo.common.allowed import is_listed, name_of
from sb3_r2vpo.common.random_state import state_of

#: What safetensors holds as it is; other types are stored as bytes
_NATIVE_DTYPES = {
    *(th.float64, th.float32, th.float16, th.bfloat16, th.float8_e4m3fn, th.float8_e5m2, th.complex64, th.bool),
    *(th.int64, th.int32, th.int16, th.int8, th.uint64, th.uint32, th.uint16, th.uint8),
}


def _strides_order(strides: tuple[int, ...]) -> list[int]:
    """The order of dimensions in memory, the slowest first."""
    return sorted(range(len(strides)), key=lambda dimension: -strides[dimension])


class TabulatedSchedule:
    """
    What stands for a schedule that could not be written, such as a lambda: its values, with straight lines between them and
    beyond both ends.

    :param name: Of the schedule
    :param values: At equal distances of the remaining progress, from 0 to 1
    """

    N_VALUES = 1001

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    @classmethod
    def of(cls, function: Callable[[float], float], name: str) -> "TabulatedSchedule | None":
        """
        :param function: A function
        :param name: Its name
        :return: What stands for it; ``None`` if it is no schedule
        """
        try:
            values = np.array([function(progress) for progress in np.linspace(0, 1, cls.N_VALUES).tolist()], dtype=np.float64)
        except Exception:
            return None
        return cls(name, values) if values.shape == (cls.N_VALUES,) else None

    def __call__(self, progress_remaining: float) -> float:
        place = progress_remaining * (len(self.values) - 1)
        left = min(max(int(place), 0), len(self.values) - 2)
        low, high = self.values[left : left + 2].tolist()
        return low + (place - left) * (high - low)

    def __repr__(self) -> str:
        return f"TabulatedSchedule({self.name})"


class Encoder:
    """Writes one value; ``tensors`` are those that it has come upon."""

    def __init__(self) -> None:
        self.tensors: dict[str, th.Tensor] = {}
        # Objects within which we are, to find cycles; and arrays by identity with their place, to write none twice
        self.within: set[int] = set()
        self.written: dict[int, tuple[Any, Any]] = {}
        self.storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        write = _WRITERS.get(type(value))
        if write is None:
            write = next((writer for kind, writer in _SUBCLASS_WRITERS if isinstance(value, kind)), Encoder._object)
        if id(value) in self.within:
            raise ValueError(f"{_place(path)} can't be written: it contains itself.")
        self.within.add(id(value))
        try:
            return write(self, value, path)
        finally:
            self.within.discard(id(value))

    def _int(self, value: int, path: str) -> Any:
        return value if abs(value) < 2**63 else {"$int": hex(value)}

    def _float(self, value: float, path: str) -> Any:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(item, f"{path}/{index}") for index, item in enumerate(values)]

    def _pairs(self, value: dict[Any, Any], path: str) -> list[Any]:
        return [[self.encode(key, path), self.encode(item, f"{path}/{key}")] for key, item in value.items()]

    def _dict(self, value: dict[Any, Any], path: str) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{path}/{key}" if path else key) for key, item in value.items()}
        return {"$dict": self._pairs(value, path)}

    def _ordered_dict(self, value: OrderedDict[Any, Any], path: str) -> Any:
        # PyTorch's state dicts have an attribute, `_metadata`
        return {"$ordered": [self._pairs(value, path), self._dict(vars(value), path)]}

    def _bytes(self, value: Any) -> str:
        return base64.b64encode(value).decode()

    def _scalar(self, value: np.generic, path: str) -> Any:
        return {"$scalar": [dtype_to_json(value.dtype, path), self._bytes(value.tobytes())]}

    def _array(self, value: np.ndarray, path: str) -> Any:
        if type(value) is not np.ndarray:
            raise ValueError(f"{_place(path)} can't be written: it is a {type(value).__name__}. Make it a plain array.")
        if id(value) not in self.written:
            dtype = dtype_to_json(value.dtype, path)
            order = list(range(value.ndim))
            if not value.flags.c_contiguous and value.transpose(_strides_order(value.strides)).flags.c_contiguous:
                order = _strides_order(value.strides)
            data = np.ascontiguousarray(value.transpose(order)).reshape([value.shape[dimension] for dimension in order])
            try:
                if not data.flags.writeable:
                    data = data.copy()
                tensor = th.from_numpy(data)
                if tensor.dtype not in _NATIVE_DTYPES:
                    raise TypeError
            except (TypeError, ValueError):
                # PyTorch has no such type
                tensor = th.frombuffer(bytearray(data.tobytes()) or bytearray(1), dtype=th.uint8)
            node = {"$array": {"tensor": self._store(tensor, path), "dtype": dtype, "shape": list(data.shape), "order": order}}
            self.written[id(value)] = node, value
        return self.written[id(value)][0]

    def _tensor(self, value: th.Tensor, path: str) -> Any:
        if id(value) not in self.written:
            if type(value) not in (th.Tensor, th.nn.Parameter) or value.layout is not th.strided or value.is_meta:
                raise ValueError(f"{_place(path)} can't be written: it is not a plain, dense tensor.")
            if value.is_quantized:
                raise ValueError(f"{_place(path)} can't be written: it is quantized. Store its `dequantize()`.")
            plain = value.detach().cpu().resolve_conj().resolve_neg()
            order = list(range(plain.ndim))
            if not plain.is_contiguous() and plain.permute(_strides_order(plain.stride())).is_contiguous():
                order = _strides_order(plain.stride())
            plain = plain.permute(order).contiguous()
            shape = list(plain.shape)
            dtype = str(plain.dtype).removeprefix("torch.")
            if plain.dtype not in _NATIVE_DTYPES:
                plain = plain.reshape(-1).view(th.uint8)
            node = {"$tensor": {"tensor": self._store(plain, path), "dtype": dtype, "shape": shape, "order": order}}
            self.written[id(value)] = node, value
        return self.written[id(value)][0]

    def _store(self, tensor: th.Tensor, path: str) -> str:
        # safetensors takes no memory twice
        storage = tensor.untyped_storage().data_ptr()
        if storage in self.storages:
            tensor = tensor.clone()
        self.storages.add(tensor.untyped_storage().data_ptr())
        # Names for readers of the file; what keeps them apart is the number, where there has to be one
        name = path or "value"
        if name in self.tensors or name == "__metadata__":
            name = f"{name}#{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def _name(self, value: Any, path: str) -> Any:
        if isinstance(value, type) or is_listed(value) or _is_importable(value):
            return {"$name": name_of(value)}
        name = getattr(value, "__qualname__", repr(value))
        argument = path.split("/")[0] or "value"
        schedule = TabulatedSchedule.of(value, name) if path == argument else None
        warnings.warn(
            f"{_place(path)} is {name}, which has no name to find it by. "
            + ("It is not written." if schedule is None else "In its place, some of its values are written.")
            + f" On loading, pass it again, as in `load(path, {argument}=...)`. To have it written, make it a function of a "
            "module and call `sb3_r2vpo.allow` for it; for schedules there are `LinearSchedule` and `ConstantSchedule` in "
            "`stable_baselines3.common.utils`.",
            stacklevel=2,
        )
        return {"$lost": name} if schedule is None else self._tabulated(schedule, path)

    def _tabulated(self, value: "TabulatedSchedule", path: str) -> Any:
        return {"$tabulated": [value.name, self._array(value.values, path)]}

    def _partial(self, value: Any, path: str) -> Any:
        return {"$partial": [self.encode(part, path) for part in (value.func, value.args, value.keywords)]}

    def _object(self, value: Any, path: str) -> Any:
        cls = type(value)
        transformers = sys.modules.get("transformers")
        if transformers is not None and isinstance(value, transformers.PreTrainedModel):
            # Its weights are those of the policy that has taken it
            config = {**value.config.to_dict(), "dtype": str(value.dtype).removeprefix("torch.")}
            return {"$causal_lm": self._dict(config, path)}
        refusal = ValueError(
            f"{_place(path)} can't be written: a {cls.__module__}.{cls.__qualname__} is more than plain values, arrays and "
            f"tensors. Keep it elsewhere, or leave it out: `save` of a model takes `exclude=[{path.split('/')[0]!r}]`."
        )
        if isinstance(value, tuple) and hasattr(cls, "_fields"):
            return {"$named": [name_of(cls), self._items(value, path)]}
        try:
            make, arguments, state, *contents = value.__reduce_ex__(2)
        except Exception as error:
            raise refusal from error
        if make is not vars(copyreg)["__newobj__"] or arguments != (cls,) or any(content is not None for content in contents):
            raise refusal
        return {"$object": [name_of(cls), self.encode(state, path)]}


def _place(path: str) -> str:
    return f"`{path.replace('/', '.')}`" if path else "The value"


def _is_importable(value: Any) -> bool:
    """Whether a function is what its name stands for."""
    found = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return found is value


def dtype_to_json(dtype: np.dtype, path: str = "") -> Any:
    as_json = dtype.str if dtype.names is None else [list(field) for field in dtype.descr]
    if dtype.hasobject or dtype_from_json(as_json) != dtype:
        raise ValueError(f"{_place(path)} can't be written: its elements are of type {dtype}. Make them numbers or strings.")
    return as_json


def dtype_from_json(as_json: Any) -> np.dtype:
    def fields(field: Any) -> Any:
        name, kind, *shape = field
        return (name, kind if isinstance(kind, str) else [fields(part) for part in kind], *(tuple(part) for part in shape))

    dtype = np.dtype(as_json if isinstance(as_json, str) else [fields(field) for field in as_json])
    if dtype.hasobject:
        raise ValueError("arrays of objects are not allowed")
    return dtype


_WRITERS: dict[type, Callable[[Encoder, Any, str], Any]] = {
    int: Encoder._int,
    float: Encoder._float,
    complex: lambda encoder, value, path: {"$complex": [encoder._float(value.real, path), encoder._float(value.imag, path)]},
    bytes: lambda encoder, value, path: {"$bytes": encoder._bytes(value)},
    bytearray: lambda encoder, value, path: {"$bytearray": encoder._bytes(value)},
    list: Encoder._items,
    tuple: lambda encoder, value, path: {"$tuple": encoder._items(value, path)},
    set: lambda encoder, value, path: {"$set": encoder._items(value, path)},
    frozenset: lambda encoder, value, path: {"$frozenset": encoder._items(value, path)},
    dict: Encoder._dict,
    OrderedDict: Encoder._ordered_dict,
    deque: lambda encoder, value, path: {"$deque": [encoder._items(value, path), value.maxlen]},
    th.Size: lambda encoder, value, path: {"$size": list(value)},
    th.device: lambda encoder, value, path: {"$device": str(value)},
    th.dtype: lambda encoder, value, path: {"$torch_dtype": str(value).removeprefix("torch.")},
    np.random.Generator: lambda encoder, value, path: {"$generator": encoder.encode(value.bit_generator, path)},
    np.random.SeedSequence: lambda encoder, value, path: {"$seeds": encoder._dict(value.state, path)},
    np.random.RandomState: lambda encoder, value, path: {"$random_state": encoder._dict(value.get_state(legacy=False), path)},
    random.Random: lambda encoder, value, path: {"$random": encoder.encode(value.getstate(), path)},
    FunctionType: Encoder._name,
    BuiltinFunctionType: Encoder._name,
    MethodType: Encoder._name,
    partial: Encoder._partial,
    TabulatedSchedule: Encoder._tabulated,
}
_SUBCLASS_WRITERS: list[tuple[type, Callable[[Encoder, Any, str], Any]]] = [
    (type, Encoder._name),
    (np.generic, Encoder._scalar),
    (np.ndarray, Encoder._array),
    (th.Tensor, Encoder._tensor),
    (np.dtype, lambda encoder, value, path: {"$dtype": dtype_to_json(value, path)}),
    (np.random.BitGenerator, lambda encoder, value, path: {"$bits": encoder.encode(state_of(value), path)}),
    (PurePath, lambda encoder, value, path: {"$path": str(value)}),
]
