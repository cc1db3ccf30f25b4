import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

import sb3_r2vpo.envs

NO_OPENGL = 77

# A fresh interpreter, because what is at stake is the order of imports. Gymnasium's warnings become errors.
PREAMBLE = """
import sys, warnings
warnings.filterwarnings("error", module="gymnasium")
import gymnasium as gym
WALKER = "dm_control/walker-run-v0"
NO_OPENGL = 77
def is_flat():
    return isinstance(gym.make(WALKER).observation_space, gym.spaces.Box)
"""


def run_python(code: str) -> int:
    result = subprocess.run([sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True)
    assert result.returncode in (0, NO_OPENGL), result.stderr
    return result.returncode


def test_import_registers_without_importing_mujoco():
    run_python(
        "import sb3_r2vpo\n"
        "assert WALKER in gym.registry\n"
        "assert not {'mujoco', 'dm_control', 'shimmy', 'envpool'} & sys.modules.keys()\n"
    )


def test_making_an_environment_keeps_our_ids():
    """The first `make` imports Shimmy, which registers its own environments under the same ids."""
    run_python("import sb3_r2vpo\nassert is_flat()\nassert 'shimmy' in sys.modules\nassert is_flat()")


def test_shimmy_imported_first():
    run_python("import shimmy\nassert not is_flat()\nimport sb3_r2vpo\nassert is_flat()")


def test_shimmy_imported_later_takes_the_ids_until_register():
    run_python(
        "import sb3_r2vpo\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import shimmy\n"
        "assert any('Overriding environment' in str(warning.message) for warning in caught)\n"
        "assert not is_flat()\n"
        "sb3_r2vpo.envs.register()\n"
        "assert is_flat()\n"
    )


def test_ids_are_the_whole_suite():
    run_python(
        "from shimmy.utils.envs_configs import DM_CONTROL_SUITE_ENVS\n"
        "from dm_control import suite\n"
        "from sb3_r2vpo.envs import DM_CONTROL_IDS\n"
        "assert set(DM_CONTROL_IDS.values()) == set(DM_CONTROL_SUITE_ENVS) <= set(suite.ALL_TASKS)\n"
    )


@pytest.mark.parametrize("task", ["walker-run", "cartpole-swingup_sparse", "ball_in_cup-catch", "humanoid-run", "fish-swim"])
def test_check_env(task):
    env = gym.make(f"dm_control/{task}-v0")
    check_env(env)
    observation, _ = env.reset(seed=0)
    assert observation.dtype == env.observation_space.dtype == env.action_space.dtype == np.float32
    assert env.spec.max_episode_steps == 1000
    env.close()


def test_observation_is_that_of_dm_control():
    """Keys in alphabetical order, which is not dm_control's, and every component of each."""
    env = gym.make("dm_control/walker-run-v0")
    from dm_control import suite  # only now: the import above chooses how to render

    raw = suite.load("walker", "run", task_kwargs={"random": 5})
    observation, _ = env.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 6)).astype(np.float32)
    time_step = raw.reset()
    for action in actions:
        parts = time_step.observation
        expected = np.concatenate([[parts["height"]], parts["orientations"], parts["velocity"]]).astype(np.float32)
        np.testing.assert_array_equal(observation, expected)
        time_step = raw.step(action)
        observation, reward, *_ = env.step(action)
        assert reward == time_step.reward


def test_episode_is_truncated_at_1000_steps():
    env = gym.make("dm_control/cartpole-balance-v0")
    env.reset(seed=0)
    for step in range(1, 1001):
        *_, terminated, truncated, _ = env.step(env.action_space.low)
        assert not terminated
        assert truncated == (step == 1000)


def test_seed():
    env = gym.make("dm_control/cheetah-run-v0")
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_suite_arguments_and_specification():
    env = gym.make("dm_control/pendulum-swingup-v0", environment_kwargs={"control_timestep": 0.04})
    assert env.unwrapped.control_timestep() == pytest.approx(0.04)
    assert env.metadata["render_fps"] == 25
    assert gym.make("dm_control/pendulum-swingup-v0").metadata["render_fps"] == 50
    assert gym.make(env.spec).observation_space == env.observation_space
    assert env.metadata["render_fps"] == 25


def test_render():
    result = run_python(
        "import os, sb3_r2vpo\n"
        "env = gym.make(WALKER, render_mode='rgb_array')\n"
        "if os.environ.get('MUJOCO_GL') == 'disable': sys.exit(NO_OPENGL)\n"
        "env.reset(seed=0)\n"
        "frame = env.render()\n"
        "assert frame.shape == (480, 480, 3) and frame.dtype == 'uint8' and frame.std() > 0\n"
    )
    if result == NO_OPENGL:
        pytest.skip("neither a display nor EGL nor OSMesa")


def test_without_opengl_training_works_and_render_says_why():
    run_python(
        "import os; os.environ['MUJOCO_GL'] = 'disable'\n"
        "import sb3_r2vpo\n"
        "env = gym.make('dm_control/pendulum-swingup-v0', render_mode='rgb_array')\n"
        "env.reset(seed=0)\n"
        "env.step(env.action_space.sample())\n"
        "try:\n"
        "    env.render()\n"
        "except RuntimeError as error:\n"
        "    assert 'No OpenGL' in str(error)\n"
        "else:\n"
        "    raise AssertionError('rendered without OpenGL')\n"
    )


def test_ppo_takes_the_id():
    model = PPO("MlpPolicy", "dm_control/walker-walk-v0", n_steps=64, batch_size=64, device="cpu").learn(128)
    assert model.num_timesteps == 128


@pytest.mark.slow
def test_fresh_worker_processes():
    env = make_vec_env("sb3_r2vpo.envs:dm_control/pendulum-swingup-v0", n_envs=2, vec_env_cls=SubprocVecEnv, seed=0)
    observations = env.reset()
    assert observations.shape == (2, 3)
    assert not np.array_equal(*observations)
    env.close()


def test_envpool_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-r2vpo\[envpool\]'"):
        sb3_r2vpo.envs.EnvPoolVecEnv("dm_control/walker-run-v0")
