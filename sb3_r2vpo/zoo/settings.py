"""Settings files: where they are found, and what their plain values stand for."""

import os
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rl_zoo3 import ALGOS
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

#: Activation functions by the name that a settings file gives; the Zoo would evaluate a string as Python code.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

#: Hyperparameters that "lin_<initial value>" makes a schedule: the Zoo's four, and R2VPO's four.
SCHEDULES = (
    *("learning_rate", "clip_range", "clip_range_vf", "delta_std"),
    *("var_coef", "target_variance", "ent_coef", "noise_exponent"),
)

#: Multiply-adds of a minibatch with the weights of one layer from which on two threads are worth it. How many times as fast
#: R2VPO's updates are with two as with one, on two cores that do nothing else (AMD EPYC, PyTorch 2.13):
#:   two layers of 64, minibatches of 64: 0.86; of 512: 1.03            two layers of 128, 512: 1.25
#:   two layers of 256, 64: 1.3; 256 and 512: 1.7; 1024: 1.8            five layers of 256, 4096: 1.8
#:   NatureCNN, 64: 1.7; 256: 1.8
#: Where another program has one of the cores, they wait for each other, and were up to ten times slower. So two are taken
#: where nearly all of the second core is gained, and not for DM Control's settings, whose seeds are run side by side.
TWO_THREADS_FROM = 2**26
#: Of an image, in the first layer of SB3's `NatureCNN`, which is its largest: 32 filters of 4 x 8 x 8 at 20 x 20 places
NATURE_CNN = 32 * 4 * 8 * 8 * 20 * 20


def choose_num_threads(hyperparams: dict[str, Any]) -> int:
    """
    How many threads PyTorch is to use for an algorithm's networks.

    :param hyperparams: The algorithm's arguments
    :return: One, or two if there are as many CPUs and products of a minibatch with a hidden layer's weights are large
    """
    widths = (hyperparams.get("policy_kwargs") or {}).get("net_arch", [64, 64])
    networks = widths.values() if isinstance(widths, dict) else [widths]
    n_weights = max((inputs * outputs for network in networks for inputs, outputs in pairwise(network)), default=0)
    if hyperparams.get("policy") == "CnnPolicy":
        n_weights = max(n_weights, NATURE_CNN)
    is_large = hyperparams.get("batch_size", 64) * n_weights >= TWO_THREADS_FROM
    return min(2 if is_large else 1, os.cpu_count() or 1)


def find_settings(algo: str, env_id: str, conf_file: str | None = None) -> str | None:
    """
    Where the hyperparameters of an algorithm on an environment are read from.

    :param algo: The algorithm, such as ``r2vpo``
    :param env_id: The environment
    :param conf_file: What ``--conf-file`` says: the name of settings in this package (``paper`` for ``r2vpo_paper.yml``), or a
        file or Python module as in the Zoo. By default, this package's file for the algorithm if it has the environment.
    :return: What to give the Zoo as its ``config``; None for the Zoo's own file
    :raises ValueError: There are no settings of this name
    """
    folder = Path(str(files("sb3_r2vpo.hyperparams")))
    if conf_file is not None:
        named = folder / f"{algo}_{conf_file}.yml"
        if named.is_file():
            return str(named)
        if conf_file.isidentifier() and find_spec(conf_file) is None:
            names = [path.stem.removeprefix(f"{algo}_") for path in folder.glob(f"{algo}_*.yml") if path.stem not in ALGOS]
            raise ValueError(
                f"`--conf-file {conf_file}` is neither a Python module nor named settings of {algo}, which are: "
                f"{', '.join(sorted(names)) or 'none'}. A file is given with its suffix, such as {conf_file}.yml."
            )
        return conf_file
    shipped = folder / f"{algo}.yml"
    if shipped.is_file() and {env_id, "default"} & yaml.safe_load(shipped.read_text()).keys():
        return str(shipped)
    return None


def split_schedules(hyperparams: dict[str, Any]) -> tuple[dict[str, LinearSchedule], dict[str, Any]]:
    """
    Make schedules of the ``lin_<initial value>`` among hyperparameters, and among ``objective_kwargs``: linear, down to zero.

    The Zoo's own ``SimpleLinearSchedule`` goes below zero in a last rollout that overshoots the number of timesteps, where
    a negative coefficient would reward what it should penalise; SB3's ``LinearSchedule`` stays at its end.

    :param hyperparams: Hyperparameters as in a settings file
    :return: The schedules, and all other hyperparameters
    """
    schedules = {name: _schedule(name, hyperparams[name]) for name in SCHEDULES if _is_schedule(hyperparams.get(name))}
    others = {name: value for name, value in hyperparams.items() if name not in schedules}
    options = others.get("objective_kwargs")
    if isinstance(options, dict):
        of_options = {name: _schedule(name, value) for name, value in options.items() if _is_schedule(value)}
        others["objective_kwargs"] = {**options, **of_options}
    return schedules, others


def _is_schedule(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("lin_")


def _schedule(name: str, value: str) -> LinearSchedule:
    try:
        return LinearSchedule(float(value.removeprefix("lin_")), end=0.0, end_fraction=1.0)
    except ValueError as error:
        raise ValueError(f"`{name}` is {value!r}; a schedule is 'lin_<initial value>', such as 'lin_0.02'.") from error


def resolve_activation(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Replace the name of an activation function by its class.

    :param policy_kwargs: As in a settings file
    :return: A copy for the policy's constructor
    """
    name = policy_kwargs.get("activation_fn")
    if not isinstance(name, str):
        return policy_kwargs
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown `activation_fn` {name!r} in `policy_kwargs`; choose one of {', '.join(ACTIVATIONS)}.")
    return {**policy_kwargs, "activation_fn": ACTIVATIONS[name]}
