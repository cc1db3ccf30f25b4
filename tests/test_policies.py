"""The policies of our own: what they promise about their outputs, and that every on-policy algorithm takes them."""

import math
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.distributions import CensoredGaussianDistribution, censored_gaussian
from sb3_r2vpo.common.policies import LayerNormTanh, regress_values
from sb3_r2vpo.common.policies import evaluate as evaluate_policy
from sb3_r2vpo.r2vpo import CensoredMlpPolicy, CnnPolicy, LayerNormMlpPolicy, MlpPolicy, MultiInputPolicy

OBSERVATIONS, ACTIONS = spaces.Box(-np.inf, np.inf, (5,)), spaces.Box(-1, 1, (3,))
#: Nodes and weights of Gauss-Legendre quadrature from -1 to 1
QUADRATURE = np.polynomial.legendre.leggauss(500)


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


@pytest.mark.parametrize("policy_class", [LayerNormMlpPolicy, CensoredMlpPolicy, MlpPolicy])
@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff, PPO])
def test_every_on_policy_algorithm_trains_it_and_loads_it(algorithm, policy_class, tmp_path):
    arguments = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    model = algorithm(policy_class, "Pendulum-v1", policy_kwargs={"net_arch": [16]}, **arguments)
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


# --- the censored Gaussian ---------------------------------------------------------------------------------------------


def tensors(*numbers: float) -> list[th.Tensor]:
    return [th.tensor([number], dtype=th.float64, requires_grad=True) for number in numbers]


def evaluate(action: float, mean: float, std: float, low: float = -1.0, high: float = 1.0) -> tuple[float, float]:
    return tuple(value.item() for value in censored_gaussian(*tensors(action, mean, std, low, high)))


def test_probability_of_a_bound_is_that_of_all_beyond():
    tail = stats.norm.sf((1 - 0.3) / 0.5)
    for action in (1.0, 1.5, 100.0):
        assert evaluate(action, mean=0.3, std=0.5)[0] == pytest.approx(math.log(tail))
    assert evaluate(-1.0, mean=-0.3, std=0.5)[0] == pytest.approx(math.log(tail))
    assert evaluate(0.9, mean=0.3, std=0.5)[0] == pytest.approx(stats.norm.logpdf(0.9, 0.3, 0.5))


@given(mean=st.floats(-3, 3), std=st.floats(0.05, 5))
def test_probabilities_sum_to_one_and_entropy_is_minus_the_mean_log_probability(mean, std):
    """By Gauss-Legendre quadrature of what is between the bounds, and the two bounds."""
    nodes, weights = QUADRATURE
    actions = th.as_tensor(np.concatenate([nodes, [-1.0, 1.0]])).unsqueeze(1)
    bounds = th.tensor([-1.0], dtype=th.float64), th.tensor([1.0], dtype=th.float64)
    log_prob, entropy = censored_gaussian(actions, th.full_like(actions, mean), th.full_like(actions, std), *bounds)
    prob = log_prob.exp() * th.as_tensor(np.concatenate([weights, [1.0, 1.0]]))
    assert prob.sum().item() == pytest.approx(1, abs=1e-9)
    assert entropy[0].item() == pytest.approx(-(prob * log_prob).sum().item(), abs=1e-9)


def test_dimensions_are_summed_and_units_of_actions_do_not_matter():
    actions, mean = th.tensor([[0.2, -3.0, 0.9]]), th.tensor([[0.1, -0.5, 1.2]])
    std, low, high = th.tensor([0.3, 0.8, 0.4]), -th.ones(3), th.ones(3)
    log_prob, entropy = censored_gaussian(actions, mean, std, low, high)
    by_dimension = [censored_gaussian(*(x[..., i : i + 1] for x in (actions, mean, std, low, high))) for i in range(3)]
    th.testing.assert_close(log_prob, sum(x[0] for x in by_dimension))
    th.testing.assert_close(entropy, sum(x[1] for x in by_dimension))
    # Torques from 0 to 300
    rescaled = censored_gaussian(*(150 * x + 150 for x in (actions, mean)), 150 * std, th.zeros(3), th.full((3,), 300.0))
    th.testing.assert_close((log_prob, entropy), rescaled)


@given(shift=st.floats(-1, 1), scale=st.floats(0.7, 1.3), mean=st.floats(-1.5, 1.5), std=st.floats(0.3, 1.5))
def test_ratio_variance_is_at_most_that_of_the_gaussian(shift, scale, mean, std):
    """Data processing inequality, by the sum over a fine grid of what the behaviour policy does."""
    action = th.linspace(mean - 9 * std, mean + 9 * std, 20_001, dtype=th.float64).unsqueeze(1)
    weight = stats.norm.pdf(action.numpy().ravel(), mean, std)
    weight = th.as_tensor(weight / weight.sum())
    bounds = th.tensor([-1.0], dtype=th.float64), th.tensor([1.0], dtype=th.float64)

    def variance(bounds) -> float:
        before, after = (
            censored_gaussian(action, th.full_like(action, m), th.full_like(action, s), *bounds)[0]
            for m, s in ((mean, std), (mean + shift * std, scale * std))
        )
        return ((after - before).expm1().square() * weight).sum().item()

    unbounded = variance([100 * bound for bound in bounds])
    assert variance(bounds) <= unbounded * (1 + 1e-3) + 1e-9


