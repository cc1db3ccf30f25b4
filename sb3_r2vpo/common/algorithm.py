"""What R2VPO's variants have in common: collect a rollout, let the critic learn, update the policy, log."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import explained_variance, update_learning_rate

from sb3_r2vpo.common.callbacks import AdvantageSnapshot
from sb3_r2vpo.common.checks import check_batch_size, check_whole_number
from sb3_r2vpo.common.collection import RolloutCollection
from sb3_r2vpo.common.critic import Critic, make_critic
from sb3_r2vpo.common.exploration import CorrelatedNoise
from sb3_r2vpo.common.mlp import unchanging
from sb3_r2vpo.common.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, evaluate, stored_actions
from sb3_r2vpo.common.rollout import (
    PaddedSamples,
    Rollout,
    RolloutReplayBuffer,
    Timeouts,
    draws_its_own_minibatches,
    passes,
)
from sb3_r2vpo.common.saving import ReplaySaving
from sb3_r2vpo.core.batch import Minibatch
from sb3_r2vpo.core.multiplier import scheduled
from sb3_r2vpo.core.objectives import ratio_minus_one
from sb3_r2vpo.core.optim import Descent, refuse_nonfinite, with_fewer_operations
from sb3_r2vpo.core.policy_loss import PolicyLoss, make_policy_loss
from sb3_r2vpo.core.statistics import PPO_CLIP_RANGE, gradient_norms, summarize_ratios
from sb3_r2vpo.core.update import Evaluation, Update


def default_target_variance(action_space: spaces.Space) -> float:
    """
    The tolerance that ``target_variance="auto"`` stands for: ``0.01 * sqrt(n_actions)``.

    A Gaussian policy that moves each of its means by ``d`` standard deviations has a ratio variance of about
    ``n_actions * d**2``: one tolerance for all tasks would be a long step where there is one action, and a short one where
    there are many. Ratios that PPO's clip at 0.2 holds grow with the root only (0.007 to 0.015 with one action, 0.02 with
    two, 0.03 to 0.04 with six, measured on DM Control, see ``benchmarks/control``), and so does this tolerance.

    :param action_space: The environment's
    :return: The tolerance; of whole responses of a language model, that of one action
    """
    n_actions = 1 if hasattr(action_space, "rollout_buffer_class") else get_action_dim(action_space)
    return 0.01 * math.sqrt(n_actions)


class RatioVarianceAlgorithm(ReplaySaving, RolloutCollection):
    """The base of R2VPO's variants; :class:`~sb3_r2vpo.r2vpo.R2VPO` has the arguments, and sets them as attributes."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    #: Number of rollouts that the policy is trained on, the newest ones
    replay_capacity: int = 1
    #: Passes over one rollout's worth of steps are ``utd_ratio * n_epochs``
    utd_ratio: float = 1.0

    # Of R2VPO's constructor
    batch_size: int
    n_epochs: int
    var_coef: float | Schedule | str
    target_variance: float | Schedule | str
    objective: str
    objective_kwargs: dict[str, Any] | None
    critic_kwargs: dict[str, Any] | None
    noise_exponent: float | Schedule | str
    clip_range_vf: float | Schedule | None
    normalize_advantage: bool
    target_kl: float | None
    compile: bool
    # Of what they stand for
    policy_loss: PolicyLoss

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

    def _follow_arguments(self) -> None:
        """
        Create loss, critic, noise and replay from the arguments; again, where an argument has changed since, as in
        ``model.vf_coef = 0.1``, which SB3's PPO follows as well.
        """
        self._check_arguments()
        kwargs = self.objective_kwargs or {}
        self._create("policy_loss", self._make_policy_loss, self.objective, self.var_coef, self.target_variance, kwargs)
        self._create("critic", self._make_critic, self.vf_coef, self.clip_range_vf, self.critic_kwargs or {})
        self._create("noise", self._make_noise, self.noise_exponent)
        n_rollouts = max(self.replay_capacity, self.critic.n_rollouts)
        kept = [] if self.replay_buffer is None else self.replay_buffer.rollouts
        self._create("replay_buffer", lambda: RolloutReplayBuffer(n_rollouts, kept) if n_rollouts > 1 else None, n_rollouts)

    def _create(self, name: str, make: Callable[[], Any], *arguments: Any) -> None:
        """Set an attribute to what ``make`` returns, unless it was made from the same arguments."""
        # Dicts are copied, as an option may be set within one
        current = tuple(dict(value) if isinstance(value, dict) else value for value in arguments)
        if self._made.get(name) != current:
            setattr(self, name, make())
            self._made[name] = current

    def _check_arguments(self) -> None:
        if hasattr(self, "clip_range"):
            raise ValueError(
                f"This model was saved by an algorithm with a `clip_range`, such as PPO, and can't be loaded by "
                f"{type(self).__name__}. To go on from its weights, create a new model and copy them: "
                f"`{type(self).__name__}(...).policy.load_state_dict(PPO.load(path).policy.state_dict())`."
            )
        check_whole_number("replay_capacity", self.replay_capacity)
        if not (math.isfinite(self.utd_ratio) and self.utd_ratio > 0):
            raise ValueError(f"`utd_ratio` is {self.utd_ratio}; it must be positive and finite.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` is {self.max_grad_norm}; it must be positive, or None for no limit.")

    def _make_policy_loss(self) -> PolicyLoss:
        target_variance = self.target_variance
        if target_variance == "auto":
            target_variance = default_target_variance(self.action_space)
        elif isinstance(target_variance, str):
            raise ValueError(f"`target_variance` is {target_variance!r}; it must be a number, a schedule, or 'auto'.")
        n_actions = get_action_dim(self.action_space) if isinstance(self.action_space, spaces.Box) else None
        policy_loss = make_policy_loss(self.objective, self.var_coef, target_variance, n_actions, self.objective_kwargs)
        if "policy_loss" in self._made and self._made["policy_loss"][1] == self.var_coef:
            # An adaptive multiplier goes on from its value
            policy_loss.multiplier.set_value(self.policy_loss.multiplier.value)
        policy_loss.multiplier.to(self.device)
        return policy_loss

    def _make_critic(self) -> Critic:
        critic = make_critic(self.vf_coef, self.clip_range_vf, **(self.critic_kwargs or {}))
        if self.policy is not None:
            critic.check(self.policy)
        return critic

    def _make_noise(self) -> CorrelatedNoise:
        noise = CorrelatedNoise(self.noise_exponent)
        if self.policy is not None:
            noise.check(self.policy)
        return noise

    def train(self) -> None:
        """Update the critic and the policy on the current rollout, and on earlier ones if they are replayed."""
        self._refuse_nonfinite_rollout()
        self._follow_arguments()
        self._update_learning_rate(self.policy.optimizer)
        rollouts = self._finished_rollouts()
        self.critic.fit(self, rollouts)
        rollouts = rollouts[-self.replay_capacity :]
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
            refuse_nonfinite(th.stack(statistics["grad_norms"]))
            self._log(statistics)

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
        # The newest one has the current critic's values, and ratios of one
        for staleness, (following, rollout) in enumerate(pairwise(reversed(rollouts)), start=1):
            values, deviations = [], []
            for samples in rollout.batches():
                batch_values, log_prob, *_ = self.evaluate_actions(samples, with_values=self.critic.recomputes_replayed)
                values.append(batch_values)
                deviations.append(self._minibatch(samples).select(ratio_minus_one(log_prob - samples.old_log_prob)))
            if self.critic.recomputes_replayed:
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
        """Look up all that the coming update uses: policy, optimizer and schedules may have changed or been replaced."""
        progress = self._current_progress_remaining
        # A number would be a constant of the compiled code, and each value of a schedule would compile it anew
        as_value = (lambda value: th.tensor(value, device=self.device)) if self.compile else float
        self.policy_loss.follow_schedules(progress, as_value)
        self.critic.follow_schedules(progress, as_value)
        learning_rate = self.critic.policy_learning_rate(self.lr_schedule(progress), self.policy)
        update_learning_rate(self.policy.optimizer, learning_rate)
        if not self.critic.learns_with_policy:
            self.logger.record("train/policy_learning_rate", learning_rate)
        has_bonus = not isinstance(self.ent_coef, Real) or self.ent_coef != 0
        return Update(
            evaluate=self._evaluate,
            objective=self.policy_loss,
            critic=self.critic,
            descend=self._make_descent(),
            ent_coef=th.as_tensor(scheduled(self.ent_coef, progress), device=self.device) if has_bonus else None,
            normalize_advantage=self.normalize_advantage,
            target_kl=self.target_kl,
            kind=(type(self.policy), type(self.policy.action_dist)),
        )

    def _refuse_nonfinite_rollout(self) -> None:
        """A NaN reward must be refused before the update: SB3 notices it only once the weights are lost (GH issue #1593)."""
        for name in ("rewards", "values", "log_probs", "advantages"):
            if not np.isfinite(getattr(self.rollout_buffer, name)).all():
                raise ValueError(
                    f"The rollout's {name} contain NaN or infinity, so this update was not made; the weights are as before. "
                    "Wrap the environment in `stable_baselines3.common.vec_env.VecCheckNan` to find the step it comes from."
                )

    def _log(self, statistics: dict[str, list[th.Tensor]]) -> None:
        clip_range = self.policy_loss.coefficients.get("clip_range", PPO_CLIP_RANGE)
        summary = summarize_ratios(th.cat(statistics.pop("log_ratio")), clip_range)
        trained = self.critic.trains(self.policy).items()
        names = [name for name, parameter in trained if parameter.requires_grad]
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
