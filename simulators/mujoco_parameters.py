"""theta of a MuJoCo model: names such as "torso.mass" or "thigh_joint.damping" as physical fields of the model.

`field_map(structure, spec)` gives the box of theta (units, bounds, the model's own values) and the function from theta
to the fields that it reaches, differentiable twice. An entry may set several elements at once, or scale them all by one
factor; `pseudo_inertia` holds all ten inertial numbers of a body and stays physical (`mujoco_inertia`). `delay` (s) is
passed by: the model applies it to its commands.

Mass and inertia also enter the softness of contacts and limits, through MuJoCo's "invweight0". `weights="frozen"` keeps
these at the compiled model's values, as editing `body_mass` does (the usual meaning of a field's derivative);
`weights="moving"` moves them along, as compiling anew or `mj_setConst` does, with exact derivatives.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.params import Params
from sim2real.simulators.mujoco_inertia import (
    inverse_weights,
    log_cholesky,
    pseudo_inertia,
    restore_weights,
    stored_numbers,
)
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_patches import Patch, make_patch, patched
from sim2real.simulators.mujoco_properties import (
    PROPERTIES,
    PSEUDO_INERTIA,
    ParameterNameError,
    Place,
    Property,
    element_names,
    find_property,
    places,
    shown_bounds,
    shown_unit,
)
from sim2real.simulators.mujoco_structure import Structure, nominal_fields
from sim2real.simulators.mujoco_xml import STANDARD, XmlLimits, load_spec

__all__ = ["Parameter", "ParameterNameError", "field_map", "parameter_model", "parameters_of", "target_names"]

DELAY = "delay"
_INERTIAL = ("body_mass", "body_ipos", "body_inertia")
_MOVES_WEIGHTS = (*_INERTIAL, "dof_armature", "tendon_armature")
Weights = Literal["frozen", "moving"]
FieldFunction = Callable[[Params], dict[str, Tensor]]


@dataclass(frozen=True)
class Parameter:
    """One entry of theta: what it sets, its bounds and where it starts. None: from the model."""

    targets: tuple[str, ...] = ()
    """ELEMENT.PROPERTY of every element that it sets, with * and ? in element names; (): the entry's own name"""
    low: float | None = None
    high: float | None = None
    default: float | tuple[float, ...] | None = None
    scale: bool = False
    """the value multiplies the model's own numbers instead of replacing them; default 1"""

    def __post_init__(self) -> None:
        defaults = self.default if isinstance(self.default, tuple) else (self.default,)
        for key, value in (("low", self.low), ("high", self.high), *(("default", each) for each in defaults)):
            if value is not None and not isinstance(value, (int, float)):
                raise TypeError(f"{key} must be a number, got {value!r}")
        if not isinstance(self.scale, bool):
            raise TypeError(f"scale must be true or false, got {self.scale!r}")
        if not isinstance(self.targets, tuple) or not all(isinstance(target, str) for target in self.targets):
            raise TypeError(f"targets must be a tuple of names, got {self.targets!r}")


ThetaSpec = Sequence[str] | Mapping[str, Parameter | Sequence[Any] | None]
"""names; or name -> `Parameter`, (low, high), or None"""


@dataclass(frozen=True)
class _Target:
    """One element's property, resolved."""

    row: Property
    index: int
    component: int | None
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    nominal: Tensor


def parameters_of(spec: ThetaSpec) -> dict[str, Parameter]:
    """The entries of a theta in any of its forms. Raises `ParameterNameError` for one that is none."""
    if isinstance(spec, str):
        raise ParameterNameError(f"theta is the text '{spec}'; give a list of names or name -> bounds")
    entries = spec if isinstance(spec, Mapping) else dict.fromkeys(spec)
    if not entries:
        raise ParameterNameError("theta names no parameter; give names such as torso.mass")
    found: dict[str, Parameter] = {}
    for name, value in entries.items():
        if isinstance(value, Parameter):
            entry = value
        elif value is None:
            entry = Parameter()
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            try:
                entry = Parameter(low=float(value[0]), high=float(value[1]))
            except (TypeError, ValueError) as error:
                raise ParameterNameError(f"theta['{name}'] = {value!r}: bounds must be numbers") from error
        else:
            raise ParameterNameError(f"theta['{name}'] = {value!r}: expected a Parameter, (low, high) or None")
        if not entry.targets and name != DELAY:
            entry = replace(entry, targets=(name,))
        found[str(name)] = entry
    return found


@engine_messages()
def parameter_model(
    source: mujoco.MjSpec | Path | str,
    spec: ThetaSpec,
    *,
    folder: Path | str | None = None,
    limits: XmlLimits = STANDARD,
) -> mujoco.MjModel:
    """The model of a trusted spec, or of a path or text of untrusted XML, compiled so that theta can reach it.

    Bodies whose inertia is a parameter are compiled with simple="false"; frozen weights that `save_xml` stored are put
    back. Raises `XmlRefusedError`, `ParameterNameError`.
    """
    editable = source.copy() if isinstance(source, mujoco.MjSpec) else load_spec(source, folder=folder, limits=limits)
    model = editable.compile()
    bodies = {
        target.index
        for entry in parameters_of(spec).values()
        for target in _targets(model, entry)
        if target.row.kind == "body"
    }
    if bodies:
        for body in editable.bodies:
            if body.id in bodies:
                body.simple = 0
        model = editable.compile()
    restore_weights(model)
    return model


