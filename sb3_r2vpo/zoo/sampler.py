"""What Optuna tunes: the ratio-variance constraint, the replay of R2VPO-OFF, and the settings shared with PPO."""

from typing import Any

import optuna

from sb3_r2vpo.zoo.settings import ACTIVATIONS

NET_ARCHS = {"small": [64, 64], "medium": [128, 128], "large": [256, 256]}


def sample_r2vpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for R2VPO's hyperparameters.

    All parameters are sampled in every trial, also those that a fixed multiplier ignores: the Zoo's multivariate TPE models
    the parameters that all trials have in common, and falls back to independent sampling for the others.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the action space; unused, the Zoo passes it to every sampler
    :param n_envs: Number of environments; unused
    :param additional_args: Arguments for HER; unused
    :return: Arguments of R2VPO
    """
    # The multiplier lambda: adaptive from an initial value, or fixed at it
    trial.suggest_categorical("multiplier", ["adaptive", "fixed"])
    trial.suggest_float("initial_var_coef", 0.01, 10.0, log=True)
    trial.suggest_float("target_variance", 0.003, 0.3, log=True)
    trial.suggest_float("dual_learning_rate", 0.003, 1.0, log=True)
    trial.suggest_categorical("min_var_coef", [0.0, 0.5, 1.0])

    # From 2**4=16 to 2**11=2048; a batch larger than the rollout is the whole rollout
    trial.suggest_int("n_steps_pow", 4, 11)
    # From 2**5=32 to 2**12=4096
    trial.suggest_int("batch_size_pow", 5, 12)
    trial.suggest_int("n_epochs", 1, 30, log=True)
    trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True)
    trial.suggest_float("one_minus_gamma", 0.0005, 0.05, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.005, 0.3, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 3.0, log=True)

    trial.suggest_categorical("net_arch", list(NET_ARCHS))
    trial.suggest_categorical("activation_fn", ["tanh", "relu", "silu"])
    trial.suggest_float("log_std_init", -2.0, 0.0)
    # The Zoo shows its users the true values of what was sampled as another quantity
    hyperparams = convert_r2vpo_params(trial.params)
    for name in ("var_coef", "n_steps", "batch_size", "gamma", "gae_lambda"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def sample_r2vpo_off_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for R2VPOOff's hyperparameters: R2VPO's and those of the replay.

    :param trial: Optuna's trial
    :param n_actions: see :func:`sample_r2vpo_params`
    :param n_envs: see :func:`sample_r2vpo_params`
    :param additional_args: see :func:`sample_r2vpo_params`
    :return: Arguments of R2VPOOff
    """
    trial.suggest_int("replay_capacity", 1, 8, log=True)
    trial.suggest_float("utd_ratio", 0.5, 4.0, log=True)
    return sample_r2vpo_params(trial, n_actions, n_envs, additional_args)


def convert_r2vpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into arguments of R2VPO or R2VPOOff, in a trial and when ``--trial-id`` loads it again.

    :param sampled_params: A trial's parameters
    :return: Arguments of the algorithm
    """
    hyperparams = dict(sampled_params)
    initial_var_coef = hyperparams.pop("initial_var_coef")
    hyperparams["var_coef"] = f"auto_{initial_var_coef}" if hyperparams.pop("multiplier") == "adaptive" else initial_var_coef
    for name in ("n_steps", "batch_size"):
        hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    for name in ("gamma", "gae_lambda"):
        hyperparams[name] = 1 - hyperparams.pop(f"one_minus_{name}")
    hyperparams["objective_kwargs"] = {name: hyperparams.pop(name) for name in ("dual_learning_rate", "min_var_coef")}
    hyperparams["policy_kwargs"] = {
        "net_arch": NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": ACTIVATIONS[hyperparams.pop("activation_fn")],
        "log_std_init": hyperparams.pop("log_std_init"),
    }
    return hyperparams
