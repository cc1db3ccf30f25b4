"""
Inject faults, one after another, and count how many training and its files survive.

    python benchmarks/faults/table.py               all of them, some minutes
    python benchmarks/faults/table.py --fast        some of each kind, below a minute, as in the tests: prints, writes nothing
    python benchmarks/faults/table.py --fault NAME  one kind; `--list` has the names

Writes `results/faults.csv` and the tables of `README.md`. Exit status 1 if something did not survive.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch as th

from sb3_r2vpo.common import worker

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import injection  # noqa: E402
from damage import HIDDEN, PAYLOADS  # noqa: E402
from readme_tables import write_tables  # noqa: E402

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "faults.csv"
PACKAGES = ("sb3-r2vpo", "stable-baselines3", "gymnasium", "torch", "numpy", "optuna")


@dataclass
class Fault:
    """
    :param injected: What is done
    :param criterion: What surviving means
    :param n_fast: How often with `--fast`
    :param n_all: How often else
    :param attempt: Does it once: number of the attempt, an empty folder -> whether it was survived, how it ended
    """

    injected: str
    criterion: str
    n_fast: int
    n_all: int
    attempt: Callable[[int, Path], injection.Outcome]


FAULTS = {
    "raising environment": Fault(
        "An environment in a worker raises: when built, in reset, step, render, get_attr, env_method",
        "the original traceback with its index, no process left",
        *(6, 60),
        injection.raising_worker,
    ),
    "dying worker": Fault(
        "A worker is killed (SIGKILL), crashes (SIGSEGV) or exits, in step or reset",
        "an error with its index and how it ended, no process left",
        *(4, 40),
        injection.dying_worker,
    ),
    "hanging worker": Fault(
        "An environment sleeps for ever, or computes for ever and ignores SIGTERM",
        "an error with its index after the timeout, no process left",
        *(2, 12),
        injection.hanging_worker,
    ),
    "restarted worker": Fault(
        "The same with `restart=True`, once in a training",
        "training goes on to its end, one restart, finite weights, no process left",
        *(4, 60),
        injection.restarted_worker,
    ),
    "killed parent": Fault(
        "The process that trains is killed (SIGKILL), with workers that wait, or that hang",
        "no worker is left",
        *(2, 12),
        injection.killed_parent,
    ),
    "poison": Fault(
        "NaN, infinity or 1e30 in a reward, NaN or infinity in an observation; also with replay and VecNormalize",
        "`ValueError` that names the environment (1e30 may be learned from), weights as before, next `learn` works",
        *(20, 200),
        injection.poison,
    ),
    "corrupted file": Fault(
        "A bit flipped, bytes overwritten or cut out in a model, SB3's zip, a replay, VecNormalize's file, a checkpoint",
        "`ValueError`, or what was saved is loaded",
        *(50, 1000),
        injection.corruption,
    ),
    "hidden code": Fault(
        "Code in a pickle of SB3's zip (data, weights, variables), replay or VecNormalize, or in settings",
        "`ValueError`, and the code did not run",
        *(len(PAYLOADS), len(PAYLOADS) * len(HIDDEN)),
        injection.payload,
    ),
    "failed save": Fault(
        "The disk is full (file-size limit), or an attribute cannot be written, while an older file is saved over",
        "an error, and the older file is as it was",
        *(8, 8),
        injection.failed_save,
    ),
    "signal": Fault(
        "SIGTERM or Ctrl-C at a random moment of training",
        "a checkpoint is saved, and training goes on from it",
        *(2, 20),
        injection.saved_at_signal,
    ),
    "killed in save": Fault(
        "SIGKILL while checkpoints are saved one after another",
        "the newest checkpoint is readable, and training goes on from it",
        *(2, 50),
        injection.killed_in_save,
    ),
    "torn journal": Fault(
        "The last line of a study's journal is torn",
        "the study goes on with all its trials",
        *(2, 20),
        injection.torn_journal,
    ),
}


def attempts(fault: Fault, fast: bool) -> Iterator[injection.Outcome]:
    for attempt in range(fault.n_fast if fast else fault.n_all):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield fault.attempt(attempt, Path(folder))
            except Exception as error:
                yield False, injection.first_line(error)


def row(name: str, fast: bool) -> dict[str, object]:
    start, fault = time.monotonic(), FAULTS[name]
    if fast:
        worker.GRACE = 1.0
    outcomes = list(attempts(fault, fast))
    for attempt, (survived, ending) in enumerate(outcomes):
        if not survived:
            print(f"  {name}, attempt {attempt}: {ending}", flush=True)
    survived = sum(survived for survived, _ in outcomes)
    return {
        "fault": name,
        "injected": fault.injected,
        "survived if": fault.criterion,
        "tried": len(outcomes),
        "survived": survived,
        "example": outcomes[0][1],
        "seconds": round(time.monotonic() - start, 1),
        "versions": " ".join(f"{package} {version(package)}" for package in PACKAGES),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
    }


def write_readme(rows: list[dict[str, str]]) -> None:
    columns = ("injected", "survived if", "tried", "survived")
    tables = {"faults": [columns, *([str(row[column]) for column in columns] for row in rows)]}
    kills = RESULTS.with_name("kills.csv")
    if kills.exists():
        with kills.open() as file:
            lines = [[line["case"], line["kills"], line["resumed"], line["equal"]] for line in csv.DictReader(file)]
        tables["kills"] = [["training", "SIGKILLs", "resumed", "weights equal, or checkpoint readable"], *lines]
    costs, soak = RESULTS.with_name("costs.csv"), RESULTS.with_name("soak.json")
    if costs.exists():
        with costs.open() as file:
            tables["costs"] = [["measured", "value"], *([line["measured"], line["value"]] for line in csv.DictReader(file))]
    if soak.exists():
        verdict = json.loads(soak.read_text())
        measured = {name: value for name, value in verdict.items() if isinstance(value, dict)}
        columns = list(next(iter(measured.values())))
        lines = [[name, *(str(value[column]) for column in columns)] for name, value in measured.items()]
        tables["soak"] = [[f"minutes {verdict['looked at from minute']} to {verdict['minutes']}", *columns], *lines]
    write_tables(FOLDER / "README.md", tables)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--readme", action="store_true", help="inject nothing, write the tables of the results that are there")
    options = parser.parse_args(arguments)
    if options.list:
        print(*FAULTS, sep="\n")
        return 0
    th.set_num_threads(1)
    earlier = {}
    if RESULTS.exists():
        with RESULTS.open() as file:
            earlier = {line["fault"]: line for line in csv.DictReader(file)}
    if options.readme:
        write_readme(list(earlier.values()))
        return 0
    rows = {}
    for name in options.fault or FAULTS:
        rows[name] = row(name, options.fast)
        print(f"{name}: {rows[name]['survived']} of {rows[name]['tried']} survived, {rows[name]['seconds']} s", flush=True)
    if not options.fast:
        known = {**earlier, **rows}
        lines = [known[name] for name in FAULTS if name in known]
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        write_readme(lines)
    return int(any(line["survived"] != line["tried"] for line in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
