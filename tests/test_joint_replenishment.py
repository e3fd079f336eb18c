"""Joint replenishment: one period by hand, terms of an order, the published item data, and the exact optimum."""

import math

import numpy as np
import pytest
import torch
from problems import shared, stack

from benchmarks.oracles.joint_replenishment import (
    joint_replenishment_optimum,
    negative_binomial_pmf,
    poisson_pmf,
)
from sim2real import Policy, deterministic_policy
from sim2real.bounds import default_params
from sim2real.simulators import OrderTerms, joint_replenishment
from sim2real.simulators.inventory_tasks import (
    InventoryTask,
    joint_replenishment_task,
    mean_cost,
    negative_binomial_task,
    task_noise,
)

STATE = stack([5.0, 2.0, 3.0, 4.0])
"""two items on hand, then what arrives next"""


def test_one_period_by_hand():
    mdp = joint_replenishment([1.0, 2.0], [9.0, 8.0], fixed=64.0, purchase=[0.5, 0.25])
    theta, demand, action = default_params(mdp.box), stack([1.0, 3.0]), stack([1.0, 6.0, 4.0])
    following = mdp.step(theta, STATE, action, demand)
    # on hand less demand plus what arrives next; then the order
    torch.testing.assert_close(following, stack([7.0, 3.0, 6.0, 4.0]))
    cost = 1.0 * 4 + 8.0 * 1 + 64 + 0.5 * 6 + 0.25 * 4
    torch.testing.assert_close(mdp.reward(theta, STATE, action, demand, following), stack(-cost))


def test_no_order_ignores_the_quantities_and_costs_nothing():
    mdp = joint_replenishment([1.0, 2.0], [9.0, 8.0])
    theta, demand, action = default_params(mdp.box), stack([1.0, 3.0]), stack([0.0, 6.0, 4.0])
    following = mdp.step(theta, STATE, action, demand)
    torch.testing.assert_close(following, stack([7.0, 3.0, 0.0, 0.0]))
    torch.testing.assert_close(mdp.reward(theta, STATE, action, demand, following), stack(-12.0))


def test_lead_time_zero_serves_the_demand_of_its_own_period():
    mdp = joint_replenishment([1.0], [9.0], fixed=5.0, lead_time=0)
    theta, state, action, demand = default_params(mdp.box), stack([1.0]), stack([1.0, 3.0]), stack([2.0])
    following = mdp.step(theta, state, action, demand)
    torch.testing.assert_close(following, stack([2.0]))
    torch.testing.assert_close(mdp.reward(theta, state, action, demand, following), stack(-7.0))


@pytest.mark.parametrize(
    ("action", "quantities", "price"),
    [
        ((1.0, 3.0, 1.0), (3.0, 1.0), 4.0),
        ((1.0, 9.0, 3.0), (7.5, 2.5), 10.0),
        ((2.0, 3.0, 1.0), (7.5, 2.5), 8.0),
        ((2.0, 30.0, 10.0), (30.0, 10.0), 32.0),
        ((2.0, 0.0, 0.0), (5.0, 5.0), 8.0),
    ],
    ids=["inside", "cut", "raised", "discounted", "nothing-asked"],
)
def test_bulk_discount_and_minimum_order(action, quantities, price):
    terms = (OrderTerms(0.0, 10.0), OrderTerms(10.0, math.inf, 0.8))
    mdp = joint_replenishment([0.0, 0.0], [0.0, 0.0], fixed=2.0, purchase=[1.0, 1.0], terms=terms, lead_time=2)
    theta, state, demand = default_params(mdp.box), torch.zeros(1, 4).double(), torch.zeros(1, 2).double()
    asked = stack(list(action))
    following = mdp.step(theta, state, asked, demand)
    torch.testing.assert_close(following[:, 2:], stack(list(quantities)))
    torch.testing.assert_close(mdp.reward(theta, state, asked, demand, following), stack(-2.0 - price))


