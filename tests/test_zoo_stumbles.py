"""What a newcomer stumbles over: no display, failed runs, unreadable plots, wrong versions; and policies as files."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3.utils
import torch as th
from gymnasium import spaces
from helpers import RandomEnv
from scipy import stats
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_r2vpo import R2VPO, RecurrentR2VPO
from sb3_r2vpo.common.export import DeterministicPolicy, export_policy
from sb3_r2vpo.common.normalization import load_normalization
from sb3_r2vpo.zoo import doctor, plots, register
from sb3_r2vpo.zoo.cli import main
from sb3_r2vpo.zoo.companions import matching_statistics
from sb3_r2vpo.zoo.studies import plot_study, table_of_best
from sb3_r2vpo.zoo.tensorboard import GROUPS

register()

SMALL = ["-n", "128", "--verbose", "0", "--eval-freq", "-1"]
PARAMS = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:1"]


@pytest.fixture(autouse=True)
def command_line(tmp_path, monkeypatch):
    """Let each test write into a folder of its own, and undo what the command line does to the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    num_threads = th.get_num_threads()
    yield
    th.set_num_threads(num_threads)


@pytest.fixture
def no_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)


# --- Imports


def test_imports_are_lazy():
    """The version takes no PyTorch, curves take no Zoo, and R2VPO takes little that SB3 does not."""
    code = """if True:
        import sys
        from sb3_r2vpo.zoo.cli import load, main
        try:
            main(["--version"])
        except SystemExit:
            print("torch" in sys.modules)
        load("plot"), load("doctor")
        print("torch" in sys.modules, "optuna" in sys.modules)
        import stable_baselines3
        before = set(sys.modules)
        from sb3_r2vpo import R2VPO
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"sb3_r2vpo", "stable_baselines3", "torch"}))
        print("torch._dynamo" in set(sys.modules) - before)
    """
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[1:3] == ["False", "False False"]
    # What reads and writes models
    assert set(eval(lines[3])) <= {"safetensors", "_safetensors_rust", "fcntl", "__future__"} | set(sys.stdlib_module_names)
    assert lines[4] == "False"


# --- Watching and recording


def test_watching_without_a_display(no_display, monkeypatch):
    for option in ([], ["--env", "dm_control/walker-run-v0"]):
        with pytest.raises(SystemExit, match=r"no display.*--no-render.*record-video"):
            main(["enjoy", *option])
    # Goes on to look for the run
    with pytest.raises(AssertionError, match="folder was not found"):
        main(["enjoy", "--no-render"])
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(AssertionError, match="folder was not found"):
        main(["enjoy"])


