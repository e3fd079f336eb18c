"""Rows of the condensed MPC program that bound outputs, hard or with slacks; `mpc.py` states the program."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sim2real.solvers.qp import QPSolution

Bound = Tensor | float


class OutputBounds(NamedTuple):
    """`low + back_off <= C s_k <= high - back_off`; a bound or a penalty None is not there."""

    C: Tensor | None
    low: Bound | None
    high: Bound | None
    back_off: Bound
    penalty: Bound | None
    penalty_quadratic: Bound | None


def per_step(bound: Bound, horizon: int, like: Tensor) -> Tensor:
    """A vector `[..., m]` repeated over the steps, `[..., N m]`; a number stays one."""
    value = torch.as_tensor(bound, dtype=like.dtype, device=like.device)
    return value.repeat(*(1,) * (value.ndim - 1), horizon) if value.ndim else value


def check_output_bounds(bounds: OutputBounds, outputs: int) -> None:
    """Raise `ValueError` for bounds of outputs without outputs to bound, and for numbers of the wrong sign."""
    if bounds.low is None and bounds.high is None:
        given = [key for key in ("C", "penalty", "penalty_quadratic") if getattr(bounds, key) is not None]
        if given:
            raise ValueError(f"{given} belong to bounds of outputs: give output_low or output_high, or leave them out")
        return
    for key, value in bounds._asdict().items():
        name = f"output_{key}" if key in ("low", "high") else key
        if key in ("back_off", "penalty", "penalty_quadratic") and isinstance(value, float | int) and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
        if isinstance(value, Tensor) and key != "C" and value.ndim and value.shape[-1] != outputs:
            raise ValueError(f"{name} must be [..., {outputs}], one per output, got {tuple(value.shape)}")


def with_outputs(
    program: tuple[Tensor, Tensor],
    responses: tuple[Tensor, Tensor],
    inputs: tuple[Bound, Bound],
    bounds: OutputBounds,
    weights: Tensor,
    states: int,
) -> tuple[Tensor, Tensor, None, None, Tensor, Tensor]:
    """H, g, no equalities, and G, h over (actions, slacks): rows of outputs, then of slacks, then of inputs."""
    H, g = program
    horizon, size = weights.shape[0] - 1, g.shape[-1]
    free, forced = responses
    if bounds.C is not None:
        free = (free.unflatten(-1, (horizon, states)) @ bounds.C.mT).flatten(-2)
        forced = (bounds.C.unsqueeze(-3) @ forced.unflatten(-2, (horizon, states))).flatten(-3, -2)
    back_off = per_step(bounds.back_off, horizon, g)
    rows: list[tuple[Tensor, Tensor]] = []
    if bounds.high is not None:
        rows.append((forced, per_step(bounds.high, horizon, g) - back_off - free))
    if bounds.low is not None:
        rows.append((-forced, free - per_step(bounds.low, horizon, g) - back_off))
    count = forced.shape[-2]
    soft = bounds.penalty is not None or bounds.penalty_quadratic is not None
    if soft:
        eye = torch.eye(count, dtype=g.dtype, device=g.device)
        rows = [(_cat([M, -eye], -1), h) for M, h in rows]
        rows.append(
            (torch.cat([torch.zeros(count, size, dtype=g.dtype, device=g.device), -eye], -1), g.new_zeros(count))
        )
        price = weights[1:].repeat_interleave(count // horizon)
        linear, curved = (
            price * per_step(0.0 if value is None else value, horizon, g)
            for value in (bounds.penalty, bounds.penalty_quadratic)
        )
        g = _cat([g, linear], -1, core=1)
        H = _block_diagonal(H, 2 * torch.diag_embed(curved))
    eye = torch.eye(size, H.shape[-1], dtype=g.dtype, device=g.device)
    for sign, bound in zip((-1.0, 1.0), inputs, strict=True):
        if isinstance(bound, Tensor) or bound != sign * math.inf:
            rows.append((sign * eye, sign * per_step(bound, horizon, g).expand(*_lead(bound), size)))
    if not rows:
        rows.append((torch.zeros_like(eye[:0]), g.new_zeros(0)))
    return H, g, None, None, _cat([M for M, _ in rows], -2), _cat([h for _, h in rows], -1, core=1)


def slack_and_pressure(
    solution: QPSolution, size: int, outputs: int, bounds: OutputBounds, weights: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Excess over the bounds `[..., N, p]` or None, and the multipliers over g^k `[..., N, p]` or None."""
    horizon = weights.shape[0] - 1
    sides = (bounds.low is not None) + (bounds.high is not None)
    if sides == 0:
        return None, None
    multipliers = solution.inequality_multipliers
    z = multipliers[..., : sides * horizon * outputs].unflatten(-1, (sides, horizon, outputs))
    pressure = z.sum(-3) / weights[1:, None]
    if solution.x.shape[-1] == size:
        return None, pressure
    e = solution.x[..., size:].unflatten(-1, (horizon, outputs))
    z_e = multipliers[..., sides * horizon * outputs :][..., : horizon * outputs].unflatten(-1, (horizon, outputs))
    # room z = e z_e on the central path: the output is over its bound by e less the room; without smoothing z_e is 0
    over = z.amax(-3)
    exceeded = over > z_e
    share = 1 - z_e / torch.where(exceeded, over, math.inf)
    return e * torch.where(exceeded, share, 0.0), pressure


def _lead(bound: Bound) -> torch.Size:
    return bound.shape[:-1] if isinstance(bound, Tensor) else torch.Size()


def _cat(parts: list[Tensor], dim: int, core: int = 2) -> Tensor:
    """Concatenation with leading dimensions broadcast."""
    lead = torch.broadcast_shapes(*(part.shape[:-core] for part in parts))
    return torch.cat([part.expand(*lead, *part.shape[-core:]) for part in parts], dim)


def _block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    zeros = a.new_zeros(a.shape[-1], b.shape[-1])
    return _cat([_cat([a, zeros], -1), _cat([zeros.mT, b], -1)], -2)
