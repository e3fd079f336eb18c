"""Physical properties of the elements of a MuJoCo model: which numbers they are, in which unit, between which bounds.

A property is named `ELEMENT.PROPERTY` or `ELEMENT.PROPERTY.COMPONENT`, as in `torso.mass`, `floor.friction.slide`,
`thigh_joint.damping`; `KIND:` in front tells elements of one name apart (`geom:torso.friction`), `KIND@3` is the
fourth of its kind where it has no name. `gravity` (with .x, .y, .z) belongs to no element.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OBJECTS: dict[str, mujoco.mjtObj] = {
    "body": mujoco.mjtObj.mjOBJ_BODY,
    "joint": mujoco.mjtObj.mjOBJ_JOINT,
    "geom": mujoco.mjtObj.mjOBJ_GEOM,
    "actuator": mujoco.mjtObj.mjOBJ_ACTUATOR,
    "tendon": mujoco.mjtObj.mjOBJ_TENDON,
    "equality": mujoco.mjtObj.mjOBJ_EQUALITY,
    "pair": mujoco.mjtObj.mjOBJ_PAIR,
}
_XYZ = {"x": 0, "y": 1, "z": 2}
_GRIP = {"slide": 0, "spin": 1, "roll": 2}
_PAIR_GRIP = {"slide1": 0, "slide2": 1, "spin": 2, "roll1": 3, "roll2": 4}
_RANGE = {"low": 0, "high": 1}
_SOFT = {"time_constant": 0, "damping_ratio": 1}
_IMPEDANCE = {"dmin": 0, "dmax": 1, "width": 2, "midpoint": 3, "power": 4}
_TENSOR = {"xx": 0, "yy": 1, "zz": 2, "xy": 3, "xz": 4, "yz": 5}


class ParameterNameError(ValueError):
    """A name in theta that the model has not, that means several things, or that does not apply to its element."""


@dataclass(frozen=True)
class Property:
    """One property: numbers of a field, `width` per element (0: one), at positions that `place` gives."""

    kind: str
    name: str
    field: str
    width: int
    components: dict[str, int]
    unit: Callable[[mujoco.MjModel, int], str]
    low: float
    """physical lower bound; nan: nominal value less its range"""
    reach: float
    """high = 10 times the nominal value, or this where that is 0; without a physical bound: nominal +- this"""
    hint: str
    """why it may have no effect"""


@dataclass(frozen=True)
class Place:
    """One number of a field: its position in the flattened field of one environment takes factor * component."""

    field: str
    position: int
    component: int
    factor: float = 1.0


def element_name(model: mujoco.MjModel, kind: str, index: int) -> str:
    """The name of an element, or `kind@index` where it has none."""
    return mujoco.mj_id2name(model, _OBJECTS[kind], index) or f"{kind}@{index}"


def element_names(model: mujoco.MjModel, kind: str) -> list[str]:
    """All elements of a kind, in the order of the model."""
    counts = {"joint": "njnt", "actuator": "nu", "equality": "neq", "pair": "npair", "tendon": "ntendon"}
    return [element_name(model, kind, k) for k in range(int(getattr(model, counts.get(kind, f"n{kind}"))))]


def _always(unit: str) -> Callable[[mujoco.MjModel, int], str]:
    return lambda model, index: unit


def _joint_unit(turning: str, sliding: str) -> Callable[[mujoco.MjModel, int], str]:
    slide = int(mujoco.mjtJoint.mjJNT_SLIDE)
    return lambda model, index: sliding if int(model.jnt_type[index]) == slide else turning


def _servo_unit(turning: str, sliding: str) -> Callable[[mujoco.MjModel, int], str]:
    """Of a servo on a joint; of one on a tendon, which is a length, as of a slide."""
    by_joint, kinds = _joint_unit(turning, sliding), mujoco.mjtTrn
    of_joint = (int(kinds.mjTRN_JOINT), int(kinds.mjTRN_JOINTINPARENT))

    def unit(model: mujoco.MjModel, index: int) -> str:
        on_joint = int(model.actuator_trntype[index]) in of_joint
        return by_joint(model, int(model.actuator_trnid[index, 0])) if on_joint else sliding

    return unit


def _table() -> tuple[Property, ...]:
    nan = float("nan")
    body = "no joint moves the body, or its motion in this rollout does not feel it"
    still = "the joint stands still in this rollout"
    limit = "the limit is not reached in this rollout"
    touch = "no contact of the geom carries force here, or the other geom's value counts (friction: the larger one)"
    idle = "the actuator's command is zero in this rollout"
    slack = "the tendon stands still or is slack in this rollout"
    held = "the servo is at its target"
    rows = [
        ("body", "mass", "body_mass", 0, {}, _always("kg"), 1e-6, 1.0, body),
        ("body", "com", "body_ipos", 3, _XYZ, _always("m"), nan, 0.2, body),
        ("body", "inertia", "body_inertia", 6, _TENSOR, _always("kg m^2"), nan, 0.1, body),
        ("joint", "damping", "dof_damping", 0, {}, _joint_unit("N m s/rad", "N s/m"), 0.0, 10.0, still),
        ("joint", "armature", "dof_armature", 0, {}, _joint_unit("kg m^2", "kg"), 0.0, 1.0, still),
        ("joint", "frictionloss", "dof_frictionloss", 0, {}, _joint_unit("N m", "N"), 0.0, 10.0, still),
        ("joint", "stiffness", "jnt_stiffness", 0, {}, _joint_unit("N m/rad", "N/m"), 0.0, 100.0, "at rest"),
        ("joint", "spring_reference", "qpos_spring", 0, {}, _joint_unit("rad", "m"), nan, 1.0, "stiffness is zero"),
        ("joint", "range", "jnt_range", 2, _RANGE, _joint_unit("rad", "m"), nan, 1.0, limit),
        ("joint", "limit_solref", "jnt_solref", 2, _SOFT, _always("s, 1"), nan, 1.0, limit),
        ("joint", "limit_solimp", "jnt_solimp", 5, _IMPEDANCE, _always("1"), nan, 0.5, limit),
        ("joint", "friction_solref", "dof_solref", 2, _SOFT, _always("s, 1"), nan, 1.0, "frictionloss is zero"),
        ("joint", "friction_solimp", "dof_solimp", 5, _IMPEDANCE, _always("1"), nan, 0.5, "frictionloss is zero"),
        ("geom", "friction", "geom_friction", 3, _GRIP, _always("1, m, m"), 0.0, 1.0, touch),
        ("geom", "solref", "geom_solref", 2, _SOFT, _always("s, 1"), nan, 1.0, touch),
        ("geom", "solimp", "geom_solimp", 5, _IMPEDANCE, _always("1"), nan, 0.5, touch),
        ("pair", "friction", "pair_friction", 5, _PAIR_GRIP, _always("1, 1, m, m, m"), 0.0, 1.0, touch),
        ("pair", "solref", "pair_solref", 2, _SOFT, _always("s, 1"), nan, 1.0, touch),
        ("pair", "solimp", "pair_solimp", 5, _IMPEDANCE, _always("1"), nan, 0.5, touch),
        ("actuator", "gear", "actuator_gear", 0, {}, _always("1"), nan, 10.0, idle),
        ("actuator", "gears", "actuator_gear", 6, {}, _always("1"), nan, 10.0, idle),
        ("actuator", "gain", "actuator_gainprm", 3, {}, _always("1"), nan, 10.0, idle),
        ("actuator", "bias", "actuator_biasprm", 3, {}, _always("1"), nan, 10.0, idle),
        ("actuator", "kp", "actuator_gainprm", 0, {}, _servo_unit("N m/rad", "N/m"), 0.0, 100.0, held),
        ("actuator", "kv", "actuator_gainprm", 0, {}, _servo_unit("N m s/rad", "N s/m"), 0.0, 10.0, held),
        ("actuator", "time_constant", "actuator_dynprm", 0, {}, _always("s"), 1e-4, 1.0, "the command is constant"),
        ("tendon", "stiffness", "tendon_stiffness", 0, {}, _always("N/m"), 0.0, 100.0, slack),
        ("tendon", "damping", "tendon_damping", 0, {}, _always("N s/m"), 0.0, 10.0, slack),
        ("tendon", "armature", "tendon_armature", 0, {}, _always("kg"), 0.0, 1.0, slack),
        ("tendon", "frictionloss", "tendon_frictionloss", 0, {}, _always("N"), 0.0, 10.0, slack),
        ("tendon", "range", "tendon_range", 2, _RANGE, _always("m"), nan, 1.0, limit),
        ("tendon", "limit_solref", "tendon_solref_lim", 2, _SOFT, _always("s, 1"), nan, 1.0, limit),
        ("tendon", "limit_solimp", "tendon_solimp_lim", 5, _IMPEDANCE, _always("1"), nan, 0.5, limit),
        ("equality", "solref", "eq_solref", 2, _SOFT, _always("s, 1"), nan, 1.0, "the constraint is not violated"),
        ("equality", "solimp", "eq_solimp", 5, _IMPEDANCE, _always("1"), nan, 0.5, "the constraint is not violated"),
    ]  # fmt: skip
    return tuple(Property(*row) for row in rows)


PROPERTIES = _table()
GRAVITY = Property("", "gravity", "gravity", 3, _XYZ, _always("m/s^2"), float("nan"), 10.0, "no joint feels gravity")
PSEUDO_INERTIA = Property(
    "body", "pseudo_inertia", "body_mass", 10, {}, _always("log-Cholesky"), float("nan"), 2.0, "no joint moves the body"
)


def find_property(model: mujoco.MjModel, name: str) -> tuple[Property, int, int | None]:
    """(property, index of the element, component or None) that a name means.

    Raises `ParameterNameError` with the nearest names, or with the kinds among which to choose.
    """
    if name.partition(".")[0] == "gravity":
        return GRAVITY, 0, _component(GRAVITY, name, name.partition(".")[2])
    wanted, _, rest = name.partition(":")
    kind, bare = (wanted, rest) if rest and wanted in _OBJECTS else ("", name)
    found = []
    for row in (*PROPERTIES, PSEUDO_INERTIA):
        element, component = _split(bare, row.name)
        if element is None or kind not in ("", row.kind):
            continue
        names = element_names(model, row.kind)
        if element in names:
            found.append((row, names.index(element), component))
    if len(found) > 1:
        kinds = " or ".join(f"{row.kind}:{bare}" for row, _, _ in found)
        raise ParameterNameError(f"'{name}' means several things; write {kinds}")
    if not found:
        raise ParameterNameError(_unknown(model, name, bare))
    row, index, component = found[0]
    return row, index, _component(row, name, component)


def places(model: mujoco.MjModel, row: Property, index: int, name: str) -> tuple[Place, ...]:
    """The numbers that the property of one element is. Raises `ParameterNameError` where it does not apply."""
    if row.kind == "actuator" and row.name in ("kp", "kv"):
        return _servo(model, row.name, index, name)
    if row.name == "time_constant" and int(model.actuator_dyntype[index]) not in (
        int(mujoco.mjtDyn.mjDYN_FILTER),
        int(mujoco.mjtDyn.mjDYN_FILTEREXACT),
    ):
        raise ParameterNameError(f"'{name}': the actuator has no filter; its activation dynamics have no time constant")
    if row.field.startswith("dof_"):
        first, width = int(model.jnt_dofadr[index]), max(row.width, 1)
        dofs = range(first, first + (6, 3, 1, 1)[int(model.jnt_type[index])])
        return tuple(Place(row.field, dof * width + k, k) for dof in dofs for k in range(width))
    if row.name == "spring_reference":
        if int(model.jnt_type[index]) < int(mujoco.mjtJoint.mjJNT_SLIDE):
            raise ParameterNameError(f"'{name}': only hinge and slide joints have a scalar spring reference")
        return (Place(row.field, int(model.jnt_qposadr[index]), 0),)
    strides = {"gear": 6, "gears": 6, "gain": 10, "bias": 10, "time_constant": 10, "gravity": 0}
    stride = strides.get(row.name, max(row.width, 1))
    return tuple(Place(row.field, index * stride + k, k) for k in range(max(row.width, 1)))


def shown_bounds(row: Property, nominal: Array) -> tuple[float, float]:
    """Default bounds around the model's own value."""
    most = float(np.abs(nominal).max())
    if row.name.endswith("solref") and nominal.min() > 0:
        return 0.1 * float(nominal.min()), 10.0 * most
    if row.name.endswith("solimp"):
        return 1e-4, max(1.0, 2.0 * most)
    if np.isnan(row.low):
        around = max(row.reach, 2.0 * most)
        return float(nominal.min()) - around, float(nominal.max()) + around
    low = 0.01 * float(nominal.min()) if row.name == "mass" and nominal.min() > 0 else row.low
    return low, 10.0 * most if most > 0 else row.reach


