"""Inventory networks, by hindsight differentiation
===================================================

Train ordering policies through the simulator: one store ends within 0.1 % of its exact optimum in half a minute.

Demand is drawn once and held fixed; a network is rolled through a simulator of sums, shifts, minima and maxima; one
backward pass gives the exact gradient of the cost of those paths. No critic, no exploration.

First one store with backlogged demand, lead time 4: an order-up-to level (base stock) is optimal, and the network,
which sees the raw pipeline, finds it (above left: its excess cost over the exact optimum; above right: its orders
against the inventory position; below left: its orders over stock on hand and on order, where those of the optimum are
straight lines). Then one warehouse and ten stores with lost demand and 16 training paths only: a plain network of the
whole state learns those paths by heart, while one set of weights shared by all stores generalises (below right).

    python examples/hdpo_inventory.py --plot inventory.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor

from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import (
    base_stock_policy,
    network_weights,
    plain_network_policy,
    plain_order_policy,
    symmetry_aware_policy,
    symmetry_aware_weights,
)
from sim2real.mdp import Noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.simulators.inventory_tasks import (
    InventoryTask,
    mean_cost,
    one_store_task,
    one_warehouse_task,
    store_traits,
    task_noise,
)


@dataclass(frozen=True)
class Settings:
    lead_time: int = 4
    underage: float = 9.0
    store_steps: int = 800
    stores: int = 10
    paths: int = 16
    """training paths of the warehouse"""
    network_steps: int = 800
    rows: int = 10
    """checks of the test cost during a training"""
    test_paths: int = 200
    test_periods: int = 1000


def train(
    task: InventoryTask, policy: Policy, nu: Params, *, paths: int, batch: int, steps: int, rate: float, seed: int
) -> Iterator[Params]:
    """Adam on the hindsight cost of 50 periods, its rate falling along a half cosine; weights after each step."""
    noise = task_noise(task, paths, 50, seed=task.train_seed, dtype=torch.float32)
    theta = {key: value.float() for key, value in task.theta.items()}
    nu = {key: value.float().requires_grad_() for key, value in nu.items()}
    optimizer = torch.optim.Adam(nu.values(), lr=rate, maximize=True)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(paths, (batch,), generator=generator) if batch < paths else torch.arange(paths)
        sample = Noise(noise.initial[chosen], noise.process[chosen], noise.policy[chosen])
        gradient = pathwise_gradient(task.mdp, policy, theta, nu, sample).grad
        for key, leaf in nu.items():
            leaf.grad = gradient[key] / (50 * len(task.mean))
        torch.nn.utils.clip_grad_norm_(nu.values(), 1.0)
        optimizer.step()
        rates.step()
        yield {key: leaf.detach().clone() for key, leaf in nu.items()}


def learning_curve(
    task: InventoryTask, policy: Policy, nu: Params, settings: Settings, **training: float
) -> tuple[list[int], list[Tensor], Params]:
    """Steps, test costs of each path, and the last weights."""
    test = task_noise(task, settings.test_paths, settings.test_periods, seed=task.test_seed, dtype=torch.float32)
    steps, costs = [], []
    every = max(int(training["steps"]) // settings.rows, 1)
    for step, weights in enumerate(train(task, policy, nu, **training), 1):  # type: ignore[arg-type]
        if step % every == 0:
            steps.append(step)
            costs.append(mean_cost(task, policy, weights, test, ignore=settings.test_periods // 3))
            print(f"{step:6d} {float(costs[-1].mean()):10.4f}")
            nu = weights
    return steps, costs, nu


def one_store(settings: Settings, seed: int, left: Axes, middle: Axes, below: Axes) -> None:
    task = one_store_task(settings.lead_time, settings.underage)
    policy = plain_order_policy(float(task.mean))
    sizes = {"order": (settings.lead_time, 32, 32, 32, 1), "direct": (settings.lead_time, 1)}
    nu = network_weights(sizes, torch.Generator().manual_seed(seed))
    # base stock: a quantile of the demand of lead time + 1 periods (clipping at 0 moves it by less than 0.01)
    spread = float(task.std) * math.sqrt(settings.lead_time + 1)
    level = float(task.mean) * (settings.lead_time + 1) + spread * norm.ppf(settings.underage / (1 + settings.underage))
    test = task_noise(task, settings.test_paths, settings.test_periods, seed=task.test_seed, dtype=torch.float32)
    best = mean_cost(
        task, base_stock_policy(), {"level": torch.tensor([level])}, test, ignore=settings.test_periods // 3
    )
    print(f"one store; the optimal policy costs {float(best.mean()):.4f} on the test paths\n  step       cost")
    budget = {"paths": 8192, "batch": 512, "steps": settings.store_steps, "rate": 5e-3, "seed": seed}
    steps, costs, nu = learning_curve(task, policy, nu, settings, **budget)
    gaps = [100 * float((cost - best).mean() / best.mean()) for cost in costs]
    print(f"gap to the optimum: {gaps[-1]:.3f} %")
    left.semilogy(steps, [max(each, 1e-3) for each in gaps], "o-")
    left.set(
        xlabel="gradient steps", ylabel="cost above the optimum, %", title=f"One store: {gaps[-1]:.2f} % at the end"
    )
    shown = task_noise(task, 40, 60, seed=1, dtype=torch.float32)
    state, positions, orders = task.mdp.initial_state({}, shown.initial), [], []
    for e in shown.process.unbind(1):
        order = policy.act(nu, state, e)
        positions.append(state.sum(-1))
        orders.append(order[:, 0])
        state = task.mdp.step({}, state, order, e)
    middle.scatter(torch.cat(positions[5:]), torch.cat(orders[5:]), s=4, alpha=0.4, label="network")
    line = torch.linspace(level - 15, level + 5, 50)
    middle.plot(line, torch.relu(level - line), color="black", label=f"order up to {level:.1f}")
    middle.set(xlabel="inventory position (stock + on order)", ylabel="order", title="What it has learnt")
    middle.legend()
    order_surface(policy, nu, level, settings.lead_time, below)


def order_surface(policy: Policy, nu: Params, level: float, lead_time: int, axes: Axes) -> None:
    """Learnt orders (colours), optimal ones (lines) over stock on hand and, spread evenly, on order; lead time > 1."""
    on_hand, on_order = torch.linspace(-5, 20, 60), torch.linspace(0, 30, 60)
    x, y = torch.meshgrid(on_hand, on_order, indexing="xy")
    pipelines = [x, *[y / (lead_time - 1)] * (lead_time - 1)]
    state = torch.stack(pipelines, -1)
    heights = [0.5, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0]
    learnt = policy.act(nu, state.flatten(0, 1), state.flatten(0, 1)).reshape(x.shape).detach()
    filled = axes.contourf(x, y, learnt, levels=[0.0, *heights, 60.0])
    lines = axes.contour(x, y, torch.relu(level - x - y), levels=heights, colors="white", linewidths=0.8)
    axes.clabel(lines, fontsize=7)
    axes.figure.colorbar(filled, ax=axes, label="order of the network")
    axes.set(xlabel="on hand", ylabel="on order", title="Order surface (lines: optimum)")


def one_warehouse(settings: Settings, seed: int, right: Axes) -> None:
    task = one_warehouse_task(settings.stores)
    traits = store_traits(task)
    traits = replace(traits, mean=traits.mean.float(), features=traits.features.float())
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = task.mdp.noise_dims[0] + traits.warehouse_width, settings.stores + 1
    candidates = {
        "plain": (plain_network_policy(traits), network_weights({"all": (inputs, 256, 256, outputs)}, generator), 3e-4),
        "symmetry-aware": (symmetry_aware_policy(traits), symmetry_aware_weights(traits, generator=generator), 3e-3),
    }
    final = {}
    for name, (policy, nu, rate) in candidates.items():
        print(f"one warehouse, {settings.stores} stores, {settings.paths} paths: {name}\n  step       cost")
        budget = {"paths": settings.paths, "batch": settings.paths, "steps": settings.network_steps, "rate": rate}
        steps, costs, _ = learning_curve(task, policy, nu, settings, **budget, seed=seed)
        values = [float(cost.mean()) for cost in costs]
        final[name] = min(values)
        right.plot(steps, values, "o-", label=name)
    saved = 100 * (1 - final["symmetry-aware"] / final["plain"])
    print(f"sharing weights saves {saved:.1f} % (each at its best check)")
    right.set(
        xlabel="gradient steps",
        ylabel="test cost per store",
        title=f"{settings.paths} paths: sharing saves {saved:.0f} %",
    )
    right.set_ylim(top=min(right.get_ylim()[1], 3 * min(final.values())))
    right.legend()


def main(settings: Settings, seed: int) -> Figure:
    figure, ((left, middle), (below, right)) = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    one_store(settings, seed, left, middle, below)
    one_warehouse(settings, seed, right)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps, short tests")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    tiny = {"store_steps": 20, "stores": 3, "network_steps": 10, "rows": 2, "test_paths": 20, "test_periods": 30}
    drawn = main(Settings(**tiny) if arguments.quick else Settings(), arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
