"""``torch.compile`` with an error that says what to do."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch as th
from torch._dynamo.exc import BackendCompilerFailed

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """
    Compile a function of tensors at its first call, once for each combination of shapes.

    Shapes are not made variable, as a truncated last minibatch would then slow down all the others.

    :param function: Floats among its arguments, and all it reads otherwise, are constants of the compiled code
    :return: The compiled function
    :raises RuntimeError: At the first call: there is no compiler.
    """
    compiled_function = th.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return compiled_function(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise RuntimeError(
                "`compile=True` needs a working C++ compiler (`g++` or `clang++`, or what the environment variable `CXX` "
                "names), and Triton on a GPU. Install one, or pass `compile=False`."
            ) from error

    return call
