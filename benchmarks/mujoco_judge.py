"""Library against reference: errors of JVP and VJP of one MuJoCo step, state by state and input by input.

For each input x (tangent position, velocity, activation, control, every physical field) with reference J = dy/dx,

    error of the VJP   |G - J' g| / |J' g|,         G the library's gradient for the random cotangent g,
    error of the JVP   |T - J t| / |J t|,           T its tangent for the random direction t,

the larger of the two; the JVP by fields goes along all of them at once. Fields are measured in their own values.
Denominators are at least `FLOOR` times their root mean square over the states: an input that hardly acts in one state
is judged on the scale on which it acts in the others; and at least `SMALLEST`. The library's outputs are
coordinates (qpos+, v+, act+); cotangents of quaternions are pulled to the tangent space, and so are their tangents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mujoco_reference import JOINT, Array, Columns, State, World, after, by_field, by_state, residual, value
from sim2real.simulators.mujoco_acceleration import Backend
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_integrators import add_tangent
from sim2real.simulators.mujoco_structure import FIELDS, check_fields, structure
from sim2real.simulators.mujoco_system import advance, mujoco_system

FLOOR = 1e-2
SMALLEST = 1e-6
"""m/s or rad/s per unit of the input"""
RESIDUAL = 1e-9
"""relative; states whose solver left more are gated out"""
KINDS = ("q", "v", "act", "ctrl")
Entries = dict[str, list[tuple[int, ...]]]
Step = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


SURE = 1e-6
"""relative uncertainty of the reference above which it judges nothing"""


@dataclass(frozen=True, eq=False)
class Judged:
    """Errors of N states; nan where the active set changes within the reference's differences."""

    errors: dict[str, NDArray[np.float64]]
    """per input `[N]`"""
    uncertain: dict[str, NDArray[np.float64]]
    """per input `[N]`, relative uncertainty of the reference itself"""
    residual: NDArray[np.float64]
    value: NDArray[np.float64]
    """`[N]`, largest difference of the step itself"""
    extra: dict[str, float] = field(default_factory=dict)


def library_step(model: mujoco.MjModel, names: tuple[str, ...], backend: Backend = "auto") -> Step:
    """The library's step from (q, v, act, ctrl and the fields `names`) `[B, ...]` to (qpos, v, act)."""
    system = mujoco_system(model, names, backend=backend)

    def step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        at = add_tangent(system.coordinates, inputs["qpos"], inputs["q"])
        state = (at, inputs["v"], inputs["act"])
        return advance(system, inputs, state, inputs["ctrl"], torch.zeros_like(inputs["v"]))

    return step


