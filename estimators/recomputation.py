"""The product `w = (dnu*/dtheta)^T g` computed anew from J alone, with an estimate of its own error.

With `A = -J_nunu`, `C = J_nutheta` and `w = C' A^-1 g` at the maximiser nu*, four things stand between w and what can
be computed at a given nu, and each is measured:

    stationarity   nu moves to the maximiser by Newton steps `d = A^-1 grad_nu J`; where they do not settle, the change
                   of w along them counts as error
    damping        only where A is singular or slightly indefinite (networks): `w(delta) = C' (A + delta)^-1 g` where it
                   changes least with delta; its change there counts as error, and so does that along a Newton step
    residual       `|C| |g - A x| / mu`, mu the lowest curvature known; where that is too coarse a further solve with
                   the residual as right-hand side, `C' A^-1 (g - A x)`, is added and counts instead
    rounding       `10 eps (lambda / mu) |C| |x|`, lambda the largest curvature; 1e-9 for 10 eps with differences

and the products A x and C' x are compared with differences of grad J, which needs J once differentiable only, so that
a derivative that is silently zero under a second differentiation shows; its effect on w counts as error. Nothing is
shared with the backends of `Sensitivity`. References: Deuflhard, Newton Methods for Nonlinear Problems, 2011, section
2.1 (the next correction as the error estimate); Pearlmutter, Neural Computation 6 (1994) 147 (their differences).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from sim2real.estimators.damping_plateau import Product, plateau_product
from sim2real.estimators.second_order import (
    DIFFERENCE,
    LocalProducts,
    Objective,
    bend,
    by_differences,
    local_products,
    size_of,
)
from sim2real.params import Params, axpy, map_params
from sim2real.solvers.linear import cg
from sim2real.solvers.spectrum import Spectrum, spectrum

Norm = Callable[[Params], float]

_EPS = torch.finfo(torch.float64).eps
# Below -1e-4 of the largest curvature nu is no maximiser; above, networks that are trained well enough have some.
_INDEFINITE = 1e-4
# One-sided slopes of the gradient of a smooth J differ by about 1e-5 of the largest curvature.
_SMOOTH = 1e-2
_NEWTON_STEPS = 5
# A with less curvature than this, relative to the largest, counts as singular.
_SINGULAR = 1e-10


@dataclass(frozen=True)
class Recomputation:
    """`value` is w at the maximiser next to the nu given; None where `obstacles` say that there is no such thing."""

    value: Params | None
    uncertainty: float
    """estimated norm of the error of `value`"""
    remainder: float
    """the way to the maximiser that is left, over the way that was gone (0: none was left)"""
    nu: Params
    """the maximiser"""
    obstacles: tuple[str, ...]
    info: dict[str, float]


def recompute(
    J: Objective,
    theta: Params,
    nu: Params,
    cotangent: Params,
    *,
    norm: Norm,
    derivative_order: Literal[1, 2] = 2,
    max_steps: int = 300,
) -> Recomputation:
    """w at the maximiser of `J(theta, .)` next to nu, in float64; `norm` measures products of the shape of theta.

    `max_steps` limits each linear solve (one Hessian-vector product a step). About twice the cost of one product where
    nu is stationary and A well conditioned, plus 40 Hessian-vector products for the spectrum.
    """
    theta, nu, g = _double(theta), _double(nu), _double(cotangent)
    start = local_products(J, theta, nu, derivative_order)
    if not (_finite(start.gradient) and _finite(start.curvature(_ones(nu)))):
        text = "grad_nu J or its derivative is not finite at (theta, nu): mask what diverges, or start from another nu"
        return Recomputation(None, math.inf, 0.0, nu, (text,), {})
    probe = spectrum(start.curvature, nu, starts=(start.gradient,) if size_of(start.gradient) > 0 else ())
    info = {"lowest_curvature": probe.lowest, "largest_curvature": probe.largest}
    info |= {"stationarity": size_of(start.gradient)}
    if obstacle := _no_maximum(probe.lowest, probe.largest):
        return Recomputation(None, math.inf, 0.0, nu, (obstacle,), info)
    found = None
    if probe.lowest > _SINGULAR * probe.largest:
        found = _at_maximum(J, theta, nu, g, start, probe, norm, derivative_order, max_steps)
    if found is None:
        found = _on_plateau(J, theta, nu, g, start, probe, norm, derivative_order, max_steps)
    product, polished, remainder = found
    info |= {"newton_move": _distance(nu, polished), "newton_remainder": remainder}
    info |= {"damping": product.damping, "residual": product.residual, "lowest_curvature": product.lowest}
    obstacles = tuple(text for text in (_no_maximum(product.lowest, probe.largest), _unsettled(remainder)) if text)
    effect = 0.0
    if not obstacles and derivative_order == 2:
        effect, obstacles = _disagreement(J, theta, polished, product, probe, norm, info)
    return Recomputation(product.value, product.error + effect, min(remainder, 1.0), polished, obstacles, info)


def _unsettled(remainder: float) -> str:
    if remainder <= 0.5:
        return ""
    return f"no maximum is near nu: Newton's last step is {remainder:.2g} times its whole way, allowed 0.5; train on"


def _at_maximum(
    J: Objective,
    theta: Params,
    nu: Params,
    g: Params,
    start: LocalProducts,
    probe: Spectrum,
    norm: Norm,
    order: Literal[1, 2],
    max_steps: int,
) -> tuple[Product, Params, float] | None:
    """w where Newton leads from nu, that point, and the way left over the way gone; None where A proves singular."""
    polished, remainder = _maximiser(J, theta, nu, start, probe, order)
    local = start if polished is nu else local_products(J, theta, polished, order)
    product = _definite_product(local, g, probe, norm, order, max_steps)
    if product is not None:  # what is left of the way, where nothing was gone to tell the effect by
        left = size_of(local.gradient) / product.lowest / (1.0 + size_of(polished))
        product = replace(product, error=product.error + 10 * left * norm(product.value))
    if product is not None and remainder > 0.1:
        before = _definite_product(start, g, probe, norm, order, max_steps)
        if before is None:
            return None
        product = replace(product, error=product.error + _gap(norm, before.value, product.value))
    return None if product is None else (product, polished, remainder)


def _on_plateau(
    J: Objective,
    theta: Params,
    nu: Params,
    g: Params,
    start: LocalProducts,
    probe: Spectrum,
    norm: Norm,
    order: Literal[1, 2],
    max_steps: int,
) -> tuple[Product, Params, float]:
    """w with the damping it depends on least, at nu; how far a damped Newton step moves it counts as error."""
    product = plateau_product(start, g, probe, norm, max_steps)
    size = size_of(start.gradient)
    solve = partial(cg, damping=product.damping, tol=1e-3, max_steps=max_steps)
    step = solve(start.curvature, start.gradient).x if size > 0 else start.gradient
    drift = math.inf
    for share in (1.0, 0.25, 0.0625):
        moved = _moved(J, theta, axpy(share, step, nu), order)
        believed = moved is not None and size_of(moved.gradient) <= size  # Newton's model holds that far
        if moved is not None and (believed or share == 0.0625):
            change = _gap(norm, moved.cross(solve(moved.curvature, g).x), product.value)
            drift = change if believed else change / share
        if believed:
            break
    return replace(product, error=product.error + drift), nu, 0.0


def product_at(
    J: Objective, theta: Params, nu: Params, cotangent: Params, *, norm: Norm, derivative_order: Literal[1, 2] = 2
) -> Params:
    """`C' A^-1 g` at nu itself, wherever it is: what an exact backend would return there."""
    theta, nu, g = _double(theta), _double(nu), _double(cotangent)
    local = local_products(J, theta, nu, derivative_order)
    probe = spectrum(local.curvature, nu)
    product = None
    if probe.lowest > _SINGULAR * probe.largest:
        product = _definite_product(local, g, probe, norm, derivative_order, 300)
    return (product or plateau_product(local, g, probe, norm, 150)).value


def _no_maximum(lowest: float, largest: float) -> str:
    scale = max(abs(lowest), abs(largest))
    if scale == 0:
        return "J_nunu = 0: J is linear in nu, or its model has no second derivative; pass derivative_order=1"
    if lowest >= -_INDEFINITE * scale:
        return ""
    return (
        f"nu is no maximum of J: -J_nunu has the eigenvalue {lowest:.2e}, below -{_INDEFINITE:g} times the largest, "
        f"{scale:.2e}; train on, past this saddle"
    )


def _maximiser(
    J: Objective, theta: Params, nu: Params, local: LocalProducts, probe: Spectrum, order: Literal[1, 2]
) -> tuple[Params, float]:
    """Newton from nu: the point reached (nu itself where it is the maximum), and the way left over the way gone."""
    start, before, length = nu, math.inf, 0.0
    for _ in range(_NEWTON_STEPS):
        allowed = (1e-12 if order == 2 else 1e-9) * (1.0 + size_of(nu))
        if size_of(local.gradient) <= allowed * probe.lowest:
            return nu, 0.0
        step = cg(local.curvature, local.gradient, tol=1e-6, max_steps=300).x
        length = size_of(step)
        if not length < 0.5 * before:
            break
        following = axpy(1.0, step, nu)
        moved = _moved(J, theta, following, order)
        if moved is None:
            break
        nu, local, before = following, moved, length
        if length <= allowed:
            return nu, 0.0
    gone = _distance(nu, start)
    return nu, length / gone if gone > 0 else math.inf


def _moved(J: Objective, theta: Params, nu: Params, order: Literal[1, 2]) -> LocalProducts | None:
    """None where a step has left the domain of J (an unstable gain, say)."""
    try:
        local = local_products(J, theta, nu, order)
    except ValueError:
        return None
    return local if _finite(local.gradient) else None


def _definite_product(
    local: LocalProducts, g: Params, probe: Spectrum, norm: Norm, order: Literal[1, 2], max_steps: int
) -> Product | None:
    """`C' A^-1 g` by conjugate gradients; None where they do not converge or meet negative curvature."""
    solution = cg(local.curvature, g, tol=1e-10 if order == 2 else 1e-7, max_steps=max_steps)
    report, x = solution.report, solution.x
    if report.negative_curvature is not None or report.residual > 1e-6:
        return None
    lowest = min(probe.lowest, report.eigenvalues[0]) if report.eigenvalues else probe.lowest
    value, cross_size = local.cross(x), _cross_size(local, g, norm)
    r = map_params(lambda gk, ak: gk - ak, g, local.curvature(x))
    error = cross_size * size_of(r) / lowest
    if error > 1e-8 * norm(value):  # the coarse bound could matter: solve for what the residual stands for
        fix = cg(local.curvature, r, tol=1e-2, max_steps=max_steps).x
        change = local.cross(fix)
        x, value, error = axpy(1.0, fix, x), axpy(1.0, change, value), min(error, norm(change))
    error += (10 * _EPS if order == 2 else 1e-9) * (probe.largest / lowest) * cross_size * size_of(x)
    return Product(value, x, error, 0.0, report.residual, lowest)


def _cross_size(local: LocalProducts, like: Params, norm: Norm) -> float:
    """Frobenius norm of C, the root mean square of `|C' z|` over three standard normal z."""
    generator = torch.Generator().manual_seed(0)
    squares = [norm(local.cross(_normal(like, generator))) ** 2 for _ in range(3)]
    return (sum(squares) / len(squares)) ** 0.5


def _disagreement(
    J: Objective, theta: Params, nu: Params, product: Product, probe: Spectrum, norm: Norm, info: dict[str, float]
) -> tuple[float, tuple[str, ...]]:
    """What differences of grad J along x, in the place of A x and C' x, would change of w; and why they may not do."""
    local, x = local_products(J, theta, nu, 2), product.x
    near, far = (by_differences(J, theta, nu, x, step) for step in (DIFFERENCE, 4 * DIFFERENCE))
    off, change = axpy(-1.0, local.curvature(x), near[0]), axpy(-1.0, local.cross(x), near[1])
    noise = 3 * _distance(near[0], far[0]), 3 * _gap(norm, near[1], far[1])
    effect = norm(change) if norm(change) > noise[1] else 0.0
    if size_of(off) > noise[0]:
        fix = cg(local.curvature, off, damping=product.damping, tol=1e-2, max_steps=300).x
        effect += norm(local.cross(fix))
    rough = size_of(bend(J, theta, nu, x, DIFFERENCE)) / max(probe.largest * size_of(x), 1e-300)
    info |= {"mismatch": effect, "roughness": rough}
    if rough <= _SMOOTH:
        return effect, ()
    text = (
        f"the slope of grad J jumps by {rough:.1e} of the largest within a relative step of {DIFFERENCE:.0e}, more "
        f"than {_SMOOTH:g}: nu sits at a kink, where the derivative is one-sided; move theta away from it"
    )
    return effect, (text,)


def _double(params: Params) -> Params:
    return {key: value.detach().double() for key, value in params.items()}


def _ones(params: Params) -> Params:
    return {key: torch.ones_like(value) for key, value in params.items()}


def _normal(like: Params, generator: torch.Generator) -> Params:
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) for k, v in like.items()}


def _finite(params: Params) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in params.values())


def _distance(a: Params, b: Params) -> float:
    return size_of(axpy(-1.0, b, a))


def _gap(norm: Norm, a: Params, b: Params) -> float:
    return norm(axpy(-1.0, b, a))
