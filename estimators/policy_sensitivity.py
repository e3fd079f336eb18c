"""Policy sensitivity dnu*/dtheta of `nu*(theta) = argmax_nu J(theta, nu)`, as products only.

Differentiating `grad_nu J(theta, nu*) = 0` gives `H (dnu*/dtheta) + C = 0` with `H = J_nunu` and `C = J_nutheta`
(rows nu, columns theta). J is maximised, so H is negative (semi-)definite and the solves run on `-H + damping I`:

    vjp(g) = C' (-H + damping I)^-1 g,        jvp(v) = (-H + damping I)^-1 C v.

H and C are never formed: one graph of `grad_nu J` is kept and differentiated again for each product (exact, about
three evaluations of J each). Reference: Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, sections 5.4
and 15 (implicit derivatives); Lorraine, Vicol and Duvenaud, AISTATS 2020, theorem 1 for the same use of CG.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.damping import damped_solve
from sim2real.params import Params, axpy, check_same_keys, dot
from sim2real.solve_report import LinearSolution, Sensitivity, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Solve, cg

Objective = Callable[[Params, Params], Tensor]

_DIFFERENCE_STEP = 6e-6  # cube root of the float64 rounding: truncation and rounding of a central difference balance


@dataclass(frozen=True)
class _SecondOrder:
    """At (theta, nu): grad_nu J, and the products -H x, C' x (theta) and C v (nu)."""

    gradient: Params
    curvature: Callable[[Params], Params]
    cross_transposed: Callable[[Params], Params]
    cross: Callable[[Params], Params]


def policy_sensitivity(
    J: Objective,
    theta: Params,
    nu: Params,
    *,
    damping: float | Literal["auto"] = "auto",
    solve: Solve | None = None,
    strict: bool = False,
    cotangent: Params | None = None,
    stationarity_tol: float = 1e-4,
    derivative_order: Literal[0, 1, 2] = 2,
) -> Sensitivity:
    """dnu*/dtheta at a maximiser nu of the scalar `J(theta, nu)`; computed in float64, returned in the input's dtype.

    `report` belongs to one solve done here: for `cotangent` when given and not zero (vjp(cotangent) then costs nothing
    more), else for a fixed pseudo-random right-hand side. Its `converged` asks for a converged solve without negative
    curvature and for a stationary nu: `|grad_nu J| <= stationarity_tol * lambda * max(1, |nu|)`, lambda the largest
    curvature met. Where it is False this warns `UnconvergedWarning`, under `strict` raises `UnconvergedError`; so does
    each product. `report.error_bound` estimates the error the linear residual leaves in vjp(cotangent): `|C| |r| / mu`,
    mu the lowest Ritz value plus damping (an estimate: Ritz values bound the spectrum from inside). What J closes over
    gets no derivative: theta holds all that should.

    `damping` has the units of H and must exceed `-report.negative_curvature`. "auto" takes it from a Lanczos probe (10
    to 40 products, more where those resolve too little): 0 where -H is positive definite; it is raised where the first
    solve meets more negative curvature (`estimators/damping.py`). `report.damping` and `report.status` say how much and
    why, every product uses it, and a saddle is refused all the same. dnu*/dtheta of an over-parameterised network is
    not identifiable and moves with the damping; its `action_sensitivity` hardly does. `solve` None: `cg`; where the
    automatic damping is positive, to a relative residual of 1e-3 only (its bias is larger) and preconditioned.

    `derivative_order` is the one of the model behind J (`mdp.derivative_order`): 2 exact products; 1 central
    differences of exact gradients, whose relative error of about 1e-9 limits the residual a solve can reach; 0 raises
    `ValueError`, as do a J that is not a scalar or has no derivative, gradients that are not finite and wrong shapes;
    other keys raise `KeyError`.
    """
    if derivative_order == 0:
        raise ValueError("J has no derivative (derivative_order 0): a sensitivity needs first derivatives at least")
    if isinstance(damping, str) and damping != "auto":
        raise ValueError(f"damping must be a number >= 0 (units of H) or 'auto', got {damping!r}")
    theta64 = {key: value.detach().double() for key, value in theta.items()}
    nu64 = {key: value.detach().double() for key, value in nu.items()}
    parts = (_exact if derivative_order == 2 else _differences)(J, theta64, nu64)
    if not all(bool(torch.isfinite(value).all()) for value in parts.gradient.values()):
        raise ValueError("grad_nu J(theta, nu) is not finite: no sensitivity can be taken at this nu")

    def judged(solution: LinearSolution, b: Params) -> LinearSolution:
        return LinearSolution(solution.x, _with_stationarity(solution, b, parts, nu64, stationarity_tol))

    def checked(rhs: Params) -> Params:
        if all(torch.equal(rhs[key], b[key]) for key in b):
            return first.x
        if not any(bool(value.any()) for value in rhs.values()):
            return rhs
        solution = judged(again(parts.curvature, rhs, damping=first.report.damping), rhs)
        _demand(solution.report, strict)
        return solution.x

    def vjp(g: Params) -> Params:
        _check_like(nu, g, "the cotangent of vjp")
        return _like(parts.cross_transposed(checked(_double(g))), theta)

    def jvp(v: Params) -> Params:
        _check_like(theta, v, "the tangent of jvp")
        return _like(checked(parts.cross(_double(v))), nu)

    if cotangent is not None:
        _check_like(nu, cotangent, "cotangent")
    given = cotangent is not None and any(bool(value.any()) for value in cotangent.values())
    b = _double(cotangent) if cotangent is not None and given else _probe(nu64)
    if damping == "auto":
        found, again = damped_solve(solve, parts.curvature, b)
    else:
        again = cg if solve is None else solve
        found = again(parts.curvature, b, damping=damping)
    first = judged(found, b)
    _demand(first.report, strict)
    bound = _error_bound(first.report, _norm(b), parts, nu64)
    return Sensitivity(vjp, jvp, replace(first.report, error_bound=bound))


