"""What the commands of ``r2vpo`` do; their docstrings are what ``r2vpo <command> --help`` begins with."""

import argparse
import importlib
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import rl_zoo3.enjoy
import rl_zoo3.train
from huggingface_sb3 import EnvironmentName

from sb3_r2vpo.zoo.companions import matching_statistics, replaced
from sb3_r2vpo.zoo.manager import ExperimentManager
from sb3_r2vpo.zoo.resume import resumed_command
from sb3_r2vpo.zoo.trust import code_free

# Given before the user's own options, which come last and therefore win. One thread, as several are slower for small networks;
# a library must not set it, a program may. `train` decides by the settings, see `zoo.settings.choose_num_threads`.
DEFAULTS = ("--algo", "r2vpo")
ENJOY_DEFAULTS = (*DEFAULTS, "--num-threads", "1", "--folder", "logs")
RECORD_VIDEO_DEFAULTS = (*DEFAULTS, "--folder", "logs")


def train(arguments: Sequence[str]) -> None:
    """Train an agent, and save it with its settings below logs/<algo>/<env>_<number>. Ctrl-C stops early, and saves; so do
    SIGTERM, by which clusters preempt (exit status 143), and an error, before it is reported.

    examples:
      r2vpo train --env CartPole-v1
      r2vpo train --env dm_control/cheetah-run-v0 --vec-env envpool --eval-freq 50000 --save-freq 200000
      r2vpo train --algo r2vpo_off --env dm_control/cheetah-run-v0 --save-replay-buffer
      r2vpo train --algo r2vpo_lstm --env CartPoleNoVel-v1                a recurrent policy
      r2vpo train --algo r2vpo_mask --env MyEnv-v0 --gym-packages mine    an environment with a method action_masks()
      r2vpo train --algo ppo --env dm_control/cheetah-run-v0              the baseline, tuned for the same budget
      r2vpo train --env dm_control/cheetah-run-v0 --conf-file paper       the paper's own settings
      r2vpo train --env Pendulum-v1 -params target_variance:0.05 n_epochs:5
      r2vpo train --env Pendulum-v1 -params var_coef:auto_0.5 target_variance:lin_0.05
      r2vpo train --env Pendulum-v1 -params "critic_kwargs:dict(n_rollouts=2)"
      r2vpo train --env CartPole-v1 -i logs/r2vpo/CartPole-v1_1/best_model.zip     a new run from its weights
      r2vpo train --env CartPole-v1 --resume                              go on with the latest run, exactly
      r2vpo train --resume logs/r2vpo/CartPole-v1_1 -n 500000             go on with this one, to so many steps in all
      r2vpo train --env MyEnv-v0 --gym-packages mine --vec-env subproc --env-timeout 20 --restart-envs

    Further to the Zoo's options below:
      --resume [RUN]      goes on from the run's newest readable checkpoint, with its own settings, in its own folder, as if
                          it had not been interrupted: weights, optimizer, multiplier, replay, statistics, schedules, random
                          numbers, and the environments where they have a state to save. Without RUN, it is the latest one of
                          --algo and --env. R2VPO's variants keep a checkpoint every five minutes in RUN/checkpoints. A run
                          that was killed before the first begins anew. What may change: -n, to which schedules are then
                          stretched, --device, --num-threads, --verbose, --log-interval, --progress, --env-timeout and
                          --restart-envs
      -i MODEL            begins a new run from a model's weights and statistics: steps, schedules, random numbers begin anew
      --vec-env subproc   has a process for each environment. --env-timeout SECONDS is how long one may take for an answer, 60
                          by default; --restart-envs starts those anew that raise, die or hang, in place of ending the training
      --trust             lets files run code. By default settings, models and statistics are read as data: settings may name
                          wrappers, callbacks and policies of Gymnasium, SB3, the Zoo, this package, and --gym-packages
      --trial-id best     takes the settings of a study's best trial, or of the one with this number
      --vec-env envpool   steps DM Control tasks in C++, several times faster: pip install 'sb3-r2vpo[envpool]'
      --conf-file paper   the paper's settings; by default, those in sb3_r2vpo/hyperparams/<algo>.yml
      --num-threads N     PyTorch's threads. By default one: several are slower for small networks, and for any if the cores
                          have other work. Two, if there are two CPUs, where batch_size times the weights of one layer of the
                          settings is 67 million or more, 256 x 256 with 1024 steps, or NatureCNN with 64: nearly twice as
                          fast on idle cores. -1 for PyTorch's own choice
    -params replaces a mapping of the settings as a whole, such as policy_kwargs, critic_kwargs or objective_kwargs. Its values
    are data: numbers, words, lists, dicts, and classes such as nn.Tanh; they are not evaluated as Python.
    """
    _train("train", arguments)


