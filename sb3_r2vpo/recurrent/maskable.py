"""MaskableRecurrentR2VPO: R2VPO for policies with an LSTM where some actions are invalid."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch as th
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.distributions import MaskableDistribution, make_masked_proba_distribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.ppo_recurrent.policies import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule

from sb3_r2vpo.core.update import Evaluation
from sb3_r2vpo.recurrent.recurrent import RecurrentR2VPO
from sb3_r2vpo.recurrent.sequences import SequenceSamples


class MaskableLstm(RecurrentActorCriticPolicy):
    """What a recurrent policy adds to leave out invalid actions. Masks are those of sb3-contrib: true where valid."""

    _action_masks: Any = None

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = make_masked_proba_distribution(self.action_space)
        # With two outputs for each binary action; RecurrentActorCriticPolicy has no `_build` of its own
        MaskableActorCriticPolicy._build(self, lr_schedule)  # type: ignore[arg-type]

    @contextmanager
    def masked(self, action_masks: np.ndarray | th.Tensor | None) -> Iterator[None]:
        """
        :param action_masks: Of the actions whose distribution is asked for meanwhile; ``None``: all are valid
        """
        before, self._action_masks = self._action_masks, action_masks
        try:
            yield
        finally:
            self._action_masks = before

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> MaskableDistribution:
        distribution: MaskableDistribution = self.action_dist.proba_distribution(self.action_net(latent_pi))  # type: ignore[assignment]
        if self._action_masks is not None:
            distribution.apply_masking(self._action_masks)
        return distribution

    def forward(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> Any:
        with self.masked(action_masks):
            return super().forward(*args, **kwargs)

    def predict(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> Any:
        with self.masked(action_masks):
            return super().predict(*args, **kwargs)


class MaskableMlpLstmPolicy(MaskableLstm, MlpLstmPolicy):
    """``MlpLstmPolicy`` with masks."""


class MaskableCnnLstmPolicy(MaskableLstm, CnnLstmPolicy):
    """``CnnLstmPolicy`` with masks."""


class MaskableMultiInputLstmPolicy(MaskableLstm, MultiInputLstmPolicy):
    """``MultiInputLstmPolicy`` with masks."""


class MaskableRecurrentR2VPO(RecurrentR2VPO):
    """
    R2VPO with memory and invalid action masking (https://arxiv.org/abs/2006.14171): the environment has a method
    ``action_masks``, or is wrapped in sb3-contrib's ``ActionMasker``.

    Takes the arguments of :class:`~sb3_r2vpo.recurrent.RecurrentR2VPO`; actions are Discrete, MultiDiscrete or MultiBinary.

    To evaluate, call ``predict`` with the state it returned, and with masks. sb3-contrib's maskable ``evaluate_policy``, and
    so ``MaskableEvalCallback``, drops the state: its policies would have no memory. SB3's ``evaluate_policy`` keeps it, and
    takes anything that has a ``predict``, such as one that adds ``action_masks=get_action_masks(env)``.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MaskableMlpLstmPolicy,
        "CnnLstmPolicy": MaskableCnnLstmPolicy,
        "MultiInputLstmPolicy": MaskableMultiInputLstmPolicy,
    }
    predict = MaskablePPO.predict
    policy: MaskableLstm

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not issubclass(self.policy_class, MaskableLstm):
            raise ValueError(f"{self.policy_class.__name__} has no masks: take MaskableMlpLstmPolicy, or RecurrentR2VPO.")

    def _collect(self, *args: Any, **kwargs: Any) -> bool:
        if not is_masking_supported(self.env):  # type: ignore[arg-type]
            raise ValueError("Environment does not support action masking. Consider using ActionMasker wrapper")
        hook = self.policy.register_forward_pre_hook(self._ask_for_masks, with_kwargs=True)
        try:
            return super()._collect(*args, **kwargs)
        finally:
            hook.remove()

    def _ask_for_masks(self, policy: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """RecurrentPPO's loop knows no masks: they are added to its calls of the policy."""
        action_masks = get_action_masks(self.env)  # type: ignore[arg-type]
        buffer: Any = self.rollout_buffer
        # A callback may call the policy, too, before the step is added
        if len(buffer.action_masks) == buffer.pos:
            buffer.action_masks.append(action_masks)
        return args, {**kwargs, "action_masks": action_masks}

    def evaluate_actions(self, samples: SequenceSamples, with_values: bool = True) -> Evaluation:
        with self.policy.masked(samples.action_masks):
            return super().evaluate_actions(samples, with_values)