def batch(model: mujoco.MjModel, states: Sequence[State], names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of `library_step`: every state and, per state, every field."""
    rows = lambda part: torch.tensor(np.stack([getattr(s, part) for s in states]), dtype=torch.float64)
    inputs = {"qpos": rows("qpos"), "v": rows("qvel"), "act": rows("act"), "ctrl": rows("ctrl")}
    inputs["q"] = torch.zeros(len(states), model.nv, dtype=torch.float64)
    for name in names:
        nominal = torch.tensor(value(model, name), dtype=torch.float64)
        inputs[name] = nominal.expand(len(states), *nominal.shape).contiguous()
    return inputs


def entries(model: mujoco.MjModel, names: Sequence[str], count: int, rng: np.random.Generator) -> Entries:
    """Up to `count` random entries of every field the model has, without the world's and those that sit on a kink."""
    found: Entries = {}
    for name in names:
        nominal = value(model, name)
        rows = [index for index in np.ndindex(*nominal.shape) if judged(model, name, index, nominal)]
        chosen = rng.permutation(len(rows))[:count]
        if len(chosen):
            found[name] = [tuple(int(i) for i in rows[k]) for k in sorted(chosen)]
    return found


def judged(model: mujoco.MjModel, name: str, index: tuple[int, ...], nominal: Array) -> bool:
    """Whether a derivative by this entry exists and acts."""
    if name.startswith("body_") and index[0] == 0:
        return False
    if "solref" in name:  # at two time steps the engine clips it; all zero: not given
        row = nominal[index[:-1]]
        return bool(row.any()) and not abs(row[0] - 2 * model.opt.timestep) < 1e-9
    if name == "dof_damping" and not nominal.any():  # implicit damping sets in with the first
        return bool(model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER)
    if "frictionloss" in name or "invweight0" in name:  # without friction there is no row
        return bool(nominal[index] != 0)
    return True


def fields_of(model: mujoco.MjModel) -> tuple[str, ...]:
    """Physical fields of which the model has entries, and which the library does not refuse for it."""
    tables = structure(model)
    found = []
    for name in FIELDS:
        try:
            check_fields(tables, (name,))
        except MujocoUnsupportedError:
            continue
        if value(model, name).size:
            found.append(name)
    return tuple(found)


def positions_to_tangent(model: mujoco.MjModel, qpos: Tensor) -> Tensor:
    """d qpos / d tangent at `qpos [B, nq]`, `[B, nq, nv]`; of a unit quaternion q it is q (0, u) / 2."""
    out = torch.zeros(len(qpos), model.nq, model.nv, dtype=qpos.dtype)
    for kind, at, dof in zip(model.jnt_type, model.jnt_qposadr, model.jnt_dofadr, strict=True):
        turning = kind in (JOINT.mjJNT_FREE.value, JOINT.mjJNT_BALL.value)
        if kind == JOINT.mjJNT_FREE.value:
            out[:, at : at + 3, dof : dof + 3] = torch.eye(3, dtype=qpos.dtype)
            at, dof = at + 3, dof + 3
        if not turning:
            out[:, at, dof] = 1.0
            continue
        w, x, y, z = qpos[:, at : at + 4].unbind(-1)
        columns = ((-x, w, z, -y), (-y, -z, w, x), (-z, y, -x, w))
        for k, column in enumerate(columns):
            out[:, at : at + 4, dof + k] = torch.stack(column, -1) / 2
    return out


def judge(w: World, states: Sequence[State], picked: Entries, *, seed: int = 0, backend: Backend = "auto") -> Judged:
    """Errors of the library's VJP and JVP at every state."""
    m, names = w.model, tuple(picked)
    inputs, step = batch(m, states, names), library_step(m, names, backend)
    generator = torch.Generator().manual_seed(seed)
    qpos, v, act = (y.detach() for y in step(inputs))
    value_error = engine_difference(w, states, (qpos, v, act))
    to_tangent = positions_to_tangent(m, qpos)  # at the new positions
    back = torch.linalg.pinv(to_tangent)
    cotangent = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (qpos, v, act)]
    g = torch.cat([(to_tangent.mT @ cotangent[0][:, :, None])[:, :, 0], *cotangent[1:]], 1).numpy()
    wrt = [kind for kind in KINDS if inputs[kind].numel()] + list(names)
    grads = gradients(step, inputs, wrt, cotangent)
    reference = [{kind: columns(w, state, kind, picked) for kind in wrt} for state in states]
    errors, uncertain = {}, {}
    scales = {kind: scale(m, kind, picked) for kind in wrt}
    directions, moves = {}, np.zeros((len(states), 2 * m.nv + m.na))
    for kind in wrt:
        J = np.stack([row[kind].matrix for row in reference]) * scales[kind]
        index = picked.get(kind) or [(i,) for i in range(J.shape[2])]
        expected = np.einsum("boi,bo->bi", J, g)
        found = np.stack([grads[kind][(slice(None), *i)].numpy() for i in index], 1) * scales[kind]
        errors[kind] = relative(found - expected, expected)
        t = torch.randn(len(states), len(index), generator=generator, dtype=torch.float64)
        directions[kind] = spread_out(inputs[kind], index, t * torch.from_numpy(scales[kind]))
        moved = np.einsum("boi,bi->bo", J, t.numpy())
        if kind in KINDS:
            pushed = push(step, inputs, {kind: directions[kind]}, back)
            errors[kind] = np.maximum(errors[kind], relative(pushed - moved, moved))
        else:
            moves = moves + moved
        errors[kind] = np.where([row[kind].switched.any() for row in reference], np.nan, errors[kind])
        spread = np.stack([row[kind].error for row in reference]) * scales[kind]
        uncertain[kind] = relative(spread, np.linalg.norm(J, axis=1))
    if names:
        pushed = push(step, inputs, {name: directions[name] for name in names}, back)
        kink = np.isnan(np.stack([errors[name] for name in names])).any(0)
        errors["fields"] = np.where(kink, np.nan, relative(pushed - moves, moves))
    return Judged(errors, uncertain, np.array([residual(w, state) for state in states]), value_error)


