"""Audit of a sensitivity: the optimum is found again at shifted theta, and its moves are compared with the product.

For `w = (dnu*/dtheta)^T g` and a direction v the number `<w, v>` must be the slope at h = 0 of

    f(h) = <g, nu*(theta + h v)>,

whatever trains nu*: no derivative of J is used. Central differences at h and h/2, extrapolated, give the slope; their
disagreement is the noise of the audit (of the solver, and of what is not smooth within h). Slopes that hold on each
side but differ from one side to the other are a kink at theta, where no derivative exists.

The directions are `v = scale z`, z standard normal, so that `E <e, v>^2 = |scale e|^2` for an error e of w: the root
mean square over k directions estimates its norm, and `sum_i <e, v_i>^2 / |scale e|^2` has the chi-square distribution
with k degrees of freedom, whose 5 % quantile makes a 95 % upper limit. Up to k parameters the unit directions are taken
instead, and the norm is exact. Reference: Press et al., Numerical Recipes, 3rd ed., 2007, section 5.7 (differences and
their extrapolation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.stats import chi2
from torch import Tensor

from sim2real.params import Params, axpy, check_same_keys, dot, map_params, ravel, unravel

Resolve = Callable[[Params, Params], Params]
"""theta, nu0 -> nu*(theta), any solver or trainer"""

_LEVEL = 0.05
_STEPS = (1e-4, 1e-6, 1e-3, 1e-2)
_QUIET = 0.01


@dataclass(frozen=True)
class Audit:
    """What k re-solves say of a product w; norms are those of `scale w`."""

    error: float
    """estimated norm of the error of w"""
    bound: float
    """above the norm of the error with 95 % confidence, the noise included"""
    noise: float
    """estimated norm of the error of the audit itself; infinite where a re-solve failed"""
    size: float
    """estimated norm of the true product"""
    kink: float
    """largest jump of the slope from one side of theta to the other; 0 where f is smooth"""
    claimed: Tensor
    """`<w, v>` `[k]`"""
    measured: Tensor
    """the slopes found `[k]`"""
    failure: str = ""
    """what a re-solve at a shifted theta raised"""


def audit(
    optimum: Resolve,
    theta: Params,
    nu: Params,
    product: Params,
    cotangent: Params,
    *,
    directions: int = 3,
    step: float | None = None,
    scale: Params | None = None,
    generator: torch.Generator | None = None,
) -> Audit:
    """Compare `product`, the claimed `(dnu*/dtheta)^T cotangent`, with re-solves at theta +- h v and +- h v / 2.

    `optimum(theta, nu0)` is called 4 `directions` times for every step tried, and once more, with nu0 = nu. `scale`
    (keys and shapes of theta; ones when None) sets the units of theta: how far each entry may reasonably move, 0 for
    fixed ones. h moves no parameter by more than `step` times its size (the root mean square of its tensor, 1 for a
    zero one). `step` None tries 1e-4 (smooth), 1e-6 (kinks near by), 1e-3 and 1e-2 (noisy solvers) until the noise is
    below 1 % of the slopes, and keeps the quietest. A re-solve that raises `ValueError` or `RuntimeError` at a shifted
    theta has failed; at theta itself it raises.
    Raises `ValueError` for bad options, `KeyError` for keys that do not match.
    """
    steps = _STEPS if step is None else (step,)
    if directions < 1 or not all(0 < each < 1 for each in steps):
        raise ValueError(f"directions must be at least 1 and step in (0, 1), got {directions} and {step}")
    check_same_keys(theta, product, "the product to audit")
    check_same_keys(nu, cotangent, "the cotangent of the audit")
    theta, g = ({k: v.detach().double() for k, v in p.items()} for p in (theta, cotangent))
    moves, whole = _directions(theta, scale, directions, generator)
    size = map_params(_typical, theta)

    failures: list[str] = []

    def f(shifted: Params) -> float:
        found = optimum(shifted, nu)
        return float(dot(g, {key: found[key].detach().double() for key in g}))

    def tried(shifted: Params) -> float:
        try:
            return f(shifted)
        except (ValueError, RuntimeError) as failure:  # unstable, infeasible, unconverged: reported, not hidden
            failures.append(str(failure))
            return float("nan")

    center, claim = f(theta), {key: value.detach().double() for key, value in product.items()}
    claimed = torch.stack([dot(claim, v) for v in moves])
    best: Audit | None = None
    for each in steps:
        rows = [_slopes(tried, theta, v, center, each * _reach(size, v)) for v in moves]
        found = _summary(claimed, torch.tensor(rows, dtype=torch.float64), whole)
        best = found if best is None or found.noise < best.noise else best
        if best.noise <= _QUIET * best.size or best.kink > _QUIET * best.size:
            break
    assert best is not None
    return replace(best, failure=failures[0] if failures and best.noise == float("inf") else "")


def _summary(claimed: Tensor, rows: Tensor, whole: bool) -> Audit:
    """Norms from slopes, noises and jumps `[k, 3]`."""
    measured, noises, jumps = rows.unbind(1)
    count = 1 if whole else len(rows)
    root = lambda values: float(values.square().sum() / count) ** 0.5
    error, noise, finite = root(claimed - measured), root(noises), bool(torch.isfinite(rows).all())
    share = 1.0 if whole else float(chi2.ppf(_LEVEL, count)) / count
    return Audit(
        error=error,
        bound=error / share**0.5 + noise if finite else float("inf"),
        noise=noise if finite else float("inf"),
        size=root(measured),
        kink=float(jumps.max()),
        claimed=claimed,
        measured=measured,
    )


def _directions(
    theta: Params, scale: Params | None, count: int, generator: torch.Generator | None
) -> tuple[list[Params], bool]:
    """The directions, and whether they are all of the units."""
    if scale is not None:
        check_same_keys(theta, scale, "scale")
    units = ravel(scale).double() if scale is not None else torch.ones_like(ravel(theta))
    if not bool(units.any()):
        raise ValueError("scale is zero everywhere: no parameter may move, so there is nothing to audit")
    moving = units.nonzero().flatten()
    if len(moving) <= count:
        return [unravel(row, theta) for row in torch.diag(units)[moving]], True
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    z = torch.randn(count, len(units), generator=rng, dtype=torch.float64).to(units.device)
    return [unravel(row, theta) for row in z * units], False


def _typical(value: Tensor) -> Tensor:
    size = value.square().mean().sqrt()
    return size if bool(size > 0) else torch.ones_like(size)


def _reach(size: Params, v: Params) -> float:
    """The largest h that moves no parameter by more than its size."""
    return min(float(size[key] / v[key].abs().max().clamp(min=1e-300)) for key in v)


def _slopes(
    f: Callable[[Params], float], theta: Params, v: Params, center: float, h: float
) -> tuple[float, float, float]:
    """Slope of f along v, its uncertainty, and the jump of the slope at theta (0: none seen)."""
    (up, down), (half_up, half_down) = ([f(axpy(sign * part * h, v, theta)) for sign in (1, -1)] for part in (1, 0.5))
    wide, narrow = (up - down) / (2 * h), (half_up - half_down) / h
    right, left = 2 * (half_up - center) / h, 2 * (center - half_down) / h
    # a kink: both one-sided slopes stay as they are when the step is doubled, and are not the same
    unsteady = abs((up - center) / h - right) + abs((center - down) / h - left)
    jump = abs(right - left)
    return (4 * narrow - wide) / 3, abs(wide - narrow), jump if unsteady < 0.5 * jump else 0.0
