"""Convex programs as layers: cvxpylayers with an accurate derivative, checked.

    nu*(theta) = argmin_nu c(theta, nu)   subject to convex constraints, a parametrised (DPP) cvxpy problem.

cvxpylayers differentiates the residual map of the homogeneous self-dual embedding of the conic form (Agrawal et al.,
Differentiable convex optimization layers, NeurIPS 2019; Differentiating through a cone program, J. Appl. Numer. Optim.
1(2), 2019). Three things it does without a word are mended here. Its default inner solver (`lsqr`) of the derivative
stops early: a dense factorisation takes its place, and `derivative_error` compares any such layer with central
differences of its own solutions. With Clarabel, an infeasible or failed solve returns numbers: every sample is solved
by cvxpy too, whose status is read. A quadratic objective goes through a second-order cone, which costs half of the
digits: the values are those of cvxpy's solve, which keeps it quadratic. Where no gradient is asked, only that one runs.
The dense derivative costs the cube of the conic form's size, per sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.params import Params, axpy, check_same_keys

ConvexLayer = Callable[[Params], Params]
# Clarabel goes as far as rounding lets it; short of 1e-8 the solve counts as failed.
_TIGHT = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
_ENOUGH = {"reduced_tol_gap_abs": 1e-8, "reduced_tol_gap_rel": 1e-8, "reduced_tol_feas": 1e-8}
# The two solves of a sample may differ by this, relative to 1 + |nu|: half of the digits, with room.
_AGREE = 1e-3
# A solution that moves by less than this part of itself, under moves of theta of order 1, counts as standing still.
_NOTHING = 1e-3


class InfeasibleError(RuntimeError):
    """A convex program has no solution, or its solver did not find it; `sample` is its index in the batch, or None."""

    def __init__(self, message: str, sample: int | None) -> None:
        super().__init__(message)
        self.sample = sample


class DerivativeError(RuntimeError):
    """The derivative of a layer disagrees with central differences of its own solutions."""


class DerivativeWarning(UserWarning):
    """As `DerivativeError`, where the caller asked to be warned only."""


def convex_layer(
    problem: Any,
    *,
    check_at: Params | None = None,
    on_failure: Literal["raise", "warn"] = "raise",
    tol: float = 1e-3,
    mode: Literal["dense", "lsmr", "lsqr"] = "dense",
) -> ConvexLayer:
    """The layer `theta -> nu` of a cvxpy `problem`: its parameters by name to its variables by name, all of them.

    theta values have the shapes of the parameters, or one batch dimension more (mixed freely); those of nu follow. It
    computes in float64 on the CPU and returns dtype and device of theta; differentiable once, backwards. With
    `check_at`, a theta, the derivative there is compared with central differences (`derivative_error`): a relative
    difference above `tol` raises `DerivativeError`, or warns `DerivativeWarning`. `mode` is the derivative of diffcp;
    measured on model predictive control: dense and lsmr agree with differences to 1e-5 or better, lsqr, its default, is
    up to 12 % off on some samples.

    Raises `ImportError` without cvxpylayers (extra `convex`), `ValueError` for a problem that is not DPP or theta of
    another shape or not finite, `KeyError` for other keys, `InfeasibleError` with the sample index for a failed solve,
    `DerivativeError` where two solves of a sample differ: its solution is not unique. `problem` is solved in place: its
    parameters and variables keep the values of the last sample.
    """
    from cvxpylayers.torch import CvxpyLayer

    if not problem.is_dpp():
        raise ValueError("the problem must follow cvxpy's DPP rules (convex, parameters entering affinely)")
    parameters = {p.name(): p for p in problem.parameters()}
    variables = {v.name(): v for v in problem.variables()}
    inner = CvxpyLayer(problem, parameters=list(parameters.values()), variables=list(variables.values()))
    options = {"solve_method": "Clarabel", "mode": mode, "n_jobs_forward": 1, "n_jobs_backward": 1, **_TIGHT}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}

    def layer(theta: Params) -> Params:
        batch = _check_theta(theta, shapes)
        values = {name: theta[name].to("cpu", torch.float64) for name in shapes}
        nu = _solve(problem, {name: x.detach() for name, x in values.items()}, shapes, batch)
        if torch.is_grad_enabled() and any(x.requires_grad for x in values.values()):
            found = dict(zip(variables, inner(*values.values(), solver_args=options), strict=True))
            _check_agreement(nu, found)
            nu = {name: x + (found[name] - found[name].detach()) for name, x in nu.items()}
        like = next(iter(theta.values()))
        return {name: x.to(like) for name, x in nu.items()}

    if check_at is not None:
        size = _check_theta(check_at, shapes) or 1
        whole = {k: x if x.ndim > len(shapes[k]) else x.expand(size, *x.shape) for k, x in check_at.items()}
        error = float(derivative_error(layer, whole).max())
        if not error <= tol:
            message = (
                f"the layer's derivative differs from central differences by {error:.1e}, relative, more than {tol:.1e}"
                f" (mode '{mode}'): the solution is degenerate or kinked there, or the mode is not accurate"
            )
            if on_failure == "raise":
                raise DerivativeError(message)
            warnings.warn(message, DerivativeWarning, stacklevel=2)
    return layer


def _along(layer: Callable[[Params], Params], leaves: Params, v: Params, g: Params, step: float) -> Tensor:
    """`<g, nu(theta + step v)>` of every sample."""
    return _rows(g, layer(axpy(step, v, {key: x.detach() for key, x in leaves.items()})))


def derivative_error(layer: ConvexLayer, theta: Params, *, directions: int = 2, seed: int = 0) -> Tensor:
    """`|<g, dnu v> - <grad, v>|` of every sample `[B]`, the worst of random directions, over the largest `<g, dnu v>`.

    All of theta has one batch dimension. v is standard normal times `max(1, |theta|)`, g standard normal; `grad` comes
    from the layer's own backward and `dnu v` from central differences of its solutions: steps 3e-3 down to 1e-6,
    extrapolated, taken where two in succession agree best. Large at a kink and at a degenerate solution too;
    a largest value below `1e-3 max(1, |nu|)` counts as that. Costs `16 directions` solves. Raises `ValueError` for no
    directions, and what the layer raises.
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    rng = torch.Generator().manual_seed(seed)
    normal = lambda x: torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.device)
    leaves = {name: x.detach().double().clone().requires_grad_() for name, x in theta.items()}
    nu = layer(leaves)
    claims, truths = [], []
    for _ in range(directions):
        v = {name: x.detach().abs().clamp(min=1.0) * normal(x) for name, x in leaves.items()}
        g = {name: normal(x) for name, x in nu.items()}
        grads = torch.autograd.grad(_rows(g, nu).sum(), list(leaves.values()), retain_graph=True)
        claims.append(_rows(dict(zip(leaves, grads, strict=True)), v))
        truths.append(_slope(partial(_along, layer, leaves, v, g)))
    claimed, true = torch.stack(claims), torch.stack(truths)
    size = torch.maximum(true.abs().max(), _NOTHING * _rows(nu, nu).detach().sqrt().max().clamp(min=1.0))
    return (claimed - true).abs().amax(0) / size


