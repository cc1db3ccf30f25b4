"""What Optuna tunes: the ratio-variance constraint, the replay of R2VPO-OFF, and the settings shared with PPO."""

from collections.abc import Callable, Sequence
from typing import Any

import optuna

from sb3_r2vpo.zoo.settings import ACTIVATIONS

NET_ARCHS = {"small": [64, 64], "medium": [128, 128], "large": [256, 256]}

#: What R2VPO's constraint consists of: a baseline objective has none of it
CONSTRAINT = ("var_coef", "target_variance", "dual_learning_rate", "min_var_coef")
#: Mappings among the arguments, and which of their entries are sampled
MAPPINGS = {
    "objective_kwargs": ("dual_learning_rate", "min_var_coef"),
    "policy_kwargs": ("net_arch", "activation_fn", "log_std_init"),
}


def _sample_multiplier(trial: optuna.Trial) -> None:
    # The multiplier lambda: adaptive from an initial value, or fixed at it
    trial.suggest_categorical("multiplier", ["adaptive", "fixed"])
    trial.suggest_float("initial_var_coef", 0.01, 10.0, log=True)


#: How each argument of R2VPO is sampled
SEARCH_SPACE: dict[str, Callable[[optuna.Trial], Any]] = {
    "var_coef": _sample_multiplier,
    "target_variance": lambda trial: trial.suggest_float("target_variance", 0.003, 0.3, log=True),
    "dual_learning_rate": lambda trial: trial.suggest_float("dual_learning_rate", 0.003, 1.0, log=True),
    "min_var_coef": lambda trial: trial.suggest_categorical("min_var_coef", [0.0, 0.5, 1.0]),
    # From 2**4=16 to 2**11=2048; a batch larger than the rollout is the whole rollout
    "n_steps": lambda trial: trial.suggest_int("n_steps_pow", 4, 11),
    # From 2**5=32 to 2**12=4096
    "batch_size": lambda trial: trial.suggest_int("batch_size_pow", 5, 12),
    "n_epochs": lambda trial: trial.suggest_int("n_epochs", 1, 30, log=True),
    "learning_rate": lambda trial: trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
    "gamma": lambda trial: trial.suggest_float("one_minus_gamma", 0.0005, 0.05, log=True),
    "gae_lambda": lambda trial: trial.suggest_float("one_minus_gae_lambda", 0.005, 0.3, log=True),
    "ent_coef": lambda trial: trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
    "max_grad_norm": lambda trial: trial.suggest_float("max_grad_norm", 0.3, 3.0, log=True),
    "net_arch": lambda trial: trial.suggest_categorical("net_arch", list(NET_ARCHS)),
    "activation_fn": lambda trial: trial.suggest_categorical("activation_fn", ["tanh", "relu", "silu"]),
    "log_std_init": lambda trial: trial.suggest_float("log_std_init", -2.0, 0.0),
}
#: How R2VPOOff's are
OFF_SEARCH_SPACE: dict[str, Callable[[optuna.Trial], Any]] = {
    "replay_capacity": lambda trial: trial.suggest_int("replay_capacity", 1, 8, log=True),
    "utd_ratio": lambda trial: trial.suggest_float("utd_ratio", 0.5, 4.0, log=True),
    **SEARCH_SPACE,
}


def check_only(only: Sequence[str], space: dict[str, Callable[[optuna.Trial], Any]]) -> None:
    """
    :param only: ``--only``, arguments to sample
    :param space: Those that can be
    :raises ValueError: One of them is not.
    """
    if unknown := [name for name in only if name not in space]:
        raise ValueError(f"`--only` has {', '.join(unknown)}; what can be tuned is {', '.join(space)}.")


def sample_r2vpo_params(
    trial: optuna.Trial,
    n_actions: int,
    n_envs: int,
    additional_args: dict[str, Any],
    *,
    settings: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
    space: dict[str, Callable[[optuna.Trial], Any]] = SEARCH_SPACE,
) -> dict[str, Any]:
    """
    Sampler for R2VPO's hyperparameters.

    All parameters are sampled in every trial, also those that a fixed multiplier ignores: the Zoo's multivariate TPE models
    the parameters that all trials have in common, and falls back to independent sampling for the others.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the action space; unused, the Zoo passes it to every sampler
    :param n_envs: Number of environments; unused
    :param additional_args: Arguments for HER; unused
    :param settings: The other arguments of the algorithm. Entries of its mappings that are not sampled stay; with a baseline
        as ``objective``, the constraint is not sampled.
    :param only: Arguments to sample, see ``SEARCH_SPACE``; the others stay as in the settings. By default, all.
    :param space: How they are sampled
    :return: Arguments of R2VPO
    """
    settings = settings or {}
    is_baseline = not settings.get("objective", "r2vpo").startswith("r2vpo")
    for name, suggest in space.items():
        if (only is None or name in only) and not (is_baseline and name in CONSTRAINT):
            suggest(trial)
    hyperparams = convert_r2vpo_params(trial.params)
    # The Zoo shows its users the true values of what was sampled as another quantity
    for name in ("var_coef", "n_steps", "batch_size", "gamma", "gae_lambda"):
        if name in hyperparams:
            trial.set_user_attr(name, hyperparams[name])
    return merged(settings, hyperparams)


def sample_r2vpo_off_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """
    Sampler for R2VPOOff's hyperparameters: R2VPO's and those of the replay.

    :param trial: Optuna's trial
    :param n_actions: see :func:`sample_r2vpo_params`
    :param n_envs: see :func:`sample_r2vpo_params`
    :param additional_args: see :func:`sample_r2vpo_params`
    :param options: see :func:`sample_r2vpo_params`
    :return: Arguments of R2VPOOff
    """
    return sample_r2vpo_params(trial, n_actions, n_envs, additional_args, **{"space": OFF_SEARCH_SPACE, **options})


def convert_r2vpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into arguments of R2VPO or R2VPOOff, in a trial and when ``--trial-id`` loads it again.

    :param sampled_params: A trial's parameters
    :return: Arguments of the algorithm
    """
    hyperparams = dict(sampled_params)
    if "initial_var_coef" in hyperparams:
        initial_var_coef = hyperparams.pop("initial_var_coef")
        is_adaptive = hyperparams.pop("multiplier") == "adaptive"
        hyperparams["var_coef"] = f"auto_{initial_var_coef}" if is_adaptive else initial_var_coef
        if not is_adaptive:
            for name in CONSTRAINT[1:]:
                hyperparams.pop(name, None)
    for name in ("n_steps", "batch_size"):
        if f"{name}_pow" in hyperparams:
            hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    for name in ("gamma", "gae_lambda"):
        if f"one_minus_{name}" in hyperparams:
            hyperparams[name] = 1 - hyperparams.pop(f"one_minus_{name}")
    readers: dict[str, Callable[[Any], Any]] = {"net_arch": NET_ARCHS.get, "activation_fn": ACTIVATIONS.get}
    for mapping, names in MAPPINGS.items():
        entries = {
            name: readers.get(name, lambda value: value)(hyperparams.pop(name)) for name in names if name in hyperparams
        }
        if entries:
            hyperparams[mapping] = entries
    return hyperparams


def merged(settings: dict[str, Any], sampled: dict[str, Any]) -> dict[str, Any]:
    """
    :param settings: The arguments so far
    :param sampled: Those that were sampled
    :return: These, with mappings completed by what the settings have in them besides
    """
    return {
        name: {**(settings.get(name) or {}), **value} if isinstance(value, dict) else value for name, value in sampled.items()
    }
