"""The command line of a script whose commands are functions without arguments."""

import argparse
from collections.abc import Callable


def run_command(description: str | None, *functions: Callable[[], None]) -> None:
    """Call the one of the functions that the command line names."""
    commands = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    commands[parser.parse_args().command]()
