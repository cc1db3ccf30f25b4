"""The fast paths against the plain ones that they stand for."""

import copy
import math
import pickle
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, logged, weights
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.minibatches import rollout_tensors, shuffled_minibatches
from sb3_r2vpo.optim import FlatAdam, clip_coefficient, clip_coefficient_on_host, descend
from sb3_r2vpo.r2vpo.acting import acting
from sb3_r2vpo.r2vpo.evaluation import acts_as_usual, evaluate_actions
from sb3_r2vpo.r2vpo.plain_mlp import PlainMlp, is_plain_mlp
from sb3_r2vpo.r2vpo.policies import CensoredMlpPolicy

IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
ACTION_SPACES = [spaces.Box(-2, 2, (2,)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)]


# --- minibatches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)}), IMAGE], ids=str)
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_minibatches_are_those_of_the_rollout_buffer(observation_space, action_space, n_envs):
    buffer_class = DictRolloutBuffer if isinstance(observation_space, spaces.Dict) else RolloutBuffer
    buffer = buffer_class(10, observation_space, action_space, "cpu", n_envs=n_envs)
    for _ in range(10):
        samples = [observation_space.sample() for _ in range(n_envs)]
        keys = observation_space.keys() if isinstance(observation_space, spaces.Dict) else None
        obs = np.stack(samples) if keys is None else {key: np.stack([sample[key] for sample in samples]) for key in keys}
        actions = np.stack([action_space.sample() for _ in range(n_envs)])
        buffer.add(obs, actions, np.random.randn(n_envs), np.zeros(n_envs), th.randn(n_envs), th.randn(n_envs))
    tensors = rollout_tensors(buffer)
    for _ in range(2):
        np.random.seed(7)
        ours = list(shuffled_minibatches([tensors], batch_size=4))
        np.random.seed(7)
        theirs = list(buffer.get(batch_size=4))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is type(b)
            for field_a, field_b in zip(a, b, strict=True):
                field_a, field_b = (f if isinstance(f, dict) else {"": f} for f in (field_a, field_b))
                assert all(field_a[key].dtype == field_b[key].dtype for key in field_b)
                assert all(th.equal(field_a[key], field_b[key]) for key in field_b)


def test_large_observations_are_not_copied_until_they_are_shuffled():
    """A replay of images would otherwise take its memory twice."""
    model = R2VPOOff("MlpPolicy", "Pendulum-v1", **SMALL).learn(32)
    rollout = model.replay_buffer.rollouts[0]
    assert np.shares_memory(rollout.tensors().observations.numpy(), rollout.buffer.observations)


def test_a_users_rollout_buffer_is_asked_for_its_minibatches():
    class HalfTheSteps(RolloutBuffer):
        def get(self, batch_size=None):
            minibatches = list(super().get(batch_size))
            yield from minibatches[: len(minibatches) // 2]

    model = R2VPO("MlpPolicy", "Pendulum-v1", rollout_buffer_class=HalfTheSteps, **SMALL).learn(32)
    assert len(list(model._minibatches())) == 2


# --- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=lambda space: type(space).__name__)
def test_evaluation_is_that_of_the_policy_bit_for_bit(action_space, share_features_extractor):
    """Values and gradients, the entropy's included."""
    policy = ActorCriticPolicy(VECTOR, action_space, lambda _: 1e-3, share_features_extractor=share_features_extractor)
    observations = th.randn(50, 3)
    actions = th.as_tensor(np.stack([action_space.sample() for _ in range(50)]))
    if not isinstance(action_space, spaces.Discrete):
        actions = actions.float()
    results = []
    for evaluation in (policy.evaluate_actions(observations, actions), evaluate_actions(policy, observations, actions)):
        values, log_prob, entropy = evaluation
        policy.zero_grad()
        (values.mean() + log_prob.exp().mean() + 0.3 * entropy.mean()).backward()
        results.append([values, log_prob, entropy, *(parameter.grad.clone() for parameter in policy.parameters())])
    assert all(th.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("policy_kwargs", [{}, {"activation_fn": th.nn.ReLU, "net_arch": [7]}, {"net_arch": {"vf": [5, 4]}}])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Discrete(4)], ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("action_space", [*ACTION_SPACES[:2], spaces.Box(-1, 1, (6,))], ids=str)
@pytest.mark.parametrize("has_entropy", [True, False])
def test_gradients_by_hand_are_those_of_autograd_bit_for_bit(observation_space, action_space, policy_kwargs, has_entropy):
    policy = ActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, **policy_kwargs)
    observations, actions = (
        th.as_tensor(np.stack([space.sample() for _ in range(50)])) for space in (observation_space, action_space)
    )
    factors = th.randn(50)

    def loss(values, log_prob, entropy) -> th.Tensor:
        return (values.flatten() * factors).mean() + (log_prob.exp() * factors).mean() + has_entropy * 0.3 * entropy.mean()

    expected = policy.evaluate_actions(observations, actions)
    loss(*expected).backward()
    gradients = [parameter.grad for parameter in policy.parameters()]

    assert is_plain_mlp(policy)
    FlatAdam(policy.parameters()).share_gradients()
    by_hand = PlainMlp(policy)
    results = by_hand.evaluate_actions(observations, actions)
    by_hand.backward(loss(*results))
    assert all(th.equal(a, b.flatten()) for a, b in zip(results[:2], expected[:2], strict=True))
    # The sum over dimensions of the action is rounded otherwise
    th.testing.assert_close(results[2], expected[2])
    for (name, parameter), gradient in zip(policy.named_parameters(), gradients, strict=True):
        assert th.equal(parameter.grad, gradient), name


