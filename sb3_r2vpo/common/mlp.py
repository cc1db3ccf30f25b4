"""The forward and backward pass of SB3's ``MlpPolicy``, written out: a small network's update spends more time in autograd and
in distribution objects than on its numbers (``benchmarks/speed``, ablation)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sb3_r2vpo.common.distributions import (
    CorrelatedGaussianDistribution,
    categorical,
    categorical_backward,
    gaussian,
    gaussian_backward,
    gaussian_entropy,
)

Activation = tuple[Callable[[th.Tensor], th.Tensor], Callable[[th.Tensor, th.Tensor], th.Tensor]]

#: Activations, in place; and the gradient of their inputs, from that of their outputs and from these
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: (th.tanh_, th.ops.aten.tanh_backward.default),
    nn.ReLU: (th.relu_, lambda gradient, outputs: th.ops.aten.threshold_backward.default(gradient, outputs, 0)),
}

#: PyTorch's number of this reduction
_MEAN = 1

GAUSSIANS = (DiagGaussianDistribution, CorrelatedGaussianDistribution)


class Layers:
    """
    Linear layers with an activation between each two.

    :param layers: Linear layers and activations in turn
    """

    def __init__(self, layers: list[Any]) -> None:
        self.parameters: list[Any] = [(layer.weight, layer.bias) for layer in layers[::2]]
        self.activation, self.activation_backward = ACTIVATIONS[type(layers[1]) if len(layers) > 1 else nn.Tanh]

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
        """
        :param features: Shape ``(batch_size, n_features)``
        :return: Outputs of the last layer, and the inputs of all layers
        """
        inputs = [features]
        for weight, bias in self.parameters[:-1]:
            features = self.activation(F.linear(features, weight, bias))
            inputs.append(features)
        return F.linear(features, *self.parameters[-1]), inputs

    def backward(self, gradient: th.Tensor, inputs: list[th.Tensor]) -> None:
        """
        Set the gradients of the parameters, whose ``grad`` are tensors to write to.

        :param gradient: That of the outputs
        :param inputs: Of all layers, from :meth:`forward`
        """
        for (weight, bias), features in zip(reversed(self.parameters), reversed(inputs), strict=True):
            th.mm(gradient.t(), features, out=weight.grad)
            th.sum(gradient, 0, out=bias.grad)
            if features is not inputs[0]:
                gradient = self.activation_backward(gradient.mm(weight), features)


class Networks:
    """
    Actor and critic of a policy, and the logarithm of a Gaussian's standard deviation, ``None`` for a categorical one.

    :param policy: An MLP of linear layers with tanh or ReLU; not referred to, so that it can be collected
    """

    #: Whether nothing changes for the time being, see :func:`unchanging`
    unchanging = False
    #: Activations of the last evaluation, kept until the next one has its own: memory that is freed after each minibatch, the
    #: C library hands back and has to fetch again, a tenth of the time with five layers of 256 and minibatches of 4096
    kept: Any = None

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.layers = _layers(policy)
        (self.actor, self.critic), self.log_std = map(Layers, self.layers), policy._parameters.get("log_std")
        pairs = self.actor.parameters + self.critic.parameters
        self.parameters: list[Any] = [parameter for pair in pairs for parameter in pair]
        if self.log_std is not None:
            self.parameters.append(self.log_std)
        self.distribution = type(policy.action_dist)
        mlp = policy.mlp_extractor
        modules = [mlp, mlp.policy_net, mlp.value_net, *self.layers[0], *self.layers[1]]
        # Where each part is found, and how many there are
        containers: list[dict[str, Any]] = [policy._modules, policy._parameters]
        containers += [container for module in modules for container in (module._modules, module._parameters) if container]
        self.places = [(container, name, part) for container in containers for name, part in container.items()]
        # A method that somebody has set on a module makes one more attribute
        watched = [*containers, *(module.__dict__ for module in modules)]
        self.sizes = [(container, len(container)) for container in watched]
        self.n_attributes = len(vars(policy))
        # Each registration of a hook, on a module or a tensor, takes the next number
        self.n_hooks = RemovableHandle.next_id

    def are_of(self, policy: ActorCriticPolicy) -> bool:
        """
        :param policy: The same policy, later
        :return: Whether no part of it has been replaced, no method set and no hook registered since
        """
        if self.n_hooks != RemovableHandle.next_id or type(policy.action_dist) is not self.distribution:
            return False
        if len(vars(policy)) != self.n_attributes:
            return False
        for container, name, part in self.places:
            if container.get(name) is not part:
                return False
        return all(len(container) == size for container, size in self.sizes)

    def are_trained(self) -> bool:
        """:return: Whether all parameters are to be trained"""
        return self.unchanging or all(map(_requires_grad, self.parameters))


_requires_grad = attrgetter("requires_grad")


def _layers(policy: ActorCriticPolicy) -> tuple[list[Any], list[Any]]:
    """Those of the actor and of the critic."""
    mlp = policy.mlp_extractor
    return [*mlp.policy_net, policy.action_net], [*mlp.value_net, policy.value_net]


def _is_written_out(policy: ActorCriticPolicy) -> bool:
    """Whether a policy computes what :class:`Networks` computes."""
    # A language model has no such parts
    if type(policy._modules.get("mlp_extractor")) is not MlpExtractor:
        return False
    extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    if (
        any(is_changed(policy, name) for name in ("extract_features", "_get_action_dist_from_latent"))
        or any("forward" in name for module in policy.modules() for name in vars(module) if callable(vars(module)[name]))
        or not all(type(extractor) is FlattenExtractor for extractor in extractors)
    ):
        return False
    actor, critic = _layers(policy)
    activations = {*map(type, actor[1::2] + critic[1::2])}
    gaussian_actions = "log_std" in policy._parameters
    return (
        type(policy.action_dist) in (GAUSSIANS if gaussian_actions else (CategoricalDistribution,))
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in actor[::2] + critic[::2])
        and len(activations) <= 1
        and activations <= ACTIVATIONS.keys()
        and all(type(parameter) is nn.Parameter for layer in actor + critic for parameter in layer._parameters.values())
        and not any(_has_hooks(part) for part in (*policy.modules(), *policy.parameters()))
    )


def _has_hooks(part: Any) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(part, name, None) for name in names)


def is_changed(policy: ActorCriticPolicy, name: str) -> bool:
    """:return: Whether a method of a policy is another than SB3's, by its class or set on the policy itself"""
    return getattr(getattr(policy, name), "__func__", None) is not getattr(ActorCriticPolicy, name)


