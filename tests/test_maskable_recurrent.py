"""R2VPO with memory and invalid action masking: masks that stay with their steps, and a task that takes both."""

import copy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import VECTOR, RandomEnv, logged, weights
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from test_maskable import NumberedEnv, numbers

from sb3_r2vpo.maskable import MaskableR2VPO
from sb3_r2vpo.recurrent import MaskableMlpLstmPolicy, MaskableRecurrentR2VPO, MlpLstmPolicy, RecurrentR2VPO

SMALL = {"n_steps": 32, "batch_size": 24, "n_epochs": 2, "seed": 0, "device": "cpu"}
NETWORK = {"lstm_hidden_size": 8, "net_arch": [8]}
DISCRETE, BINARY = spaces.Discrete(5), spaces.MultiBinary(3)
MULTI = spaces.MultiDiscrete([3, 4])
IMAGE, DICT = spaces.Box(0, 255, (3, 36, 36), np.uint8), spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
CASES = [
    ("MlpLstmPolicy", VECTOR, DISCRETE, {}),
    ("MlpLstmPolicy", VECTOR, MULTI, {"enable_critic_lstm": False}),
    ("MlpLstmPolicy", VECTOR, BINARY, {"enable_critic_lstm": False, "shared_lstm": True}),
    ("CnnLstmPolicy", IMAGE, DISCRETE, {"share_features_extractor": False}),
    ("MultiInputLstmPolicy", DICT, BINARY, {"n_lstm_layers": 2}),
]


def n_choices(space) -> list[int]:
    """Of each part of an action."""
    if isinstance(space, spaces.Discrete):
        return [space.n]
    return [*space.nvec] if isinstance(space, spaces.MultiDiscrete) else [2] * space.n


def is_valid(action, masks, space) -> bool:
    """Whether each part of an action is one that its masks allow."""
    parts = np.split(np.asarray(masks).ravel(), np.cumsum(n_choices(space))[:-1])
    return all(mask[int(part)] for part, mask in zip(np.asarray(action).ravel(), parts, strict=True))


class MaskedEnv(RandomEnv):
    """One action of each part is always valid, others at random; episodes of 1 to 20 steps. Invalid actions are an error."""

    def _draw(self):
        masks = [self.np_random.random(size) < 0.3 for size in n_choices(self.action_space)]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = True
        self.masks = np.concatenate(masks)

    def action_masks(self) -> np.ndarray:
        return self.masks

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self._draw()
        return result

    def step(self, action):
        assert is_valid(action, self.masks, self.action_space)
        obs, reward, *_ = super().step(action)
        self._draw()
        terminated, truncated = self.np_random.random(2) < 0.05
        return obs, reward, bool(terminated), bool(truncated), {}


def make(policy="MlpLstmPolicy", observation_space=VECTOR, action_space=DISCRETE, cls=MaskableRecurrentR2VPO, **kwargs):
    env = make_vec_env(lambda: MaskedEnv(observation_space, action_space), n_envs=3, seed=0)
    return cls(policy, env, **{**SMALL, "policy_kwargs": NETWORK, **kwargs})


def collect(model):
    """The second rollout begins within episodes"""
    callback = model._setup_learn(10**6)[1]
    for _ in range(2):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model._finished_rollouts()
    return model