def largest(found: Judged) -> float:
    """Largest error where the solver converged and the reference is sure of itself."""
    good = found.residual <= RESIDUAL
    worst = 0.0
    for kind, errors in found.errors.items():
        sure = found.uncertain[kind] <= SURE if kind in found.uncertain else np.ones_like(good)
        worst = max(worst, float(np.nanmax(errors[good & sure], initial=0.0)))
    return worst


def unsure(found: Judged) -> float:
    """Share of states and inputs of which the reference is not sure."""
    return float(np.mean([spread > SURE for spread in found.uncertain.values()]))


def scale(model: mujoco.MjModel, kind: str, picked: Entries) -> Array:
    """What each entry is measured in: fields in their own value, or a tenth of the field's largest, or 1."""
    if kind in KINDS:
        return np.ones(1)
    nominal = value(model, kind)
    largest = 0.1 * float(np.abs(nominal).max())
    return np.array([max(abs(float(nominal[index])), largest) or 1.0 for index in picked[kind]])


def engine_difference(w: World, states: Sequence[State], found: tuple[Tensor, Tensor, Tensor]) -> Array:
    """Largest difference of the library's step from the engine's, per state."""
    rows = []
    for i, state in enumerate(states):
        end = after(w, state)
        parts = ((end.qpos, found[0]), (end.qvel, found[1]), (end.act, found[2]))
        rows.append(max(float(np.abs(a - b[i].numpy()).max(initial=0.0)) for a, b in parts))
    return np.array(rows)


def columns(w: World, state: State, kind: str, picked: Entries) -> Columns:
    return by_state(w, state, kind) if kind in KINDS else by_field(w, state, kind, picked[kind])


def gradients(
    step: Step, inputs: Mapping[str, Tensor], wrt: Sequence[str], cotangent: Sequence[Tensor]
) -> dict[str, Tensor]:
    """VJP by every input in `wrt`."""
    leaves = {kind: inputs[kind].clone().requires_grad_() for kind in wrt}
    outputs = step({**inputs, **leaves})
    total = sum((y * c).sum() for y, c in zip(outputs, cotangent, strict=True))
    found = torch.autograd.grad(total, [leaves[kind] for kind in wrt], allow_unused=True)  # type: ignore[arg-type]
    return {k: torch.zeros_like(leaves[k]) if x is None else x for k, x in zip(wrt, found, strict=True)}


def spread_out(like: Tensor, index: Sequence[tuple[int, ...]], t: Tensor) -> Tensor:
    """The direction whose entries at `index` are t `[B, n]`, 0 elsewhere."""
    direction = torch.zeros_like(like)
    for k, i in enumerate(index):
        direction[(slice(None), *i)] = t[:, k]
    return direction


def push(step: Step, inputs: Mapping[str, Tensor], directions: Mapping[str, Tensor], back: Tensor) -> Array:
    """JVP along several inputs at once, positions in the tangent space."""
    kinds = list(directions)
    along = tuple(directions[kind] for kind in kinds)
    moved = torch.func.jvp(
        lambda *x: step({**inputs, **dict(zip(kinds, x, strict=True))}), tuple(inputs[kind] for kind in kinds), along
    )[1]
    out: Array = torch.cat([(back @ moved[0][:, :, None])[:, :, 0], *moved[1:]], 1).numpy()
    return out


def relative(difference: Array, expected: Array) -> Array:
    """Norms over the last axis, floored as the module says."""
    size = np.linalg.norm(expected, axis=-1)
    root = np.sqrt(np.mean(size**2)) if len(size) else 0.0
    return np.linalg.norm(difference, axis=-1) / np.maximum(size, max(FLOOR * root, SMALLEST))
