import math

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_r2vpo.core.baselines import clip_higher, exact_kl, gppo, ppo_clip, spo, topr
from sb3_r2vpo.core.batch import constant_length_mean, mean, sequence_mean, token_mean
from sb3_r2vpo.core.objectives import OBJECTIVES, entropy_compensation, r2vpo, r2vpo_sequence
from sb3_r2vpo.core.policy_loss import PolicyLoss, make_policy_loss
from sb3_r2vpo.core.ratio import MAX_LOG_RATIO, importance_ratio, ratio_minus_one, ratio_statistics
from sb3_r2vpo.core.statistics import summarize_ratios

RATIOS = (0.5, 0.9, 1.0, 1.25, 1.5, 3.0)

#: One valid call of each objective
COEFFICIENTS = {
    "r2vpo": {"var_coef": 0.7},
    "r2vpo_sequence": {"var_coef": 0.7},
    "exact_kl": {"kl_coef": 1.4},
    "dppo": {"old_log_prob": th.tensor(0.5).log()},
}

#: Log-ratios at which a loss or its gradient jumps: the bounds of clips, and of the masks of M2PO and DPPO in the call above
JUMPS = [math.log(bound) for bound in (0.8, 1.2, 1.28, 1 - 3e-4, 1 + 4e-4, 5.0, 0.7, 1.3)] + [-0.2, 0.2]


def gradient_of_objective(objective, log_ratio, advantages, **coefficients):
    """d(objective)/d(log pi), the objective being what is maximised: minus the loss."""
    log_ratio = log_ratio.clone().requires_grad_()
    loss, _ = objective(log_ratio, advantages, **coefficients)
    return -th.autograd.grad(loss.sum(), log_ratio)[0]


