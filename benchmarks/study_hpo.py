"""The whole study of hybrid policies: HPO, HPO with counterfactual branches and PPO, up to five seeds; resumable.

    python benchmarks/study_hpo.py [--only lqr/3-2] [--seeds 5] [--out benchmarks/results/hpo.json]

Resumable: instances and seeds that the file already holds are skipped, and the file is replaced as a whole after each
new row. A row holds the metric of the reference on the test paths at the weights that were best on the development
paths, the paired gap to the optimum where it is known, the learning curve on the development paths (updates, periods
simulated, CPU seconds, metric), the recipe, the command, the machine and the versions. `--quick` runs one instance,
shortly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.hybrid_tasks import HybridTask, heavy_tail_task, lqr_task, metric, replenishment_task, task_policy
from benchmarks.hybrid_training import Recipe, train
from benchmarks.rows import Row, append, present, stamp, stored
from sim2real.hybrid_policy import greedy_policy

FILE = Path(__file__).parent / "results" / "hpo.json"


@dataclass(frozen=True)
class Instance:
    """`name` is TASK/SIZE/METHOD."""

    name: str
    task: Callable[[], HybridTask]
    recipe: Recipe
    seeds: int = 5
    every: int = 1
    """epochs between checks on the development paths"""


HPO = Recipe()
BRANCHES = replace(
    HPO,
    method="branches",
    epochs=40,
    branch_times=3,
    branch_before=3,
    branch_steps=3,
    first_weight=200.0,
    response=0.2,
)
"""three branches of three steps, in which an optimal regulator does all but 0.1 % of its work"""
PPO = replace(HPO, method="ppo", rate=1e-3, passes=4, minibatches=4)
LONG: dict[str, Any] = {"epochs": 16, "rate": 2e-3, "width": 64, "ramp": 0.4, "buffer": 12, "passes": 4}
"""joint replenishment: exploration at first only, edges that teach nothing"""
FEW: dict[str, Any] = LONG | {"method": "branches", "branch_times": 4, "cross_term": False}


def instances() -> Iterator[Instance]:
    """Names, tasks and recipes, the cheapest first."""
    yield Instance("lqr/3-2/hpo", partial(lqr_task, 3), replace(HPO, epochs=40))
    yield Instance("lqr/16-2/hpo", partial(lqr_task, 16), HPO)
    yield Instance("lqr/48-2/hpo", partial(lqr_task, 48), HPO)
    for items in (1, 2, 3):
        few = partial(replenishment_task, items, periods=60, rule=(1.1, 6.0))
        yield Instance(f"jrp/{items}/branches", few, replace(HPO, **FEW), seeds=1)
        yield Instance(f"jrp/{items}/hpo", few, replace(HPO, **LONG), seeds=1)
    # some 50 periods lie between orders
    heavy = FEW | {"epochs": 20, "rate": 3e-3, "buffer": 50, "settle": True, "tail": 100, "cut": 100, "branch_times": 6}
    yield Instance("jrp/2-nb/branches", partial(heavy_tail_task, 310), replace(HPO, **heavy), seeds=2)
    yield Instance("lqr/16-2/ppo", partial(lqr_task, 16), PPO)
    yield Instance("lqr/3-2/branches", partial(lqr_task, 3), replace(BRANCHES, epochs=27))
    yield Instance("lqr/16-2/branches", partial(lqr_task, 16), BRANCHES)
    yield Instance("lqr/48-2/ppo", partial(lqr_task, 48), PPO)
    many = LONG | {"width": 128, "epochs": 24, "discount": 0.93}
    yield Instance("jrp/50/hpo", partial(replenishment_task, 50, periods=60), replace(HPO, **many), seeds=1)
    ruled = partial(replenishment_task, 50, periods=60, rule=(-2.0, 4.0))
    yield Instance("jrp/50/rule", ruled, replace(HPO, **many), seeds=1)
    slow = many | {"epochs": 64, "rate": 1e-3, "minibatches": 4}
    yield Instance("jrp/50/ppo", partial(replenishment_task, 50, periods=60), replace(PPO, **slow), seeds=1, every=2)


def measured(instance: Instance, seed: int) -> Row:
    """Train, keep the weights that are best on the development paths, test: one row."""
    task, recipe = instance.task(), instance.recipe
    policy = greedy_policy(task_policy(task, stochastic=recipe.method == "ppo"))
    best, nu, curve = math.inf, {}, []
    for epoch, progress in enumerate(train(task, recipe, seed=seed), 1):
        if epoch % instance.every and epoch != recipe.epochs:
            continue
        cost = float(metric(task, policy, progress.nu, task.dev).mean())
        curve.append([progress.updates, progress.periods, round(progress.seconds, 1), round(cost, 6)])
        if cost < best:
            best, nu = cost, {key: value.detach().clone() for key, value in progress.nu.items()}
    cost = metric(task, policy, nu, task.test)
    row: Row = {
        "instance": instance.name,
        "seed": seed,
        "cost": float(cost.mean()),
        "cost_stderr": float(cost.std()) / math.sqrt(len(cost)),
        "dev": best,
        "cpu_seconds": curve[-1][2],
        "recipe": asdict(recipe),
        "curve": curve,
    }
    if task.optimum is not None:
        optimum = task.optimum(task.test)
        excess = cost - optimum
        scale = float(optimum.mean())
        row |= {"optimum": scale, "gap": float(excess.mean()) / scale}
        row["gap_stderr"] = float(excess.std()) / math.sqrt(len(excess)) / scale
        row["optimum_dev"] = float(task.optimum(task.dev).mean())
    return row


def run(path: Path, only: str, seeds: int, quick: bool) -> None:
    """Append the rows that are missing, one by one."""
    torch.set_num_threads(1)
    where = stamp("torch")
    for instance in instances():
        if quick:
            instance = replace(instance, recipe=replace(instance.recipe, epochs=2))
        for seed in range(min(seeds, instance.seeds)):
            if only not in instance.name or present(stored(path), instance=instance.name, seed=seed):
                continue
            row = measured(instance, seed) | where
            append(path, row)
            print(
                json.dumps({key: row.get(key) for key in ("instance", "seed", "cost", "gap", "cpu_seconds")}),
                flush=True,
            )
            if quick:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--only", default="", help="part of the instance's name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one instance, two epochs")
    arguments = parser.parse_args()
    run(arguments.out, arguments.only, arguments.seeds, arguments.quick)


if __name__ == "__main__":
    main()
