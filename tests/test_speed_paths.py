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
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.distributions import CorrelatedGaussianDistribution
from sb3_r2vpo.common.mlp import networks as written_out
from sb3_r2vpo.common.policies import CensoredMlpPolicy, MlpPolicy, evaluate, regress_values
from sb3_r2vpo.common.rollout import Rollout, Timeouts
from sb3_r2vpo.common.sampler import shuffled_minibatches
from sb3_r2vpo.core.optim import Descent, FlatAdam, clip_coefficient, clip_coefficient_on_host

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
    reference = copy.deepcopy(buffer)
    samples = Rollout(buffer, obs, np.zeros(n_envs), Timeouts()).samples
    for _ in range(2):
        np.random.seed(7)
        ours = list(shuffled_minibatches([samples], batch_size=4))
        np.random.seed(7)
        theirs = list(reference.get(batch_size=4))
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
    assert np.shares_memory(rollout.samples.observations.numpy(), rollout.buffer.observations)


def test_a_users_rollout_buffer_is_asked_for_its_minibatches():
    class HalfTheSteps(RolloutBuffer):
        def get(self, batch_size=None):
            minibatches = list(super().get(batch_size))
            yield from minibatches[: len(minibatches) // 2]

    model = R2VPO("MlpPolicy", "Pendulum-v1", rollout_buffer_class=HalfTheSteps, **SMALL).learn(32)
    assert len(list(model._minibatches(model._finished_rollouts()))) == 2
    # Where others would have to be drawn instead
    for critic_kwargs in ({"n_rollouts": 2}, {"recompute_advantages": True}):
        with pytest.raises(ValueError, match="HalfTheSteps has a `get` of its own"):
            R2VPO("MlpPolicy", "Pendulum-v1", rollout_buffer_class=HalfTheSteps, critic_kwargs=critic_kwargs, **SMALL)
    with pytest.raises(ValueError, match="HalfTheSteps has a `get` of its own"):
        R2VPOOff("MlpPolicy", "Pendulum-v1", rollout_buffer_class=HalfTheSteps, **SMALL)


# --- log-probabilities -------------------------------------------------------------------------------------------------


def samples_of(policy: ActorCriticPolicy, n_samples: int = 50) -> tuple[th.Tensor, th.Tensor]:
    """Random observations and actions, as a minibatch has them"""
    observations, actions = (
        th.as_tensor(np.stack([space.sample() for _ in range(n_samples)]))
        for space in (policy.observation_space, policy.action_space)
    )
    return observations, actions if isinstance(policy.action_space, spaces.Discrete) else actions.float()


def gradients(policy: ActorCriticPolicy, loss: th.Tensor, backward=th.Tensor.backward) -> dict[str, th.Tensor]:
    """By name, where the backward pass leaves one; where it writes to tensors, nothing must be left of what was in them."""
    if backward is th.Tensor.backward:
        policy.zero_grad()
    else:
        # One tensor for all of them, as in training
        FlatAdam(policy.parameters()).flatten([*policy.parameters()])
        for parameter in policy.parameters():
            parameter.grad = th.full_like(parameter, 7.0)
    backward(loss)
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    if backward is th.Tensor.backward:
        return found
    return {name: gradient for name, gradient in found.items() if not (gradient == 7.0).all()}


def assert_same_gradients(ours: dict[str, th.Tensor], theirs: dict[str, th.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert th.equal(ours[name], gradient), name


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("policy_class", [ActorCriticPolicy, MlpPolicy])
def test_evaluation_is_that_of_the_policy_bit_for_bit(policy_class, action_space, share_features_extractor):
    """Values and gradients, the entropy's included."""
    policy = policy_class(VECTOR, action_space, lambda _: 1e-3, share_features_extractor=share_features_extractor)
    observations, actions = samples_of(policy)

    def loss(values, log_prob, entropy) -> th.Tensor:
        return values.mean() + log_prob.exp().mean() + 0.3 * entropy.mean()

    expected = policy.evaluate_actions(observations, actions)
    expected_gradients = gradients(policy, loss(*expected))
    *results, backward = evaluate(policy, observations, actions)
    assert th.equal(results[0].flatten(), expected[0].flatten())
    assert th.equal(results[1], expected[1])
    # Written out, the sum over dimensions of the action is rounded otherwise
    assert th.equal(results[2], expected[2]) or (backward is not th.Tensor.backward and results[2].allclose(expected[2]))
    assert_same_gradients(gradients(policy, loss(*results), backward), expected_gradients)
    # By values alone, as without a gradient
    values, *results, backward = evaluate(policy, observations, actions, with_values=False)
    assert values is None
    with th.no_grad():
        values, log_prob, *_ = evaluate(policy, observations, actions)
    assert th.equal(values, expected[0])
    assert th.equal(log_prob, expected[1])
    assert not log_prob.requires_grad


@pytest.mark.parametrize("policy_kwargs", [{}, {"activation_fn": th.nn.ReLU, "net_arch": [7]}, {"net_arch": {"vf": [5, 4]}}])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Discrete(4)], ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("action_space", [*ACTION_SPACES[:2], spaces.Box(-1, 1, (6,))], ids=str)
@pytest.mark.parametrize("has_entropy", [True, False])
def test_gradients_by_hand_are_those_of_autograd_bit_for_bit(observation_space, action_space, policy_kwargs, has_entropy):
    policy = MlpPolicy(observation_space, action_space, lambda _: 1e-3, **policy_kwargs)
    observations, actions = samples_of(policy)
    factors = th.randn(50)

    def loss(values, log_prob, entropy) -> th.Tensor:
        result = (values.flatten() * factors).mean() + (log_prob.exp() * factors).mean()
        return result + 0.3 * entropy.mean() if has_entropy else result

    expected = policy.evaluate_actions(observations, actions)
    expected_gradients = gradients(policy, loss(*expected))
    *results, backward = policy.evaluate(observations, actions, with_values=True)
    assert all(th.equal(a, b) for a, b in zip(results[:2], expected[:2], strict=True))
    # The sum over dimensions of the action is rounded otherwise
    th.testing.assert_close(results[2], expected[2])
    assert_same_gradients(gradients(policy, loss(*results), backward), expected_gradients)

    # And with gradients in the tensors of an optimizer, whose step is then made
    parameters = [*policy.parameters()]
    *results, backward = policy.evaluate(observations, actions, with_values=True)
    Descent(FlatAdam(parameters, lr=0.0), parameters, None)(loss(*results), backward=backward)
    assert_same_gradients({name: parameter.grad for name, parameter in policy.named_parameters()}, expected_gradients)


@pytest.mark.parametrize("action_space", ACTION_SPACES[:2], ids=str)
def test_gradients_by_hand_without_values_are_the_actors_alone(action_space):
    policy = MlpPolicy(VECTOR, action_space, lambda _: 1e-3)
    observations, actions = samples_of(policy)
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    expected = gradients(policy, log_prob.exp().mean() + entropy.mean())
    values, log_prob, entropy, backward = policy.evaluate(observations, actions, with_values=False)
    assert values is None
    assert_same_gradients(gradients(policy, log_prob.exp().mean() + entropy.mean(), backward), expected)
    names = {name for name, _ in policy.named_parameters()}
    assert names - expected.keys() == {name for name in names if "value" in name}


@pytest.mark.parametrize("policy_kwargs", [{}, {"activation_fn": th.nn.ReLU, "net_arch": {"vf": [5, 4]}}])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Discrete(4)], ids=lambda space: type(space).__name__)
def test_regression_of_values_by_hand_is_that_of_autograd_bit_for_bit(observation_space, policy_kwargs):
    policy = MlpPolicy(observation_space, spaces.Discrete(2), lambda _: 1e-3, **policy_kwargs)
    observations, returns = samples_of(policy)[0], th.randn(50)
    expected = th.nn.functional.mse_loss(policy.predict_values(observations).flatten(), returns)
    expected_gradients = gradients(policy, expected)
    loss, backward = regress_values(policy, observations, returns)
    assert backward is not th.Tensor.backward
    assert th.equal(loss, expected)
    assert all("value" in name for name in expected_gradients)
    assert_same_gradients(gradients(policy, loss, backward), expected_gradients)


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_entropy_is_logged_whether_or_not_the_loss_depends_on_it(env_id, ent_coef):
    model = R2VPO("MlpPolicy", env_id, ent_coef=ent_coef, learning_rate=0.0, **SMALL).learn(32)
    observations = model.rollout_buffer._get_samples(slice(None)).observations
    entropy = model.policy.get_distribution(observations).entropy().mean().item()
    assert logged(model)["train/entropy_loss"] == pytest.approx(-entropy, rel=1e-5)


