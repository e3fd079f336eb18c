"""The product `w = (dnu*/dtheta)^T g` computed anew from J alone, with an estimate of its own error.

With `A = -J_nunu`, `C = J_nutheta` and `w = C' A^-1 g` at the maximiser nu*, four things stand between w and what can
be computed at a given nu, and each is measured:

    stationarity   nu moves to the maximiser by Newton steps `d = A^-1 grad_nu J`; where they do not settle, the change
                   of w along them counts as error
    damping        only where A is singular or slightly indefinite: `w(0) = w(delta) + delta C' (A + delta)^-2 g + ...`,
                   whose first-order term is added, and counts as error
    residual       `|C| |g - A x| / mu`, mu the lowest curvature known; where that is too coarse a further solve with
                   the residual as right-hand side, `C' A^-1 (g - A x)`, is added and counts instead
    rounding       `10 eps (lambda / mu) |C| |x|`, lambda the largest curvature

and the products A x and C' x are compared with differences of grad J, which needs J once differentiable only, so that
a derivative that is silently zero under a second differentiation shows. Nothing is shared with the backends of
`Sensitivity`. References: Deuflhard, Newton Methods for Nonlinear Problems, 2011, section 2.1 (the next correction as
the error estimate); Pearlmutter, Neural Computation 6 (1994) 147 (products by differences of gradients).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sim2real.params import Params, axpy, dot, map_params
from sim2real.solvers.linear import cg
from sim2real.solvers.spectrum import Spectrum, spectrum

Objective = Callable[[Params, Params], Tensor]
Norm = Callable[[Params], float]

_EPS = torch.finfo(torch.float64).eps
# Below -1e-4 of the largest curvature nu is no maximiser; above, networks that are trained well enough have some.
_INDEFINITE = 1e-4
# Relative step of differences of gradients: the cube root of eps, where truncation and rounding are of one size.
_DIFFERENCE = 6e-6
# The products of a smooth J agree with differences of its gradients to about 1e-8 of the largest curvature.
_AGREE = 1e-3
_NEWTON_STEPS = 5


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


@dataclass(frozen=True)
class _Local:
    """At (theta, nu): grad_nu J, `A x` and `C' x`."""

    gradient: Params
    curvature: Callable[[Params], Params]
    cross: Callable[[Params], Params]


@dataclass(frozen=True)
class _Product:
    """`w = C' A^-1 g` at one nu, with its error and what it took."""

    value: Params
    x: Params
    error: float
    damping: float
    residual: float
    lowest: float
    status: str


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
    start = _local(J, theta, nu, derivative_order)
    if not (_finite(start.gradient) and _finite(start.curvature(_ones(nu)))):
        text = "grad_nu J or its derivative is not finite at (theta, nu): mask what diverges, or start from another nu"
        return Recomputation(None, math.inf, 0.0, nu, (text,), {})
    probe = spectrum(start.curvature, nu, starts=(start.gradient,) if _size(start.gradient) > 0 else ())
    info = {"lowest_curvature": probe.lowest, "largest_curvature": probe.largest}
    if obstacle := _no_maximum(probe.lowest, probe.largest):
        return Recomputation(None, math.inf, 0.0, nu, (obstacle,), info)
    damping = _least_damping(probe)
    polished, moved, remainder = _maximiser(J, theta, nu, start, probe, damping, derivative_order)
    local = start if moved == 0 else _local(J, theta, polished, derivative_order)
    info |= {"stationarity": _size(start.gradient), "newton_move": moved, "newton_remainder": remainder}
    product = _product(local, g, probe, damping, norm, derivative_order, max_steps)
    info |= {"damping": product.damping, "residual": product.residual, "lowest_curvature": product.lowest}
    if obstacle := _no_maximum(product.lowest, probe.largest):
        return Recomputation(None, math.inf, remainder, polished, (obstacle,), info)
    uncertainty = product.error
    if remainder > 0.1:
        drift = _product(start, g, probe, product.damping, norm, derivative_order, max_steps)
        uncertainty += norm(axpy(-1.0, drift.value, product.value))
    obstacles = ()
    if derivative_order == 2:
        obstacles = _disagreement(J, theta, polished, g, product, probe, norm, info)
    return Recomputation(product.value, uncertainty, min(remainder, 1.0), polished, obstacles, info)


def product_at(
    J: Objective, theta: Params, nu: Params, cotangent: Params, *, norm: Norm, derivative_order: Literal[1, 2] = 2
) -> Params:
    """`C' A^-1 g` at nu itself, wherever it is: what an exact backend would return there."""
    theta, nu, g = _double(theta), _double(nu), _double(cotangent)
    local = _local(J, theta, nu, derivative_order)
    probe = spectrum(local.curvature, nu)
    return _product(local, g, probe, _least_damping(probe), norm, derivative_order, 300).value


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


def _least_damping(probe: Spectrum) -> float:
    """0 where A is definite; else what lifts the lowest curvature met well above zero."""
    scale = max(abs(probe.lowest), abs(probe.largest))
    return 0.0 if probe.lowest > 1e-10 * scale else max(3 * abs(probe.lowest), 1e-9 * scale)


def _maximiser(
    J: Objective, theta: Params, nu: Params, local: _Local, probe: Spectrum, damping: float, order: Literal[1, 2]
) -> tuple[Params, float, float]:
    """Newton from nu: the point reached, its distance from nu, and the way left over the way gone (inf: divergence)."""
    start, before = nu, math.inf
    lowest = max(probe.lowest + damping, 1e-12 * probe.largest)
    for _ in range(_NEWTON_STEPS):
        allowed = (1e-12 if order == 2 else 1e-9) * (1.0 + _size(nu))
        if _size(local.gradient) / lowest <= allowed:
            return nu, _distance(nu, start), 0.0
        step = cg(local.curvature, local.gradient, damping=damping, tol=1e-6, max_steps=300).x
        length = _size(step)
        if not length < 0.5 * before:
            break
        following = axpy(1.0, step, nu)
        moved = _local(J, theta, following, order)
        if not _finite(moved.gradient):
            break
        nu, local = following, moved
        if length <= allowed:
            return nu, _distance(nu, start), 0.0
        before = length
    gone = _distance(nu, start)
    return nu, gone, length / gone if gone > 0 else math.inf


def _product(
    local: _Local, g: Params, probe: Spectrum, damping: float, norm: Norm, order: Literal[1, 2], max_steps: int
) -> _Product:
    """`C' A^-1 g`, with the least damping that CG can work with, and the first-order effect of that damping undone."""
    tol, scale = (1e-10 if order == 2 else 1e-7), probe.largest
    lowest = probe.lowest
    for attempt in range(4):
        solution = cg(local.curvature, g, damping=damping, tol=tol, max_steps=max_steps)
        report = solution.report
        lowest = min(lowest, report.eigenvalues[0] if report.eigenvalues else lowest)
        if report.converged or _no_maximum(lowest, scale) or attempt == 3:
            break
        curved = report.negative_curvature is not None and report.negative_curvature + damping <= 0
        damping = 3 * abs(lowest) if curved else max(1e-8 * scale, 30 * damping)
    x, r = solution.x, _residual(local, g, solution.x, damping)
    value, mu = local.cross(x), max(lowest + damping, _EPS * scale)
    cross_size = _cross_size(local, g, norm)
    error = cross_size * _size(r) / mu
    if error > 1e-8 * norm(value):  # the coarse bound could matter: solve for what the residual stands for
        fix = cg(local.curvature, r, damping=damping, tol=1e-2, max_steps=max_steps).x
        change = local.cross(fix)
        x, value, error = axpy(1.0, fix, x), axpy(1.0, change, value), min(error, norm(change))
    if damping > 0:
        bias = cg(local.curvature, x, damping=damping, tol=1e-3, max_steps=max_steps).x
        change = {key: damping * part for key, part in local.cross(bias).items()}
        value, error = axpy(1.0, change, value), error + norm(change)
    error += 10 * _EPS * (scale / mu) * cross_size * _size(x) if damping == 0 else 0.0
    return _Product(value, x, error, damping, report.residual, lowest, report.status)


def _residual(local: _Local, g: Params, x: Params, damping: float) -> Params:
    return map_params(lambda gk, ak, xk: gk - ak - damping * xk, g, local.curvature(x), x)


def _cross_size(local: _Local, like: Params, norm: Norm) -> float:
    """Frobenius norm of C, the root mean square of `|C' z|` over three standard normal z."""
    generator = torch.Generator().manual_seed(0)
    squares = [norm(local.cross(_normal(like, generator))) ** 2 for _ in range(3)]
    return (sum(squares) / len(squares)) ** 0.5


def _disagreement(
    J: Objective,
    theta: Params,
    nu: Params,
    g: Params,
    product: _Product,
    probe: Spectrum,
    norm: Norm,
    info: dict[str, float],
) -> tuple[str, ...]:
    """Where A x and C' x are not what differences of grad J along x say."""
    local = _local(J, theta, nu, 2)
    exact = local.curvature(product.x), local.cross(product.x)
    near, far = (_by_differences(J, theta, nu, product.x, step) for step in (_DIFFERENCE, 4 * _DIFFERENCE))
    size = max(_size(exact[0]), _size(g))
    off = (
        max(_distance(near[0], exact[0]) - 3 * _distance(near[0], far[0]), 0.0) / max(size, 1e-300),
        max(_gap(norm, near[1], exact[1]) - 3 * _gap(norm, near[1], far[1]), 0.0) / max(norm(exact[1]), 1e-300),
    )
    rough = _distance(near[0], far[0]) / max(probe.largest * _size(product.x), 1e-300)
    info |= {"curvature_mismatch": off[0], "cross_mismatch": off[1], "roughness": rough}
    found = []
    for name, mismatch in zip(("J_nunu", "J_nutheta"), off, strict=True):
        # a product of zero norm has no relative error
        if mismatch > _AGREE and not (name == "J_nutheta" and norm(near[1]) <= 1e-9 * max(1.0, norm(exact[1]))):
            found.append(
                f"products with {name} differ from differences of grad J by {mismatch:.1e}, relative, more than "
                f"{_AGREE:g}: a part of the model has a wrong or silently zero second derivative; pass "
                "derivative_order=1 or mend its backward"
            )
    if rough > _AGREE:
        found.append(
            f"grad J bends by {rough:.1e} of its slope within a relative step of {4 * _DIFFERENCE:.0e}, more than "
            f"{_AGREE:g}: nu sits at a kink, where the derivative is one-sided; move theta away from it"
        )
    return tuple(found)