def shown_unit(row: Property, model: mujoco.MjModel, index: int, component: int | None) -> str:
    """The unit of one element's property, or of one component where these differ (friction: 1, m, m)."""
    units = row.unit(model, index).split(", ")
    return ", ".join(units) if component is None else units[min(component, len(units) - 1)]


def nearest_names(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for the closest known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(item) for item in close)}?" if close else ""


def all_names(model: mujoco.MjModel) -> list[str]:
    """Every name without a component that theta may hold for this model, where it is unambiguous."""
    names = [f"{e}.{row.name}" for row in (*PROPERTIES, PSEUDO_INERTIA) for e in element_names(model, row.kind)]
    return ["gravity", *names]


def _split(bare: str, prop: str) -> tuple[str | None, str]:
    """Element and component of `ELEMENT.prop[.component]`; element names may hold dots."""
    if bare.endswith(f".{prop}"):
        return bare.removesuffix(f".{prop}"), ""
    head, mark, component = bare.rpartition(".")
    return (head.removesuffix(f".{prop}"), component) if mark and head.endswith(f".{prop}") else (None, "")


def _component(row: Property, name: str, component: str) -> int | None:
    if not component:
        return None
    if component in row.components:
        return row.components[component]
    if component.isdecimal() and int(component) < row.width:
        return int(component)
    known = list(row.components) or [str(k) for k in range(row.width)]
    raise ParameterNameError(f"'{name}': '{row.name}' has {f'the components {known}' if known else 'no components'}")


