"""Contacts as two rounded cores: normal, distance and point as closed forms of two poses, exact to all orders (rule A).

Each geom offers a core carried by its body, and a radius r around it: a point P (sphere, end of a capsule, vertex),
a line L (side of a capsule or cylinder, edge), a plane F (plane, face, cap), a rim R (circle, edge of a cap), and,
against a face, the foot of a cylinder C or of an ellipsoid E and clipped points of boxes (`mujoco_clipping`). Between
core points q1 and q2 with normal n,

    F-P, F-C, F-E   n = u1                      q1 = q2 - n (n . (q2 - p1))
    P-P, R-P, L-P   n = (q2 - q1)/|q2 - q1|     q1 the nearest point of the core 1 to q2
    L-L             n = u1 x u2 / |u1 x u2|     closest points of two lines
    E               q2 = c - S n / sqrt(n' S n),            S = R A^2 R', semi-axes A
    C               q2 = c + c0 u + c1 f + c2 f x u,        f = -(n - u (u . n))/|...|, the lowest direction of the rim
    x1 = q1 + r1 n,  x2 = q2 - r2 n,  dist = n . (x2 - x1),  point = (x1 + x2)/2

with p, u, c carried by the bodies. The order of the two geoms is as above; `flip` restores MuJoCo's.
Reference: mujoco_recipe 3; MuJoCo engine_collision_primitive (cylinder on a plane).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACE, RIM, LINE, POINT, CYLINDER_FOOT, ELLIPSOID_FOOT, CUT_EDGE, UNDER_CORNER, NO_CORE = range(9)
CORE_PAIRS = (
    (FACE, POINT),
    (FACE, CYLINDER_FOOT),
    (FACE, ELLIPSOID_FOOT),
    (FACE, CUT_EDGE),
    (FACE, UNDER_CORNER),
    (RIM, POINT),
    (LINE, LINE),
    (LINE, POINT),
    (POINT, POINT),
)

cross = torch.linalg.cross


@dataclass(frozen=True, eq=False)
class CorePair:
    """n contacts of one pair of kinds; points and axes in the frames of their carriers."""

    kinds: tuple[int, int]
    point: Tensor
    """[n, 2, 3] m"""
    axis: Tensor
    """[n, 2, 3] unit"""
    radius: Tensor
    """[n, 2] m"""
    shape: Tensor
    """[n, 3, 3]: rim (radius at [0, 0]), foot of a cylinder (c0, c1, c2 in row 0), S of an ellipsoid; of a
    clipped point the normal of the side (row 0) and a point on it (row 1), in the frame of the first carrier"""
    sign: Tensor
    """[n] +1 or -1: the side of the core on which the normal lies"""
    flip: Tensor
    """[n] -1 where core 1 belongs to MuJoCo's second geom"""


def core_frames(pair: CorePair, position: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance [n], point [n, 3] and normal [n, 3] (MuJoCo's first to second geom) from the carriers' poses.

    `position` [n, 2, 3] and `rotation` [n, 2, 3, 3] of the carriers of core 1 and core 2, m.
    """
    point = position + (rotation @ pair.point[..., None]).squeeze(-1)
    axis = (rotation @ pair.axis[..., None]).squeeze(-1)
    p1, p2 = point.unbind(1)
    u1, u2 = axis.unbind(1)
    first, second = pair.kinds
    if first == FACE:
        q2 = _foot(pair, p2, u2, u1, rotation[:, 1])
        if second in (CUT_EDGE, UNDER_CORNER):
            q2 = _clip(pair, p2, u2, u1, position[:, 0], rotation[:, 0])
        normal, q1 = u1, q2 - u1 * _inner(u1, q2 - p1)
    elif second == LINE:
        normal, q1, q2 = _two_lines(p1, u1, p2, u2, pair.sign)
    else:
        q1, q2 = _nearest(pair, p1, u1, p2), p2
        normal = _unit(q2 - q1) * pair.sign[:, None]
    x1, x2 = q1 + pair.radius[:, :1] * normal, q2 - pair.radius[:, 1:] * normal
    return _inner(normal, x2 - x1).squeeze(-1), (x1 + x2) / 2, normal * pair.flip[:, None]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _unit(a: Tensor) -> Tensor:
    return a / _inner(a, a).sqrt()


def _foot(pair: CorePair, center: Tensor, axis: Tensor, normal: Tensor, rotation: Tensor) -> Tensor:
    """The core point [n, 3] that a geom turns towards a plane."""
    if pair.kinds[1] == CYLINDER_FOOT:
        along, down, aside = pair.shape[:, 0, :].split(1, -1)
        lowest = -_unit(normal - axis * _inner(axis, normal))
        return center + along * axis + down * lowest + aside * cross(lowest, axis)
    if pair.kinds[1] == ELLIPSOID_FOOT:
        turned = (rotation.mT @ normal[..., None]).squeeze(-1)
        support = (pair.shape @ turned[..., None]).squeeze(-1)
        return center - (rotation @ support[..., None]).squeeze(-1) / _inner(support, turned).sqrt()
    return center


def _clip(pair: CorePair, point: Tensor, axis: Tensor, normal: Tensor, position: Tensor, rotation: Tensor) -> Tensor:
    """The clipped point [n, 3] of core 2 over a face with this normal, whose carrier is at `position`, `rotation`."""
    side = (rotation @ pair.shape[:, 0, :, None]).squeeze(-1)
    corner = position + (rotation @ pair.shape[:, 1, :, None]).squeeze(-1)
    if pair.kinds[1] == CUT_EDGE:
        return point + axis * _inner(side, corner - point) / _inner(side, axis)
    return corner + normal * _inner(axis, point - corner) / _inner(axis, normal)


def _nearest(pair: CorePair, center: Tensor, axis: Tensor, target: Tensor) -> Tensor:
    """The point [n, 3] of core 1 nearest to the core point `target`."""
    if pair.kinds[0] == POINT:
        return center
    offset = target - center
    along = axis * _inner(axis, offset)
    if pair.kinds[0] == LINE:
        return center + along
    return center + pair.shape[:, 0, :1] * _unit(offset - along)


def _two_lines(p1: Tensor, u1: Tensor, p2: Tensor, u2: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Common normal and closest points of two lines."""
    between = p2 - p1
    cosine, along1, along2 = _inner(u1, u2), _inner(u1, between), _inner(u2, between)
    sine2 = 1 - cosine * cosine
    q1 = p1 + u1 * (along1 - cosine * along2) / sine2
    q2 = p2 + u2 * (cosine * along1 - along2) / sine2
    return _unit(cross(u1, u2)) * sign[:, None], q1, q2
