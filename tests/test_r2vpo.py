import math
import warnings
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, logged, weights
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.archive import read_archive
from sb3_r2vpo.common.critic import critic_parameters
from sb3_r2vpo.common.rollout import Rollout, passes
from sb3_r2vpo.core.batch import Minibatch
from sb3_r2vpo.core.multiplier import DEFAULT_INITIAL_VAR_COEF
from sb3_r2vpo.core.objectives import OBJECTIVES
from sb3_r2vpo.core.optim import Descent
from sb3_r2vpo.core.statistics import gradient_norms
from sb3_r2vpo.core.update import step as gradient_step

ALGORITHMS = [R2VPO, R2VPOOff]


def multiplier(model) -> float:
    return model.policy_loss.multiplier.value.item()


def target_variance(model, progress_remaining: float = 1.0) -> float:
    model.policy_loss.follow_schedules(progress_remaining)
    return model.policy_loss.target_variance.item()


# --- equality with PPO -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.2, "ent_coef": 0.01, "target_kl": 0.02, "n_epochs": 8}])
def test_ppo_clip_is_sb3_ppo_bit_for_bit(env_id, options):
    settings = {"n_steps": 128, "batch_size": 48, "seed": 3, "device": "cpu", **options}
    # One after the other: both draw from the global generators, which the constructor seeds
    ppo = PPO("MlpPolicy", env_id, clip_range=0.15, **settings)
    before = weights(ppo)
    ppo.learn(3 * 128)
    assert not th.equal(before, weights(ppo))
    kwargs = {"clip_range": 0.15}
    ours = R2VPO("MlpPolicy", env_id, objective="ppo_clip", objective_kwargs=kwargs, **settings).learn(3 * 128)
    assert th.equal(weights(ppo), weights(ours))
    assert logged(ppo)["train/n_updates"] == logged(ours)["train/n_updates"]


def test_ppo_clip_with_a_schedule_is_sb3_ppo_bit_for_bit():
    schedule = LinearSchedule(start=0.3, end=0.05, end_fraction=1.0)
    settings = {"n_steps": 128, "seed": 3, "device": "cpu"}
    ppo = PPO("MlpPolicy", "CartPole-v1", clip_range=schedule, **settings).learn(3 * 128)
    kwargs = {"clip_range": schedule}
    ours = R2VPO("MlpPolicy", "CartPole-v1", objective="ppo_clip", objective_kwargs=kwargs, **settings).learn(3 * 128)
    assert th.equal(weights(ppo), weights(ours))


CRITIC_APART = {"critic_kwargs": {"n_rollouts": 2, "n_epochs": 3, "gae_lambda": 0.99}, "gae_lambda": 0.7}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("options", [{}, CRITIC_APART, {"critic_kwargs": {"recompute_advantages": True}}])
def test_off_with_capacity_1_and_utd_1_is_on_bit_for_bit(env_id, options):
    settings = {
        "n_steps": 128,
        "batch_size": 48,
        "seed": 3,
        "device": "cpu",
        "var_coef": "auto",
        "target_variance": 0.02,
        **options,
    }
    on = R2VPO("MlpPolicy", env_id, **settings).learn(4 * 128)
    off = R2VPOOff("MlpPolicy", env_id, replay_capacity=1, utd_ratio=1, **settings).learn(4 * 128)
    assert th.equal(weights(on), weights(off))
    assert multiplier(on) == multiplier(off)


# --- the entropy of a Gaussian policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate_entropy", [False, True])
def test_constraint_has_no_pull_on_the_standard_deviations_when_it_is_compensated(compensate_entropy):
    n_samples, distance, var_coef, learning_rate = 400_000, 0.1, 2.0, 1e-3
    model = R2VPO(
        "MlpPolicy",
        RandomEnv(VECTOR, spaces.Box(-1, 1, (2,))),
        learning_rate=learning_rate,
        max_grad_norm=None,
        var_coef=var_coef,
        objective_kwargs={"compensate_entropy": compensate_entropy},
        policy_kwargs={"optimizer_class": th.optim.SGD},
        **SMALL,
    )
    observations = th.randn(n_samples, 3)
    with th.no_grad():
        actions, _, log_prob = model.policy(observations)
        # Standard deviations are one
        model.policy.action_net.bias += distance
    nothing = th.zeros(n_samples)
    rollout_data = RolloutBufferSamples(observations, actions, nothing, log_prob, nothing, nothing)
    parts = gradient_step(model._make_update(), Minibatch(rollout_data))
    # The step of plain gradient descent tells the gradient, to the digits that are left of a standard deviation of one
    gradient = -model.policy.log_std.detach() / learning_rate
    variance = math.expm1(2 * distance**2)
    assert parts["ratio_variance"].item() == pytest.approx(variance, rel=0.02)
    pull = 2 * var_coef * distance**2 * (1 + variance)
    expected = 0.0 if compensate_entropy else pull
    np.testing.assert_allclose(gradient.numpy(), expected, atol=0.1 * pull)
    assert ("ent_coef" in parts) == compensate_entropy


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_entropy_is_compensated_for_continuous_actions_only(algorithm):
    def trained(env_id, compensate_entropy):
        kwargs = {"compensate_entropy": compensate_entropy}
        model = algorithm("MlpPolicy", env_id, objective_kwargs=kwargs, **SMALL).learn(96)
        assert ("train/ent_coef" in logged(model)) == (env_id == "Pendulum-v1" and compensate_entropy)
        return weights(model)

    assert not th.equal(trained("Pendulum-v1", True), trained("Pendulum-v1", False))
    assert th.equal(trained("CartPole-v1", True), trained("CartPole-v1", False))
    # A baseline stays what its authors made it
    baseline = algorithm("MlpPolicy", "Pendulum-v1", objective="spo", **SMALL).learn(96)
    assert "train/ent_coef" not in logged(baseline)
    with pytest.raises(ValueError, match=r"got `objective_kwargs` \['compensate_entropy'\]"):
        algorithm("MlpPolicy", "Pendulum-v1", objective="spo", objective_kwargs={"compensate_entropy": False}, **SMALL)