def test_environment_of_ones_own_on_video(no_display, monkeypatch):
    Path("mine.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "gym.register('Mine-v0', CartPoleEnv, max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(".")
    own = ["--env", "Mine-v0", "--gym-packages", "mine"]
    try:
        main(["train", *own, *SMALL, *PARAMS])
        gym.registry.pop("Mine-v0")
        sys.modules.pop("mine")
        main(["record-video", *own, "-n", "5"])
    finally:
        gym.registry.pop("Mine-v0", None)
        sys.modules.pop("mine", None)
    assert list(Path("logs/r2vpo/Mine-v0_1/videos").glob("*.mp4"))


# --- Runs that fail


def test_failed_run_leaves_no_folder():
    for arguments, error in ((["-params", "n_steps:-3"], ValueError), (["-params", "n_stepps:3"], TypeError)):
        with pytest.raises(error):
            main(["train", "--env", "CartPole-v1", *SMALL, *arguments])
    assert not list(Path("logs").rglob("CartPole*"))


def test_runs_without_a_model_are_passed_over():
    for number in (1, 2, 3):
        Path(f"logs/r2vpo/CartPole-v1_{number}").mkdir(parents=True)
    Path("logs/r2vpo/CartPole-v1_2/CartPole-v1.zip").touch()
    with matching_statistics():
        _, path, _ = rl_zoo3.utils.get_model_path(0, "logs", "r2vpo", "CartPole-v1")
        assert path == "logs/r2vpo/CartPole-v1_2/CartPole-v1.zip"
        with pytest.raises(ValueError, match="No model found"):
            rl_zoo3.utils.get_model_path(0, "logs", "r2vpo", "CartPole-v1", True)


# --- Learning curves


def test_interval_is_the_bootstrap_of_the_mean():
    random = np.random.default_rng(0)
    steps, returns = np.linspace(0, 100, plots.N_GRID_POINTS), random.normal(size=(5, plots.N_GRID_POINTS))
    # One run is shorter
    curves = [*zip([steps] * 5, returns, strict=True)]
    curves[0] = (steps[:100], returns[0, :100])
    grid, mean, low, high = plots.average(curves)
    assert np.array_equal(grid, steps)
    for column, runs in ((10, returns[:, 10]), (150, returns[1:, 150])):
        expected = stats.bootstrap((runs,), np.mean, method="percentile", random_state=1).confidence_interval
        assert mean[column] == pytest.approx(runs.mean())
        # Both are of draws; the interval is some 1.5 wide
        assert (low[column], high[column]) == pytest.approx(tuple(expected), abs=0.1)
    assert (low < mean).all()
    assert (mean < high).all()


def write_monitor(lengths: list[int], header: dict, tail: str = "") -> None:
    rows = [f"{length / 10},{length},{i}\n" for i, length in enumerate(lengths)]
    Path("run").mkdir(exist_ok=True)
    Path("run/0.monitor.csv").write_text("".join([f"#{json.dumps({'t_start': 0.0, **header})}\n", "r,l,t\n", *rows, tail]))


def test_curves_leave_out_episodes_that_were_cut_off():
    write_monitor([250, 500, 1000, 1000], {plots.CUT_OFF: [250, 500, 750]})
    steps, returns = plots.read_training_curve(Path("run"), window=10)
    assert steps.tolist() == [1750, 2750]
    assert returns.tolist() == [100, 100]
    # An environment whose episodes end by themselves
    write_monitor([250, 500, 1000, 1000], {})
    assert plots.read_training_curve(Path("run"), window=10)[0].tolist() == [250, 750, 1750, 2750]


def test_curves_of_killed_runs():
    write_monitor([10, 20], {}, tail="3.0,3")
    assert plots.read_training_curve(Path("run"), window=1)[0].tolist() == [10, 30]
    for torn in ("", '#{"t_st'):
        Path("run/0.monitor.csv").write_text(torn)
        assert plots.read_training_curve(Path("run"), window=1)[0].size == 0


def test_curves_can_be_told_apart():
    folders = []
    for i in range(9):
        write_monitor([10, 20], {})
        folders.append(Path("run").rename(f"Env-v0_{i}"))
    (ax,) = plots.plot_learning_curves(folders).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == len(ax.lines) == 9


# --- Studies


def test_best_trials_of_a_study(capsys):
    study = optuna.create_study(study_name="r2vpo_dm_control/x", direction="maximize")
    random = np.random.default_rng(0)
    distributions = {f"x{i}": optuna.distributions.FloatDistribution(0, 1) for i in range(17)}
    for number in range(20):
        params = {name: float(random.uniform()) for name in distributions}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=100 * params["x3"] + number / 1e3)
        )
    study.add_trial(optuna.create_trial(params=params, distributions=distributions, state=optuna.trial.TrialState.FAIL))
    header, values, *rows = (line.split() for line in table_of_best(study).splitlines())
    best = sorted(study.trials[:-1], key=lambda trial: trial.value, reverse=True)[:5]
    assert header == ["trial", *(str(trial.number) for trial in best)]
    assert values == ["value", *(f"{trial.value:.3g}" for trial in best)]
    assert rows[3] == ["x3", *(f"{trial.params['x3']:.3g}" for trial in best)]
    plot_study(study, Path())
    assert {path.name for path in Path().glob("*.png")} == {
        f"r2vpo_dm_control-x_{plot}.png" for plot in ("history", "importances", "slices")
    }


# --- TensorBoard


