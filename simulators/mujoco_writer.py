"""A MuJoCo model with identified numbers written back as XML that every MuJoCo program reads.

Numbers are written with 17 digits and the file is compiled again before it replaces anything: what comes back equals
what was identified to 1e-12. Where constraint weights were frozen (see `mujoco_parameters`), compiling would compute
them anew from the new masses, so the frozen ones, and the delay, are kept as custom numerics "sim2real_..." which
`parameter_model` puts back; other programs ignore them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.checkpoint import write_atomic
from sim2real.params import Params
from sim2real.simulators.mujoco_inertia import STORED, WEIGHTS, inertia_matrix, restore_weights
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_parameters import DELAY, ThetaSpec, Weights, field_map, parameter_model
from sim2real.simulators.mujoco_structure import nominal_fields, structure
from sim2real.simulators.mujoco_xml import STANDARD, XmlLimits, load_spec

Array = NDArray[np.float64]

_JOINT = {"range": "jnt_range", "solref_limit": "jnt_solref", "solimp_limit": "jnt_solimp"}
_DOF = {
    "armature": "dof_armature",
    "frictionloss": "dof_frictionloss",
    "solref_friction": "dof_solref",
    "solimp_friction": "dof_solimp",
}
_TENDON = {
    "armature": "tendon_armature",
    "frictionloss": "tendon_frictionloss",
    "range": "tendon_range",
    "solref_limit": "tendon_solref_lim",
    "solimp_limit": "tendon_solimp_lim",
    "solref_friction": "tendon_solref_fri",
    "solimp_friction": "tendon_solimp_fri",
}
_SAME: dict[str, tuple[str, ...]] = {
    "geom": ("friction", "solref", "solimp"),
    "pair": ("friction", "solref", "solreffriction", "solimp"),
    "actuator": ("gear", "gainprm", "biasprm", "dynprm"),
    "eq": ("solref", "solimp"),
}


class XmlWriteError(ValueError):
    """The identified model cannot be written so that it comes back the same; the message names the field."""


@engine_messages()
def save_xml(
    path: Path | str,
    source: mujoco.MjSpec | Path | str,
    spec: ThetaSpec,
    theta: Params,
    *,
    weights: Weights = "frozen",
    folder: Path | str | None = None,
    limits: XmlLimits = STANDARD,
) -> None:
    """Write the model `source` with the parameters `theta` (named by `spec`) to `path`, its meshes and textures below.

    `source`, `spec`, `weights`, `folder`, `limits`: as for `parameter_model`, `field_map`. The file is replaced in one
    step. Raises `XmlWriteError` when a field does not come back to 1e-12, `ValueError` for batched theta, `OSError`.
    """
    path = Path(path)
    editable = source.copy() if isinstance(source, mujoco.MjSpec) else load_spec(source, folder=folder, limits=limits)
    model = parameter_model(source, spec, folder=folder, limits=limits)
    tables = structure(model)
    box, fields = field_map(tables, spec, weights=weights)
    with torch.no_grad():
        reached = {name: value.to("cpu", torch.float64) for name, value in fields(theta).items()}
    if any(len(value) > 1 for value in reached.values()):
        raise ValueError("theta holds one value per environment; pick one of them to write")
    wanted = nominal_fields(tables) | reached
    compiled = editable.compile()
    _edit(editable, compiled, {name: value[0].numpy() for name, value in wanted.items()})
    if DELAY in box.default:
        _store(editable, DELAY, theta[DELAY].detach().reshape(1).double().numpy())
    _keep_weights(editable, wanted)
    xml = _written(editable)
    _check_return(xml, editable.assets, wanted, path)
    beside = _beside(path, editable.assets)
    write_atomic(path, xml.encode())
    for target, content in beside.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)


def _beside(path: Path, assets: Mapping[str, bytes | str]) -> dict[Path, bytes]:
    """Where the files that the XML names are written; `XmlWriteError` for a place outside, or one that is taken."""
    found = {}
    for name, content in assets.items():
        target = path.parent / name
        found[target] = content if isinstance(content, bytes) else str(content).encode()
        if path.parent.resolve() not in target.resolve().parents:
            raise XmlWriteError(f"'{path}' is not written: its '{name}' lies outside; write to a folder further down")
        if target.resolve() == path.resolve() or (target.is_file() and target.read_bytes() != found[target]):
            raise XmlWriteError(f"'{path}' is not written: its '{name}' would replace another file; take a new folder")
    return found


def _edit(spec: mujoco.MjSpec, model: mujoco.MjModel, fields: Mapping[str, Array]) -> None:
    """Set every field in the spec (in place)."""
    spec.option.gravity = fields["gravity"]
    _edit_bodies(spec, fields)
    for joint in spec.joints:
        index, dof = joint.id, int(model.jnt_dofadr[joint.id])
        turns = int(model.jnt_type[index]) != int(mujoco.mjtJoint.mjJNT_SLIDE)
        angle = 180.0 / np.pi if turns and spec.compiler.degree else 1.0
        joint.springdamper = [0.0, 0.0]
        joint.damping = [fields["dof_damping"][dof], *joint.damping[1:]]
        joint.stiffness = [fields["jnt_stiffness"][index], *joint.stiffness[1:]]
        if int(model.jnt_type[index]) >= int(mujoco.mjtJoint.mjJNT_SLIDE):
            joint.springref = float(fields["qpos_spring"][int(model.jnt_qposadr[index])]) * angle
        for name, field in _DOF.items():
            setattr(joint, name, fields[field][dof])
        for name, field in _JOINT.items():
            setattr(joint, name, fields[field][index] * (angle if name == "range" else 1.0))
    for tendon in spec.tendons:
        tendon.damping = [fields["tendon_damping"][tendon.id], *tendon.damping[1:]]
        tendon.stiffness = [fields["tendon_stiffness"][tendon.id], *tendon.stiffness[1:]]
        tendon.springlength = model.tendon_lengthspring[tendon.id]  # else taken from the spring reference
        for name, field in _TENDON.items():
            setattr(tendon, name, fields[field][tendon.id])
    for kind, elements in (
        ("geom", spec.geoms),
        ("pair", spec.pairs),
        ("actuator", spec.actuators),
        ("eq", spec.equalities),
    ):
        for element in elements:
            for name in _SAME[kind]:
                setattr(element, name, fields[f"{kind}_{name}"][element.id])


def _edit_bodies(spec: mujoco.MjSpec, fields: Mapping[str, Array]) -> None:
    """Inertias as numbers, in principal axes; the compiler shall not change them again (in place)."""
    compiler = spec.compiler
    compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_AUTO
    compiler.settotalmass, compiler.boundmass, compiler.boundinertia, compiler.balanceinertia = -1.0, 0.0, 0.0, False
    for body in spec.bodies:
        mass = float(fields["body_mass"][body.id])
        if body.id == 0 or mass == 0.0:
            continue
        matrix = inertia_matrix(torch.as_tensor(fields["body_inertia"][body.id])).numpy()
        moments, axes = np.linalg.eigh(matrix)
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, (axes * np.sign(np.linalg.det(axes))).reshape(-1))
        body.explicitinertial, body.mass, body.ipos = True, mass, fields["body_ipos"][body.id]
        body.fullinertia = [np.nan, 0, 0, 0, 0, 0]
        body.ialt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
        body.iquat, body.inertia = quaternion, moments


def _keep_weights(spec: mujoco.MjSpec, wanted: Mapping[str, Tensor]) -> None:
    """Store the weights that compiling gives otherwise (in place)."""
    model = spec.compile()
    for name in WEIGHTS:
        values = wanted[name][0].numpy()
        if values.size and not np.allclose(getattr(model, name), values, rtol=1e-12, atol=0.0):
            _store(spec, name, values.reshape(-1))
        else:
            _forget(spec, name)


def _store(spec: mujoco.MjSpec, name: str, values: Array) -> None:
    _forget(spec, name)
    spec.add_numeric(name=STORED.format(name), size=values.size, data=values.tolist())


def _forget(spec: mujoco.MjSpec, name: str) -> None:
    for numeric in list(spec.numerics):
        if numeric.name == STORED.format(name):
            spec.delete(numeric)


def _check_return(xml: str, assets: dict[str, bytes], wanted: Mapping[str, Tensor], path: Path) -> None:
    model = mujoco.MjSpec.from_string(xml, assets=assets).compile()
    restore_weights(model)
    found = nominal_fields(structure(model))
    for name, value in wanted.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        worst = float((found[name] - value).abs().max()) if value.numel() else 0.0
        if not worst <= 1e-12 * max(scale, 1e-300):
            raise XmlWriteError(
                f"'{path}' is not written: {name} would come back with an error of {worst:.3g} (of {scale:.3g}); "
                f"a compiler setting or class of the XML overrides it"
            )


def _written(spec: mujoco.MjSpec) -> str:
    """The XML of the spec with 17 digits; it is compiled first, as the writer needs."""
    spec.compile()
    with _all_digits():
        text: str = spec.to_xml()
    return text


@contextmanager
def _all_digits() -> Iterator[None]:
    """MuJoCo's writer keeps 6 digits unless told otherwise, through a function outside its public interface."""
    package = Path(os.fspath(mujoco.__file__)).parent
    names = [*package.glob("libmujoco*.so*"), *package.glob("libmujoco*.dylib"), *package.glob("mujoco.dll")]
    library = ctypes.CDLL(str(names[0])) if names else None
    if library is None or not hasattr(library, "_mjPRIVATE__set_xml_precision"):
        raise XmlWriteError(f"MuJoCo {mujoco.__version__} cannot write all digits; use MuJoCo 4.0")
    before = int(library._mjPRIVATE__get_xml_precision())
    library._mjPRIVATE__set_xml_precision(17)
    try:
        yield
    finally:
        library._mjPRIVATE__set_xml_precision(before)
