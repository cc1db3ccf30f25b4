"""What R2VPO's variants have in common: collect a rollout, let the critic learn, update the policy, log."""

import math
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from itertools import compress, pairwise
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import explained_variance, update_learning_rate

from sb3_r2vpo.common.arguments import default_target_variance as default_target_variance
from sb3_r2vpo.common.callbacks import AdvantageSnapshot
from sb3_r2vpo.common.checks import check_batch_size
from sb3_r2vpo.common.collection import RolloutCollection
from sb3_r2vpo.common.finite import NonFiniteGradient, finite_minibatches, refuse_nonfinite_rollout
from sb3_r2vpo.common.mlp import unchanging
from sb3_r2vpo.common.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, evaluate, stored_actions
from sb3_r2vpo.common.rollout import (
    PaddedSamples,
    Rollout,
    Timeouts,
    draws_its_own_minibatches,
    passes,
)
from sb3_r2vpo.common.sampler import map_field
from sb3_r2vpo.common.saving import ReplaySaving
from sb3_r2vpo.core.batch import Minibatch
from sb3_r2vpo.core.objectives import ratio_minus_one
from sb3_r2vpo.core.optim import Descent, with_fewer_operations
from sb3_r2vpo.core.statistics import gradient_norms, summarize_ratios
from sb3_r2vpo.core.update import Evaluation, Update


