"""The algorithm on one page: one gradient step on the policy and one dual step on the multiplier, from one minibatch."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch as th

from sb3_r2vpo.core.batch import Minibatch
from sb3_r2vpo.core.compilation import compiled
from sb3_r2vpo.core.optim import Descent
from sb3_r2vpo.core.policy_loss import PolicyLoss
from sb3_r2vpo.core.ratio import ratio_statistics

Statistics = dict[str, th.Tensor]
Backward = Callable[[th.Tensor], None]


class Evaluation(NamedTuple):
    """
    Actions under the current policy.

    :param values: The critic's, shape ``(n,)`` or ``(n, 1)``; ``None`` where it does not learn from these minibatches
    :param log_prob: Log-probabilities, of the shape of ``old_log_prob``
    :param entropy: The same shape; ``None`` where there is no closed form
    :param backward: From a loss that depends on them to the gradients of the parameters. A policy may have its backward pass
        written out; it then writes to the parameters' ``grad``.
    """

    values: th.Tensor | None
    log_prob: th.Tensor
    entropy: th.Tensor | None
    backward: Backward = th.Tensor.backward


class ValueLoss(Protocol):
    """How the critic learns from the policy's minibatches; see ``sb3_r2vpo.common.critic``."""

    #: Coefficient of the value loss
    vf_coef: float

    def loss(self, values: th.Tensor, batch: Minibatch) -> th.Tensor:
        """:return: The value loss, a scalar"""


@dataclass
class Update:
    """
    All that the minibatches of one update have in common.

    :param evaluate: From the samples of a minibatch to their :class:`Evaluation`
    :param objective: The policy's loss, with its multiplier
    :param critic: The critic's
    :param descend: The optimizer
    :param ent_coef: Entropy coefficient, a scalar; ``None`` for no entropy bonus
    :param normalize_advantage: Whether to normalise advantages over the minibatch: it sets the units of the multiplier
    :param target_kl: No step is made on a minibatch whose approximate KL divergence exceeds 1.5 times this value
    :param kind: Updates of different kinds, such as those of different policy classes, are compiled separately
    """

    evaluate: Callable[[Any], Evaluation]
    objective: PolicyLoss
    critic: ValueLoss
    descend: Descent
    ent_coef: th.Tensor | None = None
    normalize_advantage: bool = True
    target_kl: float | None = None
    kind: Hashable = None

    def __call__(self, batch: Minibatch) -> Statistics:
        """
        :param batch: A minibatch
        :return: Its statistics, on the device: to read one is to wait for it
        """
        return (compiled_step(self.kind) if self.descend.compiled else step)(self, batch)


def step(update: Update, batch: Minibatch) -> Statistics:
    """One gradient step on the policy, unless ``target_kl`` is exceeded, and one dual step on the multiplier."""
    samples, objective = batch.samples, update.objective
    values, log_prob, entropy, backward = update.evaluate(samples)
    advantages = batch.normalized_advantages() if update.normalize_advantage else samples.advantages

    # Theorem 4.3: -rho A + lambda (rho - 1)^2
    log_ratio = log_prob - samples.old_log_prob
    losses, deviation = objective(log_ratio, advantages, mask=batch.mask, old_log_prob=samples.old_log_prob)
    loss = policy_loss = batch.mean(losses)
    ratio_variance = batch.mean(deviation.square())

    # Entropy favors exploration; -log_prob estimates it where there is no closed form
    entropy_loss = -batch.mean(-log_prob if entropy is None else entropy)
    statistics = {
        "log_ratio": objective.action_log_ratio(log_ratio.detach(), batch.mask),
        "ratio_variance": ratio_variance,
        "policy_gradient_loss": policy_loss.detach(),
        "entropy_loss": entropy_loss.detach(),
    }
    ent_coef, bonus = update.ent_coef, objective.entropy_bonus(ratio_variance)
    if bonus is not None:
        ent_coef = bonus if ent_coef is None else ent_coef + bonus
    if ent_coef is not None:
        statistics["ent_coef"] = ent_coef
        loss = loss + ent_coef * entropy_loss

    if values is not None:
        value_loss = update.critic.loss(values.flatten(), batch)
        statistics["value_loss"] = value_loss.detach()
        loss = loss.add(value_loss, alpha=update.critic.vf_coef)
    statistics["loss"] = loss.detach()

    may_step = None
    if update.target_kl is not None:
        statistics["approx_kl"] = ratio_statistics(statistics["log_ratio"])["approx_kl"].mean()
        may_step = statistics["approx_kl"] <= 1.5 * update.target_kl
    accepted, statistics["grad_norms"] = update.descend(loss, may_step, backward)
    # Eq. 10: lambda <- max(0, lambda + eta (E[(rho - 1)^2] - epsilon))
    objective.dual_step(ratio_variance, accepted)
    return statistics


@cache
def compiled_step(kind: Hashable) -> Callable[[Update, Minibatch], Statistics]:
    """:return: :func:`step`, compiled for updates of this kind"""
    return compiled(step)
