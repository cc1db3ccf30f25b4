"""What may be replaced, copied, loaded, patched or frozen, and what users' hooks may do: SB3's PPO bears all of it."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, weights
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.critic import critic_parameters
from sb3_r2vpo.common.policies import MlpPolicy

ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
SEPARATE = {"critic_kwargs": {"n_rollouts": 2, "n_epochs": 3}}


def env(n_envs: int = 1, actions: spaces.Space = ACTIONS):
    return make_vec_env(lambda: RandomEnv(VECTOR, actions), n_envs=n_envs, seed=0)


def make(algorithm=R2VPO, policy="MlpPolicy", n_envs: int = 1, **kwargs):
    return algorithm(policy, env(n_envs), **{**SMALL, **kwargs})


def critic_weights(model) -> th.Tensor:
    names = critic_parameters(model.policy)
    return th.cat([p.detach().flatten().clone() for name, p in model.policy.named_parameters() if name in names])


# === Saving ===


def test_checkpoints_of_a_separate_critic_include_its_rollouts(tmp_path: Path) -> None:
    model = make(**SEPARATE)
    model.learn(3 * 32, callback=CheckpointCallback(32, str(tmp_path), save_replay_buffer=True))
    (path,) = tmp_path.glob("*replay_buffer_96*")
    loaded = make(**SEPARATE)
    loaded.load_replay_buffer(path)
    # The rollout in the making takes the place of one of the two
    assert len(loaded.replay_buffer) == 1
    loaded.learn(64)


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_save_replay_buffer_says_when_there_is_none(algorithm) -> None:
    model = make(algorithm, **({"replay_capacity": 1} if algorithm is R2VPOOff else {}))
    with pytest.raises(ValueError, match="keeps no rollouts"):
        model.save_replay_buffer(io.BytesIO())


# === Optimizers ===


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.RMSprop, th.optim.AdamW])
@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_a_new_optimizer_leaves_a_separate_critic_alone_in_the_policys_steps(optimizer_class, policy) -> None:
    model = make(policy=policy, **SEPARATE)
    model.learn(32)
    model.policy.optimizer = optimizer_class(model.policy.parameters(), lr=1e-2)
    after_fit: list[th.Tensor] = []
    fit = model.critic.fit

    def recording_fit(*args):
        fit(*args)
        after_fit.append(critic_weights(model))

    model.critic.fit = recording_fit
    before = weights(model)
    model.learn(64, reset_num_timesteps=False)
    assert th.equal(after_fit[-1], critic_weights(model))
    assert not th.equal(before, weights(model))


def test_replaced_optimizer_is_the_one_that_steps() -> None:
    model = make()
    model.learn(32)
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=0.0)
    model.lr_schedule = lambda _: 0.0
    before = weights(model)
    model.learn(32, reset_num_timesteps=False)
    assert th.equal(before, weights(model))


@pytest.mark.parametrize("max_grad_norm", [None, float("inf")])
def test_gradients_need_not_be_clipped(max_grad_norm) -> None:
    model = make(max_grad_norm=max_grad_norm)
    model.learn(64)
    large = make(max_grad_norm=1e9)
    large.learn(64)
    assert th.equal(weights(model), weights(large))


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, float("nan")])
def test_max_grad_norm_is_checked(max_grad_norm) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        make(max_grad_norm=max_grad_norm)


# === Copies ===


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
@pytest.mark.parametrize("kwargs", [{}, SEPARATE, {"noise_exponent": 0.5}])
def test_a_copy_trains_itself_and_not_the_original(algorithm, kwargs) -> None:
    model = make(algorithm, **kwargs)
    model.learn(64)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = weights(model)
        duplicate.learn(64, reset_num_timesteps=False)
        assert th.equal(before, weights(model))
        assert not th.equal(before, weights(duplicate))
        assert th.isfinite(weights(duplicate)).all()


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_trains_itself() -> None:
    model = make(compile=True)
    early = copy.deepcopy(model)
    model.learn(32)
    late = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for duplicate in (early, late):
        before, own = weights(model), weights(duplicate)
        duplicate.learn(32, reset_num_timesteps=False)
        assert th.equal(before, weights(model))
        assert not th.equal(own, weights(duplicate))


# === Loading ===


@pytest.mark.parametrize(
    ("saved", "loaded"), [({}, SEPARATE), (SEPARATE, {}), (SEPARATE, {"critic_kwargs": {"n_rollouts": 5}})]
)
def test_load_may_change_the_critic(tmp_path: Path, saved, loaded) -> None:
    model = make(**saved)
    model.learn(64)
    model.save(tmp_path / "model")
    critic_kwargs = loaded.get("critic_kwargs")
    other = R2VPO.load(tmp_path / "model", env=env(), critic_kwargs=critic_kwargs)
    assert th.equal(weights(model), weights(other))
    other.learn(64)
    assert not th.equal(weights(model), weights(other))


@pytest.mark.parametrize("kwargs", [{}, SEPARATE])
def test_parameters_of_ppo_can_be_set(kwargs) -> None:
    ppo = PPO("MlpPolicy", env(), **SMALL)
    ppo.learn(32)
    model = make(**kwargs)
    model.set_parameters(ppo.get_parameters(), exact_match=False)
    assert th.equal(weights(ppo), weights(model))
    model.learn(64)
    with pytest.raises(ValueError, match="parameters do not match"):
        model.set_parameters(ppo.get_parameters())


@pytest.mark.parametrize(("saved", "loaded"), [("r2vpo", "ppo_clip"), ("spo", "r2vpo")])
def test_load_may_change_the_objective(tmp_path: Path, saved, loaded) -> None:
    model = make(objective=saved)
    model.learn(32)
    model.save(tmp_path / "model")
    R2VPO.load(tmp_path / "model", env=env(), objective=loaded).learn(32)


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_stored_rollouts_follow_a_loaded_discount_factor(tmp_path: Path, gamma: float) -> None:
    model = make(R2VPOOff, n_envs=2)
    model.learn(2 * 64)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = R2VPOOff.load(tmp_path / "model", env=env(2), gamma=gamma)
    loaded.load_replay_buffer(tmp_path / "replay")
    rollout = loaded.replay_buffer.newest(1)[0]
    assert len(rollout.timeouts) > 0
    rollout.renew(loaded.predict_values, loaded.gamma, loaded.gae_lambda)
    # What the environment gave, and the value of each terminal observation at the present discount
    raw = model.replay_buffer.newest(1)[0]
    given = raw.buffer.rewards.copy()
    given[raw.timeouts.steps, raw.timeouts.envs] -= raw.timeouts.gamma * raw.timeouts.values
    expected = given.copy()
    values = loaded.predict_values(np.stack(raw.timeouts.observations)).flatten().numpy()
    expected[raw.timeouts.steps, raw.timeouts.envs] += gamma * values
    np.testing.assert_allclose(rollout.buffer.rewards, expected, rtol=1e-5, atol=1e-6)
    assert rollout.buffer.gamma == gamma


@pytest.mark.parametrize("kwargs", [{}, SEPARATE])
def test_replay_goes_on_with_another_number_of_environments(tmp_path: Path, kwargs) -> None:
    model = make(R2VPOOff, n_envs=2, **kwargs)
    model.learn(2 * 64)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = R2VPOOff.load(tmp_path / "model", env=env(3))
    loaded.load_replay_buffer(tmp_path / "replay")
    loaded.learn(3 * 32)
    assert [rollout.buffer.n_envs for rollout in loaded.replay_buffer.rollouts] == [2, 3]
    assert th.isfinite(weights(loaded)).all()


# === Networks ===


@pytest.mark.parametrize("kwargs", [{}, SEPARATE])
def test_a_frozen_critic_stays_as_it_is(kwargs) -> None:
    model = make(**kwargs)
    names = critic_parameters(model.policy)
    for name, parameter in model.policy.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.learn(64)
    for name, parameter in model.policy.named_parameters():
        assert th.equal(before[name], parameter) == (name in names)


@pytest.mark.parametrize("kwargs", [{}, SEPARATE])
def test_a_frozen_layer_of_the_actor_stays_as_it_is(kwargs) -> None:
    model = make(**kwargs)
    layer = model.policy.mlp_extractor.policy_net[0].requires_grad_(False)
    before = layer.weight.clone()
    model.learn(64)
    assert th.equal(before, layer.weight)


def test_replaced_layers_act_and_are_trained_as_by_ppo() -> None:
    def replaced(make_model):
        model = make_model()
        model.learn(64)
        th.manual_seed(1)
        policy = model.policy
        policy.mlp_extractor.policy_net[2] = nn.Linear(64, 64)
        policy.action_net = nn.Linear(64, 2)
        policy.optimizer = th.optim.Adam(policy.parameters(), lr=3e-4, eps=1e-5)
        model.learn(64, reset_num_timesteps=False)
        return weights(model)

    assert th.equal(replaced(lambda: make(objective="ppo_clip")), replaced(lambda: PPO("MlpPolicy", env(), **SMALL)))


def test_hooks_are_called() -> None:
    model = make()
    model.learn(32)
    calls: list[int] = []
    handle = model.policy.mlp_extractor.policy_net[0].register_forward_hook(lambda *_: calls.append(1))
    model.learn(32, reset_num_timesteps=False)
    # At each of 32 steps, each of 4 minibatches
    assert len(calls) >= 36
    handle.remove()
    gradients: list[th.Tensor] = []
    model.policy.action_net.weight.register_hook(gradients.append)
    model.learn(32, reset_num_timesteps=False)
    assert len(gradients) == 4


class SharedModule(BaseFeaturesExtractor):
    """Extractors of actor and critic with one layer in common."""

    common = None

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 8)
        SharedModule.common = SharedModule.common or nn.Linear(3, 8)
        self.layer = SharedModule.common

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations)


def test_a_shared_module_is_found_wherever_it_is() -> None:
    SharedModule.common = None
    policy_kwargs = {"features_extractor_class": SharedModule, "share_features_extractor": False}
    with pytest.raises(ValueError, match="parameters of its own"):
        make(policy_kwargs=policy_kwargs, **SEPARATE)


class OddExtractor(nn.Module):
    """Layers with other names than SB3's, one of which only `forward_critic` uses."""

    latent_dim_pi = latent_dim_vf = 8

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.late = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 8)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return th.tanh(self.body(features))

    def forward_critic(self, features):
        return self.late(th.tanh(self.head(features)))


class OddPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OddExtractor()


def test_the_critics_parameters_are_those_that_values_depend_on() -> None:
    model = make(policy=OddPolicy, **SEPARATE)
    names = critic_parameters(model.policy)
    assert {name.split(".")[1] for name in names if name.startswith("mlp_extractor")} == {"head", "late"}
    before = model.policy.mlp_extractor.late.weight.clone()
    model.learn(64)
    assert not th.equal(before, model.policy.mlp_extractor.late.weight)


# === Users' hooks ===


class SetAdvantages(BaseCallback):
    """Replaces advantages and returns, consistently with each other, at the end of each rollout."""

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        buffer.advantages = np.arange(buffer.advantages.size, dtype=np.float32).reshape(buffer.advantages.shape)
        buffer.returns = buffer.advantages + buffer.values

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [(R2VPO, SEPARATE), (R2VPO, {"critic_kwargs": {"recompute_advantages": True}}), (R2VPOOff, {}), (R2VPOOff, SEPARATE)],
)
def test_advantages_that_a_callback_has_set_stay(algorithm, kwargs) -> None:
    model = make(algorithm, n_envs=2, **kwargs)
    seen: list[th.Tensor] = []
    minibatches = model._minibatches

    def recording(rollouts):
        for batch in minibatches(rollouts):
            seen.append(batch.samples.advantages)
            yield batch

    model._minibatches = recording
    model.learn(4 * 64, callback=SetAdvantages())
    assert set(th.cat(seen).tolist()) == set(map(float, range(64)))


