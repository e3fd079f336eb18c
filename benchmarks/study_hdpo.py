"""The whole study of hindsight training: every published instance of every class, one row each; hours of one core.

    python benchmarks/study_hdpo.py [--only backlogged/L4 serial/] [--steps 1000] [--out benchmarks/results/hdpo.json]

Resumable: instances that the file already holds are skipped, and the file is replaced as a whole after each new one. A
row holds the gap to the optimum (or the cost, where no optimum is known), its standard error over test paths, CPU
seconds of the training, the recipe, the command, the machine and the versions. Warehouses keep the weights that are
cheapest on 64 paths held out of the training (`chosen_step`); symmetry-aware weights trained on 16 paths are also
run, unchanged, in the networks of other sizes (`moved`: cost there). `--quick` runs one instance, shortly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
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
    selected,
    serial,
    trained,
    transshipment,
    warehouse,
)
from sim2real.params import Params

Row = dict[str, Any]
FILE = Path(__file__).parent / "results" / "hdpo.json"
SHORTAGES = (4.0, 9.0, 19.0, 39.0)
SIZES = (3, 5, 10, 20, 30, 50)
MOVED = (10, 20, 30, 50)
"""numbers of stores between which weights move"""


def instances() -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Names as the trials have them, and how to build each."""
    store, line, hub = Recipe(600), Recipe(700, batch=256, periods=100), Recipe(400, 3e-3, batch=256, paths=8192)
    for lead_time in (1, 4, 7, 10, 15, 20):
        for p in SHORTAGES:
            yield f"backlogged/L{lead_time}-p{p:g}", partial(backlogged, lead_time, p, store)
    for lead_time in (1, 2, 3, 4):
        for p in SHORTAGES:
            yield f"lost/L{lead_time}-p{p:g}", partial(lost, lead_time, p, store)
            yield f"serial/L{lead_time}-p{p:g}", partial(serial, lead_time, p, line)
    for stores in (3, 5, 10):
        for correlation in (0.0, 0.5):
            for lead_time in (2, 6):
                for p in (4.0, 9.0):
                    name = f"transshipment/n{stores}-r{correlation:g}-L{lead_time}-p{p:g}"
                    yield name, partial(transshipment, stores, correlation, lead_time, p, hub)
    for paths in (16, 256, 8192):
        few = Recipe(400, batch=min(paths, 256), paths=paths)
        for stores in SIZES:
            for kind, rate in (("symmetric", 3e-3), ("plain", 3e-4)):
                build = partial(warehouse, stores, replace(few, rate=rate), symmetric=kind == "symmetric")
                yield f"warehouse/n{stores}-{paths}-{kind}", build


def measured(trial: Trial, *, seed: int, paths: int, periods: int) -> Row:
    """Train, then test: one row."""
    row: Row = {"instance": trial.name}
    if trial.optimum is None:
        nu, seconds, row["chosen_step"] = selected(trial, max(trial.recipe.steps // 20, 1), seed=seed)
    else:
        nu, seconds = trained(trial, seed=seed)
    noise, ignore = held_out(trial, paths, periods), 3 * periods // 5
    cost = held_out_cost(trial, nu, noise, ignore)
    row |= {
        "cost": float(cost.mean()),
        "cost_stderr": float(cost.std()) / math.sqrt(len(cost)),
        "optimum": trial.optimum,
        "cpu_seconds": round(seconds, 1),
        "recipe": asdict(trial.recipe),
        "seed": seed,
        "test": {"paths": paths, "periods": periods, "ignore": ignore},
    }
    if trial.optimum is not None:
        row["gap"], row["gap_stderr"] = gap(trial, cost, noise, ignore)
    elif trial.name.endswith("-16-symmetric") and len(trial.task.mean) in MOVED:
        row["moved"] = {str(n): moved(nu, n, paths, periods) for n in MOVED if n != len(trial.task.mean)}
    return row


def moved(nu: Params, stores: int, paths: int, periods: int) -> float:
    """Cost of symmetry-aware weights in the one-warehouse network of so many stores."""
    there = warehouse(stores, Recipe(), symmetric=True)
    return float(held_out_cost(there, nu, held_out(there, paths, periods), 3 * periods // 5).mean())


def stored(path: Path = FILE) -> list[Row]:
    """Rows of the file, none when there is none."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def save(rows: list[Row], path: Path) -> None:
    """One line per row; the old file stays if this is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    part.replace(path)


def run(path: Path, only: Sequence[str], *, steps: int | None, seed: int, quick: bool) -> None:
    """Append the rows that are missing, one by one."""
    torch.set_num_threads(1)
    where = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    for name, build in instances():
        known = any((row["instance"], row["seed"]) == (name, seed) for row in stored(path))
        if known or not any(part in name for part in only):
            continue
        trial = build()
        if steps is not None:
            trial = replace(trial, recipe=replace(trial.recipe, steps=steps))
        # paths of fifty stores X
        size = {"paths": 50, "periods": 100} if quick else {"paths": 500 if trial.optimum else 200, "periods": 5000}
        options = f" --steps {steps}" if steps is not None else ""
        command = f"python benchmarks/study_hdpo.py --only {name} --seed {seed}{options}"
        row = measured(trial, seed=seed, **size) | {"command": command} | where
        save([*stored(path), row], path)
        shown = {key: row.get(key) for key in ("instance", "cost", "optimum", "gap", "gap_stderr", "cpu_seconds")}
        print(json.dumps(shown), flush=True)
        if quick:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of instances")
    parser.add_argument("--steps", type=int, help="gradient steps (default: those of the class)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one instance, a short test")
    arguments = parser.parse_args()
    run(arguments.out, arguments.only, steps=arguments.steps, seed=arguments.seed, quick=arguments.quick)


if __name__ == "__main__":
    main()
