"""R2VPOOff: R2VPO on a replay of its last rollouts."""

import io
import math
import pathlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutBufferSamples, Schedule

from sb3_r2vpo.objectives import ratio_minus_one
from sb3_r2vpo.r2vpo.r2vpo import EVALUATION_BATCH_SIZE, R2VPO
from sb3_r2vpo.rollout_replay import RolloutReplayBuffer, StoredRollout, drop_padding

SelfR2VPOOff = TypeVar("SelfR2VPOOff", bound="R2VPOOff")


class R2VPOOff(R2VPO):
    """
    Ratio-Variance Regularized Policy Optimization on replayed rollouts (R2VPO-OFF, section 4.3 of the paper).

    The last ``replay_capacity`` rollouts are kept with the log-probabilities under the policies that generated them; each
    update draws its minibatches uniformly from all of them. The constraint on the ratio variance is what bounds the distance
    to the older policies: there is no importance-weight truncation, no V-trace, no Retrace.

    With ``replay_capacity=1`` and ``utd_ratio=1`` it trains exactly as :class:`R2VPO` without
    ``recompute_advantages``; it shares that class's other arguments.

    :param policy: see :class:`R2VPO`, as all that is not listed here
    :param env: see :class:`R2VPO`
    :param n_steps: The number of steps to run for each environment per update; 1024, so that the replay's two rollouts are
        the 2048 steps that :class:`R2VPO` and SB3's PPO update on: shorter ones renew the policy more often.
    :param replay_capacity: Number of rollouts to keep, first in, first out: two here and in ``hyperparams/``, four in the
        paper's language-model experiments. More is for rollouts that are shorter (``benchmarks/control``).
    :param utd_ratio: Update-to-data ratio: passes over one rollout's worth of steps are ``utd_ratio * n_epochs`` (rounded, at
        least one); 2 as in the paper's language-model experiments. With 1 there are as many gradient steps for each collected
        step as on-policy.
    :param recompute_advantages: Whether to bring values, advantages and returns of the stored rollouts up to date with the
        current critic before each update. GAE then goes on from each rollout into the one that followed it. Behaviour
        log-probabilities are never touched.
    :param critic_capacity: see :class:`R2VPO`; ``recompute_advantages=True`` goes with it, and the rollouts are kept once, for
        the critic and the policy. Two rollouts for both, with :class:`R2VPO`'s other settings, are ahead
        of ``None`` and four short rollouts over ten tasks of DM Control (``benchmarks/control``, five seeds).
    :raises ValueError: ``replay_capacity`` is not a whole number of at least 1, ``utd_ratio`` is not positive and finite, or
        ``critic_capacity`` comes with ``recompute_advantages=False``.
    """

    replay_buffer: RolloutReplayBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 1024,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        var_coef: float | Schedule | str = "auto",
        target_variance: float | Schedule | str = "auto",
        dual_learning_rate: float = 0.02,
        min_var_coef: float = 0.0,
        compensate_entropy: bool = True,
        replay_capacity: int = 2,
        utd_ratio: float = 2.0,
        recompute_advantages: bool = True,
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
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            var_coef=var_coef,
            target_variance=target_variance,
            dual_learning_rate=dual_learning_rate,
            min_var_coef=min_var_coef,
            compensate_entropy=compensate_entropy,
            recompute_advantages=recompute_advantages,
            critic_capacity=critic_capacity,
            critic_epochs=critic_epochs,
            critic_gae_lambda=critic_gae_lambda,
            std_scaled_learning_rate=std_scaled_learning_rate,
            noise_exponent=noise_exponent,
            objective=objective,
            objective_kwargs=objective_kwargs,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            compile=compile,
            _init_setup_model=False,
        )
        self.replay_capacity = replay_capacity
        self.utd_ratio = utd_ratio

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if not (math.isfinite(self.utd_ratio) and self.utd_ratio > 0):
            raise ValueError(f"`utd_ratio` is {self.utd_ratio}; it must be positive and finite.")
        if self.critic_capacity is not None and not self.recompute_advantages:
            raise ValueError("`critic_capacity` needs `recompute_advantages=True`: the critic learns before the advantages.")
        super()._setup_model()

    def _empty_replay_buffer(self) -> RolloutReplayBuffer:
        """One buffer for policy and critic: each learns from the newest rollouts, in numbers of their own."""
        replay_buffer = RolloutReplayBuffer(self.replay_capacity)
        critics = super()._empty_replay_buffer()
        return replay_buffer if critics is None or critics.capacity < replay_buffer.capacity else critics

    def _minibatches(self) -> Iterator[RolloutBufferSamples]:
        """``utd_ratio * n_epochs`` times the minibatches of one rollout, from the policy's rollouts in the replay buffer."""
        n_passes = max(1, round(self.utd_ratio * self.n_epochs))
        for minibatches in self.replay_buffer.passes(self.batch_size, n_passes, self.replay_capacity):
            self._n_updates += 1
            yield from minibatches

    def _prepare_rollouts(self) -> None:
        """After the newest rollout, bring those that the policy trains on as well up to date."""
        super()._prepare_rollouts()
        rollouts = self.replay_buffer.newest(self.replay_capacity)
        # The newest one has the current critic's values, and ratios of one
        for staleness, (following, stored) in enumerate(pairwise(reversed(rollouts)), start=1):
            variance = self._refresh(stored, following)
            self.logger.record(f"train/ratio_variance_stale_{staleness}", variance)

    @th.no_grad()
    def _refresh(self, rollout: StoredRollout, following: StoredRollout | None = None) -> float:
        """
        Bring a stored rollout's values, advantages and returns up to date with the current critic.

        :param rollout: One that an earlier policy collected
        :param following: The one collected after it, up to date already
        :return: The ratio variance between the current policy and that one
        """
        values, deviations = [], []
        for rollout_data in rollout.batches(EVALUATION_BATCH_SIZE):
            batch_values, log_prob, _ = self._evaluate_actions(rollout_data)
            assert batch_values is not None
            values.append(batch_values)
            deviations.append(drop_padding(ratio_minus_one(log_prob - rollout_data.old_log_prob), rollout_data))
        if self.recompute_advantages:
            self._update_advantages(rollout, th.cat(values), following)
        return th.cat(deviations).square().mean().item()

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file.

        :param path: Path to the file where the replay buffer should be saved.
            if path is a str or pathlib.Path, the path is automatically created if necessary.
        """
        save_to_pkl(path, self.replay_buffer, self.verbose)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. Pickle can run code: load only files that you trust.

        :param path: Path to the pickled replay buffer. If it holds more rollouts than this model keeps, the newest stay.
        :param truncate_last_traj: For compatibility with SB3's off-policy algorithms; stored rollouts are always whole.
        :raises ValueError: The file holds something else, or rollouts of other spaces; the buffer is as before.
        """
        loaded = load_from_pkl(path, self.verbose)
        if not isinstance(loaded, RolloutReplayBuffer):
            raise ValueError(
                f"{path} holds a {type(loaded).__name__}, not a RolloutReplayBuffer: "
                f"it was not saved by {type(self).__name__}.save_replay_buffer()."
            )
        replay_buffer = self._empty_replay_buffer()
        for rollout in loaded.rollouts:
            spaces_match = (rollout.buffer.observation_space, rollout.buffer.action_space) == (
                self.observation_space,
                self.action_space,
            )
            if not spaces_match:
                raise ValueError(
                    f"{path} holds rollouts of {rollout.buffer.observation_space} and {rollout.buffer.action_space}, "
                    f"but this model's spaces are {self.observation_space} and {self.action_space}."
                )
            rollout.buffer.device = self.device
            replay_buffer.add(rollout)
        self.replay_buffer = replay_buffer

    def learn(
        self: SelfR2VPOOff,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "R2VPOOff",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfR2VPOOff:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
