"""Files: what can be written comes back equal, what is damaged is refused, and nothing that a file says is run."""

import base64
import contextlib
import copy
import errno
import functools
import io
import json
import math
import os
import pickle
import random
import resource
import sys
import threading
import zipfile
from collections import OrderedDict, deque
from pathlib import Path, PosixPath
from warnings import catch_warnings, simplefilter

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, weights
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file, save_to_pkl
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_r2vpo
from sb3_r2vpo import R2VPO, MaskableR2VPO, MaskableR2VPOOff, MaskableRecurrentR2VPO, R2VPOOff, RecurrentR2VPO
from sb3_r2vpo.common import allowed, archive
from sb3_r2vpo.common.archive import CorruptFileError, read_archive, write_archive, written_atomically
from sb3_r2vpo.common.policies import LayerNormMlpPolicy, MlpPolicy
from sb3_r2vpo.common.rollout import Rollout, RolloutReplayBuffer
from sb3_r2vpo.common.saving import load_normalization, save_normalization
from sb3_r2vpo.common.serialization import LostError, UntrustedError, decode, encode, safe_loads

#: Damaged copies of each kind of file; a thousand where there is time: R2VPO_MUTATIONS=1000
N_MUTATIONS = int(os.environ.get("R2VPO_MUTATIONS", 120))


def through_a_file(value):
    file = io.BytesIO()
    write_archive(file, {"value": value})
    return read_archive(file)["value"]


def make(algorithm=R2VPO, policy="MlpPolicy", env="CartPole-v1", **kwargs):
    return algorithm(policy, env, **{**SMALL, **kwargs})


def same_training(one, other, steps: int = 64) -> bool:
    """Whether two models learn the same from now on."""
    for model in (one, other):
        set_random_seed(7)
        model.learn(steps, reset_num_timesteps=False)
    return th.equal(weights(one), weights(other))


# --- values ------------------------------------------------------------------------------------------------------------

STRUCTURED = np.dtype([("a", "<f4"), ("b", "<i2", (2,)), ("c", [("d", "u1")])])


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, -(2**64), 1 << 20000, 1.5, math.inf, -math.inf, 1j, "", "a\ud800\0", b"\xff", bytearray(b"y")),
        *(
            [],
            [1, (2, [3])],
            {},
            {"a": {"b": ()}},
            {1: 2, (1, 2): 3, None: 4, "$x": 5},
            {"$tuple": [1]},
            {1, 2},
            frozenset([1]),
        ),
        *(deque([1, 2], maxlen=3), deque(), OrderedDict(b=1, a=2), PosixPath("a/b"), random.getstate()),
        *(
            np.float32(1.5),
            np.int64(3),
            np.str_(""),
            np.str_("ab"),
            np.bool_(True),
            np.datetime64("2020-01-01"),
            np.bytes_(b"x"),
        ),
        *(th.Size([2, 3]), th.device("cuda:1"), th.float16, np.dtype("f4"), STRUCTURED),
        *(th.nn.Tanh, th.optim.AdamW, spaces.Box, np.float32, MlpPolicy),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_comes_back(value):
    loaded = through_a_file(value)
    assert loaded == value
    assert type(loaded) is type(value)
    assert getattr(loaded, "maxlen", None) == getattr(value, "maxlen", None)
    if isinstance(value, dict):
        assert [*loaded] == [*value]


def test_nan_and_negative_zero_come_back():
    loaded = through_a_file([math.nan, -0.0, complex(-0.0, math.nan)])
    assert math.isnan(loaded[0])
    assert math.copysign(1, loaded[1]) == -1
    assert math.isnan(loaded[2].imag)


CUBE = np.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "array",
    [
        *(
            CUBE,
            CUBE.T,
            CUBE[:, ::2],
            CUBE[::-1],
            CUBE.transpose(1, 0, 2),
            np.broadcast_to(np.arange(3), (2, 3)),
            np.array(3.0),
        ),
        *(np.zeros((0, 3)), np.zeros((2, 0), "U3"), np.array(["", ""]), np.array(["a", "bcd"]), np.array([b"x"])),
        *(CUBE.astype(dtype) for dtype in (">f4", "f2", "c8", "c16", "g", "u2", "u8", "i1", "?", "m8[s]")),
        np.zeros(3, STRUCTURED),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}-{array.strides}",
)
def test_array_comes_back_with_its_layout(array):
    loaded = through_a_file(array)
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)
    # Sums over the same numbers in another order in memory round differently
    if array.flags.f_contiguous or array.flags.c_contiguous:
        assert loaded.flags.f_contiguous == array.flags.f_contiguous
        assert loaded.flags.c_contiguous == array.flags.c_contiguous
    assert loaded.flags.writeable


@pytest.mark.parametrize(
    "dtype", [th.float32, th.bfloat16, th.float16, th.float8_e4m3fn, th.complex64, th.complex128, th.bool, th.int8, th.uint16]
)
def test_tensor_comes_back_with_its_layout(dtype):
    full = th.arange(24).reshape(2, 3, 4).to(dtype)
    for tensor in (full, full.permute(2, 0, 1), full[:, ::2], full[0, 0, 0], full[:0]):
        loaded = through_a_file(tensor)
        assert loaded.dtype == dtype
        assert loaded.shape == tensor.shape
        assert loaded.tolist() == tensor.tolist()
    assert through_a_file(full.permute(2, 0, 1)).stride() == full.permute(2, 0, 1).stride()


def test_shared_memory_is_not_refused_and_one_object_stays_one():
    tensor, array = th.arange(6.0), np.arange(3.0)
    loaded = through_a_file([tensor, tensor[:3], tensor.view(2, 3), tensor, array, array])
    assert loaded[0] is loaded[3]
    assert loaded[4] is loaded[5]
    assert loaded[1].tolist() == [0, 1, 2]
    assert loaded[2].shape == (2, 3)
    assert through_a_file(th.nn.Parameter(tensor)).tolist() == tensor.tolist()


