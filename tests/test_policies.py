"""LayerNormMlpPolicy: what it promises about its outputs, and that every on-policy algorithm takes it."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.r2vpo import LayerNormMlpPolicy
from sb3_r2vpo.r2vpo.policies import LayerNormTanh

OBSERVATIONS, ACTIONS = spaces.Box(-np.inf, np.inf, (5,)), spaces.Box(-1, 1, (3,))


def make_policy(**kwargs) -> LayerNormMlpPolicy:
    th.manual_seed(0)
    return LayerNormMlpPolicy(OBSERVATIONS, ACTIONS, lambda _: 1e-3, **kwargs)


def test_first_layer_by_hand():
    layer = LayerNormTanh(OBSERVATIONS, features_dim=4)
    observations = th.randn(7, 5)
    linear = layer.layers[1]
    hidden = observations @ linear.weight.T + linear.bias
    normalized = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    th.testing.assert_close(layer(observations), normalized.tanh())


def test_actions_start_at_nearly_zero_however_large_the_observations():
    policy = make_policy()
    for scale in (1.0, 1e6):
        distribution = policy.get_distribution(scale * th.randn(100, 5)).distribution
        assert distribution.mean.abs().max() < 2e-3
        assert distribution.mean.abs().max() > 0
        th.testing.assert_close(distribution.stddev, th.full((100, 3), 0.6065), rtol=1e-3, atol=0)
    # The critic's head is not scaled down
    assert policy.predict_values(th.randn(100, 5)).std() > 0.05


def test_actor_and_critic_share_no_weights():
    policy = make_policy()
    policy.predict_values(th.randn(2, 5)).sum().backward()
    with_gradient = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None}
    assert with_gradient == {"vf_features_extractor", "mlp_extractor", "value_net"}
    assert all(p.grad is None for p in policy.mlp_extractor.policy_net.parameters())


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff, PPO])
def test_every_on_policy_algorithm_trains_it_and_loads_it(algorithm, tmp_path):
    arguments = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    model = algorithm(LayerNormMlpPolicy, "Pendulum-v1", policy_kwargs={"net_arch": [16]}, **arguments)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(128)
    after = model.policy.state_dict()
    assert all(not th.equal(before[name], after[name]) for name in before)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    observation = np.ones(3, dtype=np.float32)
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
