"""Phrases of Warp's kernel language, each beside the same formula in torch: name -> (kernel function, torch function).

Every function takes vectors a in (0.2, 0.9)^4 and b in (-0.9, 0.9)^4 and returns numbers; the torch one is batched over
the first axis. `phrases` calls all kernel functions: one translation, one compilation.
"""

import math

import torch
import warp as wp
from torch import Tensor

GAIN = 0.1  # not exact in binary: must not be rounded to float32 in a float64 model
WHOLE = 3
TABLE = (0.5, 1.5, -2.0)
ARM = wp.vec3d(0.3, -0.2, 0.5)
TYPED = wp.constant(wp.float64(0.7))


def arithmetic(a, b):
    return (a[0] + b[0]) * a[1] - b[1] / a[2] + 2 * b[2] - -a[3] + GAIN, +a[0] - 1 / 2


def powers(a, b):
    return a[0] ** 2 + b[0] ** 3, a[1] ** -1, a[2] ** 0.5, a[3] ** 1.7, wp.pow(a[0], b[1]), b[2] ** 5


def trigonometry(a, b):
    return wp.sin(b[0]) * wp.cos(b[0]), wp.tan(b[1]), wp.asin(b[2]), wp.acos(b[3]), wp.atan(b[0]), wp.atan2(b[1], b[2])


def exponentials(a, b):
    return wp.sinh(b[0]), wp.cosh(b[1]), wp.tanh(b[2]), wp.exp(b[3]), wp.log(a[0]), wp.sqrt(a[1]), wp.log10(a[2])


def kinks(a, b):
    clamped = wp.clamp(a[2] * 2.0, 0.6, a[3] + 1.0)
    return wp.abs(b[0]) * a[0], wp.min(a[0], b[1]), wp.max(a[1], b[2]), clamped, abs(b[3])


def steps(a, b):
    chosen = wp.where(b[0] > 0.0, a[0], b[1])
    return wp.sign(b[0]) * a[0], wp.floor(5.0 * b[1]) * b[1], wp.ceil(3.0 * b[2]) + a[2], chosen


def branches(a, b):
    if b[0] > 0.3:
        y = wp.sqrt(b[0]) * a[0]
        z = 2.0
    elif b[0] > 0.0 and not b[1] < 0.0:
        y = a[1] * a[1]
        z = b[1]
    else:
        y = wp.sin(b[0] * a[2])
        z = -1.0
    t = wp.log(b[2]) if b[2] > 0.0 else b[2] * a[0]
    return y, z * y, t


def early(a, b):
    if b[0] < -0.2:
        return a[0] * b[1]
    s = a[1]
    for i in range(2):
        s = s * a[i]
        if s > b[2]:
            return s * s
    return s + b[3]


def returns(a, b):
    return early(a, b), 1.0 * a[3]


def loops(a, b):
    total = 0.0
    for i in range(4):
        total += a[i] * b[i] ** 2
    for j in range(WHOLE, 0, -1):
        total *= 1.0 + TABLE[j - 1] * a[j]
    for i in range(2):
        for k in range(i + 1):
            total -= b[k] * a[i]
    return total, 1.0 * WHOLE * a[0]


def pair(x, y):
    return x * y, x - y


def scaled(x, gain=3.0):
    return gain * x


@wp.func
def decorated(x: wp.float32, y: wp.float32):
    return wp.sin(x) * y


def make(dt):
    def advance(x, v):
        return x + dt * v

    return advance


ADVANCE = make(0.02)


def calls(a, b):
    p, q = pair(a[0], b[0])
    p = decorated(p, q)
    r = scaled(p, gain=q) + scaled(q)
    return p, r, ADVANCE(a[1], b[1]), TYPED * a[2], float(a[3] > 0.5) * b[2] + wp.static(math.pi) * a[0]


def vectors(a, b):
    u, v = wp.vec3(a[0], a[1], a[2]), wp.vec3(b[0], b[1], b[2])
    w = wp.cross(u, v) + ARM * a[3]
    w[1] = w[1] * b[3]
    n = wp.normalize(w)
    s = wp.vector(a[0], a[1], b[2], b[3], 1.0)
    return wp.dot(u, v), wp.length(w), n[0], n[2], wp.length_sq(s), (-w / a[3]).y, wp.dot(a[1:3], b[:2]), len(s) * s[-2]


