"""The freedom that the real return leaves in theta: move to the likeliest model with the same policy.

The optimal model is not unique. With N = d pi / d theta = (d pi / d nu) (d nu*/d theta) at theta, in scaled parameters
x = theta / scale, every step d with `N d = 0` leaves the policy, hence the real return, as it is to first order.
`likeliest_equal_policy` therefore solves

    maximise  l(theta)   subject to   pi(nu*(theta)) = pi_0,   low <= theta <= high,

l the log-likelihood, by sequential quadratic steps in the null space of N,

    d = argmax  l_x'd - d'L d / 2    subject to   N d = 0,  |d| <= radius,  bounds,

L the Gauss-Newton matrix of -l, each followed by corrections `d <- d - N^+ (pi(nu*(theta + d)) - pi_0)` with nu* solved
again, so that what the step changed to second order is undone, and by a check of the real return itself.

The row space of N is found from transposed products with random cotangents until they bring nothing new (Halko,
Martinsson and Tropp, SIAM Review 53 (2011) 217, algorithm 4.2), and cut at small singular values. The steps follow
Nocedal and Wright, Numerical Optimization, 2nd ed., 2006, chapter 18; feasible points after every step are those of the
generalised reduced gradient (Abadie and Carpentier, 1969).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jvp, vjp

from sim2real.params import Params, map_params, ravel, unravel
from sim2real.safe_step import safe_step
from sim2real.solve_report import Sensitivity, UnconvergedError
from sim2real.trust_region import predicted_gain
from sim2real.tune_state import Space, moved, room

Output = Callable[[Params], Tensor]
"""nu -> what the policy is, as one vector: its actions at some states, or nu itself"""
LogLikelihood = Callable[[Params], tuple[float, Tensor, Tensor]]
"""theta -> value (nat), gradient `[d]` and Gauss-Newton matrix `[d, d]` of minus the log-likelihood, in x"""


@dataclass(frozen=True)
class PolicyDirections:
    """The thin singular value decomposition `N = left diag(singular) moving'` without the negligible part."""

    moving: Tensor
    """`[d, r]` orthonormal directions of x that move the policy; their complement is the freedom"""
    singular: Tensor
    """`[r]` largest first"""
    left: Tensor
    """`[M, r]`"""
    neglected: float
    """largest singular value that was cut off, relative to the largest"""


@dataclass(frozen=True)
class Freedom:
    """How theta moved where the policy does not change."""

    theta: Params
    nu: Params
    dimension: int
    """directions of theta that are free"""
    log_likelihood: tuple[float, float]
    """before and after, nat"""
    real_return: tuple[float, float]
    """before and after, on the same data"""
    policy_change: float
    """`|pi - pi_0| / |pi_0|` that is left"""
    steps: int
    status: str
    """why it ended"""


def policy_directions(
    sensitivity: Sensitivity,
    theta: Params,
    nu: Params,
    space: Space,
    output: Output,
    *,
    rank_tol: float = 1e-6,
) -> PolicyDirections:
    """Directions of the scaled free parameters that move `output(nu*(theta))`, by products with dnu*/dtheta only.

    Directions that move it less than `rank_tol` times the strongest count as free. Costs r + 3 transposed and r plain
    products, r the rank of N. Raises `ValueError` when a product is not finite.
    """
    fixed = {key: value.detach().double() for key, value in nu.items()}
    at = output(fixed).detach()
    pull = vjp(output, fixed)[1]
    rows, silent, first = torch.zeros(len(space.scale), 0, dtype=torch.float64), 0, 0.0
    generator, fine = torch.Generator().manual_seed(0), 0.01 * min(rank_tol, 1e-4)
    while silent < 3 and rows.shape[1] < min(len(space.scale), at.numel()):
        cotangent = torch.randn(at.shape, generator=generator, dtype=torch.float64).to(at.device)
        (back,) = pull(cotangent.to(at.dtype))
        down = sensitivity.vjp(map_params(lambda g, value: g.to(value.dtype), back, nu))
        row = ravel({key: down[key] for key in space.keys}).double() * space.scale
        if not bool(torch.isfinite(row).all()):
            raise ValueError("a product with dnu*/dtheta is not finite: the null space of the policy cannot be found")
        first = max(first, float(row.norm()))
        for _ in range(2):  # twice is enough (Parlett)
            row = row - rows @ (rows.T @ row)
        size = float(row.norm())
        silent = silent + 1 if size <= fine * first else 0
        if size > fine * first:
            rows = torch.cat([rows, (row / size).unsqueeze(1)], 1)
    images = [_pushed(sensitivity, theta, fixed, nu, space, output, row) for row in rows.T]
    if not images:
        return PolicyDirections(rows, rows.new_zeros(0), rows.new_zeros(at.numel(), 0), 0.0)
    left, singular, right = torch.linalg.svd(torch.stack(images, 1), full_matrices=False)
    kept = singular > rank_tol * singular[0]
    neglected = float(singular[~kept].max() / singular[0]) if bool((~kept).any()) else 0.0
    return PolicyDirections((rows @ right.T)[:, kept], singular[kept], left[:, kept], neglected)


def _pushed(
    sensitivity: Sensitivity, theta: Params, fixed: Params, nu: Params, space: Space, output: Output, row: Tensor
) -> Tensor:
    """`N row`, flat."""
    free = {key: theta[key] for key in space.keys}
    step = unravel(row * space.scale, free)
    tangent = {key: step[key].to(v.dtype) if key in step else torch.zeros_like(v) for key, v in theta.items()}
    pushed = sensitivity.jvp(tangent)
    change = jvp(output, (fixed,), ({key: pushed[key].double() for key in fixed},))[1]
    return change.reshape(-1)


def free_step(gradient: Tensor, curvature: Tensor, moving: Tensor, low: Tensor, high: Tensor, radius: float) -> Tensor:
    """argmax of `g'd - d'L d / 2` over `moving'd = 0`, `|d| <= radius`, `low <= d <= high`; all in x, `[d]`.

    Raises `ValueError` for what is not finite.
    """
    if not bool(torch.isfinite(gradient).all() & torch.isfinite(curvature).all()):
        raise ValueError("the log-likelihood has a gradient or a curvature that is not finite")
    free = complement(moving)
    if not free.shape[1]:
        return torch.zeros_like(gradient)
    slopes, margins = torch.cat([free, -free]), torch.cat([-low, high])
    near, far = torch.isfinite(margins), gradient.new_full((free.shape[1],), torch.inf)
    along, bent = free.T @ gradient, free.T @ curvature @ free
    found = safe_step(along, bent, radius, -far, far, margins[near], slopes[near])
    return (free @ found.step).clamp(low, high)


def complement(columns: Tensor) -> Tensor:
    """Orthonormal basis `[d, d - rank]` of what is orthogonal to `columns [d, k]` (not nec. independent)."""
    left, singular, _ = torch.linalg.svd(columns, full_matrices=True)
    rank = int((singular > 1e-12 * singular.max()).sum()) if singular.numel() else 0
    return left[:, rank:]


@dataclass(frozen=True)
class EqualPolicies:
    """The problem of `likeliest_equal_policy`, as functions."""

    space: Space
    log_likelihood: LogLikelihood
    optimum: Callable[[Params, Params], Params]
    """theta, nu0 -> nu*(theta)"""
    sensitivity: Callable[[Params, Params], Sensitivity]
    """theta, nu* -> dnu*/dtheta"""
    real_return: Callable[[Params], float]
    """nu -> J_real, always on the same data"""
    output: Output = ravel
    """what is held: nu itself, or what of it can be seen, when different nu are the same policy"""


@dataclass(frozen=True)
class _Place:
    """A theta whose policy is that of the start, up to `change`."""

    theta: Params
    nu: Params
    value: float
    change: float
    real: float


def likeliest_equal_policy(
    problem: EqualPolicies,
    theta: Params,
    nu: Params,
    *,
    rank_tol: float = 1e-6,
    policy_tol: float = 1e-7,
    return_tol: float = 1e-6,
    tol: float = 1e-9,
    radius: float = 1.0,
    max_steps: int = 100,
) -> Freedom:
    """Maximise the log-likelihood over the theta whose in-sim optimal policy is `nu` (module docstring).

    A step is taken when the likelihood grows, the policy is the start's to `policy_tol` (relative) and the real return
    no more than `return_tol |J_real|` below the start's. Ends when a step promises less than `tol` nat, or after
    `max_steps`. A theta whose optimum cannot be found only shortens the step; problems at the start itself raise.
    """
    goal = _seen(problem, nu)
    place = _Place(theta, nu, problem.log_likelihood(theta)[0], 0.0, problem.real_return(nu))
    first, lowest = place, place.real - return_tol * abs(place.real)
    status, steps, dimension, stale = f"stopped after the allowed {max_steps} steps", 0, 0, True
    for steps in range(max_steps + 1):
        if stale:
            known = problem.sensitivity(place.theta, place.nu)
            directions = policy_directions(
                known, place.theta, place.nu, problem.space, problem.output, rank_tol=rank_tol
            )
            dimension = len(problem.space.scale) - len(directions.singular)
        _, gradient, curvature = problem.log_likelihood(place.theta)
        step = free_step(gradient, curvature, directions.moving, *room(problem.space, place.theta), radius)
        promised = predicted_gain(gradient, curvature, step)
        if promised <= tol:
            status = f"converged: no free direction promises more than {tol:.1e} nat"
            break
        if steps == max_steps or radius < 1e-9:
            status = status if steps == max_steps else f"stopped: no gain within a radius of {radius:.1e}"
            break
        trial = _corrected(problem, place, step, goal, directions, policy_tol)
        gain = trial.value - place.value if trial.change <= policy_tol and trial.real >= lowest else -math.inf
        stale = gain > 1e-4 * promised
        if stale:
            place, radius = trial, 2 * radius if gain > 0.75 * promised else radius
        else:
            radius = 0.3 * min(radius, float(step.norm()))
    likelihoods, returns = (first.value, place.value), (first.real, place.real)
    return Freedom(place.theta, place.nu, dimension, likelihoods, returns, place.change, steps, status)


def _seen(problem: EqualPolicies, nu: Params) -> Tensor:
    return problem.output({key: value.detach().double() for key, value in nu.items()}).detach()


def _corrected(
    problem: EqualPolicies,
    place: _Place,
    step: Tensor,
    goal: Tensor,
    directions: PolicyDirections,
    policy_tol: float,
) -> _Place:
    """`place` after the step, brought back to the policy `goal` by simplified Newton steps in the row space of N."""
    theta, nu, change = moved(problem.space, place.theta, step), place.nu, math.inf
    for _ in range(20):
        try:
            nu = problem.optimum(theta, nu)
        except (ValueError, UnconvergedError, torch.linalg.LinAlgError):
            return replace(place, change=math.inf)
        gap = _seen(problem, nu) - goal
        before, change = change, float(gap.norm() / goal.norm().clamp(min=1e-300))
        if change <= 0.1 * policy_tol or not change < 0.9 * before:
            break
        back = directions.moving @ ((directions.left.T @ gap) / directions.singular)
        theta = moved(problem.space, theta, -back)
    if change > policy_tol:
        return replace(place, change=change)
    return _Place(theta, nu, problem.log_likelihood(theta)[0], change, problem.real_return(nu))
