"""Environments in processes that raise, hang or die: an error in bounded time or a restart, and no process is left."""

import gc
import math
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SMALL, VECTOR, RandomEnv, weights
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from sb3_r2vpo import R2VPO
from sb3_r2vpo.common import worker as worker_module
from sb3_r2vpo.common.worker_vec_env import WorkerError, WorkerVecEnv, WorkerVecMonitor

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults"
sys.path.insert(0, str(FAULTS))
from faulty_env import FaultyEnv  # noqa: E402

DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
ACTIONS = spaces.Discrete(2)
STEP = np.zeros(3, dtype=int)
ANEW = "started anew"


class TracedEnv(RandomEnv):
    """Shows what it was reset with. Episodes have 7 steps."""

    def __init__(self, observation_space: spaces.Space = VECTOR) -> None:
        super().__init__(observation_space, ACTIONS)
        self.resets: list[tuple] = []
        self.level = 0

    def reset(self, *, seed=None, options=None):
        self.resets.append((seed, options))
        return super().reset(seed=seed, options=options)

    def set_level(self, level: int) -> int:
        self.level = level
        return level

    def render(self):
        return None


def functions(n_envs: int = 3, monitor_folder: Path | None = None, monitored: bool = False, **fault):
    """Environments of which number 1 fails, if a fault is given."""

    def make(index: int):
        def build() -> gym.Env:
            env = TracedEnv()
            if fault:
                env = FaultyEnv(env, index=index, worker=1, **fault)
            if monitor_folder is not None or monitored:
                env = Monitor(env, None if monitor_folder is None else str(monitor_folder / str(index)))
            return env

        return build

    return [make(index) for index in range(n_envs)]


def workers(start_method: str = "fork", timeout: float = 30.0, **kwargs) -> WorkerVecEnv:
    settings = {name: kwargs.pop(name) for name in ("restart", "max_restarts", "start_timeout") if name in kwargs}
    return WorkerVecEnv(functions(**kwargs), start_method=start_method, timeout=timeout, **settings)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch) -> None:
    """Forked workers have it, too."""
    monkeypatch.setattr(worker_module, "GRACE", 1.0)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_end(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def pids_of(env: WorkerVecEnv) -> list[int]:
    return [process.pid for process in env.processes]


# === Nothing fails ===


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["box", "dict"])
def test_results_are_those_of_the_other_classes(space: spaces.Space) -> None:
    def run(vec_env_class, **kwargs) -> list:
        env = vec_env_class([lambda: Monitor(RandomEnv(space, ACTIONS)) for _ in range(3)], **kwargs)
        env.seed(5)
        env.set_options({"difficulty": 1})
        results = [env.reset(), env.reset_infos]
        for _ in range(16):
            obs, rewards, dones, infos = env.step(STEP)
            for info in infos:
                info.get("episode", {}).pop("t", None)
            results += [obs, rewards.astype(np.float32), dones, list(infos)]
        results += [env.get_attr("steps"), env.has_attr("steps"), env.has_attr("nothing"), env.env_is_wrapped(Monitor)]
        env.close()
        return results

    ours = run(WorkerVecEnv, start_method="fork")
    assert sum(done.sum() for done in ours[4::4][:16]) == 2 * 3
    np.testing.assert_equal(ours, run(SubprocVecEnv, start_method="fork"))
    np.testing.assert_equal(ours, run(DummyVecEnv))


def test_training_is_the_same() -> None:
    def train(vec_env_class, **kwargs) -> th.Tensor:
        env = VecNormalize(vec_env_class(functions(), start_method="fork", **kwargs))
        model = R2VPO("MlpPolicy", env, **SMALL)
        model.learn(2 * 96)
        env.close()
        return weights(model)

    assert th.equal(train(WorkerVecEnv, restart=True), train(SubprocVecEnv))


# === Errors ===

