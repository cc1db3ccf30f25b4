"""R2VPO with invalid action masking: sb3-contrib's MaskablePPO bit for bit, and masks that stay with their observations."""

import copy
import io

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, logged, weights
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_r2vpo.maskable import MaskableR2VPO, MaskableR2VPOOff

ALGORITHMS = [MaskableR2VPO, MaskableR2VPOOff]
SPACES = {
    "discrete": (VECTOR, spaces.Discrete(5)),
    "multidiscrete": (VECTOR, spaces.MultiDiscrete([3, 4])),
    "multibinary": (VECTOR, spaces.MultiBinary(3)),
    "dict": (spaces.Dict({"x": VECTOR, "y": spaces.Discrete(3)}), spaces.Discrete(4)),
    "dict, multidiscrete": (spaces.Dict({"x": VECTOR}), spaces.MultiDiscrete([2, 2])),
}


class RandomMaskEnv(RandomEnv):
    """Random masks besides; the first action of each dimension is always valid."""

    def action_masks(self) -> np.ndarray:
        space = self.action_space
        sizes = {spaces.Discrete: lambda: [space.n], spaces.MultiDiscrete: lambda: space.nvec}
        sizes = sizes.get(type(space), lambda: [2] * space.n)()
        masks = [self.np_random.random(size) < 0.5 for size in sizes]
        for mask in masks:
            mask[0] = True
        return np.concatenate(masks)


@pytest.mark.parametrize("use_masking", [True, False])
@pytest.mark.parametrize("name", SPACES)
def test_ppo_clip_is_maskable_ppo_bit_for_bit(name, use_masking):
    policy = "MultiInputPolicy" if name.startswith("dict") else "MlpPolicy"
    results = []
    for algorithm, kwargs in [(MaskablePPO, {}), (MaskableR2VPO, {"objective": "ppo_clip"})]:
        env = make_vec_env(lambda: RandomMaskEnv(*SPACES[name]), n_envs=2)
        model = algorithm(policy, env, ent_coef=0.01, clip_range_vf=0.3, **SMALL, **kwargs)
        model.learn(3 * 64, use_masking=use_masking)
        results.append((weights(model), model.policy.optimizer.state_dict()["state"][0]["exp_avg"], model.num_timesteps))
    assert th.equal(results[0][0], results[1][0])
    assert th.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_off_with_one_rollout_is_on_policy_bit_for_bit():
    models = [
        algorithm("MlpPolicy", RandomMaskEnv(*SPACES["multidiscrete"]), **SMALL, **kwargs).learn(128)
        for algorithm, kwargs in [(MaskableR2VPO, {}), (MaskableR2VPOOff, {"replay_capacity": 1, "utd_ratio": 1.0})]
    ]
    assert th.equal(*map(weights, models))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"env": IdentityEnvBox()}, AssertionError, "The algorithm only supports"),
        ({"policy": ActorCriticPolicy}, ValueError, "must subclass MaskableActorCriticPolicy"),
        ({"use_sde": True}, ValueError, "continuous actions"),
        ({"noise_exponent": 0.5}, ValueError, "continuous actions"),
        ({"compile": True}, ValueError, "compile=False"),
    ],
)
def test_what_does_not_go_with_masks_is_refused(algorithm, kwargs, error, message):
    arguments = {"policy": "MlpPolicy", "env": RandomMaskEnv(*SPACES["discrete"]), **SMALL, **kwargs}
    with pytest.raises(error, match=message):
        algorithm(**arguments)


def test_an_environment_without_masks_is_refused_unless_masking_is_off():
    model = MaskableR2VPOOff("MlpPolicy", IdentityEnv(dim=2), **SMALL)
    with pytest.raises(ValueError, match="does not support action masking"):
        model.learn(64)
    model.learn(64, use_masking=False)
    evaluate_policy(model, IdentityEnv(dim=2), n_eval_episodes=1, warn=False, use_masking=False)


class BufferWithItsOwnOrder(MaskableRolloutBuffer):
    def get(self, batch_size=None):
        yield from sorted(super().get(batch_size), key=lambda samples: samples.returns.mean().item())


def test_rollout_buffers_of_the_users_own():
    env = RandomMaskEnv(*SPACES["discrete"])
    MaskableR2VPOOff("MlpPolicy", env, rollout_buffer_class=MaskableRolloutBuffer, **SMALL).learn(64)
    MaskableR2VPO("MlpPolicy", env, rollout_buffer_class=BufferWithItsOwnOrder, **SMALL).learn(64)
    with pytest.raises(ValueError, match="has a `get` of its own"):
        MaskableR2VPOOff("MlpPolicy", env, rollout_buffer_class=BufferWithItsOwnOrder, **SMALL)


