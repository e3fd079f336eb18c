"""Small MuJoCo scenes, one per feature, and converged states in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_program import Active, freeze
from sim2real.simulators.mujoco_structure import Structure, nominal_fields, structure

Array = NDArray[np.float64]

SOFT = 'solimp=".8 .95 .02 .5 2" solref=".01 .9"'  # states inside the ramp of the impedance
_LOW = 0.12  # m: low enough to touch the floor within the first moments
SHAPES = {
    "sphere": 'type="sphere" size=".1"',
    "capsule": 'type="capsule" size=".06 .1"',
    "box": 'type="box" size=".1 .08 .06"',
}
TENDON = (
    '<tendon><fixed name="t" stiffness="4" damping=".3" springlength=".1" range="-.1 .05" limited="true" armature=".02"'
    ' frictionloss=".2"><joint joint="h1" coef=".7"/><joint joint="h2" coef="-.4"/><joint joint="s1" coef="2"/>'
    "</fixed></tendon>"
)
ACTUATORS = (
    '<actuator><position joint="h1" kp="20" kv="1.5"/><velocity joint="h2" kv=".7" ctrlrange="-.3 .3"/>'
    '<general joint="s1" gaintype="affine" gainprm="3 1 .2" biastype="affine" biasprm=".1 -2 -.3" dyntype="filter" '
    'dynprm=".05"/><motor joint="b1" gear="1 .3 -.5"/><motor jointinparent="b1" gear=".5 .3 -.5"/>'
    '<position tendon="t" kp="5" kv=".2"/><general joint="h1" dyntype="filterexact" dynprm=".03" gainprm="2" '
    'biastype="affine" biasprm="0 -2 0" actearly="true" forcerange="-.4 .4"/></actuator>'
)
EQUALITIES = (
    '<equality><connect body1="l3" body2="x" anchor=".1 0 0" solref=".02 1"/><weld body1="y" body2="l2" '
    'torquescale=".7" solref=".03 1.2"/><joint joint1="h1" joint2="h2" polycoef="0.1 .5 .3 .2 .1"/></equality>'
)


def scene(bodies: str, *, option: str = "", floor: str = 'friction=".1 .001 .001"', extra: str = "") -> str:
    return (
        f'<mujoco><compiler autolimits="true"/><option timestep=".002" {option}/><worldbody><geom name="floor" '
        f'type="plane" size="5 5 .1" {floor}/>{bodies}</worldbody>{extra}</mujoco>'
    )


def free(shape: str, *, z: float = _LOW, extra: str = SOFT, joint: str = "<freejoint/>") -> str:
    return (
        f'<body name="{shape}" pos="0 0 {z}" simple="false">{joint}<geom name="g{shape}" pos=".01 .02 .015" '
        f'{SHAPES[shape]} friction=".7 .02 .01" {extra}/></body>'
    )


def arm(*, ball: str = "", hinge: str = "", body: str = "", tip: str = "") -> str:
    link = '<geom type="capsule" fromto="0 0 0 .3 0 0" size=".03"/>'
    hinge = f'axis="0 1 0" damping=".05" armature=".01" {hinge}'
    return (
        f'<body name="l1" pos="0 0 .6"><joint name="b1" type="ball" damping=".1" {ball}/>{link}'
        f'<body name="l2" pos=".3 0 0" {body}><joint name="h1" {hinge}/>{link}'
        '<body name="l3" pos=".3 0 0"><joint name="h2" axis="0 0 1" damping=".05" pos=".02 0 0"/><joint name="s1" '
        'type="slide" axis="1 0 .3" stiffness="30" damping=".3" range="-.03 .03"/><geom name="tip" type="capsule" '
        f'fromto="0 0 0 .2 .1 0" size=".03" friction=".8 .01 .01"/>{tip}</body></body></body>'
    )


_LOOSE = "".join(
    f'<body name="{n}" pos="{p}" simple="false"><freejoint/><geom type="box" size=".03 .04 .05" friction="{f}"/></body>'
    for n, p, f in (("x", ".9 .1 .6", 0.9), ("y", ".5 .2 .6", 0.85))  # no two alike: at a tie max has no derivative
)
_PAIR = (
    '<contact><pair geom1="floor" geom2="gcapsule" friction=".4 .6 .01 .002 .001" solref=".03 .9" '
    f'solreffriction=".05 1.1" condim="6" margin=".01" gap=".003" {SOFT.split(" solref")[0]}/></contact>'
)
_DIRECT = 'solimp=".8 .95 .02 .5 3" solref="-800 -30" solmix="3"'
_STATIC = (
    '<body pos=".1 .2 .3" quat="1 .2 .3 .1"><geom size=".05" pos="1 0 0"/><body pos=".1 .1 .4" euler="10 20 30">'
    '<joint axis="1 1 0" pos=".1 .2 .3" armature=".1" ref=".3" springref="-.2" stiffness="2"/><joint type="slide" '
    'axis="0 1 1"/><geom size=".05 .1" type="capsule" pos=".1 .2 .3"/><body pos=".2 0 0"><joint type="ball" '
    'pos=".1 0 0" armature=".01"/><geom size=".05 .06 .07" type="box"/></body></body></body>'
)
_SPATIAL = (
    '<tendon><spatial name="sp" stiffness="20" damping="1" springlength=".2"><site site="a"/><site site="b"/></spatial>'
    '</tendon><actuator><motor tendon="sp" gear="3"/><general site="b" gear="1 2 0 0 0 .3" gainprm="2"/><muscle '
    'joint="h1" lengthrange="-1 1" timeconst=".01 .04"/></actuator>'
)
_FREE_JOINT = '<joint name="f" type="free" armature=".1" damping=".2" stiffness="3" frictionloss=".3"/>'
_FREE_DRIVEN = (
    '<actuator><general joint="f" gear="1 2 3 4 5 6"/><general jointinparent="f" gear="0 2 3 4 5 6"/>'
    '<position joint="f" kp="3" kv="1" gear="0 0 1 0 0 1"/></actuator>'
)
_TIES = (
    '<tendon><fixed name="t1"><joint joint="h1" coef=".7"/></fixed>'
    '<fixed name="t2"><joint joint="h2" coef="1"/></fixed></tendon>'
    '<equality><connect site1="b" site2="c"/><tendon tendon1="t1" tendon2="t2" polycoef=".1 .5 .1 0 0"/>'
    '<joint joint1="s1" polycoef=".01 0 0 0 0"/><weld body1="y" solref=".05 1"/></equality>'
)
_BRANCHES = (
    '<body pos="0 0 1"><joint name="r" axis="0 1 0"/><geom size=".05"/>'
    '<body pos=".1 0 0"><joint name="p" axis="0 1 0"/><joint name="s" type="slide"/>'
    '<geom size=".05" pos=".1 0 0"/></body>'
    '<body pos="-.1 0 0"><joint name="q" axis="0 1 0"/><geom size=".05" pos="-.1 0 0"/></body></body>'
)
_ACROSS = (
    '<tendon><fixed armature=".002"><joint joint="p" coef="1"/><joint joint="s" coef="-1"/><joint joint="q" coef="2"/>'
    '<joint joint="r" coef=".5"/></fixed></tendon>'
)
_ADHESION = '<actuator><adhesion body="box" gain="3" ctrlrange="0 1"/></actuator>'

SCENES: dict[str, str] = {
    "pyramid box": scene(free("box")),
    "pyramid box condim 6": scene(free("box", extra=SOFT + ' condim="6"')),
    "frictionless capsule": scene(free("capsule", extra=SOFT + ' condim="1"'), floor='condim="1"'),
    "elliptic capsule condim 6": scene(
        free("capsule", extra=SOFT + ' condim="6"'), option='cone="elliptic" impratio="3"'
    ),
    "elliptic sphere condim 4": scene(free("sphere", extra=SOFT + ' condim="4"'), option='cone="elliptic"'),
    "elliptic box condim 3": scene(free("box"), option='cone="elliptic" impratio="3"'),
    "direct solref, solmix": scene(free("box", extra=_DIRECT), floor='friction=".1 .001 .001" solref="-500 -10"'),
    "priority": scene(free("capsule", extra=SOFT + ' priority="1"'), floor='friction="1 .001 .001"'),
    "explicit pair": scene(free("capsule"), option='cone="elliptic"', extra=_PAIR),
    "ball arm": scene(arm(ball='stiffness="2"')),
    "limits": scene(arm(ball='range="0 .4"', hinge='range="-.2 .2" margin=".05"')),
    "dry friction": scene(arm(ball='frictionloss=".1"', hinge='frictionloss=".6"')),
    "actuators, tendon": scene(arm(), extra=TENDON + ACTUATORS),
    "free joint, driven": scene(free("box", z=0.8, joint=_FREE_JOINT), extra=_FREE_DRIVEN),
    "connect, weld, joint": scene(arm() + _LOOSE, extra=EQUALITIES),
    "sites, tendons, world tied": scene(
        arm(tip='<site name="b" pos=".1 0 .02"/>')
        + _LOOSE.replace("<geom", '<site name="c" pos=".01 .02 .03"/><geom', 1),
        extra=_TIES,
    ),
    "static bodies": scene(_STATIC),
    "gravity compensation": scene(
        arm(hinge='actuatorgravcomp="true"', body='gravcomp=".7"'), extra='<actuator><motor joint="h2"/></actuator>'
    ),
    "joint force range": scene(
        arm(hinge='actuatorfrcrange="-.3 .3"'), extra='<actuator><position joint="h1" kp="20" kv="1"/></actuator>'
    ),
    "tendon armature across branches": scene(_BRANCHES, extra=_ACROSS),
    "adhesion": scene(free("box"), extra=_ADHESION),
    "fluid": scene(arm(), option='density="1000" viscosity=".1"'),
    "spatial tendon, site, muscle": scene(
        '<site name="a" pos="0 .1 1"/>' + arm(tip='<site name="b" pos=".1 0 .02"/>'), extra=_SPATIAL
    ),
}


@dataclass(frozen=True, eq=False)
class States:
    """n states of one scene with MuJoCo's converged acceleration and what it says of the constraints."""

    structure: Structure
    fields: dict[str, Tensor]
    state: State
    a: Tensor
    mass: Tensor
    hessian: Tensor
    active: Active