@pytest.mark.parametrize("action_space", ACTION_SPACES[:2], ids=str)
def test_gradients_by_hand_without_values_are_the_actors_alone(action_space):
    policy = ActorCriticPolicy(VECTOR, action_space, lambda _: 1e-3)
    observations, actions = (th.as_tensor(np.stack([space.sample() for _ in range(50)])) for space in (VECTOR, action_space))
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    (log_prob.exp().mean() + entropy.mean()).backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    for parameter in policy.parameters():
        parameter.grad = th.full_like(parameter, 7.0)
    by_hand = PlainMlp(policy, with_values=False)
    values, log_prob, entropy = by_hand.evaluate_actions(observations, actions)
    assert values is None
    by_hand.backward(log_prob.exp().mean() + entropy.mean())
    for name, parameter in policy.named_parameters():
        assert th.equal(parameter.grad, gradients.get(name, th.full_like(parameter, 7.0))), name
    assert {name for name, _ in policy.named_parameters()} - gradients.keys() == {
        name for name, _ in policy.named_parameters() if "value" in name
    }


@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Discrete(4)], ids=lambda space: type(space).__name__)
def test_regression_of_values_by_hand_is_that_of_autograd_bit_for_bit(observation_space):
    policy = ActorCriticPolicy(observation_space, spaces.Discrete(2), lambda _: 1e-3)
    observations, returns = th.as_tensor(np.stack([observation_space.sample() for _ in range(50)])), th.randn(50)
    expected = th.nn.functional.mse_loss(policy.predict_values(observations).flatten(), returns)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    FlatAdam(policy.parameters()).share_gradients()
    assert th.equal(PlainMlp(policy).regress_values(observations, returns), expected)
    assert all("value" in name for name in gradients)
    for name, parameter in policy.named_parameters():
        assert th.equal(parameter.grad, gradients.get(name, th.zeros_like(parameter))), name


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_entropy_is_logged_whether_or_not_the_loss_depends_on_it(env_id, ent_coef):
    model = R2VPO("MlpPolicy", env_id, ent_coef=ent_coef, learning_rate=0.0, **SMALL).learn(32)
    observations = rollout_tensors(model.rollout_buffer).observations
    entropy = model.policy.get_distribution(observations).entropy().mean().item()
    assert logged(model)["train/entropy_loss"] == pytest.approx(-entropy, rel=1e-5)


def change_layer(policy) -> None:
    policy.mlp_extractor.policy_net[2] = th.nn.Sequential(policy.mlp_extractor.policy_net[2])


def change_activation(policy) -> None:
    policy.mlp_extractor.value_net[1] = th.nn.ELU()


@pytest.mark.parametrize(
    "change",
    [
        change_layer,
        change_activation,
        lambda policy: policy.log_std.requires_grad_(False),
        lambda policy: policy.register_parameter("temperature", th.nn.Parameter(th.ones(1))),
        lambda policy: policy.value_net.register_forward_hook(lambda *_: None),
        lambda policy: policy.value_net.bias.register_hook(lambda gradient: gradient * 2),
        lambda policy: setattr(policy, "features_extractor", th.nn.Identity()),
    ],
)
def test_policies_that_are_left_to_autograd(change):
    """And train there."""
    model = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(32)
    assert is_plain_mlp(model.policy)
    change(model.policy)
    assert not is_plain_mlp(model.policy)
    before = weights(model)
    model.train()
    assert not th.equal(weights(model), before)


