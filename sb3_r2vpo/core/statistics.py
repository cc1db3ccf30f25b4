"""What is logged of an update: computed once, at its end, from tensors that the minibatches left on the device."""

from collections.abc import Sequence

import torch as th

from sb3_r2vpo.core.objectives import ratio_statistics

#: Clip range against which ``train/clip_fraction`` is counted, unless the objective has one of its own: SB3 PPO's default.
PPO_CLIP_RANGE = 0.2


def summarize_ratios(log_ratio: th.Tensor, clip_range: float | th.Tensor = PPO_CLIP_RANGE) -> dict[str, th.Tensor]:
    """
    What the ratios of all minibatches of an update tell, beside their mean variance.

    :param log_ratio: In one dimension, without padding
    :param clip_range: Deviation of the ratio from one beyond which PPO would clip
    :return: Scalars. ``ess`` is Kish's effective sample size as a fraction of the samples: 1 on-policy, towards 0 if a few
        ratios dominate.
    """
    stats = ratio_statistics(log_ratio)
    ratio = stats["ratio"]
    return {
        "approx_kl": stats["approx_kl"].mean(),
        # The largest of all: one outlier can dominate an update, and a mean would hide it
        "ratio_max": ratio.max(),
        "ess": ratio.mean().square() / ratio.square().mean(),
        "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
    }


def gradient_norms(is_critic: Sequence[bool], norms: th.Tensor) -> dict[str, th.Tensor]:
    """
    :param is_critic: For each of a policy's parameters, whether it is the critic's own
    :param norms: Those of the gradient of each of them, before clipping, in the last dimension
    :return: Norms of the critic's own gradients, if there are any, and of all others (a shared feature extractor's included)
    """
    critic = th.tensor(is_critic)
    groups = {"policy_grad_norm": norms[..., ~critic], "value_grad_norm": norms[..., critic]}
    return {name: th.linalg.vector_norm(group, dim=-1) for name, group in groups.items() if group.shape[-1] > 0}
