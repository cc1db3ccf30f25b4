"""The critic: one that learns with the policy, as PPO's, or one that is optimised separately, before the policy."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain, compress, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_r2vpo.common.checks import check_flag, check_number, check_whole_number, is_number, number_or_schedule
from sb3_r2vpo.common.finite import finite_minibatches
from sb3_r2vpo.common.mlp import unchanging
from sb3_r2vpo.common.policies import evaluate, regress_values, stored_actions
from sb3_r2vpo.common.rollout import Rollout, passes
from sb3_r2vpo.core.batch import Minibatch
from sb3_r2vpo.core.compilation import compiled
from sb3_r2vpo.core.multiplier import scheduled
from sb3_r2vpo.core.optim import Descent

if TYPE_CHECKING:
    from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm


class Critic:
    """What both kinds of critic answer; by default, as for a critic that learns from the policy's minibatches."""

    #: Number of rollouts that the critic learns from by itself, before the policy does
    n_rollouts = 0
    #: Coefficient of the value loss in the policy's minibatches
    vf_coef = 0.0
    #: How far a value may move within an update
    clip_range_vf: float | th.Tensor | None = None
    #: Whether values and advantages are computed anew: of replayed rollouts, and of the current one before each epoch
    recomputes_replayed, recomputes_each_epoch = True, False

    @property
    def learns_with_policy(self) -> bool:
        """Whether it learns from the policy's minibatches"""
        return self.n_rollouts == 0

    def check(self, policy: ActorCriticPolicy) -> None:
        """:raises ValueError: The critic is not for such a policy."""

    def follow_schedules(self, progress_remaining: float, as_value: Callable[[float], Any] = float) -> None:
        """
        :param progress_remaining: From 1 (start of training) to 0
        :param as_value: Makes a coefficient of a number: compiled code needs a tensor
        """

    def fit(self, model: "RatioVarianceAlgorithm", rollouts: list[Rollout]) -> int:
        """
        Learn from rollouts, before the policy does.

        :param model: The algorithm
        :param rollouts: The newest ones, the oldest of them first
        :return: Number of minibatches that were left out, as their gradient was not finite
        :raises NonFiniteGradient: These were too many. The others have been learned from, and the critic is finite.
        """
        return 0

    def loss(self, values: th.Tensor, batch: Minibatch) -> th.Tensor:
        """
        :param values: The current critic's
        :param batch: A minibatch
        :return: The value loss, a scalar
        """
        raise NotImplementedError

    def trains(self, policy: ActorCriticPolicy) -> dict[str, th.nn.Parameter]:
        """:return: By name, the parameters that the policy's minibatches train"""
        return dict(policy.named_parameters())

    def policy_learning_rate(self, learning_rate: float, policy: ActorCriticPolicy) -> float:
        """:return: The learning rate of the policy's minibatches"""
        return learning_rate


class JointCritic(Critic):
    """
    A critic that learns from the policy's minibatches, by a term of the same loss, as in SB3's PPO.

    :param vf_coef: Coefficient of the value loss
    :param clip_range_vf: How far a value may move within an update, in units of the reward; a number, a schedule, or ``None``
        for no limit
    :param recompute_advantages: ``None`` (default): values, advantages and returns of replayed rollouts are computed anew with
        the current critic before each update. ``True``: without replay, those of the current rollout as well, before each
        epoch but the first (https://arxiv.org/abs/2006.05990, section 3.5). ``False``: never. Behaviour log-probabilities are
        never touched.
    """

    def __init__(
        self, vf_coef: float, clip_range_vf: float | Schedule | None = None, recompute_advantages: bool | None = None
    ) -> None:
        if is_number(clip_range_vf):
            assert clip_range_vf > 0, "`clip_range_vf` must be positive, pass `None` to deactivate vf clipping"  # type: ignore[operator]
        if recompute_advantages is not None:
            check_flag("recompute_advantages", recompute_advantages)
        self.vf_coef = vf_coef
        self.clip_schedule = None if clip_range_vf is None else number_or_schedule("clip_range_vf", clip_range_vf)
        self.recomputes_replayed = recompute_advantages is not False
        self.recomputes_each_epoch = recompute_advantages is True

    def follow_schedules(self, progress_remaining: float, as_value: Callable[[float], Any] = float) -> None:
        if self.clip_schedule is not None:
            self.clip_range_vf = as_value(scheduled(self.clip_schedule, progress_remaining))

    def loss(self, values: th.Tensor, batch: Minibatch) -> th.Tensor:
        # Mean squared error to the TD(gae_lambda) targets
        samples = batch.samples
        if self.clip_range_vf is not None:
            # Clip the difference between old and new value; NOTE: this depends on the reward scaling
            change = th.clamp(values - samples.old_values, -self.clip_range_vf, self.clip_range_vf)  # type: ignore[arg-type]
            values = samples.old_values + change
        return F.mse_loss(batch.select(samples.returns), batch.select(values))


