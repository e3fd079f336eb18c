"""Solution, status and derivative data of a batch of quadratic programs; see `qp.py` for what they mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sim2real.solvers.infeasibility import descent_ray, farkas
from sim2real.solvers.interior_point import (
    Point,
    Program,
    balance,
    gather_active,
    interior_point,
    polish,
    residual,
    rows,
    take_rows,
)

SOLVED, UNCONVERGED, INFEASIBLE, UNBOUNDED = range(4)
_DEPENDENT = 1e-11  # least pivot, squared, of rows of norm 1 that count as independent
_FLAT = 1e-13  # the same for the curvature on the active set, relative


class Found(NamedTuple):
    """Of B programs; the first three carry derivatives, `scale` and `shift` make their system well conditioned."""

    x: Tensor
    y: Tensor
    z: Tensor
    active: Tensor
    """`[B, m]`"""
    rows: Tensor
    """`[B, k]` of the rows of [A; G] in the system of derivatives, p + m where a sample has fewer"""
    scale: Tensor
    """`[B, n + k]`"""
    shift: Tensor
    """`[B, n, n]` added to the scaled H: the projector on the directions in which the minimiser is not unique"""
    status: Tensor
    unique: Tensor
    residual: Tensor
    margin: Tensor
    ray: Tensor
    """`[B, n]`"""


def solve_programs(program: Program, *, tol: float, max_steps: int) -> Found:
    """All B programs; those without a solution get x = NaN, and y and z, or the ray, that prove it."""
    p, m = program.b.shape[-1], program.h.shape[-1]
    scaled, scaling = balance(Program(*program[:4], *present(*program[4:])))
    point, active, error = _two_stages(scaled, tol, max_steps)
    status = torch.where(error <= tol, SOLVED, UNCONVERGED)
    index, multipliers = _independent(scaled, point, active)
    unique, shift = _flat_directions(scaled, index)
    index, active = index.clamp_max(p + m), active[:, :m]
    margin = torch.where(error <= tol, _margin(scaled, point, active, index), 0.0)
    y, z = multipliers[:, :p], multipliers[:, p : p + m]
    x, ray = point.x, torch.zeros_like(point.x)
    failed = (status == UNCONVERGED).nonzero()[:, 0]
    if len(failed):
        verdict, rays, y_proof, z_proof = explain(rows(scaled, failed), max_steps)
        status = status.index_copy(0, failed, verdict)
        ray = ray.index_copy(0, failed, rays)
        proved = failed[verdict == INFEASIBLE]
        y = y.index_copy(0, proved, y_proof[verdict == INFEASIBLE])
        z = z.index_copy(0, proved, z_proof[verdict == INFEASIBLE, :m])
        x = torch.where((status >= INFEASIBLE)[:, None], math.nan, x)
    cost = scaling.cost[:, None]
    multiplier_scale = torch.cat([scaling.row_A, scaling.row_G[:, :m]], -1) / cost
    root = cost.sqrt()
    row_scale = torch.cat([multiplier_scale * root, torch.ones_like(cost)], -1).gather(-1, index)
    return Found(
        x=scaling.column * x,
        y=multiplier_scale[:, :p] * y,
        z=multiplier_scale[:, p:] * z,
        active=active & (status <= UNCONVERGED)[:, None],
        rows=index,
        scale=torch.cat([scaling.column * root, row_scale], -1),
        shift=shift,
        status=status,
        unique=unique | (status >= INFEASIBLE),
        residual=error,
        margin=margin,
        ray=scaling.column * ray,
    )


def _margin(program: Program, point: Point, active: Tensor, index: Tensor) -> Tensor:
    """Least slack of the inactive and least multiplier of the active rows `[B]`; 0 where an active one was left out."""
    p, m = program.b.shape[-1], active.shape[-1]
    primal, dual = residual(program, point)[1].unsqueeze(-1).unbind(-2)
    slack, pressure = (point.s / primal)[:, :m], (point.z / dual)[:, :m]
    kept = torch.zeros(len(index), p + m + 1, device=index.device).scatter(-1, index, 1.0)[:, p:-1] > 0
    distance = torch.where(active, torch.where(kept, pressure, 0.0), slack).clamp_min(0.0)
    return torch.cat([distance, torch.full_like(primal, math.inf)], -1).amin(-1)


def present(G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that say nothing as `0 x <= 1`, one of which there always is: the interior point needs it."""
    if h.shape[-1] == 0:
        G, h = G.new_zeros(*G.shape[:-2], 1, G.shape[-1]), h.new_zeros(*h.shape[:-1], 1)
    absent = (h == math.inf) | ((G == 0).all(-1) & (h >= 0))
    return torch.where(absent.unsqueeze(-1), 0.0, G), torch.where(absent, 1.0, h)


