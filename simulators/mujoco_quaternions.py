"""Quaternions (w, x, y, z) as MuJoCo uses them, batched: product, matrix, exponential and logarithm.

Two exponentials: that of any rotation vector, and that of a tangent vector d whose value is zero, written as
(1 - |d|^2/8, d/2): exact in value, gradient and Hessian at d = 0, for half the work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALL = 1e-6  # below this squared sine the logarithm is its series, exact to 1e-20


def quaternion_product(left: Tensor, right: Tensor) -> Tensor:
    """left * right, `[..., 4]`: the rotation `right`, then `left`."""
    w1, v1, w2, v2 = left[..., :1], left[..., 1:], right[..., :1], right[..., 1:]
    scalar = w1 * w2 - (v1 * v2).sum(-1, keepdim=True)
    return torch.cat([scalar, w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)], -1)


def quaternion_conjugate(q: Tensor) -> Tensor:
    """The inverse of a unit quaternion `[..., 4]`."""
    return torch.cat([q[..., :1], -q[..., 1:]], -1)


def quaternion_matrix(q: Tensor) -> Tensor:
    """The rotation matrix `[..., 3, 3]` of a unit quaternion `[..., 4]`."""
    w, x, y, z = q.unbind(-1)
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion_exp(d: Tensor) -> Tensor:
    """exp(d) of a tangent vector `[..., 3]` whose value is zero, exact to second order."""
    return torch.cat([1 - (d * d).sum(-1, keepdim=True) / 8, d / 2], -1)


def quaternion_exponential(x: Tensor) -> Tensor:
    """Unit quaternion of the rotation vector x `[..., 3]`: (cos |x|/2, sin(|x|/2) x / |x|), smooth at 0."""
    square = (x * x).sum(-1, keepdim=True)
    small = square < 1e-2  # below: Taylor series in |x|^2, its next term is below 1e-19
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    cosine = _polynomial(square, (1.0, -1 / 8, 1 / 384, -1 / 46080, 1 / 10321920))
    sine = _polynomial(square, (1 / 2, -1 / 48, 1 / 3840, -1 / 645120, 1 / 185794560))
    w = torch.where(small, cosine, torch.cos(angle / 2.0))
    return torch.cat([w, x * torch.where(small, sine, torch.sin(angle / 2.0) / angle)], -1)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient + x * total
    return total


def rotation_vector_rate(x: Tensor, w: Tensor) -> Tensor:
    """dexp(x)^-1 w: the rate of the rotation vector x `[..., 3]` of a frame that turns at w, in its own axes."""
    square = (x * x).sum(-1, keepdim=True)
    small = square < 1e-2
    s = torch.where(small, torch.ones_like(square), square)
    half = s.sqrt() / 2.0
    series = _polynomial(square, (1 / 12, 1 / 720, 1 / 30240, 1 / 1209600, 1 / 47900160))
    c = torch.where(small, series, (1.0 - half / torch.tan(half)) / s)
    across = torch.linalg.cross(x, w)
    return w + 0.5 * across + c * torch.linalg.cross(x, across)


def normalized(q: Tensor) -> Tensor:
    """The unit quaternion along q `[..., 4]`."""
    return q / q.norm(dim=-1, keepdim=True)


def rotation_vector(q: Tensor) -> Tensor:
    """The rotation vector `[..., 3]`, of angle in (-pi, pi], of a unit quaternion: MuJoCo's `mju_quat2Vel`.

    It is 2 atan2(|v|, w) v/|v|, less a turn where w < 0. Two derivatives are exact at v = 0 too.
    """
    w, v = q[..., :1], q[..., 1:]
    square = (v * v).sum(-1, keepdim=True)
    small = (square < _SMALL) & (w > 0)
    one = torch.ones_like(w)
    ratio = torch.where(small, square, 0 * square) / torch.where(small, w, one) ** 2
    series = 2 * (1 - ratio / 3 + ratio**2 / 5 - ratio**3 / 7) / torch.where(small, w, one)
    sine = torch.where(square < 1e-30, one, square).sqrt()
    angle = 2 * torch.atan2(sine, w)
    shortest = torch.where(angle > math.pi, angle - 2 * math.pi, angle)
    return v * torch.where(small, series, shortest / sine)
