"""Rows of contacts: mixing of the two geoms' parameters, pyramids, elliptic cones, frictionless contacts.

Friction is the larger of the two geoms' (each entry), solref and solimp are averaged by solmix (the smaller of each
entry if one solref is in direct format), a higher priority overrides; explicit pairs carry their own. Mixing here gives
the fields their derivatives; where two frictions are equal, each gets half.

    pyramid    edges n +- mu_k t_k, every one with D = imp/(2 mu^2/impratio (1 - imp) diag (1 + mu^2)), mu = mu_1
    elliptic   R_0 = (1 - imp)/imp diag, R_k = R_0/impratio (mu_1/mu_k)^2, D = 1/R; the cone has mu_1/sqrt(impratio)
    normal     D = imp/((1 - imp) diag)                                            diag: sum of the inverse weights
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_contacts import Contacts, contact_frames
from sim2real.simulators.mujoco_forces import Fields
from sim2real.simulators.mujoco_kinematics import point_velocity
from sim2real.simulators.mujoco_limits import pick
from sim2real.simulators.mujoco_rows import Motion, Rows, impedance, reference_gains
from sim2real.simulators.mujoco_structure import Structure

_TINY = 1e-15
_LEAST_FRICTION = 1e-5  # MuJoCo raises smaller coefficients to this


@dataclass(frozen=True, eq=False)
class _Law:
    """Parameters of N contacts."""

    friction: Tensor
    """[N, 5] slide, slide, spin, roll, roll; zero past the dimension of the contact"""
    solref: Tensor
    solref_friction: Tensor
    solimp: Tensor
    diagonal: Tensor
    """[N]"""


def contact_rows(structure: Structure, motion: Motion, contacts: Contacts, fields: Fields) -> list[Rows]:
    """Every row of the contacts."""
    distance, point, frame = contact_frames(structure, contacts, motion.poses)
    rate = _rates(motion, contacts, point, frame)
    law = _laws(structure, contacts, fields)
    gap = distance - contacts.margin
    plain = contacts.dim == 1
    pyramids = structure.model.opt.cone == int(mujoco.mjtCone.mjCONE_PYRAMIDAL)
    groups = ((plain, _normal), (~plain, _pyramid if pyramids else _elliptic))
    out = []
    for mask, rows in groups:
        chosen = mask.nonzero()[:, 0]
        if len(chosen):
            width = int(contacts.dim[chosen].max())
            env, moving = contacts.env[chosen], rate[chosen][..., :width]
            out.append(rows(structure, env, moving, gap[chosen], _chosen(law, chosen)))
    return out


def _rates(motion: Motion, contacts: Contacts, point: Tensor, frame: Tensor) -> Tensor:
    """Rates [N, K, 6] of the second body against the first at the point, linear then angular, in the contact frame."""
    first, second = (motion.twists[contacts.env, :, contacts.body[:, k]] for k in (0, 1))
    relative = second - first
    linear = point_velocity(relative, point[:, None])
    axes = frame.transpose(1, 2)
    return torch.cat([linear @ axes, relative[..., :3] @ axes], -1)


def _normal(structure: Structure, env: Tensor, rate: Tensor, gap: Tensor, law: _Law) -> Rows:
    d = impedance(gap, law.solimp)
    jar = rate[:, 1] - _reference(structure, rate[:, 0], gap[:, None], d[:, None], law)
    weight = 1 / ((1 - d) / d * law.diagonal).clamp(min=_TINY)
    return Rows("limit", env, rate[..., :1], jar[:, :1], weight[:, None])


def _pyramid(structure: Structure, env: Tensor, rate: Tensor, gap: Tensor, law: _Law) -> Rows:
    friction = law.friction[:, : rate.shape[-1] - 1]
    side = rate[..., 1:] * friction[:, None]
    edges = torch.cat([rate[..., :1] + side, rate[..., :1] - side], -1)
    d = impedance(gap, law.solimp)
    jar = edges[:, 1] - _reference(structure, edges[:, 0], gap[:, None], d[:, None], law)
    mu = friction[:, 0]
    normal = ((1 - d) / d * law.diagonal * (1 + mu**2)).clamp(min=_TINY)
    weight = 1 / (2 * mu**2 / structure.model.opt.impratio * normal)
    real = (friction > 0).to(weight.dtype).repeat(1, 2)
    return Rows("limit", env, edges, jar, weight[:, None] * real)


def _elliptic(structure: Structure, env: Tensor, rate: Tensor, gap: Tensor, law: _Law) -> Rows:
    ratio = float(structure.model.opt.impratio)
    friction = law.friction[:, : rate.shape[-1] - 1]
    d = impedance(gap, law.solimp)
    resistance = ((1 - d) / d * law.diagonal).clamp(min=_TINY)[:, None]
    weight = torch.cat([1 / resistance, ratio / resistance * (friction / friction[:, :1]) ** 2], 1)
    normal = _reference(structure, rate[:, 0, :1], gap[:, None], d[:, None], law)
    damping = reference_gains(structure, law.solref_friction, law.solimp)[1][:, None]
    jar = rate[:, 1] - torch.cat([normal, -damping * rate[:, 0, 1:]], 1)
    bound = torch.cat([friction[:, :1] / ratio**0.5, friction], 1)
    return Rows("elliptic", env, rate, jar, weight, bound)


def _reference(structure: Structure, rate: Tensor, gap: Tensor, d: Tensor, law: _Law) -> Tensor:
    stiffness, damping = (gain[:, None] for gain in reference_gains(structure, law.solref, law.solimp))
    return -damping * rate - stiffness * d * gap


def _laws(structure: Structure, contacts: Contacts, fields: Fields) -> _Law:
    """Mixed parameters, with the fields' derivatives."""
    friction, solref, solimp = _mixed(structure, contacts, fields)
    solref_friction = solref
    explicit = contacts.pair >= 0
    if explicit.any():
        number = contacts.pair.clamp(min=0)
        own = {
            name: pick(fields[f"pair_{name}"], contacts.env, number)
            for name in ("friction", "solref", "solreffriction", "solimp")
        }
        choose = lambda mine, other: torch.where(explicit[:, None], mine, other)
        friction = choose(own["friction"].clamp(min=_LEAST_FRICTION), friction)
        solref, solimp = choose(own["solref"], solref), choose(own["solimp"], solimp)
        given = (own["solreffriction"] != 0).any(-1) & explicit
        solref_friction = torch.where(given[:, None], own["solreffriction"], solref)
    real = torch.arange(1, 6) < contacts.dim[:, None]
    one, two = (pick(fields["body_invweight0"], contacts.env, contacts.body[:, k])[:, 0] for k in (0, 1))
    return _Law(friction * real, solref, solref_friction, solimp, one + two)


