"""What the arguments stand for: loss, critic, noise and replay, made of what has been checked."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule

from sb3_r2vpo.common.checks import (
    check_arguments,
    check_batch_size,
    check_flag,
    check_spaces,
    evaluate_argument,
    number_or_schedule,
)
from sb3_r2vpo.common.critic import Critic, make_critic
from sb3_r2vpo.common.exploration import CorrelatedNoise
from sb3_r2vpo.common.rollout import RolloutReplayBuffer
from sb3_r2vpo.core.policy_loss import PolicyLoss, make_policy_loss


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


class Arguments(OnPolicyAlgorithm):
    """The part of :class:`~sb3_r2vpo.common.algorithm.RatioVarianceAlgorithm` that checks arguments and follows them."""

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
    critic: Critic
    noise: CorrelatedNoise
    replay_buffer: RolloutReplayBuffer | None
    _made: dict[str, tuple[Any, ...]]

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        # Refused now, rather than by the optimizer that the policy makes with it
        evaluate_argument("learning_rate", self.lr_schedule, 1.0)

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
        check_arguments(self)
        # A language model's have a start of their own; without an environment, there are none yet
        if hasattr(self, "action_space") and not hasattr(self.action_space, "rollout_buffer_class"):
            flattens = "features_extractor_class" not in (self.policy_kwargs or {})
            check_spaces(self.observation_space, self.action_space, flattens)
        if hasattr(self, "n_envs"):
            check_batch_size(self.batch_size, self.n_steps, self.n_envs, self.normalize_advantage, warn=False)

    def _make_policy_loss(self) -> PolicyLoss:
        target_variance = self.target_variance
        if isinstance(target_variance, str):
            if target_variance != "auto":
                raise ValueError(f"`target_variance` is {target_variance!r}; it must be a number, a schedule, or 'auto'.")
            target_variance = default_target_variance(self.action_space)
        n_actions = get_action_dim(self.action_space) if isinstance(self.action_space, spaces.Box) else None
        var_coef = self.var_coef if isinstance(self.var_coef, str) else number_or_schedule("var_coef", self.var_coef)
        target_variance = number_or_schedule("target_variance", target_variance)
        options = dict(self.objective_kwargs or {})
        for name, value in options.items():
            if name == "compensate_entropy":
                check_flag(name, value)
            else:
                options[name] = number_or_schedule(name, value)
        if not isinstance(self.objective, str):
            raise ValueError(f"`objective` is {self.objective!r}; it must be a name, such as 'r2vpo'.")
        unused = sorted({"dual_learning_rate", "min_var_coef"} & set(options))
        unused += ["target_variance"] if self.target_variance != "auto" else []
        if unused and self.objective.startswith("r2vpo") and not isinstance(var_coef, str):
            warnings.warn(
                f"{', '.join(unused)} has no effect, as var_coef={var_coef!r} fixes the multiplier: pass var_coef='auto' to "
                "have it adapted.",
                stacklevel=2,
            )
        policy_loss = make_policy_loss(self.objective, var_coef, target_variance, n_actions, options)
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
        exponent = self.noise_exponent
        noise = CorrelatedNoise(exponent if isinstance(exponent, str) else number_or_schedule("noise_exponent", exponent))
        if self.policy is not None:
            noise.check(self.policy)
        return noise

    def _follow_schedules(self) -> tuple[float, float]:
        """
        Bring all that may be a schedule to its value at the present progress.

        :return: The learning rate and the entropy coefficient
        :raises ValueError: A schedule returned what is not finite, or out of its range.
        """
        progress = self._current_progress_remaining
        # A number would be a constant of the compiled code, and each value of a schedule would compile it anew
        as_value = (lambda value: th.tensor(value, device=self.device)) if self.compile else float
        learning_rate = evaluate_argument("learning_rate", self.lr_schedule, progress)
        ent_coef = evaluate_argument("ent_coef", self.ent_coef, progress)
        self.policy_loss.follow_schedules(progress, as_value)
        self.critic.follow_schedules(progress, as_value)
        return learning_rate, ent_coef
