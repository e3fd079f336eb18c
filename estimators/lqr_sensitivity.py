"""Exact sensitivity of the optimal gain of a discounted linear-quadratic problem, by Bellman at a fixed policy.

`P = Bellman(theta, K, P)` is stationary in K at the optimum (envelope theorem), so dP solves one Lyapunov equation with
K held fixed, and `K = g S^-1 B'P A` follows by the chain rule: no Hessian of the return, no conjugate gradients
(`sim2real.solvers.riccati` states the equations). Noise of constant covariance does not change K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp

from sim2real.params import Params, check_same_keys
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.solvers.riccati import mean_square_radius, riccati, riccati_residual


def lqr_sensitivity(system: Callable[[Params], Params], theta: Params) -> Sensitivity:
    """dK*/dtheta of the optimal gain `nu = {"gain": K}`, for any theta that `system` turns into matrices.

    `system(theta)` returns {"A", "B", "Q", "R"} and optionally "discount" and "noise" as `riccati` takes them (costs,
    to be minimised; `a = -K s`). info: "gain" K `[m, n]`, "cost_matrix" P `[n, n]`, "radius" of the discounted loop.
    Computes in float64, returns theta's dtype. Raises `KeyError` for other keys, `UnstableError` as `riccati` does.
    """
    theta64 = {key: value.detach().double() for key, value in theta.items()}
    matrices = _matrices(system, theta64)
    P, K = riccati(**matrices)
    pull = vjp(lambda th: riccati(**_matrices(system, th))[1], theta64)[1]
    push = vjp(pull, torch.zeros_like(K))[1]

    def backward(g: Params) -> Params:
        check_same_keys({"gain": K}, g, "the cotangent of vjp")
        (pulled,) = pull(g["gain"].detach().double())
        return {key: value.detach().to(theta[key].dtype) for key, value in pulled.items()}

    def forward(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        (pushed,) = push(({key: value.detach().double() for key, value in v.items()},))
        return {"gain": pushed.detach()}

    discount, noise = matrices.get("discount", 1.0), matrices.get("noise")
    A, B = matrices["A"], matrices["B"]
    residual = float(riccati_residual(A, B, matrices["Q"], matrices["R"], discount, noise, P).max())
    radius = mean_square_radius(A - B @ K, discount, None if noise is None else noise @ K)
    report = SolveReport(True, residual, 0, f"Riccati equation solved to {residual:.1e}")
    return Sensitivity(backward, forward, report, {"gain": K, "cost_matrix": P, "radius": radius})


def _matrices(system: Callable[[Params], Params], theta: Params) -> dict[str, Tensor]:
    matrices = system(theta)
    if not {"A", "B", "Q", "R"} <= matrices.keys() <= {"A", "B", "Q", "R", "discount", "noise"}:
        raise KeyError(f"system(theta) must return A, B, Q, R and optionally discount, noise; got {sorted(matrices)}")
    return {key: value.double() for key, value in matrices.items()}
