"""The newer objectives: loss and gradient by hand, what makes each of them different, and the path through PolicyLoss."""

import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_r2vpo import R2VPO
from sb3_r2vpo.core.baselines import ppo_clip
from sb3_r2vpo.core.objectives import OBJECTIVES, r2vpo
from sb3_r2vpo.core.policy_loss import PolicyLoss, RatioVarianceLoss, make_policy_loss
from sb3_r2vpo.core.ratio import ratio_minus_one
from sb3_r2vpo.core.relatives import (
    cispo,
    dppo,
    dro,
    dro_token,
    gipo,
    gspo,
    m2po,
    masked_importance_sampling,
    sapo,
    truncated_importance_sampling,
    vespo,
)

F64 = th.float64

#: What calls that don't go through PolicyLoss have to pass
REQUIRED = {
    "r2vpo": {"var_coef": 0.7},
    "r2vpo_sequence": {"var_coef": 0.7},
    "exact_kl": {"kl_coef": 1.4},
    "dppo": {"old_log_prob": th.tensor(0.5, dtype=F64).log()},
}


def logs(*ratios: float) -> th.Tensor:
    return th.tensor(ratios, dtype=F64).log().requires_grad_()


def loss_and_gradient(objective, log_ratio, advantages, **arguments):
    """:return: Losses, and the derivative of the *objective*, minus their sum, with respect to each log-probability"""
    losses, _ = objective(log_ratio, th.as_tensor(advantages, dtype=F64), **arguments)
    return losses.detach(), -th.autograd.grad(losses.sum(), log_ratio)[0]


def assert_values(actual: th.Tensor, expected) -> None:
    th.testing.assert_close(actual, th.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-12)


# --- by hand ---------------------------------------------------------------------------------------------------------

E, LN2 = math.e, math.log(2)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def soft_gate(ratio: float, temperature: float) -> tuple[float, float]:
    """SAPO's loss and gradient for an advantage of one"""
    p = logistic(temperature * (ratio - 1))
    return -4 / temperature * p, 4 * p * (1 - p) * ratio


