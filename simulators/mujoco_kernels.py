"""Products of MuJoCo's acceleration on kernels: what `mujoco_products` does in torch, many environments at once.

At the solver's acceleration a and the acceleration w that advances velocity,

    r(q, v, a; ctrl, fields) = 0,      G w = M a,      G = M + h diag(damping), or w = a

are differentiated by the implicit function theorem with contacts as the kernels find them from the position alone:
all products are functions of (x, y), nothing is remembered. Where r is not zero the contacts are not MuJoCo's: the
mask says which environments hold. One thread takes `LANES` environments at a time through the model's tree.

Covered: hinge, slide, ball and free joints; springs, dampers, armature, joint limits; actuators with fixed or affine
laws on hinges and slides; pyramidal contacts of planes, spheres and capsules; Euler with and without implicit damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import warp as wp
from torch import Tensor

from sim2real.simulators.mujoco_forward import Kind
from sim2real.simulators.mujoco_kernels_model import FIELDS, SOFT, powers_are_quadratic, tables, uncovered
from sim2real.simulators.mujoco_kernels_passes import (
    INTEGERS,
    NUMBERS,
    REALS,
    SIZES,
    SLOTS,
    WORDS,
    Pass,
    Variant,
    kernel,
    scratch_numbers,
)
from sim2real.simulators.mujoco_products import STATE, KernelProducts
from sim2real.simulators.mujoco_structure import Structure, nominal_fields
from sim2real.simulators.warp_functions import Tensors, Wanted
from sim2real.simulators.warp_kernels import in_slices
from sim2real.simulators.warp_source import LANES

THREADED = 256
"""environments for each thread below which a pass uses fewer threads"""
_LANES = LANES[torch.float64]
_BYTES = 8


@dataclass(frozen=True, eq=False)
class _Plan:
    """What every call of one model needs."""

    names: tuple[str, ...]
    variant: dict[Pass, Variant]
    kept: tuple[Tensor, ...]
    """tables whose addresses are in `words`"""
    words: tuple[int, ...]
    nominal: dict[str, Tensor]
    """fields that do not vary, `[1, length]`"""
    lengths: tuple[int, ...]
    """components of every slot"""
    shapes: tuple[tuple[int, ...], ...]
    """of the gradients by the program's inputs, without copies"""
    scratch: int


def kernel_products(structure: Structure, names: tuple[str, ...], kind: Kind) -> KernelProducts | None:
    """The products by x = (base, d, v, act, ctrl, force, *names) of y = (w, a); None where `uncovered` says why.

    Each gives its tensors and a mask `[C]`: rows where it is false hold anything.
    """
    if uncovered(structure, names, kind) is not None:
        return None
    plan = _plan(structure, names, kind)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> tuple[Tensors, Tensor]:
        count = _copies((*x, *dx, *y))
        dw = _empty(count, (structure.model.nv,))
        slots = _slots(plan, x, y)
        moves = _slots(plan, dx, ())
        covered = _run(plan, "push", count, slots, moves, {"cotangent": dw}, {})
        return (dw, torch.zeros_like(dw)), covered

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> tuple[Tensors, Tensor]:
        count = _copies((*x, *y, *g))
        grads = _room(plan, count, wanted)
        slots = _slots(plan, x, y) | {"cotangent": g[0]}
        covered = _run(plan, "pull", count, slots, {}, _chosen(plan, grads, wanted), {})
        return grads, covered

    def second(
        arguments: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], wanted: Wanted
    ) -> tuple[Tensors, Tensor]:
        x, dx, y, dy, g, h = arguments
        count = _copies([t for part in arguments for t in part])
        n = len(x)
        by_x, by_dx = _room(plan, count, wanted[:n]), _room(plan, count, wanted[n:])
        slots = _slots(plan, x, y) | {"cotangent": h[0]}
        tangents = (dy[0], dy[0]) if kind == "explicit" else (dy[0],)  # else the pass finds that of a
        moves = _slots(plan, dx, tangents) | {"cotangent": g[0]}
        first, last = _chosen(plan, by_x, wanted[:n]), _chosen(plan, by_dx, wanted[n:])
        covered = _run(plan, "second", count, slots, moves, first, last)
        return (*by_x, *by_dx), covered

    return KernelProducts(push, pull, second)