def change_layer(policy) -> None:
    policy.mlp_extractor.policy_net[2] = th.nn.Sequential(policy.mlp_extractor.policy_net[2])


def change_activation(policy) -> None:
    policy.mlp_extractor.value_net[1] = th.nn.ELU()


class Double(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return 2 * super().forward(observations)


def change_features(policy) -> None:
    policy.features_extractor = policy.pi_features_extractor = policy.vf_features_extractor = Double(VECTOR)


class Negative(MlpExtractor):
    def forward_actor(self, features):
        return -super().forward_actor(features)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)


def change_extractor(policy) -> None:
    extractor = Negative(3, [64, 64], th.nn.Tanh)
    extractor.load_state_dict(policy.mlp_extractor.state_dict())
    policy.mlp_extractor = extractor


CHANGES = [
    change_layer,
    change_activation,
    change_features,
    change_extractor,
    lambda policy: policy.log_std.requires_grad_(False),
    lambda policy: policy.value_net.register_forward_hook(lambda module, inputs, outputs: 2 * outputs),
    lambda policy: policy.value_net.bias.register_hook(lambda gradient: gradient * 2),
    lambda policy: policy.mlp_extractor.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    lambda policy: setattr(policy, "features_extractor", th.nn.Identity()),
]
# What is computed by hand still: the networks are found anew
SMALL_CHANGES = [
    lambda policy: policy.register_parameter("temperature", th.nn.Parameter(th.ones(1))),
    lambda policy: setattr(policy, "value_net", copy.deepcopy(policy.value_net)),
    lambda policy: setattr(policy.action_net, "weight", th.nn.Parameter(2 * policy.action_net.weight.detach())),
    lambda policy: policy.load_state_dict({name: 2 * value for name, value in policy.state_dict().items()}),
]


