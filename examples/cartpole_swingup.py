"""
What `make train` runs: R2VPO on a DM Control task, from nothing to a policy that can be watched.

It prints the return before and after, and leaves the model, a learning curve and a video in `runs/cartpole-swingup`.
"""

import argparse
import warnings
from pathlib import Path

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch as th
from matplotlib import pyplot as plt
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.results_plotter import window_func
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize, VecVideoRecorder

from sb3_r2vpo import R2VPO
from sb3_r2vpo.envs import EnvPoolVecEnv

ENV_ID = "dm_control/cartpole-swingup-v0"


def make_training_envs(n_envs: int, seed: int) -> VecEnv:
    """EnvPool where it is installed, with episodes at all phases; else the same task in Python, several times slower."""
    try:
        return EnvPoolVecEnv(ENV_ID, n_envs=n_envs, seed=seed, stagger=True)
    except ImportError as error:
        print(f"{error}. Going on without it, more slowly.")
        return DummyVecEnv([lambda: gym.make(ENV_ID)] * n_envs)


def mean_return(model: R2VPO, n_episodes: int = 10) -> float:
    """Mean return in dm_control itself, with the training statistics of the observations, which stay as they are."""
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(ENV_ID))]), training=False, norm_reward=False)
    env.obs_rms = model.get_vec_normalize_env().obs_rms
    env.seed(1000)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=n_episodes)
    return float(mean)


def plot_learning_curve(monitor_file: Path, png: Path) -> None:
    """Mean return of the last 100 training episodes against environment steps."""
    episodes = np.genfromtxt(monitor_file, delimiter=",", skip_header=1, names=True)
    steps, returns = window_func(np.cumsum(episodes["l"]), episodes["r"], 100, np.mean)
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(steps, returns)
    ax.set(xlabel="Environment steps", ylabel="Return (mean of 100 episodes)", title=f"R2VPO on {ENV_ID}", ylim=(0, 1000))
    ax.grid(alpha=0.3)
    fig.savefig(png, dpi=150)


def record_video(model: R2VPO, folder: Path) -> None:
    """One episode as an mp4 file; needs OpenGL."""
    env = DummyVecEnv([lambda: gym.make(ENV_ID, render_mode="rgb_array")])
    recorder = VecVideoRecorder(env, str(folder), lambda step: step == 0, video_length=1000, name_prefix="r2vpo")
    env = VecNormalize(recorder, training=False, norm_reward=False)
    env.obs_rms = model.get_vec_normalize_env().obs_rms
    obs = env.reset()
    for _ in range(1000):
        actions, _ = model.predict(obs, deterministic=True)
        obs, _, _, _ = env.step(actions)
    env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--timesteps", type=float, default=6e5, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/cartpole-swingup"), help="where the results go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    # One thread is fastest for small networks
    th.set_num_threads(1)

    # `EnvPoolVecEnv` has the statistics of `VecMonitor` built in, but not its file
    warnings.filterwarnings("ignore", message="The environment is already wrapped with a `Monitor`")
    envs = VecMonitor(make_training_envs(n_envs=32, seed=args.seed), str(args.folder / "train"))
    learning_rate = LinearSchedule(start=5e-4, end=0.0, end_fraction=1.0)
    settings = {"n_steps": 128, "batch_size": 512, "learning_rate": learning_rate}
    model = R2VPO("MlpPolicy", VecNormalize(envs), **settings, seed=args.seed, device="cpu")

    before = mean_return(model)
    model.learn(args.timesteps, progress_bar=True)
    model.save(args.folder / "model")
    model.get_vec_normalize_env().save(str(args.folder / "vecnormalize.pkl"))
    print(f"Return of {ENV_ID}, mean of 10 episodes (at most 1000): {before:.0f} before, {mean_return(model):.0f} after.")

    plot_learning_curve(args.folder / "train.monitor.csv", args.folder / "learning_curve.png")
    try:
        record_video(model, args.folder)
    except RuntimeError as error:
        print(f"No video, as there is no OpenGL here (Debian: `apt install libegl1 libgl1-mesa-dri`): {error}")
    print(f"Model, learning curve and video are in {args.folder}")


if __name__ == "__main__":
    main()
