"""``ActorCriticPolicy.evaluate_actions`` without distribution objects, an eighth of the update of a small network."""

import math

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

from sb3_r2vpo.r2vpo.distributions import CensoredGaussianDistribution, censored_gaussian

Evaluation = tuple[th.Tensor, th.Tensor, th.Tensor | None]


def gaussian(distance: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Log-probability of a diagonal Gaussian, bit for bit that of ``torch.distributions.Normal``.

    Factors of two are where there are fewest of them, not where ``Normal`` has them: they are exact anywhere.

    :param distance: Squared deviation of actions from their mean, over the variance; shape ``(batch_size, action_dim)``
    :param std: The same shape, or ``(action_dim,)`` if it is the same for all
    :return: Shape ``(batch_size,)``
    """
    log_prob = th.sub(-std.log(), distance, alpha=0.5) - math.log(math.sqrt(2 * math.pi))
    return log_prob.sum(dim=-1)


def gaussian_sample(mean: th.Tensor, std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Actions of a diagonal Gaussian and their log-probabilities, operation by operation those of ``torch.distributions.Normal``.

    :param mean: Shape ``(batch_size, action_dim)``
    :param std: Shape ``(action_dim,)``
    :param noise: What makes the actions, in standard deviations; the shape of ``mean``
    :return: Actions, and log-probabilities of shape ``(batch_size,)``
    """
    actions = mean + noise * std
    deviation = actions - mean
    return actions, gaussian(deviation * deviation / (std * std), std)


def gaussian_entropy(std: th.Tensor) -> th.Tensor:
    """
    Entropy of a diagonal Gaussian, operation by operation that of ``torch.distributions.Normal``.

    :param std: Shape ``(..., action_dim)``
    :return: Shape ``(...)``
    """
    return (0.5 + 0.5 * math.log(2 * math.pi) + th.log(std)).sum(dim=-1)


def gaussian_backward(
    deviation: th.Tensor,
    distance: th.Tensor,
    std: th.Tensor,
    log_prob_grad: th.Tensor,
    entropy_grad: th.Tensor | None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    The gradient of :func:`gaussian` and :func:`gaussian_entropy`, bit for bit that of autograd.

    :param deviation: Actions minus their mean, shape ``(batch_size, action_dim)``
    :param distance: Its square over the variance
    :param std: Shape ``(action_dim,)``
    :param log_prob_grad: Gradient of the log-probabilities, shape ``(batch_size,)``
    :param entropy_grad: Gradient of the entropies, same shape; ``None`` for zero
    :return: Gradients of the mean and of ``std``
    """
    variance, gradient = std * std, log_prob_grad.unsqueeze(1)
    std_grad = gradient / std
    if entropy_grad is not None:
        std_grad = std_grad - entropy_grad.unsqueeze(1) / std
    std_grad = distance / variance * gradient * std - std_grad
    return gradient / variance * deviation, std_grad.sum(dim=0)


def categorical(logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-probability and entropy of a categorical distribution, operation by operation those of ``torch.distributions``.

    :param logits: Shape ``(batch_size, n_actions)``
    :param actions: Integers of shape ``(batch_size,)``
    :return: Log-probability and entropy, each of shape ``(batch_size,)``
    """
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    log_prob = logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    # An impossible action, of logit minus infinity, adds zero to the entropy
    entropy = -(th.clamp(logits, min=th.finfo(logits.dtype).min) * F.softmax(logits, dim=-1)).sum(-1)
    return log_prob, entropy


def categorical_backward(
    logits: th.Tensor, actions: th.Tensor, log_prob_grad: th.Tensor, entropy_grad: th.Tensor | None
) -> th.Tensor:
    """
    The gradient of :func:`categorical`, operation by operation that of autograd.

    :param logits: As the forward function's, like the next one
    :param log_prob_grad: Gradient of its log-probability, shape ``(batch_size,)``
    :param entropy_grad: Gradient of its entropy, same shape; ``None`` for zero
    :return: Gradient of the logits
    """
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    gradient = th.zeros_like(logits).scatter_add_(-1, actions.unsqueeze(-1), log_prob_grad.unsqueeze(-1))
    if entropy_grad is not None:
        probs, minimum = F.softmax(logits, dim=-1), th.finfo(logits.dtype).min
        product_grad = -entropy_grad.unsqueeze(-1)
        probs_grad = product_grad * logits.clamp(min=minimum)
        through_softmax = th.ops.aten._softmax_backward_data(probs_grad, probs, -1, logits.dtype)
        gradient = through_softmax + th.where(logits >= minimum, product_grad * probs, 0.0) + gradient
    return gradient - gradient.sum(dim=-1, keepdim=True) * logits.exp()


def is_gaussian(policy: ActorCriticPolicy) -> bool:
    """:return: Whether a policy's actions have a diagonal Gaussian distribution"""
    return type(policy.action_dist) is DiagGaussianDistribution


def has_usual_distribution(policy: ActorCriticPolicy) -> bool:
    """
    :return: Whether :func:`gaussian`, :func:`censored_gaussian` or :func:`categorical` tells what a policy's
        ``evaluate_actions`` does
    """
    return (
        type(policy.action_dist) in (DiagGaussianDistribution, CensoredGaussianDistribution, CategoricalDistribution)
        and type(policy).evaluate_actions is ActorCriticPolicy.evaluate_actions
        and type(policy)._get_action_dist_from_latent is ActorCriticPolicy._get_action_dist_from_latent
    )


def acts_as_usual(policy: ActorCriticPolicy) -> bool:
    """:return: Whether a policy's ``forward`` is SB3's, with a distribution that :func:`has_usual_distribution`"""
    return has_usual_distribution(policy) and type(policy).forward is ActorCriticPolicy.forward


def evaluate_actions(policy: ActorCriticPolicy, observations: PyTorchObs, actions: th.Tensor) -> Evaluation:
    """
    ``policy.evaluate_actions(observations, actions)``, bit for bit, and just that where the policy or its distribution is not
    one of the usual.

    :param policy: Any actor-critic policy
    :param observations: A batch of observations
    :param actions: The actions to evaluate
    :return: values, log-probabilities and (if it has a closed form) entropy, as ``policy`` returns them
    """
    if not has_usual_distribution(policy):
        return policy.evaluate_actions(observations, actions)

    outputs, values = _outputs_and_values(policy, observations)
    if is_gaussian(policy):
        # Expanded before it is used: the gradient is then summed over the batch where `Normal` sums it, in the same order
        std = policy.log_std.exp().expand_as(outputs)
        log_prob, entropy = gaussian((actions - outputs) ** 2 / std**2, std), gaussian_entropy(std)
    elif isinstance(policy.action_dist, CensoredGaussianDistribution):
        bounds = policy.action_dist.low, policy.action_dist.high
        log_prob, entropy = censored_gaussian(actions, outputs, policy.log_std.exp().expand_as(outputs), *bounds)
    else:
        log_prob, entropy = categorical(outputs, actions)
    return values, log_prob, entropy


def act_with_noise(
    policy: ActorCriticPolicy, observations: PyTorchObs, noise: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    ``policy.forward`` with other noise than independent normal numbers.

    :param policy: A policy that :func:`is_gaussian` and :func:`acts_as_usual`
    :param observations: A batch of observations
    :param noise: Of unit variance and of the actions' flat shape
    :return: actions, values, and log-probabilities, as ``policy`` returns them
    """
    outputs, values = _outputs_and_values(policy, observations)
    actions, log_prob = gaussian_sample(outputs, policy.log_std.exp(), noise)
    return actions.reshape((-1, *policy.action_space.shape)), values, log_prob  # type: ignore[misc]


def _outputs_and_values(policy: ActorCriticPolicy, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
    features = policy.extract_features(observations)
    if policy.share_features_extractor:
        latent_pi, latent_vf = policy.mlp_extractor(features)
    else:
        pi_features, vf_features = features
        latent_pi = policy.mlp_extractor.forward_actor(pi_features)
        latent_vf = policy.mlp_extractor.forward_critic(vf_features)
    return policy.action_net(latent_pi), policy.value_net(latent_vf)
