"""The mathematics on its own: what it imports, what a minibatch and an objective are, and a whole step by hand."""

import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch as th

from sb3_r2vpo.core.batch import Minibatch, constant_length_mean, sequence_mean, token_mean
from sb3_r2vpo.core.objectives import OBJECTIVES, entropy_compensation, ppo_clip, r2vpo, r2vpo_sequence, topr
from sb3_r2vpo.core.optim import Descent, FlatAdam
from sb3_r2vpo.core.policy_loss import PolicyLoss, RatioVarianceLoss, make_policy_loss
from sb3_r2vpo.core.update import Evaluation, Update, step

# --- imports ---------------------------------------------------------------------------------------------------------


def in_fresh_interpreter(code: str, tmp_path: Path) -> list[str]:
    """:return: The words that the code prints; warnings are errors"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


#: Needed by the rest of the package, or by its extras
OTHERS = [
    *("stable_baselines3", "sb3_contrib", "gymnasium", "shimmy", "dm_control", "mujoco", "envpool"),
    *("optuna", "pandas", "matplotlib", "tensorboard", "yaml", "transformers", "peft", "trl", "ray"),
]


def test_core_imports_pytorch_and_nothing_else(tmp_path):
    code = """
import sys
import torch
before = {*sys.modules}
import sb3_r2vpo.core
packages = {name.split(".")[0] for name in {*sys.modules} - before}
print(*sorted(packages - {*sys.stdlib_module_names} - {"torch", "sb3_r2vpo"}))
"""
    assert in_fresh_interpreter(code, tmp_path) == []


def test_core_is_used_without_the_rest(tmp_path):
    """The example of its docstring, and a step of an optimizer, in a process that then has none of the other packages."""
    code = f"""
import sys
import torch as th
from sb3_r2vpo.core import Descent, RatioVarianceLoss, token_mean
log_prob, mask = th.nn.Parameter(th.tensor([[0.1, -0.2], [0.3, 0.0]])), th.tensor([[True, True], [True, False]])
loss = RatioVarianceLoss("r2vpo", var_coef="auto", target_variance=0.01)
loss.follow_schedules(progress_remaining=1.0)
losses, deviation = loss(log_prob - th.zeros(2, 2), th.ones(2, 1))
accepted, _ = Descent(th.optim.Adam([log_prob]), [log_prob], 0.5)(token_mean(losses, mask))
loss.dual_step(token_mean(deviation.square(), mask), accepted)
assert accepted and loss.multiplier.value > 1 and log_prob[0, 0] > 0.1
print(*sorted({{*{OTHERS}}} & sys.modules.keys()))
"""
    assert in_fresh_interpreter(code, tmp_path) == []


@pytest.mark.parametrize(
    "imports",
    [
        "import sb3_r2vpo, gymnasium",
        "import gymnasium, sb3_r2vpo",
        "import sb3_r2vpo.core, gymnasium",
        "import gymnasium.spaces, sb3_r2vpo.core",
        "import sb3_r2vpo, gymnasium.spaces, gymnasium",
        "import sb3_r2vpo; from importlib.util import find_spec; find_spec('gymnasium'); import gymnasium",
        "import sb3_r2vpo, sb3_r2vpo.envs, gymnasium",
    ],
)
def test_environments_are_registered_in_any_order_without_their_simulator(imports, tmp_path):
    code = f"""
{imports}
import sys
print(gymnasium.spec("dm_control/walker-run-v0").id)
print(*sorted({{"stable_baselines3", "shimmy", "dm_control", "mujoco"}} & sys.modules.keys()))
"""
    assert in_fresh_interpreter(code, tmp_path) == ["dm_control/walker-run-v0"]


@pytest.mark.parametrize("imports", ["import stable_baselines3, sb3_r2vpo", "from sb3_r2vpo import R2VPO"])
def test_environments_are_registered_with_stable_baselines3(imports, tmp_path):
    code = f"{imports}; import gymnasium; print(gymnasium.spec('dm_control/walker-run-v0').max_episode_steps)"
    assert in_fresh_interpreter(code, tmp_path) == ["1000"]


def test_without_gymnasium_it_is_gymnasium_that_is_missing(tmp_path):
    """What registers the environments does not hide that there is nothing to register them with."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path, target=None):
        if name == "gymnasium":
            raise ModuleNotFoundError("No module named 'gymnasium'", name=name)
