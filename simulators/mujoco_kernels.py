"""Products of MuJoCo's acceleration on kernels: what `mujoco_products` does in torch, many environments at once.

At the solver's acceleration a and the acceleration w that advances velocity,

    r(q, v, a; ctrl, fields) = 0,      G w = M a,      G = M - h D, or w = a

are differentiated by the implicit function theorem with contacts as the kernels find them from the position alone:
all products are functions of (x, y), nothing is remembered. Where r is not zero the contacts are not MuJoCo's: the
mask says which environments hold. One thread takes `LANES` environments at a time through the model's tree.

Covered: hinge, slide, ball and free joints; springs, dampers, armature, joint limits; actuators with fixed or affine
laws on hinges and slides; dry friction; contacts of planes, spheres and capsules with pyramidal or elliptic friction;
Euler with and without implicit damping; implicitfast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mujoco
import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray
from torch import Tensor

from sim2real.outside_program import Tensors, Wanted
from sim2real.simulators.mujoco_forward import Kind
from sim2real.simulators.mujoco_kernels_model import FIELDS, KINDS, SOFT, tables, uncovered
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
from sim2real.simulators.mujoco_products import STATE, Cotangents, KernelProducts
from sim2real.simulators.mujoco_structure import Structure, nominal_fields
from sim2real.simulators.warp_kernels import in_slices
from sim2real.simulators.warp_source import LANES

THREADED = 256
"""environments for each thread below which a pass uses fewer threads"""
_LANES = LANES[torch.float64]
_BYTES = 8
_INDEX = {name: k for k, name in enumerate(SLOTS)}
_COVERED = WORDS * len(SLOTS)
_COTANGENTS = _COVERED + 1 + len(INTEGERS) + len(REALS) + SIZES.index("cotangents")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What every call of one model needs."""

    names: tuple[str, ...]
    variant: dict[Pass, Variant]
    kept: tuple[Tensor, ...]
    """tables and fields whose addresses are in `words`"""
    words: NDArray[np.int64]
    """all addresses, strides and sizes of a pass, where no argument is written yet"""
    shapes: tuple[tuple[int, ...], ...]
    """of the gradients by the program's inputs, without copies"""
    scratch: int
    seats: dict[Pass, list[_Seat]]
    """those that no thread uses now"""


@dataclass(frozen=True, eq=False)
class _Seat:
    """What one thread needs to run a pass, kept from call to call."""

    launch: Any
    words: NDArray[np.int64]
    scratch: Tensor


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the gradients of one call lie in one piece of memory."""

    numbers: int
    views: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    """shape, strides and offset of each"""
    places: NDArray[np.int64]
    """of address and strides in the words of a slot's first part"""
    offsets: NDArray[np.int64]
    """what stands there, bytes; addresses from the start of that memory"""
    starts: NDArray[np.int64]
    """which of the places are addresses"""


def kernel_products(structure: Structure, names: tuple[str, ...], kind: Kind) -> KernelProducts | None:
    """The products by x = (base, d, v, act, ctrl, force, *names) of y = (w, a); None where `uncovered` says why.

    Each gives its tensors and a mask `[C]`: rows where it is false hold anything.
    """
    if uncovered(structure, names, kind) is not None:
        return None
    plan = _plan(structure, names, kind)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> tuple[Tensors, Tensor]:
        count = _copies((*x, *dx, *y))
        dw = torch.empty(structure.model.nv, _width(count), dtype=torch.float64)[:, :count].T
        words = plan.words.copy()
        _describe(words, 2, "cotangent", dw, count)
        covered = _run(plan, "push", count, words, _slots(plan, x, y), _slots(plan, dx, ()))
        return (dw, torch.zeros_like(dw)), covered

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> tuple[Tensors, Tensor]:
        count = _copies((*x, *y, *g))
        words = plan.words.copy()
        grads = _room(plan, count, wanted, words, 2)
        slots = _slots(plan, x, y) | {"cotangent": g[0]}
        return grads, _run(plan, "pull", count, words, slots, {})

    def second(
        arguments: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], wanted: Wanted
    ) -> tuple[Tensors, Tensor]:
        x, dx, y, dy, g, h = arguments
        count = _copies([t for part in arguments for t in part])
        n = len(x)
        words = plan.words.copy()
        by_x, by_dx = _room(plan, count, wanted[:n], words, 2), _room(plan, count, wanted[n:], words, 3)
        slots = _slots(plan, x, y) | {"cotangent": h[0]}
        tangents = (dy[0], dy[0]) if kind == "explicit" else (dy[0],)  # else the pass finds that of a
        moves = _slots(plan, dx, tangents) | {"cotangent": g[0]}
        return (*by_x, *by_dx), _run(plan, "second", count, words, slots, moves)

    return KernelProducts(push, pull, second)


