"""Tuning with the Zoo's samplers and pruners, in studies that survive what happens to their workers."""

import math
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from rl_zoo3.exp_manager import ExperimentManager as ZooExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_r2vpo.zoo.sampler import OFF_SEARCH_SPACE, SEARCH_SPACE, check_only
from sb3_r2vpo.zoo.signals import as_interrupt
from sb3_r2vpo.zoo.storage import GRACE_PERIOD, HEARTBEAT_INTERVAL, MAX_RETRIES, RetryTrial, open_storage
from sb3_r2vpo.zoo.studies import N_BEST, plot_study, table_of_best

_ERROR = "error"


class TuningManager(ZooExperimentManager):
    """The Zoo's experiment manager, as far as studies go."""

    algo: str
    #: ``--only``
    only: Sequence[str] | None = None

    # --- Trials to train with

    def _load_trial(self, trial_id: int | str) -> tuple[int, dict[str, Any]]:
        """
        :param trial_id: A number, or "best"
        :return: Its number, and its arguments of the algorithm
        :raises ValueError: There is none, or it has not come to a result.
        """
        study = self._load_study()
        trials = study.trials
        completed = [trial.number for trial in trials if trial.state is TrialState.COMPLETE]
        if trial_id == "best":
            if not completed:
                raise ValueError(f"Study {self.study_name!r} has no best trial, as none has completed.")
            trial_id = study.best_trial.number
            print(f"The best trial is {trial_id}, with a value of {study.best_value:g}.")
        try:
            number = int(trial_id)
        except ValueError:
            raise ValueError(f"`--trial-id` is {trial_id!r}; it must be a trial's number, or best.") from None
        if not 0 <= number < len(trials):
            raise ValueError(f"Study {self.study_name!r} has the trials 0 to {len(trials) - 1}, not {number}.")
        state = trials[number].state
        if state not in (TrialState.COMPLETE, TrialState.PRUNED):
            others = ", ".join(map(str, completed)) or "none"
            raise ValueError(
                f"Trial {number} of study {self.study_name!r} is {state.name}, and has no result to take its settings for; "
                f"its worker may have been killed. Completed are: {others}; `--trial-id best` takes the best of them."
            )
        if state is TrialState.PRUNED:
            warnings.warn(f"Trial {number} was pruned: it was worse than others, or failed.", stacklevel=2)
        return number, HYPERPARAMS_CONVERTER[self.algo](trials[number].params)

    def _load_study(self) -> optuna.Study:
        if self.storage is None or self.study_name is None:
            raise ValueError("Loading a trial takes `--storage` and `--study-name` besides `--trial-id`.")
        storage = open_storage(self.storage, create=False)
        try:
            return optuna.load_study(study_name=self.study_name, storage=storage)
        except KeyError as error:
            names = optuna.get_all_study_names(storage)
            raise ValueError(f"{self.storage} has no study {self.study_name!r}, but {', '.join(names) or 'none'}.") from error

    # --- Trials to run

    def objective(self, trial: optuna.Trial) -> float:
        # The Zoo prunes a trial for AssertionError and ValueError only; any other error of a trial that diverges, such as
        # `torch.multinomial`'s RuntimeError for NaN probabilities or a lack of memory, would end the study
        try:
            reward = super().objective(trial)
        except optuna.TrialPruned as pruned:
            if pruned.__cause__ is not None:
                trial.set_user_attr(_ERROR, repr(pruned.__cause__))
            raise
        except (ArithmeticError, RuntimeError) as error:
            print(f"Trial {trial.number} failed: {error!r}")
            trial.set_user_attr(_ERROR, repr(error))
            raise optuna.TrialPruned from error
        except KeyboardInterrupt:
            self._interrupted.append(trial.number)
            raise
        if not math.isfinite(reward):
            trial.set_user_attr(_ERROR, f"The mean reward is {reward}.")
            raise optuna.TrialPruned(f"The mean reward is {reward}.")
        return reward

    def hyperparameters_optimization(self) -> None:
        """
        Run trials, and report.

        The Zoo's own method takes a storage by name, without heartbeats; counts trials of dead workers; ends in an error
        where no trial has completed; and pickles the study, which ``pd.read_csv`` and ``optuna.load_study`` serve better.
        """
        storage = None if self.storage is None else open_storage(self.storage)
        study = optuna.create_study(
            sampler=self._create_sampler(self.sampler),
            pruner=self._create_pruner(self.pruner),
            storage=storage,
            study_name=self.study_name,
            load_if_exists=True,
            direction="maximize",
        )
        if "command" not in study.user_attrs:
            study.set_user_attr("command", " ".join(sys.orig_argv))
            for key, value in sorted(self._hyperparams.items()):
                study.set_user_attr(key, str(value))
        self._choose_sampled()
        self._interrupted: list[int] = []
        with as_interrupt(signal.SIGTERM) as received:
            try:
                self._run_trials(study)
            except KeyboardInterrupt:
                trials = study.trials
                for number in self._interrupted:
                    RetryTrial(MAX_RETRIES)(study, trials[number])
        if received.number:
            sys.exit(128 + received.number)
        self._report(study)

    def _choose_sampled(self) -> None:
        sampler: Any = HYPERPARAMS_SAMPLER[self.algo]
        if self.algo.startswith("r2vpo"):
            sampler = getattr(sampler, "func", sampler)
            HYPERPARAMS_SAMPLER[self.algo] = partial(sampler, settings=dict(self._hyperparams), only=self.only)

    def _check_only(self) -> None:
        if self.only is None:
            return
        if not self.algo.startswith("r2vpo"):
            raise ValueError(f"`--only` is for R2VPO's variants; {self.algo} has the Zoo's sampler, which samples all.")
        check_only(self.only, OFF_SEARCH_SPACE if self.algo == "r2vpo_off" else SEARCH_SPACE)

    def _run_trials(self, study: optuna.Study) -> None:
        options: dict[str, Any] = {"n_jobs": self.n_jobs, "gc_after_trial": True}
        if self.max_total_trials is None:
            study.optimize(self.objective, n_trials=self.n_trials, **options)
            return
        # As long as a trial that is running now may turn out to be of a dead worker
        deadline = time.monotonic() + GRACE_PERIOD + HEARTBEAT_INTERVAL
        while (n_finished := _count(study, TrialState.COMPLETE, TrialState.PRUNED)) < self.max_total_trials:
            _fail_stale_trials(study)
            n_running = _count(study, TrialState.RUNNING)
            if n_finished + n_running < self.max_total_trials:
                study.optimize(self.objective, callbacks=[self._stop_at_limit], **options)
                deadline = time.monotonic() + GRACE_PERIOD + HEARTBEAT_INTERVAL
            elif time.monotonic() > deadline:
                print(f"{n_running} trials are running elsewhere, which makes {self.max_total_trials}.")
                return
            else:
                time.sleep(min(1.0, HEARTBEAT_INTERVAL))

    def _stop_at_limit(self, study: optuna.Study, trial: FrozenTrial) -> None:
        # With those running, else there would be as many too much as there are workers
        if _count(study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) >= (self.max_total_trials or 0):
            study.stop()

    def _report(self, study: optuna.Study) -> None:
        trials = study.trials
        states = Counter(trial.state.name for trial in trials)
        print(f"Study {study.study_name!r} has {len(trials)} trials: {_listed(states)}")
        folder = Path(self.log_path)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"report_{self.env_name}_{self.n_trials}-trials-{self.n_timesteps}-{self.sampler}-{self.pruner}"
        path = folder / f"{name}_{int(time.time())}.csv"
        study.trials_dataframe().to_csv(path)
        print(f"Wrote {path}")
        if not states[TrialState.COMPLETE.name]:
            errors = [trial.user_attrs[_ERROR] for trial in trials if _ERROR in trial.user_attrs]
            last = f" The last error was: {errors[-1]}" if errors else ""
            sys.exit(f"No trial of study {study.study_name!r} has completed, so that there is no best one.{last}")
        best = study.best_trial
        print(f"Best trial: {best.number}\nValue: {best.value}\nBest {N_BEST} trials:\n{table_of_best(study)}")
        # What was sampled as another quantity, and how the study was made
        print("User attributes:\n" + "\n".join(f"    {key}: {value}" for key, value in best.user_attrs.items()))
        if not self.no_optim_plots and self.storage is not None and self.study_name is not None:
            plot_study(study, folder)


def _count(study: optuna.Study, *states: TrialState) -> int:
    return len(study.get_trials(deepcopy=False, states=states))


def _listed(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "none"


def _fail_stale_trials(study: optuna.Study) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