BITS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


@pytest.mark.parametrize("read", [through_a_file, lambda value: safe_loads(pickle.dumps(value))], ids=["ours", "pickle"])
@pytest.mark.parametrize("bits", BITS)
def test_random_generator_goes_on(bits, read):
    generator = np.random.Generator(bits(3))
    # Leaves half of a number over
    generator.integers(5, dtype=np.int32)
    generator.random(3)
    legacy = np.random.RandomState(bits(3))
    legacy.randn()
    loaded, loaded_legacy = read([generator, legacy])
    np.testing.assert_array_equal(
        loaded.integers(9, size=700, dtype=np.int32), generator.integers(9, size=700, dtype=np.int32)
    )
    np.testing.assert_array_equal(loaded_legacy.randn(5), legacy.randn(5))


def test_random_generators_spawn_and_pythons_goes_on():
    generator, pythons = np.random.default_rng(3), random.Random(3)
    loaded, loaded_pythons = through_a_file([generator, pythons])
    assert loaded.spawn(1)[0].random() == generator.spawn(1)[0].random()
    assert loaded_pythons.random() == pythons.random()


@pytest.mark.parametrize(("bits", "path"), [(np.random.MT19937, ("state", "pos")), (np.random.Philox, ("buffer_pos",))])
@pytest.mark.parametrize("position", [-1, 10**6])
def test_position_of_a_random_generator_is_checked(bits, path, position):
    """It is where it reads in its own memory; NumPy does not look."""
    tree, tensors = encode(np.random.Generator(bits(1)))
    state = tree["$generator"]["$bits"]["$tuple"][0]
    functools.reduce(dict.__getitem__, path[:-1], state)[path[-1]] = position
    with pytest.raises(ValueError, match="position"):
        decode(tree, tensors)


SPACES = [
    spaces.Box(-1, np.array([1, np.inf], np.float32)),
    spaces.Box(0, 255, (2, 2, 1), np.uint8),
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary([2, 2]),
    spaces.Dict(a=VECTOR, b=spaces.Dict(c=spaces.Discrete(2))),
    spaces.Tuple([spaces.Discrete(2), VECTOR]),
    spaces.Text(5),
    spaces.Sequence(spaces.Discrete(3)),
    spaces.Graph(spaces.Box(0, 1), spaces.Discrete(3)),
    spaces.OneOf([spaces.Discrete(2), VECTOR]),
]


@pytest.mark.parametrize("read", [through_a_file, lambda value: safe_loads(pickle.dumps(value))], ids=["ours", "pickle"])
@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_space_goes_on_sampling(space, read):
    space = copy.deepcopy(space)
    space.seed(3)
    space.sample()
    loaded = read(space)
    assert loaded == space
    assert [str(loaded.sample()) for _ in range(5)] == [str(space.sample()) for _ in range(5)]


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), (x for x in ()), sys, np.array([None]), th.zeros(2).to_sparse(), ValueError("x"), np.ma.array([1])],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_written_is_named(value):
    with pytest.raises(ValueError, match=r"`part\.0\.b` can't be written"):
        encode({"part": [{"b": value}]})


def test_what_contains_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        encode({"a": endless})
    deep: list = []
    for _ in range(10**4):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(deep)


# --- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def touched(tmp_path):
    """A file that payloads would make."""
    path = tmp_path / "touched"
    yield path
    assert not path.exists()


class Payload:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(path: Path) -> list:
    script = f"open({str(path)!r}, 'w')"
    return [
        Payload(os.system, f"touch {path}"),
        Payload(exec, script),
        Payload(eval, script),
        Payload(getattr, "x", "upper"),
        Payload(th.hub.load, str(path.parent)),
        Payload(gym.make, "antigravity:Env-v0"),
        Payload(np.load, str(path)),
        Payload(functools.partial, os.system, f"touch {path}"),
        # Classes that a file may name, but not call
        Payload(MlpPolicy, VECTOR, spaces.Discrete(2), print),
        Payload(th.optim.Adam, []),
    ]


N_PAYLOADS = len(payloads(Path()))


def pickled(index: int, path: Path) -> bytes:
    return pickle.dumps(payloads(path)[index])


@pytest.mark.parametrize("index", range(N_PAYLOADS))
def test_pickle_runs_nothing(index, touched):
    with pytest.raises(UntrustedError, match="trust=True"):
        safe_loads(pickled(index, touched))


def test_pickle_runs_what_it_says_if_it_is_trusted(tmp_path):
    safe_loads(pickled(1, tmp_path / "touched"), trust=True)
    assert (tmp_path / "touched").exists()


def test_pickle_changes_no_class():
    """The unpickler in C sets attributes of whatever a file names."""
    name = b"csb3_r2vpo.common.rollout\nRollout\n"
    with pytest.raises(UntrustedError, match="changes"):
        safe_loads(name + b"(N}S'__len__'\nI1\nstb.")
    assert callable(vars(Rollout)["__len__"])
    with pytest.raises(ValueError, match="steps that no file of SB3 has"):
        safe_loads(b"(S'touch x'\nios\nsystem\n.")


