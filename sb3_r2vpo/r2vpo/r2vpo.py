"""R2VPO: on-policy optimization with a constraint on the variance of the probability ratio in place of PPO's clip."""

from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm
from sb3_r2vpo.common.checks import check_number, check_whole_number

SelfR2VPO = TypeVar("SelfR2VPO", bound="R2VPO")


class R2VPO(RatioVarianceAlgorithm):
    """
    Ratio-Variance Regularized Policy Optimization (R2VPO), on-policy.

    PPO without its clip: the update maximises ``E[rho A]`` subject to ``E[(rho - 1)^2] <= epsilon``, where ``rho`` is the
    probability ratio between the current and the behaviour policy, by gradient ascent on the policy and dual ascent on the
    multiplier ``lambda`` (Theorem 4.3 and Eq. 10). Seven arguments, ``var_coef`` to ``noise_exponent`` and ``compile``, stand
    in place of ``clip_range``; all others are those of SB3's PPO, with its defaults and its behaviour.

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
        Adaptive is the default because no fixed value serves all: 0.3 is better with the default learning rate on Gymnasium's
        robots, and loses a small task with discrete actions at ten times that rate (``benchmarks/swap``).
    :param target_variance: The tolerance ``epsilon``: where an adaptive multiplier holds ``E[(rho - 1)^2]``, averaged over the
        minibatches of an update; a fixed one has no use for it. A number or a schedule; "auto" (default) is
        ``0.01 * sqrt(n_actions)``, as the same step costs more variance with more dimensions, see
        :func:`~sb3_r2vpo.common.algorithm.default_target_variance`.
    :param objective: The policy objective: "r2vpo"; "r2vpo_sequence", which takes the ratio of a language model's whole
        response; or a baseline to compare with in the same loop: "ppo_clip", "clip_higher", "gppo", "topr", "topr_token",
        "exact_kl", "spo" (see ``sb3_r2vpo.core.objectives``), which have no use for the multiplier.
    :param objective_kwargs: Options of the objective. R2VPO's are those of
        :class:`~sb3_r2vpo.core.policy_loss.RatioVarianceLoss`: ``dual_learning_rate`` (0.02), the step size ``eta`` of an
        adaptive multiplier; ``min_var_coef`` (0), its lower bound; ``compensate_entropy`` (``True``), whether an entropy bonus
        cancels the constraint's own pull on the entropy of a Gaussian policy. A baseline's are its coefficients, numbers or
        schedules, such as ``{"clip_range": 0.1}``.
    :param critic_kwargs: Options of the critic. By default it learns from the policy's minibatches, as in SB3's PPO
        (:class:`~sb3_r2vpo.common.critic.JointCritic`; ``{"recompute_advantages": True}`` computes advantages anew before each
        epoch). With ``n_rollouts`` it is optimised separately, before the policy and from so many rollouts
        (:class:`~sb3_r2vpo.common.critic.SeparateCritic`): ``{"n_rollouts": 2, "n_epochs": 15, "gae_lambda": 0.99,
        "std_scaled_learning_rate": True}`` is used on DM Control; ``vf_coef`` and ``clip_range_vf`` then have no use.
    :param noise_exponent: Temporal correlation of a Gaussian policy's exploration noise, a number or a schedule: over the
        steps of a rollout, its power is proportional to ``frequency ** -noise_exponent``, while the noise of each single step
        is distributed as ever (https://arxiv.org/abs/2312.11091 advises 0.5 for PPO). 0 (default) is white noise, as in SB3; 1
        is pink. "auto" is for rare rewards: pink while the critic predicts nothing of the rewards, white once it predicts
        them, see :func:`~sb3_r2vpo.common.exploration.auto_exponent`; for rollouts of a hundred steps or more.
    :param clip_range_vf: Clipping parameter for the value function,
        it can be a function of the current progress remaining (from 1 to 0).
        If None is passed (default), no clipping will be done on the value function.
        IMPORTANT: this clipping depends on the reward scaling.
    :param normalize_advantage: Whether to normalize or not the advantage. It sets the units of ``lambda``.
    :param ent_coef: Entropy coefficient for the loss calculation, it can be a function of the current progress remaining
        (from 1 to 0), which SB3's PPO does not take. Falling to zero, it explores at first and leaves the deterministic policy
        well defined in the end.
    :param vf_coef: Value function coefficient for the loss calculation
    :param max_grad_norm: The maximum value for the gradient clipping; ``None`` for no clipping
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected. One with a
        ``get`` of its own can't be combined with replay, nor with a critic that computes advantages anew.
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
    :raises ValueError: An option is out of its range or unknown, two of them can't be combined, or the policy is not one that
        they are for; the message says what to pass instead.
    :raises AssertionError: As SB3's PPO: a batch of one with normalised advantages, an unsupported action space.
    """

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
        objective: str = "r2vpo",
        objective_kwargs: dict[str, Any] | None = None,
        critic_kwargs: dict[str, Any] | None = None,
        noise_exponent: float | Schedule | str = 0.0,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
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
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
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
        self.target_variance = target_variance
        self.objective = objective
        self.objective_kwargs = objective_kwargs
        self.critic_kwargs = critic_kwargs
        self.noise_exponent = noise_exponent
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.compile = compile

        self._check_arguments()
        if self.env is not None:
            self._check_batch_size(self.env.num_envs)
        if _init_setup_model:
            self._setup_model()

    def learn(
        self: SelfR2VPO,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> SelfR2VPO:
        """
        Train, see ``BaseAlgorithm.learn``, whose arguments these are.

        :param total_timesteps: Environment steps, also as a float such as ``1e6``
        :param tb_log_name: Name of the run for TensorBoard; ``None`` for that of the class
        :param kwargs: Those of the variant, such as ``use_masking``
        :return: The model
        :raises ValueError: An argument is out of its range, also one of the constructor's that has been set since; an
            environment returned NaN or infinity; or the policy's actions or gradients are not finite. What was wrong has not
            been used: the model can be saved, and ``learn`` called again.
        """
        if log_interval is not None:
            log_interval = check_whole_number("log_interval", log_interval)
        return super().learn(
            total_timesteps=int(check_number("total_timesteps", total_timesteps)),
            callback=callback,
            log_interval=log_interval,
            tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
            **kwargs,
        )
