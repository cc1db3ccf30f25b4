"""
`EnvPoolVecEnv` against dm_control itself, transition by transition.

EnvPool can neither be put into a state nor asked for one, but its float64 observations hold the state of most tasks up
to what the dynamics do not depend on (the place of the walker, the heading of the humanoid). So every comparison has
three parties: the environment under test, a raw EnvPool with the same seeds and actions for its float64 observations,
and dm_control, which is set to the state found in those.
"""

import gymnasium as gym
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import ks_2samp
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_r2vpo.envs import DM_CONTROL_IDS, EnvPoolVecEnv

envpool = pytest.importorskip("envpool", reason="needs the extra: pip install sb3-r2vpo[envpool]")


def env_id(task):
    return f"dm_control/{task}-v0"


def raw_pool(envpool_id, **kwargs):
    return envpool.make_gymnasium(envpool_id, num_threads=1, **kwargs)


def held_actions(env, seed, n_steps=1000, hold=25):
    """Random actions `(n_steps, n_envs, size)`, each held for a while, so that the robots get somewhere."""
    shape = (n_steps // hold, *env.action_space.shape)
    actions = [np.random.default_rng(seed + i).uniform(-1, 1, shape) for i in range(env.num_envs)]
    return np.repeat(np.stack(actions, axis=1), hold, axis=0).astype(np.float32)


# From the observation of one environment to the state of dm_control: each function gives `qpos`.


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


def all_joints(physics, obs):
    return obs["position"]


def all_but_x(physics, obs):
    return [0, *obs["position"]]


def cartpole(physics, obs):
    cart, *orientations = obs["position"]
    cosines, sines = np.reshape(orientations, (-1, 2)).T
    return [cart, *wrap(np.diff(np.arctan2(sines, cosines), prepend=0))]


def acrobot(physics, obs):
    sines, cosines = obs["orientations"].reshape(2, 2)
    return np.diff(np.arctan2(sines, cosines), prepend=0)


def pendulum(physics, obs):
    cosine, sine = obs["orientation"]
    return [np.arctan2(sine, cosine)]


def walker(physics, obs):
    cosines, sines = obs["orientations"].reshape(-1, 2).T
    torso, right_thigh, right_leg, right_foot, left_thigh, left_leg, left_foot = np.arctan2(sines, cosines)
    right = [right_thigh - torso, right_leg - right_thigh, right_foot - right_leg]
    left = [left_thigh - torso, left_leg - left_thigh, left_foot - left_leg]
    angles = wrap(np.array([torso, *right, *left])) * physics.model.jnt_axis[2:, 1]
    physics.data.qpos[:] = [0, 0, *angles]
    physics.forward()
    return [obs["height"] - physics.torso_height(), 0, *angles]


def finger(physics, obs):
    proximal, distal, *tip = obs["position"]
    physics.data.qpos[:] = [proximal, distal, 0]
    physics.forward()
    tip_at_zero = physics.tip_position()
    return [proximal, distal, np.arctan2(tip[1], tip[0]) - np.arctan2(tip_at_zero[1], tip_at_zero[0])]


def reacher(physics, obs):
    physics.data.qpos[:] = obs["position"]
    physics.forward()
    finger_position = physics.named.data.geom_xpos["finger", ["x", "y"]]
    physics.named.model.geom_pos["target", ["x", "y"]] = finger_position + obs["to_target"]
    return obs["position"]


def set_state(env, recover, obs, i):
    physics = env.unwrapped.physics
    obs = {key: values[i] for key, values in obs.items()}
    physics.data.qpos[:] = recover(physics, obs)
    physics.data.qvel[:] = obs["velocity"]
    physics.forward()


# The seeds are such that the actions above meet a reward, which most tasks give in few states only.
RECOVERABLE = {
    "acrobot-swingup": ("AcrobotSwingup-v1", acrobot, 9),
    "ball_in_cup-catch": ("BallInCupCatch-v1", all_joints, 13),
    "cartpole-swingup": ("CartpoleSwingup-v1", cartpole, 0),
    "cartpole-swingup_sparse": ("CartpoleSwingupSparse-v1", cartpole, 113),
    "cartpole-two_poles": ("CartpoleTwoPoles-v1", cartpole, 0),
    "cheetah-run": ("CheetahRun-v1", all_but_x, 0),
    "finger-spin": ("FingerSpin-v1", finger, 50),
    "hopper-hop": ("HopperHop-v1", all_but_x, 29),
    "pendulum-swingup": ("PendulumSwingup-v1", pendulum, 43),
    "point_mass-easy": ("PointMassEasy-v1", all_joints, 107),
    "reacher-hard": ("ReacherHard-v1", reacher, 95),
    "walker-run": ("WalkerRun-v1", walker, 0),
    "walker-walk": ("WalkerWalk-v1", walker, 0),
}


def other_contacts(task, envs):
    """MuJoCo 3.7 changed the contact of two capsules, such as fingertip and spinner, and EnvPool contains 3.6."""
    import mujoco

    in_contact = any(env.unwrapped.physics.data.ncon for env in envs)
    return task == "finger-spin" and mujoco.mj_version() >= 3007000 and in_contact


@pytest.mark.parametrize("task", RECOVERABLE)
def test_every_transition_of_an_episode_equals_dm_control(task):
    envpool_id, recover, seed = RECOVERABLE[task]
    vec_env = EnvPoolVecEnv(env_id(task), n_envs=2, seed=seed, num_threads=1)
    pool = raw_pool(envpool_id, num_envs=2, seed=seed)
    twins = [gym.make(env_id(task)) for _ in range(2)]
    for twin in twins:
        twin.reset(seed=0)
        assert twin.observation_space == vec_env.observation_space
        assert twin.action_space == vec_env.action_space
    vec_env.reset()
    raw_obs, _ = pool.reset()

    actions = held_actions(vec_env, seed)
    compared, rewarded = 0, 0
    for step in range(1, 1001):
        for i, twin in enumerate(twins):
            set_state(twin, recover, raw_obs, i)
        skip = other_contacts(task, twins)
        obs, rewards, dones, infos = vec_env.step(actions[step - 1])
        raw_obs, *_ = pool.step(actions[step - 1])
        expected = [twin.step(action) for twin, action in zip(twins, actions[step - 1], strict=True)]
        assert dones.tolist() == [truncated for *_, truncated, _ in expected] == [step == 1000] * 2
        assert not any(terminated for _, _, terminated, _, _ in expected)
        if step == 1000:
            obs = np.stack([info["terminal_observation"] for info in infos])
        if skip or other_contacts(task, twins):
            continue
        np.testing.assert_allclose(obs, [result[0] for result in expected], rtol=1e-5, atol=1e-5, err_msg=f"{step=}")
        np.testing.assert_allclose(rewards, [result[1] for result in expected], atol=1e-6, err_msg=f"{step=}")
        compared += 1
        rewarded += bool(rewards.max() > 1e-3)
    assert compared == 1000 or (task == "finger-spin" and compared > 500)
    assert rewarded > 0


# In these two the heading, or the whole orientation, does not show in the observation. It is found from the first
# steps: the dynamics do not depend on it (the fish swims without gravity), so that dm_control started with another
# orientation gives the same velocities, rotated.


def fish_state(physics, obs, rotation):
    physics.data.qpos[:] = [0, 0, 0, *rotation.as_quat(scalar_first=True), *obs["joint_angles"]]
    physics.data.qvel[:] = obs["velocity"]
    physics.forward()
    to_target = physics.named.data.geom_xmat["mouth"].reshape(3, 3) @ obs["target"]
    physics.named.model.geom_pos["target"] = physics.named.data.geom_xpos["mouth"] + to_target
    physics.forward()


def fish_rotation(velocities, expected):
    rotation, _ = Rotation.align_vectors(expected, velocities)
    return rotation


def humanoid_state(physics, obs, rotation):
    upright, _ = Rotation.align_vectors([[0, 0, 1]], [obs["torso_vertical"]])
    physics.data.qpos[:] = [0, 0, 0, *(rotation * upright).as_quat(scalar_first=True), *obs["joint_angles"]]
    physics.data.qvel[:] = obs["velocity"]
    physics.forward()
    physics.data.qpos[2] = obs["head_height"] - physics.head_height()
    physics.forward()


def humanoid_rotation(velocities, expected):
    planar, planar_expected = (v[:, 0] + 1j * v[:, 1] for v in (velocities, expected))
    return Rotation.from_euler("z", np.angle(np.sum(planar.conj() * planar_expected)))


@pytest.mark.parametrize(
    ("task", "envpool_id", "set_initial_state", "find_rotation", "n_steps"),
    [
        ("fish-swim", "FishSwim-v1", fish_state, fish_rotation, 1000),
        # Bodies that fall and tumble amplify rounding errors, so that a long run proves nothing.
        ("humanoid-run", "HumanoidRun-v1", humanoid_state, humanoid_rotation, 30),
    ],
)
def test_run_from_the_same_state_equals_dm_control(task, envpool_id, set_initial_state, find_rotation, n_steps):
    vec_env = EnvPoolVecEnv(env_id(task), n_envs=2, seed=1, num_threads=1)
    pool = raw_pool(envpool_id, num_envs=2, seed=1)
    vec_env.reset()
    raw_first_obs, _ = pool.reset()
    actions = held_actions(vec_env, seed=0, hold=1)[:n_steps]
    results = [vec_env.step(action) for action in actions]
    raw_velocities = np.stack([pool.step(action)[0]["velocity"][:, :3] for action in actions[:8]])

    for i in range(2):
        env = gym.make(env_id(task))
        physics = env.unwrapped.physics
        raw_obs = {key: values[i] for key, values in raw_first_obs.items()}

        def restart(rotation, env=env, physics=physics, raw_obs=raw_obs):
            env.reset()
            set_initial_state(physics, raw_obs, rotation)

        def linear_velocity(action, env=env, physics=physics):
            env.step(action)
            return physics.data.qvel[:3].copy()

        restart(Rotation.identity())
        velocities = np.stack([linear_velocity(action[i]) for action in actions[:8]])
        restart(find_rotation(velocities, raw_velocities[:, i]))
        for action, (obs, rewards, dones, infos) in zip(actions, results, strict=True):
            expected_obs, expected_reward, terminated, truncated, _ = env.step(action[i])
            last_obs = infos[i].get("terminal_observation", obs[i])
            np.testing.assert_allclose(last_obs, expected_obs, rtol=1e-4, atol=1e-4)
            assert rewards[i] == pytest.approx(expected_reward, abs=1e-5)
            assert (terminated, truncated) == (False, dones[i])


@pytest.mark.parametrize("task", ["walker-run", "reacher-hard", "ball_in_cup-catch", "finger-spin", "pendulum-swingup"])
def test_first_states_have_the_distribution_of_dm_control(task):
    vec_env = EnvPoolVecEnv(env_id(task), n_envs=4, seed=0, num_threads=1)
    env = gym.make(env_id(task))
    env.reset(seed=0)
    ours = np.concatenate([vec_env.reset() for _ in range(100)])
    theirs = np.stack([env.reset()[0] for _ in range(400)])
    assert len(np.unique(ours, axis=0)) == 400
    for component, (sample, reference) in enumerate(zip(ours.T, theirs.T, strict=True)):
        assert ks_2samp(sample, reference).pvalue > 1e-4, component


@pytest.mark.slow
@pytest.mark.parametrize("task_id", DM_CONTROL_IDS)
def test_observed_keys_are_those_of_dm_control(task_id):
    """EnvPool adds keys that the task does not observe; what is left must be dm_control's, in `flatten`'s order."""
    env = gym.make(task_id)
    vec_env = EnvPoolVecEnv(task_id, n_envs=1, seed=0)
    assert vec_env._keys == list(env.unwrapped.observation_space)
    assert vec_env.observation_space == env.observation_space
    assert vec_env.action_space == env.action_space


def test_end_of_episode():
    """Against a raw EnvPool, which returns the reset observation one step later, for a step that does nothing."""
    vec_env = EnvPoolVecEnv(env_id("cheetah-run"), n_envs=3, seed=0, num_threads=2)
    pool = raw_pool("CheetahRun-v1", num_envs=3, seed=0)
    vec_env.reset()
    pool.reset()
    actions = held_actions(vec_env, 0)
    for episode in range(2):
        total = np.zeros(3)
        for step in range(1, 1001):
            obs, rewards, dones, infos = vec_env.step(actions[step - 1])
            raw_obs, raw_rewards, *_ = pool.step(actions[step - 1])
            total += raw_rewards
            np.testing.assert_array_equal(rewards, raw_rewards)
            assert dones.tolist() == [step == 1000] * 3, (episode, step)
            if step < 1000:
                assert infos == [{}] * 3
        terminal = np.concatenate([raw_obs["position"], raw_obs["velocity"]], axis=1).astype(np.float32)
        raw_obs, *_ = pool.step(actions[0])
        first = np.concatenate([raw_obs["position"], raw_obs["velocity"]], axis=1).astype(np.float32)
        np.testing.assert_array_equal(obs, first)
        for i, info in enumerate(infos):
            np.testing.assert_array_equal(info["terminal_observation"], terminal[i])
            assert info["TimeLimit.truncated"] is True
            assert info["episode"]["l"] == 1000
            assert info["episode"]["r"] == pytest.approx(total[i], abs=1e-5)
            assert info["episode"]["t"] > 0


def test_staggered_episodes():
    """First episodes of 250, 500, 750 and 1000 steps, cut off as by a time limit; whole ones then; again after `reset`."""
    vec_env = EnvPoolVecEnv(env_id("pendulum-swingup"), n_envs=4, seed=0, num_threads=1, stagger=True)
    actions = np.zeros((4, 1), dtype=np.float32)
    for _ in range(2):
        vec_env.reset()
        ends = []
        for step in range(1, 2001):
            _, _, dones, infos = vec_env.step(actions)
            for i in np.flatnonzero(dones):
                assert infos[i]["TimeLimit.truncated"]
                ends.append((step, i, infos[i]["episode"]["l"]))
        first = [(250, 0, 250), (500, 1, 500), (750, 2, 750), (1000, 3, 1000)]
        assert ends == [*first, (1250, 0, 1000), (1500, 1, 1000), (1750, 2, 1000), (2000, 3, 1000)]


def test_types_and_ownership():
    """As with `DummyVecEnv`, what a step returned must not change with the next one, nor its infos be shared."""
    vec_env = EnvPoolVecEnv(env_id("pendulum-swingup"), n_envs=2, seed=0)
    first = vec_env.reset()
    assert first.dtype == np.float32
    assert vec_env.observation_space.contains(first[0])
    kept = first.copy()
    obs, rewards, dones, infos = vec_env.step(np.ones((2, 1), dtype=np.float32))
    assert (obs.dtype, rewards.dtype, dones.dtype) == (np.float32, np.float32, np.bool_)
    assert obs.shape == (2, 3)
    assert rewards.shape == dones.shape == (2,)
    infos[0]["mine"] = 1
    assert infos[1] == {}
    assert vec_env.step(np.ones((2, 1), dtype=np.float32))[3] == [{}, {}]
    np.testing.assert_array_equal(first, kept)


def test_terminated_environments_are_reset_alone():
    """`lqr` is the one domain that terminates, here under a controller that brings it to rest at differing steps."""
    vec_env = EnvPoolVecEnv(env_id("lqr-lqr_2_1"), n_envs=4, seed=0, num_threads=2)
    obs = vec_env.reset()
    ends = []
    for step in range(1, 1001):
        obs, _, dones, infos = vec_env.step(obs @ np.array([[0], [0], [-15], [-5]], dtype=np.float32))
        for i in range(4):
            if dones[i]:
                info = infos[i]
                terminated = not info["TimeLimit.truncated"]
                assert terminated == (np.linalg.norm(info["terminal_observation"]) < 1e-6)
                assert info["episode"]["l"] == step
                assert np.linalg.norm(obs[i]) > 0.1
                ends.append((i, terminated))
            else:
                assert infos[i] == {}
    assert sorted(ends) == [(0, True), (1, True), (2, False), (3, False)]


def first_steps(vec_env, n_steps=3):
    action = np.full((vec_env.num_envs, *vec_env.action_space.shape), 0.5, dtype=np.float32)
    return np.stack([vec_env.reset(), *(vec_env.step(action)[0] for _ in range(n_steps))])


def test_seeds():
    def make(seed, **kwargs):
        return EnvPoolVecEnv(env_id("reacher-easy"), n_envs=3, seed=seed, **kwargs)

    vec_env = make(7)
    run = first_steps(vec_env)
    np.testing.assert_array_equal(run, first_steps(make(7, num_threads=1)))
    assert len(np.unique(run[0], axis=0)) == 3
    # Environment i of seed 7 is environment 0 of seed 7 + i, as with `make_vec_env`.
    np.testing.assert_array_equal(run[:, 1:], first_steps(make(8))[:, :2])

    second_run = first_steps(vec_env)
    assert not np.array_equal(run, second_run)
    assert vec_env.seed(7) == [7, 8, 9]
    np.testing.assert_array_equal(first_steps(vec_env), run)
    np.testing.assert_array_equal(first_steps(vec_env), second_run)

    assert not np.array_equal(first_steps(make(None)), first_steps(make(None)))
    first_steps(make(2**32 - 2))  # the largest that `VecEnv.seed` draws, beyond EnvPool's int32


def test_seed_acts_at_reset_only():
    vec_env, reference = (EnvPoolVecEnv(env_id("reacher-easy"), n_envs=2, seed=0) for _ in range(2))
    vec_env.reset()
    reference.reset()
    vec_env.seed(5)
    action = np.ones((2, 2), dtype=np.float32)
    np.testing.assert_array_equal(vec_env.step(action)[0], reference.step(action)[0])


def test_ppo_learns_on_it_seeds_it_and_logs_its_episodes():
    vec_env = EnvPoolVecEnv(env_id("cartpole-balance"), n_envs=4, seed=0, num_threads=1)
    model = PPO("MlpPolicy", vec_env, n_steps=512, batch_size=512, n_epochs=1, seed=11, device="cpu")
    first_obs = EnvPoolVecEnv(env_id("cartpole-balance"), n_envs=4, seed=11).reset()
    model.learn(1)
    np.testing.assert_array_equal(model.rollout_buffer.observations[::512], first_obs)
    model.learn(4 * 512, reset_num_timesteps=False)
    assert model.num_timesteps == 2 * 4 * 512
    assert [info["l"] for info in model.ep_info_buffer] == [1000] * 4


def test_vec_normalize_and_vec_monitor():
    vec_env = EnvPoolVecEnv(env_id("cartpole-balance"), n_envs=2, seed=0)
    normalized = VecNormalize(vec_env)
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitored = VecMonitor(EnvPoolVecEnv(env_id("cartpole-balance"), n_envs=2, seed=0))
    normalized.reset()
    monitored.reset()
    action = np.full((2, 1), 0.1, dtype=np.float32)
    for _ in range(1000):
        obs, _, dones, infos = normalized.step(action)
        *_, expected = monitored.step(action)
    assert dones.all()
    for i in range(2):
        assert infos[i]["episode"]["r"] == pytest.approx(expected[i]["episode"]["r"], rel=1e-5)
        assert infos[i]["episode"]["l"] == expected[i]["episode"]["l"]
        terminal = normalized.normalize_obs(expected[i]["terminal_observation"])
        np.testing.assert_allclose(infos[i]["terminal_observation"], terminal, rtol=1e-5)
    assert np.abs(obs).max() <= 10


@pytest.mark.filterwarnings("error")
def test_evaluate_policy_finds_the_episode_statistics():
    vec_env = EnvPoolVecEnv(env_id("pendulum-swingup"), n_envs=2, seed=0)
    model = PPO("MlpPolicy", vec_env, n_steps=8, batch_size=16, device="cpu")
    _, lengths = evaluate_policy(model, vec_env, n_eval_episodes=2, return_episode_rewards=True)
    assert lengths == [1000, 1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "dm_control/walker-fly-v0"}, "dm_control/walker-run-v0"),
        ({"env_id": "CartPole-v1"}, "Close matches"),
        ({"env_id": env_id("walker-run"), "n_envs": 0}, "`n_envs` is 0"),
        ({"env_id": env_id("walker-run"), "num_threads": 0}, "`num_threads` is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnvPoolVecEnv(**arguments)


def test_bad_actions():
    """EnvPool itself reads beyond a short batch and aborts the process."""
    vec_env = EnvPoolVecEnv(env_id("pendulum-swingup"), n_envs=2, seed=0)
    with pytest.raises(RuntimeError, match="reset"):
        vec_env.step(np.zeros((2, 1)))
    vec_env.reset()
    for shape in [(1, 1), (2, 2), (2,)]:
        with pytest.raises(ValueError, match="shape"):
            vec_env.step(np.zeros(shape))
    vec_env.step(np.zeros((2, 1)))


def test_no_python_objects_inside():
    vec_env = EnvPoolVecEnv(env_id("pendulum-swingup"), n_envs=2, seed=0)
    assert vec_env.get_attr("render_mode") == [None, None]
    assert not vec_env.has_attr("spec")
    assert vec_env.env_is_wrapped(Monitor) == [True, True]
    assert vec_env.env_is_wrapped(gym.wrappers.TimeLimit, indices=0) == [False]
    with pytest.raises(AttributeError, match="Python objects"):
        vec_env.get_attr("physics")
    with pytest.raises(NotImplementedError, match="Python objects"):
        vec_env.set_attr("gravity", 0)
    with pytest.raises(NotImplementedError, match="Python objects"):
        vec_env.env_method("reset")
    with pytest.raises(NotImplementedError, match="rgb_array"):
        vec_env.render()
    vec_env.close()