@pytest.mark.parametrize("index", range(N_PAYLOADS))
@pytest.mark.parametrize(
    "entry", ["policy_class", "learning_rate", "new", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"]
)
def test_zip_of_sb3_runs_nothing(entry, index, touched, tmp_path, sb3_zip):
    payload = pickled(index, touched)
    with zipfile.ZipFile(io.BytesIO(sb3_zip)) as old, zipfile.ZipFile(tmp_path / "model.zip", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == entry:
                with io.BytesIO() as file:
                    th.save({"a": payloads(touched)[index]}, file)
                    content = file.getvalue()
            elif name == "data" and "." not in entry:
                data = json.loads(content)
                data[entry] = {":type:": "x", ":serialized:": base64.b64encode(payload).decode()}
                content = json.dumps(data).encode()
            new.writestr(name, content)
    with pytest.raises(ValueError, match=r"trust=True|can't be read"):
        R2VPO.load(tmp_path / "model.zip")


@pytest.fixture(scope="module")
def sb3_zip() -> bytes:
    file = io.BytesIO()
    make().export_sb3(file)
    return file.getvalue()


def rewritten(path: Path, change) -> Path:
    """An archive that someone has changed, with checksums that are right again."""
    sections = {name: section for name, section in archive.read_sections(path).items()}
    for tree, _ in sections.values():
        if "policy_class" in tree:
            change(tree)
    with zipfile.ZipFile(path, "w") as file:
        checksums = {}
        for name, (tree, tensors) in sections.items():
            for entry, content in (
                (f"{name}.json", json.dumps(tree).encode()),
                (f"{name}.safetensors", archive.save_tensors(tensors)),
            ):
                checksums[entry] = archive.hashlib.sha256(content).hexdigest()
                file.writestr(entry, content)
        file.writestr("format.json", json.dumps({"format": 1, "packages": {}, "sha256": checksums}))
    return path


NAMES = [
    *("os:system", "posix:system", "builtins:eval", "builtins:exec", "subprocess:Popen", "antigravity:x", "torch:load"),
    *("sb3_r2vpo.common.policies:th.hub.load", "stable_baselines3.common.save_util:load_from_pkl", "gymnasium:make"),
    *("torch.nn.modules.module:Module", "sb3_r2vpo.r2vpo.r2vpo:R2VPO", "sb3_r2vpo.zoo.__main__:main", "x", ""),
]
NODES = [
    *({"$name": name} for name in NAMES),
    *({"$object": [name, {}]} for name in NAMES),
    *({"$partial": [{"$name": name}, {"$tuple": []}, {}]} for name in NAMES),
    {"$object": ["torch.nn.modules.activation:Tanh", {}]},
    {"$partial": [{"$name": "torch.optim.adam:Adam"}, {"$tuple": []}, {}]},
    {"$named": ["os:stat_result", [1]]},
]


@pytest.mark.parametrize("node", NODES, ids=str)
def test_archive_names_nothing_else(node, tmp_path):
    make().save(tmp_path / "model")
    rewritten(tmp_path / "model.zip", lambda tree: tree.update(learning_rate=node))
    with pytest.raises(UntrustedError, match=r"`learning_rate` can't be loaded.*trust=True"):
        R2VPO.load(tmp_path / "model")
    assert "antigravity" not in sys.modules
    # What is replaced is not even looked at
    assert R2VPO.load(tmp_path / "model", learning_rate=1e-3).learning_rate == 1e-3


@pytest.mark.parametrize(
    "tree", [{"$unknown": 1}, {"$array": {}}, {"$int": "x"}, {"$torch_dtype": "load"}, {"$dtype": "O"}], ids=str
)
def test_malformed_archive_is_refused(tree):
    with pytest.raises(ValueError, match="not what was once written"):
        decode(tree, {})


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"env": "antigravity:Env-v0"}, "brings an environment"),
        ({"policy_kwargs": {"model_kwargs": {"trust_remote_code": True}}}, "brings its own code"),
        ({"policy_kwargs": {"model_kwargs": {"attn_implementation": "someone/kernel"}}}, "brings its own code"),
        ({"policy_kwargs": {"lora": {"megatron_core": "antigravity"}}}, "brings its own code"),
    ],
)
def test_options_that_bring_code_are_refused(attributes, message, export, tmp_path):
    model = make()
    vars(model).update(attributes)
    (model.export_sb3 if export else model.save)(tmp_path / "model", include=attributes)
    with pytest.raises(UntrustedError, match=message):
        R2VPO.load(tmp_path / "model")
    assert "antigravity" not in sys.modules


# --- names of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_allowed_for_long(monkeypatch):
    monkeypatch.setattr(allowed, "_allowed", {})


class OwnPolicy(ActorCriticPolicy):
    pass


class OwnExtractor(FlattenExtractor):
    pass


class OwnSchedule:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, progress_remaining: float) -> float:
        return self.value * progress_remaining


def own_schedule(progress_remaining: float) -> float:
    return 1e-3 * progress_remaining


OWN = [
    ({"policy": OwnPolicy}, [OwnPolicy], "policy_class"),
    ({"policy_kwargs": {"features_extractor_class": OwnExtractor}}, [OwnExtractor], "policy_kwargs"),
    ({"learning_rate": OwnSchedule(1e-3)}, [OwnSchedule], "learning_rate"),
    ({"learning_rate": own_schedule}, [own_schedule], "learning_rate"),
    ({"learning_rate": functools.partial(own_schedule)}, [own_schedule], "learning_rate"),
    ({"var_coef": own_schedule, "ent_coef": OwnSchedule(0.1)}, [own_schedule, OwnSchedule], "ent_coef"),
]


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize(("kwargs", "things", "attribute"), OWN)
def test_own_names_have_to_be_allowed(kwargs, things, attribute, export, tmp_path):
    model = make(**kwargs).learn(32)
    (model.export_sb3 if export else model.save)(tmp_path / "model")
    with pytest.raises(
        UntrustedError, match=rf"`{attribute}` can't be loaded.*allow\({things[-1].__qualname__}\).*trust=True"
    ):
        R2VPO.load(tmp_path / "model")
    trusted = R2VPO.load(tmp_path / "model", trust=True)
    assert sb3_r2vpo.allow(*things) in (things[0], tuple(things))
    loaded = R2VPO.load(tmp_path / "model")
    for other in (trusted, loaded):
        assert th.equal(weights(other), weights(model))
        assert other.lr_schedule(0.5) == model.lr_schedule(0.5)
        assert type(other.policy) is type(model.policy)


