"""The peer of the fit-time bar: `mujoco.sysid` on the windows of a torque-driven pendulum.

The same five parameters: inertia and m g l (through mass and armature), damping, Coulomb friction (frictionloss),
torque offset (actuator bias); the same start states, torques and samples; plain squares of the angle error, its default
optimiser with finite-difference Jacobians, one thread.
"""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco import sysid

from sim2real.log import RolloutLog
from sim2real.windows import Channels, Windows, window_actions

LENGTH = 0.5
"""m, from the axis to the mass; only mass times length and the total inertia reach the motion"""
_XML = """
<mujoco><option timestep="{dt}" gravity="0 0 -9.81" integrator="implicitfast"/>
  <worldbody><body name="link"><joint name="hinge" type="hinge" axis="0 -1 0" armature="0.01"/>
    <geom type="sphere" size="0.01" pos="0 0 -{length}" mass="0.6755" contype="0" conaffinity="0"/></body></worldbody>
  <actuator><general name="torque" joint="hinge" gainprm="1" biastype="affine" biasprm="0"/></actuator>
  <sensor><jointpos name="angle" joint="hinge"/></sensor>
</mujoco>
"""


@dataclass(frozen=True)
class SysidFit:
    """What the peer finds: physical values by the names of our pendulum, and its RMSE on the scored samples, rad."""

    values: dict[str, float]
    rmse: float


def _set(spec: mujoco.MjSpec, parameter: sysid.Parameter, what: str) -> None:
    value = float(parameter.value[0])
    if what == "mass":
        spec.geoms[0].mass = value
    elif what == "offset":
        spec.actuators[0].biasprm[0] = value
    elif what == "damping":
        spec.joints[0].damping[0] = value
    else:
        setattr(spec.joints[0], what, value)


def _parameters() -> sysid.ParameterDict:
    parameters = sysid.ParameterDict()
    starts = {  # ours: 0.169 kg m^2, 3.31 N m, 0.1, 0, 0; every start a little inside its bounds
        "mass": (0.6755, 0.01, 5.0),
        "armature": (0.005, 1e-5, 0.5),
        "damping": (0.1, 0.0, 5.0),
        "frictionloss": (0.01, 0.0, 5.0),
        "offset": (0.0, -2.0, 2.0),
    }
    for name, (start, low, high) in starts.items():
        parameters.add(sysid.Parameter(name, start, low, high, modifier=partial(_set, what=name)))
    return parameters


def problem(log: RolloutLog, channels: Channels, windows: Windows) -> tuple[Any, sysid.ParameterDict]:
    """The residual function and the start values; the samples are the scored rows of `windows`."""
    spec = mujoco.MjSpec.from_string(_XML.format(dt=log.dt, length=LENGTH))
    model = spec.compile()
    actions = window_actions(windows, log.actions[..., channels.actions]).transpose(0, 1).numpy()
    times = np.arange(windows.steps + 1) * log.dt
    rows = log.signals[windows.episode.unsqueeze(1), windows.start.unsqueeze(1) + torch.arange(windows.steps + 1)]
    angle = channels.logged[:1]
    # the last control is not used: T steps need T + 1 of them
    control = [sysid.TimeSeries.from_control_names(times, np.pad(u, ((0, 1), (0, 0))), model) for u in actions]
    readings = [sysid.TimeSeries.from_names(times, run.numpy(), model) for run in rows[..., angle]]
    starts = [sysid.create_initial_state(model, s[:1], s[1:]) for s in windows.anchor.numpy()]
    names = [f"window{k}" for k in range(len(starts))]
    sequences = sysid.ModelSequences("pendulum", spec, names, starts, control, readings)
    rows_scored = windows.rows.numpy()

    def angle_error(params: Any, predicted: Any, given: Any, model: Any, everything: bool, *, state: Any) -> Any:
        return state[rows_scored - 1, 1] - given.data[rows_scored, 0], predicted, given

    compiled: dict[bytes, mujoco.MjModel] = {}

    def build_once(params: sysid.ParameterDict, spec: mujoco.MjSpec) -> mujoco.MjModel:
        """By itself the peer compiles the model anew for every window; that would double its time."""
        key = params.as_vector().tobytes()
        if key not in compiled:
            compiled[key] = sysid.apply_param_modifiers(params, spec)
        return compiled[key]

    residual = sysid.build_residual_fn(
        models_sequences=[sequences],
        build_model=build_once,
        modify_residual=angle_error,
        n_threads=1,
        resample_true=False,
    )
    return residual, _parameters()


def sysid_fit(residual: Any, parameters: sysid.ParameterDict, count: int) -> SysidFit:
    """Run the default optimiser of `mujoco.sysid`; count: samples in all."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress would mix with the figures
        found, _ = sysid.optimize(parameters, residual, verbose=False)
    logging.disable(logging.NOTSET)
    errors = np.concatenate([np.ravel(part) for part in residual(found.as_vector(), found)[0]])
    if errors.size != count:
        raise ValueError(f"mujoco.sysid scored {errors.size} samples, expected {count}")
    mass, armature, damping, coulomb, offset = found.as_vector()
    values = {
        "inertia": mass * LENGTH**2 + armature,
        "mgl": mass * 9.81 * LENGTH,
        "damping": damping,
        "coulomb": coulomb * 2 / np.pi,
        "torque_offset": offset,
    }
    return SysidFit({name: float(value) for name, value in values.items()}, float(np.sqrt(np.mean(errors**2))))