def tune(arguments: Sequence[str]) -> None:
    """Search hyperparameters with Optuna: for R2VPO, fixed or adaptive multiplier, its initial value, the target variance
    epsilon, the dual learning rate eta, for R2VPO-OFF capacity and update-to-data ratio, and what PPO has as well.

    examples:
      r2vpo tune --env CartPole-v1 -n 50000 --n-trials 50
      r2vpo tune --algo r2vpo_off --env dm_control/walker-run-v0 -n 500000 --vec-env envpool
      r2vpo tune --env CartPole-v1 --storage sqlite:///study.db --study-name cartpole --max-total-trials 100
      r2vpo tune --env Pendulum-v1 -n 100000 --only var_coef,target_variance,n_epochs
      r2vpo tune --env CartPole-v1 -n 50000 -params objective:ppo_clip                      a baseline, without the constraint
      r2vpo train --env CartPole-v1 --storage logs/optuna.log --study-name r2vpo_CartPole-v1 --trial-id best

    Trials go to logs/optuna.log, study <algo>_<env>, unless --storage and --study-name say otherwise. Run the command in
    several processes to share one study, each with another --seed or with none: equal seeds sample equal trials. A trial that
    diverges is pruned, and counts. A trial whose worker was killed is found by its missing signs of life after a minute, does
    not count, and is run again by the next worker that is free; so is one that Ctrl-C or SIGTERM ends. Tables and plots of the
    study are written below logs/<algo>/.

    Further to the Zoo's options below:
      --only NAMES    samples these arguments only, separated by commas; the others stay as in the settings. The constraint has
                      var_coef, target_variance, dual_learning_rate, min_var_coef. By default, all that can be sampled
      --trust         lets settings run code, see `r2vpo train --help`
    """
    _refuse_masks("tune", arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="r2vpo")
    parser.add_argument("--env", type=EnvironmentName, default="CartPole-v1")
    parser.add_argument("-f", "--log-folder", type=Path, default=Path("logs"))
    known, _ = parser.parse_known_args(arguments)
    study = ["--storage", str(known.log_folder / "optuna.log"), "--study-name", f"{known.algo}_{known.env}"]
    _train("tune", ["--optimize-hyperparameters", "--n-trials", "100", *study, *arguments])


def enjoy(arguments: Sequence[str]) -> None:
    """Watch a trained agent, by default the latest run's final model.

    examples:
      r2vpo enjoy --env CartPole-v1
      r2vpo enjoy --env dm_control/walker-run-v0 --load-best --no-render -n 5000
      r2vpo enjoy --algo r2vpo_off --env CartPole-v1 --exp-id 2 --load-checkpoint 20000

    The best model and checkpoints run with the normalization statistics saved with them. A run that was killed before it had
    such a model is passed over. The run's files are read as data; --trust lets them run code, for wrappers and policies of
    your own, --gym-packages names their packages. It takes a display, unless --no-render is given.
    """
    _refuse_masks("enjoy", arguments)
    _refuse_no_display(arguments)
    trust, packages, others = _trusted(arguments)
    with code_free(trust, packages), matching_statistics():
        packages_options = ["--gym-packages", *packages] if packages else []
        _run_in_zoo("enjoy", [*ENJOY_DEFAULTS, *others, *packages_options], rl_zoo3.enjoy.enjoy)


def record_video(arguments: Sequence[str]) -> None:
    """Record a trained agent as an mp4 file, in the run's folder videos/ or in --output-folder.

    examples:
      r2vpo record-video --env CartPole-v1 -n 500
      r2vpo record-video --env dm_control/cheetah-run-v0 --load-best -n 1000 -o videos

    Without a display, DM Control renders with EGL or OSMesa; set MUJOCO_GL to choose. --gym-packages and --trust are those of
    `r2vpo enjoy`.
    """
    _refuse_masks("record-video", arguments)
    # The Zoo's script has no function to call, and a new interpreter would not know our algorithms
    script = partial(runpy.run_module, "rl_zoo3.record_video", run_name="__main__")
    trust, packages, others = _trusted(arguments)
    with code_free(trust, packages), matching_statistics():
        for package in packages:
            # The Zoo's script has no such option
            importlib.import_module(package)
        _run_in_zoo("record-video", [*RECORD_VIDEO_DEFAULTS, *others], script)