# --- all that PPO runs on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "action_space",
    [spaces.Box(-2, 2, (2,)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)],
    ids=lambda space: type(space).__name__,
)
@pytest.mark.parametrize(
    "observation_space",
    [
        VECTOR,
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiBinary(4),
        spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces(algorithm, observation_space, action_space):
    env = make_vec_env(lambda: RandomEnv(observation_space, action_space), n_envs=2)
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = algorithm(policy, env, **SMALL)
    before = weights(model)
    model.learn(3 * 64)
    after = weights(model)
    assert after.isfinite().all()
    assert not th.equal(before, after)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_images(algorithm):
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)])
    model = algorithm("CnnPolicy", env, policy_kwargs={"features_extractor_kwargs": {"features_dim": 16}}, **SMALL)
    model.learn(3 * 32)
    assert "train/ratio_variance" in logged(model)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dict_with_images(algorithm):
    model = algorithm("MultiInputPolicy", DummyVecEnv([lambda: SimpleMultiObsEnv(random_start=False)]), **SMALL)
    model.learn(3 * 32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gsde(algorithm):
    model = algorithm("MlpPolicy", "Pendulum-v1", use_sde=True, sde_sample_freq=4, **SMALL)
    model.learn(3 * 32)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(algorithm, objective):
    kwargs = {"kl_coef": 1.0} if objective == "exact_kl" else None
    model = algorithm("MlpPolicy", "CartPole-v1", objective=objective, objective_kwargs=kwargs, **SMALL)
    model.learn(3 * 32)
    assert weights(model).isfinite().all()


def test_objectives_differ():
    """Each name really selects another update, once ratios leave the clip range."""
    fast = {"n_epochs": 20, "learning_rate": 1e-2}
    results = []
    # Two forms of TOPR, of DRO and of R2VPO differ on sequences only
    for objective in OBJECTIVES.keys() - {"topr_token", "dro_token", "r2vpo_sequence"}:
        kwargs = {"kl_coef": 1.0} if objective == "exact_kl" else None
        model = R2VPO("MlpPolicy", "CartPole-v1", objective=objective, objective_kwargs=kwargs, **(SMALL | fast))
        results.append(weights(model.learn(64)))
    for i, a in enumerate(results):
        assert all(not th.equal(a, b) for b in results[:i])


# --- the multiplier ----------------------------------------------------------------------------------------------------


FAST = {"dual_learning_rate": 1.0}


def test_adaptive_multiplier_holds_the_target_variance():
    kwargs = {"var_coef": "auto", "target_variance": 0.01, "objective_kwargs": FAST}
    model = R2VPO("MlpPolicy", "CartPole-v1", n_steps=512, seed=0, device="cpu", **kwargs)
    variances = []
    train = model.train

    def train_and_record() -> None:
        train()
        variances.append(logged(model)["train/ratio_variance"])

    model.train = train_and_record
    model.learn(12 * 512)
    assert np.mean(variances[4:]) == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_multiplier_does_not_fall_below_its_minimum(algorithm, tmp_path):
    kwargs = {**FAST, "min_var_coef": 0.4}
    model = algorithm("MlpPolicy", "CartPole-v1", target_variance=10.0, objective_kwargs=kwargs, **SMALL)
    model.learn(128)
    assert logged(model)["train/var_coef"] == pytest.approx(0.4)
    model.save(tmp_path / "model")
    lowered = algorithm.load(tmp_path / "model", env=model.env, objective_kwargs=FAST)
    assert algorithm.load(tmp_path / "model").policy_loss.multiplier.minimum == 0.4
    lowered.learn(128)
    assert logged(lowered)["train/var_coef"] == 0.0


def test_larger_multiplier_means_smaller_variance():
    variances = []
    for var_coef in (0.0, 0.5, 50.0):
        model = R2VPO("MlpPolicy", "CartPole-v1", n_steps=256, var_coef=var_coef, learning_rate=1e-3, seed=0, device="cpu")
        model.learn(256)
        assert multiplier(model) == var_coef
        variances.append(logged(model)["train/ratio_variance"])
    assert variances[0] > 1.5 * variances[1]
    assert variances[1] > 1.5 * variances[2]


def test_schedules():
    model = R2VPO(
        "MlpPolicy",
        "CartPole-v1",
        target_variance=lambda progress: 0.02 * progress,
        **SMALL | {"var_coef": LinearSchedule(start=1.0, end=0.0, end_fraction=1.0)},
    )
    # Two iterations: the second is at progress 0
    model.learn(64)
    assert multiplier(model) == 0.0
    model.var_coef = "auto"
    model._setup_model()
    model._setup_model()
    assert target_variance(model, 0.5) == pytest.approx(0.01)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_entropy_coefficient_follows_a_schedule(algorithm):
    def trained(ent_coef):
        kwargs = {"compensate_entropy": False}
        return algorithm("MlpPolicy", "Pendulum-v1", ent_coef=ent_coef, objective_kwargs=kwargs, **SMALL).learn(64)

    falling = trained(LinearSchedule(start=0.1, end=0.0, end_fraction=1.0))
    # Two iterations: the second is at progress 0
    assert logged(falling)["train/ent_coef"] == 0.0
    constant = trained(lambda _: 0.1)
    assert logged(constant)["train/ent_coef"] == pytest.approx(0.1)
    assert th.equal(weights(constant), weights(trained(0.1)))
    assert not th.equal(weights(constant), weights(falling))


def test_var_coef_default_and_strings():
    assert R2VPO("MlpPolicy", "CartPole-v1").policy_loss.multiplier.adaptive
    assert multiplier(R2VPO("MlpPolicy", "CartPole-v1")) == DEFAULT_INITIAL_VAR_COEF
    fixed = R2VPO("MlpPolicy", "CartPole-v1", **SMALL, var_coef=0.3).learn(64)
    assert multiplier(fixed) == pytest.approx(0.3)
    assert "train/target_variance" not in logged(fixed)
    assert multiplier(R2VPO("MlpPolicy", "CartPole-v1", var_coef="auto_0.5")) == 0.5


def test_clip_range_is_refused_with_what_has_taken_its_place():
    with pytest.raises(TypeError, match=r"R2VPOOff has no `clip_range`.*`target_variance` with var_coef='auto'"):
        R2VPOOff("MlpPolicy", "CartPole-v1", clip_range=0.2)


def test_a_subclass_may_have_a_clip_range_of_its_own():
    class Clipped(R2VPO):
        def __init__(self, *args: Any, clip_range: float, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.clip_range = clip_range

    assert Clipped("MlpPolicy", "CartPole-v1", clip_range=0.3).clip_range == 0.3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_variance": 0.02}, "target_variance"),
        ({"objective_kwargs": {"min_var_coef": 0.1, "compensate_entropy": False}}, "min_var_coef"),
        ({"objective_kwargs": {"dual_learning_rate": 0.1}, "var_coef": lambda _: 1.0}, "dual_learning_rate"),
    ],
)
def test_options_of_an_adaptive_multiplier_warn_with_a_fixed_one(options, named):
    with pytest.warns(UserWarning, match=f"^{named} has no effect"):
        R2VPO("MlpPolicy", "CartPole-v1", **SMALL | {"var_coef": 0.3} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R2VPO("MlpPolicy", "CartPole-v1", **SMALL, **options | {"var_coef": "auto"})
        baseline = {**options, "objective": "ppo_clip", "objective_kwargs": {"clip_range": 0.2}}
        R2VPO("MlpPolicy", "CartPole-v1", **SMALL, **baseline)


# --- logs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_logged_keys(algorithm, tmp_path):
    model = algorithm("MlpPolicy", "Pendulum-v1", clip_range_vf=1.0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(3 * 32)
    values = logged(model)
    of_ppo = "entropy_loss policy_gradient_loss value_loss approx_kl clip_fraction loss explained_variance std n_updates"
    ours = "var_coef target_variance ratio_variance ratio_max ess policy_grad_norm value_grad_norm clip_range_vf"
    for name in (of_ppo + " " + ours).split():
        assert math.isfinite(values[f"train/{name}"]), name
    assert 0 < values["train/ess"] <= 1
    assert values["train/ratio_max"] >= 1
    assert values["train/policy_grad_norm"] > 0
    assert values["train/value_grad_norm"] > 0
    assert (tmp_path / "progress.csv").exists()


def test_first_minibatch_is_on_policy():
    """Behaviour and current policy are the same before the first step: all ratios are one."""
    model = R2VPO("MlpPolicy", "Pendulum-v1", **(SMALL | {"batch_size": 32, "n_epochs": 1}))
    model.learn(32)
    values = logged(model)
    assert values["train/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert values["train/ess"] == pytest.approx(1, abs=1e-5)
    assert values["train/ratio_variance"] < 1e-9


def test_gradient_norms_are_those_that_get_clipped():
    """sqrt(policy^2 + value^2) is the total norm, also with a shared feature extractor."""
    model = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL)
    loss = sum((parameter * th.randn_like(parameter)).sum() for parameter in model.policy.parameters())
    _, norms_by_parameter = Descent(model.policy.optimizer, list(model.policy.parameters()), None)(loss)
    norms = gradient_norms(["value" in name for name, _ in model.policy.named_parameters()], norms_by_parameter)
    total = th.nn.utils.get_total_norm([p.grad for p in model.policy.parameters()])
    th.testing.assert_close((norms["policy_grad_norm"] ** 2 + norms["value_grad_norm"] ** 2).sqrt(), total)
    critic = [*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()]
    th.testing.assert_close(norms["value_grad_norm"], th.nn.utils.get_total_norm([p.grad for p in critic]))


def test_logged_norms_are_those_of_the_trained_parameters():
    """Also where a part of the policy is frozen: the norms that are left are still told apart."""
    model = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL)
    model.policy.mlp_extractor.policy_net.requires_grad_(False)
    # The last minibatch's are left in the parameters
    model.batch_size, model.n_epochs, model.max_grad_norm = 32, 1, 1e9
    model.learn(32)
    policy = model.policy
    groups = {"policy": [*policy.action_net.parameters(), policy.log_std]}
    groups["value"] = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
    for name, parameters in groups.items():
        norm = th.nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item()
        assert logged(model)[f"train/{name}_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_target_kl_stops_early(capsys):
    settings = SMALL | {"n_epochs": 50, "verbose": 1, "learning_rate": 1e-2, "n_steps": 64, "var_coef": 0.0}
    model = R2VPO("MlpPolicy", "CartPole-v1", target_kl=1e-3, **settings).learn(64)
    assert model._n_updates < 50
    assert "Early stopping" in capsys.readouterr().out


def test_total_timesteps_may_be_a_float():
    model = R2VPO("MlpPolicy", "CartPole-v1", **SMALL).learn(1e2)
    assert model.num_timesteps == 128


# --- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_multiplier_is_saved(algorithm, tmp_path):
    model = algorithm("MlpPolicy", "CartPole-v1", **SMALL).learn(128)
    value = multiplier(model)
    assert value != DEFAULT_INITIAL_VAR_COEF
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    assert multiplier(loaded) == value
    assert loaded.policy_loss.multiplier.adaptive
    assert target_variance(loaded) == target_variance(model)
    loaded.learn(64)
    assert multiplier(loaded) != value


def test_multiplier_can_be_fixed_on_loading(tmp_path):
    R2VPO("MlpPolicy", "CartPole-v1", **SMALL).learn(64).save(tmp_path / "model")
    loaded = R2VPO.load(tmp_path / "model", env=gym.make("CartPole-v1"), var_coef=0.3, target_variance=0.1)
    assert not loaded.policy_loss.multiplier.adaptive
    loaded.learn(64)
    assert multiplier(loaded) == pytest.approx(0.3)
    assert target_variance(loaded) == pytest.approx(0.1)


def test_on_policy_model_goes_on_off_policy(tmp_path):
    model = R2VPO("MlpPolicy", "CartPole-v1", **SMALL).learn(64)
    model.save(tmp_path / "model")
    loaded = R2VPOOff.load(tmp_path / "model", env=gym.make("CartPole-v1"), replay_capacity=3, device="cpu")
    assert th.equal(weights(model), weights(loaded))
    loaded.learn(96)
    assert len(loaded.replay_buffer) == 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ppo_zip_is_refused(algorithm, tmp_path):
    PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"`clip_range`, such as PPO.*load_state_dict"):
        algorithm.load(tmp_path / "ppo")


def test_unknown_load_argument_is_refused(tmp_path):
    R2VPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Unknown arguments \['clip_range'\]"):
        R2VPO.load(tmp_path / "model", clip_range=0.1)
    with pytest.raises(ValueError, match=r"Unknown arguments \['replay_capacity'\]"):
        R2VPO.load(tmp_path / "model", replay_capacity=2)
    with pytest.raises(ValueError, match="`var_coef` is -1"):
        R2VPO.load(tmp_path / "model", var_coef=-1)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"var_coef": -0.1}, "`var_coef` is -0.1"),
        ({"var_coef": math.inf}, "`var_coef` is inf"),
        ({"var_coef": math.nan}, "`var_coef` is nan"),
        ({"var_coef": "automatic"}, "`var_coef` is 'automatic'"),
        ({"objective_kwargs": {"dual_learning_rate": -1.0}}, "`dual_learning_rate` is -1.0"),
        ({"objective_kwargs": {"dual_learning_rate": math.nan}}, "`dual_learning_rate` is nan"),
        ({"objective_kwargs": {"dual_learning_rate": math.inf}}, "`dual_learning_rate` is inf"),
        ({"objective_kwargs": {"min_var_coef": -1.0}}, "`min_var_coef` is -1.0"),
        ({"target_variance": 0.0}, "`target_variance` is 0.0"),
        ({"target_variance": -0.1}, "`target_variance` is -0.1"),
        ({"target_variance": math.nan}, "`target_variance` is nan"),
        ({"target_variance": math.inf}, "`target_variance` is inf"),
        ({"target_variance": "automatic"}, "`target_variance` is 'automatic'"),
        ({"objective": "ppo"}, "Unknown `objective` 'ppo'; choose one of r2vpo, r2vpo_sequence, ppo_clip"),
        ({"objective": "ppo_clip", "objective_kwargs": {"clip": 0.1}}, r"takes \['clip_range'\]"),
        ({"objective": "exact_kl"}, r"it needs \['kl_coef'\]"),
        ({"objective_kwargs": {"var_coef": 0.1}}, r"takes \['compensate_entropy', 'dual_learning_rate', 'min_var_coef'\]"),
        ({"objective": "topr", "objective_kwargs": {"var_coef": 0.1}}, "takes none"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_coefficients(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm("MlpPolicy", "CartPole-v1", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_capacity": 0}, "`replay_capacity` is 0"),
        ({"replay_capacity": 2.5}, "`replay_capacity` is 2.5"),
        ({"utd_ratio": 0}, "`utd_ratio` is 0"),
        ({"utd_ratio": -1.0}, "`utd_ratio` is -1.0"),
        ({"utd_ratio": math.nan}, "`utd_ratio` is nan"),
        ({"utd_ratio": math.inf}, "`utd_ratio` is inf"),
        (
            {"critic_kwargs": {"n_rollouts": 8, "recompute_advantages": False}},
            "`recompute_advantages` are for a critic that learns",
        ),
    ],
)
def test_bad_replay_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        R2VPOOff("MlpPolicy", "CartPole-v1", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_kwargs": {"n_rollouts": 0}}, "`n_rollouts` is 0"),
        ({"critic_kwargs": {"n_rollouts": 2.5}}, "`n_rollouts` is 2.5"),
        ({"critic_kwargs": {"n_rollouts": 8, "n_epochs": 0}}, "`n_epochs` is 0"),
        ({"critic_kwargs": {"n_rollouts": 8, "gae_lambda": 1.5}}, "`gae_lambda` is 1.5"),
        ({"critic_kwargs": {"gae_lambda": 0.95}}, "add `n_rollouts`"),
        ({"critic_kwargs": {"n_epochs": 3}}, "add `n_rollouts`"),
        (
            {"critic_kwargs": {"n_rollouts": 8}, "clip_range_vf": 0.2},
            "`clip_range_vf` .* for a critic that learns with the policy",
        ),
        (
            {"critic_kwargs": {"n_rollouts": 8, "recompute_advantages": True}},
            "`recompute_advantages` are for a critic that learns",
        ),
        (
            {"critic_kwargs": {"n_rollouts": 8, "std_scaled_learning_rate": True}},
            "`std_scaled_learning_rate` is for Gaussian policies",
        ),
        ({"critic_kwargs": {"vf_coef": 0.3}}, r"unknown options \['vf_coef'\]"),
        ({"critic_kwargs": {"epochs": 3}}, r"unknown options \['epochs'\]"),
        ({"critic_kwargs": {"n_rollouts": 8, "epochs": 3}}, r"unknown options \['epochs'\]"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_critic_settings(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm("MlpPolicy", "CartPole-v1", **settings)


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, math.nan])
def test_bad_max_grad_norm(max_grad_norm):
    with pytest.raises(ValueError, match="`max_grad_norm` is"):
        R2VPO("MlpPolicy", "CartPole-v1", max_grad_norm=max_grad_norm)


def test_bad_batch_sizes():
    with pytest.raises(AssertionError, match="`batch_size` must be greater than 1"):
        R2VPO("MlpPolicy", "CartPole-v1", batch_size=1)
    with pytest.raises(AssertionError, match=r"`n_steps \* n_envs` must be greater than 1"):
        R2VPO("MlpPolicy", "CartPole-v1", n_steps=1)
    with pytest.warns(UserWarning, match="truncated mini-batch of size 4"):
        R2VPO("MlpPolicy", "CartPole-v1", n_steps=20, batch_size=16)


def test_unsupported_action_space():
    env = RandomEnv(VECTOR, spaces.Dict({"a": VECTOR}))
    with pytest.raises(AssertionError, match="The algorithm only supports"):
        R2VPO("MlpPolicy", DummyVecEnv([lambda: env]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_reward_does_not_reach_the_weights(algorithm):
    model = algorithm("MlpPolicy", RandomEnv(VECTOR, spaces.Discrete(2), nan_reward_at=50), **SMALL)
    model.learn(32)
    before, value = weights(model), multiplier(model)
    with pytest.raises(
        ValueError, match=r"reward in environment 0 is nan, at step 17 of the rollout \(num_timesteps=49 before it\)"
    ):
        model.learn(32, reset_num_timesteps=False)
    assert th.equal(before, weights(model))
    assert multiplier(model) == value


@pytest.mark.parametrize("optimizer_kwargs", [{}, {"fused": True, "eps": 1e-5}])
def test_nan_gradient_does_not_reach_the_weights(optimizer_kwargs):
    """The error comes at the end of the update: with a fused optimizer, the host does not read the norms before."""
    model = R2VPO("MlpPolicy", "CartPole-v1", policy_kwargs={"optimizer_kwargs": optimizer_kwargs}, **SMALL)
    model.learn(32)
    model.rollout_buffer.observations[3] = math.nan
    with pytest.raises(ValueError, match=r"non-finite .* in minibatch \d of 4, for `mlp_extractor.policy_net.0.weight`"):
        model.train()
    # The other minibatches have been trained on
    assert weights(model).isfinite().all()
    assert math.isfinite(multiplier(model))
    model.learn(32)


# --- recomputed advantages ---------------------------------------------------------------------------------------------


RECOMPUTE = {"recompute_advantages": True}


class RecordingR2VPO(R2VPO):
    """Keeps each minibatch, with a copy of the policy that it was drawn for."""

    def _minibatches(self, rollouts):
        self.drawn = []
        for batch in super()._minibatches(rollouts):
            self.drawn.append((deepcopy(self.policy), batch.samples))
            yield batch

    def epochs_in_order(self) -> list[tuple[ActorCriticPolicy, dict[str, np.ndarray]]]:
        """Of minibatches that are whole rollouts: their fields in the order of time, (n_envs, n_steps)."""
        # Log-probabilities tell steps apart
        order = np.argsort(np.argsort(self.rollout_buffer.log_probs.flatten()))
        epochs = []
        for policy, rollout_data in self.drawn:
            indices = np.argsort(rollout_data.old_log_prob.numpy())[order]
            fields = {name: field.numpy()[indices] for name, field in rollout_data._asdict().items()}
            epochs.append((policy, {name: field.reshape(self.n_envs, self.n_steps, -1) for name, field in fields.items()}))
        return epochs


def recording_pendulum(**settings) -> RecordingR2VPO:
    model = RecordingR2VPO(
        "MlpPolicy",
        make_vec_env("Pendulum-v1", 2),
        **(SMALL | {"n_steps": 250, "batch_size": 500, "n_epochs": 3, "critic_kwargs": RECOMPUTE} | settings),
    )
    return model.learn(500)


def test_recomputing_with_an_unchanged_critic_changes_nothing():
    """The whole path, time-outs after 200 steps included, against what SB3 computed at collection."""
    (_, first), *later = recording_pendulum(learning_rate=0.0).epochs_in_order()
    assert len(later) == 2
    for _, epoch in later:
        for name, field in first.items():
            np.testing.assert_allclose(epoch[name], field, rtol=1e-4, atol=1e-4)


def test_advantages_are_those_of_the_critic_at_each_epoch():
    model = recording_pendulum(learning_rate=1e-2, gae_lambda=0.0)
    (_, first), *later = model.epochs_in_order()
    rewards = model.rollout_buffer.rewards.T
    for policy, epoch in later:
        for name in ("observations", "actions", "old_log_prob"):
            np.testing.assert_array_equal(epoch[name], first[name])
        with th.no_grad():
            values = policy.predict_values(th.as_tensor(epoch["observations"]).flatten(0, 1)).reshape(2, 250).numpy()
        np.testing.assert_allclose(epoch["old_values"][..., 0], values, rtol=1e-4, atol=1e-4)
        assert np.abs(values - first["old_values"][..., 0]).max() > 0.01
        # One-step targets; an episode ends after 200 steps, and what is beyond the last step is not among the observations
        targets = rewards[:, :-1] + model.gamma * values[:, 1:]
        for steps in (slice(0, 199), slice(200, 249)):
            np.testing.assert_allclose(epoch["returns"][:, steps, 0], targets[:, steps], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                epoch["advantages"][:, steps, 0], (targets - values[:, :-1])[:, steps], rtol=1e-4, atol=1e-4
            )


# --- replay ------------------------------------------------------------------------------------------------------------


def pendulum_off(**settings) -> R2VPOOff:
    return R2VPOOff(
        "MlpPolicy", "Pendulum-v1", **(SMALL | {"replay_capacity": 3, "n_steps": 250, "batch_size": 50} | settings)
    )


def test_staleness_is_logged():
    model = pendulum_off(learning_rate=1e-3).learn(4 * 250)
    values = logged(model)
    assert values["train/ratio_variance_stale_1"] > 0
    assert values["train/ratio_variance_stale_2"] > 0
    assert "train/ratio_variance_stale_0" not in values
    assert "train/ratio_variance_stale_3" not in values


def test_replay_fills_and_forgets():
    model = pendulum_off()
    sizes = []
    for _ in range(5):
        model.learn(250, reset_num_timesteps=False)
        sizes.append(len(model.replay_buffer))
    assert sizes == [1, 2, 3, 3, 3]


def test_behaviour_log_probs_never_change_and_values_do():
    model = pendulum_off().learn(250)
    rollout = model.replay_buffer.rollouts[0]
    before = {name: getattr(rollout.buffer, name).copy() for name in ("log_probs", "observations", "actions", "values")}
    model.learn(2 * 250, reset_num_timesteps=False)
    assert model.replay_buffer.rollouts[0] is rollout
    for name in ("log_probs", "observations", "actions"):
        np.testing.assert_array_equal(getattr(rollout.buffer, name), before[name])
    assert not np.allclose(rollout.buffer.values, before["values"])


def test_recomputing_can_be_switched_off():
    model = pendulum_off(critic_kwargs={"recompute_advantages": False}).learn(250)
    rollout = model.replay_buffer.rollouts[0]
    before = {name: getattr(rollout.buffer, name).copy() for name in ("values", "advantages", "returns")}
    model.learn(250, reset_num_timesteps=False)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(rollout.buffer, name), array)
    assert "train/ratio_variance_stale_1" in logged(model)


def test_refresh_with_an_unchanged_critic_changes_nothing():
    """The whole path (values, last value, time-outs, GAE) against what SB3 computed at collection."""
    model = R2VPOOff("MlpPolicy", make_vec_env("Pendulum-v1", 2), learning_rate=0.0, **(SMALL | {"n_steps": 250}))
    model.learn(500)
    rollout = model.replay_buffer.rollouts[0]
    # An episode of Pendulum is cut off after 200 steps
    assert rollout.timeouts.steps == [199, 199]
    assert rollout.timeouts.envs == [0, 1]
    before = {name: getattr(rollout.buffer, name).copy() for name in ("values", "advantages", "returns", "rewards")}
    rollout.buffer.values, rollout.buffer.advantages, rollout.buffer.returns = (
        np.zeros_like(before["values"]) for _ in range(3)
    )
    # As the next update would: with another rollout that does not go on from it
    model._renew_replayed([rollout, rollout])
    assert logged(model)["train/ratio_variance_stale_1"] < 1e-9
    for name, array in before.items():
        np.testing.assert_allclose(getattr(rollout.buffer, name), array, rtol=1e-4, atol=1e-4)


def test_refreshed_advantages_go_on_in_the_rollout_that_follows():
    """Two rollouts of one policy and critic have the advantages of a single one of twice the length."""
    half, whole = (
        R2VPOOff(
            "MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=0), learning_rate=0.0, **(SMALL | {"n_steps": n_steps})
        ).learn(500)
        for n_steps in (125, 250)
    )
    expected = whole.replay_buffer.rollouts[0].buffer.advantages.reshape(2, 250)
    for rollout, steps in zip(half.replay_buffer.rollouts, (slice(125), slice(125, None)), strict=True):
        np.testing.assert_allclose(rollout.buffer.advantages.reshape(2, 125), expected[:, steps], rtol=1e-4, atol=1e-4)


def test_refresh_brings_the_bootstrap_at_timeouts_up_to_date():
    model = R2VPOOff("MlpPolicy", "Pendulum-v1", learning_rate=0.0, **(SMALL | {"n_steps": 250})).learn(250)
    rollout = model.replay_buffer.rollouts[0]
    rewards = rollout.buffer.rewards.copy()
    with th.no_grad():
        model.policy.value_net.bias += 10
    model._renew_replayed([rollout, rollout])
    difference = rollout.buffer.rewards - rewards
    expected = np.zeros_like(rewards)
    expected[199, 0] = 10 * model.gamma
    np.testing.assert_allclose(difference, expected, atol=1e-3)


@pytest.mark.parametrize(("utd_ratio", "expected"), [(2.0, 20), (1.0, 10), (0.5, 5), (0.01, 1)])
def test_utd_ratio_counts_updates(utd_ratio, expected):
    model = pendulum_off(utd_ratio=utd_ratio, n_epochs=10, replay_capacity=2)
    model.learn(250)
    # Adam counts its steps
    adam_state = model.policy.optimizer.state[model.policy.log_std]
    before = adam_state["step"].item()
    model.learn(250, reset_num_timesteps=False)
    assert adam_state["step"].item() - before == expected * 5


def test_replay_buffer_is_saved_apart(tmp_path):
    model = pendulum_off().learn(500)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = R2VPOOff.load(tmp_path / "model", env=model.get_env())
    # Not in the zip
    assert len(loaded.replay_buffer) == 0
    loaded.load_replay_buffer(tmp_path / "replay")
    for ours, theirs in zip(loaded.replay_buffer.rollouts, model.replay_buffer.rollouts, strict=True):
        np.testing.assert_array_equal(ours.buffer.log_probs, theirs.buffer.log_probs)
        np.testing.assert_array_equal(ours.buffer.observations, theirs.buffer.observations)
    loaded.learn(250)
    assert len(loaded.replay_buffer) == 3


def test_zip_does_not_grow_with_the_replay(tmp_path):
    model = pendulum_off()
    model.save(tmp_path / "empty")
    model.learn(3 * 250).save(tmp_path / "full")
    replayed = sum(rollout.buffer.observations.nbytes for rollout in model.replay_buffer.rollouts)
    assert (tmp_path / "full.zip").stat().st_size < (tmp_path / "empty.zip").stat().st_size * 3
    assert replayed > 0
    assert len(model._timeouts) > 0
    assert "_timeouts" not in read_archive(tmp_path / "full.zip")["data"]


def test_smaller_capacity_keeps_the_newest(tmp_path):
    model = pendulum_off().learn(3 * 250)
    model.save_replay_buffer(tmp_path / "replay")
    smaller = pendulum_off(replay_capacity=2)
    smaller.load_replay_buffer(tmp_path / "replay")
    assert len(smaller.replay_buffer) == 2
    for ours, theirs in zip(smaller.replay_buffer.rollouts, model.replay_buffer.newest(2), strict=True):
        np.testing.assert_array_equal(ours.buffer.log_probs, theirs.buffer.log_probs)


@pytest.mark.parametrize(("algorithm", "settings"), [(R2VPO, {}), (R2VPOOff, {"replay_capacity": 1})])
def test_without_a_replay_there_is_nothing_to_save_or_to_load(algorithm, settings, tmp_path):
    model = algorithm("MlpPolicy", "Pendulum-v1", **SMALL, **settings)
    with pytest.raises(ValueError, match="keeps no rollouts after their own update"):
        model.save_replay_buffer(tmp_path / "replay")
    assert not (tmp_path / "replay.pkl").exists()
    pendulum_off().learn(250).save_replay_buffer(tmp_path / "replay")
    with pytest.raises(ValueError, match="keeps no rollouts after their own update"):
        model.load_replay_buffer(tmp_path / "replay")


class SetsAdvantages(BaseCallback):
    """Replaces what was computed of a rollout, as in https://github.com/DLR-RM/stable-baselines3/pull/2000."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces

    def _on_rollout_end(self) -> None:
        if self.replaces:
            self.model.rollout_buffer.advantages[:] = 7.0

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (R2VPOOff, {}),
        (R2VPOOff, {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 2}}),
        (R2VPO, {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 2}}),
        (R2VPO, {"critic_kwargs": {"recompute_advantages": True}}),
        (R2VPO, {}),
    ],
)
def test_advantages_that_a_callback_sets_are_trained_on(algorithm, settings, replaces, monkeypatch):
    """In the update on the rollout and in the later ones, whatever is computed anew otherwise."""
    model = algorithm("MlpPolicy", "Pendulum-v1", **SMALL, **settings)
    drawn = []
    minibatches = model._minibatches

    def recording(rollouts):
        for batch in minibatches(rollouts):
            drawn.append(batch.samples.advantages)
            yield batch

    monkeypatch.setattr(model, "_minibatches", recording)
    model.learn(3 * 32, callback=SetsAdvantages(replaces))
    assert bool((th.cat(drawn) == 7.0).all()) == replaces
    assert bool((th.cat(drawn) == 7.0).any()) == replaces


def test_foreign_replay_buffers_are_refused(tmp_path):
    model = pendulum_off().learn(250)
    model.save_replay_buffer(tmp_path / "replay")
    cartpole = R2VPOOff("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.raises(ValueError, match="this model's spaces are"):
        cartpole.load_replay_buffer(tmp_path / "replay")
    assert len(cartpole.replay_buffer) == 0
    save_to_pkl(tmp_path / "other", {"not": "a buffer"})
    with pytest.raises(ValueError, match="holds a dict, not a RolloutReplayBuffer"):
        model.load_replay_buffer(tmp_path / "other")
    assert len(model.replay_buffer) == 1


# --- a critic that learns apart ----------------------------------------------------------------------------------------


def apart(**settings) -> R2VPOOff:
    kwargs = {"n_rollouts": 4, "n_epochs": 3} | settings.pop("critic_kwargs", {})
    return pendulum_off(**({"critic_kwargs": kwargs, "replay_capacity": 2} | settings))


def named_weights(model: R2VPOOff) -> dict[str, th.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}


@pytest.mark.parametrize("compile", [False, True])
def test_critic_and_policy_learn_apart(compile, monkeypatch):
    """The critic's steps change the critic alone, and the policy's the policy alone."""
    model = apart(compile=compile)
    before, after_critic = {}, {}
    fit = model.critic.fit

    def observed(*args):
        before.update(named_weights(model))
        fit(*args)
        after_critic.update(named_weights(model))

    monkeypatch.setattr(model.critic, "fit", observed)
    model.learn(2 * 250)
    for name, parameter in named_weights(model).items():
        is_critic = "value" in name
        assert th.equal(before[name], after_critic[name]) != is_critic
        assert th.equal(after_critic[name], parameter) == is_critic


def test_critic_learns_from_rollouts_that_the_policy_has_forgotten(monkeypatch):
    drawn = {}

    def recording(user):
        def passes_of_user(*args):
            # Those of the last update are left
            drawn[user] = [[*minibatches] for minibatches in passes(*args)]
            return map(iter, drawn[user])

        return passes_of_user

    for user in ("critic", "algorithm"):
        monkeypatch.setattr(f"sb3_r2vpo.common.{user}.passes", recording(user))
    model = apart(critic_kwargs={"n_epochs": 4}).learn(6 * 250)
    assert len(model.replay_buffer) == 4
    policy_steps, critic_steps = (
        th.cat([batch.observations for minibatches in drawn[user] for batch in minibatches]).unique(dim=0)
        for user in ("algorithm", "critic")
    )
    assert len(policy_steps) == 2 * 250
    assert len(critic_steps) == 4 * 250


def steps_made(model) -> tuple[set[float], set[float]]:
    """How often Adam has changed the parameters of the policy, and of the critic"""
    numbers = set(), set()
    for name, parameter in model.policy.named_parameters():
        numbers["value" in name].add(model.policy.optimizer.state[parameter]["step"].item())
    return numbers


def test_critic_epochs_count_the_critics_steps():
    model = apart().learn(2 * 250)
    # Two rollouts, three passes over one rollout's worth of steps, or twice two, and five minibatches each
    assert steps_made(model) == ({2 * 2 * 2 * 5}, {2 * 3 * 5})


def test_critic_and_policy_have_horizons_of_their_own(monkeypatch):
    """Targets with a lambda of one are discounted sums of rewards; advantages with zero are temporal differences."""
    model = apart(learning_rate=0.0, gae_lambda=0.0, critic_kwargs={"gae_lambda": 1.0})
    targets = {}

    def critics_passes(rollouts, *args):
        targets.update({id(rollout): rollout.buffer.returns.flatten().copy() for rollout in rollouts})
        return passes(rollouts, *args)

    monkeypatch.setattr("sb3_r2vpo.common.critic.passes", critics_passes)
    model.learn(250)
    (rollout,) = model.replay_buffer.rollouts
    rewards, values = rollout.buffer.rewards.flatten(), rollout.buffer.values.flatten()
    with th.no_grad():
        last_value = model.policy.predict_values(th.as_tensor(rollout.last_obs)).item()
    # Pendulum's first episode ends after 200 steps, its bootstrap is in the reward already
    expected, one_step = np.zeros(250), np.zeros(250)
    following_return = following_value = last_value
    for step in reversed(range(250)):
        if step == 199:
            following_return = following_value = 0.0
        expected[step] = following_return = rewards[step] + model.gamma * following_return
        one_step[step] = rewards[step] + model.gamma * following_value - values[step]
        following_value = values[step]
    np.testing.assert_allclose(targets[id(rollout)], expected, rtol=1e-4)
    np.testing.assert_allclose(rollout.buffer.advantages.flatten(), one_step, rtol=1e-3, atol=1e-3)


def test_critic_comes_closer_to_its_targets():
    model = apart(learning_rate=1e-3, gamma=0.5, critic_kwargs={"n_epochs": 40}).learn(4 * 250)

    def error() -> float:
        """On the targets that the last update was made with"""
        steps = [rollout.samples for rollout in rollouts]
        observations = th.cat([step.observations for step in steps])
        with th.no_grad():
            return (model.policy.predict_values(observations).flatten() - targets).square().mean().item()

    rollouts = list(model.replay_buffer.rollouts)
    targets = th.cat([rollout.samples.returns for rollout in rollouts])
    before = error()
    model.critic.fit(model, rollouts)
    assert error() < 0.95 * before


@pytest.mark.parametrize("compile", [False, True])
def test_critic_and_policy_have_parameters_and_losses_of_their_own(compile):
    """All in SB3's one optimizer; the loss and the gradient that are logged of the critic are those of its own steps."""
    model = apart(compile=compile, objective_kwargs={"compensate_entropy": False}).learn(250)
    (group,) = model.policy.optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.policy.parameters()]
    of_policy, of_critic = {*model.critic.trains(model.policy)}, critic_parameters(model.policy)
    assert of_critic == {name for name, _ in model.policy.named_parameters() if "value" in name}
    assert of_policy == {name for name, _ in model.policy.named_parameters()} - of_critic
    values = logged(model)
    assert values["train/value_loss"] > 0
    assert values["train/value_grad_norm"] > 0
    assert values["train/loss"] == pytest.approx(values["train/policy_gradient_loss"], abs=1e-5)


@pytest.mark.parametrize(("log_std", "factor"), [(math.log(0.1), 0.1), (math.log(3.0), 1.0)])
@pytest.mark.parametrize("compile", [False, True])
def test_policy_steps_are_in_proportion_to_its_standard_deviation(compile, log_std, factor):
    """The first step of Adam is one learning rate long but for `eps`, for each weight; that of the critic is never scaled."""
    kwargs = {"n_rollouts": 2, "n_epochs": 1, "gae_lambda": 0.99, "std_scaled_learning_rate": True}
    settings = SMALL | {"n_epochs": 1, "batch_size": 32, "learning_rate": 1e-3, "gae_lambda": 0.7, "critic_kwargs": kwargs}
    settings |= {"policy_kwargs": {"log_std_init": log_std}, "compile": compile}
    model = R2VPO("MlpPolicy", "Pendulum-v1", **settings)
    before = named_weights(model)
    model.learn(32)
    for name, parameter in model.policy.named_parameters():
        longest = (parameter - before[name]).abs().max().item()
        assert longest == pytest.approx(1e-3 if "value" in name else factor * 1e-3, rel=0.2)
    assert logged(model)["train/learning_rate"] == 1e-3
    assert logged(model)["train/policy_learning_rate"] == pytest.approx(factor * 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "add `n_rollouts`"), ({"critic_kwargs": {"n_rollouts": 2}, "use_sde": True}, "without `use_sde`")],
)
def test_std_scaled_learning_rate_is_refused_without_what_it_needs(settings, message):
    kwargs = {**settings.pop("critic_kwargs", {}), "std_scaled_learning_rate": True}
    with pytest.raises(ValueError, match=message):
        R2VPO("MlpPolicy", "Pendulum-v1", critic_kwargs=kwargs, **settings)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_optimizer_of_policy_and_critic_is_saved(algorithm, tmp_path):
    settings = SMALL | {"n_steps": 250, "batch_size": 50, "critic_kwargs": {"n_rollouts": 4, "n_epochs": 3}}
    model = algorithm("MlpPolicy", "Pendulum-v1", **settings).learn(2 * 250)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    ours, theirs = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert len(ours) == len(list(model.policy.parameters()))
    for number, state in ours.items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert th.equal(state[name], theirs[number][name])
    loaded.learn(250)
    assert steps_made(loaded)[1] == {3 * 3 * 5}


