"""
What each hand-written part that makes training faster brings, of the whole of `learn()`: environment, collection and update.

It switches the parts of commit e70198e off, one at a time, and runs on that commit alone:

    git worktree add ../e70198e e70198e
    cd ../e70198e
    python ../sb3-r2vpo/benchmarks/speed/ablation.py                    # all settings: a quarter of an hour
    python ../sb3-r2vpo/benchmarks/speed/ablation.py Pendulum --mode eager

The package and the other benchmarks are those of the working directory. Writes results/ablation.csv beside this file; with
arguments, it prints only. The arms of a setting train in turn, forwards and backwards, in one process with one thread.
"All parts, again" is a second model of the same kind: what it differs by is what the measurement can't tell apart. Where
other programs compete for the cores (`load` above their number), wall times say little, and CPU times still do.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before NumPy and PyTorch are loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path("benchmarks", "control").resolve()))
sys.path.insert(0, str(Path("benchmarks", "speed").resolve()))
sys.path.insert(0, str(Path.cwd()))

import numpy as np
import pandas as pd
import torch as th
from benchmark import interleave, load
from experiment import METHODS, make_model, package_versions, processor
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

import sb3_r2vpo

HERE = Path(__file__).parent
#: The modules where the parts are looked up
LEARNER, ACTING, REPLAY = (import_module(f"sb3_r2vpo.{name}") for name in ("r2vpo.r2vpo", "r2vpo.acting", "rollout_replay"))

Patch = tuple[Any, str, Any]


def indexed_minibatches(rollouts: list[Any], batch_size: int) -> Iterator[Any]:
    """`shuffled_minibatches` without copies of a rollout's worth: each field of each minibatch is indexed on its own."""
    together = type(rollouts[0])(*(None if fields[0] is None else th.cat(fields) for fields in zip(*rollouts, strict=True)))
    for indices in th.as_tensor(np.random.permutation(len(together.old_log_prob))).split(batch_size):
        yield type(together)(*(None if field is None else field[indices] for field in together))


def minibatches_of_sb3(model: Any) -> Iterator[Any]:
    """`R2VPO._minibatches` with those of `RolloutBuffer.get`, for a critic that learns with the policy."""
    for _ in range(model.n_epochs):
        model._n_updates += 1
        yield from model.rollout_buffer.get(model.batch_size)


def fused_adam(optimizer: th.optim.Optimizer, flat: bool = False) -> th.optim.Optimizer:
    return th.optim.Adam([group | {"fused": True} for group in optimizer.param_groups])


def policy_evaluate_actions(policy: Any, observations: th.Tensor, actions: th.Tensor) -> Any:
    return policy.evaluate_actions(observations, actions)


def forgetful_evaluate_actions(policy: Any, observations: th.Tensor, actions: th.Tensor) -> Any:
    """The distribution that SB3 leaves in the policy is an output of the compiled step, which it breaks in two."""
    results = policy.evaluate_actions(observations, actions)
    policy.action_dist.distribution = None
    return results


def act_with_modules(acting: Any, obs: th.Tensor, deterministic: bool = False) -> Any:
    """`Acting.__call__` with the policy's modules, without objects of distributions; for Gaussian policies."""
    if deterministic or th.is_grad_enabled():
        return ActorCriticPolicy.forward(acting.policy, obs, deterministic)
    noise = th.randn(len(obs), acting.policy.action_space.shape[0]) if acting.noise is None else acting.noise()
    return ACTING.act_with_noise(acting.policy, obs, noise)


BACKWARD: Patch = (LEARNER, "is_plain_mlp", lambda policy: False)
ADAM: Patch = (LEARNER, "with_fewer_operations", lambda optimizer, flat=False: optimizer)
FUSED: Patch = (LEARNER, "with_fewer_operations", fused_adam)
COLLECTION: Patch = (ACTING, "is_plain_mlp", lambda policy: False)
EVALUATION: Patch = (LEARNER, "evaluate_actions", policy_evaluate_actions)
INDEXED: tuple[Patch, ...] = tuple((module, "shuffled_minibatches", indexed_minibatches) for module in (LEARNER, REPLAY))
FORGETFUL: Patch = (LEARNER, "evaluate_actions", forgetful_evaluate_actions)
MODULES: Patch = (ACTING.Acting, "__call__", act_with_modules)
BUFFER_GET: Patch = (LEARNER.R2VPO, "_minibatches", minibatches_of_sb3)


def make_arms(mode: str, minibatches: dict[str, tuple[Patch, ...]]) -> dict[str, tuple[Patch, ...]]:
    """
    :param mode: "eager" or "compiled"
    :param minibatches: What takes the place of minibatches cut from few tensors; the last one is part of "no part"
    :return: What to patch for each arm
    """
    *_, plainest = minibatches.values()
    arms: dict[str, tuple[Patch, ...]] = {"all parts": (), "all parts, again": ()}
    if mode == "eager":
        arms |= {
            "backward by autograd": (BACKWARD,),
            "backward by autograd, evaluation by distributions": (BACKWARD, EVALUATION),
            "torch's Adam": (ADAM,),
            "torch's fused Adam": (FUSED,),
        }
    else:
        arms |= {
            "evaluation by distributions": (EVALUATION,),
            "evaluation by distributions, then dropped": (FORGETFUL,),
        }
    arms |= {
        "collection by modules and distributions": (COLLECTION,),
        "collection by modules alone": (MODULES,),
        **minibatches,
    }
    if mode == "eager":
        none = (BACKWARD, EVALUATION, COLLECTION, *plainest)
        return {**arms, "no part, torch's fused Adam": (FUSED, *none), "no part": (ADAM, *none)}
    # With distributions that don't break the step in two
    return {**arms, "no part but Adam in the compiled step": (FORGETFUL, COLLECTION, *plainest)}


