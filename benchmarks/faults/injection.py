"""One fault at a time: each function injects one, and says whether it was survived and how it ended."""

import itertools
import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from damage import FILES, HIDDEN, PAYLOADS, failing_save, mutated, write_files
from faulty_env import POISON, FaultyEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.checkpoint import CheckpointCallback, list_checkpoints, newest_readable, resume
from sb3_r2vpo.common.worker_vec_env import WorkerError, WorkerVecEnv

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}
N_ENVS = 3

# Whether a fault was survived, and how it ended
Outcome = tuple[bool, str]


def make_envs(**fault) -> list[Callable[[], gym.Env]]:
    """Environments of which number 1 fails."""
    return [lambda i=i: FaultyEnv(gym.make("CartPole-v1"), index=i, worker=1, **fault) for i in range(N_ENVS)]


def weights(model) -> th.Tensor:
    return th.cat([tensor.detach().flatten() for tensor in model.policy.parameters()])


def first_line(error: BaseException) -> str:
    """What a reader sees of an error: its first sentence, or at most so many characters, without this machine's folders."""
    text = str(error).replace(tempfile.gettempdir(), "").splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text[:150]}"


# === Workers ===


def worker_error(fault: str, call: str = "step") -> Outcome:
    """Whether all is over with an error that names the environment, soon, and without a process that is left."""
    start, env = time.monotonic(), None
    try:
        env = WorkerVecEnv(make_envs(fault=fault, call=call), start_method="fork", timeout=1.0)
        env.reset()
        env.step(np.zeros(N_ENVS, dtype=int))
        env.get_attr("attribute")
        env.env_method("method")
        env.env_method("render")
    except WorkerError as error:
        if env is not None:
            env.close()
        named = "environment 1 " in str(error).lower() and ("ValueError: boom" in str(error) or fault != "raise")
        return named and not mp.active_children() and time.monotonic() - start < 15, first_line(error)
    return False, "nothing was raised"


def raising_worker(attempt: int, folder: Path) -> Outcome:
    return worker_error("raise", ("init", "reset", "step", "attribute", "method", "render")[attempt % 6])