@pytest.mark.parametrize(
    ("objective", "arguments", "advantage", "ratios", "losses", "gradients"),
    [
        # Weights of 1/2, 1, 3, and clipped at 5; the loss is that times -A log rho
        (cispo, {}, 1.0, (0.5, 1.0, 3.0, 8.0), (0.5 * LN2, 0.0, -3 * math.log(3), -15 * LN2), (0.5, 1.0, 3.0, 5.0)),
        (cispo, {}, -2.0, (0.5, 1.0, 3.0, 8.0), (-LN2, 0.0, 6 * math.log(3), 30 * LN2), (-1.0, -2.0, -6.0, -10.0)),
        (cispo, {"clip_low": 0.2, "clip_high": 0.28}, 1.0, (0.5, 1.0, 2.0), (0.8 * LN2, 0.0, -1.28 * LN2), (0.8, 1.0, 1.28)),
        # The sigmoid at rho = 2 and -1/2 + 1
        (sapo, {}, 1.0, (0.5, 1.0, 2.0), *zip(*(soft_gate(r, 1.0) for r in (0.5, 1.0, 2.0)), strict=True)),
        (sapo, {"temperature_pos": 2.0}, 1.0, (0.5, 1.0), (-2 * logistic(-1), -1.0), (2 * logistic(1) * logistic(-1), 1.0)),
        (sapo, {}, -1.0, (1.0, 2.0), (2 / 1.05, -soft_gate(2, 1.05)[0]), (-1.0, -soft_gate(2, 1.05)[1])),
        # w^2 e^(3 - 3w) for A >= 0, w^3 e^(2 - 2w) for A < 0
        (vespo, {}, 1.0, (0.5, 1.0, 2.0), (0.25 * E**1.5 * LN2, 0.0, -4 * E**-3 * LN2), (0.25 * E**1.5, 1.0, 4 * E**-3)),
        (vespo, {}, -1.0, (0.5, 1.0, 2.0), (-0.125 * E * LN2, 0.0, 8 * E**-2 * LN2), (-0.125 * E, -1.0, -8 * E**-2)),
        (vespo, {"power_neg": 1.0, "decay_neg": 0.0}, -1.0, (0.5, 2.0), (-0.5 * LN2, 2 * LN2), (-0.5, -2.0)),
        # e^(-1/2) at one standard deviation
        (gipo, {}, 1.0, (1.0, E, 1 / E), (-1.0, -(E**0.5), -(E**-1.5)), (1.0, E**0.5, E**-1.5)),
        (gipo, {"sigma": 0.5}, -1.0, (1.0, E, 1 / E), (1.0, E**-1, E**-3), (-1.0, -(E**-1), -(E**-3))),
        # A log rho - beta / 2 (log rho)^2, and A - beta log rho
        (dro, {}, 1.0, (1.0, E, E**2, 1 / E), (0.0, -0.5, 0.0, 1.5), (1.0, 0.0, -1.0, 2.0)),
        (dro, {"kl_coef": 0.5}, -1.0, (1.0, E, 1 / E), (0.0, 1.25, -0.75), (-1.0, -1.5, -0.5)),
        (dro_token, {"kl_coef": 0.5}, -1.0, (1.0, E, 1 / E), (0.0, 1.25, -0.75), (-1.0, -1.5, -0.5)),
        # Of one dimension each sample is an action of its own, clipped as PPO's
        (gspo, {}, 1.0, (0.9, 1.0, 1.0003, 1.0005), (-0.9, -1.0, -1.0003, -1.0004), (0.9, 1.0, 1.0003, 0.0)),
        (gspo, {}, -1.0, (0.9996, 0.9998, 1.1), (0.9997, 0.9998, 1.1), (0.0, -0.9998, -1.1)),
        # From a probability of 0.4 to 0.56 and 0.52; to 0.24 and 0.28, with the mask on one side only
        (dppo, {"old_log_prob": math.log(0.4)}, 1.0, (1.4, 1.3, 0.1), (0.0, -1.3, -0.1), (0.0, 1.3, 0.1)),
        (dppo, {"old_log_prob": math.log(0.4)}, -1.0, (0.6, 0.7, 2.0), (0.0, 0.7, 2.0), (0.0, -0.7, -2.0)),
        (dppo, {"old_log_prob": math.log(0.4), "delta_high": 0.05}, 1.0, (1.1, 1.2), (-1.1, 0.0), (1.1, 0.0)),
        (dppo, {"old_log_prob": math.log(0.4), "delta_low": 0.05}, -1.0, (0.9, 0.8), (0.9, 0.0), (-0.9, 0.0)),
        # A rare token may become ten times as likely
        (dppo, {"old_log_prob": math.log(0.01)}, 1.0, (10.0, 20.0), (-10.0, 0.0), (10.0, 0.0)),
    ],
)
def test_losses_and_gradients_by_hand(objective, arguments, advantage, ratios, losses, gradients):
    if "old_log_prob" in arguments:
        arguments = arguments | {"old_log_prob": th.tensor(arguments["old_log_prob"], dtype=F64)}
    actual_losses, actual_gradients = loss_and_gradient(objective, logs(*ratios), advantage, **arguments)
    assert_values(actual_losses, losses)
    assert_values(actual_gradients, gradients)


# --- M2PO ------------------------------------------------------------------------------------------------------------


def kept(log_ratio, advantages, **arguments) -> list[bool]:
    log_ratio = th.tensor(log_ratio, dtype=F64, requires_grad=True)
    losses, gradient = loss_and_gradient(m2po, log_ratio, advantages, **arguments)
    is_kept = losses != 0
    # What is left out has no gradient, what is kept that of the unclipped surrogate
    expected = log_ratio.detach().exp() * th.as_tensor(advantages, dtype=F64)
    th.testing.assert_close(losses, -expected * is_kept)
    th.testing.assert_close(gradient, expected * is_kept)
    return is_kept.tolist()


