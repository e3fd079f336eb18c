"""`b-sac`: the hypergradient of a design task whose follower is a network trained by soft actor-critic.

The arm of `simulators/spring_arm.py`, stepped by Warp, at its first design, temperature 0.1; gradients by the relative
change of spring, damping and gear. The leader knows the arm that it builds (pathwise sources, mean next state), its own
reward, 10 000 transitions (400 episodes), the follower's policy and the soft value of the follower's critics; its own
value is least squares on monomials of the state, to degree 4, or 2 for the linear arm. Statistics are over trainings of
the follower from new networks.

    linear-K-cosine    phi for sin(phi): cosine with the exact gradient (soft LQR, second moments) after K updates of
                       the follower; -low, -high: 95 % bounds of its mean; -error: relative, root mean square
    linear-formula-cosine   the same with the exact follower: what the leader's own sampling leaves
    arm-K-cosine, -error    the arm itself, against the exact gradient of `oracles/spring_arm.py`
    arm-naive-cosine   the direct terms alone
    arm-differences-cosine  of the leader's return under followers trained anew at 25 % more and less of each parameter,
                       same seeds and noise on both sides: cosine of their mean with the exact gradient; per parameter
                       the mean, its 95 % bounds, and the exact difference of the same width
Needs torchrl and Warp.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.oracles import spring_arm as oracle
from sim2real import default_params, rollout, sample_noise
from sim2real.estimators import (
    CriticOptions,
    boltzmann_covariance_gradient,
    inverse_noise_weights,
    naive_leader_gradient,
    transitions,
)
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import discounted_return
from sim2real.simulators.spring_arm import FOLLOWER_COST, spring_arm, spring_arm_matrices
from sim2real.solvers import SoftLQR, linear_noise_policy, soft_lqr

if TYPE_CHECKING:
    from sim2real.solvers.soft_actor_critic import LearnedFollower

TEMPERATURE = 0.1
THETA = default_params(spring_arm().follower.box)
DESIGN = np.array([float(value) for value in THETA.values()])


def task_of(linear: bool) -> LeaderTask:
    from sim2real.simulators.warp_spring_arm import warp_spring_arm

    return warp_spring_arm(linear=linear)


def train(task: LeaderTask, theta: Params, seed: int, updates: int) -> LearnedFollower:
    from sim2real.solvers.soft_actor_critic import SACSettings, soft_actor_critic

    return soft_actor_critic(
        task.follower,
        theta,
        temperature=TEMPERATURE,
        generator=torch.Generator().manual_seed(seed),
        settings=SACSettings(rounds=updates // 100),
    )


def exact_follower() -> SoftLQR:
    """The soft optimum of the linear arm."""
    A, B = spring_arm_matrices(THETA)
    rates = 0.1 * torch.tensor(FOLLOWER_COST, dtype=torch.float64)
    return soft_lqr(A, B, rates[:2].diag(), rates[2:].diag(), discount=0.9, temperature=TEMPERATURE)


def observe(task: LeaderTask, policy: Policy, nu: Params, seed: int) -> Transitions:
    """10 000 transitions with the leader's rewards."""
    noise = sample_noise(task.follower, policy, 400, 25, torch.Generator().manual_seed(seed))
    data = transitions(rollout(task.follower, policy, THETA, nu, noise))
    return replace(data, rewards=task.reward(THETA, data.states, data.actions, data.next_states))


def monomials(states: Tensor, degree: int) -> Tensor:
    angle, speed = states[:, 0], 0.5 * states[:, 1]
    return torch.stack([angle**i * speed**j for i in range(degree + 1) for j in range(degree + 1 - i)], -1)


def hypergradient(
    task: LeaderTask,
    policy: Policy,
    nu: Params,
    soft_value: Callable[[Tensor], Tensor],
    seed: int,
    *,
    degree: int,
    naive: bool = False,
) -> Tensor:
    """`[3]`, by relative changes."""
    data = observe(task, policy, nu, seed)
    critics = CriticOptions(
        kind="state",
        value_features=partial(monomials, degree=degree),
        row_weights=inverse_noise_weights(data.states, floor=0.5),
        next_state=lambda s, a: task.follower.step(THETA, s, a, s.new_zeros(len(s), 1)),
    )
    method = naive_leader_gradient if naive else boltzmann_covariance_gradient
    grad = method(task, policy, THETA, nu, data, temperature=TEMPERATURE, soft_value=soft_value, critics=critics).grad
    return torch.stack([THETA[key] * grad[key] for key in THETA]).detach()


