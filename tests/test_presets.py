"""Presets are the settings files as arguments."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from gymnasium import spaces
from helpers import RandomEnv
from stable_baselines3.common.utils import LinearSchedule

from sb3_r2vpo import R2VPO, R2VPOOff, presets
from sb3_r2vpo.zoo.settings import resolve_activation, split_schedules

FOLDER = Path(__file__).parents[1] / "hyperparams"
PRESETS = {
    "dm_control": (R2VPO, "r2vpo.yml", "dm_control/cheetah-run-v0"),
    "dm_control_off": (R2VPOOff, "r2vpo_off.yml", "dm_control/cheetah-run-v0"),
    "paper": (R2VPO, "r2vpo_paper.yml", "default"),
}
#: What is said of the environments, and the policy's name
NOT_ARGUMENTS = {"n_timesteps", "n_envs", "normalize", "vec_env_wrapper", "policy"}


def comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: comparable(part) for name, part in value.items()}
    return [type(value), *map(value, (1.0, 0.5, -0.1))] if isinstance(value, LinearSchedule) else value


@pytest.mark.parametrize("name", PRESETS)
def test_equal_to_the_settings_file(name):
    _, file, key = PRESETS[name]
    settings = yaml.safe_load((FOLDER / file).read_text())[key]
    settings = {key: value for key, value in settings.items() if key not in NOT_ARGUMENTS}
    schedules, others = split_schedules({**settings, "policy_kwargs": resolve_activation(settings["policy_kwargs"])})
    assert comparable(getattr(presets, name)()) == comparable({**schedules, **others})


@pytest.mark.parametrize("name", PRESETS)
def test_models_train(name):
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    small = {"n_steps": 32, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}
    model = PRESETS[name][0]("MlpPolicy", env, **{**getattr(presets, name)(), **small})
    model.learn(64)
    assert model.num_timesteps == 64
    assert model._n_updates > 0


def test_each_call_makes_new_ones():
    first = presets.paper()
    first["policy_kwargs"]["net_arch"]["pi"].append(1)
    first["objective_kwargs"]["min_var_coef"] = 1.0
    assert presets.paper()["policy_kwargs"]["net_arch"] == {"pi": [256] * 5, "vf": [256] * 5}
    assert presets.paper()["objective_kwargs"] == {"compensate_entropy": False}
    off = presets.dm_control_off()
    off["critic_kwargs"]["n_rollouts"] = 8
    assert presets.dm_control_off()["critic_kwargs"]["n_rollouts"] == 2