class RatioVarianceAlgorithm(ReplaySaving, RolloutCollection):
    """The base of R2VPO's variants; :class:`~sb3_r2vpo.r2vpo.R2VPO` has the arguments, and sets them as attributes."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # The one argument of PPO's that has gone: Python's own error would not say what has taken its place.
        # A subclass may have one of its own
        if "clip_range" in kwargs and "clip_range" not in signature(cls.__init__).parameters:
            raise TypeError(
                f"{cls.__name__} has no `clip_range`: the variance of the ratio is limited in its place. Leave it out, or set "
                "`var_coef`, the multiplier, or `target_variance` with var_coef='auto'. objective='ppo_clip' with "
                "objective_kwargs={'clip_range': 0.2} is PPO."
            )
        return super().__new__(cls)

    def _check_batch_size(self, n_envs: int) -> None:
        check_batch_size(self.batch_size, self.n_steps, n_envs, self.normalize_advantage)

    def _setup_model(self) -> None:
        self._made: dict[str, tuple[Any, ...]] = {}
        self.policy = self.replay_buffer = None  # type: ignore[assignment]
        # Made first: an invalid option must not leave a half-made model
        self._follow_arguments()
        # Actions that are whole responses of a language model bring a buffer of sequences
        self.rollout_buffer_class = self.rollout_buffer_class or getattr(self.action_space, "rollout_buffer_class", None)
        super()._setup_model()
        self.critic.check(self.policy)
        self.noise.check(self.policy)
        if (check_algorithm := getattr(self.policy, "check_algorithm", None)) is not None:
            check_algorithm(self)
        self._snapshot = AdvantageSnapshot()
        self._timeouts = Timeouts()
        if draws_its_own_minibatches(self.rollout_buffer) and self._renews_advantages:
            raise ValueError(
                f"{type(self.rollout_buffer).__name__} has a `get` of its own, from which a replay of rollouts, a separately "
                "optimised critic or recomputed advantages can't draw: leave these out, or `rollout_buffer_class`."
            )
        if self.compile and isinstance(self.rollout_buffer, PaddedSamples):
            raise ValueError(
                "`compile=True` is not for sequences: each length would be compiled anew, for a minute. Pass `compile=False`."
            )
        self.policy.optimizer = with_fewer_operations(self.policy.optimizer, flat=self.compile)
        if self.compile:
            # Convolutions are faster so on a CPU, by a sixth; their rounding is another one, as that of all compiled code
            self.policy.to(memory_format=th.channels_last)  # type: ignore[call-overload]
            # Refused now, rather than at the first update
            self._make_descent()

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        super()._maybe_recommend_cpu("MlpPolicy" if self.policy_class is MlpPolicy else mlp_class_name)

    def train(self) -> None:
        """
        Update the critic and the policy on the current rollout, and on earlier ones if they are replayed.

        :raises ValueError: The rollout is not finite, and has not been stored, see
            :func:`~sb3_r2vpo.common.finite.refuse_nonfinite_rollout`; or a schedule's value is out of its range: nothing has
            been changed. Or gradients were not finite, see :class:`~sb3_r2vpo.common.finite.NonFiniteGradient`: minibatches
            without one have been trained on, and what remains is finite.
        """
        refuse_nonfinite_rollout(self)
        self._follow_arguments()
        learning_rate, _ = self._follow_schedules()
        self.logger.record("train/learning_rate", learning_rate)
        update_learning_rate(self.policy.optimizer, learning_rate)
        rollouts = self._finished_rollouts()
        try:
            self._learn_from(rollouts)
        except NonFiniteGradient:
            # It may come from any of the rollouts, and would come again
            self._forget(len(rollouts))
            raise
        except Exception:
            self._forget(1)
            raise

    def _forget(self, n_rollouts: int) -> None:
        """Drop the newest rollouts from the replay."""
        if self.replay_buffer is not None:
            for _ in range(n_rollouts):
                self.replay_buffer.rollouts.pop()

    def _learn_from(self, rollouts: list[Rollout]) -> None:
        """
        :param rollouts: The newest ones, the oldest of them first
        """
        n_dropped = self.critic.fit(self, rollouts)
        rollouts = rollouts[-self.replay_capacity :]
        for name, value in getattr(self.rollout_buffer, "statistics", {}).items():
            self.logger.record(f"rollout/{name}", value)
        self._renew_replayed(rollouts)

        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        update = self._make_update()
        # Tensors until the end of the update: to read one is to wait for the device
        statistics: defaultdict[str, list[th.Tensor]] = defaultdict(list)
        with unchanging(self.policy):
            for batch in self._minibatches(rollouts):
                for name, value in update(batch).items():
                    statistics[name].append(value)
                if self.target_kl is not None and statistics["approx_kl"][-1] > 1.5 * self.target_kl:
                    if self.verbose >= 1:
                        print(f"Early stopping at update {self._n_updates} due to reaching max kl")
                    break
        # A rollout of sequences may leave nothing to train on
        if statistics:
            names = [name for name, parameter in self.critic.trains(self.policy).items() if parameter.requires_grad]
            finite = finite_minibatches(th.stack(statistics["grad_norms"]), names, self._droppable_share)
            if finite is not None:
                n_dropped += len(finite) - sum(finite)
                statistics = {name: [*compress(values, finite)] for name, values in statistics.items()}  # type: ignore[assignment]
            self._log(statistics, names)
        if self._droppable_share > 0:
            self.logger.record("train/dropped_minibatches", n_dropped)

    def _finished_rollouts(self) -> list[Rollout]:
        """:return: The rollout just collected, after those that were kept, the oldest of them first"""
        rollout = Rollout(
            self.rollout_buffer,
            last_obs=deepcopy(self._last_obs),  # type: ignore[arg-type]
            last_dones=deepcopy(self._last_episode_starts),  # type: ignore[arg-type]
            timeouts=self._timeouts,
            fixed=self._renews_advantages and self._snapshot.changed(),
        )
        if self.replay_buffer is None:
            return [rollout]
        self.replay_buffer.add(rollout)
        return self.replay_buffer.newest(self.replay_buffer.capacity)

    @th.no_grad()
    def _renew_replayed(self, rollouts: list[Rollout]) -> None:
        """Recompute values and advantages of replayed rollouts with the current critic, and log their ratio variance."""
        # A language model's advantages may need no critic: then only some responses are looked at, a minibatch of all rollouts
        has_critic = getattr(self.policy, "value_net", True) is not None
        n_looked_at = None if has_critic else math.ceil(self.batch_size / max(1, len(rollouts) - 1))
        # The newest one has the current critic's values, and ratios of one
        for staleness, (following, rollout) in enumerate(pairwise(reversed(rollouts)), start=1):
            values, deviations = [], []
            for samples in rollout.batches() if n_looked_at is None else [_evenly_spaced(rollout.samples, n_looked_at)]:
                batch_values, log_prob, *_ = self.evaluate_actions(samples, with_values=self.critic.recomputes_replayed)
                values.append(batch_values)
                # Of what is an action to the objective, as all that is logged of ratios
                log_ratio, mask = log_prob - samples.old_log_prob, self._minibatch(samples).mask
                deviations.append(ratio_minus_one(self.policy_loss.action_log_ratio(log_ratio, mask)))
            if self.critic.recomputes_replayed and has_critic:
                rollout.renew(self.predict_values, self.gamma, self.gae_lambda, following, th.cat(values))  # type: ignore[arg-type]
            self.logger.record(f"train/ratio_variance_stale_{staleness}", th.cat(deviations).square().mean().item())

    def _minibatches(self, rollouts: list[Rollout]) -> Iterator[Minibatch]:
        """
        The minibatches of one update: ``utd_ratio * n_epochs`` shuffled passes over one rollout's worth of steps.

        :param rollouts: Those that the policy is trained on, the oldest of them first
        """
        n_passes = max(1, round(self.utd_ratio * self.n_epochs))
        if draws_its_own_minibatches(self.rollout_buffer):
            epochs: Iterator[Any] = (self.rollout_buffer.get(self.batch_size) for _ in range(n_passes))
        else:
            epochs = passes(rollouts, self.batch_size, n_passes)
        for epoch, minibatches in enumerate(epochs):
            self._n_updates += 1
            if epoch > 0 and self.critic.recomputes_each_epoch and self.replay_buffer is None:
                self.policy.set_training_mode(False)
                rollouts[-1].renew(self.predict_values, self.gamma, self.gae_lambda)
                self.policy.set_training_mode(True)
            yield from map(self._minibatch, minibatches)

    def _minibatch(self, samples: Any) -> Minibatch:
        """:return: Samples with their mask, if the rollout buffer pads them"""
        buffer = self.rollout_buffer
        return buffer.minibatch(samples) if isinstance(buffer, PaddedSamples) else Minibatch(samples)

    def evaluate_actions(self, samples: Any, with_values: bool = True) -> Evaluation:
        """
        Evaluate stored actions with the current policy.

        :param samples: Of a minibatch
        :param with_values: Whether values are needed
        :return: The evaluation; ``None`` for values that are not needed
        """
        actions = stored_actions(self.action_space, samples.actions)
        inputs = self.policy_inputs(samples)
        return evaluate(self.policy, samples.observations, actions, with_values, not self.compile, **inputs)

    def policy_inputs(self, samples: Any) -> dict[str, Any]:
        """
        The hook of variants whose policies take more than observations.

        :param samples: Of a minibatch
        :return: Further arguments of the policy's ``evaluate_actions``, by name
        """
        return {}

    def _evaluate(self, samples: Any) -> Evaluation:
        """:meth:`evaluate_actions`, with values if the critic learns from them."""
        return self.evaluate_actions(samples, with_values=self.critic.learns_with_policy)

    def _make_descent(self) -> Descent:
        trained = self.critic.trains(self.policy).values()
        return Descent(self.policy.optimizer, [*trained], self.max_grad_norm, self.compile)

    def _make_update(self) -> Update:
        """Look up all that the coming update uses: policy and optimizer may have been replaced."""
        learning_rate, ent_coef = self._follow_schedules()
        learning_rate = self.critic.policy_learning_rate(learning_rate, self.policy)
        update_learning_rate(self.policy.optimizer, learning_rate)
        if not self.critic.learns_with_policy:
            self.logger.record("train/policy_learning_rate", learning_rate)
        has_bonus = callable(self.ent_coef) or self.ent_coef != 0
        return Update(
            evaluate=self._evaluate,
            objective=self.policy_loss,
            critic=self.critic,
            descend=self._make_descent(),
            ent_coef=th.as_tensor(ent_coef, device=self.device) if has_bonus else None,
            normalize_advantage=self.normalize_advantage,
            target_kl=self.target_kl,
            kind=(type(self.policy), type(self.policy.action_dist)),
        )

    def _log(self, statistics: dict[str, list[th.Tensor]], names: list[str]) -> None:
        """
        :param statistics: By name, a value for each minibatch
        :param names: Of the parameters, in the order of the gradients' norms
        """
        summary = summarize_ratios(th.cat(statistics.pop("log_ratio")), *self.policy_loss.clip_range)
        is_critic = ["value_net" in name or name.startswith(("vf_", "lstm_critic.", "critic.")) for name in names]
        summary |= gradient_norms(is_critic, th.stack(statistics.pop("grad_norms")))
        summary |= {name: th.stack(values) for name, values in statistics.items()}
        means = th.stack([values.mean() for values in summary.values()]).tolist()
        for name, value in zip(summary, means, strict=True):
            self.logger.record(f"train/{name}", value)
        explained_var = explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten())
        self.logger.record("train/explained_variance", explained_var)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in self.policy_loss.logged().items():
            self.logger.record(f"train/{name}", value)
        if self.critic.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", float(self.critic.clip_range_vf))


def _evenly_spaced(samples: Any, n_samples: int) -> Any:
    """So many of a rollout's samples, drawn without random numbers."""
    n = len(samples.old_log_prob)
    rows = th.linspace(0, n - 1, min(n, n_samples)).long()
    return type(samples)(*(map_field(lambda tensor: tensor[rows], field) for field in samples))
