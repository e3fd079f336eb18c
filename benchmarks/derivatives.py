"""Derivatives of every torch simulator: gradcheck, gradgradcheck, and rollout gradients against central differences.

A random case draws theta, the start, a linear policy with per-step action offsets, and a horizon; its return is
differentiated with respect to all of them at once. The reference is Romberg's extrapolation of central differences in
float64, steps halved from 1/8 of each variable's scale down, the entry of smallest estimated error taken (Ridders,
Accurate computation of F'(x) and F'(x) F''(x), Advances in Engineering Software 4(2), 1982, 75-76).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from sim2real import ModelMDP, Noise, Params, default_params, discounted_return, linear_policy, ravel, rollout, unravel
from sim2real.simulators import (
    battery,
    building_rc,
    cartpole,
    double_pendulum,
    dynamic_bicycle,
    kinematic_bicycle,
    linear_gaussian,
    multiplicative_noise_lqr,
    pendulum,
    planar_quadrotor,
)

RTOL = 1e-6
"""the bar: |gradient - reference| <= RTOL |reference| + ATOL (1 + |return|) / scale, entry by entry"""
ATOL = 1e-10
"""rounding of the reference where an entry is 0 or nearly so, in units of the return per scale of the variable"""
LEVELS = 16


@dataclass(frozen=True)
class Case:
    """A simulator with the scales from which random problems are drawn: deviations of theta, state, action, input."""

    mdp: ModelMDP
    theta: Params
    spread: float
    """relative: every theta entry is drawn uniformly from value * (1 +- spread)"""
    action_scale: float
    input_mean: float = 0.0
    input_std: float = 0.0


def simulator_cases() -> dict[str, Case]:
    """Every simulator and every integrator, each at parameters of a real or plausible system."""
    seed = torch.Generator().manual_seed(7)
    A = 0.5 * torch.randn(3, 3, generator=seed, dtype=torch.float64)
    B = torch.randn(3, 2, generator=seed, dtype=torch.float64)
    W = 0.1 * torch.eye(3, dtype=torch.float64) + 0.02
    rig = {"b1": 0.005, "b2": 0.003, "cf1": 0.1, "cf2": 0.08, "torque_offset1": 0.01, "torque_offset2": -0.02}
    bench = {"coulomb": 0.1, "torque_offset": 0.05}
    cases = {}
    for integrator in ("semi_implicit", "midpoint", "rk4"):
        cases[f"pendulum {integrator}"] = _case(pendulum(integrator=integrator, initial_std=1.0), 3.0, bench)
        model = double_pendulum(integrator=integrator, initial_std=1.0)
        cases[f"double pendulum {integrator}"] = _case(model, 1.0, rig)
        cases[f"cart-pole {integrator}"] = _case(cartpole(integrator=integrator, initial_std=0.5), 3.0)
    model = double_pendulum(parameters="physical", integrator="rk4", substeps=2, initial_std=1.0)
    cases["double pendulum physical"] = _case(model, 1.0, rig)
    for order in (1, 2, 3):
        cases[f"house {order}"] = _house(building_rc(order, initial_std=2.0))
    for scheme in ("midpoint", "rk4"):
        cases[f"house 3 {scheme}"] = _house(building_rc(3, initial_std=2.0, integrator=scheme, substeps=8))
    model = linear_gaussian(A, B, noise_covariance=W)
    cases["linear Gaussian"] = _case(model, 1.0, {"noise_scale": 0.7})
    cases["multiplicative noise"] = _case(multiplicative_noise_lqr(A, B, 0.5, noise_covariance=W), 1.0)
    cases["planar quadrotor"] = _case(planar_quadrotor(initial_std=0.3), 0.5)
    road = {"steering_offset": 0.02, "drag": 0.1}
    cases["kinematic bicycle"] = _case(kinematic_bicycle(initial_std=0.3), 1.0, road)
    cases["dynamic bicycle"] = _case(dynamic_bicycle(initial_std=0.3), 1.0, road | {"curvature": -0.5})
    cases["battery"] = _case(battery(), 0.2, {"mean": 0.02})
    return cases


def _case(mdp: ModelMDP, action_scale: float, changes: dict[str, float] | None = None) -> Case:
    changed = {key: torch.tensor(value, dtype=torch.float64) for key, value in (changes or {}).items()}
    return Case(mdp, default_params(mdp.box) | changed, spread=0.2, action_scale=action_scale)


def _house(mdp: ModelMDP) -> Case:
    return replace(_case(mdp, 20.0), input_mean=5.0, input_std=5.0)


@dataclass(frozen=True)
class Problem:
    """One random case: `value(x [N, P]) -> [N]` is the return as a function of all variables, each of its own scale."""

    value: Callable[[Tensor], Tensor]
    x: Tensor
    scale: Tensor


def random_problem(case: Case, generator: torch.Generator) -> Problem:
    """Draw theta, policy, start, noise and horizon (1 to 40 steps) of a case."""
    mdp, m, n = case.mdp, len(case.mdp.names["action"]), case.mdp.noise_dims[0]
    horizon = int(torch.randint(1, 41, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def jitter(value: Tensor) -> Tensor:
        return value * (1.0 + case.spread * (2.0 * torch.rand(value.shape, generator=generator) - 1.0))

    variables = {f"theta.{key}": jitter(value) for key, value in case.theta.items()}
    variables |= {"gain": 0.1 * case.action_scale * normal(m, n), "offset": case.action_scale * normal(m)}
    variables |= {"start": normal(n), "push": case.action_scale * normal(horizon, m)}
    e = normal(horizon, mdp.noise_dims[1])
    if mdp.exogenous_dim:
        e = case.input_mean + case.input_std * e
    policy = linear_policy(m, std=1.0)

    def value(x: Tensor) -> Tensor:
        parts = unravel(x, variables)
        theta = {key.removeprefix("theta."): part for key, part in parts.items() if key.startswith("theta.")}
        nu = {"gain": parts["gain"], "offset": parts["offset"]}
        noise = Noise(parts["start"], e.expand(x.shape[0], -1, -1), parts["push"])
        return discounted_return(rollout(mdp, policy, theta, nu, noise).rewards, mdp.discount)

    x = ravel(variables)
    # an absolute floor keeps the step of a variable that happens to be near 0 from vanishing
    floor = ravel({key: part.abs().mean().expand(part.shape) for key, part in variables.items()})
    return Problem(value, x, torch.maximum(x.abs(), floor))


def romberg_gradient(value: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient `[P]` by extrapolated central differences, and the estimate of its error."""
    steps = 0.125 * 0.5 ** torch.arange(LEVELS, dtype=x.dtype)
    offsets = steps[:, None, None] * torch.diag(scale)
    ends = value(torch.cat([x + offsets, x - offsets]).reshape(-1, x.shape[0])).reshape(2, LEVELS, -1)
    column = (ends[0] - ends[1]) / (2.0 * steps[:, None] * scale)
    best, error = column[-1], torch.full_like(scale, float("inf"))
    for order in range(1, 6):
        finer = column[1:] + (column[1:] - column[:-1]) / (4.0**order - 1.0)
        doubt = torch.maximum((finer - column[1:]).abs(), (finer - column[:-1]).abs())
        smallest, row = doubt.min(0)
        candidate = finer.gather(0, row.unsqueeze(0)).squeeze(0)
        best, error = torch.where(smallest < error, candidate, best), torch.minimum(error, smallest)
        column = finer
    return best, error