def trained_after(change, by_hand: bool, monkeypatch) -> tuple[bool, dict[str, th.Tensor], R2VPO]:
    """A model whose policy is changed between two updates, and its weights"""
    with monkeypatch.context() as patch:
        if not by_hand:
            patch.setattr("sb3_r2vpo.common.policies.networks", lambda policy: None)
        model = R2VPO("MlpPolicy", RandomEnv(VECTOR, spaces.Box(-1, 1, (2,))), **SMALL).learn(32)
        th.manual_seed(1)
        policy = model.policy
        change(policy)
        # Parameters that were replaced would not be in it
        policy.optimizer = FlatAdam(policy.parameters(), eps=1e-5)
        evaluation = policy.evaluate(th.zeros(4, 3), th.zeros(4, 2), with_values=True)
        before = weights(model)
        model.learn(32, reset_num_timesteps=False)
        assert not th.equal(weights(model), before)
        return evaluation is not None, {name: p.detach() for name, p in policy.named_parameters()}, model


@pytest.mark.parametrize("change", [*CHANGES, *SMALL_CHANGES])
def test_policies_that_change_between_updates(change, monkeypatch):
    """Are left to autograd, unless they are still what is written out, and train as by autograd alone."""
    (by_hand, ours, model), (_, theirs, _) = (trained_after(change, by_hand, monkeypatch) for by_hand in (True, False))
    assert by_hand == (change in SMALL_CHANGES)
    assert_same_gradients(ours, theirs)
    assert logged(model).keys() >= {"train/policy_grad_norm", "train/value_grad_norm"}


