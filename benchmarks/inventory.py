"""Inventory networks by hindsight differentiation: gaps to exact optima, value of symmetry, speed.

Trainings take a minute each, so the first two bars read the rows of `study_hdpo.py` in `results/hdpo.json`, and every
figure names the command of its row; `--quick` trains anew, shortly, and reads none.

`m-hdpo/CLASS`: largest relative gap of a trained network to the optimum over the instances of the class that have rows
(n of them), each on 500 test paths of 5000 periods that the optimum runs as well (transshipment: the relaxed problem,
whose cost is a lower bound); `CLASS-INSTANCE`, `-stderr`: each instance, standard error over paths. `minutes`: CPU
minutes of one core for the training of one store, backlogged, lead time 4, shortage cost 9.

`m-symmetry/gain-N`: one warehouse, N stores, 16 training paths: share of the plain network's cost that the
symmetry-aware one saves, both on the same test paths, each with the weights that are best on held-out paths; `gain` is
the smallest. `transfer-N-M`: cost of weights trained with N stores, run with M, over that of weights trained there,
less 1; `transfer` is the largest.

`m-speed`: one warehouse, 50 stores, 8192 paths: simulated periods with their gradient per second, ours over the peer's
(`inventory_peer`), each in the number of paths at a time that suits it best; weights of the published sizes (32 wide,
context 256), same gradient. `ratio` is to the faster of the peer's two forms; `ratio-order-up-to` is that of the
simulators alone, under a policy that costs next to nothing.

`m-warp`: one warehouse, 3 and 10 stores, 8192 paths, the same policy: CPU seconds of the torch simulator over those of
its Warp twin (`ratio-N`), one thread, gradient of 8 periods, after both have run once; `difference-N` of the gradients.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import inventory_peer as peer
from benchmarks.bars import Figure, MissingError, main
from benchmarks.inventory_training import (
    Recipe,
    backlogged,
    gap,
    held_out,
    held_out_cost,
    lost,
    selected,
    trained,
    warehouse,
)
from benchmarks.study_hdpo import FILE, MOVED, Row, stored
from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import StoreTraits, symmetry_aware_policy, symmetry_aware_weights
from sim2real.mdp import Noise
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.simulators.inventory_tasks import InventoryTask, one_warehouse_task, store_traits, task_noise


def rows_of(task: str) -> dict[str, Row]:
    """Stored rows of seed 0 by instance. Raises `MissingError` when there are none."""
    found = {row["instance"]: row for row in stored() if row["instance"].startswith(task) and row["seed"] == 0}
    if not found:
        raise MissingError(f"no rows of {task} in {FILE}; run make study-hdpo")
    return found


def m_hdpo(quick: bool) -> Iterator[Figure]:
    """Quick: 500 steps on one instance of each of the first two classes."""
    if quick:
        for trial in (backlogged(4, 9.0, Recipe(500)), lost(4, 9.0, Recipe(500))):
            nu, _seconds = trained(trial)
            noise = held_out(trial, 500, 1000)
            value, stderr = gap(trial, held_out_cost(trial, nu, noise, 500), noise, 500)
            yield Figure(f"{trial.name.split('/')[0]}-quick", value, "1", len(noise.process))
            yield Figure(f"{trial.name.split('/')[0]}-quick-stderr", stderr, "1", len(noise.process))
        return
    for kind in ("backlogged", "lost", "serial", "transshipment"):
        rows = rows_of(f"{kind}/")
        worst = max(rows.values(), key=lambda row: row["gap"])
        reference = {"backlogged": 0.0011}.get(kind)
        yield Figure(kind, worst["gap"], "1", len(rows), reference, worst["command"])
        for name, row in rows.items():
            label, paths = name.replace("/", "-"), row["test"]["paths"]
            yield Figure(label, row["gap"], "1", paths, command=row["command"])
            yield Figure(f"{label}-stderr", row["gap_stderr"], "1", paths, command=row["command"])
    row = rows_of("backlogged/L4-p9")["backlogged/L4-p9"]
    yield Figure("minutes", row["cpu_seconds"] / 60, "CPU minutes", 1, 241 / 60, row["command"])


def m_symmetry(quick: bool) -> Iterator[Figure]:
    """Quick: 100 steps with 10 stores."""
    if quick:
        costs = []
        for symmetric in (False, True):
            recipe = Recipe(100, 3e-3 if symmetric else 3e-4, batch=16, paths=16)
            trial = warehouse(10, recipe, symmetric=symmetric)
            nu, _seconds, _step = selected(trial, 25)
            costs.append(float(held_out_cost(trial, nu, held_out(trial, 64, 200), 60).mean()))
        yield Figure("gain-10-quick", 1 - costs[1] / costs[0], "1", 64)
        return
    rows = rows_of("warehouse/")
    shared = {n: rows[name] for n in MOVED if (name := f"warehouse/n{n}-16-symmetric") in rows}
    gains = {}
    for n, row in shared.items():
        if plain := rows.get(f"warehouse/n{n}-16-plain"):
            gains[n] = Figure(f"gain-{n}", 1 - row["cost"] / plain["cost"], "1", 1, command=row["command"])
            yield Figure(f"plain-{n}", plain["cost"], "cost", plain["test"]["paths"], command=plain["command"])
            yield Figure(f"symmetric-{n}", row["cost"], "cost", row["test"]["paths"], command=row["command"])
            yield gains[n]
    if gains:
        yield replace(min(gains.values(), key=lambda each: each.value), metric="gain", n=len(gains))
    transfers = [
        Figure(f"transfer-{n}-{m}", row["moved"][str(m)] / there["cost"] - 1, "1", 1, command=row["command"])
        for n, row in shared.items()
        for m, there in shared.items()
        if m != n
    ]
    yield from transfers
    if transfers:
        yield replace(max(transfers, key=lambda each: each.value), metric="transfer", n=len(transfers))


def m_speed(quick: bool) -> Iterator[Figure]:
    """Periods per second, forward and backward, on one thread; float32."""
    periods, paths, rounds = (8, 512, 2) if quick else (8, 8192, 1)  # an order takes five periods to reach a store
    task = one_warehouse_task(50)
    noise = task_noise(task, paths, periods, seed=task.train_seed, dtype=torch.float32)
    traits = store_traits(task)
    traits = replace(traits, mean=traits.mean.float(), features=traits.features.float())
    sizes = (512,) if quick else (512, 2048)
    network = symmetry_aware_policy(traits), symmetry_aware_weights(traits, context=256)
    levels = {"level": 4.0 * traits.mean, "top": 8.0 * traits.mean.sum(0, keepdim=True)}
    races = {
        "": (network, {"stacked": peer.stacked, "nodes": peer.nodes}),
        "-order-up-to": ((order_up_to_policy(50), levels), {"stacked": peer.order_up_to}),
    }
    for label, ((policy, weights), forms) in races.items():
        nu = {key: value.float() for key, value in weights.items()}
        mine = partial(our_gradient, task, policy, nu, noise)
        others = {name: peer_gradient(task, decide, nu, noise, traits) for name, decide in forms.items()}
        racers: dict[str, Callable[[slice], Params]] = {"ours": mine, **others}
        rates = {
            name: max(periods / _seconds(form, paths, size, rounds) for size in sizes) for name, form in racers.items()
        }
        ours = rates.pop("ours")
        yield Figure(f"periods-per-second{label}", ours, "1/s", rounds)
        for name, other in others.items():
            yield Figure(f"peer-{name}{label}", rates[name], "1/s", rounds)
            yield Figure(f"difference-{name}{label}", _difference(mine, other), "1", 1)
        yield Figure(f"ratio{label}", ours / max(rates.values()), "1", rounds)


def m_warp(quick: bool) -> Iterator[Figure]:
    """Quick: 512 paths, 3 stores."""
    from sim2real.simulators.warp_inventory import warp_inventory_network  # Warp takes seconds to start

    periods, paths, rounds = 8, 512 if quick else 8192, 2
    for stores in (3,) if quick else (3, 10):
        task, names = one_warehouse_task(stores), ("holding", "underage", "warehouse_holding", "purchase")
        if task.routes is None:
            raise TypeError("a task with warehouses has routes")
        costs = {key: task.theta[key].tolist() for key in names}
        twin = replace(task, mdp=warp_inventory_network(task.routes, start=task.mean.tolist(), **costs))
        mean = task.mean.float()
        levels = {"level": 4.0 * mean, "top": 8.0 * mean.sum(0, keepdim=True)}
        noise = task_noise(task, paths, periods, seed=task.train_seed, dtype=torch.float32)
        torch_form, warp_form = (
            partial(our_gradient, each, order_up_to_policy(stores), levels, noise) for each in (task, twin)
        )
        yield Figure(f"difference-{stores}", _difference(warp_form, torch_form), "1", 1)
        ratio = _seconds(torch_form, paths, paths, rounds) / _seconds(warp_form, paths, paths, rounds)
        yield Figure(f"ratio-{stores}", ratio, "1", rounds)


def order_up_to_policy(stores: int) -> Policy:
    """The peer's `order_up_to` on the states of the library."""

    def act(nu: Params, state: Tensor) -> Tensor:
        positions = state[..., :-3].unflatten(-1, (-1, stores)).sum(-2)
        return torch.relu(torch.cat([nu["level"] - positions, nu["top"] - state.sum(-1, keepdim=True)], -1))

    return deterministic_policy(act)


