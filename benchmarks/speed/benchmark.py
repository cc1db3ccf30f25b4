"""
Speed of the update, of training end to end, and how cost grows; see README.md beside this file for the rules and the results.

    python benchmarks/speed/benchmark.py                                 # everything but sbx: about ten minutes
    python benchmarks/speed/benchmark.py --sbx-python ~/sbx/bin/python   # with sbx, installed in an environment of its own
    python benchmarks/speed/benchmark.py update end_to_end               # some of the tables

Writes results/<table>.csv and the tables in README.md.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
from gymnasium import spaces

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from readme_tables import write_tables  # noqa: E402

#: Observations and actions of the cheetah, as the update does not care where its data come from.
VECTOR, IMAGE = spaces.Box(-1, 1, (17,), np.float32), spaces.Box(0, 255, (4, 84, 84), np.uint8)
TASK = "dm_control/cheetah-run-v0"
ADAM = {"eps": 1e-5}


class RandomEnv(gym.Env):
    """Random observations and rewards."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space, self.steps = deepcopy(observation_space), action_space, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.np_random.normal()), False, self.steps % 500 == 0, {}


#: Name: policy, network, observation and action space, steps in a rollout, minibatch, epochs timed in one go
SETTINGS: dict[str, tuple[str, list[int], spaces.Space, spaces.Space, int, int, int]] = {
    "MLP 64x64, batch 64": ("MlpPolicy", [64, 64], VECTOR, spaces.Box(-1, 1, (6,)), 2048, 64, 10),
    "MLP 64x64, batch 512": ("MlpPolicy", [64, 64], VECTOR, spaces.Box(-1, 1, (6,)), 4096, 512, 10),
    "MLP 5x256, batch 4096": ("MlpPolicy", [256] * 5, VECTOR, spaces.Box(-1, 1, (6,)), 8192, 4096, 1),
    "Nature CNN, batch 64": ("CnnPolicy", [], IMAGE, spaces.Discrete(6), 128, 64, 1),
}


def make_learner(arm: str, policy: str, env: Any, net_arch: list[int], package: str = "sb3_r2vpo", **settings: Any) -> Any:
    """A learner by the name of its arm. Imports are here, as sbx lives in an environment of its own."""
    policy_kwargs: dict[str, Any] = {"net_arch": {"pi": net_arch, "vf": net_arch}}
    if arm == "sbx PPO":
        from sbx import PPO as SbxPPO

        # sbx has its own names for layers and spaces, and Adam's eps at 1e-5 already
        return SbxPPO(policy, env, policy_kwargs=policy_kwargs, seed=0, **settings)
    import torch as th
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO

    # Ours, or what it was before
    ours = import_module(package)
    settings = {"policy_kwargs": policy_kwargs, "seed": 0, "device": "cpu", **settings}
    th.set_num_threads(1)
    if arm == "SB3 PPO, fused Adam":
        policy_kwargs["optimizer_kwargs"] = {**ADAM, "fused": True}
    if arm == "TRPO":
        # Its own defaults for what it shares with PPO but means something else: the critic's minibatches and passes
        settings.pop("n_epochs")
    learners: dict[str, Callable[[], Any]] = {
        "SB3 PPO": lambda: PPO(policy, env, **settings),
        "SB3 PPO, fused Adam": lambda: PPO(policy, env, **settings),
        "TRPO": lambda: TRPO(policy, env, **settings),
        "R2VPO, PPO's objective": lambda: ours.R2VPO(policy, env, objective="ppo_clip", **settings),
        "R2VPO": lambda: ours.R2VPO(policy, env, **settings),
        "R2VPOOff": lambda: ours.R2VPOOff(policy, env, utd_ratio=1.0, **settings),
    }
    name = arm.removesuffix(", compiled")
    if name != arm:
        settings["compile"] = True
    return learners[name]()