@pytest.mark.parametrize("settings", [{"use_sde": True}, {"policy_kwargs": {"log_std_init": -1, "activation_fn": th.nn.ELU}}])
def test_variants_of_the_policy_that_are_left_to_autograd(settings):
    policy = R2VPO("MlpPolicy", "Pendulum-v1", **settings).policy
    assert written_out(policy) is None
    assert policy.evaluate(*samples_of(policy), with_values=True) is None
    assert policy.regress_values(samples_of(policy)[0], th.zeros(50)) is None


def test_mlp_policy_is_sb3s():
    """By default it is what is written out, with SB3's state dict and SB3's initial weights."""
    ours, theirs = (algorithm("MlpPolicy", "Pendulum-v1", **SMALL).policy for algorithm in (R2VPO, PPO))
    assert type(ours) is MlpPolicy
    assert written_out(ours) is not None
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(th.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
@pytest.mark.parametrize("settings", [{}, {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 2}}])
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD, th.optim.AdamW])
def test_by_hand_is_as_by_autograd_with_any_optimizer(optimizer_class, algorithm, settings, monkeypatch):
    settings = SMALL | settings | {"ent_coef": 0.01, "policy_kwargs": {"optimizer_class": optimizer_class}}
    results = []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr("sb3_r2vpo.common.policies.networks", lambda policy: None)
        model = algorithm("MlpPolicy", "Pendulum-v1", **settings)
        assert (model.policy.evaluate(th.zeros(2, 3), th.zeros(2, 1), with_values=True) is not None) == by_hand
        results.append(weights(model.learn(96)))
    assert th.equal(*results)


@pytest.mark.parametrize("policy_class", [ActorCriticPolicy, MlpPolicy])
def test_an_overridden_evaluation_is_used(policy_class):
    class Shifted(policy_class):
        def evaluate_actions(self, obs, actions):
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values + 100, log_prob, entropy

        def predict_values(self, obs):
            return super().predict_values(obs) + 100

    policy = Shifted(VECTOR, spaces.Discrete(2), lambda _: 1e-3)
    values, *_ = evaluate(policy, th.zeros(4, 3), th.zeros(4, dtype=th.long))
    assert (values > 90).all()
    loss, _ = regress_values(policy, th.zeros(4, 3), th.zeros(4))
    assert loss > 8100


@pytest.mark.parametrize("policy_class", [ActorCriticPolicy, MlpPolicy])
def test_overridden_parts_are_used(policy_class):
    class OtherFeatures(policy_class):
        def extract_features(self, obs, features_extractor=None):
            return super().extract_features(2 * obs, features_extractor)

    class OtherDistribution(policy_class):
        def _get_action_dist_from_latent(self, latent_pi):
            return self.action_dist.proba_distribution(2 * self.action_net(latent_pi))

    for changed in (OtherFeatures, OtherDistribution):
        policy = changed(VECTOR, spaces.Discrete(2), lambda _: 1e-3)
        observations, actions = samples_of(policy)
        expected, results = policy.evaluate_actions(observations, actions), evaluate(policy, observations, actions)
        assert all(th.equal(a, b) for a, b in zip(results[:3], expected, strict=True))
        returns = th.randn(50)
        expected = th.nn.functional.mse_loss(policy.predict_values(observations).flatten(), returns)
        assert th.equal(regress_values(policy, observations, returns)[0], expected)


# --- optimizer ---------------------------------------------------------------------------------------------------------


