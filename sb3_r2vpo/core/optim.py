"""Clipping and stepping with few operations: for small networks their number, not their size, is what an update costs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_r2vpo.core.compilation import require_compilation

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
    """Adam's constants, its state for some parameters together, and the views of it that belong to each."""

    parameters: tuple[th.nn.Parameter, ...]
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

    def is_current(self, group: dict[str, Any]) -> bool:
        """:return: Whether the optimizer's options are as before, and Adam has not stepped some of the parameters alone"""
        return self.betas == group["betas"] and self.eps == group["eps"] and bool((self.step == self.step[0]).all())


class FlatAdam(th.optim.Adam):
    """
    ``th.optim.Adam``, bit for bit, with its elementwise operations made once on all parameters together.

    Adam's own loop makes a dozen operations for each parameter: on a CPU that is a fifth of a PPO update with two small
    networks. ``fused=True`` is as fast as this class, but rounds differently, so that seeds no longer reproduce SB3's results.

    The state of each parameter is a view into the common one, and ``state_dict()`` is Adam's. Where parameters can't be
    treated alike (several groups, options beyond the learning rate, the betas and ``eps``), Adam steps.

    :param params: Parameters or parameter groups, such as those of an Adam that this one is to replace
    :param kwargs: Arguments of ``th.optim.Adam``
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._flat: dict[tuple[int, ...], FlatState] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by `load_state_dict`, `pickle` and `deepcopy`: the new state consists of separate tensors again
        super().__setstate__(state)
        self._flat = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        # The same without its profiling and grouping, which take longer than a forward pass through a layer
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @th.inference_mode()
    def step_flat(self, flat: FlatState) -> None:
        """
        :meth:`step` for the parameters of :meth:`flatten`, without the profiling around it, which takes as long as it does.

        :param flat: Their state, with the gradients in it
        """
        group, (beta1, beta2) = self.param_groups[0], flat.betas
        step = flat.step.add_(1)[0].item()
        flat.exp_avg.lerp_(flat.gradient, 1 - beta1)
        flat.exp_avg_sq.mul_(beta2).addcmul_(flat.gradient, flat.gradient, value=1 - beta2)
        th.sqrt(flat.exp_avg_sq, out=flat.denominator).div_((1 - beta2**step) ** 0.5).add_(flat.eps)
        # The parameters themselves stay separate tensors: nobody expects those of a module to share memory
        step_size = group["lr"] / (1 - beta1**step)
        th._foreach_addcdiv_(flat.parameters, flat.exp_avgs, flat.denominators, -step_size)

    def flatten(self, parameters: Sequence[th.nn.Parameter]) -> FlatState | None:
        """
        :param parameters: Those that are trained together, all or some of the optimizer's
        :return: Their state in common tensors; ``None`` where they can't be treated alike
        """
        key = tuple(map(id, parameters))
        group = self.param_groups[0]
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return None
        known = self._flat.get(key)
        if known is not None and known.is_current(group):
            return known
        owned = {id(parameter) for parameter in group["params"]}
        states = [self.state[parameter] for parameter in parameters if id(parameter) in owned]
        alike = (
            len(self.param_groups) == 1
            and len(states) == len(parameters) > 0
            and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
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
        # The state of a parameter is a view of one common tensor only
        self._flat = {other: flat for other, flat in self._flat.items() if not {*other} & {*key}}
        self._flat[key] = FlatState(
            parameters=tuple(parameters), betas=group["betas"], eps=group["eps"],
            learning_rate=step.new_tensor(float(group["lr"])), step=step,
            gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, denominator=denominator,
            gradients=gradients, exp_avgs=exp_avgs, denominators=denominators,
        )  # fmt: skip
        return self._flat[key]


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


def descend_by_tensors(
    loss: th.Tensor, state: FlatState, max_norm: float, may_step: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradients, clipping and :class:`FlatAdam` without a decision of the host's, to be compiled.

    :param loss: Any scalar that depends on the parameters
    :param state: The parameters and their state, changed in place; those that the loss does not depend on count as zero
    :param max_norm: Largest norm of all gradients together
    :param may_step: A boolean scalar, a further condition of the step; ``None`` for none
    :return: Whether the step was made, and the norm of each parameter's gradient before clipping
    """
    gradients = th.autograd.grad(loss, state.parameters, allow_unused=True, materialize_grads=True)
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
        parts = change.split([parameter.numel() + _padding(parameter) for parameter in state.parameters])
        for parameter, part in zip(state.parameters, parts, strict=True):
            parameter.sub_(part[: parameter.numel()].view_as(parameter))
    return accept, norms


