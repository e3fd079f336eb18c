"""Taxis without drivers: a fleet serves trips between the stations of a city, and idle vehicles may be moved.

One step at time t, for idle vehicles q_i, requests d_ij (Poisson), prices p_ij, trips of tau_ij steps, moves of
sigma_ij steps, and a cost c per vehicle and step:

    1. matching    x = argmax sum p_ij x_ij,  0 <= x_ij <= d_ij,  sum_j x_ij <= q_i     (per origin: dearest trip first)
                   reward += max(0, sum_ij (p_ij - c tau_ij) x_ij)
    2. decision    flows f_ij of idle vehicles, sum_{j != i} f_ij <= q_i
                   reward -= c sum_ij sigma_ij f_ij
    3. arrivals    a trip or move of tau steps that leaves at t can leave again at t + tau + 1

Staying (f_ii) is free. All functions work on a batch of episodes. The public simulator forgets passengers under way
when another group on the same pair is due at the same time (travel times change): `lossy=True` does so, too.

Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, appendix; data
and simulator: github.com/DanieleGammelli/graph-meta-rl-for-amod.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOOKAHEAD = 6
"""steps ahead that the features show"""
FEATURES = 1 + 2 * LOOKAHEAD
SCALE = 0.01
"""of the features"""


@dataclass(frozen=True)
class RoutingScenario:
    """A city of n stations, per step: everything but the requests drawn. T covers the episode and the lookahead.

    Raises `ValueError` for shapes that do not fit and a T that is too small.
    """

    rates: Tensor
    """`[T, n, n]` requests expected from i to j"""
    prices: Tensor
    """`[T, n, n]` money per trip"""
    trip_steps: Tensor
    """`[T, n, n]` steps of a trip, integers of at least 1"""
    move_steps: Tensor
    """`[n, n]` steps of an empty move, integers; diagonal 0"""
    fleet: Tensor
    """`[n]` vehicles at the start"""
    step_cost: float
    """money per vehicle and step on the road"""
    edges: Tensor
    """`[2, E]` directed pairs of neighbours, for messages between stations; vehicles may move between any two"""
    steps: int
    """of an episode"""
    minutes: float
    """of a step"""

    def __post_init__(self) -> None:
        n, horizon = len(self.fleet), self.steps + LOOKAHEAD
        for name in ("rates", "prices", "trip_steps"):
            shape = getattr(self, name).shape
            if shape[1:] != (n, n) or shape[0] < horizon:
                raise ValueError(
                    f"'{name}' must be [T, {n}, {n}] with T of at least {horizon} ({self.steps} steps and "
                    f"{LOOKAHEAD} of lookahead), got {list(shape)}"
                )
        if self.move_steps.shape != (n, n):
            raise ValueError(f"'move_steps' must be [{n}, {n}], got {list(self.move_steps.shape)}")

    @property
    def stations(self) -> int:
        return len(self.fleet)


@dataclass(frozen=True)
class RoutingSettings:
    """How a scenario file becomes steps: start hour, minutes per step, multiple of the demand, money per minute."""

    start_hour: int
    minutes: float
    demand: float
    cost_per_minute: float
    steps: int = 20


NYC_BROOKLYN = RoutingSettings(19, 4, 9.0, 0.5)
SHENZHEN_DOWNTOWN_WEST = RoutingSettings(8, 3, 2.5, 0.5)


@dataclass(frozen=True)
class FleetState:
    """Where the vehicles of B episodes are, at step `step`."""

    step: int
    idle: Tensor
    """`[B, n]`"""
    incoming: Tensor
    """`[B, n, W]` vehicles due at the end of this step, of the next, ..."""
    trips: Tensor | None = None
    """`[B, n, n, W]` passengers under way by pair, kept only by the lossy simulator"""
    lost: Tensor | None = None
    """`[B, n, W]` vehicles of `incoming` that the lossy simulator has forgotten"""


@dataclass(frozen=True)
class RoutingRollout:
    """B episodes of T decisions."""

    features: Tensor
    """`[B, T, n, 13]` before each decision"""
    idle: Tensor
    """`[B, T, n]` before each decision"""
    flows: Tensor
    """`[B, T, n, n]`"""
    rewards: Tensor
    """`[B, T]`: of the move, and of the match of the next step (0 after the last decision)"""
    first_match: Tensor
    """`[B]` reward before the first decision; the return of an episode is its sum with all rewards"""
    vehicles: Tensor
    """`[B]` in the fleet at the end"""

    @property
    def returns(self) -> Tensor:
        return self.first_match + self.rewards.sum(-1)


Decide = Callable[[FleetState], Tensor]
"""idle and incoming vehicles -> flows `[B, n, n]`"""


def read_routing_scenario(path: str | Path, settings: RoutingSettings) -> RoutingScenario:
    """Read a scenario file (JSON: demand, rebTime, totalAcc, topology_graph) and aggregate it over steps.

    Rates are sums over the minutes of a step times `settings.demand`; prices and times are rate-weighted means; times
    are rounded to steps, at least 1. Moves take what they take in the start hour. Raises `ValueError` for files without
    these entries or with less demand data than the episode and its lookahead need.
    """
    data = json.loads(Path(path).read_text())
    missing = [key for key in ("nlat", "nlon", "demand", "rebTime", "totalAcc", "topology_graph") if key not in data]
    if missing:
        raise ValueError(f"'{path}' is no scenario of vehicle routing: it lacks {missing}")
    n, horizon = data["nlat"] * data["nlon"], settings.steps + LOOKAHEAD + 1
    rates, money, times = _aggregate(data["demand"], n, horizon, settings, path)
    share = np.where(rates > 0, rates, 1.0)
    moves = np.zeros((n, n))
    for row in data["rebTime"]:
        if row["time_stamp"] == settings.start_hour and row["origin"] != row["destination"]:
            moves[row["origin"], row["destination"]] = max(round(row["reb_time"] / settings.minutes), 1)
    if (moves + np.eye(n) == 0).any():
        raise ValueError(f"'{path}' has no travel times of empty vehicles (rebTime) at hour {settings.start_hour}")
    hour = settings.start_hour + round(settings.minutes * settings.steps / 120)
    totals = {row["hour"]: row["acc"] for row in data["totalAcc"]}
    if hour not in totals:
        raise ValueError(f"'{path}' has no fleet size (totalAcc) at hour {hour}, only at {sorted(totals)}")
    edges = [[row[key] for row in data["topology_graph"]] for key in ("i", "j")]
    return RoutingScenario(
        rates=torch.from_numpy(rates * settings.demand),
        prices=torch.from_numpy(money / share),
        trip_steps=torch.from_numpy(np.maximum(np.rint(times / share / settings.minutes), 1)).long(),
        move_steps=torch.from_numpy(moves).long(),
        fleet=torch.full((n,), float(totals[hour] // n), dtype=torch.float64),
        step_cost=settings.cost_per_minute * settings.minutes,
        edges=torch.tensor(edges),
        steps=settings.steps,
        minutes=settings.minutes,
    )


def _aggregate(
    rows: list[dict[str, Any]], n: int, horizon: int, settings: RoutingSettings, path: str | Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over each step of rate, rate times price, rate times minutes `[horizon, n, n]`."""
    minute = np.array([row["time_stamp"] for row in rows]) - 60 * settings.start_hour
    step = np.floor(minute / settings.minutes).astype(int)
    if not rows or minute.min() > 0 or minute.max() + 1 < math.floor(settings.minutes * horizon):
        raise ValueError(
            f"'{path}' must cover {horizon} steps of {settings.minutes:g} minutes from hour {settings.start_hour} "
            f"({settings.steps} of the episode, the rest is lookahead)"
        )
    kept = (step >= 0) & (step < horizon)
    index = tuple(np.array([row[key] for row in rows])[kept] for key in ("origin", "destination"))
    rate, price, time = (np.array([row[key] for row in rows])[kept] for key in ("demand", "price", "travel_time"))
    sums = []
    for values in (rate, rate * price, rate * time):
        total = np.zeros((horizon, n, n))
        np.add.at(total, (step[kept], *index), values)
        sums.append(total)
    return sums[0], sums[1], sums[2]


