"""Safety constraints in `tune`, and training on draws from the posterior, on exact linear-quadratic problems.

World: a double integrator with noise; model: damping and input gain theta = (d, b) of a deterministic one, whose
optimal gain K*(theta) runs in the world. The discounted mean square of the input must stay below 2; the best gain
without that limit needs 3.6.

`s-safety`, against scipy's SLSQP on functions of scipy alone:

    exact-gap          relative loss of return of `tune` with exact margins against the constrained optimum
    exact-violation    by how much its theta violates the limit, relative to it
    coverage-48, -200  share of logs of so many episodes whose upper limit of the input's mean square, at 95 %
                       confidence, is not exceeded by the true one
    violations-95, -50 share of runs of `tune` from rollouts that end above the limit in truth, with that confidence
    loss-95, -50       median relative loss of return of those runs against the constrained optimum

`s-randomization`: the gain trained on one theta, on draws from its posterior, and on the worst fifth of them, each run
in 2000 other draws: relative gain in the mean and in the worst fifth of the return against the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov
from scipy.optimize import minimize
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from sim2real.bounds import Box
from sim2real.domain_randomization import randomized_objective, standard_draws
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.mdp import sample_noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy, linear_policy
from sim2real.rollout import Rollout, rollout
from sim2real.safety import Constraint, Margin, constraint_gradient
from sim2real.simulators.linear_gaussian import linear_gaussian
from sim2real.solvers.optimum import policy_optimum
from sim2real.solvers.riccati import lyapunov, riccati
from sim2real.tune_state import TuneSettings
from sim2real.tuning import TuneResult, tune

A, B = np.array([[1.0, 0.2], [0.0, 1.0]]), np.array([[0.0], [0.3]])
COST, EFFORT, GAMMA, LIMIT = np.diag([1.0, 0.1]), np.array([[0.01]]), 0.95, 2.0
NOISE, LOW, HIGH, START = 0.05, (0.5, 0.05), (1.3, 2.0), (1.0, 0.3)
BOX = Box(low=dict(zip("db", LOW, strict=True)), high=dict(zip("db", HIGH, strict=True)))
WORLD = replace(
    linear_gaussian(*map(torch.tensor, (A, B)), noise_covariance=NOISE * torch.eye(2).double(), discount=GAMMA), box=BOX
)
TRUTH = {"A": torch.tensor(A), "B": torch.tensor(B)}


def reward(s: Tensor, a: Tensor, following: Tensor) -> Tensor:
    """Of the real task."""
    return -((s @ torch.tensor(COST)) * s).sum(-1) - ((a @ torch.tensor(EFFORT)) * a).sum(-1)


def scipy_return(theta: np.ndarray) -> tuple[float, float]:
    """Real return of the model's optimal gain, and the margin of the limit on the input's mean square."""
    model_A, model_B = np.array([[1.0, 0.2], [0.0, theta[0]]]), np.array([[0.0], [theta[1]]])
    P = solve_discrete_are(np.sqrt(GAMMA) * model_A, np.sqrt(GAMMA) * model_B, COST, EFFORT)
    K = GAMMA * np.linalg.solve(EFFORT + GAMMA * model_B.T @ P @ model_B, model_B.T @ P @ model_A)
    start = (1 + GAMMA / (1 - GAMMA) * NOISE) * np.eye(2)
    X = solve_discrete_lyapunov(np.sqrt(GAMMA) * (A - B @ K), start)
    return -float(((COST + K.T @ EFFORT @ K) * X).sum()), LIMIT - (1 - GAMMA) * float((K @ X @ K.T)[0, 0])


def scipy_optimum() -> tuple[np.ndarray, float]:
    """theta and return of the constrained optimum."""
    found = minimize(
        lambda t: -scipy_return(t)[0],
        np.array([0.9, 0.6]),
        bounds=list(zip(LOW, HIGH, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda t: scipy_return(t)[1]}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x, -float(found.fun)


def matrices(theta: Params) -> tuple[Tensor, Tensor]:
    """A and B of the model."""
    zero, one = torch.zeros_like(theta["d"]), torch.ones_like(theta["d"])
    model_A = torch.stack([torch.stack([one, 0.2 * one]), torch.stack([zero, theta["d"]])])
    return model_A, torch.stack([zero, theta["b"]]).unsqueeze(-1)


def model_gain(theta: Params, nu: Params) -> Params:
    """K*(theta)."""
    return {"gain": riccati(*matrices(theta), *map(torch.tensor, (COST, EFFORT)), GAMMA)[1].detach()}


def model_return(theta: Params, nu: Params) -> Tensor:
    """`-tr P` of a gain in the model."""
    model_A, model_B = matrices(theta)
    K = nu["gain"]
    stage = torch.tensor(COST) + K.mT @ torch.tensor(EFFORT) @ K
    return -lyapunov(model_A - model_B @ K, stage, GAMMA).diagonal().sum()


def finite_return(theta: Params, nu: Params) -> Tensor:
    """The same over 60 steps: finite for every gain."""
    model_A, model_B = matrices(theta)
    K, X, total = nu["gain"], torch.eye(2).double(), torch.zeros(()).double()
    stage = torch.tensor(COST) + K.mT @ torch.tensor(EFFORT) @ K
    for t in range(60):
        total = total - GAMMA**t * (stage * X).sum()
        X = (model_A - model_B @ K) @ X @ (model_A - model_B @ K).mT
    return total


def moment(K: Tensor) -> Tensor:
    """Discounted second moment of the world's states under the gain."""
    start = (1 + GAMMA / (1 - GAMMA) * NOISE) * torch.eye(2).double()
    return lyapunov((torch.tensor(A) - torch.tensor(B) @ K).mT, start, GAMMA)


