"""The targets behind logged flows of a fleet, and whether the flows were the cheapest for them.

With the program of `flow_program` the target that flows f met without waste is `t = q + inflow - outflow`: index sums,
no solver. Whether f is optimal for it is read from duality: f is, if and only if potentials a, pi exist with

    pi_j - a_i <= c_ij   for every edge and for staying (c_ii = 0),     equal where f_ij > 0;

then the dual value `sum_j pi_j t_j - sum_i a_i q_i` equals the cost of f. Eliminating pi leaves differences

    a_k - a_i <= D_ik = min { c_ij - c_kj : f_kj > 0 },

which some a meets if and only if D has no cycle of negative length. Shortest paths over D (Floyd and Warshall) give a,
or show a negative cycle: vehicles that could be exchanged around it more cheaply.

Shares `u = t / sum t` become whole targets again by largest remainders: no vehicle is lost, as truncation loses it.

Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, section 4; Ahuja,
Magnanti, Orlin, Network Flows, 1993, theorem 9.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sim2real.solvers.apportionment import largest_remainder
from sim2real.solvers.flow_program import TOLERANCE, FlowProgram, rebalance_flows

CHUNK = 20_000_000
"""entries of the largest temporary tensor"""


@dataclass(frozen=True)
class FlowInverse:
    """What a batch of logged flows was aiming at."""

    target: Tensor
    """`[B, n]` whole"""
    optimal: Tensor
    """`[B]` bool: no cheaper flows reach the target"""
    saving: Tensor
    """`[B]` what the cheapest flows to the same target would save; 0 where optimal"""
    origin_potential: Tensor
    """`[B, n]` a; NaN where not optimal"""
    goal_potential: Tensor
    """`[B, n]` pi; NaN where not optimal"""


def recover_target(idle: Tensor, flows: Tensor) -> Tensor:
    """Where vehicles are after the flows `[B, n, n]`, `[B, n]`; the diagonal does not count."""
    return idle - flows.sum(-1) + flows.sum(-2)


def target_shares(target: Tensor) -> Tensor:
    """`u = t / sum t` `[B, n]`; uniform where there is nothing to share."""
    total = target.sum(-1, keepdim=True)
    shares = target / total.clamp(min=1)
    return torch.where(total > 0, shares, torch.full_like(shares, 1 / target.shape[-1]))


def integer_target(
    shares: Tensor, total: Tensor, *, rounding: Literal["largest_remainder", "floor"] = "largest_remainder"
) -> Tensor:
    """Whole targets `[B, n]` from shares that sum to 1 and the number of vehicles `[B]`.

    "largest_remainder" hands out every vehicle and gives back the targets that `target_shares` came from; "floor" is
    what the public implementation does. Raises `ValueError` for shares that are negative or do not sum to 1 (1e-4) and
    for totals that are not whole.
    """
    if not bool((shares >= 0).all() and ((shares.sum(-1) - 1).abs() <= 1e-4).all()):
        raise ValueError(
            f"shares must be at least 0 and sum to 1; got a least share of {float(shares.min()):g} "
            f"and sums from {float(shares.sum(-1).min()):g} to {float(shares.sum(-1).max()):g}"
        )
    whole = largest_remainder(shares.double(), total.double())  # checks the totals
    return whole if rounding == "largest_remainder" else torch.floor(shares.double() * total.double().unsqueeze(-1))


def invert_flows(program: FlowProgram, idle: Tensor, flows: Tensor) -> FlowInverse:
    """The targets of logged flows `[B, n, n]` from `idle` `[B, n]`, and whether the flows are the cheapest for them.

    Raises `ValueError` for other shapes and for flows that are negative or fractional, use no edge of the program or
    more than the idle vehicles.
    """
    cost = torch.from_numpy(program.cost).to(idle.device)
    n = len(cost)
    if idle.shape[1:] != (n,) or flows.shape != (len(idle), n, n):
        raise ValueError(
            f"idle must be [B, {n}] and flows [B, {n}, {n}], got {list(idle.shape)} and {list(flows.shape)}"
        )
    stay = torch.eye(n, dtype=torch.bool, device=idle.device)
    moved = flows.double() * ~stay
    kept = idle.double() - moved.sum(-1)
    if not bool((moved >= 0).all() and (kept >= 0).all() and (moved[:, ~torch.isfinite(cost)] == 0).all()):
        raise ValueError(
            "flows must be at least 0, sum to at most the idle vehicles of each station and use edges of the program; "
            f"got a least flow of {float(moved.min()):g} and {float(kept.min()):g} vehicles left at the worst station"
        )
    if not bool((moved == moved.round()).all() and (kept == kept.round()).all()):
        raise ValueError("idle vehicles and flows must be whole numbers")
    used = (moved + torch.diag_embed(kept)) > 0
    size = max(1, CHUNK // n**3)
    found = [_potentials(cost, part) for part in used.split(size)]
    optimal, a, pi = (torch.cat(column) for column in zip(*found, strict=True))
    target = recover_target(idle.double(), moved)
    saving = torch.zeros_like(kept[:, 0])
    if not bool(optimal.all()):
        wrong = ~optimal
        paid = (moved[wrong] * torch.where(torch.isfinite(cost), cost, 0)).sum((-1, -2))
        saving[wrong] = paid - rebalance_flows(program, idle[wrong], target[wrong]).cost
    nothing = torch.where(optimal, 0.0, torch.nan).unsqueeze(-1).to(a)
    return FlowInverse(target, optimal, saving, a + nothing, pi + nothing)


def _potentials(cost: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """optimal `[b]`, a and pi `[b, n]` from which edges `[b, n, n]` carry vehicles."""
    scale = float(cost[torch.isfinite(cost)].max())
    paid = torch.where(used, cost, -torch.inf)  # c_kj where f_kj > 0
    # D_ik = min_j (c_ij - c_kj): unused j are worth inf
    D = (cost.unsqueeze(-2) - paid.unsqueeze(-3)).amin(-1)
    for k in range(D.shape[-1]):
        # a negative cycle doubles its length at every turn: bounded, it stays negative
        D = torch.minimum(D, D[..., k : k + 1] + D[..., k : k + 1, :]).clamp(min=-1e6 * scale)
    optimal = (D.diagonal(dim1=-2, dim2=-1) >= -TOLERANCE * scale).all(-1)
    a = D.amin(-2)
    pi = (a.unsqueeze(-1) + cost).amin(-2)
    pi = torch.where(pi < torch.inf, pi, 0.0)  # stations that no vehicle can reach
    # stations without vehicles bind nothing: the least potential that their edges allow
    least = (pi.unsqueeze(-2) - cost).amax(-1)
    return optimal, torch.where(used.any(-1), a, least), pi