@pytest.mark.parametrize("sequence_length", [None, 5])
@pytest.mark.parametrize(("policy", "observation_space", "action_space", "network"), CASES)
def test_recomputed_log_probabilities_and_values_are_those_of_collection(
    policy, observation_space, action_space, network, sequence_length
):
    kwargs = {"policy_kwargs": NETWORK | network, "rollout_buffer_kwargs": {"sequence_length": sequence_length}}
    model = collect(make(policy, observation_space, action_space, **kwargs))
    n_steps, differ = 0, False
    for batch in model.rollout_buffer.get(40):
        values, log_prob, *_ = model.evaluate_actions(batch)
        th.testing.assert_close(log_prob, batch.old_log_prob, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(values.flatten(), batch.old_values, rtol=1e-4, atol=1e-5)
        for action, masks in zip(batch.actions, batch.action_masks, strict=True):
            assert is_valid(action, masks, action_space)
        n_steps += len(log_prob)
        others = batch._replace(action_masks=batch.action_masks.roll(1, 0))
        differ |= bool((model.evaluate_actions(others).log_prob < -100).any())
    assert n_steps == 96
    # Had they been those of other steps, it would show
    assert differ
    model.train()
    assert np.isfinite(logged(model)["train/loss"])
    assert 0 < logged(model)["train/ratio_variance"] < 0.1


class CallsThePolicy(BaseCallback):
    """With the environment's masks and with others, between a step and its storage."""

    def _on_step(self) -> bool:
        obs, only_last = self.locals["new_obs"], np.arange(self.model.action_space.n) == self.model.action_space.n - 1
        policy = self.model.policy
        with th.no_grad():
            policy(policy.obs_to_tensor(obs)[0], self.locals["lstm_states"], th.zeros(2))
        actions, _ = self.model.predict(obs, action_masks=np.stack([only_last] * 2))
        assert (actions == len(only_last) - 1).all()
        return True


@pytest.mark.parametrize("callback", [None, CallsThePolicy()])
@pytest.mark.parametrize("as_dict", [False, True])
def test_masks_stay_with_their_observations(as_dict, callback):
    firsts = iter([0, 512])
    env = make_vec_env(lambda: NumberedEnv(next(firsts), as_dict), n_envs=2)
    model = MaskableRecurrentR2VPO("MultiInputLstmPolicy" if as_dict else "MlpLstmPolicy", env, **SMALL)
    callback = model._setup_learn(10**6, callback)[1]
    for first in (0, 32):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 32)
        model._finished_rollouts()
        batches = [*model.rollout_buffer.get(24)]
        for batch in batches:
            th.testing.assert_close(model.evaluate_actions(batch).log_prob, batch.old_log_prob, rtol=1e-4, atol=1e-5)
        seen = th.cat([*map(numbers, batches)])
        expected = th.arange(first, first + 32)
        assert th.equal(seen.sort()[0].long(), th.cat([expected, expected + 512]))


@pytest.mark.parametrize(("policy", "observation_space", "action_space", "network"), CASES[:3])
def test_predicted_actions_are_valid(policy, observation_space, action_space, network):
    model = make(policy, observation_space, action_space, policy_kwargs=NETWORK | network)
    env = model.env
    obs, state, starts = env.reset(), None, np.ones(3)
    for step in range(50):
        masks = get_action_masks(env)
        actions, state = model.predict(obs, state, starts, deterministic=step % 2 == 0, action_masks=masks)
        # The environment refuses others
        obs, _, starts, _ = env.step(actions)
    # Of one environment, without a batch dimension
    single = MaskedEnv(observation_space, action_space)
    obs, _ = single.reset(seed=0)
    assert is_valid(model.predict(obs, action_masks=single.action_masks())[0], single.masks, action_space)
    # Masks are gone after the call: without any, all actions can come
    assert model.policy._action_masks is None
    taken = {tuple(np.ravel(model.predict(obs)[0])) for _ in range(200)}
    assert not all(is_valid(action, single.masks, action_space) for action in taken)


class AllValid(RandomEnv):
    def action_masks(self) -> np.ndarray:
        return np.ones(self.action_space.n, bool)


