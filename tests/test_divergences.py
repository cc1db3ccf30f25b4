import math
import pickle

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from sb3_r2vpo.core.divergences import (
    CHI_SQUARE,
    F_DIVERGENCES,
    JENSEN_SHANNON,
    KL_BEHAVIOUR_PI,
    KL_PI_BEHAVIOUR,
    SQUARED_HELLINGER,
    alpha_divergence,
    clipping_error,
    clipping_error_bound,
)

# Orders on either side of 0, 1/2 and 1, where the closed forms change branch
ALPHAS = [-0.6, 0.3, 0.7, 1.6]


def _alpha_generator(alpha):
    return lambda r: (r**alpha - alpha * r - (1 - alpha)) / (alpha * (alpha - 1))


# Divergence, f(r) and f''(1), as the paper's Table 1 has them: the KLs without the multiple of (r - 1) that centres them
TABLE = [
    (KL_PI_BEHAVIOUR, lambda r: r * np.log(r), 1.0),
    (KL_BEHAVIOUR_PI, lambda r: -np.log(r), 1.0),
    (JENSEN_SHANNON, lambda r: (r * np.log(r) - (r + 1) * np.log((r + 1) / 2)) / 2, 0.25),
    (SQUARED_HELLINGER, lambda r: (np.sqrt(r) - 1) ** 2, 0.5),
    (CHI_SQUARE, lambda r: (r - 1) ** 2, 2.0),
    *[(alpha_divergence(alpha), _alpha_generator(alpha), 1.0) for alpha in ALPHAS],
]
NAMES = [divergence.name for divergence, _, _ in TABLE]
DIVERGENCES = [divergence for divergence, _, _ in TABLE]

every_row = pytest.mark.parametrize(("divergence", "generator", "second_derivative"), TABLE, ids=NAMES)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
every_gaussian = pytest.mark.parametrize(
    ("divergence", "generator"),
    [(divergence, generator) for divergence, generator, _ in TABLE if divergence is not JENSEN_SHANNON],
    ids=[name for name in NAMES if name != JENSEN_SHANNON.name],
)

divergences = st.sampled_from(DIVERGENCES)
log_ratios = st.lists(st.floats(-5, 5), min_size=1, max_size=20)


def _double(values):
    return th.tensor(values, dtype=th.float64)


def _logits(n_actions):
    return st.lists(st.floats(-4, 4), min_size=n_actions, max_size=n_actions).map(_double)


