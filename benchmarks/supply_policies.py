"""Behaviour policies, trivial policies and the bound of the supply chain, and how they are run.

A decision is a function of the state `[B, ...]` to requested shipments and production `[B, n+1]`.

`order_up_to`  brings each store's position (stock + on its way - demand and backlog) up to a level and the warehouse's
               to another; short of stock, the warehouse ships in proportion, rounded down
`predictive`   model predictive control: the plan for a horizon of 10 with the forecast without noise, first step
`nothing`      neither ships nor produces
`goals`        any upper policy over the lower level of `solvers/shipping_program.py`
`uniform`      the upper policy of equal shares and half of the production
`dispersed`    an upper policy drawn at random (Dirichlet of ones and uniform)
`foresight`    profit of the plan that knows all demands in advance: no policy does better
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sim2real.params import Params
from sim2real.simulators.supply_chain import STEPS, SupplyTask, demand_forecast, stocks, store_room, supply_chain
from sim2real.solvers.shipping_plan import PlanCosts, PlanStart, plan_shipments
from sim2real.solvers.shipping_program import ShippingGoals, ShippingLimits, invert_shipments, ship, shipping_goals

Decide = Callable[[Tensor], Tensor]
THREE_LEVELS = (3.0, 9.0, 13.0)
SCRIPT_LEVELS = (3.0, 3.0, 9.0)
"""what the published script runs on 1W3S: it lists four levels for three stores"""
TEN_LEVELS = (2.0,) * 4 + (6.0,) * 3 + (10.0,) * 3
HORIZON = 10


@dataclass(frozen=True)
class Episodes:
    """`states [B, T+1, k]`, requested `actions [B, T, n+1]`, `rewards [B, T]`."""

    states: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def total(self) -> Tensor:
        """`[B]`"""
        return self.rewards.sum(-1)


def run(task: SupplyTask, theta: Params, decide: Decide, episodes: int, seed: int) -> Episodes:
    """Whole episodes; the same seed gives the same demands to every policy."""
    mdp, rng = supply_chain(task), torch.Generator().manual_seed(seed)
    noise = torch.randn(episodes, STEPS + 1, mdp.noise_dims[1], generator=rng, dtype=torch.float64)
    state = mdp.initial_state(theta, noise[:, 0, : mdp.noise_dims[0]])
    states, actions, rewards = [state], [], []
    for t in range(1, STEPS + 1):
        action = decide(state)
        following = mdp.step(theta, state, action, noise[:, t])
        rewards.append(mdp.reward(theta, state, action, noise[:, t], following))
        state = following
        states.append(state)
        actions.append(action)
    return Episodes(torch.stack(states, 1), torch.stack(actions, 1), torch.stack(rewards, 1))


def executed(task: SupplyTask, states: Tensor) -> tuple[Tensor, Tensor]:
    """What was shipped `[..., n]` and produced `[...]` in each step, read from the states that follow `[..., k]`."""
    incoming = stocks(task, states).incoming
    return incoming[..., :-1], incoming[..., -1]


def order_up_to(task: SupplyTask, theta: Params, levels: tuple[float, ...], warehouse: float) -> Decide:
    """See the module."""
    wanted = torch.tensor(levels, dtype=torch.float64)

    def decide(state: Tensor) -> Tensor:
        now, n = stocks(task, state), task.stores
        orders = torch.relu(wanted - now.stock[:, :n] - now.incoming[:, :n] + now.demand + now.owed)
        total, stock = orders.sum(-1, keepdim=True), now.stock[:, -1:]
        part = torch.floor(stock * orders / total.clamp(min=1))
        shipped = torch.where(stock >= total, orders, part)
        missing = torch.relu(warehouse - now.available + shipped.sum(-1))
        return torch.cat([shipped, torch.minimum(missing, theta["production_cap"]).unsqueeze(-1)], -1)

    return decide


def predictive(task: SupplyTask, theta: Params, horizon: int = HORIZON) -> Decide:
    """See the module."""

    def decide(state: Tensor) -> Tensor:
        now = stocks(task, state)
        ahead = min(horizon, STEPS + 1 - int(now.period[0]))
        demand = torch.cat([now.demand.unsqueeze(-1), demand_forecast(task, now.period, ahead - 1)], -1)
        plan = plan_shipments(_costs(theta), _start(task, state), demand)
        return torch.round(torch.cat([plan.shipments[:, 0], plan.production[:, :1]], -1))

    return decide


def nothing(state: Tensor, stores: int) -> Tensor:
    """See the module."""
    return state.new_zeros(len(state), stores + 1)


def limits(task: SupplyTask, theta: Params, state: Tensor, *, margin: float = 0.0) -> ShippingLimits:
    """The constraints of the lower level in a state."""
    available = stocks(task, state).available
    room = store_room(task, theta, state, margin=margin)
    return ShippingLimits(available, room, theta["capacity"][-1], theta["production_cap"])


def goals(task: SupplyTask, theta: Params, upper: Decide, *, margin: float = 0.0) -> Decide:
    """The lower level under an upper policy that gives shares and production `[B, n+2]`."""

    def decide(state: Tensor) -> Tensor:
        u = upper(state)
        wanted = shipping_goals(u[:, :-1], stocks(task, state).available)
        plan = ship(limits(task, theta, state, margin=margin), wanted, u[:, -1])
        return torch.cat([plan.shipments, plan.production.unsqueeze(-1)], -1)

    return decide


def uniform(task: SupplyTask, theta: Params) -> Decide:
    """See the module."""
    equal = torch.full((task.stores + 2,), 1 / (task.stores + 1), dtype=torch.float64)
    equal[-1] = theta["production_cap"] / 2
    return goals(task, theta, lambda state: equal.expand(len(state), -1))


def dispersed(task: SupplyTask, theta: Params, seed: int) -> Decide:
    """See the module."""
    rng = torch.Generator().manual_seed(seed)

    def upper(state: Tensor) -> Tensor:
        drawn = torch.rand(len(state), task.stores + 2, generator=rng, dtype=torch.float64)
        weight = -torch.log1p(-drawn[:, :-1])  # exponential variables, normalised, are a Dirichlet of ones
        return torch.cat([weight / weight.sum(-1, keepdim=True), drawn[:, -1:] * theta["production_cap"]], -1)

    return goals(task, theta, upper)


def foresight(task: SupplyTask, theta: Params, episodes: Episodes) -> Tensor:
    """Profit `[B]` of the best plan for the demands of these episodes."""
    demand = stocks(task, episodes.states[:, :-1]).demand.movedim(1, 2)
    return plan_shipments(_costs(theta), _start(task, episodes.states[:, 0]), demand).profit


@dataclass(frozen=True)
class Log:
    """Whole episodes, flattened to N transitions."""

    states: Tensor
    following: Tensor
    reward: Tensor


def flat(episodes: Episodes) -> Log:
    """States before and after each step; actions are forgotten."""
    before, after = episodes.states[:, :-1].flatten(0, 1), episodes.states[:, 1:].flatten(0, 1)
    return Log(before, after, episodes.rewards.flatten())


def recovered(task: SupplyTask, theta: Params, log: Log) -> ShippingGoals:
    """Goals from states alone."""
    return invert_shipments(limits(task, theta, log.states), *executed(task, log.following))


def violations(task: SupplyTask, theta: Params, states: Tensor, actions: Tensor) -> Tensor:
    """Units `[N]` by which requests exceed stock, production cap, room of the warehouse and room of the stores."""
    held, requests = limits(task, theta, states), torch.round(actions)
    shipments, production = requests[:, :-1], requests[:, -1]
    over = torch.relu(shipments.sum(-1) - held.available) + torch.relu(production - held.production_cap)
    over = over + torch.relu(held.available - shipments.sum(-1) + production - held.warehouse_capacity)
    # a store that is too full already cannot be helped: only what is sent on top counts
    return over + torch.relu(shipments - torch.relu(held.room)).sum(-1) + torch.relu(-requests).sum(-1)


def behaviours(task: SupplyTask, theta: Params) -> dict[str, Decide]:
    """The policies that are run without learning, by their name in the benchmark."""
    three = task.stores == 3
    warehouse = 46.0 if three else 79.0
    rows = {"heur": order_up_to(task, theta, THREE_LEVELS if three else TEN_LEVELS, warehouse)}
    if three:
        rows["heur-script"] = order_up_to(task, theta, SCRIPT_LEVELS, warehouse)
    rows |= {"mpc": predictive(task, theta), "nothing": partial(nothing, stores=task.stores)}
    return rows | {"uniform": uniform(task, theta), "dispersed": dispersed(task, theta, seed=0)}


def _start(task: SupplyTask, state: Tensor) -> PlanStart:
    now, n = stocks(task, state), task.stores
    return PlanStart(now.available, now.stock[:, :n] + now.incoming[:, :n], now.owed)


def _costs(theta: Params) -> PlanCosts:
    return PlanCosts(
        price=float(theta["price"]),
        production=float(theta["production_cost"]),
        transport=float(theta["transport"]),
        backlog=float(theta["backlog"]),
        overflow=float(theta["overflow"]),
        holding=theta["holding"],
        capacity=theta["capacity"],
        production_cap=float(theta["production_cap"]),
    )
