"""Rollouts of whole responses: one row holds a prompt, all tokens of a response, and their behaviour log-probabilities."""

from collections.abc import Callable, Generator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import TensorDict

from sb3_r2vpo.common.checks import check_flag
from sb3_r2vpo.common.rollout import TIME_MAJOR, PaddedSamples, flatten
from sb3_r2vpo.core.batch import Minibatch, constant_length_mean, sequence_mean, token_mean

#: Fills the rows of a batch of responses after their end. No token id, so that no tokenizer needs a pad token.
PADDING = -1

#: Rollouts of more batches than this are refused: ``n_steps`` was left at PPO's default for robots.
MAX_BATCHES = 256

ADVANTAGES = ("group", "group_mean", "leave_one_out", "gae")
LOSS_NORMALIZATIONS = ("token", "sequence", "constant")


class SequenceRolloutBufferSamples(NamedTuple):
    """
    A minibatch of ``n`` prompts and responses. What belongs to tokens has shape ``(n, max_new_tokens)`` and counts only where
    ``mask`` is set; advantages have shape ``(n, 1)`` and so hold for all tokens of a response.
    """

    observations: TensorDict
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    mask: th.Tensor


def group_means(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """
    :param scores: Any shape
    :param groups: Label of each one's group, same shape
    :return: The mean of each one's group, same shape, in float64
    """
    _, inverse, counts = np.unique(groups.ravel(), return_inverse=True, return_counts=True)
    return (np.bincount(inverse, weights=scores.ravel().astype(np.float64)) / counts)[inverse].reshape(scores.shape)


def group_advantages(scores: np.ndarray, groups: np.ndarray, kind: str = "group") -> np.ndarray:
    """
    Advantages of responses relative to the other responses to the same prompt; no critic.

    :param scores: Total reward of each response, any shape.
    :param groups: Label of each response's group, same shape.
    :param kind: "group": ``(R - mean) / (std + tiny)``, GRPO's and the paper's (the standard deviation is the population's,
        as the group is all there is; it leaves a group of one at zero). "group_mean": ``R - mean``, which does not favour
        prompts that are almost always or almost never solved (Dr. GRPO, https://arxiv.org/abs/2503.20783).
        "leave_one_out": ``R`` minus the mean of the *others*, unbiased (RLOO, https://arxiv.org/abs/2402.14740).
    :return: Advantages, same shape. Responses alone in their group get zero.
    """
    _, inverse, counts = np.unique(groups.ravel(), return_inverse=True, return_counts=True)
    advantages = (scores.astype(np.float64) - group_means(scores, groups)).ravel()
    if kind == "group":
        stds = np.sqrt(np.bincount(inverse, weights=advantages**2) / counts)[inverse]
        advantages /= stds + 1e-6
    elif kind == "leave_one_out":
        advantages *= (counts / np.maximum(counts - 1, 1))[inverse]
    return advantages.reshape(scores.shape).astype(np.float32)


class SequenceRolloutBuffer(PaddedSamples, DictRolloutBuffer):
    """
    Rollout buffer for responses (actions of a :class:`~sb3_r2vpo.llm.spaces.ResponseSpace`).

    One step of a rollout is one batch of responses, or one turn of a conversation. Responses to the same prompt in the same
    step form a group, however many environments share it; the score of a conversation is the sum of its rewards, and all of
    its turns get the same advantage.

    :param buffer_size: Steps in a rollout: ``n_steps`` of the algorithm, a multiple of the number of turns
    :param observation_space: Space of the prompts
    :param action_space: Space of the responses
    :param device: PyTorch device
    :param gae_lambda: see ``advantage="gae"``
    :param gamma: see ``advantage="gae"``
    :param n_envs: Number of responses in a step
    :param advantage: "group" (default, the paper's), "group_mean" or "leave_one_out", see :func:`group_advantages`; "gae" for
        a policy with a value head: SB3's estimate, over the turns of a conversation.
    :param loss_normalization: How the loss is averaged over the tokens of a minibatch: "token" (default, DAPO: all tokens
        weigh the same), "sequence" (GRPO: all responses weigh the same) or "constant" (Dr. GRPO: sums over responses, divided
        by ``max_new_tokens``).
    :param filter_uniform_groups: Leave out groups whose scores are all equal (DAPO's filter, without its resampling): their
        advantages are zero, and they would only dilute the loss. By default they stay, and are held in place by the penalty.
    :param mask_truncated: Leave out responses that the length limit cut off (DAPO's overlong filter): their reward tells
        little of what they were about to say. They still count for the advantages of their group. By default they are trained
        on.
    :raises ValueError: An option is unknown, or a rollout is longer than ``MAX_BATCHES`` steps.
    """

    time_major = (*TIME_MAJOR, "groups", "selected")

    # Defaults of the class: rollouts in older files lack them
    mask_truncated = False
    #: Of the last rollout, by the names that they are logged with under ``rollout/``; empty before there is one
    statistics: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        *args: Any,
        advantage: str = "group",
        loss_normalization: str = "token",
        filter_uniform_groups: bool = False,
        mask_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        if advantage not in ADVANTAGES:
            raise ValueError(f"`advantage` is {advantage!r}; choose one of {', '.join(ADVANTAGES)}.")
        if loss_normalization not in LOSS_NORMALIZATIONS:
            raise ValueError(
                f"`loss_normalization` is {loss_normalization!r}; choose one of {', '.join(LOSS_NORMALIZATIONS)}."
            )
        self.advantage = advantage
        for name, flag in (("filter_uniform_groups", filter_uniform_groups), ("mask_truncated", mask_truncated)):
            check_flag(name, flag)
        self.filter_uniform_groups = filter_uniform_groups
        if mask_truncated:
            self.mask_truncated = True
        super().__init__(*args, **kwargs)
        averages: dict[str, Callable[..., th.Tensor]] = {
            "token": token_mean,
            "sequence": sequence_mean,
            "constant": partial(constant_length_mean, max_length=self.action_dim),
        }
        self.average = averages[loss_normalization]
        if self.buffer_size > MAX_BATCHES:
            raise ValueError(
                f"A rollout would hold {self.buffer_size} batches of {self.n_envs} responses each: `n_steps` counts batches "
                "of whole responses here. Pass n_steps=1, or the number of turns of a conversation."
            )

    def reset(self) -> None:
        super().reset()
        self.log_probs = np.zeros((self.buffer_size, self.n_envs, self.action_dim), dtype=np.float32)
        self.groups: np.ndarray | None = None
        self.selected = np.ones((self.buffer_size, self.n_envs), dtype=bool)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        :param last_values: Values after the last step, for "gae"
        :param dones: Whether the last step ended the episodes
        :raises ValueError: The rollout ends within a conversation.
        """
        is_new, groups = self.groups is None, self.groups
        if groups is None:
            groups = self.groups = self._label_groups(dones)
            # A turn in which the environment had nothing to ask is no response
            lengths = (self.actions != PADDING).sum(axis=-1)
            self.selected = lengths > 0
            truncated = self.selected & (lengths == self.action_dim) & ~np.isin(self.actions[..., -1], self._eos_token_ids)
        if self.advantage == "gae":
            super().compute_returns_and_advantage(last_values, dones)
        conversations = np.cumsum(self.episode_starts[:, 0]).astype(int) - 1
        scores = np.stack([self.rewards[conversations == i].sum(axis=0) for i in range(conversations[-1] + 1)])
        if self.advantage != "gae":
            self.advantages = group_advantages(scores, groups, self.advantage)[conversations]
            self.returns = scores[conversations]
        # Not `!= 0`: the mean of equal floats may differ from them in the last digit
        differs = np.abs(group_advantages(scores, groups, "group_mean")) > 1e-6
        if is_new:
            self.statistics = self._summary(scores, differs, lengths[self.selected], truncated[self.selected])
            if self.mask_truncated:
                self.selected &= ~truncated
        if self.filter_uniform_groups:
            self.selected &= np.isin(groups, groups[differs])[conversations]

    @property
    def _eos_token_ids(self) -> list[int]:
        return list(getattr(self.action_space, "eos_token_ids", ()))

    def _summary(
        self, scores: np.ndarray, differs: np.ndarray, lengths: np.ndarray, truncated: np.ndarray
    ) -> dict[str, float]:
        """
        :param scores: Of all conversations
        :param differs: Whether they differ from the mean of their group
        :param lengths: Tokens of each response that is not empty
        :param truncated: Whether the length limit cut it off
        :return: What is logged of a rollout. The entropy is estimated by minus the log-probabilities of the sampled tokens.
        """
        groups = np.unique(self.groups)  # type: ignore[arg-type]
        spread = scores.ravel() - group_means(scores, self.groups).ravel()  # type: ignore[arg-type]
        return {
            "reward_mean": float(scores.mean()),
            "reward_std": float(scores.std()),
            "reward_std_within_groups": float(np.sqrt(np.square(spread).mean())),
            "uniform_groups": 1 - len(np.unique(self.groups[differs])) / len(groups),  # type: ignore[index]
            "length_mean": float(lengths.mean()),
            "length_max": float(lengths.max()),
            "truncated": float(truncated.mean()),
            "entropy": float(-self.log_probs[self.actions != PADDING].mean()),
        }

    def minibatch(self, samples: SequenceRolloutBufferSamples) -> Minibatch:
        return Minibatch(samples, samples.mask, self.average)

    def _label_groups(self, dones: np.ndarray) -> np.ndarray:
        """Labels of shape ``(n_conversations, n_envs)``: equal where conversations of one step began with the same prompt."""
        starts = self.episode_starts.astype(bool)
        if not (starts[0].all() and dones.all() and (starts.all(axis=1) == starts.any(axis=1)).all()):
            raise ValueError(
                f"A rollout of n_steps={self.buffer_size} ends within a conversation: `n_steps` must be a multiple of the "
                "number of turns, `max_turns` of the environment."
            )
        labels: list[np.ndarray] = []
        for step in np.flatnonzero(starts[:, 0]):
            prompts = np.concatenate([obs[step] for obs in self.observations.values()], axis=-1)
            _, inverse = np.unique(prompts, axis=0, return_inverse=True)
            labels.append(inverse.reshape(-1) + len(labels) * self.n_envs)
        return np.stack(labels)

    @property
    def selected_indices(self) -> np.ndarray:
        """Rows to train on, in sampling order: responses that are not empty and not filtered out"""
        return np.flatnonzero(self.swap_and_flatten(self.selected))

    def get(  # type: ignore[override]
        self, batch_size: int | None = None
    ) -> Generator[SequenceRolloutBufferSamples, None, None]:
        """
        :param batch_size: Responses in a minibatch; ``None`` for all in one
        :return: Minibatches of the selected responses in random order
        """
        assert self.full, "The rollout is not complete"
        flatten(self)
        indices = np.random.permutation(self.selected_indices)
        batch_size = batch_size or len(indices)
        for start in range(0, len(indices), batch_size):
            yield self._get_samples(indices[start : start + batch_size])

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: Any = None
    ) -> SequenceRolloutBufferSamples:
        actions = self.to_torch(self.actions[batch_inds])
        return SequenceRolloutBufferSamples(
            observations={key: self.to_torch(obs[batch_inds]) for key, obs in self.observations.items()},
            actions=actions,
            old_values=self.to_torch(self.values[batch_inds].flatten()),
            old_log_prob=self.to_torch(self.log_probs[batch_inds]),
            advantages=self.to_torch(self.advantages[batch_inds].reshape(-1, 1)),
            returns=self.to_torch(self.returns[batch_inds].flatten()),
            mask=actions != PADDING,
        )