class Descent:
    """
    One optimizer step on a loss, with clipped gradients; none at all if a gradient is NaN or infinite, which one step would
    spread to all weights.

    The host reads whether to step; with a fused optimizer (``fused=True``), which decides on its own, it does not, so that it
    needn't wait for the device.

    Made anew for each update, so that it follows a policy or an optimizer that has been replaced.

    :param optimizer: Any optimizer
    :param parameters: Those of its parameters that the losses train
    :param max_norm: Largest norm of all gradients together; ``None`` for no limit
    :param compiled: Whether the step is to be compiled, with the learning rate that the optimizer has now
    :raises ValueError: ``compiled`` is set, and the optimizer can't be compiled.
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[th.nn.Parameter],
        max_norm: float | None,
        compiled: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.max_norm = math.inf if max_norm is None else max_norm
        self.flat = optimizer.flatten(self.parameters) if isinstance(optimizer, FlatAdam) else None
        self.compiled = compiled
        if compiled:
            require_compilation()
        if compiled and self.flat is None:
            raise ValueError(
                "`compile=True` compiles Adam along with the rest, with `lr`, `betas` and `eps` for options. "
                f"This policy has {optimizer}, or parameters that it does not train. Pass `compile=False`, or change that."
            )
        if self.flat is not None:
            self.flat.learning_rate.fill_(optimizer.param_groups[0]["lr"])

    def __call__(
        self,
        loss: th.Tensor,
        may_step: th.Tensor | None = None,
        backward: Callable[[th.Tensor], None] = th.Tensor.backward,
    ) -> tuple[th.Tensor | bool, th.Tensor]:
        """
        :param loss: A scalar
        :param may_step: A boolean scalar, a further condition of the step; ``None`` for none
        :param backward: From the loss to the gradients: autograd's, or one that writes to the parameters' ``grad``
        :return: Whether the step was made, a boolean scalar or the host's, and the norm of each parameter's gradient before
            clipping; zero for those that the loss does not depend on
        """
        if self.compiled:
            assert self.flat is not None
            return descend_by_tensors(loss, self.flat, self.max_norm, may_step)
        written_out = backward is not th.Tensor.backward
        if written_out:
            self._provide_gradients()
        else:
            self.optimizer.zero_grad()
        backward(loss)
        if self.flat is None or not written_out:
            gradients = [gradient for p in self.parameters if (gradient := p.grad) is not None]
            if len(gradients) < len(self.parameters):
                return self._step_those_with_gradients(gradients, may_step)
            if self.flat is None:
                return self._step(gradients, may_step)
            th._foreach_copy_(self.flat.gradients, gradients)
        norms = th.stack(th._foreach_norm(self.flat.gradients))
        factor, is_finite = clip_coefficient_on_host(norms, self.max_norm)
        accept = is_finite and (may_step is None or bool(may_step))
        if accept:
            self.flat.gradient.mul_(factor)
            self.optimizer.step_flat(self.flat)  # type: ignore[attr-defined]
        return accept, norms

    def _provide_gradients(self) -> None:
        """Let each parameter's ``grad`` be a tensor to write to: a view of the optimizer's own, if it has one."""
        if self.flat is None:
            # Any optimizer steps whatever has a gradient, also what was trained before
            self.optimizer.zero_grad()
            for parameter in self.parameters:
                parameter.grad = th.zeros_like(parameter)
        elif self.parameters[0].grad is not self.flat.gradients[0]:
            for parameter, gradient in zip(self.parameters, self.flat.gradients, strict=True):
                parameter.grad = gradient

    def _step(self, gradients: list[th.Tensor], may_step: th.Tensor | None) -> tuple[th.Tensor | bool, th.Tensor]:
        """Clip, and step as the optimizer itself does."""
        norms = th.stack(th._foreach_norm(gradients))
        if self.optimizer.param_groups[0].get("fused"):
            clip_coef, accept = clip_coefficient(norms, self.max_norm)
            if may_step is not None:
                accept &= may_step
            # The convention of `torch.amp.GradScaler`
            self.optimizer.found_inf = (~accept).float()  # type: ignore[attr-defined]
            th._foreach_mul_(gradients, clip_coef)
            self.optimizer.step()
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
            return accept, norms
        factor, is_finite = clip_coefficient_on_host(norms, self.max_norm)
        if not is_finite or not (may_step is None or bool(may_step)):
            return False, norms
        th._foreach_mul_(gradients, factor)
        self.optimizer.step()
        return True, norms

    def _step_those_with_gradients(
        self, gradients: list[th.Tensor], may_step: th.Tensor | None
    ) -> tuple[th.Tensor | bool, th.Tensor]:
        """The same where the loss does not depend on all parameters: the others are left as they are, as by PyTorch."""
        self.flat = None
        accept, norms = self._step(gradients, may_step)
        has_gradient = th.tensor([parameter.grad is not None for parameter in self.parameters], device=norms.device)
        return accept, norms.new_zeros(len(self.parameters)).masked_scatter(has_gradient, norms)
