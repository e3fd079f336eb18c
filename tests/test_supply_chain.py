"""The supply chain: against a plain loop over units written from its description, published figures, and bounds."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from benchmarks.supply_policies import behaviours, executed, foresight, goals, limits, predictive, run
from sim2real.bounds import default_params
from sim2real.params import Params
from sim2real.simulators.supply_chain import (
    STEPS,
    SupplyTask,
    demand_forecast,
    message_edges,
    stocks,
    store_room,
    supply_chain,
    supply_features,
    ten_stores,
    three_stores,
)
from sim2real.solvers.shipping_plan import PlanCosts, PlanStart, plan_shipments
from sim2real.solvers.shipping_program import invert_shipments, ship, shipping_goals


def theta_of(task: SupplyTask) -> Params:
    return default_params(supply_chain(task).box)


def by_hand(task: SupplyTask, states: Tensor, actions: Tensor, turns: Tensor) -> list[float]:
    """Rewards of one episode from its demands, requests and serving orders, unit costs written out."""
    n = task.stores
    stock, house, way, made, owed = [task.start] * n, 0.0, [0.0] * n, 0.0, [0.0] * n
    rewards = []
    for t in range(STEPS):
        demand = stocks(task, states[t]).demand.tolist()
        requests = [round(max(value, 0.0)) for value in actions[t].tolist()]
        house += made
        left, sent, income = house, [0.0] * n, 0.0
        for j in turns[t].tolist():
            sent[j] = min(float(requests[j]), left)
            left -= sent[j]
        cost = 6.0 * max(sum(requests[:n]) - house, 0.0) + 0.5 * sum(sent)
        house, made = left, min(float(requests[n]), task.production_cap)
        cost += 5.0 * made + task.warehouse_holding * house + 22.5 * max(house - task.warehouse_capacity, 0.0)
        for j in range(n):
            stock[j] += way[j]
            wanted = demand[j] + owed[j]
            sold = min(wanted, stock[j])
            stock[j], owed[j], income = stock[j] - sold, wanted - sold, income + 15.0 * sold
            cost += task.store_holding * stock[j] + task.backlog * owed[j]
            cost += 22.5 * max(stock[j] - task.store_capacity, 0.0)
        way = sent
        rewards.append(income - cost)
    return rewards


@pytest.mark.parametrize("task", [three_stores(), three_stores(backlog=1.0), ten_stores()], ids=["3", "3b", "10"])
def test_rewards_equal_a_plain_loop(task: SupplyTask) -> None:
    mdp, theta, n = supply_chain(task), theta_of(task), task.stores
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, STEPS + 1, 2 * n, generator=rng, dtype=torch.float64)
    state = mdp.initial_state(theta, noise[:, 0, :n])
    states, rewards = [state], []
    # requests beyond stock and production cap, negative ones and fractions included
    actions = 12 * torch.rand(4, STEPS, n + 1, generator=rng, dtype=torch.float64) - 2
    actions[..., -1] *= 4
    for t in range(STEPS):
        following = mdp.step(theta, state, actions[:, t], noise[:, t + 1])
        rewards.append(mdp.reward(theta, state, actions[:, t], noise[:, t + 1], following))
        assert not bool(mdp.terminal(theta, state).any())
        state = following
        states.append(state)
    assert bool(mdp.terminal(theta, state).all())
    turns = noise[:, 1:, n:].argsort(-1)
    for b in range(4):
        expected = by_hand(task, torch.stack(states, 1)[b], actions[b], turns[b])
        torch.testing.assert_close(torch.stack(rewards, 1)[b], torch.tensor(expected, dtype=torch.float64))


def test_demand_is_the_published_formula_with_a_cycle_of_31() -> None:
    task = three_stores()
    rate = demand_forecast(task, torch.zeros(1), STEPS)[0]
    for j, (peak, frequency, shift) in enumerate(zip((5, 15, 20), (2, 4, 6), (1, 3, 6), strict=True)):
        for t in range(1, STEPS + 1):
            exact = peak / 2 * (1 + math.cos(frequency * math.pi * (2 * shift + t) / 31))
            assert float(rate[j, t - 1]) == np.round(exact)
    assert not bool(demand_forecast(task, torch.tensor([30.0]), 10).any())


def test_demand_noise_is_uniform_on_four_whole_numbers() -> None:
    task = SupplyTask((40.0,), (0.0,), (0.0,), 10.0, 0.5, 15.0, 0.1, 50.0, 25.0)
    mdp = supply_chain(task)
    e0 = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = stocks(task, mdp.initial_state(theta_of(task), e0)).demand - 40.0
    counts = torch.stack([(noise == k).double().mean() for k in (-2.0, -1.0, 0.0, 1.0)])
    # 5 standard errors of a frequency of 1/4 in 40 000 draws: 0.011; false alarms below 1e-5
    torch.testing.assert_close(counts, torch.full((4,), 0.25, dtype=torch.float64), atol=0.011, rtol=0)


def test_features_name_every_column() -> None:
    task = three_stores()
    theta = theta_of(task) | {"capacity": torch.tensor([10.0, 11.0, 12.0, 50.0], dtype=torch.float64)}
    out = run(task, theta, behaviours(task, theta)["heur"], 2, seed=3)
    state = out.states[:, 7]
    now, x = stocks(task, state), supply_features(task, theta, state)
    assert x.shape == (2, 4, 18)
    assert bool((x[:, :3, 0] == now.demand + now.owed).all())
    assert x[0, :, 1].tolist() == [0.5, 0.5, 0.5, 0.1]
    assert x[0, :, 2].tolist() == [0.0, 0.0, 0.0, 5.0]
    assert bool((x[..., 3] == now.incoming).all() and (x[..., 4] == now.stock).all())
    assert bool((x[:, :3, 5:15] == demand_forecast(task, now.period, 10)).all())
    assert x[0, :, 15].tolist() == [15.0, 15.0, 15.0, 0.0]
    assert x[0, :, 16].tolist() == [10.0, 11.0, 12.0, 50.0]
    assert x[0, :, 17].tolist() == [0.0, 0.0, 0.0, 25.0]
    assert not bool(x[:, 3, [0, *range(5, 16)]].any())
    edges, lead = message_edges(task)
    assert edges.tolist() == [[3, 3, 3, 0, 1, 2], [0, 1, 2, 3, 3, 3]]
    assert lead.tolist() == [1.0] * 6


# paper, table 5: 81.7 and 15.3 percent, episodes spread by 1.8 and 3.0; the published script's levels gave 77.0 percent
# when measured independently; MPC 98.4 and 96.1. The paper does not say its normaliser, ours is foresight: 2 points
@pytest.mark.parametrize(
    ("task", "row", "percent", "episodes"),
    [
        (three_stores(backlog=1.0), "heur", 81.7, 30),
        (three_stores(backlog=1.0), "heur-script", 77.0, 30),
        (three_stores(backlog=1.0), "mpc", 98.4, 6),
        (ten_stores(), "heur", 15.3, 60),
    ],
    ids=["3-heur", "3-script", "3-mpc", "10-heur"],
)
def test_behaviour_policies_reach_the_published_figures(
    task: SupplyTask, row: str, percent: float, episodes: int
) -> None:
    theta = theta_of(task)
    out = run(task, theta, behaviours(task, theta)[row], episodes, seed=0)
    bound = foresight(task, theta, out)
    assert bool((out.total <= bound + 1e-6).all())
    assert abs(100 * float(out.total.mean() / bound.mean()) - percent) < 2.0


def test_plan_equals_an_integer_program_and_its_own_execution() -> None:
    """A noise-free task: the plan's profit is what the simulator pays for it, and no integer plan is better."""
    task, periods = three_stores(), 6
    theta = theta_of(task)
    state = supply_chain(task).initial_state(theta, torch.zeros(1, 3, dtype=torch.float64))
    now = stocks(task, state)
    demand = torch.cat([now.demand.unsqueeze(-1), demand_forecast(task, now.period, periods - 1)], -1)
    costs = PlanCosts(15.0, 5.0, 0.5, 1.5, 22.5, theta["holding"], theta["capacity"], 25.0)
    plan = plan_shipments(costs, PlanStart(now.available, now.stock[:, :3], now.owed), demand)
    torch.testing.assert_close(plan.shipments, plan.shipments.round(), atol=1e-7, rtol=0)
    stock, house, owed, made, way, profit = now.stock[0, :3], now.available[0], now.owed[0], 0.0, torch.zeros(3), 0.0
    for t in range(periods):
        house, stock = house + made, stock + way
        house = house - plan.shipments[0, t].sum()
        wanted = demand[0, :, t] + owed
        sold = torch.minimum(wanted, stock)
        stock, owed, way = stock - sold, wanted - sold, plan.shipments[0, t]
        made = float(plan.production[0, t])
        kept = torch.cat([stock, house.reshape(1)])
        profit += 15 * float(sold.sum()) - 5 * made - 0.5 * float(way.sum()) - float((theta["holding"] * kept).sum())
        profit -= 1.5 * float(owed.sum()) + 22.5 * float(torch.relu(kept - theta["capacity"]).sum())
    assert profit == pytest.approx(float(plan.profit), abs=1e-6)
    assert integer_profit(demand[0].numpy(), now.stock[0, :3].numpy()) == pytest.approx(profit, abs=1e-6)