def draw_requests(scenario: RoutingScenario, batch: int, generator: torch.Generator) -> Tensor:
    """Poisson requests `[batch, steps, n, n]`."""
    rates = scenario.rates[: scenario.steps]
    return torch.poisson(rates.expand(batch, *rates.shape).contiguous(), generator=generator)


def start_fleet(scenario: RoutingScenario, batch: int, *, lossy: bool = False) -> FleetState:
    """The whole fleet idle at its stations, at step 0, before the first match."""
    n = scenario.stations
    width = int(max(scenario.trip_steps.max(), scenario.move_steps.max())) + 1
    empty = scenario.fleet.new_zeros(batch, n, width)
    trips = scenario.fleet.new_zeros(batch, n, n, width) if lossy else None
    return FleetState(0, scenario.fleet.repeat(batch, 1), empty, trips, empty if lossy else None)


def match_trips(scenario: RoutingScenario, state: FleetState, requests: Tensor) -> tuple[FleetState, Tensor]:
    """Serve the requests `[B, n, n]` of this step, dearest first; the reward `[B]`.

    Exact for the matching program: stations share nothing, and each fills a knapsack of unit weights.
    """
    price, steps = scenario.prices[state.step], scenario.trip_steps[state.step]
    order = torch.argsort(price, dim=-1, descending=True, stable=True).expand_as(requests)
    sorted_requests = requests.gather(-1, order)
    before = sorted_requests.cumsum(-1) - sorted_requests
    sorted_served = torch.minimum(sorted_requests, (state.idle.unsqueeze(-1) - before).clamp(min=0))
    served = torch.zeros_like(requests).scatter(-1, order, sorted_served)
    gain = (served * (price - scenario.step_cost * steps)).sum((-1, -2)).clamp(min=0)
    sent = _sent(state, served, steps)
    if state.trips is not None and state.lost is not None:
        trips, lost = _overwritten(state.trips, state.lost, served, steps)
        sent = replace(sent, trips=trips, lost=lost)
    return sent, gain


