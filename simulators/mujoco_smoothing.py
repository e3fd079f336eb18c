"""Contacts that set in gradually: forces begin at a distance and grow over a width, so derivatives do not jump.

MuJoCo's contact force scales with the impedance d(r) in (0, 1), r = dist - margin, which here rises from nearly zero at
dist = width/2 to its full value at dist = -width/2:

    margin + width/2,        d = dmin + (dmax - dmin) s(|r|/width),  dmin = 0,  s quadratic at both ends (power 2).

A body rests up to width/2 higher than on hard contacts. Either the dynamics themselves are smoothed, or only their
derivatives: x' of the model as it is, dx'/dx of the smoothed one at the same state. The latter are biased, as gradients
of another function must be, but see a contact before it happens.
Reference: Paulus et al., Differentiable simulation of hard contacts with soft gradients for learning and control, ICLR
2026 (contacts from distance, straight-through); MuJoCo documentation, Modeling, Solver parameters (impedance).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mujoco

from sim2real.outside_program import Program, Tensors, Wanted
from sim2real.simulators.mujoco_system import MujocoSystem


@dataclass(frozen=True)
class ContactSmoothing:
    """How wide contacts set in, and where that counts."""

    width: float
    """m: over this change of distance a contact sets in"""
    forward: bool = True
    """False: the steps are those of the model as it is, only their derivatives are smoothed"""

    def __post_init__(self) -> None:
        if not 0.0 < self.width < math.inf:
            raise ValueError(f"the width of a contact smoothing must be positive and finite (m), got {self.width}")


def smoothed_contacts(model: mujoco.MjModel, width: float) -> mujoco.MjModel:
    """A copy of the model whose contacts set in over `width` m."""
    out = copy.copy(model)
    out.geom_margin[:] += width / 4  # the margins of the two geoms add up
    out.pair_margin[:] += width / 2
    for solimp in (out.geom_solimp, out.pair_solimp):
        solimp[:, 0], solimp[:, 2:] = 0.0, (width, 0.5, 2.0)
    return out


def smoothed_system(
    model: mujoco.MjModel,
    smoothing: ContactSmoothing | None,
    names: Sequence[str],
    build: Callable[[mujoco.MjModel], MujocoSystem],
) -> MujocoSystem:
    """`build(model)` with its contacts smoothed; `names` are the fields that theta reaches."""
    if smoothing is None:
        return build(model)
    given = sorted({"geom_solimp", "pair_solimp"} & set(names))
    if given:
        raise ValueError(f"smoothing sets the impedance of contacts, which theta reaches, too ({given}); drop one")
    soft = build(smoothed_contacts(model, smoothing.width))
    if smoothing.forward:
        return soft
    hard = build(model)
    return replace(hard, program=_straight_through(hard.program, soft.program), cotangents=None)


def _straight_through(hard: Program, soft: Program) -> Program:
    """The values of one program with the derivatives of another at the same inputs."""

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        return soft.push(x, dx, soft.value(x))

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        return soft.pull(x, soft.value(x), g, wanted)

    def second(arguments: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], wanted: Wanted) -> Tensors:
        x, dx, _, dy, g, h = arguments
        return soft.second((x, dx, soft.value(x), dy, g, h), wanted)

    return Program(hard.value, push, pull, second)
