"""R2VPO: on-policy optimization with a constraint on the variance of the probability ratio in place of PPO's clip."""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutBufferSamples, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from sb3_r2vpo.compilation import compiled
from sb3_r2vpo.dual import DualVariable, default_target_variance
from sb3_r2vpo.minibatches import rollout_tensors, shuffled_minibatches
from sb3_r2vpo.objectives import OBJECTIVES, check_objective, entropy_compensation, mean
from sb3_r2vpo.optim import (
    FlatAdam,
    FlatState,
    descend,
    descend_on,
    flat_state,
    refuse_nonfinite,
    where,
    with_fewer_operations,
)
from sb3_r2vpo.r2vpo.acting import acting
from sb3_r2vpo.r2vpo.critic import critic_parameters
from sb3_r2vpo.r2vpo.evaluation import acts_as_usual, evaluate_actions, is_gaussian
from sb3_r2vpo.r2vpo.noise import auto_exponent, colored_noise, unexplained_variance
from sb3_r2vpo.r2vpo.plain_mlp import PlainMlp, is_plain_mlp
from sb3_r2vpo.r2vpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_r2vpo.r2vpo.statistics import PPO_CLIP_RANGE, gradient_norms, summarize_ratios
from sb3_r2vpo.rollout_replay import RolloutReplayBuffer, StoredRollout, Timeouts, check_whole_number, drop_padding

SelfR2VPO = TypeVar("SelfR2VPO", bound="R2VPO")

#: Steps in one forward pass without gradient over a rollout: large enough to be fast, small enough for images.
EVALUATION_BATCH_SIZE = 2048


def is_auto_or(value: float | Schedule | str, accepts: Callable[[float], bool]) -> bool:
    """
    :param value: Of an argument that adapts itself with "auto"
    :param accepts: Whether it may be this number
    :return: Whether it is "auto", a schedule, which is not looked into, or a number that is accepted
    """
    if isinstance(value, str):
        return value == "auto"
    return not isinstance(value, Real) or accepts(float(value))


