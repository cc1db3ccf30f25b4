"""
Speed of the update on a GPU, beside that on the same machine's CPU; see README.md beside this file.

    python benchmarks/speed/gpu.py      # some minutes

Writes results/gpu.csv and the table in README.md.
"""

import torch as th
from benchmark import HERE, compare_updates, make_update, read_tables, write_rows
from readme_tables import write_tables

ARMS = ("SB3 PPO", "SB3 PPO, fused Adam", "R2VPO", "R2VPO, compiled", "R2VPOOff, compiled")


def main() -> None:
    rows = []
    for setting in ("MLP 64x64, batch 64", "MLP 64x64, batch 512"):
        arms = {name: make_update(name, setting, "cuda") for name in ARMS}
        arms["SB3 PPO on the CPU"] = make_update("SB3 PPO", setting)
        rows += compare_updates(setting, arms, rounds=4)
    device = f"{th.cuda.get_device_name()}, torch {th.__version__}"
    write_rows("gpu", [row | {"device": device} for row in rows])
    write_tables(HERE / "README.md", read_tables())


if __name__ == "__main__":
    main()
