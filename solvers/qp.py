"""Batched convex quadratic programs as a differentiable layer, equalities and inequalities.

    x = argmin_x  x'H x / 2 + g'x   subject to   A x = b,  G x <= h,      H symmetric positive semi-definite

with multipliers y of the equalities and z >= 0 of the inequalities: `H x + g + A'y + G'z = 0`. Forward: an interior
point, made exact on the active set (`interior_point.py`).

Derivative: with C the equalities and the active inequalities, d their right-hand sides and v their multipliers,

    [[H, C'], [C, 0]] (dx, dv) = -(dH x + dg + dC'v, dC x - dd)

(Amos and Kolter, OptNet, ICML 2017, eq. 6, on the active set), one solve per product made of plain operations, so
derivatives of every order exist. Of dependent active rows a largest independent set with multipliers z >= 0 is kept
(Caratheodory). An active inequality with z = 0, and a row left out, are kinks, where derivatives are one-sided: one of
them is given, and `margin` tells how near the next kink is. A program without a solution is not answered: it is named,
with the certificate that proves it (`infeasibility.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals, saved
from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.convex import InfeasibleError
from sim2real.solvers.interior_point import Program, apply, take_rows
from sim2real.solvers.qp_solve import INFEASIBLE, SOLVED, UNBOUNDED, UNCONVERGED, Found, solve_programs

OnFailure = Literal["raise", "nan"]
Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class QPSolution:
    """Minimisers of a batch of QPs; x and the multipliers carry derivatives."""

    x: Tensor
    """`[..., n]`; NaN where there is no solution"""
    equality_multipliers: Tensor
    """y `[..., p]`; of an infeasible program the certificate: `A'y + G'z = 0`, `b'y + h'z < 0`"""
    inequality_multipliers: Tensor
    """z `[..., m]`, >= 0; of an infeasible program the certificate"""
    active: Tensor
    """`[..., m]` bool: inequalities that hold with equality"""
    converged: Tensor
    """`[...]` bool: residual <= tol"""
    infeasible: Tensor
    """`[...]` bool: no x satisfies the constraints, proved by the multipliers"""
    unbounded: Tensor
    """`[...]` bool: the objective falls for ever along `ray`"""
    ray: Tensor
    """`[..., n]`: of an unbounded program `H d = 0, A d = 0, G d <= 0, g'd < 0`; else 0"""
    unique: Tensor
    """`[...]` bool: the minimiser is the only one; where it is not, its derivative is one of many"""
    residual: Tensor
    """`[...]`: largest violation of the optimality conditions, relative to their terms, rows and columns balanced"""
    margin: Tensor
    """`[...]`: least multiplier of an active, least slack of another inequality, on the same scale; 0 at a kink
    and without a solution"""


@dataclass(frozen=True)
class QPOptions:
    """What the public functions of QPs take besides the program."""

    tol: float
    max_steps: int
    strict: bool
    on_failure: OnFailure


def qp(
    H: Tensor,
    g: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    tol: float = 1e-10,
    max_steps: int = 60,
    strict: bool = False,
    on_failure: OnFailure = "raise",
) -> QPSolution:
    """Minimise `x'H x / 2 + g'x` over `A x = b, G x <= h`, batched, differentiable in all six.

    H `[..., n, n]` (its symmetric part is used), g `[..., n]`, A `[..., p, n]`, b `[..., p]`, G `[..., m, n]`, h
    `[..., m]`; an entry inf of h drops its row; leading dimensions broadcast. Computes in float64, returns g's dtype.
    A program that is infeasible or unbounded raises `InfeasibleError` with the rows that contradict one another; with
    `on_failure="nan"` its x is NaN, the solution says why, and no gradient comes from it. Samples whose residual stays
    above `tol`, or whose minimiser is not unique, warn `UnconvergedWarning`, under `strict` raise `UnconvergedError`.
    Raises `ValueError` for shapes that do not fit, values that are not finite, an H that is not positive semi-definite.
    """
    if not 0 < tol < 1 or max_steps < 1:
        raise ValueError(f"tol must lie in (0, 1) and max_steps be at least 1, got {tol} and {max_steps}")
    check_on_failure(on_failure)
    inputs = complete_program(H, g, A, b, G, h)
    options = QPOptions(tol, max_steps, strict, on_failure)
    found = Found(*_QP.apply(options, *inputs))
    return QPSolution(
        x=found.x.to(g.dtype),
        equality_multipliers=found.y.to(g.dtype),
        inequality_multipliers=found.z.to(g.dtype),
        active=found.active,
        converged=found.status == SOLVED,
        infeasible=found.status == INFEASIBLE,
        unbounded=found.status == UNBOUNDED,
        ray=found.ray.to(g.dtype),
        unique=found.unique,
        residual=found.residual,
        margin=found.margin,
    )


def check_on_failure(on_failure: OnFailure) -> None:
    """Raise `ValueError` for anything but "raise" and "nan"."""
    if on_failure not in ("raise", "nan"):
        raise ValueError(f"on_failure (of an MPC: on_infeasible) must be 'raise' or 'nan', got {on_failure!r}")


def complete_program(
    H: Tensor, g: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> list[Tensor]:
    """All six in float64 with equal leading dimensions, H symmetric, after their shapes were found to fit."""
    n = g.shape[-1] if g.ndim else 0
    if (A is None) != (b is None) or (G is None) != (h is None):
        raise ValueError("A and b, and G and h, must be given together")
    none = g.new_zeros(0, n)
    A, b = (none, none[:, 0] if n else none) if A is None or b is None else (A, b)
    G, h = (none, none[:, 0] if n else none) if G is None or h is None else (G, h)
    wanted = {"H": (n, n), "g": (n,), "A": (*b.shape[-1:], n), "b": b.shape[-1:], "G": (*h.shape[-1:], n)}
    tensors = {"H": H, "g": g, "A": A, "b": b, "G": G, "h": h}
    for name, value in tensors.items():
        shape = tuple(wanted.get(name, h.shape[-1:]))
        if n == 0 or not shape or value.shape[-len(shape) :] != shape or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating point [..., {', '.join(map(str, shape))}] for g {tuple(g.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    tensors = {name: value.to(g.device, torch.float64) for name, value in tensors.items()}
    tensors["H"] = 0.5 * (tensors["H"] + tensors["H"].mT)
    core = {name: 2 if name in "HAG" else 1 for name in tensors}
    lead = torch.broadcast_shapes(*(value.shape[: -core[name]] for name, value in tensors.items()))
    return [value.expand(*lead, *value.shape[-core[name] :]) for name, value in tensors.items()]


class _QP(torch.autograd.Function):
    """options, H, g, A, b, G, h (equal leading dimensions, H symmetric) -> the fields of `Found`."""

    @staticmethod
    def forward(options: QPOptions, *inputs: Tensor) -> tuple[Tensor, ...]:
        lead = inputs[1].shape[:-1]
        flat = Program(*(value.reshape((math.prod(lead), *value.shape[len(lead) :])) for value in inputs))
        check_program(flat)
        found = solve_programs(flat, tol=options.tol, max_steps=options.max_steps)
        complain(found, options)
        return tuple(value.reshape((*lead, *value.shape[1:])).clone() for value in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[3:])
        found = Found(*output)
        kept = (inputs[1], inputs[3], inputs[5], *found[:3], found.rows, found.scale, found.shift, found.status)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        system, x, v, index, count = _system(saved(ctx))
        gx, gy, gz = grads[:3]
        u, q = system(gx, take_rows(torch.cat([gy, gz], -1).unsqueeze(-1), index).squeeze(-1))
        moved = v.unsqueeze(-1) * u.unsqueeze(-2) + q.unsqueeze(-1) * x.unsqueeze(-2)
        dC, dd = -_put_rows(moved, index, gy.shape[-1] + gz.shape[-1]), _put(q, index, gy.shape[-1] + gz.shape[-1])
        dH = -u.unsqueeze(-1) * x.unsqueeze(-2)
        return None, dH, -u, dC[..., :count, :], dd[..., :count], dC[..., count:, :], dd[..., count:]

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = primals(ctx)
        system, x, v, index, count = _system(kept)
        A, G = kept[1:3]
        dH, dg, dA, db, dG, dh = tangents
        dC = take_rows(_stacked(dA, dG, A, G, -2), index)
        dd = take_rows(_stacked(db, dh, A[..., 0], G[..., 0], -1).unsqueeze(-1), index).squeeze(-1)
        force = apply(dC.mT, v)
        force = force if dH is None else force + apply(dH, x)
        force = force if dg is None else force + dg
        dx, dv = system(-force, dd - apply(dC, x))
        dv = _put(dv, index, A.shape[-2] + G.shape[-2])
        return dx.clone(), dv[..., :count].clone(), dv[..., count:].clone(), *(None,) * (len(Found._fields) - 3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], options: QPOptions, *inputs: Tensor) -> Any:
        batched = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(inputs, in_dims[1:], strict=True)
        )
        return _QP.apply(options, *batched), (0,) * len(Found._fields)


def _system(kept: tuple[Tensor, ...]) -> tuple[Solve, Tensor, Tensor, Tensor, int]:
    """Solver of `[[H, C'], [C, 0]] (u, q) = (p, r)`, x, the multipliers v `[..., k]` of C, its index and p."""
    H, A, G, x, y, z, index, scale, shift, status = kept
    solved, n = (status <= UNCONVERGED).unsqueeze(-1), x.shape[-1]
    x = torch.where(solved, x, 0.0)
    v = torch.where(solved, take_rows(torch.cat([y, z], -1).unsqueeze(-1), index).squeeze(-1), 0.0)
    C = take_rows(torch.cat([A, G], -2), index)
    spare = torch.diag_embed((index == A.shape[-2] + G.shape[-2]).to(H.dtype))
    matrix = torch.cat([torch.cat([H, C.mT], -1), torch.cat([C, spare], -1)], -2)
    matrix = scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)
    matrix = matrix + torch.nn.functional.pad(shift, (0, index.shape[-1]) * 2)
    eye = torch.eye(matrix.shape[-1], dtype=H.dtype, device=H.device)
    # inv, not linalg.solve, whose derivatives are wrong in nested forward mode: pytorch/pytorch issue 192540
    inverse = torch.linalg.inv(torch.where(solved.unsqueeze(-1), matrix, eye))

    def solve(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        both = scale * apply(inverse, scale * torch.where(solved, torch.cat([p, r], -1), 0.0))
        return both[..., :n], both[..., n:]

    return solve, x, v, index, A.shape[-2]


def _stacked(a: Tensor | None, b: Tensor | None, like_a: Tensor, like_b: Tensor, dim: int) -> Tensor:
    parts = [torch.zeros_like(like) if value is None else value for value, like in ((a, like_a), (b, like_b))]
    return torch.cat(parts, dim)


def _put_rows(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Transpose of `take_rows`: rows `[..., k, n]` added into zeros `[..., size, n]`."""
    zeros = torch.zeros(*index.shape[:-1], size + 1, values.shape[-1], dtype=values.dtype, device=values.device)
    return zeros.scatter_add(-2, index.unsqueeze(-1).expand(*index.shape, values.shape[-1]), values)[..., :-1, :]