def dying_worker(attempt: int, folder: Path) -> Outcome:
    return worker_error(("kill", "exit", "segfault", "sys_exit")[attempt % 4], ("step", "reset")[attempt // 4 % 2])


def hanging_worker(attempt: int, folder: Path) -> Outcome:
    return worker_error(("hang", "spin")[attempt % 2], ("step", "reset")[attempt // 2 % 2])


def restarted_worker(attempt: int, folder: Path) -> Outcome:
    fault = ("raise", "kill", "exit", "unpicklable_info", "hang", "segfault")[attempt % 6]
    window = (attempt // 6 + 1,) * 2
    envs = make_envs(fault=fault, once=folder / "once", window=window)
    env = WorkerVecEnv(envs, start_method="fork", timeout=1.0, restart=True)
    model = R2VPO("MlpPolicy", env, **SMALL)
    model.learn(2 * 16 * N_ENVS)
    finite, restarts = bool(weights(model).isfinite().all()), env.n_restarts
    env.close()
    return finite and restarts == 1 and not mp.active_children(), f"training went on after {restarts} restart"


def killed_parent(attempt: int, folder: Path) -> Outcome:
    fault = {} if attempt % 2 else {"once": folder / "never"}

    def train(pids) -> None:
        env = WorkerVecEnv(make_envs(fault="hang", window=(5, 5), **fault), start_method="fork")
        env.reset()
        pids.send([process.pid for process in env.processes])
        R2VPO("MlpPolicy", env, **SMALL).learn(10**9)

    process, workers = in_child(train)
    time.sleep(0.3)
    process.kill()
    process.join()
    deadline = time.monotonic() + 15
    while (left := [pid for pid in workers if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left, f"{len(left)} of {N_ENVS} processes were left"


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_child(function) -> tuple[mp.Process, object]:
    """:return: A process that runs the function, and the first thing that it sends"""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        # What it is made to print is expected
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        function(sender)

    process = context.Process(target=run)
    process.start()
    sender.close()
    return process, receiver.recv()


# === Poison ===


def poison(attempt: int, folder: Path) -> Outcome:
    fault = POISON[attempt % len(POISON)]
    algorithm = (R2VPO, R2VPOOff)[attempt // len(POISON) % 2]
    normalized = attempt // (2 * len(POISON)) % 2 == 1
    at = attempt % 13 + 2
    env = DummyVecEnv(make_envs(fault=fault, window=(at, at)))
    env = VecNormalize(env) if normalized else env
    model = algorithm("MlpPolicy", env, seed=attempt, **SMALL)
    before, ending = weights(model).clone(), "learn() bears it"
    try:
        model.learn(16 * N_ENVS)
    except ValueError as error:
        ending = first_line(error)
        if "environment 1" not in str(error) or not th.equal(weights(model), before):
            return False, ending
    else:
        # A huge reward is a number, and may be learned from
        if fault != "huge_reward":
            return False, "it was not noticed"
    model.learn(3 * 16 * N_ENVS)
    statistics = [env.obs_rms.mean, env.ret_rms.var] if normalized else []
    finite = bool(weights(model).isfinite().all()) and all(np.isfinite(array).all() for array in statistics)
    return finite, ending


# === Files ===


def corruption(attempt: int, folder: Path) -> Outcome:
    """A mutated file is refused with a `ValueError`, or loads as what was saved."""
    name = list(FILES)[attempt % len(FILES)]
    path, saved = write_files()[name]
    generator = random.Random(attempt)
    damaged = folder / path.name
    damaged.write_bytes(mutated(path.read_bytes(), generator))
    try:
        loaded = FILES[name](damaged)
    except ValueError as error:
        return True, f"{name}: {first_line(error)}"
    same = len(loaded) == len(saved) and all(np.array_equal(a, b) for a, b in zip(loaded, saved, strict=True))
    return same, f"{name}: loads as saved" if same else f"{name}: loads as something else"


def payload(attempt: int, folder: Path) -> Outcome:
    name = list(PAYLOADS)[attempt % len(PAYLOADS)]
    hidden = list(HIDDEN)[attempt // len(PAYLOADS) % len(HIDDEN)]
    marker = folder / "marker"
    try:
        PAYLOADS[name](folder, HIDDEN[hidden](marker))
    except ValueError as error:
        return not marker.exists(), f"{name}: {first_line(error)}"
    return False, f"{name}: was loaded"


def failed_save(attempt: int, folder: Path) -> Outcome:
    cases = list(itertools.product(("model", "replay", "VecNormalize", "checkpoint"), ("disk full", "attribute")))
    return failing_save(*cases[attempt % len(cases)], folder)


# === Signals ===


def saved_at_signal(attempt: int, folder: Path) -> Outcome:
    number = (signal.SIGTERM, signal.SIGINT)[attempt % 2]

    def train(ready) -> None:
        model = R2VPO("MlpPolicy", DummyVecEnv([lambda: gym.make("CartPole-v1")]), **SMALL)
        with CheckpointCallback(folder, every=None) as callback:
            ready.send(None)
            model.learn(10**9, callback=callback)

    process, _ = in_child(train)
    time.sleep(0.2 + 0.01 * random.Random(attempt).uniform(0, 30))
    os.kill(process.pid, number)
    process.join(10)
    newest = newest_readable(folder)
    if newest is None:
        return False, f"{number.name}: nothing was saved"
    model = resume(folder, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    model.learn(32, reset_num_timesteps=False)
    ended = process.exitcode == (0 if number is signal.SIGTERM else 1)
    return ended and model.num_timesteps > 32, f"{number.name}: saved, and resumed from there"


def killed_in_save(attempt: int, folder: Path) -> Outcome:
    def train(ready) -> None:
        model = R2VPO("MlpPolicy", DummyVecEnv([lambda: gym.make("CartPole-v1")]), **SMALL)
        ready.send(None)
        model.learn(10**9, callback=CheckpointCallback(folder, save_freq=1, every=None))

    process, _ = in_child(train)
    while not list_checkpoints(folder):
        time.sleep(0.01)
    time.sleep(random.Random(attempt).uniform(0, 0.2))
    process.kill()
    process.join()
    newest = newest_readable(folder)
    resume(folder, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    return newest == list_checkpoints(folder)[-1], "the newest checkpoint is whole, and was resumed from"


def torn_journal(attempt: int, folder: Path) -> Outcome:
    import optuna

    from sb3_r2vpo.zoo.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / "study.log"

    def trials(n: int) -> int:
        study = optuna.create_study(study_name="study", storage=open_storage(str(path)), load_if_exists=True)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n)
        return len([trial for trial in study.trials if trial.state.is_finished()])

    trials(2)
    lines = path.read_bytes().splitlines(keepends=True)
    line = lines[random.Random(attempt).randrange(len(lines))]
    with path.open("ab") as file:
        file.write(line[: random.Random(attempt).randrange(1, len(line) - 1)])
    n_trials = trials(1)
    return n_trials == 3, f"the study goes on, with {n_trials} of 3 trials"
