"""Restarts of environments are counted in the log."""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, VECTOR, RandomEnv, logged
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_r2vpo import R2VPO
from sb3_r2vpo.common.worker_vec_env import WorkerVecEnv, WorkerVecMonitor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
from faulty_env import FaultyEnv
from test_poison import ACTIONS


@pytest.mark.filterwarnings("ignore:Environment 1 raised an exception")
@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: VecNormalize(WorkerVecMonitor(env))])
def test_restarts_are_logged(wrap) -> None:
    def make(index: int):
        # Environment 1 fails in its 40th step, and so does each one that replaces it
        return lambda: FaultyEnv(RandomEnv(VECTOR, ACTIONS), "raise", index=index, worker=1, window=(40, 40))

    env = WorkerVecEnv([make(0), make(1)], start_method="fork", restart=True)
    try:
        model = R2VPO("MlpPolicy", wrap(env), **SMALL)
        counts = []
        for _ in range(3):
            # Not written, and so not cleared
            model.learn(64, log_interval=100, reset_num_timesteps=False)
            counts.append(logged(model)["rollout/env_restarts"])
    finally:
        env.close()
    # After 32, 64 and 96 steps; the new one is in its 56th step then
    assert counts == [0, 1, 2]


def test_nothing_is_logged_where_nothing_restarts() -> None:
    model = R2VPO("MlpPolicy", DummyVecEnv([lambda: RandomEnv(VECTOR, ACTIONS)]), **SMALL).learn(32, log_interval=100)
    assert "rollout/env_restarts" not in logged(model)


def test_ended_workers_leave_no_file_open() -> None:
    def files_after_use() -> int:
        env = WorkerVecEnv([lambda: RandomEnv(VECTOR, ACTIONS)] * 2, start_method="fork", restart=True)
        env.reset()
        env.processes[1].kill()
        with pytest.warns(UserWarning, match="started anew"):
            env.step(np.zeros((2, 2), np.float32))
        env.close()
        return len(os.listdir("/proc/self/fd"))

    gc.disable()
    try:
        # The first one starts what stays; what earlier tests have left may go at any time
        first = files_after_use()
        assert files_after_use() <= first
    finally:
        gc.enable()
