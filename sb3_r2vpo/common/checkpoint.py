"""
Checkpoints from which training goes on exactly: bit by bit as if it had not been interrupted.

    with CheckpointCallback("logs/walker") as checkpoints:
        model.learn(1_000_000, callback=checkpoints)

and after a crash, with environments made and wrapped in the same way:

    model = resume("logs/walker", env)
    with CheckpointCallback("logs/walker") as checkpoints:
        model.learn(remaining_timesteps(model), callback=checkpoints, reset_num_timesteps=False)

A checkpoint is one file: a saved model, which ``R2VPO.load`` reads as well, with all else that the next steps depend on, as of
the start of a rollout. The versions of packages, the number of PyTorch's threads and the device have to be the same on both
sides. Of the log, ``time/iterations`` begins anew, and with it the counting of ``log_interval``.
"""

import math
import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv

import sb3_r2vpo
from sb3_r2vpo.common.archive import CorruptFileError, decode_section, read_sections, write_archive
from sb3_r2vpo.common.checks import check_flag, check_positive, check_whole_number
from sb3_r2vpo.common.saving import ReplaySaving, replace_by_copy
from sb3_r2vpo.common.signals import delayed_signals, handled_signals
from sb3_r2vpo.common.training_state import get_companions, get_training_state, set_companions, set_training_state

BEST = "best_checkpoint.zip"

#: What callbacks are to get back when the training of a resumed model starts
_resumed: "WeakKeyDictionary[BaseAlgorithm, dict[str, Any]]" = WeakKeyDictionary()


def save_checkpoint(model: Any, path: str | Path, state: dict[str, Any] | None = None) -> None:
    """
    Save a model between two rollouts. Nothing is changed, and no random numbers are drawn: training with checkpoints is the
    same as without.

    The file is there as a whole or not at all: an existing one stays until the new one is complete. Ctrl-C and SIGTERM wait
    until then.

    :param model: A model whose training has begun
    :param path: Of the file; :class:`CheckpointCallback` calls it ``checkpoint_<num_timesteps>.zip``
    :param state: From :func:`~sb3_r2vpo.common.training_state.get_training_state`, if a rollout has begun since
    :raises ValueError: The model has no environment, or something can't be written, such as an attribute of the model.
    :raises OSError: The disk is full, for instance. An existing file is as before.
    """
    if state is None:
        if model.get_env() is None or model._last_obs is None:
            raise ValueError("The model's training has not begun: there is none to go on from a checkpoint. Use `save`.")
        state = get_training_state(model)
    state = dict(state)
    rollouts = state.pop("rollouts")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with delayed_signals():
        write_archive(path, {**model.sections(exclude=["replay_buffer"]), "rollouts": rollouts, "training": state})


