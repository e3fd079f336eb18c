"""Nonlinear least squares as a layer whose derivative is exact.

With `f(theta, nu) = |r(theta, nu)|^2 / 2` and `nu*(theta) = argmin_nu f`, the implicit function theorem gives

    H dnu*/dtheta = -C,    H = f_nunu = J'J + sum_i r_i (r_i)_nunu,    C = f_nutheta,    J = r_nu.

Solvers of the Gauss-Newton kind that differentiate their last step put J'J in the place of H, which is wrong wherever
residuals remain: by `(J'J)^-1 sum_i r_i (r_i)_nunu`, relative, which ill-conditioned fits make large
(`gauss_newton_gap` measures it). Here products with H come from differentiating f twice.
References: Nocedal, Wright, Numerical Optimization, 2006, section 10.3 (the two Hessians); Pineda et al., Theseus,
NeurIPS 2022, section 3.3 (the Gauss-Newton derivative).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from sim2real.function_rules import pushforward
from sim2real.params import Params, axpy, check_same_keys, dot, ravel, unravel
from sim2real.solve_report import UnconvergedError
from sim2real.solvers.implicit import Layer, Solver, implicit_argmax
from sim2real.solvers.least_squares import least_squares
from sim2real.solvers.linear import Matvec, Solve, dense

Residuals = Callable[[Params, Params], Tensor]

# A factorisation is exact to rounding whatever the residual it leaves, which is eps times the condition number.
_EXACT = partial(dense, tol=1e-6)


def least_squares_layer(
    residual: Residuals,
    solver: Solver | None = None,
    *,
    solve: Solve = _EXACT,
    polish: int = 5,
    strict: bool = False,
    tol: float = 1e-6,
) -> Layer:
    """The layer `(theta, nu0) -> argmin_nu |residual(theta, nu)|^2 / 2`, differentiated with the full Hessian.

    residual: theta, nu -> r of any shape, twice differentiable in torch (once more for a second derivative of the
    layer). `solver(theta, nu0) -> nu` goes forward: `levenberg_marquardt` when None, or `theseus_solver(residual)`. Its
    answer is moved by at most `polish` exact Newton steps, as long as each shrinks what the next one promises: solvers
    stop where the value, not nu, has settled, and a derivative is no more exact than the point it is taken at. Options
    and errors are those of `implicit_argmax`; at an answer where H is not positive definite the derivative warns
    `UnconvergedWarning`, under `strict` raises `UnconvergedError`.
    """
    forward = _levenberg(residual) if solver is None else solver
    if polish < 0:
        raise ValueError(f"polish is the largest number of Newton steps and must be at least 0, got {polish}")

    def polished(theta: Params, nu0: Params) -> Params:
        nu = forward(theta, nu0)
        check_same_keys(nu0, nu, "what the solver returned")
        return _newton({key: nu[key].detach().to(nu0[key]) for key in nu0}, lambda x: _cost(residual, theta, x))

    def _newton(nu: Params, cost: Callable[[Params], Tensor]) -> Params:
        before, promised = nu, float("inf")
        for _ in range(polish + 1):
            slope, matvec = _hessian(cost, nu)
            if not bool(torch.isfinite(ravel(slope)).all()):
                return before
            solution = solve(matvec, {key: -x for key, x in slope.items()})
            gain = -float(dot(slope, solution.x))
            if solution.report.negative_curvature is not None or not 0 < gain < 0.25 * promised:
                return nu if gain < promised else before
            before, nu, promised = nu, axpy(1.0, solution.x, nu), gain
        return before

    return implicit_argmax(lambda theta, nu: -_cost(residual, theta, nu), polished, solve=solve, strict=strict, tol=tol)


def gauss_newton_gap(
    residual: Residuals, theta: Params, nu: Params, cotangent: Params, *, solve: Solve = _EXACT
) -> float:
    """Relative error `|v_GN - v| / |v|` of the gradient `v = (dnu*/dtheta)' cotangent` when J'J stands for H.

    `nu` is the minimiser at theta; the norm is over all of theta, whose entries should be of like scale. Raises
    `KeyError` for keys that do not match and `UnconvergedError` where a system with H or J'J cannot be solved.
    """
    check_same_keys(nu, cotangent, "the cotangent of gauss_newton_gap")
    named = lambda x: {"r": residual(theta, x)}
    pull = vjp(named, nu)[1]
    gauss_newton: Matvec = lambda v: pull(pushforward(named, nu, v))[0]
    gradients = []
    for name, matvec in (("H", _hessian(lambda x: _cost(residual, theta, x), nu)[1]), ("J'J", gauss_newton)):
        solution = solve(matvec, cotangent)
        if not solution.report.converged:
            raise UnconvergedError(f"the system with {name} was not solved: {solution.report.status}")
        slope = lambda th: grad(lambda x: _cost(residual, th, x))(nu)
        gradients.append(ravel(vjp(slope, theta)[1](solution.x)[0]))
    exact, approximate = gradients
    size = float(exact.norm())
    difference = float((approximate - exact).norm())
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def theseus_solver(residual: Residuals, *, max_steps: int = 100, tolerance: float = 1e-12) -> Solver:
    """theseus' Levenberg-Marquardt (dense Cholesky, adaptive damping) as the forward solver of `least_squares_layer`.

    Only the search is theseus'; its derivative is not used. `tolerance`: relative decrease of the value at which it
    stops. Raises `ImportError` when theseus-ai (extra `nls`) is missing.
    """
    import theseus

    def solver(theta: Params, nu0: Params) -> Params:
        variables = {key: theseus.Vector(tensor=x.reshape(1, -1), name=key) for key, x in nu0.items()}

        def errors(optim_vars: Any, aux_vars: Any) -> Tensor:
            nu = {key: v.tensor.reshape(nu0[key].shape) for key, v in zip(nu0, optim_vars, strict=True)}
            return residual(theta, nu).reshape(1, -1)

        weight = theseus.ScaleCostWeight(ravel(nu0).new_ones(1, 1))
        objective = theseus.Objective(dtype=ravel(nu0).dtype)
        size = residual(theta, nu0).numel()
        objective.add(theseus.AutoDiffCostFunction(list(variables.values()), errors, size, cost_weight=weight))
        optimizer = theseus.LevenbergMarquardt(
            objective,
            linear_solver_cls=theseus.CholeskyDenseSolver,
            max_iterations=max_steps,
            abs_err_tolerance=0.0,
            rel_err_tolerance=tolerance,
        )
        start = {key: x.reshape(1, -1) for key, x in nu0.items()}
        with torch.no_grad():
            options = {"damping": 1e-3, "adaptive_damping": True}
            found, _ = theseus.TheseusLayer(optimizer).forward(start, optimizer_kwargs=options)
        return {key: found[key].reshape(x.shape) for key, x in nu0.items()}

    return solver


def _levenberg(residual: Residuals) -> Solver:
    def solver(theta: Params, nu0: Params) -> Params:
        found = least_squares(lambda x: residual(theta, unravel(x, nu0)).reshape(-1), ravel(nu0), max_steps=500)
        return unravel(found.x, nu0)

    return solver


def _cost(residual: Residuals, theta: Params, nu: Params) -> Tensor:
    return residual(theta, nu).square().sum() / 2


def _hessian(cost: Callable[[Params], Tensor], nu: Params) -> tuple[Params, Matvec]:
    """The gradient of the cost at nu, and the product with its Hessian."""
    slope, pull = vjp(grad(cost), nu)[:2]
    return slope, lambda v: pull(v)[0]