@pytest.mark.parametrize(
    ("log_ratio", "advantages", "threshold", "expected"),
    [
        # Of squares .01, .04, .09, .16 the mean is .075; .04667 without the last, .025 without the last two
        ([0.1, 0.4, 0.2, 0.3], 1.0, 0.04, [True, False, True, False]),
        ([0.1, 0.4, 0.2, 0.3], 1.0, 0.05, [True, False, True, True]),
        ([-0.1, -0.4, -0.2, -0.3], -1.0, 0.05, [True, False, True, True]),
        # All kept, at the threshold itself too (0.25 is exact)
        ([0.1, 0.4, 0.2, 0.3], 1.0, 0.08, [True] * 4),
        ([0.5, 0.5], 1.0, 0.25, [True, True]),
        # All left out: the smallest is too large already
        ([0.3, 0.5], 1.0, 0.04, [False, False]),
        ([-0.3, 0.5], [-1.0, 1.0], 0.0, [False, False]),
        # Those that move against their advantage, or have none, are never left out, and do not dilute the mean
        ([0.3, -9.0, 9.0, 0.1], [1.0, 1.0, -1.0, 1.0], 0.04, [False, True, True, True]),
        ([0.3, 0.0, 0.0, 0.0, 0.0], 1.0, 0.04, [False, True, True, True, True]),
        # Both sides of H together: the mean of .01 and .09 is .05
        ([0.1, -0.3], [1.0, -1.0], 0.05, [True, True]),
        ([0.1, -0.3], [1.0, -1.0], 0.049, [True, False]),
        # Ties: one by one, the later first. Of .01 and three of .09, the mean is .07, .0633, .05
        ([0.3, 0.3, 0.1, 0.3], 1.0, 0.0633, [True, False, True, False]),
        ([0.3, 0.3, 0.1, 0.3], 1.0, 0.065, [True, True, True, False]),
        ([0.3], 1.0, 0.04, [False]),
        ([0.3], -1.0, 0.04, [True]),
    ],
)
def test_m2po_leaves_out_the_largest_log_ratios(log_ratio, advantages, threshold, expected):
    assert kept(log_ratio, advantages, threshold=threshold) == expected


def test_m2po_default_threshold():
    assert kept([0.1, 0.2, 0.25], 1.0) == kept([0.1, 0.2, 0.25], 1.0, threshold=0.04) == [True, True, True]
    assert kept([0.1, 0.2, 0.3], 1.0) == [True, True, False]


def test_m2po_without_an_advantage():
    losses, gradient = loss_and_gradient(m2po, logs(2.0, 1.1), [0.0, 1.0])
    assert_values(losses, [0.0, -1.1])
    assert_values(gradient, [0.0, 1.1])


def brute_force_m2po(log_ratio: list[float], advantages: list[float], threshold: float) -> list[bool]:
    """Algorithm 1, one sample after the other"""
    mask = [True] * len(log_ratio)
    outward = [i for i, (x, a) in enumerate(zip(log_ratio, advantages, strict=True)) if x * a > 0]
    while outward and sum(log_ratio[i] ** 2 for i in outward) / len(outward) > threshold:
        largest = max(outward, key=lambda i: (log_ratio[i] ** 2, i))
        mask[largest] = False
        outward.remove(largest)
    return mask


@given(
    samples=st.lists(st.tuples(st.integers(-64, 64), st.sampled_from([-1.0, 0.5, 2.0])), min_size=1, max_size=30),
    threshold=st.sampled_from([0.0, 0.01, 0.04, 0.5]),
)
def test_m2po_is_the_papers_loop(samples, threshold):
    # Multiples of 1/64: their squares add up without rounding
    log_ratio, advantages = [x / 64 for x, _ in samples], [a for _, a in samples]
    assert kept(log_ratio, advantages, threshold=threshold) == brute_force_m2po(log_ratio, advantages, threshold)