N_BITS = 10


class NumberedEnv(gym.Env):
    """Each step has its own number, which is its observation and, in binary, its mask; the last action is always valid."""

    action_space = spaces.Discrete(N_BITS + 1)

    def __init__(self, first: int, as_dict: bool) -> None:
        self.number, self.as_dict = first, as_dict
        box = spaces.Box(0, 2**N_BITS, (1,))
        self.observation_space = spaces.Dict({"number": box}) if as_dict else box

    def _observation(self):
        observation = np.array([self.number], dtype=np.float32)
        return {"number": observation} if self.as_dict else observation

    def action_masks(self) -> np.ndarray:
        return np.array([self.number >> bit & 1 for bit in range(N_BITS)] + [1], dtype=bool)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        self.number += 1
        ends = self.number % 7 == 0
        return self._observation(), float(action), ends and self.number % 2 == 0, ends, {}


def numbers(samples) -> th.Tensor:
    """The steps' numbers, of which observations and masks have to be the same."""
    observations = samples.observations["number"] if isinstance(samples.observations, dict) else samples.observations
    decoded = (samples.action_masks[:, :N_BITS] * 2.0 ** th.arange(N_BITS)).sum(dim=1)
    assert th.equal(observations.flatten(), decoded)
    # An action that its mask rules out was never taken
    assert samples.action_masks.gather(1, samples.actions.long()).all()
    return decoded


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("critic_kwargs", [None, {"recompute_advantages": True}, {"n_rollouts": 3, "n_epochs": 2}])
def test_masks_stay_with_their_observations_through_replay(critic_kwargs, as_dict):
    """Three rollouts of two environments: in every pass, training or not, and in the log-probabilities."""
    env = make_vec_env(lambda: NumberedEnv(0, as_dict), n_envs=2)
    env.envs[1].unwrapped.number = 512
    model = MaskableR2VPOOff(
        "MultiInputPolicy" if as_dict else "MlpPolicy",
        env,
        replay_capacity=3,
        # No weight changes, so that the log-probabilities of replayed steps do not
        learning_rate=0.0,
        critic_kwargs=critic_kwargs,
        **SMALL,
    )
    seen, evaluate_actions = [], model.evaluate_actions

    def watched(samples, with_values=True):
        evaluation = evaluate_actions(samples, with_values)
        th.testing.assert_close(evaluation.log_prob, samples.old_log_prob)
        seen.append((numbers(samples), th.is_grad_enabled()))
        return evaluation

    model.evaluate_actions = watched
    for iteration in range(5):
        seen.clear()
        model.learn(64, reset_num_timesteps=iteration == 0)
        end = 32 * (iteration + 1)
        kept = th.arange(max(0, end - 96), end)
        expected = th.cat([kept, kept + 512])
        assert len(model.replay_buffer) == min(3, iteration + 1)
        assert th.equal(th.cat([numbers(rollout.samples) for rollout in model.replay_buffer.rollouts]).sort()[0], expected)
        # `utd_ratio * n_epochs` is 4: with three rollouts, each step is trained on at least once
        trained = th.cat([drawn for drawn, with_grad in seen if with_grad])
        assert th.equal(trained.unique(), expected)
        renewed = [drawn for drawn, with_grad in seen if not with_grad]
        assert len(th.cat([th.zeros(0), *renewed])) == 64 * (len(model.replay_buffer) - 1)


class ManyActionsEnv(gym.Env):
    """
    Two of 512 actions are valid at each step: the right one of the state, and a random one. The right one is rewarded, and an
    invalid one ends the episode of 20 steps. At random, with masks, half of the steps are rewarded; without, one of 512.
    """

    N_STATES, N_ACTIONS, N_STEPS = 64, 512, 20

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Discrete(self.N_STATES), spaces.Discrete(self.N_ACTIONS)
        self.right = np.random.default_rng(0).permutation(self.N_ACTIONS)[: self.N_STATES]

    def _draw(self) -> int:
        self.state = int(self.np_random.integers(self.N_STATES))
        self.valid = {int(self.right[self.state]), int(self.np_random.integers(self.N_ACTIONS))}
        return self.state

    def action_masks(self) -> np.ndarray:
        return np.isin(np.arange(self.N_ACTIONS), [*self.valid])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._draw(), {}

    def step(self, action):
        self.steps += 1
        reward, valid = float(action == self.right[self.state]), int(action) in self.valid
        return self._draw(), reward, not valid or self.steps == self.N_STEPS, False, {}