def networks() -> list[th.nn.Module]:
    th.manual_seed(0)
    network = th.nn.Sequential(th.nn.Linear(5, 17), th.nn.Tanh(), th.nn.Linear(17, 3), th.nn.Linear(3, 1, bias=False))
    return [network, copy.deepcopy(network)]


def clip_and_step(optimizer, parameters, loss) -> None:
    """What :class:`Descent` stands for."""
    optimizer.zero_grad()
    loss.backward()
    th.nn.utils.clip_grad_norm_(parameters, 0.1)
    optimizer.step()


def descend(optimizer, parameters, loss) -> None:
    Descent(optimizer, parameters, 0.1)(loss)


def descend_by_hand(optimizer, parameters, loss) -> None:
    """With a backward pass that writes to the parameters' ``grad``."""

    def backward(loss: th.Tensor) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter, gradient in zip(trained, th.autograd.grad(loss, trained), strict=True):
            parameter.grad.copy_(gradient)

    Descent(optimizer, parameters, 0.1)(loss, backward=backward)


def train(network, optimizer, n_steps, descend=clip_and_step, parts=(slice(None),)) -> None:
    """Steps on all parameters, or in turn on parts of them, which the loss depends on."""
    th.manual_seed(1)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for part in parts:
            parameters = list(network.parameters())[part]
            trained = {id(parameter) for parameter in parameters}
            used = {name: p if id(p) in trained else p.detach() for name, p in network.named_parameters()}
            descend(optimizer, parameters, th.func.functional_call(network, used, th.randn(20, 5)).square().mean())