def kernel_cotangents(structure: Structure, names: tuple[str, ...], kind: Kind) -> Cotangents | None:
    """J' g for several cotangents of each state, which share all that only the state decides; None as above.

    (x, y, g `[C, K, nv]`, wanted) -> gradients of the wanted inputs `[C, K, length]`, and the mask `[C]`; y may be w
    alone, from which the acceleration follows.
    """
    if uncovered(structure, names, kind) is not None:
        return None
    plan = _plan(structure, names, kind)

    def pull(x: Tensors, y: Tensors, g: Tensor, wanted: Wanted) -> tuple[Tensors, Tensor]:
        count, many = _copies((*x, *y, g)), g.shape[1]
        wide = replace(plan, shapes=tuple((many * math.prod(shape),) for shape in plan.shapes))
        words = plan.words.copy()
        words[_COTANGENTS] = many
        grads = _room(wide, count, wanted, words, 2)
        slots = _slots(plan, x, y) | {"cotangent": g.flatten(1)}
        covered = _run(plan, "pull", count, words, slots, {})
        lengths = [math.prod(shape) for shape, want in zip(plan.shapes, wanted, strict=True) if want]
        return tuple(g.unflatten(1, (many, length)) for g, length in zip(grads, lengths, strict=True)), covered

    return pull


def _plan(structure: Structure, names: tuple[str, ...], kind: Kind) -> _Plan:
    model, found = structure.model, tables(structure)
    nominal = {name: array.reshape(1, -1) for name, array in nominal_fields(structure).items() if name in FIELDS}
    own = {"base": model.nq, "act": model.na, "ctrl": model.nu}
    lengths = [own.get(name, model.nv) if name not in FIELDS else nominal[name].shape[1] for name in SLOTS]
    for part, field in (("elastic", "jnt_stiffness"), ("rubbing", "dof_frictionloss")):
        present = getattr(model, field).reshape(-1) != 0
        found.integers[part] = np.array(present | (field in names), np.int32)
    found.integers["slot_first"] = np.array([0, *np.cumsum(lengths)[:-1]], np.int32)
    found.integers["slot_length"] = np.array(lengths, np.int32)
    sizes = {**found.sizes, "components": sum(lengths), "implicit": KINDS.index(kind), "cotangents": 1}
    kept = [torch.from_numpy(np.append(found.integers[name], 0).astype(np.int32)) for name in INTEGERS]
    kept += [torch.from_numpy(np.append(found.reals[name], 0.0)) for name in REALS]
    numbers = np.array([found.numbers[name] for name in NUMBERS]).view(np.int64)
    words = np.zeros(WORDS * len(SLOTS) + 1, np.int64)
    for name, array in nominal.items():
        kept.append(_describe(words, 0, name, array, 2))
    static = [t.data_ptr() for t in kept[: len(INTEGERS) + len(REALS)]] + [sizes[name] for name in SIZES]
    soft = bool(SOFT & set(names))
    elliptic = model.opt.cone == int(mujoco.mjtCone.mjCONE_ELLIPTIC)
    shapes: list[tuple[int, ...]] = [(own.get(name, model.nv),) for name in STATE]
    shapes += [tuple(nominal_fields(structure)[name].shape[1:]) for name in names]
    return _Plan(
        names=names,
        variant={which: Variant(which, soft, elliptic) for which in ("push", "pull", "second")},
        kept=tuple(kept),
        words=np.concatenate([words, np.array(static, np.int64), numbers]),
        shapes=tuple(shapes),
        scratch=scratch_numbers(sizes),
        seats={"push": [], "pull": [], "second": []},
    )


