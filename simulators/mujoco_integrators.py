"""MuJoCo's integrators around one function, the acceleration; plain torch, so exact to every order.

    Euler and its implicit variants     v' = v + h w,    q' = q (+) h v',    act' = next(act, act_dot)
    rk4 (Runge-Kutta-Munthe-Kaas)       u_i = h a_i k_{i-1},   q_i = q (+) u_i,   k_i = dexp(u_i)^-1 v_i,
                                        q' = q (+) h sum b_i k_i,   v' = v + h sum b_i w_i,   act' likewise

w is the acceleration that advances velocity: the solver's own in the explicit schemes, else the answer of
`(M - h D) w = M a`. q (+) u adds linear coordinates and turns quaternions, `normalised q * exp(u)` with u in the body's
frame; dexp(u)^-1 v = v + u x v / 2 + c(|u|) u x (u x v) is the inverse of its derivative.

A quaternion reaches the acceleration as a tangent vector at a frozen base, `d = 2 vec(base* q) / |q|`, of value 0 and
with the first and second derivatives of log(base* q).

Activation: integrator, filter, filterexact (exact over a step for a held control) and muscle.
Reference: MuJoCo documentation, Computation, Numerical integration and Actuation model; Munthe-Kaas, BIT 38(1), 1998;
Millard et al., J. Biomech. Eng. 135(2), 2013 (muscle activation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_quaternions import (
    normalized,
    quaternion_conjugate,
    quaternion_exponential,
    quaternion_product,
    rotation_vector_rate,
)

Scheme = Literal["euler", "rk4"]
Acceleration = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q `[B, nq]`, v `[B, nv]`, act `[B, na]`, ctrl `[B, nu]` -> w `[B, nv]`"""

_MINIMUM = 1e-15  # mjMINVAL: time constants below it count as it


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where linear coordinates and quaternions lie in q and v of one model."""

    linear_q: Tensor
    linear_v: Tensor
    quaternion_q: Tensor
    """`[K, 4]`"""
    quaternion_v: Tensor
    """`[K, 3]`"""
    order_q: Tensor
    """where each entry of q lies in (linear, quaternions)"""
    order_v: Tensor


@dataclass(frozen=True, eq=False)
class Activations:
    """The actuators with an activation variable: one each, in the order of `act`."""

    actuator: Tensor
    dynamics: tuple[str, ...]
    """the kinds that occur"""
    kind: Tensor
    """index of each one's kind in `dynamics`"""
    control_range: Tensor
    """`[na, 2]`, infinite where the control is not clamped"""
    range: Tensor
    """`[na, 2]`, infinite where the activation is not clamped"""
    time_step: float


def coordinates(model: Any) -> Coordinates:
    """Index tables of the joints of a compiled model."""
    linear_q: list[int] = []
    linear_v: list[int] = []
    quaternion_q, quaternion_v = [], []
    for kind, at, dof in zip(model.jnt_type, model.jnt_qposadr, model.jnt_dofadr, strict=True):
        kind, at, dof = int(kind), int(at), int(dof)
        if kind == int(mujoco.mjtJoint.mjJNT_FREE):
            linear_q += range(at, at + 3)
            linear_v += range(dof, dof + 3)
            at, dof = at + 3, dof + 3
        if kind in (int(mujoco.mjtJoint.mjJNT_FREE), int(mujoco.mjtJoint.mjJNT_BALL)):
            quaternion_q.append(list(range(at, at + 4)))
            quaternion_v.append(list(range(dof, dof + 3)))
        else:
            linear_q.append(at)
            linear_v.append(dof)
    index = lambda rows, width: torch.tensor(rows, dtype=torch.long).reshape(-1, width)
    q4, v3 = index(quaternion_q, 4), index(quaternion_v, 3)
    q1, v1 = index(linear_q, 1)[:, 0], index(linear_v, 1)[:, 0]
    order = lambda linear, turned: torch.argsort(torch.cat([linear, turned.flatten()]))
    return Coordinates(q1, v1, q4, v3, order(q1, q4), order(v1, v3))


def tangent(table: Coordinates, q: Tensor) -> tuple[Tensor, Tensor]:
    """Base (q without derivatives) and tangent vector d `[..., nv]` there: value 0, the derivatives of q."""
    base = q.detach()
    if not len(table.quaternion_q):
        return base, q - base
    linear = (q - base)[..., table.linear_q]
    turned = quaternion_product(quaternion_conjugate(base[..., table.quaternion_q]), q[..., table.quaternion_q])
    d = 2.0 * turned[..., 1:] / turned.norm(dim=-1, keepdim=True)
    return base, torch.cat([linear, d.flatten(-2)], -1)[..., table.order_v]


def add_tangent(table: Coordinates, q: Tensor, u: Tensor) -> Tensor:
    """q (+) u as `mj_integratePos` does it: `[..., nq]`."""
    if not len(table.quaternion_q):
        return q + u
    linear = q[..., table.linear_q] + u[..., table.linear_v]
    unit = normalized(q[..., table.quaternion_q])
    turned = quaternion_product(unit, quaternion_exponential(u[..., table.quaternion_v]))
    return torch.cat([linear, turned.flatten(-2)], -1)[..., table.order_q]


def tangent_rate(table: Coordinates, u: Tensor, v: Tensor) -> Tensor:
    """du/dt of q (+) u where the velocity is v: dexp(u)^-1 v on quaternions, v elsewhere."""
    if not len(table.quaternion_q):
        return v
    rate = rotation_vector_rate(u[..., table.quaternion_v], v[..., table.quaternion_v])
    return torch.cat([v[..., table.linear_v], rate.flatten(-2)], -1)[..., table.order_v]


