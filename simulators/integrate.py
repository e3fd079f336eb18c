"""Time stepping of ordinary differential equations with the input held over the step.

Second order, `q'' = f(q, w)` with `w = q'`, over a step h:

    semi_implicit   w' = w + h f(q, w),               q' = q + h w'                     (order 1, symplectic)
    midpoint        w' = w + h f(q + h w / 2, w + h f(q, w) / 2),   q' = q + h (w + h f(q, w) / 2)    (order 2)
    rk4             the classical Runge-Kutta method of (q, w)                           (order 4)

First order, `x' = f(x)`: midpoint and rk4. Reference: Hairer, Norsett, Wanner, Solving Ordinary Differential
Equations I, 1993, II.1; Hairer, Lubich, Wanner, Geometric Numerical Integration, 2006, I.1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Integrator = Literal["semi_implicit", "midpoint", "rk4"]


def check_time_step(dt: float, substeps: int, integrator: str, known: tuple[str, ...] = get_args(Integrator)) -> None:
    """Raise `ValueError` unless dt > 0 (s), substeps >= 1 and the integrator is one of `known`."""
    if not 0.0 < dt < float("inf"):
        raise ValueError(f"dt must be a positive number of seconds, got {dt}")
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    if integrator not in known:
        raise ValueError(f"integrator must be one of {known}, got '{integrator}'")


def integrate_second_order(
    acceleration: Callable[[Tensor, Tensor], Tensor],
    position: Tensor,
    velocity: Tensor,
    *,
    dt: float,
    integrator: Integrator = "midpoint",
    substeps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Position and velocity `[..., n]` after dt (s) of `q'' = acceleration(q, w)`, in `substeps` equal steps."""
    q, w, h = position, velocity, dt / substeps
    for _ in range(substeps):
        if integrator == "semi_implicit":
            w = torch.add(w, acceleration(q, w), alpha=h)
            q = torch.add(q, w, alpha=h)
        elif integrator == "midpoint":
            w_mid = torch.add(w, acceleration(q, w), alpha=h / 2)
            w_end = torch.add(w, acceleration(torch.add(q, w, alpha=h / 2), w_mid), alpha=h)
            q, w = torch.add(q, w_mid, alpha=h), w_end
        else:
            q, w = _rk4_second_order(acceleration, q, w, h)
    return q, w


def _rk4_second_order(
    acceleration: Callable[[Tensor, Tensor], Tensor], q: Tensor, w: Tensor, h: float
) -> tuple[Tensor, Tensor]:
    f1 = acceleration(q, w)
    w2 = torch.add(w, f1, alpha=h / 2)
    f2 = acceleration(torch.add(q, w, alpha=h / 2), w2)
    w3 = torch.add(w, f2, alpha=h / 2)
    f3 = acceleration(torch.add(q, w2, alpha=h / 2), w3)
    w4 = torch.add(w, f3, alpha=h)
    f4 = acceleration(torch.add(q, w3, alpha=h), w4)
    return (
        torch.add(q, w + 2.0 * (w2 + w3) + w4, alpha=h / 6),
        torch.add(w, f1 + 2.0 * (f2 + f3) + f4, alpha=h / 6),
    )


def integrate_first_order(
    derivative: Callable[[Tensor], Tensor],
    state: Tensor,
    *,
    dt: float,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
) -> Tensor:
    """State `[..., n]` after dt of `x' = derivative(x)`, in `substeps` equal steps; dt in the derivative's own unit."""
    x, h = state, dt / substeps
    for _ in range(substeps):
        k1 = derivative(x)
        k2 = derivative(torch.add(x, k1, alpha=h / 2))
        if integrator == "midpoint":
            x = torch.add(x, k2, alpha=h)
            continue
        k3 = derivative(torch.add(x, k2, alpha=h / 2))
        k4 = derivative(torch.add(x, k3, alpha=h))
        x = torch.add(x, k1 + 2.0 * (k2 + k3) + k4, alpha=h / 6)
    return x
