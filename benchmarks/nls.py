"""Bars of the least-squares layer: its derivative on a well- and an ill-conditioned fit, to 50 digits.

Decays `sum_k a_k exp(-b_k t)` plus a sensor offset are fitted to noisy data; nu holds a and b, theta the data and the
offset. The figure is `|(D - R) V| / |R V|` (Frobenius) of the Jacobian D = dnu/dtheta along random directions V.
Reference R V: the stationarity conditions solved anew with 50 digits at shifted theta, central differences of step
1e-15. Beside it: our layer with theseus going forward, theseus' own `implicit` and `unroll` derivatives, and the
Gauss-Newton gap.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import torch
from torch import Tensor
from torch.func import hessian, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from sim2real import Params, ravel, unravel
from sim2real.solvers.implicit import Layer
from sim2real.solvers.nls import Residuals, gauss_newton_gap, least_squares_layer, theseus_solver

DIGITS = 50
DIRECTIONS = 5
BAR = 1e-8


@dataclass(frozen=True)
class Fit:
    """`data = sum_k amplitude_k exp(-rate_k t) + noise`; nu0 is where searches start."""

    times: Tensor
    theta: Params
    nu0: Params


def decay_fit(kind: str) -> Fit:
    """One decay with 5 % noise ("well"), or two of nearly the same rate ("ill")."""
    rng = torch.Generator().manual_seed(0)
    rates, amplitudes, noise = {
        "well": ([1.0], [1.0], 0.05),
        "ill": ([1.0, 1.4], [1.0, 1.0], 5e-4),
    }[kind]
    times = torch.linspace(0.0, 3.0, 30, dtype=torch.float64)
    rate, amplitude = torch.tensor(rates, dtype=torch.float64), torch.tensor(amplitudes, dtype=torch.float64)
    clean = (amplitude * torch.exp(-rate * times[:, None])).sum(1)
    data = clean + noise * torch.randn(30, generator=rng, dtype=torch.float64)
    theta = {"data": data, "offset": torch.tensor(0.0, dtype=torch.float64)}
    return Fit(times, theta, {"amplitude": 0.9 * amplitude, "rate": rate + 0.1})


def decay_residual(times: Tensor, theta: Params, nu: Params) -> Tensor:
    """`offset + sum_k amplitude_k exp(-rate_k t) - data`, `[R]`"""
    return theta["offset"] + (nu["amplitude"] * torch.exp(-nu["rate"] * times[:, None])).sum(1) - theta["data"]


def exact_derivative(fit: Fit, nu: Params, direction: Params) -> Tensor:
    """`(dnu/dtheta) direction`, amplitudes first: central differences of 50-digit solutions."""
    with mpmath.workdps(DIGITS):
        step = mpmath.mpf(10) ** -15
        above, below = (_solve_exactly(fit, nu, direction, sign * step) for sign in (1, -1))
        difference = [float((a - b) / (2 * step)) for a, b in zip(above, below, strict=True)]
    return torch.tensor(difference, dtype=torch.float64)


def _solve_exactly(fit: Fit, nu: Params, direction: Params, shift: mpmath.mpf) -> list[mpmath.mpf]:
    exact = lambda values: [mpmath.mpf(float(x)) for x in values.reshape(-1)]
    times, count = exact(fit.times), nu["rate"].numel()
    moved = {
        key: [x + shift * d for x, d in zip(exact(fit.theta[key]), exact(direction[key]), strict=True)]
        for key in fit.theta
    }

    def gradient(*x: mpmath.mpf) -> list[mpmath.mpf]:
        decays = [[mpmath.exp(-b * t) for b in x[count:]] for t in times]
        r = [
            moved["offset"][0] + mpmath.fsum(a * e for a, e in zip(x[:count], row, strict=True)) - y
            for row, y in zip(decays, moved["data"], strict=True)
        ]
        of_amplitude = [mpmath.fsum(ri * row[k] for ri, row in zip(r, decays, strict=True)) for k in range(count)]
        of_rate = [
            -x[k] * mpmath.fsum(ri * t * row[k] for ri, t, row in zip(r, times, decays, strict=True))
            for k in range(count)
        ]
        return of_amplitude + of_rate

    start = [*exact(nu["amplitude"]), *exact(nu["rate"])]
    return list(mpmath.findroot(gradient, start, solver="mdnewton", tol=mpmath.mpf(10) ** (-2 * DIGITS + 16)))


def theseus_jacobian(fit: Fit, mode: str) -> Tensor:
    """dnu/dtheta `[P, Q]` as theseus differentiates its own answer in backward mode `mode`."""
    try:
        import theseus
    except ImportError as missing:
        raise MissingError("theseus-ai (extra `nls`)") from missing

    leaves = {key: value.reshape(1, -1).clone().requires_grad_() for key, value in fit.theta.items()}
    start = {key: value.reshape(1, -1) for key, value in fit.nu0.items()}

    def errors(optim_vars: Sequence[Any], aux_vars: Sequence[Any]) -> Tensor:
        nu = {key: v.tensor.reshape(fit.nu0[key].shape) for key, v in zip(start, optim_vars, strict=True)}
        theta = {key: v.tensor.reshape(fit.theta[key].shape) for key, v in zip(leaves, aux_vars, strict=True)}
        return decay_residual(fit.times, theta, nu)[None]

    objective = theseus.Objective(dtype=torch.float64)
    cost = theseus.AutoDiffCostFunction(
        [theseus.Vector(tensor=value, name=key) for key, value in start.items()],
        errors,
        len(fit.times),
        cost_weight=theseus.ScaleCostWeight(torch.ones(1, 1, dtype=torch.float64)),
        aux_vars=[theseus.Variable(tensor=value.detach(), name=key) for key, value in leaves.items()],
        autograd_mode="dense",
    )
    objective.add(cost)
    search = {"max_iterations": 200, "abs_err_tolerance": 0.0, "rel_err_tolerance": 1e-15}
    layer = theseus.TheseusLayer(theseus.LevenbergMarquardt(objective, **search))
    options = {"damping": 1e-3, "adaptive_damping": True, "backward_mode": mode}
    found, _ = layer.forward(start | leaves, optimizer_kwargs=options)
    nu = torch.cat([found[key].reshape(-1) for key in start])
    rows = [torch.autograd.grad(x, list(leaves.values()), retain_graph=True) for x in nu]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@dataclass(frozen=True)
class Problem:
    """A fit, its solution, and the 50-digit derivative along random directions."""

    fit: Fit
    residual: Residuals
    nu: Params
    directions: Tensor
    """V `[Q, K]`"""
    reference: Tensor
    """R V `[P, K]`"""


def problem(kind: str, quick: bool) -> Problem:
    fit = decay_fit(kind)
    residual = lambda theta, nu: decay_residual(fit.times, theta, nu)
    nu = least_squares_layer(residual)(fit.theta, fit.nu0)
    rng = torch.Generator().manual_seed(1)
    directions = [
        {key: torch.randn(x.shape, generator=rng, dtype=x.dtype) for key, x in fit.theta.items()}
        for _ in range(2 if quick else DIRECTIONS)
    ]
    reference = torch.stack([exact_derivative(fit, nu, v) for v in directions], 1)
    return Problem(fit, residual, nu, torch.stack([ravel(v) for v in directions], 1), reference)


def error(case: Problem, jacobian: Tensor) -> float:
    """`|(D - R) V| / |R V|`"""
    return float((jacobian @ case.directions - case.reference).norm() / case.reference.norm())


def s_nls(quick: bool) -> Iterator[Figure]:
    """s-nls/well and s-nls/ill: the layer's derivative against the 50-digit reference, bar 1e-8; then theseus."""
    cases = {kind: problem(kind, quick) for kind in ("well", "ill")}
    n = 2 if quick else DIRECTIONS
    for kind, case in cases.items():
        fit, residual, nu = case.fit, case.residual, case.nu
        yield Figure(kind, error(case, jacobian_of(least_squares_layer(residual), fit)), "relative", n, BAR)
        cost = lambda x, case=case: case.residual(case.fit.theta, unravel(x, case.nu)).square().sum() / 2
        yield Figure(f"{kind}-condition", float(torch.linalg.cond(hessian(cost)(ravel(nu)))), "of the Hessian", 1)
        for key in nu:
            cotangent = {name: torch.full_like(x, float(name == key)) for name, x in nu.items()}
            gap = gauss_newton_gap(residual, fit.theta, nu, cotangent)
            yield Figure(f"{kind}-gauss-newton-gap-{key}", gap, "relative", 1)
    for kind, case in cases.items():
        for mode in ("implicit", "unroll"):
            yield Figure(f"{kind}-theseus-{mode}", error(case, theseus_jacobian(case.fit, mode)), "relative", n)
        layer = least_squares_layer(case.residual, theseus_solver(case.residual))
        yield Figure(f"{kind}-theseus-forward", error(case, jacobian_of(layer, case.fit)), "relative", n, BAR)


def jacobian_of(layer: Layer, fit: Fit) -> Tensor:
    """dnu/dtheta `[P, Q]` of a layer."""
    rows = jacrev(lambda theta: ravel(layer(theta, fit.nu0)))(fit.theta)
    return torch.cat([block.reshape(len(block), -1) for block in rows.values()], 1)


if __name__ == "__main__":
    main({"s-nls": s_nls})
