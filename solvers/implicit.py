"""Derivatives of a solution from the condition it satisfies, whatever found it.

Let `F(theta, nu) = 0` define `nu(theta)`. The implicit function theorem gives `F_nu (dnu/dtheta) + F_theta = 0`, so

    vjp(g) = -F_theta' u  with  F_nu' u = g,        jvp(v) = -w  with  F_nu w = F_theta v

(Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022, equation 4). The conditions:

    implicit_root          F = residual(theta, nu)
    implicit_fixed_point   F = nu - f(theta, nu)
    implicit_argmax        F = -grad_nu J(theta, nu), whose F_nu = -J_nunu is symmetric and positive definite

The linear solve is an autograd function of its own, with derivatives by the same theorem; the products above are made
of it and plain operations, so a layer can be differentiated again, forward and backward, and vmapped at every level.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from sim2real.function_rules import forward_rule, primals, pushforward, saved
from sim2real.params import Params, axpy, check_same_keys, ravel
from sim2real.solve_report import LinearSolution, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Matvec, Solve, cg, dense

Residual = Callable[[Params, Params], Params]
Solver = Callable[[Params, Params], Params]
Layer = Callable[[Params, Params], Params]


def root_vjp(
    residual: Residual,
    theta: Params,
    nu: Params,
    cotangent: Params,
    *,
    solve: Solve = dense,
    symmetric: bool = False,
    strict: bool = False,
) -> Params:
    """`(dnu/dtheta)' cotangent` at a root nu of `residual(theta, nu)`; itself differentiable in theta, nu, cotangent.

    `symmetric` says that F_nu is, so that a solver like `cg` may be used. Raises `KeyError` for keys that do not match;
    an unconverged linear solve warns `UnconvergedWarning`, under `strict` raises `UnconvergedError`.
    """
    check_same_keys(nu, cotangent, "the cotangent of root_vjp")
    u = _linear_solve(_operator(residual, solve, symmetric, strict, transposed=True), theta, nu, cotangent)
    (pulled,) = vjp(lambda th: _checked(residual(th, nu), nu), theta)[1](u)
    return {key: -value for key, value in pulled.items()}


def root_jvp(
    residual: Residual,
    theta: Params,
    nu: Params,
    tangent: Params,
    *,
    solve: Solve = dense,
    symmetric: bool = False,
    strict: bool = False,
) -> Params:
    """`(dnu/dtheta) tangent` at a root nu of `residual(theta, nu)`; otherwise as `root_vjp`."""
    check_same_keys(theta, tangent, "the tangent of root_jvp")
    b = pushforward(lambda th: _checked(residual(th, nu), nu), theta, tangent)
    w = _linear_solve(_operator(residual, solve, symmetric, strict, transposed=False), theta, nu, b)
    return {key: -value for key, value in w.items()}


def implicit_root(
    residual: Residual,
    solver: Solver,
    *,
    solve: Solve = dense,
    symmetric: bool = False,
    strict: bool = False,
    tol: float = 1e-4,
) -> Layer:
    """The layer `(theta, nu0) -> nu` with `nu = solver(theta, nu0)`, differentiated through `residual(theta, nu) = 0`.

    It computes in float64 and returns the dtype of nu0; nu0 gets no gradient, nor does what `residual` closes over: all
    that is differentiated belongs in theta. The solver may do anything: it sees plain
    tensors, and under vmap one row at a time. Its answer is checked: `|F| > tol * (|F_nu F| / |F|) * max(1, |nu|)`
    warns `UnconvergedWarning`, under `strict` raises `UnconvergedError`; so does an unconverged linear solve of a
    derivative. Raises `KeyError` or `ValueError` when solver or residual return other keys, shapes or NaN.
    """
    spec = _Condition(residual, solver, solve, symmetric, strict, tol)

    def layer(theta: Params, nu0: Params) -> Params:
        for name, params in (("theta", theta), ("nu0", nu0)):
            for key, value in params.items():
                if not value.is_floating_point():
                    raise ValueError(f"{name}['{key}'] must be floating point, got {value.dtype}")
        keyed = replace(spec, theta_keys=tuple(theta), nu_keys=tuple(nu0))
        nu = _Root.apply(keyed, *(x.double() for x in theta.values()), *(x.double() for x in nu0.values()))
        return {key: value.to(nu0[key].dtype) for key, value in zip(nu0, nu, strict=True)}

    return layer


def implicit_fixed_point(
    function: Callable[[Params, Params], Params],
    solver: Solver,
    *,
    solve: Solve = dense,
    strict: bool = False,
    tol: float = 1e-4,
) -> Layer:
    """The layer of a fixed point `nu = function(theta, nu)`; otherwise as `implicit_root`."""
    residual = lambda theta, nu: axpy(-1.0, function(theta, nu), nu)
    return implicit_root(residual, solver, solve=solve, strict=strict, tol=tol)


def implicit_argmax(
    J: Callable[[Params, Params], Tensor],
    solver: Solver,
    *,
    solve: Solve = cg,
    strict: bool = False,
    tol: float = 1e-4,
) -> Layer:
    """The layer of a maximiser of the scalar `J(theta, .)`; solves run on `-J_nunu`; otherwise as `implicit_root`.

    Bind damping to the solve: `solve=partial(cg, damping=1e-3)`. Where `-J_nunu` plus damping is not positive definite
    nu is no maximiser, and the derivative counts as unconverged whatever solved it. J must be twice differentiable in
    torch; once more for a second derivative of the layer.
    """

    def residual(theta: Params, nu: Params) -> Params:
        return {key: -value for key, value in grad(J, argnums=1)(theta, nu).items()}

    def definite(matvec: Matvec, b: Params, **options: int) -> LinearSolution:
        solution: LinearSolution = solve(matvec, b, **options)
        report = solution.report
        if not report.converged or report.negative_curvature is None or report.negative_curvature + report.damping > 0:
            return solution
        status = (
            f"-J_nunu has the eigenvalue {report.negative_curvature:.1e} or less, which no maximiser has; add damping"
        )
        return LinearSolution(solution.x, replace(report, converged=False, status=status))

    return implicit_root(residual, solver, solve=definite, symmetric=True, strict=strict, tol=tol)


@dataclass(frozen=True)
class _Condition:
    residual: Residual
    solver: Solver
    solve: Solve
    symmetric: bool
    strict: bool
    tol: float
    theta_keys: tuple[str, ...] = ()
    nu_keys: tuple[str, ...] = ()

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Params, Params]:
        count = len(self.theta_keys)
        theta = dict(zip(self.theta_keys, tensors[:count], strict=True))
        return theta, dict(zip(self.nu_keys, tensors[count:], strict=True))


class _Root(torch.autograd.Function):
    """condition, theta tensors, nu0 tensors -> nu tensors."""

    @staticmethod
    def forward(condition: _Condition, *tensors: Tensor) -> tuple[Tensor, ...]:
        theta, nu0 = condition.split(tuple(x.detach() for x in tensors))
        with torch.enable_grad():  # solvers may differentiate inside
            nu = condition.solver(theta, nu0)
        check_same_keys(nu0, nu, "what the solver returned")
        nu = {key: nu[key].detach().to(nu0[key]).clone() for key in nu0}
        _check_stationary(condition, theta, nu, nu0)
        return tuple(nu.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        condition, *tensors = inputs
        ctx.condition = condition
        kept = (*tensors[: len(condition.theta_keys)], *output)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        condition = ctx.condition
        theta, nu = condition.split(saved(ctx))
        cotangent = dict(zip(condition.nu_keys, grads, strict=True))
        options = {"solve": condition.solve, "symmetric": condition.symmetric, "strict": condition.strict}
        pulled = root_vjp(condition.residual, theta, nu, cotangent, **options)
        return (None, *(pulled[key] for key in condition.theta_keys), *(None for _ in condition.nu_keys))

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        condition = ctx.condition
        theta, nu = condition.split(primals(ctx))
        filled = (torch.zeros_like(x) if t is None else t for x, t in zip(theta.values(), tangents, strict=False))
        tangent = dict(zip(condition.theta_keys, filled, strict=True))
        options = {"solve": condition.solve, "symmetric": condition.symmetric, "strict": condition.strict}
        pushed = root_jvp(condition.residual, theta, nu, tangent, **options)
        return tuple(pushed[key] for key in condition.nu_keys)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], condition: _Condition, *tensors: Tensor) -> Any:
        rows = [
            _Root.apply(
                condition, *(x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims[1:], strict=True))
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(condition.nu_keys)


def _checked(value: Params, nu: Params) -> Params:
    """What the residual returned, in the order of nu, shapes checked."""
    check_same_keys(nu, value, "what the residual returned")
    for key, x in nu.items():
        if value[key].shape != x.shape:
            raise ValueError(f"the residual of '{key}' has shape {tuple(value[key].shape)}, nu has {tuple(x.shape)}")
    return {key: value[key] for key in nu}


def _check_stationary(condition: _Condition, theta: Params, nu: Params, nu0: Params) -> None:
    for key, value in nu.items():
        if value.shape != nu0[key].shape or not bool(torch.isfinite(value).all()):
            raise ValueError(f"the solver returned '{key}' with shape {tuple(value.shape)}, or not finite: {value}")
    value, pull = vjp(lambda x: _checked(condition.residual(theta, x), x), nu)[:2]
    size = float(ravel(value).norm())
    if size == 0.0:
        return
    slope = float(ravel(pull(value)[0]).norm()) / size
    allowed = condition.tol * slope * max(1.0, float(ravel(nu).norm()))
    if not size <= allowed:
        _complain(f"the solver's answer is not stationary: |F| = {size:.1e}, allowed {allowed:.1e}", condition.strict)


def _complain(message: str, strict: bool) -> None:
    if strict:
        raise UnconvergedError(message)
    warnings.warn(message, UnconvergedWarning, stacklevel=3)


@dataclass(frozen=True)
class _Operator:
    """A(theta, nu): `linearise(p)` does the work that all products share, once, and returns the product."""

    linearise: Callable[[tuple[Params, Params]], Matvec]
    transposed: Callable[[tuple[Params, Params]], Matvec]
    solve: Solve
    strict: bool
    batch_dims: int = 0


def _operator(residual: Residual, solve: Solve, symmetric: bool, strict: bool, *, transposed: bool) -> _Operator:
    def pull(p: tuple[Params, Params]) -> Matvec:
        theta, nu = p
        product = vjp(lambda x: _checked(residual(theta, x), x), nu)[1]
        return lambda v: product(v)[0]

    def push(p: tuple[Params, Params]) -> Matvec:
        product = vjp(pull(p), {key: torch.zeros_like(x) for key, x in p[1].items()})[1]
        return lambda v: product(v)[0]

    forward = pull if symmetric else push
    return _Operator(pull, forward, solve, strict) if transposed else _Operator(forward, pull, solve, strict)


def _linear_solve(operator: _Operator, theta: Params, nu: Params, b: Params) -> Params:
    keys = (tuple(theta), tuple(nu))
    x = _LinearSolve.apply(operator, keys, *theta.values(), *nu.values(), *(b[key] for key in nu))
    return dict(zip(nu, x, strict=True))


class _LinearSolve(torch.autograd.Function):
    """operator, keys, theta, nu and b tensors -> x tensors of `A(theta, nu) x = b`."""

    @staticmethod
    def forward(operator: _Operator, keys: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        p, b = _regroup(keys, tensors)
        options = {"batch_dims": operator.batch_dims} if operator.batch_dims else {}
        solution = operator.solve(operator.linearise(p), b, **options)
        if not solution.report.converged:
            _complain(f"the linear solve of a derivative did not converge: {solution.report.status}", operator.strict)
        return tuple(solution.x[key] for key in keys[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator, ctx.keys, *tensors = inputs
        kept = (*tensors[: -len(output)], *output)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operator, keys = ctx.operator, ctx.keys
        p, x = _regroup(keys, saved(ctx))
        adjoint = replace(operator, linearise=operator.transposed, transposed=operator.linearise)
        w = _LinearSolve.apply(adjoint, keys, *p[0].values(), *p[1].values(), *grads)
        (pulled,) = vjp(lambda q: operator.linearise(q)(x), p)[1](dict(zip(keys[1], w, strict=True)))
        return (None, None, *(-g for part in pulled for g in part.values()), *w)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _operator: None, _keys: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        operator, keys, values = ctx.operator, ctx.keys, primals(ctx)
        p, x = _regroup(keys, values)
        filled = tuple(torch.zeros_like(s) if t is None else t for s, t in zip(values, tangents, strict=True))
        dp, db = _regroup(keys, filled)
        change = pushforward(lambda q: operator.linearise(q)(x), p, dp)
        rhs = (db[key] - change[key] for key in keys[1])
        return _LinearSolve.apply(operator, keys, *p[0].values(), *p[1].values(), *rhs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operator: _Operator, keys: Any, *tensors: Tensor) -> Any:
        dims, count = in_dims[2:], len(keys[1])
        rhs = [
            b.movedim(d, 0) if d is not None else b.expand(info.batch_size, *b.shape)
            for b, d in zip(tensors[-count:], dims[-count:], strict=True)
        ]
        p_dims, _ = _regroup(keys, dims)
        shared = all(d is None for d in dims[:-count])

        def batched(linearise: Callable[[tuple[Params, Params]], Matvec]) -> Callable[[tuple[Params, Params]], Matvec]:
            if shared:
                return lambda p: vmap(linearise(p))
            return lambda p: lambda v: vmap(lambda q, w: linearise(q)(w), in_dims=(p_dims, 0))(p, v)

        over_rows = replace(
            operator,
            linearise=batched(operator.linearise),
            transposed=batched(operator.transposed),
            batch_dims=operator.batch_dims + 1,
        )
        return _LinearSolve.apply(over_rows, keys, *tensors[:-count], *rhs), (0,) * count


def _regroup(keys: tuple[tuple[str, ...], tuple[str, ...]], values: Any) -> tuple[tuple[Any, Any], Any]:
    """((theta, nu), b) from one flat sequence."""
    a, b = len(keys[0]), len(keys[0]) + len(keys[1])
    theta, nu = dict(zip(keys[0], values[:a], strict=True)), dict(zip(keys[1], values[a:b], strict=True))
    return (theta, nu), dict(zip(keys[1], values[b:], strict=True))
