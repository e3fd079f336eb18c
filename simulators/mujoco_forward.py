"""MuJoCo's acceleration of many environments at once, in C on a pool of threads.

    value: (q, v, act, ctrl, force, fields) -> w, a, residual

a is the solver's acceleration, w the one that advances velocity (v' = v + h w): a itself in the explicit schemes, else
w = (v' - v) / h of the engine's own implicit step. The residual

    |M a - smooth forces - constraint forces|_max / max(|M a|, |smooth|, |constraint|)_max

says how well the solver converged, per environment; it comes from what the engine leaves and costs no solve.

The engine keeps the inertia of a body as principal moments in a turned frame; the field `body_inertia [nbody, 6]`
here is the matrix (xx, yy, zz, xy, xz, yz) in the body's axes, which is smooth, and is diagonalised on the way in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_messages import engine_messages

Kind = Literal["explicit", "eulerdamp", "implicitfast", "implicit"]
Array = NDArray[np.float64]
Accelerate = Callable[
    [tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]
]
"""(q `[C, nq]`, v, act, ctrl, force), fields `[C or 1, ...]` -> w `[C, nv]`, a `[C, nv]`, residual `[C]`"""

Roll = Callable[[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor] | None]
"""(q, v, act), controls `[B, N, nu]`, force `[B, N, nv]`, fields -> states `[B, N, nq + nv + na]`, residual `[B, N]`"""

_KEPT = 4  # pools of different sizes kept alive: a rollout and its derivatives use two or three
_ENGINE_NAME = {"gravity": "opt.gravity"}
_FOLLOWING = {"body_inertia": "body_iquat", "body_mass": "body_subtreemass"}  # written along with a field


class SimulationDivergedError(ArithmeticError):
    """The engine's acceleration of some environments is not finite."""


@dataclass(frozen=True, eq=False)
class _Pool:
    """Buffers of one batch of the engine."""

    batch: Any
    inputs: tuple[Array, ...]
    fields: dict[str, Array]
    written: dict[str, Array]
    """what the fields hold, in the shapes they were given in: nothing is written twice"""
    qvel: Array
    outputs: tuple[Array, ...]
    """qacc, qfrc_smooth, qfrc_constraint, M"""
    square: Array
    """`[nsim, nv nv]` scratch: M, zero where it has no entry"""


def integration(model: Any) -> tuple[Literal["euler", "rk4"], Kind]:
    """Scheme and kind of acceleration of a model's integrator; raises `ValueError` for one without derivatives."""
    names = mujoco.mjtIntegrator
    chosen = names(int(model.opt.integrator))
    if chosen == names.mjINT_RK4:
        return "rk4", "explicit"
    if chosen == names.mjINT_EULER:
        off = int(mujoco.mjtDisableBit.mjDSBL_EULERDAMP) | int(mujoco.mjtDisableBit.mjDSBL_DAMPER)
        return "euler", "explicit" if model.opt.disableflags & off else "eulerdamp"
    if chosen == names.mjINT_IMPLICITFAST:
        return "euler", "implicitfast"
    if chosen == names.mjINT_IMPLICIT:
        return "euler", "implicit"
    raise ValueError(f"integrator {chosen.name} has no derivatives here; use Euler, implicitfast, implicit or RK4")


def accelerate(model: Any, names: tuple[str, ...], kind: Kind, *, threads: int = 1) -> Accelerate:
    """The function from states, controls and the fields `names` to accelerations of a prepared model.

    `threads`: 0 uses all processors. Raises `SimulationDivergedError` where a state or an acceleration is not finite.
    """
    pool_of, lock, table = _pools(model, names, threads), threading.Lock(), _tables(model)

    def value(
        state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        arrays = [x.numpy() for x in state]
        given = {name: fields[name].numpy() for name in names}
        with lock:  # a batch of the engine belongs to one call at a time
            pool = _loaded(pool_of, table, arrays, given)
            with engine_messages():
                if kind == "explicit":
                    pool.batch.forward()
                else:
                    pool.batch.step()
            a, smooth, constraint, mass = pool.outputs
            w = a.copy() if kind == "explicit" else (pool.qvel - arrays[1]) / model.opt.timestep
            residual = _residual(table, pool.square, mass, a, smooth, constraint)
            found = w, a.copy()
        _check_finite(residual)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1]), torch.from_numpy(residual)

    return value