def _double(params: Params) -> Params:
    return {key: value.detach().double().clone() for key, value in params.items()}


def _check_like(reference: Params, other: Params, what: str) -> None:
    check_same_keys(reference, other, what)
    for key, value in reference.items():
        if other[key].shape != value.shape:
            raise ValueError(f"{what} has shape {tuple(other[key].shape)} for '{key}', expected {tuple(value.shape)}")
        if not bool(torch.isfinite(other[key]).all()):
            raise ValueError(f"{what} is not finite for '{key}'")


def _like(params: Params, like: Params) -> Params:
    return {key: params[key].to(like[key].dtype) for key in like}


def _probe(nu: Params) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device) for k, v in nu.items()}


def _norm(params: Params) -> float:
    return float(dot(params, params)) ** 0.5


def _demand(report: SolveReport, strict: bool) -> None:
    if not report.converged:
        message = f"the policy sensitivity is not to be trusted: {report.status}"
        if strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=4)


def _with_stationarity(solution: LinearSolution, b: Params, parts: _SecondOrder, nu: Params, tol: float) -> SolveReport:
    """The report with the stationarity, and with the reasons why it may not count as converged."""
    report, size = solution.report, _norm(parts.gradient)
    # a solver that tells no eigenvalues has met the curvature |b| / |x| at least
    least = _norm(b) / max(_norm(solution.x), 1e-300)
    largest = max(abs(value) for value in report.eigenvalues) if report.eigenvalues else least
    allowed, status = tol * largest * max(1.0, _norm(nu)), report.status
    stationary = size <= allowed
    if not stationary:
        status += f"; nu is not stationary: |grad_nu J| = {size:.1e}, allowed {allowed:.1e}"
    indefinite = report.negative_curvature is not None and report.negative_curvature + report.damping <= 0
    if indefinite:
        status += f"; -J_nunu has the eigenvalue {report.negative_curvature:.1e} or less: choose more damping than that"
    converged = report.converged and stationary and not indefinite
    return replace(report, converged=converged, stationarity=size, status=status)