_FOUND: WeakKeyDictionary[ActorCriticPolicy, Networks] = WeakKeyDictionary()


def networks(policy: ActorCriticPolicy) -> Networks | None:
    """
    The networks of a policy that is an MLP of linear layers with tanh or ReLU, and a Gaussian or categorical distribution.

    :param policy: Any policy
    :return: Its networks, which follow layers that were replaced or given hooks; ``None`` where the policy is something else,
        which is then left to its modules and to autograd
    """
    found = _FOUND.get(policy)
    if found is not None and (found.unchanging or found.are_of(policy)):
        return found
    if not _is_written_out(policy):
        return None
    found = _FOUND[policy] = Networks(policy)
    return found


@contextmanager
def unchanging(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    For the minibatches of one update, between which no code of the user's runs: a policy's networks are looked up once.

    :param policy: Any policy
    """
    net = networks(policy)
    if net is None or not net.are_trained():
        yield
        return
    net.unchanging = True
    try:
        yield
    finally:
        net.unchanging = False


class MlpEvaluation:
    """
    Values, log-probabilities and entropies of actions, bit for bit those of ``ActorCriticPolicy.evaluate_actions``, and the
    backward pass that belongs to them. What is made of them, the loss, is left to autograd, whose graph begins here.

    :param net: The networks
    :param features: Observations, shape ``(batch_size, n_features)``
    :param actions: Shape ``(batch_size, action_dim)``; integers of shape ``(batch_size,)`` for a categorical distribution
    :param with_values: Whether values are needed
    """

    #: Of the distribution, what its gradient takes
    parts: Any

    def __init__(self, net: Networks, features: th.Tensor, actions: th.Tensor, with_values: bool) -> None:
        self.net = net
        # Faster than `no_grad`. Its tensors can't enter a graph, their copies can.
        with th.inference_mode():
            outputs, self.actor_inputs = net.actor.forward(features)
            values, self.critic_inputs = net.critic.forward(features) if with_values else (None, [])
            if net.log_std is None:
                self.parts = outputs, actions
                log_prob, entropy = categorical(outputs, actions)
            else:
                deviation, std = actions - outputs, net.log_std.exp()
                distance = deviation * deviation / (std * std)
                self.parts = deviation, distance, std
                log_prob = gaussian(distance, std)
                entropy = gaussian_entropy(std).expand_as(log_prob)
        #: Shape ``(batch_size, 1)``, or ``None``
        self.values = None if values is None else values.clone().requires_grad_()
        #: Shape ``(batch_size,)``, like the entropies
        self.log_prob = log_prob.clone().requires_grad_()
        self.entropy = entropy.clone().requires_grad_()
        net.kept = self.actor_inputs, self.critic_inputs

    def backward(self, loss: th.Tensor) -> None:
        """
        Set the gradients of the parameters, whose ``grad`` are tensors to write to.

        :param loss: A scalar that depends on the log-probabilities, and perhaps on the values and the entropies
        """
        loss.backward()
        with th.inference_mode():
            log_prob_grad, entropy_grad = _gradient(self.log_prob), self.entropy.grad
            if self.net.log_std is None:
                outputs, actions = self.parts
                outputs_grad = categorical_backward(outputs, actions, log_prob_grad, entropy_grad)
            else:
                deviation, distance, std = self.parts
                outputs_grad, std_grad = gaussian_backward(deviation, distance, std, log_prob_grad, entropy_grad)
                th.mul(std_grad, std, out=self.net.log_std.grad)
            self.net.actor.backward(outputs_grad, self.actor_inputs)
            if self.values is not None:
                self.net.critic.backward(_gradient(self.values), self.critic_inputs)


def _gradient(leaf: th.Tensor) -> th.Tensor:
    assert leaf.grad is not None, "The loss does not depend on it"
    return leaf.grad


class ValueRegression:
    """
    The mean squared error of values, bit for bit that of ``predict_values``, and its backward pass.

    :param critic: The critic
    :param features: Observations, shape ``(batch_size, n_features)``
    :param returns: What the values should be, shape ``(batch_size,)``
    """

    def __init__(self, critic: Layers, features: th.Tensor, returns: th.Tensor) -> None:
        self.critic, self.returns = critic, returns
        with th.inference_mode():
            values, self.inputs = critic.forward(features)
            self.values = values.flatten()
            self.loss = F.mse_loss(self.values, returns)

    def backward(self, loss: th.Tensor) -> None:
        """
        Set the gradients of the critic's parameters, whose ``grad`` are tensors to write to.

        :param loss: The error
        """
        with th.inference_mode():
            gradient = th.ops.aten.mse_loss_backward.default(loss.new_ones(()), self.values, self.returns, _MEAN)
            self.critic.backward(gradient.unsqueeze(1), self.inputs)
