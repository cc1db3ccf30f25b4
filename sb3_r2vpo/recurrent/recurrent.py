"""RecurrentR2VPO: R2VPO for policies with an LSTM."""

import warnings
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent.policies import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from sb3_r2vpo.common.policies import stored_actions
from sb3_r2vpo.core.update import Evaluation
from sb3_r2vpo.r2vpo.r2vpo import R2VPO
from sb3_r2vpo.recurrent.evaluation import evaluate
from sb3_r2vpo.recurrent.sequences import SequenceDictRolloutBuffer, SequenceRolloutBuffer, SequenceSamples, SequenceSampling


class RecurrentR2VPO(R2VPO):
    """
    Ratio-Variance Regularized Policy Optimization for recurrent policies (LSTM): what RecurrentPPO of sb3-contrib is to PPO,
    with its policies, its defaults and its way of collecting rollouts.

    Minibatches consist of whole sequences, so that the LSTM runs over all of their steps in one call, see
    :class:`~sb3_r2vpo.recurrent.sequences.SequenceRolloutBuffer`. Sequences cut to ``n`` steps are faster still where
    episodes are long: ``rollout_buffer_kwargs={"sequence_length": n}``.

    A critic that is optimised separately, recomputed advantages, correlated noise and ``compile`` are not available.

    :param policy: The policy model to use (MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy)
    :param env: see :class:`~sb3_r2vpo.r2vpo.R2VPO`, as all that is not listed here
    :param learning_rate: see there
    :param n_steps: The number of steps to run for each environment per update, the longest that is learned to be remembered
    :param batch_size: Minibatch size, in steps: about so many, as sequences stay whole
    :param args: Further positional arguments of R2VPO
    :param kwargs: Further arguments of R2VPO
    :raises ValueError: An option can't be combined with a recurrent policy, or the policy is not recurrent.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int = 128,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, n_steps, batch_size, *args, **kwargs)

    def _check_batch_size(self, n_envs: int) -> None:
        with warnings.catch_warnings():
            # Of a truncated minibatch: sequences are shared out to minibatches of about one size
            warnings.simplefilter("ignore")
            super()._check_batch_size(n_envs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        critic_kwargs = self.critic_kwargs or {}
        refused = {
            "critic_kwargs={'n_rollouts': ...}": critic_kwargs.get("n_rollouts") is not None,
            "critic_kwargs={'recompute_advantages': True}": critic_kwargs.get("recompute_advantages") is True,
            "noise_exponent": self.noise_exponent != 0,
            "compile=True": self.compile,
            "replay_capacity": self.replay_capacity != 1,
        }
        for option, is_set in refused.items():
            if is_set:
                raise ValueError(f"`{option}` is not for recurrent policies: leave it out, or take R2VPO with an MlpPolicy.")
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(
                f"{self.policy_class.__name__} is not recurrent: take MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy or "
                "another subclass of sb3-contrib's RecurrentActorCriticPolicy, or R2VPO."
            )
        for name in ("evaluate_actions", "_process_sequence"):
            if getattr(self.policy_class, name) is not getattr(RecurrentActorCriticPolicy, name):
                raise ValueError(
                    f"{self.policy_class.__name__} has a `{name}` of its own, which RecurrentR2VPO does not call."
                )
        if self.rollout_buffer_class is not None and not issubclass(self.rollout_buffer_class, SequenceSampling):
            raise ValueError(
                f"`rollout_buffer_class` is {self.rollout_buffer_class.__name__}; it must be a subclass of "
                "SequenceRolloutBuffer or SequenceDictRolloutBuffer, or None."
            )

    def _setup_model(self) -> None:
        if self.rollout_buffer_class is None:
            has_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = SequenceDictRolloutBuffer if has_dict else SequenceRolloutBuffer
        super()._setup_model()
        lstm: nn.LSTM = self.policy.lstm_actor  # type: ignore[assignment]
        # As in RecurrentPPO, actor and critic have LSTMs of one architecture
        zeros = th.zeros(lstm.num_layers, self.n_envs, lstm.hidden_size, device=self.device)
        self._last_lstm_states = RNNStates((zeros, zeros), (zeros, zeros))

    def _collect(self, *args: Any, **kwargs: Any) -> bool:
        return RecurrentPPO.collect_rollouts(self, *args, **kwargs)  # type: ignore[arg-type]

    def evaluate_actions(self, samples: SequenceSamples, with_values: bool = True) -> Evaluation:
        return evaluate(self.policy, samples, stored_actions(self.action_space, samples.actions))  # type: ignore[arg-type]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_lstm_states"]
