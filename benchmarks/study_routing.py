"""Study: offline learning of the upper policy of vehicle routing from inverted logs (`o-routing`), resumable.

    python benchmarks/study_routing.py [--quick] [--city nyc] [--data inf] [--method iql] [--seeds 1] [--updates 10000]

Logs of 10 000 transitions of a behaviour policy hold flows: `recover_target` turns them into shares of the idle
vehicles, torchrl's losses learn a Dirichlet policy over these (one graph convolution), the cheapest flows execute its
mean. The last weights count: nothing is selected on test episodes. `e2e-` methods learn the flows themselves
(Gaussian); they are run as published (truncated, cut edge by edge) and, for a fair comparison, projected onto the idle
vehicles.

Rows in `benchmarks/results/ohio_routing.json`, over 30 test episodes whose requests no log has: `percent` of the
published oracle under the published simulator (which loses vehicles), `normalised` with all vehicles kept, between no
moves (0) and perfect foresight (100); `behaviour`: the same two of the policy that wrote the log.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ohio_learning import Family, Networks, Progress, Recipe, Transitions, best, dirichlet, gaussian, learn
from benchmarks.routing import ORACLE, PAPER, scenario
from benchmarks.routing_networks import Critic, EndToEnd, EndToEndCritic, Upper, Value
from benchmarks.routing_policies import (
    Decide,
    RoutingLog,
    behaviours,
    flown,
    none,
    observed,
    perfect_foresight,
    routing_logs,
)
from benchmarks.rows import append, present, stamp, stored
from sim2real.simulators.vehicle_routing import RoutingScenario, draw_requests, routing_rollout
from sim2real.solvers.flow_inverse import recover_target, target_shares

RESULTS = Path(__file__).parent / "results" / "ohio_routing.json"
TRANSITIONS, TEST_EPISODES, TEST_SEED, REWARD_SCALE = 10_000, 30, 10_000, 0.01


def transitions(log: RoutingLog, end_to_end: bool) -> Transitions:
    """In the form of the learner. No end is marked, as in the published implementation: the city goes on."""
    moves = log.flows - torch.diag_embed(log.flows.diagonal(dim1=-2, dim2=-1))
    inputs = moves.flatten(1) if end_to_end else target_shares(recover_target(log.idle, log.flows))
    parts = log.features, inputs, log.reward * REWARD_SCALE, log.next_features
    features, inputs, reward, following = (part.float() for part in parts)
    return Transitions(features, inputs, reward, following, torch.zeros(len(reward), dtype=torch.bool))


def networks(here: RoutingScenario, end_to_end: bool) -> tuple[Networks, Family]:
    """Graph networks and the family of the policy."""
    policy, critic = (EndToEnd, EndToEndCritic) if end_to_end else (Upper, Critic)
    made = Networks(*(make(here.edges, here.stations) for make in (policy, critic, Value)))
    return made, gaussian(0.1) if end_to_end else dirichlet()


def trained(
    here: RoutingScenario, behaviour: Decide, recipe: Recipe, seed: int, count: int, *, end_to_end: bool
) -> tuple[Callable[[Tensor], Tensor], Progress]:
    """The learned policy, features -> shares or flows, and its last report."""
    torch.manual_seed(seed)
    train, held = (
        transitions(routing_logs(here, behaviour, size, 2 * seed + k), end_to_end)
        for k, size in enumerate((count, 570))
    )
    nets, family = networks(here, end_to_end)
    *_, last = learn(train, held, nets, family, recipe, seed=seed)
    return lambda features: best(nets.policy, family, last.policy, features.float()).double(), last


def scores(here: RoutingScenario, city: str, decide: Callable[[], Decide], episodes: int) -> dict[str, float]:
    """`percent` with its spread over episodes, and `normalised`; `decide()` makes the policy anew."""
    requests = draw_requests(here, episodes, torch.Generator().manual_seed(TEST_SEED))
    lossy = 100 * routing_rollout(here, requests, decide(), lossy=True).returns / ORACLE[city]
    kept = float(routing_rollout(here, requests, decide()).returns.mean())
    still = float(routing_rollout(here, requests, none(here)).returns.mean())
    top = sum(perfect_foresight(here, each) for each in requests) / episodes
    normalised = 100 * (kept - still) / (top - still)
    return {"percent": float(lossy.mean()), "spread": float(lossy.std()), "normalised": normalised}


def measured(city: str, data: str, method: str, seed: int, *, updates: int, quick: bool) -> dict[str, object]:
    """One row of the study."""
    begin, here, episodes = time.process_time(), scenario(city), 3 if quick else TEST_EPISODES
    behaviour, end_to_end = behaviours(here, city, seed)[data], method.startswith("e2e-")
    name = method.removeprefix("e2e-")
    rate = 1e-3 if name == "bc" else 3e-4
    recipe = Recipe(name, updates, 100, rate, anneal=True, discount=0.97, every=updates)  # type: ignore[arg-type]
    count = 190 if quick else TRANSITIONS
    policy, last = trained(here, behaviour, recipe, seed, count, end_to_end=end_to_end)
    row = dict[str, object]()
    if end_to_end:
        row |= scores(here, city, lambda: flown(here, policy, projected=False), episodes)
        row["projected"] = scores(here, city, lambda: flown(here, policy, projected=True), episodes)
    else:
        row |= scores(here, city, lambda: observed(here, policy), episodes)
    row["behaviour"] = scores(here, city, lambda: behaviours(here, city, seed + 1)[data], episodes)
    row["paper_behaviour"] = PAPER[city][data]
    return row | {"held_out": last.held_out, "updates": last.updates, "seconds": time.process_time() - begin}


def main() -> None:
    """Run what is not stored yet."""
    parser = argparse.ArgumentParser(description="Offline learning of vehicle routing; rows are stored as they come.")
    parser.add_argument("--city", action="append", choices=["nyc", "shz"])
    parser.add_argument("--data", action="append", choices=sorted(PAPER["nyc"]))
    parser.add_argument("--method", action="append", choices=["bc", "iql", "cql", "e2e-bc", "e2e-iql"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="a few updates on little data; prints, stores nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = stamp("torch", "torchrl", "scipy")
    updates = 20 if options.quick else options.updates
    for seed in range(options.seeds):
        for city in options.city or ["nyc", "shz"]:
            for data in options.data or ["inf", "dtv", "prop", "disp"]:
                for method in options.method or ["bc", "iql"]:
                    key: dict[str, object] = {"city": city, "data": data, "method": method, "seed": seed}
                    if options.quick or not present(stored(RESULTS), updates=updates, **key):
                        row = key | measured(city, data, method, seed, updates=updates, quick=options.quick)
                        print(row, flush=True)
                        if not options.quick:
                            append(RESULTS, row | where)


if __name__ == "__main__":
    main()
