"""NaN, infinity and absurd numbers: refused where they come from, before anything has used them."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, logged, weights
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.callbacks import DropNonFiniteMinibatches

ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
SEPARATE = {"critic_kwargs": {"n_rollouts": 3, "n_epochs": 2}}
DICT = spaces.Dict({"a": VECTOR, "image": spaces.Box(0, 255, (3, 36, 36), np.uint8), "b": spaces.Discrete(3)})


class PoisonedEnv(RandomEnv):
    """Returns one bad number, in its 46th or 49th step, at which an episode is cut off; it keeps the actions that it got."""

    def __init__(self, observation_space, action_space, where: str = "", value: float = math.nan) -> None:
        super().__init__(observation_space, action_space)
        self.where, self.value, self.actions = where, value, []

    def poisoned(self, obs):
        obs = copy.deepcopy(obs)
        (obs["a"] if isinstance(obs, dict) else obs)[1] = self.value
        return obs

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        is_first = self.where == "first reset" and self.steps == 0
        return self.poisoned(obs) if is_first or (self.where == "reset" and self.steps == 49) else obs, info

    def step(self, action):
        self.actions.append(action)
        obs, reward, terminated, truncated, info = super().step(action)
        if self.where == "reward" and self.steps == 46:
            reward = self.value
        if self.where == {46: "observation", 49: "terminal observation"}.get(self.steps):
            obs = self.poisoned(obs)
        return obs, reward, terminated, truncated, info


def poisoned_envs(where, value, observation_space=VECTOR, action_space=ACTIONS):
    """Of two environments, the second one is poisoned."""
    spaces_ = observation_space, action_space
    return DummyVecEnv([lambda: Monitor(PoisonedEnv(*spaces_)), lambda: Monitor(PoisonedEnv(*spaces_, where, value))])


def statistics(env) -> dict[str, np.ndarray]:
    """What ``VecNormalize`` knows"""
    if not isinstance(env, VecNormalize):
        return {}
    of_obs = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
    rms = {"return": env.ret_rms, **of_obs}
    return {f"{name}.{part}": np.array(getattr(r, part)) for name, r in rms.items() for part in ("mean", "var", "count")}


def state_of(model) -> dict[str, np.ndarray]:
    """All that a refused number must not reach"""
    adam = model.policy.optimizer.state_dict()["state"]
    state = {f"adam.{i}.{name}": np.array(value) for i, s in adam.items() for name, value in s.items()}
    state |= {"weights": weights(model).numpy(), "multiplier": model.policy_loss.multiplier.value.clone().numpy()}
    for i, rollout in enumerate(model.replay_buffer.rollouts if model.replay_buffer else ()):
        state |= {f"replay.{i}.{name}": getattr(rollout.buffer, name).copy() for name in ("rewards", "actions", "log_probs")}
    return state


def assert_equal_states(first, second) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


# === What environments return ===

PLACES = {
    "reward": (r"reward in environment 1 is {}, at step 13 of the rollout \(num_timesteps=90 before it\)"),
    "observation": r"observation\[1\] in environment 1 is {}, at step 13 of the rollout \(num_timesteps=90 before it\)",
    "terminal observation": r"terminal observation\[1\] in environment 1 is {}, at step 16 .*num_timesteps=96",
    "reset": r"observation\[1\] in environment 1 is {}, at step 16 .*num_timesteps=96 before it\), as the first one",
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", PLACES)
def test_a_bad_number_is_refused_before_it_acts(where: str, value: float, normalize: bool, tmp_path) -> None:
    env = inner = poisoned_envs(where, value)
    if normalize:
        env = VecNormalize(inner)
    # One more is kept than there will be, as the oldest makes room before the next is collected
    model = R2VPOOff("MlpPolicy", env, replay_capacity=3, **SMALL)
    model.learn(64)
    before = state_of(model)
    seen: list[dict[str, np.ndarray]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=PLACES[where].format(value)) as error:
            model.learn(64, reset_num_timesteps=False, callback=lambda *_: seen.append(statistics(env)) or True)
    assert "wrapper" in str(error.value)
    assert_equal_states(before, state_of(model))
    # As after the step before
    assert_equal_states(seen[-1], statistics(env))
    assert all(np.isfinite(array).all() for array in seen[-1].values())
    # Nothing is left of the checks
    assert model.get_env() is env
    assert not normalize or env.venv is inner
    # And nothing has acted upon it
    actions = inner.envs[1].unwrapped.actions
    assert len(actions) == (46 if where in ("reward", "observation") else 49)
    assert np.isfinite(actions).all()
    # The model can be saved, and goes on where the environment does
    inner.envs[1].unwrapped.where = ""
    model.save(tmp_path / "model")
    model.learn(64, reset_num_timesteps=False)
    assert weights(model).isfinite().all()
    assert not th.equal(weights(model), th.as_tensor(before["weights"]))
    assert len(model.replay_buffer) == 2


@pytest.mark.parametrize("value", [1e200, -1e39, 1.7e308])
@pytest.mark.parametrize("n_numbers", [3, 40])
def test_an_observation_that_32_bits_cannot_hold_is_refused(n_numbers: int, value: float) -> None:
    space = spaces.Box(-np.inf, np.inf, (n_numbers,), np.float64)
    env = VecNormalize(poisoned_envs("observation", value, space))
    model = R2VPO("MlpPolicy", env, **SMALL).learn(64)
    with pytest.raises(ValueError, match=re.escape(f"is {value}, more than 32 bits hold, at step 13")):
        model.learn(64, reset_num_timesteps=False)
    assert all(np.isfinite(array).all() for array in statistics(env).values())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("observation_space", "policy"), [(VECTOR, "MlpPolicy"), (DICT, "MultiInputPolicy")])
def test_the_first_observation_is_checked(observation_space, policy, normalize: bool) -> None:
    env = poisoned_envs("first reset", math.nan, observation_space, spaces.Discrete(2))
    if normalize:
        env = VecNormalize(env, norm_obs_keys=["a"] if observation_space is DICT else None)
    model = R2VPO(policy, env, **SMALL)
    before = state_of(model), statistics(env)
    with pytest.raises(ValueError, match=r"observation.*\[1\] in environment 1 is nan, after a reset"):
        model.learn(64)
    assert_equal_states(before[0], state_of(model))
    assert_equal_states(before[1], statistics(env))
    assert env.get_attr("steps") == [0, 0]
    env.get_attr("unwrapped")[1].where = ""
    model.learn(64)


@pytest.mark.parametrize("where", ["observation", "terminal observation"])
@pytest.mark.parametrize("action_space", [ACTIONS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_parts_of_an_observation_are_named(where: str, action_space) -> None:
    env = poisoned_envs(where, math.inf, DICT, action_space)
    model = R2VPO("MultiInputPolicy", env, **{**SMALL, "n_steps": 64})
    with pytest.raises(ValueError, match=rf"{where}\['a'\]\[1\] in environment 1 is inf"):
        model.learn(128)
    assert np.isfinite(env.envs[1].unwrapped.actions).all()


@pytest.mark.parametrize(
    "wrap", [lambda e: VecFrameStack(VecNormalize(VecMonitor(e)), 2), lambda e: VecNormalize(VecNormalize(e)), VecMonitor]
)
def test_checks_are_beneath_each_normalization(wrap) -> None:
    env = wrap(poisoned_envs("observation", math.inf))
    model = R2VPO("MlpPolicy", env, **SMALL)
    model.learn(64)
    with pytest.raises(ValueError, match=r"observation\[1\] in environment 1 is inf"):
        model.learn(64, reset_num_timesteps=False)
    while hasattr(env, "venv"):
        assert all(np.isfinite(array).all() for array in statistics(env).values())
        env = env.venv


def test_a_wrapper_above_the_normalization_is_checked_too() -> None:
    class NanAbove(VecMonitor):
        def step_wait(self):
            obs, *rest = super().step_wait()
            return obs * np.nan, *rest

    env = NanAbove(VecNormalize(poisoned_envs("", 0.0)))
    with pytest.raises(ValueError, match=r"observation\[0\] in environment 0 is nan, at step 0"):
        R2VPO("MlpPolicy", env, **SMALL).learn(64)
    assert [len(e.unwrapped.actions) for e in env.unwrapped.envs] == [1, 1]


@pytest.mark.filterwarnings("error", "ignore:The environment is already wrapped with a `Monitor`")
def test_nobody_sees_the_checks(tmp_path) -> None:
    def make_env():
        return VecNormalize(VecMonitor(DummyVecEnv([lambda: Monitor(PoisonedEnv(VECTOR, ACTIONS))])))

    env = make_env()
    chain = [env, env.venv, env.venv.venv]

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            found = [self.training_env, self.training_env.venv, self.training_env.venv.venv]
            assert found[0] is env
            assert [isinstance(e, type(c)) for e, c in zip(found, chain, strict=True)] == [True] * 3
            assert self.training_env.env_is_wrapped(Monitor) == [True]
            assert self.training_env.get_attr("steps") == [self.num_timesteps]
            # What is set on it is set on what it stands for
            found[1].note = self.num_timesteps
            assert self.model.get_vec_normalize_env() is env
            copy.deepcopy(self.locals["env"].unwrapped.envs)
            env.save(tmp_path / "normalization.pkl")
            return True

    # Its statistics are the training's, not its own
    (eval_env := make_env()).training = False
    evaluation = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=16, verbose=0)
    R2VPO("MlpPolicy", env, **SMALL).learn(64, callback=[Look(), evaluation])
    assert [env, env.venv, env.venv.venv] == chain
    assert chain[1].note == 64
    loaded = VecNormalize.load(tmp_path / "normalization.pkl", make_env().venv)
    assert_equal_states(statistics(env), statistics(loaded))
    assert_equal_states(statistics(env), statistics(evaluation.eval_env))


class Raising(PoisonedEnv):
    def step(self, action):
        if self.steps == 40:
            raise KeyError("the user's own")
        return super().step(action)


def test_exceptions_of_an_environment_pass_unchanged() -> None:
    env = VecNormalize(inner := DummyVecEnv([lambda: Raising(VECTOR, ACTIONS)]))
    model = R2VPO("MlpPolicy", env, **SMALL)
    with pytest.raises(KeyError, match="the user's own") as error:
        model.learn(64)
    assert error.value.__cause__ is None
    assert env.venv is inner


# === What the policy does ===


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_actions_are_not_sent(value: float) -> None:
    env = poisoned_envs("", 0.0)
    model = R2VPO("MlpPolicy", env, **SMALL)
    forward = model.policy.forward

    def bad_forward(obs, deterministic=False):
        actions, values, log_prob = forward(obs, deterministic)
        if model.rollout_buffer.pos == 5:
            actions[1, 0] = value
        return actions, values, log_prob

    model.policy.forward = bad_forward
    if math.isnan(value):
        with pytest.raises(ValueError, match=r"action\[0\] in environment 1 is .*, at step 5 .*num_timesteps=10.*not sent"):
            model.learn(64)
        assert env.get_attr("steps") == [5, 5]
    else:
        # Clipped to the bound, as SB3 does; the rollout is not learned from
        before = weights(model)
        with pytest.raises(ValueError, match=r"rollout's actions have NaN or infinity: inf in environment 1, at step 5"):
            model.learn(64)
        assert th.equal(weights(model), before)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_probabilities_that_are_not_finite_are_named(action_space) -> None:
    large = spaces.Box(-3e38, 3e38, (3,), np.float32)
    model = R2VPO("MlpPolicy", RandomEnv(large, action_space), policy_kwargs={"activation_fn": th.nn.ReLU}, **SMALL)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(1e3)
    with pytest.raises(
        ValueError, match=r"probabilities of actions have NaN.*Largest observations, by environment: \[\d.*e\+3"
    ):
        model.learn(64)


def test_weights_that_are_not_finite_do_not_act() -> None:
    env = poisoned_envs("", 0.0)
    model = R2VPO("MlpPolicy", env, **SMALL)
    with th.no_grad():
        model.policy.mlp_extractor.value_net[0].weight[3, 1] = math.inf
    with pytest.raises(ValueError, match=r"parameter `mlp_extractor\.value_net\.0\.weight` has NaN or infinity"):
        model.learn(64)
    assert env.get_attr("steps") == [0, 0]


@pytest.mark.parametrize(("name", "value"), [("values", math.nan), ("log_probs", -math.inf), ("advantages", math.inf)])
def test_a_bad_rollout_is_refused_by_name(name: str, value: float) -> None:
    model = R2VPOOff("MlpPolicy", poisoned_envs("", 0.0), replay_capacity=3, **SMALL)
    model.learn(64)
    before = state_of(model)

    class Spoil(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            getattr(self.model.rollout_buffer, name)[7, 1] = value

    with pytest.raises(ValueError, match=rf"rollout's {name} have .* in environment 1, at step 7 .*num_timesteps=78 before"):
        model.learn(64, reset_num_timesteps=False, callback=Spoil())
    assert_equal_states(before, state_of(model))
    model.learn(64, reset_num_timesteps=False)


# === Absurd numbers ===


@pytest.mark.parametrize(("algorithm", "kwargs"), [(R2VPO, {}), (R2VPO, SEPARATE), (R2VPOOff, {"replay_capacity": 8})])
def test_an_absurd_reward_fails_once(algorithm, kwargs) -> None:
    model = algorithm("MlpPolicy", poisoned_envs("reward", 1e30), **kwargs, **SMALL)
    model.learn(64)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"rewards have numbers whose squares overflow: 1.*e\+30 in environment 1, at step 13"
    ):
        model.learn(64, reset_num_timesteps=False)
    assert_equal_states(before, state_of(model))
    for _ in range(3):
        model.learn(64, reset_num_timesteps=False)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize(("algorithm", "kwargs"), [(R2VPO, SEPARATE), (R2VPOOff, {"replay_capacity": 4})])
def test_a_rollout_whose_update_fails_is_not_stored(algorithm, kwargs) -> None:
    model = algorithm("MlpPolicy", poisoned_envs("", 0.0), **kwargs, **SMALL)
    model.learn(128)
    stored = list(model.replay_buffer.rollouts)
    assert len(stored) == 2

    def fail(*_):
        raise ArithmeticError("of a user's policy")

    evaluate, model._evaluate = model._evaluate, fail
    with pytest.raises(ArithmeticError):
        model.learn(64, reset_num_timesteps=False)
    assert list(model.replay_buffer.rollouts) == stored
    model._evaluate = evaluate
    # The cause of a bad gradient may be in any of them
    model.policy.action_net.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(ValueError, match="non-finite"):
        model.learn(64, reset_num_timesteps=False)
    assert len(model.replay_buffer) == 0


# === Gradients ===


def with_minibatches(model, names: str):
    """Let a model learn from three minibatches of its rollout, by name; "n" is one with a NaN."""
    minibatches = model._minibatches

    def chosen(rollouts):
        batches = list(minibatches(rollouts))[:3]
        bad = copy.copy(batches[0])
        bad.samples = bad.samples._replace(advantages=bad.samples.advantages * math.nan)
        for name in names:
            yield bad if name == "n" else batches[int(name)]

    model._minibatches = chosen
    return model


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        SEPARATE,
        {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
        {"policy_kwargs": {"optimizer_kwargs": {"fused": True}}},
        {"policy_kwargs": {"net_arch": [8], "activation_fn": th.nn.ELU}, "ent_coef": 0.01, "target_kl": 1.0},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_a_dropped_minibatch_leaves_no_trace(kwargs) -> None:
    models = []
    for names in ("0n1n2", "012"):
        model = with_minibatches(R2VPO("MlpPolicy", poisoned_envs("", 0.0), **kwargs, **SMALL), names)
        model.learn(64, callback=DropNonFiniteMinibatches(0.5))
        models.append(model)
    assert_equal_states(*map(state_of, models))
    first, second = map(logged, models)
    assert first.pop("train/dropped_minibatches") == 2
    assert second.pop("train/dropped_minibatches") == 0
    for name, value in first.items():
        if name.startswith("train/"):
            assert value == pytest.approx(second[name], rel=1e-5), name


def test_too_many_bad_minibatches_are_an_error_that_names_them() -> None:
    model = with_minibatches(R2VPO("MlpPolicy", poisoned_envs("", 0.0), **SMALL), "0n1n")
    match = r"in minibatch 2 of 4, for `log_std` and \d+ other parameters, and in 1 other minibatches"
    for callback in (None, DropNonFiniteMinibatches(), DropNonFiniteMinibatches(0.45)):
        with pytest.raises(ValueError, match=match):
            model.learn(64, callback=callback)
    model.learn(64, callback=DropNonFiniteMinibatches(0.5))
    # For one `learn` only
    with pytest.raises(ValueError, match=match):
        model.learn(64)
    assert weights(model).isfinite().all()


def test_the_critics_bad_minibatches_count() -> None:
    model = R2VPO("MlpPolicy", poisoned_envs("", 0.0), **SEPARATE, **SMALL)
    calls: list[int] = []

    def hook(gradient):
        calls.append(1)
        return gradient * (math.nan if len(calls) == 3 else 1.0)

    model.policy.value_net.weight.register_hook(hook)
    model.learn(64, callback=DropNonFiniteMinibatches(0.2))
    assert len(calls) == 8
    assert logged(model)["train/dropped_minibatches"] == 1
    assert math.isfinite(logged(model)["train/value_loss"])
    calls.clear()
    with pytest.raises(ValueError, match=r"in minibatch 3 of \d+, for `value_net.weight`\. "):
        model.learn(64)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, "0.1", True, None])
def test_the_share_of_dropped_minibatches_is_checked(share) -> None:
    with pytest.raises(ValueError, match="`max_share` is"):
        DropNonFiniteMinibatches(share)


# === Arguments ===

WHOLE = ["n_steps", "batch_size", "n_epochs", "replay_capacity", "stats_window_size", "sde_sample_freq", "seed"]
NUMBERS = ["gamma", "gae_lambda", "vf_coef", "max_grad_norm", "target_kl", "utd_ratio"]
SCHEDULES = ["learning_rate", "ent_coef", "var_coef", "target_variance", "noise_exponent", "clip_range_vf"]
STRANGE = ["2", True, np.bool_(True), math.nan, [2], np.zeros(2), 2j]


def make(**kwargs):
    algorithm = R2VPOOff if {"replay_capacity", "utd_ratio"} & set(kwargs) else R2VPO
    return algorithm("MlpPolicy", RandomEnv(VECTOR, ACTIONS), **{**SMALL, **kwargs})


def ids(value) -> str:
    return repr(value)


@pytest.mark.parametrize("value", [*STRANGE, 2.0, 2.5, math.inf, -2, np.int64(-2)], ids=ids)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_checked(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is .*; it must be a whole number, at least"):
        make(**{name: value})


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in ("sde_sample_freq", "seed")])
def test_zero_is_no_number_of_anything(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is 0; it must be a whole number, at least 1"):
        make(**{name: 0})


@pytest.mark.parametrize("value", [*STRANGE, -1.0, -math.inf, np.float32(-1)], ids=ids)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is .*; it must be"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", 1.01), ("gae_lambda", 2), ("vf_coef", math.inf), ("utd_ratio", 0), ("target_kl", 0.0)]
)
def test_ranges_are_checked(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is"):
        make(**{name: value})


@pytest.mark.parametrize("value", [*STRANGE, math.inf, -math.inf], ids=ids)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_are_checked(name: str, value) -> None:
    # SB3's PPO has an assertion for `clip_range_vf`
    with pytest.raises((ValueError, AssertionError), match=rf"`{name}`"):
        make(**{name: value})


@pytest.mark.parametrize(("option", "value"), [("clip_range", value) for value in [*STRANGE, -0.1, math.inf]], ids=ids)
def test_options_of_a_baseline_are_checked(option: str, value) -> None:
    with pytest.raises(ValueError, match=rf"`{option}` is"):
        make(objective="ppo_clip", objective_kwargs={option: value})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"normalize_advantage": "False"}, "`normalize_advantage` is 'False'; it must be True or False"),
        ({"compile": "no"}, "`compile` is 'no'"),
        ({"use_sde": None}, "`use_sde` is None"),
        ({"objective_kwargs": {"compensate_entropy": "no"}}, "`compensate_entropy` is 'no'"),
        ({"objective_kwargs": {"dual_learning_rate": True}}, "`dual_learning_rate` is True"),
        ({"objective_kwargs": "clip_range"}, "`objective_kwargs` is 'clip_range'; it must be a dict"),
        ({"critic_kwargs": [("n_rollouts", 2)]}, "`critic_kwargs` is"),
        ({"policy_kwargs": "net_arch"}, "`policy_kwargs` is"),
        ({"objective": ["r2vpo"]}, "`objective` is"),
        ({"critic_kwargs": {"n_rollouts": True}}, "`n_rollouts` is True"),
        ({"critic_kwargs": {"n_rollouts": 2, "gae_lambda": "1"}}, "`gae_lambda` is '1'"),
        ({"critic_kwargs": {"n_rollouts": 2, "std_scaled_learning_rate": "no"}}, "`std_scaled_learning_rate` is 'no'"),
        ({"critic_kwargs": {"recompute_advantages": "no"}}, "`recompute_advantages` is 'no'"),
    ],
)
def test_flags_and_mappings_are_checked(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_numpys_numbers_are_numbers() -> None:
    """``deque``, ``split``, ``random.seed`` and SB3's schedules refuse them."""
    whole = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "replay_capacity": 2, "stats_window_size": 5, "seed": 0}
    numbers = dict.fromkeys(("gamma", "gae_lambda", "vf_coef", "max_grad_norm", "target_kl", "utd_ratio", *SCHEDULES), 0.5)
    others = {name: np.int64(value) for name, value in whole.items()} | {name: np.float32(0.5) for name in numbers}
    python = make(**whole, **numbers, objective_kwargs={"dual_learning_rate": 0.5}).learn(64)
    numpy = make(**others, objective_kwargs={"dual_learning_rate": np.float64(0.5)}).learn(64)
    assert th.equal(weights(python), weights(numpy))
    assert type(numpy.batch_size) is int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("batch_size", "16"),
        ("gamma", math.nan),
        ("ent_coef", math.nan),
        ("vf_coef", -1.0),
        ("target_kl", -1.0),
        ("max_grad_norm", math.nan),
        ("clip_range_vf", "0.2"),
        ("noise_exponent", math.inf),
        ("var_coef", math.nan),
    ],
)
def test_what_is_set_later_is_checked_before_anything_changes(name: str, value) -> None:
    model = make()
    model.learn(32)
    before = state_of(model), model.env.get_attr("steps"), model.num_timesteps, th.get_rng_state()
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"`{name}` is"):
        model.learn(32)
    assert_equal_states(before[0], state_of(model))
    assert before[1:3] == (model.env.get_attr("steps"), model.num_timesteps)
    assert th.equal(before[3], th.get_rng_state())


