"""Where studies are kept, so that they survive workers that are killed, and files that these leave torn."""

import random
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

#: Seconds between two signs of life of a running trial, and without one until it is taken for dead, and run again. A worker
#: gives them from a thread of its own, also during an update; the database of several workers may be busy for some seconds.
HEARTBEAT_INTERVAL = 15
GRACE_PERIOD = 60
#: How often a trial is run again: one that takes its worker with it, as for lack of memory, would do so for ever
MAX_RETRIES = 3
#: Seconds that a worker waits for others which create the tables of the same new database
CREATION_TIMEOUT = 60

_HEARTBEAT = "r2vpo:heartbeat"


def open_storage(storage: str, create: bool = True) -> BaseStorage:
    """
    Open a study storage with heartbeats: a trial whose worker was killed is found, and run again by another worker.

    :param storage: ``--storage``: a journal, a file that ends in ``.log``, or the URL of a database, such as
        ``sqlite:///study.db``
    :param create: Whether to create a file that does not exist
    :return: The storage
    :raises ValueError: It does not exist, or is none.
    """
    retry = RetryTrial(MAX_RETRIES)
    if storage.endswith(".log"):
        return Journal(storage, retry, create)
    path = storage.removeprefix("sqlite:///")
    if not create and path != storage and not Path(path).is_file():
        raise ValueError(f"There is no study storage {storage}.")
    if "://" not in storage:
        raise ValueError(
            f"`--storage` is {storage!r}; it must be a file that ends in .log, or a URL such as sqlite:///study.db."
        )
    # SQLite's own patience is 5 seconds
    engine_kwargs: dict[str, Any] = {"connect_args": {"timeout": 60}} if path != storage else {}
    return _patiently(lambda: Database(storage, engine_kwargs, retry))


def _patiently(make: Callable[[], Any]) -> Any:
    """Workers started together create the tables of a new database at the same time, of which all but one fail."""
    deadline = time.monotonic() + CREATION_TIMEOUT
    while True:
        try:
            return make()
        except (DatabaseError, StorageInternalError):
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.05, 0.5))


class RetryTrial(RetryHeartbeatStaleTrialCallback):
    """Optuna's callback that puts a dead trial back in the queue, and says so."""

    def __init__(self, max_retry: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(max_retry)

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        # Signs of life are the dead trial's own
        attributes = {name: value for name, value in trial.system_attrs.items() if name != _HEARTBEAT}
        trial.system_attrs = attributes
        n_trials = len(study.get_trials(deepcopy=False))
        super().__call__(study, trial)
        again = len(study.get_trials(deepcopy=False)) > n_trials
        end = "it is put back in the queue" if again else f"it was run {MAX_RETRIES + 1} times, and is given up"
        print(f"Trial {trial.number} was left unfinished by its worker: {end}.")


def _is_late(since: datetime | None) -> bool:
    return since is None or datetime.now(since.tzinfo) - since > timedelta(seconds=GRACE_PERIOD)


class Database(RDBStorage):
    """
    Optuna's storage in a database, which finds trials that have never given a sign of life as well: of workers killed at once,
    or of an earlier version.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any], stale_trial_callback: RetryTrial) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                url,
                engine_kwargs,
                heartbeat_interval=HEARTBEAT_INTERVAL,
                grace_period=GRACE_PERIOD,
                heartbeat_stale_trial_callback=stale_trial_callback,
            )

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        stale = super()._get_stale_trial_ids(study_id)
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id not in stale and _is_late(trial.datetime_start) and not self._has_heartbeat(trial._trial_id):
                stale.append(trial._trial_id)
        return stale

    def _has_heartbeat(self, trial_id: int) -> bool:
        from optuna.storages._rdb.models import TrialHeartbeatModel

        with self.scoped_session() as session:
            return session.query(TrialHeartbeatModel).filter_by(trial_id=trial_id).first() is not None


class Journal(JournalStorage, BaseHeartbeat):
    """
    Optuna's storage in a file, with the heartbeats that Optuna has for databases only: a line of the journal each.

    :param path: The file
    :param stale_trial_callback: What to do with a dead trial
    :param create: Whether to create the file if there is none
    :raises ValueError: There is no file, or it is damaged.
    """

    def __init__(self, path: str, stale_trial_callback: RetryTrial, create: bool = True) -> None:
        if not create and not Path(path).is_file():
            raise ValueError(f"There is no study storage {path}.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._stale_trial_callback = stale_trial_callback
        try:
            super().__init__(MendedJournalFile(path))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged, and not only at its end: {error!r}. Restore a copy, or take another file for --storage."
            ) from error

    def record_heartbeat(self, trial_id: int) -> None:
        # The trial may have ended since, or been taken for dead
        with suppress(UpdateFinishedTrialError):
            self.set_trial_system_attr(trial_id, _HEARTBEAT, time.time())

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT_INTERVAL

    def get_heartbeat_stale_trial_callback(self) -> RetryTrial:
        return self._stale_trial_callback

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        trials = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in trials if self._is_stale(trial)]

    def _is_stale(self, trial: FrozenTrial) -> bool:
        heartbeat = trial.system_attrs.get(_HEARTBEAT)
        return _is_late(trial.datetime_start) if heartbeat is None else time.time() - heartbeat > GRACE_PERIOD


class MendedJournalFile(JournalFileBackend):
    """
    Optuna's journal file, whose last line may be torn by a worker that was killed while it wrote: it is cut off, where Optuna
    can't read the file any more once the next line has been written behind it.
    """

    def __init__(self, file_path: str) -> None:
        super().__init__(file_path)
        with get_lock_file(self._lock):
            self._cut_torn_line()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with get_lock_file(self._lock):
            self._cut_torn_line()
        super().append_logs(logs)

    def _cut_torn_line(self) -> None:
        """Under the lock, with which lines are written as a whole: one without an end is nobody's who is alive."""
        with open(self._file_path, "r+b") as file:
            content_length = file.seek(0, 2)
            if content_length == 0:
                return
            file.seek(-1, 2)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            complete = file.read().rfind(b"\n") + 1
            file.truncate(complete)
        print(
            f"{self._file_path}: the last line was torn, as a worker was killed while it wrote; its "
            f"{content_length - complete} bytes were cut off."
        )