def field_map(structure: Structure, spec: ThetaSpec, *, weights: Weights = "frozen") -> tuple[Box, FieldFunction]:
    """The box of theta, and the function from theta to the fields that it reaches.

    The function takes every entry as its default's shape, or with a leading `[B]` for one value per environment, and
    returns `{field: [1 or B, *shape]}`, always the same fields. Raises `ParameterNameError` for names the model does
    not have, with the nearest ones, and for entries that set the same number twice.
    """
    if weights not in ("frozen", "moving"):
        raise ValueError(f"weights must be 'frozen' or 'moving', got {weights!r}")
    model, nominal = structure.model, nominal_fields(structure)
    entries = parameters_of(spec)
    resolved = {name: _targets(model, entry, nominal) for name, entry in entries.items()}
    _check_overlap(entries, resolved)
    box = _box(model, entries, resolved)
    shapes = {name: torch.as_tensor(value).shape for name, value in box.default.items()}
    touched = {place.field for targets in resolved.values() for target in targets for place in target.places}
    simple = [b for b, name in enumerate(element_names(model, "body")) if {name, f"body {b}"} & set(structure.simple)]
    follow = inverse_weights(model, simple) if weights == "moving" and touched & set(_MOVES_WEIGHTS) else None

    plan = _plan(entries, resolved, nominal)
    pseudo = {name for name, targets in resolved.items() if any(target.row is PSEUDO_INERTIA for target in targets)}

    def fields(theta: Params) -> dict[str, Tensor]:
        columns = {name: _rows(name, theta, shapes[name]) for name, targets in resolved.items() if targets}
        for name in pseudo:
            columns[name] = pseudo_inertia(columns[name])
        found = {field: patched(nominal[field], patches, columns) for field, patches in plan.items()}
        if follow is None:
            return found
        sample = next(iter(found.values()))
        return found | follow({name: found.get(name, nominal[name].to(sample)) for name in _MOVES_WEIGHTS})

    return box, fields


def _plan(
    entries: Mapping[str, Parameter], resolved: Mapping[str, tuple[_Target, ...]], nominal: Mapping[str, Tensor]
) -> dict[str, tuple[Patch, ...]]:
    """What theta does to every field that it reaches: first numbers are set, then multiplied."""
    widths = {name: 1 if entries[name].scale else len(t[0].nominal.reshape(-1)) for name, t in resolved.items() if t}
    found: dict[str, tuple[Patch, ...]] = {}
    for field in sorted(
        {place.field for targets in resolved.values() for target in targets for place in target.places}
    ):
        made = []
        for multiply in (False, True):
            assigned = [
                (name, replace(place, component=0, factor=1.0) if multiply else place)
                for name, targets in resolved.items()
                for target in targets
                for place in target.places
                if place.field == field and entries[name].scale == multiply
            ]
            made.append(make_patch(assigned, widths, nominal[field].numel(), multiply=multiply))
        found[field] = tuple(patch for patch in made if patch is not None)
    return found


def target_names(model: mujoco.MjModel, spec: ThetaSpec) -> dict[str, tuple[str, ...]]:
    """Which properties each entry of theta means, wildcards resolved."""
    entries = parameters_of(spec).items()
    return {name: tuple(one for target in entry.targets for one in _matches(model, target)) for name, entry in entries}


def _targets(model: mujoco.MjModel, entry: Parameter, nominal: dict[str, Tensor] | None = None) -> tuple[_Target, ...]:
    """Every element's property that an entry means; wildcards match the elements that have the property."""
    found: list[_Target] = []
    for name in entry.targets:
        for one in _matches(model, name):
            row, index, component = find_property(model, one)
            if row is PSEUDO_INERTIA:
                found.append(_inertial_target(row, index, component, one, nominal))
                continue
            at = places(model, row, index, one)
            if component is not None:
                at = tuple(replace(place, component=0) for place in at if place.component == component)
            shape = () if component is not None or row.width == 0 else (row.width,)
            value = torch.zeros(shape, dtype=torch.float64)
            if nominal is not None:
                first = {place.component: place for place in reversed(at)}
                flat = [nominal[p.field].flatten()[p.position] / p.factor for _, p in sorted(first.items())]
                value = torch.stack(flat).reshape(shape)
            found.append(_Target(row, index, component, at, shape, value))
    return tuple(found)


