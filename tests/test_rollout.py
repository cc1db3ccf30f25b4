import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_r2vpo.common import rollout as rollout_module
from sb3_r2vpo.common.rollout import Rollout, RolloutReplayBuffer, Timeouts, flatten, passes

N_STEPS, N_ENVS = 5, 3
GAMMA, GAE_LAMBDA = 0.95, 0.9
ACTION_SPACE = spaces.Box(-1, 1, (2,))
OBSERVATION_SPACE = spaces.Box(-1, 1, (4,))


def fill(buffer: RolloutBuffer, rng: np.random.Generator) -> None:
    """A full rollout of random numbers."""
    buffer.reset()
    for step in range(N_STEPS):
        if isinstance(buffer.observation_space, spaces.Dict):
            obs = {"x": rng.normal(size=(N_ENVS, 4)), "image": rng.integers(0, 255, (N_ENVS, 3, 8, 8))}
        else:
            obs = rng.normal(size=(N_ENVS, 4))
        numbers = th.as_tensor(rng.normal(size=(2, N_ENVS)), dtype=th.float32)
        starts = np.full(N_ENVS, step == 0) | (rng.random(N_ENVS) < 0.2)
        buffer.add(obs, rng.normal(size=(N_ENVS, 2)), rng.normal(size=N_ENVS), starts, numbers[0], numbers[1])
    last_values = th.as_tensor(rng.normal(size=N_ENVS), dtype=th.float32)
    buffer.compute_returns_and_advantage(last_values, dones=np.zeros(N_ENVS, dtype=bool))


def make_buffer(observation_space: spaces.Space = OBSERVATION_SPACE) -> RolloutBuffer:
    buffer_class = DictRolloutBuffer if isinstance(observation_space, spaces.Dict) else RolloutBuffer
    return buffer_class(N_STEPS, observation_space, ACTION_SPACE, "cpu", gae_lambda=GAE_LAMBDA, gamma=GAMMA, n_envs=N_ENVS)


def store(buffer: RolloutBuffer, timeouts: Timeouts | None = None, fixed: bool = False) -> Rollout:
    last_obs, last_dones = np.zeros((N_ENVS, 4)), np.zeros(N_ENVS, dtype=bool)
    return Rollout(buffer, last_obs, last_dones, timeouts or Timeouts(), fixed=fixed)


def critic(last_values: th.Tensor, timeout_value: float = math.nan) -> Callable[[np.ndarray], th.Tensor]:
    """Values of observations after the last step, one for each environment, and of a single one at a time-out."""
    return lambda observations: last_values if len(observations) == N_ENVS else th.tensor([timeout_value])


DICT_SPACE = spaces.Dict({"x": OBSERVATION_SPACE, "image": spaces.Box(0, 255, (3, 8, 8), np.uint8)})


@pytest.mark.parametrize("observation_space", [OBSERVATION_SPACE, DICT_SPACE])
def test_capacity_one_yields_the_minibatches_of_the_rollout_buffer(observation_space):
    """Bit for bit, so that R2VPOOff at capacity 1 is R2VPO."""
    buffer = make_buffer(observation_space)
    fill(buffer, np.random.default_rng(0))
    reference = copy.deepcopy(buffer)
    replay = RolloutReplayBuffer(1)
    replay.add(store(buffer))
    np.random.seed(1)
    ours = list(next(passes(replay.newest(1), batch_size=4, n_passes=1)))
    np.random.seed(1)
    theirs = list(reference.get(batch_size=4))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in b._fields:
            field_a, field_b = getattr(a, name), getattr(b, name)
            if isinstance(field_b, dict):
                assert all(th.equal(field_a[key], field_b[key]) for key in field_b)
            else:
                assert th.equal(field_a, field_b)


@pytest.mark.parametrize("observation_space", [OBSERVATION_SPACE, DICT_SPACE])
def test_every_step_of_every_rollout_is_drawn_once_before_any_is_drawn_again(observation_space):
    rng = np.random.default_rng(0)
    buffer, replay = make_buffer(observation_space), RolloutReplayBuffer(3)
    expected = []
    for _ in range(3):
        fill(buffer, rng)
        expected.append(buffer.log_probs.flatten())
        replay.add(store(buffer))
    drawn_passes = [list(minibatches) for minibatches in passes(replay.newest(3), batch_size=8, n_passes=3)]
    assert [len(minibatches) for minibatches in drawn_passes] == [2, 2, 2]
    samples = [minibatch for minibatches in drawn_passes for minibatch in minibatches]
    assert [len(s.old_log_prob) for s in samples] == [8, 8, 8, 8, 8, 5]
    drawn = np.concatenate([s.old_log_prob.numpy() for s in samples])
    np.testing.assert_array_equal(np.sort(drawn), np.sort(np.concatenate(expected)))
    # Fields stay together: the pair of observation and log-probability is one that was stored
    obs = samples[0].observations["x"] if isinstance(observation_space, spaces.Dict) else samples[0].observations
    for row, log_prob in zip(obs.numpy(), samples[0].old_log_prob.numpy(), strict=True):
        rollout = next(r for r in replay.rollouts if log_prob in r.buffer.log_probs)
        stored = rollout.buffer.observations
        stored = stored["x"] if isinstance(stored, dict) else stored
        np.testing.assert_array_equal(row, stored[np.flatnonzero(rollout.buffer.log_probs == log_prob)[0]])


