"""Checkpoints: training goes on from them bit by bit, and whatever ends it, they are there and whole."""

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

import sb3_r2vpo.envs  # noqa: F401
from sb3_r2vpo import R2VPO, R2VPOOff, RecurrentR2VPO, presets
from sb3_r2vpo.common import checkpoint
from sb3_r2vpo.common.checkpoint import (
    CheckpointCallback,
    list_checkpoints,
    newest_readable,
    remaining_timesteps,
    resume,
    save_checkpoint,
)
from sb3_r2vpo.common.env_state import NotCapturedError, get_env_state, get_single_state, set_env_state, set_single_state

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
kills = pytest.importorskip("kills")

SHORT = {"policy": "MlpPolicy", "n_steps": 32, "batch_size": 32, "n_epochs": 2}
N_ROLLOUTS = 6


def cartpole(n_envs: int = 2) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, seed=0)


def weights(model: Any) -> dict[str, th.Tensor]:
    optimizer = model.policy.optimizer.state_dict()["state"]
    state = {f"{i} {name}": value for i, values in optimizer.items() for name, value in values.items()}
    multiplier = {"multiplier": th.as_tensor(model.policy_loss.multiplier.value)}
    return {key: th.as_tensor(value).clone() for key, value in {**model.policy.state_dict(), **state, **multiplier}.items()}


def assert_equal(model: Any, other: Any) -> None:
    assert model.num_timesteps == other.num_timesteps
    th.testing.assert_close(weights(model), weights(other), atol=0, rtol=0, equal_nan=True)


def make(env: VecEnv | None = None, algorithm: type = R2VPO, **kwargs: Any) -> Any:
    return algorithm(env=env or cartpole(), seed=1, device="cpu", **{**SHORT, **kwargs})


class At(BaseCallback):
    """Do something once, at a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.step, self.action = step, action

    def _on_step(self) -> bool:
        if self.n_calls == self.step:
            self.action()
        return True


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# === Environments ===


def stacked() -> VecEnv:
    return VecFrameStack(VecMonitor(DummyVecEnv([lambda: gym.make("MountainCar-v0")])), 3)


ENVS: dict[str, Callable[[], VecEnv]] = {
    **{
        name: lambda name=name: VecNormalize(make_vec_env(name, n_envs=2, seed=0))  # type: ignore[misc]
        for name in (
            *("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "HalfCheetah-v5", "Humanoid-v5", "Reacher-v5"),
            *(f"dm_control/{task}-v0" for task in ("walker-run", "finger-turn_hard", "reacher-hard", "point_mass-hard")),
            *(f"dm_control/{task}-v0" for task in ("ball_in_cup-catch", "fish-swim", "humanoid-run", "acrobot-swingup")),
        )
    },
    "FrozenLake-v1": lambda: make_vec_env("FrozenLake-v1", n_envs=2, seed=0),
    "stacked": stacked,
    "subprocesses": lambda: VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv)),
}


@pytest.mark.parametrize("name", ENVS)
def test_environments_go_on_exactly(name: str) -> None:
    env, restored = ENVS[name](), ENVS[name]()
    env.seed(5)
    env.reset()
    env.action_space.seed(0)
    actions = [np.array([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(90)]
    for action in actions[:23]:
        env.step(action)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    state = get_env_state(env)
    assert state["not_captured"] is None
    # The state is a copy: it does not move with the environment
    for action in actions[23:30]:
        env.step(action)
    set_env_state(restored, state)
    assert np.array_equal(before, np.random.get_state()[1])
    set_env_state(env, state)
    for step, action in enumerate(actions[23:]):
        ours, theirs = env.step(action), restored.step(action)
        for one, other in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(one, other)
        infos = [[{**info.get("episode", {}), "t": 0} for info in result[3]] for result in (ours, theirs)]
        assert infos[0] == infos[1]
        if step == 40:
            # Random generators of the first states
            np.testing.assert_array_equal(env.reset(), restored.reset())
    env.close()
    restored.close()


class Walk(gym.Env):
    """A random walk with a state that only it knows how to save."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = np.zeros(1)
        self.n = 0
        return self.position.astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = self.position + self.np_random.normal(size=1) + action
        self.n += 1
        return self.position.astype(np.float32), float(-(self.position[0] ** 2)), self.n == 50, False, {}


class SavedWalk(Walk):
    def get_state(self) -> dict[str, Any]:
        return {"position": self.position, "n": self.n, "generator": self.np_random}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position, self.n, self.np_random = state["position"], state["n"], state["generator"]


