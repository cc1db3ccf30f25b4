"""The runner of `benchmarks/swap`: a run's rows are complete, nothing runs twice, and evaluations have seeds of their own."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "swap" / "benchmark.py"
TASK, N_TIMESTEPS = "CartPole-v1", 1000


@pytest.fixture
def swap(tmp_path, monkeypatch):
    """The module, by another name than that of `benchmarks/control`, with one tiny task and runs in this process."""
    pytest.importorskip("minatar")
    spec = importlib.util.spec_from_file_location("swap_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "swap_benchmark", module)
    spec.loader.exec_module(module)
    module.RESULTS = tmp_path / "results"
    module.TASKS = {TASK: N_TIMESTEPS}
    module.fresh_processes = ThreadPoolExecutor
    return module


def rows_of(swap, method: str = "ppo", task: str = TASK, seed: int = 1000, n: int = 10) -> list[dict]:
    return [dict.fromkeys(swap.COLUMNS, 0) | {"method": method, "task": task, "seed": seed} for _ in range(n)]


@pytest.mark.parametrize("method", ["ppo", "r2vpo", "r2vpo_off"])
def test_a_run_writes_its_rows_once(swap, method):
    command = ["run", "--methods", method, "--seeds", "1"]
    assert swap.main(command) == 0
    evaluations, runs = swap.paths(method)
    rows, (run_row,) = swap.read_rows(evaluations), swap.read_rows(runs)
    assert list(rows[0]) == list(swap.COLUMNS)
    assert list(run_row) == list(swap.RUN_COLUMNS)
    steps = [int(row["step"]) for row in rows]
    assert steps[:-1] == [100 * k for k in range(1, 10)]
    assert steps[-1] == int(run_row["steps"]) >= N_TIMESTEPS
    assert all(float(row["return_mean"]) >= 8 for row in rows)
    assert float(rows[-1]["train_return"]) >= 8
    assert float(run_row["cpu_seconds"]) > 0
    assert ("sb3-r2vpo" in run_row["versions"]) == (method != "ppo")

    contents = evaluations.read_bytes(), runs.read_bytes()
    swap.train = None
    assert swap.main(command) == 0
    assert (evaluations.read_bytes(), runs.read_bytes()) == contents


def test_rows_of_an_interrupted_run_are_dropped(swap):
    run, other = swap.Run(1000, TASK, "ppo"), swap.Run(2000, TASK, "ppo")
    evaluations, _ = swap.paths("ppo")
    swap.save(other, rows_of(swap, seed=2000), dict.fromkeys(swap.RUN_COLUMNS, 0) | other._asdict())
    swap.write_rows(evaluations, swap.COLUMNS, [*swap.read_rows(evaluations), *rows_of(swap, n=3)])
    assert swap.finished("ppo") == {other}
    swap.save(run, rows_of(swap), dict.fromkeys(swap.RUN_COLUMNS, 0) | run._asdict())
    assert swap.finished("ppo") == {run, other}
    assert len(swap.read_rows(evaluations)) == 20


def test_a_run_that_fails_does_not_stop_the_others(swap, monkeypatch):
    def execute(run, n_timesteps):
        if run.seed == 1000:
            raise ValueError
        executed.append(run)

    executed = []
    monkeypatch.setattr(swap, "execute", execute)
    assert swap.main(["run", "--methods", "ppo", "--seeds", "3"]) == 1
    assert [run.seed for run in executed] == [2000, 3000]


def test_runs_are_planned_seed_by_seed_and_cheap_tasks_first(swap):
    swap.TASKS = {"a": 1, "b": 2}
    runs = swap.planned_runs(["ppo", "r2vpo"], ["b", "a"], 2)
    assert [(run.seed, run.task) for run in runs[::2]] == [(1000, "a"), (1000, "b"), (2000, "a"), (2000, "b")]


def test_seeds_of_evaluations_differ(swap):
    runs = [swap.Run(seed, TASK, "ppo") for seed in swap.SEEDS]
    seeds = {swap.evaluation_seed(run, number) for run in runs for number in range(1, swap.N_EVALUATIONS + 1)}
    assert len(seeds) == len(runs) * swap.N_EVALUATIONS
    assert not seeds & set(swap.SEEDS)


def test_evaluations_of_a_run_begin_in_other_states(swap, monkeypatch):
    states = []

    def evaluate(model, env, n_episodes, **kwargs):
        states.append((env.reset().tolist(), n_episodes))
        return [1.0] * n_episodes, [1] * n_episodes

    monkeypatch.setattr(swap, "evaluate_policy", evaluate)
    swap.train(swap.Run(1000, TASK, "ppo"), N_TIMESTEPS)
    assert len(np.unique([state for state, _ in states], axis=0)) == swap.N_EVALUATIONS
    assert [n for _, n in states] == [10] * 9 + [20]


def test_minatar_is_a_vector_of_floats_that_follows_its_seed(swap):
    env = swap.make_env("MinAtar/Asterix-v1")
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert env.observation_space.shape == (400,)
    assert env.observation_space.dtype == np.float32

    def episode(seed: int) -> list[np.ndarray]:
        observations = [env.reset(seed=seed)[0]]
        for step in range(50):
            observation, _, terminated, _, _ = env.step(step % 5)
            observations.append(observation)
            if terminated:
                break
        return observations

    first, again, other = episode(1), episode(1), episode(2)
    assert first[0].dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_ppo_does_not_import_our_package():
    code = "import sys, benchmark; benchmark.algorithm('ppo'); assert 'sb3_r2vpo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PATH.parent)})