def test_tensorboard_groups_all_that_is_logged():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    options = ["--algo", "r2vpo_off", "--env", "Pendulum-v1", "--tensorboard-log", "tb", "--verbose", "0"]
    main(["train", *options, "-n", "400", "--eval-freq", "200", "--eval-episodes", "1", *PARAMS, "var_coef:'auto'"])
    (file,) = Path("tb").rglob("events*")
    events = EventAccumulator(str(file)).Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [*GROUPS]
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    tags = events.Tags()["scalars"]
    assert "train/ratio_variance_stale_1" in tags
    assert [tag for tag in tags if not any(re.match(pattern, tag) for pattern in patterns)] == []


# --- r2vpo doctor


@pytest.fixture
def requirements(monkeypatch):
    """The package's requirements, and the versions that are installed."""
    versions = {"torch": "2.13.0+cpu", "mujoco": "3.17.0", "pandas": "2.3.3"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    wanted = ["torch<3,>=2.8", 'mujoco<4,>=3.1; extra == "dm-control"', 'pandas<3,>=2.2; extra == "zoo"']
    wanted += ['envpool>=1; (python_version < "3") and extra == "envpool"', 'mujoco<4,>=3.1; extra == "all"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_doctor_knows_incompatible_versions(requirements, capsys):
    assert doctor.check_packages()[1] == []
    requirements.update(mujoco="4.0.1", pandas="3.0.0")
    lines, (mujoco, pandas) = doctor.check_packages()
    assert "extra dm_control: mujoco 4.0.1" in lines
    assert "flex_vertedge" in mujoco
    assert mujoco.endswith("pip install 'mujoco<4,>=3.1'")
    assert "pandas is 3.0.0, not <3,>=2.2: rl_zoo3's plot scripts" in pandas
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--no-render"])
    assert "To mend:\n- mujoco is 4.0.1" in capsys.readouterr().out


def test_doctor_knows_what_is_missing(requirements, capsys):
    del requirements["mujoco"]
    lines, problems = doctor.check_packages()
    assert problems == []
    assert (
        "not installed of the extra dm_control: mujoco; in a checkout, pip install -c constraints.txt '.[dm_control]'" in lines
    )
    # Not for this version of Python
    assert "envpool" not in "".join(lines)
    main(["doctor", "--no-render"])
    assert capsys.readouterr().out.endswith("Nothing to mend.\n")
    del requirements["torch"]
    assert doctor.check_packages()[1] == ["torch is missing. pip install torch"]


def test_requirements_have_a_reason(requirements, monkeypatch):
    """The reasons are of packages that the package itself limits."""
    monkeypatch.undo()
    wanted = metadata.requires("sb3-r2vpo") or []
    for name in doctor.REASONS:
        assert any(re.match(rf"{name}\S*<\d", line) for line in wanted)


@pytest.mark.parametrize(
    ("working", "chosen", "problem"),
    [
        ({"egl", "osmesa"}, None, None),
        ({"egl"}, "egl", None),
        ({"egl"}, "osmesa", "MUJOCO_GL is osmesa, which does not work here: export MUJOCO_GL=egl"),
        (set(), None, "MuJoCo can't render, for videos: apt-get install libegl1 libosmesa6"),
    ],
)
def test_doctor_tries_to_render(no_display, requirements, monkeypatch, working, chosen, problem):
    monkeypatch.setattr(doctor, "renders", working.__contains__)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if chosen is not None:
        monkeypatch.setenv("MUJOCO_GL", chosen)
    lines, problems = doctor.check_rendering()
    assert problems == ([] if problem is None else [problem])
    assert lines[0].startswith("display: none; `r2vpo enjoy` takes --no-render")


# --- Export

FLOATS = spaces.Box(-1.0, 1.0, (3,), np.float64)
TORQUES = spaces.Box(np.float32([-0.02, -0.1]), np.float32([0.1, 0.02]))
POLICIES = {
    "continuous": (FLOATS, TORQUES, "MlpPolicy", {}, {}),
    "discrete": (FLOATS, spaces.Discrete(4), "MlpPolicy", {}, {}),
    "several": (FLOATS, spaces.MultiDiscrete([3, 4]), "MlpPolicy", {}, {}),
    "binary": (spaces.Discrete(5), spaces.MultiBinary(3), "MlpPolicy", {"norm_obs": False}, {}),
    "mapping": (
        spaces.Dict(angle=FLOATS, target=spaces.Box(0, 1, (2,))),
        TORQUES,
        "MultiInputPolicy",
        {"norm_obs_keys": ["angle"]},
        {},
    ),
    "images": (spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Discrete(3), "CnnPolicy", {"norm_obs": False}, {}),
    "squashed": (FLOATS, TORQUES, "MlpPolicy", {}, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
}


def trained(name: str) -> R2VPO:
    observations, actions, policy, normalization, options = POLICIES[name]
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(observations, actions)]), **normalization)
    model = R2VPO(policy, env, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu", **options)
    model.learn(64)
    with th.no_grad():
        # Else no action would reach a bound
        model.policy.action_net.weight.mul_(30)
    return model


def assert_equal_actions(model: R2VPO, run) -> None:
    """Compare what a file does with what the model does, on more observations than it was exported with."""
    module = DeterministicPolicy(model.policy)
    observations = module.example(50)
    arrays = {name: part.numpy() for name, part in zip(module.names, observations, strict=True)}
    normalized = model.get_vec_normalize_env().normalize_obs(arrays if module.is_mapping else arrays["observations"])
    expected, _ = model.predict(normalized, deterministic=True)
    actions = run(arrays)
    assert actions.shape == expected.shape
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-6)
    if isinstance(model.action_space, spaces.Box) and not model.policy.squash_output:
        assert (actions == model.action_space.low).any()
        assert (actions == model.action_space.high).any()