@pytest.mark.parametrize(
    ("objective", "coefficients", "advantage", "expected"),
    [
        (ppo_clip, {"clip_range": 0.2}, 1.0, (0.5, 0.9, 1.0, 0.0, 0.0, 0.0)),
        (ppo_clip, {"clip_range": 0.2}, -1.0, (0.0, -0.9, -1.0, -1.25, -1.5, -3.0)),
        (clip_higher, {}, 1.0, (0.5, 0.9, 1.0, 1.25, 0.0, 0.0)),
        (clip_higher, {}, -1.0, (0.0, -0.9, -1.0, -1.25, -1.5, -3.0)),
        (gppo, {}, 1.0, (0.5, 0.9, 1.0, 1.25, 1.28, 1.28)),
        (gppo, {}, -1.0, (-0.8, -0.9, -1.0, -1.25, -1.5, -3.0)),
        (r2vpo, {"var_coef": 1.0}, 1.0, (1.0, 1.08, 1.0, 0.625, 0.0, -9.0)),
        (r2vpo, {"var_coef": 1.0}, -1.0, (0.0, -0.72, -1.0, -1.875, -3.0, -15.0)),
        (topr, {}, 1.0, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
        (topr, {}, -1.0, (-0.5, -0.9, -1.0, -1.0, -1.0, -1.0)),
        # r A - beta (r - 1)
        (exact_kl, {"kl_coef": 2.0}, 1.0, (1.5, 1.1, 1.0, 0.75, 0.5, -1.0)),
        # r (A - |A| (r - 1) / c)
        (spo, {"clip_range": 0.5}, 1.0, (1.0, 1.08, 1.0, 0.625, 0.0, -9.0)),
        (spo, {"clip_range": 0.5}, -2.0, (0.0, -1.44, -2.0, -3.75, -6.0, -30.0)),
    ],
)
def test_gradients_against_hand_computed_numbers(objective, coefficients, advantage, expected):
    log_ratio = th.tensor(RATIOS, dtype=th.float64).log()
    gradient = gradient_of_objective(objective, log_ratio, th.full_like(log_ratio, advantage), **coefficients)
    th.testing.assert_close(gradient, th.tensor(expected, dtype=th.float64))


@pytest.mark.parametrize(
    ("objective", "coefficients", "advantage", "expected"),
    [
        (r2vpo, {"var_coef": 1.0}, 1.0, (-0.25, -0.89, -1.0, -1.1875, -1.25, 1.0)),
        (ppo_clip, {}, 2.0, (-1.0, -1.8, -2.0, -2.4, -2.4, -2.4)),
        (ppo_clip, {}, -2.0, (1.6, 1.8, 2.0, 2.5, 3.0, 6.0)),
        (clip_higher, {}, 1.0, (-0.5, -0.9, -1.0, -1.25, -1.28, -1.28)),
        (gppo, {}, 1.0, (-0.5, -0.9, -1.0, -1.25, -1.28, -1.28)),
        (gppo, {}, -1.0, (0.8, 0.9, 1.0, 1.25, 1.5, 3.0)),
        (spo, {"clip_range": 0.25}, -1.0, (1.0, 0.92, 1.0, 1.375, 2.0, 11.0)),
    ],
)
def test_losses_against_hand_computed_numbers(objective, coefficients, advantage, expected):
    log_ratio = th.tensor(RATIOS, dtype=th.float64).log()
    loss, _ = objective(log_ratio, th.full_like(log_ratio, advantage), **coefficients)
    th.testing.assert_close(loss, th.tensor(expected, dtype=th.float64))


def test_exact_kl_loss():
    loss, _ = exact_kl(th.tensor([math.log(3.0)]), th.tensor([0.5]), kl_coef=2.0)
    th.testing.assert_close(loss, th.tensor([-1.5 + 2.0 * (2.0 - math.log(3.0))]))


def test_r2vpo_optimum():
    """The per-sample optimum is at rho = 1 + A / (2 lambda)."""
    advantages = th.tensor([0.8, -0.6], dtype=th.float64)
    var_coef = 0.5
    optimum = th.log(1 + advantages / (2 * var_coef))
    assert gradient_of_objective(r2vpo, optimum, advantages, var_coef=var_coef).abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_are_the_policy_gradient_at_ratio_one(name):
    log_ratio, advantages = th.zeros(3, dtype=th.float64), th.tensor([-2.0, 0.5, 1.0], dtype=th.float64)
    gradient = gradient_of_objective(OBJECTIVES[name], log_ratio, advantages, **COEFFICIENTS.get(name, {}))
    th.testing.assert_close(gradient, advantages)


def test_exact_kl_agrees_with_r2vpo_locally():
    """With beta = 2 lambda the two differ by O(|rho - 1|^3), so that a tenth of the deviation leaves a thousandth."""
    gaps = []
    for deviation in (1e-2, 1e-3):
        log_ratio = th.tensor([math.log1p(deviation)], dtype=th.float64)
        advantages = th.ones_like(log_ratio)
        gaps.append((r2vpo(log_ratio, advantages, var_coef=0.7)[0] - exact_kl(log_ratio, advantages, kl_coef=1.4)[0]).item())
    assert gaps[0] / gaps[1] == pytest.approx(1000, rel=0.02)


def test_r2vpo_of_whole_responses():
    """Two tokens that double their probability make a ratio of 4: -(4 A) + lambda 9, pulled back where one token is not."""
    log_ratio = th.tensor([[2.0, 2.0], [0.5, 1.0]], dtype=th.float64).log().requires_grad_()
    advantages = th.tensor([[1.0], [-1.0]], dtype=th.float64)
    loss, deviation = r2vpo_sequence(log_ratio, advantages, var_coef=0.25, sequence_log_ratio=log_ratio.sum(-1, keepdim=True))
    th.testing.assert_close(loss, th.tensor([[-1.75, -1.75], [0.5625, 0.5625]], dtype=th.float64))
    th.testing.assert_close(deviation.square(), th.tensor([[9.0, 9.0], [0.25, 0.25]], dtype=th.float64))
    loss.mean(-1).sum().backward()
    # rho (A - 2 lambda (rho - 1)) for each token
    th.testing.assert_close(-log_ratio.grad, th.tensor([[-2.0, -2.0], [-0.375, -0.375]], dtype=th.float64))
    alone, _ = r2vpo_sequence(log_ratio, advantages, var_coef=0.25)
    th.testing.assert_close(alone, r2vpo(log_ratio, advantages, var_coef=0.25)[0])


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_responses_that_the_policy_has_left_behind(advantage, dtype):
    """
    The documented bound, rho (|A| + 2 lambda): at a sum of -35 there is nothing left to train with, or to pull back with.

    The response counts as one in the variance. DRO and the exact KL do pull it back, by beta times 35 and by beta.
    """
    log_ratio = th.tensor([[-30.0, -5.0], [-6.0, -4.0]], dtype=dtype, requires_grad=True)
    totals = log_ratio.sum(-1, keepdim=True)
    loss, deviation = r2vpo_sequence(log_ratio, th.tensor(advantage, dtype=dtype), var_coef=0.5, sequence_log_ratio=totals)
    # Of the loss of a response, which both of its tokens have
    (gradient,) = th.autograd.grad(loss[:, 0].sum(), log_ratio)
    rho = th.tensor([[math.exp(-35)] * 2, [math.exp(-10)] * 2], dtype=th.float64)
    expected = -rho * (advantage - 2 * 0.5 * (rho - 1))
    assert (gradient.abs() <= rho * (1 + 2 * 0.5) + (1e-15 if dtype == th.float64 else 1e-7)).all()
    th.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-13 if dtype == th.float64 else 1e-7)
    if dtype == th.float32:
        assert (gradient[0] == 0).all()
    th.testing.assert_close(deviation[0].square(), th.ones(2, dtype=dtype))

    pulled = gradient_of_objective(OBJECTIVES["dro"], totals.detach(), th.zeros(1, dtype=dtype), kl_coef=0.5)
    th.testing.assert_close(pulled[0].item(), 0.5 * 35)
    pulled = gradient_of_objective(exact_kl, totals.detach(), th.zeros(1, dtype=dtype), kl_coef=0.5)
    th.testing.assert_close(pulled[0].item(), 0.5)


