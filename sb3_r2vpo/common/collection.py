"""Collecting a rollout: SB3's loop, with correlated noise, and with what advantages can be computed from later."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_r2vpo.common.arguments import Arguments
from sb3_r2vpo.common.callbacks import AdvantageSnapshot, AfterRolloutStart
from sb3_r2vpo.common.exploration import unexplained_variance
from sb3_r2vpo.common.finite import checked, refuse_nonfinite_weights
from sb3_r2vpo.common.rollout import Timeouts


class RolloutCollection(Arguments):
    """The half of :class:`~sb3_r2vpo.common.algorithm.RatioVarianceAlgorithm` that runs before an update."""

    _snapshot: AdvantageSnapshot
    _timeouts: Timeouts
    # Of the last rollout's rewards
    _unexplained_variance = 1.0
    #: The largest share of an update's minibatches that may be left out for a gradient that is not finite
    _droppable_share = 0.0

    @property
    def _renews_advantages(self) -> bool:
        """Whether advantages are computed again after collection."""
        return self.replay_buffer is not None or self.critic.recomputes_each_epoch

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._follow_arguments()
        # A reset may be part of it
        with checked(self.env, self) as env:  # type: ignore[arg-type]
            learning = super()._setup_learn(*args, **kwargs)
            env.first(self._last_obs)
        return learning

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # Until a callback says otherwise
        self._droppable_share = 0.0
        if self._renews_advantages:
            users = callback if isinstance(callback, list) else [] if callback is None else [callback]
            converted = [user if isinstance(user, BaseCallback) else ConvertCallback(user) for user in users]
            # Before the user's, to see what they change
            callback = [self._snapshot, *converted]
        return super()._init_callback(callback, progress_bar)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int, **kwargs: Any
    ) -> bool:
        if rollout_buffer.buffer_size != n_rollout_steps:
            raise ValueError(
                f"`n_steps` is {n_rollout_steps}, but the rollout buffer was made for {rollout_buffer.buffer_size} steps, and "
                "would be trained on with old ones. Set it where the model is made or loaded: "
                "`load(path, env=env, n_steps=...)`."
            )
        self._follow_arguments()
        refuse_nonfinite_weights(self.policy)
        if self.noise.schedule is not None:
            # Its value is refused before anything is changed
            self.noise.schedule(self._current_progress_remaining)
        self._timeouts = Timeouts()
        if self.replay_buffer is not None:
            self.replay_buffer.make_room()
        if not self.noise.is_white:

            def start_noise() -> None:
                settings = n_rollout_steps, env.num_envs, self._current_progress_remaining, self._unexplained_variance
                self.logger.record("rollout/noise_exponent", self.noise.start(self.policy, *settings))

            callback = AfterRolloutStart(callback, start_noise)  # type: ignore[assignment]
        try:
            with checked(env, self) as checked_env:
                finished = self._collect(checked_env, callback, rollout_buffer, n_rollout_steps, **kwargs)
        finally:
            self.noise.stop(self.policy)
        # Of environments in processes that are started anew, see `WorkerVecEnv`, also beneath wrappers
        if (n_restarts := getattr(env, "n_restarts", None)) is not None:
            self.logger.record("rollout/env_restarts", n_restarts)
        if finished and len(self._timeouts) > 0:
            self._timeouts.values, self._timeouts.gamma = self._timeouts.predict(self.predict_values), self.gamma
        if finished and self.noise.adaptive:
            self._update_unexplained_variance()
        return finished

    def _collect(self, *args: Any, **kwargs: Any) -> bool:
        """Collect one rollout: SB3's loop, or sb3-contrib's in a variant."""
        return super().collect_rollouts(*args, **kwargs)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        """Called at each step before SB3 adds the bootstrapped value to the rewards: note where that is going to happen."""
        super()._update_info_buffer(infos, dones)
        self.noise.advance(self.policy)
        if not (self._renews_advantages or self.noise.adaptive):
            return
        for idx in np.flatnonzero(dones).tolist():  # type: ignore[arg-type]
            info = infos[idx]
            if info.get("terminal_observation") is not None and info.get("TimeLimit.truncated", False):
                self._timeouts.append(self.rollout_buffer.pos, idx, info["terminal_observation"])

    def _update_unexplained_variance(self) -> None:
        """How much of the rollout's rewards the critic has not predicted, before it learns from them."""
        buffer, timeouts = self.rollout_buffer, self._timeouts
        last_values = self.predict_values(self._last_obs).cpu().numpy()
        next_values = np.concatenate([buffer.values[1:], last_values.reshape(1, -1)])
        dones = np.concatenate([buffer.episode_starts[1:], self._last_episode_starts[np.newaxis]])  # type: ignore[index]
        # SB3 has added the values of timeouts to the rewards
        td_errors = buffer.rewards + self.gamma * (1 - dones) * next_values - buffer.values
        rewards = buffer.rewards.copy()
        rewards[timeouts.steps, timeouts.envs] -= self.gamma * timeouts.values
        self._unexplained_variance = unexplained_variance(rewards, td_errors, dones, self.gamma)

    @th.no_grad()
    def predict_values(self, observations: Any) -> th.Tensor:
        """
        :param observations: A batch of observations, arrays or tensors
        :return: The current critic's values of them, shape ``(batch_size, 1)``, without gradient
        """
        first = next(iter(observations.values())) if isinstance(observations, dict) else observations
        if not isinstance(first, th.Tensor):
            observations = obs_as_tensor(observations, self.device)
        return self.policy.predict_values(observations)
