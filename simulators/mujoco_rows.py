"""Constraint rows of MuJoCo's convex cost: coordinates, reference accelerations and slopes, flat over environments.

The cost of constraints is s(jar), jar = J a - aref, aref = -B J v - K imp (pos - margin). Its slope, minus the force:

    equality     D jar
    friction     D jar, clipped at the friction loss
    limit        D min(jar, 0)                 (limits, frictionless contacts, edges n +- mu_k t_k of a pyramid)
    elliptic     three zones of N = mu jar_0, T = |mu_k jar_k|: N >= mu T free; mu N + T <= 0: D jar; between, with
                 Dm = D_0/(mu^2 (1 + mu^2)) and g = Dm (N - mu T):  g mu  and  -g mu u_k mu_k,  u = (mu_k jar_k)/T

imp(pos) is the solimp sigmoid of |pos - margin|; D = imp/((1 - imp) diag); K = 1/(dmax tc dr)^2, B = 2/(dmax tc) from
solref = (tc, dr), or -r0/dmax^2, -r1/dmax from a negative one. Connect and weld rows carry J' v as well.
Reference: Todorov, Convex and analytically-invertible dynamics with contacts and constraints, ICRA 2014; MuJoCo
documentation, Computation; mujoco_recipe 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forces import disabled
from sim2real.simulators.mujoco_kinematics import Poses, State
from sim2real.simulators.mujoco_structure import Structure

_TINY = 1e-15
_EDGE = 1e-4  # MuJoCo keeps impedances within [1e-4, 1 - 1e-4]
Law = Literal["equality", "friction", "limit", "elliptic"]


@dataclass(frozen=True, eq=False)
class Motion:
    """One batch of states and K generalised velocities, of which the first is v and the second a."""

    state: State
    along: Tensor
    """[B, K, nv]"""
    poses: Poses
    twists: Tensor
    """[B, K, nbody, 6]"""
    bias: Tensor
    """[B, nbody, 6] spatial acceleration at a = 0"""


@dataclass(frozen=True, eq=False)
class Rows:
    """N groups of m rows under one law."""

    law: Law
    env: Tensor
    """[N] their environment"""
    rate: Tensor
    """[N, K, m] J u along the K generalised velocities u"""
    jar: Tensor
    """[N, m] J a - aref"""
    weight: Tensor
    """[N, m] D"""
    bound: Tensor | None = None
    """friction: [N, 1] the loss; elliptic: [N, m] (mu, mu_1, ...)"""


def impedance(position: Tensor, solimp: Tensor) -> Tensor:
    """d in (0, 1) at the violation `position` [N], from solimp [N, 5] = (dmin, dmax, width, midpoint, power)."""
    low, high = solimp[..., 0].clamp(_EDGE, 1 - _EDGE), solimp[..., 1].clamp(_EDGE, 1 - _EDGE)
    width, middle = solimp[..., 2].clamp(min=_TINY), solimp[..., 3].clamp(_EDGE, 1 - _EDGE)
    power = solimp[..., 4].clamp(min=1)
    x = position.abs() / width
    inside = (x > 0) & (x < 1)
    x = torch.where(inside, x, 0.5 + 0 * x)
    rising = x**power / middle ** (power - 1)
    settling = 1 - (1 - x) ** power / (1 - middle) ** (power - 1)
    y = torch.where(x <= middle, rising, settling)
    beyond = (position.abs() >= width).to(y.dtype)
    return low + torch.where(inside, y, beyond) * (high - low)


def reference_gains(structure: Structure, solref: Tensor, solimp: Tensor) -> tuple[Tensor, Tensor]:
    """K and B [N] of the reference acceleration, from solref [N, 2] and solimp [N, 5]."""
    high = solimp[..., 1].clamp(_EDGE, 1 - _EDGE)
    standard = solref[..., 0] > 0
    time, ratio = (torch.where(standard, solref[..., k], 1 + 0 * solref[..., k]) for k in (0, 1))
    if not disabled(structure, mujoco.mjtDisableBit.mjDSBL_REFSAFE):
        time = time.clamp(min=2 * structure.model.opt.timestep)
    stiffness = torch.where(standard, 1 / (high * time * ratio).square().clamp(min=_TINY), -solref[..., 0] / high**2)
    damping = torch.where(standard, 2 / (high * time).clamp(min=_TINY), -solref[..., 1] / high)
    return stiffness, damping


def spring_rows(
    structure: Structure,
    law: Law,
    env: Tensor,
    rate: Tensor,
    position: Tensor,
    violation: Tensor,
    solver: tuple[Tensor, Tensor, Tensor],
    *,
    drift: Tensor | float = 0.0,
) -> Rows:
    """One group: position [N, m] less margin, violation [N] of the impedance, (solref, solimp, diag [N, m])."""
    solref, solimp, diagonal = solver
    d = impedance(violation, solimp)[:, None]
    stiffness, damping = (gain[:, None] for gain in reference_gains(structure, solref, solimp))
    aref = -damping * rate[:, 0] - stiffness * d * position
    weight = 1 / ((1 - d) / d * diagonal).clamp(min=_TINY)
    return Rows(law, env, rate, rate[:, 1] + drift - aref, weight)


def friction_rows(
    structure: Structure, env: Tensor, rate: Tensor, loss: Tensor, solver: tuple[Tensor, Tensor, Tensor]
) -> Rows:
    """Rows of dry friction: no position, no stiffness."""
    solref, solimp, diagonal = solver
    d = impedance(torch.zeros_like(loss), solimp)[:, None]
    damping = reference_gains(structure, solref, solimp)[1][:, None]
    weight = 1 / ((1 - d) / d * diagonal).clamp(min=_TINY)
    return Rows("friction", env, rate, rate[:, 1] + damping * rate[:, 0], weight, loss[:, None])


def slope(rows: Rows) -> Tensor:
    """ds/djar [N, m], minus the constraint force."""
    linear = rows.weight * rows.jar
    if rows.law == "equality":
        return linear
    if rows.law == "limit":
        return torch.where(rows.jar < 0, linear, 0 * linear)
    bound = _bound(rows)
    if rows.law == "friction":
        return torch.where(linear.abs() < bound, linear, bound * torch.sign(rows.jar.detach()))
    scaled, free, sticking, size, normal = _cone(rows)
    mu = bound[:, :1]
    pull = rows.weight[:, :1] / (mu**2 * (1 + mu**2)) * (normal - mu * size)
    sliding = torch.cat([pull * mu, -pull * mu * scaled[:, 1:] / size * bound[:, 1:]], 1)
    return torch.where(free, 0 * linear, torch.where(sticking, linear, sliding))


def curvature(rows: Rows) -> Tensor:
    """d2s/djar2 [N, m, m]."""
    weight = rows.weight
    if rows.law == "limit":
        weight = weight * (rows.jar < 0)
    if rows.law == "friction":
        weight = weight * ((weight * rows.jar).abs() < _bound(rows))
    if rows.law != "elliptic":
        return torch.diag_embed(weight)
    bound = _bound(rows)
    scaled, free, sticking, size, normal = _cone(rows)
    mu = bound[:, :1]
    along = scaled[:, 1:] / size
    edge = torch.cat([torch.ones_like(mu), -mu * along], 1)
    eye = torch.eye(along.shape[1], dtype=along.dtype, device=along.device)
    around = (-mu * (normal - mu * size) / size)[..., None] * (eye - along[:, :, None] * along[:, None])
    block = edge[:, :, None] * edge[:, None] + torch.nn.functional.pad(around, (1, 0, 1, 0))
    middle = (rows.weight[:, :1] / (mu**2 * (1 + mu**2)))[..., None] * bound[:, :, None] * block * bound[:, None]
    return torch.where(free[..., None], 0 * middle, torch.where(sticking[..., None], torch.diag_embed(weight), middle))


def power(rows: Rows, size: int, column: int = 2) -> Tensor:
    """<lam, J' s'> [size] of every environment; lam is generalised velocity number `column` of the motion."""
    value = (slope(rows) * rows.rate[:, column]).sum(-1)
    return torch.zeros(size, dtype=value.dtype, device=value.device).index_add(0, rows.env, value)


def normal_matrix(rows: Rows, size: int) -> Tensor:
    """J' s'' J [size, K - 2, K - 2] over the generalised velocities after the first two."""
    jacobian = rows.rate[:, 2:]
    value = jacobian @ curvature(rows) @ jacobian.transpose(1, 2)
    shape = (size, *value.shape[1:])
    return torch.zeros(shape, dtype=value.dtype, device=value.device).index_add(0, rows.env, value)


def _bound(rows: Rows) -> Tensor:
    if rows.bound is None:
        raise ValueError(f"rows of law '{rows.law}' need a bound: the friction loss, or the friction coefficients")
    return rows.bound


def _cone(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scaled residuals, the two masks of the outer zones, T (1 outside the middle zone) and N, each [N, 1 or m]."""
    bound = _bound(rows)
    scaled, mu = bound * rows.jar, bound[:, :1]
    normal, square = scaled[:, :1], scaled[:, 1:].square().sum(1, keepdim=True)
    length = square.detach().sqrt()
    free = normal >= mu * length
    sticking = ~free & (mu * normal + length <= 0)
    size = torch.where(free | sticking, 1 + 0 * square, square).sqrt()
    return scaled, free, sticking, size, normal