# --- per sample


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (KL_PI_BEHAVIOUR, 4 * math.log(4) - 3),
        (KL_BEHAVIOUR_PI, 3 - math.log(4)),
        (JENSEN_SHANNON, (4 * math.log(4) - 5 * math.log(2.5)) / 2),
        (SQUARED_HELLINGER, 1.0),
        (CHI_SQUARE, 9.0),
        (alpha_divergence(0.5), 2.0),
        (alpha_divergence(-1), 1.125),
        (alpha_divergence(3), 9.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_ratio_of_four_by_hand(divergence, expected):
    assert divergence.per_sample(_double([math.log(4)])).item() == pytest.approx(expected, rel=1e-14)


@every_row
def test_second_derivative_at_one(divergence, generator, second_derivative):
    """``f''(1)`` by automatic differentiation, and ``f(1) = f'(1) = 0``."""
    ratio = th.ones((), dtype=th.float64, requires_grad=True)
    value = divergence.per_sample(ratio.log())
    (slope,) = th.autograd.grad(value, ratio, create_graph=True)
    (curvature,) = th.autograd.grad(slope, ratio)
    assert value.item() == 0
    assert slope.item() == pytest.approx(0, abs=1e-15)
    assert curvature.item() == pytest.approx(second_derivative, rel=1e-14)
    assert divergence.second_derivative_at_one == second_derivative


@given(divergence=divergences, log_ratio=log_ratios)
def test_per_sample_is_not_negative(divergence, log_ratio):
    log_ratio = _double(log_ratio)
    assert (divergence.per_sample(log_ratio) >= -4e-16 * (1 + log_ratio.abs())).all()


@given(divergence=divergences, log_ratio=st.floats(-5, 5).filter(lambda x: abs(x) > 1e-4))
def test_per_sample_is_zero_only_at_one(divergence, log_ratio):
    assert divergence.per_sample(_double(log_ratio)) > 0


@every_divergence
def test_small_log_ratio_in_float32(divergence):
    """The two squares keep every digit; the differences lose ``eps / |log_ratio|``, not ``eps / log_ratio^2``."""
    log_ratio = th.tensor([-1e-3, 1e-3])
    expected = divergence.per_sample(log_ratio.double()).float()
    rtol = 1e-6 if divergence in (CHI_SQUARE, SQUARED_HELLINGER) else 1e-3
    th.testing.assert_close(divergence.per_sample(log_ratio), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
@every_divergence
def test_half_precision_is_computed_in_float32(divergence, dtype):
    log_ratio = th.tensor([-0.3, 0.0, 0.3], dtype=dtype)
    th.testing.assert_close(divergence.per_sample(log_ratio), divergence.per_sample(log_ratio.float()), rtol=0, atol=0)


@pytest.mark.parametrize("divergence", F_DIVERGENCES.values(), ids=F_DIVERGENCES)
def test_extreme_log_ratios_stay_finite_in_float32(divergence):
    log_ratio = th.tensor([-100.0, 20.0, 21.0, 100.0], requires_grad=True)
    values = divergence.per_sample(log_ratio)
    (gradient,) = th.autograd.grad(values.sum(), log_ratio)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert (values[1:].diff() > 0).all(), "monotone across the point where the ratio becomes linear"


def test_extreme_log_ratios_by_hand():
    """At a log-ratio of -100 the ratio is zero; above 20 it is continued by its tangent."""
    log_ratio = th.tensor([-100.0])
    at_zero = [divergence.per_sample(log_ratio).item() for divergence in F_DIVERGENCES.values()]
    assert at_zero == pytest.approx([1, 99, math.log(2) / 2, 1, 1], rel=1e-6)
    deviation = CHI_SQUARE.per_sample(_double([20.0, 30.0])).sqrt()
    assert deviation.tolist() == pytest.approx([math.exp(20) - 1, 11 * math.exp(20) - 1], rel=1e-14)


@pytest.mark.parametrize("alpha", [-1, 0.5, 3, 5])
def test_extreme_log_ratios_of_alpha_divergences(alpha):
    values = alpha_divergence(alpha).per_sample(th.tensor([-100.0, 100.0]))
    assert not values.isnan().any()
    assert values.isfinite().tolist() == [alpha >= 0, alpha <= 3]


@every_divergence
def test_nan_is_passed_through(divergence):
    assert divergence.per_sample(th.tensor([math.nan, 0.0])).isnan().tolist() == [True, False]


# --- quadratic approximation


@every_row
def test_quadratic_by_hand(divergence, generator, second_derivative):
    assert divergence.quadratic(_double(0.08)).item() == pytest.approx(0.04 * second_derivative)


@every_divergence
def test_quadratic_error_is_of_third_order(divergence):
    """Proposition 4.1: half the deviation of the ratio, an eighth of the error."""
    behaviour_probs = _double([0.2, 0.3, 0.5])
    direction = _double([2.0, 1.0, -1.4])  # of mean zero under the behaviour policy

    def error(step):
        ratio = 1 + step * direction
        exact = (behaviour_probs * divergence.per_sample(ratio.log())).sum()
        variance = (behaviour_probs * (ratio - 1).square()).sum()
        return (exact - divergence.quadratic(variance)).abs().item()

    if divergence is CHI_SQUARE:
        assert error(0.1) < 1e-15
    else:
        assert error(1e-3) / error(5e-4) == pytest.approx(8, rel=0.02)


# --- categorical


@every_row
def test_categorical_equals_brute_force(divergence, generator, second_derivative):
    generator_of_logits = th.Generator().manual_seed(0)
    logits, behaviour_logits = 2 * th.randn(2, 4, 5, dtype=th.float64, generator=generator_of_logits)
    probs, behaviour_probs = logits.softmax(-1).numpy(), behaviour_logits.softmax(-1).numpy()
    expected = (behaviour_probs * generator(probs / behaviour_probs)).sum(-1)
    np.testing.assert_allclose(divergence.categorical(logits, behaviour_logits), expected, rtol=1e-12)


@given(divergence=divergences, logits=_logits(4), behaviour_logits=_logits(4))
def test_categorical_is_the_expectation_of_per_sample(divergence, logits, behaviour_logits):
    log_ratio = logits.log_softmax(-1) - behaviour_logits.log_softmax(-1)
    expected = (behaviour_logits.softmax(-1) * divergence.per_sample(log_ratio)).sum()
    actual = divergence.categorical(logits, behaviour_logits)
    th.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)
    assert actual > -1e-14


@given(divergence=divergences, logits=_logits(3), shift=st.floats(-3, 3))
def test_categorical_of_equal_policies_is_zero(divergence, logits, shift):
    assert divergence.categorical(logits + shift, logits).item() == pytest.approx(0, abs=1e-14)


def test_categorical_by_hand():
    """pi = (1/2, 1/2) and pi_b = (4/5, 1/5): ratios 5/8 and 5/2, of variance 4/5 * 9/64 + 1/5 * 9/4 = 9/16."""
    logits, behaviour_logits = _double([0.5, 0.5]).log(), _double([0.8, 0.2]).log()
    assert CHI_SQUARE.categorical(logits, behaviour_logits).item() == pytest.approx(9 / 16)
    assert KL_PI_BEHAVIOUR.categorical(logits, behaviour_logits).item() == pytest.approx(math.log(25 / 16) / 2)


@pytest.mark.parametrize(
    ("divergence", "only_behaviour", "only_pi"),
    [
        (KL_PI_BEHAVIOUR, math.log(2), math.inf),
        (KL_BEHAVIOUR_PI, math.inf, math.log(2)),
        (JENSEN_SHANNON, 0.75 * math.log(4 / 3), 0.75 * math.log(4 / 3)),
        (SQUARED_HELLINGER, 2 - math.sqrt(2), 2 - math.sqrt(2)),
        (CHI_SQUARE, 1.0, math.inf),
        (alpha_divergence(-1), math.inf, 0.5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_masked_actions(divergence, only_behaviour, only_pi):
    """(1, 0, 0) against (1/2, 1/2, 0): the third action is masked in both, the second in one of them."""
    one, two = _double([0.0, -math.inf, -math.inf]), _double([0.0, 0.0, -math.inf])
    assert divergence.categorical(one, two).item() == pytest.approx(only_behaviour)
    assert divergence.categorical(two, one).item() == pytest.approx(only_pi)


@every_divergence
def test_gradient_with_actions_masked_in_both(divergence):
    logits = _double([0.3, -0.2, -math.inf]).requires_grad_()
    divergence.categorical(logits, _double([0.1, 0.4, -math.inf])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float32])
@every_divergence
def test_categorical_in_low_precision(divergence, dtype):
    logits, behaviour_logits = th.tensor([[1.0, 0.5, -2.0], [0.5, 0.5, -1.0]], dtype=dtype)
    actual = divergence.categorical(logits, behaviour_logits)
    assert actual.dtype == th.float32
    expected = divergence.categorical(logits.double(), behaviour_logits.double()).float()
    th.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


# --- diagonal Gaussian


def _integral(generator, mean, std, behaviour_mean, behaviour_std):
    """``E_b[f(rho)]`` in one dimension, by quadrature over twelve standard deviations of either policy."""
    pi, behaviour = stats.norm(mean, std), stats.norm(behaviour_mean, behaviour_std)
    low = min(mean - 12 * std, behaviour_mean - 12 * behaviour_std)
    high = max(mean + 12 * std, behaviour_mean + 12 * behaviour_std)

    def integrand(action):
        return behaviour.pdf(action) * generator(math.exp(pi.logpdf(action) - behaviour.logpdf(action)))

    return integrate.quad(integrand, low, high, limit=200, epsabs=1e-13, points=[mean, behaviour_mean])[0]


# Mean and standard deviation of the current policy, then of the behaviour policy
GAUSSIANS = [(0.3, 0.7, 0.0, 0.7), (0.2, 0.8, -0.1, 1.0), (-0.4, 1.2, 0.1, 1.0)]


@pytest.mark.parametrize("parameters", GAUSSIANS)
@every_gaussian
def test_gaussian_equals_quadrature(divergence, generator, parameters):
    actual = divergence.gaussian(*[_double([parameter]) for parameter in parameters]).item()
    assert actual == pytest.approx(_integral(generator, *parameters), rel=1e-8)


@every_gaussian
def test_gaussian_in_several_dimensions(divergence, generator):
    """KLs add up over independent dimensions; the moments ``E_b[rho^a] = 1 + a (a - 1) D_a`` multiply."""
    scale, alpha = divergence.second_derivative_at_one, divergence.alpha
    marginals = _double([_integral(generator, *parameters) / scale for parameters in GAUSSIANS])
    if alpha in (0, 1):
        expected = scale * marginals.sum()
    else:
        expected = scale * ((1 + alpha * (alpha - 1) * marginals).prod() - 1) / (alpha * (alpha - 1))
    actual = divergence.gaussian(*_double(GAUSSIANS).T)
    th.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


@every_gaussian
def test_gaussian_equals_mean_over_samples(divergence, generator):
    mean, std, behaviour_mean, behaviour_std = _double([(0.1, 0.9, 0.0, 1.0), (-0.1, 0.8, 0.1, 0.7)]).T
    samples = behaviour_mean + behaviour_std * th.randn(200_000, 2, dtype=th.float64, generator=th.Generator().manual_seed(0))
    pi, behaviour = th.distributions.Normal(mean, std), th.distributions.Normal(behaviour_mean, behaviour_std)
    values = divergence.per_sample((pi.log_prob(samples) - behaviour.log_prob(samples)).sum(-1))
    standard_error = values.std() / math.sqrt(len(values))
    assert (values.mean() - divergence.gaussian(mean, std, behaviour_mean, behaviour_std)).abs() < 4 * standard_error


def test_ratio_variance_of_gaussians_with_equal_std():
    """``exp(sum((dmu / sigma)^2)) - 1``: here shifts of 1/2 and 1/3 standard deviations."""
    std = _double([0.4, 0.9])
    variance = CHI_SQUARE.gaussian(_double([0.2, -0.3]), std, _double([0.0, 0.0]), std)
    assert variance.item() == pytest.approx(math.exp(1 / 4 + 1 / 9) - 1)


@every_gaussian
def test_gaussian_of_equal_policies_is_zero(divergence, generator):
    mean, std = th.randn(3, 2), th.rand(3, 2) + 0.1
    assert divergence.gaussian(mean, std, mean, std).tolist() == [0, 0, 0]


@given(
    divergence=divergences.filter(lambda divergence: divergence is not JENSEN_SHANNON),
    shift=st.floats(-2, 2),
    log_std=st.floats(-2, 2),
)
def test_gaussian_is_not_negative(divergence, shift, log_std):
    zero, one = _double([0.0]), _double([1.0])
    value = divergence.gaussian(_double([shift]), _double([log_std]).exp(), zero, one)
    assert value >= -1e-14
    if abs(shift) > 1e-4 or abs(log_std) > 1e-4:
        assert value > 0


@pytest.mark.parametrize(
    ("divergence", "std_ratio"), [(CHI_SQUARE, math.sqrt(2)), (alpha_divergence(3), math.sqrt(1.5))], ids=["chi", "alpha"]
)
def test_gaussian_is_infinite_where_the_integral_diverges(divergence, std_ratio):
    mean, std = _double([0.0, 0.5]), _double([1.0, 1.0])
    for factor, finite in [(0.99, True), (1.01, False), (2.0, False)]:
        wide = std * _double([1.0, factor * std_ratio])
        assert divergence.gaussian(mean, wide, mean, std).isfinite().item() is finite


def test_gaussian_of_negative_order_is_infinite_for_narrow_policies():
    zero = _double([0.0])
    for std, finite in [(0.8, True), (0.7, False)]:  # at order -1, of behaviour_std^2 < 2 std^2
        assert alpha_divergence(-1).gaussian(zero, _double([std]), zero, _double([1.0])).isfinite().item() is finite


@every_gaussian
def test_gaussian_in_bfloat16(divergence, generator):
    parameters = th.tensor([(0.25, 0.75, 0.0, 0.75), (0.25, 0.75, 0.5, 1.0)], dtype=th.bfloat16).T
    actual = divergence.gaussian(*parameters)
    assert actual.dtype == th.float32
    th.testing.assert_close(actual, divergence.gaussian(*parameters.double()).float(), rtol=1e-5, atol=0)


def test_jensen_shannon_of_gaussians_has_no_closed_form():
    one = th.ones(2)
    with pytest.raises(NotImplementedError, match="per_sample"):
        JENSEN_SHANNON.gaussian(one, one, one, one)


# --- clipping


def test_clipping_error_by_hand():
    """Ratios 1.5, 0.5, 1.1 and 3 at c = 0.2 lose 0.3, -0.3, 0 and 1.8, times the advantage."""
    log_ratio, advantages = _double([1.5, 0.5, 1.1, 3.0]).log(), _double([2.0, 1.0, 5.0, -1.0])
    th.testing.assert_close(clipping_error(log_ratio, advantages, 0.2), _double([0.6, -0.3, 0.0, -1.8]))


@given(
    log_ratio=log_ratios,
    seed=st.integers(0, 2**32 - 1),
    clip_range=st.floats(0.01, 1.0),
)
def test_clipping_error_is_bounded(log_ratio, seed, clip_range):
    """Theorem 4.4 for the clipped surrogate and for PPO's minimum, both written out."""
    log_ratio = _double(log_ratio)
    advantages = th.randn(len(log_ratio), dtype=th.float64, generator=th.Generator().manual_seed(seed))
    ratio = log_ratio.exp()
    surrogate, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    bound = clipping_error_bound((ratio - 1).square().mean(), advantages.abs().max(), clip_range) * (1 + 1e-12) + 1e-12
    assert (surrogate.mean() - clipped.mean()).abs() <= bound
    assert (surrogate.mean() - th.min(surrogate, clipped).mean()).abs() <= bound

    error = clipping_error(log_ratio, advantages, clip_range)
    th.testing.assert_close(error, surrogate - clipped, rtol=1e-9, atol=1e-12)
    th.testing.assert_close(error.relu(), surrogate - th.min(surrogate, clipped), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.4])
def test_clipping_error_bound_is_tight_at_twice_the_clip_range(clip_range):
    log_ratio, advantages = _double([1 + 2 * clip_range, 1 - 2 * clip_range]).log(), _double([3.0, -3.0])
    error = clipping_error(log_ratio, advantages, clip_range).mean()
    bound = clipping_error_bound(CHI_SQUARE.per_sample(log_ratio).mean(), 3.0, clip_range)
    th.testing.assert_close(error, bound, rtol=1e-12, atol=0)
    assert error.item() == pytest.approx(3 * clip_range)


def test_clipping_error_in_low_precision():
    log_ratio, advantages = th.tensor([-100.0, 0.25, 100.0]), th.tensor([1.0, 2.0, -1.0])
    error = clipping_error(log_ratio.bfloat16(), advantages.bfloat16(), 0.2)
    assert error.dtype == th.float32
    assert error.isfinite().all()
    th.testing.assert_close(error, clipping_error(log_ratio.double(), advantages.double(), 0.2).float())


# --- edges


@pytest.mark.parametrize("alpha", [0, 1, 1.0, math.nan, math.inf])
def test_alpha_without_a_divergence(alpha):
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        alpha_divergence(alpha)


def test_integer_log_ratio_is_refused():
    with pytest.raises(ValueError, match=r"torch\.int64"):
        KL_PI_BEHAVIOUR.per_sample(th.tensor([1]))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"logits \(3, 2\), behaviour_logits \(2,\)"):
        KL_PI_BEHAVIOUR.categorical(th.zeros(3, 2), th.zeros(2))
    with pytest.raises(ValueError, match=r"behaviour_std \(2,\)"):
        KL_PI_BEHAVIOUR.gaussian(th.zeros(3, 2), th.ones(3, 2), th.zeros(3, 2), th.ones(2))
    with pytest.raises(ValueError, match=r"advantages \(3, 1\)"):
        clipping_error(th.zeros(3), th.zeros(3, 1), 0.2)


@pytest.mark.parametrize("std", [0.0, -0.5, math.nan])
def test_std_that_is_not_positive_is_refused(std):
    zero, one, bad = th.zeros(1), th.ones(1), th.full((1,), std)
    with pytest.raises(ValueError, match="log standard deviation"):
        KL_PI_BEHAVIOUR.gaussian(zero, bad, zero, one)
    with pytest.raises(ValueError, match="log standard deviation"):
        KL_PI_BEHAVIOUR.gaussian(zero, one, zero, bad)


@pytest.mark.parametrize("clip_range", [0.0, -0.2, math.nan])
def test_clip_range_that_is_not_positive_is_refused(clip_range):
    with pytest.raises(ValueError, match="clip_range must be positive"):
        clipping_error(th.zeros(1), th.zeros(1), clip_range)
    with pytest.raises(ValueError, match="clip_range must be positive"):
        clipping_error_bound(th.ones(()), 1.0, clip_range)


def test_names_and_pickling():
    assert list(F_DIVERGENCES) == ["kl_pi_behaviour", "kl_behaviour_pi", "jensen_shannon", "squared_hellinger", "chi_square"]
    assert alpha_divergence(0.5).name == "alpha_0.5"
    copy = pickle.loads(pickle.dumps(alpha_divergence(0.5)))
    assert copy.per_sample(_double([math.log(4)])).item() == pytest.approx(2)