def test_critic_apart_follows_no_epoch_of_the_policy(monkeypatch):
    """The critic is the same at each epoch of the policy, so that advantages are computed but once."""
    computed = []
    renew = Rollout.renew

    def counted(rollout, *args, **kwargs):
        computed.append(rollout)
        renew(rollout, *args, **kwargs)

    monkeypatch.setattr(Rollout, "renew", counted)
    R2VPO("MlpPolicy", "Pendulum-v1", **SMALL, **CRITIC_APART).learn(96)
    # In each update those of the critic's rollouts, one at first and then two, and in the end the policy's
    n_updates = 96 // SMALL["n_steps"]
    assert len(computed) == 3 * n_updates - 1


def test_a_critic_apart_takes_no_random_numbers_of_its_own():
    numbers = []
    for settings in ({}, CRITIC_APART):
        model = R2VPO("MlpPolicy", "Pendulum-v1", **SMALL, **settings)
        numbers.append((weights(model).tolist(), th.rand(3).tolist(), np.random.rand(3).tolist()))
    assert numbers[0] == numbers[1]


class WithoutCritic(ActorCriticPolicy):
    def predict_values(self, obs):
        return th.zeros(len(obs), 1)


def test_policies_without_a_critic_of_their_own_are_refused():
    with pytest.raises(ValueError, match="which this policy does not have"):
        R2VPO(WithoutCritic, "Pendulum-v1", critic_kwargs={"n_rollouts": 2}, **SMALL)