def test_allow_is_a_decorator_and_takes_what_has_a_name():
    @sb3_r2vpo.allow
    def halved(progress_remaining: float) -> float:
        return progress_remaining / 2

    assert through_a_file(halved) is halved
    for nameless in (lambda _: 0.0, OwnSchedule(1.0), 3):
        with pytest.raises(ValueError, match="name of their own"):
            sb3_r2vpo.allow(nameless)


SCHEDULES = ["learning_rate", "var_coef", "ent_coef", "target_variance", "clip_range_vf", "noise_exponent"]


@pytest.mark.parametrize("argument", SCHEDULES)
def test_lambda_is_tabulated_or_given_again(argument, tmp_path):
    model = make(env="Pendulum-v1", **{argument: lambda progress: 0.1 * progress**2}).learn(32)
    with pytest.warns(UserWarning, match=f"`{argument}` is .*<lambda>.*load.*{argument}=") as warnings:
        model.save(tmp_path / "model")
    assert len(warnings) == 1
    with pytest.warns(UserWarning, match="1001 values of the schedule"):
        loaded = R2VPO.load(tmp_path / "model", gym.make("Pendulum-v1"))
    schedule = getattr(loaded, argument)
    for progress in (0.0, 0.5, 1.0, 0.123456):
        assert schedule(progress) == pytest.approx(0.1 * progress**2, abs=1e-7)
    # Linear beyond the ends, to which the last rollout may go
    assert schedule(-0.01) == pytest.approx(-0.01 * 0.1 / 1000)
    assert type(schedule(0.5)) is float
    loaded.learn(32)
    loaded.save(tmp_path / "again")
    with pytest.warns(UserWarning, match="1001 values of the schedule"):
        assert getattr(R2VPO.load(tmp_path / "again"), argument)(0.5) == schedule(0.5)
    with warns_nothing():
        for given in ({argument: LinearSchedule(0.1, 0.0, 1.0)}, {"custom_objects": {argument: 0.1}}):
            assert th.equal(weights(R2VPO.load(tmp_path / "model", **given)), weights(model))


@contextlib.contextmanager
def warns_nothing():
    with catch_warnings():
        simplefilter("error")
        yield


def test_other_functions_without_a_name_are_given_again(tmp_path):
    model = make(policy_kwargs={"activation_fn": lambda: th.nn.Tanh()})
    with pytest.warns(UserWarning, match="`policy_kwargs.activation_fn` is .*It is not written"):
        model.save(tmp_path / "model")
    for trust in (False, True):
        with pytest.raises(LostError, match=r"`policy_kwargs` can't be loaded.*R2VPO\.load\(path, policy_kwargs="):
            R2VPO.load(tmp_path / "model", trust=trust)
    loaded = R2VPO.load(tmp_path / "model", policy_kwargs={"activation_fn": th.nn.Tanh})
    assert th.equal(weights(loaded), weights(model))


def test_lambda_in_a_zip_of_sb3_is_given_again_or_trusted(tmp_path):
    make(learning_rate=lambda progress: 1e-3 * progress).export_sb3(tmp_path / "model")
    with pytest.raises(UntrustedError, match=r"`learning_rate`.*code of a function.*trust=True"):
        R2VPO.load(tmp_path / "model")
    assert R2VPO.load(tmp_path / "model", learning_rate=1e-4).lr_schedule(0.5) == 1e-4
    assert R2VPO.load(tmp_path / "model", trust=True).lr_schedule(0.5) == 5e-4


# --- models ------------------------------------------------------------------------------------------------------------

DICT = spaces.Dict(vector=VECTOR, image=spaces.Box(0, 255, (36, 36, 1), np.uint8))


def images() -> RandomEnv:
    return RandomEnv(spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Discrete(2))