def _plan(structure: Structure, names: tuple[str, ...], kind: Kind) -> _Plan:
    model, found = structure.model, tables(structure)
    nominal = {name: array.reshape(1, -1) for name, array in nominal_fields(structure).items() if name in FIELDS}
    own = {"base": model.nq, "act": model.na, "ctrl": model.nu}
    lengths = [own.get(name, model.nv) if name not in FIELDS else nominal[name].shape[1] for name in SLOTS]
    varies = "jnt_stiffness" in names
    found.integers["elastic"] = np.int32((model.jnt_stiffness.reshape(-1) != 0) | varies)
    found.integers["slot_first"] = np.array([0, *np.cumsum(lengths)[:-1]], np.int32)
    found.integers["slot_length"] = np.array(lengths, np.int32)
    sizes = {**found.sizes, "components": sum(lengths)}
    kept = [torch.from_numpy(np.append(found.integers[name], 0).astype(np.int32)) for name in INTEGERS]
    kept += [torch.from_numpy(np.append(found.reals[name], 0.0)) for name in REALS]
    numbers = np.array([found.numbers[name] for name in NUMBERS]).view(np.int64)
    words = [t.data_ptr() for t in kept] + [sizes[name] for name in SIZES] + [int(number) for number in numbers]
    soft = bool(SOFT & set(names))
    quadratic = powers_are_quadratic(model) and not soft
    implicit = kind != "explicit"
    shapes = [(own.get(name, model.nv),) for name in STATE]
    shapes += [tuple(nominal_fields(structure)[name].shape[1:]) for name in names]
    return _Plan(
        names=names,
        variant={which: Variant(which, implicit, soft, quadratic) for which in ("push", "pull", "second")},
        kept=tuple(kept),
        words=tuple(words),
        nominal=nominal,
        lengths=tuple(lengths),
        shapes=tuple(shapes),
        scratch=scratch_numbers(sizes),
    )


def _slots(plan: _Plan, x: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors by slot: the program's inputs, w and a."""
    return dict(zip((*SLOTS[:6], *plan.names), x, strict=True)) | dict(zip(SLOTS[6:8], y, strict=False))


def _chosen(plan: _Plan, grads: Tensors, wanted: Wanted) -> dict[str, Tensor]:
    """Where gradients are written, by slot; the base has none."""
    names = [name for name, want in zip((*SLOTS[:6], *plan.names), wanted, strict=True) if want]
    return {name: grad for name, grad in zip(names, grads, strict=True) if name != "base"}


def _room(plan: _Plan, count: int, wanted: Wanted) -> Tensors:
    """New gradients of the wanted inputs `[C, *shape]`; that by the base is zero."""
    shapes = [(shape, k) for k, (shape, want) in enumerate(zip(plan.shapes, wanted, strict=True)) if want]
    return tuple(_empty(count, shape).zero_() if k == 0 else _empty(count, shape) for shape, k in shapes)


def _empty(count: int, shape: Sequence[int]) -> Tensor:
    """A new tensor `[C, *shape]` with the environments side by side."""
    return torch.empty(*shape, count, dtype=torch.float64).movedim(-1, 0)


def _copies(tensors: Sequence[Tensor]) -> int:
    return max(len(t) for t in tensors)


def _run(
    plan: _Plan,
    which: Pass,
    count: int,
    slots: dict[str, Tensor],
    moves: dict[str, Tensor],
    out: dict[str, Tensor],
    second_out: dict[str, Tensor],
) -> Tensor:
    """Launch a pass over all environments, in slices for torch's threads; the mask of those covered."""
    covered = torch.zeros(count, dtype=torch.bool)
    if count == 0:
        return covered
    kept: list[Tensor] = []
    words: list[int] = []
    for name in SLOTS:
        value = slots.get(name)
        for tensor in (plan.nominal.get(name) if value is None else value, moves.get(name)):
            words += _described(tensor, count, kept)
        for tensor in (out.get(name), second_out.get(name)):
            words += _described(tensor, count, kept, written=True)
    pointers = torch.tensor([*words, covered.data_ptr(), *plan.words], dtype=torch.int64)
    assert len(pointers) == WORDS * len(SLOTS) + 1 + len(plan.words)
    array = wp.from_torch(pointers, return_ctype=True)
    chosen = kernel(plan.variant[which])
    width = plan.scratch * _LANES * (1 if which == "pull" else 2)

    def run(first: int, last: int) -> None:
        scratch = torch.empty(width, dtype=torch.float64)
        ends = first * _LANES, min(count, last * _LANES)
        wp.launch(chosen, dim=1, inputs=[*ends, scratch.data_ptr(), array], device="cpu")

    threads = max(1, min(torch.get_num_threads(), count // THREADED))
    in_slices(chosen, run, -(-count // _LANES), threads)
    return covered


def _described(tensor: Tensor | None, count: int, kept: list[Tensor], *, written: bool = False) -> tuple[int, int, int]:
    """Address and strides, in bytes, of a tensor `[C or 1, ...]` as rows of components; zeros for none."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0, 0
    rows = tensor if tensor.dim() == 2 else _flat(tensor)
    if written and rows.data_ptr() != tensor.data_ptr():
        raise RuntimeError("a gradient must be written in place")
    kept.append(rows)
    step = 0 if len(rows) == 1 < count else rows.stride(0)
    return rows.data_ptr(), step * _BYTES, rows.stride(1) * _BYTES


def _flat(tensor: Tensor) -> Tensor:
    """`[C, ...] -> [C, length]`, a view where the strides allow."""
    return tensor.reshape(len(tensor), -1)
