"""Colored noise of exploration."""

import copy
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.distributions import CorrelatedGaussianDistribution
from sb3_r2vpo.common.exploration import auto_exponent, colored_noise, unexplained_variance
from sb3_r2vpo.r2vpo import CensoredMlpPolicy, LayerNormMlpPolicy

PLANE = spaces.Box(-1, 1, (2,))


@given(exponent=st.floats(0, 2), n_steps=st.integers(1, 40), seed=st.integers(0, 9))
def test_noise_of_each_step_is_standard_normal(exponent, n_steps, seed):
    """Whatever the exponent is, at the first step as at the last."""
    th.manual_seed(seed)
    noise = colored_noise(exponent, n_steps, 4000)
    assert noise.shape == (n_steps, 4000)
    assert noise.dtype == th.float32
    assert noise.square().mean(dim=1).numpy() == pytest.approx(np.ones(n_steps), abs=0.15)
    assert noise.mean(dim=1).numpy() == pytest.approx(np.zeros(n_steps), abs=0.1)


def test_white_noise_is_as_it_was_drawn():
    th.manual_seed(0)
    white = th.randn(50, 3, 2)
    th.manual_seed(0)
    th.testing.assert_close(colored_noise(0.0, 50, 3, 2), white)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_power_falls_with_frequency(exponent):
    """By the exponent, on a logarithmic scale; and what is of lower frequency than one period is as strong as that."""
    th.manual_seed(0)
    power = th.fft.rfft(colored_noise(exponent, 256, 2000), dim=0).abs().square().mean(dim=1).numpy()
    slope, _ = np.polyfit(np.log(np.arange(1, 129)), np.log(power[1:]), 1)
    assert slope == pytest.approx(-exponent, abs=0.02)
    assert power[0] / power[1] == pytest.approx(1.0, abs=0.15)


def test_numbers_of_a_step_are_independent():
    th.manual_seed(0)
    noise = colored_noise(1.0, 32, 1000, 2, 3).reshape(-1, 6)
    assert th.corrcoef(noise.T).numpy() == pytest.approx(np.eye(6), abs=0.05)


def rollout_noise(model) -> np.ndarray:
    """What was added to the mean actions, in standard deviations; shape ``(n_steps, n_envs, n_actions)``."""
    # The update has put the rollout into sampling order
    samples = model.rollout_buffer._get_samples(slice(None))
    with th.no_grad():
        distribution = model.policy.get_distribution(samples.observations)
        th.testing.assert_close(distribution.log_prob(samples.actions), samples.old_log_prob)
        noise = (samples.actions - distribution.distribution.mean) / distribution.distribution.stddev
    return noise.numpy().reshape(model.n_envs, model.n_steps, -1).swapaxes(0, 1)


def correlation_of_neighbours(noise: np.ndarray) -> float:
    return float(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1])


@pytest.mark.parametrize("action_space", [PLANE, spaces.Box(-1, 1, (2, 3))], ids=str)
@pytest.mark.parametrize("policy", ["MlpPolicy", LayerNormMlpPolicy])
@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_a_rollout_has_the_noise_of_its_exponent(algorithm, policy, action_space):
    """And the probabilities that it says it has."""
    settings = SMALL | {"n_steps": 64, "learning_rate": 0.0}
    correlations = []
    for exponent in (0.0, 1.0):
        env = make_vec_env(lambda: RandomEnv(spaces.Box(-1, 1, (3,)), action_space), n_envs=16, seed=0)
        model = algorithm(policy, env, noise_exponent=exponent, **settings).learn(16 * 64)
        noise = rollout_noise(model)
        assert noise.std() == pytest.approx(1.0, abs=0.1)
        correlations.append(correlation_of_neighbours(noise))
        # Between rollouts, noise is white
        assert getattr(model.policy.action_dist, "noise", None) is None
    assert correlations[0] == pytest.approx(0.0, abs=0.1)
    assert correlations[1] > 0.5


class Exponents(BaseCallback):
    """Those that are logged, one for each rollout. Asks the policy for actions of its own at every step."""

    def _on_training_start(self) -> None:
        self.exponents: list[float] = []

    def _on_rollout_end(self) -> None:
        self.exponents.append(self.logger.name_to_value["rollout/noise_exponent"])

    def _on_step(self) -> bool:
        with th.no_grad():
            self.model.policy(self.locals["obs_tensor"])
        return True


