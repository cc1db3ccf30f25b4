"""
A policy for a robot, without Python's environments around it: from the environment's own observations to its own actions, with
the normalization of the one and the clipping of the other inside, as ONNX or TorchScript.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

#: What is written, by the ending of the file's name
FORMATS = {".onnx": "ONNX", ".pt": "TorchScript"}

#: Name of the one input where observations are no mapping, and of the output
OBSERVATIONS, ACTIONS = "observations", "actions"


class DeterministicPolicy(nn.Module):
    """
    The deterministic actions of a policy, as the environment receives them.

    :param policy: Of SB3's on-policy algorithms or R2VPO's variants, but neither recurrent nor masked
    :param normalization: The statistics that it was trained with, if any
    :raises ValueError: The policy has a state or masks, or the statistics are of other observations.
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: ActorCriticPolicy, normalization: VecNormalize | None = None) -> None:
        super().__init__()
        if not isinstance(policy, ActorCriticPolicy) or hasattr(policy, "lstm_actor"):
            raise ValueError(
                f"{type(policy).__name__} can't be exported: it takes more than an observation, a state or a mask. Load the "
                "model with its algorithm's `load`."
            )
        known = (
            *(DiagGaussianDistribution, StateDependentNoiseDistribution),
            *(CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution),
        )
        if not isinstance(policy.action_dist, known):
            raise ValueError(f"Actions of a {type(policy.action_dist).__name__} can't be exported.")
        # Copies without gradients, of what acts: the model stays where it is, and goes on learning
        self.features_extractor = deepcopy(policy.pi_features_extractor)
        self.mlp_extractor = deepcopy(policy.mlp_extractor)
        self.action_net = deepcopy(policy.action_net)
        self.requires_grad_(False)
        self.distribution, self.squash_output = policy.action_dist, policy.squash_output
        self.observation_space, self.action_space = policy.observation_space, policy.action_space
        self.normalize_images = policy.normalize_images
        if isinstance(policy.action_space, spaces.Box):
            self.register_buffer("low", th.as_tensor(policy.action_space.low))
            self.register_buffer("high", th.as_tensor(policy.action_space.high))
        space = policy.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {OBSERVATIONS: space}
        self.names = list(parts)
        self.is_mapping = isinstance(space, spaces.Dict)
        self.normalized: list[str] = []
        self.clip_obs = 0.0
        if normalization is not None and normalization.norm_obs:
            self.clip_obs = float(normalization.clip_obs)
            statistics = (
                normalization.obs_rms if isinstance(normalization.obs_rms, dict) else {OBSERVATIONS: normalization.obs_rms}
            )
            for name, moments in statistics.items():
                self._add_statistics(name, moments, normalization.epsilon, parts[name])

    def _add_statistics(self, name: str, moments: RunningMeanStd, epsilon: float, space: spaces.Space) -> None:
        if moments.mean.shape != space.shape:
            raise ValueError(
                f"The statistics are of {name} of shape {moments.mean.shape}, the policy takes {space.shape}: observations "
                "are stacked or transposed between the two, which can't be exported."
            )
        self.normalized.append(name)
        self.register_buffer(f"mean_{self.names.index(name)}", th.as_tensor(moments.mean, dtype=th.float32))
        self.register_buffer(f"std_{self.names.index(name)}", th.as_tensor(np.sqrt(moments.var + epsilon), dtype=th.float32))

    def forward(self, *observations: th.Tensor) -> th.Tensor:
        """
        :param observations: Of shape ``(batch_size, *shape)``, as the environment returns them; of a ``Dict`` space, one for
            each of :attr:`names`
        :return: Actions of shape ``(batch_size, *shape)``, within the bounds of the action space
        """
        parts = {name: self._normalize(name, part) for name, part in zip(self.names, observations, strict=True)}
        inputs: Any = parts if self.is_mapping else parts[OBSERVATIONS]
        inputs = preprocess_obs(inputs, self.observation_space, normalize_images=self.normalize_images)
        return self._most_probable(self.action_net(self.mlp_extractor.forward_actor(self.features_extractor(inputs))))

    def _normalize(self, name: str, part: th.Tensor) -> th.Tensor:
        if name not in self.normalized:
            return part
        number = self.names.index(name)
        mean, std = getattr(self, f"mean_{number}"), getattr(self, f"std_{number}")
        return th.clamp((part - mean) / std, -self.clip_obs, self.clip_obs)

    def _most_probable(self, outputs: th.Tensor) -> th.Tensor:
        # The modes of SB3's distributions, whose objects check their arguments, which no exporter can follow
        distribution, space = self.distribution, self.action_space
        if isinstance(distribution, CategoricalDistribution):
            return outputs.argmax(dim=1)
        if isinstance(distribution, MultiCategoricalDistribution):
            choices = [logits.argmax(dim=1) for logits in outputs.split([*map(int, distribution.action_dims)], dim=1)]
            return th.stack(choices, dim=1).reshape(-1, *space.shape)  # type: ignore[misc]
        if isinstance(distribution, BernoulliDistribution):
            return (outputs > 0).to(th.int8).reshape(-1, *space.shape)  # type: ignore[misc]
        assert isinstance(space, spaces.Box)
        actions = outputs.reshape(-1, *space.shape)
        if self.squash_output:
            return self.low + 0.5 * (th.tanh(actions) + 1.0) * (self.high - self.low)
        return th.minimum(th.maximum(actions, self.low), self.high)

    def example(self, batch_size: int = 2) -> tuple[th.Tensor, ...]:
        """
        :param batch_size: Number of observations
        :return: Observations drawn from the space, in the types that :meth:`forward` takes: floats of 32 bits
        """
        space = self.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {OBSERVATIONS: space}
        examples = [th.as_tensor(np.stack([part.sample() for _ in range(batch_size)])) for part in parts.values()]
        return tuple(part.float() if part.dtype == th.float64 else part for part in examples)


