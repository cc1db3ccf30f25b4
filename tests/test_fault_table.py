"""The fast part of `benchmarks/faults`: of each kind of fault, some are injected, and all are survived."""

import importlib
import pickle
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "faults"


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("optuna")
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("table")
    sys.path.remove(str(FOLDER))


NAMES = (
    *("raising environment", "dying worker", "hanging worker", "restarted worker", "killed parent", "poison"),
    *("corrupted file", "hidden code", "failed save", "signal", "killed in save", "torn journal"),
)


def test_every_kind_is_tried(table) -> None:
    assert tuple(table.FAULTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_faults_are_survived(table, name: str, capsys) -> None:
    row = table.row(name, fast=True)
    assert row["tried"] >= 2
    assert row["survived"] == row["tried"], capsys.readouterr().out


def test_the_hidden_code_would_run(table, tmp_path: Path) -> None:
    for number, hide in enumerate(table.HIDDEN.values()):
        marker = tmp_path / str(number)
        pickle.loads(pickle.dumps(hide(marker)))
        assert marker.exists()


def test_damages_are_damages(table) -> None:
    import random

    damage = sys.modules["damage"]
    content = bytes(range(256)) * 8
    changed = [damage.mutated(content, random.Random(seed)) != content for seed in range(200)]
    # Zeros may be overwritten by zeros
    assert sum(changed) >= 195


def test_an_attempt_that_fails_is_counted_and_shown(table, monkeypatch, capsys) -> None:
    monkeypatch.setitem(table.FAULTS, "poison", table.Fault("", "", 3, 3, lambda attempt, folder: (attempt != 1, "lost")))
    assert table.main(["--fast", "--fault", "poison"]) == 1
    assert "poison, attempt 1: lost" in capsys.readouterr().out
