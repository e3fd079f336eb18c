"""Quadratic programs whose minimiser is smooth: inequalities as logarithmic barriers, on the central path.

    x = argmin_x  x'H x / 2 + g'x - mu sum_i log(h_i - G_i x)   subject to   A x = b

Equivalently the optimality conditions of the program with `s_i z_i = mu` in place of complementarity, s = h - G x (Boyd
and Vandenberghe, Convex Optimization, 2004, section 11.2). x is strictly inside, its cost at most mu times the number
of rows above the program's, and it has derivatives of every order in all data: no kinks where active sets change. So a
return that averages over few states stays differentiable, and its maxima are stationary. mu has the units of the cost.

Derivative: with W = mu / s^2, r = dH x + dg + dA'y + dG'z + G'W (dG x - dh) and t = dA x - db,

    [[H + G'W G, A'], [A, 0]] (dx, dy) = -(r, t),

one solve per product made of plain operations, so derivatives of every order exist.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals, saved
from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.convex import InfeasibleError
from sim2real.solvers.interior_point import (
    Point,
    Program,
    apply,
    balance,
    central_path_step,
    first_point,
    residual,
    rows,
)
from sim2real.solvers.qp import (
    OnFailure,
    QPOptions,
    QPSolution,
    Solve,
    check_on_failure,
    check_program,
    complete_program,
)
from sim2real.solvers.qp_solve import INFEASIBLE, SOLVED, UNBOUNDED, UNCONVERGED, explain, present


def smooth_qp(
    H: Tensor,
    g: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    smoothing: float,
    tol: float = 1e-10,
    max_steps: int = 60,
    strict: bool = False,
    on_failure: OnFailure = "raise",
) -> QPSolution:
    """`qp` with barriers of weight mu = `smoothing` > 0 (in units of the cost) instead of inequalities.

    Shapes, failures and options as in `qp`. The inequalities need an interior: a program without one does not converge,
    and neither does one with so little smoothing that the distance to a bound is lost to rounding.
    In the solution `active` is False, `unique` True and `margin` inf everywhere, because there are no kinks.
    """
    if not (0 < tol < 1 and max_steps >= 1 and 0 < smoothing < math.inf):
        raise ValueError(
            f"tol must lie in (0, 1), max_steps be at least 1 and smoothing be positive, got {tol}, {max_steps} and "
            f"{smoothing}"
        )
    check_on_failure(on_failure)
    inputs = complete_program(H, g, A, b, G, h)
    rows_given = inputs[5].shape[-1]
    inputs = [*inputs[:4], *present(*inputs[4:])]
    options = QPOptions(tol, max_steps, strict, on_failure)
    x, y, _, status, error = _SmoothQP.apply(options, smoothing, *inputs)
    slack = inputs[5] - apply(inputs[4], x)
    z = smoothing / torch.where((inputs[4] == 0).all(-1), math.inf, slack)[..., :rows_given]
    none = torch.zeros_like(status, dtype=torch.bool)
    return QPSolution(
        x=x.to(g.dtype),
        equality_multipliers=y.to(g.dtype),
        inequality_multipliers=z.to(g.dtype),
        active=none.unsqueeze(-1).expand(z.shape),
        converged=status == SOLVED,
        infeasible=status == INFEASIBLE,
        unbounded=status == UNBOUNDED,
        ray=torch.zeros_like(g).expand(x.shape),
        unique=~none,
        residual=error,
        margin=torch.full_like(error, math.inf),
    )


class _SmoothQP(torch.autograd.Function):
    """options, mu, H, g, A, b, G, h (equal leading dimensions) -> x, y, scale of the system, status, residual."""

    @staticmethod
    def forward(options: QPOptions, mu: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        lead = inputs[1].shape[:-1]
        flat = Program(*(value.reshape((math.prod(lead), *value.shape[len(lead) :])) for value in inputs))
        check_program(flat)
        found = _solve(flat, mu, options)
        _complain(found[3], found[4], options)
        return tuple(value.reshape((*lead, *value.shape[1:])).clone() for value in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.mu = inputs[1]
        kept = (inputs[2], inputs[4], inputs[6], inputs[7], *output[:4])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        kept = saved(ctx)
        system, x, y, z, W = _system(kept, ctx.mu)
        u, q = system(grads[0], grads[1])
        pulled = W * apply(kept[2], u)
        outer = lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2)
        dA, dG = -(outer(y, u) + outer(q, x)), -(outer(z, u) + outer(pulled, x))
        return None, None, -outer(u, x), -u, dA, q, dG, pulled

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = primals(ctx)
        H, A, G = kept[:3]
        system, x, y, z, W = _system(kept, ctx.mu)
        like = (H, x, A, A[..., 0], G, G[..., 0])
        dH, dg, dA, db, dG, dh = (torch.zeros_like(v) if d is None else d for d, v in zip(tangents, like, strict=True))
        force = apply(dH, x) + dg + apply(dA.mT, y) + apply(dG.mT, z) + apply(G.mT, W * (apply(dG, x) - dh))
        dx, dy = system(-force, db - apply(dA, x))
        return dx.clone(), dy.clone(), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], options: QPOptions, mu: float, *inputs: Tensor) -> Any:
        batched = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(inputs, in_dims[2:], strict=True)
        )
        return _SmoothQP.apply(options, mu, *batched), (0,) * 5


def _system(kept: tuple[Tensor, ...], mu: float) -> tuple[Solve, Tensor, Tensor, Tensor, Tensor]:
    """Solver of `[[H + G'W G, A'], [A, 0]] (u, q) = (p, r)`, x, y, z and W; zeros where there is no solution."""
    H, A, G, h, x, y, scale, status = kept
    solved, n = (status <= UNCONVERGED).unsqueeze(-1), x.shape[-1]
    x, y = torch.where(solved, x, 0.0), torch.where(solved, y, 0.0)
    slack = torch.where(solved, h - apply(G, x), 1.0)
    z = mu / slack
    W = z / slack
    corner = torch.zeros(*A.shape[:-1], A.shape[-2], dtype=A.dtype, device=A.device)
    matrix = torch.cat([torch.cat([H + G.mT @ (W.unsqueeze(-1) * G), A.mT], -1), torch.cat([A, corner], -1)], -2)
    matrix = scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)
    eye = torch.eye(matrix.shape[-1], dtype=H.dtype, device=H.device)
    # inv, not linalg.solve, whose derivatives are wrong in nested forward mode: pytorch/pytorch issue 192540
    inverse = torch.linalg.inv(torch.where(solved.unsqueeze(-1), matrix, eye))

    def solve(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        both = scale * apply(inverse, scale * torch.where(solved, torch.cat([p, r], -1), 0.0))
        return both[..., :n], both[..., n:]

    return solve, x, y, z, W


def _solve(program: Program, mu: float, options: QPOptions) -> tuple[Tensor, ...]:
    """x, y, scale, status and residual of B programs."""
    scaled, scaling = balance(program)
    # rows that say nothing have no barrier: their product is driven along and changes nothing
    target = mu * scaling.cost.unsqueeze(-1)
    point = first_point(scaled)
    todo = torch.arange(len(target), device=target.device)
    best, error = point, _distance(scaled, point, target)
    for _ in range(options.max_steps):
        todo = todo[error[todo] > 1e-2 * options.tol]
        if len(todo) == 0:
            break
        part = rows(scaled, todo)
        moved = central_path_step(part, Point(*(value[todo] for value in point)), target[todo])
        found = _distance(part, moved, target[todo])
        point = Point(*(old.index_copy(0, todo, new) for old, new in zip(point, moved, strict=True)))
        better = found < error[todo]
        kept = todo[better]
        best = Point(*(old.index_copy(0, kept, new[better]) for old, new in zip(best, moved, strict=True)))
        error = error.index_copy(0, kept, found[better])
        todo = todo[torch.isfinite(found)]
    error = torch.maximum(error, _lost(scaled, best))
    status = torch.where(error <= options.tol, SOLVED, UNCONVERGED)
    x, y = scaling.column * best.x, scaling.row_A / scaling.cost.unsqueeze(-1) * best.y
    failed = (status == UNCONVERGED).nonzero()[:, 0]
    if len(failed):
        status = status.index_copy(0, failed, explain(rows(scaled, failed), options.max_steps)[0])
        x = torch.where((status >= INFEASIBLE).unsqueeze(-1), math.nan, x)
    root = scaling.cost.sqrt().unsqueeze(-1)
    return x, y, torch.cat([scaling.column * root, scaling.row_A / root], -1), status, error


def _complain(status: Tensor, error: Tensor, options: QPOptions) -> None:
    hopeless, late = ((found.nonzero()[:, 0].tolist()) for found in (status >= INFEASIBLE, status == UNCONVERGED))
    if hopeless and options.on_failure == "raise":
        kind = "infeasible" if int(status[hopeless[0]]) == INFEASIBLE else "unbounded"
        raise InfeasibleError(
            f"smooth_qp: {len(hopeless)} of {len(status)} samples have no solution; sample {hopeless[0]} is {kind}; qp "
            "proves it",
            hopeless[0],
        )
    if late:
        message = (
            f"smooth_qp: {len(late)} of {len(status)} samples (first: {late[:5]}) are off the central path by up to "
            f"{float(error[late].max()):.1e} > {options.tol:.1e}, relative: raise max_steps or smoothing, and see that "
            "the inequalities have an interior"
        )
        if options.strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=3)


def _lost(program: Program, point: Point) -> Tensor:
    """Relative error by rounding `[B]` of `h - G x`, on which the derivative is built; 0 where it is small."""
    exact = point.s.abs().clamp_min(torch.finfo(point.s.dtype).tiny)
    off = ((program.h - apply(program.G, point.x) - point.s).abs() / exact).amax(-1)
    return torch.where(off > 1e-3, off, 0.0)


def _distance(program: Program, point: Point, target: Tensor) -> Tensor:
    """Relative distance from the point of the central path, `[B]`."""
    H, g, A, b, G, h = program
    x, y, z, s = point
    primal, dual = residual(program, point)[1].unsqueeze(-1).unbind(-2)
    stationary = (apply(H, x) + g + apply(A.mT, y) + apply(G.mT, z)) / dual
    feasible = torch.cat([apply(A, x) - b, apply(G, x) + s - h], -1) / primal
    return torch.cat([s * z / target - 1, stationary, feasible], -1).abs().amax(-1).nan_to_num(math.inf)
