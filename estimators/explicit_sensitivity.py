"""Sensitivity of a policy that is given by a formula: `nu = optimum(theta)`, differentiable.

A controller built from the model (MPC, LQR, a computed-torque law) *is* its training: nu*(theta) is a function one can
differentiate, and dnu*/dtheta is its Jacobian. No Hessian, no stationarity, no linear solve:

    vjp(g) = (d optimum / d theta)' g,        jvp(v) = (d optimum / d theta) v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp

from sim2real.params import Params, check_same_keys, dot
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError


def explicit_sensitivity(
    J: Callable[[Params, Params], Tensor] | None,
    theta: Params,
    nu: Params,
    *,
    optimum: Callable[[Params], Params],
    cotangent: Params | None = None,
    derivative_order: Literal[0, 1, 2] = 2,
    tol: float = 1e-9,
    strict: bool = False,
) -> Sensitivity:
    """The Jacobian of `optimum(theta) -> nu` at theta, in the calling convention of every sensitivity.

    For `tune`: `optimum=lambda theta, nu0: f(theta), sensitivity=partial(explicit_sensitivity, optimum=f)`. J,
    `cotangent` and `derivative_order` belong to that convention and are not used. `report.residual` is the relative
    distance of nu from `optimum(theta)`; past `tol` the report is not converged, and `strict` raises
    `UnconvergedError`. info "nu_norm". Computes in the dtype of theta. Raises `KeyError` when optimum returns other
    keys than nu, or a cotangent or tangent has others, `ValueError` when it returns other shapes, when the map or its
    derivative is not finite, or when no part of nu depends on theta (detached, `no_grad`, numpy inside).
    """
    inputs = {key: value.detach() for key, value in theta.items()}
    reached: list[str] = []

    def traced(at: Params) -> Params:
        found = optimum(at)
        reached.extend(key for key, item in found.items() if item.requires_grad)
        return found

    value, pull = vjp(traced, inputs)[:2]
    check_same_keys(nu, value, "what optimum(theta) returns")
    _check_shapes(nu, value)
    if not reached:
        raise ValueError(
            "nothing of optimum(theta) depends on theta, so its derivative would be 0: see that the map is "
            "made of torch operations, without detach, no_grad or numpy"
        )
    _require_finite(value, "optimum(theta)")
    push = vjp(pull, {key: torch.zeros_like(item) for key, item in value.items()})[1]
    gap = {key: value[key].detach() - nu[key].detach() for key in nu}
    size = float(dot(value, value).detach()) ** 0.5
    residual = float(dot(gap, gap)) ** 0.5 / max(size, 1e-300)
    report = SolveReport(residual <= tol, residual, 0, "nu is a formula of theta" + _stale(residual, tol))
    if strict and not report.converged:
        raise UnconvergedError(f"the explicit sensitivity is not to be trusted: {report.status}")

    def backward(g: Params) -> Params:
        check_same_keys(nu, g, "the cotangent of vjp")
        return _detached(pull({key: item.detach().to(value[key].dtype) for key, item in g.items()})[0], "vjp")

    def forward(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        return _detached(push(({key: item.detach().to(inputs[key].dtype) for key, item in v.items()},))[0], "jvp")

    return Sensitivity(backward, forward, report, {"nu_norm": torch.tensor(size, dtype=torch.float64)})


def _check_shapes(nu: Params, value: Params) -> None:
    for key, item in value.items():
        if item.shape != nu[key].shape:
            raise ValueError(f"optimum(theta) gave '{key}' {tuple(item.shape)}, nu holds {tuple(nu[key].shape)}")


def _stale(residual: float, tol: float) -> str:
    if residual <= tol:
        return ""
    return f", but the nu given is another one: relative distance {residual:.1e} > {tol:.1e}"


def _detached(params: Params, what: str) -> Params:
    _require_finite(params, f"the {what} of optimum")
    return {key: value.detach() for key, value in params.items()}


def _require_finite(params: Params, what: str) -> None:
    for key, value in params.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what} is not finite for '{key}'")