def activations(model: Any) -> Activations:
    """Table of the activation variables of a model that `mujoco_structure.structure` takes."""
    names = {int(getattr(mujoco.mjtDyn, f"mjDYN_{name.upper()}")): name for name in _RATES}
    kinds = {i: int(kind) for i, kind in enumerate(model.actuator_dyntype) if int(kind)}
    by_address = sorted(kinds, key=lambda i: int(model.actuator_actadr[i]))
    clamped = not model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_CLAMPCTRL)
    used = tuple(sorted({names[kind] for kind in kinds.values()}))
    return Activations(
        actuator=torch.tensor(by_address, dtype=torch.long),
        dynamics=used,
        kind=torch.tensor([used.index(names[kinds[i]]) for i in by_address], dtype=torch.long),
        control_range=_limits(by_address, model.actuator_ctrllimited * clamped, model.actuator_ctrlrange),
        range=_limits(by_address, model.actuator_actlimited, model.actuator_actrange),
        time_step=float(model.opt.timestep),
    )


def _limits(rows: list[int], limited: Any, ranges: Any) -> Tensor:
    free = (-float("inf"), float("inf"))
    found = [tuple(float(x) for x in ranges[i]) if limited[i] else free for i in rows]
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)


def activation_rate(table: Activations, act: Tensor, ctrl: Tensor, dynprm: Tensor) -> Tensor:
    """act_dot `[B, na]` of act `[B, na]` and ctrl `[B, nu]`; dynprm `[1 or B, nu, 10]`."""
    if not table.dynamics:
        return torch.zeros_like(act)
    low, high = table.control_range.to(ctrl).unbind(-1)
    control = ctrl[..., table.actuator].clamp(low, high)
    parameters = dynprm[..., table.actuator, :]
    rates = [_RATES[name](act, control, parameters) for name in table.dynamics]
    rate = rates[0]
    for k in range(1, len(rates)):
        rate = torch.where(table.kind.to(act.device) == k, rates[k], rate)
    return rate


def next_activation(table: Activations, act: Tensor, rate: Tensor, dynprm: Tensor) -> Tensor:
    """Activation one engine step later `[B, na]`."""
    if not table.dynamics:
        return act
    following = act + table.time_step * rate
    if "filterexact" in table.dynamics:
        tau = dynprm[..., table.actuator, 0].clamp(min=_MINIMUM)
        exact = act + rate * tau * -torch.expm1(-table.time_step / tau)
        following = torch.where(table.kind.to(act.device) == table.dynamics.index("filterexact"), exact, following)
    low, high = table.range.to(act).unbind(-1)
    return following.clamp(low, high)


def _filter_rate(act: Tensor, control: Tensor, parameters: Tensor) -> Tensor:
    return (control - act) / parameters[..., 0].clamp(min=_MINIMUM)


def _muscle_rate(act: Tensor, control: Tensor, parameters: Tensor) -> Tensor:
    speed = 0.5 + 1.5 * act.clamp(0.0, 1.0)
    rising, falling, width = parameters[..., 0] * speed, parameters[..., 1] / speed, parameters[..., 2]
    excess = control.clamp(0.0, 1.0) - act
    x = (excess / width.clamp(min=_MINIMUM) + 0.5).clamp(0.0, 1.0)
    smooth = x**3 * (x * (6.0 * x - 15.0) + 10.0)
    mix = torch.where(width < _MINIMUM, (excess > 0.0).to(excess), smooth)
    return excess / (falling + (rising - falling) * mix).clamp(min=_MINIMUM)


_RATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "integrator": lambda act, control, parameters: control,
    "filter": _filter_rate,
    "filterexact": _filter_rate,
    "muscle": _muscle_rate,
}


def engine_step(
    table: Coordinates,
    muscles: Activations,
    acceleration: Acceleration,
    state: tuple[Tensor, Tensor, Tensor],
    ctrl: Tensor,
    dynprm: Tensor,
    *,
    scheme: Scheme,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, v, act) one engine step later, as `mj_step` does it."""
    q, v, act = state
    h = muscles.time_step
    if scheme == "euler":
        following = torch.add(v, acceleration(q, v, act, ctrl), alpha=h)
        rate = activation_rate(muscles, act, ctrl, dynprm)
        return add_tangent(table, q, h * following), following, next_activation(muscles, act, rate, dynprm)
    return _munthe_kaas(table, muscles, acceleration, state, ctrl, dynprm)


def _munthe_kaas(
    table: Coordinates,
    muscles: Activations,
    acceleration: Acceleration,
    state: tuple[Tensor, Tensor, Tensor],
    ctrl: Tensor,
    dynprm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, v, act = state
    h = muscles.time_step
    position, u, v_stage, act_stage = q, torch.zeros_like(v), v, act
    turn, gain, rate_mean = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(act)
    for following, weight in ((0.5, 1 / 6), (0.5, 1 / 3), (1.0, 1 / 3), (0.0, 1 / 6)):
        w = acceleration(position, v_stage, act_stage, ctrl)
        k = tangent_rate(table, u, v_stage)
        rate = activation_rate(muscles, act_stage, ctrl, dynprm)
        turn, gain, rate_mean = turn + weight * k, gain + weight * w, rate_mean + weight * rate
        if following:
            u, v_stage, act_stage = following * h * k, v + following * h * w, act + following * h * rate
            position = add_tangent(table, q, u)
    act_next = next_activation(muscles, act, rate_mean, dynprm)
    return add_tangent(table, q, h * turn), v + h * gain, act_next