sys.meta_path.insert(0, Missing())
import sb3_r2vpo.core
for _ in range(2):
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert in_fresh_interpreter(code, tmp_path) == ["gymnasium"] * 2


def test_public_names():
    import sb3_r2vpo
    import sb3_r2vpo.core

    assert all(hasattr(sb3_r2vpo.core, name) for name in sb3_r2vpo.core.__all__)
    assert {"R2VPO", "R2VPOOff", "__version__"} <= {*sb3_r2vpo.__all__} <= {*dir(sb3_r2vpo)}
    assert sb3_r2vpo.R2VPOOff is sb3_r2vpo.r2vpo_off.R2VPOOff
    with pytest.raises(AttributeError, match="'sb3_r2vpo' has no attribute 'PPO'"):
        _ = sb3_r2vpo.PPO


# --- a minibatch -----------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    observations: th.Tensor
    actions: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


def samples(**fields: th.Tensor) -> Samples:
    return Samples(**{name: fields.get(name) for name in Samples._fields})


MASK = np.array([[True, True, False], [True, False, False], [False, False, False]])


def padded(rng: np.random.Generator) -> tuple[np.ndarray, th.Tensor]:
    """Numbers where the mask is set, and NaN, which must not get through, elsewhere"""
    values = np.where(MASK, rng.normal(size=MASK.shape), np.nan)
    return values, th.as_tensor(values)


def test_mean_of_a_minibatch():
    values, tensor = padded(np.random.default_rng(0))
    mask = th.as_tensor(MASK)
    assert Minibatch(samples(), mask).mean(tensor).item() == pytest.approx(values[MASK].mean())
    assert Minibatch(samples(), mask, token_mean).mean(tensor).item() == pytest.approx(values[MASK].mean())
    by_sequence = (values[0, :2].mean() + values[1, 0]) / 2
    assert Minibatch(samples(), mask, sequence_mean).mean(tensor).item() == pytest.approx(by_sequence)
    constant = Minibatch(samples(), mask, lambda x, m: constant_length_mean(x, m, max_length=7))
    assert constant.mean(tensor).item() == pytest.approx(values[MASK].sum() / 3 / 7)
    # Without a mask, however masked values would be averaged
    assert Minibatch(samples(), average=sequence_mean).mean(tensor[0, :2]).item() == pytest.approx(values[0, :2].mean())


def test_what_counts_of_a_minibatch():
    values, tensor = padded(np.random.default_rng(0))
    batch = Minibatch(samples(), th.as_tensor(MASK))
    np.testing.assert_array_equal(batch.select(tensor).numpy(), values[MASK])
    # Of whole sequences: there is no padding among them
    for per_sequence in (th.randn(3), th.randn(3, 1)):
        assert batch.select(per_sequence) is per_sequence
    assert Minibatch(samples()).select(tensor) is tensor


def test_normalized_advantages():
    advantages = np.random.default_rng(0).normal(3, 2, size=50)
    batch = Minibatch(samples(advantages=th.as_tensor(advantages)))
    expected = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch.normalized_advantages().numpy(), expected)
    # Of one there is no standard deviation
    alone = Minibatch(samples(advantages=th.tensor([3.0])))
    assert alone.normalized_advantages().tolist() == [3.0]


def test_normalized_advantages_of_what_counts():
    values, tensor = padded(np.random.default_rng(0))
    counted = values[MASK]
    normalized = Minibatch(samples(advantages=tensor), th.as_tensor(MASK)).normalized_advantages().numpy()
    np.testing.assert_allclose(normalized[MASK], (counted - counted.mean()) / (counted.std(ddof=1) + 1e-8))
    alone = th.as_tensor(MASK) & th.tensor([[False], [True], [True]])
    np.testing.assert_array_equal(Minibatch(samples(advantages=tensor), alone).normalized_advantages()[1, 0], values[1, 0])
    # One for each sequence
    per_sequence = th.tensor([[1.0], [2.0], [6.0]], dtype=th.float64)
    batch = Minibatch(samples(advantages=per_sequence), th.as_tensor(MASK))
    expected = (per_sequence.numpy() - 3) / (np.std([1, 2, 6], ddof=1) + 1e-8)
    np.testing.assert_allclose(batch.normalized_advantages().numpy(), expected)