def export_policy(model: OnPolicyAlgorithm, path: str | Path, normalization: VecNormalize | None = None) -> Path:
    """
    Write a trained policy as a file that needs neither SB3 nor the environment: observations in, actions out, any number of
    them at once. What other wrappers do to observations or actions is not inside.

    :param model: The trained model
    :param path: Ends in ``.onnx``, for onnxruntime and its like, or in ``.pt``, for ``torch.jit.load`` and LibTorch
    :param normalization: The statistics that it was trained with; by default, those of the model's environment, if it has one
    :return: The file
    :raises ValueError: The ending is another one, or the policy can't be exported, see :class:`DeterministicPolicy`.
    :raises ImportError: ONNX is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        endings = ", ".join(f"{ending} for {name}" for ending, name in FORMATS.items())
        raise ValueError(f"{path} has the ending {path.suffix!r}; it must be one of {endings}.")
    module = DeterministicPolicy(model.policy, normalization or model.get_vec_normalize_env()).cpu().eval()
    example = module.example()
    with warnings.catch_warnings(), th.no_grad():
        # Of the exporters' own future
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        if path.suffix == ".pt":
            th.jit.trace(module, example).save(str(path))
        else:
            _export_onnx(module, example, path)
    return path


def _export_onnx(module: DeterministicPolicy, example: Sequence[Any], path: Path) -> None:
    try:
        import onnxscript as onnxscript
    except ImportError as error:
        raise ImportError("ONNX files need the extra `export`: pip install 'sb3-r2vpo[export]'") from error
    batch = th.export.Dim("batch_size")
    th.onnx.export(
        module,
        tuple(example),
        path,
        input_names=module.names,
        output_names=[ACTIONS],
        dynamic_shapes=(tuple({0: batch} for _ in example),),
        external_data=False,
        verbose=False,
    )
