# mypy: disable-error-code="attr-defined, misc"
"""Reading the pickles of SB3 without running what they say: each step that makes or changes an object is checked."""

import functools
import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch as th

from sb3_r2vpo.common.allowed import UntrustedError, find, may_be_stored
from sb3_r2vpo.common.random_state import BIT_GENERATORS, bit_generator, random_state


def safe_loads(data: bytes, trust: bool = False) -> Any:
    """
    Read a pickle, such as SB3 writes, of plain values, arrays, spaces, schedules, buffers and statistics.

    Pickles have no checksum: a damaged one may be read as another value.

    :param data: The pickle
    :param trust: Whether to read it with ``cloudpickle``, which runs whatever code it holds
    :return: What it holds
    :raises UntrustedError: It names a class or function that is not on the list, see
        :func:`~sb3_r2vpo.common.allowed.allow`, or calls one that files may name only.
    :raises ValueError: It is no pickle, or a damaged one.
    """
    try:
        return cloudpickle.loads(data) if trust else _Unpickler(io.BytesIO(data)).load()
    except UntrustedError:
        raise
    except Exception as error:
        raise ValueError(f"This is no pickle, or a damaged one ({type(error).__name__}: {error}).") from error


class _Maker:
    """What a pickle may call: a function of ours that stands for the one it names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class _Seeds:
    """Stands for what a random generator was seeded by, which only its ``spawn`` needs."""


def _dtype(kind: str, *_: Any) -> np.dtype:
    dtype = np.dtype(kind)
    if not isinstance(kind, str) or dtype.hasobject:
        raise UntrustedError("The pickle has an array of objects; load it with `trust=True` if you trust whoever made it.")
    return dtype


def _array(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, *_: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order).copy(order)  # type: ignore[call-overload]


def _bytearray(*arguments: Any) -> bytearray:
    # A number would be a length, which a damaged file can make too large
    return bytearray(*arguments) if not arguments or not isinstance(arguments[0], int) else bytearray()


def _latin1(text: str, _: str) -> bytes:
    return text.encode("latin1")


def _bit_generator(kind: Any = "MT19937") -> np.random.BitGenerator:
    return BIT_GENERATORS[kind if isinstance(kind, str) else kind.function.__name__]()


def _partial(function: Any, *arguments: Any) -> functools.partial:
    if not isinstance(function, FunctionType):
        raise UntrustedError(f"The pickle has a partial call of {function!r}; load it with `trust=True` if you trust it.")
    return functools.partial(function, *arguments)


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections:deque": deque,
    "collections:OrderedDict": OrderedDict,
    "builtins:set": set,
    "builtins:frozenset": frozenset,
    "builtins:bytearray": _bytearray,
    "builtins:complex": complex,
    "builtins:slice": slice,
    "builtins:range": range,
    "_codecs:encode": _latin1,
    "functools:partial": _partial,
    "torch:device": th.device,
    "torch:Size": th.Size,
    "numpy:dtype": _dtype,
    "numpy:ndarray": np.ndarray,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in {
            "numeric:_frombuffer": _array,
            "multiarray:_reconstruct": lambda *_: np.empty(0, np.int8),
            "multiarray:scalar": lambda dtype, data: np.ndarray((), dtype, data or bytes(1))[()],
        }.items()
    },
    "numpy.random._pickle:__generator_ctor": lambda generator="MT19937", *_: np.random.Generator(
        _bit_generator(generator) if isinstance(generator, str) else generator
    ),
    "numpy.random._pickle:__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle:__randomstate_ctor": lambda generator="MT19937", *_: np.random.RandomState(
        _bit_generator(generator) if isinstance(generator, str) else generator
    ),
    "numpy.random.bit_generator:__pyx_unpickle_SeedSequence": lambda *_: _Seeds(),
    "numpy.random.bit_generator:SeedSequence": _Seeds,
    **{f"{cls.__module__}:{name}": cls for name, cls in BIT_GENERATORS.items()},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose single steps can be replaced; the one in C lets a file set any attribute."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module_name: str, name: str) -> Any:
        module_name = {"__builtin__": "builtins"}.get(module_name, module_name)
        full_name = f"{module_name}:{name}"
        if full_name in _MAKERS:
            return _Maker(_MAKERS[full_name])
        if module_name == "torch" and isinstance(vars(th).get(name), th.dtype):
            return vars(th)[name]
        if module_name.startswith("cloudpickle"):
            raise UntrustedError(
                "The file holds the code of a function or class, such as a lambda or a class of a script. Pass it again, as "
                "in `load(path, learning_rate=...)` or `custom_objects`; or load it with `trust=True`, which runs that code."
            )
        return find(full_name)

    def load_reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack[-1]
        if not isinstance(maker, _Maker):
            raise UntrustedError(f"The pickle calls {maker!r}, which it may only name; `trust=True` lets it.")
        self.stack[-1] = maker.function(*arguments)

    def load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack[-1]
        if not may_be_stored(cls):
            raise UntrustedError(f"The pickle makes an instance of {cls!r}, which it may only name; `trust=True` lets it.")
        self.stack[-1] = cls.__new__(cls, *arguments)

    def load_build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, np.ndarray):
            _, shape, dtype, _, data = state
            if any(length < 0 for length in shape) or not isinstance(data, bytes) or dtype.hasobject:
                raise ValueError("the state of an array is not one")
            value.__setstate__(state)
        elif isinstance(value, np.dtype):
            # The rest of it is known from its name, or a structure
            if state[1] not in ("|", "=", value.byteorder, np.dtype(int).newbyteorder("=").str[0]) or state[3] is not None:
                raise ValueError("an array has another byte order, or is structured")
        elif isinstance(value, np.random.BitGenerator):
            state = state[0] if isinstance(state, tuple) else state
            bit_generator(state)
            value.state = state
        elif isinstance(value, np.random.RandomState):
            random_state(state)
            value.set_state(state)
        elif isinstance(value, functools.partial):
            if state[0] is not value.func:
                raise ValueError("the state of a partial call is not its own")
            value.__setstate__(state)
        elif may_be_stored(type(value)):
            if hasattr(value, "__setstate__"):
                value.__setstate__(state)
            else:
                vars(value).update(state)
        elif not isinstance(value, _Seeds):
            raise UntrustedError(f"The pickle changes {value!r}; `trust=True` lets it.")

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        data = bytearray(self.read(size))
        if len(data) != size:
            raise ValueError("it ends too early")
        self.append(data)

    def load_append(self) -> None:
        self._fill(self.stack[-2], list, deque)
        super().load_append()

    def load_appends(self) -> None:
        self._fill(self.metastack[-1][-1], list, deque)
        super().load_appends()

    def load_setitem(self) -> None:
        self._fill(self.stack[-3], dict)
        super().load_setitem()

    def load_setitems(self) -> None:
        self._fill(self.metastack[-1][-1], dict)
        super().load_setitems()

    def load_additems(self) -> None:
        self._fill(self.metastack[-1][-1], set)
        super().load_additems()

    @staticmethod
    def _fill(container: Any, *kinds: type) -> None:
        if not isinstance(container, kinds):
            raise ValueError(f"it fills a {type(container).__name__}")

    def refuse(self) -> None:
        raise ValueError("it has steps that no file of SB3 has")

    for _opcode in (
        *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX),
        *(pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        dispatch[_opcode[0]] = refuse
    for _opcode, _step in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_newobj,
        pickle.BUILD: load_build,
        pickle.BYTEARRAY8: load_bytearray8,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.ADDITEMS: load_additems,
    }.items():
        dispatch[_opcode[0]] = _step