def compared(name: str, found: Sequence[Tensor], exact: Tensor) -> Iterator[Figure]:
    """Cosines with the exact gradient, with 95 % t bounds of their mean, and the relative error."""
    every = torch.stack(list(found))
    cosines = torch.nn.functional.cosine_similarity(every, exact.unsqueeze(0)).tolist()
    mean, n = statistics.mean(cosines), len(cosines)
    margin = float(student.ppf(0.975, n - 1)) * statistics.stdev(cosines) / math.sqrt(n)
    error = float((every - exact).square().sum(-1).mean().sqrt() / exact.norm())
    for label, value in (("", mean), ("-low", mean - margin), ("-high", mean + margin), ("-worst", min(cosines))):
        yield Figure(f"{name}-cosine{label}", value, "cosine", n)
    yield Figure(f"{name}-error", error, "relative", n)


def linear_figures(seeds: int, lengths: Sequence[int]) -> Iterator[Figure]:
    """By training length, against the closed form."""
    task, best = task_of(linear=True), exact_follower()
    exact = torch.from_numpy(oracle.gradient(oracle.prepare(linear=True), DESIGN, TEMPERATURE))
    known = lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    found = [hypergradient(task, linear_noise_policy(1), best.nu, known, seed, degree=2) for seed in range(seeds)]
    yield from compared("linear-formula", found, exact)
    for updates in lengths:
        found, nats = [], []
        for seed in range(seeds):
            follower = train(task, THETA, seed, updates)
            found.append(hypergradient(task, follower.policy, follower.nu, follower.soft_value, seed, degree=2))
            nats.append(follower.report.residual)
        yield from compared(f"linear-{updates}", found, exact)
        yield Figure(f"linear-{updates}-nats", statistics.median(nats), "nats", seeds)


def arm_figures(seeds: int, updates: int) -> Iterator[Figure]:
    """The arm itself, against the grid."""
    task = task_of(linear=False)
    exact = torch.from_numpy(oracle.gradient(oracle.prepare(), DESIGN, TEMPERATURE))
    found, naive = [], []
    for seed in range(seeds):
        follower = train(task, THETA, seed, updates)
        args = (task, follower.policy, follower.nu, follower.soft_value, seed)
        found.append(hypergradient(*args, degree=4))
        naive.append(hypergradient(*args, degree=4, naive=True))
    yield from compared(f"arm-{updates}", found, exact)
    yield from compared("arm-naive", naive, exact)


def judged(task: LeaderTask, theta: Params, follower: LearnedFollower) -> float:
    """The leader's return over 4000 episodes, whose noise is the same in every call."""
    noise = sample_noise(task.follower, follower.policy, 4000, 100, torch.Generator().manual_seed(1))
    run = rollout(task.follower, follower.policy, theta, follower.nu, noise)
    flat = (run.states[:, :-1].flatten(0, 1), run.actions.flatten(0, 1), run.states[:, 1:].flatten(0, 1))
    return float(discounted_return(task.reward(theta, *flat).reshape(run.rewards.shape), task.discount).mean())


def slopes(key: str, seeds: int, updates: int, change: float) -> tuple[list[float], float]:
    """Of the leader's return along the log of one parameter: with followers trained anew, and exact at that width."""
    task, arm = task_of(linear=False), oracle.prepare()
    sides = [THETA | {key: THETA[key] * math.exp(sign * change)} for sign in (1, -1)]
    found = []
    for seed in range(seeds):
        above, below = (judged(task, theta, train(task, theta, seed, updates)) for theta in sides)
        found.append((above - below) / (2 * change))
    designs = [np.array([float(value) for value in theta.values()]) for theta in sides]
    above, below = (oracle.leader_return(arm, design, TEMPERATURE) for design in designs)
    return found, (above - below) / (2 * change)


def difference_figures(seeds: int, updates: int, *, change: float = 0.25) -> Iterator[Figure]:
    """Followers trained anew on both sides."""
    exact = torch.from_numpy(oracle.gradient(oracle.prepare(), DESIGN, TEMPERATURE))
    means = []
    for key in THETA:
        found, expected = slopes(key, seeds, updates, change)
        means.append(statistics.mean(found))
        margin = float(student.ppf(0.975, seeds - 1)) * statistics.stdev(found) / math.sqrt(seeds)
        for label, value in (("", 0.0), ("-low", -margin), ("-high", margin)):
            yield Figure(f"arm-differences-{key}{label}", means[-1] + value, "return", seeds, expected)
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(means, dtype=torch.float64), exact, dim=0)
    yield Figure("arm-differences-cosine", float(cosine), "cosine", 6 * seeds)


def b_sac(quick: bool) -> Iterator[Figure]:
    """All of it; quick: two trainings of each, short ones."""
    for module in ("torchrl", "warp"):
        if importlib.util.find_spec(module) is None:
            raise MissingError(f'{module} is not installed: pip install "sim2real[rl,warp]"')
    seeds = 2 if quick else 5
    yield from linear_figures(seeds, (300, 1000))
    yield from arm_figures(seeds, 1000)
    yield from difference_figures(2 if quick else 3, 300 if quick else 1000)


if __name__ == "__main__":
    main({"b-sac": b_sac})