CALLS = {
    "init": lambda env: None,
    "reset": lambda env: env.reset(),
    "step": lambda env: env.step(STEP),
    "render": lambda env: env.env_method("render"),
    "attribute": lambda env: env.get_attr("attribute"),
    "method": lambda env: env.env_method("method"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_exception_arrives_with_its_traceback_and_ends_all(call: str) -> None:
    before = set(mp.active_children())

    def run() -> None:
        env = workers(fault="raise", call=call)
        if call != "reset":
            env.reset()
        try:
            CALLS[call](env)
        finally:
            assert set(mp.active_children()) == before
            with pytest.raises(WorkerError, match="have ended"):
                env.reset()
            env.close()
            env.close()

    with pytest.raises(WorkerError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith("Environment 1 raised an exception")
    assert "faulty_env.py" in message
    assert message.rstrip().endswith("ValueError: boom")
    assert isinstance(caught.value.__cause__, ValueError)
    assert set(mp.active_children()) == before


DEATHS = {
    "unpicklable_error": "UnpicklableError: boom",
    "unpicklable_info": "pickle",
    "exit": "ended with exit code 3 during `step`",
    "sys_exit": "ended with exit code 4 during `step`",
    "kill": "was killed by SIGKILL during `step`.*memory",
    "segfault": "was killed by SIGSEGV during `step`.*PYTHONFAULTHANDLER",
    "hang": "hangs: `step` took longer than 0.5 s.*longer `timeout`",
    "spin": "hangs: `step` took longer than 0.5 s",
}


@pytest.mark.parametrize("fault", DEATHS)
def test_a_worker_that_dies_or_hangs_is_named(fault: str) -> None:
    env = workers(fault=fault, timeout=0.5)
    env.reset()
    pids, start = pids_of(env), time.monotonic()
    with pytest.raises(WorkerError, match="(?is)environment 1 .*" + DEATHS[fault]):
        env.step(STEP)
    env.close()
    # timeout, grace, terminate, kill, each with a margin for a busy machine
    assert time.monotonic() - start < 8
    assert_end(pids, 0)


def test_workers_that_start_in_a_fresh_interpreter() -> None:
    env = workers("forkserver", n_envs=2, fault="exit", call="step")
    env.reset()
    pids = pids_of(env)
    with pytest.raises(WorkerError, match="environment 1 ended with exit code 3"):
        env.step(STEP[:2])
    assert_end(pids, 0)


def test_a_constructor_that_hangs() -> None:
    with pytest.raises(WorkerError, match=r"building the environment took longer than 0\.5 s.*longer `start_timeout`"):
        workers(fault="hang", call="init", start_timeout=0.5)


def test_a_worker_killed_between_two_steps() -> None:
    env = workers()
    env.reset()
    os.kill(env.processes[2].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="environment 2 was killed by SIGKILL"):
        env.step(STEP)


def test_an_observation_larger_than_the_pipe_does_not_stop_close() -> None:
    large = spaces.Box(0, 1, (500_000,), np.float64)
    env = WorkerVecEnv([lambda: RandomEnv(large, ACTIONS)] * 2, start_method="fork")
    env.reset()
    pids = pids_of(env)
    env.step_async(STEP[:2])
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < 4
    assert_end(pids, 0)


def test_close_while_an_environment_hangs() -> None:
    env = workers(fault="spin")
    env.reset()
    env.step_async(STEP)
    pids, start = pids_of(env), time.monotonic()
    env.close()
    assert time.monotonic() - start < 6
    assert_end(pids, 0)


def test_environments_are_closed_however_the_worker_ends(tmp_path: Path) -> None:
    class Closing(TracedEnv):
        def close(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    def build(index: int):
        return lambda: FaultyEnv(Closing(), "raise", index=index, worker=1)

    env = WorkerVecEnv([build(0), build(1)], start_method="fork")
    env.reset()
    pids = pids_of(env)
    with pytest.raises(WorkerError):
        env.step(STEP[:2])
    assert {int(path.name) for path in tmp_path.iterdir()} == set(pids)


def test_garbage_collection_ends_the_processes() -> None:
    env, other = workers(), workers()
    pids = pids_of(env)
    del env
    gc.collect()
    assert_end(pids, 0)
    other.reset()
    other.close()


def test_refused_arguments() -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"`env_fns\[1\]` cannot be sent to another process.*'_thread.lock'.*inside of"):
        WorkerVecEnv([TracedEnv, lambda: lock])
    with pytest.raises(ValueError, match=r"`env_fns\[0\]` is a TracedEnv; it must be a function"):
        WorkerVecEnv([TracedEnv()])
    with pytest.raises(ValueError, match="`env_fns` is empty"):
        WorkerVecEnv([])
    for timeout in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`timeout` is .* positive number of seconds, or None"):
            WorkerVecEnv([TracedEnv], timeout=timeout)
    with pytest.raises(ValueError, match="`max_restarts` is 0"):
        WorkerVecEnv([TracedEnv], max_restarts=0)


def test_an_interrupted_step_leaves_the_environments_usable() -> None:
    env = workers()
    env.reset()
    env.step_async(STEP)
    # As when Ctrl-C comes before the answers have been read
    assert env.get_attr("steps") == [1, 1, 1]
    env.step(STEP)
    assert env.get_attr("steps") == [2, 2, 2]
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        env.set_attr("function", (item for item in ()))
    env.step(STEP)
    assert env.get_attr("steps") == [3, 3, 3]
    env.close()


# === The end of the process that trains ===

SCRIPT = """
import os, signal, sys, time
import gymnasium as gym
from sb3_r2vpo import R2VPO
from sb3_r2vpo.common.worker_vec_env import WorkerVecEnv

class Slow(gym.Wrapper):
    def step(self, action):
        time.sleep({sleep})
        return self.env.step(action)

if __name__ == "__main__":
    env = WorkerVecEnv([lambda: Slow(gym.make("CartPole-v1"))] * 3, start_method="{method}")
    model = R2VPO("MlpPolicy", env, n_steps=32, batch_size=16, device="cpu")
    model._last_obs = env.reset()
    print(*[process.pid for process in env.processes], flush=True)
    {body}
"""
TRAIN = """
    try:
        model.learn(10**9)
    except KeyboardInterrupt:
        model.save("{path}")
        print("saved", flush=True)
"""


def script(tmp_path: Path, body: str, method: str = "fork", sleep: float = 0.01) -> tuple[subprocess.Popen, list[int]]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip(), method=method, sleep=sleep))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts its background jobs, of which these tests may be one, with an interrupt that they and theirs ignore
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, str(path)], **pipes, start_new_session=True, cwd=tmp_path, preexec_fn=heed)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 3, process.stderr.read()
    return process, pids