def test_minibatches_mix_all_rollouts_uniformly():
    rng, buffer, replay = np.random.default_rng(0), make_buffer(), RolloutReplayBuffer(2)
    for offset in (0.0, 1000.0):
        fill(buffer, rng)
        buffer.log_probs += offset
        replay.add(store(buffer))
    np.random.seed(0)
    # The first minibatch of many passes: half of it from each rollout on average
    first = [next(next(passes(replay.newest(2), batch_size=10, n_passes=1))).old_log_prob for _ in range(300)]
    newest = [(log_prob > 500).float().mean().item() for log_prob in first]
    assert np.mean(newest) == pytest.approx(0.5, abs=0.03)


def test_first_in_first_out():
    rng, buffer, replay = np.random.default_rng(0), make_buffer(), RolloutReplayBuffer(2)
    rollouts = []
    for _ in range(3):
        fill(buffer, rng)
        rollouts.append(store(buffer))
        replay.add(rollouts[-1])
    assert len(replay) == replay.capacity == 2
    assert list(replay.rollouts) == replay.newest(3) == rollouts[1:]
    assert replay.newest(1) == rollouts[2:]


def test_room_is_made_before_the_next_rollout_is_collected():
    """So that never more rollouts are in memory than the buffer is for."""
    rng, buffer, replay = np.random.default_rng(0), make_buffer(), RolloutReplayBuffer(2)
    sizes = []
    for _ in range(4):
        replay.make_room()
        sizes.append(len(replay))
        fill(buffer, rng)
        replay.add(store(buffer))
    assert sizes == [0, 1, 1, 1]


class Masked(RolloutBuffer):
    """Has a further array for each step, as a subclass with action masks."""

    def reset(self) -> None:
        super().reset()
        self.masks = np.zeros((self.buffer_size, self.n_envs, 2))


def test_rollout_is_flattened_in_place_in_sampling_order():
    """There is no second copy of it; `rewards` and `episode_starts` stay in the order of time, for GAE."""
    buffer = Masked(N_STEPS, OBSERVATION_SPACE, ACTION_SPACE, "cpu", gae_lambda=GAE_LAMBDA, gamma=GAMMA, n_envs=N_ENVS)
    fill(buffer, np.random.default_rng(0))
    buffer.masks = np.random.default_rng(1).normal(size=(N_STEPS, N_ENVS, 2))
    before = copy.deepcopy(buffer)
    flat = flatten(buffer)
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns", "masks"):
        np.testing.assert_array_equal(getattr(flat, name), RolloutBuffer.swap_and_flatten(getattr(before, name)))
        assert getattr(flat, name) is getattr(buffer, name)
    for name in ("rewards", "episode_starts"):
        np.testing.assert_array_equal(getattr(flat, name), getattr(before, name))
    assert flatten(buffer).observations is flat.observations


@pytest.mark.parametrize("observation_space", [OBSERVATION_SPACE, DICT_SPACE])
def test_stored_rollout_outlives_the_next_collection(observation_space):
    rng, buffer = np.random.default_rng(0), make_buffer(observation_space)
    fill(buffer, rng)
    rollout = store(buffer)
    names = ("observations", "actions", "values", "log_probs", "rewards", "episode_starts", "advantages", "returns")
    before = {name: copy.deepcopy(getattr(rollout.buffer, name)) for name in names}
    fill(buffer, rng)
    for name, array in before.items():
        np.testing.assert_equal(getattr(rollout.buffer, name), array)


NAMES_IN_SAMPLES = {"values": "old_values", "advantages": "advantages", "returns": "returns"}


