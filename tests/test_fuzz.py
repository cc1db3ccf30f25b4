"""Any combination of spaces, policy and settings trains with finite weights, or is refused with a sentence."""

import math
import os
import warnings
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomEnv, weights
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.checkpoint import CheckpointCallback, resume
from sb3_r2vpo.common.worker_vec_env import WorkerVecEnv

# 500 of each have been tried by hand: FUZZ_EXAMPLES=500 python -m pytest -s tests/test_fuzz.py
N_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=N_EXAMPLES,
    derandomize=N_EXAMPLES <= 25,
    suppress_health_check=[*HealthCheck],
    database=None,
    deadline=None,
    # An example is short, and to shorten it takes minutes
    phases=[Phase.generate],
)


class StrictEnv(RandomEnv):
    """Takes actions of its space only."""

    def step(self, action):
        if not self.action_space.contains(action):
            raise TypeError(f"The action {action!r} is not in {self.action_space}.")
        return super().step(action)


# === Spaces ===

vectors = st.builds(
    lambda bounds, shape, dtype: spaces.Box(*bounds, shape, dtype),
    st.sampled_from([(-1.0, 1.0), (-0.1, 300.0), (0.0, 6e4), (-np.inf, np.inf), (2.0, 2.0)]),
    st.sampled_from([(1,), (3,), (17,), (2, 3), (1, 1, 2)]),
    st.sampled_from([np.float32, np.float64, np.float16]),
)
counts = st.sampled_from([spaces.Box(0, 9, (4,), np.int64), spaces.Box(0, 255, (5,), np.uint8)])
images = st.sampled_from([spaces.Box(0, 255, shape, np.uint8) for shape in [(3, 36, 36), (40, 36, 1), (1, 36, 38)]])
discrete = st.sampled_from([spaces.Discrete(2), spaces.Discrete(1), spaces.Discrete(5)])
several = st.sampled_from(
    [spaces.MultiDiscrete([3, 2]), spaces.MultiDiscrete([1]), spaces.MultiBinary(1), spaces.MultiBinary(4)]
)
simple = st.one_of(vectors, counts, discrete, several, st.just(spaces.MultiBinary([2, 2])))
dicts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.one_of(simple, images), min_size=1, max_size=3).map(spaces.Dict)
observation_spaces = st.one_of(simple, images, dicts)
actions = st.sampled_from(
    [spaces.Box(-1, 1, shape, dtype) for shape in [(1,), (3,), (), (2, 2)] for dtype in (np.float32, np.float64)]
    + [spaces.Box(np.float32([-3, 0]), np.float32([0.5, 1e6]))]
)
action_spaces = st.one_of(actions, actions, discrete, several)
#: What networks, or SB3's buffers, have no code for
REFUSED = [
    *(spaces.Discrete(3, start=-1), spaces.Discrete(5, start=2), spaces.MultiDiscrete([2, 3], start=[1, 0])),
    *(spaces.MultiDiscrete([[2, 3], [3, 2]]), spaces.Box(-1, 1, (0,))),
]
REFUSED_OBSERVATIONS = [
    *(spaces.Box(-1, 1, ()), spaces.Dict({}), spaces.Tuple([spaces.Discrete(2)])),
    *(spaces.Dict({"a": spaces.Box(-1, 1, ())}), spaces.Dict({"a": spaces.Discrete(5, start=1)})),
]

# === Settings ===

schedules = st.sampled_from(
    [LinearSchedule(0.1, 0.0, 1.0), lambda progress: 0.05 * progress, lambda progress: np.float32(0.1)]
)


def numbers(*values: float) -> st.SearchStrategy:
    """Some numbers, each as Python's or NumPy's"""
    whole = all(isinstance(value, int) for value in values)
    kinds = (int, np.int64, np.int32) if whole else (float, np.float64, np.float32)
    return st.builds(lambda kind, value: kind(value), st.sampled_from(kinds), st.sampled_from(values))


