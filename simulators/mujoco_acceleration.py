"""MuJoCo's acceleration as a program of torch: value in C, derivatives by the implicit function theorem.

    inputs   base [C, nq], d, v [C, nv], act [C, na], ctrl [C, nu], force [C, nv], and the fields that theta reaches
    outputs  w [C, nv], by which velocity advances, and a [C, nv], the solver's own

base is the position without derivatives, d the tangent displacement there, of value 0. The products come from Warp
kernels where these cover the model, and from torch for the environments in which the kernels do not see what MuJoCo
saw. Nothing is remembered between value and derivative: both start from x and y.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from sim2real.outside_program import Program, Tensors, Wanted
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_forward import Accelerate, Kind, accelerate
from sim2real.simulators.mujoco_products import STATE, Cotangents, KernelProducts, Products, torch_products
from sim2real.simulators.mujoco_structure import Structure
from sim2real.solve_report import UnconvergedError, UnconvergedWarning

Backend = Literal["auto", "warp", "torch"]
Engine = Literal["mujoco", "mujoco_warp"]


def acceleration_program(
    structure: Structure,
    names: tuple[str, ...],
    kind: Kind,
    *,
    engine: Engine = "mujoco",
    backend: Backend = "auto",
    threads: int = 1,
    tolerance: float = 1e-9,
    strict: bool = False,
) -> Program:
    """The program of a model's acceleration, differentiable in state, control, force and the fields `names`.

    An environment whose solver leaves a residual above `tolerance` (of its largest force) warns `UnconvergedWarning`,
    under `strict` raises `UnconvergedError`. "warp" raises `MujocoUnsupportedError` for a model without kernels.
    """
    accelerations = _accelerations(structure, names, kind, engine, threads)
    products = _products(structure, names, kind, backend)

    def value(x: Tensors) -> Tensors:
        base, _, v, act, ctrl, force = x[: len(STATE)]
        w, a, residual = accelerations((base, v, act, ctrl, force), dict(zip(names, x[len(STATE) :], strict=True)))
        check_residual(residual, tolerance, strict)
        return w, a

    return Program(value, products.push, products.pull, products.second)


def _accelerations(
    structure: Structure, names: tuple[str, ...], kind: Kind, engine: Engine, threads: int
) -> Accelerate:
    if engine == "mujoco":
        return accelerate(structure.model, names, kind, threads=threads)
    if engine != "mujoco_warp":
        raise ValueError(f"engine must be 'mujoco' or 'mujoco_warp', got {engine!r}")
    from sim2real.simulators.mujoco_warp_engine import warp_acceleration

    return warp_acceleration(structure, names, kind)


def _products(structure: Structure, names: tuple[str, ...], kind: Kind, backend: Backend) -> Products:
    fallback = torch_products(structure, names, kind)
    if backend == "torch":
        return fallback
    if backend not in ("auto", "warp"):
        raise ValueError(f"backend must be 'auto', 'warp' or 'torch', got {backend!r}")
    if find_spec("warp") is None:
        if backend == "warp":
            raise ModuleNotFoundError("backend='warp' needs the package warp-lang; install sim2real[warp]")
        return fallback
    from sim2real.simulators.mujoco_kernels import kernel_products
    from sim2real.simulators.mujoco_kernels_model import uncovered

    kernels = kernel_products(structure, names, kind)
    if kernels is not None:
        return split_products(kernels, fallback)
    if backend == "warp":
        reason = uncovered(structure, names, kind)
        raise MujocoUnsupportedError(f"no Warp kernels for this model: {reason}; take backend='auto' or 'torch'")
    return fallback


def check_residual(residual: Tensor, tolerance: float, strict: bool) -> None:
    """Warn `UnconvergedWarning` where a residual is above the tolerance; under `strict` raise `UnconvergedError`."""
    worst = float(residual.max()) if residual.numel() else 0.0
    if worst <= tolerance:
        return
    advice = "soften the contacts (solref, solimp), shorten the time step, or raise tolerance"
    if strict:
        raise UnconvergedError(
            f"MuJoCo's solver left a residual of {worst:.1e} of the largest force, above {tolerance:.1e} in "
            f"{int((residual > tolerance).sum())} of {residual.numel()} states: {advice}"
        )
    warnings.warn(  # without figures, so that a rollout shows it once
        f"MuJoCo's solver left a residual above tolerance = {tolerance:.1e} of the largest force in some states; "
        f"derivatives there are of that accuracy. rollout_report says where; {advice}",
        UnconvergedWarning,
        stacklevel=2,
    )


def cotangent_kernels(structure: Structure, names: tuple[str, ...], kind: Kind, backend: Backend) -> Cotangents | None:
    """Reverse products of several cotangents of each state at once; None where there are no kernels for it."""
    if backend == "torch" or find_spec("warp") is None:
        return None
    from sim2real.simulators.mujoco_kernels import kernel_cotangents

    return kernel_cotangents(structure, names, kind)


def split_products(kernels: KernelProducts, fallback: Products) -> Products:
    """Products of the kernels, those of `fallback` in the environments (copies) that the kernels do not cover."""

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        found, covered = kernels.push(x, dx, y)
        return _mended(found, covered, lambda pick: fallback.push(pick(x), pick(dx), pick(y)))

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        found, covered = kernels.pull(x, y, g, wanted)
        return _mended(found, covered, lambda pick: fallback.pull(pick(x), pick(y), pick(g), wanted))

    def second(arguments: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], wanted: Wanted) -> Tensors:
        found, covered = kernels.second(arguments, wanted)
        x, dx, y, dy, g, h = arguments
        return _mended(
            found,
            covered,
            lambda pick: fallback.second((pick(x), pick(dx), pick(y), pick(dy), pick(g), pick(h)), wanted),
        )

    return Products(push, pull, second)


def _mended(
    found: Tensors, covered: Tensor, redo: Callable[[Callable[[Sequence[Tensor]], Tensors]], Tensors]
) -> Tensors:
    """`found`, with the copies that are not covered done again."""
    if bool(covered.all()):
        return found
    rows = (~covered).nonzero().flatten()
    again = redo(lambda tensors: tuple(t if len(t) == 1 else t[rows] for t in tensors))
    return tuple(
        whole.index_copy(0, rows, part.expand(len(rows), *part.shape[1:]))
        for whole, part in zip(found, again, strict=True)
    )
