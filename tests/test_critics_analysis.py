"""The measurement of `benchmarks/analysis/critics.py`: its estimators by hand, and one critic in place of another."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_r2vpo import R2VPOOff

pytest.importorskip("envpool")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "analysis"))

import critics


class Constant(nn.Module):
    """A critic that knows one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.full((len(observations), 1), self.value)


def test_the_product_of_mean_gradients_leaves_out_a_batch_with_itself():
    one, other = th.tensor([[1.0, 2.0], [3.0, 0.0]]), th.tensor([[1.0, 1.0], [0.0, 2.0]])
    # (1, 2) with (0, 2), and (3, 0) with (1, 1)
    assert critics.between_batches(one, other) == pytest.approx((4 + 3) / 2)


def test_cosines_by_hand():
    # Both means point along the first axis; a batch of the first has as much noise as signal
    one, reference = th.tensor([[1.0, 1.0], [1.0, -1.0]]), th.tensor([[2.0, 0.0], [2.0, 0.0]])
    found = critics.signal(one, reference)
    assert found["cosine_of_batch"] == pytest.approx(2**-0.5)
    # One inner product of two batches of noise that cancels: none is left of the mean
    assert np.isnan(found["cosine_of_mean"])
    assert critics.signal(reference, reference) == pytest.approx({"cosine_of_batch": 1, "cosine_of_mean": 1})


def test_another_critic_takes_the_place_of_the_models():
    model = R2VPOOff("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8, seed=0)
    rollout = critics.collect(model, n_steps=16)
    rewards = rollout.buffer.rewards[:, 0]
    critics.compute_advantages(model, None, rollout, 0.0)
    own = rollout.buffer.values.copy()
    critics.compute_advantages(model, Constant(2.0), rollout, 0.0)
    # One step: reward + gamma * 2 - 2
    np.testing.assert_allclose(rollout.buffer.advantages.flatten(), rewards + (model.gamma - 1) * 2, rtol=1e-5)
    critics.compute_advantages(model, None, rollout, 0.0)
    np.testing.assert_array_equal(rollout.buffer.values, own)