class Images(SavedWalk):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return self.image(), {}

    def step(self, action: int) -> Any:
        return self.image(), *super().step(action)[1:]

    def image(self) -> np.ndarray:
        return self.np_random.integers(0, 255, (36, 36, 1), dtype=np.uint8)


def images() -> VecEnv:
    # Transposed views of stacked frames
    return VecFrameStack(make_vec_env(Images, n_envs=2, seed=0), 2)


class Scale(gym.RewardWrapper):
    """A wrapper of a user, with a plain attribute."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.n_rewards = 0

    def reward(self, reward: Any) -> float:
        self.n_rewards += 1
        return float(reward) / (100 + self.n_rewards)


class Opaque(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rewards = iter(range(10))


def test_what_is_not_known_is_not_guessed() -> None:
    with pytest.raises(NotCapturedError, match="Walk has no `get_state` and `set_state`"):
        get_single_state(Walk())
    with pytest.raises(NotCapturedError, match=r"Attribute `rewards` of Opaque holds a builtins.range_iterator"):
        get_single_state(Opaque(gym.make("CartPole-v1")))
    saved = SavedWalk()
    saved.reset(seed=0)
    saved.position = lambda: 0  # type: ignore[assignment]
    with pytest.raises(NotCapturedError, match="The state of SavedWalk can't be written"):
        get_single_state(saved)
    env = gym.make("CartPole-v1")
    state = get_single_state(env)
    state[-1]["state"]["attributes"]["values"]["step"] = 1
    with pytest.raises(ValueError, match="`step` is no attribute of CartPoleEnv that could be restored"):
        set_single_state(env, state)
    hopper, swimmer = (gym.make(f"{name}-v5").unwrapped for name in ("Hopper", "Swimmer"))
    hopper_state = get_single_state(hopper)
    with pytest.raises(ValueError, match="another MuJoCo model"):
        set_single_state(swimmer, [{**hopper_state[0], "class": "SwimmerEnv"}])


# === Going on exactly ===

CASES: dict[str, tuple[type, Callable[[], VecEnv], dict[str, Any]]] = {
    "defaults": (R2VPO, cartpole, {}),
    "off": (R2VPOOff, lambda: make_vec_env("Pendulum-v1", n_envs=2, seed=0), {"replay_capacity": 3}),
    "dm_control": (
        R2VPO,
        lambda: VecNormalize(make_vec_env("dm_control/cheetah-run-v0", n_envs=2, seed=0)),
        {**presets.dm_control(), "n_steps": 32, "batch_size": 32},
    ),
    "dm_control_off": (
        R2VPOOff,
        lambda: VecNormalize(make_vec_env("Hopper-v5", n_envs=2, seed=0)),
        {**presets.dm_control_off(), "n_steps": 32, "batch_size": 32},
    ),
    "gsde": (R2VPO, lambda: make_vec_env("Pendulum-v1", n_envs=2, seed=0), {"use_sde": True, "sde_sample_freq": 5}),
    "recurrent": (RecurrentR2VPO, cartpole, {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}}),
    "images": (R2VPO, images, {"policy": "CnnPolicy"}),
    "own state": (R2VPO, lambda: VecNormalize(DummyVecEnv([lambda: Scale(SavedWalk())] * 2)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_training_is_the_same(case: str, tmp_path: Path) -> None:
    algorithm, make_env, options = CASES[case]
    n_steps = N_ROLLOUTS * 32 * 2
    alone = make(make_env(), algorithm, **options).learn(n_steps)
    # Training with checkpoints is the same as without
    saving = make(make_env(), algorithm, **options)
    with CheckpointCallback(tmp_path, save_freq=2 * 64, every=None, keep=9) as callback:
        saving.learn(n_steps, callback=callback)
    assert_equal(saving, alone)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint_128.zip", "checkpoint_256.zip"]
    for path in list_checkpoints(tmp_path):
        env = make_env()
        random.seed(0), np.random.seed(0), th.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed = resume(path, env, device="cpu")
        assert type(resumed) is algorithm
        assert remaining_timesteps(resumed) == n_steps - resumed.num_timesteps
        resumed.learn(remaining_timesteps(resumed), reset_num_timesteps=False)
        assert_equal(resumed, alone)
        assert remaining_timesteps(resumed) == 0
    # It is a saved model as well
    obs = np.zeros((2, *alone.observation_space.shape), np.float32)
    loaded = algorithm.load(list_checkpoints(tmp_path)[-1])
    assert loaded.predict(obs)[0].shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["R2VPO, defaults", "R2VPOOff, DM Control settings"])
def test_killed_training_ends_as_if_left_alone(case: str) -> None:
    row = kills.kill_training(case, n_kills=1, n_timesteps=6000, every=0.01)
    assert row["equal"]
    assert row["kills"] > 0


def test_without_the_state_of_environments_all_else_is_exact(tmp_path: Path) -> None:
    def make_env() -> VecEnv:
        return VecNormalize(DummyVecEnv([Walk] * 2), gamma=0.9)

    model = make(make_env())
    with pytest.warns(UserWarning, match="Walk has no `get_state` and `set_state`"):
        model.learn(128, callback=CheckpointCallback(tmp_path, save_freq=64))
    env = make_env()
    with pytest.warns(UserWarning, match="Training goes on from their reset, with all else as it was"):
        resumed = resume(tmp_path, env)
    assert env.obs_rms.count == pytest.approx(64 + 2, abs=0.01)
    first = make(make_env())
    first.learn(64)
    assert_equal(resumed, first)
    resumed.learn(remaining_timesteps(resumed), reset_num_timesteps=False)
    # Not the episodes of the beginning once more
    begun = resumed.rollout_buffer.observations, first.rollout_buffer.observations
    assert not np.array_equal(*begun)


def test_the_environments_must_be_those_of_the_training(tmp_path: Path) -> None:
    model = make(VecNormalize(cartpole()))
    model.learn(64)
    save_checkpoint(model, tmp_path / "checkpoint_64.zip")
    with pytest.raises(ValueError, match="2 environments in DummyVecEnv in VecNormalize, but this is 3 environments"):
        resume(tmp_path, VecNormalize(cartpole(3)))
    with pytest.raises(ValueError, match="but this is 2 environments in DummyVecEnv: make and wrap"):
        resume(tmp_path, cartpole())
    with pytest.raises(ValueError, match=r"CartPoleEnv in PassiveEnvChecker.*, but this is CartPoleEnv in"):
        resume(tmp_path, VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1", disable_env_checker=True)] * 2)))
    # Unless one says so
    resumed = resume(tmp_path, VecNormalize(cartpole(3)), reset_env=True)
    resumed.learn(96, reset_num_timesteps=False)
    assert resumed.num_timesteps == 160


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no readable checkpoint in"):
        resume(tmp_path, cartpole())
    assert newest_readable(tmp_path) is None
    model = make()
    with pytest.raises(ValueError, match="The model's training has not begun"):
        save_checkpoint(model, tmp_path / "checkpoint_0.zip")
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="is a saved model without the state of its training"):
        resume(tmp_path / "model.zip", cartpole())


@pytest.mark.parametrize("options", [{}, {"noise_exponent": 0.5}], ids=["white", "coloured"])
def test_callbacks_and_the_log_go_on_as_well(options: dict[str, Any], tmp_path: Path) -> None:
    def make_env() -> VecEnv:
        return make_vec_env("Pendulum-v1", n_envs=2, seed=0)

    def callbacks() -> tuple[EvalCallback, list[BaseCallback]]:
        evaluation = EvalCallback(
            make_vec_env("Pendulum-v1", seed=7), eval_freq=24, n_eval_episodes=2, log_path=str(tmp_path), verbose=0
        )
        return evaluation, [evaluation, CheckpointCallback(tmp_path, save_freq=64, keep=9)]

    lines: list[dict[str, Any]] = []

    class Line(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            # The first after the checkpoint, which the evaluation has written
            if step == 144:
                lines.append({key: value for key, value in key_values.items() if not key.startswith("eval/")})

    alone, both = callbacks()
    model = make(make_env(), **options)
    model.set_logger(Logger(None, [Line()]))
    model.learn(256, callback=both)
    evaluation, both = callbacks()
    resumed = resume(tmp_path / "checkpoint_128.zip", make_env())
    resumed.set_logger(Logger(None, [Line()]))
    resumed.learn(remaining_timesteps(resumed), callback=both, reset_num_timesteps=False)
    assert_equal(resumed, model)
    assert evaluation.n_calls == alone.n_calls == 128
    assert evaluation.evaluations_timesteps == alone.evaluations_timesteps == [48, 96, 144, 192, 240]
    assert evaluation.evaluations_results[:2] == alone.evaluations_results[:2]
    # With what the last update before the checkpoint had recorded
    assert "train/policy_gradient_loss" in lines[0] or "train/value_loss" in lines[0]
    assert lines[0] == lines[1]
    assert evaluation.best_mean_reward >= max(np.mean(results) for results in alone.evaluations_results[:2])


# === Which files there are ===


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    model = make()
    returns = iter([1.0, 3.0, 2.0, 2.5, 0.0, 0.0])

    class Returns(BaseCallback):
        def _on_rollout_start(self) -> None:
            model.ep_info_buffer.clear()
            model.ep_info_buffer.append({"r": next(returns), "l": 1, "t": 0})

        def _on_step(self) -> bool:
            return True

    callback = CheckpointCallback(tmp_path, save_freq=64, every=None, keep=2)
    model.learn(6 * 64, callback=[Returns(), callback])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint_256.zip", "checkpoint_320.zip"]
    # The first rollout's start, of return 1, had nothing to save
    assert callback.best_mean_return == 3
    best = resume(tmp_path / "best_checkpoint.zip", cartpole())
    assert best.num_timesteps == 64
    assert sorted(os.listdir(tmp_path)) == ["best_checkpoint.zip", "checkpoint_256.zip", "checkpoint_320.zip"]


def test_time_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    class Clock(BaseCallback):
        def _on_rollout_end(self) -> None:
            now[0] += 20

        def _on_step(self) -> bool:
            return True

    make().learn(8 * 64, callback=[Clock(), CheckpointCallback(tmp_path, every=50, keep=9)])
    # After 60 and 120 seconds, three rollouts each
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["checkpoint_192", "checkpoint_384"]


def test_a_new_training_takes_another_folder(tmp_path: Path) -> None:
    make().learn(128, callback=CheckpointCallback(tmp_path, save_freq=64))
    with pytest.raises(ValueError, match="has checkpoints of another training"):
        make().learn(128, callback=CheckpointCallback(tmp_path, save_freq=64))
    for options in ({"keep": 0}, {"save_freq": 0}, {"every": 0}, {"every": float("nan")}):
        with pytest.raises(ValueError, match=f"`?{next(iter(options))}`?"):
            CheckpointCallback(tmp_path, **options)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model = make()
    model.learn(192, callback=CheckpointCallback(tmp_path, save_freq=64))
    older, newest = list_checkpoints(tmp_path)
    content = newest.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle], b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"The checkpoint .*{newest.name} is passed over"):
            assert newest_readable(tmp_path) == older
    with pytest.warns(UserWarning, match="is passed over"):
        resumed = resume(tmp_path, cartpole())
    # Trained on, the torn file is replaced
    resumed.learn(remaining_timesteps(resumed), callback=CheckpointCallback(tmp_path, save_freq=64), reset_num_timesteps=False)
    assert newest_readable(tmp_path) == newest
    assert_equal(resumed, model)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model = make()
    model.learn(64)
    path = tmp_path / "checkpoint_64.zip"
    save_checkpoint(model, path)
    content = path.read_bytes()
    model.lock = sys.stdout
    with pytest.raises(ValueError, match="lock"):
        save_checkpoint(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = make(VecNormalize(cartpole()))
    model.learn(64)
    model.action_space = spaces.Discrete(2)
    before = random.getstate(), np.random.get_state()[1].copy(), th.get_rng_state()  # type: ignore[union-attr]
    paths = [tmp_path / f"checkpoint_{i}.zip" for i in range(2)]
    for path in paths:
        save_checkpoint(model, path)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert th.equal(th.get_rng_state(), before[2])
    assert paths[0].read_bytes() == paths[1].read_bytes()


# === Whatever ends training ===


def finish(folder: Path) -> Any:
    resumed = resume(folder, cartpole())
    return resumed.learn(remaining_timesteps(resumed), reset_num_timesteps=False)


@pytest.fixture(scope="module")
def alone() -> Any:
    return make().learn(256)


class During(BaseCallback):
    """Do something during an update."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__()
        self.action = action

    def _on_rollout_end(self) -> None:
        if self.num_timesteps == 128:
            train = self.model.train

            def train_and_act() -> None:
                del self.model.train
                train()
                self.action()

            self.model.train = train_and_act

    def _on_step(self) -> bool:
        return True


