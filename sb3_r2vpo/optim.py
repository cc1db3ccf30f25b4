"""Clipping and stepping with few operations: for small networks their number, not their size, is what an update costs."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch as th
from torch.nn import functional as F

#: Options of ``th.optim.Adam`` that are left to it.
_PLAIN_OPTIONS = ["amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"]

#: Parameters begin at multiples of so many elements in the common tensors, with zeros in between: matrix products of other
#: alignment than that of PyTorch's allocator, 64 bytes, may be rounded differently.
_ALIGNMENT = 16


def _together(tensors: list[th.Tensor]) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
    """A copy of tensors of any shapes in one, and the views of it that belong to each."""
    sizes = [tensor.numel() + _padding(tensor) for tensor in tensors]
    flat = tensors[0].new_zeros(sum(sizes))
    views = tuple(part[: t.numel()].view_as(t) for part, t in zip(flat.split(sizes), tensors, strict=True))
    th._foreach_copy_(views, tensors)
    return flat, views


def _padding(tensor: th.Tensor) -> int:
    return -tensor.numel() % _ALIGNMENT


class FlatState(NamedTuple):
    """Adam's constants, its state for all parameters together, and the views of it that belong to each."""

    betas: tuple[float, float]
    eps: float
    #: A scalar, for the compiled step: the host's number would be a constant of its code
    learning_rate: th.Tensor
    #: Number of steps, once for each parameter
    step: th.Tensor
    gradient: th.Tensor
    exp_avg: th.Tensor
    exp_avg_sq: th.Tensor
    denominator: th.Tensor
    gradients: tuple[th.Tensor, ...]
    exp_avgs: tuple[th.Tensor, ...]
    denominators: tuple[th.Tensor, ...]


class FlatAdam(th.optim.Adam):
    """
    ``th.optim.Adam``, bit for bit, with its elementwise operations made once on all parameters together.

    Adam's own loop makes a dozen operations for each parameter: on a CPU that is a fifth of a PPO update with two small
    networks. ``fused=True`` is as fast as this class, but rounds differently, so that seeds no longer reproduce SB3's results.

    The state of each parameter is a view into the common one, and ``state_dict()`` is Adam's. Where parameters can't be
    treated alike (several groups, a missing gradient, options beyond the learning rate, the betas and ``eps``), Adam steps.

    :param params: Parameters or parameter groups, such as those of an Adam that this one is to replace
    :param kwargs: Arguments of ``th.optim.Adam``
    """

    _flat: FlatState | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by `load_state_dict`, `pickle` and `deepcopy`: the new state consists of separate tensors again
        super().__setstate__(state)
        self._flat = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        # The same without its profiling and grouping, which take longer than a forward pass through a layer
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None or self.gather_gradients() is None:
            self._flat = None
            return super().step(closure)
        self.step_with_gathered_gradients()
        return None

    @th.inference_mode()
    def step_with_gathered_gradients(self) -> None:
        """:meth:`step` without the profiling around it, which takes as long as it does; after :meth:`gather_gradients`."""
        assert self._flat is not None
        group, flat = self.param_groups[0], self._flat
        beta1, beta2 = group["betas"]
        step = flat.step.add_(1)[0].item()
        flat.exp_avg.lerp_(flat.gradient, 1 - beta1)
        flat.exp_avg_sq.mul_(beta2).addcmul_(flat.gradient, flat.gradient, value=1 - beta2)
        th.sqrt(flat.exp_avg_sq, out=flat.denominator).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        # The parameters themselves stay separate tensors: nobody expects those of a module to share memory
        step_size = group["lr"] / (1 - beta1**step)
        th._foreach_addcdiv_(group["params"], flat.exp_avgs, flat.denominators, -step_size)

    def gather_gradients(self) -> th.Tensor | None:
        """
        Move the gradients into one tensor, if they are not there already: each parameter's ``grad`` becomes a view of it.

        :return: That tensor; ``None``, and nothing is moved, where :meth:`step` has to be Adam's
        """
        flat, parameters = self.flatten(), self.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        has_hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if flat is None or has_hooks or any(map(operator.is_, gradients, repeat(None))):
            return None
        if not all(map(operator.is_, gradients, flat.gradients)):
            th._foreach_copy_(flat.gradients, gradients)
            self.share_gradients()
        return flat.gradient

    def share_gradients(self) -> None:
        """Let each parameter's ``grad`` be a view of one tensor, whose values are to be set; see :meth:`gather_gradients`."""
        if (flat := self.flatten()) is not None:
            for parameter, gradient in zip(self.param_groups[0]["params"], flat.gradients, strict=True):
                parameter.grad = gradient

    def flatten(self) -> FlatState | None:
        """
        :return: The state of all parameters in common tensors; ``None`` where they can't be treated alike
        """
        if len(self.param_groups) > 1:
            return None
        if self._flat is not None:
            return self._flat
        group = self.param_groups[0]
        parameters = group["params"]
        states = [self.state[parameter] for parameter in parameters]
        alike = (
            len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
            and len({float(state.get("step", 0)) for state in states}) == 1
            and not any(group.get(option) for option in (*_PLAIN_OPTIONS, "weight_decay"))
        )
        if not alike:
            return None
        zeros = [th.zeros_like(parameter) for parameter in parameters]
        step = th.tensor([float(state.get("step", 0)) for state in states], device=parameters[0].device)
        (exp_avg, exp_avgs), (exp_avg_sq, exp_avg_sqs) = (
            _together([state.get(name, zero) for state, zero in zip(states, zeros, strict=True)])
            for name in ("exp_avg", "exp_avg_sq")
        )
        (gradient, gradients), (denominator, denominators) = _together(zeros), _together(zeros)
        for state, *views in zip(states, step, exp_avgs, exp_avg_sqs, strict=True):
            state["step"], state["exp_avg"], state["exp_avg_sq"] = views
        self._flat = FlatState(
            betas=group["betas"], eps=group["eps"], learning_rate=step.new_tensor(float(group["lr"])), step=step,
            gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, denominator=denominator,
            gradients=gradients, exp_avgs=exp_avgs, denominators=denominators,
        )  # fmt: skip
        return self._flat


