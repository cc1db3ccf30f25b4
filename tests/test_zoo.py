"""The command line, its settings files, samplers and plots: what the RL Zoo does not test for us."""

import json
import math
import re
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.utils
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager as ZooExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.zoo import ExperimentManager, register
from sb3_r2vpo.zoo.cli import COMMANDS, main
from sb3_r2vpo.zoo.companions import find_companion, matching_statistics, replaced
from sb3_r2vpo.zoo.plots import average, environment_of, read_evaluation_curve, read_training_curve
from sb3_r2vpo.zoo.settings import choose_num_threads, find_settings, resolve_activation, split_schedules
from sb3_r2vpo.zoo.trust import code_free
from sb3_r2vpo.zoo.wrappers import VecRewardScale

register()

# Sampled batches, and those of the settings for many environments, do not divide the small rollouts here
pytestmark = pytest.mark.filterwarnings("ignore:With n_steps")

SETTINGS_FOLDER = Path(__file__).parent.parent / "hyperparams"
SETTINGS = {path.stem: yaml.safe_load(path.read_text()) for path in SETTINGS_FOLDER.glob("*.yml")}
ENTRIES = [(name, key) for name, entries in SETTINGS.items() for key in entries]

# A command line of its own process, for what needs one: the entry point, signals, a storage shared by processes
R2VPO_COMMAND = [sys.executable, "-m", "sb3_r2vpo.zoo"]
SMALL = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:2"]
NORMALIZED = [*SMALL, "normalize:{'norm_obs':True,'norm_reward':True}"]


