"""Four Rooms from samples: gradients by what the leader knows, and returns of the ascent.

`b-rooms-gradient` (temperature 0.003, `oracles/four_rooms_trained_point.json`): linear solves with the empirical kernel
of on-policy steps, rows tilted to the known soft values. The leader knows the map of rewards, the follower's policy and
its soft values, never the kernel. Mean cosine with the exact gradient, and the cosine of the mean of 24:

    kept-100    100 fresh steps and 2000 kept from before;      kept-1000   1000 and 10 000
    fresh-1000  1000 fresh steps alone;                         mean24      kept-1000, soft values not used
    *-plain     the same without the soft values

`b-rooms-return` (temperatures 0.001, 0.003, 0.005): batches of 100 steps, 2000 iterations, kernel estimated from all
steps so far; exact leader value at the end, mean of 10 seeds. Remedy: 0.001 natural steps with the follower annealed
from 0.05 over 70 %, the others restarts (5 from logits of standard deviation 2, the best by estimated value continued).
`*-no-remedy`: the exact gradient, Adam, from nearly uniform penalties.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles import four_rooms as oracle
from sim2real.estimators import (
    annealed_temperature,
    best_of_restarts,
    boltzmann_tables_gradient,
    empirical_transition,
    natural_softmax_step,
    tilted_transition,
    transition_counts,
)
from sim2real.params import Estimate, Params
from sim2real.simulators import four_rooms_tables, four_rooms_transition
from sim2real.solvers import SoftFollower, policy_values, soft_value_iteration

CELLS, START, GOAL, GAMMA, LIMIT = 104, oracle.START, oracle.GOAL, 0.99, 200
CUMULATIVE = four_rooms_transition().cumsum(-1).numpy()
PUBLISHED = {0.001: 0.67, 0.003: 0.54, 0.005: 1.33}


def follower_at(theta: Params, temperature: float, warm: Tensor | None = None) -> SoftFollower:
    """The follower of the task, which knows the kernel."""
    tables = four_rooms_tables(theta)
    return soft_value_iteration(
        tables.follower_reward, KERNEL, discount=GAMMA, temperature=temperature, value=warm, tol=1e-9
    )


KERNEL = four_rooms_transition()


def walk(policy: Tensor, steps: int, generator: np.random.Generator) -> Tensor:
    """Counts `[104, 4, 105]` of `steps` on-policy steps; an episode ends in the goal or after 200."""
    choose = policy.cumsum(-1).numpy()
    uniform = generator.random((steps, 2))
    rows = np.empty((steps, 3), dtype=np.int64)
    cell, age = START, 0
    for k in range(steps):
        move = min(int(choose[cell].searchsorted(uniform[k, 0])), 3)
        ends = cell == GOAL
        after = CELLS if ends else min(int(CUMULATIVE[cell, move].searchsorted(uniform[k, 1])), CELLS - 1)
        rows[k] = cell, move, after
        age += 1
        cell, age = (START, 0) if ends or age >= LIMIT else (after, age)
    cells, moves, reached = torch.from_numpy(rows).unbind(1)
    return transition_counts(cells, moves, reached, reached == CELLS, shape=(CELLS, 4))


def learned_gradient(
    theta: Params, follower: SoftFollower, counts: Tensor, temperature: float, *, soft_values: bool = False
) -> Estimate:
    """The leader's gradient from counts, the follower's policy and, with `soft_values`, its values."""
    kernel = empirical_transition(counts)
    kernel[GOAL] = 0.0  # that acting in the goal ends the episode is the leader's own rule
    if soft_values:
        reward = four_rooms_tables(theta).follower_reward
        kernel = tilted_transition(
            kernel, follower.policy, follower.value, reward, temperature=temperature, discount=GAMMA
        )
    return boltzmann_tables_gradient(
        four_rooms_tables,
        theta,
        follower.policy,
        follower.value,
        temperature=temperature,
        leader_discount=GAMMA,
        follower_discount=GAMMA,
        transition=kernel,
    )


def cosines(fresh: int, kept: int, repeats: int, soft_values: bool) -> tuple[float, float]:
    """Mean cosine over `repeats`, and the cosine of the mean."""
    logits, temperature = oracle.trained_point()
    exact = torch.from_numpy(oracle.exact(logits, temperature).gradient)
    theta = {"logits": torch.from_numpy(logits)}
    follower = follower_at(theta, temperature)
    found = []
    for seed in range(repeats):
        generator = np.random.default_rng([3, seed])
        counts = walk(follower.policy, fresh, generator)
        if kept:
            counts = counts + walk(follower.policy, kept, generator)
        found.append(learned_gradient(theta, follower, counts, temperature, soft_values=soft_values).grad["logits"])
    cosine = torch.nn.functional.cosine_similarity
    every = torch.stack(found)
    return float(cosine(every, exact.unsqueeze(0)).mean()), float(cosine(every.mean(0), exact, dim=0))


def b_rooms_gradient(quick: bool) -> Iterator[Figure]:
    """Cosines at the trained point."""
    repeats = 16 if quick else 48
    for name, fresh, kept in (("kept-100", 100, 2000), ("kept-1000", 1000, 10000), ("fresh-1000", 1000, 0)):
        for suffix, soft_values in (("", True), ("-plain", False)):
            mean, _ = cosines(fresh, kept, repeats, soft_values)
            yield Figure(name + suffix, mean, "cosine", repeats, -0.01)
    yield Figure("mean24", cosines(1000, 10000, 24, False)[1], "cosine", 24, -0.91)
    yield Figure("mean24-kept-100", cosines(100, 2000, 24, False)[1], "cosine", 24, -0.91)


class _World:
    """Counts of all steps so far and the last soft values of the follower: what is kept between iterations."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng([7, seed])
        self.counts = torch.zeros(CELLS, 4, CELLS + 1, dtype=torch.float64)
        self.warm: Tensor | None = None