MODELS = {
    "default": lambda: make(),
    "continuous": lambda: make(
        env="Pendulum-v1", policy_kwargs={"net_arch": {"pi": [8], "vf": [4]}, "activation_fn": th.nn.ELU}
    ),
    "gsde": lambda: make(env="Pendulum-v1", use_sde=True),
    "schedules": lambda: make(
        learning_rate=LinearSchedule(1e-3, 0, 0.5), var_coef=LinearSchedule(1, 0, 1), target_variance=0.1
    ),
    "noise": lambda: make(env="Pendulum-v1", noise_exponent="auto"),
    "optimizer": lambda: make(policy_kwargs={"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}),
    "critic": lambda: make(critic_kwargs={"n_rollouts": 3, "n_epochs": 2}),
    "images": lambda: make(policy="CnnPolicy", env=images(), policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}}),
    "dict": lambda: make(policy="MultiInputPolicy", env=RandomEnv(DICT, spaces.MultiDiscrete([2, 3]))),
    "binary": lambda: make(env=RandomEnv(VECTOR, spaces.MultiBinary(2))),
    "layer norm": lambda: make(policy=LayerNormMlpPolicy, env="Pendulum-v1"),
    "off": lambda: make(R2VPOOff, env="Pendulum-v1", replay_capacity=3),
    "maskable": lambda: make(MaskableR2VPO, env=InvalidActionEnvDiscrete(dim=5, n_invalid_actions=3)),
    "maskable off": lambda: make(MaskableR2VPOOff, env=InvalidActionEnvDiscrete(dim=5, n_invalid_actions=3)),
    "recurrent": lambda: make(RecurrentR2VPO, "MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 8}),
    "maskable recurrent": lambda: make(
        MaskableRecurrentR2VPO, "MlpLstmPolicy", InvalidActionEnvDiscrete(dim=5), policy_kwargs={"lstm_hidden_size": 8}
    ),
}


@pytest.mark.parametrize("export", [False, True], ids=["ours", "sb3"])
@pytest.mark.parametrize("name", MODELS)
def test_model_comes_back(name, export, tmp_path):
    model = MODELS[name]().learn(64)
    (model.export_sb3 if export else model.save)(tmp_path / "model")
    env = None if name in ("images", "dict") else copy.deepcopy(model.get_env())
    loaded = type(model).load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    for part, state in model.get_parameters().items():
        assert str(loaded.get_parameters()[part]) == str(state)
        th.testing.assert_close(loaded.get_parameters()[part], state, rtol=0, atol=0)
    assert (loaded.observation_space, loaded.action_space) == (model.observation_space, model.action_space)
    # Loading seeds the spaces
    excluded = {*model._excluded_save_params(), "lr_schedule", "observation_space", "action_space"}
    ours, theirs = ({key: item for key, item in vars(one).items() if key not in excluded} for one in (model, loaded))
    assert encode(theirs)[0] == encode(ours)[0]
    # Replay and LSTM states are in files of their own, and SB3's zips have no place for the critic's rollouts
    if env is not None and "off" not in name and "recurrent" not in name and not (name == "critic" and export):
        assert same_training(model, loaded)


def test_language_model_given_as_an_object(tmp_path):
    """Its configuration is enough, as its weights are the policy's; and it names no code of its own."""
    transformers = pytest.importorskip("transformers")
    llm = pytest.importorskip("test_llm")
    config = llm.tiny_model().config
    env, language_model = llm.vec_env(), transformers.LlamaForCausalLM(config).to(th.bfloat16)
    kwargs = {"model": language_model, "lora": {"r": 2, "target_modules": ["q_proj"]}}
    model = R2VPO(llm.CausalLMPolicy, env, **llm.SEQUENCES, policy_kwargs=kwargs).learn(env.num_envs)
    model.save(tmp_path / "model")
    loaded = R2VPO.load(tmp_path / "model", env=env, device=model.device)
    th.testing.assert_close(loaded.policy.state_dict(), model.policy.state_dict(), rtol=0, atol=0)
    rewritten(
        tmp_path / "model.zip", lambda tree: tree["policy_kwargs"]["model"]["$causal_lm"].update(attn_implementation="a/b")
    )
    with pytest.raises(UntrustedError, match="attn_implementation"):
        R2VPO.load(tmp_path / "model", env=env)


def test_critic_of_its_own_goes_on_with_its_rollouts(tmp_path):
    """Without them, a continued run differed by a third of the whole change."""
    for n_rollouts, steps in ((2, 32), (3, 64), (4, 96)):
        model = make(env="Pendulum-v1", critic_kwargs={"n_rollouts": n_rollouts, "n_epochs": 2}).learn(steps)
        model.save(tmp_path / "model")
        loaded = R2VPO.load(tmp_path / "model", env=copy.deepcopy(model.get_env()), device="cpu", force_reset=False)
        assert len(loaded.replay_buffer) == len(model.replay_buffer) > 0
        assert same_training(model, loaded, 96)
    fewer = R2VPO.load(tmp_path / "model", critic_kwargs={"n_rollouts": 2})
    np.testing.assert_array_equal(fewer.replay_buffer.rollouts[-1].buffer.rewards, np.load(io.BytesIO(newest(tmp_path))))
    assert len(fewer.replay_buffer) == 2
    assert R2VPO.load(tmp_path / "model", critic_kwargs=None).replay_buffer is None
    model.save(tmp_path / "without", exclude=["replay_buffer"])
    assert len(R2VPO.load(tmp_path / "without").replay_buffer) == 0


def newest(folder: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, read_archive(folder / "model.zip")["rollouts"][-1].buffer.rewards)
    return file.getvalue()


def test_default_checkpoint_is_not_larger_than_sb3s(tmp_path):
    model = R2VPO("MlpPolicy", "Pendulum-v1", n_steps=64, device="cpu").learn(64)
    model.save(tmp_path / "ours")
    model.export_sb3(tmp_path / "sb3")
    assert (tmp_path / "ours.zip").stat().st_size < 1.5 * (tmp_path / "sb3.zip").stat().st_size


def test_exported_zip_is_one_of_sb3(tmp_path):
    model = make().learn(32)
    model.export_sb3(tmp_path / "model")
    data, parameters, _ = load_from_zip_file(tmp_path / "model")
    assert data["num_timesteps"] == 32
    assert parameters.keys() == {"policy", "policy.optimizer", "policy_loss.multiplier"}
    assert th.equal(parameters["policy"]["action_net.bias"], model.policy.action_net.bias)


@pytest.mark.parametrize("export", [False, True])
def test_parameters_are_set_from_a_path(export, tmp_path):
    model, other = make().learn(64), make(seed=3)
    (model.export_sb3 if export else model.save)(tmp_path / "model")
    for path in (str(tmp_path / "model"), tmp_path / "model.zip", io.BytesIO((tmp_path / "model.zip").read_bytes())):
        other = make(seed=3)
        other.set_parameters(path)
        assert th.equal(weights(other), weights(model))
        th.testing.assert_close(other.policy.optimizer.state_dict(), model.policy.optimizer.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        other.set_parameters({"policy": model.policy.state_dict()})


def test_arguments_of_load(tmp_path, capsys):
    model = make(verbose=0).learn(32)
    model.save(tmp_path / "model", exclude=["gamma"], include=["lr_schedule"])
    data = read_archive(tmp_path / "model.zip")["data"]
    assert "gamma" not in data
    assert "lr_schedule" in data
    loaded = R2VPO.load(
        tmp_path / "model",
        make_vec_env("CartPole-v1", 2),
        custom_objects={"gamma": 0.5, "n_epochs": 1},
        print_system_info=True,
    )
    assert (loaded.gamma, loaded.n_epochs, loaded.n_envs, loaded._last_obs) == (0.99, 1, 2, None)
    assert not hasattr(loaded, "dummy")
    assert "SAVED MODEL SYSTEM INFO ==\n- OS" in capsys.readouterr().out
    loaded.learn(64)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        R2VPO.load(tmp_path / "model", gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        R2VPO.load(tmp_path / "model", policy_kwargs={"net_arch": [3]})
    with pytest.raises(ValueError, match="custom_objects argument must be a dict"):
        R2VPO.load(tmp_path / "model", custom_objects=[])
    with pytest.raises(FileNotFoundError):
        R2VPO.load(tmp_path / "none")


# --- which class -------------------------------------------------------------------------------------------------------


class OwnR2VPO(R2VPO):
    pass


class OwnR2VPOOff(R2VPOOff):
    pass


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("off", R2VPO),
        ("default", R2VPOOff),
        ("default", OwnR2VPOOff),
        ("maskable", R2VPO),
        ("maskable", MaskableR2VPOOff),
        ("maskable off", MaskableR2VPO),
        ("default", MaskableR2VPO),
        ("default", RecurrentR2VPO),
        ("recurrent", R2VPO),
        ("maskable recurrent", RecurrentR2VPO),
    ],
)
def test_other_algorithms_are_refused_by_name(name, other, export, tmp_path):
    model = MODELS[name]()
    (model.export_sb3 if export else model.save)(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"was saved by {type(model).__name__}\b"):
        other.load(tmp_path / "model")


def test_class_of_ones_own_loads_what_its_base_has_saved(tmp_path):
    make().save(tmp_path / "base")
    make(OwnR2VPO).save(tmp_path / "own")
    assert type(OwnR2VPO.load(tmp_path / "base")) is OwnR2VPO
    assert type(OwnR2VPO.load(tmp_path / "own")) is OwnR2VPO
    with pytest.raises(ValueError, match="was saved by OwnR2VPO"):
        R2VPO.load(tmp_path / "own")


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize(("given", "expected"), [({"replay_capacity": 3}, (3, 2.0)), ({"utd_ratio": 1.0}, (2, 1.0))])
def test_on_policy_file_goes_on_off_policy_on_request(given, expected, export, tmp_path):
    model = make().learn(32)
    (model.export_sb3 if export else model.save)(tmp_path / "model")
    loaded = R2VPOOff.load(tmp_path / "model", **given)
    assert (loaded.replay_capacity, loaded.utd_ratio) == expected


def test_files_of_other_algorithms_keep_their_sentences(tmp_path):
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "ppo")
    A2C("MlpPolicy", "CartPole-v1").save(tmp_path / "a2c")
    for algorithm in (R2VPO, R2VPOOff):
        with pytest.raises(ValueError, match="`clip_range`, such as PPO"):
            algorithm.load(tmp_path / "ppo")
        with pytest.raises(ValueError, match="another algorithm"):
            algorithm.load(tmp_path / "a2c")


