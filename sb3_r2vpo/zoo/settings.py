"""Settings files: where they are found, and what their plain values stand for."""

from importlib.resources import files
from importlib.util import find_spec
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
    Make schedules of the ``lin_<initial value>`` among hyperparameters: linear, down to zero.

    The Zoo's own ``SimpleLinearSchedule`` goes below zero in a last rollout that overshoots the number of timesteps, where
    a negative coefficient would reward what it should penalise; SB3's ``LinearSchedule`` stays at its end.

    :param hyperparams: Hyperparameters as in a settings file
    :return: The schedules, and all other hyperparameters
    """
    schedules, others = {}, {}
    for name, value in hyperparams.items():
        if name in SCHEDULES and isinstance(value, str) and value.startswith("lin_"):
            try:
                schedules[name] = LinearSchedule(float(value.removeprefix("lin_")), end=0.0, end_fraction=1.0)
            except ValueError as error:
                raise ValueError(f"`{name}` is {value!r}; a schedule is 'lin_<initial value>', such as 'lin_0.02'.") from error
        else:
            others[name] = value
    return schedules, others


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