def matrices(a, b):
    m = wp.mat33(a[0], b[0], 0.1, b[1], 1.0 + a[1], b[2], 0.3, a[2], 2.0 + b[3])
    k = wp.mat22(a[0] + 1.0, b[1], b[2], a[3] + 1.0)
    u = wp.inverse(m) * wp.vec3(a[0], a[1], a[2])
    o = wp.outer(wp.vec2(b[0], b[1]), wp.vec2(a[0], a[1])) @ k
    q = wp.mat44(0.5)
    q[0, 1] = b[0]
    q[2, 2] = a[1] + q[1, 1]
    d, row = wp.determinant(k * 2.0), wp.transpose(m)[1]
    return wp.determinant(m), u[0], u[2], o[0, 1], o[1, 0], d, wp.trace(m @ m), row[0], wp.determinant(q)


def rotations(a, b):
    q = wp.normalize(wp.quat(b[0], b[1], b[2], a[3] + 0.5))
    v = wp.vec3(a[0], a[1], a[2])
    p = wp.quat_from_axis_angle(wp.normalize(v), b[3]) * q
    r, s = wp.quat_rotate(p, v), wp.quat_rotate_inv(q, v)
    m = wp.quat_to_matrix(wp.quat_inverse(p))
    return p[0], p[3], r[0], r[1], r[2], s[0], s[1], s[2], m[0, 1], m[2, 0]


def phrases(a, b):
    c0, c1 = arithmetic(a, b)
    p = powers(a, b)
    t = trigonometry(a, b)
    e = exponentials(a, b)
    k = kinks(a, b)
    s = steps(a, b)
    r = branches(a, b)
    f = returns(a, b)
    o = loops(a, b)
    c = calls(a, b)
    v = vectors(a, b)
    m = matrices(a, b)
    q = rotations(a, b)
    return wp.vector(c0, c1, p, t, e, k, s, r, f, o, c, v, m, q)


# -------------------------------------------------------------------------------------------------------- in torch


def _quaternion(b: Tensor, w: Tensor) -> Tensor:
    q = torch.cat([b, w[..., None]], -1)
    return q / q.norm(dim=-1, keepdim=True)


def _product(p: Tensor, q: Tensor) -> Tensor:
    u, v = p[..., :3], q[..., :3]
    w = p[..., 3] * q[..., 3] - (u * v).sum(-1)
    return torch.cat([p[..., 3:] * v + q[..., 3:] * u + torch.linalg.cross(u, v), w[..., None]], -1)


def _conjugate(q: Tensor) -> Tensor:
    return torch.cat([-q[..., :3], q[..., 3:]], -1)


def _rotated(q: Tensor, v: Tensor) -> Tensor:
    pure = torch.cat([v, torch.zeros_like(v[..., :1])], -1)
    return _product(_product(q, pure), _conjugate(q))[..., :3]


def _stack(*items: Tensor | float) -> Tensor:
    like = next(item for item in items if isinstance(item, Tensor))
    return torch.stack([item if isinstance(item, Tensor) else torch.full_like(like, item) for item in items], -1)


def _early(a: Tensor, b: Tensor) -> Tensor:
    s1, s2 = a[..., 1] * a[..., 0], a[..., 1] * a[..., 0] * a[..., 1]
    late = torch.where(s1 > b[..., 2], s1 * s1, torch.where(s2 > b[..., 2], s2 * s2, s2 + b[..., 3]))
    return torch.where(b[..., 0] < -0.2, a[..., 0] * b[..., 1], late)


def _loops(a: Tensor, b: Tensor) -> Tensor:
    total = (a * b * b).sum(-1)
    for j in (3, 2, 1):
        total = total * (1.0 + TABLE[j - 1] * a[..., j])
    for i, k in ((0, 0), (1, 0), (1, 1)):
        total = total - b[..., k] * a[..., i]
    return total


def _safe(x: Tensor) -> Tensor:
    return torch.where(x > 0.0, x, 0.5)  # torch's own branch not taken must stay finite