# --- an objective with its coefficients ------------------------------------------------------------------------------

LOG_RATIO, ADVANTAGES = th.tensor([0.3, -0.2, 0.0, 0.7]), th.tensor([1.0, -2.0, 0.5, 2.0])


def equal(ours, theirs) -> bool:
    return all(th.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_their_functions(name):
    kwargs = {"kl_coef": 0.3} if name == "exact_kl" else {}
    loss = make_policy_loss(name, 0.7, 0.01, options=kwargs)
    loss.follow_schedules(1.0)
    is_ours = name.startswith("r2vpo")
    assert isinstance(loss, RatioVarianceLoss) == is_ours
    old = {"old_log_prob": th.full_like(LOG_RATIO, -1.0)}
    needed = old if name == "dppo" else {}
    expected = OBJECTIVES[name](LOG_RATIO, ADVANTAGES, **kwargs, **needed, **({"var_coef": 0.7} if is_ours else {}))
    for ours, theirs in zip(loss(LOG_RATIO, ADVANTAGES, **old), expected, strict=True):
        th.testing.assert_close(ours, theirs)
    assert (loss.entropy_bonus(th.tensor(0.1)) is None) == (name != "r2vpo" or loss.n_actions is None)
    assert loss.logged() == pytest.approx({"var_coef": 0.7} if is_ours else kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ppo", {}, "Unknown `objective` 'ppo'; choose one of r2vpo, r2vpo_sequence, ppo_clip"),
        ("ppo_clip", {"clip": 0.1}, r"got `objective_kwargs` \['clip'\]; it takes \['clip_range'\], of which it needs none"),
        ("topr", {"sequence_log_ratio": 0.1}, "it takes none"),
        ("exact_kl", {}, r"it takes \['kl_coef'\], of which it needs \['kl_coef'\]"),
        ("exact_kl", {"kl_coef": 1.0, "beta": 2.0}, r"got `objective_kwargs` \['beta', 'kl_coef'\]"),
        ("spo", {"compensate_entropy": False}, r"it takes \['clip_range'\]"),
        ("r2vpo", {"clip_range": 0.2}, r"it takes \['compensate_entropy', 'dual_learning_rate', 'min_var_coef'\]"),
        ("r2vpo_sequence", {"clip_range": 0.2}, r"it takes \['compensate_entropy', 'dual_learning_rate', 'min_var_coef'\]"),
        ("r2vpo", {"dual_learning_rate": -1.0}, "`dual_learning_rate` is -1.0"),
        ("r2vpo", {"dual_learning_rate": math.nan}, "`dual_learning_rate` is nan"),
        ("r2vpo", {"min_var_coef": math.inf}, "`min_var_coef` is inf"),
    ],
)
def test_unknown_missing_and_bad_options(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_policy_loss(name, "auto", 0.01, options=kwargs)


@pytest.mark.parametrize("target_variance", [0.0, -0.1, math.nan, math.inf])
def test_bad_target_variance(target_variance):
    with pytest.raises(ValueError, match="`target_variance` is"):
        RatioVarianceLoss("r2vpo", "auto", target_variance)


def test_coefficients_follow_their_schedules():
    loss = PolicyLoss("ppo_clip", clip_range=lambda progress: 0.4 * progress)
    for progress in (1.0, 0.25):
        loss.follow_schedules(progress)
        assert loss.logged() == {"clip_range": pytest.approx(0.4 * progress)}
        assert equal(loss(LOG_RATIO, ADVANTAGES), ppo_clip(LOG_RATIO, ADVANTAGES, clip_range=0.4 * progress))
    # Compiled code takes tensors
    loss.follow_schedules(0.5, th.tensor)
    assert th.equal(loss.coefficients["clip_range"], th.tensor(0.2))

    loss = RatioVarianceLoss("r2vpo", lambda progress: progress, lambda progress: 0.02 * progress)
    loss.follow_schedules(0.5)
    assert loss.multiplier.value.item() == 0.5
    assert loss.target_variance.item() == pytest.approx(0.01)
    assert equal(loss(LOG_RATIO, ADVANTAGES), r2vpo(LOG_RATIO, ADVANTAGES, var_coef=0.5))
    # Nothing to hold where the multiplier is fixed
    assert loss.logged() == {"var_coef": 0.5}
    loss = RatioVarianceLoss("r2vpo", "auto_0.5", lambda progress: 0.02 * progress)
    loss.follow_schedules(0.5)
    assert loss.logged() == pytest.approx({"var_coef": 0.5, "target_variance": 0.01})


def test_ratio_of_a_whole_response_is_that_of_its_tokens():
    log_ratio, advantages = th.tensor([[-0.5, 0.2, 0.0], [0.3, 0.1, 0.2]]), th.tensor([[-1.0], [-1.0]])
    totals = log_ratio.sum(-1, keepdim=True)
    for name, function, coefficients in (("topr", topr, {}), ("r2vpo_sequence", r2vpo_sequence, {"var_coef": th.tensor(0.7)})):
        loss = make_policy_loss(name, 0.7, 0.01)
        loss.follow_schedules(1.0)
        expected = function(log_ratio, advantages, sequence_log_ratio=totals, **coefficients)
        assert equal(loss(log_ratio, advantages), expected)
        # Of one dimension, each sample is an action of its own
        assert equal(loss(LOG_RATIO, ADVANTAGES), function(LOG_RATIO, ADVANTAGES, **coefficients))


@pytest.mark.parametrize(
    ("name", "kwargs", "n_actions"),
    [
        ("r2vpo", {}, 3),
        ("r2vpo", {}, None),
        ("r2vpo", {"compensate_entropy": False}, 3),
        ("r2vpo_sequence", {}, 3),
        ("ppo_clip", {}, 3),
    ],
)
def test_entropy_bonus(name, kwargs, n_actions):
    loss = make_policy_loss(name, 0.5, 0.01, n_actions, kwargs)
    loss.follow_schedules(1.0)
    bonus = loss.entropy_bonus(th.tensor(0.06))
    if name == "r2vpo" and not kwargs and n_actions is not None:
        th.testing.assert_close(bonus, entropy_compensation(th.tensor(0.06), 3, var_coef=0.5))
        th.testing.assert_close(bonus, th.tensor(0.02))
    else:
        assert bonus is None


@pytest.mark.parametrize("as_tensor", [False, True])
def test_dual_step(as_tensor):
    """Whether the step was made is known to the host, or to the device alone."""
    loss = RatioVarianceLoss("r2vpo", "auto_0.5", 0.02, dual_learning_rate=0.1)
    loss.follow_schedules(1.0)
    for accepted, variance, expected in ((True, 0.12, 0.51), (False, 0.12, 0.51), (False, math.nan, 0.51), (True, 0.0, 0.508)):
        loss.dual_step(th.tensor(variance), th.tensor(accepted) if as_tensor else accepted)
        assert loss.multiplier.value.item() == pytest.approx(expected)
    fixed = RatioVarianceLoss("r2vpo", 0.5, 0.02)
    fixed.follow_schedules(1.0)
    fixed.dual_step(th.tensor(0.5), th.tensor(True) if as_tensor else True)
    assert fixed.multiplier.value.item() == 0.5


# --- one step by hand ------------------------------------------------------------------------------------------------

N_SAMPLES, N_INPUTS, N_ACTIONS, VF_COEF = 6, 3, 2, 0.5
Weights = dict[str, np.ndarray]


class LinearPolicy(th.nn.Module):
    """A Gaussian whose mean is linear in the observation, and a linear critic, in float64."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, th.nn.Parameter(th.as_tensor(weight.copy())))

    def evaluate(self, batch: Samples) -> Evaluation:
        distribution = th.distributions.Normal(batch.observations @ self.actor, self.log_std.exp())
        log_prob, entropy = distribution.log_prob(batch.actions).sum(-1), distribution.entropy().sum(-1)
        return Evaluation(batch.observations @ self.critic, log_prob, entropy)

    def weights(self) -> Weights:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.named_parameters()}


class Critic:
    vf_coef = VF_COEF

    def loss(self, values: th.Tensor, batch: Minibatch) -> th.Tensor:
        return (values - batch.samples.returns).square().mean()


def initial_weights() -> Weights:
    rng = np.random.default_rng(1)
    shapes = {"actor": (N_INPUTS, N_ACTIONS), "log_std": (N_ACTIONS,), "critic": (N_INPUTS,)}
    return {name: 0.3 * rng.normal(size=shape) for name, shape in shapes.items()}


def log_prob_by_hand(weights: Weights, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    distance = (actions - obs @ weights["actor"]) / np.exp(weights["log_std"])
    return (-0.5 * distance**2 - weights["log_std"] - 0.5 * np.log(2 * np.pi)).sum(axis=1)


def rollout() -> dict[str, np.ndarray]:
    """Actions of a policy that is a little behind the current one"""
    rng = np.random.default_rng(2)
    behind = {name: weight + 0.3 * rng.normal(size=weight.shape) for name, weight in initial_weights().items()}
    obs, noise = rng.normal(size=(N_SAMPLES, N_INPUTS)), rng.normal(size=(N_SAMPLES, N_ACTIONS))
    actions = obs @ behind["actor"] + noise * np.exp(behind["log_std"])
    old_log_prob = log_prob_by_hand(behind, obs, actions)
    advantages, returns = rng.normal(2, 3, size=(2, N_SAMPLES))
    arrays = {"observations": obs, "actions": actions, "old_log_prob": old_log_prob}
    return {**arrays, "advantages": advantages, "returns": returns}


def tensors(arrays: dict[str, np.ndarray]) -> Samples:
    return samples(**{name: th.as_tensor(array) for name, array in arrays.items()})


def step_by_hand(
    weights: Weights, data: dict[str, np.ndarray], var_coef: float, ent_coef: float, compensates: bool, normalize: bool
) -> tuple[Weights, dict[str, float]]:
    """The gradient of R2VPO's loss, written out, and its statistics."""
    obs, actions, n_samples = data["observations"], data["actions"], len(data["observations"])
    advantages = data["advantages"]
    if normalize:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    log_ratio = log_prob_by_hand(weights, obs, actions) - data["old_log_prob"]
    ratio, std = np.exp(log_ratio), np.exp(weights["log_std"])
    values = obs @ weights["critic"]
    entropy = (weights["log_std"] + 0.5 * np.log(2 * np.pi * np.e)).sum()
    variance = ((ratio - 1) ** 2).mean()
    coefficient = ent_coef + (2 * var_coef * variance / N_ACTIONS if compensates else 0.0)
    policy_loss = (-ratio * advantages + var_coef * (ratio - 1) ** 2).mean()
    value_loss = ((values - data["returns"]) ** 2).mean()
    # d loss / d log pi, for each sample; then by the chain rule
    by_log_prob = -ratio * (advantages - 2 * var_coef * (ratio - 1)) / n_samples
    deviation = actions - obs @ weights["actor"]
    gradients = {
        "actor": obs.T @ (by_log_prob[:, None] * deviation / std**2),
        "log_std": (by_log_prob[:, None] * (deviation**2 / std**2 - 1)).sum(axis=0) - coefficient,
        "critic": VF_COEF * 2 / n_samples * obs.T @ (values - data["returns"]),
    }
    statistics = {
        "ratio_variance": variance,
        "policy_gradient_loss": policy_loss,
        "entropy_loss": -entropy,
        "value_loss": value_loss,
        "loss": policy_loss - coefficient * entropy + VF_COEF * value_loss,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "ent_coef": coefficient,
    }
    return gradients, statistics


def make_update(policy: LinearPolicy, optimizer: th.optim.Optimizer, max_norm: float | None = None, **kwargs) -> Update:
    objective = kwargs.pop("objective", None) or RatioVarianceLoss("r2vpo", "auto_0.75", 0.02, N_ACTIONS)
    objective.follow_schedules(1.0)
    descend = Descent(optimizer, list(policy.parameters()), max_norm)
    return Update(policy.evaluate, objective, Critic(), descend, **kwargs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("compensates", [True, False])
@pytest.mark.parametrize("ent_coef", [None, 0.03])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_is_the_one_written_out_by_hand(max_norm, ent_coef, compensates, normalize):
    """Loss, gradients, clipping, plain gradient descent, and the multiplier, in float64."""
    data, weights, learning_rate = rollout(), initial_weights(), 0.1
    policy = LinearPolicy(weights)
    objective = RatioVarianceLoss(
        "r2vpo", "auto_0.75", 0.02, N_ACTIONS, dual_learning_rate=0.25, compensate_entropy=compensates
    )
    update = make_update(
        policy,
        th.optim.SGD(policy.parameters(), lr=learning_rate),
        max_norm,
        objective=objective,
        ent_coef=None if ent_coef is None else th.tensor(ent_coef, dtype=th.float64),
        normalize_advantage=normalize,
        target_kl=10.0,
    )
    statistics = step(update, Minibatch(tensors(data)))

    gradients, expected = step_by_hand(weights, data, 0.75, ent_coef or 0.0, compensates, normalize)
    norms = [np.linalg.norm(gradients[name]) for name, _ in policy.named_parameters()]
    total = np.linalg.norm(norms)
    assert total > 0.6, "it is to be clipped"
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (total + 1e-6))
    for name, weight in policy.weights().items():
        np.testing.assert_allclose(weight, weights[name] - learning_rate * factor * gradients[name], rtol=1e-10, atol=1e-12)
    if ent_coef is None and not compensates:
        del expected["ent_coef"]
    assert statistics.keys() == {*expected, "log_ratio", "grad_norms"}
    for name, value in expected.items():
        # The target and the multiplier are float32
        assert statistics[name].item() == pytest.approx(value, rel=1e-6), name
        assert not statistics[name].requires_grad
    np.testing.assert_allclose(statistics["grad_norms"].numpy(), norms, rtol=1e-6)
    violation = min(expected["ratio_variance"] - 0.02, 1.0)
    assert objective.multiplier.value.item() == pytest.approx(0.75 + 0.25 * violation, rel=1e-6)


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, FlatAdam])
def test_steps_of_adam_are_those_written_out_by_hand(optimizer_class):
    """Three of them, with the multiplier of each."""
    data, weights, learning_rate, max_norm = rollout(), initial_weights(), 0.1, 0.5
    policy = LinearPolicy(weights)
    update = make_update(policy, optimizer_class(policy.parameters(), lr=learning_rate, eps=1e-5), max_norm)
    var_coef = 0.75
    moments = {name: (np.zeros_like(weight), np.zeros_like(weight)) for name, weight in weights.items()}
    for number in (1, 2, 3):
        step(update, Minibatch(tensors(data)))
        gradients, statistics = step_by_hand(weights, data, var_coef, 0.0, True, True)
        total = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, max_norm / (total + 1e-6))
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = first, second
            denominator = np.sqrt(second / (1 - 0.999**number)) + 1e-5
            weights[name] = weights[name] - learning_rate * first / (1 - 0.9**number) / denominator
        # The multiplier is float32
        for name, weight in policy.weights().items():
            np.testing.assert_allclose(weight, weights[name], rtol=1e-6, atol=1e-7)
        var_coef = max(0.0, var_coef + 0.02 * (min(statistics["ratio_variance"] - 0.02, 1.0)))
        assert update.objective.multiplier.value.item() == pytest.approx(var_coef, rel=1e-5)