def test_quantities_carry_a_derivative_and_the_choice_none():
    terms = (OrderTerms(0.0, 10.0), OrderTerms(10.0, math.inf, 0.8))
    mdp = joint_replenishment([1.0, 2.0], [9.0, 8.0], purchase=[1.0, 2.0], terms=terms)
    theta = default_params(mdp.box)

    def cost(quantity: torch.Tensor, choice: float) -> torch.Tensor:
        action = torch.cat([quantity.new_full((len(quantity), 1), choice), quantity], -1)
        demand = torch.ones(len(quantity), 2).double()
        after = mdp.step(theta, STATE, action, demand)
        later = mdp.step(theta, after, action, 2 * demand)
        first = mdp.reward(theta, STATE, action, demand, after)
        return first + mdp.reward(theta, after, action, 2 * demand, later) + later.square().sum(-1)

    for choice in (1.0, 2.0):
        for quantity in (stack([3.0, 1.0]), stack([9.0, 5.0])):
            torch.autograd.gradcheck(lambda q, d=choice: cost(q, d), quantity.requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"holding": [1.0], "underage": [1.0, 2.0]}, "one cost per item"),
        ({"holding": [], "underage": []}, "one cost per item"),
        ({"holding": [1.0], "underage": [1.0], "terms": (OrderTerms(3.0, 2.0),)}, "0 <= low < high"),
        ({"holding": [1.0], "underage": [1.0], "terms": ()}, "0 <= low < high"),
        ({"holding": [1.0], "underage": [1.0], "lead_time": -1}, "lead times"),
        ({"holding": [1.0], "underage": [-1.0]}, "underage"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        joint_replenishment(**arguments)


def test_item_data_are_the_published_draws():
    # three items of the reference optima, which were computed from the same legacy draws
    theta = joint_replenishment_task(3).theta
    torch.testing.assert_close(theta["holding"], stack(1.085614, 1.023173, 1.007139), rtol=0, atol=1e-6)
    torch.testing.assert_close(theta["underage"], stack(10.236674, 9.330694, 6.974822), rtol=0, atol=1e-6)
    assert joint_replenishment_task(3).mean.tolist() == [7.988, 9.6, 9.288]


@pytest.mark.parametrize(
    ("items", "fixed", "cost", "level"),
    [(1, 64.0, 34.901, [52]), (2, 64.0, 55.750, [43, 51]), (1, 320.0, 72.589, [86]), (2, 128.0, 74.049, [51, 61])],
)
def test_optimum_is_the_reference_figure(items, fixed, cost, level):
    optimum = optimum_of(joint_replenishment_task(items, fixed))
    assert optimum.cost == pytest.approx(cost, abs=6e-4)  # printed with three digits
    assert optimum.level.tolist() == level


def test_homogeneous_item_has_the_published_levels():
    optimum = joint_replenishment_optimum([poisson_pmf(10.0)], [1.0], [9.0], 64.0)
    assert optimum.cost == pytest.approx(37.064, abs=6e-4)
    assert (int(np.nonzero(optimum.order)[0].max()) + optimum.lowest, optimum.level.tolist()) == (26, [62])


@pytest.mark.slow
def test_three_items():
    assert optimum_of(joint_replenishment_task(3), tol=2e-4).cost == pytest.approx(71.664, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixed", "underage", "variation", "published"),
    [(50.0, 50.0, 0.5, 1.411), (20.0, 50.0, 0.5, 0.993), (100.0, 50.0, 0.5, 1.889), (50.0, 10.0, 0.5, 1.236)],
)
def test_negative_binomial_optimum_is_near_the_published_one(fixed, underage, variation, published):
    demands = [negative_binomial_pmf(mean / 52, math.sqrt(52) * variation) for mean in (40, 20)]
    costs = {"holding": [2 / 52] * 2, "underage": [underage / 52] * 2, "fixed": fixed, "purchase": [0.1, 0.4]}
    optimum = joint_replenishment_optimum(demands, **costs, lead_time=0, lowest=-60, highest=150)
    assert optimum.cost / 2 == pytest.approx(published, rel=0.009)  # published by simulation


def test_grid_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="`lowest`"):
        joint_replenishment_optimum([poisson_pmf(10.0)], [1.0], [9.0], 64.0, lowest=40)
    with pytest.raises(ValueError, match="`highest`"):
        joint_replenishment_optimum([poisson_pmf(10.0)], [1.0], [9.0], 64.0, highest=45)
    with pytest.raises(RuntimeError, match="value iteration"):
        joint_replenishment_optimum([poisson_pmf(10.0)], [1.0], [9.0], 64.0, max_sweeps=3)


@pytest.mark.parametrize("task", [joint_replenishment_task(1), joint_replenishment_task(2)], ids=["one", "two"])
def test_simulated_optimal_policy_costs_what_the_optimum_says(task):
    optimum = optimum_of(task)
    noise = task_noise(task, 200, 400, seed=task.test_seed)
    cost = mean_cost(task, optimal_policy(optimum), {}, noise, ignore=50) * len(task.mean)
    # four standard errors over 200 independent paths: false alarms in 6 of 100 000 draws
    assert abs(float(cost.mean()) - optimum.cost) < 4 * float(cost.std()) / math.sqrt(200)


@pytest.mark.slow
def test_simulated_negative_binomial_policy():
    task = negative_binomial_task()
    demands = [negative_binomial_pmf(mean / 52, math.sqrt(52) * 0.5) for mean in (40, 20)]
    theta = {key: value.tolist() for key, value in task.theta.items()}
    optimum = joint_replenishment_optimum(demands, **theta, lead_time=0, lowest=-60, highest=150)
    cost = mean_cost(task, optimal_policy(optimum), {}, task_noise(task, 1000, 1000, seed=65), ignore=200)
    # as above; starts empty, so the warm-up is long
    assert abs(2 * float(cost.mean()) - optimum.cost) < 8 * float(cost.std()) / math.sqrt(1000)


def optimum_of(task: InventoryTask, tol: float = 1e-5):
    theta = {key: value.tolist() for key, value in task.theta.items()}
    return joint_replenishment_optimum([poisson_pmf(m) for m in task.mean.tolist()], **theta, tol=tol)


def optimal_policy(optimum) -> Policy:
    """Order all up to the levels where the table says so."""
    order, level = torch.from_numpy(optimum.order), torch.from_numpy(optimum.level)

    def act(nu, state):
        position = state.unflatten(-1, (-1, len(level))).sum(-2)
        index = (position.long() - optimum.lowest).clamp(0, order.shape[0] - 1)
        choice = order[index.unbind(-1)].to(state)
        return torch.cat([choice.unsqueeze(-1), torch.relu(level - position)], -1)

    return deterministic_policy(act)


def test_reference_file_agrees():
    import json

    stored = json.loads(shared("reference/hpo/jrp_optima.json").read_text())["results"]
    task = joint_replenishment_task(2)
    assert stored[1]["means"] == task.mean.tolist()


def test_negative_binomial_demand_has_its_moments():
    task = negative_binomial_task()
    demand = task_noise(task, 100, 500, seed=1).process.reshape(-1, 2)
    # 5e4 draws of variance m (1 + 13 m), skewed: standard errors 1 % of the mean, 3 % of the deviation; four of each
    torch.testing.assert_close(demand.mean(0), task.mean, rtol=0.05, atol=0)
    torch.testing.assert_close(demand.std(0), task.std, rtol=0.12, atol=0)
    torch.testing.assert_close(task.std.square(), task.mean * (1 + 13 * task.mean))
