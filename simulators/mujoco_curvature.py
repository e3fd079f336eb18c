"""Contacts of smooth convex geoms, first order, from the curvature of their support functions (rule B).

C_i is the Hessian of geom i's support function at the normal, on the tangent plane (P = I - n n'): sphere r P,
vertex 0, face infinite, edge infinite along it, ellipsoid (A^2 - s s')/|A n| with s = A^2 n/|A n|, rim of a cylinder
(r / sin of the tilt) e e'. With witness points X_i and normals N_i carried rigidly,

    (C1 + C2 + dist I) dn = P (dX2 - dX1) + C1 dN1 + C2 dN2,            d dist = n . (dX2 - dX1),
    dx = (dX1 + dX2)/2 + (C1 (dn - dN1) - C2 (dn - dN2))/2.

Here geom 1 rests and geom 2 moves, which is all a contact can depend on. "Infinite" is 1e7 m and costs 1e-8.
Reference: mujoco_recipe 3, rule B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim2real.simulators.mujoco_cores import FACE, LINE
from sim2real.simulators.mujoco_features import (
    BOX,
    CAPSULE,
    CYLINDER,
    ELLIPSOID,
    MESH,
    PLANE,
    SPHERE,
    Array,
    GeomTable,
    Sides,
    features,
)

_INFINITE = 1e7
"""curvature radius of a flat direction, m"""
_NEAR = 1e-5
"""a witness this close to a boundary (times the size) lies on it"""
_ALONG = 1e-4
"""largest sine between the reported normal and the exact one of the feature: convex colliders carry noise up to 2e-5"""


def curvature_jacobian(normal: Array, dist: Array, arm: Array, first: Array, second: Array) -> Array:
    """d(point, normal, dist)/d(twist of geom 2 about its centre) [n, 7, 6], world axes; linear part first.

    `normal` [n, 3]; `dist` [n] m; `arm` [n, 3] from the centre of geom 2 to its witness; `first`, `second` [n, 3, 3] C.
    """
    n = len(normal)
    eye = np.broadcast_to(np.eye(3), (n, 3, 3))
    project = eye - normal[:, :, None] * normal[:, None, :]
    d_witness = np.concatenate([eye, -_skew(arm)], -1)
    d_normal = np.concatenate([np.zeros((n, 3, 3)), -_skew(normal)], -1)
    # the projector n n' makes the singular tangential system regular and leaves its tangential solution alone
    stiffness = first + second + dist[:, None, None] * project + normal[:, :, None] * normal[:, None, :]
    turn = project @ np.linalg.solve(stiffness, project @ (d_witness + second @ d_normal))
    shift = (d_witness + first @ turn - second @ (turn - d_normal)) / 2
    return np.concatenate([shift, turn, normal[:, None, :] @ d_witness], 1)


def _skew(x: Array) -> Array:
    zero = np.zeros(len(x))
    a, b, c = x.T
    return np.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).reshape(-1, 3, 3)


def support_hessian(table: GeomTable, sides: Sides) -> tuple[Array, NDArray[np.bool_]]:
    """C [n, 3, 3] in the frames of the geoms, and whether witness and normal fit one smooth feature [n]."""
    n = len(sides.geom)
    hessian, fits = np.zeros((n, 3, 3)), np.zeros(n, dtype=bool)
    kinds = table.kind[sides.geom]
    rules = {CAPSULE: _capsule, ELLIPSOID: _ellipsoid, BOX: _box, CYLINDER: _cylinder, MESH: _mesh}
    for kind in np.unique(kinds).tolist():
        rows = kinds == kind
        if kind == PLANE:
            hessian[rows], fits[rows] = _INFINITE * np.eye(3), True
        elif kind == SPHERE:
            hessian[rows], fits[rows] = table.size[sides.geom[rows], 0, None, None] * np.eye(3), True
        elif kind in rules:
            hessian[rows], fits[rows] = rules[kind](table, sides[rows])
    project = np.eye(3) - sides.normal[:, :, None] * sides.normal[:, None, :]
    return project @ hessian @ project, fits


def _outer(x: Array) -> Array:
    return x[:, :, None] * x[:, None, :]


def _capsule(table: GeomTable, s: Sides) -> tuple[Array, NDArray[np.bool_]]:
    radius, half = table.size[s.geom, 0], table.size[s.geom, 1]
    height = np.abs(s.witness[:, 2] - radius * s.normal[:, 2])
    end = height > half * (1 - _NEAR)
    flat = np.where(end, 0.0, _INFINITE)[:, None, None] * np.diag([0.0, 0.0, 1.0])
    return radius[:, None, None] * np.eye(3) + flat, end | (np.abs(s.normal[:, 2]) < _ALONG)


def _ellipsoid(table: GeomTable, s: Sides) -> tuple[Array, NDArray[np.bool_]]:
    size = table.size[s.geom]
    length = np.linalg.norm(size * s.normal, axis=1)[:, None]
    support = size**2 * s.normal / length
    squares = np.zeros((len(size), 3, 3))
    squares[:, [0, 1, 2], [0, 1, 2]] = size**2
    across = np.linalg.norm(support - s.witness, axis=1)
    return (squares - _outer(support)) / length[..., None], across < _ALONG * size.max(1) ** 2 / size.min(1)


def _box(table: GeomTable, s: Sides) -> tuple[Array, NDArray[np.bool_]]:
    size = table.size[s.geom]
    free = np.abs(s.witness) < size - _NEAR * size.max(1, keepdims=True)
    outward = (s.witness * s.normal > 0) | (np.abs(s.normal) < _ALONG)
    fits = np.where(free, np.abs(s.normal) < _ALONG, outward).all(1) & (free.sum(1) < 3)
    flat = np.zeros((len(size), 3, 3))
    flat[:, [0, 1, 2], [0, 1, 2]] = np.where(free, _INFINITE, 0.0)
    return flat, fits


def _cylinder(table: GeomTable, s: Sides) -> tuple[Array, NDArray[np.bool_]]:
    radius, half = table.size[s.geom, 0], table.size[s.geom, 1]
    across = np.hypot(s.normal[:, 0], s.normal[:, 1])
    on_cap = np.abs(s.witness[:, 2]) > half * (1 - _NEAR)
    on_side = np.hypot(s.witness[:, 0], s.witness[:, 1]) > radius * (1 - _NEAR)
    rim, cap = on_cap & on_side, on_cap & ~on_side
    along = np.stack([-s.normal[:, 1], s.normal[:, 0], 0 * across], -1) / np.maximum(across, _ALONG)[:, None]
    bent = (radius / np.maximum(across, _ALONG))[:, None, None] * _outer(along)
    round_ = radius[:, None, None] * np.eye(3) + _INFINITE * np.diag([0.0, 0.0, 1.0])
    hessian = np.where(rim[:, None, None], bent, np.where(cap[:, None, None], _INFINITE * np.eye(3), round_))
    level = np.abs(s.normal[:, 2]) < _ALONG
    return hessian, np.where(rim, across > _ALONG, np.where(cap, across < _ALONG, on_side & level))


def _mesh(table: GeomTable, s: Sides) -> tuple[Array, NDArray[np.bool_]]:
    fits = np.ones(len(s.geom), dtype=bool)
    hessian = np.zeros((len(fits), 3, 3))
    found = features(table, s, _ALONG)
    extent = np.array([np.ptp(table.hulls[g], axis=0).max() for g in s.geom.tolist()])
    gap = np.array(
        [np.linalg.norm(table.hulls[g] - w, axis=1).min() for g, w in zip(s.geom.tolist(), s.witness, strict=True)]
    )
    inside = gap > _NEAR * extent
    hessian[inside & (found.kind == FACE)] = _INFINITE * np.eye(3)
    edge = inside & (found.kind == LINE)
    hessian[edge] = _INFINITE * _outer(found.axis[edge])
    return hessian, ~inside | (found.kind == FACE) | edge