class SeparateCritic(Critic):
    """
    A critic that is optimised separately: before the policy, and from more rollouts, as a value is not tied to the policy that
    acted as closely as a gradient is. The policy's advantages then come from a critic that has learned from the current
    rollout. Over ten tasks of DM Control it is ahead of :class:`JointCritic` (``benchmarks/control``, five seeds).

    :param n_rollouts: Number of rollouts that it learns from, the newest ones; 2 with rollouts of 128 steps on DM Control
    :param n_epochs: Passes over one rollout's worth of steps for each rollout, in minibatches of the algorithm's
        ``batch_size``; 20, twice those of the policy at ``n_epochs=10``
    :param gae_lambda: GAE's lambda for its targets; ``None`` (default) for the algorithm's. A good critic allows the policy a
        short horizon, and needs a long one itself to become one (https://arxiv.org/abs/2503.01491 decouples the two).
    :param std_scaled_learning_rate: Whether to multiply the policy's learning rate by its standard deviation, the mean over
        dimensions, where that is below one. The size of Adam's steps does not depend on that of the gradient; measured in
        standard deviations, which is what ratios see, they grow as these fall. For Gaussian policies.
    :raises ValueError: An option is out of its range.
    """

    def __init__(
        self,
        n_rollouts: int,
        n_epochs: int = 20,
        gae_lambda: float | None = None,
        std_scaled_learning_rate: bool = False,
    ) -> None:
        self.n_rollouts = check_whole_number("n_rollouts", n_rollouts)
        self.n_epochs = check_whole_number("n_epochs", n_epochs)
        self.gae_lambda = None if gae_lambda is None else check_number("gae_lambda", gae_lambda, 0, 1)
        check_flag("std_scaled_learning_rate", std_scaled_learning_rate)
        self.std_scaled_learning_rate = std_scaled_learning_rate
        self._names: tuple[set[str], set[str]] | None = None

    def check(self, policy: ActorCriticPolicy) -> None:
        """:raises ValueError: The critic has no parameters of its own, or the policy no standard deviation to scale by."""
        self._own_names(policy)
        if self.std_scaled_learning_rate and (not hasattr(policy, "log_std") or policy.use_sde):
            raise ValueError(
                "`std_scaled_learning_rate` is for Gaussian policies with one standard deviation for all states: with "
                "continuous actions, without `use_sde`."
            )

    def _own_names(self, policy: ActorCriticPolicy) -> set[str]:
        """Names of the critic's parameters; names, as the parameters themselves may be replaced, copied or loaded."""
        everything = {name for name, _ in policy.named_parameters()}
        if self._names is None or self._names[0] != everything:
            self._names = everything, critic_parameters(policy)
        return self._names[1]

    def trains(self, policy: ActorCriticPolicy) -> dict[str, th.nn.Parameter]:
        own = self._own_names(policy)
        return {name: parameter for name, parameter in policy.named_parameters() if name not in own}

    def policy_learning_rate(self, learning_rate: float, policy: ActorCriticPolicy) -> float:
        if not self.std_scaled_learning_rate:
            return learning_rate
        return learning_rate * min(1.0, policy.log_std.detach().exp().mean().item())

    def fit(self, model: "RatioVarianceAlgorithm", rollouts: list[Rollout]) -> int:
        rollouts = rollouts[-self.n_rollouts :]
        newest, policy = rollouts[-1], model.policy
        gae_lambda = model.gae_lambda if self.gae_lambda is None else self.gae_lambda
        # The newest rollout was collected with the critic as it is
        newest.renew(model.predict_values, model.gamma, gae_lambda, values=newest.samples.old_values)
        for following, rollout in pairwise(reversed(rollouts)):
            rollout.renew(model.predict_values, model.gamma, gae_lambda, following)
        names = self._own_names(policy)
        own = {name: p for name, p in policy.named_parameters() if name in names and p.requires_grad}
        descend, n_dropped = Descent(policy.optimizer, [*own.values()], model.max_grad_norm, model.compile), 0
        if descend.parameters:
            policy.set_training_mode(True)
            step = _compiled_regression_step if model.compile else _regression_step
            losses, norms = [], []
            with unchanging(policy):
                for batch in chain.from_iterable(passes(rollouts, model.batch_size, self.n_epochs)):
                    loss, grad_norms = step(policy, descend, batch.observations, batch.returns)
                    losses.append(loss)
                    norms.append(grad_norms)
            policy.set_training_mode(False)
            finite = finite_minibatches(th.stack(norms), [*own], model._droppable_share)
            if finite is not None:
                n_dropped = len(finite) - sum(finite)
                losses, norms = [*compress(losses, finite)], [*compress(norms, finite)]
            model.logger.record("train/value_loss", th.stack(losses).mean().item())
            model.logger.record("train/value_grad_norm", th.linalg.vector_norm(th.stack(norms), dim=-1).mean().item())
        newest.renew(model.predict_values, model.gamma, model.gae_lambda)
        return n_dropped


