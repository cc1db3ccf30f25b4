import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit
from helpers import VECTOR, RandomEnv, logged, weights
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_r2vpo import R2VPO
from sb3_r2vpo.recurrent import MlpLstmPolicy, RecurrentR2VPO, sequences
from sb3_r2vpo.recurrent.sequences import SequenceRolloutBuffer

SMALL = {"n_steps": 32, "batch_size": 24, "n_epochs": 2, "seed": 0, "device": "cpu"}
NETWORK = {"lstm_hidden_size": 8, "net_arch": [8]}
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
BOX, DISCRETE = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3)


class RandomLengths(RandomEnv):
    """Episodes of 1 to 20 steps, which end differently in each environment."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        terminated, truncated = self.np_random.random(2) < 0.05
        return obs, reward, bool(terminated), bool(truncated), {}


class Cue(gym.Env):
    """Shows one of two cues at the first step only; the last action is rewarded if it repeats it. Memoryless: 0.5."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = int(self.np_random.integers(2)), int(self.np_random.integers(3, 7))
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.left -= 1
        reward = float(self.left == 0 and action == self.cue)
        return np.array([0, self.left == 1], np.float32), reward, self.left == 0, False, {}


class FirstStep(gym.Env):
    """Shows nothing. The right action is 1 at the first step and 0 later; memory that is reset tells. Memoryless: -1."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.is_first, self.left = True, int(self.np_random.integers(2, 7))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = float(bool(action) == self.is_first) - 1
        self.is_first, self.left = False, self.left - 1
        return np.zeros(1, np.float32), reward, self.left == 0, False, {}


class CartPoleNoVelocity(CartPoleEnv):
    """CartPole without velocities; a policy without memory holds the pole for some 50 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-10, 10, (2,), np.float32)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs[[0, 2]], info

    def step(self, action):
        obs, *others = super().step(action)
        return obs[[0, 2]], *others


class OwnEvaluation(MlpLstmPolicy):
    def evaluate_actions(self, *args):
        raise NotImplementedError


def make(observation_space=VECTOR, action_space=BOX, policy="MlpLstmPolicy", cls=RecurrentR2VPO, **kwargs):
    env = make_vec_env(lambda: RandomLengths(observation_space, action_space), n_envs=3, seed=0)
    return cls(policy, env, **{**SMALL, "policy_kwargs": NETWORK, **kwargs})


def collect(model, n_rollouts=2):
    """The second rollout begins within episodes"""
    callback = model._setup_learn(10**6)[1]
    for _ in range(n_rollouts):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def _with_starts(parts):
    start = 0
    for part in parts:
        yield start, part
        start += part[0]


@pytest.mark.parametrize("part_cost", [0, 10**6])
@pytest.mark.parametrize("sequence_length", [None, 5, 1])
@pytest.mark.parametrize("batch_size", [None, 1, 7, 24, 1000])
def test_one_pass_has_each_step_once_in_sequences_that_no_episode_begins_in(
    monkeypatch, sequence_length, batch_size, part_cost
):
    monkeypatch.setattr(sequences, "PART_COST", part_cost)
    model = collect(make(rollout_buffer_kwargs={"sequence_length": sequence_length}))
    buffer = model.rollout_buffer
    starts = buffer.episode_starts.astype(bool)
    states = [th.stack([*step.pi, *step.vf]).numpy() for step in buffer._states]
    model._finished_rollouts()
    n_steps, n_envs = starts.shape
    # Numbers that say which step it is
    buffer.returns = np.arange(n_steps * n_envs, dtype=np.float32).reshape(-1, 1)
    seen = []
    for batch in buffer.get(batch_size):
        steps = batch.returns.long()
        seen += steps.tolist()
        padded, kept = (th.arange(len(steps)) if index is None else index for index in (batch.padded, batch.kept))
        assert th.equal(padded[kept], th.arange(len(steps)))
        # Which sequence a place of the calls belongs to, and its time
        times = [
            time for start, (n, n_seq) in _with_starts(batch.parts) for time in range(start, start + n) for _ in range(n_seq)
        ]
        owners = [owner for n, n_seq in batch.parts for _ in range(n) for owner in range(n_seq)]
        assert len(times) == len(padded)
        assert sum(n for n, _ in batch.parts) <= min(n for n in (n_steps, sequence_length, batch_size) if n)
        for index in range(batch.lstm_states.pi[0].shape[1]):
            places = [place for place in kept.tolist() if owners[place] == index]
            sequence = steps[padded[places]]
            assert [times[place] for place in places] == [*range(len(sequence))]
            assert (sequence.diff() == 1).all()
            env, step = divmod(int(sequence[0]), n_steps)
            assert int(sequence[-1]) // n_steps == env
            assert not starts[step + 1 : step + len(sequence), env].any()
            state = np.stack([part[:, index] for part in (*batch.lstm_states.pi, *batch.lstm_states.vf)])
            np.testing.assert_array_equal(state, 0 if starts[step, env] else states[step][:, :, env])
            whole = step == 0 or starts[step, env]
            assert whole or sequence_length or (batch_size or n_steps) < n_steps
    assert sorted(seen) == list(range(n_steps * n_envs))