@pytest.mark.parametrize("settings", [{"use_sde": True}, {"policy_kwargs": {"log_std_init": -1, "activation_fn": th.nn.ELU}}])
def test_variants_of_the_policy_that_are_left_to_autograd(settings):
    assert not is_plain_mlp(R2VPO("MlpPolicy", "Pendulum-v1", **settings).policy)


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
@pytest.mark.parametrize("settings", [{}, {"critic_capacity": 3, "critic_epochs": 2}])
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD, th.optim.AdamW])
def test_by_hand_is_as_by_autograd_with_any_optimizer(optimizer_class, algorithm, settings, monkeypatch):
    settings = SMALL | settings | {"ent_coef": 0.01, "policy_kwargs": {"optimizer_class": optimizer_class}}
    results = []
    for by_hand in (True, False):
        monkeypatch.setattr("sb3_r2vpo.r2vpo.r2vpo.is_plain_mlp", lambda policy, by_hand=by_hand: by_hand)
        model = algorithm("MlpPolicy", "Pendulum-v1", **settings).learn(96)
        results.append(weights(model))
    assert th.equal(*results)


def test_an_overridden_evaluation_is_used():
    class Shifted(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values + 100, log_prob, entropy

    policy = Shifted(VECTOR, spaces.Discrete(2), lambda _: 1e-3)
    values, *_ = evaluate_actions(policy, th.zeros(4, 3), th.zeros(4, dtype=th.long))
    assert (values > 90).all()


# --- optimizer ---------------------------------------------------------------------------------------------------------


def networks() -> list[th.nn.Module]:
    th.manual_seed(0)
    network = th.nn.Sequential(th.nn.Linear(5, 17), th.nn.Tanh(), th.nn.Linear(17, 3), th.nn.Linear(3, 1, bias=False))
    return [network, copy.deepcopy(network)]


def clip_and_step(optimizer, parameters, max_norm, may_step) -> None:
    """What :func:`descend` stands for."""
    th.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def train(network, optimizer, n_steps, descend=clip_and_step) -> None:
    th.manual_seed(1)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.zero_grad()
        network(th.randn(20, 5)).square().mean().backward()
        descend(optimizer, list(network.parameters()), 0.1, None)


def assert_same(a: th.nn.Module, b: th.nn.Module) -> None:
    assert all(th.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_flat_adam_is_adam_bit_for_bit():
    plain, flat = networks()
    train(plain, th.optim.Adam(plain.parameters(), eps=1e-5), 50)
    train(flat, FlatAdam(flat.parameters(), eps=1e-5), 50, descend)
    assert_same(plain, flat)


def test_state_goes_from_adam_to_flat_adam_and_back():
    plain, flat = networks()
    adam, flat_adam = th.optim.Adam(plain.parameters()), FlatAdam(flat.parameters())
    train(plain, adam, 5)
    train(flat, flat_adam, 5)
    state, flat_state = copy.deepcopy(adam.state_dict()), copy.deepcopy(flat_adam.state_dict())
    for ours, theirs in zip(flat_state["state"].values(), state["state"].values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)
    adam.load_state_dict(flat_state)
    flat_adam.load_state_dict(state)
    train(plain, adam, 5)
    train(flat, flat_adam, 5)
    assert_same(plain, flat)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}, {"foreach": True}])
def test_options_that_flat_adam_leaves_to_adam(options):
    plain, flat = networks()
    train(plain, th.optim.Adam(plain.parameters(), **options), 5)
    train(flat, FlatAdam(flat.parameters(), **options), 5)
    assert_same(plain, flat)


def test_parameters_without_a_gradient():
    plain, flat = networks()
    for network in (plain, flat):
        network[2].requires_grad_(False)
    train(plain, th.optim.Adam(plain.parameters()), 5)
    train(flat, FlatAdam(flat.parameters()), 5, descend)
    # Thawed later: its number of steps differs from the others'
    for network in (plain, flat):
        network[2].requires_grad_(True)
    optimizers = th.optim.Adam(plain.parameters()), FlatAdam(flat.parameters())
    train(plain, optimizers[0], 5)
    train(flat, optimizers[1], 5)
    assert_same(plain, flat)


