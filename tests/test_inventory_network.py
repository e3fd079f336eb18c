"""Networks: periods by hand, a per-node twin, symmetries of the policies, the bound of transshipment."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from problems import stack

from benchmarks.oracles.base_stock import transshipment_bound
from sim2real import Params, deterministic_policy, rollout
from sim2real.bounds import default_params
from sim2real.estimators import pathwise_gradient
from sim2real.inventory_policies import (
    StoreTraits,
    network_weights,
    plain_network_policy,
    symmetry_aware_policy,
    symmetry_aware_weights,
)
from sim2real.simulators import Routes, inventory_network
from sim2real.simulators.inventory_tasks import (
    InventoryTask,
    joint_replenishment_task,
    many_warehouses_task,
    mean_cost,
    one_store_task,
    one_warehouse_task,
    serial_task,
    store_traits,
    task_noise,
    transshipment_task,
)

TASKS = {
    "one-warehouse": one_warehouse_task(4),
    "many-warehouses": many_warehouses_task(),
    "transshipment": transshipment_task(3, 0.5, 2, 4.0),
}


def small(**options):
    """Two stores with lead times 1 and 2, one warehouse with lead time 2."""
    data = {"start": [1.0, 1.0], "holding": [1.0, 2.0], "underage": [9.0, 8.0], "warehouse_holding": [0.5]}
    return inventory_network(Routes(((1, 2),), (2,)), **data | options)


def test_one_period_by_hand():
    mdp = small(purchase=[0.25])
    theta = default_params(mdp.box)
    # stores: on hand (3, 4), then (0, 2) arriving; warehouse: 5 on hand, 1 arriving
    state, demand = stack([3.0, 4.0, 0.0, 2.0, 5.0, 1.0]), stack([1.0, 6.0])
    action = stack([2.0, 1.0, 7.0])
    after = mdp.step(theta, state, action, demand)
    # store 0 receives at once for the next period, store 1 a period later; lost demand leaves store 1 at 0 + 2
    torch.testing.assert_close(after, stack([4.0, 2.0, 0.0, 1.0, 3.0, 7.0]))
    cost = 1.0 * 2 + 8.0 * 2 + 0.5 * 2 + 0.25 * 7
    torch.testing.assert_close(mdp.reward(theta, state, action, demand, after), stack(-cost))


def test_requests_beyond_the_stock_are_rationed_in_proportion():
    mdp = small(lost=False)
    theta, state, demand = default_params(mdp.box), stack([0.0, 0.0, 0.0, 0.0, 5.0, 1.0]), stack([1.0, 6.0])
    after = mdp.step(theta, state, stack([6.0, 4.0, 0.0]), demand)
    torch.testing.assert_close(after, stack([2.0, -6.0, 0.0, 2.0, 1.0, 0.0]))


@pytest.mark.parametrize(("asked", "sent"), [((1.0, 3.0), (1.25, 3.75)), ((0.0, 0.0), (2.5, 2.5))])
def test_a_hub_ships_all_it_has(asked, sent):
    mdp = small(lost=False, hub=True)
    theta, state, demand = default_params(mdp.box), stack([0.0, 0.0, 0.0, 0.0, 5.0, 1.0]), stack([0.0, 0.0])
    after = mdp.step(theta, state, stack([*asked, 0.0]), demand)
    torch.testing.assert_close(after, stack([sent[0], 0.0, 0.0, sent[1], 1.0, 0.0]))


@pytest.mark.parametrize("name", TASKS)
def test_a_twin_that_walks_from_node_to_node_agrees(name):
    task = TASKS[name]
    noise = task_noise(task, 3, 15, seed=57)
    policy, nu = random_policy(task)
    run = rollout(task.mdp, policy, task.theta, nu, noise)
    for path in range(3):
        state = run.states[path, 0].tolist()
        rewards = twin(task, state, run.actions[path].tolist(), noise.process[path].tolist(), hub=name[0] == "t")
        np.testing.assert_allclose(run.rewards[path].detach().numpy(), rewards, rtol=1e-12)


def twin(task: InventoryTask, state: list[float], actions, demands, *, hub: bool) -> list[float]:
    """Rewards of one path; deliveries sit in a calendar, nothing is shifted."""
    routes, theta, lost = task.routes, {key: value.tolist() for key, value in task.theta.items()}, not hub
    houses, n = len(routes.lead_times), len(routes.lead_times[0])
    width = max(max(row) for row in routes.lead_times)
    stock, due = defaultdict(float), defaultdict(float)
    for i in range(n):
        for k in range(width):
            due[k, "store", i] += state[k * n + i]
    rewards = []
    for t, (action, demand) in enumerate(zip(actions, demands, strict=True)):
        cost = 0.0
        for node in [("store", i) for i in range(n)] + [("house", w) for w in range(houses)]:
            stock[node] += due[t, *node]
        for w in range(houses):
            asked = {i: action[w * n + i] for i in range(n) if routes.lead_times[w][i]}
            have, total = stock["house", w], sum(asked.values())
            for i, amount in asked.items():
                sent = amount * have / total if hub or total > have else amount
                stock["house", w] -= sent
                due[t + routes.lead_times[w][i], "store", i] += sent
            order = action[houses * n + w]
            cost += theta["warehouse_holding"][w] * stock["house", w] + theta["purchase"][w] * order
            due[t + routes.supplier_lead_times[w], "house", w] += order
        for i in range(n):
            left = stock["store", i] - demand[i]
            cost += theta["holding"][i] * max(left, 0.0) + theta["underage"][i] * max(-left, 0.0)
            stock["store", i] = max(left, 0.0) if lost else left
        rewards.append(-cost)
    return rewards


def random_policy(task: InventoryTask):
    traits = store_traits(task)
    nu = symmetry_aware_weights(traits, generator=torch.Generator().manual_seed(0))
    return symmetry_aware_policy(traits), nu


@pytest.mark.parametrize("name", TASKS)
def test_goods_are_conserved(name):
    task = TASKS[name]
    noise = task_noise(task, 5, 30, seed=57)
    run = rollout(task.mdp, *random_policy(task)[:1], task.theta, random_policy(task)[1], noise)
    orders = run.actions[..., -len(task.routes.lead_times) :].sum(-1)
    gained = run.states[:, 1:].sum(-1) - run.states[:, :-1].sum(-1)
    n = len(task.mean)
    sold = noise.process.sum(-1)
    if name != "transshipment":
        sold = torch.minimum(noise.process, run.states[:, :-1, :n]).sum(-1)
    torch.testing.assert_close(gained, orders - sold)


def test_stores_may_be_renamed():
    """The symmetry-aware network treats stores alike: permuted stores get permuted requests."""
    traits = store_traits(TASKS["one-warehouse"])
    policy, nu = random_policy(TASKS["one-warehouse"])
    order = torch.tensor([2, 0, 3, 1])
    renamed = symmetry_aware_policy(
        StoreTraits(traits.mean[order], traits.features[order], traits.store_width, 1, traits.warehouse_width)
    )
    state = torch.rand(5, 15, generator=torch.Generator().manual_seed(1)).double() * 9
    stores = state[:, :12].unflatten(-1, (3, 4))[..., order].flatten(-2)
    action = policy.act(nu, state, state)
    moved = renamed.act(nu, torch.cat([stores, state[:, 12:]], -1), state)
    torch.testing.assert_close(moved, torch.cat([action[:, order], action[:, 4:]], -1))


def test_the_same_weights_run_with_any_number_of_stores():
    nu = random_policy(one_warehouse_task(4))[1]
    for stores in (3, 7):
        task = one_warehouse_task(stores)
        policy = symmetry_aware_policy(store_traits(task))
        cost = mean_cost(task, policy, nu, task_noise(task, 4, 10, seed=65), ignore=2)
        assert torch.isfinite(cost).all()


@pytest.mark.parametrize("hub", [False, True])
def test_plain_network_never_ships_more_than_there_is(hub):
    traits = store_traits(TASKS["transshipment"])
    policy = plain_network_policy(traits, hub=hub)
    nu = network_weights({"all": (9, 16, 4)}, torch.Generator().manual_seed(0))
    state = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)).double() * 9
    action = policy.act(nu, state, state)
    sent, there = action[:, :3].sum(-1), state[:, 6]
    assert bool((sent < there).all()) != hub
    torch.testing.assert_close(sent, there) if hub else None
    assert bool((action >= 0).all())


def test_transshipment_costs_at_least_its_bound():
    task = TASKS["transshipment"]
    bound = transshipment_bound(task.std.numpy(), 0.5, 2, 4.0) / 3
    cost = mean_cost(task, fair_shares(task), {}, task_noise(task, 300, 400, seed=65), ignore=100)
    # four standard errors below the bound, and the myopic rule is known to come close to it
    assert bound - 4 * float(cost.std()) / math.sqrt(300) < float(cost.mean()) < 1.03 * bound


def test_the_relaxed_problem_costs_the_bound_and_no_more_than_a_policy():
    from benchmarks.inventory_training import relaxed_cost

    task = TASKS["transshipment"]
    noise = task_noise(task, 300, 400, seed=65)
    relaxed = relaxed_cost(task, 0.5, noise, 100)
    bound = transshipment_bound(task.std.numpy(), 0.5, 2, 4.0) / 3
    # fixed seed, false alarms 6e-5: four standard errors
    assert float(relaxed.mean()) == pytest.approx(bound, abs=4 * float(relaxed.std()) / math.sqrt(300))
    excess = mean_cost(task, fair_shares(task), {}, noise, ignore=100) - relaxed
    # only stores that would have to send stock back tell the two apart, so it spreads far less than the cost
    assert 0 <= float(excess.mean()) < 0.03 * bound
    assert float(excess.std()) < 0.2 * float(relaxed.std())
    with pytest.raises(ValueError, match="5 ignored periods"):
        relaxed_cost(task, 0.5, noise, 4)
    with pytest.raises(ValueError, match="no routes"):
        relaxed_cost(one_store_task(1, 4.0), 0.5, noise, 100)


def fair_shares(task: InventoryTask, fractile: float = 0.8):
    """Order up to the level of the relaxed problem; give each store the same number of deviations."""
    from scipy.stats import norm

    n, std, hub, lead = len(task.mean), task.std, 3, task.routes.lead_times[0][0]
    correlation = 0.5 * (1 + torch.eye(n).double())
    total = float(std @ correlation @ std)
    spread = math.sqrt(hub * total + (lead + 1) * float(std.sum()) ** 2)
    level = float(task.mean.sum()) * (hub + lead + 1) + float(norm.ppf(fractile)) * spread

    def act(nu: Params, state: torch.Tensor) -> torch.Tensor:
        position = state[:, : n * lead].unflatten(-1, (lead, n)).sum(-2)
        there = state[:, n * lead : n * lead + 1]
        safety = position + 0.0 - (lead + 1) * task.mean
        common = (safety.sum(-1, keepdim=True) + there) / std.sum()
        order = torch.relu(level - state.sum(-1, keepdim=True))
        return torch.cat([torch.relu(common * std - safety), order], -1)

    return deterministic_policy(act)


def test_training_lowers_the_cost_of_a_network():
    task = one_warehouse_task(3)
    policy, nu = random_policy(task)
    noise = task_noise(task, 64, 20, seed=57)
    nu = {key: value.requires_grad_() for key, value in nu.items()}
    optimizer, values = torch.optim.Adam(nu.values(), lr=0.01, maximize=True), []
    for _ in range(40):
        estimate = pathwise_gradient(task.mdp, policy, task.theta, nu, noise)
        for key, grad in estimate.grad.items():
            nu[key].grad = grad
        optimizer.step()
        values.append(-float(estimate.value))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("lead_times", "suppliers", "message"),
    [
        (((1, 2),), (2, 2), "one row of lead times per warehouse"),
        (((1, 2), (1,)), (2, 2), "all of one length"),
        (((1, 0), (1, 0)), (2, 2), "every store needs a route"),
        (((1, -1),), (2,), "lead times"),
        (((1, 1),), (0,), "lead times"),
    ],
)
def test_routes_that_make_no_network_are_refused(lead_times, suppliers, message):
    with pytest.raises(ValueError, match=message):
        Routes(lead_times, suppliers)


@pytest.mark.parametrize("wrong", [{"holding": [1.0]}, {"warehouse_holding": [1.0, 1.0]}, {"purchase": []}])
def test_lists_of_wrong_length_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        small(**wrong)


def test_the_peer_of_the_race_computes_the_same_cost_and_gradient():
    from benchmarks import inventory_peer as peer

    task = one_warehouse_task(4)
    traits, (policy, nu) = store_traits(task), random_policy(task)
    noise = task_noise(task, 6, 10, seed=57)
    estimate = pathwise_gradient(task.mdp, policy, task.theta, nu, noise)
    start = task.mdp.initial_state(task.theta, noise.initial)[:, :12].unflatten(-1, (3, 4)).mT
    times = torch.tensor(task.routes.lead_times[0])
    for decide in (peer.stacked, peer.nodes):
        leaves = {key: value.requires_grad_() for key, value in nu.items()}
        cost = peer.total_cost(decide, leaves, task.theta, traits, times, start, noise.process.mT) / 6
        torch.testing.assert_close(-cost.detach(), estimate.value)
        for key, grad in zip(nu, torch.autograd.grad(cost, list(leaves.values())), strict=True):
            torch.testing.assert_close(-grad, estimate.grad[key], rtol=1e-8, atol=1e-10)


def test_only_networks_have_store_traits():
    with pytest.raises(ValueError, match="only a network"):
        store_traits(one_store_task(1, 4.0))


@pytest.mark.parametrize("name", ["store", "line", "network", "hub", "replenishment"])
def test_vmap_over_costs_and_paths_equals_the_batch(name):
    task = {
        "store": one_store_task(3, 4.0),
        "line": serial_task(2, 4.0),
        "network": TASKS["many-warehouses"],
        "hub": TASKS["transshipment"],
        "replenishment": joint_replenishment_task(2),
    }[name]
    noise, width = task_noise(task, 5, 6, seed=57), len(task.mdp.names["action"])
    actions = 1 + 6 * torch.rand(5, 6, width, generator=torch.Generator().manual_seed(2)).double()
    actions[..., 0] = 1.0 if name == "replenishment" else actions[..., 0]
    each = {key: torch.stack([(1 + 0.1 * k) * value for k in range(5)]) for key, value in task.theta.items()}

    def cost(theta: Params, initial: torch.Tensor, process: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        state, total = task.mdp.initial_state(theta, initial), 0.0
        for action, e in zip(chosen.unbind(-2), process.unbind(-2), strict=True):
            after = task.mdp.step(theta, state, action, e)
            total, state = total + task.mdp.reward(theta, state, action, e, after), after
        return total

    together = cost(each, noise.initial, noise.process, actions)
    single = torch.func.vmap(cost)(each, noise.initial, noise.process, actions)
    torch.testing.assert_close(single, together)
    slopes = torch.func.vmap(torch.func.grad(cost))(each, noise.initial, noise.process, actions)
    # costs are linear in the prices, so the slopes give them back
    returned = sum((slopes[key] * each[key]).reshape(5, -1).sum(-1) for key in each)
    torch.testing.assert_close(returned, together)