def engine_rollout(model: Any, names: tuple[str, ...], *, threads: int = 1) -> Roll:
    """The function that steps a prepared model N times in one call of the engine, without derivatives.

    None where the engine complained on the way (it then holds the state): step by step, the complaint has a name.
    Residuals are those of whole steps, of RK4 those of the first stage, which costs a quarter of a step more.
    """
    rk4 = integration(model)[0] == "rk4"
    first_stage = accelerate(model, names, "explicit", threads=threads) if rk4 else None
    pool_of, lock, table = _pools(model, names, threads), threading.Lock(), _tables(model)
    inputs = int(mujoco.mjtState.mjSTATE_CTRL) | int(mujoco.mjtState.mjSTATE_QFRC_APPLIED)
    record = ("qpos", "qvel", "act", "qacc", "qfrc_smooth", "qfrc_constraint", "M")

    def roll(
        state: tuple[Tensor, Tensor, Tensor], controls: Tensor, force: Tensor, fields: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        given = {name: fields[name].numpy() for name in names}
        arrays = [x.numpy() for x in (*state, controls[:, 0], force[:, 0])]
        control = torch.cat([controls, force], -1).numpy()
        with lock:
            pool = _loaded(pool_of, table, arrays, given)
            if pool.batch.nsim != len(control):
                control = np.broadcast_to(control, (pool.batch.nsim, *control.shape[1:]))
            with engine_messages() as complaints:
                found = pool.batch.rollout(control.shape[1], control, control_spec=inputs, record=record)
        if complaints:
            return None
        states = torch.from_numpy(np.concatenate([found[name] for name in record[:3]], -1))
        if first_stage is not None:
            before = [torch.cat(state, -1).expand(len(states), -1), *states.unbind(1)]
            parts = [x.split([x.shape[1] for x in state], -1) for x in before[: states.shape[1]]]
            steps = zip(parts, controls.unbind(1), force.unbind(1), strict=True)
            return states, torch.stack([first_stage((*part, u, f), fields)[2] for part, u, f in steps], 1)
        a, smooth, constraint, mass = (found[name].reshape(-1, found[name].shape[-1]) for name in record[3:])
        residual = _residual(table, np.zeros((len(a), model.nv**2)), mass, a, smooth, constraint)
        return states, torch.from_numpy(residual.reshape(states.shape[:2]))

    return roll


def _pools(model: Any, names: tuple[str, ...], threads: int) -> Callable[[int], _Pool]:
    """The pool of a number of environments; a few are kept."""
    kept: dict[int, _Pool] = {}

    def pool_of(count: int) -> _Pool:
        pool = kept.pop(count, None) or _pool(model, names, count, threads)
        kept[count] = pool  # last used, last in order
        if len(kept) > _KEPT:
            kept.pop(next(iter(kept)))
        return pool

    return pool_of


def _loaded(pool_of: Callable[[int], _Pool], table: _Tables, arrays: list[Array], fields: Mapping[str, Array]) -> _Pool:
    """The pool that holds these states and fields."""
    pool = pool_of(max(len(x) for x in (*arrays, *fields.values())))
    for target, source in zip(pool.inputs, arrays, strict=True):
        target[:] = source
    for name, array in fields.items():
        _write(pool, table, name, array)
    return pool


def _pool(model: Any, names: tuple[str, ...], count: int, threads: int) -> _Pool:
    batch = Batch(model, count, threads)
    inputs = tuple(batch.bind(name) for name in ("qpos", "qvel", "act", "ctrl", "qfrc_applied"))
    fields = {}
    for name in names:
        fields[name] = batch.expand(_ENGINE_NAME.get(name, name))
        if name in _FOLLOWING:
            fields[_FOLLOWING[name]] = batch.expand(_FOLLOWING[name])
    outputs = tuple(batch.bind(name) for name in ("qacc", "qfrc_smooth", "qfrc_constraint", "M"))
    return _Pool(batch, inputs, fields, {}, inputs[1], outputs, np.zeros((count, model.nv**2)))


def _write(pool: _Pool, table: _Tables, name: str, value: Array) -> None:
    held = pool.written.get(name)
    if held is not None and held.shape == value.shape and np.array_equal(held, value):
        return
    pool.written[name] = value.copy()
    if name == "body_inertia":
        pool.fields[name][:], pool.fields["body_iquat"][:] = principal_axes(value)
        return
    pool.fields[name][:] = value
    if name == "body_mass":
        pool.fields["body_subtreemass"][:] = value @ table.descendants.T


def write_fields(model: mujoco.MjModel, fields: Mapping[str, Array]) -> None:
    """Write fields of one environment into a model of the caller's own, as the pool holds them."""
    for name, value in fields.items():
        if name == "gravity":
            model.opt.gravity[:] = value
        elif name == "body_inertia":
            model.body_inertia[:], model.body_iquat[:] = principal_axes(value)
        else:
            getattr(model, name)[:] = value
        if name == "body_mass":
            model.body_subtreemass[:] = descendants(model) @ value


def principal_axes(inertia: Array) -> tuple[Array, Array]:
    """Principal moments `[..., 3]` and the quaternion `[..., 4]` of their frame, of (xx, yy, zz, xy, xz, yz)."""
    xx, yy, zz, xy, xz, yz = np.moveaxis(inertia, -1, 0)
    matrix = np.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).reshape(*inertia.shape[:-1], 3, 3)
    moments, frame = np.linalg.eigh(matrix)
    frame = frame * np.sign(np.linalg.det(frame))[..., None, None]  # right-handed
    return moments, _quaternion(frame)