@pytest.mark.parametrize("body", ["env.step_async([0] * 3)", "raise ValueError"])
def test_nothing_is_left_when_the_interpreter_exits(tmp_path: Path, body: str) -> None:
    process, pids = script(tmp_path, body)
    process.wait(20)
    assert_end(pids)


def in_child(run, **kwargs) -> tuple[mp.Process, list[int]]:
    """Run something with three workers in a process of its own, without the seconds that imports take."""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        os.setsid()
        env = workers(**kwargs)
        env.reset()
        sender.send(pids_of(env))
        run(env)

    process = context.Process(target=child)
    process.start()
    return process, receiver.recv()


@pytest.mark.parametrize("end", [os._exit, sys.exit])
@pytest.mark.parametrize("fault", [{}, {"fault": "spin"}])
def test_nothing_is_left_when_the_parent_exits(fault: dict, end) -> None:
    def run(env) -> None:
        env.step_async(STEP)
        end(0)

    process, pids = in_child(run, **fault)
    process.join(10)
    assert process.exitcode == 0
    assert_end(pids)


@pytest.mark.parametrize("fault", [{}, {"fault": "hang"}])
def test_nothing_is_left_when_the_parent_is_killed(fault: dict) -> None:
    def run(env) -> None:
        env.step_async(STEP)
        time.sleep(60)

    process, pids = in_child(run, **fault)
    time.sleep(0.2)
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert_end(pids)


@pytest.mark.slow
def test_nothing_is_left_of_fresh_interpreters_when_the_parent_is_killed(tmp_path: Path) -> None:
    # They are in the middle of a step, and do not listen
    process, pids = script(tmp_path, "env.step_async([0] * 3); time.sleep(60)", "forkserver", sleep=1000)
    time.sleep(0.2)
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.wait(10)
    assert_end(pids, 15)


def test_ctrl_c_lets_the_model_be_saved(tmp_path: Path) -> None:
    process, pids = script(tmp_path, TRAIN.format(path=tmp_path / "model"))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out == "saved\n"
    assert err == ""
    assert process.returncode == 0
    assert_end(pids)
    R2VPO.load(tmp_path / "model")


def test_sigterm_is_left_to_the_parent() -> None:
    def run(env) -> None:
        received = []
        signal.signal(signal.SIGTERM, lambda *_: received.append(1))
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.3)
        env.step(STEP)
        env.close()
        assert received == [1]

    process, pids = in_child(run)
    process.join(10)
    assert process.exitcode == 0
    assert_end(pids, 0)


# === Restart ===


def restarting(tmp_path: Path, fault: str = "raise", **kwargs) -> WorkerVecEnv:
    """Fails once, in its fourth step, unless said otherwise."""
    settings = {"restart": True, "once": tmp_path / "once", "window": (4, 4), "fault": fault, **kwargs}
    env = workers(**settings)
    env.seed(7)
    env.set_options([{"task": index} for index in range(env.num_envs)])
    return env


