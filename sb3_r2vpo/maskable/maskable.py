"""R2VPO where some actions are invalid: with the policies, buffers and rollout collection of sb3-contrib's MaskablePPO."""

from typing import Any, TypeVar

from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm
from sb3_r2vpo.common.rollout import SHUFFLED_STEPS
from sb3_r2vpo.r2vpo import R2VPO
from sb3_r2vpo.r2vpo_off import R2VPOOff

SelfMaskable = TypeVar("SelfMaskable", bound="InvalidActionMasking")

# Like SB3's, with the masks besides
SHUFFLED_STEPS |= {MaskableRolloutBuffer.get, MaskableDictRolloutBuffer.get}


class InvalidActionMasking(RatioVarianceAlgorithm):
    """
    What a variant of R2VPO adds to leave out invalid actions (https://arxiv.org/abs/2006.14171), used as MaskablePPO is: the
    environment has a method ``action_masks``, or is wrapped in sb3-contrib's ``ActionMasker``.

    Masks are stored, shuffled and replayed with their observations: the probability ratio is that of two policies under the
    same mask, whichever rollout it comes from.
    """

    policy_aliases = MaskablePPO.policy_aliases
    predict = MaskablePPO.predict

    _use_masking = True

    def _setup_model(self) -> None:
        supported = spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary
        assert isinstance(self.action_space, supported), (
            f"The algorithm only supports {supported} as action spaces but {self.action_space} was provided"
        )
        policy_class: type = self.policy_class
        if not issubclass(policy_class, MaskableActorCriticPolicy):
            raise ValueError("Policy must subclass MaskableActorCriticPolicy")
        if self.compile:
            raise ValueError(
                "`compile=True` slows masked distributions down: few of their parts compile. Pass `compile=False`."
            )
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = MaskableDictRolloutBuffer if is_dict else MaskableRolloutBuffer
        # Discrete actions have no gSDE, and sb3-contrib's policies no such argument
        self.policy_class = lambda *args, use_sde, **kwargs: policy_class(*args, **kwargs)  # type: ignore[assignment]
        try:
            super()._setup_model()
        finally:
            self.policy_class = policy_class

    def _collect(self, *args: Any, **kwargs: Any) -> bool:
        kwargs = {"use_masking": self._use_masking, **kwargs}
        return MaskablePPO.collect_rollouts(self, *args, **kwargs)  # type: ignore[arg-type]

    def policy_inputs(self, samples: Any) -> dict[str, Any]:
        return {"action_masks": samples.action_masks}

    def learn(self: SelfMaskable, *args: Any, use_masking: bool = True, **kwargs: Any) -> SelfMaskable:
        """
        Train, see ``BaseAlgorithm.learn``, whose arguments are taken as well.

        :param use_masking: Whether to use invalid action masks during training
        :return: The model
        """
        self._use_masking = use_masking
        return super().learn(*args, **kwargs)


class MaskableR2VPO(InvalidActionMasking, R2VPO):
    """
    R2VPO with invalid action masking, in place of sb3-contrib's MaskablePPO.

    Takes the arguments of :class:`~sb3_r2vpo.r2vpo.R2VPO`. Those for continuous actions, ``use_sde`` and ``noise_exponent``,
    are refused, and so is ``compile``; the policy is one of sb3-contrib's ``MaskableActorCriticPolicy``.
    """


class MaskableR2VPOOff(InvalidActionMasking, R2VPOOff):
    """
    R2VPOOff with invalid action masking: rollouts are replayed with their masks.

    Takes the arguments of :class:`~sb3_r2vpo.r2vpo_off.R2VPOOff`, but for the limits of :class:`MaskableR2VPO`.
    """