def _two_stages(program: Program, tol: float, max_steps: int) -> tuple[Point, Tensor, Tensor]:
    """Point, active set and residual: most active sets show well before the interior point has converged."""
    early = interior_point(program, max_steps=max_steps, tol=1e-4)
    point, active = polish(program, early, tol=1e-2 * tol, corrections=2)
    error = residual(program, point)[0]
    late = (error > tol).nonzero()[:, 0]
    if len(late):
        part, start = rows(program, late), Point(*(value[late] for value in early))
        converged = interior_point(part, max_steps=max_steps, tol=1e-12, start=start)
        again, active_again = polish(part, converged, tol=1e-2 * tol)
        point = Point(*(old.index_copy(0, late, new) for old, new in zip(point, again, strict=True)))
        active = active.index_copy(0, late, active_again)
        error = error.index_copy(0, late, residual(part, again)[0])
    return point, active, error


def explain(program: Program, max_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Status `[B]`, ray, y and z of programs that were not solved."""
    empty, y, z = farkas(program, max_steps=max_steps)
    falls, ray = descent_ray(program, max_steps=max_steps)
    falls = falls & ~empty
    status = torch.where(empty, INFEASIBLE, torch.where(falls, UNBOUNDED, UNCONVERGED))
    return status, torch.where(falls[:, None], ray, 0.0), y, z


def _independent(program: Program, point: Point, active: Tensor) -> tuple[Tensor, Tensor]:
    """Index `[B, k]` of independent rows of [A; G] and multipliers `[B, p + m]` on them alone, z >= 0.

    Along a dependence v of the rows (`C'v = 0`) the multipliers may move; they do until the first z is zero.
    """
    p = program.b.shape[-1]
    stacked, taken = (
        torch.cat([program.A, program.G], -2),
        torch.cat([torch.ones_like(program.b, dtype=torch.bool), active], -1),
    )
    total = taken.shape[-1]
    index = gather_active(taken)
    C = take_rows(stacked, index)
    norm = C.norm(dim=-1)
    norm = torch.where(norm > 0, norm, 1.0)
    C = C / norm.unsqueeze(-1)
    weight = norm * take_rows(torch.cat([point.y, point.z], -1).unsqueeze(-1), index).squeeze(-1)
    gram = C @ C.mT
    factor, failures = torch.linalg.cholesky_ex(gram + torch.diag_embed((index == total).to(C.dtype)))
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    todo = ((failures > 0) | ~(pivots > _DEPENDENT).all(-1)).nonzero()[:, 0]
    for _ in range(index.shape[-1]):
        absent = index[todo] == total
        values, vectors = torch.linalg.eigh(_without(gram[todo], absent))
        todo, v, absent = (x[values[:, 0] <= _DEPENDENT] for x in (todo, vectors[..., 0], absent))
        if len(todo) == 0:
            break
        signed = (index[todo] >= p) & ~absent & (v.abs() > 1e-7)
        v = v * torch.where((signed & (v > 0)).any(-1, keepdim=True), 1.0, -1.0)
        limits = torch.where(signed & (v > 0), weight[todo] / v, math.inf)
        free = torch.where(absent | signed, 0.0, v.abs()).argmax(-1, keepdim=True)
        leaves = torch.where(signed.any(-1, keepdim=True), limits.argmin(-1, keepdim=True), free)
        length = (weight[todo] / v).gather(-1, leaves)
        weight = weight.index_copy(0, todo, (weight[todo] - length * v).scatter(-1, leaves, 0.0))
        index = index.index_copy(0, todo, index[todo].scatter(-1, leaves, total))
    weight = torch.where(index == total, 0.0, weight / norm)
    spread = torch.zeros(*taken.shape[:-1], total + 1, dtype=C.dtype, device=C.device)
    return index, spread.scatter(-1, index, weight)[:, :-1]


def _without(gram: Tensor, absent: Tensor) -> Tensor:
    """The Gram matrix with the absent rows and columns those of the identity."""
    there = (~absent).to(gram.dtype)
    return there.unsqueeze(-1) * gram * there.unsqueeze(-2) + torch.diag_embed(1 - there)


def _flat_directions(program: Program, index: Tensor) -> tuple[Tensor, Tensor]:
    """Whether `H` is definite where `C x = 0`, and the projector on the directions in which it is not."""
    C = take_rows(torch.cat([program.A, program.G], -2), index)
    curved = program.H + C.mT @ C
    factor, failures = torch.linalg.cholesky_ex(curved)
    suspect = (failures > 0) | ~(factor.diagonal(dim1=-2, dim2=-1).square() > _FLAT).all(-1)
    shift, unique = torch.zeros_like(curved), ~suspect
    todo = suspect.nonzero()[:, 0]
    if len(todo):
        values, vectors = torch.linalg.eigh(curved[todo])
        flat = vectors * (values <= _FLAT).to(values.dtype).unsqueeze(-2)
        shift = shift.index_copy(0, todo, flat @ flat.mT)
        unique = unique.index_copy(0, todo, (values > _FLAT).all(-1))
    return unique, shift
