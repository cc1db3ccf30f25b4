r"""f-divergences between the current policy and the behaviour policy, and what clipping throws away.

Every smooth f-divergence is, locally, the variance of the ratio ``rho = pi(a|s) / pi_b(a|s)`` (Proposition 4.1 of
"Ratio-Variance Regularized Policy Optimization", https://arxiv.org/abs/2605.26784):

    D_f(pi || pi_b) = E_b[f(rho)] = f''(1)/2 * E_b[(rho - 1)^2] + O(E_b|rho - 1|^3).

Each row of the paper's Table 1 is an :class:`FDivergence`, which knows all sides of this equation:

=======================  ================================================  ==========  =======
row                      f(r)                                              f''(1)      alpha
=======================  ================================================  ==========  =======
``KL_PI_BEHAVIOUR``      ``r log r - (r - 1)``                             1           1
``KL_BEHAVIOUR_PI``      ``(r - 1) - log r``                               1           0
``JENSEN_SHANNON``       ``(r log r - (r + 1) log((r + 1) / 2)) / 2``      1/4         (none)
``SQUARED_HELLINGER``    ``(sqrt(r) - 1)^2``                               1/2         1/2
``CHI_SQUARE``           ``(r - 1)^2``                                     2           2
``alpha_divergence(a)``  ``(r^a - a r - (1 - a)) / (a (a - 1))``           1           a
=======================  ================================================  ==========  =======

All but Jensen-Shannon are ``f''(1)`` times the alpha-divergence of the order in the last column (the two KLs as limits),
so one closed form per family of policies gives five of them. That of chi-square is the ratio variance itself, for Gaussian
policies of equal standard deviation ``exp(|(mean - behaviour_mean) / std|^2) - 1``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch as th
import torch.nn.functional as F

#: Log-ratio beyond which a sampled ratio is continued by its tangent. Training does so earlier, for the sake of its
#: gradients; a measurement is exact as far as it means anything, and a ratio of ``exp(20)`` (5e8) is well past that.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class FDivergence:
    """
    A row of Table 1: exact from samples, exact in closed form, and approximately from the ratio variance.

    :param name: Name, for legends and loggers.
    :param generator: ``log_ratio -> f(exp(log_ratio))``. ``f`` is centred, i.e. ``f'(1) = 0``: adding a multiple of
        ``r - 1`` does not change the divergence, because ``E_b[rho - 1] = 0``, and this one makes ``f`` non-negative.
    :param second_derivative_at_one: ``f''(1)``.
    :param alpha: Order of the alpha-divergence that this divergence is ``f''(1)`` times of; None where there is none.
    """

    name: str
    generator: Callable[[th.Tensor], th.Tensor]
    second_derivative_at_one: float
    alpha: float | None

    def per_sample(self, log_ratio: th.Tensor) -> th.Tensor:
        """
        ``f(rho)`` of actions drawn from the behaviour policy; its mean is an unbiased estimate of ``D_f(pi || pi_b)``,
        provided that the behaviour policy may take every action that the current policy may take.

        It is non-negative up to a rounding error of the order of ``eps * |log_ratio|``. Half precision is computed and
        returned in float32. Above ``MAX_LOG_RATIO`` the ratio is continued by its tangent, so that values and gradients
        are finite, the values too small rather than infinite, for log-ratios from -100 to 100. Only an alpha-divergence of
        an order outside [0, 3] may still overflow to infinity there, by its ``rho^alpha``. A NaN is passed through.

        :param log_ratio: ``log pi(a|s) - log pi_b(a|s)``, of any shape.
        :return: ``f(rho)``, of the same shape.
        """
        return self.generator(_limit(_to_float(log_ratio)))

    def quadratic(self, ratio_variance: th.Tensor) -> th.Tensor:
        """
        ``f''(1)/2 * Var_b(rho)``, the approximation of Proposition 4.1; exact for chi-square.

        :param ratio_variance: ``E_b[(rho - 1)^2]``, from ``CHI_SQUARE`` by samples or in closed form.
        """
        return self.second_derivative_at_one / 2 * ratio_variance

    def categorical(self, logits: th.Tensor, behaviour_logits: th.Tensor) -> th.Tensor:
        """
        ``D_f(pi || pi_b)`` of two categorical policies; that of ``CHI_SQUARE`` is the ratio variance.

        Logits may be ``-inf`` (masked actions). An action that only one of the policies takes enters by its limit, which
        is infinite in some divergences, e.g. in the two KLs if it is only their first policy that takes it.

        :param logits: Logits of the current policy, of shape ``(..., n_actions)``; need not be normalised.
        :param behaviour_logits: Logits of the behaviour policy, of the same shape.
        :return: The divergence, of shape ``(...)``.
        """
        _check_same_shape(logits=logits, behaviour_logits=behaviour_logits)
        log_p = _to_float(logits).log_softmax(dim=-1)
        log_q = _to_float(behaviour_logits).log_softmax(dim=-1)
        if self.alpha is None:
            return _categorical_jensen_shannon(log_p, log_q)
        return self.second_derivative_at_one * _categorical_alpha(log_p, log_q, self.alpha)

    def gaussian(self, mean: th.Tensor, std: th.Tensor, behaviour_mean: th.Tensor, behaviour_std: th.Tensor) -> th.Tensor:
        """
        ``D_f(pi || pi_b)`` of two diagonal Gaussian policies; that of ``CHI_SQUARE`` is the ratio variance.

        The divergence is infinite where its integral diverges. For ``alpha > 1`` that is where, in any dimension,
        ``std^2 >= alpha / (alpha - 1) * behaviour_std^2``: chi-square needs ``std^2 < 2 * behaviour_std^2``.
        For ``alpha < 0`` it is where ``behaviour_std^2 >= (1 - alpha) / (-alpha) * std^2``.

        :param mean: Mean of the current policy, of shape ``(..., action_dim)``.
        :param std: Standard deviation of the current policy, of the same shape.
        :param behaviour_mean: Mean of the behaviour policy, of the same shape.
        :param behaviour_std: Standard deviation of the behaviour policy, of the same shape.
        :return: The divergence, of shape ``(...)``.
        :raises NotImplementedError: For Jensen-Shannon, which has no closed form.
        """
        if self.alpha is None:
            raise NotImplementedError(
                f"The {self.name} divergence of two Gaussians has no closed form. "
                "Average FDivergence.per_sample(log_ratio) over actions of the behaviour policy instead."
            )
        _check_same_shape(mean=mean, std=std, behaviour_mean=behaviour_mean, behaviour_std=behaviour_std)
        if not ((std > 0).all() and (behaviour_std > 0).all()):
            raise ValueError("Standard deviations must be positive; is one of them a log standard deviation?")
        mean, std, behaviour_mean, behaviour_std = map(_to_float, (mean, std, behaviour_mean, behaviour_std))
        return self.second_derivative_at_one * _gaussian_alpha(mean, std, behaviour_mean, behaviour_std, self.alpha)


def _kl_pi_behaviour(log_ratio: th.Tensor) -> th.Tensor:
    """``r log r - (r - 1)``."""
    deviation = log_ratio.expm1()
    return (1 + deviation) * log_ratio - deviation


def _kl_behaviour_pi(log_ratio: th.Tensor) -> th.Tensor:
    """``(r - 1) - log r``, known as the k3 estimator (http://joschu.net/blog/kl-approx.html)."""
    return log_ratio.expm1() - log_ratio


def _jensen_shannon(log_ratio: th.Tensor) -> th.Tensor:
    """``(r log r - (r + 1) log((r + 1) / 2)) / 2``."""
    deviation = log_ratio.expm1()
    return ((1 + deviation) * log_ratio - (2 + deviation) * (deviation / 2).log1p()) / 2


def _squared_hellinger(log_ratio: th.Tensor) -> th.Tensor:
    """``(sqrt(r) - 1)^2``."""
    return (log_ratio / 2).expm1().square()


def _chi_square(log_ratio: th.Tensor) -> th.Tensor:
    """``(r - 1)^2``."""
    return log_ratio.expm1().square()


def _alpha(log_ratio: th.Tensor, alpha: float) -> th.Tensor:
    """``(r^a - a r - (1 - a)) / (a (a - 1)) = ((r^a - 1) - a (r - 1)) / (a (a - 1))``."""
    return ((alpha * log_ratio).expm1() - alpha * log_ratio.expm1()) / (alpha * (alpha - 1))


KL_PI_BEHAVIOUR = FDivergence("kl_pi_behaviour", _kl_pi_behaviour, second_derivative_at_one=1.0, alpha=1.0)
KL_BEHAVIOUR_PI = FDivergence("kl_behaviour_pi", _kl_behaviour_pi, second_derivative_at_one=1.0, alpha=0.0)
JENSEN_SHANNON = FDivergence("jensen_shannon", _jensen_shannon, second_derivative_at_one=0.25, alpha=None)
SQUARED_HELLINGER = FDivergence("squared_hellinger", _squared_hellinger, second_derivative_at_one=0.5, alpha=0.5)
CHI_SQUARE = FDivergence("chi_square", _chi_square, second_derivative_at_one=2.0, alpha=2.0)

#: The rows of Table 1 that take no parameter, by name; for the sixth see :func:`alpha_divergence`.
F_DIVERGENCES: dict[str, FDivergence] = {
    divergence.name: divergence
    for divergence in (KL_PI_BEHAVIOUR, KL_BEHAVIOUR_PI, JENSEN_SHANNON, SQUARED_HELLINGER, CHI_SQUARE)
}


def alpha_divergence(alpha: float) -> FDivergence:
    """
    The alpha-divergence of Table 1, of which order 1/2 is twice the squared Hellinger and order 2 half the chi-square.

    :param alpha: Order, any real number but 0 and 1, whose limits are the two KLs.
    """
    if not math.isfinite(alpha) or alpha in (0, 1):
        raise ValueError(
            f"alpha must be finite and neither 0 nor 1 (the limits KL_BEHAVIOUR_PI and KL_PI_BEHAVIOUR), got {alpha}"
        )
    return FDivergence(f"alpha_{alpha:g}", partial(_alpha, alpha=alpha), second_derivative_at_one=1.0, alpha=alpha)


def clipping_error(log_ratio: th.Tensor, advantages: th.Tensor, clip_range: float) -> th.Tensor:
    """
    What clipping removes from the surrogate, ``(rho - clip(rho, 1 - c, 1 + c)) A`` per sample.

    Its mean is ``J - J_clip``, with ``J = E_b[rho A]`` and ``J_clip = E_b[clip(rho, 1 - c, 1 + c) A]``. PPO's pessimistic
    ``min(rho A, clip(rho, 1 - c, 1 + c) A)`` removes the positive part of it: its error is the mean of ``relu`` of this.

    :param log_ratio: ``log pi(a|s) - log pi_b(a|s)``, of any shape; large ones as in :meth:`FDivergence.per_sample`.
    :param advantages: Advantages, of the same shape.
    :param clip_range: Half-width ``c > 0`` of the clip range.
    :return: ``rho A`` less its clipped value, of the same shape.
    """
    _check_same_shape(log_ratio=log_ratio, advantages=advantages)
    _check_clip_range(clip_range)
    deviation = _limit(_to_float(log_ratio)).expm1()
    return F.softshrink(deviation, clip_range) * advantages


def clipping_error_bound(ratio_variance: th.Tensor, max_advantage: th.Tensor | float, clip_range: float) -> th.Tensor:
    """
    Theorem 4.4: ``|J - J_clip| <= max|A| / (4 c) * E_b[(rho - 1)^2]``.

    Clipping moves the deviation ``x = rho - 1`` by ``max(|x| - c, 0) <= x^2 / (4 c)``, from ``(|x| - 2 c)^2 >= 0``, with
    equality at ``|x| = 2 c``. Only absolute values of samples enter, hence the bound holds for PPO's pessimistic minimum
    too, and for means over a batch as for expectations, with the batch's own mean of ``(rho - 1)^2``.

    :param ratio_variance: ``E_b[(rho - 1)^2]``.
    :param max_advantage: ``max|A|``.
    :param clip_range: Half-width ``c > 0`` of the clip range.
    """
    _check_clip_range(clip_range)
    return max_advantage / (4 * clip_range) * ratio_variance


def _mean_under(log_p: th.Tensor, log_q: th.Tensor, function: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
    """``E_p[function(log p - log q)]``; actions that p never takes count nothing, whether or not q takes them."""
    p = log_p.exp()
    return (p * function(th.where(p > 0, log_p - log_q, 0.0))).sum(dim=-1)


def _categorical_alpha(log_p: th.Tensor, log_q: th.Tensor, alpha: float) -> th.Tensor:
    """``(E_p[(p/q)^(a-1)] - 1) / (a (a - 1))``, and ``E_p[log(p/q)]`` in the limit of 1."""
    if alpha < 0.5:  # D_a(p || q) = D_{1-a}(q || p)
        return _categorical_alpha(log_q, log_p, 1 - alpha)
    if alpha == 1:
        return _mean_under(log_p, log_q, lambda log_ratio: log_ratio)
    return _mean_under(log_p, log_q, lambda log_ratio: ((alpha - 1) * log_ratio).expm1()) / (alpha * (alpha - 1))


def _categorical_jensen_shannon(log_p: th.Tensor, log_q: th.Tensor) -> th.Tensor:
    """``(KL(p || m) + KL(q || m)) / 2`` with the mixture ``m = (p + q) / 2``, for which ``p/m = 2 sigmoid(log(p/q))``."""

    def log_ratio_to_mixture(log_ratio: th.Tensor) -> th.Tensor:
        return F.logsigmoid(log_ratio) + math.log(2)

    return (_mean_under(log_p, log_q, log_ratio_to_mixture) + _mean_under(log_q, log_p, log_ratio_to_mixture)) / 2


def _gaussian_alpha(mean_p: th.Tensor, std_p: th.Tensor, mean_q: th.Tensor, std_q: th.Tensor, alpha: float) -> th.Tensor:
    """
    ``(M - 1) / (a (a - 1))`` with the moment ``M = E_q[(p/q)^a]``, and the KL in the limit of 1.

    With the interpolated variance ``v = a std_q^2 + (1 - a) std_p^2``, the log of M is a sum over dimensions of
    ``log(std_q^a std_p^(1-a)) - log(v) / 2 + a (a - 1) / 2 * (mean_p - mean_q)^2 / v``, infinite unless v > 0
    (Gil, Alajaji and Linder, 2013, "Rényi divergence measures for commonly used univariate continuous distributions").
    Here variances and means are in units of std_q, in which ``v = 1 + (1 - a) (std_p^2 - 1)``.
    """
    if alpha < 0.5:  # D_a(p || q) = D_{1-a}(q || p)
        return _gaussian_alpha(mean_q, std_q, mean_p, std_p, 1 - alpha)
    log_std = (std_p / std_q).log()
    shift_squared = ((mean_p - mean_q) / std_q).square()
    excess_variance = (2 * log_std).expm1()
    if alpha == 1:
        return (excess_variance - 2 * log_std + shift_squared).sum(dim=-1) / 2
    excess = (1 - alpha) * excess_variance
    log_moment = (1 - alpha) * (log_std - alpha / 2 * shift_squared / (1 + excess)) - excess.log1p() / 2
    return th.where(excess > -1, log_moment, th.inf).sum(dim=-1).expm1() / (alpha * (alpha - 1))


def _limit(log_ratio: th.Tensor) -> th.Tensor:
    """The logarithm of a ratio that is ``exp(log_ratio)`` up to ``MAX_LOG_RATIO`` and continues linearly from there."""
    return log_ratio.clamp(max=MAX_LOG_RATIO) + (log_ratio - MAX_LOG_RATIO).relu().log1p()


def _to_float(tensor: th.Tensor) -> th.Tensor:
    """Half precision to float32: three digits do not survive the cancellations here."""
    if not tensor.is_floating_point():
        raise ValueError(f"Expected a tensor of floating-point numbers, got {tensor.dtype}")
    return tensor.to(th.promote_types(tensor.dtype, th.float32))


def _check_same_shape(**tensors: th.Tensor) -> None:
    """Broadcasting, e.g. of (batch,) with (batch, 1), would silently pair every sample with every other."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Shapes must be equal, got {shapes}")


def _check_clip_range(clip_range: float) -> None:
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