def integer_profit(demand: np.ndarray, stock: np.ndarray) -> float:
    """The same plan by HiGHS's integer solver, in cumulative form: totals produced P_t, shipped F_jt, sold Z_jt."""
    n, periods = demand.shape
    size = periods * (1 + 2 * n) + periods * (n + 1)
    place = {
        (kind, j, t): i
        for i, (kind, j, t) in enumerate(
            [
                (k, j, t)
                for t in range(periods)
                for k, j in [
                    ("P", 0),
                    *(("F", j) for j in range(n)),
                    *(("Z", j) for j in range(n)),
                    *(("O", j) for j in range(n + 1)),
                ]
            ]
        )
    }
    cost, rows, low, high = np.zeros(size), [], [], []
    capacity, holding = [15.0] * n + [50.0], [0.5] * n + [0.1]
    constant = 0.0

    def bounded(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(size)
        for index, value in terms.items():
            row[index] += value
        rows.append(row)
        low.append(least)
        high.append(most)

    for t in range(periods):
        before = {k: ({place[k, j, t - 1]: -1.0 for j in range(n if k == "F" else 1)} if t else {}) for k in "PF"}
        bounded({place["P", 0, t]: 1.0} | before["P"], 0, 25)
        house = before_house = {**{place["F", j, t]: -1.0 for j in range(n)}}
        if t:
            house = {**before_house, place["P", 0, t - 1]: 1.0}
        bounded(house, 0, np.inf)
        bounded({**house, place["O", n, t]: -1.0}, -np.inf, capacity[n])
        for index, value in house.items():
            cost[index] += holding[n] * value
        for j in range(n):
            for kind in "FZ":
                if t:
                    bounded({place[kind, j, t]: 1.0, place[kind, j, t - 1]: -1.0}, 0, np.inf)
            total = demand[j, : t + 1].sum()
            bounded({place["Z", j, t]: 1.0}, 0, total)
            held = {place["Z", j, t]: -1.0} | ({place["F", j, t - 1]: 1.0} if t else {})
            bounded(held, -stock[j], np.inf)
            bounded({**held, place["O", j, t]: -1.0}, -np.inf, capacity[j] - stock[j])
            for index, value in held.items():
                cost[index] += holding[j] * value
            cost[place["Z", j, t]] -= 1.5
            constant += holding[j] * stock[j] + 1.5 * total
        for j in range(n + 1):
            cost[place["O", j, t]] += 22.5
    cost[place["P", 0, periods - 1]] += 5.0
    for j in range(n):
        cost[place["F", j, periods - 1]] += 0.5
        cost[place["Z", j, periods - 1]] -= 15.0
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(size),
        bounds=Bounds(0, np.inf),
    )
    assert found.success
    return -float(found.fun) - constant


