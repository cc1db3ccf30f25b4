"""The Zoo's experiment manager: each method here calls the Zoo's own, and mends or adds one thing."""

import math
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import rl_zoo3.exp_manager
import torch as th
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager as ZooExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from rl_zoo3.utils import get_latest_run_id
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from sb3_r2vpo.zoo.companions import find_companion, replaced
from sb3_r2vpo.zoo.plots import plot_study
from sb3_r2vpo.zoo.settings import choose_num_threads, find_settings, resolve_activation, split_schedules


class ExperimentManager(ZooExperimentManager):
    """
    The Zoo's experiment manager, for all its algorithms and ours.

    :param args: The Zoo's command line, parsed
    :param algo: The algorithm's name in ``rl_zoo3.ALGOS``
    :param env_id: The environment
    :param config: ``--conf-file``, see :func:`~sb3_r2vpo.zoo.settings.find_settings`
    :param trial_id: ``--trial-id``: take the hyperparameters of this trial of the study, those of the command line before it
    :param envpool: Whether to step the environments with EnvPool
    :param choose_threads: Whether to set the number of PyTorch's threads by the size of networks and minibatches
    :param options: The Zoo's other arguments
    :raises ValueError: The trial or its study does not exist
    """

    def __init__(
        self,
        args: Namespace,
        algo: str,
        env_id: str,
        *positional: Any,
        config: str | None = None,
        trial_id: int | None = None,
        envpool: bool = False,
        choose_threads: bool = False,
        **options: Any,
    ) -> None:
        options["config"] = find_settings(algo, env_id, config)
        super().__init__(args, algo, env_id, *positional, **options)
        self.envpool, self.choose_threads = envpool, choose_threads
        if envpool:
            # Keep a true record in the run's `args.yml`: the Zoo's parser has no such choice
            args.vec_env = "envpool"
        if trial_id is not None:
            # The Zoo tests whether the id is true, so that it ignores trial 0, or an id without its study
            self.custom_hyperparams = {**self._load_trial(trial_id), **(self.custom_hyperparams or {})}

    def _load_trial(self, trial_id: int) -> dict[str, Any]:
        trials = self._load_study().trials
        if not 0 <= trial_id < len(trials):
            raise ValueError(f"Study {self.study_name!r} has the trials 0 to {len(trials) - 1}, not {trial_id}.")
        return HYPERPARAMS_CONVERTER[self.algo](trials[trial_id].params)

    def _load_study(self) -> optuna.Study:
        if self.storage is None or self.study_name is None:
            raise ValueError("Loading a trial takes `--storage` and `--study-name` besides `--trial-id`.")
        storage: Any = self.storage
        if storage.endswith(".log"):
            if not os.path.isfile(storage):  # Optuna would create it
                raise ValueError(f"There is no study storage {storage}.")
            storage = JournalStorage(JournalFileBackend(storage))
        try:
            return optuna.load_study(study_name=self.study_name, storage=storage)
        except KeyError as error:
            names = optuna.get_all_study_names(storage)
            raise ValueError(f"{self.storage} has no study {self.study_name!r}, but {', '.join(names) or 'none'}.") from error

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        schedules, others = split_schedules(hyperparams)
        return {**ZooExperimentManager._preprocess_schedules(others), **schedules}

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        if isinstance(hyperparams.get("policy_kwargs"), dict):
            hyperparams = {**hyperparams, "policy_kwargs": resolve_activation(hyperparams["policy_kwargs"])}
        processed = super()._preprocess_hyperparams(hyperparams)
        if self.choose_threads:
            # In `args.yml` as well
            self.args.num_threads = choose_num_threads(processed[0])
            th.set_num_threads(self.args.num_threads)
        return processed

    def create_log_folder(self) -> None:
        if self.optimize_hyperparameters:
            # A study is no run: `enjoy` would take the empty folder for the latest one
            os.makedirs(self.log_path, exist_ok=True)
            return
        # Runs started together read the same latest id, and would write into each other's files
        while True:
            with suppress(FileExistsError):
                os.makedirs(self.save_path)
                break
            run_id = get_latest_run_id(self.log_path, self.env_name) + 1
            self.save_path = os.path.join(self.log_path, f"{self.env_name}_{run_id}")
        self.params_path = f"{self.save_path}/{self.env_name}"
        super().create_log_folder()

    def create_callbacks(self) -> None:
        is_masked = self.algo == "r2vpo_mask"
        with replaced(rl_zoo3.exp_manager, EvalCallback=MaskableEvalCallback if is_masked else EvalCallback):
            super().create_callbacks()
        # The Zoo overwrites the best model's statistics with the final ones, and saves none with checkpoints
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = True
                callback.save_replay_buffer = self.save_replay_buffer
            elif isinstance(callback, EvalCallback) and self.normalize:
                callback.callback_on_new_best = SaveVecNormalizeCallback(
                    save_freq=1, save_path=os.path.join(self.save_path, "best_model")
                )

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        no_log = no_log or self.optimize_hyperparameters
        if self.envpool:
            env_kwargs = self.eval_env_kwargs if eval_env else self.env_kwargs
            if self.env_wrapper is not None or env_kwargs or self.monitor_kwargs:
                raise ValueError(
                    "EnvPool makes its environments itself: `env_wrapper`, `env_kwargs` and `monitor_kwargs` have no effect "
                    "on them. Use `vec_env_wrapper`, or `--vec-env dummy`."
                )
            # SB3's `make_vec_env` hands this a function for each environment, of which EnvPool takes but the number
            self.vec_env_class = partial(  # type: ignore[assignment]
                make_envpool,
                env_id=self.env_name.gym_id,
                seed=self.seed,
                # Evaluations are of whole episodes
                stagger=not eval_env,
                monitor_path=None if eval_env or no_log else os.path.join(self.save_path, "0"),
            )
        return super().create_envs(n_envs, eval_env, no_log)

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        statistics = find_companion(self.trained_agent, "vecnormalize") if self.continue_training else None
        if statistics is None:
            return super()._maybe_normalize(env, eval_env)
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        replay_buffer = find_companion(self.trained_agent, "replay_buffer")
        if replay_buffer is not None:
            model.load_replay_buffer(replay_buffer)  # type: ignore[attr-defined]
        return model

    def objective(self, trial: optuna.Trial) -> float:
        # The Zoo prunes a trial for AssertionError and ValueError only; any other error of a trial that diverges, such as
        # `torch.multinomial`'s RuntimeError for NaN probabilities or a lack of memory, would end the study
        try:
            reward = super().objective(trial)
        except (ArithmeticError, RuntimeError) as error:
            print(f"Trial {trial.number} failed: {error!r}")
            raise optuna.TrialPruned from error
        if not math.isfinite(reward):
            raise optuna.TrialPruned(f"The mean reward is {reward}.")
        return reward

    def hyperparameters_optimization(self) -> None:
        draw, self.no_optim_plots = not self.no_optim_plots, True  # the Zoo's need plotly and a browser
        super().hyperparameters_optimization()
        if draw and self.storage is not None and self.study_name is not None:
            plot_study(self._load_study(), Path(self.log_path))


def make_envpool(env_fns: list[Callable], env_id: str, seed: int, stagger: bool, monitor_path: str | None) -> VecEnv:
    """
    Environments stepped by EnvPool, in the shape of a ``VecEnv`` class's constructor.

    :param env_fns: A function for each environment
    :param env_id: The environment
    :param seed: Seed of the environments
    :param stagger: Whether their episodes are to be at different phases, see :class:`~sb3_r2vpo.envs.EnvPoolVecEnv`
    :param monitor_path: Where to log episodes, in place of the ``Monitor`` around each environment
    """
    from sb3_r2vpo.envs import EnvPoolVecEnv

    with warnings.catch_warnings():
        # It has the statistics already, but SB3 copies normalization statistics between environments of equal wrappers only,
        # so that evaluations get the wrapper that training needs for its file
        warnings.filterwarnings("ignore", message="The environment is already wrapped with a `Monitor`")
        return VecMonitor(EnvPoolVecEnv(env_id, len(env_fns), seed=seed, stagger=stagger), filename=monitor_path)