def twins(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """All phrases in torch: name -> `[..., results]`, in the order of `phrases`."""
    a0, a1, a2, a3 = a.unbind(-1)
    b0, b1, b2, b3 = b.unbind(-1)
    first, second = b0 > 0.3, (b0 > 0.0) & ~(b1 < 0.0)
    y = torch.where(first, _safe(b0).sqrt() * a0, torch.where(second, a1 * a1, (b0 * a2).sin()))
    z = torch.where(first, 2.0, torch.where(second, b1, -1.0))
    p, q = a0 * b0, a0 - b0
    d = p.sin() * q
    u, v = a[..., :3], b[..., :3]
    w = torch.linalg.cross(u, v) + torch.tensor(list(ARM), dtype=a.dtype) * a3[..., None]
    w = w * _stack(a0 * 0 + 1, b3, a0 * 0 + 1)
    n = w / w.norm(dim=-1, keepdim=True)
    m = _stack(a0, b0, 0.1, b1, 1.0 + a1, b2, 0.3, a2, 2.0 + b3).unflatten(-1, (3, 3))
    k = _stack(a0 + 1.0, b1, b2, a3 + 1.0).unflatten(-1, (2, 2))
    o = (b[..., :2, None] * a[..., None, :2]) @ k
    inverted = (torch.linalg.inv(m) @ u[..., None])[..., 0]
    h = 0.5 + 0 * a0
    big = _stack(h, b0, h, h, h, h, h, h, h, h, a1 + 0.5, h, h, h, h, h).unflatten(-1, (4, 4))
    rotation = _quaternion(v, a3 + 0.5)
    axis = u / u.norm(dim=-1, keepdim=True)
    turned = _product(torch.cat([axis * (b3 / 2).sin()[..., None], (b3 / 2).cos()[..., None]], -1), rotation)
    columns = torch.stack([_rotated(_conjugate(turned), e.expand_as(u)) for e in torch.eye(3, dtype=a.dtype)], -1)
    return {
        "arithmetic": _stack((a0 + b0) * a1 - b1 / a2 + 2 * b2 + a3 + GAIN, a0 - 0.5),
        "powers": _stack(a0**2 + b0**3, 1 / a1, a2.sqrt(), a3**1.7, a0**b1, b2**5),
        "trigonometry": _stack(b0.sin() * b0.cos(), b1.tan(), b2.asin(), b3.acos(), b0.atan(), torch.atan2(b1, b2)),
        "exponentials": _stack(b0.sinh(), b1.cosh(), b2.tanh(), b3.exp(), a0.log(), a1.sqrt(), a2.log10()),
        "kinks": _stack(
            b0.abs() * a0,
            torch.minimum(a0, b1),
            torch.maximum(a1, b2),
            torch.minimum((2.0 * a2).clamp(min=0.6), a3 + 1.0),
            b3.abs(),
        ),
        "steps": _stack(b0.sign() * a0, (5 * b1).floor() * b1, (3 * b2).ceil() + a2, torch.where(b0 > 0.0, a0, b1)),
        "branches": _stack(y, z * y, torch.where(b2 > 0.0, _safe(b2).log(), b2 * a0)),
        "returns": _stack(_early(a, b), a3),
        "loops": _stack(_loops(a, b), 3.0 * a0),
        "calls": _stack(d, q * d + 3.0 * q, a1 + 0.02 * b1, 0.7 * a2, (a3 > 0.5) * b2 + math.pi * a0),
        "vectors": _stack(
            (u * v).sum(-1),
            w.norm(dim=-1),
            n[..., 0],
            n[..., 2],
            a0**2 + a1**2 + b2**2 + b3**2 + 1.0,
            -w[..., 1] / a3,
            a1 * b0 + a2 * b1,
            5 * b3,
        ),
        "matrices": _stack(
            torch.linalg.det(m),
            inverted[..., 0],
            inverted[..., 2],
            o[..., 0, 1],
            o[..., 1, 0],
            4.0 * torch.linalg.det(k),
            (m @ m).diagonal(dim1=-2, dim2=-1).sum(-1),
            m[..., 0, 1],
            torch.linalg.det(big),
        ),
        "rotations": torch.cat(
            [turned[..., [0, 3]], _rotated(turned, u), _rotated(_conjugate(rotation), u), columns[..., [0, 2], [1, 0]]],
            -1,
        ),
    }
