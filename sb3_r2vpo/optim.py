"""Clipping and stepping with few operations: for small networks their number, not their size, is what an update costs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

#: Options of ``th.optim.Adam`` that are left to it.
_PLAIN_OPTIONS = ["amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"]


class FlatState(NamedTuple):
    """Adam's constants, its state for all parameters together, and the views of it that belong to each."""

    betas: tuple[float, float]
    eps: float
    #: Number of steps, once for each parameter
    step: th.Tensor
    exp_avg: th.Tensor
    exp_avg_sq: th.Tensor
    denominator: th.Tensor
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

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        group = self.param_groups[0]
        gradients = [parameter.grad for parameter in group["params"]]
        if closure is not None or any(gradient is None for gradient in gradients) or (flat := self.flatten()) is None:
            self._flat = None
            return super().step(closure)

        beta1, beta2 = group["betas"]
        step = flat.step.add_(1)[0].item()
        gradient = _flatten_dense_tensors(gradients)
        flat.exp_avg.lerp_(gradient, 1 - beta1)
        flat.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        th.sqrt(flat.exp_avg_sq, out=flat.denominator).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        # The parameters themselves stay separate tensors: nobody expects those of a module to share memory
        step_size = group["lr"] / (1 - beta1**step)
        th._foreach_addcdiv_(group["params"], flat.exp_avgs, flat.denominators, -step_size)
        return None

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
        exp_avg, exp_avg_sq = (
            _flatten_dense_tensors([state.get(name, zero) for state, zero in zip(states, zeros, strict=True)])
            for name in ("exp_avg", "exp_avg_sq")
        )
        denominator = th.empty_like(exp_avg)
        exp_avgs, exp_avg_sqs, denominators = (
            _unflatten_dense_tensors(tensor, parameters) for tensor in (exp_avg, exp_avg_sq, denominator)
        )
        for state, *views in zip(states, step, exp_avgs, exp_avg_sqs, strict=True):
            state["step"], state["exp_avg"], state["exp_avg_sq"] = views
        self._flat = FlatState(group["betas"], group["eps"], step, exp_avg, exp_avg_sq, denominator, exp_avgs, denominators)
        return self._flat


def adam_step(
    parameters: list[th.nn.Parameter],
    gradients: Sequence[th.Tensor],
    state: FlatState,
    learning_rate: th.Tensor,
    accept: th.Tensor,
) -> None:
    """
    :class:`FlatAdam`'s step made of tensors only, to be compiled together with what computes the gradients.

    :param parameters: All parameters, changed in place
    :param gradients: One for each
    :param state: Changed in place
    :param learning_rate: A scalar
    :param accept: A boolean scalar: if false, nothing changes, whatever the gradients are
    """
    gradient = th.where(accept, th.cat([gradient.flatten() for gradient in gradients]), 0.0)
    state.step.add_(accept)
    step, (beta1, beta2) = state.step[0], state.betas
    state.exp_avg.lerp_(gradient, th.where(accept, 1 - beta1, 0.0))
    state.exp_avg_sq.lerp_(gradient.square(), th.where(accept, 1 - beta2, 0.0))
    denominator = (state.exp_avg_sq / (1 - beta2**step)).sqrt() + state.eps
    change = th.where(accept, learning_rate / (1 - beta1**step) * state.exp_avg / denominator, 0.0)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, change.split(sizes), strict=True):
        parameter.sub_(part.view_as(parameter))


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


@th.no_grad()
def clip_gradients(parameters: Iterable[th.nn.Parameter], max_norm: float) -> tuple[th.Tensor, th.Tensor]:
    """
    ``th.nn.utils.clip_grad_norm_``, bit for bit, that also returns what it is computed from.

    :param parameters: Those without a gradient count as zero
    :param max_norm: Largest norm of all gradients together
    :return: That norm before clipping, and the norm of each parameter's gradient
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = th.stack(th._foreach_norm(gradients))
    total_norm = th.linalg.vector_norm(norms)
    th._foreach_mul_(gradients, (max_norm / (total_norm + 1e-6)).clamp(max=1.0))
    if len(gradients) < len(parameters):
        has_gradient = th.tensor([parameter.grad is not None for parameter in parameters], device=norms.device)
        norms = norms.new_zeros(len(parameters)).masked_scatter(has_gradient, norms)
    return total_norm, norms


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


def step_if_finite(optimizer: th.optim.Optimizer, total_norm: th.Tensor) -> None:
    """
    One step, unless a gradient is NaN or infinite, which one step would spread to all weights.

    :param optimizer: Any optimizer
    :param total_norm: Norm of all gradients
    :raises RuntimeError: The norm is not finite. A fused optimizer (``fused=True``) skips the step on its own, with no error,
        so that the host needn't wait for the device: look at the norms after the last of many steps.
    """
    if optimizer.param_groups[0].get("fused"):
        # The convention of `torch.amp.GradScaler`
        optimizer.found_inf = (~total_norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.found_inf = None  # type: ignore[attr-defined]
    else:
        refuse_nonfinite(total_norm)
        optimizer.step()
