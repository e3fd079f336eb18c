"""Products of MuJoCo's acceleration by the implicit function theorem: J dx, J' g and second order, in torch.

At the converged acceleration a and the acceleration w that advances velocity,

    r(x, a) = 0,     G(x) w = M(x) a,     G = M - h D,                D = d(forces)/dv as the integrator takes it

with x = (d, v, act, ctrl, force, fields). Both are the gradient, by multipliers z = (lam, mu), of one scalar

    Phi(x, y, z) = <lam, r(x, a)> + mu' M(x) (a - w) + h mu' D(x) w,                y = (a, w),

which is all that is programmed (`mujoco_program`). With H = dr/da, A z = (H lam + M mu, -G' mu):

    push     dy:  A' dy = -d_x [dPhi/dz] dx
    pull     z :  A z = -(0, g),       J' g = dPhi/dx
    second   of <g, y> + <h, J dx>:    by dx  dPhi/dx at z(h);
             by x  the derivative of dPhi/dx along (dx, dy, dz) plus dPhi/dx at z(g),  A dz = -(derivative of dPhi/dy)

The explicit schemes have w = a and no mu. Contacts and constraint zones are frozen at the state; H is factored once.
Only reverse mode is used inside (forward mode does not nest there). Outputs are (w, a): cotangents of a are ignored and
its tangent is zero, since nothing may depend on it.
Reference: Griewank and Walther, Evaluating Derivatives, 2008, 15.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.outside_program import DerivativeOrderError, Tensors, Wanted
from sim2real.simulators.mujoco_forward import Kind
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_program import (
    Active,
    damping_power,
    freeze,
    hessian,
    mass_power,
    residual_power,
)
from sim2real.simulators.mujoco_structure import Structure, nominal_fields

STATE = ("base", "d", "v", "act", "ctrl", "force")
"""the inputs of the program before its fields"""


@dataclass(frozen=True, eq=False)
class Products:
    """The members of `outside_program.Program` apart from its value, for x = (*STATE, *fields) and y = (w, a)."""

    push: Callable[[Tensors, Tensors, Tensors], Tensors]
    pull: Callable[[Tensors, Tensors, Tensors, Wanted], Tensors]
    second: Callable[[tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], Wanted], Tensors]


@dataclass(frozen=True, eq=False)
class KernelProducts:
    """The same, each with a mask `[C]`: the environments whose rows are right; the others' rows hold anything."""

    push: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensor]]
    pull: Callable[[Tensors, Tensors, Tensors, Wanted], tuple[Tensors, Tensor]]
    second: Callable[[tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], Wanted], tuple[Tensors, Tensor]]


Cotangents = Callable[[Tensors, Tensors, Tensor, Wanted], tuple[Tensors, Tensor]]
"""x, y, g `[C, K, nv]` of w, wanted -> J' g of the wanted inputs `[C, K, length]`, and the mask of `KernelProducts`;
y may be (w,) alone"""


@dataclass(frozen=True, eq=False)
class _Point:
    """One batch of converged states with the factors of A."""

    x: Tensors
    """leading length C each"""
    y: Tensors
    """(a,) or (a, w) `[C, nv]`"""
    active: Active
    factor: Tensor
    """Cholesky factor of H"""
    mass: Tensor
    operator: Tensor | None
    """G; None: explicit"""


@dataclass(frozen=True, eq=False)
class _Condition:
    """Phi of a model over the fields `names`."""

    structure: Structure
    names: tuple[str, ...]
    kind: Kind
    nominal: Mapping[str, Tensor]


def torch_products(structure: Structure, names: tuple[str, ...], kind: Kind) -> Products:
    """The products of a model's acceleration with respect to state, control, force and the fields `names`."""
    condition = _Condition(structure, names, kind, nominal_fields(structure))

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        point = _linearise(condition, x, y, dx)
        with torch.enable_grad():
            z = tuple(torch.zeros_like(part).requires_grad_() for part in point.y)
            leaves = _leaves(point.x)
            slope = _gradient(_power(condition, point, leaves, point.y, z), leaves, create_graph=True)
            rows = _gradient(_along(slope, dx), z)
        return _tangents(point, rows)[-1], torch.zeros_like(point.y[0])

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        point = _linearise(condition, x, y, g)
        return _chosen(_by_inputs(condition, point, _adjoint(point, (g[0],)), wanted), wanted)

    def second(arguments: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], wanted: Wanted) -> Tensors:
        x, dx, y, _, g, h = arguments
        point = _linearise(condition, x, y, (*dx, *g, *h))
        _check_second_order(condition, point)
        by_x, by_dx = _second(condition, point, dx, g[0], h[0])
        return _chosen((*by_x, *by_dx), wanted)

    return Products(push, pull, second)


def _linearise(condition: _Condition, x: Tensors, y: Tensors, directions: Tensors) -> _Point:
    """Expand to the copies of all arguments, freeze contacts and zones at the states, factor H."""
    copies = max(len(t) for t in (*x, *y, *directions))
    x = tuple(t.expand(copies, *t.shape[1:]) for t in x)
    w, a = (t.expand(copies, *t.shape[1:]) for t in y)
    state, fields = State(*x[: len(STATE)]), _fields(condition, x)
    active = freeze(condition.structure, state, fields, differentiated=condition.names)
    damped = None if condition.kind == "explicit" else condition.kind
    mass, curvature, damping = hessian(condition.structure, state, a, fields, active, damped)
    factor = torch.linalg.cholesky(curvature)
    if damping is None:
        return _Point(x, (a,), active, factor, mass, None)
    operator = mass - condition.structure.model.opt.timestep * damping
    return _Point(x, (a, w), active, factor, mass, operator)