def _train(command: str, arguments: Sequence[str]) -> None:
    """Run the Zoo's training script, with what its own parser does not know."""
    parser = argparse.ArgumentParser(prog=f"r2vpo {command}", add_help=False, allow_abbrev=False)
    if command == "train":
        # Without a value, the latest run; no other option of the Zoo's begins like this one
        parser.add_argument("--resume", nargs="?", type=Path, const=Path(), metavar="RUN")
        parser.add_argument("--trial-id")
    else:
        parser.add_argument("--only", type=lambda names: names.split(","))
    parser.add_argument("--trust", action="store_true")
    ours, others = parser.parse_known_args(arguments)
    run = None
    if getattr(ours, "resume", None) is not None:
        named = [] if ours.resume == Path() else [f"--resume={ours.resume}"]
        run, others = resumed_command([*others, *named], ours.trust)

    parser = argparse.ArgumentParser(prog=f"r2vpo {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--vec-env", choices=["dummy", "subproc", "envpool"], default="dummy")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--env-timeout", type=float)
    parser.add_argument("--restart-envs", action="store_true")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    options, zoos = parser.parse_known_args(others)
    if options.vec_env != "subproc" and (options.env_timeout is not None or options.restart_envs):
        parser.error("--env-timeout and --restart-envs are for --vec-env subproc, which has environments in processes")
    envpool = options.vec_env == "envpool"
    manager = partial(
        ExperimentManager,
        envpool=envpool,
        # A study's trials have networks of all sizes, and are for several processes
        choose_threads=options.num_threads is None and command == "train",
        trial=getattr(ours, "trial_id", None),
        only=getattr(ours, "only", None),
        run=run,
        trust=ours.trust,
        env_timeout=options.env_timeout,
        restart_envs=options.restart_envs,
    )
    known = ["--vec-env", "dummy" if envpool else options.vec_env]
    known += ["--num-threads", "1" if options.num_threads is None else str(options.num_threads)]
    known += ["--gym-packages", *options.gym_packages] if options.gym_packages else []
    with code_free(ours.trust, options.gym_packages), replaced(rl_zoo3.train, ExperimentManager=manager):
        _run_in_zoo(command, [*DEFAULTS, *zoos, *known], rl_zoo3.train.train)


def _trusted(arguments: Sequence[str]) -> tuple[bool, list[str], list[str]]:
    """:return: Whether files may run code, the packages that they may name, and the other options"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    ours, others = parser.parse_known_args(arguments)
    return ours.trust, ours.gym_packages, others


def _refuse_masks(command: str, arguments: Sequence[str]) -> None:
    """The Zoo's script would let the agent take invalid actions, in silence."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    if parser.parse_known_args(arguments)[0].algo == "r2vpo_mask":
        sys.exit(
            f"r2vpo {command}: the Zoo's script has no action masks. Load the model in Python with MaskableR2VPO.load(), and "
            "use sb3_contrib.common.maskable.evaluation.evaluate_policy()."
        )


def _refuse_no_display(arguments: Sequence[str]) -> None:
    """GLFW, with which MuJoCo opens windows, aborts the process without one; pygame draws what nobody sees."""
    if {"--no-render", "-h", "--help"} & {*arguments} or not sys.platform.startswith("linux"):
        return
    # Whoever has set SDL's driver has chosen where pygame draws
    if not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))):
        sys.exit(
            "r2vpo enjoy: there is no display, as neither DISPLAY nor WAYLAND_DISPLAY is set. Add --no-render to see the "
            "returns only, or use `r2vpo record-video` with the same options."
        )


def _run_in_zoo(command: str, arguments: Sequence[str], script: Callable[[], object]) -> None:
    """Run one of the Zoo's scripts in this interpreter, where our algorithms are registered."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(inspect.getdoc(COMMANDS[command]), end="\n\n")
    sys.argv = [f"r2vpo {command}", *arguments]
    script()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "enjoy": enjoy,
    "tune": tune,
    "record-video": record_video,
}
