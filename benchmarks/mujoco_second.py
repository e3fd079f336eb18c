"""Products with the Hessian of one MuJoCo step against Richardson differences of the library's own VJP.

    F(x) = <c, step(x)>,      H t = d/de grad F(x + e t)   at e = 0

x joins position (as a tangent at the state), velocity, activation, control and entries of physical fields; t moves all
of them at once. States whose active set changes on the way are left out, by the engine's own account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.mujoco_judge import KINDS, SMALLEST, Entries, Step, batch, gradients, library_step
from benchmarks.mujoco_reference import Array, State, World, edit, marked, moved, value
from sim2real.simulators.mujoco_acceleration import Backend

STEPS = (1e-5, 1e-6, 1e-4)
PART = 1e-2
"""of the gradient: products smaller than that are judged on its scale"""


@dataclass(frozen=True, eq=False)
class SecondOrder:
    """Errors of N states by input; nan where the active set changes."""

    errors: dict[str, NDArray[np.float64]]
    uncertain: dict[str, NDArray[np.float64]]


def judge_second(
    w: World, states: Sequence[State], picked: Entries, *, seed: int = 0, backend: Backend = "auto"
) -> SecondOrder:
    """Errors of products with the Hessian; raises what the library raises where it has none."""
    names = tuple(picked)
    inputs, step = batch(w.model, states, names), library_step(w.model, names, backend)
    generator = torch.Generator().manual_seed(seed)
    wrt = [kind for kind in KINDS if inputs[kind].numel()] + list(names)
    direction = directions(inputs, wrt, picked, generator)
    sizes = [y.shape for y in step(inputs)]
    cotangent = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    grads = gradients(step, inputs, wrt, cotangent)
    found = product(step, inputs, direction, cotangent)
    tried = [slopes(step, inputs, direction, cotangent, h) for h in STEPS]
    errors, uncertain = {}, {}
    for kind in wrt:
        rows = len(states)
        spread = np.stack(
            [np.linalg.norm((fine[kind] - coarse[kind]).reshape(rows, -1), axis=1) for fine, coarse in tried]
        )
        best = np.stack([fine[kind].reshape(rows, -1) for fine, _ in tried])[spread.argmin(0), np.arange(rows)]
        least = PART * np.linalg.norm(grads[kind].reshape(rows, -1).numpy(), axis=1)
        size = np.maximum(np.linalg.norm(best, axis=1), np.maximum(least, SMALLEST))
        off = found[kind].reshape(rows, -1).numpy() - best
        errors[kind] = np.linalg.norm(off, axis=1) / size
        uncertain[kind] = spread.min(0) / size
    changed = np.array([switches(w, state, direction, i) for i, state in enumerate(states)])
    return SecondOrder({kind: np.where(changed, np.nan, e) for kind, e in errors.items()}, uncertain)


def directions(
    inputs: Mapping[str, Tensor], wrt: Sequence[str], picked: Entries, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random; a field moves by a tenth of its value."""
    out = {}
    for kind in wrt:
        draw = torch.randn(inputs[kind].shape, generator=generator, dtype=torch.float64)
        if kind not in KINDS:
            mask = torch.zeros_like(draw)
            for index in picked[kind]:
                mask[(slice(None), *index)] = 1
            draw = 0.1 * draw * inputs[kind].abs() * mask
        out[kind] = draw
    return out


def product(
    step: Step, inputs: Mapping[str, Tensor], direction: dict[str, Tensor], cotangent: Sequence[Tensor]
) -> dict[str, Tensor]:
    """H t, forward over reverse."""

    def total(leaves: dict[str, Tensor]) -> Tensor:
        terms = [(y * c).sum() for y, c in zip(step({**inputs, **leaves}), cotangent, strict=True)]
        return torch.stack(terms).sum()

    leaves = {kind: inputs[kind] for kind in direction}
    out: dict[str, Tensor] = torch.func.jvp(torch.func.grad(total), (leaves,), (direction,))[1]
    return {kind: x.detach() for kind, x in out.items()}


def slopes(
    step: Step, inputs: Mapping[str, Tensor], direction: Mapping[str, Tensor], cotangent: Sequence[Tensor], h: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Richardson differences of the VJP at h and at 2 h."""

    def central(size: float) -> dict[str, Tensor]:
        ends = []
        for x in (-size, size):
            at = {**inputs, **{kind: inputs[kind] + x * t for kind, t in direction.items()}}
            ends.append(gradients(step, at, list(direction), cotangent))
        return {kind: (ends[1][kind] - ends[0][kind]) / (2 * size) for kind in direction}

    rows = [central(k * h) for k in (1, 2, 4)]
    best = {kind: ((4 * rows[0][kind] - rows[1][kind]) / 3).numpy() for kind in direction}
    return best, {kind: ((4 * rows[1][kind] - rows[2][kind]) / 3).numpy() for kind in direction}


def switches(w: World, state: State, direction: Mapping[str, Tensor], row: int) -> bool:
    """Whether the active set changes within the second of the steps."""
    names = [kind for kind in direction if kind not in KINDS]
    nominal = {name: value(w.model, name) for name in names}
    marks = set()
    for x in (0.0, -2 * STEPS[0], 2 * STEPS[0]):
        here = state
        for kind in KINDS:
            for i, t in enumerate(direction[kind][row].tolist() if kind in direction else ()):
                here = moved(w.model, here, kind, i, x * t)
        for name in names:
            t = direction[name][row].numpy()
            for index in zip(*np.nonzero(t), strict=True):
                edit(w, name, tuple(int(i) for i in index), float(nominal[name][index] + x * t[index]))
        marks.add(marked(w, here)[1])
    for name in names:
        for index in zip(*np.nonzero(direction[name][row].numpy()), strict=True):
            edit(w, name, tuple(int(i) for i in index), float(nominal[name][index]))
    return len(marks) > 1
