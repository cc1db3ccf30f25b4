"""Files that are damaged, bring code, or cannot be written."""

import functools
import json
import os
import pickle
import random
import resource
import signal
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
import yaml
from stable_baselines3.common.save_util import data_to_json
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_r2vpo import R2VPOOff
from sb3_r2vpo.common.checkpoint import resume, save_checkpoint
from sb3_r2vpo.common.saving import load_normalization, save_normalization

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "seed": 0, "policy_kwargs": {"net_arch": [8]}}


def environment() -> VecNormalize:
    return VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))


@functools.cache
def trained() -> R2VPOOff:
    model = R2VPOOff("MlpPolicy", environment(), replay_capacity=2, **SMALL)
    model.learn(64)
    return model


def save(name: str, path: Path) -> None:
    """
    :param name: Key of `FILES`
    :param path: Where to save that part of the trained model
    """
    model = trained()
    if name == "model":
        model.save(path)
    elif name == "SB3 zip":
        model.export_sb3(path)
    elif name == "replay":
        model.save_replay_buffer(path)
    elif name == "VecNormalize":
        save_normalization(model.get_env(), path)
    else:
        save_checkpoint(model, path)


# === What a file holds, to compare it ===


def weights_of(model: Any) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in model.policy.state_dict().values()]


def replay_of(model: Any) -> list[np.ndarray]:
    fields = [value for rollout in model.replay_buffer.rollouts for _, value in sorted(vars(rollout).items())]
    return [value for value in fields if isinstance(value, np.ndarray)]


def load_replay(path: Path) -> list[np.ndarray]:
    model = R2VPOOff("MlpPolicy", environment(), replay_capacity=2, **SMALL)
    model.load_replay_buffer(path)
    return replay_of(model)


def load_statistics(path: Path) -> list[np.ndarray]:
    loaded = load_normalization(path, environment().venv)
    return [loaded.obs_rms.mean, loaded.obs_rms.var, loaded.ret_rms.var, loaded.returns]


FILES: dict[str, Callable[[Path], list[np.ndarray]]] = {
    "model": lambda path: weights_of(R2VPOOff.load(path, device="cpu")),
    "SB3 zip": lambda path: weights_of(R2VPOOff.load(path, device="cpu")),
    "replay": load_replay,
    "VecNormalize": load_statistics,
    "checkpoint": lambda path: weights_of(resume(path, environment(), device="cpu")),
}

_folder = tempfile.TemporaryDirectory()


@functools.cache
def write_files() -> dict[str, tuple[Path, list[np.ndarray]]]:
    """:return: For each of `FILES`, an undamaged one and what it holds"""
    files = {}
    for name, load in FILES.items():
        path = Path(_folder.name) / (f"{name}.pkl" if name == "replay" else f"{name}.zip")
        save(name, path)
        files[name] = path, load(path)
    return files


def mutated(content: bytes, generator: random.Random) -> bytes:
    """:return: The content with one damage: a bit flipped, a block overwritten or cut out, or its end cut off"""
    damaged, at = bytearray(content), generator.randrange(len(content))
    size = generator.randrange(1, 65)
    kind = generator.choice(("bit", "bit", "block", "zeros", "hole", "end"))
    if kind == "bit":
        damaged[at] ^= 1 << generator.randrange(8)
    elif kind == "end":
        del damaged[at:]
    else:
        replacement = {"block": generator.randbytes(size), "zeros": bytes(size), "hole": b""}[kind]
        damaged[at : at + size] = replacement
    return bytes(damaged)


# === Code in files ===


class Calls:
    """Unpickled, it is the result of a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


HIDDEN: dict[str, Callable[[Path], Any]] = {
    "a command": lambda marker: Calls(os.system, f"touch '{marker}'"),
    "a program": lambda marker: Calls(exec, f"open({str(marker)!r}, 'w')"),
    "a function of the standard library": lambda marker: Calls(os.mkdir, str(marker)),
    "a function pickled by value": lambda marker: Calls(cloudpickle.loads, cloudpickle.dumps(Calls(os.mkdir, str(marker)))),
}


def hide_in_zip(folder: Path, entry: str, content: bytes) -> None:
    path = folder / "sb3.zip"
    with zipfile.ZipFile(write_files()["SB3 zip"][0]) as original, zipfile.ZipFile(path, "w") as archive:
        for name in original.namelist():
            archive.writestr(name, content if name == entry else original.read(name))
    R2VPOOff.load(path)


def hide_in_data(folder: Path, hidden: Any) -> None:
    with zipfile.ZipFile(write_files()["SB3 zip"][0]) as original:
        data = json.loads(original.read("data"))
    data |= json.loads(data_to_json({"learning_rate": hidden}))
    hide_in_zip(folder, "data", json.dumps(data).encode())


def hide_in_weights(entry: str, folder: Path, hidden: Any) -> None:
    path = folder / "hidden.pth"
    th.save({"log_std": hidden}, path)
    hide_in_zip(folder, entry, path.read_bytes())


def hide_in_replay(folder: Path, hidden: Any) -> None:
    path = folder / "replay.pkl"
    path.write_bytes(pickle.dumps(hidden))
    load_replay(path)


def hide_in_statistics(folder: Path, hidden: Any) -> None:
    path = folder / "vecnormalize.pkl"
    path.write_bytes(pickle.dumps({"obs_rms": hidden}))
    load_statistics(path)


def hide_in_yaml(folder: Path, hidden: Any) -> None:
    from sb3_r2vpo.zoo.trust import SettingsLoader

    (module, function), arguments = (hidden.call[0].__module__, hidden.call[0].__name__), list(hidden.call[1])
    text = f"policy_kwargs: !!python/object/apply:{module}.{function} {json.dumps([str(part) for part in arguments])}"
    yaml.load(text, Loader=SettingsLoader)


def hide_in_setting(folder: Path, hidden: Any) -> None:
    from sb3_r2vpo.zoo.literals import parse_literal

    function, arguments = hidden.call
    parse_literal(f"dict(net_arch=[__import__('{function.__module__}').{function.__name__}(*{arguments!r})])")


PAYLOADS: dict[str, Callable[[Path, Any], None]] = {
    "SB3 zip, data": hide_in_data,
    "SB3 zip, weights": functools.partial(hide_in_weights, "policy.pth"),
    "SB3 zip, variables": functools.partial(hide_in_weights, "pytorch_variables.pth"),
    "replay": hide_in_replay,
    "VecNormalize": hide_in_statistics,
    "settings, tag": hide_in_yaml,
    "settings, string": hide_in_setting,
}


# === Saves that fail ===


def failing_save(name: str, how: str, folder: Path) -> tuple[bool, str]:
    """
    :param name: Key of `FILES`
    :param how: "disk full" or "attribute"
    :param folder: An empty folder
    :return: Whether the older file is as it was and the failure was reported, and what was reported
    """
    path = folder / "file.zip"
    save(name, path)
    before, error = path.read_bytes(), None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, env = trained(), trained().get_env()
    owner = {"replay": model.replay_buffer, "VecNormalize": env}.get(name, model)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if how == "disk full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        else:
            owner.unwritable = (item for item in ())
        save(name, path)
    except (ValueError, OSError) as raised:
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        vars(owner).pop("unwritable", None)
    whole = path.read_bytes() == before and [entry.name for entry in folder.iterdir()] == [path.name]
    ending = "nothing was raised" if error is None else f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return error is not None and whole, f"{name}, {how}: {ending.replace(str(folder), '')}"