def list_checkpoints(folder: str | Path) -> list[Path]:
    """
    :param folder: Where :class:`CheckpointCallback` saves
    :return: Its checkpoints, the oldest first; not the best one, which is ``best_checkpoint.zip``
    """
    paths = Path(folder).glob("checkpoint_*.zip")
    return sorted((path for path in paths if re.fullmatch(r"checkpoint_\d+\.zip", path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint_"))


def newest_readable(folder: str | Path) -> Path | None:
    """
    :param folder: Where :class:`CheckpointCallback` saves
    :return: Its newest checkpoint that is whole; a warning names each newer one that is not. ``None`` if there is none.
    """
    return next((path for path, _ in _readable(folder)), None)


def _readable(folder: str | Path) -> Iterator[tuple[Path, dict[str, tuple[Any, dict[str, th.Tensor]]]]]:
    for path in reversed(list_checkpoints(folder)):
        try:
            sections = read_sections(path)
        except (CorruptFileError, OSError) as error:
            warnings.warn(f"The checkpoint {path} is passed over for the one before it: {error}", stacklevel=3)
        else:
            yield path, sections


def resume(
    path: str | Path,
    env: GymEnv,
    algorithm: type[ReplaySaving] | None = None,
    trust: bool = False,
    reset_env: bool = False,
    **kwargs: Any,
) -> Any:
    """
    Load a checkpoint, to go on with ``model.learn(remaining_timesteps(model), reset_num_timesteps=False)``: with the same
    schedules, up to the step at which the interrupted training was to end.

    Make all environments before, also those for evaluations: the random generators are restored here, and whatever draws from
    them before ``learn`` makes another training of it.

    :param path: A checkpoint, or a folder of :class:`CheckpointCallback`, whose newest readable one is taken
    :param env: Environments that are made and wrapped as those of the training; they need not have been reset
    :param algorithm: The algorithm's class; by default, that of this package which the file names
    :param trust: See ``load``
    :param reset_env: Whether to go on from a reset of the environments, for the case that they are not those of the training
    :param kwargs: Arguments of ``load``, such as ``device`` or ``tensorboard_log``
    :return: The model, with its environments where they were. If their state could not be saved, a warning says so, and
        training goes on from their reset; all else is exact.
    :raises FileNotFoundError: There is no such file, or no readable checkpoint in the folder.
    :raises ValueError: The file is torn, or no checkpoint, or the environments are none, or not those of the training.
    """
    if env is None:
        raise ValueError("`env` is None: a training goes on in environments. Make them as for the training, or use `load`.")
    path = Path(path)
    if path.is_dir():
        found = next(_readable(path), None)
        if found is None:
            raise FileNotFoundError(f"There is no readable checkpoint in {path}; their names are `checkpoint_<steps>.zip`.")
        path, sections = found
    else:
        sections = read_sections(path)
    if "training" not in sections:
        raise ValueError(f"{path} is a saved model without the state of its training: `load` reads it, `resume` can't go on.")
    about, state = (decode_section(path, *sections[name], trust) for name in ("about", "training"))
    name = about["saved_by"]
    if algorithm is None:
        if name not in sb3_r2vpo.__all__ or not isinstance(getattr(sb3_r2vpo, name), type):
            raise ValueError(f"{path} was saved by {name}, which this package does not have: pass `algorithm={name}`.")
        algorithm = getattr(sb3_r2vpo, name)
    model: Any = algorithm.load(path, env=env, force_reset=False, trust=trust, **kwargs)
    rollouts = decode_section(path, *sections["rollouts"], trust)
    set_training_state(model, {**state, "rollouts": rollouts}, reset_env, str(path))
    _resumed[model] = state.get("companions", {})
    return model


def remaining_timesteps(model: BaseAlgorithm) -> int:
    """
    :param model: A resumed model
    :return: The ``total_timesteps`` to go on with in ``learn(..., reset_num_timesteps=False)``, which adds them to the steps
        made: zero if the training was at its end
    """
    return max(0, model._total_timesteps - model.num_timesteps)


class CheckpointCallback(BaseCallback):
    """
    Save checkpoints during training, each at the start of a rollout. Put it last in a list of callbacks.

    As a context manager around ``learn``, it also saves when training is ended from outside or by an error, so that no more
    than the current rollout is lost:

    - At SIGTERM, by which clusters preempt, ``learn`` returns after the current step, and ``stopped_by`` has the signal's
      number; if an update is running, it returns after that.
    - At Ctrl-C and other exceptions, the exception goes on, with a note that names the checkpoint. During an update, Ctrl-C
      waits for its end; a second one does not.

    What is then saved is the state at the start of the current rollout, of which a copy is kept: training goes on from there
    exactly, unless an update was broken off within. Weights with NaN are not saved.

    :param folder: Where to save ``checkpoint_<num_timesteps>.zip``
    :param save_freq: Steps between two checkpoints, by ``num_timesteps``; ``None`` (default) for none
    :param every: Seconds between two checkpoints, 5 minutes by default; ``None`` for no limit
    :param keep: How many to keep, the newest ones. An old one goes only when the new one is in place.
    :param keep_best: Whether to keep, besides, the one with the highest mean return of recent episodes, those of
        ``ep_info_buffer``, as ``best_checkpoint.zip``
    :param verbose: 1 prints the path of each checkpoint
    :raises ValueError: An argument is out of its range. When training starts: it begins at zero, and the folder has some.
    :raises OSError: When training starts: the folder can't be made.
    """

    def __init__(
        self,
        folder: str | Path,
        save_freq: int | None = None,
        every: float | None = 300.0,
        keep: int = 2,
        keep_best: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_whole_number("keep", keep)
        if save_freq is not None:
            check_whole_number("save_freq", save_freq)
        if every is not None:
            check_positive("every", every, ", in seconds, or None", math.inf)
        check_flag("keep_best", keep_best)
        self.folder, self.save_freq, self.every, self.keep, self.keep_best = Path(folder), save_freq, every, keep, keep_best
        self.best_mean_return = -np.inf
        #: The last file that was written
        self.last_path: Path | None = None
        #: Number of the signal that ended training
        self.stopped_by: int | None = None
        self._stack: ExitStack | None = None
        self._state: dict[str, Any] | None = None
        self._collecting = self._interrupted = False

    # === Saving now and then ===

    def _on_training_start(self) -> None:
        # While rollouts are collected, another one may stand there
        self._outermost: BaseCallback = self.locals["callback"]
        companions = _resumed.pop(self.model, None)
        if companions:
            set_companions(self.model, self._outermost, companions)
            self.best_mean_return = companions["best_mean_return"]
        elif companions is None and self.model.num_timesteps == 0 and list_checkpoints(self.folder):
            raise ValueError(
                f"{self.folder} has checkpoints of another training: `resume` goes on from them; take another folder to begin "
                "a new one."
            )
        # A folder that can't be is an error now, not after the first hours
        self.folder.mkdir(parents=True, exist_ok=True)
        reason = get_training_state(self.model)["env"]["not_captured"]
        if reason is not None:
            warnings.warn(
                f"Checkpoints do not have the state of these environments: {reason} A resumed training begins with a reset, "
                "with all else as it was.",
                stacklevel=2,
            )
        self._collecting = self._interrupted = False
        self.stopped_by = self.last_path = self._state = None
        self._last_steps, self._last_time = self.model.num_timesteps, time.monotonic()

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        is_due = self.save_freq is not None and steps // self.save_freq > self._last_steps // self.save_freq
        is_due |= self.every is not None and steps > self._last_steps and time.monotonic() - self._last_time >= self.every
        if is_due or self._stack is not None:
            self._state = self._current_state()
        # From now on, signals find a state to save
        self._collecting = True
        if is_due or self.stopped_by is not None:
            self._save()
        if self._interrupted:
            raise KeyboardInterrupt
        if self._stack is None:
            self._state = None

    def _current_state(self) -> dict[str, Any]:
        companions = {**get_companions(self.model, self._outermost), "best_mean_return": self.best_mean_return}
        return {**get_training_state(self.model), "companions": companions}

    def _save(self) -> None:
        """Save the state at the start of the rollout."""
        assert self._state is not None
        steps = self._state["attributes"]["num_timesteps"]
        path = self.folder / f"checkpoint_{steps}.zip"
        if path == self.last_path:
            return
        episodes = [episode["r"] for episode in self._state["attributes"]["ep_info_buffer"]]
        mean_return = float(np.mean(episodes)) if episodes else -np.inf
        is_best = self.keep_best and mean_return > self.best_mean_return
        if is_best:
            self._state["companions"]["best_mean_return"] = mean_return
        with delayed_signals():
            save_checkpoint(self.model, path, self._state)
            self.last_path, self._last_steps, self._last_time = path, steps, time.monotonic()
            if is_best:
                self.best_mean_return = mean_return
                replace_by_copy(path, self.folder / BEST)
            # Later ones are of a training that went on further, if they are not torn
            for old in [other for other in list_checkpoints(self.folder) if _number(other) <= steps][: -self.keep]:
                old.unlink(missing_ok=True)
        if self.verbose >= 1:
            print(f"Saved checkpoint {path}")

    def _on_step(self) -> bool:
        return self.stopped_by is None

    def _on_rollout_end(self) -> None:
        self._collecting = False

    def _on_training_end(self) -> None:
        if self.stopped_by is not None and not self._collecting:
            # During the last update
            self._state = self._current_state()
            self._save()
        self._state = None

    # === Saving when training is ended ===

    def __enter__(self) -> "CheckpointCallback":
        self._state = None
        self._stack = ExitStack()
        self._stack.enter_context(handled_signals(self._on_signal))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._stack is not None
        try:
            if error is not None and self._state is not None:
                error.add_note(self._save_after_error())
        finally:
            self._stack.close()
            self._stack = self._state = None

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self._collecting or self._interrupted or self._state is None:
                raise KeyboardInterrupt
            self._interrupted = True
        elif self.stopped_by is None:
            self.stopped_by = number
            if self._state is None:
                raise SystemExit(128 + number)
            if self._collecting:
                self._save()

    def _save_after_error(self) -> str:
        """Save the state at the start of the rollout, and return what the error's note is to say."""
        if not _all_finite(self.model):
            return f"The weights are not finite, and were not saved. The last checkpoint is {self.last_path}."
        try:
            self._save()
        except Exception as error:
            return f"The checkpoint could not be saved: {error} The last one is {self.last_path}."
        return f"Training up to this rollout is saved in {self.last_path}, from where `resume` goes on."


def _all_finite(model: Any) -> bool:
    state = model.policy.optimizer.state.values()
    tensors = [*model.policy.state_dict().values(), *(value for values in state for value in values.values())]
    tensors = [tensor for tensor in tensors if isinstance(tensor, th.Tensor) and tensor.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