@lru_cache(maxsize=64)
def states(xml: str, count: int, *, integrator: int = 0, disable: int = 0, seed: int = 0) -> States:
    """States some way into a random motion; from the second on with a contact where a free body can fall."""
    model = mujoco.MjModel.from_xml_string(xml)
    model.opt.integrator = integrator
    model.opt.disableflags |= disable
    tables = structure(model)
    model, data, rng = tables.model, mujoco.MjData(tables.model), np.random.default_rng(seed)
    rows: list[tuple[Array, ...]] = []
    falls = f'pos="0 0 {_LOW}" simple="false"' in xml and not disable
    while len(rows) < count:
        mujoco.mj_resetData(model, data)
        data.qvel[:] = rng.normal(0, 1, model.nv)
        mujoco.mj_integratePos(model, data.qpos, rng.normal(0, 0.15, model.nv), 1.0)
        for t in range(int(rng.integers(30, 120))):
            if t % 10 == 0:
                data.ctrl[:] = rng.normal(0, 0.5, model.nu)
            mujoco.mj_step(model, data)
        data.qvel[:] += rng.normal(0, 0.5, model.nv)
        data.qfrc_applied[:] = rng.normal(0, 0.1, model.nv)
        mujoco.mj_forward(model, data)
        if data.ncon or not rows or not falls:
            mass = np.zeros((model.nv, model.nv))
            mujoco.mj_fullM(model, data, mass)
            found = (data.qpos, data.qvel, data.qacc, data.act, data.ctrl, data.qfrc_applied)
            rows.append((*(x.copy() for x in found), mass, mass + constraint_hessian(model, data)))
    base, v, a, act, ctrl, force, mass, hessian = (torch.tensor(np.stack(column)) for column in zip(*rows, strict=True))
    fields = nominal_fields(tables)
    state = State(base, torch.zeros_like(v), v, act, ctrl, force)
    return States(tables, fields, state, a, mass, hessian, freeze(tables, state, fields))


