"""Scalar laws of the MuJoCo kernels as arithmetic graphs: limits, contacts, actuators, springs of quaternion joints.

Every law adds to phi = <lam, r> a term  y_lam f(y, y_v, y_a; fields), where y is a coordinate and y_lam, y_v, y_a are
its rates along lam, v and a. A constraint row with jar = y_a + B y_v + K imp pos exerts f = s'(jar) = D min(jar, 0).

    force    f = d phi / d y_lam                             what r needs
    stiff    df / dy_a, the row's part of H                  (a block where rates are coupled)
    pull     gradients of phi by every input that moves, f first

All three are derived from phi by `warp_dual`. Reference: MuJoCo documentation, Computation, "Constraint model" and
"Parameters": impedance, reference acceleration, friction pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

from sim2real.simulators.mujoco_kernels_algebra import Piece, inputs
from sim2real.simulators.warp_dual import adjoints
from sim2real.simulators.warp_graph import Node, apply, both, constant, less, less_equal, power, select

_ONE = constant(1.0)
_LEAST, _MOST = 1e-4, 0.9999  # MuJoCo's bounds of impedances and of midpoints


def _clamped(x: Node, low: float, high: float) -> Node:
    return select(less(x, low), low, select(less(high, x), high, x))


def _at_least(x: Node, low: Node | float) -> Node:
    return select(less(x, low), low, x)


def _larger(a: Node, b: Node) -> Node:
    """max(a, b), whose derivative is shared where they are equal."""
    return select(less(a, b), b, select(less(b, a), a, (a + b) * 0.5))


def _smaller(a: Node, b: Node) -> Node:
    return -_larger(-a, -b)


def impedance(pos: Node, solimp: Sequence[Node]) -> Node:
    """The sigmoid of |pos| between dmin and dmax."""
    low, high = (_clamped(solimp[k], _LEAST, _MOST) for k in (0, 1))
    width, middle = _at_least(solimp[2], 1e-15), _clamped(solimp[3], _LEAST, _MOST)
    exponent = _at_least(solimp[4], 1.0)
    x = apply("abs", pos) / width
    rest = _ONE - x
    begin = power(x, exponent) / power(middle, exponent - 1.0)
    end = _ONE - power(rest, exponent) / power(_ONE - middle, exponent - 1.0)
    share = select(less_equal(x, middle), begin, end)
    return select(less(x, 1.0), low + share * (high - low), high)


def reference(solref: Sequence[Node], highest: Node, least_time: Node) -> tuple[Node, Node]:
    """Stiffness K and damping B of a row; least_time: what the time constant is kept above."""
    high = _clamped(highest, _LEAST, _MOST)
    time = _at_least(solref[0], least_time)
    standard = less(0.0, solref[0])
    size = high * time * solref[1]
    stiffness = select(standard, _ONE / (size * size), -solref[0] / (high * high))
    return stiffness, select(standard, 2.0 / (high * time), -solref[1] / high)


def _pulling(jar: Node, strength: Node) -> Node:
    return select(less(jar, 0.0), strength * jar, 0.0)


def _mixed(one: Sequence[Node], two: Sequence[Node], weight: Node) -> list[Node]:
    return [weight * a + (1.0 - weight) * b for a, b in zip(one, two, strict=True)]


def _contact(x: Sequence[Node], dim: int, *, elliptic: bool) -> tuple[Node, int]:
    """phi of one contact with friction (dim 3) or without (dim 1); and the first input that is soft.

    Inputs: rates along lam, v, a (dim each), distance, friction of both geoms, invweight of both bodies, | solref and
    solimp of both geoms, | weight of the first geom, margin, impratio, least time constant.
    """
    rates = [x[k * dim : (k + 1) * dim] for k in range(3)]
    at = 3 * dim
    distance, friction = x[at], _larger(x[at + 1], x[at + 2])
    weight, margin, ratio, least = x[at + 19 : at + 23]
    pos = distance - margin
    direct = select(less(0.0, x[at + 5]), select(less(0.0, x[at + 7]), 0.0, 1.0), 1.0)
    smaller = [_smaller(a, b) for a, b in zip(x[at + 5 : at + 7], x[at + 7 : at + 9], strict=True)]
    mixed = _mixed(x[at + 5 : at + 7], x[at + 7 : at + 9], weight)
    decided = select(less(weight * (1.0 - weight), 1e-30), 0.0, direct)  # one geom has priority
    solref = [select(less(0.5, decided), a, b) for a, b in zip(smaller, mixed, strict=True)]
    solimp = _mixed(x[at + 9 : at + 14], x[at + 14 : at + 19], weight)
    grip = impedance(pos, solimp)
    stiffness, damping = reference(solref, solimp[1], least)
    strength = grip / ((_ONE - grip) * (x[at + 3] + x[at + 4]))
    if dim > 1 and elliptic:
        pushing = stiffness * grip * pos
        jar = [a + damping * v + (pushing if k == 0 else 0.0) for k, (v, a) in enumerate(zip(*rates[1:], strict=True))]
        return _power(rates[0], _cone(jar, strength, friction, ratio)), at + 5
    rows = [tuple(rate[0] for rate in rates)]
    if dim > 1:
        square = friction * friction
        strength = strength * ratio / (2.0 * square * (1.0 + square))
        signed = [(k, sign * friction) for k in range(1, dim) for sign in (1.0, -1.0)]
        rows = [tuple(rate[0] + slope * rate[k] for rate in rates) for k, slope in signed]
    phi = constant(0.0)
    for by_lam, by_v, by_a in rows:
        phi = phi + by_lam * _pulling(by_a + damping * by_v + stiffness * grip * pos, strength)
    return phi, at + 5


def _power(rate: Sequence[Node], force: Sequence[Node]) -> Node:
    total = constant(0.0)
    for one, two in zip(rate, force, strict=True):
        total = total + one * two
    return total


def _cone(jar: Sequence[Node], strength: Node, friction: Node, ratio: Node) -> list[Node]:
    """s'(jar) of an elliptic cone: with N = mu jar_0, U = friction (jar_1, jar_2), T = |U|, mu = friction/sqrt(ratio),

    free where N >= mu T;  D jar where mu N + T <= 0;  between, g (mu, -mu friction U/T) with
    g = D_0/(mu^2 (1 + mu^2)) (N - mu T).
    """
    mu = friction / apply("sqrt", ratio)
    normal, slip = mu * jar[0], [friction * part for part in jar[1:]]
    size = apply("norm", slip[0] * slip[0] + slip[1] * slip[1])
    pull = strength / (mu * mu * (1.0 + mu * mu)) * (normal - mu * size)
    sticking = [strength * jar[0], *(strength * ratio * part for part in jar[1:])]
    sliding = [pull * mu, *(-(pull * mu * friction) * (part / size) for part in slip)]
    free, stuck = less_equal(mu * size, normal), less_equal(mu * normal + size, 0.0)
    return [select(free, 0.0, select(stuck, a, b)) for a, b in zip(sticking, sliding, strict=True)]


CONTACT_INPUTS = {1: 3 + 23, 3: 9 + 23}


def contact_pieces(dim: int, *, soft: bool, elliptic: bool) -> list[Piece]:
    """`row` (force, and the upper triangle of stiff by rows) and `pull` of a contact; soft: solref, solimp move too."""
    x = inputs(CONTACT_INPUTS[dim])
    phi, first = _contact(x, dim, elliptic=elliptic)
    return _row_pieces(f"contact{dim}", phi, x, dim, first + 14 if soft else first)


def limit_pieces(*, soft: bool) -> list[Piece]:
    """The same of a joint limit.

    Inputs: rates along lam, v, a of the joint, its position, bound, invweight, | solref, solimp, | side (-1: lower
    bound, 1: upper), margin, least time constant.
    """
    x = inputs(16)
    side, margin, least = x[13:16]
    pos = side * (x[4] - x[3]) - margin
    grip = impedance(pos, x[8:13])
    stiffness, damping = reference(x[6:8], x[9], least)
    strength = grip / ((_ONE - grip) * x[5])
    by_lam, by_v, by_a = (-side * rate for rate in x[:3])
    phi = by_lam * _pulling(by_a + damping * by_v + stiffness * grip * pos, strength)
    return _row_pieces("limit", phi, x, 1, 13 if soft else 6)


def friction_pieces(*, soft: bool) -> list[Piece]:
    """The same of a joint's dry friction, f = D jar within the loss: no position, no stiffness.

    Inputs: rates along lam, v, a of the degree of freedom, loss, invweight, | solref, solimp, | least time constant.
    """
    x = inputs(13)
    grip = _clamped(x[7], _LEAST, _MOST)
    damping = reference(x[5:7], x[8], x[12])[1]
    linear = grip / ((_ONE - grip) * x[4]) * (x[2] + damping * x[1])
    bounded = select(less(linear, 0.0), -x[3], x[3])
    phi = x[0] * select(less(apply("abs", linear), x[3]), linear, bounded)
    return _row_pieces("friction", phi, x, 1, 12 if soft else 5)


def _row_pieces(name: str, phi: Node, x: Sequence[Node], dim: int, moving: int) -> list[Piece]:
    force = adjoints([phi], [_ONE], x[:dim])
    pull = adjoints([phi], [_ONE], x[:moving])
    stiff = [entry for k, slope in enumerate(force) for entry in adjoints([slope], [_ONE], x[2 * dim + k : 3 * dim])]
    return [Piece(f"{name}_row", moving, tuple(force + stiff)), Piece(f"{name}_pull", moving, tuple(pull))]


def actuator_pieces() -> list[Piece]:
    """`force`, `slope` and `pull` of an actuator on a joint.

    f = -gear clamp(gain u + bias), gain and bias affine in y and y_v; slope = -df/dy_v where the clamp is open, as
    MuJoCo's implicit integrators have it; pull is that of y_lam f + weight slope.

    Inputs: y_lam, weight, y_v, y (of the joint), u, gear, gain (3), bias (3), | control range, force range.
    The clamped control is u itself where it is inside; a derivative at its end is that from inside.
    """
    x = inputs(16)
    by_lam, weight, speed, joint, control, gear = x[:6]
    length, rate = gear * joint, gear * speed
    gain = x[6] + x[7] * length + x[8] * rate
    bias = x[9] + x[10] * length + x[11] * rate
    clamped = select(less(control, x[12]), x[12], select(less(x[13], control), x[13], control))
    force = gain * clamped + bias
    bounded = select(less(force, x[14]), x[14], select(less(x[15], force), x[15], force))
    within = both(less(x[14], force), less(force, x[15]))
    slope = select(within, gear * gear * (x[8] * clamped + x[11]), 0.0)
    phi = weight * slope - by_lam * gear * bounded
    return [
        Piece("actuator_force", 12, tuple(adjoints([phi], [_ONE], x[:1]))),
        Piece("actuator_slope", 12, (slope,)),
        Piece("actuator_pull", 12, tuple(adjoints([phi], [_ONE], x[2:12]))),
    ]


def spring_pieces() -> list[Piece]:
    """`force` and `pull` of a spring of a quaternion joint, f = k rotation_vector(reference^-1 q exp(d)).

    Inputs: y_lam (3), d (3), stiffness, reference (4), | q (4). Of d only derivatives matter, exact to second order.
    """
    x = inputs(15)
    by_lam, d, stiffness, rest, base = x[:3], x[3:6], x[6], x[7:11], x[11:15]
    turn = [1.0 - (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]) * 0.125, *(part * 0.5 for part in d)]
    size = apply("sqrt", rest[0] * rest[0] + rest[1] * rest[1] + rest[2] * rest[2] + rest[3] * rest[3])
    back = [rest[0] / size, *(-part / size for part in rest[1:])]
    w, *u = _product(back, _product(base, turn))
    flip = select(less(w, 0.0), -1.0, 1.0)
    w, u = flip * w, [flip * part for part in u]
    square = u[0] * u[0] + u[1] * u[1] + u[2] * u[2]
    sine = apply("norm", square)
    safe = select(less(1e-14, square), sine, 1.0)
    # 2 atan2(s, w) / s, near s = 0 by its series in s^2 (w = sqrt(1 - s^2)): 2 + s^2 / 3
    factor = select(less(1e-14, square), 2.0 * apply("atan2", safe, w) / safe, 2.0 + square / 3.0)
    phi = constant(0.0)
    for rate, part in zip(by_lam, u, strict=True):
        phi = phi + rate * stiffness * factor * part
    return [
        Piece("spring_force", 11, tuple(adjoints([phi], [_ONE], by_lam))),
        Piece("spring_pull", 11, tuple(adjoints([phi], [_ONE], x[3:11]))),
    ]


def _product(a: Sequence[Node], b: Sequence[Node]) -> list[Node]:
    return [
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    ]
