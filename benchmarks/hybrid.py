"""Training with mixed gradients against optima and PPO: the figures of the rows of `study_hpo.py`.

The rows are those of `results/hpo.json`; `make study-hpo` trains what it lacks, row by row. Sizes without rows are left
out, n is the number of seeds behind a figure. `--quick` trains one small instance of each task and reads no rows.

`m-lqr`, switched LQR, test set of 1024 starts, at the weights that are best on the development set:

    N-M             gap to the exact optimum, mean over seeds (n of them); N-M-stderr over seeds
    ppo-ratio-N     gap of PPO after as many epochs, same networks, over that of HPO
    branches-N-M    gap with counterfactual branches, trained on as many simulated periods at most, branches included
    same-periods-N-M, branches-same-periods-N-M
                    lowest gap on the development set within the same number of simulated periods, that of the shorter
                    of the two trainings

`m-jrp`, joint replenishment with K = 64: `N`, gap to the exact optimal policy paired on the 1024 test paths, trained
with counterfactual branches at 4 steps of each rollout; `N-hpo` with a critic instead; `2-nb`, two items with negative
binomial demand, and `2-nb-cost` per item and period (published neural policy 1.423, optimum 1.411). Up to three items
start from an order-up-to rule at six mean demands that orders at random every fourth period; `2-nb` likewise at fifty
mean demands and every 47th period.

`m-jrp50`, 50 items: `best`, the lowest cost on the development paths of any row, HPO from an order-up-to rule (row
`jrp/50/rule`) among them; `updates` of HPO from uniform choices and orders near their mean, `ppo-updates` until
the cost there is within 10 % of it; `ppo-ratio` of the two. When PPO never gets there, the updates it had are a lower
bound, and the metric is called `ppo-ratio-at-least`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.hybrid_tasks import lqr_task, replenishment_task
from benchmarks.rows import Row, stored
from benchmarks.study_hpo import FEW, FILE, HPO, Instance, measured

SIZES = ("3-2", "16-2", "48-2")
REFERENCE = {"3-2": 0.002, "16-2": 0.03}


def rows_of(task: str) -> dict[str, list[Row]]:
    """Stored rows by instance. Raises `MissingError` when there are none."""
    found: dict[str, list[Row]] = {}
    for row in stored(FILE):
        if row["instance"].startswith(task):
            found.setdefault(row["instance"].removeprefix(task), []).append(row)
    if not found:
        raise MissingError(f"no rows of {task} in {FILE}; run make study-hpo")
    return found


def m_lqr(quick: bool) -> Iterator[Figure]:
    """Quick: 3 states, 10 epochs, one seed."""
    if quick:
        small = Instance("lqr/3-2/hpo", lambda: lqr_task(3), replace(HPO, epochs=10))
        yield Figure("3-2-quick", measured(small, 0)["gap"], "1", 1)
        return
    rows = rows_of("lqr/")
    gaps = {name: [row["gap"] for row in each] for name, each in rows.items()}
    for size in SIZES:
        hpo, ppo, branches = (gaps.get(f"{size}/{method}", []) for method in ("hpo", "ppo", "branches"))
        if hpo:
            yield Figure(size, fmean(hpo), "1", len(hpo), REFERENCE.get(size))
        if len(hpo) > 1:
            yield Figure(f"{size}-stderr", stdev(hpo) / len(hpo) ** 0.5, "1", len(hpo))
        if hpo and ppo:
            yield Figure(f"ppo-{size}", fmean(ppo), "1", len(ppo))
            yield Figure(f"ppo-ratio-{size.split('-')[0]}", fmean(ppo) / fmean(hpo), "1", len(ppo))
        if hpo and branches:
            yield Figure(f"branches-{size}", fmean(branches), "1", len(branches))
            plain, branched = rows[f"{size}/hpo"], rows[f"{size}/branches"]
            limit = min(row["curve"][-1][1] for row in (*plain, *branched))
            yield Figure(f"same-periods-{size}", fmean(best_within(row, limit) for row in plain), "1", len(plain))
            value = fmean(best_within(row, limit) for row in branched)
            yield Figure(f"branches-same-periods-{size}", value, "1", len(branched))


def best_within(row: Row, periods: int) -> float:
    """Lowest gap on the development paths before more than `periods` are simulated."""
    return float(min(point[3] for point in row["curve"] if point[1] <= periods) / row["optimum_dev"] - 1)


def m_jrp(quick: bool) -> Iterator[Figure]:
    """Quick: one item, 10 epochs of 40 periods."""
    if quick:
        recipe = replace(HPO, **FEW | {"epochs": 10, "buffer": 8})
        small = Instance(
            "jrp/1/branches", lambda: replenishment_task(1, periods=40, paths=512, rule=(1.1, 6.0)), recipe
        )
        yield Figure("1-quick", measured(small, 0)["gap"], "1", 1)
        return
    for name, each in rows_of("jrp/").items():
        size, method = name.split("/")
        if size == "50":
            continue
        label = size if method == "branches" else f"{size}-{method}"
        if size == "2-nb":
            yield Figure(f"{label}-cost", fmean(row["cost"] for row in each), "cost", len(each), 1.423)
        yield Figure(label, fmean(row["gap"] for row in each), "1", len(each))


def m_jrp50(quick: bool) -> Iterator[Figure]:
    """Quick prints nothing: fifty items take minutes."""
    if quick:
        raise MissingError("fifty items take minutes; run without --quick")
    rows = rows_of("jrp/50/")
    best = min(point[3] for each in rows.values() for row in each for point in row["curve"])
    yield Figure("best", best, "cost", sum(map(len, rows.values())))
    reached = {name: [first_within(row, 1.1 * best) for row in each] for name, each in rows.items()}
    updates = [each for each in reached["hpo"] if each is not None]
    if not updates:
        raise MissingError("HPO has not come within 10 % of the best cost")
    yield Figure("updates", fmean(updates), "1", len(updates))
    peers = rows.get("ppo", [])
    if peers:
        had = [
            each if each is not None else row["curve"][-1][0] for each, row in zip(reached["ppo"], peers, strict=True)
        ]
        yield Figure("ppo-updates", fmean(had), "1", len(had))
        name = "ppo-ratio-at-least" if None in reached["ppo"] else "ppo-ratio"
        yield Figure(name, fmean(had) / fmean(updates), "1", len(had))


def first_within(row: Row, cost: float) -> int | None:
    """Updates until the development cost is at most `cost`."""
    return next((point[0] for point in row["curve"] if point[3] <= cost), None)


if __name__ == "__main__":
    main({"m-lqr": m_lqr, "m-jrp": m_jrp, "m-jrp50": m_jrp50})