@pytest.mark.parametrize("name", POLICIES)
def test_torchscript_has_equal_actions(name):
    model = trained(name)
    exported = th.jit.load(export_policy(model, "policy.pt"))
    assert_equal_actions(model, lambda arrays: exported(*map(th.as_tensor, arrays.values())).numpy())


@pytest.mark.parametrize("name", ["continuous", pytest.param("mapping", marks=pytest.mark.slow)])
def test_onnx_has_equal_actions(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(name)
    session = onnxruntime.InferenceSession(export_policy(model, "policy.onnx"))
    assert [output.name for output in session.get_outputs()] == ["actions"]
    assert [path.name for path in Path().iterdir()] == ["policy.onnx"]
    assert_equal_actions(model, lambda arrays: session.run(None, arrays)[0])


def test_export_leaves_the_model_alone():
    model = trained("continuous")
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    module = DeterministicPolicy(model.policy)
    for parameter in module.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    for name, parameter in model.policy.named_parameters():
        assert parameter.requires_grad
        assert th.equal(parameter, before[name])


def test_export_refuses(monkeypatch):
    model = trained("discrete")
    with pytest.raises(ValueError, match=r"'.h5'; it must be one of .onnx for ONNX, .pt for TorchScript"):
        export_policy(model, "policy.h5")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="extra `export`"):
        export_policy(model, "policy.onnx")
    with pytest.raises(ValueError, match=r"statistics are of observations of shape \(3,\), the policy takes \(\)"):
        DeterministicPolicy(trained("binary").policy, VecNormalize(model.get_env().venv))
    recurrent = RecurrentR2VPO("MlpLstmPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match="it takes more than an observation"):
        export_policy(recurrent, "policy.pt")
    assert not list(Path().iterdir())


def test_export_of_a_run(capsys):
    main(["train", "--env", "Pendulum-v1", *SMALL, *PARAMS, "normalize:True"])
    main(["export", "--env", "Pendulum-v1", "-o", "policy.pt"])
    assert "normalized by logs/r2vpo/Pendulum-v1_1/Pendulum-v1/vecnormalize.pkl" in capsys.readouterr().out
    run = Path("logs/r2vpo/Pendulum-v1_1")
    model = R2VPO.load(run / "Pendulum-v1.zip", device="cpu")
    statistics = load_normalization(run / "Pendulum-v1/vecnormalize.pkl", DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    observations = np.float32([[1, 0, -3], [-1, 0, 8]])
    expected, _ = model.predict(statistics.normalize_obs(observations), deterministic=True)
    actions = th.jit.load("policy.pt")(th.as_tensor(observations)).numpy()
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--algo", "sac"])