def our_gradient(task: InventoryTask, policy: Policy, nu: Params, noise: Noise, part: slice) -> Params:
    theta = {key: value.float() for key, value in task.theta.items()}
    piece = Noise(noise.initial[part], noise.process[part], noise.policy[part])
    return pathwise_gradient(task.mdp, policy, theta, nu, piece).grad


def peer_gradient(
    task: InventoryTask, decide: peer.Decide, nu: Params, noise: Noise, traits: StoreTraits
) -> Callable[[slice], Params]:
    """The same gradient by the peer; its arrays are laid out beforehand."""
    theta, n = {key: value.float() for key, value in task.theta.items()}, len(traits.mean)
    pipelines = task.mdp.initial_state(theta, noise.initial)[:, : n * traits.store_width]
    start, demand = pipelines.unflatten(-1, (-1, n)).mT.contiguous(), noise.process.mT.contiguous()
    times = torch.tensor(task.routes.lead_times[0] if task.routes else ())

    def gradient(part: slice) -> Params:
        leaves = {key: value.detach().requires_grad_() for key, value in nu.items()}
        cost = peer.total_cost(decide, leaves, theta, traits, times, start[part], demand[part])
        return dict(zip(leaves, torch.autograd.grad(-cost / len(start[part]), list(leaves.values())), strict=True))

    return gradient


def _difference(mine: Callable[[slice], Params], other: Callable[[slice], Params]) -> float:
    """Largest relative difference of the gradients over 64 paths."""
    pairs = zip(mine(slice(0, 64)).values(), other(slice(0, 64)).values(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in pairs)


def _seconds(form: Callable[[slice], Params], paths: int, size: int, rounds: int) -> float:
    """CPU seconds for the gradient over all paths, `size` at a time; the best of several rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        for first in range(0, paths, size):
            form(slice(first, first + size))
        taken.append(time.process_time() - start)
    return min(taken)


if __name__ == "__main__":
    main({"m-hdpo": m_hdpo, "m-symmetry": m_symmetry, "m-speed": m_speed, "m-warp": m_warp})