def flat_state(optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter]) -> FlatState:
    """
    :param optimizer: Any optimizer
    :param parameters: All that it is to train
    :return: The optimizer's state in the form that :func:`descend_by_tensors` takes, at the current learning rate
    :raises ValueError: It has no such state, or not for all parameters.
    """
    state = optimizer.flatten() if isinstance(optimizer, FlatAdam) else None
    trained = [id(parameter) for parameter in optimizer.param_groups[0]["params"] if parameter.requires_grad]
    if state is None or trained != [id(parameter) for parameter in parameters]:
        raise ValueError(
            "`compile=True` compiles Adam along with the rest, with `lr`, `betas` and `eps` for options. "
            f"This policy has {optimizer}, or parameters that it does not train. Pass `compile=False`, or change that."
        )
    state.learning_rate.fill_(optimizer.param_groups[0]["lr"])
    return state


def with_fewer_operations(optimizer: th.optim.Optimizer, flat: bool = False) -> th.optim.Optimizer:
    """
    :param optimizer: Any optimizer
    :param flat: Whether to take :class:`FlatAdam` on any device
    :return: For an Adam whose implementation was left open, :class:`FlatAdam` on a CPU and the fused one on CUDA; else itself
    """
    groups = optimizer.param_groups
    if type(optimizer) is not th.optim.Adam or any(group["fused"] or group["foreach"] for group in groups):
        return optimizer
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if flat or devices == {"cpu"}:
        return FlatAdam(groups)
    if devices == {"cuda"}:
        return th.optim.Adam([group | {"fused": True} for group in groups])
    return optimizer


def clip_coefficient(norms: th.Tensor, max_norm: float) -> tuple[th.Tensor, th.Tensor]:
    """
    The factor of ``th.nn.utils.clip_grad_norm_``, bit for bit.

    :param norms: Norm of each parameter's gradient
    :param max_norm: Largest norm of all gradients together
    :return: What to multiply the gradients with, and whether all of them are finite: boolean, a scalar
    """
    total_norm = th.linalg.vector_norm(norms)
    # Python's division would do the same, more slowly
    return (max_norm * (total_norm + 1e-6).reciprocal()).clamp(max=1.0), total_norm < math.inf


def clip_coefficient_on_host(norms: th.Tensor, max_norm: float) -> tuple[float, bool]:
    """:func:`clip_coefficient`, bit for bit, but read by the host after its first operation: it is faster with scalars."""
    # NumPy has no bfloat16
    if norms.dtype not in (th.float32, th.float64):
        clip_coef, is_finite = clip_coefficient(norms, max_norm)
        return clip_coef.item(), bool(is_finite)
    total_norm = th.linalg.vector_norm(norms).numpy(force=True)[()]
    # Of the tensor's precision
    number = type(total_norm)
    return min(float(number(max_norm) * (number(1) / (total_norm + number(1e-6)))), 1.0), bool(total_norm < math.inf)


def where(condition: th.Tensor | bool, value: th.Tensor, other: th.Tensor) -> th.Tensor:
    """``th.where``, for a condition that the host may know."""
    if isinstance(condition, bool):
        return value if condition else other
    return th.where(condition, value, other)


