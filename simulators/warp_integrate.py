"""The time stepping of `sim2real.simulators.integrate` in Warp's kernel language, with the same arithmetic.

Second order, `q'' = acceleration(theta, q, w, action)`; first order, `x' = rates(theta, x, action, noise)`; action and
noise are held over the step. Loops over substeps are unrolled when the kernel is translated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sim2real.simulators.integrate import Integrator, check_time_step

# What a kernel computes with has Warp's types only once it is translated.
Kernel = Callable[..., Any]


def second_order(acceleration: Kernel, *, dt: float, integrator: Integrator, substeps: int) -> Kernel:
    """`advance(theta, q, w, action) -> (q, w)` over dt (s), for vectors q, w of the same length."""
    check_time_step(dt, substeps, integrator)
    h = dt / substeps

    def semi_implicit(theta: Any, q: Any, w: Any, action: Any) -> Any:
        for _ in range(substeps):
            w = w + h * acceleration(theta, q, w, action)
            q = q + h * w
        return q, w

    def midpoint(theta: Any, q: Any, w: Any, action: Any) -> Any:
        for _ in range(substeps):
            w_mid = w + 0.5 * h * acceleration(theta, q, w, action)
            w_end = w + h * acceleration(theta, q + 0.5 * h * w, w_mid, action)
            q = q + h * w_mid
            w = w_end
        return q, w

    def rk4(theta: Any, q: Any, w: Any, action: Any) -> Any:
        for _ in range(substeps):
            f1 = acceleration(theta, q, w, action)
            w2 = w + 0.5 * h * f1
            f2 = acceleration(theta, q + 0.5 * h * w, w2, action)
            w3 = w + 0.5 * h * f2
            f3 = acceleration(theta, q + 0.5 * h * w2, w3, action)
            w4 = w + h * f3
            f4 = acceleration(theta, q + h * w3, w4, action)
            q = q + h / 6.0 * (w + 2.0 * (w2 + w3) + w4)
            w = w + h / 6.0 * (f1 + 2.0 * (f2 + f3) + f4)
        return q, w

    return {"semi_implicit": semi_implicit, "midpoint": midpoint, "rk4": rk4}[integrator]


def first_order(rates: Kernel, *, dt: float, integrator: str, substeps: int) -> Kernel:
    """`advance(theta, x, action, noise) -> x` over dt, in the unit of the rates; midpoint or rk4."""
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))
    h = dt / substeps

    def midpoint(theta: Any, x: Any, action: Any, noise: Any) -> Any:
        for _ in range(substeps):
            x = x + h * rates(theta, x + 0.5 * h * rates(theta, x, action, noise), action, noise)
        return x

    def rk4(theta: Any, x: Any, action: Any, noise: Any) -> Any:
        for _ in range(substeps):
            k1 = rates(theta, x, action, noise)
            k2 = rates(theta, x + 0.5 * h * k1, action, noise)
            k3 = rates(theta, x + 0.5 * h * k2, action, noise)
            k4 = rates(theta, x + h * k3, action, noise)
            x = x + h / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        return x

    return {"midpoint": midpoint, "rk4": rk4}[integrator]
