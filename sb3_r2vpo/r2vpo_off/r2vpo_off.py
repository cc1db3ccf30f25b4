"""R2VPOOff: R2VPO on a replay of its last rollouts."""

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_r2vpo.r2vpo.r2vpo import R2VPO


class R2VPOOff(R2VPO):
    """
    Ratio-Variance Regularized Policy Optimization on replayed rollouts (R2VPO-OFF, section 4.3 of the paper).

    The last ``replay_capacity`` rollouts are kept with the log-probabilities under the policies that generated them; each
    update draws its minibatches uniformly from all of them. The constraint on the ratio variance is what bounds the distance
    to the older policies: there is no importance-weight truncation, no V-trace, no Retrace. Values, advantages and returns of
    the older rollouts are brought up to date with the current critic before each update, and GAE goes on from each rollout
    into the one that followed it.

    With ``replay_capacity=1`` and ``utd_ratio=1`` it trains exactly as :class:`~sb3_r2vpo.r2vpo.R2VPO`.

    :param policy: see :class:`~sb3_r2vpo.r2vpo.R2VPO`, as all that is not listed here
    :param env: see there
    :param learning_rate: see there
    :param n_steps: The number of steps to run for each environment per update; 1024, so that the replay's two rollouts are
        the 2048 steps that R2VPO and SB3's PPO update on: shorter ones renew the policy more often.
    :param args: Further positional arguments of R2VPO
    :param replay_capacity: Number of rollouts to keep, first in, first out: two here and in ``hyperparams/``, four in the
        paper's language-model experiments. More is for rollouts that are shorter (``benchmarks/control``).
    :param utd_ratio: Update-to-data ratio: passes over one rollout's worth of steps are ``utd_ratio * n_epochs`` (rounded, at
        least one); 2 as in the paper's language-model experiments. With 1 there are as many gradient steps for each collected
        step as on-policy.
    :param kwargs: Further arguments of R2VPO
    :raises ValueError: ``replay_capacity`` is not a whole number of at least 1, or ``utd_ratio`` is not positive and finite.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 1024,
        *args: Any,
        replay_capacity: int = 2,
        utd_ratio: float = 2.0,
        **kwargs: Any,
    ) -> None:
        self.replay_capacity = replay_capacity
        self.utd_ratio = utd_ratio
        super().__init__(policy, env, learning_rate, n_steps, *args, **kwargs)