def test_parameters_without_a_gradient_have_a_norm_of_zero():
    network, _ = networks()
    network(th.ones(5)).backward()
    network[2].weight.grad = None
    parameters = list(network.parameters())
    accepted, norms = descend(th.optim.SGD(parameters, lr=0.1), parameters, math.inf, None)
    assert accepted
    expected = [0.0 if parameter.grad is None else parameter.grad.norm() for parameter in parameters]
    th.testing.assert_close(norms, th.tensor(expected))


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.bfloat16])
def test_clipping_on_the_host_is_the_same_bit_for_bit(dtype):
    for norms in [*(th.rand(1000, 5, dtype=dtype) / 2), th.tensor([0.1, math.inf]), th.tensor([0.1, math.nan])]:
        on_device, finite = clip_coefficient(norms, 0.5)
        on_host, finite_on_host = clip_coefficient_on_host(norms, 0.5)
        assert finite.item() is finite_on_host
        assert on_device.item() == on_host or not finite


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, FlatAdam])
@pytest.mark.parametrize(("gradient", "may_step"), [(math.nan, None), (math.inf, None), (1.0, th.tensor(False))])
def test_no_step_is_made(optimizer_class, gradient, may_step):
    network, before = networks()
    network(th.ones(5)).backward()
    network[0].bias.grad[3] *= gradient
    accepted, _ = descend(optimizer_class(network.parameters(), lr=0.1), list(network.parameters()), 0.1, may_step)
    assert not accepted
    assert_same(network, before)


def test_optimizer_of_the_users_choice_is_kept():
    def optimizer(**policy_kwargs):
        return R2VPO("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **SMALL).policy.optimizer

    assert type(optimizer()) is FlatAdam
    assert optimizer().param_groups[0]["eps"] == 1e-5
    assert type(optimizer(optimizer_class=th.optim.AdamW)) is th.optim.AdamW
    assert type(optimizer(optimizer_kwargs={"fused": True})) is th.optim.Adam


# --- collection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_rollouts_are_those_of_ppo(algorithm):
    rollouts = []
    for cls in (PPO, algorithm):
        env = make_vec_env(lambda: RandomEnv(VECTOR, spaces.Box(-1, 1, (2,))), n_envs=3, seed=0)
        model = cls("MlpPolicy", env, learning_rate=0.0, **SMALL)
        model.learn(3 * 32)
        buffer = model.rollout_buffer
        names = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
        arrays = {name: getattr(buffer, name) for name in names}
        if not buffer.generator_ready:
            flat = ("observations", "actions", "values", "log_probs", "advantages", "returns")
            arrays |= {name: RolloutBuffer.swap_and_flatten(arrays[name]) for name in flat}
        rollouts.append(arrays)
    for name, array in rollouts[0].items():
        np.testing.assert_array_equal(array, rollouts[1][name], err_msg=name)


@pytest.mark.parametrize("policy_kwargs", [{}, {"activation_fn": th.nn.ReLU, "net_arch": {"vf": [5, 4]}}])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Discrete(4)], ids=lambda space: type(space).__name__)
@pytest.mark.parametrize(
    ("policy_class", "action_space"),
    [(ActorCriticPolicy, space) for space in (*ACTION_SPACES, spaces.Box(-1, 1, (3, 2)))]
    + [(CensoredMlpPolicy, spaces.Box(-0.5, 0.5, (3,)))],
    ids=str,
)
def test_acting_in_a_collection_is_the_policys_bit_for_bit(policy_class, action_space, observation_space, policy_kwargs):
    """From the same random numbers, by hand where the policy is plain; and so are calls with gradients or deterministic."""
    policy = policy_class(observation_space, action_space, lambda _: 1e-3, **policy_kwargs)
    observations = th.as_tensor(np.stack([observation_space.sample() for _ in range(7)]))

    def act() -> list[th.Tensor]:
        th.manual_seed(3)
        with th.no_grad():
            results = [*policy(observations), *policy(observations), *policy(observations, deterministic=True)]
        return [*results, *policy(observations), th.rand(1)]

    expected = act()
    with acting(policy):
        assert ("forward" in vars(policy)) == acts_as_usual(policy)
        if acts_as_usual(policy):
            assert (policy.forward.by_hand is not None) == is_plain_mlp(policy)
        results = act()
    assert "forward" not in vars(policy)
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype
        assert result.requires_grad == other.requires_grad
        assert th.equal(result, other)


