"""Rebalancing flows against the program as written, networkx-free enumeration, and known duals; their inverse."""

import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linprog
from torch import Tensor

from sim2real.solvers import InfeasibleError, flow_program, integer_target, invert_flows, rebalance_flows, target_shares
from sim2real.solvers.flow_inverse import recover_target
from sim2real.solvers.linear_program import LinearProgram, invert_right_hand_side


def cities(n: int, seed: int, *, rounded: bool) -> Tensor:
    """Travel times between random points; whole numbers of at least 1 break the triangle inequality."""
    points = np.random.default_rng(seed).random((n, 2))
    cost = 8 * np.linalg.norm(points[:, None] - points[None], axis=-1)
    return torch.from_numpy(np.maximum(np.rint(cost), 1) if rounded else cost)


def fleets(n: int, count: int, seed: int, per_station: int = 6) -> tuple[Tensor, Tensor]:
    """Idle vehicles and floored targets; some stations are empty."""
    rng = np.random.default_rng(seed)
    idle = np.stack([rng.multinomial(per_station * n, rng.dirichlet(np.full(n, 0.5))) for _ in range(count)])
    target = np.floor(rng.dirichlet(np.full(n, 0.7), count) * idle.sum(-1, keepdims=True))
    return torch.from_numpy(idle).double(), torch.from_numpy(target)


def as_written(cost: Tensor, idle: Tensor, target: Tensor) -> float:
    """inflow - outflow >= t - q and outflow <= q, over all edges but staying."""
    n = len(idle)
    origin, goal = np.nonzero(~np.eye(n, dtype=bool))
    k = np.arange(len(origin))
    leaves, enters = np.zeros((n, len(k))), np.zeros((n, len(k)))
    leaves[origin, k], enters[goal, k] = 1.0, 1.0
    rows, limit = np.vstack([leaves - enters, leaves]), torch.cat([idle - target, idle])
    return float(linprog(cost.numpy()[origin, goal], A_ub=rows, b_ub=limit.numpy()).fun)


@pytest.mark.parametrize("rounded", [False, True], ids=["metric", "rounded"])
def test_flows_cost_what_the_program_as_written_costs(rounded: bool) -> None:
    cost = cities(9, 3, rounded=rounded)
    program = flow_program(cost, tie_break=1.0 if rounded else None)
    idle, target = fleets(9, 60, 4)
    found = rebalance_flows(program, idle, target)
    assert program.direct is not rounded
    assert bool(found.full.any()) is rounded  # both ways of solving are met
    for k in range(60):
        assert float(found.cost[k]) == pytest.approx(as_written(cost, idle[k], target[k]), abs=1e-9)
    assert bool((found.flows.sum(-1) == idle).all())
    assert bool((found.flows.sum(-2) >= target).all())
    assert bool((found.flows == found.flows.round()).all())
    assert float(found.shortfall.max()) == 0