def test_exponent_follows_its_schedule():
    """At the progress before each rollout; the noise is that of the exponent that is logged."""
    exponent, callback = LinearSchedule(2.0, 0.0, 1.0), Exponents()
    env = make_vec_env(lambda: RandomEnv(spaces.Box(-1, 1, (3,)), PLANE), n_envs=16, seed=0)
    settings = SMALL | {"n_steps": 64, "learning_rate": 0.0}
    model = R2VPO("MlpPolicy", env, noise_exponent=exponent, **settings).learn(2 * 16 * 64, callback=callback)
    assert callback.exponents == [2.0, 1.0]
    assert 0.5 < correlation_of_neighbours(rollout_noise(model)) < 0.8


def test_unexplained_variance_by_hand():
    """Sums of 2 and 1, of 0 and 4; TD errors add up to 0.5 and 0, to 0.5 and 1."""
    rewards = np.array([[1.5, -2.0], [1.0, 4.0]])
    td_errors = np.array([[0.5, 0.0], [0.0, 1.0]])
    dones = np.zeros((2, 2))
    share = np.var([0.5, 0.0, 0.5, 1.0]) / np.var([2.0, 1.0, 0.0, 4.0])
    assert unexplained_variance(rewards, td_errors, dones, gamma=0.5) == pytest.approx(share)
    # An episode ends after its first step: nothing that follows counts
    dones[0, 1] = 1.0
    share = np.var([0.5, 0.0, 0.0, 1.0]) / np.var([2.0, 1.0, -2.0, 4.0])
    assert unexplained_variance(rewards, td_errors, dones, gamma=0.5) == pytest.approx(share)


@given(
    rewards=arrays(np.float32, (6, 3), elements=st.floats(-4, 4, width=16)),
    values=arrays(np.float32, (7, 3), elements=st.floats(-4, 4, width=16)),
    dones=arrays(np.float32, (6, 3), elements=st.sampled_from([0.0, 1.0])),
)
def test_unexplained_variance_is_of_sums_of_rewards(rewards, values, dones):
    """What a critic says of the rewards is its value less that of where the sum ends; the ends of episodes have none."""
    gamma = 0.9
    sums, foreseen = np.zeros((6, 3)), np.zeros((6, 3))
    for env, first in np.ndindex(3, 6):
        step, discount = first, 1.0
        while True:
            sums[first, env] += discount * rewards[step, env]
            discount *= gamma
            step += 1
            if dones[step - 1, env] or step == 6:
                break
        foreseen[first, env] = values[first, env] - (1 - dones[step - 1, env]) * discount * values[step, env]
    td_errors = rewards + gamma * (1 - dones) * values[1:] - values[:-1]
    share = unexplained_variance(rewards, td_errors, dones, gamma)
    total, unexplained = np.var(sums), np.var(sums - foreseen)
    assert 0 <= share <= 1
    if total > 1e-6:
        assert share == pytest.approx(min(1.0, unexplained / total), abs=1e-3)


def test_variance_that_is_not_there_is_unexplained():
    nothing = np.zeros((4, 2), dtype=np.float32)
    assert unexplained_variance(nothing, nothing, nothing, 0.99) == 1.0
    rewards = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    assert unexplained_variance(rewards, rewards, nothing, 0.99) == 1.0
    assert unexplained_variance(rewards, nothing, nothing, 0.99) == 0.0


class Shares(Exponents):
    """Of the variance of each rollout, what its values leave unexplained, by GAE with a lambda of 1."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.shares: list[float] = []

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        rollout = copy.deepcopy(self.model.rollout_buffer)
        rollout.gae_lambda = 1.0
        with th.no_grad():
            last_values = self.model.policy.predict_values(th.as_tensor(self.locals["new_obs"]))
            timeouts = self.model._timeouts
            bootstraps = self.model.policy.predict_values(th.as_tensor(np.stack(timeouts.observations))).flatten()
        rollout.compute_returns_and_advantage(last_values, self.locals["dones"])
        errors = rollout.advantages.copy()
        rollout.rewards[timeouts.steps, timeouts.envs] -= self.model.gamma * bootstraps.numpy()
        rollout.values[:] = 0.0
        rollout.compute_returns_and_advantage(th.zeros(self.model.n_envs), self.locals["dones"])
        self.shares.append(min(1.0, errors.var() / rollout.advantages.var()))


@pytest.mark.parametrize("critic_kwargs", [None, {"n_rollouts": 2}])
@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_auto_exponent_is_of_what_the_critic_has_not_foreseen(algorithm, critic_kwargs):
    """Pink before the first rollout; afterwards of the last one's rewards, by the values that were collected with them."""
    env, callback = make_vec_env(lambda: RandomEnv(VECTOR, PLANE), n_envs=4, seed=0), Shares()
    settings = SMALL | {"learning_rate": 1e-3, "critic_kwargs": critic_kwargs, "noise_exponent": "auto"}
    algorithm("MlpPolicy", env, **settings).learn(4 * 4 * 32, callback=callback)
    assert len(callback.model._timeouts) > 0
    assert callback.exponents[0] == 1.0
    assert callback.exponents[1:] == pytest.approx([auto_exponent(share) for share in callback.shares[:-1]], rel=1e-4)