def default_model(env: str) -> Callable[[str], OnPolicyAlgorithm]:
    def make(mode: str) -> OnPolicyAlgorithm:
        options = {"seed": 0, "device": "cpu"}
        if mode == "ppo":
            return PPO("MlpPolicy", env, **options)
        return LEARNER.R2VPO("MlpPolicy", env, compile=mode == "compiled", **options)

    return make


def shipped_model(method: str) -> Callable[[str], OnPolicyAlgorithm]:
    def make(mode: str) -> OnPolicyAlgorithm:
        chosen = METHODS["ppo" if mode == "ppo" else method]
        own = {} if mode == "ppo" else {"compile": mode == "compiled"}
        return make_model(chosen.algorithm, {**chosen.settings("cheetah-run"), **own}, "cheetah-run", seed=0)

    return make


ONE_BY_ONE = {"minibatches indexed one by one": INDEXED}
WITH_BUFFER = {**ONE_BY_ONE, "minibatches of RolloutBuffer.get": (BUFFER_GET,)}
#: Name: what makes a model, what takes the place of minibatches, environment steps timed in one go (two rollouts)
SETTINGS: dict[str, tuple[Callable[[str], OnPolicyAlgorithm], dict[str, tuple[Patch, ...]], int]] = {
    "cheetah-run on EnvPool, shipped R2VPO": (shipped_model("r2vpo"), ONE_BY_ONE, 2 * 4096),
    "cheetah-run on EnvPool, shipped R2VPOOff": (shipped_model("r2vpo_off"), ONE_BY_ONE, 2 * 4096),
    "Pendulum-v1, default arguments": (default_model("Pendulum-v1"), WITH_BUFFER, 2 * 2048),
    "HalfCheetah-v5, default arguments": (default_model("HalfCheetah-v5"), WITH_BUFFER, 2 * 2048),
}


def patched(patches: tuple[Patch, ...], function: Callable[[], Any]) -> Any:
    """The patches are global to the modules, and there while the function runs."""
    with ExitStack() as stack:
        for change in patches:
            stack.enter_context(patch.object(*change))
        return function()


def make_training(make: Callable[[str], OnPolicyAlgorithm], mode: str, patches: tuple[Patch, ...], n_timesteps: int) -> Any:
    """:return: A function that times `learn()`, in microseconds of wall and of CPU time for each step, and its model"""
    model = patched(patches, lambda: make(mode))
    # Compiled, allocated, and with a full replay
    patched(patches, lambda: model.learn(2 * n_timesteps))

    def train() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        model.learn(n_timesteps, reset_num_timesteps=False)
        return 1e6 * (time.perf_counter() - wall) / n_timesteps, 1e6 * (time.process_time() - cpu) / n_timesteps

    return lambda: patched(patches, train), model


def compare(setting: str, mode: str, rounds: int) -> pd.DataFrame:
    make, minibatches, n_timesteps = SETTINGS[setting]
    arms, models = {}, {}
    for arm, patches in make_arms(mode, minibatches).items():
        arms[arm], models[arm] = make_training(make, mode, patches, n_timesteps)
    check(mode, models)
    arms["PPO, SB3's class"], _ = make_training(make, "ppo", (), n_timesteps)
    times = interleave(arms, rounds)
    th._dynamo.reset()
    rows = pd.DataFrame(
        [(setting, mode, arm, *np.median(seconds, axis=0)) for arm, seconds in times.items()],
        columns=["setting", "mode", "arm", "wall_us_a_step", "cpu_us_a_step"],
    )
    for column in ("wall", "cpu"):
        rows[f"over_all_parts_{column}"] = (rows[f"{column}_us_a_step"] / rows[f"{column}_us_a_step"][0]).round(3)
    rows["rounds"], rows["load"] = rounds, load()
    rows["versions"], rows["processor"] = package_versions(), processor()
    return rows.round({"wall_us_a_step": 1, "cpu_us_a_step": 1})


def weights(model: OnPolicyAlgorithm) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


def check(mode: str, models: dict[str, OnPolicyAlgorithm]) -> None:
    """In eager mode all arms but those with a fused Adam are to make the same updates, bit for bit."""
    for arm, model in models.items():
        same = th.equal(weights(model), weights(models["all parts"]))
        assert mode == "compiled" or "fused" in arm or same, arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="what the names of settings begin with; default: all")
    parser.add_argument("--mode", choices=["eager", "compiled"], help="default: both")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    assert Path(sb3_r2vpo.__file__).is_relative_to(Path.cwd()), f"{sb3_r2vpo.__file__} is not of the working directory"
    th.set_num_threads(1)
    tables = []
    for setting in SETTINGS:
        if args.settings and not setting.startswith(tuple(args.settings)):
            continue
        for mode in [args.mode] if args.mode else ["eager", "compiled"]:
            tables.append(compare(setting, mode, args.rounds))
            print(tables[-1].drop(columns=["setting", "versions", "processor"]).to_string(), flush=True)
    if not args.settings and not args.mode:
        pd.concat(tables).to_csv(HERE / "results" / "ablation.csv", index=False)


if __name__ == "__main__":
    main()