def test_logs_of_states_alone_give_goals_that_repeat_them() -> None:
    """Order-up-to logs are optimal throughout; predictive ones overfill the warehouse in some steps, and these only."""
    task = three_stores(backlog=1.0)
    theta = theta_of(task)
    for row in ("heur", "mpc"):
        out = run(task, theta, behaviours(task, theta)[row], 8, seed=5)
        states, following = out.states[:, :-1].flatten(0, 1), out.states[:, 1:].flatten(0, 1)
        shipments, production = executed(task, following)
        held = limits(task, theta, states)
        found = invert_shipments(held, shipments, production)
        share = found.share.float().double()  # as stored in a data set
        again = ship(held, shipping_goals(share, held.available), found.production)
        same = (again.shipments == shipments).all(-1) & (again.production == production)
        assert bool((same == found.optimal).all())
        overfull = held.available - shipments.sum(-1) + production > held.warehouse_capacity
        assert bool((found.optimal == ~overfull).all())
        assert bool(found.optimal.all()) == (row == "heur")


def test_random_goals_never_break_a_constraint_and_with_a_margin_no_store_overflows() -> None:
    task = three_stores()
    theta = theta_of(task) | {"capacity": torch.tensor([10.0, 10.0, 10.0, 50.0], dtype=torch.float64)}
    rng = torch.Generator().manual_seed(0)

    def upper(state: Tensor) -> Tensor:
        drawn = torch.rand(len(state), 5, generator=rng, dtype=torch.float64)
        return torch.cat([drawn[:, :-1] ** 4, 25 * drawn[:, -1:]], -1)

    for margin in (0.0, 2.0):
        out = run(task, theta, goals(task, theta, upper, margin=margin), 50, seed=2)
        states = out.states[:, :-1].flatten(0, 1)
        shipments, production = executed(task, out.states[:, 1:].flatten(0, 1))
        held = limits(task, theta, states, margin=margin)
        assert bool((out.actions.flatten(0, 1)[:, :3] == shipments).all())
        assert bool((shipments <= torch.relu(held.room)).all() and (production <= 25).all())
        assert bool((held.available - shipments.sum(-1) + production <= 50).all())
        over = torch.relu(stocks(task, out.states[:, 2:]).stock - theta["capacity"])
        # the start of 10 units is within capacity; demand may miss its forecast by 2
        assert float(over.max()) <= 2.0 - margin
        assert (margin > 0) or bool(over.any())