def test_a_policy_acts_by_hand_no_longer_than_the_collection_lasts():
    class Stop(Exception):
        pass

    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            assert self.model.policy.forward.by_hand is not None
            self.copies = copy.deepcopy(self.model.policy), pickle.loads(pickle.dumps(self.model.policy))
            raise Stop

    model, callback = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL), Interrupt()
    with pytest.raises(Stop):
        model.learn(32, callback=callback)
    assert "forward" not in vars(model.policy)
    observations = th.randn(5, 3)
    expected = model.policy(observations, deterministic=True)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.zero_()
        for copied in callback.copies:
            assert all(th.equal(a, b) for a, b in zip(copied(observations, deterministic=True), expected, strict=True))
            copied(observations)


def test_an_overridden_forward_is_used():
    class Still(ActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            actions, values, log_prob = super().forward(obs, deterministic)
            return th.zeros_like(actions), values, log_prob

    model = R2VPO(Still, "Pendulum-v1", **SMALL).learn(32)
    assert is_plain_mlp(model.policy)
    assert not model.rollout_buffer.actions.any()


# --- compilation -------------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


def assert_compiled_agrees(algorithm, policy, env, n_updates=3, **settings) -> None:
    settings = SMALL | settings
    results = []
    for compile in (False, True):
        model = algorithm(policy, env(), compile=compile, **settings)
        before = weights(model)
        model.learn(n_updates * settings["n_steps"])
        results.append((weights(model), logged(model), list(model.policy.state_dict()), model))
    (eager, eager_log, eager_names, _), (compiled, compiled_log, compiled_names, model) = results
    assert eager_names == compiled_names
    assert not th.equal(before, compiled)
    # Single precision, over some dozen steps of Adam, whose step is all sign where a gradient is almost zero
    th.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    assert eager_log.keys() == compiled_log.keys()
    for name in ("loss", "value_loss", "approx_kl", "policy_grad_norm", "ratio_variance"):
        assert compiled_log[f"train/{name}"] == pytest.approx(eager_log[f"train/{name}"], rel=2e-2, abs=1e-5), name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_compiled_agrees(env_id):
    schedule = LinearSchedule(start=1e-3, end=1e-4, end_fraction=1.0)
    kwargs = {"learning_rate": schedule, "clip_range_vf": 0.2, "ent_coef": schedule, "batch_size": 12}
    counters.clear()
    assert_compiled_agrees(R2VPO, "MlpPolicy", lambda: gym.make(env_id), **kwargs)
    # The step is compiled as a whole: nothing in it is decided by the host
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_sde": True}, {"objective": "ppo_clip", "objective_kwargs": {"clip_range": 0.1}}])
def test_compiled_agrees_on_variants(settings):
    assert_compiled_agrees(R2VPOOff, "MlpPolicy", lambda: gym.make("Pendulum-v1"), **settings)


@needs_compiler
@pytest.mark.slow
def test_compiled_agrees_on_censored_actions():
    counters.clear()
    assert_compiled_agrees(R2VPOOff, CensoredMlpPolicy, lambda: gym.make("Pendulum-v1"), ent_coef=0.01)
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
def test_compiled_agrees_on_a_critic_that_learns_apart(tmp_path):
    counters.clear()
    settings = {"critic_capacity": 3, "critic_epochs": 2, "critic_gae_lambda": 0.9, "replay_capacity": 2}
    assert_compiled_agrees(R2VPOOff, "MlpPolicy", lambda: gym.make("Pendulum-v1"), **settings)
    assert not counters["graph_break"]
    model = R2VPOOff("MlpPolicy", "Pendulum-v1", compile=True, **SMALL | settings).learn(32)
    model.save(tmp_path / "model")
    loaded = R2VPOOff.load(tmp_path / "model", env=model.get_env()).learn(32)
    # Two minibatches in each of two passes over a rollout, before and after
    assert {state["step"].item() for state in loaded.critic_optimizer.state.values()} == {2 * 2 * 2}


@needs_compiler
@pytest.mark.slow
def test_compiled_agrees_on_dicts_and_multi_discrete():
    space = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
    assert_compiled_agrees(R2VPO, "MultiInputPolicy", lambda: RandomEnv(space, spaces.MultiDiscrete([2, 3])))


@needs_compiler
@pytest.mark.slow
def test_compiled_refuses_a_poisoned_step_stops_early_and_is_saved(tmp_path, capsys):
    model = R2VPO("MlpPolicy", "CartPole-v1", compile=True, **SMALL).learn(32)
    model.save(tmp_path / "model")
    assert R2VPO.load(tmp_path / "model").compile
    assert not R2VPO.load(tmp_path / "model", compile=False).compile

    advantages = model.rollout_buffer.advantages.copy()
    model.rollout_buffer.advantages[3] = 1e38
    model.rollout_buffer.returns[3] = 1e38
    before = weights(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        model.train()
    assert weights(model).isfinite().all()
    assert not th.equal(weights(model), before)
    assert math.isfinite(model.dual.value.item())

    # The step that exceeds the limit is not made
    model = R2VPO("MlpPolicy", "CartPole-v1", compile=True, target_kl=1e-9, verbose=1, **SMALL)
    model.learn(32)
    model.rollout_buffer.advantages[:] = advantages
    model.rollout_buffer.log_probs += 1
    before = weights(model)
    model.train()
    assert th.equal(weights(model), before)
    assert "Early stopping" in capsys.readouterr().out


def test_compiled_needs_adam():
    with pytest.raises(ValueError, match="`compile=True` compiles Adam along"):
        R2VPO("MlpPolicy", "CartPole-v1", compile=True, policy_kwargs={"optimizer_class": th.optim.SGD}, **SMALL)


def test_missing_compiler():
    th.compiler.reset()
    # A size of network that no other test has, as compiled code may be found in a cache
    model = R2VPO("MlpPolicy", "CartPole-v1", compile=True, policy_kwargs={"net_arch": [13]}, **SMALL)
    # By PyTorch's own means: to undo what pytest's has set would leave the option deleted
    no_compiler = th._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")})
    with no_compiler, pytest.raises(RuntimeError, match="needs a working C\\+\\+ compiler"):
        model.learn(32)


# --- the host does not wait for the device ----------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Collects operations whose result the host needs: each would have it wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize(("target_kl", "reads_per_minibatch"), [(None, 0), (10.0, 1)])
def test_minibatches_are_not_waited_for(env_id, target_kl, reads_per_minibatch, by_hand, monkeypatch):
    """With fused Adam, which is what a policy on a GPU gets, an update reads nothing before its end but a limit of the KL."""
    monkeypatch.setattr("sb3_r2vpo.r2vpo.r2vpo.is_plain_mlp", lambda policy: by_hand)
    policy_kwargs = {"optimizer_kwargs": {"fused": True, "eps": 1e-5}}
    model = R2VPO("MlpPolicy", env_id, target_kl=target_kl, policy_kwargs=policy_kwargs, **SMALL).learn(32)
    n_reads = []
    for model.n_epochs in (1, 5):
        with HostReads() as reads:
            model.train()
        n_reads.append(len(reads.operations))
    # Two minibatches an epoch
    assert n_reads[1] - n_reads[0] == 4 * 2 * reads_per_minibatch


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_minibatch_loop_does_not_wait_for_the_gpu():
    model = R2VPO("MlpPolicy", "Pendulum-v1", **(SMALL | {"device": "cuda"})).learn(32)
    minibatches, coefficients = list(model._minibatches()), model._objective_coefficients()
    ent_coef, target_variance = th.tensor([0.0, 0.02], device="cuda")
    th.cuda.set_sync_debug_mode("error")
    try:
        for rollout_data in minibatches:
            model._step(rollout_data, coefficients, ent_coef, None, target_variance)
    finally:
        th.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("algorithm", "settings"), [(R2VPO, {}), (R2VPOOff, {"replay_capacity": 1})])
def test_updates_on_a_gpu_are_those_of_the_cpu(algorithm, settings, compile, tmp_path):
    on_cpu = algorithm("MlpPolicy", "Pendulum-v1", **(SMALL | {"n_epochs": 1} | settings)).learn(64)
    on_cpu.save(tmp_path / "model")
    on_gpu = algorithm.load(tmp_path / "model", env=on_cpu.get_env(), device="cuda", compile=compile)
    on_gpu.set_logger(configure())
    # The last rollout once more: actions that are sampled on two devices differ
    on_gpu.rollout_buffer = copy.deepcopy(on_cpu.rollout_buffer)
    on_gpu.rollout_buffer.device = on_gpu.device
    for model in (on_cpu, on_gpu):
        np.random.seed(0)
        model.train()
    assert weights(on_gpu).device.type == "cuda"
    # As for the compiled step: single precision, and Adam's step is all sign where a gradient is almost zero
    th.testing.assert_close(weights(on_gpu).cpu(), weights(on_cpu), rtol=1e-3, atol=1e-4)
    on_gpu.learn(64)
    on_gpu.save(tmp_path / "model")
    assert th.equal(weights(algorithm.load(tmp_path / "model", device="cpu")), weights(on_gpu).cpu())
