"""Products with `A = -J_nunu` and `C = J_nutheta` from J itself: by differentiating twice, or by differences.

Central differences of the gradient of J along x, `(grad J(nu + h x) - grad J(nu - h x)) / 2h`, hold `-A x` (its part in
nu) and `C' x` (its part in theta) at once, and need J once differentiable only. Reference: Pearlmutter, Neural
Computation 6 (1994) 147.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sim2real.params import Params, axpy, dot

Objective = Callable[[Params, Params], Tensor]

DIFFERENCE = 6e-6
"""relative step of differences of gradients: the cube root of eps, where truncation and rounding are of one size"""


@dataclass(frozen=True)
class LocalProducts:
    """At (theta, nu): grad_nu J, `A x` and `C' x`."""

    gradient: Params
    curvature: Callable[[Params], Params]
    cross: Callable[[Params], Params]


def by_differences(J: Objective, theta: Params, nu: Params, x: Params, step: float) -> tuple[Params, Params]:
    """`A x` and `C' x` by central differences of the gradient of J along x."""
    h = step * max(1.0, size_of(nu)) / max(size_of(x), 1e-300)
    (theta_up, nu_up), (theta_down, nu_down) = (gradients(J, theta, axpy(s * h, x, nu)) for s in (1, -1))
    slope = lambda up, down: {key: (up[key] - down[key]) / (2 * h) for key in up}
    return {key: -value for key, value in slope(nu_up, nu_down).items()}, slope(theta_up, theta_down)


def bend(J: Objective, theta: Params, nu: Params, x: Params, step: float) -> Params:
    """Half the difference of the slopes of grad_nu J along x on both sides of nu: of order `step` where J is smooth."""
    h = step * max(1.0, size_of(nu)) / max(size_of(x), 1e-300)
    up, at, down = (gradients(J, theta, axpy(s * h, x, nu))[1] for s in (1, 0, -1))
    return {key: (up[key] - 2 * at[key] + down[key]) / (2 * h) for key in up}


def gradients(J: Objective, theta: Params, nu: Params, *, create_graph: bool = False) -> tuple[Params, Params]:
    """grad_theta J and grad_nu J at theta and nu, which must be leaves where a graph is kept."""
    if not create_graph:
        theta, nu = leaves(theta), leaves(nu)
    with torch.enable_grad():
        value = J(theta, nu)
        if value.numel() != 1:
            raise ValueError(f"J must return a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("J depends differentiably neither on theta nor on nu")
        inputs = [*theta.values(), *nu.values()]
        grads = torch.autograd.grad(
            value.reshape(()), inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    return dict(zip(theta, grads, strict=False)), dict(zip(nu, grads[len(theta) :], strict=True))


def local_products(J: Objective, theta: Params, nu: Params, order: Literal[1, 2]) -> LocalProducts:
    """Exact products (order 2), or central differences of gradients (order 1), at (theta, nu)."""
    if order == 1:
        _, gradient = gradients(J, theta, nu)
        both = lambda x: by_differences(J, theta, nu, x, DIFFERENCE)
        return LocalProducts(gradient, lambda x: both(x)[0], lambda x: both(x)[1])
    theta, nu = leaves(theta), leaves(nu)
    _, gradient = gradients(J, theta, nu, create_graph=True)
    alive = [key for key, value in gradient.items() if value.requires_grad]

    def pulled(x: Params, into: Params) -> Params:
        if not alive:
            return {key: torch.zeros_like(value) for key, value in into.items()}
        outputs, cotangents = [gradient[key] for key in alive], [x[key] for key in alive]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(outputs, list(into.values()), cotangents, **options)
        return dict(zip(into, grads, strict=True))

    fixed = {key: value.detach() for key, value in gradient.items()}
    return LocalProducts(fixed, lambda x: {k: -v for k, v in pulled(x, nu).items()}, lambda x: pulled(x, theta))


def leaves(params: Params) -> Params:
    """Copies without history that collect gradients."""
    return {key: value.detach().requires_grad_() for key, value in params.items()}


def size_of(params: Params) -> float:
    """Euclidean norm."""
    return float(dot(params, params)) ** 0.5
