"""
Collect the evaluations of runs of `r2vpo train --eval-freq ...` into one CSV file, a row for each evaluation.

    python benchmarks/control/collect_evaluations.py logs -o benchmarks/control/first_runs.csv
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import yaml
from experiment import package_versions, processor


def read_run(run: Path) -> list[dict[str, object]]:
    """The rows of one run, from `evaluations.npz` and the arguments that the Zoo saves beside it."""
    # The file is an ordered dict in Python's own YAML tag, written by the Zoo on this machine
    (arguments_file,) = run.glob("*/args.yml")
    arguments = dict(yaml.unsafe_load(arguments_file.read_text()))
    with np.load(run / "evaluations.npz") as evaluations:
        timesteps, returns = evaluations["timesteps"], evaluations["results"]
    return [
        {
            "algo": arguments["algo"],
            "env": str(arguments["env"]),
            "seed": arguments["seed"],
            "hyperparams": json.dumps(arguments["hyperparams"] or {}),
            "timesteps": int(steps),
            "mean_return": round(float(episodes.mean()), 2),
            "std_return": round(float(episodes.std()), 2),
            "returns": " ".join(f"{episode:.1f}" for episode in episodes),
            "versions": package_versions(),
            "processor": processor(),
        }
        for steps, episodes in zip(timesteps, returns, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="log folder of `r2vpo train`")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for run in sorted({path.parent for path in args.folder.rglob("evaluations.npz")}) for row in read_run(run)]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"Wrote {len(rows)} rows to {args.output}")


if __name__ == "__main__":
    main()