def _fields(condition: _Condition, x: Tensors) -> dict[str, Tensor]:
    return {**condition.nominal, **dict(zip(condition.names, x[len(STATE) :], strict=True))}


def _power(condition: _Condition, point: _Point, x: Tensors, y: Tensors, z: Tensors) -> Tensor:
    """Phi summed over the environments."""
    structure, state = condition.structure, State(*x[: len(STATE)])
    fields, a, lam = _fields(condition, x), y[0], z[0]
    total = residual_power(structure, state, a, lam, fields, point.active)
    if point.operator is not None:
        w, mu = y[1], z[1]
        step = structure.model.opt.timestep
        total = total + mass_power(structure, state, mu, a - w, fields)
        if condition.kind != "explicit":
            total = total + step * damping_power(structure, state, mu, w, fields, condition.kind)
    return total.sum()


def _tangents(point: _Point, rows: Tensors) -> Tensors:
    """dy of `rows` = d_x (conditions) dx:  H da = -rows_1,  G dw = M da + rows_2."""
    da = -_solve(point, rows[0])
    if point.operator is None:
        return (da,)
    right = _times(point.mass, da) + rows[1]
    return da, torch.linalg.solve(point.operator, right[..., None])[..., 0]


def _adjoint(point: _Point, g: Tensors) -> Tensors:
    """z with A z = -g of (a, w); a single g is that of w:  mu = G^-T g_w,  lam = -H^-1 (M mu + g_a)."""
    if point.operator is None:
        return (-_solve(point, g[0]),)
    mu = torch.linalg.solve(point.operator.mT, g[-1].expand_as(point.y[0])[..., None])[..., 0]
    right = _times(point.mass, mu)
    return -_solve(point, right + g[0] if len(g) == 2 else right), mu


def _by_inputs(condition: _Condition, point: _Point, z: Tensors, wanted: Wanted) -> Tensors:
    """dPhi/dx of the wanted inputs, zeros for the others."""
    with torch.enable_grad():
        leaves = _leaves(point.x, wanted)
        return _gradient(_power(condition, point, leaves, point.y, z), leaves)


def _second(condition: _Condition, point: _Point, dx: Tensors, g: Tensor, h: Tensor) -> tuple[Tensors, Tensors]:
    """Gradients by x and by dx of <g, w> + <h, dw>."""
    n = len(point.x)
    with torch.enable_grad():
        x, y = _leaves(point.x), tuple(t.detach().requires_grad_() for t in point.y)
        z = tuple(t.requires_grad_() for t in _adjoint(point, (h,)))
        slope = _gradient(_power(condition, point, x, y, z), (*x, *y), create_graph=True)
        along_x = _along(slope[:n], dx)
        dy = _tangents(point, _gradient(along_x, z, retain_graph=True))
        turned = _gradient(along_x + _along(slope[n:], dy), (*x, *y))
    dz = _adjoint(point, turned[n:])
    sources = tuple(p + q for p, q in zip(dz, _adjoint(point, (g,)), strict=True))
    rest = _by_inputs(condition, point, sources, (True,) * n)
    by_x = tuple(p + q for p, q in zip(turned[:n], rest, strict=True))
    return by_x, tuple(t.detach() for t in slope[:n])


def _check_second_order(condition: _Condition, point: _Point) -> None:
    if condition.structure.uncovered:
        names = [force.name for force in condition.structure.uncovered]
        raise DerivativeOrderError(f"second derivatives are not available through the differenced forces {names}")
    contacts = point.active.contacts
    if contacts is not None and contacts.order < 2:
        raise DerivativeOrderError(
            "second derivatives are not available through contacts known to first order only: "
            f"{', '.join(contacts.first_order)}; use spheres, capsules, boxes or meshes off their edges"
        )


def _leaves(x: Tensors, wanted: Sequence[bool] | None = None) -> Tensors:
    """The inputs as leaves, all but the base; without those that are not wanted."""
    needed = [i > 0 and (wanted is None or wanted[i]) for i in range(len(x))]
    return tuple(t.detach().requires_grad_(need) for t, need in zip(x, needed, strict=True))


def _gradient(value: Tensor, leaves: Tensors, *, create_graph: bool = False, retain_graph: bool = False) -> Tensors:
    """Gradients of a scalar, zeros where it does not depend on a leaf."""
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not asked or not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    grads = iter(
        torch.autograd.grad(
            value, asked, create_graph=create_graph, retain_graph=create_graph or retain_graph, allow_unused=True
        )
    )
    found = (next(grads) if leaf.requires_grad else None for leaf in leaves)
    return tuple(torch.zeros_like(leaf) if t is None else t for t, leaf in zip(found, leaves, strict=True))


def _along(slope: Tensors, direction: Tensors) -> Tensor:
    total = slope[0].new_zeros(())
    for s, t in zip(slope, direction, strict=True):
        total = total + (s * t).sum()
    return total


def _chosen(tensors: Tensors, wanted: Wanted) -> Tensors:
    return tuple(t for t, want in zip(tensors, wanted, strict=True) if want)


def _solve(point: _Point, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right.expand_as(point.y[0])[..., None], point.factor)[..., 0]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
