import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_r2vpo.rollout_replay import RolloutReplayBuffer, StoredRollout, Timeouts

N_STEPS, N_ENVS = 5, 3
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
    return buffer_class(N_STEPS, observation_space, ACTION_SPACE, "cpu", gae_lambda=0.9, gamma=0.95, n_envs=N_ENVS)


def store(buffer: RolloutBuffer, timeouts: Timeouts | None = None) -> StoredRollout:
    return StoredRollout(buffer, np.zeros((N_ENVS, 4)), np.zeros(N_ENVS, dtype=bool), timeouts or Timeouts())


DICT_SPACE = spaces.Dict({"x": OBSERVATION_SPACE, "image": spaces.Box(0, 255, (3, 8, 8), np.uint8)})


@pytest.mark.parametrize("observation_space", [OBSERVATION_SPACE, DICT_SPACE])
def test_capacity_one_yields_the_minibatches_of_the_rollout_buffer(observation_space):
    """Bit for bit, so that R2VPOOff at capacity 1 is R2VPO."""
    buffer = make_buffer(observation_space)
    fill(buffer, np.random.default_rng(0))
    replay = RolloutReplayBuffer(1)
    replay.add(store(buffer))
    np.random.seed(1)
    ours = list(next(replay.passes(batch_size=4, n_passes=1)))
    np.random.seed(1)
    theirs = list(buffer.get(batch_size=4))
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
    passes = [list(minibatches) for minibatches in replay.passes(batch_size=8, n_passes=3)]
    assert [len(minibatches) for minibatches in passes] == [2, 2, 2]
    samples = [minibatch for minibatches in passes for minibatch in minibatches]
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
    first = [next(next(replay.passes(batch_size=10, n_passes=1))).old_log_prob for _ in range(300)]
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
    assert list(replay.rollouts) == rollouts[1:]


def test_stored_rollout_outlives_the_next_collection():
    rng, buffer = np.random.default_rng(0), make_buffer()
    fill(buffer, rng)
    rollout = store(buffer)
    before = {name: getattr(rollout.buffer, name).copy() for name in ("observations", "actions", "log_probs", "rewards")}
    fill(buffer, rng)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(rollout.buffer, name), array)


def test_update_values_is_gae_of_the_new_values():
    """Against a fresh buffer that had the new values, and the new bootstrap at the time-out, from the start."""
    rng, buffer = np.random.default_rng(0), make_buffer()
    fill(buffer, rng)
    timeouts = Timeouts()
    timeouts.append(2, 1, np.ones(4))
    timeouts.values = np.array([0.5], dtype=np.float32)
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
    rollout.update_values(np.ones(N_STEPS * N_ENVS, dtype=np.float32), np.array([7.0], dtype=np.float32), last_values)
    rollout.update_values(reference.values.T.flatten(), np.array([0.8], dtype=np.float32), last_values)
    for name in ("values", "advantages", "returns"):
        expected = RolloutBuffer.swap_and_flatten(getattr(reference, name))
        np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rollout.buffer.log_probs, log_probs)


def long_rollout_in_two(rng: np.random.Generator) -> tuple[RolloutBuffer, StoredRollout, StoredRollout, th.Tensor]:
    """A rollout of twice the length, and its halves stored one by one, with values that are out of date."""
    whole = RolloutBuffer(
        2 * N_STEPS, OBSERVATION_SPACE, ACTION_SPACE, "cpu", gae_lambda=0.9, gamma=0.95, n_envs=N_ENVS
    )  # fmt: skip
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
        halves.append(StoredRollout(half, last_obs, last_dones.astype(bool), Timeouts()))
    return whole, *halves, last_values


def test_advantages_go_on_in_the_rollout_that_follows():
    whole, first, second, last_values = long_rollout_in_two(np.random.default_rng(0))
    no_timeouts = np.zeros(0, dtype=np.float32)
    second.update_values(whole.values[N_STEPS:].T.flatten(), no_timeouts, last_values)
    values_between = th.as_tensor(whole.values[N_STEPS])
    first.update_values(whole.values[:N_STEPS].T.flatten(), no_timeouts, values_between, following=second)
    for rollout, steps in ((first, slice(N_STEPS)), (second, slice(N_STEPS, None))):
        for name in ("advantages", "returns"):
            expected = RolloutBuffer.swap_and_flatten(getattr(whole, name)[steps])
            np.testing.assert_allclose(getattr(rollout.buffer, name), expected, rtol=1e-5, atol=1e-5)


def test_advantages_break_off_where_the_environments_were_reset_in_between():
    whole, first, second, last_values = long_rollout_in_two(np.random.default_rng(0))
    second.buffer.observations = second.buffer.observations + 1
    second.update_values(whole.values[N_STEPS:].T.flatten(), np.zeros(0, dtype=np.float32), last_values)
    arguments = (whole.values[:N_STEPS].T.flatten(), np.zeros(0, dtype=np.float32), th.as_tensor(whole.values[N_STEPS]))
    first.update_values(*arguments)
    alone = first.buffer.advantages
    first.update_values(*arguments, following=second)
    np.testing.assert_array_equal(first.buffer.advantages, alone)


def test_dictionary_observations_go_on_in_the_rollout_that_follows():
    rng, buffer = np.random.default_rng(0), make_buffer(DICT_SPACE)
    rollouts = []
    for _ in range(2):
        fill(buffer, rng)
        rollouts.append(store(buffer))
    first_obs = {key: array[::N_STEPS] for key, array in rollouts[1].buffer.observations.items()}
    rollouts[0].last_obs = first_obs
    assert rollouts[0].goes_on_in(rollouts[1])
    rollouts[0].last_obs = {**first_obs, "x": first_obs["x"] + 1}
    assert not rollouts[0].goes_on_in(rollouts[1])


def test_batches_are_in_sampling_order():
    buffer = make_buffer()
    fill(buffer, np.random.default_rng(0))
    rollout = store(buffer)
    batches = list(rollout.batches(4))
    assert [len(b.old_log_prob) for b in batches] == [4, 4, 4, 3]
    np.testing.assert_array_equal(th.cat([b.old_log_prob for b in batches]).numpy(), rollout.buffer.log_probs.flatten())


@pytest.mark.parametrize("capacity", [0, -1, 1.5, None, "4"])
def test_bad_capacity(capacity):
    with pytest.raises(ValueError, match="`replay_capacity` is"):
        RolloutReplayBuffer(capacity)
