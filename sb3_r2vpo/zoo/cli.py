"""Train, tune, watch, record and plot R2VPO agents with the RL Baselines3 Zoo.

commands:
  train          r2vpo train --env CartPole-v1
  enjoy          r2vpo enjoy --env CartPole-v1 --load-best
  tune           r2vpo tune --env CartPole-v1 -n 50000 --n-trials 50
  record-video   r2vpo record-video --env CartPole-v1 -n 500
  plot           r2vpo plot logs/r2vpo logs/ppo
  export         r2vpo export --env CartPole-v1 -o policy.onnx
  doctor         r2vpo doctor                                        what is installed, and what is wrong with it
  llm            r2vpo llm train config.yml --folder logs/llm/run       language models, see `r2vpo llm --help`

Options are the Zoo's: `r2vpo <command> --help` lists them, with more examples. Algorithms are r2vpo (the default), r2vpo_off
and all of the Zoo's; environments are Gymnasium's and the DeepMind Control Suite's, such as dm_control/walker-run-v0.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

from sb3_r2vpo import __version__

#: With the extra of ``setup.cfg`` that each of them needs
COMMANDS = {
    **dict.fromkeys(("train", "enjoy", "tune", "record-video", "plot", "export"), "zoo"),
    "doctor": "",
    "llm": "llm",
}

#: Those that do without the Zoo, whose import takes seconds, and the modules with their ``main``
MODULES = {
    "plot": "sb3_r2vpo.zoo.plots",
    "export": "sb3_r2vpo.zoo.exporting",
    "doctor": "sb3_r2vpo.zoo.doctor",
    "llm": "sb3_r2vpo.llm.cli",
}


def load(command: str) -> Callable[[Sequence[str]], None]:
    """
    Import what a command needs: only now, as the base installation does without.

    :param command: Key of ``COMMANDS``
    :return: The command, a function of its options
    :raises ModuleNotFoundError: A package is missing.
    """
    if command in MODULES:
        return import_module(MODULES[command]).main
    from sb3_r2vpo.zoo import commands, register

    register()
    return commands.COMMANDS[command]


def main(arguments: Sequence[str] | None = None) -> None:
    """
    The command line ``r2vpo``.

    :param arguments: Command and options; by default, those of the process
    """
    parser = argparse.ArgumentParser(
        prog="r2vpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="r2vpo <command> [...]"
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    try:
        command = load(parsed.command)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "sb3_r2vpo"):
            raise
        extra = COMMANDS[parsed.command]
        parser.exit(1, f"`r2vpo {parsed.command}` needs {package}, an extra: pip install 'sb3-r2vpo[{extra}]'\n")
    command(parsed.options)