@pytest.mark.parametrize("fault", ["raise", "kill", "hang", "unpicklable_info"])
def test_a_restart_truncates_the_episode(tmp_path: Path, fault: str) -> None:
    env = restarting(tmp_path, fault, timeout=1.0)
    env.set_attr("extra", 5)
    env.reset()
    pids = pids_of(env)
    before = [env.step(STEP) for _ in range(3)][-1]
    with pytest.warns(UserWarning, match="(?is)environment 1 .*started anew, for time 1 of 10"):
        obs, rewards, dones, infos = env.step(STEP)
    assert dones.tolist() == [False, True, False]
    assert rewards[1] == 0
    assert infos[1]["worker_restarted"] is True
    assert infos[1]["TimeLimit.truncated"] is True
    np.testing.assert_array_equal(infos[1]["terminal_observation"], before[0][1])
    assert not np.array_equal(obs[1], before[0][1])
    assert "worker_restarted" not in infos[0]
    assert env.n_restarts == 1
    assert [new == old for new, old in zip(pids_of(env), pids, strict=True)] == [True, False, True]
    assert not is_running(pids[1])
    ((seed, options),) = env.get_attr("resets", indices=1)[0]
    assert options == {"task": 1}
    # seed() gave 7 to 9
    assert seed not in (None, 7, 8, 9)
    assert env.get_attr("extra") == [5, 5, 5]
    # The new episode is whole: 7 steps
    assert [bool(env.step(STEP)[2][1]) for _ in range(7)] == [False] * 6 + [True]
    env.close()


def test_every_restart_has_a_seed_of_its_own(tmp_path: Path) -> None:
    env = restarting(tmp_path, once=None, window=(2, 2))
    env.reset()
    with pytest.warns(UserWarning, match=ANEW):
        seeds = [env.step(STEP) and env.get_attr("resets", indices=1)[0][0][0] for _ in range(6)]
    assert env.n_restarts == 3
    assert len(set(seeds)) == 4
    env.close()
    again = restarting(tmp_path, once=None, window=(2, 2))
    again.reset()
    with pytest.warns(UserWarning, match=ANEW):
        repeated = [again.step(STEP) and again.get_attr("resets", indices=1)[0][0][0] for _ in range(6)]
    assert repeated == seeds
    again.close()


def test_a_failing_reset(tmp_path: Path) -> None:
    """The second reset is the one within `step`, at the end of an episode of 7 steps."""
    env = restarting(tmp_path, call="reset", window=(2, 2))
    env.reset()
    last = [env.step(STEP) for _ in range(6)][-1][0]
    with pytest.warns(UserWarning, match="in `step`"):
        _, _, dones, infos = env.step(STEP)
    assert dones.all()
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])
    env.close()
    (tmp_path / "once").unlink()
    env = restarting(tmp_path, call="reset", window=(1, 1))
    with pytest.warns(UserWarning, match="in `reset`"):
        obs = env.reset()
    assert obs.shape == (3, 3)
    assert not env.step(STEP)[2].any()
    env.close()


def test_a_death_between_two_steps_is_noticed_by_any_call() -> None:
    env = workers(restart=True)
    env.reset()
    last = env.step(STEP)[0]
    os.kill(env.processes[1].pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="SIGKILL during `env_method`"):
        assert env.env_method("set_level", 3) == [3, 3, 3]
    fresh = env.get_attr("observation_space")
    assert fresh == [VECTOR] * 3
    _, rewards, dones, infos = env.step(STEP)
    # The action was meant for the old episode
    assert dones.tolist() == [False, True, False]
    assert rewards[1] == 0
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])
    assert env.get_attr("steps") == [2, 0, 2]
    assert not env.step(STEP)[2].any()
    os.kill(env.processes[1].pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match=ANEW):
        env.get_attr("steps")
    env.reset()
    # A reset ends the episode, too
    assert not env.step(STEP)[2].any()
    env.close()


def test_a_mistaken_call_is_no_reason_to_restart() -> None:
    env = workers(restart=True)
    env.reset()
    with pytest.raises(WorkerError, match="nonsense"):
        env.env_method("nonsense")
    assert env.n_restarts == 0


def test_too_many_restarts(tmp_path: Path, monkeypatch) -> None:
    env = restarting(tmp_path, once=None, window=(1, math.inf), max_restarts=2)
    env.reset()
    pids = pids_of(env)
    with pytest.warns(UserWarning, match=ANEW):
        assert [env.step(STEP)[2][1] for _ in range(2)] == [True, True]
    pids += pids_of(env)
    with pytest.raises(WorkerError, match="boom"):
        env.step(STEP)
    assert env.n_restarts == 2
    assert not env.processes
    assert_end(pids, 0)
    # Those of more than an hour ago are forgotten
    monkeypatch.setattr(worker_module, "RESTART_WINDOW", 0.0)
    env = restarting(tmp_path, once=None, window=(1, math.inf), max_restarts=2)
    env.reset()
    with pytest.warns(UserWarning, match=ANEW):
        assert [env.step(STEP)[2][1] for _ in range(4)] == [True] * 4
    env.close()