def _unknown(model: mujoco.MjModel, name: str, bare: str) -> str:
    element = bare.partition(".")[0]
    for kind in _OBJECTS:
        names = [n for n in element_names(model, kind) if bare.startswith(f"{n}.")]
        if names:
            known = [row.name for row in (*PROPERTIES, PSEUDO_INERTIA) if row.kind == kind]
            prop = bare.removeprefix(f"{max(names, key=len)}.")
            return f"'{name}': a {kind} has no '{prop}'{nearest_names(prop, known)}; it has {', '.join(known)}"
    everything = [n for kind in _OBJECTS for n in element_names(model, kind)]
    close = nearest_names(bare, all_names(model)) or nearest_names(element, everything)
    return f"'{name}': the model has no such element{close}; write ELEMENT.PROPERTY, such as torso.mass"


def _servo(model: mujoco.MjModel, prop: str, index: int, name: str) -> tuple[Place, ...]:
    """kp and kv: force = kp (u - y) - kv y' (position), kv (u - y') (velocity)."""
    gain, bias = model.actuator_gainprm[index], model.actuator_biasprm[index]
    affine = int(model.actuator_biastype[index]) == int(mujoco.mjtBias.mjBIAS_AFFINE)
    position = affine and gain[0] != 0 and bias[1] == -gain[0]
    velocity = affine and gain[0] != 0 and bias[1] == 0 and bias[2] == -gain[0]
    at = 10 * index
    if prop == "kp" and position:
        return Place("actuator_gainprm", at, 0), Place("actuator_biasprm", at + 1, 0, -1.0)
    if prop == "kv" and position:
        return (Place("actuator_biasprm", at + 2, 0, -1.0),)
    if prop == "kv" and velocity:
        return Place("actuator_gainprm", at, 0), Place("actuator_biasprm", at + 2, 0, -1.0)
    kinds = "position or velocity" if prop == "kv" else "position"
    raise ParameterNameError(f"'{name}': the actuator is no {kinds} servo; use gain and bias")
