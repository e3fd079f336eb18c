"""Study: offline learning of the supply chain's upper policy from inverted logs (`o-supply`), resumable.

    python benchmarks/study_supply.py [--quick] [--task 1w3s] [--data heur] [--data mpc] [--method iql] [--seeds 1]

Logs of 20 000 transitions of an order-up-to or a predictive policy hold states alone: what was shipped and produced is
on its way in the next state. `invert_shipments` turns it into shares and production, torchrl's losses learn a policy
over these (graph network, Dirichlet and Beta), the lower level executes it. `e2e-` methods learn shipments and
production themselves (Gaussian); they are run raw and, for a fair comparison, projected onto the same constraints.

Rows in `benchmarks/results/ohio_supply.json`; percentages of the plan with perfect foresight of the same 100 episodes.
`small_capacity`: the same weights with stores of capacity 10, as a percentage of the foresight plan with capacity 10.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ohio_learning import (
    Family,
    Networks,
    Progress,
    Recipe,
    Transitions,
    best,
    beta,
    dirichlet,
    gaussian,
    joined,
    learn,
)
from benchmarks.rows import Row, append, present, stamp, stored
from benchmarks.supply_policies import (
    Decide,
    Log,
    behaviours,
    executed,
    flat,
    foresight,
    goals,
    limits,
    recovered,
    run,
    violations,
)
from sim2real.bounds import default_params
from sim2real.params import Params
from sim2real.simulators.supply_chain import (
    FEATURES,
    STEPS,
    SupplyTask,
    message_edges,
    supply_chain,
    supply_features,
    ten_stores,
    three_stores,
)
from sim2real.solvers.shipping_program import ship

RESULTS = Path(__file__).parent / "results" / "ohio_supply.json"
# the published figures belong to a backlog cost of 1 on 1W3S, see docs/supply.rst
TASKS = {"1w3s": three_stores(backlog=1.0), "1w10s": ten_stores()}
# a tenth of the published scale: advantages of some units keep weights exp(temperature advantage) below their cut
REWARD_SCALE = 0.01
WIDTH, BATCH, UPDATES = 64, 100, 5000
TRANSITIONS, TEST_EPISODES, SMALL_CAPACITY = 20_000, 100, 10.0
TEST_SEED = 10_000


class Messages(nn.Module):
    """One round of messages between the warehouse and its stores: `[N, n+1, f]` -> `[N, n+1, f + width]`."""

    edges: Tensor
    scale: Tensor

    def __init__(self, task: SupplyTask, scale: Tensor, width: int) -> None:
        super().__init__()
        edges, _ = message_edges(task)
        self.register_buffer("edges", edges)
        self.register_buffer("scale", scale)
        self.net = nn.Sequential(nn.Linear(2 * FEATURES, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        x = features / self.scale
        sender, receiver = self.edges
        message = self.net(torch.cat([x[:, receiver], x[:, sender]], -1))
        heard = message.new_zeros(*x.shape[:2], message.shape[-1]).index_add(1, receiver, message)
        return torch.cat([x, heard], -1)


class Upper(nn.Module):
    """Raw numbers of shares (one per node), then two of the production, read at the warehouse."""

    def __init__(self, task: SupplyTask, scale: Tensor, width: int) -> None:
        super().__init__()
        self.messages = Messages(task, scale, width)
        self.head = nn.Sequential(nn.Linear(FEATURES + width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, features: Tensor) -> Tensor:
        numbers = self.head(self.messages(features))
        return torch.cat([numbers[..., 0], numbers[:, -1, 1:]], -1)


class EndToEnd(nn.Module):
    """Means of shipments and production in units, then their raw deviations."""

    def __init__(self, task: SupplyTask, scale: Tensor, width: int) -> None:
        super().__init__()
        self.messages = Messages(task, scale, width)
        self.head = nn.Sequential(nn.Linear(FEATURES + width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.messages(features)).movedim(-1, -2).flatten(1)


class Critic(nn.Module):
    """Q(s, u): a number per node from features and its entries of u, summed over nodes."""

    size: Tensor

    def __init__(self, task: SupplyTask, scale: Tensor, width: int, size: Tensor) -> None:
        super().__init__()
        self.messages = Messages(task, scale, width)
        self.register_buffer("size", size)
        self.head = nn.Sequential(nn.Linear(FEATURES + width + 2, width), nn.ReLU(), nn.Linear(width, 1))
        self.nodes = task.stores + 1

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        u = u / self.size
        # entries of nodes first; what is left is the production, given to all
        rest = u[:, -1:].expand(-1, self.nodes)
        heard = torch.cat([self.messages(features), torch.stack([u[:, : self.nodes], rest], -1)], -1)
        return self.head(heard).sum((-2, -1))


class Value(nn.Module):
    """V(s)."""

    def __init__(self, task: SupplyTask, scale: Tensor, width: int) -> None:
        super().__init__()
        self.messages = Messages(task, scale, width)
        self.head = nn.Sequential(nn.Linear(FEATURES + width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.messages(features)).sum((-2, -1))


@cache
def logged(task: SupplyTask, data: str, episodes: int, seed: int) -> Log:
    """Episodes of a behaviour policy; the methods of a study share them."""
    theta = default_params(supply_chain(task).box)
    return flat(run(task, theta, behaviours(task, theta)[data], episodes, seed))


def transitions(task: SupplyTask, theta: Params, log: Log, inputs: Tensor) -> Transitions:
    """In the form of the learner; the last step of an episode is terminal, as in the published implementation."""
    terminal = log.following[:, 0] > STEPS
    parts = supply_features(task, theta, log.states), inputs, log.reward * REWARD_SCALE
    features, inputs, reward = (part.float() for part in parts)
    return Transitions(features, inputs, reward, supply_features(task, theta, log.following).float(), terminal)


def inputs_of(task: SupplyTask, theta: Params, log: Log, end_to_end: bool) -> Tensor:
    """What the policy is to say: shares and production, or shipments and production."""
    if end_to_end:
        shipments, production = executed(task, log.following)
        return torch.cat([shipments, production.unsqueeze(-1)], -1)
    found = recovered(task, theta, log)
    return torch.cat([found.share, found.production.unsqueeze(-1)], -1)


def networks(
    task: SupplyTask, theta: Params, data: Transitions, width: int, end_to_end: bool
) -> tuple[Networks, Family]:
    """Graph networks and the family of the policy."""
    scale = data.features.abs().amax((0, 1)).clamp(min=1.0)
    cap, n = float(theta["production_cap"]), task.stores
    if end_to_end:
        size = torch.tensor([float(theta["capacity"][0])] * n + [cap])
        made = EndToEnd(task, scale, width)
        return Networks(made, Critic(task, scale, width, size), Value(task, scale, width)), gaussian(0.1)
    family = joined(dirichlet(), n + 1, n + 1, beta(0.0, cap))
    critic = Critic(task, scale, width, torch.tensor([1.0] * (n + 1) + [cap]))
    return Networks(Upper(task, scale, width), critic, Value(task, scale, width)), family


def deployed(task: SupplyTask, theta: Params, said: Callable[[Tensor], Tensor], kind: str) -> Decide:
    """A learned policy as a decision: 'goals' over the lower level, 'raw', or 'projected' onto the constraints."""
    if kind == "goals":
        return goals(task, theta, said)
    if kind == "raw":
        return said

    def decide(state: Tensor) -> Tensor:
        wanted = said(state)
        plan = ship(limits(task, theta, state), wanted[:, :-1], wanted[:, -1])
        return torch.cat([plan.shipments, plan.production.unsqueeze(-1)], -1)

    return decide


def scores(task: SupplyTask, theta: Params, decide: Decide, episodes: int) -> dict[str, float]:
    """Mean and spread over episodes in percent of perfect foresight; violations: units beyond any constraint."""
    out = run(task, theta, decide, episodes, TEST_SEED)
    percent = 100 * out.total / foresight(task, theta, out)
    states = out.states[:, :-1].flatten(0, 1)
    return {
        "percent": float(percent.mean()),
        "spread": float(percent.std()),
        "violations": float(violations(task, theta, states, out.actions.flatten(0, 1)).sum()) / episodes,
    }


def small(theta: Params) -> Params:
    """Stores of capacity 10."""
    capacity = theta["capacity"].clone()
    capacity[:-1] = SMALL_CAPACITY
    return theta | {"capacity": capacity}


def recipe_of(method: str, updates: int) -> Recipe:
    """The published discount, expectile and temperature; fewer updates, at higher rates that fall."""
    settings = {"rate": 1e-3, "critic_rate": 1e-3, "anneal": True, "discount": 0.97, "every": updates}
    return Recipe(method, updates=updates, batch=BATCH, **settings)  # type: ignore[arg-type]


def trained(
    task: SupplyTask, theta: Params, data: str, method: str, seed: int, *, quick: bool, updates: int = UPDATES
) -> tuple[Callable[[Params], Callable[[Tensor], Tensor]], Progress]:
    """A learned policy as a function of theta (which it sees through the features), and its last report."""
    torch.manual_seed(seed)
    end_to_end, count = method.startswith("e2e-"), 600 if quick else TRANSITIONS
    log, aside = (logged(task, data, -(-size // STEPS), 2 * seed + k) for k, size in enumerate((count, 600)))
    train, held = (transitions(task, theta, each, inputs_of(task, theta, each, end_to_end)) for each in (log, aside))
    nets, family = networks(task, theta, train, 32 if quick else WIDTH, end_to_end)
    *_, last = learn(
        train, held, nets, family, recipe_of(method.removeprefix("e2e-"), 300 if quick else updates), seed=seed
    )

    def policy(theta: Params) -> Callable[[Tensor], Tensor]:
        def said(state: Tensor) -> Tensor:
            return best(nets.policy, family, last.policy, supply_features(task, theta, state).float()).double()

        return said

    return policy, last


def measured(name: str, data: str, method: str, seed: int, *, quick: bool, updates: int = UPDATES) -> Row:
    """One row of the study."""
    task, begin = TASKS[name], time.process_time()
    theta = default_params(supply_chain(task).box)
    policy, last = trained(task, theta, data, method, seed, quick=quick, updates=updates)
    episodes, row = 10 if quick else TEST_EPISODES, Row()
    for kind in ("raw", "projected") if method.startswith("e2e-") else ("goals",):
        row[kind] = scores(task, theta, deployed(task, theta, policy(theta), kind), episodes)
        less = small(theta)
        row[f"{kind}_small_capacity"] = scores(task, less, deployed(task, less, policy(less), kind), episodes)
    settings = {"width": WIDTH, "batch": BATCH, "reward_scale": REWARD_SCALE}
    return row | settings | {"held_out": last.held_out, "updates": last.updates, "seconds": time.process_time() - begin}


def main() -> None:
    """Run what is not stored yet."""
    parser = argparse.ArgumentParser(description="Offline learning on the supply chain; rows are stored as they come.")
    parser.add_argument("--task", action="append", choices=sorted(TASKS))
    parser.add_argument("--data", action="append", choices=["heur", "mpc"])
    parser.add_argument("--method", action="append", choices=["bc", "iql", "cql", "e2e-bc", "e2e-iql"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--quick", action="store_true", help="a few updates on little data; prints, stores nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = stamp("torch", "torchrl", "scipy")
    for seed in range(options.seeds):
        for name in options.task or ["1w3s"]:
            for data in options.data or ["heur", "mpc"]:
                for method in options.method or ["bc", "iql"]:
                    key: Row = {"task": name, "data": data, "method": method, "seed": seed}
                    if options.quick or not present(stored(RESULTS), **key):
                        row = key | measured(name, data, method, seed, quick=options.quick, updates=options.updates)
                        print(row, flush=True)
                        if not options.quick:
                            append(RESULTS, row | where)


if __name__ == "__main__":
    main()