def test_padding_takes_no_part_in_a_step():
    """A minibatch of sequences, with any numbers at its padding, makes the step of the same samples without padding."""
    data = rollout()
    mask = np.array([[True, True, True, False], [True, False, False, False], [True, True, False, False]])
    flat, padded_policy = LinearPolicy(initial_weights()), LinearPolicy(initial_weights())

    def pad(array: np.ndarray) -> np.ndarray:
        result = np.full((*mask.shape, *array.shape[1:]), 1e3)
        result[mask] = array
        return result

    def evaluate(batch: Samples) -> Evaluation:
        rows = Samples(*(field.flatten(0, 1) for field in batch))
        values, log_prob, entropy, _ = padded_policy.evaluate(rows)
        return Evaluation(values, log_prob.reshape(mask.shape), entropy.reshape(mask.shape))

    class MaskedCritic(Critic):
        def loss(self, values: th.Tensor, batch: Minibatch) -> th.Tensor:
            return batch.select(values.reshape(mask.shape) - batch.samples.returns).square().mean()

    sequences = tensors({name: pad(array) for name, array in data.items()})
    statistics = []
    for policy, batch in ((flat, Minibatch(tensors(data))), (padded_policy, Minibatch(sequences, th.as_tensor(mask)))):
        update = make_update(policy, th.optim.SGD(policy.parameters(), lr=0.1), ent_coef=th.tensor(0.03), target_kl=10.0)
        if policy is padded_policy:
            update.evaluate, update.critic = evaluate, MaskedCritic()
        statistics.append(step(update, batch))
    for name, value in statistics[0].items():
        th.testing.assert_close(statistics[1][name], value, msg=lambda message, name=name: f"{name}: {message}")
    for name, weight in flat.weights().items():
        np.testing.assert_allclose(padded_policy.weights()[name], weight, rtol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("scale", "target_kl"), [(1.0, 1e-6), (math.nan, None), (math.inf, None)])
