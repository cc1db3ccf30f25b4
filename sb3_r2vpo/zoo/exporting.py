"""``r2vpo export``: a run's policy as ONNX or TorchScript."""

import argparse
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_r2vpo.common.export import export_policy
from sb3_r2vpo.common.saving import load_normalization
from sb3_r2vpo.zoo import register
from sb3_r2vpo.zoo.companions import find_companion, matching_statistics
from sb3_r2vpo.zoo.trust import code_free


def main(arguments: Sequence[str]) -> None:
    """Write a trained policy as one file, from the environment's observations to its actions, for machines without Python's
    environments: normalization and the clipping of actions are inside.

    examples:
      r2vpo export --env dm_control/walker-run-v0 --load-best -o walker.onnx       for onnxruntime and its like
      r2vpo export --env CartPole-v1 -o policy.pt                                  TorchScript, for torch.jit.load and LibTorch

    Actions are the most probable ones. What a run's wrappers do to observations or actions is not inside. ONNX takes the extra
    `export`.
    """
    parser = argparse.ArgumentParser(
        prog="r2vpo export", description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", default="r2vpo", help="algorithm of the run (%(default)s)")
    parser.add_argument("--env", type=EnvironmentName, default="CartPole-v1", help="its environment (%(default)s)")
    parser.add_argument("-f", "--folder", default="logs", help="folder of the runs (%(default)s)")
    parser.add_argument("--exp-id", type=int, default=0, help="number of the run, 0 for the latest (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--load-best", action="store_true", help="the best model in place of the final one")
    which.add_argument("--load-checkpoint", type=int, metavar="STEPS", help="the checkpoint after so many steps")
    parser.add_argument("-o", "--output", type=Path, default=Path("policy.onnx"), help="file to write (%(default)s)")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages of environments and policies of your own")
    parser.add_argument("--trust", action="store_true", help="let the run's files run code, see `r2vpo enjoy --help`")
    options = parser.parse_args(arguments)
    register()
    if options.algo not in rl_zoo3.ALGOS or not issubclass(rl_zoo3.ALGOS[options.algo], OnPolicyAlgorithm):
        parser.error(f"--algo is {options.algo}; what can be exported are policies of r2vpo, r2vpo_off, ppo and a2c")
    for package in options.gym_packages:
        importlib.import_module(package)
    env_name = EnvironmentName(options.env)
    with code_free(options.trust, options.gym_packages), matching_statistics():
        _, model_path, log_path = rl_zoo3.utils.get_model_path(
            options.exp_id, options.folder, options.algo, env_name, options.load_best, options.load_checkpoint
        )
        model = rl_zoo3.ALGOS[options.algo].load(model_path, device="cpu")
        statistics = find_companion(model_path, "vecnormalize")
        if statistics is None and (path := Path(log_path, env_name, "vecnormalize.pkl")).is_file():
            statistics = path
        spaces = DummyVecEnv([lambda: _Spaces(model.observation_space, model.action_space)])
        normalization = None if statistics is None else load_normalization(str(statistics), spaces, options.trust)
    assert isinstance(model, OnPolicyAlgorithm)
    print(
        f"Wrote {export_policy(model, options.output, normalization)}: {model_path}, normalized by {statistics or 'nothing'}"
    )


class _Spaces(gym.Env):
    """Has the spaces of an environment, which needs not be installed."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
