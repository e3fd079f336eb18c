"""Forces that the derivative program leaves out, differenced alone along the multiplier."""

from __future__ import annotations

from torch import Tensor

from sim2real.simulators.mujoco_forces import Fields
from sim2real.simulators.mujoco_structure import Structure


def uncovered_force(
    structure: Structure, base: Tensor, d: Tensor, v: Tensor, act: Tensor, ctrl: Tensor, fields: Fields
) -> Tensor:
    raise NotImplementedError