def zones(model: mujoco.MjModel, data: mujoco.MjData) -> list[tuple[int, int, int]]:
    """(type, element, zone) of every constraint row group at data.qacc: 0 free, 1 linear, 2 sliding, 3 bounded."""
    jar = data.efc_J.reshape(data.nefc, model.nv) @ data.qacc - data.efc_aref
    out, i = [], 0
    while i < data.nefc:
        kind, element, size = int(data.efc_type[i]), int(data.efc_id[i]), 1
        linear = jar[i] * data.efc_D[i]
        if kind == int(mujoco.mjtConstraint.mjCNSTR_CONTACT_ELLIPTIC):
            contact = data.contact[element]
            size = contact.dim
            normal = contact.mu * jar[i]
            tangent = np.linalg.norm(contact.friction[: size - 1] * jar[i + 1 : i + size])
            zone = 0 if normal >= contact.mu * tangent else 1 if contact.mu * normal + tangent <= 0 else 2
        elif kind in (1, 2):
            zone = 1 if abs(linear) < data.efc_frictionloss[i] else 3 + (linear > 0)
        else:
            zone = int(kind == 0 or jar[i] < 0)
        out.append((kind, element, zone))
        i += size
    return out


def constraint_hessian(model: mujoco.MjModel, data: mujoco.MjData) -> Array:
    """J' s'' J from MuJoCo's own rows: s'' by differences of s' in the sliding zone, D or 0 elsewhere."""
    jacobian = data.efc_J.reshape(data.nefc, model.nv)
    total, i = np.zeros((model.nv, model.nv)), 0
    for kind, element, zone in zones(model, data):
        size = data.contact[element].dim if kind == int(mujoco.mjtConstraint.mjCNSTR_CONTACT_ELLIPTIC) else 1
        rows, weight = jacobian[i : i + size], data.efc_D[i : i + size]
        if zone == 1:
            total += rows.T @ np.diag(weight) @ rows
        elif zone == 2:
            jar = rows @ data.qacc - data.efc_aref[i : i + size]
            contact = data.contact[element]
            scale = np.r_[contact.mu, contact.friction[: size - 1]]
            total += rows.T @ _cone_hessian(jar, scale, weight[0]) @ rows
        i += size
    return total


def _cone_hessian(jar: Array, scale: Array, weight: float) -> Array:
    """Second derivative of s = Dm/2 (N - mu T)^2 by central differences of its gradient."""
    mu = scale[0]

    def gradient(x: Array) -> Array:
        u = scale * x
        length = np.linalg.norm(u[1:])
        pull = weight / (mu**2 * (1 + mu**2)) * (u[0] - mu * length)
        return scale * pull * np.r_[1.0, -mu * u[1:] / length]

    step = 1e-6 * np.linalg.norm(jar)
    columns = [(gradient(jar + step * e) - gradient(jar - step * e)) / (2 * step) for e in np.eye(len(jar))]
    return np.stack(columns, 1)