def _quaternion(frame: Array) -> Array:
    """Unit quaternions `[..., 4]` of rotations `[..., 3, 3]`: the largest of four equivalent forms."""
    r = np.moveaxis(frame.reshape(*frame.shape[:-2], 9), -1, 0).reshape(3, 3, *frame.shape[:-2])
    trace = r[0, 0] + r[1, 1] + r[2, 2]
    x, y, z = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    xy, xz, yz = r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1]
    squares = [1 + trace, *(1 - trace + 2 * r[i, i] for i in range(3))]
    forms = np.stack(
        [
            np.stack([squares[0], x, y, z], -1),
            np.stack([x, squares[1], xy, xz], -1),
            np.stack([y, xy, squares[2], yz], -1),
            np.stack([z, xz, yz, squares[3]], -1),
        ],
        -2,
    )
    best = np.argmax(np.stack(squares, -1), -1)[..., None, None]
    chosen = np.take_along_axis(forms, np.broadcast_to(best, (*best.shape[:-2], 1, 4)), -2)[..., 0, :]
    return chosen / np.linalg.norm(chosen, axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class _Tables:
    entry: NDArray[np.intp]
    """where the entries of the mass matrix lie in the flat square one"""
    place: NDArray[np.intp]
    """and in the engine's packed lower triangle"""
    descendants: Array


def _tables(model: Any) -> _Tables:
    entry, place = [], []
    for i in range(model.nv):
        for k in range(int(model.M_rowadr[i]), int(model.M_rowadr[i] + model.M_rownnz[i])):
            j = int(model.M_colind[k])
            entry += [i * model.nv + j] if i == j else [i * model.nv + j, j * model.nv + i]
            place += [k] if i == j else [k, k]
    return _Tables(np.array(entry, dtype=np.intp), np.array(place, dtype=np.intp), descendants(model))


def descendants(model: Any) -> Array:
    """`[nbody, nbody]` 1 where the column's body hangs on the row's, itself included."""
    below = np.eye(model.nbody)
    for body in range(model.nbody - 1, 0, -1):
        below[int(model.body_parentid[body])] += below[body]
    return below


def _residual(table: _Tables, square: Array, mass: Array, a: Array, smooth: Array, constraint: Array) -> Array:
    """Largest entry of M a - forces over the largest force, per environment; `square` is scratch for M."""
    count, nv = a.shape
    if not nv:
        return np.zeros(count)
    square[:, table.entry] = mass[:, table.place]
    inertial = np.matmul(square.reshape(count, nv, nv), a[..., None])[..., 0]
    scale = np.maximum(np.maximum(abs(smooth), abs(constraint)), abs(inertial)).max(-1)
    return abs(inertial - smooth - constraint).max(-1) / np.where(scale > 0.0, scale, 1.0)


def _check_finite(residual: Array) -> None:
    """A state, force or acceleration that is not finite leaves no finite residual."""
    if not len(residual) or np.isfinite(residual.max()):
        return
    rows = np.flatnonzero(~np.isfinite(residual)).tolist()
    raise SimulationDivergedError(
        f"the acceleration of {len(rows)} of {len(residual)} environments is not finite (first rows: {rows[:8]}); "
        "bound the actions, shorten the time step, or end the episode (terminal) before the state grows"
    )