def test_renewed_advantages_are_gae_of_the_new_values():
    """Against a fresh buffer that had the new values, and the new bootstrap at the time-out, from the start."""
    rng, buffer = np.random.default_rng(0), make_buffer()
    fill(buffer, rng)
    timeouts = Timeouts()
    timeouts.append(2, 1, np.ones(4))
    timeouts.values, timeouts.gamma = np.array([0.5], dtype=np.float32), GAMMA
    raw_rewards = buffer.rewards.copy()
    buffer.rewards[2, 1] += buffer.gamma * 0.5

    reference = copy.deepcopy(buffer)
    reference.rewards = raw_rewards
    reference.rewards[2, 1] += buffer.gamma * 0.8
    reference.values = rng.normal(size=(N_STEPS, N_ENVS)).astype(np.float32)
    last_values = th.tensor([0.1, -0.4, 2.0])
    reference.compute_returns_and_advantage(last_values, np.zeros(N_ENVS, dtype=bool))

    rollout = store(buffer, timeouts)
    log_probs = rollout.buffer.log_probs.copy()
    # Twice, with other numbers first: updates must not add up
    rollout.renew(critic(last_values, 7.0), GAMMA, GAE_LAMBDA, values=th.ones(N_STEPS * N_ENVS))
    values = th.as_tensor(reference.values.T.flatten())
    rollout.renew(critic(last_values, 0.8), GAMMA, GAE_LAMBDA, values=values)
    for name in ("values", "advantages", "returns"):
        expected = RolloutBuffer.swap_and_flatten(getattr(reference, name))
        np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(
            getattr(rollout.samples, NAMES_IN_SAMPLES[name]), getattr(rollout.buffer, name).flatten()
        )
    np.testing.assert_array_equal(rollout.buffer.log_probs, log_probs)


def test_values_that_are_not_at_hand_are_predicted():
    """Those of all steps in sampling order, of the terminal observations, and of the last ones."""
    buffer, weights = make_buffer(), th.tensor([1.0, -2.0, 0.5, 3.0])
    fill(buffer, np.random.default_rng(0))
    timeouts = Timeouts()
    timeouts.append(2, 1, np.ones(4))
    timeouts.values, timeouts.gamma = np.zeros(1, dtype=np.float32), GAMMA
    reference = copy.deepcopy(buffer)
    reference.values = reference.observations @ weights.numpy()
    reference.rewards[2, 1] += GAMMA * 2.5
    reference.compute_returns_and_advantage(th.zeros(N_ENVS), np.zeros(N_ENVS, dtype=bool))
    rollout = store(buffer, timeouts)
    rollout.renew(lambda obs: th.as_tensor(obs, dtype=th.float32) @ weights[:, None], GAMMA, GAE_LAMBDA)
    for name in ("values", "advantages", "returns"):
        expected = RolloutBuffer.swap_and_flatten(getattr(reference, name))
        np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)


def test_discount_factor_and_lambda_may_change():
    """What the rewards contain of the critic is that of the new discount factor, too."""
    buffer = make_buffer()
    fill(buffer, np.random.default_rng(0))
    timeouts = Timeouts()
    timeouts.append(2, 1, np.ones(4))
    timeouts.values, timeouts.gamma = np.array([0.5], dtype=np.float32), GAMMA
    reference = copy.deepcopy(buffer)
    buffer.rewards[2, 1] += GAMMA * 0.5
    reference.rewards[2, 1] += 0.5 * 0.8
    reference.gamma, reference.gae_lambda = 0.5, 0.3
    last_values = th.tensor([0.1, -0.4, 2.0])
    reference.compute_returns_and_advantage(last_values, np.zeros(N_ENVS, dtype=bool))
    rollout = store(buffer, timeouts)
    rollout.renew(critic(last_values, 0.8), 0.5, 0.3, values=rollout.samples.old_values)
    for name in ("values", "advantages", "returns"):
        expected = RolloutBuffer.swap_and_flatten(getattr(reference, name))
        np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)


def test_advantages_that_a_callback_has_set_stay():
    buffer = make_buffer()
    fill(buffer, np.random.default_rng(0))
    rollout = store(buffer, fixed=True)
    names = ("values", "advantages", "returns", "rewards")
    before = {name: getattr(rollout.buffer, name).copy() for name in names}
    rollout.renew(critic(th.ones(N_ENVS)), GAMMA, GAE_LAMBDA, values=th.ones(N_STEPS * N_ENVS))
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(rollout.buffer, name), array)


def test_pickled_rollout_is_the_same():
    buffer = make_buffer()
    fill(buffer, np.random.default_rng(0))
    rollout = store(buffer)
    assert rollout.samples is rollout.samples
    restored = pickle.loads(pickle.dumps(rollout))
    for ours, theirs in zip(restored.samples, rollout.samples, strict=True):
        assert th.equal(ours, theirs)