def world_return(K: Tensor) -> Tensor:
    """Exact real return."""
    return -((torch.tensor(COST) + K.mT @ torch.tensor(EFFORT) @ K) * moment(K)).sum()


def mean_square(K: Tensor) -> Tensor:
    """Exact discounted mean square of the input."""
    return (1 - GAMMA) * (K @ moment(K) @ K.mT).sum()


def exact_gradient(policy: Policy, nu: Params, log: Any, **_: Any) -> Estimate:
    """Real return and its gradient in the gain."""
    K = nu["gain"].detach().requires_grad_()
    value = world_return(K)
    return Estimate(value.detach(), {"gain": torch.autograd.grad(value, K)[0]})


def exact_margin(nu: Params, data: Any) -> Margin:
    """Margin of the limit and its gradient in the gain."""
    K = nu["gain"].detach().requires_grad_()
    value = mean_square(K)
    grad = {"gain": -torch.autograd.grad(value, K)[0]}
    return Margin(LIMIT - value.detach(), grad, value.detach(), torch.zeros(()).double())


def start_theta() -> Params:
    """Where `tune` begins: the world's own damping and gain."""
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in zip("db", START, strict=True)}


def record(policy: Policy, nu: Params, iteration: int, generator: torch.Generator, *, episodes: int = 100) -> Rollout:
    """Exploring rollouts of 40 steps in the world."""
    acting = linear_policy(1, std=0.5)
    return rollout(WORLD, acting, TRUTH, nu, sample_noise(WORLD, acting, episodes, 40, generator))


def tuned(confidence: float | None, seed: int, steps: int) -> TuneResult:
    """`tune` with exact margins and gradients (confidence None), or from rollouts."""
    effort = Constraint("effort", lambda s, a, s_next: a.square().sum(-1), LIMIT, discount=GAMMA)
    policy, theta = linear_policy(1), start_theta()
    call = partial(
        tune,
        WORLD,
        policy,
        theta,
        model_gain(theta, {}),
        noise=None,
        real_discount=GAMMA,
        objective=model_return,
        optimum=model_gain,
        generator=torch.Generator().manual_seed(seed),
        settings=TuneSettings(max_steps=steps, radius=1.0, gradient_tol=1e-7),
        scale={"d": torch.tensor(0.05).double(), "b": torch.tensor(0.05).double()},
    )
    if confidence is None:
        exact = {"gradient": exact_gradient, "constraints": {"effort": exact_margin}}
        return call(log=record(policy, model_gain(theta, {}), 0, torch.Generator()), real_reward=reward, **exact)
    limit = replace(effort, confidence=confidence)
    margin = lambda nu, data: constraint_gradient(limit, policy, nu, data)
    return call(log=None, real_reward=reward, collect=record, constraints={"effort": margin})