def gradient_error(problem: Problem) -> float:
    """Largest |gradient - reference| of a problem in units of what is allowed: above 1 is a failure."""
    x = problem.x.clone().requires_grad_()
    value = problem.value(x.unsqueeze(0))[0]
    (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        reference, _ = romberg_gradient(problem.value, problem.x, problem.scale)
        allowed = RTOL * reference.abs() + ATOL * (1.0 + value.abs()) / problem.scale
        error = (gradient - reference).abs() / allowed
    return float(torch.where(error.isfinite(), error, float("inf")).max())


def step_derivatives_hold(case: Case, generator: torch.Generator) -> bool:
    """gradcheck and gradgradcheck of step and reward in theta, state, action and e, at one random point.

    theta is in units of its own value: gradcheck's fixed step of 1e-6 would be 2 % of a rotor inertia in kg m^2.
    """
    mdp, m = case.mdp, len(case.mdp.names["action"])
    k0, k = mdp.noise_dims
    start = torch.randn(1, k0, generator=generator, dtype=torch.float64)
    action = case.action_scale * torch.randn(1, m, generator=generator, dtype=torch.float64)
    e = case.input_mean + (case.input_std or 1.0) * torch.randn(1, k, generator=generator, dtype=torch.float64)
    relative = [torch.ones_like(value) for value in case.theta.values()]

    def step_and_reward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        theta = {key: case.theta[key] * x for key, x in zip(case.theta, inputs[:-3], strict=True)}
        s, a, e = inputs[-3:]
        following = mdp.step(theta, s, a, e)
        return following, mdp.reward(theta, s, a, e, following)

    points = (*relative, mdp.initial_state(case.theta, start), action, e)
    inputs = tuple(value.clone().requires_grad_() for value in points)
    with torch.random.fork_rng():  # gradgradcheck draws its cotangents from the global generator
        torch.manual_seed(0)
        first = gradcheck(step_and_reward, inputs, raise_exception=False)
        return first and gradgradcheck(step_and_reward, inputs, raise_exception=False)


def derivative_failures(quick: bool) -> Iterator[Figure]:
    """The bar derivatives/failures: 200 rollout gradients and 10 gradcheck points per simulator (quick: 20 and 2)."""
    gradients, points = (20, 2) if quick else (200, 10)
    generator = torch.Generator().manual_seed(0)
    failures, total, worst = 0, 0, 0.0
    for case in simulator_cases().values():
        errors = [gradient_error(random_problem(case, generator)) for _ in range(gradients)]
        held = [step_derivatives_hold(case, generator) for _ in range(points)]
        failures += sum(error > 1.0 for error in errors) + held.count(False)
        total += gradients + points
        worst = max(worst, *errors)
    yield Figure("failures", failures, "cases", total)
    yield Figure("worst", RTOL * worst, "relative error", total)


if __name__ == "__main__":
    main({"derivatives": derivative_failures})
