"""A quasi-Newton model inside a ball and a box, for maximisation.

The step maximises `g'd - d'B d / 2` over `|d| <= radius`, `low <= d <= high`, with B symmetric positive semi-definite
(minus the Hessian). B follows from gradients at two points by the BFGS update of -F, skipped where F is not concave
along the step. Reference: J. Nocedal and S. Wright, Numerical Optimization, 2nd ed., 2006, sections 4.3, 6.1, 18.5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trust_region_step(gradient: Tensor, curvature: Tensor, radius: float, low: Tensor, high: Tensor) -> Tensor:
    """d `[n]` for gradient `[n]`, B `[n, n]` and bounds `low <= 0 <= high` on d; variables that hit a bound stay on it.

    Raises `ValueError` for a radius that is negative or not finite, or bounds that exclude 0.
    """
    if not 0 <= radius < float("inf"):
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
    if bool(((low > 0) | (high < 0)).any()):
        raise ValueError("the bounds exclude the present point; project it into the box first")
    step = torch.zeros_like(gradient)
    free = ~(((low >= 0) & (gradient < 0)) | ((high <= 0) & (gradient > 0)))
    while bool(free.any()):
        room = max(radius**2 - float(step.square().sum()), 0.0) ** 0.5
        slope = gradient[free] - curvature[free][:, ~free] @ step[~free]
        part = _ball_step(slope, curvature[free][:, free], room)
        outside = (part < low[free]) | (part > high[free])
        index = free.nonzero().squeeze(-1)
        if not bool(outside.any()):
            return step.index_put((index,), part)
        hit = index[outside]
        step = step.index_put((hit,), torch.clamp(part, low[free], high[free])[outside])
        free = free.index_fill(0, hit, False)
    return step


def _ball_step(gradient: Tensor, curvature: Tensor, radius: float) -> Tensor:
    """The maximiser of `g'd - d'B d / 2` in the ball, from the eigenvectors of B and a bisection for the shift."""
    size = float(gradient.norm())
    if size == 0.0 or radius == 0.0:
        return torch.zeros_like(gradient)
    values, vectors = torch.linalg.eigh(curvature)
    values, along = values.clamp(min=0.0), vectors.T @ gradient
    solve = lambda shift: vectors @ (along / (values + shift))
    if float(values[0]) > 1e-14 * float(values[-1]) and float(solve(0.0).norm()) <= radius:
        return solve(0.0)
    below, above = 0.0, size / radius  # |solve(shift)| falls with shift and is at most radius at `above`
    for _ in range(100):
        middle = 0.5 * (below + above)
        if float(solve(middle).norm()) > radius:
            below = middle
        else:
            above = middle
    return solve(above)


def predicted_gain(gradient: Tensor, curvature: Tensor, step: Tensor) -> float:
    """`g'd - d'B d / 2`."""
    return float(gradient @ step - 0.5 * step @ (curvature @ step))


def bfgs_update(curvature: Tensor, step: Tensor, fall: Tensor) -> Tensor:
    """B `[n, n]` after a step d along which the gradient fell by y (`fall` = gradient before - after).

    A zero B starts from (y'd / d'd) I. A pair with y'd <= 1e-8 |y| |d| (no concavity along d) leaves B as it was.
    """
    along = float(fall @ step)
    if along <= 1e-8 * float(fall.norm() * step.norm()):
        return curvature
    if not bool(curvature.any()):
        eye = torch.eye(len(step), dtype=step.dtype, device=step.device)
        curvature = along / float(step @ step) * eye
    carried = curvature @ step
    updated = curvature - torch.outer(carried, carried) / (step @ carried) + torch.outer(fall, fall) / along
    return 0.5 * (updated + updated.T)


def next_radius(radius: float, length: float, gain: float, predicted: float, largest: float) -> float:
    """Half the step after a gain below a quarter of the prediction, double after a good step to the boundary."""
    if not gain >= 0.25 * predicted:
        return 0.5 * min(length, radius)
    if gain >= 0.75 * predicted and length >= 0.9 * radius:
        return min(2.0 * radius, largest)
    return radius
