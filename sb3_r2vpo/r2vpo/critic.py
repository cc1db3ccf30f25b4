"""Which parameters are the critic's own."""

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy


def critic_parameters(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    """
    :param policy: A policy
    :return: The parameters that its values depend on
    :raises ValueError: There are none, or the policy's actions depend on some of them, too.
    """
    own: list[th.nn.Parameter] = []
    # Language models have no such networks
    if hasattr(policy, "mlp_extractor"):
        actor = [policy.pi_features_extractor, policy.mlp_extractor.policy_net]
        critic = [policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net]
        shared = {id(parameter) for module in actor for parameter in module.parameters()}
        own = [parameter for module in critic for parameter in module.parameters()]
    if not own or any(id(parameter) in shared for parameter in own):
        raise ValueError(
            "`critic_capacity` is for a critic with parameters of its own, which this policy does not have. If it shares its "
            "features extractor, pass `policy_kwargs=dict(share_features_extractor=False)`; else no `critic_capacity`."
        )
    return own