def _put(values: Tensor, index: Tensor, size: int) -> Tensor:
    return _put_rows(values.unsqueeze(-1), index, size).squeeze(-1)


def check_program(program: Program) -> None:
    """Names the first sample that breaks a condition, and the condition."""
    H, g, A, b, G, h = program
    sizes = H.diagonal(dim1=-2, dim2=-1).abs()
    largest = sizes.amax(-1, keepdim=True)
    # by variable, so that large units of one do not hide that another is concave; 1e-14 is rounding beside the largest
    nearly = H + torch.diag_embed(1e-12 * sizes + torch.where(largest > 0, 1e-14 * largest, 1e-12))
    finite = [torch.isfinite(value).flatten(1).all(-1) for value in (H, g, A, b, G)]
    conditions = (
        (torch.stack(finite).all(0), "H, g, A, b and G must be finite"),
        (torch.linalg.cholesky_ex(nearly).info == 0, "H is not positive semi-definite; check the weights"),
        (~(h.isnan() | (h == -math.inf)).any(-1), "h must be finite or inf"),
    )
    for holds, message in conditions:
        if not bool(holds.all()):
            raise ValueError(f"qp, sample {int((~holds).nonzero()[0, 0])} of {g.shape[0]}: {message}")


def complain(found: Found, options: QPOptions) -> None:
    """Raise or warn for programs without a solution, an exact one or a unique one."""
    count = found.status.shape[0]
    hopeless = (found.status >= INFEASIBLE).nonzero()[:, 0].tolist()
    if hopeless and options.on_failure == "raise":
        row = hopeless[0]
        if int(found.status[row]) == INFEASIBLE:
            largest = torch.cat([found.y[row], found.z[row]]).abs().amax()
            A, G = ((w.abs() > 1e-6 * largest).nonzero()[:, 0].tolist() for w in (found.y[row], found.z[row]))
            reason = f"infeasible: rows {A} of A and {G} of G contradict one another"
        else:
            reason = f"unbounded: the objective falls for ever along {found.ray[row].tolist()}"
        raise InfeasibleError(f"qp: {len(hopeless)} of {count} samples have no solution; sample {row} is {reason}", row)
    late = (found.status == UNCONVERGED).nonzero()[:, 0].tolist()
    if late:
        _doubt(
            f"qp: {len(late)} of {count} samples (first: {late[:5]}) have a relative residual up to "
            f"{float(found.residual[late].max()):.1e} > {options.tol:.1e}; their derivatives belong to another point: "
            "raise max_steps, or tol when the program is nearly degenerate",
            options,
        )
    many = (~found.unique).nonzero()[:, 0].tolist()
    if many:
        _doubt(
            f"qp: {len(many)} of {count} samples (first: {many[:5]}) have more than one minimiser; one is given, and "
            "one of many derivatives: add a small multiple of the identity to H",
            options,
        )


def _doubt(message: str, options: QPOptions) -> None:
    if options.strict:
        raise UnconvergedError(message)
    warnings.warn(message, UnconvergedWarning, stacklevel=4)
