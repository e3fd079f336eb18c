"""A model MDP from a MuJoCo model: the engine's own step, differentiable in state, action, noise and parameters.

State    [qpos (nq), qvel (nv), act (na)], then commands under way (delay), then the number of steps (truncation)
Action   the controls (nu), held for `frame_skip` engine steps, in the units of the actuators
Noise    e_0: normal deviations of position (in the tangent space, so quaternions stay units) and of velocity;
         e: a normal generalised force, held over the step

Derivatives are those of one engine step, chained: the acceleration by the implicit function theorem
(`mujoco_products`), its integration in torch (`mujoco_integrators`). They are exact to second order within one set of
active contacts and limits; at a switch they are one-sided. MuJoCo runs on the CPU in float64: a state on another device
or in float32 is copied there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mujoco
import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.mujoco_acceleration import Backend, Engine
from sim2real.simulators.mujoco_integrators import activations, add_tangent
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_pairs import check_contact_pairs
from sim2real.simulators.mujoco_parameters import DELAY, ThetaSpec, Weights, field_map, parameter_model
from sim2real.simulators.mujoco_rollout import segmented_rollout
from sim2real.simulators.mujoco_sensitivity import engine_sensitivity
from sim2real.simulators.mujoco_smoothing import ContactSmoothing, smoothed_system
from sim2real.simulators.mujoco_step import (
    GradientGuard,
    StepSettings,
    commands_under_way,
    control_step,
    engine_roll,
    to_engine,
)
from sim2real.simulators.mujoco_structure import structure
from sim2real.simulators.mujoco_system import MujocoSystem, mujoco_system
from sim2real.simulators.mujoco_xml import load_xml

Reward = Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]
Observe = Callable[[Params, Tensor], Tensor]

_TURN = [("_wx", "rad/s"), ("_wy", "rad/s"), ("_wz", "rad/s")]
_QUATERNION = [(suffix, "1") for suffix in ("_qw", "_qx", "_qy", "_qz")]
_PLACE = [("_x", "m"), ("_y", "m"), ("_z", "m")]
_RATE = [("_x", "m/s"), ("_y", "m/s"), ("_z", "m/s")]
_JOINTS = {  # by joint type: suffixes and units of its positions and of its velocities
    int(mujoco.mjtJoint.mjJNT_FREE): (_PLACE + _QUATERNION, _RATE + _TURN),
    int(mujoco.mjtJoint.mjJNT_BALL): (_QUATERNION, _TURN),
    int(mujoco.mjtJoint.mjJNT_SLIDE): ([("", "m")], [("", "m/s")]),
    int(mujoco.mjtJoint.mjJNT_HINGE): ([("", "rad")], [("", "rad/s")]),
}


def mujoco_model(
    source: mujoco.MjSpec | mujoco.MjModel | Path | str,
    theta: ThetaSpec,
    reward: Reward,
    *,
    frame_skip: int = 1,
    delay: float = 0.0,
    initial: Tensor | str | None = None,
    initial_std: float | tuple[float, float] | Tensor = 0.0,
    force_std: float | Tensor | None = None,
    terminal: Observe | None = None,
    observe: Observe | None = None,
    signal: Sequence[str] | None = None,
    discount: float = 1.0,
    weights: Weights = "frozen",
    truncation: int | None = None,
    guard: GradientGuard | None = None,
    segment: int | None = None,
    engine: Engine = "mujoco",
    backend: Backend = "auto",
    threads: int = 1,
    tolerance: float = 1e-9,
    strict: bool = False,
    check_pairs: bool = True,
    smoothing: ContactSmoothing | None = None,
) -> ModelMDP:
    """A MuJoCo model as an MDP whose step has exact first and second derivatives, parameters included.

    source: XML (path or text, taken as untrusted), a trusted `MjSpec`, a compiled `MjModel` (bodies whose inertia is a
    parameter need simple="false"), theta: names of physical parameters, as
    `mujoco_parameters.field_map` takes them (`torso.mass`, `floor.friction.slide`, `delay`, ...); `weights` says
    whether the constraint weights of the reference pose move with the masses. reward, terminal, observe: of theta and
    states `[B, n]`, any torch functions (`body_poses` gives positions of bodies).

    initial: start state `[nq + nv + na]` or the name of a keyframe, None: qpos0 at rest; initial_std: of its tangent
    displacement and velocity (two numbers, one for both, or `[2 nv]`), in rad or m and per s. force_std: of the
    generalised force that is the process noise, N or N m (`[nv]` or one number); None: no process noise. delay: of the
    commands, in s; where it is to be a parameter, "delay" stands in theta instead, with its start and bounds.

    truncation: the state is cut from its past every so many steps (`[B, 1]` counts them at the end of the state).
    guard: bounds each environment's cotangent in reverse mode, see `gradient_guard`. segment: an `open_loop` rollout
    keeps one state per so many steps and recomputes between them in reverse mode; None: about the root of their number.
    engine: "mujoco_warp" solves the forward step with mujoco_warp in float32, on a GPU where there is one, and takes it
    to float64 (`mujoco_warp_engine`). backend: "auto" takes Warp kernels where they cover the model; threads: of the
    engine, 0 for all processors. A solver residual above `tolerance` of the largest force warns `UnconvergedWarning`;
    under `strict` it raises `UnconvergedError`. check_pairs=False lets a model pass in which a cylinder can stand on a
    flat body, a contact that has no derivative: its states raise instead. smoothing: contacts set in gradually, see
    `ContactSmoothing`.

    Raises `MujocoUnsupportedError`, by element, for what has no derivative, `ParameterNameError`, `XmlRefusedError`,
    and `ValueError` for settings that do not fit the model.
    """
    _check_settings(frame_skip, delay, truncation, segment)
    with engine_messages():
        model = source if isinstance(source, mujoco.MjModel) else _compiled(source, theta)
    time_step = float(model.opt.timestep)
    if not 0.0 < time_step < float("inf"):
        raise ValueError(f"the time step of the model must be a positive number of seconds, got {time_step:g}")
    if check_pairs:
        check_contact_pairs(model)
    tables = structure(model)
    box, fields = field_map(tables, theta, weights=weights) if len(theta) else (Box(), _no_fields)
    names = tuple(fields({key: torch.as_tensor(value) for key, value in box.default.items()}))
    build = partial(
        mujoco_system,
        names=names,
        engine=engine,
        backend=backend,
        threads=threads,
        tolerance=tolerance,
        strict=strict,
    )
    system = smoothed_system(model, smoothing, names, build)
    if delay and DELAY in box.default:
        raise ValueError(f"delay={delay} s next to theta's 'delay', which replaces it; give that one a default instead")
    longest = box.high[DELAY] if DELAY in box.default else delay
    settings = StepSettings(
        fields=fields,
        frame_skip=frame_skip,
        delay=delay,
        commands=commands_under_way(longest, frame_skip, time_step),
        force_std=None if force_std is None else _spread(force_std, model.nv, "force_std"),
        truncation=truncation,
        guard=guard,
    )
    step = partial(control_step, system, settings)
    labels, units = _labels(model, settings)
    return ModelMDP(
        initial_state=_start(system, settings, initial, initial_std),
        step=step,
        reward=reward,
        noise_dims=(2 * model.nv, 0 if force_std is None else model.nv),
        dt=frame_skip * time_step,
        discount=discount,
        terminal=terminal,
        observe=observe,
        open_loop=segmented_rollout(step, partial(engine_roll, system, settings), segment),
        sensitivity=engine_sensitivity(system, settings, step),
        derivative_order=1 if system.structure.uncovered else 2,
        names=labels if signal is None else labels | {"signal": tuple(signal)},
        units=units,
        box=box,
    )


def action_box(model: mujoco.MjModel) -> Box:
    """Bounds (`ctrlrange`), units and zeros of the actions of a model, by actuator."""
    names = _names(model, "actuator", model.nu)
    limited = [i for i in range(model.nu) if model.actuator_ctrllimited[i]]
    low, high = ({names[i]: float(model.actuator_ctrlrange[i, side]) for i in limited} for side in (0, 1))
    unit = {name: _action_unit(model, i) for i, name in enumerate(names)}
    return Box(low=low, high=high, unit=unit, default=dict.fromkeys(names, 0.0))


def _compiled(source: mujoco.MjSpec | Path | str, theta: ThetaSpec) -> mujoco.MjModel:
    if len(theta):
        return parameter_model(source, theta)
    return source.copy().compile() if isinstance(source, mujoco.MjSpec) else load_xml(source)


def _no_fields(theta: Params) -> dict[str, Tensor]:
    return {}


def _start(
    system: MujocoSystem,
    settings: StepSettings,
    initial: Tensor | str | None,
    initial_std: float | tuple[float, float] | Tensor,
) -> Callable[[Params, Tensor], Tensor]:
    """theta, e0 `[B, 2 nv]` -> s."""
    model = system.structure.model
    nq, nv = model.nq, model.nv
    physical = _initial(model, initial)
    if isinstance(initial_std, tuple):
        initial_std = torch.tensor(initial_std, dtype=torch.float64).repeat_interleave(nv)
    std = _spread(initial_std, 2 * nv, "initial_std")
    more = settings.commands * model.nu + (settings.truncation is not None)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        deviation = std * to_engine(e0)
        at = physical.expand(len(e0), -1)
        q = add_tangent(system.coordinates, at[:, :nq], deviation[:, :nv])
        rest = at[:, nq + nv :]
        return torch.cat([q, at[:, nq : nq + nv] + deviation[:, nv:], rest, rest.new_zeros(len(e0), more)], -1).to(e0)

    return initial_state


def _initial(model: mujoco.MjModel, initial: Tensor | str | None) -> Tensor:
    if isinstance(initial, Tensor):
        wanted = model.nq + model.nv + model.na
        if initial.shape != (wanted,):
            raise ValueError(f"initial must be (qpos, qvel, act) of length {wanted}, got shape {tuple(initial.shape)}")
        return to_engine(initial.detach())
    data = mujoco.MjData(model)
    if initial is not None:
        names = [model.key(k).name for k in range(model.nkey)]
        if initial not in names:
            raise ValueError(f"the model has no keyframe '{initial}'; it has {names or 'none'}")
        mujoco.mj_resetDataKeyframe(model, data, names.index(initial))
    return torch.cat([torch.tensor(x.copy()) for x in (data.qpos, data.qvel, data.act)])


def _spread(value: float | Tensor, length: int, what: str) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float64)
    if found.shape not in ((), (length,)) or not bool((found >= 0.0).all()):
        raise ValueError(f"{what} must be one number or {length}, none negative, got {value}")
    return found.expand(length)


def _check_settings(frame_skip: int, delay: float, truncation: int | None, segment: int | None) -> None:
    for what, count in (("frame_skip", frame_skip), ("truncation", truncation), ("segment", segment)):
        if count is not None and count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}")
    if not 0.0 <= delay < float("inf"):
        raise ValueError(f"delay must be a number of seconds from 0, got {delay}")


def _names(model: mujoco.MjModel, kind: str, count: int) -> list[str]:
    return [getattr(model, kind)(i).name or f"{kind}{i}" for i in range(count)]


def _labels(model: mujoco.MjModel, settings: StepSettings) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Names of the columns of state and action, and their units."""
    position: list[tuple[str, str]] = []
    velocity: list[tuple[str, str]] = []
    for joint, kind in zip(_names(model, "joint", model.njnt), model.jnt_type, strict=True):
        q, v = _JOINTS[int(kind)]
        position += [(joint + suffix, unit) for suffix, unit in q]
        velocity += [(f"{joint}{suffix}_velocity", unit) for suffix, unit in v]
    actuators = _names(model, "actuator", model.nu)
    inner = [(f"{actuators[int(i)]}_activation", "1") for i in activations(model).actuator]
    units = {name: _action_unit(model, i) for i, name in enumerate(actuators)}
    under_way = [(f"{name}_{k}_ago", units[name]) for k in range(settings.commands, 0, -1) for name in actuators]
    count = [] if settings.truncation is None else [("steps", "1")]
    state = [*position, *velocity, *inner, *under_way, *count]
    names = {"state": tuple(name for name, _ in state), "action": tuple(actuators)}
    return names, dict(state) | units


def _action_unit(model: mujoco.MjModel, i: int) -> str:
    """Of a motor: its force; of a servo on a joint: its position or velocity; else none."""
    kinds = mujoco.mjtTrn
    if model.actuator_trntype[i] not in (int(kinds.mjTRN_JOINT), int(kinds.mjTRN_JOINTINPARENT)):
        return "1"
    turns = int(model.jnt_type[model.actuator_trnid[i, 0]]) != int(mujoco.mjtJoint.mjJNT_SLIDE)
    gain, bias = model.actuator_gainprm[i, 0], model.actuator_biasprm[i]
    if int(model.actuator_biastype[i]) == int(mujoco.mjtBias.mjBIAS_NONE):
        return ("N m" if turns else "N") if gain == 1.0 and abs(model.actuator_gear[i]).sum() == 1.0 else "1"
    if gain == -bias[1] != 0.0:
        return "rad" if turns else "m"
    return ("rad/s" if turns else "m/s") if gain == -bias[2] != 0.0 else "1"
