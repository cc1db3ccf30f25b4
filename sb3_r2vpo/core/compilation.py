"""``torch.compile`` for a whole gradient step."""

from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch as th

P = ParamSpec("P")
T = TypeVar("T")


def require_compilation() -> None:
    """:raises RuntimeError: This PyTorch can't compile a function that takes gradients."""
    from torch._dynamo import config

    # Off by default in PyTorch 2.11 and later, where it appeared: https://github.com/pytorch/pytorch/pull/169493
    if not hasattr(config, "trace_autograd_ops"):
        raise RuntimeError(f"`compile=True` needs PyTorch 2.11 or later, this is {th.__version__}. Pass `compile=False`.")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """
    Compile a function of tensors, gradients included, at its first call, once for each combination of shapes.

    Shapes are not made variable: a truncated last minibatch would then slow down all the others. The compiled code belongs to
    the function, not to a model: a model that is copied or saved takes none of it along. It is compiled as a function of its
    own, so that what one compiled function can't do is not held against another one of the same source.

    :param function: Floats among its arguments, and all it reads otherwise, are constants of the compiled code
    :return: The compiled function
    :raises RuntimeError: At the first call: there is no compiler.
    """
    own_code = function.__code__.replace()
    own = FunctionType(own_code, function.__globals__, function.__name__)
    compile_once = cache(lambda: th.compile(own, dynamic=False))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from torch._dynamo import config
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            # Each kind of model in a process is compiled for itself; beyond the limit, code would silently run uncompiled
            with config.patch(trace_autograd_ops=True, recompile_limit=64):
                return compile_once()(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise RuntimeError(
                "`compile=True` failed: it needs a working C++ compiler (`g++` or `clang++`, or what the environment variable "
                "`CXX` names), and Triton on a GPU, whose own error is above. Install one, or pass `compile=False`."
            ) from error

    return call
