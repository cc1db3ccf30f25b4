"""R2VPO's mathematics, for any trainer: it needs PyTorch and nothing else.

loss = RatioVarianceLoss("r2vpo", var_coef="auto", target_variance=0.01)
loss.follow_schedules(progress_remaining=1.0)
losses, deviation = loss(log_prob - old_log_prob, advantages)        # one value per sample or token
token_mean(losses, mask).backward()
loss.dual_step(token_mean(deviation.square(), mask), accepted=True)  # the multiplier
"""

from sb3_r2vpo.core.batch import Minibatch, constant_length_mean, mean, sequence_mean, token_mean
from sb3_r2vpo.core.multiplier import Multiplier
from sb3_r2vpo.core.objectives import OBJECTIVES, entropy_compensation, r2vpo, r2vpo_sequence, ratio_minus_one
from sb3_r2vpo.core.optim import Descent
from sb3_r2vpo.core.policy_loss import PolicyLoss, RatioVarianceLoss, make_policy_loss
from sb3_r2vpo.core.update import Update

__all__ = [
    "OBJECTIVES",
    "Descent",
    "Minibatch",
    "Multiplier",
    "PolicyLoss",
    "RatioVarianceLoss",
    "Update",
    "constant_length_mean",
    "entropy_compensation",
    "make_policy_loss",
    "mean",
    "r2vpo",
    "r2vpo_sequence",
    "ratio_minus_one",
    "sequence_mean",
    "token_mean",
]
