"""SB3's ``MlpPolicy`` differentiated by hand: a small network's update spends more time in autograd than on its numbers."""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn import functional as F

from sb3_r2vpo.r2vpo.distributions import CensoredGaussianDistribution, censored_gaussian
from sb3_r2vpo.r2vpo.evaluation import (
    categorical,
    categorical_backward,
    gaussian,
    gaussian_backward,
    gaussian_entropy,
    gaussian_sample,
    has_usual_distribution,
)

Activation = tuple[Callable[[th.Tensor], th.Tensor], Callable[[th.Tensor, th.Tensor], th.Tensor]]

#: Activations, in place; and the gradient of their inputs, from that of their outputs and from these
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: (th.tanh_, th.ops.aten.tanh_backward.default),
    nn.ReLU: (th.relu_, lambda gradient, outputs: th.ops.aten.threshold_backward.default(gradient, outputs, 0)),
}

#: PyTorch's number of this reduction
_MEAN = 1


class Layers:
    """
    Linear layers with an activation between each two.

    :param layers: Linear layers and activations in turn
    """

    def __init__(self, *layers: nn.Module) -> None:
        self.parameters = [(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)]
        self.activation, self.activation_backward = ACTIVATIONS[type(layers[1]) if len(layers) > 1 else nn.Tanh]

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Shape ``(batch_size, n_features)``
        :return: Outputs of the last layer
        """
        self.inputs = [features]
        for weight, bias in self.parameters[:-1]:
            self.inputs.append(self.activation(F.linear(self.inputs[-1], weight, bias)))
        return F.linear(self.inputs[-1], *self.parameters[-1])

    def backward(self, gradient: th.Tensor) -> None:
        """
        Set the gradients of the parameters.

        :param gradient: That of the outputs of the last :meth:`forward`
        """
        for (weight, bias), inputs in zip(reversed(self.parameters), reversed(self.inputs), strict=True):
            th.mm(gradient.t(), inputs, out=weight.grad)
            th.sum(gradient, 0, out=bias.grad)
            if inputs is not self.inputs[0]:
                gradient = self.activation_backward(gradient.mm(weight), inputs)


class PlainMlp:
    """
    Actor and critic of a policy that :func:`is_plain_mlp`. Their results and gradients are those of
    ``ActorCriticPolicy.evaluate_actions`` and autograd, bit for bit (the value of the entropy but for rounding); what is made
    of the results, the loss, is left to autograd.

    :param policy: The policy. Its parameters' ``grad`` must be tensors, to which gradients are written.
    :param entropy_gradient: Whether the loss depends on the entropy. If not, that of a Gaussian, which is the same for all
        states, is computed only once, now.
    :param with_values: Whether :meth:`evaluate_actions` has values, too: not if the critic learns apart, by a loss of its own
    """

    def __init__(self, policy: ActorCriticPolicy, entropy_gradient: bool = True, with_values: bool = True) -> None:
        self.policy, self.with_values = policy, with_values
        self.actor, self.critic = (Layers(*layers) for layers in _networks(policy))
        self.log_std: Any = policy.log_std if hasattr(policy, "log_std") else None
        distribution = policy.action_dist
        self.bounds: tuple[th.Tensor, ...] | None = None
        if isinstance(distribution, CensoredGaussianDistribution):
            self.bounds = tuple(bound.to(policy.device) for bound in (distribution.low, distribution.high))
        self.entropy_gradient = entropy_gradient
        if self.log_std is not None:
            self.gaussian_entropy = gaussian_entropy(self.log_std.detach().exp())

    def evaluate_actions(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor | None, th.Tensor, th.Tensor]:
        """
        :param observations: A batch of observations
        :param actions: The actions to evaluate
        :return: values (``None`` without them), log-probabilities and entropy, each of shape ``(batch_size,)``: leaves of
            autograd's graph, but for an entropy that the loss does not depend on, and for what is of a censored Gaussian
        """
        # Faster than `no_grad`. Its tensors can't enter a graph, their copies can.
        with th.inference_mode():
            features = self._features(observations)
            outputs = self.actor.forward(features)
            values = self.critic.forward(features).flatten() if self.with_values else None
            if self.log_std is None:
                self.categorical = outputs, actions
                log_prob, entropy = categorical(*self.categorical)
            elif self.bounds is None:
                deviation, std = actions - outputs, self.log_std.exp()
                distance = deviation * deviation / (std * std)
                self.gaussian = deviation, distance, std
                log_prob = gaussian(distance, std)
                entropy = (gaussian_entropy(std) if self.entropy_gradient else self.gaussian_entropy).expand_as(log_prob)
        self.values = None if values is None else values.clone().requires_grad_()
        if self.bounds is not None:
            # Some twenty operations on a few numbers each: left to autograd
            self.mean = outputs.clone().requires_grad_()
            self.log_prob, self.entropy = censored_gaussian(actions, self.mean, self.log_std.exp(), *self.bounds)
            return self.values, self.log_prob, self.entropy
        self.log_prob, self.entropy = log_prob.clone().requires_grad_(), entropy
        if self.entropy_gradient:
            self.entropy = entropy.clone().requires_grad_()
        return self.values, self.log_prob, self.entropy

    def act(self, obs: th.Tensor, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        ``policy.forward``, bit for bit, from the same random numbers; without gradients.

        :param obs: A batch of observations
        :param noise: Of Gaussian actions, of unit variance and their flat shape; ``None`` for independent normal numbers
        :return: actions, values of shape ``(batch_size, 1)``, and log-probabilities
        """
        features = self._features(obs)
        outputs, values = self.actor.forward(features), self.critic.forward(features)
        if self.log_std is None:
            logits = outputs - outputs.logsumexp(dim=-1, keepdim=True)
            actions = th.multinomial(F.softmax(logits, dim=-1), 1, replacement=True)
            log_prob = logits.gather(-1, actions).flatten()
        else:
            std = self.log_std.exp()
            actions, log_prob = gaussian_sample(outputs, std, th.randn_like(outputs) if noise is None else noise)
            if self.bounds is not None:
                actions = actions.clamp(*self.bounds)
                log_prob, _ = censored_gaussian(actions, outputs, std, *self.bounds)
        return actions.reshape((-1, *self.policy.action_space.shape)), values, log_prob  # type: ignore[misc]

    def backward(self, loss: th.Tensor) -> None:
        """
        Set the gradients of all parameters, or of the actor's alone without values.

        :param loss: A scalar made of the results of the last :meth:`evaluate_actions`
        """
        if self.bounds is not None:
            self.log_std.grad.zero_()
        loss.backward()
        with th.inference_mode():
            if self.bounds is not None:
                outputs_grad = _gradient(self.mean)
            elif self.log_std is None:
                outputs_grad = categorical_backward(*self.categorical, _gradient(self.log_prob), self.entropy.grad)
            else:
                outputs_grad, std_grad = gaussian_backward(*self.gaussian, _gradient(self.log_prob), self.entropy.grad)
                th.mul(std_grad, self.gaussian[-1], out=self.log_std.grad)
            self.actor.backward(outputs_grad)
            if self.values is not None:
                self.critic.backward(_gradient(self.values).unsqueeze(1))

    @th.inference_mode()
    def regress_values(self, observations: th.Tensor, returns: th.Tensor) -> th.Tensor:
        """
        Set the gradients of the critic's parameters to those of the mean squared error of its values.

        :param observations: A batch of observations
        :param returns: What the values should be, shape ``(batch_size,)``
        :return: The error
        """
        values = self.critic.forward(self._features(observations)).flatten()
        gradient = th.ops.aten.mse_loss_backward.default(values.new_ones(()), values, returns, _MEAN)
        self.critic.backward(gradient.unsqueeze(1))
        return F.mse_loss(values, returns)

    def _features(self, observations: th.Tensor) -> th.Tensor:
        features = preprocess_obs(observations, self.policy.observation_space, self.policy.normalize_images)
        return features.flatten(1)  # type: ignore[union-attr]