def test_no_step_and_no_dual_step(scale, target_kl, fused):
    """Beyond the limit of the KL divergence, or with a gradient that is not finite."""
    data, policy = rollout(), LinearPolicy(initial_weights())
    data["returns"][2] *= scale
    update = make_update(policy, th.optim.Adam(policy.parameters(), fused=fused), 0.5, target_kl=target_kl)
    statistics = step(update, Minibatch(tensors(data)))
    assert statistics["ratio_variance"] > 0.02
    if target_kl is not None:
        assert statistics["approx_kl"] > 1.5 * target_kl
    for name, weight in policy.weights().items():
        np.testing.assert_array_equal(weight, initial_weights()[name])
    assert update.objective.multiplier.value.item() == pytest.approx(0.75, abs=1e-7)


def test_step_without_values_and_without_a_closed_form_of_the_entropy():
    """A critic that is optimised separately leaves no value loss; -log pi estimates the entropy."""
    data, policy = rollout(), LinearPolicy(initial_weights())
    update = make_update(policy, th.optim.SGD(policy.parameters(), lr=0.1), ent_coef=th.tensor(0.03, dtype=th.float64))
    evaluate, log_probs = update.evaluate, []

    def without(batch: Samples) -> Evaluation:
        _, log_prob, _, backward = evaluate(batch)
        log_probs.append(log_prob.detach())
        return Evaluation(None, log_prob, None, backward)

    update.evaluate = without
    statistics = step(update, Minibatch(tensors(data)))
    assert "value_loss" not in statistics
    th.testing.assert_close(statistics["entropy_loss"], log_probs[0].mean())
    assert statistics["grad_norms"][[name for name, _ in policy.named_parameters()].index("critic")] == 0
    np.testing.assert_array_equal(policy.critic.detach().numpy(), initial_weights()["critic"])
    assert not np.array_equal(policy.actor.detach().numpy(), initial_weights()["actor"])


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, FlatAdam])
def test_backward_pass_of_the_policy_is_used(optimizer_class):
    """One that is written out: it writes to the parameters' gradients, whatever was in them."""
    results = []
    for written_out in (False, True):
        policy = LinearPolicy(initial_weights())
        update = make_update(policy, optimizer_class(policy.parameters(), lr=0.1), 0.5)
        parameters, evaluate = list(policy.parameters()), policy.evaluate

        def backward(loss: th.Tensor, parameters=parameters) -> None:
            for parameter, gradient in zip(parameters, th.autograd.grad(loss, parameters), strict=True):
                parameter.grad.copy_(gradient)

        if written_out:
            update.evaluate = lambda batch, evaluate=evaluate, backward=backward: evaluate(batch)._replace(backward=backward)
        for _ in range(3):
            step(update, Minibatch(tensors(rollout())))
        results.append(policy.weights())
    for name, weight in results[0].items():
        np.testing.assert_array_equal(results[1][name], weight)