def _mixed(structure: Structure, contacts: Contacts, fields: Fields) -> tuple[Tensor, Tensor, Tensor]:
    model = structure.model
    geoms = contacts.geom
    ranked = torch.as_tensor(model.geom_priority)[geoms]
    above, below = (ranked[:, 0] > ranked[:, 1])[:, None], (ranked[:, 0] < ranked[:, 1])[:, None]
    override = lambda one, two, mixed: torch.where(above, one, torch.where(below, two, mixed))
    both = lambda name: tuple(pick(fields[name], contacts.env, geoms[:, k]) for k in (0, 1))
    share = _share(torch.as_tensor(model.geom_solmix)[geoms])[:, None]
    friction = tuple(f.clamp(min=_LEAST_FRICTION)[:, [0, 0, 1, 2, 2]] for f in both("geom_friction"))
    one, two = both("geom_solref")
    standard = ((one[:, 0] > 0) & (two[:, 0] > 0))[:, None]
    solref = torch.where(standard, share * one + (1 - share) * two, torch.minimum(one, two))
    first, second = both("geom_solimp")
    return (
        override(friction[0], friction[1], torch.maximum(friction[0], friction[1])),
        override(one, two, solref),
        override(first, second, share * first + (1 - share) * second),
    )


def _share(mix: Tensor) -> Tensor:
    """Weight [N] of the first geom, from the two solmix [N, 2]."""
    one, two = mix.unbind(-1)
    weighs = mix >= _TINY
    mixed = torch.where(weighs.all(-1), one / (one + two).clamp(min=_TINY), 0.5)
    return torch.where(weighs[:, 0] == weighs[:, 1], mixed, weighs[:, 0].to(mix.dtype))


def _chosen(law: _Law, rows: Tensor) -> _Law:
    values: dict[str, Any] = {name: value[rows] for name, value in vars(law).items()}
    return _Law(**values)