def _regression_step(
    policy: ActorCriticPolicy, descend: Descent, observations: PyTorchObs, returns: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """One minibatch of a critic that is optimised separately: its loss, and the norm of each parameter's gradient."""
    loss, backward = regress_values(policy, observations, returns, written_out=not descend.compiled)
    _, norms = descend(loss, backward=backward)
    return loss.detach(), norms


_compiled_regression_step = compiled(_regression_step)


def make_critic(
    vf_coef: float, clip_range_vf: float | Schedule | None, /, n_rollouts: int | None = None, **kwargs: Any
) -> Critic:
    """
    :param vf_coef: Of a :class:`JointCritic`
    :param clip_range_vf: Of a :class:`JointCritic`
    :param n_rollouts: Of a :class:`SeparateCritic`; ``None`` for a :class:`JointCritic`
    :param kwargs: Their other options, ``critic_kwargs`` of the algorithm
    :return: The critic
    :raises ValueError: An option is unknown, out of its range, or belongs to the other kind of critic.
    """
    joint, separate = ["recompute_advantages"], ["n_epochs", "gae_lambda", "std_scaled_learning_rate"]
    if n_rollouts is None:
        if misplaced := sorted(set(kwargs) & set(separate)):
            raise ValueError(
                f"`critic_kwargs` has {misplaced}, which are for a separately optimised critic: add `n_rollouts`, such as 2."
            )
    elif set(kwargs) & set(joint) or clip_range_vf is not None:
        raise ValueError(
            "`clip_range_vf` and `recompute_advantages` are for a critic that learns with the policy: leave out them, or "
            "`n_rollouts` in `critic_kwargs`."
        )
    if unknown := sorted(set(kwargs) - {*joint, *separate}):
        raise ValueError(f"`critic_kwargs` has unknown options {unknown}; it takes {['n_rollouts', *joint, *separate]}.")
    return JointCritic(vf_coef, clip_range_vf, **kwargs) if n_rollouts is None else SeparateCritic(n_rollouts, **kwargs)


def critic_parameters(policy: ActorCriticPolicy) -> set[str]:
    """
    Ask autograd which parameters values depend on, and which ones actions.

    :param policy: A policy
    :return: Names of the parameters that its values depend on
    :raises ValueError: There are none, or the policy's actions depend on some of them, too.
    """
    observation, action = (deepcopy(space).sample() for space in (policy.observation_space, policy.action_space))
    obs, _ = policy.obs_to_tensor(observation)
    was_training = policy.training
    policy.set_training_mode(False)
    # As rollout buffers store them
    actions = th.as_tensor(np.asarray(action), device=policy.device).reshape(1, -1)
    if isinstance(policy.action_space, spaces.Box | spaces.MultiBinary):
        actions = actions.float()
    values = _names_with_gradients(policy, policy.predict_values(obs))
    actor = _names_with_gradients(policy, evaluate(policy, obs, stored_actions(policy.action_space, actions)).log_prob)
    policy.set_training_mode(was_training)
    if not values or values & actor:
        raise ValueError(
            "`n_rollouts` in `critic_kwargs` is for a critic with parameters of its own, which this policy does not have. If "
            "it shares its features extractor, pass `policy_kwargs=dict(share_features_extractor=False)`; else no "
            "`n_rollouts`."
        )
    return values


def _names_with_gradients(policy: ActorCriticPolicy, outputs: th.Tensor) -> set[str]:
    """Names of the parameters that outputs depend on."""
    policy.zero_grad()
    if outputs.requires_grad:
        outputs.sum().backward()
    names = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    policy.zero_grad()
    return names