def descend(
    optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter], max_norm: float, may_step: th.Tensor | None
) -> tuple[th.Tensor | bool, th.Tensor]:
    """
    Clip the gradients and make one step, unless one of them is NaN or infinite, which one step would spread to all weights.

    The host reads whether to step; with a fused optimizer (``fused=True``), which decides on its own, it does not, so that it
    needn't wait for the device.

    :param optimizer: Any optimizer
    :param parameters: All parameters; those without a gradient count as zero
    :param max_norm: Largest norm of all gradients together
    :param may_step: A boolean scalar, a further condition of the step; ``None`` for none
    :return: Whether the step was made, a boolean scalar or the host's, and the norm of each parameter's gradient before
        clipping
    """
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    flat = optimizer.gather_gradients() if isinstance(optimizer, FlatAdam) else None
    norms = th.stack(th._foreach_norm(gradients))
    accept: th.Tensor | bool
    if optimizer.param_groups[0].get("fused"):
        clip_coef, accept = clip_coefficient(norms, max_norm)
        if may_step is not None:
            accept &= may_step
        # The convention of `torch.amp.GradScaler`
        optimizer.found_inf = (~accept).float()  # type: ignore[attr-defined]
        th._foreach_mul_(gradients, clip_coef)
        optimizer.step()
        optimizer.found_inf = None  # type: ignore[attr-defined]
    else:
        factor, accept = clip_coefficient_on_host(norms, max_norm)
        accept = accept and (may_step is None or bool(may_step))
        if accept and isinstance(optimizer, FlatAdam) and flat is not None:
            flat.mul_(factor)
            optimizer.step_with_gathered_gradients()
        elif accept:
            th._foreach_mul_(gradients, factor)
            optimizer.step()
    if len(gradients) < len(parameters):
        has_gradient = th.tensor([parameter.grad is not None for parameter in parameters], device=norms.device)
        norms = norms.new_zeros(len(parameters)).masked_scatter(has_gradient, norms)
    return accept, norms


def descend_by_tensors(
    loss: th.Tensor, parameters: Sequence[th.nn.Parameter], state: FlatState, max_norm: float, may_step: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradients and :func:`descend` with :class:`FlatAdam` without a decision of the host's, to be compiled.

    :param loss: Any scalar that depends on the parameters
    :param parameters: All of the optimizer's, changed in place; those that the loss does not depend on count as zero
    :param state: The optimizer's, changed in place
    :param max_norm: Largest norm of all gradients together
    :param may_step: A boolean scalar, a further condition of the step; ``None`` for none
    :return: Whether the step was made, and the norm of each parameter's gradient before clipping
    """
    gradients = th.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    with th.no_grad():
        norms = th.stack([th.linalg.vector_norm(gradient) for gradient in gradients])
        clip_coef, accept = clip_coefficient(norms, max_norm)
        if may_step is not None:
            accept &= may_step
        # If not accepted, nothing changes, whatever the gradients are
        flat = th.cat([F.pad(gradient.flatten(), (0, _padding(gradient))) for gradient in gradients])
        gradient = th.where(accept, clip_coef * flat, 0.0)
        state.step.add_(accept)
        step, (beta1, beta2) = state.step[0], state.betas
        state.exp_avg.lerp_(gradient, th.where(accept, 1 - beta1, 0.0))
        state.exp_avg_sq.lerp_(gradient.square(), th.where(accept, 1 - beta2, 0.0))
        denominator = (state.exp_avg_sq / (1 - beta2**step)).sqrt() + state.eps
        change = th.where(accept, state.learning_rate / (1 - beta1**step) * state.exp_avg / denominator, 0.0)
        parts = change.split([parameter.numel() + _padding(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.sub_(part[: parameter.numel()].view_as(parameter))
    return accept, norms


def descend_on(
    loss: th.Tensor,
    optimizer: th.optim.Optimizer,
    parameters: Sequence[th.nn.Parameter],
    state: FlatState | None,
    max_norm: float,
    may_step: th.Tensor | None = None,
) -> tuple[th.Tensor | bool, th.Tensor]:
    """
    Gradients by autograd and one step: :func:`descend_by_tensors` where the optimizer's state is given, else :func:`descend`.

    :param loss: Any scalar that depends on the parameters
    :param optimizer: Any optimizer
    :param parameters: All of its parameters
    :param state: For code that is compiled, the optimizer's, by :func:`flat_state`; ``None`` for code that is not
    :param max_norm: see :func:`descend`
    :param may_step: see :func:`descend`
    :return: see :func:`descend`
    """
    if state is not None:
        return descend_by_tensors(loss, parameters, state, max_norm, may_step)
    optimizer.zero_grad()
    loss.backward()
    return descend(optimizer, parameters, max_norm, may_step)


def refuse_nonfinite(norms: th.Tensor) -> None:
    """
    :param norms: Norms of gradients, of any shape
    :raises RuntimeError: One of them is NaN or infinite.
    """
    if not norms.isfinite().all():
        raise RuntimeError(
            "The gradient is non-finite (NaN or infinite); the step was not made, the weights are finite. Extreme rewards or "
            "observations do this: wrap the environment in `stable_baselines3.common.vec_env.VecNormalize`."
        )
