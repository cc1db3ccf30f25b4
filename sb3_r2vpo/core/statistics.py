"""What is logged of an update: computed once, at its end, from tensors that the minibatches left on the device."""

from collections.abc import Sequence

import torch as th

from sb3_r2vpo.core.policy_loss import PPO_CLIP_RANGE
from sb3_r2vpo.core.ratio import ratio_statistics


def summarize_ratios(
    log_ratio: th.Tensor, clip_low: float | th.Tensor = PPO_CLIP_RANGE, clip_high: float | th.Tensor | None = None
) -> dict[str, th.Tensor]:
    """
    What the ratios of all minibatches of an update tell, beside their mean variance.

    :param log_ratio: In one dimension, without padding: of whole responses where these are the objective's actions, see
        :meth:`~sb3_r2vpo.core.policy_loss.PolicyLoss.action_log_ratio`
    :param clip_low: How far below one ratios count as clipped, see
        :attr:`~sb3_r2vpo.core.policy_loss.PolicyLoss.clip_range`
    :param clip_high: How far above one; ``None`` (default) for as far as below
    :return: Scalars. ``ess`` is Kish's effective sample size as a fraction of the samples: 1 on-policy, towards 0 if a few
        ratios dominate.
    """
    stats = ratio_statistics(log_ratio)
    ratio = stats["ratio"]
    clip_high = clip_low if clip_high is None else clip_high
    return {
        "approx_kl": stats["approx_kl"].mean(),
        # The largest of all: one outlier can dominate an update, and a mean would hide it
        "ratio_max": ratio.max(),
        "ess": ratio.mean().square() / ratio.square().mean(),
        "clip_fraction": ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).float().mean(),
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
