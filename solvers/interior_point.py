"""Convex quadratic programs, many at once: interior point, then the active set exactly.

    min_x  x'H x / 2 + g'x   subject to   A x = b,  G x <= h

Interior point: Mehrotra's predictor-corrector (SIAM J. Optim. 2 (1992) 575) on the optimality conditions

    H x + g + A'y + G'z = 0,    A x = b,    G x + s = h,    s_i z_i = mu,    s, z > 0,

whose steps need one factorisation of `[[H + G'diag(z/s)G, A'], [A, 0]]` each, on rows and columns balanced beforehand
(Ruiz 2001). Where it ends, `z_i > s_i` tells the active set; the equality-constrained program on it, solved with
refinement, is exact to rounding, and signs of multipliers and slacks that disagree correct the set. Everything here is
`[B, ...]` in float64 and carries no derivatives; `qp.py` differentiates what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_REGULARISED = 1e-10  # of the scaled system: bounds the damage of dependent rows, refinement takes its bias away
_NOTHING = 1e-8  # of the data: a solution below it counts as zero, which has no relative error


class Program(NamedTuple):
    """H `[B, n, n]`, g `[B, n]`, A `[B, p, n]`, b `[B, p]`, G `[B, m, n]`, h `[B, m]`; p may be 0, m not."""

    H: Tensor
    g: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor


class Point(NamedTuple):
    """x `[B, n]`, multipliers y `[B, p]` and z `[B, m]`, slacks s `[B, m]`."""

    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor


class Scaling(NamedTuple):
    """Balanced program: `x = column x'`, `y = row_A y' / cost`, `z = row_G z' / cost`."""

    column: Tensor
    row_A: Tensor
    row_G: Tensor
    cost: Tensor


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """`[..., n, m] @ [..., m]`; a row times a matrix, which batched multiplication does several times faster."""
    return (vector.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def rows(program: Program, which: Tensor) -> Program:
    """The programs of a batch that an index or a mask names."""
    return Program(*(value[which] for value in program))


def balance(program: Program) -> tuple[Program, Scaling]:
    """Rows and columns of `[[H, A', G'], [A, 0, 0], [G, 0, 0]]` brought to largest entries near 1, then the cost."""
    H, g, A, b, G, h = program
    column, row_A, row_G = torch.ones_like(g), torch.ones_like(b), torch.ones_like(h)
    for _ in range(8):
        sizes = [M.abs() for M in (H, A, G)]
        largest = torch.stack([size.amax(-2) for size in sizes if size.shape[-2]]).amax(0)
        columns, equal, unequal = (_inverse_root(v) for v in (largest, sizes[1].amax(-1), sizes[2].amax(-1)))
        H = columns.unsqueeze(-1) * H * columns.unsqueeze(-2)
        A, G = (e.unsqueeze(-1) * M * columns.unsqueeze(-2) for e, M in ((equal, A), (unequal, G)))
        column, row_A, row_G = column * columns, row_A * equal, row_G * unequal
    size = torch.maximum((column * g).abs().amax(-1), H.abs().amax((-2, -1)))
    cost = 1 / torch.where(size > 0, size, 1.0)
    H, g = cost[:, None, None] * H, cost[:, None] * column * g
    return Program(H, g, A, row_A * b, G, row_G * h), Scaling(column, row_A, row_G, cost)


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0).rsqrt()


def residual(program: Program, point: Point) -> tuple[Tensor, Tensor]:
    """Largest relative violation of the conditions `[B]`, and the scales of slacks and multipliers `[B, 2]`."""
    H, g, A, b, G, h = program
    x, y, z, _ = point
    parts = (apply(H, x), g, apply(A.mT, y), apply(G.mT, z))
    floor = _NOTHING * torch.cat([g, b, h], -1).abs().amax(-1)
    floor = torch.where(floor > 0, floor, _NOTHING)
    dual = torch.stack([*(part.abs().amax(-1) for part in parts), floor]).amax(0)
    primal = torch.maximum(torch.cat([x, b, g], -1).abs().amax(-1), floor)
    slack = (h - apply(G, x)) / primal.unsqueeze(-1)
    worst = torch.cat(
        [
            sum(parts) / dual.unsqueeze(-1),
            (apply(A, x) - b) / primal.unsqueeze(-1),
            torch.minimum(slack, z / dual.unsqueeze(-1)),  # complementarity, and the signs of both
        ],
        -1,
    )
    return worst.abs().amax(-1).nan_to_num(math.inf), torch.stack([primal, dual], -1)


def interior_point(program: Program, *, max_steps: int, tol: float = 1e-9, start: Point | None = None) -> Point:
    """Iterates until the residual is below tol, rounding stops them, or `max_steps` are taken; see `residual`."""
    point = first_point(program) if start is None else start
    todo, part = torch.arange(program.g.shape[0], device=program.g.device), program
    best, error = point, residual(program, point)[0]
    none, live = torch.zeros_like(error).unsqueeze(-1), torch.ones_like(todo, dtype=torch.bool)
    for _ in range(max_steps):
        late = (error[todo] > tol) & live
        if not bool(late.all()):
            todo, part = todo[late], rows(part, late)
        if len(todo) == 0:
            break
        moved = central_path_step(part, Point(*(value[todo] for value in point)), none[todo])
        found = residual(part, moved)[0]
        live, better = torch.isfinite(found), found < error[todo]
        kept = todo[better]
        point = Point(*(old.index_copy(0, todo, new) for old, new in zip(point, moved, strict=True)))
        best = Point(*(old.index_copy(0, kept, new[better]) for old, new in zip(best, moved, strict=True)))
        error = error.index_copy(0, kept, found[better])
    return best


def first_point(program: Program) -> Point:
    """The least-squares start of Mehrotra and of CVXOPT (Vandenberghe 2010, section 5.3)."""
    H, g, A, b, G, h = program
    x, y = _kkt(H + G.mT @ G, A)(-g + apply(G.mT, h), b)
    z = apply(G, x) - h
    return Point(x, y, _positive(z), _positive(-z))


def _positive(v: Tensor) -> Tensor:
    short = (-v).amax(-1, keepdim=True)
    return torch.where(short < -1e-6, v, v + 1 + short)


def _kkt(M: Tensor, A: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Solver of `M u + A'v = p`, `A u = q`, slightly regularised."""
    n, count = M.shape[-1], A.shape[-2]
    M = M + _REGULARISED * torch.eye(n, dtype=M.dtype, device=M.device)
    if count == 0:
        factor, failures = torch.linalg.cholesky_ex(M)
        if not bool(failures.any()):
            return lambda p, q: (torch.cholesky_solve(p.unsqueeze(-1), factor).squeeze(-1), q)
    below = -_REGULARISED * torch.eye(count, dtype=M.dtype, device=M.device).expand(*M.shape[:-2], -1, -1)
    system = torch.cat([torch.cat([M, A.mT], -1), torch.cat([A, below], -1)], -2)
    factors, pivots, _ = torch.linalg.lu_factor_ex(system)

    def solve(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.linalg.lu_solve(factors, pivots, torch.cat([p, q], -1).unsqueeze(-1)).squeeze(-1)
        return both[..., :n], both[..., n:]

    return solve


def central_path_step(program: Program, point: Point, target: Tensor) -> Point:
    """Newton towards `s_i z_i = target` `[B, 1]`; far above it, predictor and corrector with one factorisation."""
    H, g, A, b, G, h = program
    x, y, z, s = point
    dual = apply(H, x) + g + apply(A.mT, y) + apply(G.mT, z)
    equal, slack = apply(A, x) - b, apply(G, x) + s - h
    solve = _kkt(H + G.mT @ ((z / s).unsqueeze(-1) * G), A)

    def direction(product: Tensor) -> Point:
        """To `s z = s z - product`, linearised."""
        force = (z * slack - product) / s
        dx, dy = solve(-dual - apply(G.mT, force), -equal)
        ds = -slack - apply(G, dx)
        return Point(dx, dy, (-product - z * ds) / s, ds)

    mean = (s * z).mean(-1, keepdim=True)
    ahead = direction(s * z)
    length = _length(point, ahead)
    reached = ((s + length * ahead.s) * (z + length * ahead.z)).mean(-1, keepdim=True)
    centred = torch.maximum((reached / mean) ** 3 * mean, target)
    near = mean < 10 * target
    chosen = direction(torch.where(near, s * z - target, s * z + ahead.s * ahead.z - centred))
    length = (0.995 * _length(point, chosen)).clamp_max(1.0)
    return Point(*(old + length * change for old, change in zip(point, chosen, strict=True)))


def _length(point: Point, change: Point) -> Tensor:
    """The longest step, at most 1/0.995, that keeps s and z positive, `[B, 1]`."""
    v, dv = torch.cat([point.s, point.z], -1), torch.cat([change.s, change.z], -1)
    return torch.where(dv < 0, -v / dv, math.inf).amin(-1, keepdim=True).clamp_max(1 / 0.995)


def polish(program: Program, point: Point, *, tol: float, corrections: int = 8) -> tuple[Point, Tensor]:
    """The point made exact on its active set, and the set `[B, m]`; where that fails, the point as it was."""
    best, error = point, residual(program, point)[0]
    active, best_set = point.z > point.s, point.z > point.s
    todo = torch.arange(active.shape[0], device=active.device)
    for _ in range(corrections):
        part = rows(program, todo)
        exact = _on_active_set(part, Point(*(value[todo] for value in best)), active)
        found = residual(part, exact)[0]
        better = found < error[todo]
        kept = todo[better]
        best = Point(*(old.index_copy(0, kept, new[better]) for old, new in zip(best, exact, strict=True)))
        error, best_set = error.index_copy(0, kept, found[better]), best_set.index_copy(0, kept, active[better])
        late = found > tol
        todo, active = todo[late], (exact.z > exact.s)[late]
        if len(todo) == 0:
            break
    return best, best_set


def gather_active(active: Tensor) -> Tensor:
    """Indices `[B, k]` of the active rows, k the most of any sample; m where a sample has fewer."""
    count = int(active.sum(-1).amax()) if active.numel() else 0
    order = torch.where(active, torch.arange(active.shape[-1], device=active.device), active.shape[-1])
    return order.sort(-1).values[:, :count]


def take_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows `[..., k, n]` of `[..., m, n]`; the index m gives a row of zeros."""
    padded = torch.cat([matrix, torch.zeros_like(matrix[..., :1, :])], -2)
    return padded.gather(-2, index.unsqueeze(-1).expand(*index.shape, matrix.shape[-1]))


def _on_active_set(program: Program, point: Point, active: Tensor) -> Point:
    """Minimiser over `A x = b`, `G_i x = h_i` for the active i, by corrections of x with refinement."""
    H, g, A, b, G, h = program
    index = gather_active(active)
    C = torch.cat([A, take_rows(G, index)], -2)
    d = torch.cat([b, take_rows(h.unsqueeze(-1), index).squeeze(-1)], -1)
    solve = _kkt(H, C)
    x, multipliers = point.x, torch.zeros_like(d)
    for _ in range(4):
        dx, change = solve(-(apply(H, x) + g + apply(C.mT, multipliers)), d - apply(C, x))
        x, multipliers = x + dx, multipliers + change
    y, z = multipliers[:, : b.shape[-1]], torch.zeros(h.shape[0], h.shape[-1] + 1, dtype=h.dtype, device=h.device)
    z = z.scatter(-1, index, multipliers[:, b.shape[-1] :])[:, :-1]
    s = torch.where(active, 0.0, h - apply(G, x))
    return Point(x, y, z, s)
