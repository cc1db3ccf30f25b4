"""A run from its start to its end: checkpoints on the way, going on from them, and what is saved however it ends."""

import shutil
import signal
import sys
import traceback
from collections import OrderedDict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch as th
from rl_zoo3.exp_manager import ExperimentManager as ZooExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecNormalize

from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm
from sb3_r2vpo.common.checkpoint import CheckpointCallback, newest_readable, resume
from sb3_r2vpo.common.saving import save_normalization
from sb3_r2vpo.zoo.companions import replaced
from sb3_r2vpo.zoo.resume import (
    CHECKPOINTS,
    RolloutClock,
    continue_evaluations,
    continue_monitors,
    monitors_are_whole,
    read_settings,
)
from sb3_r2vpo.zoo.signals import as_interrupt, uninterrupted


class RunCheckpoints(CheckpointCallback):
    """Checkpoints of a run: the last one is that of its end, from where it goes on if it is to have more steps."""

    def _on_training_end(self) -> None:
        if self.stopped_by is None and not self._collecting:
            self._state = self._current_state()
            self._save()
        super()._on_training_end()


class Running(ZooExperimentManager):
    """The Zoo's experiment manager, as far as a run's beginning and end go."""

    trust: bool
    #: ``--resume``
    run: Path | None = None
    #: From which the run goes on
    checkpoint: Path | None = None
    #: Of a new run
    made_folder: str | None = None
    #: Whether the run's monitor files are appended to
    appends: bool = False
    is_saved: bool = False
    #: The number of the signal that ended training
    ended_by: int = 0

    @property
    def keeps_checkpoints(self) -> bool:
        """Those of the Zoo's own algorithms do not have all that an exact continuation takes."""
        return issubclass(ALGOS[self.algo], RatioVarianceAlgorithm)

    def _choose_run(self, run: Path | None) -> None:
        if run is None:
            return
        if not self.keeps_checkpoints:
            raise ValueError(f"`--resume` is for R2VPO's variants; for {self.algo}, `-i` begins a new run from its weights.")
        self.run, self.save_path = run, str(run)
        self.params_path = f"{run}/{self.env_name}"
        self.checkpoint = newest_readable(run / CHECKPOINTS)
        if self.checkpoint is None:
            print(f"{run} has no readable checkpoint: it begins anew, with its own settings and seed.")
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
            if self.n_timesteps <= 0:
                self.n_timesteps = read_settings(Path(self.params_path) / "args.yml", self.trust).get("n_timesteps", -1)
        else:
            print(f"Resuming {self.checkpoint}")
            self.appends = monitors_are_whole(run)

    def _read_run_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        settings = read_settings(Path(self.params_path) / "config.yml", self.trust)
        # The environment's arguments are among the settings, or among the options
        self.eval_env_kwargs = self.eval_env_kwargs or settings.get("env_kwargs") or {}
        return dict(settings), OrderedDict(settings)

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        try:
            result = super().setup_experiment()
        except BaseException:
            # Nothing is in it yet that anybody could go on with
            if self.made_folder is not None:
                shutil.rmtree(self.made_folder, ignore_errors=True)
            raise
        if self.checkpoint is None or result is None:
            return result
        # In place of the new model, whose environments go on
        fresh, saved_hyperparams = result
        assert isinstance(fresh, RatioVarianceAlgorithm)
        env = fresh.get_env()
        assert env is not None
        options: dict[str, Any] = {"device": self.device, "tensorboard_log": self.tensorboard_log, "verbose": self.verbose}
        model = resume(self.checkpoint, env, type(fresh), trust=self.trust, **options)
        if self.appends:
            continue_monitors(env, Path(self.save_path), getattr(model, "rollout_began", float("inf")))
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):
                continue_evaluations(callback, Path(self.save_path), model.num_timesteps)
        # What the user has said now, or what the interrupted training was to come to
        total = self.args.n_timesteps if self.args.n_timesteps > 0 else model._total_timesteps
        if model.num_timesteps >= total:
            raise ValueError(
                f"{self.save_path} is at its end, after {model.num_timesteps} steps. To go on, say how many there are to be "
                f"in all, such as `-n {2 * total}`."
            )
        print(f"At {model.num_timesteps} of {total} steps")
        self.n_timesteps = total
        return model, saved_hyperparams

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.run is None:
            super()._save_config(saved_hyperparams)

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train, and save whatever happens: at Ctrl-C and SIGTERM, and before an error goes on.

        :param model: New, or resumed
        :raises BaseException: That of the training; by then the model is saved, if its weights are finite.
        """
        with ExitStack() as stack:
            # The handlers within leave no gap in which a second Ctrl-C would break what the first one saves
            ending = stack.enter_context(uninterrupted())
            if self.keeps_checkpoints:
                # With checksums, and whole or not at all; SB3 and the Zoo read their own algorithms' as ever
                stack.enter_context(replaced(VecNormalize, save=_save_statistics))
            try:
                if self.keeps_checkpoints:
                    self._learn_with_checkpoints(model)
                else:
                    with as_interrupt(signal.SIGINT, signal.SIGTERM) as received:
                        super().learn(model)
                    self.ended_by = received.number
            except KeyboardInterrupt:
                # Ctrl-C ends training early
                self.ended_by = self.ended_by or signal.SIGINT
            except SystemExit:
                # SIGTERM, before there was anything to save
                self._close(model)
                raise
            except BaseException as error:
                print(f"Training has ended with an error: {error!r}", file=sys.stderr)
                self._save_despite(model)
                raise
            self._save(model)
            self._close(model)
            if self.ended_by:
                # All is saved, and the exit status is still to come
                ending.keep = True

    def _learn_with_checkpoints(self, model: BaseAlgorithm) -> None:
        options: dict[str, Any] = {}
        if self.log_interval != -1:
            options["log_interval"] = self.log_interval if self.log_interval > -1 else None
        checkpoints = RunCheckpoints(Path(self.save_path) / CHECKPOINTS)
        # The clock before the checkpoints, which have its time; these last, as they have the others' counts
        callbacks = [RolloutClock(), *self.callbacks, checkpoints]
        goes_on = self.checkpoint is not None
        try:
            with checkpoints:
                model.learn(
                    self.n_timesteps - model.num_timesteps * goes_on,
                    callback=callbacks,
                    reset_num_timesteps=not goes_on,
                    **options,
                )
        finally:
            if self.show_progress:
                # As in the Zoo: the progress bar's last line
                self.callbacks[0].on_training_end()
            self.ended_by = checkpoints.stopped_by or 0

    def _save(self, model: BaseAlgorithm) -> None:
        self.is_saved = True
        super().save_trained_model(model)

    def _save_despite(self, model: BaseAlgorithm) -> None:
        """Save after an error, which must be the one that is reported in the end."""
        try:
            if _is_finite(model):
                self._save(model)
            else:
                print(f"The weights are not finite, and are not saved. What there is is in {self.save_path}.", file=sys.stderr)
            self._close(model)
        except Exception:
            traceback.print_exc()

    @staticmethod
    def _close(model: BaseAlgorithm) -> None:
        with suppress(EOFError, BrokenPipeError):
            if model.env is not None:
                model.env.close()

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """What the Zoo calls after :meth:`learn`, which has saved already."""
        if not self.is_saved:
            self._save(model)
        if self.ended_by:
            print(f"Ended by {signal.Signals(self.ended_by).name}.")
            # As shells have it: 143 for SIGTERM
            sys.exit(128 + self.ended_by if self.ended_by != signal.SIGINT else 0)


def _save_statistics(statistics: VecNormalize, save_path: str) -> None:
    save_normalization(statistics, save_path)


def _is_finite(model: BaseAlgorithm) -> bool:
    """Whether weights and statistics are worth saving."""
    tensors = [*model.policy.state_dict().values()]
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        runnings = statistics.obs_rms.values() if isinstance(statistics.obs_rms, dict) else [statistics.obs_rms]
        moments = [rms for rms in (*runnings, statistics.ret_rms) if rms is not None]
        tensors += [th.as_tensor(value) for rms in moments for value in (rms.mean, rms.var)]
    return all(bool(th.isfinite(tensor).all()) for tensor in tensors)
