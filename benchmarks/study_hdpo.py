"""The whole study of hindsight training: every published instance of every class, one row each; hours of one core.

    python benchmarks/study_hdpo.py [--only backlogged/] [--steps 2000] [--out benchmarks/results/hdpo.json]

Resumable: instances that the file already holds are skipped, and the file is replaced as a whole after each new one. A
row holds the gap to the optimum (or the cost, where no optimum is known), its standard error over test paths, CPU
seconds of the training, the recipe, the command, the machine and the versions. `--quick` runs one instance, shortly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inventory_training import (
    Recipe,
    Trial,
    backlogged,
    gap,
    held_out,
    held_out_cost,
    lost,
    serial,
    trained,
    transshipment,
    warehouse,
)

Row = dict[str, Any]
SHORTAGES = (4.0, 9.0, 19.0, 39.0)


def instances(steps: int) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Names as the trials have them, and how to build each."""
    recipe, pooled = Recipe(steps), Recipe(steps, 3e-3, batch=256, paths=8192)
    for lead_time in (1, 4, 7, 10, 15, 20):
        for p in SHORTAGES:
            yield f"backlogged/L{lead_time}-p{p:g}", partial(backlogged, lead_time, p, recipe)
    for lead_time in (1, 2, 3, 4):
        for p in SHORTAGES:
            yield f"lost/L{lead_time}-p{p:g}", partial(lost, lead_time, p, recipe)
            yield f"serial/L{lead_time}-p{p:g}", partial(serial, lead_time, p, replace(recipe, batch=256, periods=100))
    for stores in (3, 5, 10):
        for correlation in (0.0, 0.5):
            for lead_time in (2, 6):
                for p in (4.0, 9.0):
                    name = f"transshipment/n{stores}-r{correlation:g}-L{lead_time}-p{p:g}"
                    yield name, partial(transshipment, stores, correlation, lead_time, p, pooled)
    for stores in (3, 5, 10, 20, 30, 50):
        for paths in (16, 256, 8192):
            few = Recipe(steps, batch=min(paths, 256), paths=paths)
            for kind, rate in (("symmetric", 3e-3), ("plain", 3e-4)):
                build = partial(warehouse, stores, replace(few, rate=rate), symmetric=kind == "symmetric")
                yield f"warehouse/n{stores}-{paths}-{kind}", build


def measured(trial: Trial, *, seed: int, paths: int, periods: int) -> Row:
    """Train, then test: one row."""
    nu, seconds = trained(trial, seed=seed)
    noise, ignore = held_out(trial, paths, periods), 3 * periods // 5
    cost = held_out_cost(trial, nu, noise, ignore)
    row: Row = {
        "instance": trial.name,
        "cost": float(cost.mean()),
        "cost_stderr": float(cost.std()) / math.sqrt(len(cost)),
        "optimum": trial.optimum,
        "cpu_seconds": round(seconds, 1),
        "recipe": asdict(trial.recipe),
        "seed": seed,
        "test": {"paths": paths, "periods": periods, "ignore": ignore},
    }
    if trial.optimum is not None:
        row["gap"], row["gap_stderr"] = gap(trial, nu, noise, ignore)
    return row


def stored(path: Path) -> list[Row]:
    """Rows of the file, none when there is none."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def run(path: Path, steps: int, only: str, seed: int, quick: bool) -> None:
    """Append the rows that are missing, one by one."""
    torch.set_num_threads(1)
    where = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    size = {"paths": 50, "periods": 100} if quick else {"paths": 500, "periods": 5000}
    for name, build in instances(steps):
        rows = stored(path)
        if only not in name or any((row["instance"], row["seed"]) == (name, seed) for row in rows):
            continue
        rows.append(measured(build(), seed=seed, **size) | where)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        part.replace(path)  # a study that is stopped while writing keeps its old rows
        print(json.dumps({key: rows[-1].get(key) for key in ("instance", "cost", "optimum", "gap", "cpu_seconds")}))
        if quick:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hdpo.json")
    parser.add_argument("--only", default="", help="part of the instance's name")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one instance, a short test")
    arguments = parser.parse_args()
    run(arguments.out, arguments.steps, arguments.only, arguments.seed, arguments.quick)


if __name__ == "__main__":
    main()