# --- whole or not at all -----------------------------------------------------------------------------------------------

SAVES = {
    "model": (lambda model, path: model.save(path), R2VPOOff.load),
    "sb3": (lambda model, path: model.export_sb3(path), R2VPOOff.load),
    "replay": (lambda model, path: model.save_replay_buffer(path), lambda path: make_off().load_replay_buffer(path)),
    "normalization": (
        lambda model, path: save_normalization(normalized(), path),
        lambda path: load_normalization(path, plain()),
    ),
}


def make_off(**kwargs) -> R2VPOOff:
    return make(R2VPOOff, env="Pendulum-v1", **kwargs)


def plain(n_envs: int = 2) -> DummyVecEnv:
    return make_vec_env("Pendulum-v1", n_envs)


def normalized(n_envs: int = 2, steps: int = 20) -> VecNormalize:
    env = VecNormalize(plain(n_envs))
    env.seed(0)
    env.reset()
    for _ in range(steps):
        env.step(np.zeros((n_envs, 1)))
    return env


def fails_to_encode(model, monkeypatch):
    monkeypatch.setattr(model, "lock", threading.Lock(), raising=False)
    return (ValueError, TypeError)


def fails_to_write(model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    return OSError


def is_interrupted(model, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.os, "fsync", interrupt)
    return KeyboardInterrupt


@contextlib.contextmanager
def file_size_limit(size: int):
    """As ``ulimit -f``"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("failure", [fails_to_encode, fails_to_write, is_interrupted, None])
@pytest.mark.parametrize("kind", SAVES)
def test_failed_save_leaves_the_old_file_and_nothing_else(kind, failure, tmp_path, monkeypatch):
    if failure is fails_to_encode and kind in ("replay", "normalization"):
        pytest.skip("nothing of the user's is in there")
    save, load = SAVES[kind]
    model, path = make_off().learn(64), tmp_path / "file.x"
    save(model, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch, contextlib.nullcontext() if failure else file_size_limit(1000):
        expected = failure(model, patch) if failure else OSError
        with pytest.raises(expected) as info:
            save(model, path)
    if expected is OSError:
        assert "was not saved, and an older file there is as before" in str(info.value)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before
    load(path)
    save(model, path)
    load(path)


def test_unwritable_attribute_is_named(tmp_path):
    model = make()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Nothing was saved.*`lock` can't be written.*exclude=\['lock'\]"):
        model.save(tmp_path / "model")
    assert [*tmp_path.iterdir()] == []
    model.save(tmp_path / "model", exclude=["lock"])
    assert not hasattr(R2VPO.load(tmp_path / "model"), "lock")


def test_abandoned_files_go_and_those_in_the_making_stay(tmp_path):
    abandoned = tmp_path / ".model.zip.01234567.partial"
    abandoned.write_bytes(b"x")
    other = tmp_path / ".model2.zip.01234567.partial"
    other.write_bytes(b"x")
    with written_atomically(tmp_path / "model.zip") as file:
        file.write(b"first")
        (making,) = {*tmp_path.glob(".model.zip.*")} - {abandoned}
        with written_atomically(tmp_path / "model.zip") as second:
            second.write(b"second")
        assert making.exists()
        assert (tmp_path / "model.zip").read_bytes() == b"second"
    assert (tmp_path / "model.zip").read_bytes() == b"first"
    assert {*tmp_path.iterdir()} == {tmp_path / "model.zip", other}


def test_paths_are_those_of_sb3(tmp_path):
    model = make()
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        model.save(tmp_path / "new" / "model")
    assert (tmp_path / "new" / "model.zip").is_file()
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder. Will save instead to"):
        model.save(tmp_path / "folder")
    assert (tmp_path / "folder.zip_2").is_file()
    (tmp_path / "target.zip").touch(mode=0o640)
    (tmp_path / "link.zip").symlink_to(tmp_path / "target.zip")
    model.save(str(tmp_path / "link.zip"))
    assert (tmp_path / "link.zip").is_symlink()
    assert (tmp_path / "target.zip").stat().st_mode & 0o777 == 0o640
    R2VPO.load(str(tmp_path / "link"))
    model.save("/dev/null")
    model.save(tmp_path / ("n" * 250))


def test_open_files_are_those_of_sb3(tmp_path):
    model = make().learn(32)
    with (tmp_path / "file").open("wb") as file:
        model.save(file)
        assert not file.closed
    with (tmp_path / "file").open("rb") as file:
        assert th.equal(weights(R2VPO.load(file)), weights(model))
        with pytest.raises(ValueError, match="writable"):
            model.save(file)
    with pytest.raises(ValueError, match="closed"):
        model.save(file)
    with pytest.raises(TypeError, match="invalid type"):
        model.save(3)
    memory = io.BytesIO()
    model.save(memory)
    assert th.equal(weights(R2VPO.load(memory)), weights(model))


# --- damage ------------------------------------------------------------------------------------------------------------


FILES = {
    "model": lambda file: make(policy_kwargs={"net_arch": [4]}).learn(32).save(file),
    "critic": lambda file: make(critic_kwargs={"n_rollouts": 2}, policy_kwargs={"net_arch": [4]}).learn(32).save(file),
    "sb3": lambda file: make(policy_kwargs={"net_arch": [4]}).learn(32).export_sb3(file),
    "replay": lambda file: make_off().learn(64).save_replay_buffer(file),
    "replay pickle": lambda file: save_to_pkl(file, make_off().learn(64).replay_buffer),
    "normalization": lambda file: save_normalization(normalized(), file),
    "normalization pickle": lambda file: pickle.dump(normalized(), file),
}


def saved_file(name: str) -> bytes:
    file = io.BytesIO()
    FILES[name](file)
    return file.getvalue()


def loaded_state(name: str, file: io.BytesIO) -> str:
    """All that a file holds, in words; pickles without their numbers, as these have no checksums."""
    if name in ("model", "critic", "sb3"):
        model = R2VPO.load(file, device="cpu")
        rollouts = [] if model.replay_buffer is None else [*model.replay_buffer.rollouts]
        excluded = {*model._excluded_save_params(), "policy", "policy_loss", "lr_schedule"}
        data = {key: value for key, value in vars(model).items() if key not in excluded}
        value = [model.get_parameters(), data, rollouts]
    elif "replay" in name:
        model = make_off()
        model.load_replay_buffer(file)
        value = [*model.replay_buffer.rollouts]
    else:
        wrapper = load_normalization(file, plain())
        value = {key: item for key, item in vars(wrapper).items() if key not in ("venv", "class_attributes")}
    tree, tensors = encode(value)
    numbers = {key: tensor.tolist() for key, tensor in tensors.items()}
    return "" if "pickle" in name else f"{tree} {numbers}"


def mutate(data: bytes, rng: random.Random) -> bytes:
    kind, start = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[start + rng.randint(1, 50) :]
    if kind == 2:
        return data[:start] + rng.randbytes(rng.randint(1, 50)) + data[start:]
    # Half of them where there is structure, not numbers
    start = rng.choice([start, rng.randrange(min(3000, len(data))), len(data) - 1 - rng.randrange(min(1500, len(data)))])
    changed = bytearray(data)
    changed[start] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_noticed_or_does_no_harm(name):
    data, rng = saved_file(name), random.Random(0)
    expected, refused = loaded_state(name, io.BytesIO(data)), 0
    for _ in range(N_MUTATIONS):
        try:
            state = loaded_state(name, io.BytesIO(mutate(data, rng)))
        except ValueError:
            refused += 1
        else:
            assert state == expected
    assert refused > N_MUTATIONS // 3


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"\x80\x04.", b"PK\x05\x06" + bytes(18), pickle.dumps({"a": 1})])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (R2VPO.load, make().set_parameters, read_archive, lambda path: load_normalization(path, plain())):
        with pytest.raises(CorruptFileError, match=str(path)):
            load(path)
    with pytest.raises(ValueError, match=str(path)):
        make_off().load_replay_buffer(path)


def test_files_are_not_mistaken_for_each_other(tmp_path):
    model = make_off().learn(32)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "replay.pkl")
    for path in (tmp_path / "replay.pkl",):
        with pytest.raises(CorruptFileError, match="not a model"):
            R2VPOOff.load(path)
    with pytest.raises(CorruptFileError, match="not replay_buffer"):
        model.load_replay_buffer(tmp_path / "model.zip")
    with pytest.raises(CorruptFileError, match="not normalization"):
        load_normalization(tmp_path / "replay.pkl", plain())


def test_file_of_a_later_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FORMAT", 2)
    make().save(tmp_path / "model")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="later version"):
        R2VPO.load(tmp_path / "model")


# --- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["ours", "pickle"])
@pytest.mark.parametrize("algorithm", [R2VPOOff, MaskableR2VPOOff])
def test_replay_comes_back(algorithm, old, tmp_path):
    env = "Pendulum-v1" if algorithm is R2VPOOff else InvalidActionEnvDiscrete(dim=5, n_invalid_actions=3)
    model = make(algorithm, env=env, replay_capacity=3).learn(96)
    if old:
        save_to_pkl(tmp_path / "replay", model.replay_buffer)
    else:
        model.save_replay_buffer(tmp_path / "replay")
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=copy.deepcopy(model.get_env()), device="cpu", force_reset=False)
    loaded.load_replay_buffer(tmp_path / "replay")
    assert len(loaded.replay_buffer) == 3
    assert same_training(model, loaded, 96)


@pytest.mark.parametrize("index", range(N_PAYLOADS))
def test_replay_and_statistics_run_nothing(index, touched, tmp_path):
    (tmp_path / "file").write_bytes(pickled(index, touched))
    with pytest.raises(UntrustedError):
        make_off().load_replay_buffer(tmp_path / "file")
    with pytest.raises(UntrustedError):
        load_normalization(tmp_path / "file", plain())


def test_rollouts_of_another_kind_are_refused(tmp_path):
    env = InvalidActionEnvDiscrete(dim=5, n_invalid_actions=3)
    make(MaskableR2VPOOff, env=env).learn(32).save_replay_buffer(tmp_path / "replay")
    model = make(R2VPOOff, env=env)
    with pytest.raises(ValueError, match="holds rollouts of a MaskableRolloutBuffer"):
        model.load_replay_buffer(tmp_path / "replay")
    assert len(model.replay_buffer) == 0


def test_rollouts_that_lack_something_are_refused(tmp_path):
    model = make_off().learn(32)
    (rollout,) = model.replay_buffer.rollouts
    for name in ("observations", "log_probs", "n_envs"):
        broken = copy.deepcopy(rollout)
        del vars(broken.buffer)[name]
        save_to_pkl(tmp_path / "replay", RolloutReplayBuffer(2, [broken]))
        with pytest.raises(CorruptFileError, match="damaged"):
            model.load_replay_buffer(tmp_path / "replay")
    broken = copy.deepcopy(rollout)
    broken.buffer.actions = broken.buffer.actions[1:]
    save_to_pkl(tmp_path / "replay", RolloutReplayBuffer(2, [broken]))
    with pytest.raises(CorruptFileError, match="another shape"):
        model.load_replay_buffer(tmp_path / "replay")


# --- VecNormalize ------------------------------------------------------------------------------------------------------


def test_statistics_come_back_with_their_returns(tmp_path):
    env = normalized()
    save_normalization(env, tmp_path / "statistics")
    loaded = load_normalization(tmp_path / "statistics", copy.deepcopy(env.venv))
    np.testing.assert_array_equal(loaded.returns, env.returns)
    assert loaded.returns.any()
    for _ in range(300):
        one, other = (wrapper.step(np.zeros((2, 1))) for wrapper in (env, loaded))
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(loaded.get_original_obs(), env.get_original_obs())
    # Other environments have other returns
    np.testing.assert_array_equal(load_normalization(tmp_path / "statistics", plain(3)).returns, np.zeros(3))


def test_statistics_of_sb3_are_read(tmp_path):
    env = normalized()
    env.save(str(tmp_path / "statistics.pkl"))
    loaded = load_normalization(tmp_path / "statistics.pkl", plain())
    reference = VecNormalize.load(str(tmp_path / "statistics.pkl"), plain())
    assert vars(loaded).keys() == vars(reference).keys()
    np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
    assert loaded.ret_rms.count == env.ret_rms.count
    raw = env.get_original_obs()
    np.testing.assert_array_equal(loaded.normalize_obs(raw), reference.normalize_obs(raw))
    assert loaded.reset().shape == (2, 3)


@pytest.mark.parametrize("space", [DICT, spaces.Box(0, 255, (36, 36, 1), np.uint8)])
def test_statistics_of_dicts_and_images(space, tmp_path):
    def make_env() -> DummyVecEnv:
        return DummyVecEnv([lambda: RandomEnv(space, spaces.Discrete(2))])

    env = VecNormalize(make_env(), norm_obs_keys=["vector"] if space is DICT else None)
    env.reset()
    save_normalization(env, tmp_path / "statistics")
    loaded = load_normalization(tmp_path / "statistics", make_env())
    assert loaded.observation_space == env.observation_space
    assert str(loaded.normalize_obs(env.get_original_obs())) == str(env.normalize_obs(env.get_original_obs()))


def test_statistics_that_are_none_are_refused(tmp_path):
    fresh = VecNormalize(plain())
    save_normalization(fresh, tmp_path / "fresh")
    assert load_normalization(tmp_path / "fresh", plain()).obs_rms.count == fresh.obs_rms.count
    env = normalized()
    for name in ("action_space", "old_reward", "clip_obs", "norm_obs"):
        sections = read_archive(tmp_path / "fresh")
        del sections["normalization"]["state"][name]
        write_archive(tmp_path / "statistics", sections)
        with pytest.raises(CorruptFileError, match=name):
            load_normalization(tmp_path / "statistics", plain())
    save_normalization(env, tmp_path / "statistics")
    with pytest.raises(ValueError, match="of other environments"):
        load_normalization(tmp_path / "statistics", make_vec_env("CartPole-v1"))
    env.ret_rms.var = np.float64(np.nan)
    save_normalization(env, tmp_path / "statistics")
    with pytest.raises(CorruptFileError, match="NaN"):
        load_normalization(tmp_path / "statistics", plain())


def test_sb3s_own_save_is_what_export_writes():
    model, ours, theirs = make().learn(32), io.BytesIO(), io.BytesIO()
    model.export_sb3(ours)
    BaseAlgorithm.save(model, theirs)
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(theirs) as other:
        assert one.namelist() == other.namelist()
        assert one.read("data") == other.read("data")