OBJECTIVES: dict[str, dict[str, st.SearchStrategy]] = {
    "r2vpo": {
        "dual_learning_rate": numbers(0.0, 0.02, 3.0),
        "min_var_coef": numbers(0.0, 0.3),
        "compensate_entropy": st.booleans(),
    },
    "ppo_clip": {"clip_range": st.one_of(numbers(0.1, 1.5), schedules)},
    "clip_higher": {"clip_low": numbers(0.2), "clip_high": numbers(0.28)},
    "gppo": {},
    "topr": {},
    "topr_token": {},
    "exact_kl": {},
    "spo": {"clip_range": numbers(0.2)},
    "r2vpo_sequence": {},
    "m2po": {"threshold": numbers(0.04, 0.0)},
    "gspo": {},
    "cispo": {},
    "sapo": {"temperature_pos": numbers(1.0)},
    "dppo": {},
    "vespo": {},
    "gipo": {"sigma": numbers(0.5)},
    "dro": {},
    "dro_token": {"kl_coef": numbers(1.0)},
}
NEEDED = {"exact_kl": {"kl_coef": st.one_of(numbers(0.0, 0.5), schedules)}}
objectives = st.sampled_from(["r2vpo", "r2vpo", *OBJECTIVES]).flatmap(
    lambda name: st.fixed_dictionaries(
        {
            "objective": st.just(name),
            "objective_kwargs": st.fixed_dictionaries(NEEDED.get(name, {}), optional=OBJECTIVES[name]),
        }
    )
)
critics = st.one_of(
    st.fixed_dictionaries({}, optional={"recompute_advantages": st.booleans()}),
    st.fixed_dictionaries(
        {"n_rollouts": numbers(1, 3)},
        optional={
            "n_epochs": numbers(1, 2),
            "gae_lambda": numbers(0.0, 0.99, 1.0),
            "std_scaled_learning_rate": st.booleans(),
        },
    ),
)
networks = st.fixed_dictionaries(
    {"net_arch": st.sampled_from([[], [8], {"pi": [4], "vf": []}, {"pi": [], "vf": [5, 3]}])},
    optional={
        "ortho_init": st.booleans(),
        "share_features_extractor": st.booleans(),
        "activation_fn": st.sampled_from([th.nn.ReLU, th.nn.Tanh, th.nn.GELU]),
        "log_std_init": numbers(-2.0, 0.0, 2.0),
        "normalize_images": st.booleans(),
        "optimizer_class": st.sampled_from([th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop]),
    },
)
SETTINGS: dict[str, st.SearchStrategy] = {
    "learning_rate": st.one_of(numbers(0.0, 3e-4, 1.0), schedules),
    "n_epochs": numbers(1, 3),
    "gamma": numbers(0.0, 0.9, 1.0),
    "gae_lambda": numbers(0.0, 0.95, 1.0),
    "var_coef": st.one_of(st.sampled_from(["auto", "auto_0.5", "auto_0"]), numbers(0.0, 0.3, 1e6), schedules),
    "target_variance": st.one_of(st.just("auto"), numbers(1e-6, 0.02, 5.0), schedules),
    "critic_kwargs": critics,
    "noise_exponent": st.one_of(st.just("auto"), numbers(0.0, 0.5, 2.0), schedules),
    "clip_range_vf": st.one_of(st.none(), numbers(0.2), schedules),
    "normalize_advantage": st.sampled_from([True, False, np.bool_(True), 0]),
    "ent_coef": st.one_of(numbers(-0.1, 0.0, 0.1), schedules),
    "vf_coef": numbers(0.0, 0.5, 10.0),
    "max_grad_norm": st.one_of(st.none(), numbers(0.5, 1e-6)),
    "use_sde": st.sampled_from([False, False, True]),
    "sde_sample_freq": numbers(-1, 1, 4),
    "target_kl": st.one_of(st.none(), numbers(1e-9, 0.1)),
    "stats_window_size": numbers(1, 100),
    "seed": st.one_of(st.none(), numbers(0, 2**31 - 1)),
    "policy_kwargs": networks,
}
OFF_POLICY = {"replay_capacity": numbers(1, 3), "utd_ratio": st.one_of(numbers(0.1, 1.0, 2.5), numbers(1, 2))}