def _error_bound(report: SolveReport, size_of_b: float, parts: _SecondOrder, nu: Params) -> float | None:
    """`|C| |r| / mu`: |C| by three steps of the power method on C C', mu the lowest Ritz value plus damping."""
    x = _probe(nu)
    mu = (report.eigenvalues[0] if report.eigenvalues else 0.0) + report.damping
    if mu <= 0:
        return None
    size = 0.0
    for _ in range(3):
        norm = max(_norm(x), 1e-300)
        x = {key: value / norm for key, value in x.items()}
        down = parts.cross_transposed(x)
        size, x = _norm(down), parts.cross(down)
    return size * report.residual * size_of_b / mu


def _grad(outputs: Params, inputs: Params, cotangent: Params, *, create_graph: bool = False) -> Params:
    """Vector-Jacobian product of `outputs` into `inputs`, zeros where they do not meet; keeps the graph."""
    alive = [key for key, value in outputs.items() if value.requires_grad]
    if not alive:
        return {key: torch.zeros_like(value) for key, value in inputs.items()}
    grads = torch.autograd.grad(
        [outputs[key] for key in alive],
        list(inputs.values()),
        [cotangent[key] for key in alive],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def _leaves(params: Params) -> Params:
    return {key: value.detach().requires_grad_() for key, value in params.items()}


def _gradients(J: Objective, theta: Params, nu: Params, *, create_graph: bool) -> tuple[Params, Params]:
    """grad_theta J and grad_nu J at leaves theta and nu."""
    with torch.enable_grad():
        value = J(theta, nu)
        if value.numel() != 1:
            raise ValueError(f"J must return a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("J depends differentiably neither on theta nor on nu")
        grads = torch.autograd.grad(
            value, [*theta.values(), *nu.values()], create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    return dict(zip(theta, grads[: len(theta)], strict=True)), dict(zip(nu, grads[len(theta) :], strict=True))


def _exact(J: Objective, theta: Params, nu: Params) -> _SecondOrder:
    theta, nu = _leaves(theta), _leaves(nu)
    _, gradient = _gradients(J, theta, nu, create_graph=True)
    if not any(value.requires_grad for value in gradient.values()):
        raise ValueError(
            "grad_nu J is constant, so J_nunu = 0: J is linear in nu, or its model has no second derivative"
        )

    @cache
    def pushed() -> tuple[Params, Params]:
        weights = {key: torch.zeros_like(value, requires_grad=True) for key, value in nu.items()}
        return weights, _grad(gradient, theta, weights, create_graph=True)  # C'w, linear in w: its transpose is C

    return _SecondOrder(
        gradient={key: value.detach() for key, value in gradient.items()},
        curvature=lambda x: {key: -value for key, value in _grad(gradient, nu, x).items()},
        cross_transposed=lambda x: _grad(gradient, theta, x),
        cross=lambda v: _grad(pushed()[1], pushed()[0], v),
    )


def _differences(J: Objective, theta: Params, nu: Params) -> _SecondOrder:
    def gradients(theta: Params, nu: Params) -> tuple[Params, Params]:
        return _gradients(J, _leaves(theta), _leaves(nu), create_graph=False)

    def central(x: Params, at: Params, gradient: Callable[[Params], Params]) -> Params:
        step = _DIFFERENCE_STEP * max(1.0, _norm(at)) / max(_norm(x), 1e-300)
        above, below = gradient(axpy(step, x, at)), gradient(axpy(-step, x, at))
        return {key: (above[key] - below[key]) / (2 * step) for key in above}

    return _SecondOrder(
        gradient=gradients(theta, nu)[1],
        curvature=lambda x: {k: -v for k, v in central(x, nu, lambda at: gradients(theta, at)[1]).items()},
        cross_transposed=lambda x: central(x, nu, lambda at: gradients(theta, at)[0]),
        cross=lambda v: central(v, theta, lambda at: gradients(at, nu)[1]),
    )
