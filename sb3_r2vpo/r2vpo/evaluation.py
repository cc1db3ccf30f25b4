"""``ActorCriticPolicy.evaluate_actions`` without distribution objects, an eighth of the update of a small network."""

import math

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

Evaluation = tuple[th.Tensor, th.Tensor, th.Tensor | None]


def gaussian(mean: th.Tensor, log_std: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-probability and entropy of a diagonal Gaussian, operation by operation those of ``torch.distributions.Normal``.

    :param mean: Shape ``(batch_size, action_dim)``
    :param log_std: Shape ``(action_dim,)``
    :param actions: Shape ``(batch_size, action_dim)``
    :return: Log-probability and entropy, each of shape ``(batch_size,)``
    """
    # Expanded before it is used: the gradient is then summed over the batch where `Normal` sums it, in the same order
    std = log_std.exp().expand_as(mean)
    log_prob = -((actions - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    entropy = 0.5 + 0.5 * math.log(2 * math.pi) + th.log(std)
    return log_prob.sum(dim=1), entropy.sum(dim=1)


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


def evaluate_actions(policy: ActorCriticPolicy, observations: PyTorchObs, actions: th.Tensor) -> Evaluation:
    """
    ``policy.evaluate_actions(observations, actions)``, bit for bit, and just that where the policy or its distribution is not
    one of the two most usual.

    :param policy: Any actor-critic policy
    :param observations: A batch of observations
    :param actions: The actions to evaluate
    :return: values, log-probabilities and (if it has a closed form) entropy, as ``policy`` returns them
    """
    is_gaussian = type(policy.action_dist) is DiagGaussianDistribution
    is_usual = (
        (is_gaussian or type(policy.action_dist) is CategoricalDistribution)
        and type(policy).evaluate_actions is ActorCriticPolicy.evaluate_actions
        and type(policy)._get_action_dist_from_latent is ActorCriticPolicy._get_action_dist_from_latent
    )
    if not is_usual:
        return policy.evaluate_actions(observations, actions)

    features = policy.extract_features(observations)
    if policy.share_features_extractor:
        latent_pi, latent_vf = policy.mlp_extractor(features)
    else:
        pi_features, vf_features = features
        latent_pi = policy.mlp_extractor.forward_actor(pi_features)
        latent_vf = policy.mlp_extractor.forward_critic(vf_features)
    outputs = policy.action_net(latent_pi)
    log_prob, entropy = gaussian(outputs, policy.log_std, actions) if is_gaussian else categorical(outputs, actions)
    return policy.value_net(latent_vf), log_prob, entropy