def test_a_constructor_that_fails_in_the_restart() -> None:
    """It is tried again until the limit: a simulator's licence or port may be free again."""
    env = workers(restart=True, max_restarts=3, fault="raise", call="step")
    env.reset()
    env.remotes[1].env_fn = worker_module.cloudpickle.dumps(lambda: 1 / 0)
    with pytest.warns(UserWarning, match=ANEW), pytest.raises(WorkerError, match=r"built(?s:.*)ZeroDivisionError"):
        env.step(STEP)
    assert env.n_restarts == 3


def test_environments_that_hang_together_are_waited_for_once(tmp_path: Path) -> None:
    def build(index: int):
        return lambda: FaultyEnv(TracedEnv(), "hang", index=index, worker=index, once=tmp_path / str(index))

    env = WorkerVecEnv([build(index) for index in range(4)], start_method="fork", timeout=1.5, restart=True)
    env.reset()
    start = time.monotonic()
    with pytest.warns(UserWarning, match=ANEW):
        dones = env.step([0] * 4)[2]
    seconds = time.monotonic() - start
    assert dones.all()
    # 1.5 s, at most 1 s for each of the others, and about 1 s for each restart
    assert 1.5 <= seconds < 10
    env.close()


def test_monitors_do_not_report_a_broken_episode(tmp_path: Path) -> None:
    """Episodes of 7 steps; the second one breaks off in its third step, the tenth of all."""
    env = restarting(tmp_path, monitor_folder=tmp_path, n_envs=2, window=(10, 10))
    env.reset()
    with pytest.warns(UserWarning, match=ANEW):
        infos = [env.step(STEP[:2])[3] for _ in range(24)]
    assert [step for step, info in enumerate(infos, 1) if "episode" in info[1]] == [7, 17, 24]
    env.close()
    (tmp_path / "0.monitor.csv").unlink()
    results = load_results(str(tmp_path))
    assert results["l"].tolist() == [7, 7, 7]
    assert (np.diff(results["t"]) > 0).all()


@pytest.mark.parametrize(("monitor_class", "lengths"), [(WorkerVecMonitor, [7, 7, 7]), (VecMonitor, [7, 3, 7, 7])])
def test_a_monitor_around_the_workers(tmp_path: Path, monitor_class, lengths: list[int]) -> None:
    """SB3's own reports an episode of 3 steps."""
    env = monitor_class(restarting(tmp_path, n_envs=2, window=(10, 10)), str(tmp_path / "all"))
    env.reset()
    with pytest.warns(UserWarning, match=ANEW):
        steps = [env.step(STEP[:2]) for _ in range(24)]
    rewards = [reward[1] for _, reward, _, _ in steps]
    episodes = [infos[1]["episode"] for *_, infos in steps if "episode" in infos[1]]
    assert [episode["l"] for episode in episodes] == lengths
    np.testing.assert_allclose(episodes[-1]["r"], sum(rewards[-7:]), rtol=1e-5)
    env.close()
    # Environment 0 has finished 3
    assert len(load_results(str(tmp_path))) == 3 + len(lengths)


def test_training_goes_on_and_bootstraps_the_broken_episode(tmp_path: Path) -> None:
    env = restarting(tmp_path, "kill", window=(10, 10), monitored=True)
    model = R2VPO("MlpPolicy", env, **SMALL)
    with pytest.warns(UserWarning, match=ANEW):
        model.learn(96)
    rollout = model.rollout_buffer
    # SB3 has put the values of one environment after those of the other, but not the rewards
    values = rollout.values.reshape(3, 32)
    # Reward 0, and the discounted value of the last observation, which is that of the broken step itself
    np.testing.assert_allclose(rollout.rewards[9, 1], model.gamma * values[1, 9], rtol=1e-5)
    assert rollout.episode_starts[10].tolist() == [0, 1, 0]
    assert env.n_restarts == 1
    assert [episode["l"] for episode in model.ep_info_buffer] == [7] * len(model.ep_info_buffer)
    model.learn(96, reset_num_timesteps=False)
    assert weights(model).isfinite().all()
    env.close()


def test_nothing_is_warned_of_when_nothing_fails() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = workers(restart=True)
        env.reset()
        env.step(STEP)
        env.close()