def test_shared_features_are_refused():
    env = RandomEnv(spaces.Box(0, 255, (3, 36, 36), np.uint8), spaces.Discrete(2))
    kwargs = {"n_rollouts": 2}
    with pytest.raises(ValueError, match="share_features_extractor=False"):
        R2VPOOff("CnnPolicy", env, critic_kwargs=kwargs, **SMALL)
    policy_kwargs = {"share_features_extractor": False}
    R2VPOOff("CnnPolicy", env, critic_kwargs=kwargs, policy_kwargs=policy_kwargs, **SMALL).learn(64)


# --- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_cartpole(algorithm):
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    model = algorithm("MlpPolicy", env, n_steps=256, batch_size=256, learning_rate=1e-3, seed=0, device="cpu")
    model.learn(40_000)
    mean_return, _ = evaluate_policy(model, env, n_eval_episodes=20)
    # A random policy gets 22, the maximum is 500
    assert mean_return > 400


def test_learns_a_bandit():
    """The sign and the size of the update: the better of two arms is found within 20 rollouts."""

    class Bandit(RandomEnv):
        def step(self, action):
            return self.observation_space.sample(), float(action), True, False, {}

    model = R2VPO("MlpPolicy", Bandit(VECTOR, spaces.Discrete(2)), **(SMALL | {"n_steps": 64, "learning_rate": 3e-3}))
    model.learn(20 * 64)
    observations = th.rand(100, 3) * 2 - 1
    probabilities = model.policy.get_distribution(observations).distribution.probs
    assert probabilities[:, 1].mean() > 0.95


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_default_tolerance_is_that_of_the_action_space(algorithm, tmp_path):
    env = RandomEnv(VECTOR, spaces.Box(-1, 1, (4,)))
    model = algorithm("MlpPolicy", env, **SMALL)
    assert target_variance(model) == pytest.approx(0.02)
    model.save(tmp_path / "model")
    assert target_variance(algorithm.load(tmp_path / "model")) == pytest.approx(0.02)
    assert target_variance(algorithm.load(tmp_path / "model", target_variance="auto")) == pytest.approx(0.02)
