"""The Zoo's experiment manager: each method here calls the Zoo's own, and mends or adds one thing."""

import math
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import rl_zoo3.exp_manager
import torch as th
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager as ZooExperimentManager
from rl_zoo3.utils import get_latest_run_id
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from sb3_r2vpo.common.saving import load_normalization
from sb3_r2vpo.common.worker_vec_env import WorkerVecEnv
from sb3_r2vpo.envs.dm_control import MAX_EPISODE_STEPS
from sb3_r2vpo.zoo.companions import find_companion, replaced
from sb3_r2vpo.zoo.plots import CUT_OFF
from sb3_r2vpo.zoo.running import Running
from sb3_r2vpo.zoo.sampler import merged
from sb3_r2vpo.zoo.settings import choose_num_threads, find_settings, resolve_activation, split_schedules
from sb3_r2vpo.zoo.tensorboard import TensorBoardLayout
from sb3_r2vpo.zoo.trust import check_settings
from sb3_r2vpo.zoo.tuning import TuningManager


class ExperimentManager(Running, TuningManager):
    """
    The Zoo's experiment manager, for all its algorithms and ours.

    :param args: The Zoo's command line, parsed
    :param algo: The algorithm's name in ``rl_zoo3.ALGOS``
    :param env_id: The environment
    :param config: ``--conf-file``, see :func:`~sb3_r2vpo.zoo.settings.find_settings`
    :param envpool: Whether to step the environments with EnvPool
    :param choose_threads: Whether to set the number of PyTorch's threads by the size of networks and minibatches
    :param trial: ``--trial-id``: take the hyperparameters of this trial of the study, a number or "best"; those of the command
        line come before it
    :param only: ``--only``: the arguments to tune; by default, all that can be
    :param run: ``--resume``: the folder of the run that goes on
    :param trust: Whether files may run code
    :param env_timeout: Seconds that an environment in a process of its own may take for an answer
    :param restart_envs: Whether such a process is started anew if it fails
    :param options: The Zoo's other arguments
    :raises ValueError: The trial or its study does not exist, or the trial has no result
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
        trial: str | None = None,
        only: Sequence[str] | None = None,
        run: Path | None = None,
        trust: bool = False,
        env_timeout: float | None = None,
        restart_envs: bool = False,
        **options: Any,
    ) -> None:
        options["config"] = find_settings(algo, env_id, config)
        super().__init__(args, algo, env_id, *positional, **options)
        self.envpool, self.choose_threads, self.only, self.trust = envpool, choose_threads, only, trust
        self._check_only()
        self.packages: Sequence[str] = getattr(args, "gym_packages", [])
        if envpool:
            # Keep a true record in the run's `args.yml`: the Zoo's parser has no such choice
            args.vec_env = "envpool"
        elif options.get("vec_env_type") == "subproc" and sys.platform != "win32":
            self.vec_env_class = WorkerVecEnv
            # A record of these as well
            args.env_timeout, args.restart_envs = env_timeout, restart_envs
            self.vec_env_kwargs = {"restart": restart_envs} | ({} if env_timeout is None else {"timeout": env_timeout})
        self.trial_hyperparams: dict[str, Any] = {}
        trial_id = trial if trial is not None else trial_id  # type: ignore[assignment]
        if trial_id is not None:
            # The Zoo tests whether the id is true, so that it ignores trial 0, or an id without its study
            args.trial_id, self.trial_hyperparams = self._load_trial(trial_id)
        self._choose_run(run)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.run is not None:
            return self._read_run_hyperparameters()
        with replaced(rl_zoo3.exp_manager, pprint=lambda _: None):
            hyperparams, _ = super().read_hyperparameters()
        given = self.custom_hyperparams or {}
        sampled = {name: value for name, value in self.trial_hyperparams.items() if name not in given}
        hyperparams = {**hyperparams, **merged(hyperparams, sampled)}
        saved = dict(sorted(hyperparams.items()))
        print("Hyperparameters:")
        rl_zoo3.exp_manager.pprint(saved)
        return hyperparams, saved

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        schedules, others = split_schedules(hyperparams)
        return {**ZooExperimentManager._preprocess_schedules(others), **schedules}

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        if not self.trust:
            check_settings(hyperparams, self.packages)
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
        if self.run is not None:
            return
        # Runs started together read the same latest id, and would write into each other's files
        while True:
            with suppress(FileExistsError):
                os.makedirs(self.save_path)
                self.made_folder = self.save_path
                break
            run_id = get_latest_run_id(self.log_path, self.env_name) + 1
            self.save_path = os.path.join(self.log_path, f"{self.env_name}_{run_id}")
        self.params_path = f"{self.save_path}/{self.env_name}"
        super().create_log_folder()

    def create_callbacks(self) -> None:
        is_masked = self.algo == "r2vpo_mask"
        with replaced(rl_zoo3.exp_manager, EvalCallback=MaskableEvalCallback if is_masked else EvalCallback):
            super().create_callbacks()
        if self.tensorboard_log is not None and self.algo.startswith("r2vpo"):
            self.callbacks.append(TensorBoardLayout())
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
                append=self.appends,
            )
        if self.appends and not eval_env:
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
        env = super().create_envs(n_envs, eval_env, no_log)
        if eval_env:
            self.monitor_kwargs.pop("override_existing", None)
        return env

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if not self.continue_training:
            # The Zoo would look for statistics of a run in the working directory
            kwargs = {**self.normalize_kwargs, **({"norm_reward": False, "training": False} if eval_env else {})}
            return VecNormalize(env, **kwargs) if self.normalize else env
        statistics = self._statistics()
        if statistics is None:
            return env
        env = load_normalization(str(statistics), env, self.trust)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def _statistics(self) -> Path | None:
        """
        :return: The statistics that the model of ``-i`` was saved with; ``None`` where there is no normalization
        :raises ValueError: They are missing.
        """
        model = Path(self.trained_agent)
        is_earlier = model.stem.startswith(("best_model", "rl_model_"))
        final = model.parent / self.env_name / "vecnormalize.pkl"
        statistics = find_companion(self.trained_agent, "vecnormalize")
        if statistics is None and not is_earlier and final.is_file():
            statistics = final
        if statistics is None and self.normalize:
            missing = find_companion(self.trained_agent, "vecnormalize", must_exist=False) if is_earlier else final
            raise ValueError(
                f"{model} has learned from normalized observations, or is to, but {missing} is missing, with the statistics "
                "of the moment when it was saved: with any others, it is another policy. Put that file there, or train "
                "without normalization: `-params normalize:False`."
            )
        return statistics

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        print(f"A new run from the weights of {self.trained_agent}: steps, schedules and random numbers begin anew.")
        model = super()._load_pretrained_agent(hyperparams, env)
        replay_buffer = find_companion(self.trained_agent, "replay_buffer")
        if replay_buffer is not None:
            model.load_replay_buffer(replay_buffer)  # type: ignore[attr-defined]
        return model


def make_envpool(
    env_fns: list[Callable], env_id: str, seed: int, stagger: bool, monitor_path: str | None, append: bool
) -> VecEnv:
    """
    Environments stepped by EnvPool, in the shape of a ``VecEnv`` class's constructor.

    :param env_fns: A function for each environment
    :param env_id: The environment
    :param seed: Seed of the environments
    :param stagger: Whether their episodes are to be at different phases, see :class:`~sb3_r2vpo.envs.EnvPoolVecEnv`
    :param monitor_path: Where to log episodes, in place of the ``Monitor`` around each environment
    :param append: Whether to append to that file
    """
    from sb3_r2vpo.envs import EnvPoolVecEnv

    with warnings.catch_warnings():
        # It has the statistics already, but SB3 copies normalization statistics between environments of equal wrappers only,
        # so that evaluations get the wrapper that training needs for its file
        warnings.filterwarnings("ignore", message="The environment is already wrapped with a `Monitor`")
        env = EnvPoolVecEnv(env_id, len(env_fns), seed=seed, stagger=stagger)
        monitor = VecMonitor(env)
    if monitor_path is not None:
        header: dict[str, Any] = {"t_start": monitor.t_start, "env_id": env_id}
        if stagger:
            # Their returns are no episode's; as EnvPoolVecEnv spreads them
            header[CUT_OFF] = [math.ceil(i * MAX_EPISODE_STEPS / env.num_envs) for i in range(1, env.num_envs)]
        monitor.results_writer = ResultsWriter(monitor_path, header, override_existing=not append)
    return monitor