def test_sigterm_ends_training_cleanly(alone: Any, tmp_path: Path) -> None:
    default = signal.getsignal(signal.SIGTERM)
    # Within a rollout: what is saved is its start
    with CheckpointCallback(tmp_path / "collecting") as callback:
        model = make().learn(256, callback=[At(80, lambda: send(signal.SIGTERM)), callback])
    assert signal.getsignal(signal.SIGTERM) == default
    assert callback.stopped_by == signal.SIGTERM
    assert model.num_timesteps == 160
    assert callback.last_path is not None
    assert callback.last_path.name == "checkpoint_128.zip"
    assert_equal(finish(tmp_path / "collecting"), alone)
    # Within an update: after it
    with CheckpointCallback(tmp_path / "training") as callback:
        make().learn(256, callback=[During(lambda: send(signal.SIGTERM)), callback])
    assert [path.name for path in list_checkpoints(tmp_path / "training")] == ["checkpoint_128.zip"]
    assert_equal(finish(tmp_path / "training"), alone)
    # Within the last update
    with CheckpointCallback(tmp_path / "last") as callback:
        make().learn(128, callback=[During(lambda: send(signal.SIGTERM)), callback])
    assert callback.stopped_by == signal.SIGTERM
    assert remaining_timesteps(resume(tmp_path / "last", cartpole())) == 0