def _slots(plan: _Plan, x: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors by slot: the program's inputs, w and a."""
    return dict(zip((*SLOTS[:6], *plan.names), x, strict=True)) | dict(zip(SLOTS[6:8], y, strict=False))


def _room(plan: _Plan, count: int, wanted: Wanted, words: NDArray[np.int64], part: int) -> Tensors:
    """New gradients of the wanted inputs `[C, *shape]`, environments side by side, written into the words.

    That by the base is zero.
    """
    layout = _layout(plan.names, plan.shapes, wanted, count)
    rows = torch.empty(layout.numbers, dtype=torch.float64)
    places = layout.places + 3 * part
    words[places] = layout.offsets
    words[places[layout.starts]] += rows.data_ptr()
    found = tuple(rows.as_strided(*view) for view in layout.views)
    if wanted[0]:
        found[0].zero_()
    return found


@lru_cache(maxsize=64)
def _layout(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], wanted: Wanted, count: int) -> _Layout:
    """The layout of gradients of `shapes` by the wanted of the program's inputs."""
    width, at, views = _width(count), 0, []
    rows: list[tuple[int, int]] = []
    for name, shape, want in zip((*SLOTS[:6], *names), shapes, wanted, strict=True):
        if not want:
            continue
        inner = [width * math.prod(shape[k + 1 :]) for k in range(len(shape))]
        views.append(((count, *shape), (1, *inner), at))
        if name != "base" and 0 not in shape:
            first = WORDS * _INDEX[name]
            rows += [(first, _BYTES * at), (first + 1, _BYTES), (first + 2, _BYTES * width)]
        at += width * math.prod(shape)
    places = np.array(rows, np.int64).reshape(-1, 2)
    return _Layout(at, tuple(views), places[:, 0].copy(), places[:, 1].copy(), np.arange(0, len(rows), 3))


def _width(count: int) -> int:
    """Environments from one component to the next: an odd number of cache lines.

    Components a power of two apart would all share one set of the cache.
    """
    return _LANES * (-(-count // _LANES) | 1)


def _copies(tensors: Sequence[Tensor]) -> int:
    return max(t.shape[0] for t in tensors)


def _run(
    plan: _Plan,
    which: Pass,
    count: int,
    words: NDArray[np.int64],
    slots: dict[str, Tensor],
    moves: dict[str, Tensor],
) -> Tensor:
    """Launch a pass over all environments, in slices for torch's threads; the mask of those covered.

    `words` have its outputs; inputs and their tangents are written here.
    """
    covered = torch.zeros(count, dtype=torch.bool)
    if count == 0:
        return covered
    kept = [_describe(words, k, *item, count) for k, part in enumerate((slots, moves)) for item in part.items()]
    words[_COVERED] = covered.data_ptr()

    def run(first: int, last: int) -> None:
        seat = _seat(plan, which)
        seat.words[:] = words
        seat.launch.set_param_at_index_from_ctype(0, first * _LANES)
        seat.launch.set_param_at_index_from_ctype(1, min(count, last * _LANES))
        seat.launch.launch()
        plan.seats[which].append(seat)

    threads = max(1, min(torch.get_num_threads(), count // THREADED))
    in_slices(kernel(plan.variant[which]), run, -(-count // _LANES), threads)
    del kept  # what is described lives until here
    return covered


def _seat(plan: _Plan, which: Pass) -> _Seat:
    """A seat that no other thread has."""
    try:
        return plan.seats[which].pop()
    except IndexError:
        words = torch.from_numpy(plan.words.copy())
        scratch = torch.empty(plan.scratch * _LANES * (1 if which == "pull" else 2), dtype=torch.float64)
        inputs = [0, 0, scratch.data_ptr(), wp.from_torch(words, return_ctype=True)]
        launch = wp.launch(kernel(plan.variant[which]), dim=1, inputs=inputs, device="cpu", record_cmd=True)
        return _Seat(launch, words.numpy(), scratch)


def _describe(words: NDArray[np.int64], part: int, name: str, tensor: Tensor, count: int) -> Tensor:
    """Write address and strides, in bytes, of a tensor `[C or 1, ...]` as rows of components; the tensor described."""
    rows = tensor if tensor.dim() == 2 else tensor.flatten(1) if tensor.dim() > 2 else tensor[:, None]  # views if dense
    copies, length = rows.shape
    if copies and length:
        at = WORDS * _INDEX[name] + 3 * part
        step, across = rows.stride()
        words[at : at + 3] = rows.data_ptr(), 0 if copies == 1 < count else step * _BYTES, across * _BYTES
    return rows