def _rows(a: Params, b: Params) -> Tensor:
    """Inner product of every sample, `[B]`."""
    return torch.stack([(a[key] * b[key]).flatten(1).sum(1) for key in a]).sum(0)


def _slope(function: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 of `function` -> `[B]`, by extrapolated central differences."""
    ratio = 3.0
    steps = [3e-3 / ratio**k for k in range(8)]
    plain = [(function(h) - function(-h)) / (2 * h) for h in steps]
    better = torch.stack([(ratio**2 * b - a) / (ratio**2 - 1) for a, b in pairwise(plain)])
    best = (better[1:] - better[:-1]).abs().argmin(0)
    return better[1:].gather(0, best[None])[0]


def _check_theta(theta: Params, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The batch size, None without one."""
    check_same_keys(dict.fromkeys(shapes, torch.empty(0)), theta, "theta of the convex layer")
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        value = theta[name]
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"theta['{name}'] holds values that are not finite")
        if tuple(value.shape) == shape:
            continue
        if tuple(value.shape[1:]) != shape or value.ndim != len(shape) + 1:
            raise ValueError(f"theta['{name}'] has shape {tuple(value.shape)}, expected {shape} or (B, *{shape})")
        sizes[name] = value.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the batch sizes of theta differ: {sizes}")
    return next(iter(sizes.values()), None)


def _solve(problem: Any, theta: Params, shapes: dict[str, tuple[int, ...]], batch: int | None) -> Params:
    """The solutions by cvxpy, sample by sample, each with its status checked."""
    import cvxpy

    rows: list[Params] = []
    for i in range(1 if batch is None else batch):
        for p in problem.parameters():
            value = theta[p.name()]
            p.value = (value if tuple(value.shape) == shapes[p.name()] else value[i]).numpy()
        try:
            with warnings.catch_warnings():  # "may be inaccurate" means 1e-8 here
                warnings.simplefilter("ignore", UserWarning)
                problem.solve(solver=cvxpy.CLARABEL, **_TIGHT, **_ENOUGH)
            status = problem.status
        except cvxpy.SolverError as failure:
            status = f"failed ({failure})"
        if status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
            where = "" if batch is None else f" of sample {i}"
            raise InfeasibleError(f"the convex program{where} was not solved: {status}", None if batch is None else i)
        rows.append({v.name(): torch.as_tensor(v.value, dtype=torch.float64) for v in problem.variables()})
    return rows[0] if batch is None else {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _check_agreement(nu: Params, found: Params) -> None:
    for name, x in nu.items():
        difference = float((x - found[name].detach()).abs().max())
        allowed = _AGREE * (1.0 + float(x.abs().max()))
        if not difference <= allowed:
            raise DerivativeError(
                f"two solves differ by {difference:.1e} in '{name}', more than {allowed:.1e}: the solution is not "
                "unique or badly conditioned, so it has no derivative to trust; add a strictly convex term"
            )