def coverage(episodes: int, count: int) -> float:
    """Share of logs whose 95 % upper limit of the input's mean square is above the true one."""
    effort = Constraint("effort", lambda s, a, s_next: a.square().sum(-1), LIMIT, discount=GAMMA)
    nu, policy = model_gain(start_theta(), {}), linear_policy(1)
    truth, hits = float(mean_square(nu["gain"])), 0
    for seed in range(count):
        log: Transitions = transitions(
            record(policy, nu, 0, torch.Generator().manual_seed(seed), episodes=episodes), reward
        )
        hits += LIMIT - float(constraint_gradient(effort, policy, nu, log).value) >= truth
    return hits / count


def s_safety(quick: bool) -> Iterator[Figure]:
    """See the module docstring."""
    best, steps, seeds = scipy_optimum()[1], 10, 4 if quick else 20
    exact = tuned(None, 0, 60)
    value, margin = scipy_return(np.array([float(exact.theta[key]) for key in "db"]))
    yield Figure("exact-gap", abs(value - best) / abs(best), "1", len(exact.history))
    yield Figure("exact-violation", max(0.0, -margin) / LIMIT, "1", len(exact.history))
    for episodes in (48, 200):
        count = 100 if quick else 1000
        yield Figure(f"coverage-{episodes}", coverage(episodes, count), "1", count, 0.95)
    for confidence in (0.95, 0.5):
        gains = [tuned(confidence, seed, steps).nu["gain"] for seed in range(seeds)]
        over = [float(mean_square(K)) > LIMIT for K in gains]
        losses = [(best - float(world_return(K))) / abs(best) for K in gains]
        yield Figure(f"violations-{100 * confidence:.0f}", sum(over) / seeds, "1", seeds)
        yield Figure(f"loss-{100 * confidence:.0f}", float(np.median(losses)), "1", seeds)


def s_randomization(quick: bool) -> Iterator[Figure]:
    """See the module docstring."""
    theta, factor = start_theta(), torch.tensor([[0.07, 0.0], [0.0, 0.07]]).double()
    generator = torch.Generator().manual_seed(0)
    draws = standard_draws(64, 2, generator)  # a fifth of 16 is too few: its best gain loses other draws
    kinds = {"nominal": None, "posterior": 1.0, "worst-fifth": 0.2}
    start, gains = model_gain(theta, {}), {}
    box = Box(low={"b": 0.05})
    for name, tail in kinds.items():
        J = finite_return
        if tail is not None:
            J = randomized_objective(finite_return, ("d", "b"), draws, factor=factor, box=box, tail=tail, batch="vmap")
        gains[name] = policy_optimum(J, theta, start, tol=1e-6).nu
        start = gains[name]
    others = standard_draws(200 if quick else 2000, 2, generator)
    returns = {}
    for name, nu in gains.items():
        judge = randomized_objective(finite_return, ("d", "b"), others, factor=factor, box=box, batch="vmap")
        worst = randomized_objective(finite_return, ("d", "b"), others, factor=factor, box=box, tail=0.2, batch="vmap")
        returns[name] = float(judge(theta, nu)), float(worst(theta, nu))
    for name in ("posterior", "worst-fifth"):
        for which, label in enumerate(("mean", "tail")):
            gain = (returns[name][which] - returns["nominal"][which]) / abs(returns["nominal"][which])
            yield Figure(f"{name}-{label}", gain, "1", len(others))


if __name__ == "__main__":
    main({"s-safety": s_safety, "s-randomization": s_randomization})