def test_room_counts_pipeline_backlog_and_forecast() -> None:
    task = three_stores()
    theta = theta_of(task)
    state = supply_chain(task).initial_state(theta, torch.zeros(1, 3, dtype=torch.float64))
    now = stocks(task, state)
    expected = 15 - 10 + now.demand + demand_forecast(task, now.period, 1)[..., 0]
    assert bool((store_room(task, theta, state) == expected).all())
    assert bool((store_room(task, theta, state, margin=2.0) <= expected).all())


def test_predictive_plans_end_with_the_episode() -> None:
    task = three_stores()
    theta = theta_of(task)
    out = run(task, theta, predictive(task, theta), 2, seed=0)
    # what is produced in the last two periods cannot be sold any more
    assert not bool(out.actions[:, -2:, -1].any())
    assert not bool(out.actions[:, -1].any())


def test_a_small_study_learns_and_breaks_no_constraint() -> None:
    pytest.importorskip("torchrl")
    from benchmarks.study_supply import measured

    row = measured("1w3s", "heur", "bc", 0, quick=True)
    # 600 transitions and 300 updates: near the 81 percent of its data policy; equal shares reach 3 percent
    assert row["goals"]["percent"] > 60
    assert row["goals"]["violations"] == row["goals_small_capacity"]["violations"] == 0


def test_failures_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="one entry per store"):
        SupplyTask((5.0,), (1.0, 2.0), (1.0,), 10.0, 0.5, 15.0, 0.1, 50.0, 25.0)
    with pytest.raises(ValueError, match="15 entries"):
        stocks(three_stores(), torch.zeros(2, 7))
    costs = PlanCosts(15.0, 5.0, 0.5, 1.5, 22.5, torch.ones(4), torch.ones(4), 25.0)
    start = PlanStart(torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="stock and owed"):
        plan_shipments(costs, start, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="3 entries"):
        plan_shipments(costs, PlanStart(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2)), torch.zeros(1, 2, 4))
    for wrong in (torch.full((1, 3, 2), torch.nan), torch.full((1, 3, 2), torch.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            plan_shipments(costs, start, wrong)
    with pytest.raises(ValueError, match="not empty"):
        plan_shipments(costs, start, torch.zeros(1, 3, 0))
    theta, mdp = theta_of(three_stores()), supply_chain(three_stores())
    state = mdp.initial_state(theta, torch.zeros(1, 3).double())
    for entries in (3, 5):
        with pytest.raises(ValueError, match="3 shipments and the production"):
            mdp.step(theta, state, torch.zeros(1, entries).double(), torch.zeros(1, 6).double())
    with pytest.raises(RuntimeError, match="HiGHS"):
        plan_shipments(costs, start, torch.full((1, 3, 2), -100.0))
