"""Hindsight training of inventory policies: trials of every published class, one training loop, paired gaps.

A trial is a task, a network with its first weights, a recipe, and what it is measured against on the same test paths:
the optimal policy (one store, serial line), whose true cost an oracle knows, or the relaxed problem whose cost bounds
that of any policy from below (transshipment: stock may flow back through the hub).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from benchmarks.oracles.base_stock import optimal_base_stock, transshipment_bound
from benchmarks.oracles.clark_scarf import clark_scarf
from benchmarks.oracles.lost_sales import lost_sales_optimum
from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import (
    StoreTraits,
    base_stock_policy,
    echelon_stock_policy,
    network_weights,
    plain_network_policy,
    plain_order_policy,
    symmetry_aware_policy,
    symmetry_aware_weights,
)
from sim2real.mdp import Noise
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.simulators.inventory_tasks import (
    InventoryTask,
    mean_cost,
    one_store_task,
    one_warehouse_task,
    serial_task,
    store_traits,
    task_noise,
    transshipment_task,
)

LINE_HOLDING = (1.0, 0.5, 0.2, 0.1)


@dataclass(frozen=True)
class Recipe:
    """Adam, its rate raised over 50 steps and lowered along a half cosine; float32 as in the reference code."""

    steps: int = 2000
    rate: float = 5e-3
    batch: int = 512
    paths: int = 32768
    """fixed training paths that batches are drawn from; all in one when there are no more than `batch`"""
    periods: int = 50


@dataclass(frozen=True)
class Trial:
    name: str
    task: InventoryTask
    policy: Policy
    weights: Params
    recipe: Recipe
    optimum: float | None = None
    """cost per period and store: exact, or a lower bound; None: unknown"""
    attained: Callable[[Noise, int], Tensor] | None = None
    """cost `[B]` of the optimum on given paths, the first so many periods ignored"""
    whole_orders: bool = False
    """orders are rounded in the test (Poisson demand), and pipelines start empty"""


def backlogged(lead_time: int, underage: float, recipe: Recipe = Recipe(), *, seed: int = 0) -> Trial:
    level, cost = optimal_base_stock(lead_time, underage)
    task = one_store_task(lead_time, underage)
    return Trial(
        f"backlogged/L{lead_time}-p{underage:g}",
        task,
        plain_order_policy(5.0),
        _order_weights(lead_time, 1, seed),
        recipe,
        cost,
        partial(_policy_cost, task, base_stock_policy(), {"level": torch.tensor([level])}),
    )


def lost(lead_time: int, underage: float, recipe: Recipe = Recipe(), *, seed: int = 0) -> Trial:
    optimum = lost_sales_optimum(lead_time, underage)
    table = torch.from_numpy(optimum.orders.astype(np.int64))
    limits = torch.tensor(table.shape) - 1

    def order(nu: Params, state: Tensor) -> Tensor:
        return table[torch.minimum(state.long(), limits).unbind(-1)].to(state).unsqueeze(-1)

    task = one_store_task(lead_time, underage, lost=True)
    return Trial(
        f"lost/L{lead_time}-p{underage:g}",
        task,
        plain_order_policy(5.0),
        _order_weights(lead_time, 1, seed),
        recipe,
        optimum.cost,
        partial(_policy_cost, task, deterministic_policy(order), {}),
        whole_orders=True,
    )


def serial(lead_time: int, underage: float, recipe: Recipe = Recipe(batch=256, periods=100), *, seed: int = 0) -> Trial:
    times = (lead_time, 3, 4, 2)
    levels, cost = clark_scarf(times, LINE_HOLDING, underage)
    task = serial_task(lead_time, underage)
    return Trial(
        f"serial/L{lead_time}-p{underage:g}",
        task,
        plain_order_policy(5.0),
        _line_weights(times, seed),
        recipe,
        cost,
        partial(_policy_cost, task, echelon_stock_policy(times), {"level": torch.tensor(levels)}),
    )


def transshipment(
    stores: int, correlation: float, lead_time: int, underage: float, recipe: Recipe = Recipe(), *, seed: int = 0
) -> Trial:
    task = transshipment_task(stores, correlation, lead_time, underage)
    traits = _single(store_traits(task))
    return Trial(
        f"transshipment/n{stores}-r{correlation:g}-L{lead_time}-p{underage:g}",
        task,
        symmetry_aware_policy(traits),
        symmetry_aware_weights(traits, generator=_seeded(seed)),
        recipe,
        transshipment_bound(task.std.numpy(), correlation, lead_time, underage) / stores,
        partial(relaxed_cost, task, correlation),
    )


def warehouse(stores: int, recipe: Recipe, *, symmetric: bool, width: int = 512, seed: int = 0) -> Trial:
    """One warehouse, lost demand; the plain network has three hidden layers of `width`."""
    task = one_warehouse_task(stores)
    traits = _single(store_traits(task))
    if symmetric:
        policy, weights = symmetry_aware_policy(traits), symmetry_aware_weights(traits, generator=_seeded(seed))
    else:
        inputs = stores * traits.store_width + traits.warehouse_width
        policy = plain_network_policy(traits)
        weights = network_weights({"all": (inputs, width, width, width, stores + 1)}, _seeded(seed))
    kind = "symmetric" if symmetric else "plain"
    return Trial(f"warehouse/n{stores}-{recipe.paths}-{kind}", task, policy, weights, recipe)


def _order_weights(inputs: int, stocks: int, seed: int) -> Params:
    return network_weights({"order": (inputs, 32, 32, 32, stocks), "direct": (inputs, stocks)}, _seeded(seed))


def _line_weights(times: Sequence[int], seed: int) -> Params:
    """The direct path of every stock starts as its own base stock rule, for the mean demand of L + 1 periods.

    From random directions the line is unstable, and training soon has a stock that is always asked for more than it
    has: what the request exceeds is cut, so its derivative is 0 on every path and that stock never learns to hold.
    """
    weights = _order_weights(sum(times), len(times), seed)
    own = torch.block_diag(*(torch.ones(1, time, dtype=torch.float64) for time in times))
    # the policy adds the one period that is not in the bias
    return weights | {"direct.0.weight": -own, "direct.0.bias": torch.tensor(times, dtype=torch.float64)}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _single(traits: StoreTraits) -> StoreTraits:
    return replace(traits, mean=traits.mean.float(), features=traits.features.float())


def train(trial: Trial, *, seed: int = 0) -> Iterator[tuple[int, Params]]:
    """`(step, weights)` after every gradient step; every batch is a sample of the fixed training paths."""
    task, recipe = trial.task, trial.recipe
    noise = task_noise(task, recipe.paths, recipe.periods, seed=task.train_seed, dtype=torch.float32)
    theta = {key: value.float() for key, value in task.theta.items()}
    nu = {key: value.float().requires_grad_() for key, value in trial.weights.items()}
    optimizer = torch.optim.Adam(nu.values(), lr=recipe.rate)
    generator, scale = _seeded(seed), -1.0 / (recipe.periods * len(task.mean))
    for step in range(recipe.steps):
        batch = noise
        if recipe.batch < recipe.paths:
            chosen = torch.randint(recipe.paths, (recipe.batch,), generator=generator)
            batch = Noise(noise.initial[chosen], noise.process[chosen], noise.policy[chosen])
        gradient = pathwise_gradient(task.mdp, trial.policy, theta, nu, batch).grad
        for key, leaf in nu.items():
            leaf.grad = scale * gradient[key]
        torch.nn.utils.clip_grad_norm_(nu.values(), 1.0)
        rise, fall = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.rate * rise * max(fall, 1e-3)
        optimizer.step()
        yield step + 1, {key: leaf.detach() for key, leaf in nu.items()}


def trained(trial: Trial, *, seed: int = 0) -> tuple[Params, float]:
    """Last weights and CPU seconds of this process."""
    start, nu = time.process_time(), trial.weights
    for _step, weights in train(trial, seed=seed):
        nu = weights
    return nu, time.process_time() - start


def selected(trial: Trial, every: int, *, seed: int = 0) -> tuple[Params, float, int]:
    """Weights after each `every` steps: those cheapest on 64 paths held out; CPU seconds; their step."""
    noise = task_noise(trial.task, 64, 150, seed=trial.task.train_seed + 1, dtype=torch.float32)
    start, best, cheapest, at = time.process_time(), trial.weights, float("inf"), 0
    for step, nu in train(trial, seed=seed):
        if step % every == 0:
            cost = float(held_out_cost(trial, nu, noise, 60).mean())
            if cost < cheapest:
                best, cheapest, at = {key: value.clone() for key, value in nu.items()}, cost, step
    return best, time.process_time() - start, at


def held_out(trial: Trial, paths: int, periods: int) -> Noise:
    noise = task_noise(trial.task, paths, periods, seed=trial.task.test_seed, dtype=torch.float32)
    # whole pipelines for a policy that is a table: nothing on hand at the start
    return replace(noise, initial=torch.full_like(noise.initial, -20.0)) if trial.whole_orders else noise


def held_out_cost(trial: Trial, nu: Params, noise: Noise, ignore: int) -> Tensor:
    """Cost per period and store of each test path."""
    policy = trial.policy
    if trial.whole_orders:
        policy = deterministic_policy(lambda nu, state: trial.policy.act(nu, state, state).round())
    return mean_cost(trial.task, policy, nu, noise, ignore=ignore)


def gap(trial: Trial, cost: Tensor, noise: Noise, ignore: int) -> tuple[float, float]:
    """Relative gap of `held_out_cost` to the optimum, paired with what the optimum costs on the paths; standard error.

    Raises `ValueError` for a trial whose optimum is unknown.
    """
    if trial.optimum is None or trial.attained is None:
        raise ValueError(f"'{trial.name}' has no known optimum or bound")
    excess = cost - trial.attained(noise, ignore)
    return float(excess.mean()) / trial.optimum, float(excess.std()) / math.sqrt(len(excess)) / trial.optimum


def _policy_cost(task: InventoryTask, policy: Policy, nu: Params, noise: Noise, ignore: int) -> Tensor:
    best = {key: value.to(noise.process) for key, value in nu.items()}
    return mean_cost(task, policy, best, noise, ignore=ignore)


def relaxed_cost(task: InventoryTask, correlation: float, noise: Noise, ignore: int) -> Tensor:
    """Cost `[B]` per period and store of transshipment where the hub may take stock back: a lower bound in the mean.

    All stores then run at one fractile: with demand D, total mean M, hub and store lead times L_0 and L,

        net_i(t) = s_i / S (z sqrt(L_0 1'C1 + (L + 1) S^2) - sum_{u = t-L-L_0}^{t-L-1} (1'D_u - M))
                   - sum_{u = t-L}^t (D_iu - m_i),    S = sum_i s_i, C the covariance.

    Needs as many ignored periods as both lead times together; raises `ValueError` otherwise.
    """
    if task.routes is None:
        raise ValueError("only a network with a hub has this relaxation; this task has no routes")
    first, then = task.routes.supplier_lead_times[0], task.routes.lead_times[0][0]
    if ignore < first + then:
        raise ValueError(f"the relaxation needs {first + then} ignored periods, got {ignore}")
    underage, std = float(task.theta["underage"][0]), task.std
    surprise = noise.process.double() - task.mean
    # sums over windows as differences of running sums, which begin at 0
    own = torch.cat([torch.zeros_like(surprise[:, :1]), surprise.cumsum(1)], 1)
    total = own.sum(2, keepdim=True)
    end = torch.arange(ignore, noise.process.shape[1]) + 1
    begin = end - then - 1
    supplied = correlation * std.sum() ** 2 + (1 - correlation) * (std**2).sum()
    spread = (first * supplied + (then + 1) * std.sum() ** 2).sqrt()
    pooled = norm.ppf(underage / (1 + underage)) * spread - (total[:, begin] - total[:, begin - first])
    net = std / std.sum() * pooled - (own[:, end] - own[:, begin])
    return (torch.relu(net) + underage * torch.relu(-net)).mean((1, 2))
