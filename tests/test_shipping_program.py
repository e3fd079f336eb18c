"""The lower level of a warehouse with stores: against linear programs solved by HiGHS, and its round trip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from sim2real.solvers.apportionment import largest_remainder
from sim2real.solvers.shipping_program import (
    ShippingLimits,
    invert_shipments,
    ship,
    shipping_goals,
)


def highs(limits: ShippingLimits, goals: Tensor, production: Tensor, row: int) -> tuple[float, float]:
    """Both objectives of one program by two linear programs; variables f, p, over, error up and down (f, p)."""
    n = goals.shape[1]
    available, room = float(limits.available[row]), limits.room[row].numpy()
    eye, zero = np.eye(n), np.zeros((n, n))
    column = np.zeros((n, 1))
    # f - over <= room; sum f <= S; p - sum f <= W - S
    upper = [
        np.hstack([eye, column, -eye, np.zeros((n, 2 * n + 2))]),
        np.hstack([np.ones((1, n)), np.zeros((1, 3 * n + 3))]),
        np.hstack([-np.ones((1, n)), np.ones((1, 1)), np.zeros((1, 3 * n + 2))]),
    ]
    limit = np.concatenate([room, [available], [float(limits.warehouse_capacity) - available]])
    # f - up + down = q, p - up + down = g
    equal = np.vstack(
        [
            np.hstack([eye, column, zero, -eye, column, eye, column]),
            np.concatenate([np.zeros(n), [1], np.zeros(n), np.zeros(n), [-1], np.zeros(n), [1]])[None],
        ]
    )
    target = np.concatenate([goals[row].numpy(), [float(production[row])]])
    bounds = [(0, None)] * n + [(0, float(limits.production_cap))] + [(0, None)] * (3 * n + 2)
    over = np.concatenate([np.zeros(n + 1), np.ones(n), np.zeros(2 * n + 2)])
    first = linprog(over, np.vstack(upper), limit, equal, target, bounds, method="highs-ds")
    assert first.success
    deviation = np.concatenate([np.zeros(2 * n + 1), np.ones(2 * n + 2)])
    second = linprog(
        deviation,
        np.vstack([*upper, over[None]]),
        np.append(limit, first.fun),
        equal,
        target,
        bounds,
        method="highs-ds",
    )
    assert second.success
    return float(first.fun), float(second.fun)


def problems(rows: int, stores: int, seed: int) -> tuple[ShippingLimits, Tensor, Tensor]:
    """Whole random programs in which every constraint binds in many rows; the warehouse often begins too full."""
    rng = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=rng).to(torch.float64)

    limits = ShippingLimits(whole(0, 80, rows), whole(-6, 15, rows, stores), torch.tensor(50.0), torch.tensor(25.0))
    return limits, whole(0, 25, rows, stores), whole(0, 30, rows)


def check_against_highs(rows: int, stores: int, seed: int) -> None:
    limits, goals, production = problems(rows, stores, seed)
    plan = ship(limits, goals, production)
    expected = torch.tensor([highs(limits, goals, production, row) for row in range(rows)])
    # whole units: HiGHS is exact up to its feasibility tolerance of 1e-7 per constraint
    torch.testing.assert_close(plan.violation, expected[:, 0].to(torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.deviation, expected[:, 1].to(torch.float64), atol=1e-5, rtol=0)
    assert_feasible(limits, plan.shipments, plan.production)


def assert_feasible(limits: ShippingLimits, shipments: Tensor, production: Tensor) -> None:
    assert bool((shipments >= 0).all() and (shipments == shipments.round()).all())
    assert bool((shipments.sum(-1) <= limits.available).all())
    assert bool(((production >= 0) & (production <= limits.production_cap)).all())
    assert bool((limits.available - shipments.sum(-1) + production <= limits.warehouse_capacity).all())


@pytest.mark.parametrize("stores", [1, 3, 10])
def test_both_objectives_equal_highs(stores: int) -> None:
    check_against_highs(100, stores, seed=stores)


@pytest.mark.slow
@pytest.mark.parametrize("stores", [1, 2, 3, 5, 10])
def test_both_objectives_equal_highs_in_thousands_of_programs(stores: int) -> None:
    check_against_highs(1000, stores, seed=100 + stores)


def test_goals_within_all_limits_are_met() -> None:
    limits = ShippingLimits(
        torch.tensor([20.0]), torch.tensor([[5.0, 8.0, 9.0]]), torch.tensor(50.0), torch.tensor(25.0)
    )
    plan = ship(limits, torch.tensor([[2.0, 8.0, 4.0]]), torch.tensor([7.0]))
    assert plan.shipments.tolist() == [[2.0, 8.0, 4.0]]
    assert (float(plan.production), float(plan.violation), float(plan.deviation)) == (7.0, 0.0, 0.0)


def test_a_full_warehouse_produces_less_before_it_ships_more() -> None:
    limits = ShippingLimits(
        torch.tensor([50.0, 60.0]), torch.tensor([[5.0, 5.0]]).expand(2, 2), torch.tensor(50.0), torch.tensor(25.0)
    )
    plan = ship(limits, torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([10.0, 10.0]))
    assert plan.production.tolist() == [4.0, 0.0]
    assert plan.shipments.tolist() == [[2.0, 2.0], [5.0, 5.0]]


def test_stores_that_ask_come_first_where_room_is_lacking() -> None:
    limits = ShippingLimits(torch.tensor([60.0]), torch.tensor([[1.0, -2.0]]), torch.tensor(50.0), torch.tensor(25.0))
    plan = ship(limits, torch.tensor([[0.0, 8.0]]), torch.tensor([3.0]))
    # one unit fills the room of store 0, the other nine exceed some capacity: eight are asked for by store 1
    assert plan.shipments.sum() == 10.0
    assert plan.shipments[0, 1] >= 8.0
    assert float(plan.violation) == 11.0


@given(st.integers(0, 2**31), st.integers(1, 10), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_round_trip_is_lossless_and_names_what_is_not_optimal(seed: int, stores: int, dtype: torch.dtype) -> None:
    limits, goals, production = problems(50, stores, seed)
    wanted = torch.minimum(goals.cumsum(-1), limits.available.unsqueeze(-1)).diff(
        dim=-1, prepend=torch.zeros(50, 1, dtype=torch.float64)
    )
    inverse = invert_shipments(limits, wanted, production)
    share = inverse.share.to(dtype)
    again = ship(limits, shipping_goals(share.double(), limits.available), inverse.production)
    same = (again.shipments == wanted).all(-1) & (again.production == production)
    assert bool((same == inverse.optimal).all())
    torch.testing.assert_close(share.sum(-1), torch.ones(50, dtype=dtype))
    # what the program itself decided is always recovered
    plan = ship(limits, goals, production)
    assert bool(invert_shipments(limits, plan.shipments, plan.production).optimal.all())


def test_nothing_available_leaves_all_shares_with_the_warehouse() -> None:
    limits = ShippingLimits(torch.zeros(1), torch.ones(1, 2), torch.tensor(50.0), torch.tensor(25.0))
    inverse = invert_shipments(limits, torch.zeros(1, 2), torch.zeros(1))
    assert inverse.share.tolist() == [[0.0, 0.0, 1.0]]
    assert bool(inverse.optimal)


def test_apportionment_against_counting() -> None:
    assert largest_remainder(torch.tensor([0.5, 0.3, 0.2]), torch.tensor(7.0)).tolist() == [4.0, 2.0, 1.0]
    units = torch.arange(1, 8).double()
    for total in (0.0, 1.0, 5.0, 28.0, 56.0):
        q = largest_remainder(units, torch.tensor(total, dtype=torch.float64))
        assert float(q.sum()) == total
        # quota: each within one of its exact share
        assert bool(((q - units / 28 * total).abs() < 1).all())


def test_failures_name_what_is_wrong() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="room"):
        ShippingLimits(one, torch.ones(2, 3), one, one)
    with pytest.raises(ValueError, match="whole"):
        ShippingLimits(one, torch.full((1, 3), 0.5), one, one)
    with pytest.raises(ValueError, match="not be negative"):
        ShippingLimits(-one, torch.ones(1, 3), one, one)
    limits = ShippingLimits(one, torch.ones(1, 3), one, one)
    with pytest.raises(ValueError, match="goals must be"):
        ship(limits, torch.ones(1, 2), one)
    with pytest.raises(ValueError, match="finite"):
        ship(limits, torch.full((1, 3), torch.nan), one)
    with pytest.raises(ValueError, match="'room' must be finite"):
        ShippingLimits(one, torch.full((1, 3), torch.inf), one, one)
    with pytest.raises(ValueError, match=r"scalar or \[4\]"):  # would broadcast to [4, 4]
        ShippingLimits(torch.ones(4), torch.ones(4, 3), torch.ones(4, 1), torch.ones(4))
    with pytest.raises(ValueError, match="shipments must be"):
        invert_shipments(limits, torch.ones(2, 3), one)
    with pytest.raises(ValueError, match="1 rows"):
        invert_shipments(limits, torch.ones(1, 3), one)
    with pytest.raises(ValueError, match="shares"):
        largest_remainder(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="totals"):
        largest_remainder(torch.ones(2), torch.tensor(1.5))
