"""How a policy acts while a rollout is collected: in less time, and with noise of any color."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_r2vpo.r2vpo.evaluation import act_with_noise, acts_as_usual
from sb3_r2vpo.r2vpo.plain_mlp import PlainMlp, is_plain_mlp


class Acting:
    """
    Stands in for a policy's ``forward`` while a rollout is collected: has the noise of exploration, and leaves the numbers to
    :meth:`PlainMlp.act` if it can, as the modules of layers and the objects of distributions take more time than the numbers
    of a few dozen environments. Calls that need gradients or deterministic actions are the policy's.

    :param policy: A policy that :func:`acts_as_usual`
    :param noise: Gives that of the current step, of unit variance and of the actions' flat shape; ``None`` for independent
        normal numbers
    """

    def __init__(self, policy: ActorCriticPolicy, noise: Callable[[], th.Tensor] | None) -> None:
        self.policy, self.noise = policy, noise
        self.by_hand = PlainMlp(policy) if is_plain_mlp(policy) else None

    def __call__(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        if deterministic or th.is_grad_enabled():
            return ActorCriticPolicy.forward(self.policy, obs, deterministic)
        noise = None if self.noise is None else self.noise()
        if self.by_hand is not None:
            return self.by_hand.act(obs, noise)
        return ActorCriticPolicy.forward(self.policy, obs) if noise is None else act_with_noise(self.policy, obs, noise)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the policy, such as a callback may make, acts as ever."""
        return partial, (ActorCriticPolicy.forward, self.policy)


@contextmanager
def acting(policy: ActorCriticPolicy, noise: Callable[[], th.Tensor] | None = None) -> Iterator[None]:
    """
    Calls of the policy are those of :class:`Acting` while it lasts, unless they have become others in a subclass.

    :param policy: Any policy
    :param noise: see :class:`Acting`
    """
    if not acts_as_usual(policy):
        yield
        return
    policy.forward = Acting(policy, noise)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del policy.forward