def assert_same(a: th.nn.Module, b: th.nn.Module) -> None:
    assert all(th.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


PARTS = {
    "all": [slice(None)],
    "apart": [slice(2), slice(2, None)],
    "overlapping": [slice(None), slice(3), slice(1, None)],
    "some": [slice(1, 3)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("descend", [descend, descend_by_hand])
@pytest.mark.parametrize("optimizer_class", [FlatAdam, th.optim.Adam, th.optim.SGD])
def test_descent_is_clipping_and_the_optimizer_bit_for_bit(optimizer_class, descend, parts):
    """Also on parts of the parameters, each with its own norm, whatever they have in common."""
    options = {} if optimizer_class is th.optim.SGD else {"eps": 1e-5}
    plain, flat = networks()
    plain_class = th.optim.Adam if optimizer_class is FlatAdam else optimizer_class
    train(plain, plain_class(plain.parameters(), lr=0.1, **options), 50, parts=parts)
    train(flat, optimizer_class(flat.parameters(), lr=0.1, **options), 50, descend, parts)
    assert_same(plain, flat)


def test_a_descent_may_be_kept_and_is_without_a_limit_by_none():
    plain, flat = networks()
    adam, flat_adam = th.optim.Adam(plain.parameters()), FlatAdam(flat.parameters())
    parameters = list(flat.parameters())
    descents = [Descent(flat_adam, parameters[:2], None), Descent(flat_adam, parameters[2:], math.inf)]
    for step in range(20):
        inputs = 100 * th.randn(20, 5)
        loss = plain(inputs).square().mean()
        adam.zero_grad()
        loss.backward(inputs=list(plain.parameters())[2 * (step % 2) :][: 2 if step % 2 == 0 else None])
        adam.step()
        accepted, _ = descents[step % 2](flat(inputs).square().mean())
        assert accepted
    assert_same(plain, flat)


def reload(network, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return network, optimizer


def copied(network, optimizer):
    return copy.deepcopy((network, optimizer))


def pickled(network, optimizer):
    return pickle.loads(pickle.dumps((network, optimizer)))


def stepped_by_itself(network, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        network(th.ones(3, 5)).square().mean().backward()
        optimizer.step()
    return network, optimizer


def closed(network, optimizer):
    def closure() -> th.Tensor:
        optimizer.zero_grad()
        loss = network(th.ones(3, 5)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return network, optimizer


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("event", [reload, copied, pickled, stepped_by_itself, closed])
def test_flat_adam_is_adam_after_all_that_may_happen_to_it(event, parts):
    plain, flat = networks()
    adam, flat_adam = th.optim.Adam(plain.parameters(), eps=1e-5), FlatAdam(flat.parameters(), eps=1e-5)
    for _ in range(3):
        train(plain, adam, 3, parts=parts)
        train(flat, flat_adam, 3, descend, parts)
        (plain, adam), (flat, flat_adam) = event(plain, adam), event(flat, flat_adam)
        assert_same(plain, flat)
    assert type(flat_adam) is FlatAdam
    state, flat_state = adam.state_dict(), flat_adam.state_dict()
    assert state["state"].keys() == flat_state["state"].keys()
    for number, theirs in state["state"].items():
        ours = flat_state["state"][number]
        assert ours.keys() == theirs.keys()
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)


def test_state_goes_from_adam_to_flat_adam_and_back():
    plain, flat = networks()
    adam, flat_adam = th.optim.Adam(plain.parameters()), FlatAdam(flat.parameters())
    train(plain, adam, 5)
    train(flat, flat_adam, 5, descend)
    state, flat_state = copy.deepcopy(adam.state_dict()), copy.deepcopy(flat_adam.state_dict())
    for ours, theirs in zip(flat_state["state"].values(), state["state"].values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)
    adam.load_state_dict(flat_state)
    flat_adam.load_state_dict(state)
    train(plain, adam, 5)
    train(flat, flat_adam, 5, descend)
    assert_same(plain, flat)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}, {"foreach": True}, {"maximize": True}])
def test_options_that_flat_adam_leaves_to_adam(options):
    plain, flat = networks()
    train(plain, th.optim.Adam(plain.parameters(), **options), 5)
    flat_adam = FlatAdam(flat.parameters(), **options)
    assert flat_adam.flatten([*flat.parameters()]) is None
    train(flat, flat_adam, 5, descend)
    assert_same(plain, flat)


def test_groups_are_left_to_adam():
    plain, flat = networks()
    optimizers = [
        optimizer_class([{"params": [*network[0].parameters()], "lr": 0.1}, {"params": [*network[2:].parameters()]}])
        for network, optimizer_class in ((plain, th.optim.Adam), (flat, FlatAdam))
    ]
    train(plain, optimizers[0], 5)
    train(flat, optimizers[1], 5, descend)
    assert_same(plain, flat)


@pytest.mark.parametrize("after", [0, 5])
def test_hooks_of_the_optimizer_are_called(after):
    """Whether they were registered before the first step or later, as by an average of the weights."""
    flat, _ = networks()
    optimizer, calls = FlatAdam(flat.parameters()), []
    train(flat, optimizer, after, descend)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    train(flat, optimizer, 2, descend)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("descend", [descend, descend_by_hand])
def test_parameters_without_a_gradient(descend):
    plain, flat = networks()
    for network in (plain, flat):
        network[2].requires_grad_(False)
    optimizers = th.optim.Adam(plain.parameters()), FlatAdam(flat.parameters())
    train(plain, optimizers[0], 5)
    train(flat, optimizers[1], 5, descend)
    # Thawed later: its number of steps differs from the others'
    for network in (plain, flat):
        network[2].requires_grad_(True)
    train(plain, optimizers[0], 5)
    train(flat, optimizers[1], 5, descend)
    assert_same(plain, flat)


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, FlatAdam])
def test_parameters_that_the_loss_does_not_depend_on(optimizer_class):
    """Have a norm of zero, and are left as they are; by turns with steps on all parameters."""
    plain, flat = networks()
    plain_class = th.optim.Adam if optimizer_class is FlatAdam else optimizer_class
    optimizers = [plain_class(plain.parameters(), lr=0.1), optimizer_class(flat.parameters(), lr=0.1)]
    th.manual_seed(1)
    descent = None
    for step in range(8):
        inputs = th.randn(20, 5)
        losses = [(network[0](inputs) if step % 4 == 1 else network(inputs)).square().mean() for network in (plain, flat)]
        optimizers[0].zero_grad()
        losses[0].backward()
        expected = [0.0 if parameter.grad is None else parameter.grad.norm().item() for parameter in plain.parameters()]
        th.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizers[0].step()
        # One for four steps
        descent = Descent(optimizers[1], [*flat.parameters()], 0.1) if step % 4 == 0 else descent
        accepted, norms = descent(losses[1])
        assert accepted
        th.testing.assert_close(norms, th.tensor(expected))
        assert_same(plain, flat)


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
    loss = network(th.ones(5)).sum() + gradient * network[0].bias[3]
    optimizer = optimizer_class(network.parameters(), lr=0.1)
    accepted, norms = Descent(optimizer, list(network.parameters()), 0.1)(loss, may_step)
    assert not accepted
    assert norms.isfinite().tolist() == [True, math.isfinite(gradient), True, True, True]
    assert_same(network, before)
    assert not any(state.get("step", 0) for state in optimizer.state.values())