class Foreseen(gym.Env):
    """The observation is the reward of this step; episodes of one step."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), PLANE

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, self.scale * float(self.obs[0]), True, False, {}


def test_noise_is_pink_without_rewards_and_becomes_white_as_the_critic_learns():
    exponents = []
    for scale in (0.0, 1.0):
        env, callback = make_vec_env(lambda scale=scale: Foreseen(scale), n_envs=4, seed=0), Exponents()
        settings = SMALL | {"learning_rate": 3e-3, "n_epochs": 10, "noise_exponent": "auto"}
        R2VPO("MlpPolicy", env, **settings).learn(10 * 4 * 32, callback=callback)
        exponents.append(callback.exponents)
    assert exponents[0] == [1.0] * 10
    assert exponents[1][0] == 1.0
    assert exponents[1][-1] < 0.05


def test_auto_exponent_goes_on_in_a_loaded_model(tmp_path):
    env = make_vec_env(lambda: Foreseen(1.0), n_envs=4, seed=0)
    model = R2VPO("MlpPolicy", env, noise_exponent="auto", **SMALL | {"learning_rate": 3e-3}).learn(4 * 4 * 32)
    model.save(tmp_path / "model")
    callback = Exponents()
    R2VPO.load(tmp_path / "model", env=env).learn(4 * 32, callback=callback)
    assert callback.exponents == [auto_exponent(model._unexplained_variance)]
    assert callback.exponents[0] < 1.0


class Predictions(BaseCallback):
    """Actions of the policy outside the collection, from the same random numbers at every step."""

    def _on_training_start(self) -> None:
        self.predictions = []

    def _on_step(self) -> bool:
        self.predictions.append(predict(self.model))
        return True


def predict(model) -> list[np.ndarray]:
    """With another number of environments, with the same, and by other ways to act."""
    results = []
    for n_envs in (7, 2):
        obs = np.zeros((n_envs, 3), dtype=np.float32)
        with th.random.fork_rng():
            th.manual_seed(5)
            results.append(model.predict(obs, deterministic=False)[0])
            with th.no_grad():
                results += [model.policy(th.as_tensor(obs))[0].numpy(), model.policy(th.as_tensor(obs), True)[0].numpy()]
            results.append(model.policy(th.as_tensor(obs))[0].detach().numpy())
    return results


@pytest.mark.parametrize("policy", ["MlpPolicy", LayerNormMlpPolicy])
def test_other_calls_than_the_collections_have_white_noise(policy):
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model, callback = R2VPO(policy, env, noise_exponent=1.0, **SMALL | {"learning_rate": 0.0}), Predictions()
    expected = predict(model)
    model.learn(64, callback=callback)
    assert len(callback.predictions) == 32
    for actions in (*callback.predictions, predict(model)):
        assert all(np.array_equal(a, b) for a, b in zip(actions, expected, strict=True))


class AsksBeforehand(BaseCallback):
    """Asks the policy for actions before the first step of each rollout, with as many environments."""

    def _on_rollout_start(self) -> None:
        predict(self.model)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("policy", ["MlpPolicy", LayerNormMlpPolicy])
def test_noise_of_the_first_step_is_the_collections(policy):
    rollouts = []
    for callback in (None, AsksBeforehand()):
        env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
        model = R2VPO(policy, env, noise_exponent=1.0, **SMALL | {"learning_rate": 0.0}).learn(64, callback=callback)
        rollouts.append(rollout_noise(model))
    np.testing.assert_array_equal(*rollouts)


class Stop(Exception):
    pass


class CopiesAndStops(BaseCallback):
    def _on_step(self) -> bool:
        assert self.model.policy.action_dist.noise is not None
        self.copies = copy.deepcopy(self.model.policy), pickle.loads(pickle.dumps(self.model.policy))
        raise Stop


@pytest.mark.parametrize("policy", ["MlpPolicy", LayerNormMlpPolicy])
def test_noise_is_correlated_no_longer_than_the_collection_lasts(policy):
    """Nor in copies of the policy, such as a callback may make; they act with their own weights."""
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model, callback = R2VPO(policy, env, noise_exponent=1.0, **SMALL), CopiesAndStops()
    with pytest.raises(Stop):
        model.learn(64, callback=callback)
    assert isinstance(model.policy.action_dist, CorrelatedGaussianDistribution)
    assert model.policy.action_dist.noise is None
    expected = predict(model)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.zero_()
    for model.policy in callback.copies:
        assert getattr(model.policy.action_dist, "noise", None) is None
        assert all(np.array_equal(a, b) for a, b in zip(predict(model), expected, strict=True))


@pytest.mark.parametrize("policy", ["MlpPolicy", LayerNormMlpPolicy])
def test_policy_with_correlated_noise_is_trained_as_ever(policy):
    """The distribution that gives it has the same log-probabilities and entropies, with the same gradients."""
    env = RandomEnv(VECTOR, PLANE)
    model = R2VPO(policy, env, noise_exponent=1.0, **SMALL | {"learning_rate": 0.0}).learn(32)
    white = R2VPO(policy, env, **SMALL)
    samples = model.rollout_buffer._get_samples(slice(None))
    results = []
    for trained in (model, white):
        trained.policy.zero_grad()
        values, log_prob, entropy = trained.policy.evaluate_actions(samples.observations, samples.actions)
        (values.mean() + log_prob.mean() + entropy.mean()).backward()
        results.append([values, log_prob, entropy, *(parameter.grad for parameter in trained.policy.parameters())])
    for a, b in zip(*results, strict=True):
        assert th.equal(a, b)


def test_evaluation_beside_the_collection_and_a_loaded_model(tmp_path):
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model = R2VPO("MlpPolicy", env, noise_exponent=1.0, **SMALL)
    evaluation = EvalCallback(
        make_vec_env("Pendulum-v1", n_envs=1, seed=1), eval_freq=10, n_eval_episodes=1, deterministic=False
    )
    model.learn(64, callback=evaluation)
    assert math.isfinite(evaluation.last_mean_reward)
    model.save(tmp_path / "model")
    loaded = R2VPO.load(tmp_path / "model", env=env)
    assert loaded.noise_exponent == 1.0
    callback = Exponents()
    loaded.learn(64, callback=callback)
    assert callback.exponents == [1.0]


class Still(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        return super().forward(obs, True)


@pytest.mark.parametrize(
    ("policy", "env_id", "settings", "message"),
    [
        (
            "MlpPolicy",
            "Pendulum-v1",
            {"noise_exponent": -0.5},
            "`noise_exponent` is -0.5; it must be a finite number",
        ),
        ("MlpPolicy", "Pendulum-v1", {"noise_exponent": math.nan}, "`noise_exponent` is nan"),
        ("MlpPolicy", "Pendulum-v1", {"noise_exponent": "pink"}, "`noise_exponent` is 'pink'; .* or 'auto'"),
        ("MlpPolicy", "CartPole-v1", {"noise_exponent": "auto"}, "with continuous actions"),
        ("MlpPolicy", "CartPole-v1", {"noise_exponent": 1.0}, "with continuous actions"),
        ("MlpPolicy", "CartPole-v1", {"noise_exponent": LinearSchedule(1.0, 0.0, 1.0)}, "with continuous actions"),
        ("MlpPolicy", "Pendulum-v1", {"noise_exponent": 1.0, "use_sde": True}, "without `use_sde`"),
        (CensoredMlpPolicy, "Pendulum-v1", {"noise_exponent": 1.0}, "is for Gaussian policies that act as SB3's"),
        (Still, "Pendulum-v1", {"noise_exponent": 1.0}, "without a `forward`"),
    ],
)
@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_bad_settings(algorithm, policy, env_id, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm(policy, env_id, **settings)