def make_update(arm: str, setting: str, device: str = "cpu", package: str = "sb3_r2vpo") -> Callable[[], tuple[float, float]]:
    """:return: A function that times one update, in microseconds of wall and of CPU time for each minibatch"""
    policy, net_arch, observation_space, action_space, n_steps, batch_size, n_epochs = SETTINGS[setting]
    env = RandomEnv(observation_space, action_space)
    # sbx has no `device`
    settings: dict[str, Any] = {} if device == "cpu" else {"device": device}
    settings |= {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
    learner = make_learner(arm, policy, env, net_arch, package, **settings)
    n_minibatches = n_epochs * n_steps // batch_size
    # Warm: compiled, allocated, and with a full replay
    learner.learn(n_steps * getattr(learner, "replay_capacity", 1))
    learner.train()

    def update() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        learner.train()
        return 1e6 * (time.perf_counter() - wall) / n_minibatches, 1e6 * (time.process_time() - cpu) / n_minibatches

    update.learner = learner  # type: ignore[attr-defined]
    return update


def make_remote_update(python: str, setting: str) -> Callable[[], tuple[float, float]]:
    """:meth:`make_update` for sbx, in the interpreter that has it. The process idles while others are timed."""
    command = [python, __file__, "--serve", setting]
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def update() -> tuple[float, float]:
        process.stdin.write("\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    update()
    update.process = process  # type: ignore[attr-defined]
    return update


def serve(setting: str) -> None:
    """The other end of :func:`make_remote_update`."""
    update = make_update("sbx PPO", setting)
    for _ in sys.stdin:
        print(json.dumps(update()), flush=True)


def interleave(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Time all arms in turn, forwards and backwards (A-B-B-A), so that load on the machine falls on all of them."""
    results = defaultdict(list)
    for number in range(rounds):
        for arm in list(arms) if number % 2 == 0 else reversed(arms):
            results[arm].append(arms[arm]())
    return results


def matrix_products(setting: str) -> Callable[[], tuple[float, float]]:
    """The limit for MLPs: forward and backward products of all layers, and nothing else."""
    import torch as th

    _, net_arch, observation_space, action_space, _, batch_size, _ = SETTINGS[setting]
    layers = []
    for outputs in (action_space.shape[0], 1):
        sizes = [observation_space.shape[0], *net_arch, outputs]
        layers += [(th.randn(batch_size, i), th.randn(i, o), th.randn(batch_size, o)) for i, o in pairwise(sizes)]

    def products() -> tuple[float, float]:
        wall, cpu, repeats = time.perf_counter(), time.process_time(), 20
        for _ in range(repeats):
            for inputs, weight, gradient in layers:
                inputs @ weight, inputs.T @ gradient, gradient @ weight.T
        return 1e6 * (time.perf_counter() - wall) / repeats, 1e6 * (time.process_time() - cpu) / repeats

    return products


def update_table(sbx_python: str | None = None, rounds: int = 6) -> list[dict[str, Any]]:
    """`train()`, a minibatch."""
    import torch as th

    names = ["SB3 PPO", "SB3 PPO, fused Adam", "R2VPO, PPO's objective", "R2VPO", "R2VPO, compiled"]
    names += ["R2VPOOff", "R2VPOOff, compiled"]
    rows = []
    for setting in SETTINGS:
        arms = {name: make_update(name, setting) for name in names}
        sb3, ours = (arms[name].learner.policy.state_dict() for name in ("SB3 PPO", "R2VPO, PPO's objective"))
        # Same work: the weights are bit for bit the same
        assert all(th.equal(sb3[key], ours[key]) for key in sb3), setting
        if sbx_python and setting.startswith("MLP"):
            arms["sbx PPO"] = make_remote_update(sbx_python, setting)
        if setting.startswith("MLP"):
            arms["(matrix products alone)"] = matrix_products(setting)
        rows += compare_updates(setting, arms, rounds)
        if sbx_python and "sbx PPO" in arms:
            arms["sbx PPO"].process.stdin.close()
    return rows


def compare_updates(setting: str, arms: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """:return: A row for each arm, beside "SB3 PPO" """
    times = interleave(arms, rounds)
    reference = [median(column) for column in zip(*times["SB3 PPO"], strict=True)]
    rows = []
    for name, values in times.items():
        wall, cpu = (median(column) for column in zip(*values, strict=True))
        rows.append({
            "setting": setting, "arm": name, "wall_us": round(wall), "cpu_us": round(cpu),
            "speedup_wall": round(reference[0] / wall, 2), "speedup_cpu": round(reference[1] / cpu, 2), "load": load(),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def make_training(arm: str, vec_env: str, n_envs: int, rollout: int = 4096) -> Callable[[], tuple[float, float]]:
    """:return: A function that times collection and update, in environment steps a second of wall time"""
    env = make_env(vec_env, n_envs)
    learner = make_learner(arm, "MlpPolicy", env, [64, 64], n_steps=rollout // n_envs, batch_size=64, n_epochs=10)
    learner.learn(rollout * getattr(learner, "replay_capacity", 1))

    def training() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        learner.learn(rollout, reset_num_timesteps=False)
        return rollout / (time.perf_counter() - wall), 1e6 * (time.process_time() - cpu) / rollout

    return training


def make_env(vec_env: str, n_envs: int) -> Any:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    import sb3_r2vpo.envs as envs

    if vec_env.startswith("EnvPool"):
        return envs.EnvPoolVecEnv(TASK, n_envs, seed=0, num_threads=int(vec_env.split()[1]))
    options = {"vec_env_cls": SubprocVecEnv} if vec_env == "SubprocVecEnv" else {}
    return make_vec_env(f"sb3_r2vpo.envs:{TASK}", n_envs, seed=0, **options)


def make_env_steps(vec_env: str, n_envs: int, n_steps: int = 2048) -> Callable[[], tuple[float, float]]:
    """The limit of collection: random actions, no learner."""
    env = make_env(vec_env, n_envs)
    env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (n_envs, 6)).astype(np.float32)

    def steps() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(n_steps // n_envs):
            env.step(actions)
        return n_steps / (time.perf_counter() - wall), 1e6 * (time.process_time() - cpu) / n_steps

    return steps


def make_collection(vec_env: str, n_envs: int, rollout: int = 4096) -> Callable[[], tuple[float, float]]:
    """Collection without the update: the environment's steps, the policy's actions and values, and SB3's loop around them."""
    from stable_baselines3.common.callbacks import CallbackList

    learner = make_learner("R2VPO", "MlpPolicy", make_env(vec_env, n_envs), [64, 64], n_steps=rollout // n_envs)
    learner.learn(rollout)
    callback = CallbackList([])
    callback.init_callback(learner)

    def collection() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, learner.n_steps)
        return rollout / (time.perf_counter() - wall), 1e6 * (time.process_time() - cpu) / rollout

    return collection


def end_to_end_table(rounds: int = 6) -> list[dict[str, Any]]:
    """Collection and update on cheetah-run: 4096 steps a rollout, batch 64, 10 epochs, MLP 64x64."""
    arms: dict[str, Callable[[], Any]] = {}
    for name, vec_env, n_envs in [
        ("SB3 PPO", "DummyVecEnv", 8), ("SB3 PPO", "EnvPool 2", 64), ("SB3 PPO, fused Adam", "EnvPool 2", 64),
        ("TRPO", "EnvPool 2", 64), ("R2VPO", "DummyVecEnv", 8), ("R2VPO", "EnvPool 2", 64),
        ("R2VPO, compiled", "EnvPool 2", 64), ("R2VPOOff, compiled", "EnvPool 2", 64),
    ]:  # fmt: skip
        arms[f"{name}|{vec_env}|{n_envs}"] = make_training(name, vec_env, n_envs)
    for vec_env, n_envs in [("DummyVecEnv", 8), ("EnvPool 2", 64)]:
        arms[f"(collection alone)|{vec_env}|{n_envs}"] = make_collection(vec_env, n_envs)
        arms[f"(environment steps alone)|{vec_env}|{n_envs}"] = make_env_steps(vec_env, n_envs)
    times = interleave(arms, rounds)
    speeds = {arm: median(steps for steps, _ in values) for arm, values in times.items()}
    rows = []
    for arm, speed in speeds.items():
        name, vec_env, n_envs = arm.split("|")
        rows.append({
            "arm": name, "vec_env": vec_env, "n_envs": n_envs, "steps_per_second": round(speed),
            "over_sb3_dummy": round(speed / speeds["SB3 PPO|DummyVecEnv|8"], 2),
            "over_sb3_envpool": round(speed / speeds["SB3 PPO|EnvPool 2|64"], 2), "load": load(),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def collection_table(rounds: int = 6) -> list[dict[str, Any]]:
    """What two cores are best used for: environment steps a second with random actions."""
    settings = [("DummyVecEnv", 8), ("SubprocVecEnv", 2), ("SubprocVecEnv", 8)]
    settings += [(f"EnvPool {threads}", n_envs) for threads in (1, 2) for n_envs in (8, 64, 256)]
    arms = {f"{vec_env}|{n_envs}": make_env_steps(vec_env, n_envs) for vec_env, n_envs in settings}
    rows = []
    for arm, values in interleave(arms, rounds).items():
        vec_env, n_envs = arm.split("|")
        speed = median(steps for steps, _ in values)
        rows.append({"vec_env": vec_env, "n_envs": n_envs, "steps_per_second": round(speed), "load": load()})
        print(rows[-1], flush=True)
    return rows


def scaling_table(rounds: int = 5) -> list[dict[str, Any]]:
    """Cost of an update against the size of the rollout and of the replay, a step and epoch."""
    rows = []
    variants = [("R2VPO", steps, 1) for steps in (1024, 4096, 16384)]
    variants += [("R2VPOOff", 4096, capacity) for capacity in (1, 2, 4, 8)]
    arms, learners = {}, {}
    for arm, n_steps, capacity in variants:
        settings = {"replay_capacity": capacity} if arm == "R2VPOOff" else {}
        env = RandomEnv(VECTOR, spaces.Box(-1, 1, (6,)))
        learner = make_learner(arm, "MlpPolicy", env, [64, 64], n_steps=n_steps, batch_size=512, n_epochs=2, **settings)
        learner.learn(n_steps * (capacity + 1))

        def update(learner=learner, n_steps=n_steps) -> float:
            cpu = time.process_time()
            learner.train()
            return 1e6 * (time.process_time() - cpu) / (n_steps * learner.n_epochs)

        arms[f"{arm}|{n_steps}|{capacity}"] = update
        learners[f"{arm}|{n_steps}|{capacity}"] = learner
    for arm, values in interleave(arms, rounds).items():
        name, n_steps, capacity = arm.split("|")
        replay = getattr(learners[arm], "replay_buffer", None)
        arrays = [v for r in getattr(replay, "rollouts", []) for v in vars(r.buffer).values() if isinstance(v, np.ndarray)]
        bytes_per_step = sum(array.nbytes for array in arrays) / (int(n_steps) * int(capacity))
        rows.append({
            "arm": name, "rollout_steps": n_steps, "replay_capacity": capacity,
            "cpu_us_per_step_and_epoch": round(median(values), 2),
            "replay_bytes_per_step": round(bytes_per_step) or "", "load": load(),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def memory_table() -> list[dict[str, Any]]:
    """Peak resident memory of a process that trains on a rollout or two, MLP 64x64."""
    rows = []
    for arm in ("SB3 PPO", "TRPO", "R2VPO", "R2VPO, compiled", "R2VPOOff"):
        output = subprocess.run([sys.executable, __file__, "--memory", arm], capture_output=True, text=True, check=True).stdout
        rows.append({"arm": arm, "peak_mib": round(int(output.split()[-1]) / 1024)})
        print(rows[-1], flush=True)
    return rows


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


TABLES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "update": update_table,
    "end_to_end": end_to_end_table,
    "collection": collection_table,
    "scaling": scaling_table,
    "memory": memory_table,
}


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    with (HERE / "results" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_tables() -> dict[str, list[list[str]]]:
    """The tables that have been measured; "gpu" is that of gpu.py."""
    paths = {name: HERE / "results" / f"{name}.csv" for name in (*TABLES, "gpu")}
    return {name: list(csv.reader(path.open())) for name, path in paths.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"any of {', '.join(TABLES)}; default: all")
    parser.add_argument("--sbx-python", help="interpreter of an environment with sbx-rl; without it that arm is left out")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.memory:
        make_update(arguments.memory, "MLP 64x64, batch 64")
        # Not `getrusage`, whose peak a process inherits from the one that started it
        status = Path("/proc/self/status").read_text()
        return print(status.split("VmHWM:")[1].split()[0])

    if not arguments.sbx_python:
        print("sbx is left out: pass --sbx-python to time it")
    (HERE / "results").mkdir(exist_ok=True)
    packages = ("stable-baselines3", "sb3-contrib", "torch", "numpy", "envpool", "dm_control", "mujoco")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    (HERE / "results" / "machine.txt").write_text(
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, {versions}, one torch thread\n"
    )
    for name in arguments.tables or TABLES:
        options = {"sbx_python": arguments.sbx_python} if name == "update" else {}
        write_rows(name, TABLES[name](**options))
    write_tables(HERE / "README.md", read_tables())


if __name__ == "__main__":
    main()
