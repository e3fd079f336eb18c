"""Batched box-constrained quadratic programs as a differentiable layer.

    x = argmin_x  x'H x / 2 + g'x   subject to   low <= x <= high,      H symmetric positive definite

Forward, on `y = D^(1/2) x`, D the diagonal of H, so that the iteration does not depend on units: forty sweeps of
Peaceman-Rachford splitting (Lions and Mercier, SIAM J. Numer. Anal. 16 (1979) 964) guess the active set, a few
primal-dual active set steps (Hintermueller, Ito and Kunisch, SIAM J. Optim. 13 (2002) 865) solve most programs exactly.
They may cycle, on MPC programs they do; what they leave goes to projected Newton (Bertsekas, SIAM J. Control Optim. 20
(1982) 221, algorithm (32)-(38)): variables near a bound that the gradient pushes against take a gradient step, the
others the Newton step, along a path clipped to the box. Of the chords to its points at the steps 1, 1/2, 1/4, ... and
where it first meets a bound, the one of largest decrease is followed to its lowest point. Once the active set is found
the step is exact. An H shared by the batch is stored once.

Derivative: on the active set with bound values b, `x_A = b_A` and `H_FF x_F = -g_F - H_FA b_A`, hence

    dx_F = -H_FF^-1 (dg + dH x + H_FA db_A)_F,      dx_A = db_A.

One batched solve per product, made of plain operations, so derivatives of every order exist. A variable that rests on
its bound with zero multiplier is a kink, where derivatives are one-sided: one of the two is given, and `margin` tells
how near the next kink is.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals, saved
from sim2real.solve_report import UnconvergedError, UnconvergedWarning


@dataclass(frozen=True)
class BoxQPSolution:
    """Minimisers of a batch of box-constrained QPs; only `x` carries derivatives."""

    x: Tensor
    """`[..., n]`, inside the box to the last bit"""
    active: Tensor
    """`[..., n]`: -1 at low, 1 at high, 0 free"""
    converged: Tensor
    """`[...]` bool: residual <= tol"""
    residual: Tensor
    """`[...]`: largest `|y - clip(y - gradient in y)|` over the largest of `|y|`, `|gradient at 0|`; y = D^(1/2) x"""
    margin: Tensor
    """`[...]`: least multiplier of an active and least distance to a bound of a free variable, over the same scale"""


@dataclass(frozen=True)
class _Options:
    tol: float
    max_steps: int
    strict: bool


Program = tuple[Tensor, Tensor, Tensor, Tensor]
"""H `[B, n, n]`, or `[1, n, n]` for all, g, low and high `[B, n]`"""
SWEEPS = 40
CURVATURE = 0.4
"""that the splitting adds to H, whose eigenvalues have the mean 1 once it is scaled; tried on programs of many kinds"""
ACTIVE_SET_STEPS = 8


def box_qp(
    H: Tensor,
    g: Tensor,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
    *,
    tol: float = 1e-12,
    max_steps: int = 200,
    strict: bool = False,
) -> BoxQPSolution:
    """Minimise `x'H x / 2 + g'x` over `low <= x <= high`, batched, differentiable in H, g, low and high.

    H `[..., n, n]` (its symmetric part is used), g `[..., n]`, low and high numbers or `[..., n]`; infinite bounds are
    allowed and leading dimensions broadcast. Computes in float64, returns the dtype of g. Samples whose relative
    residual stays above `tol` within `max_steps` warn `UnconvergedWarning`, under `strict` raise `UnconvergedError`.
    Raises `ValueError` for shapes that do not fit, an H that is not positive definite, values that are not finite, and
    an empty box (low > high: the program is infeasible), naming the sample.
    """
    if not 0 < tol < 1 or max_steps < 1:
        raise ValueError(f"tol must lie in (0, 1) and max_steps be at least 1, got {tol} and {max_steps}")
    n = g.shape[-1] if g.ndim else 0
    limits = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (low, high))
    tensors = {"H": H, "g": g, **dict(zip(("low", "high"), limits, strict=True))}
    for name, value in tensors.items():
        wanted = (n, n) if name == "H" else (n,)
        fits = value.shape[-len(wanted) :] == wanted or (value.ndim == 0 and name in ("low", "high"))
        if n == 0 or not fits or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating point [..., {', '.join(map(str, wanted))}] for g {tuple(g.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    vectors = [tensors[name].to(g.device, torch.float64) for name in ("g", "low", "high")]
    lead = torch.broadcast_shapes(H.shape[:-2], *(x.shape[:-1] for x in vectors))
    matrix = H.to(g.device, torch.float64)
    matrix = (0.5 * (matrix + matrix.mT)).expand(*lead, n, n)
    options = _Options(tol, max_steps, strict)
    x, active, residual, margin = _BoxQP.apply(options, matrix, *(v.expand(*lead, n) for v in vectors))
    return BoxQPSolution(x.to(g.dtype), active, residual <= tol, residual, margin)


class _BoxQP(torch.autograd.Function):
    """options, H, g, low, high (equal leading dimensions, H symmetric) -> x, active, residual, margin."""

    @staticmethod
    def forward(options: _Options, H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        lead, n = g.shape[:-1], g.shape[-1]
        matrix = H.reshape(-1, n, n)
        matrix = matrix[:1] if matrix.stride(0) == 0 else matrix  # one H for all is factored once
        rows = matrix, g.reshape(-1, n), low.reshape(-1, n), high.reshape(-1, n)
        _check_values(*rows)
        x, active, residual, margin = _solve(*rows, options)
        _complain(residual, options)
        return x.reshape(g.shape), active.reshape(g.shape), residual.reshape(lead), margin.reshape(lead)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        kept = (inputs[1], *output[:2])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        H, x, active = saved(ctx)
        w = -_free_solve(H, active, grad)
        curvature = w.unsqueeze(-1) * x.unsqueeze(-2) if ctx.needs_input_grad[1] else None
        if not any(ctx.needs_input_grad[3:]):
            return None, curvature, w, None, None
        pulled = grad + _apply(H, w)
        zero = torch.zeros_like(pulled)
        return None, curvature, w, pulled.where(active < 0, zero), pulled.where(active > 0, zero)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        H, x, active = primals(ctx)
        dH, dg, dlow, dhigh = tangents
        bound, force = torch.zeros_like(x), torch.zeros_like(x)
        bound = bound if dlow is None else bound + dlow.where(active < 0, torch.zeros_like(x))
        bound = bound if dhigh is None else bound + dhigh.where(active > 0, torch.zeros_like(x))
        force = force if dH is None else force + _apply(dH, x)
        force = force if dg is None else force + dg
        return bound - _free_solve(H, active, force + _apply(H, bound)), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], options: _Options, *inputs: Tensor) -> Any:
        rows = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(inputs, in_dims[1:], strict=True)
        )
        return _BoxQP.apply(options, *rows), (0, 0, 0, 0)


def _free_solve(H: Tensor, active: Tensor, v: Tensor) -> Tensor:
    """w with `w_F = H_FF^-1 v_F`, `w_A = 0`."""
    free, zero = active == 0, torch.zeros_like(v)
    # not linalg.solve, whose derivatives are wrong in nested forward mode: pytorch/pytorch issue 192540
    factor = torch.linalg.cholesky_ex(_reduced(H, free)).L
    return torch.cholesky_solve(v.where(free, zero).unsqueeze(-1), factor).squeeze(-1).where(free, zero)


def _reduced(H: Tensor, free: Tensor) -> Tensor:
    """H of the free variables, the identity for the others."""
    eye, share = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device), free.to(H.dtype)
    return torch.lerp(eye, H, share.unsqueeze(-1) * share.unsqueeze(-2))  # exact at 0 and 1, faster than a mask


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    # a row times a matrix: batched multiplication does that several times faster
    return (vector.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def _check_values(H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> None:
    """Names the first sample that breaks a condition, and the condition."""
    conditions = (
        ((H.abs().amax((-2, -1)) < math.inf) & (g.abs().amax(-1) < math.inf), "H and g must be finite"),
        (torch.linalg.cholesky_ex(H).info == 0, "H is not positive definite; check the weights or add to the diagonal"),
        ((low.amax(-1) < math.inf) & (high.amin(-1) > -math.inf), "low or high leaves no number"),
        ((low <= high).all(-1), "infeasible: low > high"),
    )
    for holds, message in conditions:
        if not bool(holds.all()):
            row = int((~holds).nonzero()[0, 0])
            raise ValueError(f"box_qp, sample {row} of {g.shape[0]}: {message}; low {low[row]}, high {high[row]}")


def _complain(residual: Tensor, options: _Options) -> None:
    late = (~(residual <= options.tol)).nonzero()[:, 0].tolist()
    if not late:
        return
    message = (
        f"box_qp: {len(late)} of {residual.shape[0]} samples (first: {late[:5]}) have a relative residual up to "
        f"{float(residual.max()):.1e} > {options.tol:.1e} after at most {options.max_steps} steps; their derivatives "
        "belong to another point: raise max_steps, or tol when H is nearly singular"
    )
    if options.strict:
        raise UnconvergedError(message)
    warnings.warn(message, UnconvergedWarning, stacklevel=3)


def _solve(H: Tensor, g: Tensor, low: Tensor, high: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, active, residual, margin of `[B, n]` programs, solved in y = D^(1/2) x."""
    root = H.diagonal(dim1=-2, dim2=-1).sqrt()
    H, g, bounds = H / (root.unsqueeze(-1) * root.unsqueeze(-2)), g / root, (low * root, high * root)
    program = (H, g, *bounds)
    y, todo = _active_sets(program, _start(*program), options)
    y = _newton(program, y, todo, options) if len(todo) else y
    residual, slope, scale = _residual(*program, y)
    at_low, at_high = (y <= bounds[0]) & (slope > 0), (y >= bounds[1]) & (slope < 0)
    at_low = at_low | ((low == high) & (slope >= 0))
    active = at_high.to(y.dtype) - at_low.to(y.dtype)
    x = torch.where(at_low, low, torch.where(at_high, high, (y / root).clamp(low, high)))
    distance = torch.where(active == 0, torch.minimum(y - bounds[0], bounds[1] - y), slope.abs())
    distance = distance.where(low < high, torch.full_like(distance, math.inf))
    return x, active, residual, distance.amin(-1) / scale


