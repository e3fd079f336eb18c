"""Which parts of a MuJoCo model the derivative program covers, leaves to differences, or refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mujoco

_TRN, _GAIN, _BIAS, _DYN, _EQ = (
    mujoco.mjtTrn,
    mujoco.mjtGain,
    mujoco.mjtBias,
    mujoco.mjtDyn,
    mujoco.mjtEq,
)
_ENABLE = mujoco.mjtEnableBit


class MujocoUnsupportedError(ValueError):
    """The model has an element whose derivative cannot be given; the message names it and says what to do."""


@dataclass(frozen=True)
class Uncovered:
    """A force outside the program, differenced alone along the multiplier."""

    kind: Literal["fluid", "tendon", "actuator"]
    index: int
    """of the tendon or actuator; -1 for the fluid"""
    name: str
    reason: str


def check_covered(model: mujoco.MjModel) -> None:
    """Raise `MujocoUnsupportedError` with every element of the model that cannot be differentiated."""
    found = [*_options(model), *_elements(model), *_actuators(model), *_tendons(model), *_equalities(model)]
    if found:
        listed = "\n  ".join(found)
        raise MujocoUnsupportedError(f"the model cannot be differentiated because of\n  {listed}")


def uncovered_forces(model: mujoco.MjModel) -> tuple[Uncovered, ...]:
    """Forces that the program leaves out: fluid drag, spatial tendons, muscles, site and body transmissions."""
    found: list[Uncovered] = []
    if model.opt.density > 0 or model.opt.viscosity > 0:
        found.append(Uncovered("fluid", -1, "option", "forces of the medium (density, viscosity)"))
    for t in range(model.ntendon):
        if _spatial(model, t) and (model.tendon_stiffness[t] or model.tendon_damping[t]):
            found.append(Uncovered("tendon", t, model.tendon(t).name or f"tendon {t}", "spatial tendon"))
    for i in range(model.nu):
        reason = _uncovered_actuator(model, i)
        if reason:
            found.append(Uncovered("actuator", i, model.actuator(i).name or f"actuator {i}", reason))
    return tuple(found)


def _uncovered_actuator(model: mujoco.MjModel, i: int) -> str:
    kind = _TRN(int(model.actuator_trntype[i]))
    if kind in (_TRN.mjTRN_SITE, _TRN.mjTRN_BODY, _TRN.mjTRN_SLIDERCRANK):
        return f"transmission {kind.name[6:].lower()}"
    if kind == _TRN.mjTRN_TENDON and _spatial(model, int(model.actuator_trnid[i, 0])):
        return "transmission by a spatial tendon"
    gain, bias = _GAIN(int(model.actuator_gaintype[i])), _BIAS(int(model.actuator_biastype[i]))
    return "muscle" if _GAIN.mjGAIN_MUSCLE == gain or _BIAS.mjBIAS_MUSCLE == bias else ""


def _spatial(model: mujoco.MjModel, tendon: int) -> bool:
    return bool(model.wrap_type[model.tendon_adr[tendon]] != int(mujoco.mjtWrap.mjWRAP_JOINT))


def _options(model: mujoco.MjModel) -> Iterator[str]:
    for bit, what in (
        (_ENABLE.mjENBL_OVERRIDE, "the contact override"),
        (_ENABLE.mjENBL_SLEEP, "sleeping trees"),
        (_ENABLE.mjENBL_DIAGEXACT, "the exact diagonal"),
        (_ENABLE.mjENBL_IPC, "the barrier contact model"),
        (_ENABLE.mjENBL_SPECULATIVE, "speculative contacts"),
    ):
        if model.opt.enableflags & int(bit):
            yield f"option: {what} is enabled; disable the flag"
    if model.opt.integrator == int(mujoco.mjtIntegrator.mjINT_DISCRETE):
        yield "option: integrator discrete; use Euler, implicitfast, implicit or RK4"
    implicit = (int(mujoco.mjtIntegrator.mjINT_IMPLICIT), int(mujoco.mjtIntegrator.mjINT_IMPLICITFAST))
    uncovered = uncovered_forces(model)
    if model.opt.integrator in implicit and uncovered:
        named = ", ".join(f"{force.name} ({force.reason})" for force in uncovered)
        yield f"option: the implicit integrators need d(force)/dv of {named}; use Euler or RK4"
    if model.opt.disableactuator:
        yield "option: actuatorgroupdisable is not covered; delete the actuators or set their gear to 0"
    if model.opt.noslip_iterations > 0:
        yield "option: noslip_iterations > 0 has no optimality condition; set it to 0 and raise impratio instead"


def _elements(model: mujoco.MjModel) -> Iterator[str]:
    if model.nflex:
        name = mujoco.mj_id2name(model, int(mujoco.mjtObj.mjOBJ_FLEX), 0)
        yield f"flex '{name}': deformable bodies are not covered"
    if model.nplugin:
        yield "plugins: their forces are unknown; remove them"
    if model.flg_surfacevel:
        yield "geom: surfacevel (moving surfaces) is not covered; set it to 0"
    if model.flg_adhesion:
        yield "geom: adhesion is not covered; set it to 0"
    for j in range(model.njnt):
        name = f"joint '{model.joint(j).name or j}'"
        if model.jnt_actfrclimited[j] and any(_uncovered_actuator(model, i) for i in range(model.nu)):
            yield f"{name}: actuatorfrcrange beside muscles or site, body and spatial-tendon actuators; drop it"
        if model.jnt_stiffnesspoly[j].any() or model.jnt_springyield[j] or model.jnt_plasticadr[j] >= 0:
            yield f"{name}: polynomial or plastic springs are not covered; use a linear stiffness"
        if model.jnt_actuatorid[j] >= 0:
            yield f"{name}: damping or armature of an actuator; move it to the joint"
        idle = not model.nu or model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        if model.jnt_actgravcomp[j] and (model.jnt_actfrclimited[j] or idle):
            yield f"{name}: actuatorgravcomp with actuatorfrcrange, or without working actuators; drop one of the two"
    for i in range(model.nv):
        if model.dof_dampingpoly[i].any():
            j = int(model.dof_jntid[i])
            yield f"joint '{model.joint(j).name or j}': polynomial damping is not covered; use a linear one"


def _actuators(model: mujoco.MjModel) -> Iterator[str]:
    if model.nu != model.nactuator or model.nout != model.nactuator:
        yield "actuators: one with several controls or several forces is not covered; split it"
        return
    gains = (_GAIN.mjGAIN_FIXED, _GAIN.mjGAIN_AFFINE, _GAIN.mjGAIN_MUSCLE)
    biases = (_BIAS.mjBIAS_NONE, _BIAS.mjBIAS_AFFINE, _BIAS.mjBIAS_MUSCLE)
    dynamics = (_DYN.mjDYN_NONE, _DYN.mjDYN_INTEGRATOR, _DYN.mjDYN_FILTER, _DYN.mjDYN_FILTEREXACT, _DYN.mjDYN_MUSCLE)
    for i in range(model.nu):
        name = f"actuator '{model.actuator(i).name or i}'"
        gain, bias = _GAIN(int(model.actuator_gaintype[i])), _BIAS(int(model.actuator_biastype[i]))
        dyn, kind = _DYN(int(model.actuator_dyntype[i])), _TRN(int(model.actuator_trntype[i]))
        if gain not in gains or bias not in biases or dyn not in dynamics:
            yield f"{name}: {gain.name[2:]}, {bias.name[2:]}, {dyn.name[2:]} not all covered; use affine laws"
        if kind == _TRN.mjTRN_SO3 or (dyn != _DYN.mjDYN_NONE and model.actuator_actnum[i] != 1):
            yield f"{name}: {kind.name[2:]} with {model.actuator_actnum[i]} activations is not covered"
        if model.actuator_delay[i] or model.actuator_history[i].any():
            yield f"{name}: a delay inside the engine is not covered; give the delay to the model instead"


def _tendons(model: mujoco.MjModel) -> Iterator[str]:
    for t in range(model.ntendon):
        name = f"tendon '{model.tendon(t).name or t}'"
        if model.tendon_stiffnesspoly[t].any() or model.tendon_dampingpoly[t].any() or model.tendon_springyield[t]:
            yield f"{name}: polynomial or plastic laws are not covered; use linear ones"
        if model.tendon_actfrclimited[t] or model.tendon_actuatorid[t] >= 0:
            yield f"{name}: actuatorfrcrange, or damping and armature of an actuator, are not covered"
        if _spatial(model, t) and (model.tendon_limited[t] or model.tendon_frictionloss[t] or model.tendon_armature[t]):
            yield f"{name}: limits, frictionloss or armature of a spatial tendon are not covered; use a fixed tendon"


def _equalities(model: mujoco.MjModel) -> Iterator[str]:
    for i in range(model.neq):
        name, kind = f"equality '{model.equality(i).name or i}'", _EQ(int(model.eq_type[i]))
        if kind not in (_EQ.mjEQ_CONNECT, _EQ.mjEQ_WELD, _EQ.mjEQ_JOINT, _EQ.mjEQ_TENDON):
            yield f"{name}: {kind.name[5:].lower()} is not covered; use connect, weld, joint or tendon"
        elif kind == _EQ.mjEQ_WELD and model.eq_objtype[i] != int(mujoco.mjtObj.mjOBJ_BODY):
            yield f"{name}: a weld of sites is not covered; weld the bodies"
        elif kind == _EQ.mjEQ_TENDON:
            for t in (int(model.eq_obj1id[i]), int(model.eq_obj2id[i])):
                if t >= 0 and _spatial(model, t):
                    yield f"{name}: ties the spatial tendon '{model.tendon(t).name or t}'; use a fixed one"