def test_topr_sequence_weight():
    """One weight for all tokens of a response, from the ratio of the whole response."""
    log_ratio = th.tensor([[-0.5, 0.2, -0.1], [0.3, 0.1, 0.2]], dtype=th.float64)
    advantages = th.tensor([[-1.0], [-1.0]], dtype=th.float64)
    totals = log_ratio.sum(dim=1, keepdim=True)
    gradient = gradient_of_objective(topr, log_ratio, advantages, sequence_log_ratio=totals)
    expected = th.tensor([[-math.exp(-0.4)] * 3, [-1.0] * 3], dtype=th.float64)
    th.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    log_ratio=st.floats(-MAX_LOG_RATIO, MAX_LOG_RATIO, width=32),
    advantage=st.floats(-10, 10, width=32),
)
def test_float32_agrees_with_float64(name, log_ratio, advantage):
    coefficients = COEFFICIENTS.get(name, {})
    results = []
    for dtype in (th.float32, th.float64):
        x = th.tensor([log_ratio], dtype=dtype, requires_grad=True)
        loss, _ = OBJECTIVES[name](x, th.tensor([advantage], dtype=dtype), **coefficients)
        results.append((loss.double(), th.autograd.grad(loss.sum(), x)[0].double()))
    (loss32, gradient32), (loss64, gradient64) = results
    # The scale of the terms that are added up, not of their sum, sets float32's error
    scale = (abs(advantage) + 1) * max(1.0, math.exp(2 * log_ratio))
    # At a jump the two may fall on different sides of it
    if all(abs(log_ratio - jump) > 1e-5 for jump in JUMPS):
        th.testing.assert_close(loss32, loss64, rtol=1e-5, atol=1e-5 * scale)
        th.testing.assert_close(gradient32, gradient64, rtol=1e-5, atol=1e-5 * scale)


@given(log_ratio=st.floats(-5, 5), advantage=st.floats(-10, 10), var_coef=st.floats(0, 10))
def test_r2vpo_gradient_is_the_regularized_advantage(log_ratio, advantage, var_coef):
    """rho (A - 2 lambda (rho - 1)), PAPER Theorem 4.3, against autograd in float64."""
    x, a = th.tensor([log_ratio], dtype=th.float64), th.tensor([advantage], dtype=th.float64)
    rho = math.exp(log_ratio)
    expected = rho * (advantage - 2 * var_coef * (rho - 1))
    assert gradient_of_objective(r2vpo, x, a, var_coef=var_coef).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16, th.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(name, advantage, dtype):
    log_ratio = th.tensor([-100.0, -50.0, -12.0, 12.0, 44.0, 50.0, 88.0, 100.0], dtype=dtype, requires_grad=True)
    advantages = th.full_like(log_ratio, advantage)
    loss, deviation = OBJECTIVES[name](log_ratio, advantages, **COEFFICIENTS.get(name, {}))
    (gradient,) = th.autograd.grad(loss.float().sum(), log_ratio)
    assert loss.dtype == th.float32
    assert loss.isfinite().all()
    assert deviation.isfinite().all()
    assert dtype == th.float16 or gradient.isfinite().all()
    # Gradient clipping squares it
    assert dtype == th.float16 or gradient.float().square().sum().isfinite()


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_runaway_ratios_are_pulled_back_ever_harder(advantage):
    """Beyond MAX_LOG_RATIO the penalty's gradient neither vanishes nor changes its sign."""
    log_ratio = th.tensor([9.0, 9.99, 10.01, 12.0, 20.0, 50.0, 100.0])
    gradient = gradient_of_objective(r2vpo, log_ratio, th.full_like(log_ratio, advantage), var_coef=0.1)
    assert (gradient < 0).all()
    assert (gradient.diff() < 0).all()


