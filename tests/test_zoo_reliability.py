"""The command line where things go wrong: killed runs and workers, files that would run code, environments that fail."""

import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import rl_zoo3.utils
import torch as th
import yaml
from optuna.trial import TrialState
from stable_baselines3 import HerReplayBuffer
from torch import nn

from sb3_r2vpo import R2VPO
from sb3_r2vpo.zoo import register
from sb3_r2vpo.zoo.cli import main
from sb3_r2vpo.zoo.companions import runs_of
from sb3_r2vpo.zoo.literals import parse_literal, parse_option
from sb3_r2vpo.zoo.plots import read_training_curve
from sb3_r2vpo.zoo.resume import find_run, read_settings, resumed_command
from sb3_r2vpo.zoo.storage import open_storage
from sb3_r2vpo.zoo.trust import SettingsLoader, check_settings, code_free

register()

pytestmark = [
    pytest.mark.filterwarnings("ignore:With n_steps"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]

SMALL = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:2"]
NORMALIZED = [*SMALL, "normalize:True"]
#: The command line in a process of its own, with a checkpoint at each rollout, and workers taken for dead after two seconds
PROGRAM = """
import sys
from functools import partial
import gymnasium as gym
from sb3_r2vpo.zoo import register
register()
from sb3_r2vpo.zoo import running, storage, tuning
running.RunCheckpoints = partial(running.RunCheckpoints, every=1e-9)
for module in (storage, tuning):
    module.HEARTBEAT_INTERVAL, module.GRACE_PERIOD = 1, 2
{setup}
from sb3_r2vpo.zoo.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def command_line(tmp_path, monkeypatch):
    """Let each test write into a folder of its own, and undo what the command line does to the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    num_threads = th.get_num_threads()
    yield
    th.set_num_threads(num_threads)


def start(*arguments: str, setup: str = "", **options) -> subprocess.Popen:
    Path("program.py").write_text(PROGRAM.format(setup=textwrap.dedent(setup)))
    return subprocess.Popen(
        [sys.executable, "program.py", *arguments],
        # A shell starts its background jobs, of which these tests may be one, with an interrupt that they and theirs ignore
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, f"it has ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(run: str) -> list[Path]:
    return [*Path(run, "checkpoints").glob("checkpoint_*.zip")]


# --- Going on with a run

RUN = "logs/r2vpo/CartPole-v1_1"


def test_killed_run_goes_on_as_if_it_had_not_been(monkeypatch):
    """Weights are equal bit by bit, episodes stand in the logs once each, in their order, and evaluations as well."""
    train = ["train", "--env", "CartPole-v1", "-n", "2500", "--seed", "1", "--verbose", "0", "--eval-freq", "500"]
    settings = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:4", "normalize:True", "learning_rate:lin_1e-3"]
    main([*train, "-f", "whole", *settings])
    process = start(*train, *settings)
    wait_for(lambda: len(checkpoints(RUN)) == 2, process)
    process.kill()
    process.wait()
    # Torn as well: the one before it is taken
    newest = max(checkpoints(RUN), key=lambda path: int(path.stem.partition("_")[2]))
    newest.write_bytes(newest.read_bytes()[:-100])
    with Path(RUN, "0.monitor.csv").open("a") as file:
        file.write("9,9")
    arguments = Path(RUN, "CartPole-v1/args.yml").read_text()
    with pytest.warns(UserWarning, match=newest.name):
        main(["train", "--env", "CartPole-v1", "--resume"])

    models = [R2VPO.load(f"{folder}/r2vpo/CartPole-v1_1/CartPole-v1.zip", device="cpu") for folder in ("whole", "logs")]
    assert models[0].num_timesteps == models[1].num_timesteps == 2560
    for one, other in zip(*(model.policy.state_dict().values() for model in models), strict=True):
        assert th.equal(one, other)
    curves = [read_training_curve(Path(folder, "r2vpo/CartPole-v1_1"), 1) for folder in ("whole", "logs")]
    np.testing.assert_array_equal(*(sorted(curve[1]) for curve in curves))
    assert curves[0][1].sum() == pytest.approx(curves[1][1].sum())
    for folder in ("whole", "logs"):
        assert np.load(f"{folder}/r2vpo/CartPole-v1_1/evaluations.npz")["timesteps"].tolist() == [500, 1000, 1500, 2000, 2500]
    assert Path(RUN, "CartPole-v1/args.yml").read_text() == arguments
    assert [run.name for run in Path("logs/r2vpo").iterdir()] == ["CartPole-v1_1"]

    with pytest.raises(ValueError, match="is at its end, after 2560 steps"):
        main(["train", "--resume", RUN])
    main(["train", "--resume", RUN, "-n", "2600"])
    assert R2VPO.load(f"{RUN}/CartPole-v1.zip", device="cpu").num_timesteps == 2688


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(number):
    process = start("train", "--env", "CartPole-v1", "-n", "100000000", *NORMALIZED, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: checkpoints(RUN), process)
    for _ in range(3):
        # A second one must not break what the first one saves
        process.send_signal(number)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 0), errors
    model = R2VPO.load(f"{RUN}/CartPole-v1.zip", device="cpu")
    assert model.num_timesteps > 0
    assert Path(RUN, "CartPole-v1/vecnormalize.pkl").is_file()
    assert find_run("r2vpo", "CartPole-v1", Path("logs")) == Path(RUN)


class Failing(gym.Env):
    """After 100 steps, it raises or returns NaN."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, failure: str = "raise", render_mode: str | None = None) -> None:
        self.failure, self.steps = failure, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 200 and self.failure == "raise":
            raise RuntimeError("the simulator has gone")
        reward = math.nan if self.steps >= 200 and self.failure == "nan" else 1.0
        return self.observation_space.sample(), reward, False, self.steps % 20 == 0, {}


@pytest.fixture
def failing():
    gym.register("Failing-v0", Failing)
    yield "Failing-v0"
    gym.registry.pop("Failing-v0")


@pytest.mark.filterwarnings("ignore:Checkpoints do not have the state")
@pytest.mark.parametrize(
    ("failure", "error", "message"), [("raise", RuntimeError, "the simulator has gone"), ("nan", ValueError, "NaN|nan")]
)
@pytest.mark.parametrize("algo", ["r2vpo", "ppo"])
def test_a_failing_environment_leaves_the_model(failing, algo, failure, error, message):
    Path("own.yml").write_text(yaml.dump({failing: {"n_timesteps": 1000, "policy": "MlpPolicy"}}))
    train = ["train", "--algo", algo, "--env", failing, "--env-kwargs", f"failure:{failure}", "--eval-freq", "-1"]
    train += ["--conf-file", "own.yml", *SMALL]
    run = Path("logs", algo, f"{failing}_1")
    if algo == "ppo" and failure == "nan":
        # SB3 notices once the weights are lost: nothing to save
        with pytest.raises((ValueError, RuntimeError), match=r"to satisfy the constraint|probability tensor contains"):
            main(train)
        assert not (run / f"{failing}.zip").is_file()
        return
    with pytest.raises(error, match=message):
        main(train)
    model = rl_zoo3.ALGOS[algo].load(run / f"{failing}.zip", device="cpu")
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    if algo == "r2vpo":
        assert checkpoints(str(run))


def test_a_run_without_a_checkpoint_begins_anew(capsys):
    main(["train", "--env", "CartPole-v1", "-n", "128", "--seed", "5", "--verbose", "0", *SMALL])
    weights = R2VPO.load(f"{RUN}/CartPole-v1.zip", device="cpu").policy.state_dict()
    for path in [*checkpoints(RUN), Path(RUN, "CartPole-v1.zip")]:
        path.unlink()
    main(["train", "--env", "CartPole-v1", "--resume"])
    assert "it begins anew" in capsys.readouterr().out
    for name, value in R2VPO.load(f"{RUN}/CartPole-v1.zip", device="cpu").policy.state_dict().items():
        assert th.equal(value, weights[name])


def test_what_resume_refuses():
    with pytest.raises(ValueError, match="no run of r2vpo on CartPole-v1 in logs"):
        main(["train", "--resume"])
    with pytest.raises(ValueError, match="There is no run nowhere"):
        main(["train", "--resume", "nowhere"])
    settings = Path(RUN, "CartPole-v1")
    settings.mkdir(parents=True)
    (settings / "config.yml").write_text("policy: MlpPolicy\nn_timesteps: 100\n")
    (settings / "args.yml").write_text("env: CartPole-v1\nalgo: r2vpo\ngym_packages: [os]\nseed: 3\nprogress: true\n")
    with pytest.raises(ValueError, match=r"The run imports os.*--gym-packages os"):
        main(["train", "--resume", RUN])
    with pytest.raises(ValueError, match=r"leave out --seed 4"):
        main(["train", "--resume", RUN, "--seed", "4"])
    run, options = resumed_command([f"--resume={RUN}", "-n", "7", "--gym-packages", "os"], trust=False)
    assert run == Path(RUN)
    assert {"--seed=3", "--progress", "--n-timesteps=7", f"--log-folder={Path('logs').resolve()}"} <= {*options}
    (settings / "args.yml").write_text("env: CartPole-v1\nalgo: ppo\n")
    with pytest.raises(ValueError, match="`-i` begins a new run"):
        main(["train", "--resume", RUN])
    (settings / "args.yml").write_text("")
    with pytest.raises(ValueError, match="holds no settings"):
        main(["train", "--resume", RUN])


def test_latest_run_is_one_that_has_a_model(capsys):
    main(["train", "--env", "CartPole-v1", "-n", "128", "--verbose", "0", *SMALL])
    for number in (2, 10):
        Path(f"logs/r2vpo/CartPole-v1_{number}/CartPole-v1").mkdir(parents=True)
    assert [run.name for run in runs_of(Path("logs/r2vpo"), "CartPole-v1")] == [f"CartPole-v1_{i}" for i in (10, 2, 1)]
    main(["enjoy", "--env", "CartPole-v1", "--no-render", "-n", "10"])
    assert f"Loading {RUN}/CartPole-v1.zip" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"No model found.*CartPole-v1_10"):
        main(["enjoy", "--env", "CartPole-v1", "--no-render", "-n", "10", "--load-checkpoint", "64"])


def test_weights_need_their_own_statistics():
    main(["train", "--env", "CartPole-v1", "-n", "256", "--verbose", "0", "--save-freq", "128", *NORMALIZED])
    own = Path(RUN, "rl_model_vecnormalize_128_steps.pkl")
    own.rename("elsewhere.pkl")
    train = ["train", "--env", "CartPole-v1", "-n", "128", "--verbose", "0", "-i", f"{RUN}/rl_model_128_steps.zip"]
    with pytest.raises(ValueError, match=r"rl_model_vecnormalize_128_steps.pkl is missing"):
        main([*train, *NORMALIZED])
    Path(RUN, "CartPole-v1/vecnormalize.pkl").unlink()
    with pytest.raises(ValueError, match=r"CartPole-v1/vecnormalize.pkl is missing"):
        main([*train[:-1], f"{RUN}/CartPole-v1.zip", *NORMALIZED])
    Path("elsewhere.pkl").rename(own)
    main([*train, *NORMALIZED])


def test_a_failing_process_is_restarted(capfd):
    main(
        ["train", "--env", "CartPole-v1", "-n", "128", "--vec-env", "subproc", "--restart-envs", "--env-timeout", "30", *SMALL]
    )
    (arguments,) = Path("logs").rglob("args.yml")
    saved = read_settings(arguments)
    assert (saved["vec_env"], saved["env_timeout"], saved["restart_envs"]) == ("subproc", 30, True)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--env", "CartPole-v1", "--restart-envs"])
    assert "are for --vec-env subproc" in capfd.readouterr().err


# --- Files are data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dict(net_arch=[256, 256], activation_fn=nn.Tanh)", {"net_arch": [256, 256], "activation_fn": nn.Tanh}),
        ("dict(net_arch=dict(pi=[64], vf=[64]), log_std_init=-2)", {"net_arch": {"pi": [64], "vf": [64]}, "log_std_init": -2}),
        ("{'norm_obs': True, 'norm_reward': False}", {"norm_obs": True, "norm_reward": False}),
        ("dict(optimizer_class=th.optim.AdamW)", {"optimizer_class": th.optim.AdamW}),
        ("HerReplayBuffer", HerReplayBuffer),
        ("(1, 'episode')", (1, "episode")),
        ("2**8", 256),
        ("-1e-3", -1e-3),
        ("1 / 4", 0.25),
        ("float('inf')", math.inf),
        ("None", None),
    ],
)
def test_literals(text, expected):
    assert parse_literal(text) == expected
    assert type(parse_literal(text)) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch ran')",
        "open('ran', 'w')",
        "dict(**{'a': 1})",
        "nn.Module.__subclasses__",
        "os.environ",
        "th.os.system",
        "nn.init.kaiming_normal_",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "f'{1}'",
        "9**9**9",
        "1e308 * 10",
        "dict(a=1)['a']",
        "{**{}}",
        "(a := 1)",
        "'a' * 10",
        "print",
        "dict(",
        "(" * 1000,
        "-" * 100000 + "1",
    ],
)
def test_no_literals(text):
    with pytest.raises(ValueError, match="is not data that settings may hold"):
        parse_literal(text)
    assert not Path("ran").exists()


def test_words_need_no_quotes():
    words = ["ppo_clip", "auto_0.5", "lin_1e-3", "gymnasium.wrappers.ClipAction", "MlpPolicy"]
    assert [parse_option(word) for word in words] == words
    assert parse_option("nn.ReLU") is nn.ReLU
    assert [parse_option(text) for text in ("'a b'", "True", "1e3", "[a]".replace("a", "1"))] == ["a b", True, 1000.0, [1]]


def test_all_settings_of_the_zoo_are_data():
    """But for those that name a package that is not installed, or a module that Gymnasium no longer has."""
    missing = ("ae.wrapper", "minigrid.wrappers", "wrappers.transform_observation", "wrappers.time_limit")
    n_entries = 0
    for path in Path(rl_zoo3.__file__).parent.glob("hyperparams/*.yml"):
        for hyperparams in yaml.safe_load(path.read_text()).values():
            if not any(name in str(hyperparams.get("env_wrapper")) for name in missing):
                check_settings(hyperparams)
                n_entries += 1
    assert n_entries > 200


#: As a string that is evaluated, as a name that is imported, and as objects of YAML
CODE = "__import__('pathlib').Path('ran').touch()"
PAYLOADS = [
    {"normalize": CODE},
    {"policy_kwargs": f"dict(a={CODE})"},
    {"monitor_kwargs": CODE},
    {"replay_buffer_kwargs": CODE},
    {"replay_buffer_class": CODE},
    {"env_wrapper": "payload.Wrapper"},
    {"env_wrapper": [{"payload.Wrapper": {}}]},
    {"vec_env_wrapper": "payload.Wrapper"},
    {"callback": "payload.Callback"},
    {"callback": [{"rl_zoo3.utils.get_class_by_name": {"name": "payload.Callback"}}]},
    {"callback": "subprocess.Popen"},
    {"env_wrapper": "stable_baselines3.common.utils.set_random_seed"},
    {"policy": "payload.Policy"},
    {"policy": "sb3_r2vpo.zoo.__main__.main"},
    {"policy": "stable_baselines3.common.callbacks.BaseCallback"},
]


@pytest.fixture
def payload(monkeypatch):
    """A module whose import leaves a trace."""
    Path("payload.py").write_text(f"{CODE}\nfrom stable_baselines3.common.callbacks import ProgressBarCallback as Callback\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "payload", raising=False)


@pytest.mark.parametrize("hidden", PAYLOADS, ids=str)
def test_settings_run_no_code(payload, hidden):
    settings = {"n_timesteps": 100, "policy": "MlpPolicy", **hidden}
    Path("own.yml").write_text(yaml.dump({"CartPole-v1": settings}))
    for command in ("train", "tune"):
        with pytest.raises(ValueError, match=r"is not data|to import a package|which is not a|must be a mapping"):
            main([command, "--env", "CartPole-v1", "--conf-file", "own.yml", "-n", "64", "--verbose", "0"])
    # And those of a folder that someone has sent
    folder = Path("logs/r2vpo/CartPole-v1_1/CartPole-v1")
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.dump(settings))
    (folder.parent / "CartPole-v1.zip").touch()
    for command in (["enjoy", "--no-render"], ["record-video"]):
        with pytest.raises(ValueError, match=r"is not data|to import a package|which is not a|must be a mapping"):
            main([*command, "--env", "CartPole-v1"])
    assert not Path("ran").exists()


@pytest.mark.parametrize("file", ["config.yml", "args.yml"])
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [ran]", "!!python/name:payload.Callback", "!!python/module:payload"]
)
def test_yaml_makes_no_objects(payload, tag, file):
    folder = Path("logs/r2vpo/CartPole-v1_1/CartPole-v1")
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text("policy: MlpPolicy\n")
    (folder / "args.yml").write_text("env_kwargs: null\n")
    (folder / file).write_text(f"env_kwargs: !!python/{tag}\n")
    (folder.parent / "CartPole-v1.zip").touch()
    for command in (["enjoy", "--no-render"], ["record-video"], ["train", "--resume", "logs/r2vpo/CartPole-v1_1"]):
        with pytest.raises(ValueError, match=r"which may run any code|settings may name"):
            main([*command, *(["--env", "CartPole-v1"] if "--resume" not in command else [])])
    assert not Path("ran").exists()


def test_yaml_of_the_zoo_is_read():
    settings = {"policy_kwargs": {"activation_fn": nn.Tanh, "net_arch": [8]}, "train_freq": (1, "episode"), "n_envs": 2}
    assert yaml.load(yaml.dump(settings), SettingsLoader) == settings
    hyperparams = __import__("collections").OrderedDict(settings)
    assert yaml.load(yaml.dump(hyperparams), SettingsLoader) == hyperparams


@pytest.mark.parametrize("algo", ["r2vpo", "ppo"])
def test_models_and_statistics_run_no_code(algo, capsys):
    class Trace:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    train = ["train", "--algo", algo, "--env", "CartPole-v1", "-n", "128", "--verbose", "0", *NORMALIZED]
    main(train)
    run = Path("logs", algo, "CartPole-v1_1")
    enjoy = ["--algo", algo, "--env", "CartPole-v1", "--exp-id", "1", "-n", "2"]
    commands = [
        ["enjoy", *enjoy, "--no-render"],
        ["record-video", *enjoy],
        [*train[:9], "-i", str(run / "CartPole-v1.zip"), *NORMALIZED],
    ]
    statistics = run / "CartPole-v1/vecnormalize.pkl"
    content = statistics.read_bytes()
    statistics.write_bytes(pickle.dumps(Trace()))
    for command in commands:
        with pytest.raises(ValueError, match=r"mkdir|damaged"):
            main(command)
    statistics.write_bytes(content)
    model = rl_zoo3.ALGOS["ppo"]("MlpPolicy", "CartPole-v1", device="cpu", n_steps=8, batch_size=8)
    model.trace = Trace()
    model.save(run / "CartPole-v1.zip")
    for command in commands:
        with pytest.raises(ValueError, match="mkdir"):
            main(command)
    assert not Path("ran").exists()
    if algo == "ppo":
        main([*commands[0], "--trust"])
        assert Path("ran").is_dir()


def test_named_packages_are_trusted(payload, capsys):
    Path("own.yml").write_text(
        yaml.dump({"CartPole-v1": {"n_timesteps": 64, "policy": "MlpPolicy", "callback": "payload.Callback"}})
    )
    train = ["train", "--env", "CartPole-v1", "--conf-file", "own.yml", "--verbose", "0", "--eval-freq", "-1"]
    with pytest.raises(ValueError, match="--gym-packages payload"):
        main(train)
    assert not Path("ran").exists()
    main([*train, "--gym-packages", "payload"])
    assert Path("ran").exists()


def test_settings_that_are_programs(payload):
    Path("program.py").write_text(f"{CODE}\nhyperparams = {{}}\n")
    with pytest.raises(ValueError, match="Settings are data: write them as a YAML file"):
        main(["train", "--env", "CartPole-v1", "--conf-file", "program.py"])
    with pytest.raises(ValueError, match="--gym-packages payload"):
        main(["train", "--env", "CartPole-v1", "--conf-file", "payload"])
    assert not Path("ran").exists()


def test_everything_is_as_before_in_the_end():
    loader, evaluate = yaml.UnsafeLoader, vars(rl_zoo3.utils).get("eval")
    with code_free(trust=False):
        assert yaml.UnsafeLoader is SettingsLoader
    assert yaml.UnsafeLoader is loader
    assert vars(rl_zoo3.utils).get("eval") is evaluate is None


# --- Studies

STORAGES = ["sqlite:///study.db", "study.log"]
TUNE = ["tune", "--env", "CartPole-v1", "--eval-episodes", "1", "--study-name", "s", "--no-optim-plots", "--verbose", "0"]


@pytest.mark.parametrize("storage", STORAGES)
def test_trial_of_a_killed_worker_runs_again(storage):
    tune = [*TUNE, "--storage", storage, "--max-total-trials", "2"]
    process = start(*tune, "-n", "100000000")

    def has_all_parameters():
        try:
            trials = optuna.load_study(study_name="s", storage=open_storage(storage, create=False)).trials
        except (ValueError, KeyError):
            return False
        return bool(trials) and "log_std_init" in trials[0].params

    wait_for(has_all_parameters, process)
    process.kill()
    process.wait()
    if storage.endswith(".log"):
        with Path(storage).open("a") as file:
            file.write('{"op_code":5,"wor')
    process = start(*tune, "-n", "64", stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert ("the last line was torn" in output) == storage.endswith(".log")
    assert "Trial 0 was left unfinished by its worker: it is put back in the queue." in output
    trials = optuna.load_study(study_name="s", storage=open_storage(storage)).trials
    assert trials[0].state is TrialState.FAIL
    # Killed trials do not count
    assert [trial.state for trial in trials[1:]] == 2 * [TrialState.COMPLETE]
    assert trials[0].params in [trial.params for trial in trials[1:]]

    options = ["--storage", storage, "--study-name", "s"]
    with pytest.raises(ValueError, match=r"Trial 0 of study 's' is FAIL, and has no result.*Completed are: 1, 2"):
        main(["train", *options, "--trial-id", "0"])
    best = max(trials[1:], key=lambda trial: trial.value)
    main(["train", *options, "--trial-id", "best", "-n", "64", "--verbose", "0"])
    assert read_settings(Path(RUN, "CartPole-v1/args.yml"))["trial_id"] == best.number
    assert read_settings(Path(RUN, "CartPole-v1/config.yml"))["learning_rate"] == best.params["learning_rate"]


@pytest.mark.slow
def test_two_workers_on_a_new_database():
    # With the settings' networks: those that a sampler draws may be large
    few = ["-n", "64", "--n-trials", "1", "--only", "var_coef"]
    workers = [start(*TUNE, "--storage", "sqlite:///new.db", *few) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    trials = optuna.load_study(study_name="s", storage="sqlite:///new.db").trials
    assert [trial.state for trial in trials] == 2 * [TrialState.COMPLETE]


def test_database_whose_tables_appear_meanwhile(monkeypatch):
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import OperationalError

    create, failures = RDBStorage.__init__, iter(["table studies already exists", "database is locked"])

    def fail_first(self, *args, **kwargs):
        if (message := next(failures, None)) is not None:
            raise OperationalError("CREATE TABLE", {}, Exception(message))
        create(self, *args, **kwargs)

    monkeypatch.setattr(RDBStorage, "__init__", fail_first)
    assert open_storage("sqlite:///new.db").get_all_studies() == []


def test_sigterm_puts_the_trial_back():
    storage = STORAGES[1]
    process = start(*TUNE, "--storage", storage, "-n", "100000000")

    def runs():
        try:
            return bool(optuna.load_study(study_name="s", storage=open_storage(storage, create=False)).trials)
        except (ValueError, KeyError):
            return False

    wait_for(runs, process)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=60) == 143
    states = [trial.state for trial in optuna.load_study(study_name="s", storage=open_storage(storage)).trials]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_study_without_a_completed_trial(failing):
    Path("own.yml").write_text(yaml.dump({failing: {"n_timesteps": 1000, "policy": "MlpPolicy"}}))
    tune = ["tune", "--env", failing, "--env-kwargs", "failure:nan", "-n", "3000", "--n-trials", "2", "--verbose", "0"]
    with pytest.raises(
        SystemExit, match=r"No trial of study 'r2vpo_Failing-v0' has completed.*The last error was: ValueError.*NaN|nan"
    ):
        main([*tune, "--eval-episodes", "1", "--conf-file", "own.yml"])
    study = optuna.load_study(study_name="r2vpo_Failing-v0", storage=open_storage("logs/optuna.log"))
    assert [trial.state for trial in study.trials] == 2 * [TrialState.PRUNED]
    with pytest.raises(ValueError, match="has no best trial"):
        main(["train", "--storage", "logs/optuna.log", "--study-name", "r2vpo_Failing-v0", "--trial-id", "best"])


def test_baseline_and_few_arguments_are_tuned():
    tune = [*TUNE, "-n", "64", "--n-trials", "1"]
    main([*tune, "--storage", "baseline.log", "-params", "objective:ppo_clip", "objective_kwargs:dict(clip_range=0.3)"])
    (trial,) = optuna.load_study(study_name="s", storage=open_storage("baseline.log")).trials
    assert trial.state is TrialState.COMPLETE
    assert "n_steps_pow" in trial.params
    assert not {"target_variance", "multiplier", "dual_learning_rate"} & {*trial.params}

    main([*tune, "--storage", "few.log", "--only", "min_var_coef,log_std_init", *SMALL, "policy_kwargs:dict(net_arch=[8])"])
    (trial,) = optuna.load_study(study_name="s", storage=open_storage("few.log")).trials
    assert {*trial.params} == {"min_var_coef", "log_std_init"}
    options = ["--storage", "few.log", "--study-name", "s", "--trial-id", "0", "--verbose", "0", "-n", "64"]
    main(["train", *options, *SMALL])
    model = R2VPO.load(f"{RUN}/CartPole-v1.zip", device="cpu")
    assert model.policy_kwargs["log_std_init"] == trial.params["log_std_init"]
    with pytest.raises(ValueError, match="`--only` has epsilon; what can be tuned is var_coef"):
        main([*tune, "--storage", "few.log", "--only", "epsilon"])
    with pytest.raises(ValueError, match="`--only` is for R2VPO's variants"):
        main([*tune, "--algo", "ppo", "--storage", "few.log", "--only", "n_steps"])


def test_damaged_journal_is_named():
    main([*TUNE, "--storage", "study.log", "-n", "64", "--n-trials", "1"])
    lines = Path("study.log").read_text().splitlines(keepends=True)
    Path("study.log").write_text("".join([*lines[:2], "{torn\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"study.log is damaged, and not only at its end"):
        main([*TUNE, "--storage", "study.log", "-n", "64", "--n-trials", "1"])
    with pytest.raises(ValueError, match=r"must be a file that ends in .log, or a URL"):
        open_storage("study.txt")
    with pytest.raises(ValueError, match=r"no study storage sqlite:///missing.db"):
        open_storage("sqlite:///missing.db", create=False)
