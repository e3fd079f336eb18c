"""Levenberg-Marquardt inside a box, for sums of (robust) squares and any other function with a Gauss-Newton model.

At x with gradient g and model Hessian H >= 0, variables at a bound whose gradient points outward are held; the step of
the others minimises the damped model inside the box,

    s = argmin  g's + s'(H + mu D^2)s / 2   subject to   low <= x + s <= high,     D^2 = largest diag H met so far,

found by solving, fixing what leaves the box on its bound, and solving again. With the gain ratio rho = actual over
promised decrease, the step is taken when rho > 1e-4 and mu becomes mu max(1/3, 1 - (2 rho - 1)^3); otherwise
mu grows by 2, 4, 8, ... A step to a value that is not finite is refused like one that does not descend.

Soft-L1 loss: value = c^2 sum (sqrt(1 + (r/c)^2) - 1), gradient J'w r, Hessian J'w^3 J, w = 1/sqrt(1 + (r/c)^2), which
keeps the exact curvature of the loss.
References: More, The Levenberg-Marquardt algorithm: implementation and theory, 1978 (scaling); Madsen, Nielsen,
Tingleff, Methods for non-linear least squares problems, 2004, section 3.2 (damping); Bertsekas, Projected Newton
methods, SIAM J. Control Optim. 20(2), 1982 (held variables).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd

from sim2real.params import Params
from sim2real.solve_report import SolveReport
from sim2real.solvers.linear import cg

# With mu this large a scaled step moves x by rounding only.
_HOPELESS_DAMPING = 1e14
# Ridge of the undamped model, relative to its unit diagonal: a direction without curvature promises nothing.
_RIDGE = 1e-10
# A Hessian known by products: the inner solve stops here, which an inexact Newton method forgives (Nocedal, Wright,
# Numerical Optimization, 2006, section 7.1).
_INNER = {"tol": 1e-2, "max_steps": 50}
# Trial steps that together must decrease the value by more than the tolerance: a kink stops the model from promising
# little although nothing is left to gain.
_PATIENCE = 8


@dataclass(frozen=True)
class QuadraticModel:
    """`value(x + s) ~ value(x) + gradient's + s' hessian s / 2`."""

    gradient: Tensor
    """`[P]`"""
    hessian: Tensor | Callable[[Tensor], Tensor]
    """`[P, P]` positive semidefinite, or its product with a vector `[P]`"""
    diagonal: Tensor | None = None
    """`[P]` curvature scale of each variable; needed where `hessian` is a product"""
    work: Any = None
    """whatever else the caller wants to find in `Minimum.model`"""


@dataclass(frozen=True)
class Objective:
    """A function and its Gauss-Newton model; `work` is whatever computing the value leaves for the model to use."""

    value: Callable[[Tensor], tuple[Tensor, Any]]
    """x `[P]` -> value `[]`, work"""
    model: Callable[[Tensor, Any], QuadraticModel]
    """x, work -> the model at x"""


@dataclass(frozen=True)
class Minimum:
    """Where the search ended. `report.residual`: largest `|g_j| / sqrt(D_j^2 2 value)` of the variables not held."""

    x: Tensor
    value: Tensor
    held: Tensor
    """`[P]` bool: at a bound, with the gradient pointing outward"""
    report: SolveReport
    history: Tensor
    """`[steps, 4]`: value, residual and damping before each step, and 1 where the step was taken"""
    work: Any
    """of the value at x"""
    model: QuadraticModel
    """at x"""


@dataclass(frozen=True)
class _Point:
    """An iterate with its model in scaled variables u = D s, and the box as bounds on u."""

    x: Tensor
    value: Tensor
    work: Any
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    matrix: Tensor | None
    unit: Tensor
    held: Tensor
    low: Tensor
    high: Tensor
    box: tuple[Tensor, Tensor]
    """the bounds on x"""


def levenberg_marquardt(
    objective: Objective,
    x0: Tensor,
    *,
    low: Tensor | float = -float("inf"),
    high: Tensor | float = float("inf"),
    max_steps: int = 100,
    tolerance: float = 1e-12,
    damping: float = 1e-3,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> Minimum:
    """Minimise `objective` from x0 `[P]` inside the box.

    Converged: the undamped model promises a decrease below `tolerance` times the value, or the last 8 steps, not all
    of them refused, together gained less than that, or the value fell below `tolerance^2` times that of the start.
    `on_step` gets an exact snapshot after every step; a run resumed from it (`state`) is bitwise equal to the unbroken
    one. Raises `ValueError` for a start outside the box or where the value is not finite, and for a snapshot of
    another problem.
    """
    low, high = torch.as_tensor(low).to(x0).expand_as(x0), torch.as_tensor(high).to(x0).expand_as(x0)
    now = _start(x0, low, high, damping) if state is None else _checked(state, x0)
    value, work = objective.value(now["x"])
    if not bool(torch.isfinite(value)):
        raise ValueError(f"the value at the start is {float(value)}; start where the function is finite")
    if state is None:
        now["first_value"] = value
    model = objective.model(now["x"], work)
    while True:
        now["scale"] = torch.maximum(now["scale"], _diagonal(model))
        point = _scaled(now, value, work, model, low, high)
        residual = _cosine(point)
        status = _ending(point, now, tolerance, max_steps)
        if status is not None:
            break
        now, value, work, taken = _advance(objective, point, now, residual)
        if taken:
            model = objective.model(now["x"], work)
        if on_step is not None:
            on_step({key: entry.clone() for key, entry in now.items()})
    report = SolveReport(
        status.startswith("converged"), float(residual), int(now["step"]), status, damping=float(now["damping"])
    )
    return Minimum(point.x, value, point.held, report, now["history"], work, model)


def _start(x0: Tensor, low: Tensor, high: Tensor, damping: float) -> Params:
    outside = ((x0 < low) | (x0 > high) | ~torch.isfinite(x0)).nonzero().flatten().tolist()
    if outside:
        j = outside[0]
        raise ValueError(f"variable {j} starts at {float(x0[j])}, outside [{float(low[j])}, {float(high[j])}]")
    return {
        "x": x0.detach().clone(),
        "scale": torch.zeros_like(x0),
        "damping": x0.new_tensor(damping),
        "growth": x0.new_tensor(2.0),
        "step": torch.tensor(0),
        "history": x0.new_zeros(0, 4),
    }


def _checked(state: Params, x0: Tensor) -> Params:
    wanted = {"x", "scale", "damping", "growth", "step", "history", "first_value"}
    if state.keys() != wanted or state["x"].shape != x0.shape:
        raise ValueError(
            f"the snapshot holds {sorted(state)} for {tuple(state['x'].shape) if 'x' in state else 'no'} variables; "
            f"this problem needs {sorted(wanted)} for {tuple(x0.shape)}"
        )
    return dict(state)


def _diagonal(model: QuadraticModel) -> Tensor:
    if isinstance(model.hessian, Tensor):
        return model.hessian.diagonal()
    if model.diagonal is None:
        raise ValueError("a hessian given as a product needs `diagonal`, the curvature scale of each variable")
    return model.diagonal


def _scaled(now: Params, value: Tensor, work: Any, model: QuadraticModel, low: Tensor, high: Tensor) -> _Point:
    x, scale, hessian = now["x"], now["scale"], model.hessian
    unit = torch.where(scale > 0, scale, torch.ones_like(scale)).sqrt()
    if isinstance(hessian, Tensor):
        matrix = hessian / unit.outer(unit)
        product: Callable[[Tensor], Tensor] = lambda u: matrix @ u
    else:
        matrix, apply = None, hessian
        product = lambda u: apply(u / unit) / unit
    held = ((x <= low) & (model.gradient > 0)) | ((x >= high) & (model.gradient < 0))
    gradient, room = model.gradient / unit, ((low - x) * unit, (high - x) * unit)
    return _Point(x, value, work, gradient, product, matrix, unit, held, *room, box=(low, high))


def _cosine(point: _Point) -> Tensor:
    free = torch.where(point.held, torch.zeros_like(point.gradient), point.gradient)
    tiny = torch.finfo(free.dtype).tiny
    return free.abs().max() / (2 * point.value).clamp(min=tiny).sqrt()


def _ending(point: _Point, now: Params, tolerance: float, max_steps: int) -> str | None:
    """Why to stop here, None to go on; decided from the snapshot alone, so that resuming decides the same."""
    promise = -_promised(point, _free_step(point, ~point.held, torch.zeros_like(point.x), _RIDGE))
    if bool(promise <= tolerance * point.value.abs()):
        return "converged: no further decrease promised"
    if bool(point.value <= tolerance**2 * now["first_value"]):
        return "converged: the value is negligible against that of the start"
    recent = now["history"][-_PATIENCE:]
    if len(recent) == _PATIENCE and bool((recent[:, 3] > 0).any()):  # none taken: the gradient may be wrong
        before = recent[0, 0]
        if bool(before - point.value <= tolerance * point.value.abs()):
            return f"converged: the last {_PATIENCE} steps gained less than the tolerance"
    if bool(now["damping"] > _HOPELESS_DAMPING):
        return "stopped: no step decreases the value, however short; is the gradient right?"
    if int(now["step"]) >= max_steps:
        return f"stopped after {max_steps} steps"
    return None


def _advance(objective: Objective, point: _Point, now: Params, residual: Tensor) -> tuple[Params, Tensor, Any, bool]:
    """One trial step: the next snapshot, the value and work at its x, and whether the step was taken."""
    mu = now["damping"]
    step = _box_step(point, mu)
    promised = -_promised(point, step)
    x = (point.x + step / point.unit).clamp(*point.box)
    x = torch.where(step <= point.low, point.box[0], torch.where(step >= point.high, point.box[1], x))
    trial, work = objective.value(x)
    gain = (point.value - trial) / promised
    taken = bool(torch.isfinite(trial)) and bool(promised > 0) and bool(gain > 1e-4)
    row = torch.stack([point.value, residual, mu, torch.full_like(mu, float(taken))])
    following = now | {
        "x": x if taken else point.x,
        "damping": mu * (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3) if taken else mu * now["growth"],
        "growth": torch.full_like(mu, 2.0) if taken else now["growth"] * 2,
        "step": now["step"] + 1,
        "history": torch.cat([now["history"], row.unsqueeze(0)]),
    }
    return (following, trial, work, True) if taken else (following, point.value, point.work, False)


def _promised(point: _Point, step: Tensor) -> Tensor:
    return point.gradient @ step + step @ point.product(step) / 2


def _box_step(point: _Point, mu: Tensor) -> Tensor:
    """The damped step inside the box: what leaves it is fixed on its bound and the others are solved for again."""
    free, step = ~point.held, torch.zeros_like(point.x)
    for _ in range(len(step) + 1):
        step = _free_step(point, free, step, float(mu))
        outside = free & ((step < point.low) | (step > point.high))
        if not bool(outside.any()):
            break
        step = torch.minimum(torch.maximum(step, point.low), point.high)
        free = free & ~outside
    return step


def _free_step(point: _Point, free: Tensor, fixed: Tensor, mu: float) -> Tensor:
    """Minimise the damped model over the `free` variables, the others staying at `fixed`."""
    zero = torch.zeros_like(fixed)
    fixed = torch.where(free, zero, fixed)
    right = torch.where(free, -point.gradient - point.product(fixed), zero)
    if not bool(free.any()):
        return fixed
    if point.matrix is None:
        masked = lambda u: {"u": torch.where(free, point.product(torch.where(free, u["u"], zero)), zero)}
        solution = cg(masked, {"u": right}, damping=mu, tol=1e-6)
        found = solution.x["u"] if bool(solution.x["u"].any()) else right / (mu + 1)
        return fixed + torch.where(free, found, zero)
    index = free.nonzero().flatten()
    inner = point.matrix[index][:, index]
    factor, failed = torch.linalg.cholesky_ex(inner + mu * torch.eye(len(index)).to(inner))
    if bool(failed):  # the model is not positive definite: a gradient step of the damped size still descends
        return fixed + right / (mu + 1)
    return fixed.index_put((index,), torch.cholesky_solve(right[index].unsqueeze(1), factor).squeeze(1))


def soft_l1(residual: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Loss `c^2 (sqrt(1 + (r/c)^2) - 1)` and weight `1 / sqrt(1 + (r/c)^2)`, each like `residual`; None: squares."""
    if scale is None:
        return residual.square() / 2, torch.ones_like(residual)
    root = torch.sqrt(1 + (residual / scale) ** 2)
    return scale**2 * (root - 1), 1 / root


def least_squares(
    residual: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    jacobian: Callable[[Tensor], Tensor] | None = None,
    low: Tensor | float = -float("inf"),
    high: Tensor | float = float("inf"),
    loss_scale: float | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-12,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> Minimum:
    """Minimise `sum residual(x)^2 / 2`, or its soft-L1 form with `loss_scale`, inside the box.

    residual: x `[P]` -> `[R]`; jacobian: x -> `[R, P]`, forward-mode automatic differentiation when None. Options and
    errors as for `levenberg_marquardt`.
    """
    derivative = jacfwd(residual) if jacobian is None else jacobian

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        r = residual(x)
        return soft_l1(r, loss_scale)[0].sum(), r

    def model(x: Tensor, r: Tensor) -> QuadraticModel:
        J, w = derivative(x), soft_l1(r, loss_scale)[1]
        return QuadraticModel(J.mT @ (w * r), J.mT @ (w.pow(3).unsqueeze(1) * J))

    return levenberg_marquardt(
        Objective(value, model),
        x0,
        low=low,
        high=high,
        max_steps=max_steps,
        tolerance=tolerance,
        on_step=on_step,
        state=state,
    )