def _slope(H: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """H symmetric."""
    if H.shape[0] == 1:
        return torch.addmm(g, y, H[0])
    return torch.baddbmm(g.unsqueeze(-2), y.unsqueeze(-2), H).squeeze(-2)


def _residual(H: Tensor, g: Tensor, low: Tensor, high: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relative residual `[B]`, gradient `[B, n]`, and the scale of both."""
    slope = _slope(H, g, y)
    scale = torch.maximum(y.abs().amax(-1), g.abs().amax(-1)).clamp_min(torch.finfo(y.dtype).tiny)
    return (y - (y - slope).clamp(low, high)).abs().amax(-1) / scale, slope, scale


def _start(H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """s `[B, n]`, near `y - gradient / c` at the minimiser y: outside the box where a bound is active.

    With c = CURVATURE: `s <- 2 x - r`, where `r = 2 clip(s) - s` and `x = (H + c I)^-1 (c r - g)`; one product. In
    single precision, since it is a guess.
    """
    eye = torch.eye(g.shape[-1], device=g.device)
    inverse = torch.linalg.inv(H.float() + CURVATURE * eye)
    reflection, offset = 2 * CURVATURE * inverse - eye, -2 * _apply(inverse, g.float())
    s, low, high = offset, low.float(), high.float()
    for _ in range(SWEEPS):
        s = _slope(reflection, offset, torch.lerp(s, s.clamp(low, high), 2.0))
    return s.to(g.dtype).nan_to_num()  # what is beyond single precision begins at 0


def _active_sets(program: Program, ahead: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """y, and the rows not solved, whose y is the guess it began with; first active set: where `ahead` is outside."""
    y, part = ahead.clamp(*program[2:]), program
    todo = torch.arange(y.shape[0], device=y.device)
    for _ in range(min(ACTIVE_SET_STEPS, options.max_steps)):
        H, g, low, high = part
        at_low, at_high = ahead <= low, ahead >= high
        bound = torch.where(at_low, low, torch.where(at_high, high, 0.0))
        guess = bound + _direction(H, _slope(H, g, bound), at_low | at_high, 0.0)
        residual, slope, _ = _residual(*part, guess)
        done = residual <= options.tol
        y = y.index_copy(0, todo[done], guess[done])
        if bool(done.all()):
            return y, todo[:0]
        todo, ahead, part = todo[~done], (guess - slope)[~done], _rows(part, ~done)
    return y, todo


def _rows(program: Program, which: Tensor) -> Program:
    H, *vectors = program
    g, low, high = (v[which] for v in vectors)
    return (H if H.shape[0] == 1 else H[which]), g, low, high


def _newton(program: Program, y: Tensor, todo: Tensor, options: _Options) -> Tensor:
    """Steps of the rows `todo` whose residual is above tol, until none is or none moves."""
    part = _rows(program, todo)
    for _ in range(options.max_steps):
        late = _residual(*part, y[todo])[0] > options.tol
        if not bool(late.any()):
            break
        if not bool(late.all()):
            todo, part = todo[late], _rows(part, late)
        following = _newton_step(*part, y[todo])
        if bool((following == y[todo]).all()):  # rounding: no step decreases the objective
            break
        y = y.index_copy(0, todo, following)
    return y


def _newton_step(H: Tensor, g: Tensor, low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    residual, slope, scale = _residual(H, g, low, high, y)
    near = (residual.clamp_max(1e-3) * scale).unsqueeze(-1)
    held = ((y <= low + near) & (slope > 0)) | ((y >= high - near) & (slope < 0))
    direction, pinned = _direction(H, slope, held), torch.zeros_like(held)
    for _ in range(3):  # what sits on its bound and would leave the box stays, and the others turn accordingly
        outward = ~held & (((y <= low) & (direction < 0)) | ((y >= high) & (direction > 0)))
        if not bool(outward.any()):
            break
        held, pinned = held | outward, pinned | outward
        direction = _direction(H, slope.where(~pinned, torch.zeros_like(slope)), held)
    bound = torch.where(direction > 0, high, low)
    kinks = torch.where(direction == 0, math.inf, (bound - y) / direction)
    halves = 0.5 ** torch.arange(10, dtype=y.dtype, device=y.device)
    first = torch.where(kinks > 0, kinks, 1.0).amin(-1, keepdim=True).clamp_max(1.0)
    lengths = torch.cat([halves.expand(y.shape[0], -1), first], -1).unsqueeze(-1)
    straight = y.unsqueeze(-2) + lengths * direction.unsqueeze(-2)
    trial = torch.where(lengths >= kinks.unsqueeze(-2), bound.unsqueeze(-2), straight)
    move = trial - y.unsqueeze(-2)
    # along a chord the objective is a parabola whose best point is inside the box: a decrease wherever it slopes down
    fall, curvature = -(move * slope.unsqueeze(-2)).sum(-1), (move * (move @ H)).sum(-1)
    share = (fall / curvature).nan_to_num(0.0).clamp(0.0, 1.0)
    share = torch.where(share > 1 - 1e-9, 1.0, share)
    best, index = (share * (fall - 0.5 * share * curvature)).max(-1)
    chosen = index[:, None, None].expand(-1, 1, y.shape[-1])
    whole, part = trial.gather(-2, chosen).squeeze(-2), share.gather(-1, index[:, None])
    following = torch.where(part == 1, whole, y + part * (whole - y))
    return torch.where((best > 0).unsqueeze(-1), following, y)


def _direction(H: Tensor, slope: Tensor, held: Tensor, gradient_step: float = 1.0) -> Tensor:
    """Newton on the free variables; a held one takes the given share of the plain gradient step."""
    reduced = _reduced(H, ~held)
    rhs = torch.where(held, gradient_step * slope, slope)
    return -torch.cholesky_solve(rhs.unsqueeze(-1), torch.linalg.cholesky_ex(reduced).L).squeeze(-1)
