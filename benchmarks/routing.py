"""Vehicle routing: behaviour policies and trivial ones, logs that come back from their goals, and large cities.

`o-routing`    CITY-POLICY              return under the published simulator (which loses vehicles), in percent of the
                                        published oracle (58 100 NYC, 67 000 SHZ); reference: the paper
               CITY-POLICY-normalised   return with all vehicles kept: no moves 0, perfect foresight 100, same episodes
               CITY-foresight           the bound itself, in percent of the published oracle

`o-roundtrip`  CITY-POLICY-recovered    of the logged flows that are the cheapest for what they reach, how many the goal
                                        recovered from them (as float32 shares) gives back, every entry equal
               CITY-POLICY-not-optimal  flows that are not the cheapest, by duality; -saving: the largest, in steps
               CITY-POLICY-truncated    vehicles of a decision whose goal is lost when shares are truncated, not rounded

`o-scale`      EDGES                    CPU seconds of a decision: graph network, whole targets, cheapest flows
               EDGES-lower              of which the lower level; EDGES-all-edges: the same program with every edge
               EDGES-prepare            once per city
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linprog
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.routing_networks import Upper
from benchmarks.routing_policies import behaviours, fleet_program, perfect_foresight
from sim2real.simulators.vehicle_routing import (
    FEATURES,
    NYC_BROOKLYN,
    SHENZHEN_DOWNTOWN_WEST,
    RoutingScenario,
    draw_requests,
    read_routing_scenario,
    routing_rollout,
)
from sim2real.solvers.flow_inverse import integer_target, invert_flows, target_shares
from sim2real.solvers.flow_program import FlowProgram, flow_program, rebalance_flows

DATA = Path(os.environ.get("SIM2REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
CITIES = {
    "nyc": ("scenario_nyc_brooklyn.json", NYC_BROOKLYN),
    "shz": ("scenario_shenzhen_downtown_west.json", SHENZHEN_DOWNTOWN_WEST),
}
ORACLE = {"nyc": 58_100.0, "shz": 67_000.0}
"""inferred from the paper's tables: best INF 57 250 = 98.5 %, 60 900 = 90.9 %"""
PAPER = {
    "nyc": {"inf": 98.5, "dtv": 89.4, "prop": 85.7, "disp": 45.8},
    "shz": {"inf": 90.9, "dtv": 92.8, "prop": 84.5, "disp": 73.5},
}
SCALES = {100: ("10k", 0.1), 200: ("40k", 0.6), 300: ("90k", 1.5)}
FLOOR = 1e-6
"""to which the published implementation lifts shares of 0, at the cost of the others"""


def scenario(city: str) -> RoutingScenario:
    name, settings = CITIES[city]
    path = DATA / "amod" / name
    if not path.exists():
        raise MissingError(f"no file '{path}'; SIM2REAL_DATA names the folder that holds amod/")
    return read_routing_scenario(path, settings)


def o_routing(quick: bool) -> Iterator[Figure]:
    episodes = 6 if quick else 60
    for city in CITIES:
        here = scenario(city)
        requests = draw_requests(here, episodes, torch.Generator().manual_seed(0))
        top = float(np.mean([perfect_foresight(here, each) for each in requests]))
        still = float(routing_rollout(here, requests, behaviours(here, city, 0)["none"]).returns.mean())
        for name, decide in behaviours(here, city, 0).items():
            lossy = float(routing_rollout(here, requests, decide, lossy=True).returns.mean())
            reference = PAPER[city].get(name)
            yield Figure(f"{city}-{name}", 100 * lossy / ORACLE[city], "%", episodes, reference)
            kept = float(routing_rollout(here, requests, behaviours(here, city, 0)[name]).returns.mean())
            yield Figure(f"{city}-{name}-normalised", 100 * (kept - still) / (top - still), "%", episodes)
        yield Figure(f"{city}-foresight", 100 * top / ORACLE[city], "%", episodes)


def o_roundtrip(quick: bool) -> Iterator[Figure]:
    for city in CITIES:
        here = scenario(city)
        program = fleet_program(here)
        requests = draw_requests(here, 2 if quick else 15, torch.Generator().manual_seed(1))
        for name in PAPER[city]:
            run = routing_rollout(here, requests, behaviours(here, city, 1)[name])
            yield from roundtrip(f"{city}-{name}", program, run.idle.flatten(0, 1), run.flows.flatten(0, 1))


