import math

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import LinearSchedule

from sb3_r2vpo.common.algorithm import default_target_variance
from sb3_r2vpo.core.multiplier import DEFAULT_INITIAL_VAR_COEF, MAX_VIOLATION, Multiplier


def test_initial_values():
    assert Multiplier("auto").value.item() == DEFAULT_INITIAL_VAR_COEF
    assert Multiplier("auto_0.25").value.item() == 0.25
    assert Multiplier("auto").adaptive
    assert not Multiplier(0.3).adaptive
    assert not Multiplier(lambda progress: progress).adaptive


def test_adaptive_step_is_equation_10():
    multiplier = Multiplier("auto_0.5")
    multiplier.step(th.tensor(0.12), target_variance=0.02, learning_rate=0.1)
    assert multiplier.value.item() == pytest.approx(0.51)
    multiplier.step(th.tensor(0.0), target_variance=0.02, learning_rate=1.0)
    assert multiplier.value.item() == pytest.approx(0.49)


def test_multiplier_is_never_negative():
    multiplier = Multiplier("auto_0.01")
    multiplier.step(th.tensor(0.0), target_variance=0.5, learning_rate=1.0)
    assert multiplier.value.item() == 0.0


def test_multiplier_stays_at_its_minimum_and_rises_from_it():
    multiplier = Multiplier("auto_0.2", minimum=0.5)
    assert multiplier.value.item() == 0.5
    multiplier.step(th.tensor(0.0), target_variance=0.5, learning_rate=1.0)
    assert multiplier.value.item() == 0.5
    multiplier.step(th.tensor(0.8), target_variance=0.5, learning_rate=1.0)
    assert multiplier.value.item() == pytest.approx(0.8)


def test_minimum_is_not_for_fixed_multipliers():
    multiplier = Multiplier(0.3, minimum=0.5)
    multiplier.follow_schedule(1.0)
    assert multiplier.value.item() == pytest.approx(0.3)


def test_outlier_does_not_wind_up_the_multiplier():
    multiplier = Multiplier("auto_0.5")
    multiplier.step(th.tensor(1e20), target_variance=0.02, learning_rate=0.1)
    assert multiplier.value.item() == pytest.approx(0.5 + 0.1 * MAX_VIOLATION)


def test_fixed_multiplier_does_not_adapt():
    multiplier = Multiplier(0.3)
    multiplier.follow_schedule(1.0)
    multiplier.step(th.tensor(5.0), target_variance=0.02, learning_rate=0.1)
    assert multiplier.value.item() == pytest.approx(0.3)


def test_adaptive_multiplier_ignores_progress():
    multiplier = Multiplier("auto_0.5")
    multiplier.follow_schedule(0.1)
    assert multiplier.value.item() == 0.5


def test_schedule_is_followed_and_never_negative():
    multiplier = Multiplier(LinearSchedule(start=0.4, end=0.0, end_fraction=1.0))
    multiplier.follow_schedule(0.5)
    assert multiplier.value.item() == pytest.approx(0.2)
    # The Zoo's linear schedule goes below zero when the last rollout overshoots
    overshooting = Multiplier(lambda progress: 0.4 * progress)
    overshooting.follow_schedule(-0.05)
    assert overshooting.value.item() == 0.0


def test_schedule_that_returns_nan_is_refused():
    multiplier = Multiplier(lambda progress: math.nan)
    with pytest.raises(ValueError, match="schedule returned nan"):
        multiplier.follow_schedule(0.5)


def test_dual_ascent_holds_the_variance_at_its_target():
    """A quadratic model of the policy's answer, V = (1 / (2 lambda))^2: the multiplier settles where V is the target."""
    multiplier = Multiplier("auto")
    for _ in range(20_000):
        multiplier.step((0.5 / multiplier.value.clamp(min=0.1)) ** 2, target_variance=0.04, learning_rate=0.1)
    assert multiplier.value.item() == pytest.approx(2.5, rel=0.01)


def test_state_dict():
    multiplier = Multiplier("auto_0.7")
    restored = Multiplier("auto")
    restored.load_state_dict(multiplier.state_dict())
    assert restored.value.item() == pytest.approx(0.7)


@pytest.mark.parametrize("var_coef", ["automatic", "auto_", "auto_x", "auto_-1", "auto_nan", "auto_inf", "0.5", ""])
def test_bad_strings(var_coef):
    with pytest.raises(ValueError, match=r"`var_coef` is .*'auto_0.5'"):
        Multiplier(var_coef)


@pytest.mark.parametrize("var_coef", [-0.1, math.nan, math.inf, -math.inf, None])
def test_bad_numbers(var_coef):
    with pytest.raises(ValueError, match="`var_coef` is"):
        Multiplier(var_coef)


@pytest.mark.parametrize("minimum", [-0.1, math.nan, math.inf])
def test_bad_minimum(minimum):
    with pytest.raises(ValueError, match="`min_var_coef` is"):
        Multiplier("auto", minimum)


@pytest.mark.parametrize(
    ("action_space", "expected"),
    [
        (spaces.Box(-1, 1, (1,)), 0.01),
        (spaces.Box(-1, 1, (4,)), 0.02),
        (spaces.Box(-1, 1, (3, 3)), 0.03),
        (spaces.Discrete(5), 0.01),
        (spaces.MultiDiscrete([2, 3, 2, 2]), 0.02),
        (spaces.MultiBinary(9), 0.03),
    ],
)
def test_default_tolerance_grows_with_the_root_of_the_number_of_actions(action_space, expected):
    assert default_target_variance(action_space) == pytest.approx(expected)
