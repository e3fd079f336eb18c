"""Policies of vehicle routing from the literature, trivial ones, the bound by perfect foresight, and logs of them.

`inf`    informed rebalancing: with lambda_j the mean requests of a step over the next six, rounded, horizon H steps,
         density rho,
             max sum_ij lambda_j (H - tau_ij) f_ij,   sum_j f_ij <= q_i,   sum_i (H - tau_ij) f_ij <= lambda_j rho H^2
`dtv`    as many vehicles as possible assigned to those requests, one each, by the least travel time
`prop`   targets in proportion to the requests expected over the next five steps
`disp`   random targets, Dirichlet(1, ..., 1)
`uniform`, `none`   equal targets; no moves

Reference: Wallar et al., Vehicle rebalancing for mobility-on-demand systems with ride-sharing, 2018; Alonso-Mora et
al., On-demand high-capacity ride-sharing via dynamic trip-vehicle assignment, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linprog
from torch import Tensor

from sim2real.simulators.vehicle_routing import (
    LOOKAHEAD,
    Decide,
    FleetState,
    RoutingScenario,
    draw_requests,
    routing_features,
    routing_rollout,
)
from sim2real.solvers.apportionment import largest_remainder
from sim2real.solvers.flow_inverse import integer_target
from sim2real.solvers.flow_program import FlowProgram, flow_program, rebalance_flows

UNSERVED = 1e4
"""cost of a request without a vehicle in `dtv`: more than any travel time"""
BATCH = 100
"""episodes run together for logs"""


@dataclass(frozen=True)
class RoutingLog:
    """N logged transitions; reward: of the move and of the match that follows it."""

    features: Tensor
    """`[N, n, 13]`"""
    idle: Tensor
    """`[N, n]`"""
    flows: Tensor
    """`[N, n, n]`"""
    reward: Tensor
    """`[N]`"""
    next_features: Tensor
    """`[N, n, 13]`"""


def fleet_program(scenario: RoutingScenario) -> FlowProgram:
    """The lower level: travel times in steps as costs; of equally cheap flows, short moves towards busy stations."""
    busy = scenario.rates[: scenario.steps].sum((0, -1))
    return flow_program(scenario.move_steps, tie_break=1.0, preference=busy * scenario.move_steps)


def expected_requests(scenario: RoutingScenario, step: int, steps: int) -> Tensor:
    """Requests expected at each station over the `steps` after `step`, `[n]`."""
    return scenario.rates[step + 1 : step + 1 + steps].sum((0, -1))


def steered(scenario: RoutingScenario, shares: Callable[[FleetState], Tensor], *, floor: bool = False) -> Decide:
    """A policy over the lower level: shares `[B, n]` of the idle vehicles -> flows."""
    program = fleet_program(scenario)

    def decide(state: FleetState) -> Tensor:
        rounding = "floor" if floor else "largest_remainder"
        target = integer_target(shares(state), state.idle.sum(-1), rounding=rounding)
        return rebalance_flows(program, state.idle, target).flows

    return decide


def observed(scenario: RoutingScenario, policy: Callable[[Tensor], Tensor]) -> Decide:
    """A learned policy: features `[B, n, 13]` -> shares `[B, n]`."""
    return steered(scenario, lambda state: policy(routing_features(scenario, state)))


def flown(scenario: RoutingScenario, policy: Callable[[Tensor], Tensor], *, projected: bool) -> Decide:
    """An end-to-end policy: features -> wished flows `[B, n^2]`.

    Published: truncated, then cut edge by edge to the vehicles left. Projected: scaled down where a station lacks
    vehicles, and rounded by largest remainders, those that stay included.
    """
    n = scenario.stations
    moves = 1 - torch.eye(n, dtype=torch.float64)

    def decide(state: FleetState) -> Tensor:
        wished = policy(routing_features(scenario, state)).double().unflatten(-1, (n, n)).clamp(min=0) * moves
        idle = state.idle.unsqueeze(-1)
        if not projected:
            whole = torch.floor(wished)
            return torch.minimum(whole, (idle - whole.cumsum(-1) + whole).clamp(min=0))
        fitted = wished * (idle / wished.sum(-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        stay = (idle.squeeze(-1) - fitted.sum(-1)).clamp(min=0)
        parts = fitted + torch.diag_embed(stay)
        empty = state.idle == 0
        shares = torch.where(empty.unsqueeze(-1), 1.0, parts)  # nothing to share out
        return largest_remainder(shares, state.idle)

    return decide


def none(scenario: RoutingScenario) -> Decide:
    return lambda state: torch.diag_embed(state.idle)


def uniform(scenario: RoutingScenario) -> Decide:
    return steered(scenario, lambda state: torch.full_like(state.idle, 1 / scenario.stations), floor=True)


def proportional(scenario: RoutingScenario) -> Decide:
    def shares(state: FleetState) -> Tensor:
        wanted = expected_requests(scenario, state.step, LOOKAHEAD - 1)
        return (wanted / wanted.sum()).expand_as(state.idle)

    return steered(scenario, shares, floor=True)


def dispersed(scenario: RoutingScenario, seed: int) -> Decide:
    rng = np.random.default_rng(seed)
    ones = np.ones(scenario.stations)
    return steered(scenario, lambda state: torch.from_numpy(rng.dirichlet(ones, len(state.idle))), floor=True)


def assigned(scenario: RoutingScenario) -> Decide:
    """`dtv`: staying costs nothing, so assigning vehicles to requests is bringing each station its requests."""
    program = fleet_program(scenario)

    def decide(state: FleetState) -> Tensor:
        wanted = (expected_requests(scenario, state.step, LOOKAHEAD) / LOOKAHEAD).round()
        return rebalance_flows(program, state.idle, wanted.expand_as(state.idle), slack=UNSERVED).flows

    return decide


def informed(scenario: RoutingScenario, horizon: int, density: float) -> Decide:
    """`inf` as a program of n^2 flows (vehicles of a station are alike), rounded down."""
    left = (horizon - scenario.move_steps.double().numpy()).clip(min=0)

    def decide(state: FleetState) -> Tensor:
        wanted = (expected_requests(scenario, state.step, LOOKAHEAD) / LOOKAHEAD).round().numpy()
        B, n = state.idle.shape
        takes = scipy.sparse.kron(scipy.sparse.eye_array(n), np.ones((1, n)))
        fills = scipy.sparse.hstack([scipy.sparse.diags_array(left[i]) for i in range(n)])
        rows = scipy.sparse.kron(scipy.sparse.eye_array(B), scipy.sparse.vstack([takes, fills]), format="csr")
        limit = np.concatenate([state.idle.numpy(), np.tile(wanted * density * horizon**2, (B, 1))], 1).ravel()
        gain = np.tile((wanted * left).ravel(), B)
        found = linprog(-gain, A_ub=rows, b_ub=limit, bounds=(0, None), method="highs-ds", options={"presolve": False})
        flows = np.floor(found.x.reshape(B, n, n) + 1e-7) * (left > 0)
        return torch.from_numpy(flows)

    return decide


INFORMED = {"nyc": (6, 4.0), "shz": (3, 1.0)}
"""horizon (steps) and density of `inf`"""


def behaviours(scenario: RoutingScenario, city: str, seed: int) -> dict[str, Decide]:
    """All policies by name; `city`: "nyc" or "shz" (the tuned parameters of `inf`)."""
    return {
        "inf": informed(scenario, *INFORMED[city]),
        "dtv": assigned(scenario),
        "prop": proportional(scenario),
        "disp": dispersed(scenario, seed),
        "uniform": uniform(scenario),
        "none": none(scenario),
    }


def routing_logs(scenario: RoutingScenario, decide: Decide, transitions: int, seed: int) -> RoutingLog:
    """Whole episodes of a policy, cut at `transitions`; the last decision of an episode has no successor."""
    episodes = -(-transitions // (scenario.steps - 1))
    parts: list[tuple[Tensor, ...]] = []
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, episodes, BATCH):
        requests = draw_requests(scenario, min(BATCH, episodes - begin), generator)
        run = routing_rollout(scenario, requests, decide)
        before, after = run.features[:, :-1], run.features[:, 1:]
        rows = (before, run.idle[:, :-1], run.flows[:, :-1], run.rewards[:, :-1], after)
        parts.append(tuple(values.flatten(0, 1) for values in rows))
    return RoutingLog(*(torch.cat(column)[:transitions] for column in zip(*parts, strict=True)))


def perfect_foresight(scenario: RoutingScenario, requests: Tensor) -> float:
    """The largest return of one episode `[steps, n, n]` when all requests are known and none need be served."""
    T, n = requests.shape[:2]
    t, i, j = np.nonzero(requests.numpy())
    st, si, sj = (values.ravel() for values in np.mgrid[:T, :n, :n])
    away = si != sj
    st, si, sj = st[away], si[away], sj[away]
    trip, move = scenario.trip_steps.numpy()[t, i, j], scenario.move_steps.numpy()[si, sj]
    gain = np.r_[scenario.prices.numpy()[t, i, j] - scenario.step_cost * trip, -scenario.step_cost * move]
    leave, origin = np.r_[t, st], np.r_[i, si]
    back, goal = leave + np.r_[trip, move] + 1, np.r_[j, sj]
    # vehicles that have left by step s, less those back by then, are at most the first fleet
    k = np.arange(len(gain))
    out = scipy.sparse.csr_array((np.ones(len(k)), (leave * n + origin, k)), shape=(T * n, len(k)))
    home = back < T
    into = scipy.sparse.csr_array((np.ones(home.sum()), (back[home] * n + goal[home], k[home])), shape=(T * n, len(k)))
    so_far = scipy.sparse.kron(np.tril(np.ones((T, T))), scipy.sparse.eye_array(n), format="csr")
    limit = np.r_[requests.numpy()[t, i, j], np.full(len(st), np.inf)]
    found = linprog(
        -gain,
        A_ub=(so_far @ (out - into)).tocsr(),
        b_ub=np.tile(scenario.fleet.numpy(), T),
        bounds=np.stack([np.zeros_like(limit), limit], 1),
        method="highs",
    )
    return -float(found.fun)