@pytest.mark.parametrize("rounded", [False, True], ids=["metric", "rounded"])
def test_a_large_city_is_priced_out_exactly(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 150 edges at first, of 400 (stations with too many to those with too few) or 1600 (all)."""
    monkeypatch.setattr(sys.modules["sim2real.solvers.flow_program"], "BLOCK", 75)
    program = flow_program(cities(40, 0, rounded=rounded), tie_break=1.0 if rounded else None)
    idle, target = fleets(40, 4, 1)
    found = rebalance_flows(program, idle, target)
    assert bool(found.full.any()) is rounded
    rows = scipy.sparse.kron(scipy.sparse.eye_array(40), np.ones((1, 40)), format="csr")
    columns = scipy.sparse.kron(np.ones((1, 40)), scipy.sparse.eye_array(40), format="csr")
    for k in range(4):
        best = linprog(program.cost.ravel(), A_ub=rows, b_ub=idle[k].numpy(), A_eq=columns, b_eq=target[k].numpy())
        assert float(found.cost[k]) == pytest.approx(best.fun, rel=1e-9)


def test_of_equal_flows_the_preferred_come_out() -> None:
    """Two stations with too many, two with too few, all a step apart: the preference pairs them."""
    cost = torch.ones(4, 4).double()
    idle, target = torch.tensor([[2.0, 2, 0, 0]]).double(), torch.tensor([[0.0, 0, 2, 2]]).double()
    for pairs in ([(0, 2), (1, 3)], [(0, 3), (1, 2)]):
        preference = torch.ones(4, 4).double()
        for i, j in pairs:
            preference[i, j] = 0.0
        flows = rebalance_flows(flow_program(cost, tie_break=1.0, preference=preference), idle, target).flows[0]
        assert all(float(flows[i, j]) == 2 for i, j in pairs)
    # never a dearer one, however much it is preferred: a cycle of n edges saves at most n (1 / (4 n + 1)) 2 < 1
    dear = cost.clone()
    dear[0, 2] = dear[1, 3] = 2.0
    preference = torch.full((4, 4), 1e6).double()
    preference[0, 2] = preference[1, 3] = 0.0
    assert float(rebalance_flows(flow_program(dear, tie_break=1.0, preference=preference), idle, target).cost) == 4.0


def test_slack_leaves_out_what_costs_too_much() -> None:
    cost = torch.tensor([[0.0, 1, 5], [1, 0, 5], [5, 5, 0]]).double()
    idle, target = torch.tensor([[4.0, 0, 0]]).double(), torch.tensor([[0.0, 3, 3]]).double()
    program = flow_program(cost)
    with pytest.raises(InfeasibleError, match="row 0 wants 6 vehicles of 4"):
        rebalance_flows(program, idle, target)
    needed = rebalance_flows(program, idle, target, slack=100.0)
    assert (float(needed.cost), needed.shortfall.tolist()) == (8.0, [[0.0, 0.0, 2.0]])
    cheap = rebalance_flows(program, idle, target, slack=2.0)  # five steps to the third station are not worth 2
    assert (float(cheap.cost), cheap.shortfall.tolist()) == (3.0, [[0.0, 0.0, 3.0]])


def test_stations_without_edges() -> None:
    cost = torch.tensor([[0.0, 1, torch.inf], [1, 0, torch.inf], [torch.inf, torch.inf, 0]]).double()
    program, idle = flow_program(cost), torch.tensor([[4.0, 0, 0]]).double()
    assert float(rebalance_flows(program, idle, torch.tensor([[1.0, 3, 0]]).double()).cost) == 3
    with pytest.raises(InfeasibleError, match="no edges lead"):
        rebalance_flows(program, idle, torch.tensor([[1.0, 0, 3]]).double())


@pytest.mark.parametrize("rounded", [False, True], ids=["metric", "rounded"])
def test_logged_flows_come_back_from_their_shares(rounded: bool) -> None:
    """Every entry, through float32 shares."""
    program = flow_program(cities(9, 5, rounded=rounded), tie_break=1.0 if rounded else None)
    idle, target = fleets(9, 80, 6)
    flows = rebalance_flows(program, idle, target).flows
    found = invert_flows(program, idle, flows)
    again = integer_target(target_shares(found.target).float(), idle.sum(-1))
    assert bool((again == found.target).all())
    assert bool((rebalance_flows(program, idle, again).flows == flows).all())
    assert bool(found.optimal.all())
    # strong duality: the dual value is the cost; rounding of sums of products up to 54 x 11
    dual = (found.goal_potential * found.target).sum(-1) - (found.origin_potential * idle).sum(-1)
    torch.testing.assert_close(dual, (flows * torch.from_numpy(program.cost)).sum((-1, -2)), rtol=1e-9, atol=1e-9)
    least = found.goal_potential.unsqueeze(-2) - found.origin_potential.unsqueeze(-1)
    assert bool((least <= torch.from_numpy(program.cost) + 1e-9).all())  # feasible for every edge and for staying


def test_wasteful_flows_are_named_with_what_they_waste() -> None:
    """Random flows: duality, the solver and the general inverse of a linear program agree on each."""
    cost, n = cities(5, 1, rounded=True), 5
    program, rng = flow_program(cost, tie_break=1.0), np.random.default_rng(2)
    idle = torch.from_numpy(rng.integers(0, 6, (60, n))).double()
    flows = torch.zeros(60, n, n).double()
    for k in range(60):
        for i in rng.permutation(n)[:2]:
            flows[k, i, rng.integers(n)] = float(rng.integers(0, int(idle[k, i]) + 1))
    flows = flows * (1 - torch.eye(n).double())
    found = invert_flows(program, idle, flows)
    torch.testing.assert_close(found.target, recover_target(idle, flows))
    paid = (flows * cost).sum((-1, -2))
    least = torch.tensor([as_written(cost, *row) for row in zip(idle, found.target, strict=True)]).double()
    torch.testing.assert_close(found.saving, paid - least, rtol=0, atol=1e-7)
    assert found.optimal.tolist() == (found.saving < 1e-7).tolist()
    assert 0 < int(found.optimal.sum()) < 60
    assert bool(found.goal_potential[~found.optimal].isnan().all())

    origin, goal = np.nonzero(~np.eye(n, dtype=bool))
    rows, edge = np.zeros((2 * n, len(origin))), np.arange(len(origin))
    rows[goal, edge] += 1
    rows[origin, edge] -= 1
    rows[n + origin, edge] = -1
    general = LinearProgram(
        cost.numpy()[origin, goal], scipy.sparse.csr_array(rows), np.zeros(2 * n, bool), np.full(len(edge), np.inf)
    )
    known = torch.cat([torch.full((60, n), torch.nan), -idle], 1)
    other = invert_right_hand_side(general, flows[:, origin, goal], known)
    assert other.optimal.tolist() == found.optimal.tolist()
    torch.testing.assert_close(other.saving, found.saving, rtol=0, atol=1e-7)
    torch.testing.assert_close(idle + other.value[:, :n], found.target)


def test_truncation_loses_what_largest_remainders_keep() -> None:
    target = torch.tensor([[3.0, 0, 7, 11, 2]])
    shares = target_shares(target) - 1e-7 * torch.tensor([[1.0, -4, 1, 1, 1]])
    total = target.sum(-1)
    assert integer_target(shares, total).tolist() == target.tolist()
    assert float(integer_target(shares, total, rounding="floor").sum()) == 19  # of 23: one per station
    assert target_shares(torch.zeros(1, 4)).tolist() == [[0.25] * 4]


def test_failures_say_what_is_wrong() -> None:
    cost = cities(3, 0, rounded=True)
    program, ones = flow_program(cost), torch.ones(1, 3).double()
    for wrong, message in (
        ({"cost": torch.ones(2, 3)}, r"\[n, n\]"),
        ({"cost": -cost}, "at least 0"),
        ({"cost": cost + 0.1, "tie_break": 1.0}, "whole multiples"),
        ({"cost": cost, "preference": cost}, "pass tie_break"),
        ({"cost": cost, "tie_break": 1.0, "preference": torch.ones(2, 2)}, "preference must"),
    ):
        with pytest.raises(ValueError, match=message):
            flow_program(**wrong)
    with pytest.raises(ValueError, match=r"idle must be \[B, 3\]"):
        rebalance_flows(program, torch.ones(3), ones)
    with pytest.raises(ValueError, match="integer_target"):
        rebalance_flows(program, ones, 0.5 * ones)
    with pytest.raises(ValueError, match="one shape"):
        rebalance_flows(program, ones, torch.ones(2, 3))
    with pytest.raises(ValueError, match="left at the worst station"):
        invert_flows(program, ones, torch.full((1, 3, 3), 2.0))
    with pytest.raises(ValueError, match="sum to 1"):
        integer_target(torch.ones(1, 3), torch.tensor([3.0]))


@pytest.mark.parametrize("unit", [1e-8, 1e-3, 1e5])
def test_the_unit_of_the_costs_does_not_matter(unit: float) -> None:
    """HiGHS's tolerances are absolute: unscaled, costs of 1e-8 give flows that cost half as much again."""
    cost = cities(9, 3, rounded=False)
    idle, target = fleets(9, 20, 4)
    least = rebalance_flows(flow_program(cost), idle, target)
    found = rebalance_flows(flow_program(unit * cost), idle, target)
    torch.testing.assert_close(found.cost / unit, least.cost, rtol=1e-9, atol=0)
    other = rebalance_flows(flow_program(cost.flip(0, 1)), idle, target).flows  # cheapest elsewhere
    here, scaled = (invert_flows(flow_program(u * cost), idle, other) for u in (1.0, unit))
    assert scaled.optimal.tolist() == here.optimal.tolist()
    assert 0 < int(here.optimal.sum()) < 20


def test_potentials_of_stations_out_of_reach_are_finite() -> None:
    cost = torch.tensor([[0.0, 1, torch.inf], [1, 0, torch.inf], [torch.inf, torch.inf, 0]]).double()
    flows = torch.zeros(1, 3, 3).double()
    flows[0, 0, 1] = 3.0
    found = invert_flows(flow_program(cost), torch.tensor([[4.0, 0, 0]]).double(), flows)
    assert float((found.goal_potential * found.target).sum() - 4 * found.origin_potential[0, 0]) == 3.0
    assert float(found.goal_potential.abs().max()) <= 1.0
    assert bool((found.goal_potential[0] - found.origin_potential[0].unsqueeze(-1) <= cost).all())


def test_what_is_not_whole_is_refused() -> None:
    program, ones = flow_program(cities(3, 0, rounded=True)), torch.ones(1, 3).double()
    with pytest.raises(ValueError, match="finite whole"):
        rebalance_flows(program, torch.inf * ones, ones)
    for slack in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="slack is the cost"):
            rebalance_flows(program, ones, 2 * ones, slack=slack)
    half = torch.zeros(1, 3, 3).double()
    half[0, 0, 1] = 0.5
    with pytest.raises(ValueError, match="whole numbers"):
        invert_flows(program, ones, half)
    with pytest.raises(ValueError, match=r"flows \[B, 3, 3\]"):
        invert_flows(program, ones, torch.zeros(4, 3, 3))
    for total in (torch.inf, torch.nan, 2.5):
        for rounding in ("largest_remainder", "floor"):
            with pytest.raises(ValueError, match="totals must be finite"):
                integer_target(ones / 3, torch.tensor([total]), rounding=rounding)
    assert target_shares(torch.zeros(1, 4, dtype=torch.long)).tolist() == [[0.25] * 4]  # integers, too
