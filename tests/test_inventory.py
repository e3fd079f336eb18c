"""One store and the serial line: periods by hand, exact optima against the reference, optimal policies simulated."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from problems import shared, stack

from benchmarks.bars import MissingError
from benchmarks.oracles.base_stock import (
    clipped_normal,
    newsvendor,
    optimal_base_stock,
    sum_of,
    transshipment_bound,
    unclipped_cost,
)
from benchmarks.oracles.clark_scarf import clark_scarf
from benchmarks.oracles.lost_sales import lost_sales_optimum
from sim2real import Params, Policy, deterministic_policy, expected_return, rollout
from sim2real.bounds import default_params
from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import (
    base_stock_policy,
    capped_base_stock_policy,
    echelon_stock_policy,
    network,
    network_weights,
    plain_order_policy,
)
from sim2real.simulators import one_store, serial_line
from sim2real.simulators.inventory_tasks import (
    demand_moments,
    mean_cost,
    normal_demand,
    one_store_task,
    serial_task,
    task_noise,
)

LINE = (4, 3, 4, 2)
HOLDING = (1.0, 0.5, 0.2, 0.1)


@pytest.mark.parametrize(
    ("lost", "demand", "following", "cost"),
    [(False, 3.0, [4.0, 1.0, 6.0], 2.0), (False, 7.0, [0.0, 1.0, 6.0], 18.0), (True, 7.0, [2.0, 1.0, 6.0], 18.0)],
    ids=["sold", "backlogged", "lost"],
)
def test_one_period_by_hand(lost, demand, following, cost):
    mdp = one_store(3, lost=lost)
    theta, state = default_params(mdp.box), stack([5.0, 2.0, 1.0])
    after = mdp.step(theta, state, stack([6.0]), stack([demand]))
    torch.testing.assert_close(after, stack(following))
    reward = mdp.reward(theta, state, stack([6.0]), stack([demand]), after)
    torch.testing.assert_close(reward, stack(-cost))


def test_negative_order_is_no_order():
    mdp = one_store(2)
    theta, state, demand = default_params(mdp.box), stack([5.0, 2.0]), stack([1.0])
    nothing = mdp.step(theta, state, stack([0.0]), demand)
    torch.testing.assert_close(mdp.step(theta, state, stack([-3.0]), demand), nothing)


@pytest.mark.parametrize("lead_time", [1, 2, 4])
def test_an_order_is_usable_lead_time_periods_later(lead_time):
    mdp = one_store(lead_time)
    theta, demand = default_params(mdp.box), stack([0.0])
    state = mdp.step(theta, torch.zeros(1, lead_time).double(), stack([8.0]), demand)
    for _ in range(lead_time - 1):
        assert float(state[0, 0]) == 0.0
        state = mdp.step(theta, state, stack([0.0]), demand)
    assert float(state[0, 0]) == 8.0


def test_serial_line_by_hand():
    mdp = serial_line((1, 2), holding=(1.0, 0.5), underage=9.0)
    theta = default_params(mdp.box)
    # store: 3 on hand; stock above: 4 on hand, 2 arriving. The store asks for more than there is
    state, action, demand = stack([3.0, 4.0, 2.0]), stack([6.0, 5.0]), stack([1.0])
    after = mdp.step(theta, state, action, demand)
    torch.testing.assert_close(after, stack([6.0, 2.0, 5.0]))
    torch.testing.assert_close(mdp.reward(theta, state, action, demand, after), stack(-2.0))
    # it asks for less: what remains above is paid for
    action = stack([1.0, 5.0])
    after = mdp.step(theta, state, action, stack([4.0]))
    torch.testing.assert_close(after, stack([0.0, 5.0, 5.0]))
    torch.testing.assert_close(mdp.reward(theta, state, action, stack([4.0]), after), stack(-9.0 - 0.5 * 3))


def test_pathwise_gradient_is_that_of_the_batch():
    task = serial_task(1, 9.0)
    noise = task_noise(task, 6, 12, seed=57)
    policy = plain_order_policy(5.0)
    nu = network_weights({"order": (10, 8, 4), "direct": (10, 4)}, torch.Generator().manual_seed(0))
    grad = pathwise_gradient(task.mdp, policy, task.theta, nu, noise).grad
    for key in nu:
        tangent = torch.randn(nu[key].shape, generator=torch.Generator().manual_seed(1)).double()
        values = [
            float(expected_return(task.mdp, policy, task.theta, nu | {key: nu[key] + sign * 1e-6 * tangent}, noise))
            for sign in (1, -1)
        ]
        # central difference of a piecewise smooth function of 72 periods: 1e-6 of the gradient, no kink nearby
        assert float((grad[key] * tangent).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("make", [partial(one_store, 0), partial(serial_line, ()), partial(serial_line, (1, 2))])
def test_wrong_lead_times_are_refused(make):
    with pytest.raises(ValueError, match="lead time"):
        make()


def test_negative_costs_are_refused():
    with pytest.raises(ValueError, match="'underage' must be >= 0"):
        one_store(1, underage=-1.0)


def test_draws_are_those_of_the_legacy_generator():
    task = one_store_task(4, 9.0)
    noise = task_noise(task, 3, 5, seed=task.train_seed)
    generator = np.random.RandomState(57 + 94)
    expected = np.clip(generator.normal(5.0, 1.6, size=(3, 1, 5)), 0, None)[:, 0]
    np.testing.assert_array_equal(noise.process[..., 0].numpy(), expected)
    uniform = np.random.RandomState(4839).uniform(size=(3, 1, 4))[:, 0]
    # to a normal number and back
    np.testing.assert_allclose(task.mdp.initial_state({}, noise.initial).numpy(), 5 * uniform, rtol=1e-12)


def test_correlated_demand_has_its_moments():
    mean, std = demand_moments(3)
    demand = normal_demand(mean, std, 0.5, clip=False)(np.random.RandomState(1), 200, 500)
    flat = demand.transpose(0, 2, 1).reshape(-1, 3)
    # 1e5 draws: standard errors of a mean 0.007, of a correlation 0.0024; four of each
    np.testing.assert_allclose(flat.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(flat.T)[np.triu_indices(3, 1)], 0.5, atol=0.01)


@pytest.mark.parametrize(("paths", "periods"), [(0, 5), (5, 0)])
def test_empty_draws_are_refused(paths, periods):
    with pytest.raises(ValueError, match="at least 1"):
        task_noise(one_store_task(1, 4.0), paths, periods, seed=0)


def test_metric_counts_the_periods_after_the_warm_up():
    task = one_store_task(2, 4.0)
    noise, policy = task_noise(task, 4, 9, seed=57), base_stock_policy()
    nu = {"level": stack(20.0)}
    total = mean_cost(task, policy, nu, noise, ignore=0) * 9
    assert float(total.mean()) == pytest.approx(-float(expected_return(task.mdp, policy, task.theta, nu, noise)))
    head = mean_cost(task, policy, nu, type(noise)(noise.initial, noise.process[:, :5], noise.policy[:, :5]), ignore=0)
    torch.testing.assert_close(mean_cost(task, policy, nu, noise, ignore=5) * 4, total - head * 5)
    with pytest.raises(ValueError, match="ignore must lie in"):
        mean_cost(task, policy, nu, noise, ignore=9)


def test_one_store_backlogged_reference():
    rows = json.loads(shared("reference/hpo/hdpo_optima.json").read_text())["one_store_backlogged"]
    assert len(rows) == 24
    for row in rows:
        level, cost = optimal_base_stock(row["lead_time"], row["underage"])
        assert level == pytest.approx(row["base_stock"], abs=0.011)  # grid of 0.02
        assert cost == pytest.approx(row["optimal_cost"], abs=1.1e-5)  # five digits
        assert unclipped_cost(row["lead_time"], row["underage"]) == pytest.approx(row["unclipped_formula"], abs=1.1e-5)


@pytest.mark.parametrize(("underage", "cost", "level"), [(4, 5.0062, 28.02), (9, 6.2769, 29.58), (39, 8.3621, 32.02)])
def test_one_store_backlogged(underage, cost, level):
    assert optimal_base_stock(4, underage) == (pytest.approx(level, abs=0.011), pytest.approx(cost, abs=6e-5))


def test_newsvendor_of_a_coin():
    assert newsvendor(np.array([0.5, 0.5]), 1.0, 3.0) == (1.0, 0.5)
    assert newsvendor(sum_of(np.array([0.5, 0.5]), 2), 1.0, 0.2) == (0.0, pytest.approx(0.2))
    assert clipped_normal(5.0, 1.6, 0.02).sum() == pytest.approx(1.0)


LOST = {
    1: (4.0407, 5.4382, 6.6757, 7.8359),
    2: (4.3953, 6.0936, 7.6644, 9.1064),
    3: (4.5987, 6.5314, 8.3625, 10.0385),
    4: (4.7285, 6.8359, 8.8872, 10.7944),
}


@pytest.mark.parametrize("lead_time", LOST)
def test_one_store_lost(lead_time):
    for underage, cost in zip((4, 9, 19, 39), LOST[lead_time], strict=True):
        optimum = lost_sales_optimum(lead_time, underage)
        assert optimum.high - optimum.low < 1e-5
        assert optimum.cost == pytest.approx(cost, abs=1e-4)  # four digits, bounds 1e-5 apart
        assert optimum.orders.max() < optimum.orders.shape[-1] - 1 or lead_time == 1


def test_lost_sales_bounds_that_stay_apart_are_an_error():
    with pytest.raises(RuntimeError, match="after 3 sweeps"):
        lost_sales_optimum(2, 9.0, max_sweeps=3)


def test_serial_reference():
    rows = json.loads(shared("reference/hpo/hdpo_optima.json").read_text())["serial"]
    assert len(rows) == 16
    for row in rows:
        levels, cost = clark_scarf((row["store_lead"], 3, 4, 2), HOLDING, row["underage"])
        assert levels == pytest.approx(row["echelon_base_stock_store_to_top"], abs=0.011)
        assert cost == pytest.approx(row["minus_in_transit"], abs=1.1e-5)


@pytest.mark.parametrize(("underage", "cost"), [(4, 8.7525), (9, 10.7339), (19, 12.4201), (39, 13.9100)])
def test_serial(underage, cost):
    assert clark_scarf(LINE, HOLDING, underage)[1] == pytest.approx(cost, abs=6e-5)


def test_serial_line_of_one_stock_is_one_store():
    levels, cost = clark_scarf((4,), (1.0,), 9.0, std=1.6)
    assert (levels[0], cost) == (pytest.approx(29.58, abs=0.021), pytest.approx(6.2769, abs=1e-4))


def test_transshipment_bound_reference():
    stored = json.loads(shared("reference/hpo/hdpo_optima.json").read_text())
    for row in stored["transshipment"]:
        mean, std = demand_moments(row["n_stores"])
        published = stored[f"transshipment_demand_params_{row['n_stores']}"]
        assert (mean.tolist(), std.tolist()) == (published["mean"], published["std"])
        bound = transshipment_bound(std, row["corr"], row["store_lead"], row["underage"])
        assert bound == pytest.approx(row["lower_bound_total"], abs=1.1e-4)


def close(cost: torch.Tensor, optimum: float) -> bool:
    """Within four standard errors over independent paths: a false alarm in 16 000 tests."""
    return abs(float(cost.mean()) - optimum) < 4 * float(cost.std()) / math.sqrt(len(cost))


@pytest.mark.parametrize(("lead_time", "underage"), [(1, 4.0), (4, 9.0)])
def test_base_stock_costs_what_the_optimum_says(lead_time, underage):
    task = one_store_task(lead_time, underage)
    level, optimum = optimal_base_stock(lead_time, underage)
    cost = mean_cost(task, base_stock_policy(), {"level": stack(level)}, task_noise(task, 500, 400, seed=65), ignore=50)
    assert close(cost, optimum)


def table_policy(orders: np.ndarray) -> Policy:
    table = torch.from_numpy(orders.astype(np.int64))
    limits = torch.tensor(table.shape) - 1

    def order(nu: Params, state: torch.Tensor) -> torch.Tensor:
        return table[torch.minimum(state.long(), limits).unbind(-1)].to(state).unsqueeze(-1)

    return deterministic_policy(order)


@pytest.mark.parametrize(("lead_time", "underage"), [(1, 4.0), (3, 19.0)])
def test_lost_sales_table_costs_what_the_optimum_says(lead_time, underage):
    task, optimum = one_store_task(lead_time, underage, lost=True), lost_sales_optimum(lead_time, underage)
    noise = task_noise(task, 500, 400, seed=65)
    empty = type(noise)(torch.full_like(noise.initial, -30.0), noise.process, noise.policy)  # integer pipelines
    assert close(mean_cost(task, table_policy(optimum.orders), {}, empty, ignore=50), optimum.cost)


def test_a_capped_base_stock_policy_is_near_the_optimum_of_lost_sales():
    # Xin, Understanding the performance of capped base-stock policies in lost-sales inventory models, 2021
    task, optimum = one_store_task(3, 9.0, lost=True), lost_sales_optimum(3, 9.0).cost
    noise = task_noise(task, 400, 400, seed=65)
    costs = {
        (level, cap): float(
            mean_cost(
                task, capped_base_stock_policy(), {"level": stack(level), "cap": stack(cap)}, noise, ignore=50
            ).mean()
        )
        for level in (23.0, 24.0)
        for cap in (6.0, 30.0)
    }
    assert optimum < min(costs.values()) < 1.02 * optimum
    assert min(costs, key=costs.__getitem__)[1] == 6.0


def test_echelon_levels_cost_what_the_optimum_says():
    task = serial_task(4, 9.0)
    levels, optimum = clark_scarf(LINE, HOLDING, 9.0)
    cost = mean_cost(
        task, echelon_stock_policy(LINE), {"level": stack(*levels)}, task_noise(task, 300, 600, seed=65), ignore=100
    )
    assert close(cost, optimum)


def test_hindsight_gradients_find_the_base_stock_level():
    task, policy = one_store_task(4, 9.0), base_stock_policy()
    noise = task_noise(task, 200, 60, seed=task.train_seed)
    nu = {"level": stack(20.0).requires_grad_()}
    optimizer = torch.optim.Adam(nu.values(), lr=0.5, maximize=True)
    for k in range(120):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.97**k
        nu["level"].grad = pathwise_gradient(task.mdp, policy, task.theta, nu, noise).grad["level"]
        optimizer.step()
    # the minimum of 12 000 newsvendor samples, correlated over 5 periods: standard error of the quantile 0.13
    assert float(nu["level"].detach()) == pytest.approx(29.58, abs=0.5)


def test_a_network_learns_one_store():
    task, policy = one_store_task(1, 4.0), plain_order_policy(5.0)
    noise = task_noise(task, 256, 20, seed=task.train_seed)
    nu = network_weights({"order": (1, 16, 1), "direct": (1, 1)}, torch.Generator().manual_seed(0))
    nu = {key: value.requires_grad_() for key, value in nu.items()}
    optimizer = torch.optim.Adam(nu.values(), lr=0.02, maximize=True)
    for _ in range(150):
        for key, grad in pathwise_gradient(task.mdp, policy, task.theta, nu, noise).grad.items():
            nu[key].grad = grad
        optimizer.step()
    test = task_noise(task, 300, 200, seed=task.test_seed)
    level, optimum = optimal_base_stock(1, 4.0)
    best = mean_cost(task, base_stock_policy(), {"level": stack(level)}, test, ignore=20)
    gap = (mean_cost(task, policy, nu, test, ignore=20) - best) / optimum
    assert -0.01 < float(gap.mean()) < 0.03


def test_a_line_starts_from_the_base_stock_rule_of_every_stock():
    from benchmarks.inventory_training import serial

    trial = serial(2, 4.0)
    direct = {
        key: torch.zeros_like(value) if key.startswith("order") else value for key, value in trial.weights.items()
    }
    # positions 4 below the mean demand of L + 1 periods (3, 4, 5, 3 of 5 units), then 4 above it
    below = stack(*[3.0, 8.0], *[6.0, 5.0, 5.0], *[7.0, 4.0, 5.0, 5.0], *[1.0, 10.0])
    above = below + 8 * torch.cat([torch.eye(width, dtype=torch.float64)[0] for width in (2, 3, 4, 2)])
    orders = trial.policy.act(direct, torch.stack([below, above]), torch.zeros(2, 4))
    # softplus_4 lies log(1 + exp(-4 * 0.8)) / 4 = 0.01 mean demands above its two lines there
    torch.testing.assert_close(orders, stack(4.0, 0.0).unsqueeze(-1).expand(2, 4), atol=0.06, rtol=0.0)


@pytest.mark.slow
def test_no_stock_of_a_line_is_always_asked_for_more_than_it_has():
    from benchmarks.inventory_training import Recipe, held_out, serial, trained

    trial = serial(1, 4.0, Recipe(100, batch=64, paths=1024, periods=60))
    nu, _seconds = trained(trial)
    noise = held_out(trial, 50, 120)
    theta = {key: value.float() for key, value in trial.task.theta.items()}
    path = rollout(trial.task.mdp, trial.policy, theta, nu, noise)
    on_hand = path.states[:, 40:-1, [1, 4, 8]]
    # a stock whose whole request is cut in every period gets no derivative; the optimal rule's share is 0.5 at most
    share = (path.actions[:, 40:, :3] > on_hand).double().mean((0, 1))
    assert float(share.max()) < 0.9


def test_a_network_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no network 'order'"):
        network({"all.0.weight": stack(1.0)}, "order", stack(1.0))


def test_study_resumes_where_it_stopped(tmp_path, capsys):
    from benchmarks.study_hdpo import run

    for _ in range(2):
        run(tmp_path / "rows.json", ["L1-p4"], steps=2, seed=0, quick=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["instance"] for row in rows] == ["backlogged/L1-p4", "lost/L1-p4"]
    assert {"gap", "cost", "cpu_seconds", "command", "machine", "versions"} <= rows[0].keys()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_bars_of_the_study_are_the_worst_rows_with_their_commands(monkeypatch):
    from benchmarks import inventory as bars

    def row(instance: str, **figures: object) -> dict[str, object]:
        return {"instance": instance, "seed": 0, "command": f"train {instance}", "test": {"paths": 5}} | figures

    rows = [
        row(f"{kind}/L4-p9", gap=0.001, gap_stderr=0.1, cpu_seconds=30.0) for kind in ("backlogged", "lost", "serial")
    ]
    rows += [row("backlogged/L1-p4", gap=0.002, gap_stderr=0.1), row("transshipment/n3", gap=0.01, gap_stderr=0.1)]
    rows += [row(f"warehouse/n{n}-16-plain", cost=8.0) for n in (10, 50)]
    rows += [row("warehouse/n10-16-symmetric", cost=6.0, moved={"50": 6.3})]
    rows += [row("warehouse/n50-16-symmetric", cost=7.0, moved={"10": 6.06})]
    monkeypatch.setattr(bars, "stored", lambda: rows)
    gaps = {figure.metric: figure for figure in bars.m_hdpo(quick=False)}
    assert (gaps["backlogged"].value, gaps["backlogged"].n) == (0.002, 2)
    assert gaps["backlogged"].command == "train backlogged/L1-p4"
    assert gaps["minutes"].value == 0.5
    saved = {figure.metric: figure.value for figure in bars.m_symmetry(quick=False)}
    assert saved["gain"] == saved["gain-50"] == pytest.approx(0.125)
    assert saved["transfer-10-50"] == pytest.approx(-0.1)
    assert saved["transfer"] == saved["transfer-50-10"] == pytest.approx(0.01)
    monkeypatch.setattr(bars, "stored", list)
    with pytest.raises(MissingError, match="no rows"):
        next(bars.m_hdpo(quick=False))
