"""The RL Baselines3 Zoo with R2VPO in it: the command line ``r2vpo``, tuned settings, Optuna samplers, learning curves."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_r2vpo.zoo.manager import ExperimentManager

__all__ = ["ExperimentManager", "register"]


def __getattr__(name: str) -> Any:
    # On first use: without the extra `zoo`, the command line has to be imported to say so
    if name == "ExperimentManager":
        from sb3_r2vpo.zoo.manager import ExperimentManager

        return ExperimentManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """
    Register R2VPO with the Zoo: ``r2vpo``, ``r2vpo_off``, ``r2vpo_lstm`` (recurrent) and ``r2vpo_mask`` (invalid actions).

    Of the last one the Zoo can train, evaluate on the way and continue; its scripts for tuning and watching have no masks.

    It has to happen before ``rl_zoo3.train.train()`` parses its command line, whose ``--algo`` offers what is registered by
    then; the Zoo's own ``--gym-packages`` comes too late.
    """
    import rl_zoo3.train
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_r2vpo import R2VPO, MaskableR2VPO, R2VPOOff, RecurrentR2VPO
    from sb3_r2vpo.zoo.manager import ExperimentManager
    from sb3_r2vpo.zoo.sampler import convert_r2vpo_params, sample_r2vpo_off_params, sample_r2vpo_params

    rl_zoo3.ALGOS.update(r2vpo=R2VPO, r2vpo_off=R2VPOOff, r2vpo_lstm=RecurrentR2VPO, r2vpo_mask=MaskableR2VPO)
    samplers = {"r2vpo": sample_r2vpo_params, "r2vpo_off": sample_r2vpo_off_params, "r2vpo_lstm": sample_r2vpo_params}
    HYPERPARAMS_SAMPLER.update(samplers)
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(samplers, convert_r2vpo_params))
    rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]