class R2VPO(OnPolicyAlgorithm):
    """
    Ratio-Variance Regularized Policy Optimization (R2VPO), on-policy.

    PPO without its clip: the update maximises ``E[rho A]`` subject to ``E[(rho - 1)^2] <= epsilon``, where ``rho`` is the
    probability ratio between the current and the behaviour policy, by gradient ascent on the policy and dual ascent on the
    multiplier ``lambda`` (Theorem 4.3 and Eq. 10). Apart from the arguments that replace ``clip_range``,
    ``recompute_advantages`` and ``compile``, the signature, the defaults and the behaviour are those of SB3's PPO.

    Paper: https://arxiv.org/abs/2605.26784

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function
        of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
        (i.e. rollout buffer size is n_steps * n_envs where n_envs is number of environment copies running in parallel)
    :param batch_size: Minibatch size
    :param n_epochs: Number of epochs when optimizing the surrogate loss
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator
    :param var_coef: The multiplier ``lambda`` of the variance, in units of normalised advantage. "auto" (default) adapts it to
        hold ``target_variance``, and "auto_0.5" does so from an initial value of 0.5; a number or a schedule fixes it.
        Adaptive is the default because no fixed value serves small and large batches, or few and many action dimensions.
    :param target_variance: The tolerance ``epsilon``: where an adaptive multiplier holds ``E[(rho - 1)^2]``, averaged over the
        minibatches of an update. A number or a schedule; "auto" (default) is ``0.01 * sqrt(n_actions)``, as the same step
        costs more variance with more dimensions, see :func:`~sb3_r2vpo.dual.default_target_variance`.
    :param dual_learning_rate: The step size ``eta`` of the adaptive multiplier, per minibatch. It should be small enough for
        the multiplier to hardly move within one update, whose first minibatches have ratios near one and whose last have not.
    :param min_var_coef: What an adaptive multiplier never falls below; zero, the default, is Eq. 10. Above zero, the tolerance
        is what the ratio variance may not exceed, no longer what it is driven to: see the README, and ``hyperparams/``.
    :param compensate_entropy: Whether to cancel the constraint's pull on the entropy of a Gaussian policy by an entropy bonus
        of ``2 * lambda * V / n_actions``, ``V`` the ratio variance of the minibatch, see
        :func:`~sb3_r2vpo.objectives.entropy_compensation`. Without, standard deviations fall that nothing else pulls down, and
        exploration with them. Only ``objective="r2vpo"`` with continuous actions has it; ``ent_coef`` comes on top.
    :param recompute_advantages: Whether to recompute values, advantages and returns with the current critic before each epoch
        but the first (https://arxiv.org/abs/2006.05990, section 3.5). Behaviour log-probabilities are never touched. SB3's PPO
        does not, and neither does this by default.
    :param critic_capacity: Number of rollouts that the critic learns from, apart from the policy and before it, by an
        optimizer of its own: more than the policy's, as a value is not tied to the policy that acted as closely as a gradient
        is. The advantages then have the critic that has learned from the current rollout; ``vf_coef`` and
        ``recompute_advantages`` have no use. ``None``, the default, as in SB3: the critic learns from the policy's own
        minibatches, by the same loss. Two rollouts of 128 steps, with ``gae_lambda=0.7``, ``critic_gae_lambda=0.99``,
        ``std_scaled_learning_rate`` and another entropy bonus, are ahead of ``None`` over ten tasks of DM Control
        (``benchmarks/control``, five seeds).
    :param critic_epochs: Number of passes over one rollout's worth of steps that such a critic makes for each rollout, in
        minibatches of ``batch_size``; 20, twice those of the policy at ``n_epochs=10``.
    :param critic_gae_lambda: GAE's lambda for the targets of such a critic; ``None``, the default, for ``gae_lambda``. A good
        critic allows the policy a short horizon, and needs a long one itself to become one
        (https://arxiv.org/abs/2503.01491 decouples the two).
    :param std_scaled_learning_rate: Whether to multiply the policy's learning rate by its standard deviation, the mean over
        dimensions, where that is below one. Adam makes steps of the same size however small the gradient: as the standard
        deviation falls, in which the policy's distances are measured, they become longer, and what they add to the ratio
        variance is noise, which the multiplier can't take back. For Gaussian policies whose critic learns apart, at the whole
        rate. ``False``, the default, as in SB3.
    :param noise_exponent: Color of the noise that a Gaussian policy explores with, a number or a schedule: its power is
        proportional to ``frequency ** -noise_exponent`` over the steps of a rollout, so that neighbouring steps are the more
        alike the larger it is, while the noise of each step is what its probability says
        (https://arxiv.org/abs/2312.11091 advises 0.5 for PPO). 0 (default) is white noise, as in SB3; 1 is pink. "auto" is
        for rewards that are rare, which noise that lasts finds: pink as long as the critic foresees nothing of them, white
        once it foresees all, see :func:`~sb3_r2vpo.r2vpo.noise.auto_exponent`; for rollouts of a hundred steps or more, as
        shorter ones say little of what is foreseen, and have no room for noise that lasts.
    :param objective: The policy objective: "r2vpo"; "r2vpo_sequence", which takes the ratio of a language model's whole
        response; or a baseline to compare with in the same loop: "ppo_clip", "clip_higher", "gppo", "topr", "topr_token",
        "exact_kl", "spo" (see ``sb3_r2vpo.objectives``), which have no use for the multiplier.
    :param objective_kwargs: Coefficients of the baselines by their names in ``sb3_r2vpo.objectives``, numbers or schedules,
        such as ``{"clip_range": 0.1}``. ``None`` takes each one's default.
    :param clip_range_vf: Clipping parameter for the value function,
        it can be a function of the current progress remaining (from 1 to 0).
        If None is passed (default), no clipping will be done on the value function.
        IMPORTANT: this clipping depends on the reward scaling.
    :param normalize_advantage: Whether to normalize or not the advantage. It sets the units of ``lambda``.
    :param ent_coef: Entropy coefficient for the loss calculation, it can be a function of the current progress remaining
        (from 1 to 0), which SB3's PPO does not take. Falling to zero, it explores at first and leaves the deterministic policy
        well defined in the end.
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Stop an update early once its approximate KL divergence exceeds 1.5 times this value.
        By default, there is no limit on the KL divergence.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param compile: Whether to compile a minibatch's whole step with ``torch.compile``. Updates of small networks then take
        half the time; results agree with those of ``False`` up to rounding. It needs PyTorch 2.11, Adam as the
        optimizer, and a C++ compiler, or Triton on a GPU. The first update takes half a minute longer, less once the
        compiler's cache is warm. Where the policy keeps distribution objects (gSDE, MultiDiscrete, MultiBinary), only parts
        are compiled.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: A coefficient is out of its range, the objective or one of its coefficients is unknown, what
        ``compile=True`` needs is missing, ``critic_capacity`` or ``critic_epochs`` is not a whole number of at least 1,
        ``critic_gae_lambda`` is not within 0 and 1, ``critic_capacity`` comes with what it can't be combined with:
        ``clip_range_vf``, or a policy whose critic has no parameters of its own; ``std_scaled_learning_rate`` lacks what it
        needs: ``critic_capacity``, and a Gaussian policy without ``use_sde``; or so does ``noise_exponent``: SB3's Gaussian
        distribution, and a policy that overrides neither ``forward`` nor ``evaluate_actions``.
    :raises AssertionError: As SB3's PPO: a batch of one with normalised advantages, an unsupported action space.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    # Of a critic that learns apart; R2VPOOff's policy draws from it, too
    replay_buffer: RolloutReplayBuffer | None
    # What a step of gradient descent uses, see `_prepare_descent`
    _parameters: list[th.nn.Parameter]
    _flat_adam: FlatState | None = None
    _critic_adam: FlatState | None = None
    _plain_mlp: PlainMlp | None = None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        var_coef: float | Schedule | str = "auto",
        target_variance: float | Schedule | str = "auto",
        dual_learning_rate: float = 0.02,
        min_var_coef: float = 0.0,
        compensate_entropy: bool = True,
        recompute_advantages: bool = False,
        critic_capacity: int | None = None,
        critic_epochs: int = 20,
        critic_gae_lambda: float | None = None,
        std_scaled_learning_rate: bool = False,
        noise_exponent: float | Schedule | str = 0.0,
        objective: str = "r2vpo",
        objective_kwargs: dict[str, Any] | None = None,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        compile: bool = False,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(
                spaces.Box,
                spaces.Discrete,
                spaces.MultiDiscrete,
                spaces.MultiBinary,
            ),
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.var_coef = var_coef
        # A schedule from `_setup_model` on
        self.target_variance: Any = target_variance
        self.dual_learning_rate = dual_learning_rate
        self.min_var_coef = min_var_coef
        self.compensate_entropy = compensate_entropy
        self.recompute_advantages = recompute_advantages
        self.critic_capacity = critic_capacity
        self.critic_epochs = critic_epochs
        self.critic_gae_lambda = critic_gae_lambda
        self.std_scaled_learning_rate = std_scaled_learning_rate
        self.noise_exponent = noise_exponent
        self.objective = objective
        self.objective_kwargs = objective_kwargs
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.compile = compile
        self._timeouts = Timeouts()
        # Of the last rollout's rewards
        self._unexplained_variance = 1.0

        if self.env is not None:
            self._check_batch_size(self.env.num_envs)
        if _init_setup_model:
            self._setup_model()

    def _check_batch_size(self, n_envs: int) -> None:
        """Refuse what would make normalised advantages NaN, warn of truncated minibatches; as SB3's PPO does."""
        buffer_size = n_envs * self.n_steps
        if self.normalize_advantage:
            assert self.batch_size > 1, (
                "`batch_size` must be greater than 1 to normalize advantages. "
                "See https://github.com/DLR-RM/stable-baselines3/issues/440"
            )
            assert buffer_size > 1, (
                "`n_steps * n_envs` must be greater than 1 to normalize advantages. "
                f"Currently n_steps={self.n_steps} and n_envs={n_envs}"
            )
        truncated = buffer_size % self.batch_size
        if truncated > 0:
            warnings.warn(
                f"With n_steps={self.n_steps} and n_envs={n_envs}, a rollout has {buffer_size} steps, so that after every "
                f"{buffer_size // self.batch_size} minibatches of size {self.batch_size}, "
                f"there will be a truncated mini-batch of size {truncated}. "
                "We recommend using a `batch_size` that is a factor of `n_steps * n_envs`."
            )

    def _setup_model(self) -> None:
        self._check_coefficients()
        self._check_critic_settings()
        # Built first: an invalid `var_coef` must not leave a half-made model
        dual = DualVariable(self.var_coef, self.min_var_coef)
        replay_buffer = self._empty_replay_buffer()
        # Actions that are whole responses of a language model bring a buffer of sequences
        sequence_buffer_class = getattr(self.action_space, "rollout_buffer_class", None)
        if self.compile and sequence_buffer_class is not None:
            raise ValueError(
                "`compile=True` is not for responses of language models: each length would be compiled anew, for a minute. "
                "Pass `compile=False`."
            )
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = sequence_buffer_class
        super()._setup_model()
        if self._has_colored_noise and not (acts_as_usual(self.policy) and is_gaussian(self.policy)):
            raise ValueError(
                "`noise_exponent` is for Gaussian policies that act as SB3's: with continuous actions, without `use_sde`, and "
                "without a `forward` or `evaluate_actions` of their own."
            )
        self.dual = dual.to(self.device)
        self.replay_buffer = replay_buffer
        if self.critic_capacity is not None:
            self._give_critic_its_optimizer()
        self.policy.optimizer = with_fewer_operations(self.policy.optimizer, flat=self.compile)
        if self.compile:
            # Refused now, rather than at the first update
            flat_state(self.policy.optimizer, [*self._trained_parameters().values()])
        self._step = compiled(self._gradient_step) if self.compile else self._gradient_step

        # `load()` calls this method again on what it has restored: wrapping a `FloatSchedule` once more is harmless
        if isinstance(self.target_variance, str):
            self.target_variance = default_target_variance(self.action_space)
        self.target_variance = FloatSchedule(self.target_variance)
        if self.clip_range_vf is not None:
            if isinstance(self.clip_range_vf, float | int):
                assert self.clip_range_vf > 0, "`clip_range_vf` must be positive, pass `None` to deactivate vf clipping"
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def _give_critic_its_optimizer(self) -> None:
        """Take the parameters of a critic that learns apart from the policy's optimizer, so that each has one optimizer."""
        self._critic_parameters = critic_parameters(self.policy)
        self.critic_optimizer = with_fewer_operations(
            self.policy.optimizer_class(self._critic_parameters, lr=self.lr_schedule(1), **self.policy.optimizer_kwargs),  # type: ignore[call-arg]
            flat=self.compile,
        )
        self._critic_step = compiled(self._critic_gradient_step) if self.compile else self._critic_gradient_step
        trained = {id(parameter) for parameter in self._trained_parameters().values()}
        for group in self.policy.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in trained]

    def _trained_parameters(self) -> dict[str, th.nn.Parameter]:
        """By name, what the loss of policy and critic trains: all parameters but those of a critic that learns apart."""
        parameters = dict(self.policy.named_parameters())
        if self.critic_capacity is None:
            return parameters
        critics = {id(parameter) for parameter in self._critic_parameters}
        return {name: parameter for name, parameter in parameters.items() if id(parameter) not in critics}

    def _check_coefficients(self) -> None:
        if hasattr(self, "clip_range"):
            raise ValueError(
                f"This model was saved by an algorithm with a `clip_range`, such as PPO, and can't be loaded by "
                f"{type(self).__name__}. To go on from its weights, create a new model and copy them: "
                f"`{type(self).__name__}(...).policy.load_state_dict(PPO.load(path).policy.state_dict())`."
            )
        if not is_auto_or(self.target_variance, lambda value: 0 < value < math.inf):
            raise ValueError(
                f"`target_variance` is {self.target_variance!r}; it must be positive and finite, such as 0.02, a schedule, or "
                "'auto'."
            )
        if not (math.isfinite(self.dual_learning_rate) and self.dual_learning_rate >= 0):
            raise ValueError(f"`dual_learning_rate` is {self.dual_learning_rate}; it must be finite and not negative.")
        if not is_auto_or(self.noise_exponent, lambda value: 0 <= value < math.inf):
            raise ValueError(
                f"`noise_exponent` is {self.noise_exponent!r}; it must be finite and not negative, such as 0.5, a schedule, "
                "or 'auto'."
            )
        check_objective(self.objective, self.objective_kwargs)

    def _check_critic_settings(self) -> None:
        check_whole_number("critic_epochs", self.critic_epochs)
        if self.critic_gae_lambda is not None and not 0 <= self.critic_gae_lambda <= 1:
            raise ValueError(f"`critic_gae_lambda` is {self.critic_gae_lambda}; it must be within 0 and 1, or None.")
        if self.std_scaled_learning_rate and (self.use_sde or not isinstance(self.action_space, spaces.Box)):
            raise ValueError(
                "`std_scaled_learning_rate` is for Gaussian policies with one standard deviation for all states: with "
                "continuous actions, without `use_sde`."
            )
        if self.critic_capacity is None:
            if self.std_scaled_learning_rate:
                raise ValueError(
                    "`std_scaled_learning_rate` would slow down a critic that learns with the policy: pass `critic_capacity`, "
                    "such as 2."
                )
            if self.critic_gae_lambda is not None:
                raise ValueError("`critic_gae_lambda` is for a critic that learns apart: pass `critic_capacity`, such as 8.")
        elif self.clip_range_vf is not None:
            raise ValueError("`clip_range_vf` is for a critic that learns with the policy: leave out it or `critic_capacity`.")

    def _empty_replay_buffer(self) -> RolloutReplayBuffer | None:
        """For the rollouts that are needed after their own update; ``None`` if none are."""
        if self.critic_capacity is None:
            return None
        check_whole_number("critic_capacity", self.critic_capacity)
        return RolloutReplayBuffer(self.critic_capacity)

    def _objective_coefficients(self) -> dict[str, Any]:
        """The coefficients that the objective takes, at the current progress of training."""
        if self.objective.startswith("r2vpo"):
            return {"var_coef": self.dual.value}
        return {name: self._current_value(value) for name, value in (self.objective_kwargs or {}).items()}

    def _current_value(self, schedule: float | Schedule) -> float | th.Tensor:
        """The value of a coefficient at the current progress of training."""
        value = FloatSchedule(schedule)(self._current_progress_remaining)
        # A number would be a constant of the compiled code, and each value of a schedule would compile it anew
        return th.tensor(value, device=self.device) if self.compile else value

    def _minibatches(self) -> Iterator[RolloutBufferSamples]:
        """The minibatches of one update, in order: ``n_epochs`` shuffled passes over the rollout."""
        rollout = None
        if self.replay_buffer is not None:
            (rollout,) = self.replay_buffer.newest(1)
        elif self.recompute_advantages:
            rollout = self._store_rollout()
        draw = self.rollout_buffer.get
        # A class of the user's may do as it likes in `get`
        if rollout is None and type(self.rollout_buffer) in (RolloutBuffer, DictRolloutBuffer):
            draw = partial(shuffled_minibatches, [rollout_tensors(self.rollout_buffer)])  # type: ignore[assignment]
        for epoch in range(self.n_epochs):
            self._n_updates += 1
            if rollout is not None:
                # A critic that learns apart is as it was
                if epoch > 0 and self.critic_capacity is None:
                    self._update_advantages(rollout)
                draw = partial(shuffled_minibatches, [rollout.training_tensors()])  # type: ignore[assignment]
            yield from draw(self.batch_size)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        self._timeouts = Timeouts()
        noise = self._exploration_noise(env.num_envs, n_rollout_steps) if self._has_colored_noise else None
        with acting(self.policy, noise):
            continue_training = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        if continue_training and self.noise_exponent == "auto":
            self._update_unexplained_variance()
        return continue_training

    @th.no_grad()
    def _update_unexplained_variance(self) -> None:
        """How much of the rollout's rewards the critic has not foreseen, before it learns from them."""
        buffer, timeouts = self.rollout_buffer, self._timeouts
        last_values = self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        next_values = np.concatenate([buffer.values[1:], last_values.cpu().numpy().reshape(1, -1)])
        dones = np.concatenate([buffer.episode_starts[1:], self._last_episode_starts[np.newaxis]])  # type: ignore[index]
        # SB3 has added the values of timeouts to the rewards
        td_errors = buffer.rewards + self.gamma * (1 - dones) * next_values - buffer.values
        rewards = buffer.rewards.copy()
        rewards[timeouts.steps, timeouts.envs] -= self.gamma * self._predict_timeout_values(timeouts)
        self._unexplained_variance = unexplained_variance(rewards, td_errors, dones, self.gamma)

    def _exploration_noise(self, n_envs: int, n_steps: int) -> Callable[[], th.Tensor]:
        """:return: What gives the noise of each step of a rollout, of shape ``(n_envs, n_actions)``"""
        if self.noise_exponent == "auto":
            exponent = auto_exponent(self._unexplained_variance)
        else:
            exponent = FloatSchedule(self.noise_exponent)(self._current_progress_remaining)  # type: ignore[arg-type]
        self.logger.record("rollout/noise_exponent", exponent)
        noise = colored_noise(exponent, n_steps, n_envs, get_action_dim(self.action_space), device=self.device)
        return lambda: noise[self.rollout_buffer.pos]

    @property
    def _has_colored_noise(self) -> bool:
        return callable(self.noise_exponent) or self.noise_exponent != 0

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        """Called at each step before SB3 adds the bootstrapped value to the rewards: note where that is going to happen."""
        super()._update_info_buffer(infos, dones)
        for idx in np.flatnonzero(dones).tolist():  # type: ignore[arg-type]
            info = infos[idx]
            if info.get("terminal_observation") is not None and info.get("TimeLimit.truncated", False):
                self._timeouts.append(self.rollout_buffer.pos, idx, info["terminal_observation"])

    def _store_rollout(self) -> StoredRollout:
        """:return: The rollout just collected, with what its advantages can be recomputed from"""
        self._timeouts.values = self._predict_timeout_values(self._timeouts)
        return StoredRollout(
            self.rollout_buffer,
            last_obs=deepcopy(self._last_obs),  # type: ignore[arg-type]
            last_dones=deepcopy(self._last_episode_starts),  # type: ignore[arg-type]
            timeouts=self._timeouts,
        )

    @th.no_grad()
    def _update_advantages(
        self,
        rollout: StoredRollout,
        values: th.Tensor | None = None,
        following: StoredRollout | None = None,
        gae_lambda: float | None = None,
    ) -> None:
        """
        Bring a rollout's values, advantages and returns up to date with the current critic.

        :param rollout: The rollout
        :param values: The current critic's values of its steps, if they are at hand
        :param following: The rollout collected after it, up to date already
        :param gae_lambda: GAE's lambda; ``None`` for the model's
        """
        if values is None:
            batches = rollout.batches(EVALUATION_BATCH_SIZE)
            values = th.cat([self.policy.predict_values(batch.observations) for batch in batches])
        rollout.buffer.gae_lambda = self.gae_lambda if gae_lambda is None else gae_lambda
        rollout.update_values(
            values=values.cpu().numpy(),
            timeout_values=self._predict_timeout_values(rollout.timeouts),
            last_values=self.policy.predict_values(obs_as_tensor(rollout.last_obs, self.device)),
            following=following,
        )

    @th.no_grad()
    def _predict_timeout_values(self, timeouts: Timeouts) -> np.ndarray:
        if len(timeouts) == 0:
            return np.zeros(0, dtype=np.float32)
        observations, _ = self.policy.obs_to_tensor(timeouts.stacked_observations())
        return self.policy.predict_values(observations).flatten().cpu().numpy()

    def _evaluate_actions(self, rollout_data: RolloutBufferSamples) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        """
        Evaluate stored actions with the current policy.

        :param rollout_data: A minibatch.
        :return: values (``None`` where a loss has no use for them), log-probabilities and (if it has a closed form) entropy,
            each of shape ``(batch_size,)``
        """
        actions = rollout_data.actions
        if isinstance(self.action_space, spaces.Discrete):
            # Convert discrete action from float to long
            actions = actions.long().flatten()
        # Without gradients there is nothing to gain
        if self._plain_mlp is not None and th.is_grad_enabled():
            return self._plain_mlp.evaluate_actions(rollout_data.observations, actions)
        values, log_prob, entropy = evaluate_actions(self.policy, rollout_data.observations, actions)
        return values.flatten(), log_prob, entropy

    def _loss(
        self,
        rollout_data: RolloutBufferSamples,
        coefficients: dict[str, Any],
        ent_coef: th.Tensor,
        clip_range_vf: float | th.Tensor | None,
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The loss of a minibatch: tensors in, tensors out, so that it can be compiled.

        :param rollout_data: A minibatch
        :param coefficients: The objective's, by their names
        :param ent_coef: Entropy coefficient, before any compensation
        :param clip_range_vf: Clipping parameter for the value function, ``None`` for no clipping
        :return: The loss and, detached, what it is made of
        """
        values, log_prob, entropy = self._evaluate_actions(rollout_data)
        advantages = rollout_data.advantages
        # Normalization does not make sense if mini batchsize == 1, see SB3's GH issue #325
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        log_ratio = log_prob - rollout_data.old_log_prob
        objective = OBJECTIVES[self.objective]
        losses, deviation = objective(log_ratio, advantages, **coefficients, **self._sequence_arguments(log_ratio))
        loss = policy_loss = self._reduce(losses, rollout_data)

        # Entropy favors exploration; -log_prob estimates it where there is no closed form
        entropy_loss = -self._reduce(-log_prob if entropy is None else entropy, rollout_data)
        parts = {
            "log_ratio": drop_padding(log_ratio, rollout_data),
            "ratio_variance": drop_padding(deviation, rollout_data).square().mean(),
            "policy_gradient_loss": policy_loss,
            "entropy_loss": entropy_loss,
        }
        if self._has_entropy_bonus:
            if self._compensates_entropy:
                n_actions = rollout_data.actions.shape[-1]
                ent_coef = ent_coef + entropy_compensation(parts["ratio_variance"], n_actions, **coefficients)
            parts["ent_coef"] = ent_coef
            loss = loss + ent_coef * entropy_loss

        if self.critic_capacity is None:
            assert values is not None
            if clip_range_vf is not None:
                # Clip the difference between old and new value; NOTE: this depends on the reward scaling
                old_values = rollout_data.old_values
                values = old_values + th.clamp(values - old_values, -clip_range_vf, clip_range_vf)  # type: ignore[arg-type]
            # Value loss using the TD(gae_lambda) target
            parts["value_loss"] = value_loss = F.mse_loss(rollout_data.returns, values)
            loss = loss.add(value_loss, alpha=self.vf_coef)
        parts["loss"] = loss
        if self.target_kl is not None:
            parts["approx_kl"] = drop_padding(deviation - log_ratio.detach(), rollout_data).mean()
        return loss, {name: part.detach() for name, part in parts.items()}

    @property
    def _compensates_entropy(self) -> bool:
        return self.compensate_entropy and self.objective == "r2vpo" and isinstance(self.action_space, spaces.Box)

    @property
    def _has_entropy_bonus(self) -> bool:
        return callable(self.ent_coef) or self.ent_coef != 0 or self._compensates_entropy

    def _descend(self, loss: th.Tensor, may_step: th.Tensor | None) -> tuple[th.Tensor | bool, th.Tensor]:
        """One optimizer step on the loss; see :func:`~sb3_r2vpo.optim.descend`."""
        optimizer, parameters = self.policy.optimizer, self._parameters
        if self._plain_mlp is not None:
            self._plain_mlp.backward(loss)
            return descend(optimizer, parameters, self.max_grad_norm, may_step)
        return descend_on(loss, optimizer, parameters, self._flat_adam, self.max_grad_norm, may_step)

    def _gradient_step(
        self,
        rollout_data: RolloutBufferSamples,
        coefficients: dict[str, Any],
        ent_coef: th.Tensor,
        clip_range_vf: float | th.Tensor | None,
        target_variance: th.Tensor,
    ) -> dict[str, th.Tensor]:
        """
        One minibatch: ascent on the policy, unless it is too far from the behaviour policy already, and on the multiplier.

        :return: Statistics of the minibatch
        """
        loss, parts = self._loss(rollout_data, coefficients, ent_coef, clip_range_vf)
        may_step = None if self.target_kl is None else parts["approx_kl"] <= 1.5 * self.target_kl
        accepted, parts["grad_norms"] = self._descend(loss, may_step)
        # No violation where there is no step
        ratio_variance = where(accepted, parts["ratio_variance"], target_variance)
        self.dual.step(ratio_variance, target_variance, self.dual_learning_rate)
        return parts

    def train(self) -> None:
        """Update the policy on the current rollout: gradient ascent on the policy, dual ascent on the multiplier."""
        self._check_rollout_is_finite()
        self._update_learning_rate(self._optimizers())
        self._prepare_descent()
        self._prepare_rollouts()
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self.dual.follow_schedule(self._current_progress_remaining)
        target_variance = th.as_tensor(self._current_value(self.target_variance), device=self.device)
        ent_coef = th.as_tensor(self._current_value(self.ent_coef), device=self.device)
        clip_range_vf = None if self.clip_range_vf is None else self._current_value(self.clip_range_vf)
        coefficients = self._objective_coefficients()

        # Tensors until the end of the update: to read one is to wait for the device
        statistics: defaultdict[str, list[th.Tensor]] = defaultdict(list)
        for rollout_data in self._minibatches():
            parts = self._step(rollout_data, coefficients, ent_coef, clip_range_vf, target_variance)
            for name, part in parts.items():
                statistics[name].append(part)
            if self.target_kl is not None and parts["approx_kl"] > 1.5 * self.target_kl:
                if self.verbose >= 1:
                    print(f"Early stopping at update {self._n_updates} due to reaching max kl")
                break

        # A rollout of sequences may leave nothing to train on
        if statistics:
            refuse_nonfinite(th.stack(statistics["grad_norms"]))
            self._log_statistics(statistics)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", float(clip_range_vf))
        if self.dual.adaptive:
            self.logger.record("train/target_variance", float(target_variance))

    def _prepare_rollouts(self) -> None:
        """Put the rollout into the replay buffer, if there is one, and let a critic that learns apart learn from it."""
        if self.replay_buffer is not None:
            self.replay_buffer.add(self._store_rollout())
        if self.critic_capacity is not None:
            self._train_critic()

    def _train_critic(self) -> None:
        """Bring the returns of the critic's rollouts up to date, regress its values on them, and renew the advantages."""
        assert self.critic_capacity is not None
        assert self.replay_buffer is not None
        rollouts = self.replay_buffer.newest(self.critic_capacity)
        # The newest rollout was collected with the critic as it is
        self._update_advantages(rollouts[-1], rollouts[-1].tensors().old_values, gae_lambda=self.critic_gae_lambda)
        for following, stored in pairwise(reversed(rollouts)):
            self._update_advantages(stored, following=following, gae_lambda=self.critic_gae_lambda)
        self.policy.set_training_mode(True)
        losses, grad_norms = [], []
        for minibatches in self.replay_buffer.passes(self.batch_size, self.critic_epochs, self.critic_capacity):
            for rollout_data in minibatches:
                loss, norms = self._critic_step(rollout_data.observations, rollout_data.returns)
                losses.append(loss)
                grad_norms.append(norms)
        self.policy.set_training_mode(False)
        norms = th.stack(grad_norms)
        refuse_nonfinite(norms)
        self.logger.record("train/value_loss", th.stack(losses).mean().item())
        self.logger.record("train/value_grad_norm", th.linalg.vector_norm(norms, dim=-1).mean().item())
        self._update_advantages(rollouts[-1])

    def _critic_gradient_step(
        self, observations: th.Tensor | dict[str, th.Tensor], returns: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        One minibatch of a critic that learns apart: tensors in, tensors out, so that it can be compiled.

        :return: The loss and the norm of each parameter's gradient
        """
        optimizer, parameters = self.critic_optimizer, self._critic_parameters
        if self._plain_mlp is not None:
            loss = self._plain_mlp.regress_values(observations, returns)  # type: ignore[arg-type]
            _, norms = descend(optimizer, parameters, self.max_grad_norm, None)
        else:
            loss = F.mse_loss(self.policy.predict_values(observations).flatten(), returns)
            _, norms = descend_on(loss, optimizer, parameters, self._critic_adam, self.max_grad_norm)
        return loss.detach(), norms

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.std_scaled_learning_rate:
            std = self.policy.log_std.detach().exp().mean().item()
            learning_rate = self.lr_schedule(self._current_progress_remaining) * min(1.0, std)
            update_learning_rate(self.policy.optimizer, learning_rate)
            self.logger.record("train/policy_learning_rate", learning_rate)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer] if self.critic_capacity is None else [self.policy.optimizer, self.critic_optimizer]

    def _prepare_descent(self) -> None:
        """Look up, once an update, what :meth:`_descend` needs: policy and optimizer may have been changed or replaced."""
        optimizer = self.policy.optimizer
        self._parameters = [*self._trained_parameters().values()]
        self._flat_adam = self._plain_mlp = None
        if self.compile:
            self._flat_adam = flat_state(optimizer, self._parameters)
            if self.critic_capacity is not None:
                self._critic_adam = flat_state(self.critic_optimizer, self._critic_parameters)
        elif is_plain_mlp(self.policy):
            self._plain_mlp = PlainMlp(self.policy, self._has_entropy_bonus, with_values=self.critic_capacity is None)
            for parameter in self.policy.parameters():
                parameter.grad = th.zeros_like(parameter)
            for owner in self._optimizers():
                if isinstance(owner, FlatAdam):
                    owner.share_gradients()

    def _reduce(self, values: th.Tensor, rollout_data: RolloutBufferSamples) -> th.Tensor:
        """Plain mean over steps; over the tokens of sequences, as their buffer says."""
        mask = getattr(rollout_data, "mask", None)
        return mean(values) if mask is None else self.rollout_buffer.reduce(values, mask)  # type: ignore[attr-defined]

    def _sequence_arguments(self, log_ratio: th.Tensor) -> dict[str, th.Tensor]:
        """What objectives on the ratio of a whole response take; log-ratios are zero at padding."""
        if log_ratio.ndim < 2 or self.objective not in ("topr", "r2vpo_sequence"):
            return {}
        return {"sequence_log_ratio": log_ratio.sum(-1, keepdim=True)}

    def _check_rollout_is_finite(self) -> None:
        """A NaN reward must be refused before the update: SB3 notices it only once the weights are lost (GH issue #1593)."""
        for name in ("rewards", "values", "log_probs", "advantages"):
            if not np.isfinite(getattr(self.rollout_buffer, name)).all():
                raise ValueError(
                    f"The rollout's {name} contain NaN or infinity, so this update was not made; the weights are as before. "
                    "Wrap the environment in `stable_baselines3.common.vec_env.VecCheckNan` to find the step it comes from."
                )

    def _log_statistics(self, statistics: dict[str, list[th.Tensor]]) -> None:
        clip_range = self._objective_coefficients().get("clip_range", PPO_CLIP_RANGE)
        summary = summarize_ratios(th.cat(statistics.pop("log_ratio")), clip_range)
        summary |= gradient_norms(self._trained_parameters(), th.stack(statistics.pop("grad_norms")))
        summary |= {name: th.stack(values) for name, values in statistics.items()}
        means = th.stack([values.mean() for values in summary.values()]).tolist()
        for name, value in zip(summary, means, strict=True):
            self.logger.record(f"train/{name}", value)
        explained_var = explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten())
        self.logger.record("train/explained_variance", explained_var)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, coefficient in self._objective_coefficients().items():
            self.logger.record(f"train/{name}", float(coefficient))

    def _excluded_save_params(self) -> list[str]:
        critic = ["critic_optimizer", "_critic_parameters", "_critic_step", "_critic_adam"]
        return [*super()._excluded_save_params(), "_timeouts", "_step", "_parameters", "_plain_mlp", "_flat_adam", *critic]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "dual", *(["critic_optimizer"] if self.critic_capacity is not None else [])], tensors

    def learn(
        self: SelfR2VPO,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "R2VPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfR2VPO:
        return super().learn(
            total_timesteps=int(total_timesteps),
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    @classmethod
    def load(cls: type[SelfR2VPO], path: Any, *args: Any, **kwargs: Any) -> SelfR2VPO:
        """
        Load the model from a zip-file, see ``BaseAlgorithm.load``, whose arguments these are.

        :param path: path to the file (or a file-like) where to load the agent from
        :param kwargs: Arguments of ``BaseAlgorithm.load``, or of the constructor to change them on loading. An adaptive
            multiplier goes on from its saved value; ``var_coef=0.3`` fixes it.
        :return: new model instance with loaded parameters
        :raises ValueError: An argument is unknown, or the file was saved by another algorithm.
        """
        known = {*inspect.signature(BaseAlgorithm.load).parameters, *inspect.signature(cls.__init__).parameters}
        if unknown := set(kwargs) - known:
            raise ValueError(
                f"Unknown arguments {sorted(unknown)} for {cls.__name__}.load(); see the arguments of {cls.__name__}()."
            )
        return super().load(path, *args, **kwargs)