@pytest.fixture(autouse=True)
def command_line(tmp_path, monkeypatch):
    """Let each test write into a folder of its own, and undo what the command line does to the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    num_threads = th.get_num_threads()
    yield
    th.set_num_threads(num_threads)


def make_manager(algo: str = "r2vpo", env_id: str = "CartPole-v1", **options) -> ExperimentManager:
    return ExperimentManager(Namespace(), algo, env_id, log_folder="logs", verbose=0, **options)


def make_model(algo: str, hyperparams: dict) -> BaseAlgorithm:
    # State-dependent exploration is for continuous actions
    images = FakeImageEnv(discrete=not hyperparams.get("use_sde", False))
    env = images if hyperparams["policy"] == "CnnPolicy" else IdentityEnvBox()
    if algo == "r2vpo_mask":
        env = FewValidActions()
    return rl_zoo3.ALGOS[algo](env=DummyVecEnv([lambda: env]), device="cpu", **hyperparams)


# --- Registration and settings


def test_registration():
    assert rl_zoo3.ALGOS["r2vpo"] is R2VPO
    assert rl_zoo3.ALGOS["r2vpo_off"] is R2VPOOff
    assert {"r2vpo", "r2vpo_off"} <= HYPERPARAMS_SAMPLER.keys() & HYPERPARAMS_CONVERTER.keys()


@pytest.mark.parametrize(
    ("algo", "env_id", "conf_file", "expected"),
    [
        ("r2vpo", "CartPole-v1", None, "r2vpo.yml"),
        ("r2vpo", "SomebodysOwn-v0", None, "r2vpo.yml"),
        ("r2vpo_off", "CartPole-v1", None, "r2vpo_off.yml"),
        ("r2vpo", "CartPole-v1", "paper", "r2vpo_paper.yml"),
        ("ppo", "dm_control/walker-run-v0", None, "ppo.yml"),
    ],
)
def test_settings_are_found_in_the_package(algo, env_id, conf_file, expected):
    found = find_settings(algo, env_id, conf_file)
    assert found is not None
    assert Path(found) == SETTINGS_FOLDER / expected


@pytest.mark.parametrize(
    ("algo", "conf_file", "expected"),
    [("ppo", None, None), ("sac", None, None), ("r2vpo", "mine.yml", "mine.yml"), ("r2vpo", "my.module", "my.module")],
)
def test_other_settings_are_left_to_the_zoo(algo, conf_file, expected):
    assert find_settings(algo, "CartPole-v1", conf_file) == expected


def test_unknown_settings():
    with pytest.raises(ValueError, match="named settings of r2vpo, which are: paper"):
        find_settings("r2vpo", "CartPole-v1", "papper")
    with pytest.raises(ValueError, match="named settings of r2vpo_off, which are: none"):
        find_settings("r2vpo_off", "CartPole-v1", "paper")


def test_settings_cover_the_same_tasks():
    assert SETTINGS["r2vpo"].keys() == SETTINGS["r2vpo_off"].keys()
    assert SETTINGS["ppo"].keys() == {env_id for env_id in SETTINGS["r2vpo"] if env_id.startswith("dm_control/")}


@pytest.mark.parametrize(("name", "key"), ENTRIES)
def test_settings_build_a_model(name, key):
    assert key in {"default", "atari"} or key in gym.registry
    hyperparams = SETTINGS[name][key]
    # The Zoo evaluates these as Python code where they are strings
    for evaluated in ("normalize", "policy_kwargs", "monitor_kwargs", "replay_buffer_class", "replay_buffer_kwargs"):
        assert not isinstance(hyperparams.get(evaluated), str)
    algo = "r2vpo" if name == "r2vpo_paper" else name
    model_kwargs, *_ = make_manager(algo)._preprocess_hyperparams(dict(hyperparams))
    make_model(algo, model_kwargs)


def test_paper_settings():
    manager = make_manager(env_id="Pendulum-v1", config="paper", hyperparams={"n_envs": 2})
    hyperparams, _, _, vec_env_wrapper = manager._preprocess_hyperparams(manager.read_hyperparameters()[0])
    assert hyperparams["policy_kwargs"]["activation_fn"] is nn.SiLU
    assert hyperparams["var_coef"] == 0.06
    assert vec_env_wrapper is not None
    env = vec_env_wrapper(DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1"))]))
    plain_env = DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1"))])
    for venv in (env, plain_env):
        venv.seed(0)
        venv.reset()
    for _ in range(200):
        _, rewards, dones, infos = env.step(np.zeros((1, 1)))
        _, plain_rewards, _, plain_infos = plain_env.step(np.zeros((1, 1)))
        assert rewards == pytest.approx(10 * plain_rewards)
    assert dones.all()
    # What is logged and evaluated stays in the task's units
    assert infos[0]["episode"]["r"] == plain_infos[0]["episode"]["r"]
    assert isinstance(env, VecRewardScale)


def test_schedules():
    schedules, others = split_schedules(
        {"target_variance": "lin_0.02", "learning_rate": "lin_3e-4", "clip_range": 0.2, "var_coef": "auto_0.5"}
    )
    assert others == {"clip_range": 0.2, "var_coef": "auto_0.5"}
    assert schedules["target_variance"](1.0) == 0.02
    assert schedules["target_variance"](0.5) == pytest.approx(0.01)
    # The last rollout overshoots: the Zoo's own schedule goes below zero there
    assert all(schedule(-0.1) == 0.0 for schedule in schedules.values())
    with pytest.raises(ValueError, match=r"`target_variance` is 'lin_small'"):
        split_schedules({"target_variance": "lin_small"})
    hyperparams = {"objective_kwargs": {"clip_range": "lin_0.2", "kl_coef": 1.0}, "critic_kwargs": {"n_rollouts": 2}}
    schedules, others = split_schedules(hyperparams)
    assert schedules == {}
    assert others["objective_kwargs"].pop("clip_range")(0.5) == pytest.approx(0.1)
    assert others == {"objective_kwargs": {"kl_coef": 1.0}, "critic_kwargs": {"n_rollouts": 2}}
    # A run's `config.yml` is written of it later
    assert hyperparams["objective_kwargs"]["clip_range"] == "lin_0.2"
    with pytest.raises(ValueError, match=r"`clip_range` is 'lin_small'"):
        split_schedules({"objective_kwargs": {"clip_range": "lin_small"}})


def test_schedules_reach_the_model():
    hyperparams = {"target_variance": "lin_0.02", "var_coef": "lin_0.5", "ent_coef": "lin_0.01", "n_envs": 1}
    manager = make_manager(hyperparams=hyperparams, n_timesteps=10)
    model, saved = manager.setup_experiment()
    assert model.target_variance(0.5) == pytest.approx(0.01)
    assert model.learning_rate(0.5) == pytest.approx(0.0005)  # "lin_0.001" in the settings file
    assert saved["var_coef"] == "lin_0.5"
    baseline = {"objective": "ppo_clip", "objective_kwargs": {"clip_range": "lin_0.2"}, "n_envs": 1}
    model, saved = make_manager(hyperparams=baseline, n_timesteps=10).setup_experiment()
    assert model.objective_kwargs["clip_range"](0.5) == pytest.approx(0.1)
    assert saved["objective_kwargs"] == {"clip_range": "lin_0.2"}


def test_mappings_on_the_command_line():
    """As the Zoo does with `policy_kwargs`: evaluated, and in place of the whole mapping of the settings file."""
    params = ["critic_kwargs:dict(n_rollouts=3)", "objective_kwargs:{'dual_learning_rate':0.1}", "n_envs:2", "n_steps:32"]
    main(["train", "--env", "dm_control/cartpole-swingup-v0", "-n", "64", "--verbose", "0", "-params", *params])
    model = R2VPO.load("logs/r2vpo/dm_control-cartpole-swingup-v0_1/dm_control-cartpole-swingup-v0.zip", device="cpu")
    assert (model.critic.n_rollouts, model.critic.n_epochs, model.critic.gae_lambda) == (3, 20, None)
    assert (model.policy_loss.dual_learning_rate, model.policy_loss.multiplier.minimum) == (0.1, 0.0)
    with pytest.raises(ValueError, match="`critic_kwargs` has unknown options"):
        main(["train", "--env", "CartPole-v1", "-params", "critic_kwargs:dict(n_rolouts=3)"])


@pytest.mark.parametrize(
    ("hyperparams", "expected"),
    [
        ({}, 1),
        ({"batch_size": 512, "policy_kwargs": {"net_arch": [128, 128]}}, 1),
        ({"batch_size": 512, "policy_kwargs": {"net_arch": [256, 256]}}, 1),
        ({"batch_size": 1024, "policy_kwargs": {"net_arch": [256, 256]}}, 2),
        ({"batch_size": 4096, "policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [256] * 5}}}, 2),
        ({"batch_size": 4096, "policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}}, 1),
        ({"batch_size": 10**6, "policy_kwargs": {"net_arch": []}}, 1),
        ({"batch_size": 256, "policy": "CnnPolicy"}, 2),
    ],
)
def test_two_threads_for_large_products(monkeypatch, hyperparams, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert choose_num_threads(hyperparams) == expected
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert choose_num_threads(hyperparams) == 1


@pytest.mark.parametrize(("options", "expected"), [([], 2), (["--num-threads", "1"], 1), (["--num-threads", "3"], 3)])
def test_threads_of_the_command_line(monkeypatch, options, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    large = ["n_envs:1", "n_steps:8", "batch_size:8192", "n_epochs:1", "policy_kwargs:dict(net_arch=[256,256])"]
    main(["train", "--env", "CartPole-v1", "-n", "8", "--verbose", "0", *options, "-params", *large])
    assert th.get_num_threads() == expected
    arguments = yaml.unsafe_load(Path("logs/r2vpo/CartPole-v1_1/CartPole-v1/args.yml").read_text())
    assert arguments["num_threads"] == expected


def test_activation_names():
    kwargs = {"activation_fn": "silu", "net_arch": [8]}
    assert resolve_activation(kwargs) == {"activation_fn": nn.SiLU, "net_arch": [8]}
    assert kwargs["activation_fn"] == "silu"
    assert resolve_activation({"activation_fn": nn.Tanh}) == {"activation_fn": nn.Tanh}
    with pytest.raises(ValueError, match=r"Unknown `activation_fn` 'swosh'.*silu"):
        resolve_activation({"activation_fn": "swosh"})


# --- Samplers and studies


@pytest.mark.parametrize("algo", ["r2vpo", "r2vpo_off"])
def test_sampled_hyperparameters_build_models(algo):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    models = []
    for _ in range(20):
        trial = study.ask()
        hyperparams = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, {})
        # `--trial-id` has the trial's parameters only
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == hyperparams
        models.append(make_model(algo, {"policy": "MlpPolicy", **hyperparams}))
    assert {model.policy_loss.multiplier.adaptive for model in models} == {True, False}


@pytest.mark.parametrize("failure", [RuntimeError("probability tensor contains nan"), FloatingPointError(), math.nan])
def test_diverging_trial_is_pruned(monkeypatch, failure):
    def objective(self, trial):
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(ZooExperimentManager, "objective", objective)
    study = optuna.create_study()
    study.optimize(make_manager().objective, n_trials=2)
    assert [trial.state for trial in study.trials] == 2 * [optuna.trial.TrialState.PRUNED]


def test_bug_in_a_trial_ends_the_study(monkeypatch):
    monkeypatch.setattr(ZooExperimentManager, "objective", lambda self, trial: {}["missing"])
    with pytest.raises(KeyError):
        optuna.create_study().optimize(make_manager().objective, n_trials=1)


@pytest.mark.slow
def test_processes_share_a_study():
    command = [*R2VPO_COMMAND, "tune", "--env", "CartPole-v1", "-n", "300", "--n-trials", "2", "--eval-episodes", "1"]
    for process in [subprocess.Popen(command), subprocess.Popen(command)]:
        assert process.wait(timeout=120) == 0
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("logs/optuna.log"))
    study = optuna.load_study(study_name="r2vpo_CartPole-v1", storage=storage)
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 4
    for name in ("history", "importances", "slices"):
        assert Path(f"logs/r2vpo/r2vpo_CartPole-v1_{name}.png").stat().st_size > 0
    # A study is no run
    assert not list(Path("logs/r2vpo").glob("CartPole*"))

    # Trial 0 is one that the Zoo itself would not load
    study_options = ["--storage", "logs/optuna.log", "--study-name", "r2vpo_CartPole-v1"]
    main(["train", "--env", "CartPole-v1", "-n", "10", *study_options, "--trial-id", "0", "--verbose", "0"])
    model = R2VPO.load("logs/r2vpo/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    params = study.trials[0].params
    assert model.lr_schedule(1.0) == pytest.approx(params["learning_rate"])
    assert model.n_steps == 2 ** params["n_steps_pow"]
    assert model.policy_loss.multiplier.adaptive == (params["multiplier"] == "adaptive")

    with pytest.raises(ValueError, match="has the trials 0 to 3, not 4"):
        main(["train", *study_options, "--trial-id", "4"])
    with pytest.raises(ValueError, match=r"no study 'r2vpo_Typo-v1', but r2vpo_CartPole-v1"):
        main(["train", *study_options[:3], "r2vpo_Typo-v1", "--trial-id", "0"])


def test_tune_in_sqlite(capsys):
    study_options = ["--storage", "sqlite:///study.db", "--study-name", "mine"]
    main(["tune", "--algo", "r2vpo_off", "-n", "64", "--n-trials", "1", "--eval-episodes", "1", *study_options, *SMALL])
    assert len(optuna.load_study(study_name="mine", storage="sqlite:///study.db").trials) == 1
    assert "Wrote logs/r2vpo_off/mine_history.png" in capsys.readouterr().out


# --- Runs


def test_train_as_a_program():
    command = [*R2VPO_COMMAND, "train", "--algo", "r2vpo", "--env", "CartPole-v1", "-n", "300", "--eval-freq", "100"]
    subprocess.run(command, check=True, timeout=120)
    run = Path("logs/r2vpo/CartPole-v1_1")
    assert (run / "CartPole-v1.zip").is_file()
    assert (run / "best_model.zip").is_file()
    arguments = yaml.unsafe_load((run / "CartPole-v1/args.yml").read_text())
    assert arguments["num_threads"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_training_saves():
    process = subprocess.Popen(
        [*R2VPO_COMMAND, "train", "--env", "CartPole-v1", "-n", "100000000"],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs, of which these tests may be one, with an interrupt that they and theirs ignore
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "total_timesteps" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert R2VPO.load("logs/r2vpo/CartPole-v1_1/CartPole-v1.zip", device="cpu").num_timesteps > 0


def test_a_run_from_training_to_video(capsys):
    """Train R2VPO-OFF with normalization and checkpoints, go on from each, watch, plot, and record it."""
    run = Path("logs/r2vpo_off/CartPole-v1_1")
    train = ["train", "--algo", "r2vpo_off", "--env", "CartPole-v1", "-n", "1000", "--seed", "1", "--verbose", "0"]
    main([*train, "--save-replay-buffer", "--save-freq", "400", "--eval-freq", "200", *NORMALIZED])

    # Each model has the statistics of its own moment
    final, count = run / "CartPole-v1.zip", {}
    with code_free(trust=False), matching_statistics():
        for name, which in {"best": (True, None), "checkpoint": (False, 400), "final": (False, None)}.items():
            _, model_path, log_path = rl_zoo3.utils.get_model_path(1, "logs", "r2vpo_off", "CartPole-v1", *which)
            hyperparams, stats_path = rl_zoo3.utils.get_saved_hyperparams(f"{log_path}/CartPole-v1")
            env = rl_zoo3.utils.create_test_env(
                "CartPole-v1", stats_path=stats_path, hyperparams=hyperparams, should_render=False
            )
            assert isinstance(env, VecNormalize)
            steps = rl_zoo3.ALGOS["r2vpo_off"].load(model_path, device="cpu").num_timesteps
            # One observation for each step, and that of the reset in each environment
            count[name] = round(env.obs_rms.count)
            assert count[name] == steps + 2
    assert count["checkpoint"] < count["final"]

    # Continue from the checkpoint, with its statistics and its replay buffer
    checkpoint = run / "rl_model_400_steps.zip"
    assert find_companion(str(checkpoint), "vecnormalize") == run / "rl_model_vecnormalize_400_steps.pkl"
    manager = make_manager(
        "r2vpo_off", trained_agent=str(checkpoint), n_timesteps=100, hyperparams={"n_envs": 2, "normalize": True}
    )
    model, _ = manager.setup_experiment()
    saved = R2VPOOff.load(checkpoint, device="cpu")
    saved.load_replay_buffer(run / "rl_model_replay_buffer_400_steps.pkl")
    assert len(model.replay_buffer.rollouts) == len(saved.replay_buffer.rollouts) > 0
    assert model.get_vec_normalize_env().obs_rms.count == pytest.approx(count["checkpoint"], abs=3)
    main([*train[:-4], "-n", "128", "-i", str(final), *NORMALIZED])
    assert Path("logs/r2vpo_off/CartPole-v1_3/CartPole-v1.zip").is_file()

    capsys.readouterr()
    enjoy = ["--algo", "r2vpo_off", "--env", "CartPole-v1", "--exp-id", "1"]
    main(["enjoy", *enjoy, "--no-render", "--load-best", "-n", "600"])
    assert "Mean reward" in capsys.readouterr().out
    main(["plot", "logs", "--source", "eval", "-o", "curve.png"])
    assert Path("curve.png").stat().st_size > 0
    main(["record-video", *enjoy, "-n", "20"])
    assert list(run.glob("videos/*.mp4"))


def test_runs_started_together_have_their_own_folders():
    managers = [make_manager() for _ in range(3)]
    assert len({manager.save_path for manager in managers}) == 1
    for manager in managers:
        manager.create_log_folder()
    assert len({manager.save_path for manager in managers}) == 3
    assert all(Path(manager.params_path).is_dir() for manager in managers)


@pytest.mark.slow
def test_dm_control_in_python_and_its_video():
    env = ["--env", "dm_control/cartpole-swingup-v0"]
    main(["train", *env, "-n", "128", "--eval-freq", "-1", "--verbose", "0", *SMALL])
    main(["train", "--algo", "ppo", *env, "-n", "128", "--eval-freq", "-1", "--verbose", "0", *SMALL])
    main(["enjoy", *env, "-n", "10", "--no-render"])
    try:
        main(["record-video", *env, "-n", "5"])
    except RuntimeError as error:
        pytest.skip(f"no OpenGL: {error}")
    assert list(Path("logs").glob("r2vpo/*/videos/*.mp4"))


def test_replaced_attributes_come_back():
    original = math.pi
    with replaced(math, pi=3):
        assert math.pi == 3
    assert math.pi == original
    with pytest.raises(KeyError), replaced(math, pi=3):
        raise KeyError
    assert math.pi == original


# --- EnvPool

ENVPOOL = ["--env", "dm_control/cartpole-swingup-v0", "--vec-env", "envpool"]


def test_envpool():
    pytest.importorskip("envpool")
    small = ["-params", "n_envs:4", "n_steps:512", "batch_size:512", "n_epochs:1"]
    main(["train", *ENVPOOL, "-n", "5000", "--eval-freq", "2000", "--eval-episodes", "1", "--verbose", "0", *small])
    (run,) = Path("logs/r2vpo").iterdir()
    assert yaml.unsafe_load(next(run.glob("*/args.yml")).read_text())["vec_env"] == "envpool"
    assert "norm_obs: true" in next(run.glob("*/config.yml")).read_text()
    assert (run / "best_model/vecnormalize.pkl").is_file()
    steps, returns = read_training_curve(run, window=1)
    # Training episodes are staggered: first ones of 250, 500, 750 and 1000 steps, of which only the last one is whole
    assert steps.tolist() == [2500, 3500, 4500]
    assert (returns > 0).all()
    assert read_evaluation_curve(run)[0].tolist() == [2000, 4000, 6000]
    # Watched and recorded in dm_control itself, whose observations are the same
    main(["enjoy", *ENVPOOL[:2], "-n", "10", "--no-render", "--load-best"])


def test_envpool_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"sb3-r2vpo\[envpool\]"):
        main(["train", *ENVPOOL, "-n", "10"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "CartPole-v1", "--vec-env", "envpool"], "not a task of the DeepMind Control Suite"),
        ([*ENVPOOL, "--env-kwargs", "render_mode:None"], "`env_kwargs` .* have no effect"),
        ([*ENVPOOL, "-params", "env_wrapper:'gymnasium.wrappers.ClipAction'"], "Use `vec_env_wrapper`"),
    ],
)
def test_envpool_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["train", *arguments])


# --- Plots


def write_run(folder: Path, returns: list[list[float]], t_start: float = 100.0) -> None:
    """Monitor files of environments whose episodes of 10 steps end one second after each other."""
    folder.mkdir(parents=True)
    for i, env_returns in enumerate(returns):
        lines = [f"#{json.dumps({'t_start': t_start, 'env_id': 'None'})}", "r,l,t"]
        lines += [f"{value},10,{j + i / 2}" for j, value in enumerate(env_returns)]
        (folder / f"{i}.monitor.csv").write_text("\n".join(lines) + "\n")


def test_training_curve():
    write_run(Path("run"), [[1.0, 3.0], [2.0, 4.0], []])
    steps, returns = read_training_curve(Path("run"), window=1)
    assert steps.tolist() == [10, 20, 30, 40]
    assert returns.tolist() == [1, 2, 3, 4]
    assert read_training_curve(Path("run"), window=3)[1].tolist() == pytest.approx([1, 1.5, 2, 3])
    assert read_training_curve(Path("run"), window=100)[1].tolist() == pytest.approx([1, 1.5, 2, 2.5])


def test_average_of_runs():
    first = (np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    second = (np.array([5.0, 20.0]), np.array([7.0, 22.0]))
    steps, mean, low, high = average([first, second])
    assert (steps[0], steps[-1]) == (0, 20)
    both = (steps >= 5) & (steps <= 10)
    # One run before and after, whose mean has no interval; of two, a quarter of the draws has one of them only
    assert mean == pytest.approx(steps + np.where(both, 1, np.where(steps < 5, 0, 2)))
    assert mean - low == pytest.approx(both.astype(float))
    assert high - mean == pytest.approx(both.astype(float))
    # A gap where there is no run
    steps, mean, *_ = average([first, (np.array([15.0, 20.0]), np.zeros(2))])
    assert not ((steps > 10) & (steps < 15)).any()
    assert np.isfinite(mean).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CartPole-v1_3", "CartPole-v1"),
        ("dm_control-ball_in_cup-catch-v0_12", "dm_control-ball_in_cup-catch-v0"),
        ("CartPole-v1_1_0a1b2c3d-0a1b-4c2d-8e3f-0a1b2c3d4e5f", "CartPole-v1"),
        ("my_run", "my_run"),
    ],
)
def test_environment_of_a_run(name, expected):
    assert environment_of(Path(name)) == expected


def test_plot(monkeypatch, capsys):
    rising = [[float(i) for i in range(50)]]
    for run in ("r2vpo/CartPole-v1_1", "r2vpo/CartPole-v1_2", "ppo/CartPole-v1_1", "ppo/Pendulum-v1_1"):
        write_run(Path("logs", run), rising)
    main(["plot", "logs", "-w", "5"])
    assert Path("learning_curve.png").stat().st_size > 0
    monkeypatch.chdir("logs/r2vpo/CartPole-v1_1")
    main(["plot", ".", "-o", "one.png"])
    assert "Wrote one.png" in capsys.readouterr().out


def test_plot_refuses():
    with pytest.raises(ValueError, match=r"no \*monitor.csv in nowhere"):
        main(["plot", "nowhere"])
    write_run(Path("logs/CartPole-v1_1"), [[]])
    with pytest.raises(ValueError, match="No episode has ended yet in the runs on CartPole-v1"):
        main(["plot", "logs"])
    with pytest.raises(SystemExit):
        main(["plot", "logs", "-w", "0"])


# --- Help and bad input


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"r2vpo {command} ", overview)
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "examples:" in text
        assert f"usage: r2vpo {command}" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["train", "--env", "CartPoll-v1"], ValueError, "you maybe meant CartPole"),
        (["train", "--trial-id", "0"], ValueError, "takes `--storage` and `--study-name`"),
        (["train", "--trial-id", "0", "--storage", "x.log", "--study-name", "s"], ValueError, "no study storage x.log"),
        (["train", "-params", "policy_kwargs:{'activation_fn':'swosh'}"], ValueError, "Unknown `activation_fn`"),
        (["train", "-params", "target_variance:-1"], ValueError, "`target_variance` is -1"),
        (["enjoy", "--no-render"], AssertionError, "logs/r2vpo folder was not found"),
        (["train", "--algo", "r3vpo"], SystemExit, "2"),
        (["train", "--vec-env", "pool"], SystemExit, "2"),
        (["fly"], SystemExit, "2"),
        ([], SystemExit, "2"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        main(arguments)
    assert not list(Path().rglob("*.zip"))


# --- Memory and masks


def test_recurrent_run(capsys):
    train = ["train", "--algo", "r2vpo_lstm", "--env", "CartPoleNoVel-v1", "-n", "300", "--verbose", "0", "--eval-freq", "200"]
    main([*train, "-params", "n_envs:2", "batch_size:32", "n_epochs:1"])
    assert Path("logs/r2vpo_lstm/CartPoleNoVel-v1_1/best_model.zip").is_file()
    main(["enjoy", "--algo", "r2vpo_lstm", "--env", "CartPoleNoVel-v1", "--no-render", "-n", "50", "--load-best"])


class FewValidActions(gym.Env):
    """One action in ten is valid, another one each time; an invalid one is an error."""

    observation_space, action_space = gym.spaces.Box(0, 1, (10,), np.float32), gym.spaces.Discrete(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def _observe(self):
        self.valid = int(self.np_random.integers(10))
        return np.eye(10, dtype=np.float32)[self.valid]

    def action_masks(self):
        return np.arange(10) == self.valid

    def step(self, action):
        assert action == self.valid, "an invalid action"
        self.steps += 1
        return self._observe(), 1.0, False, self.steps == 20, {}


def test_masked_run_with_evaluations(capsys):
    gym.register("FewValidActions-v0", FewValidActions)
    train = ["train", "--algo", "r2vpo_mask", "--env", "FewValidActions-v0", "-n", "300", "--verbose", "0"]
    try:
        main([*train, "--eval-freq", "100", "-params", "n_steps:64", "batch_size:32", "n_epochs:1"])
    finally:
        gym.registry.pop("FewValidActions-v0")
    evaluations = np.load("logs/r2vpo_mask/FewValidActions-v0_1/evaluations.npz")
    assert (evaluations["results"] == 20).all()


@pytest.mark.parametrize("command", ["enjoy", "tune", "record-video"])
def test_commands_without_masks_say_so(command):
    with pytest.raises(SystemExit, match="no action masks"):
        main([command, "--algo", "r2vpo_mask", "--env", "CartPole-v1"])