def test_ratio_is_continued_by_its_tangent():
    edge = th.tensor([MAX_LOG_RATIO], dtype=th.float64)
    beyond = edge + 3
    th.testing.assert_close(importance_ratio(beyond), edge.exp() * 4)
    th.testing.assert_close(ratio_minus_one(beyond), edge.exp() * 4 - 1)
    inside = th.linspace(-MAX_LOG_RATIO, MAX_LOG_RATIO, 101)
    assert th.equal(importance_ratio(inside), inside.exp())
    assert th.equal(ratio_minus_one(inside), inside.expm1())


def test_small_deviations_keep_their_digits():
    """exp(x) - 1 would be off by 5% at 1e-6 in float32."""
    log_ratio = th.tensor([1e-6, -3e-7])
    th.testing.assert_close(ratio_minus_one(log_ratio).double(), log_ratio.double().expm1(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_is_not_hidden(name):
    log_ratio = th.tensor([0.1, math.nan], requires_grad=True)
    loss, _ = OBJECTIVES[name](log_ratio, th.ones(2), **COEFFICIENTS.get(name, {}))
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shapes_and_deviation(name):
    """One advantage for all tokens of a response broadcasts; the deviation is detached and of the log-ratio's shape."""
    log_ratio = th.randn(4, 7).mul(0.1).requires_grad_()
    loss, deviation = OBJECTIVES[name](log_ratio, th.randn(4, 1), **COEFFICIENTS.get(name, {}))
    assert loss.shape == log_ratio.shape
    assert not deviation.requires_grad
    assert th.equal(deviation, ratio_minus_one(log_ratio))


def test_ratio_statistics():
    stats = ratio_statistics(th.tensor([0.0, math.log(1.5), math.log(0.5)]))
    th.testing.assert_close(stats["ratio"], th.tensor([1.0, 1.5, 0.5]))
    th.testing.assert_close(stats["ratio_variance"], th.tensor([0.0, 0.25, 0.25]))
    th.testing.assert_close(stats["approx_kl"], th.tensor([0.0, 0.5 - math.log(1.5), -0.5 - math.log(0.5)]))


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # Tokens: of ratios 2, 2, 1/2
        ("r2vpo", {}, {"ess": 1.5**2 / 2.75, "ratio_max": 2.0, "approx_kl": (1.5 - math.log(2)) / 3, "clip_fraction": 1.0}),
        # Responses: of ratios 4, 1/2
        ("r2vpo_sequence", {}, {"ess": 2.25**2 / 8.125, "ratio_max": 4.0, "approx_kl": (2.5 - math.log(2)) / 2}),
        ("topr", {}, {"ess": 2.25**2 / 8.125, "ratio_max": 4.0}),
        ("topr_token", {}, {"ratio_max": 2.0}),
        ("vespo", {}, {"ess": 2.25**2 / 8.125, "ratio_max": 4.0}),
        ("dro", {}, {"ess": 2.25**2 / 8.125, "ratio_max": 4.0}),
        # Responses, normalised by their lengths: 2, 1/2
        ("gspo", {}, {"ess": 1.25**2 / 2.125, "ratio_max": 2.0, "clip_fraction": 1.0}),
        # The objective's own bounds: up to 5 and down to 0, only above 0.6, only below 1.2
        ("cispo", {}, {"clip_fraction": 0.0}),
        ("clip_higher", {"clip_low": 0.6, "clip_high": 0.9}, {"clip_fraction": 2 / 3}),
        ("clip_higher", {"clip_low": 0.4, "clip_high": 1.2}, {"clip_fraction": 1 / 3}),
        ("spo", {"clip_range": 0.6}, {"clip_fraction": 2 / 3}),
    ],
)
def test_statistics_are_of_what_the_objective_takes(name, kwargs, expected):
    """Three tokens in two responses; a third response is empty, and what is at padding does not count."""
    loss = make_policy_loss(name, 0.5, 0.01, options=kwargs)
    loss.follow_schedules(1.0)
    log_ratio = th.tensor([[2.0, 2.0], [0.5, 77.0], [77.0, 77.0]]).log()
    mask = th.tensor([[1, 1], [1, 0], [0, 0]])
    for counted in (mask, mask.bool()):
        statistics = summarize_ratios(loss.action_log_ratio(log_ratio, counted), *loss.clip_range)
        for key, value in expected.items():
            assert statistics[key].item() == pytest.approx(value), key
        # The deviation is of the same ratios
        _, deviation = loss(log_ratio, th.ones(3, 1), mask=counted)
        assert deviation[mask.bool()].max().item() + 1 == pytest.approx(statistics["ratio_max"].item())
    # Without padding, and of samples that are actions of their own
    assert loss.action_log_ratio(log_ratio).ndim == 1
    assert th.equal(loss.action_log_ratio(log_ratio[0]), log_ratio[0])


