"""MuJoCo's acceleration from mujoco_warp, MuJoCo's port to Warp kernels in float32, on a GPU where there is one.

    value: (q, v, act, ctrl, force, fields) -> w, a, residual        as `mujoco_forward.accelerate`

mujoco_warp detects contacts and minimises the constrained Gauss cost in float32. From there Newton steps in float64 on
the residual program of `mujoco_program`, a <- a - H^-1 r, take a to the solution that its derivatives are derivatives
of (the implicit function theorem holds at r = 0 only); the contacts of the program are those of MuJoCo's own collider.
w, which advances velocity, solves (M - h D) w = M a with the damping matrix D of the integrator.
Reference: mujoco_warp (Google DeepMind and NVIDIA, Newton project); Todorov, ICRA 2014.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forward import (
    Accelerate,
    Kind,
    SimulationDivergedError,
    descendants,
    principal_axes,
)
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_program import Active, freeze, hessian, residual_power, solver_residual
from sim2real.simulators.mujoco_structure import Structure, nominal_fields

_CORRECTIONS = 6
"""Newton steps at most: one from float32 where no constraint changes its zone, as many more as zones change"""
_ENOUGH = 1e-12
_ROWS = (64, 64)
"""contacts and constraints per environment to begin with; they grow on demand"""
_STATES = ("qpos", "qvel", "act", "ctrl", "qfrc_applied")


def warp_acceleration(structure: Structure, names: tuple[str, ...], kind: Kind) -> Accelerate:
    """The function from states, controls and the fields `names` to accelerations, as `mujoco_forward.accelerate`.

    Runs on Warp's default device: the first GPU, else the processor. Raises `ModuleNotFoundError` without mujoco_warp,
    `SimulationDivergedError` where an acceleration is not finite.
    """
    engine = _engine(structure.model, names)
    nominal = nominal_fields(structure)

    def value(
        state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = max(len(x) for x in (*state, *fields.values()))
        q, v, act, ctrl, force = (x.detach().expand(count, -1) for x in state)
        given = {name: fields[name].detach() for name in names}
        start = engine([q, v, act, ctrl, force], given)
        at = State(q, torch.zeros_like(v), v, act, ctrl, force)
        known = {**nominal, **given}
        active = freeze(structure, at, known, differentiated=())
        a, residual = _corrected(structure, at, start, known, active)
        return _advancing(structure, at, a, known, active, kind), a, residual

    return value


def _corrected(
    structure: Structure, at: State, a: Tensor, fields: Mapping[str, Tensor], active: Active
) -> tuple[Tensor, Tensor]:
    """The best a of a few Newton steps, per environment, and its residual."""
    known = dict(fields)
    best, least = a, solver_residual(structure, at, a, known, active)
    for _ in range(_CORRECTIONS):
        if bool((least <= _ENOUGH).all()):
            break
        factor = torch.linalg.cholesky(hessian(structure, at, a, known, active)[1])
        a = a - torch.cholesky_solve(_residual_vector(structure, at, a, known, active)[..., None], factor)[..., 0]
        found = solver_residual(structure, at, a, known, active)
        better = found < least
        best, least = torch.where(better[:, None], a, best), torch.where(better, found, least)
    return best, least


def _residual_vector(structure: Structure, at: State, a: Tensor, fields: dict[str, Tensor], active: Active) -> Tensor:
    lam = torch.zeros_like(a).requires_grad_()
    with torch.enable_grad():
        (r,) = torch.autograd.grad(residual_power(structure, at, a, lam, fields, active).sum(), lam)
    return r


def _advancing(
    structure: Structure, at: State, a: Tensor, fields: Mapping[str, Tensor], active: Active, kind: Kind
) -> Tensor:
    if kind == "explicit":
        return a.clone()
    mass, _, damping = hessian(structure, at, a, dict(fields), active, kind)
    operator = mass - structure.model.opt.timestep * damping if damping is not None else mass
    return torch.linalg.solve(operator, mass @ a[..., None])[..., 0]  # a value: nothing differentiates it


def _engine(model: mujoco.MjModel, names: tuple[str, ...]) -> Callable[[list[Tensor], Mapping[str, Tensor]], Tensor]:
    """States and fields -> acceleration of the engine, in float64 again but of the accuracy of float32."""
    if find_spec("mujoco_warp") is None:
        raise ModuleNotFoundError("engine='mujoco_warp' needs the package mujoco-warp; install sim2real[mujoco-warp]")
    import mujoco_warp
    import warp as wp

    place = wp.get_device()
    with wp.ScopedDevice(place):
        port = mujoco_warp.put_model(_accepted(model))
        port.opt.warn_overflow = 0  # read from its data instead of printed
    data: dict[tuple[int, ...], Any] = {}
    rows = list(_ROWS)

    def run(count: int, state: list[Tensor]) -> Any:
        key = (count, *rows)
        if key not in data:
            data.clear()  # one batch size at a time is kept
            data[key] = mujoco_warp.make_data(model, nworld=count, nconmax=rows[0], njmax=rows[1])
        held = data[key]
        for name, value in zip(_STATES, state, strict=True):
            if value.shape[1]:
                getattr(held, name).assign(value.to(torch.float32).cpu().numpy())
        held.overflow.zero_()
        mujoco_warp.forward(port, held)
        return held

    def accelerations(state: list[Tensor], fields: Mapping[str, Tensor]) -> Tensor:
        with wp.ScopedDevice(place):
            for name, value in fields.items():
                _write(wp, port, model, name, value.cpu().numpy())
            while True:
                held = run(len(state[0]), state)
                full = _full(mujoco_warp, held, rows)
                if not any(full):
                    break
                rows[:] = [2 * size if grow else size for size, grow in zip(rows, full, strict=True)]
            a = torch.from_numpy(held.qacc.numpy()).to(torch.float64)
        if not bool(a.isfinite().all()):
            bad = (~a.isfinite().all(-1)).nonzero().flatten().tolist()
            raise SimulationDivergedError(
                f"the acceleration of {len(bad)} of {len(a)} environments is not finite (first rows: {bad[:8]}); "
                "bound the actions, shorten the time step, or end the episode (terminal) before the state grows"
            )
        return a

    return accelerations


def _accepted(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy without the flags that concern only the C engine, which the port refuses."""
    out = copy.copy(model)
    out.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE) & ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    return out


def _full(mujoco_warp: Any, held: Any, rows: list[int]) -> tuple[bool, bool]:
    """Whether the buffers of contacts and of constraints were too short for the last call."""
    kinds, met = mujoco_warp.OverflowType, int(np.bitwise_or.reduce(held.overflow.numpy()))
    contacts = max(int(held.nacon.numpy()[0]), int(held.ncollision.numpy()[0]))
    return (
        contacts > rows[0] * held.nworld or bool(met & int(kinds.CCD)),
        int(held.nefc.numpy().max()) > rows[1] or bool(met & int(kinds.NJMAX_NNZ)),
    )


def _write(wp: Any, port: Any, model: mujoco.MjModel, name: str, value: np.ndarray[Any, Any]) -> None:
    """A field `[C or 1, ...]` of the port's model, in the port's element types."""
    owner, parts = (port.opt if name == "gravity" else port), {name: value}
    if name == "body_inertia":
        moments, frames = principal_axes(value)
        parts = {"body_inertia": moments, "body_iquat": frames}
    elif name == "body_mass":
        parts["body_subtreemass"] = value @ descendants(model).T
    for field, array in parts.items():
        element = getattr(owner, field).dtype
        setattr(owner, field, wp.array(np.ascontiguousarray(array, dtype=np.float32), dtype=element))