def _by_differences(J: Objective, theta: Params, nu: Params, x: Params, step: float) -> tuple[Params, Params]:
    """`A x` and `C' x` by central differences of the gradient of J along x."""
    h = step * max(1.0, _size(nu)) / max(_size(x), 1e-300)
    (theta_up, nu_up), (theta_down, nu_down) = (_gradients(J, theta, axpy(s * h, x, nu)) for s in (1, -1))
    slope = lambda up, down: {key: (up[key] - down[key]) / (2 * h) for key in up}
    return {key: -value for key, value in slope(nu_up, nu_down).items()}, slope(theta_up, theta_down)


def _gradients(J: Objective, theta: Params, nu: Params, *, create_graph: bool = False) -> tuple[Params, Params]:
    """grad_theta J and grad_nu J at theta and nu, which must be leaves where a graph is kept."""
    if not create_graph:
        theta, nu = _leaves(theta), _leaves(nu)
    with torch.enable_grad():
        value = J(theta, nu)
        if value.numel() != 1:
            raise ValueError(f"J must return a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("J depends differentiably neither on theta nor on nu")
        inputs = [*theta.values(), *nu.values()]
        options = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(value.reshape(()), inputs, create_graph=create_graph, **options)
    return dict(zip(theta, grads, strict=False)), dict(zip(nu, grads[len(theta) :], strict=True))


def _local(J: Objective, theta: Params, nu: Params, order: Literal[1, 2]) -> _Local:
    if order == 1:
        _, gradient = _gradients(J, theta, nu)
        both = lambda x: _by_differences(J, theta, nu, x, _DIFFERENCE)
        return _Local(gradient, lambda x: both(x)[0], lambda x: both(x)[1])
    theta, nu = _leaves(theta), _leaves(nu)
    _, gradient = _gradients(J, theta, nu, create_graph=True)
    alive = [key for key, value in gradient.items() if value.requires_grad]

    def pulled(x: Params, into: Params) -> Params:
        if not alive:
            return {key: torch.zeros_like(value) for key, value in into.items()}
        outputs, cotangents = [gradient[key] for key in alive], [x[key] for key in alive]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(outputs, list(into.values()), cotangents, **options)
        return dict(zip(into, grads, strict=True))

    fixed = {key: value.detach() for key, value in gradient.items()}
    return _Local(fixed, lambda x: {k: -v for k, v in pulled(x, nu).items()}, lambda x: pulled(x, theta))


def _double(params: Params) -> Params:
    return {key: value.detach().double() for key, value in params.items()}


def _leaves(params: Params) -> Params:
    return {key: value.detach().requires_grad_() for key, value in params.items()}


def _ones(params: Params) -> Params:
    return {key: torch.ones_like(value) for key, value in params.items()}


def _normal(like: Params, generator: torch.Generator) -> Params:
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) for k, v in like.items()}


def _finite(params: Params) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in params.values())


def _size(params: Params) -> float:
    return float(dot(params, params)) ** 0.5


def _distance(a: Params, b: Params) -> float:
    return _size(axpy(-1.0, b, a))


def _gap(norm: Norm, a: Params, b: Params) -> float:
    return norm(axpy(-1.0, b, a))