def test_where_all_actions_are_valid_it_learns_as_without_masks():
    results = []
    for cls in (MaskableRecurrentR2VPO, RecurrentR2VPO):
        env = make_vec_env(lambda: AllValid(VECTOR, DISCRETE), n_envs=3, seed=0)
        model = cls("MlpLstmPolicy", env, policy_kwargs=NETWORK, **SMALL)
        results.append((weights(model), weights(model.learn(200))))
    assert th.equal(results[0][0], results[1][0])
    th.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def test_the_state_goes_on_under_masks():
    model = make()
    obs, masks = model.env.reset(), np.ones((3, 5), bool)
    expected = RecurrentR2VPO.predict(model, obs, None, np.ones(3), deterministic=True)
    ours = model.predict(obs, None, np.ones(3), deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(ours[0], expected[0])
    for part, other in zip(ours[1], expected[1], strict=True):
        np.testing.assert_array_equal(part, other)
    assert np.abs(ours[1][0]).max() > 0


class CueMasks(gym.Env):
    """
    Shows one of two cues at the first step only. In each of 8 states, which are shown, two of 64 actions are valid: one for
    each cue. The last action is rewarded if it is that of the cue; an invalid one ends the episode without reward.

    With masks, but without memory: 0.5. Without masks, each state's actions would have to be found among 64, several times
    in a row: at random, nothing.
    """

    N_STATES, N_ACTIONS = 8, 64
    observation_space = spaces.Box(-1, 1, (N_STATES + 2,), np.float32)
    action_space = spaces.Discrete(N_ACTIONS)
    pairs = np.random.default_rng(0).permutation(N_ACTIONS)[: 2 * N_STATES].reshape(N_STATES, 2)

    def _observe(self, cue=0):
        self.state = int(self.np_random.integers(self.N_STATES))
        return np.array([cue, self.left == 1, *(np.arange(self.N_STATES) == self.state)], np.float32)

    def action_masks(self) -> np.ndarray:
        return np.isin(np.arange(self.N_ACTIONS), self.pairs[self.state])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = int(self.np_random.integers(2)), int(self.np_random.integers(3, 7))
        return self._observe(2 * self.cue - 1), {}

    def step(self, action):
        self.left -= 1
        reward = float(self.left == 0 and action == self.pairs[self.state][self.cue])
        ends = self.left == 0 or action not in self.pairs[self.state]
        return self._observe(), reward, ends, False, {}


def train(cls, n_steps=12_000) -> float:
    env = make_vec_env(CueMasks, n_envs=8, seed=0)
    network = {"net_arch": [16]} if cls is MaskableR2VPO else {"net_arch": [], "lstm_hidden_size": 16}
    policy = "MlpPolicy" if cls is MaskableR2VPO else "MlpLstmPolicy"
    model = cls(policy, env, 1e-2, 32, 128, 5, seed=0, device="cpu", policy_kwargs=network)
    model.learn(n_steps)
    with_masks = {} if cls is RecurrentR2VPO else {"action_masks": lambda: get_action_masks(env)}

    def predict(obs, **kwargs):
        return model.predict(obs, **kwargs, **{name: ask() for name, ask in with_masks.items()})

    return evaluate_policy(SimpleNamespace(predict=predict), env, n_eval_episodes=100, deterministic=True)[0]


def test_learns_what_takes_both_masks_and_memory():
    assert train(MaskableRecurrentR2VPO) > 0.95


def test_without_memory_the_cue_is_lost():
    assert train(MaskableR2VPO) < 0.7


def test_without_masks_the_valid_actions_are_not_found():
    assert train(RecurrentR2VPO) < 0.2


@pytest.mark.parametrize("action_space", [DISCRETE, BINARY])
def test_saved_loaded_and_copied(tmp_path, action_space):
    model = make(action_space=action_space).learn(200)
    assert not model.policy._forward_pre_hooks
    model.save(tmp_path / "model")
    obs, masks = model.env.reset(), get_action_masks(model.env)
    expected, state = model.predict(obs, deterministic=True, action_masks=masks)
    loaded = MaskableRecurrentR2VPO.load(tmp_path / "model", env=copy.deepcopy(model.env), device="cpu")
    assert loaded.policy_class is MaskableMlpLstmPolicy
    for other in (loaded, copy.deepcopy(model)):
        assert th.equal(weights(other), weights(model))
        actions, other_state = other.predict(obs, deterministic=True, action_masks=masks)
        np.testing.assert_array_equal(actions, expected)
        np.testing.assert_array_equal(other_state[0], state[0])
        other.learn(96, reset_num_timesteps=False)
        assert not th.equal(weights(other), weights(model))


def test_same_seed_same_weights():
    first, second = (make(action_space=MULTI).learn(200) for _ in range(2))
    assert th.equal(weights(first), weights(second))


def test_an_environment_without_masks_is_refused():
    env = make_vec_env(lambda: RandomEnv(VECTOR, DISCRETE))
    with pytest.raises(ValueError, match="does not support action masking"):
        MaskableRecurrentR2VPO("MlpLstmPolicy", env, policy_kwargs=NETWORK, **SMALL).learn(32)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"policy": MlpLstmPolicy}, ValueError, "no masks"),
        ({"policy": "MlpPolicy"}, ValueError, "MlpPolicy"),
        ({"action_space": spaces.Box(-1, 1, (2,), np.float32)}, NotImplementedError, "Discrete"),
        ({"use_sde": True}, ValueError, "continuous actions"),
        ({"compile": True}, ValueError, "compile"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)
