"""The study of OHIO: upper policies learned offline from inverted logs, five seeds each; resumable.

    python benchmarks/study_ohio.py [--only reacher/E2E] [--seeds 5] [--out benchmarks/results/ohio.json]

reacher/VARIANT/METHOD: 250 episodes of 1000 steps of the flat data policy of `ohio_reacher`, drawn anew for each seed,
inverted for the lower level VARIANT (E2E; Q or R ten times as large: 10S, 10C); a tenth of the episodes is held out,
and the weights of the smallest held-out loss are deployed, in 100 episodes that the data policy runs from the same
starts. `observed`: cloning with the state that was reached in place of the goal, everything else equal.

A row holds the return (sum over 1000 steps, mean and standard error over episodes) of the learned policy and of its
data policy, their ratio, how the segments were judged, the recipe, the command, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ohio_learning import Networks, Recipe, Transitions, VectorCritic, best, gaussian, learn, perceptron
from benchmarks.ohio_reacher import (
    ARM_SIGNALS,
    STEPS,
    VARIANTS,
    features,
    flat_policy,
    hierarchical_reacher,
    inverted,
    suite_theta,
    to_log,
    transitions,
)
from benchmarks.rows import Row, append, present, stamp, stored
from sim2real.estimators.high_level import HighLevelLog, high_level_transitions
from sim2real.mdp import sample_noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import rollout
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.reacher import reacher

FILE = Path(__file__).parent / "results" / "ohio.json"


@dataclass(frozen=True)
class Instance:
    """`name` is TASK/VARIANT/METHOD."""

    name: str
    recipe: Recipe
    seeds: int = 5
    episodes: int = 250
    steps: int = 1000
    judged: int = 100
    """episodes of the deployment"""


CLONING = Recipe("bc", updates=4000, rate=2e-3, anneal=True, every=500)
IQL = Recipe("iql", updates=6000, rate=1e-3, critic_rate=1e-3, anneal=True, every=1000, discount=0.97, expectile=0.7)


def instances() -> Iterator[Instance]:
    """The bars first."""
    for variant in VARIANTS:
        yield Instance(f"reacher/{variant}/bc", CLONING)
    yield Instance("reacher/E2E/observed", CLONING)
    yield Instance("reacher/E2E/iql", IQL, seeds=1)
    yield Instance("reacher/E2E/cql", replace(IQL, method="cql", updates=2000, conservatism=0.1), seeds=1)


def logged(instance: Instance, seed: int) -> tuple[HighLevelLog, float]:
    """The inverted log, and CPU seconds of the inversion."""
    mdp, theta, policy = reacher(), suite_theta(), flat_policy()
    generator = torch.Generator().manual_seed(seed)
    noise = sample_noise(mdp, policy, instance.episodes, instance.steps, generator)
    log = to_log(mdp, theta, rollout(mdp, policy, theta, {}, noise), f"flat policy, seed {seed}")
    begin = time.process_time()
    found = inverted(log, theta, instance.name.split("/")[1])
    return found, time.process_time() - begin


def episodes(log: RolloutLog, first: int, last: int | None) -> RolloutLog:
    """Episodes first .. last - 1, or to the end."""
    rewards = None if log.rewards is None else log.rewards[first:last]
    cut = {"signals": log.signals[first:last], "actions": log.actions[first:last], "mask": log.mask[first:last]}
    return replace(log, rewards=rewards, **cut)


def learned(instance: Instance, log: RolloutLog, seed: int) -> tuple[Policy, Row]:
    """The upper policy of the smallest held-out loss, and what its training says."""
    observed = instance.name.endswith("observed")
    s, u, _, after = high_level_transitions(log)
    relative = (after[:, ARM_SIGNALS] if observed else u) - s[:, ARM_SIGNALS]
    scale, cut = relative.abs().mean(0), len(log.mask) - max(1, len(log.mask) // 10)
    train, held_out = (transitions(episodes(log, *ends), scale, observed=observed) for ends in ((0, cut), (cut, None)))
    networks, family = _networks(train, seed), gaussian()
    chosen, lowest, curve = dict[str, Tensor](), math.inf, []
    for progress in learn(train, held_out, networks, family, instance.recipe, seed=seed):
        curve.append([progress.updates, round(progress.seconds, 1), round(progress.held_out, 5)])
        if progress.held_out < lowest:
            chosen, lowest = progress.policy, progress.held_out
    mdp = reacher()
    assert mdp.observe is not None
    observe = mdp.observe

    def act(nu: Params, state: Tensor, e: Tensor) -> Tensor:
        goal = best(networks.policy, family, chosen, features(observe({}, state)))
        return state[:, :4] + scale * goal.double()

    spent = {"train_seconds": curve[-1][1], "held_out": lowest, "curve": curve}
    return Policy(act, lambda nu, state, action: torch.zeros_like(state[:, 0]), 0), spent


def _networks(data: Transitions, seed: int) -> Networks:
    torch.manual_seed(seed)
    inputs, outputs = data.features.shape[1], data.input.shape[1]
    value = nn.Sequential(perceptron(inputs, 1, 128), nn.Flatten(0))
    return Networks(perceptron(inputs, 2 * outputs, 128), VectorCritic(inputs, outputs, 128), value)


def measured(instance: Instance, seed: int) -> Row:
    """Log, invert, learn, deploy: one row."""
    found, seconds = logged(instance, seed)
    policy, spent = learned(instance, found.log, seed)
    theta, test = suite_theta(), lambda: torch.Generator().manual_seed(10_000 + seed)
    upper, flat = hierarchical_reacher(instance.name.split("/")[1]), flat_policy()
    noise = sample_noise(upper, policy, instance.judged, instance.steps // STEPS, test())
    reached = rollout(upper, policy, theta, {}, noise).rewards.sum(1)
    noise = sample_noise(reacher(), flat, instance.judged, instance.steps, test())
    data = rollout(reacher(), flat, theta, {}, noise).rewards.sum(1)
    row: Row = {"instance": instance.name, "seed": seed, "return": float(reached.mean()), "data": float(data.mean())}
    root = math.sqrt(instance.judged)
    row |= {"return_stderr": float(reached.std()) / root, "data_stderr": float(data.std()) / root}
    row |= {"percent": 100 * row["return"] / row["data"], "segments": found.counts, "inversion_seconds": seconds}
    return row | spent | {"recipe": asdict(instance.recipe)}


def run(path: Path, only: str, seeds: int, quick: bool) -> None:
    """Append the rows that are missing, one by one, a seed of all instances before the next."""
    torch.set_num_threads(1)
    where = stamp("torch", "torchrl", "tensordict")
    for seed, instance in ((seed, instance) for seed in range(seeds) for instance in instances()):
        if quick:
            short = replace(instance.recipe, updates=20, every=10)
            instance = replace(instance, recipe=short, episodes=4, steps=50, judged=4)
        done = present(stored(path), instance=instance.name, seed=seed)
        if only not in instance.name or seed >= instance.seeds or done:
            continue
        row = measured(instance, seed) | where
        append(path, row)
        shown = ("instance", "seed", "return", "data", "percent", "segments", "inversion_seconds", "train_seconds")
        print(json.dumps({key: row[key] for key in shown}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--only", default="", help="part of the instance's name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; give another --out")
    arguments = parser.parse_args()
    run(arguments.out, arguments.only, arguments.seeds, arguments.quick)


if __name__ == "__main__":
    main()
