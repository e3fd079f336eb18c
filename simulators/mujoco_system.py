"""A MuJoCo model and all that its engine steps need: tables, program of the acceleration, fields of theta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import mujoco
import torch
from torch import Tensor

from sim2real.outside_program import Program, evaluate
from sim2real.params import Params
from sim2real.simulators.mujoco_acceleration import (
    Backend,
    Engine,
    acceleration_program,
    check_residual,
    cotangent_kernels,
)
from sim2real.simulators.mujoco_forward import Kind, Roll, engine_rollout, integration
from sim2real.simulators.mujoco_integrators import (
    Activations,
    Coordinates,
    Scheme,
    activations,
    coordinates,
    engine_step,
    tangent,
)
from sim2real.simulators.mujoco_kinematics import Poses, poses
from sim2real.simulators.mujoco_products import Cotangents
from sim2real.simulators.mujoco_structure import Structure, check_fields, nominal_fields, structure

FieldMap = Callable[[Params], Mapping[str, Tensor]]
"""theta -> the fields it reaches, `[1 or B, *shape]`, always under the same names"""
State = tuple[Tensor, Tensor, Tensor]
"""q `[B, nq]`, v `[B, nv]`, act `[B, na]`"""


@dataclass(frozen=True, eq=False)
class MujocoSystem:
    """One compiled model with its derivatives; made by `mujoco_system`."""

    structure: Structure
    names: tuple[str, ...]
    """the fields that theta reaches"""
    scheme: Scheme
    kind: Kind
    program: Program
    coordinates: Coordinates
    activations: Activations
    dynprm: Tensor
    """`[1, nu, 10]` the model's own"""
    roll: Roll
    """many engine steps at once, without derivatives"""
    check: Callable[[Tensor], None]
    """warns of solver residuals, or raises"""
    cotangents: Cotangents | None = None
    """the program's reverse products, many for each state, where kernels have them"""


def mujoco_system(
    model: mujoco.MjModel | Structure,
    names: tuple[str, ...] = (),
    *,
    engine: Engine = "mujoco",
    backend: Backend = "auto",
    threads: int = 1,
    tolerance: float = 1e-9,
    strict: bool = False,
) -> MujocoSystem:
    """Read a compiled model; `names` are the fields (as in MjModel) that will be given with each step.

    Raises `MujocoUnsupportedError` for what cannot be differentiated. Other arguments: see `mujoco_model`.
    """
    tables = model if isinstance(model, Structure) else structure(model)
    check_fields(tables, names)
    scheme, kind = integration(tables.model)
    if kind == "eulerdamp" and "dof_damping" not in names and not tables.model.dof_damping.any():
        kind = "explicit"  # no damping anywhere: the implicit step is the explicit one
    program = acceleration_program(
        tables, names, kind, engine=engine, backend=backend, threads=threads, tolerance=tolerance, strict=strict
    )
    return MujocoSystem(
        structure=tables,
        names=names,
        scheme=scheme,
        kind=kind,
        program=program,
        coordinates=coordinates(tables.model),
        activations=activations(tables.model),
        dynprm=nominal_fields(tables)["actuator_dynprm"],
        roll=engine_rollout(tables.model, names, threads=threads) if engine == "mujoco" else _step_by_step,
        check=partial(check_residual, tolerance=tolerance, strict=strict),
        cotangents=cotangent_kernels(tables, names, kind, backend),
    )


def _step_by_step(
    state: State, controls: Tensor, force: Tensor, fields: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The `Roll` of an engine that has none."""
    return None


def advance(system: MujocoSystem, fields: Mapping[str, Tensor], state: State, ctrl: Tensor, force: Tensor) -> State:
    """The state one engine step later; ctrl `[B, nu]`, generalised force `[B, nv]`, all float64 on the CPU."""
    given = tuple(fields[name] for name in system.names)

    def acceleration(q: Tensor, v: Tensor, act: Tensor, control: Tensor) -> Tensor:
        base, d = tangent(system.coordinates, q)
        return evaluate(system.program, base, d, v, act, control, force, *given)[0]

    dynprm = fields.get("actuator_dynprm", system.dynprm)
    return engine_step(system.coordinates, system.activations, acceleration, state, ctrl, dynprm, scheme=system.scheme)


def body_poses(system: MujocoSystem, q: Tensor) -> Poses:
    """Positions and rotations of all bodies at q `[B, nq]`, differentiable to second order: for rewards and signals."""
    base, d = tangent(system.coordinates, q)
    return poses(system.structure, base, d)


def split_state(model: mujoco.MjModel, state: Tensor) -> State:
    """q, v, act of a state `[..., nq + nv + na (+ more)]`."""
    q, v, act = torch.split(state[..., : model.nq + model.nv + model.na], [model.nq, model.nv, model.na], -1)
    return q, v, act