@pytest.mark.parametrize(("gradient", "may_step"), [(math.nan, None), (math.inf, None), (1.0, th.tensor(False))])
def test_no_step_is_made_by_a_fused_optimizer(gradient, may_step):
    """Which decides on its own: whether it did is a tensor."""
    network, before = networks()
    optimizer = th.optim.Adam(network.parameters(), lr=0.1, fused=True)
    descend = Descent(optimizer, list(network.parameters()), 0.1)
    accepted, _ = descend(network(th.ones(5)).sum() + gradient * network[0].bias[3], may_step)
    assert isinstance(accepted, th.Tensor)
    assert not accepted
    assert_same(network, before)
    accepted, _ = descend(network(th.ones(5)).sum())
    assert accepted
    assert not th.equal(network[0].bias, before[0].bias)


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
@pytest.mark.parametrize("action_space", [*ACTION_SPACES, spaces.Box(-1, 1, (3, 2))], ids=str)
@pytest.mark.parametrize("correlated", [False, True])
def test_acting_is_that_of_sb3_bit_for_bit(action_space, observation_space, policy_kwargs, correlated):
    """From the same random numbers, by hand where the policy is plain; and so are calls with gradients or deterministic."""
    policy = MlpPolicy(observation_space, action_space, lambda _: 1e-3, **policy_kwargs)
    if correlated and not isinstance(action_space, spaces.Box):
        pytest.skip("noise is of Gaussian policies")
    observations = th.as_tensor(np.stack([observation_space.sample() for _ in range(7)]))
    n_actions = math.prod(action_space.shape)
    noise = th.randn(2, 7, n_actions)

    def act(forward) -> list[th.Tensor]:
        th.manual_seed(3)
        if correlated:
            policy.action_dist = CorrelatedGaussianDistribution(n_actions)
            policy.action_dist.start(noise)
        with th.no_grad():
            # The second is of the same step, and so of white noise
            results = [*forward(policy, observations), *forward(policy, observations)]
            results += forward(policy, observations, deterministic=True)
            if correlated:
                policy.action_dist.advance()
            results += forward(policy, observations)
        return [*results, *forward(policy, observations), th.rand(1)]

    assert (written_out(policy) is not None) == isinstance(action_space, spaces.Box | spaces.Discrete)
    expected, results = act(ActorCriticPolicy.forward), act(MlpPolicy.forward)
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype
        assert result.requires_grad == other.requires_grad
        assert th.equal(result, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_copies_of_a_policy_act_and_are_trained_with_their_own_weights(duplicate):
    """Such as a callback may make, in the middle of a rollout; and neither keeps anything of the other."""

    class Copies(BaseCallback):
        def _on_step(self) -> bool:
            self.copied = duplicate(self.model.policy)
            return True

    model, callback = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL | {"learning_rate": 0.0}), Copies()
    model.learn(32, callback=callback)
    observations, actions = samples_of(model.policy)

    def outputs(policy) -> list[th.Tensor]:
        th.manual_seed(2)
        with th.no_grad():
            acted = policy(observations)
        *evaluated, backward = policy.evaluate(observations, actions, with_values=True)
        found = gradients(policy, evaluated[0].mean() + evaluated[1].mean(), backward)
        return [*acted, *evaluated, *found.values()]

    expected = outputs(model.policy)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.zero_()
    assert all(th.equal(a, b) for a, b in zip(outputs(callback.copied), expected, strict=True))
    assert not th.equal(outputs(model.policy)[0], expected[0])