def _gradient(leaf: th.Tensor) -> th.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _networks(policy: ActorCriticPolicy) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers of the actor and of the critic."""
    extractor = policy.mlp_extractor
    return [*extractor.policy_net, policy.action_net], [*extractor.value_net, policy.value_net]


def is_plain_mlp(policy: nn.Module) -> bool:
    """
    :param policy: Any policy
    :return: Whether it is SB3's ``MlpPolicy`` with a usual distribution and activation, trained as a whole, and neither
        changed by a subclass nor by hooks
    """
    if not (
        isinstance(policy, ActorCriticPolicy)
        and has_usual_distribution(policy)
        and type(policy).extract_features is ActorCriticPolicy.extract_features
        and type(policy).predict_values is ActorCriticPolicy.predict_values
        and type(policy.mlp_extractor) is MlpExtractor
    ):
        return False
    actor, critic = _networks(policy)
    linears, activations = actor[::2] + critic[::2], [{*map(type, layers[1::2])} for layers in (actor, critic)]
    extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    known = [policy.log_std] if hasattr(policy, "log_std") else []
    known += [parameter for layer in linears for parameter in layer.parameters()]
    return (
        all(type(extractor) is FlattenExtractor for extractor in extractors)
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in linears)
        and all(len(types) <= 1 and types <= ACTIVATIONS.keys() for types in activations)
        and {*map(id, known)} == {*map(id, policy.parameters())}
        and all(parameter.requires_grad and not parameter._backward_hooks for parameter in known)
        and not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in policy.modules()
        )
    )