def shuffle_masks(model) -> None:
    """What must not happen, to see that the test would notice."""
    evaluate_actions = model.evaluate_actions

    def shuffled(samples, with_values=True):
        masks = samples.action_masks
        return evaluate_actions(samples._replace(action_masks=masks[th.randperm(len(masks))]), with_values)

    model.evaluate_actions = shuffled


def learn_and_evaluate(algorithm, n_steps=512, use_masking=True, shuffled=False) -> tuple[float, float]:
    """The mean reward of an episode, at most 20, and the ratio variance of the last update."""
    env = Monitor(ManyActionsEnv())
    settings = {"n_steps": 256, "n_epochs": 5, "learning_rate": 1e-3, "gamma": 0.5, "seed": 0, "device": "cpu"}
    model = algorithm("MlpPolicy", env, **settings)
    if shuffled:
        shuffle_masks(model)
    model.learn(n_steps, use_masking=use_masking)
    reward, _ = evaluate_policy(model, env, n_eval_episodes=20, use_masking=use_masking)
    return reward, logged(model).get("train/ratio_variance", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_with_masks_what_it_does_not_learn_without(algorithm):
    reward, ratio_variance = learn_and_evaluate(algorithm)
    assert reward > 19
    assert ratio_variance < 0.3
    assert learn_and_evaluate(algorithm, n_steps=0)[0] < 14
    # Four times the steps
    assert learn_and_evaluate(algorithm, n_steps=2048, use_masking=False)[0] < 2


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_that_learning_would_fail_with_the_masks_of_other_steps(algorithm):
    """Under another step's mask nearly all actions are impossible: ratios of zero, which teach nothing."""
    reward, ratio_variance = learn_and_evaluate(algorithm, shuffled=True)
    assert reward < 18
    assert ratio_variance > 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["multibinary", "dict"])
def test_save_load_and_deepcopy(tmp_path, algorithm, name):
    policy = "MultiInputPolicy" if name.startswith("dict") else "MlpPolicy"
    env = RandomMaskEnv(*SPACES[name])
    model = algorithm(policy, env, **SMALL).learn(96)
    obs = make_vec_env(lambda: env).reset()
    masks = env.action_masks()
    expected, _ = model.predict(obs, deterministic=True, action_masks=masks)
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", env=RandomMaskEnv(*SPACES[name]), device="cpu")
    assert loaded.policy_class is model.policy_class
    assert loaded.policy_loss.multiplier.state_dict() == model.policy_loss.multiplier.state_dict()
    for other in (loaded, copy.deepcopy(model)):
        assert th.equal(weights(other), weights(model))
        assert np.array_equal(other.predict(obs, deterministic=True, action_masks=masks)[0], expected)
        other.learn(64, reset_num_timesteps=False)
        assert not th.equal(weights(other), weights(model))


def test_the_replay_is_saved_with_its_masks():
    env = RandomMaskEnv(*SPACES["discrete"])
    model = MaskableR2VPOOff("MlpPolicy", env, replay_capacity=3, **SMALL).learn(96)
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    other = MaskableR2VPOOff("MlpPolicy", env, replay_capacity=2, **SMALL)
    other.load_replay_buffer(file)
    assert len(other.replay_buffer) == 2
    for ours, theirs in zip(other.replay_buffer.rollouts, model.replay_buffer.newest(2), strict=True):
        assert th.equal(ours.samples.action_masks, theirs.samples.action_masks)
        assert not ours.samples.action_masks.all()
    other.learn(64)
    assert {"train/ratio_variance_stale_1", "train/ratio_variance"} <= logged(other).keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_callback(tmp_path, algorithm):
    env = Monitor(ManyActionsEnv())
    callback = MaskableEvalCallback(env, eval_freq=32, n_eval_episodes=2, best_model_save_path=tmp_path, verbose=0)
    model = algorithm("MlpPolicy", Monitor(ManyActionsEnv()), **SMALL).learn(64, callback=callback)
    best = algorithm.load(tmp_path / "best_model.zip", device="cpu")
    # No invalid action has ended an episode
    lengths = evaluate_policy(best, env, n_eval_episodes=2, return_episode_rewards=True)[1]
    assert lengths == [ManyActionsEnv.N_STEPS] * 2
    assert callback.best_mean_reward > 0
    assert model.num_timesteps == 64


def test_masked_actions_are_never_predicted():
    env = ManyActionsEnv()
    model = MaskableR2VPO("MlpPolicy", env, **SMALL)
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        assert int(model.predict(obs, action_masks=env.action_masks())[0]) in env.valid