def _inertial_target(
    row: Property, body: int, component: int | None, name: str, nominal: dict[str, Tensor] | None
) -> _Target:
    if component is not None:
        raise ParameterNameError(f"'{name}': the ten numbers of pseudo_inertia go together; name no component")
    widths = (("body_mass", 1), ("body_ipos", 3), ("body_inertia", 6))
    pairs = [(field, body * width + k) for field, width in widths for k in range(width)]
    at = tuple(Place(field, position, k) for k, (field, position) in enumerate(pairs))
    value = torch.zeros(10, dtype=torch.float64)
    if nominal is not None:
        mass, com, six = (nominal[field][0, body] for field, _ in widths)
        try:
            value = log_cholesky(mass, com, six)
        except ValueError as error:
            raise ParameterNameError(f"'{name}': {error}") from error
    return _Target(row, body, None, at, (10,), value)


def _matches(model: mujoco.MjModel, name: str) -> list[str]:
    if not any(mark in name for mark in "*?"):
        return [name]
    kind, _, bare = name.rpartition(":")
    last, found = bare.rpartition(".")[2], []
    for row in (*PROPERTIES, PSEUDO_INERTIA):
        if kind not in ("", row.kind):
            continue
        elements = [(f"{e}.{row.name}", f"{row.kind}:{e}") for e in element_names(model, row.kind)]
        for full, short in elements:
            if fnmatch.fnmatchcase(full, bare):
                found.append(f"{short}.{row.name}")
            elif last in row.components and fnmatch.fnmatchcase(full, bare.removesuffix(f".{last}")):
                found.append(f"{short}.{row.name}.{last}")
    if not found:
        raise ParameterNameError(f"'{name}' matches no element; write ELEMENT.PROPERTY, such as *_joint.damping")
    return found


def _check_overlap(entries: Mapping[str, Parameter], resolved: Mapping[str, tuple[_Target, ...]]) -> None:
    taken: dict[tuple[str, int, bool], str] = {}
    for name, targets in resolved.items():
        scale = entries[name].scale
        for target in targets:
            if scale and target.row is PSEUDO_INERTIA:
                raise ParameterNameError(f"'{name}' scales pseudo_inertia; scale mass and inertia instead")
            for place in target.places:
                other = taken.setdefault((place.field, place.position, scale), name)
                if other != name:
                    raise ParameterNameError(f"'{name}' and '{other}' both set {place.field}; keep one of them")
        if len({target.shape for target in targets}) > 1 and not scale:
            raise ParameterNameError(f"'{name}' sets {[t.row.name for t in targets]}, of different lengths; split it")


def _box(model: mujoco.MjModel, entries: Mapping[str, Parameter], resolved: Mapping[str, tuple[_Target, ...]]) -> Box:
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    unit: dict[str, str] = {}
    default: dict[str, float | Tensor] = {}
    for name, entry in entries.items():
        targets = resolved[name]
        if not targets:  # the delay
            stored = stored_numbers(model, DELAY)
            nominal = torch.tensor(0.0 if stored is None else float(stored[0]), dtype=torch.float64)
            bounds, unit[name] = (0.0, max(0.1, 2.0 * float(nominal))), "s"
        elif entry.scale:
            bounds, nominal, unit[name] = (0.1, 10.0), torch.ones((), dtype=torch.float64), "1"
        else:
            nominal = torch.stack([target.nominal for target in targets]).mean(0)
            bounds = shown_bounds(targets[0].row, np.concatenate([t.nominal.numpy().reshape(-1) for t in targets]))
            unit[name] = shown_unit(targets[0].row, model, targets[0].index, targets[0].component)
        if entry.default is not None:
            given = torch.as_tensor(entry.default, dtype=torch.float64)
            if given.shape not in ((), nominal.shape):
                raise ParameterNameError(
                    f"theta['{name}'] has {max(nominal.numel(), 1)} numbers, its default {given.tolist()}"
                )
            nominal = given.expand(nominal.shape).clone()
        low[name] = bounds[0] if entry.low is None else entry.low
        high[name] = bounds[1] if entry.high is None else entry.high
        if not low[name] <= float(nominal.min()) <= float(nominal.max()) <= high[name]:
            raise ParameterNameError(
                f"theta['{name}'] starts at {nominal.tolist()} {unit[name]}, outside its bounds ({low[name]:g}, "
                f"{high[name]:g}); widen them or give a default inside"
            )
        default[name] = nominal if nominal.ndim else float(nominal)
    return Box(low=low, high=high, unit=unit, default=default)


def _rows(name: str, theta: Params, shape: torch.Size) -> Tensor:
    """The entry as `[1 or B, width]`."""
    if name not in theta:
        raise ValueError(f"theta lacks '{name}'; it holds {sorted(theta)}")
    value = theta[name]
    if value.shape == shape:
        return value.reshape(1, -1)
    if value.ndim == len(shape) + 1 and value.shape[1:] == shape:
        return value.reshape(len(value), -1)
    raise ValueError(f"theta['{name}'] is {tuple(value.shape)}, expected {tuple(shape)} or [B, *{tuple(shape)}]")
