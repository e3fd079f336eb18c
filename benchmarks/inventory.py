"""Inventory networks by hindsight differentiation: gaps to exact optima, value of symmetry, speed.

`m-hdpo/CLASS`: relative gap of the trained network to the optimum, on test paths that the optimal policy runs as well
(transshipment: to a lower bound); `CLASS-stderr` its standard error over paths; `minutes` are those of one core for the
training of one store, backlogged, lead time 4, shortage cost 9. Quick: fewer steps, one instance of each of the first
two classes.

`m-symmetry/gain`: one warehouse, 16 training paths, share of the plain network's cost that the symmetry-aware one
saves, each after the number of steps that is best on held-out paths; `transfer`: cost of weights trained with 10
stores, run with 50, over that of weights trained there, less 1.

`m-speed`: one warehouse, 50 stores, 8192 paths: simulated periods with their gradient per second, ours over the peer's
(`inventory_peer`), each in the number of paths at a time that suits it best; weights of the published sizes (32 wide,
context 256), same gradient. `ratio` is to the faster of the peer's two forms; `ratio-order-up-to` is that of the
simulators alone, under a policy that costs next to nothing.
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
from benchmarks.bars import Figure, main
from benchmarks.inventory_training import (
    Recipe,
    Trial,
    backlogged,
    gap,
    held_out,
    held_out_cost,
    lost,
    serial,
    train,
    trained,
    transshipment,
    warehouse,
)
from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import StoreTraits, symmetry_aware_policy, symmetry_aware_weights
from sim2real.mdp import Noise
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.simulators.inventory_tasks import InventoryTask, one_warehouse_task, store_traits, task_noise


def m_hdpo(quick: bool) -> Iterator[Figure]:
    """Trains one instance of each class (quick: of the first two, with fewer steps)."""
    steps = 500 if quick else 2000
    trials = [backlogged(4, 9.0, Recipe(steps)), lost(4, 9.0, Recipe(steps))]
    if not quick:
        trials += [serial(4, 9.0), transshipment(5, 0.5, 2, 4.0, Recipe(2000, 3e-3, batch=256, paths=8192))]
    for trial in trials:
        name = trial.name.split("/")[0]
        nu, seconds = trained(trial)
        noise = held_out(trial, 500, 1000 if quick else 3000)
        value, stderr = gap(trial, nu, noise, 500)
        yield Figure(name, value, "1", len(noise.process), {"backlogged": 0.0011}.get(name))
        yield Figure(f"{name}-stderr", stderr, "1", len(noise.process))
        if name == "backlogged":
            yield Figure("minutes", seconds / 60, "CPU minutes", 1, 241 / 60)


def best_on_held_out(trial: Trial, every: int, chosen: Noise, judged: Noise, ignore: int) -> tuple[float, Params]:
    """Cost on `judged` of the weights that are cheapest on `chosen` among those after each `every` steps."""
    best, cheapest = trial.weights, float("inf")
    for step, nu in train(trial):
        if step % every == 0:
            cost = float(held_out_cost(trial, nu, chosen, ignore).mean())
            if cost < cheapest:
                best, cheapest = {key: value.clone() for key, value in nu.items()}, cost
    return float(held_out_cost(trial, best, judged, ignore).mean()), best


def m_symmetry(quick: bool) -> Iterator[Figure]:
    """16 training paths; 10 stores (full: also 50)."""
    steps, costs, weights = (400 if quick else 2000), {}, {}
    for stores in (10,) if quick else (10, 50):
        recipe = Recipe(steps, batch=16, paths=16)
        for symmetric in (False, True):
            trial = warehouse(stores, replace(recipe, rate=3e-3 if symmetric else 3e-4), symmetric=symmetric)
            chosen = task_noise(trial.task, 64, 150, seed=trial.task.train_seed + 1, dtype=torch.float32)
            judged = held_out(trial, 128, 400)
            costs[stores, symmetric], weights[stores] = best_on_held_out(trial, steps // 10, chosen, judged, 60)
        yield Figure(f"plain-{stores}", costs[stores, False], "cost", 128)
        yield Figure(f"symmetric-{stores}", costs[stores, True], "cost", 128)
        yield Figure(f"gain-{stores}", 1 - costs[stores, True] / costs[stores, False], "1", 128)
    if not quick:
        there = warehouse(50, Recipe(1), symmetric=True)
        moved = float(held_out_cost(there, weights[10], held_out(there, 128, 400), 60).mean())
        yield Figure("transfer", moved / costs[50, True] - 1, "1", 128)


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
        rates = {
            name: max(periods / _seconds(form, paths, size, rounds) for size in sizes)
            for name, form in {"ours": mine, **others}.items()
        }
        ours = rates.pop("ours")
        yield Figure(f"periods-per-second{label}", ours, "1/s", rounds)
        for name, other in others.items():
            yield Figure(f"peer-{name}{label}", rates[name], "1/s", rounds)
            yield Figure(f"difference-{name}{label}", _difference(mine, other), "1", 1)
        yield Figure(f"ratio{label}", ours / max(rates.values()), "1", rounds)


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
    main({"m-hdpo": m_hdpo, "m-symmetry": m_symmetry, "m-speed": m_speed})
