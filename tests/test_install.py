"""The base installation: what works without the extras, and what says which one it needs."""

import subprocess
import sys
from collections.abc import Iterable

import pytest

EXTRAS = {
    "zoo": ["rl_zoo3", "optuna", "huggingface_sb3", "tensorboard", "tqdm", "rich", "matplotlib", "moviepy", "yaml", "pandas"],
    "dm_control": ["shimmy", "dm_control", "mujoco"],
    "envpool": ["envpool"],
    "llm": ["transformers", "peft", "gguf", "reasoning_gym", "math_verify"],
}

# As if the packages were not installed
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_without(extras: Iterable[str], code: str) -> subprocess.CompletedProcess:
    """Run code without the packages of some extras, or without some packages."""
    packages = {package for extra in extras for package in EXTRAS.get(extra, [extra])}
    command = [sys.executable, "-c", WITHOUT.format(packages=packages) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_training_without_extras():
    result = run_without(
        EXTRAS,
        "import sb3_r2vpo\n"
        "from sb3_r2vpo import R2VPO, R2VPOOff, presets\n"
        "R2VPO('MlpPolicy', 'CartPole-v1', n_steps=64, device='cpu').learn(128)\n"
        "model = R2VPOOff('MlpPolicy', 'CartPole-v1', n_steps=64, device='cpu').learn(128)\n"
        "arguments = {**presets.dm_control(), 'n_steps': 512, 'n_epochs': 1}\n"
        "R2VPO('MlpPolicy', 'Pendulum-v1', **arguments, device='cpu').learn(512)\n"
        "import gymnasium\n"
        "assert 'dm_control/walker-run-v0' in gymnasium.registry\n"
        "import sb3_r2vpo.envs, sb3_r2vpo.zoo, sb3_r2vpo.zoo.cli\n",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["train", "enjoy", "tune", "record-video", "plot", "export"])
def test_the_command_line_names_its_extra(command):
    result = run_without(["zoo"], f"from sb3_r2vpo.zoo.cli import main\nmain([{command!r}, '--env', 'CartPole-v1'])")
    assert result.returncode == 1
    assert "pip install 'sb3-r2vpo[zoo]'" in result.stderr
    assert f"`r2vpo {command}` needs" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_line_of_language_models_names_its_extra():
    result = run_without(["llm"], "from sb3_r2vpo.zoo.cli import main\nmain(['llm', 'train', 'config.yml'])")
    assert result.returncode == 1
    assert result.stderr == "`r2vpo llm` needs transformers, an extra: pip install 'sb3-r2vpo[llm]'\n"


def test_help_and_version_without_extras():
    for option in ("--help", "--version"):
        result = run_without(EXTRAS, f"from sb3_r2vpo.zoo.cli import main\nmain([{option!r}])")
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_a_broken_package_of_ours_is_no_missing_extra():
    code = "sys.modules['sb3_r2vpo.zoo.plots'] = None\nfrom sb3_r2vpo.zoo.cli import main\nmain(['plot', 'x'])"
    result = run_without([], code)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "extra" not in result.stderr


@pytest.mark.parametrize("missing", [["dm_control"], ["dm_control", "zoo"]])
def test_dm_control_names_its_extra(missing):
    result = run_without(missing, "import sb3_r2vpo, gymnasium\ngymnasium.make('dm_control/walker-run-v0')")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: DM Control's tasks need ")
    assert result.stderr.splitlines()[-1].endswith("an extra: pip install 'sb3-r2vpo[dm_control]'")


def test_dm_control_names_its_extra_where_shimmy_is_there():
    # The Zoo brings it along
    result = run_without(["mujoco"], "import sb3_r2vpo, gymnasium\ngymnasium.make('dm_control/walker-run-v0')")
    assert result.stderr.splitlines()[-1].endswith("need mujoco, an extra: pip install 'sb3-r2vpo[dm_control]'")


def test_envpool_names_its_extra():
    result = run_without(["envpool"], "from sb3_r2vpo.envs import EnvPoolVecEnv\nEnvPoolVecEnv('dm_control/walker-run-v0')")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == "ImportError: EnvPoolVecEnv needs EnvPool, an extra: pip install 'sb3-r2vpo[envpool]'"


def test_envpool_does_without_dm_control():
    pytest.importorskip("envpool")
    code = "from sb3_r2vpo.envs import EnvPoolVecEnv\nEnvPoolVecEnv('dm_control/walker-run-v0', seed=0).reset()"
    result = run_without(["dm_control", "zoo", "llm"], code)
    # EnvPool itself draws with matplotlib, which it requires
    if "matplotlib" in result.stderr:
        result = run_without(["dm_control", "llm"], code)
    assert result.returncode == 0, result.stderr


def test_language_models_name_their_extra():
    result = run_without(["llm"], "import sb3_r2vpo.llm")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: sb3_r2vpo.llm needs transformers, an extra: pip install 'sb3-r2vpo[llm]'"