class LabelledBuffer(RolloutBuffer):
    """A field of the user's own, which its samples hold as their old values."""

    def reset(self) -> None:
        super().reset()
        self.labels = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

    def add(self, obs, *args, **kwargs) -> None:
        self.labels[self.pos] = obs[:, 0]
        super().add(obs, *args, **kwargs)

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(old_values=self.to_torch(self.labels[batch_inds]).flatten())


@pytest.mark.parametrize(("algorithm", "kwargs"), [(R2VPO, {}), (R2VPO, SEPARATE), (R2VPOOff, {"replay_capacity": 3})])
def test_fields_of_a_users_buffer_stay_with_their_observations(algorithm, kwargs) -> None:
    model = make(algorithm, n_envs=2, rollout_buffer_class=LabelledBuffer, **kwargs)
    minibatches = model._minibatches
    n_seen = 0

    def checking(rollouts):
        nonlocal n_seen
        for batch in minibatches(rollouts):
            assert th.equal(batch.samples.observations[:, 0], batch.samples.old_values)
            n_seen += len(batch.samples.old_values)
            yield batch

    model._minibatches = checking
    model.learn(4 * 64)
    assert n_seen > 0


class FirstHalf(RolloutBuffer):
    """Draws from half of the rollout."""

    def get(self, batch_size=None):
        for samples in super().get(batch_size):
            yield type(samples)(*(field[: len(field) // 2] for field in samples))


def test_a_users_get_is_used_or_refused() -> None:
    model = make(rollout_buffer_class=FirstHalf)
    sizes: list[int] = []
    minibatches = model._minibatches
    model._minibatches = lambda rollouts: (sizes.append(len(b.samples.actions)) or b for b in minibatches(rollouts))
    model.learn(32)
    assert set(sizes) == {8}
    for algorithm, kwargs in ((R2VPOOff, {}), (R2VPO, SEPARATE), (R2VPO, {"critic_kwargs": {"recompute_advantages": True}})):
        with pytest.raises(ValueError, match="FirstHalf has a `get` of its own"):
            make(algorithm, rollout_buffer_class=FirstHalf, **kwargs)


class StochasticEvaluation(BaseCallback):
    """Acts with the policy in the middle of a rollout."""

    def _on_step(self) -> bool:
        observation, _ = self.model.policy.obs_to_tensor(self.model._last_obs)
        # Not `predict`, which clips both to the bounds
        first, second = (self.model.policy._predict(observation, deterministic=False) for _ in range(2))
        self.differences = [*getattr(self, "differences", []), (first - second).abs().min().item()]
        return True


def test_evaluations_within_a_rollout_have_noise_of_their_own() -> None:
    model = make(noise_exponent=1.0)
    callback = StochasticEvaluation()
    model.learn(32, callback=callback)
    assert min(callback.differences) > 0


# === Memory ===

MEMORY = """
import sys
import weakref
import gymnasium as gym, numpy as np, torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from sb3_r2vpo import R2VPO, R2VPOOff
th.set_num_threads(1)

class Images(gym.Env):
    observation_space, action_space = spaces.Box(0, 255, (3, 128, 128), np.uint8), spaces.Discrete(2)
    steps = 0
    def reset(self, seed=None, options=None):
        return np.full((3, 128, 128), 7, np.uint8), {}
    def step(self, action):
        self.steps += 1
        return np.full((3, 128, 128), self.steps % 256, np.uint8), 0.0, False, self.steps % 20 == 0, {}

policy_kwargs = {"net_arch": [], "features_extractor_class": __import__("test_faults").Pixel}
kwargs = {"replay_capacity": int(sys.argv[2])} if sys.argv[1] == "R2VPOOff" else {}
algorithm = {"PPO": PPO, "R2VPO": R2VPO, "R2VPOOff": R2VPOOff}[sys.argv[1]]
kwargs |= {"n_steps": 2048, "n_epochs": 1, "device": "cpu", "policy_kwargs": policy_kwargs}
model = algorithm("CnnPolicy", Images(), batch_size=64, **kwargs)

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

# Of a first update, small: libraries are loaded
model.n_steps, model.rollout_buffer.buffer_size = 64, 64
model.learn(64)
model.n_steps, model.rollout_buffer.buffer_size = 2048, 2048
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model.learn(3 * 2048)
print(status("VmHWM") - before)
"""


class Pixel(FlattenExtractor):
    """So small that the rollout is what takes memory."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self._features_dim = 1

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations[:, 0, 0, :1]


def peak_megabytes(*arguments: str) -> float:
    command = [sys.executable, "-c", MEMORY, *arguments]
    # Else the C library keeps some of what was freed, how much is chance
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=Path(__file__).parent, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    return float(result.stdout)


@pytest.mark.slow
def test_a_rollout_of_images_takes_no_more_memory_than_ppos() -> None:
    rollout = 2048 * 3 * 128 * 128 / 2**20
    ppo = peak_megabytes("PPO")
    assert peak_megabytes("R2VPO") < 1.1 * ppo
    # One more is kept, and the last observations of its episodes
    assert peak_megabytes("R2VPOOff", "2") < ppo + 1.2 * rollout


def test_time_limits_are_noted_only_where_they_are_used() -> None:
    plain, replaying = make(), make(R2VPOOff)
    plain.learn(32)
    replaying.learn(32)
    assert len(plain._timeouts) == 0
    assert len(replaying._timeouts) > 0


def test_our_policy_is_sb3s_for_other_algorithms() -> None:
    ours = PPO(MlpPolicy, env(2), **SMALL)
    ours.learn(128)
    theirs = PPO("MlpPolicy", env(2), **SMALL)
    theirs.learn(128)
    assert th.equal(weights(ours), weights(theirs))
    assert list(ours.policy.state_dict()) == list(theirs.policy.state_dict())


def test_arguments_may_be_set_later_as_sb3s_may_be() -> None:
    later = make(R2VPOOff)
    later.learn(64)
    later.vf_coef, later.clip_range_vf, later.target_variance = 0.1, 0.05, 0.3
    later.objective_kwargs = {"dual_learning_rate": 0.5}
    value = later.policy_loss.multiplier.value.item()
    later.learn(32, reset_num_timesteps=False)
    assert later.critic.vf_coef == 0.1
    assert later.critic.clip_range_vf == 0.05
    assert later.policy_loss.target_variance.item() == pytest.approx(0.3)
    # From where it was, by its new step size
    assert 0 < abs(later.policy_loss.multiplier.value.item() - value) < 0.5 * 0.3 * 8
    later.objective_kwargs["dual_learning_rate"] = 0.0
    value = later.policy_loss.multiplier.value.item()
    later.learn(32, reset_num_timesteps=False)
    assert later.policy_loss.multiplier.value.item() == value
    later.replay_capacity, later.critic_kwargs = 3, {"n_rollouts": 4, "n_epochs": 1}
    later.clip_range_vf = None
    later.learn(3 * 32, reset_num_timesteps=False)
    assert len(later.replay_buffer) == 4
    later.vf_coef = 0.7
    later.target_variance = -1.0
    with pytest.raises(ValueError, match="target_variance"):
        later.learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("where", ["policy", "mlp_extractor", "action_net"])
def test_patched_methods_are_called(where: str) -> None:
    model = make()
    model.learn(32)
    calls: list[int] = []
    owner = model.policy if where == "policy" else getattr(model.policy, where)
    name = "evaluate_actions" if where == "policy" else "forward"
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: calls.append(1) or method(*args))
    model.learn(32, reset_num_timesteps=False)
    assert len(calls) >= 4


def test_policies_are_collected() -> None:
    model = make()
    model.learn(32)
    policy = weakref.ref(model.policy)
    del model
    gc.collect()
    assert policy() is None