#: What no setting is, or not each of them
STRANGE = st.sampled_from(
    [
        *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 2.5, True, False, None, 2j, 10**400, 10**30, object()),
        *("2", "", "auto_x", "nan", b"1", [], [2], {}, {"x": 1}, th.tensor(0.5), np.zeros(2), np.array(2.0)),
        *(np.int64(-1), np.uint8(200), np.float64("nan"), np.bool_(False)),
        *(lambda progress: math.nan, lambda progress: None, lambda progress: "x"),
    ]
)
#: Options within; those of a policy are its own business
STRANGE_PARTS = {
    "objective_kwargs": ["clip_range", "dual_learning_rate", "min_var_coef", "compensate_entropy", "kl_coef", "sigma", "x", 1],
    "critic_kwargs": ["n_rollouts", "n_epochs", "gae_lambda", "std_scaled_learning_rate", "recompute_advantages", "x", 1],
}
NAMES = [*SETTINGS, *OFF_POLICY, "n_steps", "batch_size", "objective", *STRANGE_PARTS, *STRANGE_PARTS]


def try_to_train(
    tried: Counter, observation_space: gym.Space, action_space: gym.Space, kwargs: dict[str, Any], n_envs: int
) -> None:
    """
    :raises AssertionError: It neither trains nor is refused with a sentence, or weights are not finite.
    """
    algorithm = R2VPOOff if set(OFF_POLICY) & set(kwargs) else R2VPO
    is_dict = isinstance(observation_space, spaces.Dict)
    is_image = isinstance(observation_space, spaces.Box) and observation_space.shape[-1:] in ((36,), (38,), (1,))
    is_image &= len(observation_space.shape or ()) == 3 and observation_space.dtype == np.uint8
    policy = "MultiInputPolicy" if is_dict else "CnnPolicy" if is_image else "MlpPolicy"
    model, refusal = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = DummyVecEnv([lambda: StrictEnv(observation_space, action_space)] * n_envs)
        try:
            model = algorithm(policy, env, device="cpu", **kwargs)
            model.learn(model.n_steps * n_envs)
        except (ValueError, AssertionError) as error:
            refusal = error
    if refusal is not None:
        message = str(refusal)
        if len(message.split()) < 4:
            raise AssertionError(f"{message!r} is no sentence.") from refusal
        tried[message[:60]] += 1
    else:
        tried["trained"] += 1
    assert model is None or weights(model).isfinite().all()


def report(tried: Counter) -> None:
    """Shown with ``-s``"""
    print(f"\n{tried['trained']} of {tried.total()} were trained. The others:")
    for message, count in tried.most_common():
        if message != "trained":
            print(f"  {count:4d}  {message}".replace("\n", " "))


sizes = st.fixed_dictionaries({"n_steps": numbers(8, 13, 2), "batch_size": numbers(8, 16, 3, 2)})


@pytest.fixture
def tried():
    counter: Counter = Counter()
    yield counter
    report(counter)


def test_valid_settings_train(tried) -> None:
    @fuzzed
    @given(
        observation_spaces,
        action_spaces,
        sizes,
        objectives,
        st.fixed_dictionaries({}, optional=SETTINGS),
        st.fixed_dictionaries({}, optional=OFF_POLICY),
        st.sampled_from([1, 2]),
    )
    def run(observation_space, action_space, sizes, objective, others, off_policy, n_envs) -> None:
        kwargs = {**sizes, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, **objective, **others, **off_policy}
        # What can't be combined
        if not isinstance(action_space, spaces.Box):
            kwargs.pop("use_sde", None)
        if not isinstance(action_space, spaces.Box) or kwargs.get("use_sde"):
            kwargs.pop("noise_exponent", None)
        if "n_rollouts" in kwargs.get("critic_kwargs", {}):
            kwargs.pop("clip_range_vf", None)
        try_to_train(tried, observation_space, action_space, kwargs, n_envs)

    run()
    assert tried["trained"] >= tried.total() / 2


def test_strange_settings_are_refused_with_a_sentence(tried) -> None:
    @fuzzed
    @given(st.data())
    def run(data) -> None:
        base = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}
        if data.draw(st.booleans(), label="other objective"):
            base |= {"objective": "ppo_clip", "objective_kwargs": {"clip_range": 0.2}}
        name, value = data.draw(st.sampled_from(NAMES), label="name"), data.draw(STRANGE, label="value")
        if name in STRANGE_PARTS and data.draw(st.booleans(), label="within"):
            parts = {data.draw(st.sampled_from(STRANGE_PARTS[name]), label="option"): value}
            base[name] = {**base.get(name, {}), **parts}
            if name == "critic_kwargs" and data.draw(st.booleans(), label="separate critic"):
                base[name] = {"n_rollouts": 2, **parts}
        else:
            base[name] = value
        # What is large is not too large to be a size: it is not tried
        if not (name in ("n_steps", "n_epochs", "replay_capacity", "utd_ratio") and str(value) in (str(10**30), "200")):
            try_to_train(tried, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), base, 1)

    run()
    assert tried["trained"] < tried.total() / 2