def _sent(state: FleetState, flows: Tensor, steps: Tensor) -> FleetState:
    """Vehicles leave: idle ones go, incoming ones are due `steps` `[n, n]` later."""
    n, width = state.incoming.shape[1:]
    due = (torch.arange(n) * width + steps).flatten()
    incoming = state.incoming.flatten(1).index_add(1, due, flows.flatten(1)).view_as(state.incoming)
    return replace(state, idle=state.idle - flows.sum(-1), incoming=incoming)


def _overwritten(trips: Tensor, lost: Tensor, served: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Passengers of a pair who are due at the same time as those who leave now are forgotten."""
    n, width = lost.shape[1:]
    due = (torch.arange(n) * width + steps).flatten()
    place = (torch.arange(n * n) * width + steps.flatten()).expand(len(served), -1)
    old, new = trips.flatten(1).gather(1, place), served.flatten(1)
    taken = old * (new > 0)
    kept = trips.flatten(1).scatter(1, place, torch.where(new > 0, new, old)).view_as(trips)
    return kept, lost.flatten(1).index_add(1, due, taken).view_as(lost)


def move_vehicles(scenario: RoutingScenario, state: FleetState, flows: Tensor) -> tuple[FleetState, Tensor]:
    """Send idle vehicles (`flows` `[B, n, n]`; the diagonal stays), let vehicles arrive, go to the next step.

    The reward `[B]` is minus what the moves cost. Raises `ValueError` for flows that are negative, no whole numbers, or
    more than a station's idle vehicles.
    """
    n = scenario.stations
    if flows.shape != (len(state.idle), n, n):
        raise ValueError(f"flows must be [{len(state.idle)}, {n}, {n}], got {list(flows.shape)}")
    moved = flows.to(state.idle.dtype) * (1 - torch.eye(n, dtype=state.idle.dtype))
    if not bool((moved >= 0).all() and (moved == moved.round()).all() and (moved.sum(-1) <= state.idle).all()):
        excess = float((moved.sum(-1) - state.idle).max())
        raise ValueError(
            f"flows at step {state.step} must be whole, not negative and at most the idle vehicles of their origin; "
            f"got a least entry of {float(moved.min()):g} and, at the worst station, {excess:+g} more than are idle"
        )
    cost = scenario.step_cost * (moved * scenario.move_steps).sum((-1, -2))
    sent = _sent(state, moved, scenario.move_steps)
    arrived = sent.incoming[..., 0]
    gone = {"incoming": _shifted(sent.incoming)}
    if sent.lost is not None and sent.trips is not None:
        arrived = arrived - sent.lost[..., 0]
        gone |= {"lost": _shifted(sent.lost), "trips": _shifted(sent.trips)}
    return replace(sent, step=sent.step + 1, idle=sent.idle + arrived, **gone), -cost


def _shifted(queue: Tensor) -> Tensor:
    return torch.cat([queue[..., 1:], torch.zeros_like(queue[..., :1])], -1)


def routing_features(scenario: RoutingScenario, state: FleetState) -> Tensor:
    """What the decision may see, `[B, n, 13]`, times 0.01, after the match of step t.

    Idle vehicles; idle plus those due at t+1, ..., t+6, each; expected revenue of requests at t+1, ..., t+6.
    """
    due = state.incoming[..., 1 : LOOKAHEAD + 1]
    due = torch.cat([due, due.new_zeros(*due.shape[:-1], LOOKAHEAD - due.shape[-1])], -1)
    ahead = slice(state.step + 1, state.step + LOOKAHEAD + 1)
    revenue = (scenario.rates[ahead] * scenario.prices[ahead]).sum(-1).T.expand(len(state.idle), -1, -1)
    idle = state.idle.unsqueeze(-1)
    return SCALE * torch.cat([idle, idle + due, revenue], -1)


def routing_rollout(
    scenario: RoutingScenario, requests: Tensor, decide: Decide, *, lossy: bool = False
) -> RoutingRollout:
    """Run the episodes of `requests` `[B, steps, n, n]` under a policy that turns a fleet into flows `[B, n, n]`.

    Raises `ValueError` for requests of another shape or not whole, and for impossible flows (`move_vehicles`).
    """
    n, steps = scenario.stations, scenario.steps
    if requests.shape[1:] != (steps, n, n):
        raise ValueError(f"requests must be [B, {steps}, {n}, {n}], got {list(requests.shape)}")
    if not bool(((requests >= 0) & (requests == requests.round()) & torch.isfinite(requests)).all()):
        raise ValueError("requests must be finite whole numbers of at least 0; draw_requests draws them from the rates")
    requests = requests.to(scenario.fleet.dtype)
    state, first = match_trips(scenario, start_fleet(scenario, len(requests), lossy=lossy), requests[:, 0])
    rows: list[tuple[Tensor, ...]] = []
    for t in range(steps):
        seen, idle, flows = routing_features(scenario, state), state.idle, decide(state)
        state, reward = move_vehicles(scenario, state, flows)
        if t + 1 < steps:
            state, gain = match_trips(scenario, state, requests[:, t + 1])
            reward = reward + gain
        rows.append((seen, idle, flows, reward))
    features, idles, flown, rewards = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    under_way = state.incoming.sum((-1, -2)) - (0 if state.lost is None else state.lost.sum((-1, -2)))
    return RoutingRollout(features, idles, flown, rewards, first, state.idle.sum(-1) + under_way)