def test_clip_range_follows_its_schedule():
    loss = PolicyLoss("clip_higher", clip_high=lambda progress: progress)
    for progress in (0.5, 0.25):
        loss.follow_schedules(progress)
        assert loss.clip_range == (0.2, progress)


VALUES = th.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, math.nan, math.nan, math.nan], [math.nan] * 4])
MASK = th.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_reductions():
    assert mean(VALUES[0]).item() == 2.5
    assert token_mean(VALUES, MASK).item() == 4.0
    assert sequence_mean(VALUES, MASK).item() == 6.25
    assert constant_length_mean(VALUES, MASK, max_length=5).item() == pytest.approx(20 / 3 / 5)


@pytest.mark.parametrize("reduction", [token_mean, sequence_mean])
def test_reductions_of_nothing(reduction):
    assert reduction(VALUES, th.zeros_like(MASK)).item() == 0.0


def test_reductions_agree_without_padding():
    values, mask = th.randn(3, 5), th.ones(3, 5, dtype=th.bool)
    for reduced in (token_mean(values, mask), sequence_mean(values, mask), constant_length_mean(values, mask, 5)):
        th.testing.assert_close(reduced, mean(values))


def test_masked_tokens_have_no_gradient():
    values = VALUES.clone().requires_grad_()
    (gradient,) = th.autograd.grad(sequence_mean(values, MASK), values)
    expected = th.zeros(3, 4)
    expected[0] = 1 / 8
    expected[1, 0] = 1 / 2
    th.testing.assert_close(gradient, expected)


def gaussian_ratio_variance(log_scale: th.Tensor, distances: th.Tensor) -> th.Tensor:
    """E[(rho - 1)^2] of a Gaussian whose means move by so many standard deviations, all of these being scaled alike"""
    squared_scale = th.exp(2 * log_scale)
    log_second_moment = (distances.square() / (2 - squared_scale) - 0.5 * th.log(squared_scale * (2 - squared_scale))).sum()
    return th.expm1(log_second_moment)


@pytest.mark.parametrize("distances", [[0.01], [0.1], [0.02, -0.03, 0.0], [0.05] * 21])
def test_entropy_compensation_cancels_the_pull_of_the_penalty(distances):
    distances = th.tensor(distances, dtype=th.float64)
    log_scale = th.zeros((), dtype=th.float64, requires_grad=True)
    variance = gaussian_ratio_variance(log_scale, distances)
    pull = th.autograd.grad(0.7 * variance, log_scale)[0]
    # It narrows the policy: descending the penalty makes the standard deviations smaller
    assert pull > 0
    # The entropy is the sum of the logarithms of the n standard deviations
    coefficient = entropy_compensation(variance.detach(), len(distances), var_coef=0.7)
    th.testing.assert_close(coefficient * len(distances), pull, rtol=0.6 * variance.item(), atol=0)


def test_entropy_compensation_by_hand():
    th.testing.assert_close(entropy_compensation(th.tensor(0.02), 4, var_coef=0.5), th.tensor(0.005))
    th.testing.assert_close(entropy_compensation(th.tensor(0.0), 4, var_coef=0.5), th.tensor(0.0))
    # A few outliers make a variance of any size
    th.testing.assert_close(entropy_compensation(th.tensor(1e6), 2, var_coef=th.tensor(0.5)), th.tensor(0.5))