@pytest.mark.parametrize("n_padding", [0, 1, 50])
def test_m2po_does_not_count_padding(n_padding):
    """Padding would make the mean smaller, and let more pass."""
    loss = PolicyLoss("m2po")
    log_ratio = th.tensor([[0.1, 0.4, *[7.0] * n_padding], [0.2, 0.3, *[7.0] * n_padding]], dtype=F64)
    mask = (log_ratio != 7.0).int()
    losses, _ = loss(log_ratio, th.ones(2, 1, dtype=F64), mask=mask)
    assert ((losses != 0)[:, :2]).tolist() == [[True, False], [True, False]]


# --- whole responses -------------------------------------------------------------------------------------------------

#: Two responses, of three tokens and of two: with ratios of 8 and 1/4 as wholes, 2 and 1/2 as means
RESPONSES = th.tensor([[2.0, 1.0, 4.0], [0.25, 1.0, 9.0]], dtype=F64).log()
MASK = th.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("name", "kwargs", "advantage", "losses", "gradients", "deviations"),
    [
        # -s A for each token; its gradient s A / |y| comes from all of them
        ("gspo", {"clip_low": 0.9, "clip_high": 3.0}, 1.0, [[-2.0] * 3, [-0.5] * 2], [[2.0] * 3, [0.5] * 2], [1.0, -0.5]),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.5}, 1.0, [[-1.5] * 3, [-0.5] * 2], [[0.0] * 3, [0.5] * 2], [1.0, -0.5]),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.5}, -1.0, [[2.0] * 3, [0.8] * 2], [[-2.0] * 3, [0.0] * 2], [1.0, -0.5]),
        # w^k e^(lambda (1 - w)) for all tokens
        (
            *("vespo", {"power_pos": 1.0, "decay_pos": 0.5}, 1.0),
            [[-8 * E**-3.5 * LN2, 0.0, -16 * E**-3.5 * LN2], [0.5 * E**0.375 * LN2, 0.0]],
            [[8 * E**-3.5] * 3, [0.25 * E**0.375] * 2],
            [7.0, -0.75],
        ),
        # A - beta log rho(y): the response is one action, its loss is spread over its tokens
        (
            *("dro", {"kl_coef": 0.5}, -1.0),
            [[LN2 + 0.75 * LN2**2, 0.0, 2 * LN2 + 1.5 * LN2**2], [-2 * LN2 + LN2**2, 0.0]],
            [[-1 - 1.5 * LN2] * 3, [-1 + LN2] * 2],
            [7.0, -0.75],
        ),
        # Each token by itself
        (
            *("dro_token", {"kl_coef": 0.5}, -1.0),
            [[LN2 + 0.25 * LN2**2, 0.0, 2 * LN2 + LN2**2], [-2 * LN2 + LN2**2, 0.0]],
            [[-1 - 0.5 * LN2, -1.0, -1 - LN2], [-1 + LN2, -1.0]],
            None,
        ),
    ],
)
def test_responses_by_hand(name, kwargs, advantage, losses, gradients, deviations):
    loss, log_ratio = PolicyLoss(name, **kwargs), RESPONSES.clone().requires_grad_()
    loss.follow_schedules(1.0)
    actual, deviation = loss(log_ratio, th.full((2, 1), advantage, dtype=F64), mask=MASK)
    assert_values(actual[MASK], [*losses[0], *losses[1]])
    (gradient,) = th.autograd.grad(-actual[MASK].sum(), log_ratio)
    assert_values(gradient[MASK], [*gradients[0], *gradients[1]])
    assert (gradient[~MASK] == 0).all()
    if deviations is None:
        th.testing.assert_close(deviation[MASK], ratio_minus_one(RESPONSES)[MASK])
    else:
        assert_values(deviation, [[deviations[0]] * 3, [deviations[1]] * 3])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_does_not_count(name):
    """More of it, whatever is in it, changes neither loss nor gradient nor statistics."""
    kwargs = {"kl_coef": 1.0} if name == "exact_kl" else {}
    loss = make_policy_loss(name, 0.7, 0.01, options=kwargs)
    loss.follow_schedules(1.0)
    advantages = th.tensor([[0.5], [-2.0]], dtype=F64)
    results = []
    for n_padding, filling in ((0, 0.0), (1, 0.0), (3, 5.0), (2, math.nan)):
        padding = th.full((2, n_padding), filling, dtype=F64)
        log_ratio = th.cat([0.3 * RESPONSES, padding], dim=-1)
        log_ratio[1, 2] = filling
        log_ratio.requires_grad_()
        mask = th.cat([MASK, th.zeros(2, n_padding, dtype=th.bool)], dim=-1)
        losses, deviation = loss(log_ratio, advantages, mask=mask, old_log_prob=th.full_like(log_ratio, -1.0))
        (gradient,) = th.autograd.grad(losses[mask].sum(), log_ratio)
        assert (gradient[~mask] == 0).all()
        results.append((losses[mask], deviation[mask], gradient[mask], loss.action_log_ratio(log_ratio, mask)))
    for other in results[1:]:
        th.testing.assert_close(other, results[0])