def test_minibatches_are_of_about_the_batch_size_in_random_order():
    model = collect(make(n_steps=128, batch_size=64))
    model._finished_rollouts()
    passes = [[batch.returns for batch in model.rollout_buffer.get(64)] for _ in range(2)]
    for batches in passes:
        sizes = [len(batch) for batch in batches]
        assert sum(sizes) == 384
        assert len(sizes) == 6
        assert min(sizes) > 30
        assert max(sizes) < 100
    assert not all(len(a) == len(b) and th.equal(a, b) for a, b in zip(*passes, strict=True))


@pytest.mark.parametrize(("sequence_length", "part_cost"), [(None, 10**6), (5, 10**6), (None, 0)])
@pytest.mark.parametrize(
    ("policy", "observation_space", "action_space", "policy_kwargs"),
    [
        ("MlpLstmPolicy", VECTOR, BOX, {}),
        ("MlpLstmPolicy", VECTOR, spaces.Box(-1, 1, (2, 2), np.float32), {"n_lstm_layers": 2}),
        ("MlpLstmPolicy", spaces.Discrete(4), DISCRETE, {"enable_critic_lstm": False}),
        ("MlpLstmPolicy", VECTOR, spaces.MultiDiscrete([2, 3]), {"enable_critic_lstm": False, "shared_lstm": True}),
        ("MlpLstmPolicy", VECTOR, spaces.MultiBinary(3), {}),
        ("CnnLstmPolicy", IMAGE, DISCRETE, {"share_features_extractor": False}),
        ("MultiInputLstmPolicy", DICT, BOX, {}),
    ],
)
def test_recomputed_log_probabilities_and_values_are_those_of_collection(
    monkeypatch, policy, observation_space, action_space, policy_kwargs, sequence_length, part_cost
):
    monkeypatch.setattr(sequences, "PART_COST", part_cost)
    kwargs = {"policy_kwargs": NETWORK | policy_kwargs, "rollout_buffer_kwargs": {"sequence_length": sequence_length}}
    model = collect(make(observation_space, action_space, policy, **kwargs))
    assert model.rollout_buffer.episode_starts[1:].any()
    assert not model.rollout_buffer.episode_starts[0].all()
    model._finished_rollouts()
    for batch in model.rollout_buffer.get(40):
        values, log_prob, *_ = model.evaluate_actions(batch)
        th.testing.assert_close(log_prob, batch.old_log_prob, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(values.flatten(), batch.old_values, rtol=1e-4, atol=1e-5)
    model.train()
    assert np.isfinite(logged(model)["train/loss"])


def test_with_gsde():
    model = make(use_sde=True, sde_sample_freq=4)
    model.learn(200)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("part_cost", [0, 10**6])
@pytest.mark.parametrize(
    ("action_space", "clip_range_vf", "policy_kwargs"),
    [
        (BOX, None, {}),
        (DISCRETE, 0.05, {}),
        (BOX, None, {"net_arch": []}),
        (BOX, None, {"enable_critic_lstm": False}),
        (BOX, None, {"enable_critic_lstm": False, "shared_lstm": True}),
        (BOX, None, {"n_lstm_layers": 2, "activation_fn": th.nn.ELU}),
    ],
)
def test_one_minibatch_has_the_gradient_of_recurrent_ppo(monkeypatch, action_space, clip_range_vf, policy_kwargs, part_cost):
    monkeypatch.setattr(sequences, "PART_COST", part_cost)
    network = NETWORK | policy_kwargs | {"optimizer_class": th.optim.SGD}
    settings = {
        "n_epochs": 1, "batch_size": 1000, "learning_rate": 1.0, "ent_coef": 0.01, "max_grad_norm": 0.3,
        "clip_range_vf": clip_range_vf, "policy_kwargs": network,
    }  # fmt: skip
    ours = collect(make(action_space=action_space, objective="ppo_clip", **settings))
    theirs = collect(make(action_space=action_space, cls=RecurrentPPO, **settings))
    assert th.equal(weights(ours), weights(theirs))
    np.testing.assert_array_equal(ours.rollout_buffer.actions, theirs.rollout_buffer.actions)
    # Off-policy, so that ratios matter
    for model in (ours, theirs):
        model.rollout_buffer.log_probs += np.linspace(-0.3, 0.3, 96, dtype=np.float32).reshape(32, 3)
    # Else it cuts one of its sequences in two
    monkeypatch.setattr(np.random, "randint", lambda *args, **kwargs: 0)
    before = weights(ours)
    for model in (ours, theirs):
        model.train()
    assert (weights(ours) - before).norm() > 0.1
    th.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)
    for name in ("loss", "value_loss", "policy_gradient_loss", "entropy_loss", "approx_kl", "clip_fraction"):
        assert logged(ours)[f"train/{name}"] == pytest.approx(logged(theirs)[f"train/{name}"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critic_kwargs": {"n_rollouts": 2}}, "n_rollouts"),
        ({"critic_kwargs": {"recompute_advantages": True}}, "recompute_advantages"),
        ({"noise_exponent": 0.5}, "noise_exponent"),
        ({"noise_exponent": "auto"}, "noise_exponent"),
        ({"compile": True}, "compile"),
        ({"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class"),
        ({"rollout_buffer_kwargs": {"sequence_length": 0}}, "sequence_length"),
        ({"policy": OwnEvaluation}, "evaluate_actions"),
        ({"policy": PPO.policy_aliases["MlpPolicy"]}, "not recurrent"),
        ({"policy": "MlpPolicy"}, "MlpPolicy"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**{"policy_kwargs": None, **kwargs})


def test_saved_and_loaded(tmp_path):
    model = make(rollout_buffer_kwargs={"sequence_length": 5}).learn(200)
    model.save(tmp_path / "model")
    loaded = RecurrentR2VPO.load(tmp_path / "model", env=model.env)
    assert th.equal(weights(loaded), weights(model))
    assert type(loaded.rollout_buffer) is SequenceRolloutBuffer
    assert loaded.rollout_buffer.sequence_length == 5
    loaded.learn(96, reset_num_timesteps=False)
    observation, state = model.env.reset(), None
    for _ in range(3):
        actions, state = loaded.predict(observation, state, np.zeros(3), deterministic=True)
    assert actions.shape == (3, 2)


def test_frozen_layers_stay_as_they_are():
    model = make()
    before = [parameter.clone() for parameter in model.policy.lstm_actor.parameters()]
    for parameter in model.policy.lstm_actor.parameters():
        parameter.requires_grad_(False)
    critic = model.policy.lstm_critic.weight_hh_l0.clone()
    model.learn(100)
    assert all(map(th.equal, before, model.policy.lstm_actor.parameters()))
    assert not th.equal(critic, model.policy.lstm_critic.weight_hh_l0)


def test_same_seed_same_weights():
    first, second = (make().learn(200) for _ in range(2))
    assert th.equal(weights(first), weights(second))


def train(env_class, cls, policy, **kwargs):
    env = make_vec_env(env_class, n_envs=8, seed=0)
    network = {"net_arch": [], "lstm_hidden_size": 16} if cls is RecurrentR2VPO else {"net_arch": [16]}
    model = cls(
        policy, env, learning_rate=1e-2, n_steps=32, batch_size=128, n_epochs=5, seed=0, device="cpu",
        policy_kwargs=network, **kwargs,
    )  # fmt: skip
    model.learn(12_000)
    return evaluate_policy(model, env, n_eval_episodes=100, deterministic=True)[0]


def test_remembers_a_cue_that_was_shown_once():
    assert train(Cue, RecurrentR2VPO, "MlpLstmPolicy") > 0.95


def test_what_is_cut_off_is_not_learned():
    assert train(Cue, RecurrentR2VPO, "MlpLstmPolicy", rollout_buffer_kwargs={"sequence_length": 1}) < 0.9


def test_notices_that_an_episode_has_begun():
    assert train(FirstStep, RecurrentR2VPO, "MlpLstmPolicy") > -0.05


def test_without_memory_the_cue_is_lost():
    assert train(Cue, R2VPO, "MlpPolicy") < 0.7


@pytest.mark.slow
def test_balances_a_pole_without_seeing_velocities():
    env = VecNormalize(make_vec_env(lambda: TimeLimit(CartPoleNoVelocity(), 500), n_envs=8, seed=0))
    model = RecurrentR2VPO(
        "MlpLstmPolicy", env, learning_rate=1e-3, n_steps=128, batch_size=256, gae_lambda=0.98, max_grad_norm=1.0, seed=0,
        policy_kwargs={"net_arch": {"pi": [], "vf": [64]}, "lstm_hidden_size": 64, "ortho_init": False}, device="cpu",
    )  # fmt: skip
    model.learn(30_000)
    env.training, env.norm_reward = False, False
    assert evaluate_policy(model, env, n_eval_episodes=16)[0] > 150