def observe(world: _World, theta: Params, temperature: float, *, batch: int = 100) -> Estimate:
    """One iteration: the follower responds, the leader watches `batch` steps and forms its gradient."""
    follower = follower_at(theta, temperature, world.warm)
    world.warm = follower.value
    world.counts += walk(follower.policy, batch, world.generator)
    return learned_gradient(theta, follower, world.counts, temperature)


def ascend_adam(world: _World, temperature: float, theta: Params, steps: int) -> tuple[Params, float]:
    logits = theta["logits"].clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1, maximize=True)
    value = 0.0
    for _ in range(steps):
        estimate = observe(world, {"logits": logits.detach()}, temperature)
        value, logits.grad = float(estimate.value), estimate.grad["logits"]
        optimizer.step()
    return {"logits": logits.detach()}, value


def restarts(seed: int, temperature: float, steps: int, *, runs: int = 5) -> Params:
    world = _World(seed)
    starts = [{"logits": torch.from_numpy(2.0 * world.generator.standard_normal(105))} for _ in range(runs)]
    return best_of_restarts(partial(ascend_adam, world, temperature), starts, steps)[0]


def annealed(seed: int, temperature: float, steps: int, *, hot: float = 0.05) -> Params:
    world = _World(seed)
    logits = torch.from_numpy(0.01 * world.generator.standard_normal(105))
    cooling = int(0.7 * steps)
    for k in range(1, steps + 1):
        now = annealed_temperature(k, cooling, hot, temperature)
        estimate = observe(world, {"logits": logits}, now)
        logits = natural_softmax_step(logits, estimate.grad["logits"], 0.1 if k < cooling else 0.03)
    return {"logits": logits}


def exact_adam(temperature: float, steps: int = 500) -> float:
    """Leader value after Adam 0.1 by the exact gradient from nearly uniform penalties: no remedy, no noise."""
    logits = torch.from_numpy(0.01 * np.random.default_rng(0).standard_normal(105)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1, maximize=True)
    for _ in range(steps):
        logits.grad = torch.from_numpy(oracle.exact(logits.detach().numpy(), temperature).gradient)
        optimizer.step()
    return oracle.exact(logits.detach().numpy(), temperature).value


def b_rooms_return(quick: bool) -> Iterator[Figure]:
    """Exact leader values after 2000 iterations."""
    seeds, steps = (3, 600) if quick else (10, 2000)
    for temperature in (0.001, 0.003, 0.005):
        remedy = annealed if temperature == 0.001 else restarts
        begin, values = time.process_time(), []
        for seed in range(seeds):
            theta = remedy(seed, temperature, steps)
            values.append(oracle.exact(theta["logits"].numpy(), temperature).value)
        elapsed = (time.process_time() - begin) / (seeds * steps)
        yield Figure(f"{temperature}", statistics.mean(values), "leader value", seeds, PUBLISHED[temperature])
        yield Figure(f"{temperature}-worst", min(values), "leader value", seeds)
        yield Figure(f"{temperature}-no-remedy", exact_adam(temperature), "leader value", 1)
        yield Figure(f"{temperature}-ms", 1e3 * elapsed, "ms of processor per iteration", seeds * steps)


def stopped_return(logits: Tensor, temperature: float, sweeps: int) -> Tensor:
    """The leader's value under a follower that stops after `sweeps` Bellman sweeps from zero, differentiable."""
    tables, value = four_rooms_tables({"logits": logits}), torch.zeros(CELLS, dtype=torch.float64)
    for _ in range(sweeps):
        value = temperature * torch.logsumexp((tables.follower_reward + GAMMA * KERNEL @ value) / temperature, -1)
    policy = torch.softmax((tables.follower_reward + GAMMA * KERNEL @ value) / temperature, -1)
    return policy_values(policy, tables.leader_reward, KERNEL, GAMMA)[START]


def b_suboptimal(quick: bool) -> Iterator[Figure]:
    """Theorem 1 with the exact kernel at a follower that stopped short, from zero values.

    own     cosine with the exact gradient of the leader's value under that follower, which moves with its sweeps
    best    cosine with the exact gradient under the soft optimum
    value   the leader's value under that follower
    """
    logits, temperature = oracle.trained_point()
    best = torch.from_numpy(oracle.exact(logits, temperature).gradient)
    theta = {"logits": torch.from_numpy(logits)}
    cosine = torch.nn.functional.cosine_similarity
    for sweeps in (5, 10, 25, 50, 100, 250, 500):
        tables = four_rooms_tables(theta)
        follower = soft_value_iteration(
            tables.follower_reward, KERNEL, discount=GAMMA, temperature=temperature, sweeps=sweeps
        )
        found = boltzmann_tables_gradient(
            four_rooms_tables,
            theta,
            follower.policy,
            follower.value,
            temperature=temperature,
            leader_discount=GAMMA,
            follower_discount=GAMMA,
            transition=KERNEL,
        ).grad["logits"]
        x = theta["logits"].clone().requires_grad_()
        value = stopped_return(x, temperature, sweeps)
        own = torch.autograd.grad(value, x)[0]
        yield Figure(f"{sweeps}-own", float(cosine(found, own, dim=0)), "cosine", 1)
        yield Figure(f"{sweeps}-best", float(cosine(found, best, dim=0)), "cosine", 1)
        yield Figure(f"{sweeps}-value", float(value.detach()), "leader value", 1)


if __name__ == "__main__":
    main({"b-rooms-gradient": b_rooms_gradient, "b-rooms-return": b_rooms_return, "b-suboptimal": b_suboptimal})