def test_a_batch_of_one_is_refused_wherever_it_is_set(tmp_path) -> None:
    model = make()
    model.save(tmp_path / "model")
    model.batch_size = 1
    with pytest.raises(AssertionError, match="`batch_size` must be greater than 1"):
        model.learn(32)
    with pytest.raises(AssertionError, match="`batch_size` must be greater than 1"):
        R2VPO.load(tmp_path / "model", env=model.get_env(), batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan,), "`total_timesteps` is nan"),
        ((math.inf,), "`total_timesteps` is inf"),
        (("1e3",), "`total_timesteps` is '1e3'"),
        ((32, None, 0), "`log_interval` is 0"),
        ((32, None, 1.5), "`log_interval` is 1.5"),
    ],
)
def test_arguments_of_learn_are_checked(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().learn(*arguments)


# === Schedules ===


def scheduled(name: str, schedule):
    if name in ("clip_range", "kl_coef"):
        return make(objective="ppo_clip" if name == "clip_range" else "exact_kl", objective_kwargs={name: schedule})
    return make(**{name: schedule})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, None, "0.1", True, [0.1, 0.2]], ids=ids)
@pytest.mark.parametrize("name", [*SCHEDULES, "clip_range", "kl_coef"])
def test_a_bad_value_of_a_schedule_is_named(name: str, value) -> None:
    if (name, value) == ("ent_coef", -1.0):
        pytest.skip("a penalty on the entropy, which SB3's PPO takes as well")
    progress: list[float] = []

    def schedule(remaining: float):
        progress.append(remaining)
        # Good at first, where it is asked for once to make the optimizer
        return value if remaining < 1 else 0.1

    model = scheduled(name, schedule)
    before = state_of(model)
    # The noise's is asked for as a rollout begins
    with pytest.raises(ValueError, match=rf"The schedule of `{name}` returned .* at progress_remaining=0\.[50]"):
        model.learn(64)
    if name != "noise_exponent":
        assert_equal_states(before, state_of(model))
    assert min(progress) >= 0


@pytest.mark.parametrize("name", [*SCHEDULES, "clip_range"])
def test_what_a_schedule_raises_passes_unchanged(name: str) -> None:
    def schedule(remaining: float) -> float:
        if remaining < 1:
            raise LookupError("the user's own")
        return 0.1

    model = scheduled(name, schedule)
    with pytest.raises(LookupError, match="the user's own"):
        model.learn(64)


def test_schedules_stay_at_their_end_where_a_rollout_overshoots() -> None:
    """A linear schedule of the Zoo would be negative there: SB3's PPO then ascends its loss."""
    seen: list[float] = []
    model = make(learning_rate=lambda remaining: seen.append(remaining) or 1e-3 * remaining)
    model.learn(40)
    assert model._current_progress_remaining < 0
    assert min(seen) == 0
    assert model.policy.optimizer.param_groups[0]["lr"] == 0