def test_gradients_are_those_of_differences_and_finite_far_outside():
    actions = th.tensor([[0.3], [1.0], [-2.0], [0.999]], dtype=th.float64)
    bounds = [th.tensor([bound], dtype=th.float64) for bound in (-1.0, 1.0)]
    mean = th.tensor([[0.1], [0.8], [-1.3], [2.0]], dtype=th.float64, requires_grad=True)
    std = th.tensor([[0.4], [0.9], [0.2], [0.7]], dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(lambda m, s: censored_gaussian(actions, m, s, *bounds)[0], (mean, std))
    assert th.autograd.gradcheck(lambda s: censored_gaussian(actions, mean.detach(), s, *bounds)[1], std)

    mean, std = th.tensor([[-50.0], [50.0], [0.0]], requires_grad=True), th.full((3, 1), 0.01, requires_grad=True)
    log_prob, entropy = censored_gaussian(th.tensor([[2.0], [0.5], [1.0]]), mean, std, *(b.float() for b in bounds))
    (log_prob.sum() + entropy.sum()).backward()
    assert all(value.isfinite().all() for value in (log_prob, entropy, mean.grad, std.grad))
    # A bound that is improbable pulls as the Gaussian does
    assert mean.grad[0] > 0


def test_entropy_is_of_the_noise_and_has_enough_of_it():
    mean = th.tensor([[0.0], [0.9], [1.5]], requires_grad=True)
    slopes = []
    for number in (0.1, 1.0, 1.4, 1.6, 3.0):
        std = th.full((3, 1), number, requires_grad=True)
        censored_gaussian(mean.detach(), mean, std, -th.ones(1), th.ones(1))[1].sum().backward()
        slopes.append(std.grad[0].item() * number)
    # As a Gaussian's, where the bounds are far
    assert slopes[0] == pytest.approx(1, abs=1e-4)
    assert slopes[1:] == sorted(slopes[1:], reverse=True)
    assert slopes[2] > 0 > slopes[3]
    assert mean.grad is None or not mean.grad.any()


def test_samples_and_mode_are_actions():
    distribution = CensoredGaussianDistribution(spaces.Box(np.float32([-1, 0]), np.float32([1, 300])))
    th.manual_seed(0)
    distribution.proba_distribution(th.tensor([[2.0, 150.0]]).expand(10_000, 2), th.tensor([0.5, 150.0]).log())
    samples = distribution.sample()
    assert samples.min(0).values.tolist()[1] == 0
    assert samples.max(0).values.tolist() == [1, 300]
    assert distribution.mode()[0].tolist() == [1, 150]
    # The entropy is what it says of these samples
    assert distribution.entropy()[0].item() == pytest.approx(-distribution.log_prob(samples).mean().item(), abs=0.02)
    # Those on the bounds are there as often as they are said to be
    on_bound = (samples[:, 1] == 0).float().mean().item()
    assert on_bound == pytest.approx(stats.norm.cdf(-1), abs=0.01)


def test_samples_beyond_a_bound_say_no_more_about_the_mean_than_the_bound():
    """All of them are one and the same action, which is nearly certain."""
    for policy_class, informative in ((ActorCriticPolicy, True), (CensoredMlpPolicy, False)):
        policy = policy_class(OBSERVATIONS, ACTIONS, lambda _: 1e-3)
        policy.action_net.bias.data.fill_(30.0)
        _, log_prob, _ = policy.evaluate_actions(th.zeros(64, 5), 30 + th.randn(64, 3))
        log_prob.square().sum().backward()
        assert (policy.action_net.bias.grad.abs().max() > 0) == informative


@pytest.mark.parametrize("policy_class", [CensoredMlpPolicy, LayerNormMlpPolicy])
def test_evaluation_of_these_policies_is_their_own(policy_class):
    """Values, log-probabilities, entropies and gradients, which no written-out pass stands for."""
    policy = policy_class(OBSERVATIONS, ACTIONS, lambda _: 1e-3)
    observations, actions, returns = th.randn(50, 5), 2 * th.randn(50, 3), th.randn(50)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values, log_prob, entropy, *_ in (
            policy.evaluate_actions(observations, actions),
            evaluate_policy(policy, observations, actions),
        ):
            policy.zero_grad()
            (values.mean() + log_prob.exp().mean() + 0.3 * entropy.mean()).backward()
            results.append([values, log_prob, entropy, *(parameter.grad.clone() for parameter in policy.parameters())])
        loss, _ = regress_values(policy, observations, returns)
    assert all(th.equal(a, b) for a, b in zip(*results, strict=True))
    assert th.equal(loss, th.nn.functional.mse_loss(policy.predict_values(observations).flatten(), returns))
    assert evaluate_policy(policy, observations, actions, with_values=False).values is None


def test_policies_have_the_names_and_the_weights_of_sb3s():
    assert R2VPO.policy_aliases.keys() == PPO.policy_aliases.keys()
    for name, policy_class in {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy, "MultiInputPolicy": MultiInputPolicy}.items():
        assert R2VPO.policy_aliases[name] is R2VPOOff.policy_aliases[name] is policy_class
        assert issubclass(policy_class, PPO.policy_aliases[name])
    th.manual_seed(0)
    ours = MlpPolicy(OBSERVATIONS, ACTIONS, lambda _: 1e-3).state_dict()
    th.manual_seed(0)
    theirs = ActorCriticPolicy(OBSERVATIONS, ACTIONS, lambda _: 1e-3).state_dict()
    assert list(ours) == list(theirs)
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)


def test_what_has_no_bounds_can_not_be_censored():
    for space in (spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(3)):
        with pytest.raises(ValueError, match="finite bounds"):
            CensoredMlpPolicy(OBSERVATIONS, space, lambda _: 1e-3)
    with pytest.raises(ValueError, match="use_sde=False"):
        R2VPO(CensoredMlpPolicy, "Pendulum-v1", use_sde=True)
