"""Why a quadratic program has no solution, proved: Farkas' certificate, or a ray of unbounded decrease.

No x satisfies `A x = b, G x <= h` if and only if some y and z >= 0 have `A'y + G'z = 0, b'y + h'z < 0`; they are
the multipliers of the linear program  min t  subject to  |A x - b| <= t, G x - h <= t, t >= 0,  which always has a
solution. A feasible program is unbounded below if and only if a d has `H d = 0, A d = 0, G d <= 0, g'd < 0`; such
a d solves  min g'd  over these d with |d_i| <= 1.  (Boyd and Vandenberghe, Convex Optimization, 2004, section 5.8.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sim2real.solvers.interior_point import Point, Program, apply, interior_point, polish

_PROOF = 1e-7  # allowed error of a certificate, relative to the value it proves


def farkas(program: Program, *, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(proved `[B]`, y `[B, p]`, z `[B, m]`) with `b'y + h'z = -t`, t the least worst violation."""
    A, b, G, h = program[2:]
    batch, n = program.g.shape
    lead: dict[str, Any] = {"dtype": A.dtype, "device": A.device}
    slack = lambda count: -torch.ones(batch, count, 1, **lead)
    p, m = b.shape[-1], h.shape[-1]
    bounds = [torch.cat([M, slack(M.shape[-2])], -1) for M in (A, -A, G)]
    nonnegative = torch.cat([torch.zeros(batch, 1, n, **lead), slack(1)], -1)
    elastic = _linear(
        torch.cat([torch.zeros_like(program.g), -slack(1)[..., 0]], -1),
        torch.zeros(batch, 0, n + 1, **lead),
        torch.cat([*bounds, nonnegative], -2),
        torch.cat([b, -b, h, torch.zeros(batch, 1, **lead)], -1),
    )
    point = _solved(elastic, max_steps)
    above, below, z = point.z[:, :p], point.z[:, p : 2 * p], point.z[:, 2 * p : 2 * p + m]
    y, z = above - below, z.clamp_min(0.0)
    value = -(b * y).sum(-1) - (h * z).sum(-1)
    error = (apply(A.mT, y) + apply(G.mT, z)).abs().amax(-1)
    return (value > 1e-8) & (error <= _PROOF * value), y, z


def descent_ray(program: Program, *, max_steps: int) -> tuple[Tensor, Tensor]:
    """(proved `[B]`, d `[B, n]`) along which a feasible program falls for ever."""
    H, g, A, _, G, _ = program
    batch, n = g.shape
    eye = torch.eye(n, dtype=g.dtype, device=g.device).expand(batch, -1, -1)
    absent = (G == 0).all(-1).to(g.dtype)  # a row of zeros limits no direction
    box = torch.ones(batch, 2 * n, dtype=g.dtype, device=g.device)
    program = _linear(g, torch.cat([H, A], -2), torch.cat([G, eye, -eye], -2), torch.cat([absent, box], -1))
    d = _solved(program, max_steps).x
    fall = -(g * d).sum(-1)
    error = torch.cat([apply(H, d).abs(), apply(A, d).abs(), apply(G, d), torch.zeros_like(g)], -1).amax(-1)
    return (fall > 1e-8) & (error <= _PROOF * fall), d


def _linear(g: Tensor, A: Tensor, G: Tensor, h: Tensor) -> Program:
    """The linear program `min g'x, A x = 0, G x <= h`."""
    H = torch.zeros(*g.shape, g.shape[-1], dtype=g.dtype, device=g.device)
    return Program(H, g, A, torch.zeros_like(A[..., 0]), G, h)


def _solved(program: Program, max_steps: int) -> Point:
    return polish(program, interior_point(program, max_steps=max_steps), tol=1e-12)[0]
