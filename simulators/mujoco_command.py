"""A MuJoCo model by plain options, as `sim2real fit model=mujoco xml=robot.xml theta=[torso.mass]` names it.

The XML is untrusted (`mujoco_xml`). The model steps at the period of the log: so many engine steps of the XML's own
time step as fit in. What a command identifies is written back as XML beside its other results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mujoco
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_parameters import Parameter, ParameterNameError, Weights, parameters_of
from sim2real.simulators.mujoco_writer import save_xml
from sim2real.simulators.mujoco_xml import XmlRefusedError, load_spec

IDENTIFIED = "model.xml"
"""name of the written file"""


def mujoco_from_xml(
    *,
    xml: str,
    theta: Sequence[str] | Mapping[str, Any],
    dt: float | None = None,
    timestep: float | None = None,
    folder: str | None = None,
    initial: str | None = None,
    initial_std: float = 0.0,
    delay: float = 0.0,
    weights: Weights = "frozen",
    discount: float = 1.0,
) -> ModelMDP:
    """The model of an XML file whose parameters are `theta`; it has no reward of its own.

    xml: path. theta: names such as torso.mass, or name -> (low, high), or name -> {targets, low, high, default, scale}
    (`mujoco_parameters.Parameter`). dt in s: control period, a multiple of the time step of the XML (None: that time
    step); timestep in s replaces the XML's. folder: where files that the XML names may lie (None: beside it).
    initial: a keyframe, at which in-sim rollouts start with deviations of `initial_std`. delay in s: of the controls.
    Raises `XmlRefusedError`, `ParameterNameError`, and `ValueError` for a dt that the time step does not divide.
    """
    spec = _spec(xml, folder, timestep)
    step = float(spec.option.timestep)
    if dt is not None and not 0.0 < dt < float("inf"):
        raise ValueError(f"dt must be a finite period above 0 s, got {dt}")
    if not step > 1e-5 * (dt or 0.0):
        raise ValueError(f"'{xml}' steps at {step:g} s; give a sensible time step with model.timestep=0.001")
    skip = 1 if dt is None else round(dt / step)
    if dt is not None and (skip < 1 or abs(skip * step - dt) > 1e-6 * dt):
        finer = dt / max(-(-dt // step), 1.0)
        raise ValueError(
            f"'{xml}' steps at {step:.6g} s, which does not divide the control period of {dt:.6g} s; give another time "
            f"step with model.timestep={finer:.6g}, or resample the log with model.dt={max(skip, 1) * step:.6g}"
        )
    return mujoco_model(
        spec,
        _entries(theta),
        _no_reward,
        frame_skip=skip,
        delay=delay,
        initial=initial,
        initial_std=initial_std,
        discount=discount,
        weights=weights,
    )


def write_identified(target: Path, values: Params, **options: Any) -> None:
    """Write the model with the parameters `values` to `target`/model.xml; options as for `mujoco_from_xml`.

    Raises `XmlWriteError` when it would not come back the same, `OSError`.
    """
    spec = _spec(options["xml"], options.get("folder"), options.get("timestep"))
    save_xml(target / IDENTIFIED, spec, _entries(options["theta"]), values, weights=options.get("weights", "frozen"))


def _spec(xml: str, folder: str | None, timestep: float | None) -> mujoco.MjSpec:
    if xml.lstrip().startswith("<"):
        raise XmlRefusedError("xml is XML text; give the path of a file")
    try:
        spec = load_spec(Path(xml), folder=folder)
    except OSError as error:
        raise XmlRefusedError(f"xml='{xml}' cannot be read: {error.strerror}; give the path of an XML file") from error
    if timestep is not None:
        if not 0.0 < timestep < float("inf"):
            raise ValueError(f"timestep must be a positive number of seconds, got {timestep}")
        spec.option.timestep = timestep
    return spec


def _entries(theta: Sequence[str] | Mapping[str, Any]) -> dict[str, Parameter]:
    """theta in plain lists and dictionaries, as it stands in a configuration or a parameter file."""
    if not isinstance(theta, Mapping):
        return parameters_of(theta)
    found: dict[str, Any] = {}
    for name, value in theta.items():
        if not isinstance(value, Mapping):
            found[str(name)] = value
            continue
        listed = lambda item: isinstance(item, Sequence) and not isinstance(item, str)
        options: dict[str, Any] = {key: tuple(item) if listed(item) else item for key, item in value.items()}
        if isinstance(options.get("targets"), str):
            options["targets"] = (options["targets"],)
        try:
            found[str(name)] = Parameter(**options)
        except TypeError as error:
            raise ParameterNameError(
                f"theta['{name}'] = {dict(value)}: expected the keys targets, low, high, default, scale ({error})"
            ) from error
    return parameters_of(found)


def _no_reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
    raise ValueError("a MuJoCo XML names no task; give reward=module.function of (state, action, next_state)")