def test_half_precision_sums_over_tokens_in_float32():
    loss = PolicyLoss("dro")
    log_ratio = th.full((1, 1000), 1e-2, dtype=th.bfloat16)
    _, deviation = loss(log_ratio, th.ones(1, 1))
    assert deviation[0, 0].item() == pytest.approx(math.expm1(1000 * log_ratio[0, 0].item()), rel=1e-3)


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    advantages=st.lists(st.floats(-10, 10), min_size=6, max_size=6),
    behaviour=st.floats(-30, 0),
)
def test_the_policy_gradient_at_ratio_one(name, advantages, behaviour):
    """Of tokens and of responses: nothing is clipped, masked or weighed before the policy has moved."""
    kwargs = {"kl_coef": 1.0} if name == "exact_kl" else {}
    loss = make_policy_loss(name, 0.7, 0.01, options=kwargs)
    loss.follow_schedules(1.0)
    flat = th.tensor(advantages, dtype=F64)
    log_ratio = th.zeros(6, dtype=F64, requires_grad=True)
    losses, deviation = loss(log_ratio, flat, old_log_prob=th.full((6,), behaviour, dtype=F64))
    th.testing.assert_close(-th.autograd.grad(losses.sum(), log_ratio)[0], flat)
    assert (deviation == 0).all()
    # Responses of three tokens; R2VPO's loss of a response is that of each of its tokens, all of which push it
    log_ratio = th.zeros(2, 3, dtype=F64, requires_grad=True)
    losses, _ = loss(log_ratio, flat[:2, None], old_log_prob=th.full((2, 3), behaviour, dtype=F64))
    expected = flat[:2, None].expand(2, 3) * (3 if name == "r2vpo_sequence" else 1)
    th.testing.assert_close(-th.autograd.grad(losses.sum(), log_ratio)[0], expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_control_flow_depends_on_data(name):
    """Traced without a break, forward and backward: what `torch.compile` needs. Its result is that of plain code."""
    kwargs = {"kl_coef": th.tensor(1.0)} if name == "exact_kl" else {}
    arguments = {key: value for key, value in REQUIRED.get(name, {}).items() if key != "kl_coef"} | kwargs
    log_ratio, advantages = th.randn(64).mul(0.3), th.randn(64)

    def gradient(x: th.Tensor) -> th.Tensor:
        x = x.clone().requires_grad_()
        losses, _ = OBJECTIVES[name](x, advantages, **arguments)
        losses.sum().backward()
        return x.grad

    def losses(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return OBJECTIVES[name](x, advantages, **arguments)

    th._dynamo.reset()
    traced = th.compile(losses, backend="aot_eager", fullgraph=True)
    x = log_ratio.clone().requires_grad_()
    actual = traced(x)
    th.testing.assert_close(actual, losses(log_ratio))
    actual[0].sum().backward()
    th.testing.assert_close(x.grad, gradient(log_ratio))


# --- truncated and masked importance sampling -------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [truncated_importance_sampling, masked_importance_sampling])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_correct(wrap, name):
    """Where the sampler is the behaviour policy, each objective is itself."""
    log_ratio, advantages = th.randn(8, dtype=F64), th.randn(8, dtype=F64)
    arguments = REQUIRED.get(name, {})
    weighed = wrap(OBJECTIVES[name])(log_ratio, advantages, sampler_log_ratio=th.zeros(8, dtype=F64), **arguments)
    for ours, theirs in zip(weighed, OBJECTIVES[name](log_ratio, advantages, **arguments), strict=True):
        assert th.equal(ours, theirs)


def test_truncated_importance_sampling_by_hand():
    """min(rho', 2) times PPO's losses of -1.2 (clipped) and 0.9, which alone have a gradient of 0.9."""
    sampler = th.tensor([4.0, 0.5], dtype=F64).log().requires_grad_()
    losses, deviation = truncated_importance_sampling(ppo_clip)(
        log_ratio := logs(1.5, 0.9), th.tensor([1.0, -1.0], dtype=F64), sampler_log_ratio=sampler
    )
    assert_values(losses, [-2.4, 0.45])
    assert_values(deviation.square(), [2 * 0.25, 0.5 * 0.01])
    losses.sum().backward()
    assert_values(log_ratio.grad, [0.0, 0.45])
    # The weight changes the measure, not what is measured
    assert sampler.grad is None


@pytest.mark.parametrize(("low", "high", "expected"), [(0.5, 5.0, (0.0, 0.5, 4.0, 0.0)), (0.1, 3.0, (0.25, 0.5, 0.0, 0.0))])
def test_masked_importance_sampling_by_hand(low, high, expected):
    sampler = th.tensor([0.25, 0.5, 4.0, 6.0], dtype=F64).log()
    losses, deviation = masked_importance_sampling(r2vpo, low, high)(
        logs(2.0, 2.0, 2.0, 2.0), th.ones(4, dtype=F64), sampler_log_ratio=sampler, var_coef=0.5
    )
    # -2 + 0.5
    assert_values(losses, [-1.5 * weight for weight in expected])
    assert_values(deviation.square(), expected)


@given(
    log_ratio=st.floats(-5, 5), sampler=st.floats(-5, 5), advantage=st.floats(-3, 3), cap=st.sampled_from([1.0, 2.0, math.inf])
)
def test_truncation_bounds_the_weight(log_ratio, sampler, advantage, cap):
    """With an infinite cap it is exact importance sampling: -(pi / pi_sampler) A of an objective that is not clipped."""
    losses, _ = truncated_importance_sampling(r2vpo, cap)(
        th.tensor([log_ratio], dtype=F64),
        th.tensor([advantage], dtype=F64),
        sampler_log_ratio=th.tensor([sampler], dtype=F64),
        var_coef=0.0,
    )
    expected = -math.exp(log_ratio + min(sampler, math.log(cap))) * advantage
    assert losses.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_importance_sampling_around_a_policy_loss():
    """With its coefficients, its mask, and its multiplier, whose variance is the weighed one; a response shares a weight."""
    loss = RatioVarianceLoss("r2vpo", "auto_0.5", 0.01, dual_learning_rate=1.0)
    loss.follow_schedules(1.0)
    advantages = th.ones(2, 1)
    log_ratio, sampler = th.tensor([[2.0, 1.0], [2.0, 9.0]]).log(), th.tensor([[1.5, 2.0], [0.2, 1.0]]).log()
    mask = th.tensor([[True, True], [True, False]])
    wrapped = truncated_importance_sampling(loss)
    losses, deviation = wrapped(
        log_ratio, advantages, mask=mask, sampler_log_ratio=th.where(mask, sampler, 0.0).sum(-1, keepdim=True)
    )
    # Weights of min(3, 2) and 0.2; R2VPO's losses at ratios of 2 and 1 are -1.5 and -1
    th.testing.assert_close(losses[mask], th.tensor([-3.0, -2.0, -0.3]))
    th.testing.assert_close(deviation[mask].square(), th.tensor([2.0, 0.0, 0.2]))
    loss.dual_step(deviation[mask].square().mean(), accepted=True)
    assert loss.multiplier.value.item() == pytest.approx(0.5 + 2.2 / 3 - 0.01)


def test_importance_weights_stay_finite():
    log_ratio = th.tensor([-100.0, 0.0, 100.0])
    for wrap in (truncated_importance_sampling, masked_importance_sampling):
        for cap in (2.0, math.inf):
            wrapped = wrap(ppo_clip, cap) if wrap is truncated_importance_sampling else wrap(ppo_clip, 0.0, cap)
            for result in wrapped(th.zeros(3), th.ones(3), sampler_log_ratio=log_ratio):
                assert result.isfinite().all()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("m2po", {"tau": 0.04}, r"got `objective_kwargs` \['tau'\]; it takes \['threshold'\]"),
        ("m2po", {"threshold": -0.1}, "`threshold` is -0.1; it must be a number, finite and not negative"),
        ("m2po", {"threshold": math.nan}, "`threshold` is nan"),
        ("gspo", {"clip_high": "0.2"}, "`clip_high` is '0.2'"),
        ("gspo", {"mean_log_ratio": 0.0}, r"it takes \['clip_high', 'clip_low'\]"),
        ("gipo", {"sigma": 0.0}, "`sigma` of the objective 'gipo' is 0.0; it must be positive"),
        ("sapo", {"temperature_neg": 0}, "`temperature_neg` of the objective 'sapo' is 0; it must be positive"),
        ("spo", {"clip_range": 0.0}, "`clip_range` of the objective 'spo' is 0.0"),
        ("dppo", {"old_log_prob": -1.0}, r"it takes \['delta_high', 'delta_low'\]"),
        ("dro", {"kl_coef": None}, "`kl_coef` is None"),
    ],
)
def test_bad_options(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_policy_loss(name, "auto", 0.01, options=kwargs)


def test_dppo_compares_probabilities():
    with pytest.raises(ValueError, match="continuous actions have none"):
        make_policy_loss("dppo", "auto", 0.01, n_actions=2)
    with pytest.raises(ValueError, match="needs `old_log_prob`"):
        PolicyLoss("dppo")(th.zeros(2), th.ones(2))
    with pytest.raises(ValueError, match="continuous actions have none"):
        R2VPO("MlpPolicy", "Pendulum-v1", objective="dppo")


@given(old_prob=st.floats(1e-6, 1.0), new_prob=st.floats(1e-6, 1.0), advantage=st.sampled_from([-1.0, 1.0]))
def test_dppo_masks_by_the_change_of_the_probability(old_prob, new_prob, advantage):
    change = (new_prob - old_prob) * advantage
    if abs(change - 0.15) < 1e-9:
        return
    log_ratio = th.tensor([math.log(new_prob) - math.log(old_prob)], dtype=F64)
    old_log_prob = th.tensor([math.log(old_prob)], dtype=F64)
    losses, _ = dppo(log_ratio, th.tensor([advantage], dtype=F64), old_log_prob=old_log_prob)
    assert (losses != 0).item() == (change <= 0.15)