@pytest.mark.parametrize("space", [*REFUSED, *REFUSED_OBSERVATIONS], ids=str)
def test_spaces_are_refused_before_training(space) -> None:
    """SB3's PPO sends actions that are not in such spaces, or stops with an IndexError or TypeError from within."""
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=r"[Tt]he observation.* space (is|has) "):
        R2VPO(policy, RandomEnv(space, spaces.Discrete(2)), n_steps=8, device="cpu")
    if space in REFUSED:
        with pytest.raises(ValueError, match=r"The action space (is|has) "):
            R2VPO("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), space), n_steps=8, device="cpu")


def test_a_feature_extractor_of_ones_own_may_take_numbers_without_a_dimension() -> None:
    class Extractor(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Box) -> None:
            super().__init__(observation_space, 1)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return observations[:, None]

    env = RandomEnv(spaces.Box(-1, 1, ()), spaces.Discrete(2))
    kwargs = {"features_extractor_class": Extractor}
    model = R2VPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", policy_kwargs=kwargs).learn(8)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("name", ["objective_kwargs", "critic_kwargs", "policy_kwargs"])
def test_names_of_options_are_strings(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` has the key 1; its keys must be names of options"):
        R2VPO("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), **{name: {1: 0.1}})


@pytest.mark.parametrize(
    ("action_space", "objective"),
    [(spaces.Box(-1, 1, (2, 2)), "r2vpo"), (spaces.MultiBinary(4), "cispo"), (spaces.MultiDiscrete([2, 3]), "r2vpo")],
)
def test_a_separate_critic_takes_actions_of_any_shape_and_type(action_space, objective: str) -> None:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), action_space)
    kwargs = {"critic_kwargs": {"n_rollouts": 2, "n_epochs": 1}, "objective": objective}
    model = R2VPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", **kwargs).learn(8)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("name", ["stats_window_size", "n_steps", "seed"])
def test_whole_numbers_are_not_larger_than_lists_can_be(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`{name}` is 1000.*; it must be a whole number, .* and at most 9223372036854775807"
    ):
        R2VPO("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), **{name: 10**30})


@pytest.mark.parametrize(
    "kwargs", [{"every": "5"}, {"every": True}, {"every": math.nan}, {"keep_best": "no"}, {"keep": 10**30}]
)
def test_arguments_of_checkpoints_are_checked(kwargs, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(kwargs))}` is "):
        CheckpointCallback(tmp_path, **kwargs)


@pytest.mark.parametrize("kwargs", [{"restart": "False"}, {"timeout": "5"}, {"start_timeout": True}, {"max_restarts": "1"}])
def test_arguments_of_workers_are_checked(kwargs) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(kwargs))}` is "):
        WorkerVecEnv([lambda: RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))], **kwargs)


def test_the_length_of_rollouts_is_not_set_later(tmp_path) -> None:
    """The rollout buffer would be trained on with the steps of the rollout before."""
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    model = R2VPO("MlpPolicy", env, n_steps=16, batch_size=8, device="cpu").learn(16)
    model.save(tmp_path / "model")
    model.n_steps = 8
    with pytest.raises(ValueError, match=r"`n_steps` is 8, but the rollout buffer was made for 16 steps"):
        model.learn(16)
    assert R2VPO.load(tmp_path / "model", env=env, n_steps=8).learn(8).rollout_buffer.buffer_size == 8


def test_a_folder_of_checkpoints_that_cannot_be_is_an_error_before_training(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    model = R2VPO("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), n_steps=16, batch_size=8, device="cpu")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            model.learn(16, callback=CheckpointCallback(folder))
    assert model.num_timesteps == 0


def test_training_is_resumed_in_environments(tmp_path) -> None:
    with pytest.raises(ValueError, match="`env` is None"):
        resume(tmp_path, None)
