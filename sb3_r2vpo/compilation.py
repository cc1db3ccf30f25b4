"""``torch.compile`` for a whole gradient step."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch as th
from torch._dynamo import config
from torch._dynamo.exc import BackendCompilerFailed

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """
    Compile a function of tensors, gradients included, at its first call, once for each combination of shapes.

    Shapes are not made variable: a truncated last minibatch would then slow down all the others.

    :param function: Floats among its arguments, and all it reads otherwise, are constants of the compiled code
    :return: The compiled function
    :raises RuntimeError: PyTorch is too old; or, at the first call, there is no compiler.
    """
    # Off by default in PyTorch 2.11 and later, where it appeared: https://github.com/pytorch/pytorch/pull/169493
    if not hasattr(config, "trace_autograd_ops"):
        raise RuntimeError(f"`compile=True` needs PyTorch 2.11 or later, this is {th.__version__}. Pass `compile=False`.")
    compiled_function = th.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            # Each model of a process is compiled for itself; beyond the limit, code would silently no longer be compiled
            with config.patch(trace_autograd_ops=True, recompile_limit=64):
                return compiled_function(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise RuntimeError(
                "`compile=True` failed: it needs a working C++ compiler (`g++` or `clang++`, or what the environment variable "
                "`CXX` names), and Triton on a GPU, whose own error is above. Install one, or pass `compile=False`."
            ) from error

    return call