def test_ctrl_c(alone: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, CheckpointCallback(tmp_path / "collecting") as callback:
        make().learn(256, callback=[At(80, lambda: send(signal.SIGINT)), callback])
    assert "checkpoint_128.zip, from where `resume` goes on" in caught.value.__notes__[0]
    assert_equal(finish(tmp_path / "collecting"), alone)
    # An update is not broken off
    with pytest.raises(KeyboardInterrupt), CheckpointCallback(tmp_path / "training") as callback:
        make().learn(256, callback=[During(lambda: send(signal.SIGINT)), callback])
    assert_equal(finish(tmp_path / "training"), alone)
    # But by a second one

    def twice() -> None:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        raise KeyError

    with pytest.raises(KeyError), CheckpointCallback(tmp_path / "twice") as callback:
        make().learn(256, callback=[During(twice), callback])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_save_waits(number: int, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_archive

    def interrupted(*arguments: Any) -> None:
        send(number)
        write(*arguments)
        send(number)

    monkeypatch.setattr(checkpoint, "write_archive", interrupted)
    callback = CheckpointCallback(tmp_path, save_freq=128)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt), callback:
            make().learn(256, callback=callback)
    else:
        with callback:
            make().learn(256, callback=callback)
        assert callback.stopped_by == number
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint_128.zip"]
    assert_equal(finish(tmp_path), alone)


class Broken(gym.Wrapper):
    def __init__(self, env: gym.Env, reward: float | None) -> None:
        super().__init__(env)
        self.left, self.broken_reward = 80, reward

    def step(self, action: Any) -> Any:
        self.left -= 1
        obs, reward, *rest = self.env.step(action)
        if self.left < 0 and self.broken_reward is None:
            raise RuntimeError("out of order")
        return obs, self.broken_reward if self.left < 0 else reward, *rest


@pytest.mark.parametrize("reward", [None, float("nan")])
def test_an_error_leaves_a_checkpoint(reward: float | None, tmp_path: Path) -> None:
    def make_env() -> VecEnv:
        return VecNormalize(make_vec_env("CartPole-v1", seed=0, wrapper_class=Broken, wrapper_kwargs={"reward": reward}))

    error = RuntimeError if reward is None else ValueError
    model = make(make_env())
    with pytest.raises(error) as caught, CheckpointCallback(tmp_path) as callback:
        model.learn(256, callback=callback)
    assert "checkpoint_64.zip, from where `resume` goes on" in caught.value.__notes__[-1]
    # The state is that of before the error, also in the statistics, and leads there again
    env = make_env()
    resumed = resume(tmp_path, env)
    assert np.isfinite([env.ret_rms.mean, env.ret_rms.var]).all()
    with pytest.raises(error):
        resumed.learn(remaining_timesteps(resumed), reset_num_timesteps=False)
    env = make_env()
    resumed = resume(tmp_path, env)
    env.env_method("set_wrapper_attr", "left", 10**9)
    resumed.learn(remaining_timesteps(resumed), reset_num_timesteps=False)
    expected_env = make_env()
    expected_env.env_method("set_wrapper_attr", "left", 10**9)
    assert_equal(resumed, make(expected_env).learn(256))


def test_lost_weights_are_not_saved(tmp_path: Path) -> None:
    model = make()

    def spoil() -> None:
        with th.no_grad():
            next(model.policy.parameters()).fill_(float("nan"))
        raise RuntimeError("spoiled")

    with pytest.raises(RuntimeError) as caught, CheckpointCallback(tmp_path, save_freq=64) as callback:
        model.learn(256, callback=[At(80, spoil), callback])
    assert "The weights are not finite, and were not saved. The last checkpoint is" in caught.value.__notes__[-1]
    assert str(callback.last_path) in caught.value.__notes__[-1]
    assert list_checkpoints(tmp_path)[-1] == callback.last_path


def test_signals_outside_of_the_main_thread(tmp_path: Path) -> None:
    import threading

    failures: list[BaseException] = []

    def run() -> None:
        try:
            with CheckpointCallback(tmp_path, save_freq=64) as callback:
                make().learn(128, callback=callback)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
    assert newest_readable(tmp_path) is not None
