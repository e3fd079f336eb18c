"""Two small tasks for lower levels designed by inverse optimisation: fleet rebalancing and inventory.

Both are linear: an episode has states and actions with

    s_{t+1} = F s_t + E u_t + d_t,   cost_t = c_t'u_t + k's_t,   A u_t = J s_t + e_t,   G u_t <= L s_t + g_t,

where d, c, e and g hold what the world draws (demand, requests, prices, forecasts). The expert plans the rest of the
episode with perfect information, one linear program by HiGHS, and applies the first action. A goal is what an action
leaves of some combinations of the next state, `goal = C s_{t+1}`: fewer numbers than the state has, so that the lower
level has something to decide.

Vehicles: four stations, twelve directed edges; u = (rebalancing f, passengers served g) per edge, 24 numbers. A
trip takes one to three steps; s counts idle vehicles and those arriving one and two steps later. Goal: per station,
idle and inbound together after the action (the fourth follows). Plain lower level: the profit of the step.

Inventory: one warehouse, three stores, prices, costs and demand of the OHIO task 1W3S (lead times 1, backlog). u =
(production, shipments, sales, position of each store less what it owes now and at the next step), 10 numbers; the last
three are pinned by equalities. Stores order one step ahead: the next demand is known, later demand is not. Goal:
position of the warehouse, and of the three stores together. Plain: the cost of the step.

All tensors are float64: call `torch.set_default_dtype(torch.float64)` first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """What the world draws in N episodes of T steps."""

    start: Tensor
    """`[N, n]`"""
    d: Tensor
    """`[N, T, n]`"""
    c: Tensor
    """`[N, T, m]`"""
    e: Tensor
    """`[N, T, p]`"""
    g: Tensor
    """`[N, T, q]`"""
    seen: Tensor
    """`[N, T, .]`: what an upper level sees besides the state"""


@dataclass(frozen=True)
class Task:
    """The matrices of a task; see the module."""

    name: str
    F: Tensor
    E: Tensor
    k: Tensor
    A: Tensor
    J: Tensor
    G: Tensor
    L: Tensor
    C: Tensor
    """`[goals, n]`"""
    unit: str


def plan_all(task: Task, state: Tensor, episodes: Episodes, row: int, time: int) -> Tensor:
    """The expert's actions `[T - time, m]` from `state` at `time` of episode `row` on: perfect information.

    One linear program over (u_t, s_{t+1}) of all remaining steps; states, as the actions, are free of sign.
    """
    steps = episodes.c.shape[1] - time
    n, m = task.E.shape
    d, c, e, g = (x[row, time:].numpy() for x in (episodes.d, episodes.c, episodes.e, episodes.g))
    s = state.numpy()
    now, before = np.eye(steps), np.eye(steps, k=-1)
    first = lambda M, v: np.concatenate([(M.numpy() @ s)[None] + v[:1], v[1:]]).ravel()
    moves = np.hstack([-np.kron(now, task.E), np.eye(steps * n) - np.kron(before, task.F)])
    pinned = np.hstack([np.kron(now, task.A), -np.kron(before, task.J)])
    limits = np.hstack([np.kron(now, task.G), -np.kron(before, task.L)])
    cost = np.concatenate([c.ravel(), np.tile(task.k.numpy(), steps)])
    cost[len(cost) - n :] = 0.0  # the state after the last step is worth nothing
    found = linprog(
        cost,
        A_ub=csr_array(limits),
        b_ub=first(task.L, g),
        A_eq=csr_array(np.vstack([moves, pinned])),
        b_eq=np.concatenate([first(task.F, d), first(task.J, e)]),
        bounds=(None, None),
        method="highs-ds",
    )
    if found.status != 0:
        raise RuntimeError(f"{task.name}, episode {row}, step {time}: {found.message}")
    return torch.from_numpy(found.x[: steps * m].reshape(steps, m).copy())


def vehicles() -> Task:
    """Four stations; state (idle, arriving at t + 1, at t + 2), all before the action."""
    source, target, travel, _ = _network()
    n, edges = 4, len(source)
    out, into = torch.zeros(n, edges), torch.zeros(n, edges)
    out[source, range(edges)] = 1.0
    into[target, range(edges)] = 1.0
    takes = [into * (travel == steps) for steps in (1, 2, 3)]
    E = torch.cat([torch.cat([takes[0] - out, takes[1], takes[2]])] * 2, -1)
    eye, zero = torch.eye(n), torch.zeros(n, n)
    F = torch.cat([torch.cat([eye, eye, zero], -1), torch.cat([zero, zero, eye], -1), torch.zeros(n, 3 * n)])
    G = torch.cat([-torch.eye(2 * edges), torch.eye(2 * edges)[edges:], torch.cat([out, out], -1)])
    L = torch.cat([torch.zeros(3 * edges, 3 * n), torch.cat([eye, zero, zero], -1)])
    C = torch.cat([eye, eye, eye], -1)[: n - 1]
    nothing = torch.zeros(0, 3 * n)
    return Task("vehicles", F, E, torch.zeros(3 * n), torch.zeros(0, 2 * edges), nothing, G, L, C, "money")


def vehicle_episodes(count: int, seed: int, *, steps: int = 20, fleet: float = 20.0) -> Episodes:
    """Poisson requests whose rates swing between the directions of each pair of stations."""
    source, _, travel, price = _network()
    edges, rng = len(source), np.random.default_rng(seed)
    world = np.random.default_rng(7)
    level, phase = world.uniform(0.5, 3.5, edges), world.uniform(0, 2 * math.pi, edges)
    rate = level * (1 + np.sin(2 * math.pi * np.arange(steps + 6)[:, None] / steps + phase))
    requests = torch.from_numpy(rng.poisson(rate[:steps], (count, steps, edges)).astype(float))
    cost = torch.cat([travel, travel - price]).expand(count, steps, 2 * edges)
    g = torch.cat([torch.zeros(count, steps, 2 * edges), requests, torch.zeros(count, steps, 4)], -1)
    start = torch.cat([torch.full((4,), fleet / 4), torch.zeros(8)]).expand(count, 12)
    forecast = torch.from_numpy(np.stack([rate[t + 1 : t + 4].mean(0) for t in range(steps)])).expand(count, -1, -1)
    seen = torch.cat([requests, forecast], -1)
    return Episodes(start, torch.zeros(count, steps, 12), cost, torch.zeros(count, steps, 0), g, seen)


def _network() -> tuple[list[int], list[int], Tensor, Tensor]:
    """Sources, targets, steps of travel and prices of the twelve edges."""
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    world = np.random.default_rng(3)
    travel = torch.from_numpy(world.integers(1, 4, 12).astype(float))
    price = torch.from_numpy(world.uniform(4.0, 12.0, 12)) + travel
    return [i for i, _ in pairs], [j for _, j in pairs], travel, price


STORE_CAPACITY, WAREHOUSE_CAPACITY, PRODUCTION_CAP = 15.0, 50.0, 25.0
_PEAK = torch.tensor([5.0, 15.0, 20.0])


def inventory() -> Task:
    """State (warehouse, last production, stock x3, shipped x3, backlog x3); u = (production, f x3, sales x3, e x3)."""
    eye, n, m = torch.eye(3), 11, 10
    F, E = torch.zeros(n, n), torch.zeros(n, m)
    F[0, :2] = 1.0
    F[2:5, 2:5] = F[2:5, 5:8] = F[8:11, 8:11] = eye
    E[0, 1:4], E[1, 0] = -1.0, 1.0
    E[2:5, 4:7], E[5:8, 1:4], E[8:11, 4:7] = -eye, eye, -eye
    k = torch.cat([torch.tensor([0.1, 0.0]), torch.full((3,), 0.5), torch.zeros(3), torch.full((3,), 1.5)])
    A, J = torch.zeros(3, m), torch.zeros(3, n)  # e - f = stock + shipped - backlog - demand of this and the next step
    A[:, 7:10], A[:, 1:4] = eye, -eye
    J[:, 2:5] = J[:, 5:8] = eye
    J[:, 8:11] = -eye
    G, L = torch.zeros(20, m), torch.zeros(20, n)
    G[:7, :7] = -torch.eye(7)
    G[7, 0] = 1.0  # production
    G[8, 1:4], L[8, :2] = 1.0, 1.0  # shipments from what the warehouse has
    G[9, 0], G[9, 1:4], L[9, :2] = 1.0, -1.0, -1.0  # warehouse capacity, production included
    G[10:13, 4:7], L[10:13, 2:5], L[10:13, 5:8] = eye, eye, eye  # sales from what the store has
    G[13:16, 4:7], L[13:16, 8:11] = eye, eye  # and not above demand and backlog
    G[16:19, 1:4], G[16:19, 4:7], L[16:19, 2:5], L[16:19, 5:8] = eye, -eye, -eye, -eye  # store capacity
    G, L = G[:19], L[:19]
    C = torch.zeros(2, n)
    C[0, :2], C[1, 2:8] = 1.0, 1.0
    return Task("inventory", F, E, k, A, J, G, L, C, "money")


def inventory_episodes(count: int, seed: int, *, steps: int = 30) -> Episodes:
    """Demand d/2 (1 + cos(f pi (2 r + t) / 31)), rounded, plus noise from {-2, -1, 0, 1}, not below 0."""
    frequency, shift = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 3.0, 6.0])
    t = torch.arange(steps + 1.0)[:, None]
    rate = 0.5 * _PEAK * (1 + torch.cos(frequency * math.pi * (2 * shift + t) / 31))
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randint(-2, 2, (count, steps, 3), generator=rng)
    demand = (rate[:steps].round() + noise).clamp_min(0)
    ordered = torch.cat([demand[:, 1:], torch.zeros(count, 1, 3)], 1)
    d = torch.zeros(count, steps, 11)
    d[..., 8:11] = demand
    c = torch.zeros(10)
    # holding and backlog are paid on what the step leaves behind, which the states of the next step carry
    c[0], c[1:4], c[4:7] = 5.0, 0.5, -15.0
    g = torch.zeros(count, steps, 19)
    g[..., 7], g[..., 9] = PRODUCTION_CAP, WAREHOUSE_CAPACITY
    g[..., 13:16], g[..., 16:19] = demand, STORE_CAPACITY
    start = torch.tensor([20.0, 0.0, *[10.0] * 3, *[0.0] * 6]).expand(count, 11)
    return Episodes(start, d, c.expand(count, steps, 10), -demand - ordered, g, torch.cat([demand, ordered], -1))