def long_rollout_in_two(rng: np.random.Generator) -> tuple[RolloutBuffer, Rollout, Rollout, th.Tensor]:
    """A rollout of twice the length, and its halves stored one by one, with values that are out of date."""
    settings = {"gae_lambda": GAE_LAMBDA, "gamma": GAMMA, "n_envs": N_ENVS}
    whole = RolloutBuffer(2 * N_STEPS, OBSERVATION_SPACE, ACTION_SPACE, "cpu", **settings)
    for name in ("observations", "rewards", "values"):
        array = getattr(whole, name)
        array[:] = rng.normal(size=array.shape)
    # An episode ends within either half, and one with the first half
    for step, env in ((2, 0), (N_STEPS, 1), (N_STEPS + 2, 2)):
        whole.episode_starts[step, env] = 1
    whole.full, last_values = True, th.tensor([0.1, -0.4, 2.0])
    whole.compute_returns_and_advantage(last_values, np.zeros(N_ENVS, dtype=bool))
    halves = []
    for start in (0, N_STEPS):
        half, steps = make_buffer(), slice(start, start + N_STEPS)
        for name in ("observations", "rewards", "episode_starts"):
            setattr(half, name, getattr(whole, name)[steps].copy())
        half.full = True
        ends = start + N_STEPS == 2 * N_STEPS
        last_obs = np.zeros((N_ENVS, 4)) if ends else whole.observations[N_STEPS]
        last_dones = np.zeros(N_ENVS) if ends else whole.episode_starts[N_STEPS]
        halves.append(Rollout(half, last_obs, last_dones.astype(bool), Timeouts()))
    return whole, *halves, last_values


def test_advantages_go_on_in_the_rollout_that_follows():
    whole, first, second, last_values = long_rollout_in_two(np.random.default_rng(0))
    values, values_between = th.as_tensor(whole.values), th.as_tensor(whole.values[N_STEPS])
    second.renew(critic(last_values), GAMMA, GAE_LAMBDA, values=values[N_STEPS:].T.flatten())
    first.renew(critic(values_between), GAMMA, GAE_LAMBDA, following=second, values=values[:N_STEPS].T.flatten())
    for rollout, steps in ((first, slice(N_STEPS)), (second, slice(N_STEPS, None))):
        for name in ("advantages", "returns"):
            expected = RolloutBuffer.swap_and_flatten(getattr(whole, name)[steps])
            np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)


def test_advantages_break_off_where_the_environments_were_reset_in_between():
    whole, first, second, last_values = long_rollout_in_two(np.random.default_rng(0))
    second.buffer.observations = second.buffer.observations + 1
    values = th.as_tensor(whole.values)
    second.renew(critic(last_values), GAMMA, GAE_LAMBDA, values=values[N_STEPS:].T.flatten())
    arguments = critic(values[N_STEPS]), GAMMA, GAE_LAMBDA
    first.renew(*arguments, values=values[:N_STEPS].T.flatten())
    alone = first.buffer.advantages
    first.renew(*arguments, following=second, values=values[:N_STEPS].T.flatten())
    np.testing.assert_array_equal(first.buffer.advantages, alone)


def test_dictionary_observations_go_on_in_the_rollout_that_follows():
    rng, buffer = np.random.default_rng(0), make_buffer(DICT_SPACE)
    rollouts = []
    for _ in range(2):
        fill(buffer, rng)
        rollouts.append(store(buffer))
    first_obs = {key: array[::N_STEPS] for key, array in rollouts[1].buffer.observations.items()}
    rollouts[0].last_obs, rollouts[0].last_dones = first_obs, rollouts[1].buffer.episode_starts[0]
    assert rollouts[0].continues_in(rollouts[1])
    rollouts[0].last_obs = {**first_obs, "x": first_obs["x"] + 1}
    assert not rollouts[0].continues_in(rollouts[1])


def test_batches_are_in_sampling_order(monkeypatch):
    monkeypatch.setattr(rollout_module, "EVALUATION_STEPS", 4)
    buffer = make_buffer()
    fill(buffer, np.random.default_rng(0))
    rollout = store(buffer)
    batches = list(rollout.batches())
    assert [len(b.old_log_prob) for b in batches] == [4, 4, 4, 3]
    np.testing.assert_array_equal(th.cat([b.old_log_prob for b in batches]).numpy(), rollout.buffer.log_probs.flatten())


@pytest.mark.parametrize("capacity", [0, -1, 1.5, None, "4"])
def test_bad_capacity(capacity):
    with pytest.raises(ValueError, match="`replay_capacity` is"):
        RolloutReplayBuffer(capacity)