def roundtrip(name: str, program: FlowProgram, idle: Tensor, flows: Tensor) -> Iterator[Figure]:
    found, total = invert_flows(program, idle, flows), idle.sum(-1)
    shares = target_shares(found.target).float()
    again = rebalance_flows(program, idle, integer_target(shares, total)).flows
    moves = ~torch.eye(idle.shape[1], dtype=torch.bool)
    same = ((again == flows) | ~moves).all((-1, -2))[found.optimal]
    yield Figure(f"{name}-recovered", float(100 * same.double().mean()), "%", len(same), 100.0)
    yield Figure(f"{name}-not-optimal", float((~found.optimal).sum()), "rows", len(idle))
    yield Figure(f"{name}-not-optimal-saving", float(found.saving.max()), "steps", len(idle))
    empty = shares == 0
    lifted = shares - empty.sum(-1, keepdim=True) * FLOOR / (~empty).sum(-1, keepdim=True)
    lifted = torch.where(empty, FLOOR, lifted).double()
    lost = (found.target - torch.floor(lifted * total.unsqueeze(-1))).sum(-1)
    yield Figure(f"{name}-truncated", float(lost.mean()), "vehicles", len(idle))


def o_scale(quick: bool) -> Iterator[Figure]:
    """Cities at random points, up to 28 steps across, 100 vehicles per station, unevenly spread."""
    decisions = 2 if quick else 10
    for n, (label, bar) in SCALES.items():
        rng = np.random.default_rng(n)
        points = rng.random((n, 2))
        away = np.linalg.norm(points[:, None] - points[None], axis=-1)
        cost = torch.from_numpy(np.maximum(np.rint(20 * away), 1.0))
        near = np.argsort(away, 1)[:, 1:5]
        network = Upper(torch.from_numpy(np.stack([near.ravel(), np.repeat(np.arange(n), 4)])), n)
        begin = time.process_time()
        program = flow_program(cost, tie_break=1.0)
        yield Figure(f"{label}-prepare", time.process_time() - begin, "s", 1)
        spent, lower, every = [], [], []
        for _ in range(decisions):
            idle = torch.from_numpy(rng.multinomial(100 * n, rng.dirichlet(np.ones(n)))).double().unsqueeze(0)
            features = torch.from_numpy(rng.gamma(1.0, size=(1, n, FEATURES))).float()
            begin = time.process_time()
            with torch.no_grad():
                concentration = torch.nn.functional.softplus(20 * network(features))
            target = integer_target((concentration / concentration.sum()).double(), idle.sum(-1))
            middle = time.process_time()
            found = rebalance_flows(program, idle, target)
            end = time.process_time()
            spent.append(end - begin)
            lower.append(end - middle)
            if len(every) < 2:
                every.append(all_edges(program, idle[0].numpy(), target[0].numpy(), float(found.cost)))
        yield Figure(label, float(np.max(spent)), "s", decisions, bar)
        yield Figure(f"{label}-lower", float(np.max(lower)), "s", decisions)
        yield Figure(f"{label}-all-edges", float(np.max(every)), "s", len(every))


def all_edges(program: FlowProgram, idle: np.ndarray, target: np.ndarray, expected: float) -> float:
    """CPU seconds of the program as written, all n^2 edges at once, built beforehand; it must cost the same."""
    n = len(idle)
    takes = scipy.sparse.kron(scipy.sparse.eye_array(n), np.ones((1, n)), format="csr")
    brings = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye_array(n), format="csr")
    begin = time.process_time()
    found = linprog(program.cost.ravel(), A_ub=takes, b_ub=idle, A_eq=brings, b_eq=target, method="highs-ds")
    spent = time.process_time() - begin
    if abs(found.fun - expected) > 1e-6 * expected:
        raise RuntimeError(f"the program with all edges costs {found.fun:g}, the flows found {expected:g}")
    return spent


if __name__ == "__main__":
    main({"o-routing": o_routing, "o-roundtrip": o_roundtrip, "o-scale": o_scale})