def test_an_overridden_forward_is_used():
    class Still(MlpPolicy):
        def forward(self, obs, deterministic=False):
            actions, values, log_prob = super().forward(obs, deterministic)
            return th.zeros_like(actions), values, log_prob

    model = R2VPO(Still, "Pendulum-v1", **SMALL).learn(32)
    assert written_out(model.policy) is not None
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
    settings = {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 2, "gae_lambda": 0.9}, "replay_capacity": 2}
    assert_compiled_agrees(R2VPOOff, "MlpPolicy", lambda: gym.make("Pendulum-v1"), **settings)
    assert not counters["graph_break"]
    model = R2VPOOff("MlpPolicy", "Pendulum-v1", compile=True, **SMALL | settings).learn(32)
    model.save(tmp_path / "model")
    loaded = R2VPOOff.load(tmp_path / "model", env=model.get_env()).learn(32)
    # Two minibatches in each of two passes over a rollout, before and after
    state = loaded.policy.optimizer.state
    critics = [parameter for name, parameter in loaded.policy.named_parameters() if "value" in name]
    assert {state[parameter]["step"].item() for parameter in critics} == {2 * 2 * 2}


@needs_compiler
@pytest.mark.slow
def test_compiled_agrees_on_dicts_and_multi_discrete():
    space = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
    assert_compiled_agrees(R2VPO, "MultiInputPolicy", lambda: RandomEnv(space, spaces.MultiDiscrete([2, 3])))


@needs_compiler
@pytest.mark.slow
def test_a_model_that_is_compiled_in_parts_leaves_the_next_one_whole():
    th.compiler.reset()
    R2VPO("MlpPolicy", RandomEnv(VECTOR, spaces.MultiDiscrete([2, 3])), compile=True, **SMALL).learn(32)
    counters.clear()
    assert_compiled_agrees(R2VPO, "MlpPolicy", lambda: gym.make("CartPole-v1"))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.slow
def test_later_updates_and_other_models_of_the_same_kind_are_not_compiled_anew():
    """Schedules and the multiplier change from update to update: they are tensors of the code, no constants."""
    th.compiler.reset()
    schedule = LinearSchedule(start=1e-3, end=1e-4, end_fraction=1.0)
    coefficients = {"learning_rate": schedule, "ent_coef": schedule, "clip_range_vf": schedule, "target_variance": schedule}
    for var_coef in ("auto", schedule):
        counters.clear()
        for _ in range(2):
            model = R2VPO("MlpPolicy", "Pendulum-v1", compile=True, **SMALL | coefficients | {"var_coef": var_coef})
            model.learn(3 * 32)
        assert counters["stats"]["unique_graphs"] <= 2, "one for each model"
        assert not counters["graph_break"]


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
    with pytest.raises(ValueError, match="squares overflow"):
        model.train()
    assert th.equal(weights(model), before)
    assert math.isfinite(model.policy_loss.multiplier.value.item())

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
    if not by_hand:
        monkeypatch.setattr("sb3_r2vpo.common.policies.networks", lambda policy: None)
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
    minibatches, update = list(model._minibatches(model._finished_rollouts())), model._make_update()
    th.cuda.set_sync_debug_mode("error")
    try:
        for batch in minibatches:
            update(batch)
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
