"""`nu*(theta) = argmax_nu J(theta, nu)`: trust-region Newton with exact Hessian-vector products.

The step maximises `g's + s'Hs/2` over `|s| <= radius` by truncated CG (Steihaug, SIAM J. Numer. Anal. 20 (1983) 626;
Nocedal and Wright, Numerical Optimization, 2nd ed., algorithms 7.2 and 4.1), which follows negative curvature to the
boundary. A start where J curves the wrong way is first improved by L-BFGS (same book, algorithm 7.4).

Stationary means `|grad_nu J| <= tol * lambda * max(1, |nu|)`, lambda the largest curvature of -J there: the error left
in nu along that curvature is then at most tol relative to nu, whatever the units of J. Where a rollout diverges lambda
is huge in a few directions and says little of the rest; the gain that Newton's step predicts must therefore also be at
most `max(0.01 |J|, lambda (tol max(1, |nu|))^2)`. A stationary point where -J still curves below `-sqrt(tol) * lambda`
is a saddle: it is left along that direction (second-order stationarity as in Nesterov and Polyak, Math. Program. 108
(2006) 177).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.params import Params, ravel, unravel
from sim2real.solve_report import Optimum, SolveReport
from sim2real.solvers.spectrum import Spectrum, spectrum

Objective = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class _Point:
    """The cost -J at `x [P]`, its gradient, and its Hessian as a function on vectors (one cached graph)."""

    x: Tensor
    cost: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Model:
    """Truncated CG on the quadratic model: step, predicted fall of the cost, curvatures met."""

    step: Tensor
    fall: float
    lowest: float
    largest: float


def policy_optimum(
    J: Objective, theta: Params, nu0: Params, *, tol: float = 1e-10, max_steps: int = 200, warmup: int = 30
) -> Optimum:
    """Maximise `J(theta, .)` from nu0, in float64; nu has the dtype of nu0 and no graph (see `implicit_argmax`).

    `report.converged` only when the point is stationary (module docstring) and no saddle was seen; `report.residual`
    and `report.stationarity` are `|grad_nu J|`, `negative_curvature` and `eigenvalues` those of -J_nunu. `max_steps`
    counts Newton steps, `warmup` L-BFGS steps. An over-parameterised network needs a looser tol (1e-6) and, in the
    derivative, damping above the negative curvature reported. Raises `ValueError` when J is not a scalar, not
    differentiable in nu, or not finite at nu0.
    """
    if not 0 < tol < 1 or max_steps < 1 or warmup < 0:
        raise ValueError(f"need 0 < tol < 1, max_steps >= 1, warmup >= 0; got {tol}, {max_steps}, {warmup}")
    theta64 = {key: value.detach().double() for key, value in theta.items()}
    start = {key: value.detach().double() for key, value in nu0.items()}
    cost = lambda x: -J(theta64, unravel(x, start))
    point = _evaluate(cost, ravel(start))
    if not (abs(point.cost) < float("inf") and bool(torch.isfinite(point.gradient).all())):
        raise ValueError(f"J(theta, nu0) = {-point.cost} or its gradient is not finite; start from a stable policy")
    if warmup and _model(point, max(1.0, float(point.x.norm())), 0.1).lowest < 0:
        point = _lbfgs(cost, point, warmup)
    point, report = _newton(cost, point, tol, max_steps)
    nu = unravel(point.x, start)
    return Optimum({key: value.to(nu0[key].dtype) for key, value in nu.items()}, report)


def _evaluate(cost: Callable[[Tensor], Tensor], x: Tensor) -> _Point:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = cost(leaf)
        if value.numel() != 1:
            raise ValueError(f"J must return a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("J does not depend differentiably on nu")
        (gradient,) = torch.autograd.grad(value.reshape(()), leaf, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # J is linear in nu
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(gradient, leaf, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if hv is None else hv

    return _Point(leaf.detach(), float(value.detach()), gradient.detach(), product)


def _newton(cost: Callable[[Tensor], Tensor], point: _Point, tol: float, max_steps: int) -> tuple[_Point, SolveReport]:
    radius, first, largest = max(1.0, float(point.x.norm())), 0.0, 0.0
    status, steps = "", 0
    for steps in range(max_steps + 1):
        size = float(point.gradient.norm())
        first = max(first, size)
        model = _model(point, radius, min(0.1, (size / first) ** 0.5) if first > 0 else 0.1)
        largest = max(largest, model.largest)
        if size <= tol * largest * max(1.0, float(point.x.norm())):
            polished = _polish(cost, point)
            ends = _spectrum(polished)
            largest = max(ends.largest, -ends.lowest)  # here: on the way it may have been larger by powers of ten
            if _stationary(polished, largest, tol):
                point = polished
                if ends.lowest >= -(tol**0.5) * largest:
                    return point, _report(point, ends, steps, largest > 0, "stationary" if largest > 0 else "J is flat")
                status = f"at a saddle after the allowed {max_steps} steps"
                trial = min(
                    (_evaluate(cost, point.x + s * radius * ends.direction["x"]) for s in (1, -1)), key=_cost_or_inf
                )
                point, radius = (trial, radius) if trial.cost < point.cost else (point, 0.25 * radius)
                continue
        status = f"not stationary after the allowed {max_steps} steps"
        if steps == max_steps:
            break
        trial = _evaluate(cost, point.x + model.step)
        fall, length = point.cost - trial.cost, float(model.step.norm())
        # where the change of J drowns in rounding the gradient still tells a better point
        floor = 1e-12 * abs(point.cost)
        rounding = model.fall <= floor and abs(fall) <= floor
        if rounding and not float(trial.gradient.norm()) < size:
            status = "stalled: no further step changes J beyond rounding"
            break
        if not rounding and not fall >= 0.25 * model.fall:
            radius = 0.25 * length
        elif length > 0.9 * radius:
            radius = 2.0 * radius
        if rounding or fall > 1e-4 * model.fall:
            point = trial
    return point, _report(point, _spectrum(point), steps, False, status)


def _stationary(point: _Point, largest: float, tol: float) -> bool:
    reach = max(1.0, float(point.x.norm()))
    if not float(point.gradient.norm()) <= tol * largest * reach:
        return False
    return _model(point, reach, 1e-3).fall <= max(0.01 * abs(point.cost), largest * (tol * reach) ** 2)


def _cost_or_inf(point: _Point) -> float:
    return point.cost if point.cost == point.cost else float("inf")


def _model(point: _Point, radius: float, forcing: float) -> _Model:
    """Truncated CG to `forcing` times the gradient norm, cut at the radius or at negative curvature."""
    r = point.gradient
    step, hs, p = torch.zeros_like(r), torch.zeros_like(r), -r
    lowest, largest = float("inf"), 0.0
    goal = forcing * float(r.norm())
    for _ in range(min(2 * r.numel(), 200) if goal > 0 else 0):
        hp = point.product(p)
        square, curvature = float(p @ p), float(p @ hp)
        lowest, largest = min(lowest, curvature / square), max(largest, abs(curvature) / square)
        alpha = float(r @ r) / curvature if curvature > 0 else float("inf")
        if not float((step + alpha * p).norm()) < radius:
            sp, ss = float(step @ p), float(step @ step)
            alpha = (-sp + (sp * sp + square * (radius * radius - ss)) ** 0.5) / square
            step, hs = step + alpha * p, hs + alpha * hp
            break
        step, hs = step + alpha * p, hs + alpha * hp
        following = r + alpha * hp
        if float(following.norm()) <= goal:
            break
        p = -following + float(following @ following) / float(r @ r) * p
        r = following
    return _Model(step, -float(point.gradient @ step) - 0.5 * float(step @ hs), lowest, largest)


def _spectrum(point: _Point) -> Spectrum:
    return spectrum(lambda x: {"x": point.product(x["x"])}, {"x": point.x})


def _polish(cost: Callable[[Tensor], Tensor], point: _Point) -> _Point:
    """One Newton step more, which costs little and takes the last digits; kept only if the gradient shrinks."""
    trial = _evaluate(cost, point.x + _model(point, max(1.0, float(point.x.norm())), 1e-10).step)
    return trial if float(trial.gradient.norm()) < float(point.gradient.norm()) else point


def _lbfgs(cost: Callable[[Tensor], Tensor], point: _Point, max_steps: int) -> _Point:
    """L-BFGS with memory 10 and Armijo backtracking; pairs with `y's <= 0` are left out."""
    pairs: list[tuple[Tensor, Tensor]] = []
    first = float(point.gradient.norm())
    for _ in range(max_steps):
        direction, coefficients = -point.gradient, []
        for s, y in reversed(pairs):
            coefficients.append(s @ direction / (s @ y))
            direction = direction - coefficients[-1] * y
        if pairs:
            s, y = pairs[-1]
            direction = direction * (s @ y) / (y @ y)
        else:
            direction = direction / max(1.0, first)
        for (s, y), a in zip(pairs, reversed(coefficients), strict=True):
            direction = direction + (a - y @ direction / (s @ y)) * s
        slope, length, trial = float(point.gradient @ direction), 1.0, point
        for _ in range(30):
            trial = _evaluate(cost, point.x + length * direction)
            if trial.cost <= point.cost + 1e-4 * length * slope:
                break
            length *= 0.5
        if not trial.cost < point.cost:
            break
        s, y = trial.x - point.x, trial.gradient - point.gradient
        point = trial
        if float(s @ y) > 1e-12 * float(s.norm() * y.norm()):
            pairs = [*pairs[-9:], (s, y)]
        if float(point.gradient.norm()) <= 1e-3 * first:
            break
    return point


def _report(point: _Point, ends: Spectrum, steps: int, converged: bool, status: str) -> SolveReport:
    size, largest = float(point.gradient.norm()), max(ends.largest, -ends.lowest)
    return SolveReport(
        converged=converged,
        residual=size,
        steps=steps,
        status=f"{status}: gradient norm {size:.1e}, largest curvature {largest:.1e}",
        negative_curvature=ends.negative_curvature,
        stationarity=size,
        eigenvalues=(ends.lowest, largest),
    )
