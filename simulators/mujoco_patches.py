"""Numbers of a field replaced or multiplied by columns of theta: a few gathers, however many parameters there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.simulators.mujoco_properties import Place


@dataclass(frozen=True, eq=False)
class Patch:
    """Numbers of one field that theta sets, or multiplies."""

    sources: tuple[str, ...]
    """entries of theta, side by side"""
    pick: Tensor
    """`[k]` their column for each number"""
    factor: Tensor | None
    """`[k]`"""
    position: Tensor
    """`[k]` of the number in the flattened field"""
    take: Tensor
    """for every number of the field: where it stands in (old numbers, new ones)"""
    multiply: bool


def make_patch(
    assigned: Sequence[tuple[str, Place]], widths: Mapping[str, int], numel: int, *, multiply: bool
) -> Patch | None:
    """The patch of one field of `numel` numbers: (entry, place of its component) pairs; None where there are none."""
    if not assigned:
        return None
    sources = tuple(dict.fromkeys(source for source, _ in assigned))
    first = dict(zip(sources, torch.tensor([0, *(widths[name] for name in sources)]).cumsum(0).tolist(), strict=False))
    pick = [first[source] + place.component for source, place in assigned]
    factor = torch.tensor([place.factor for _, place in assigned], dtype=torch.float64)
    take = torch.arange(numel)
    position = torch.tensor([place.position for _, place in assigned])
    take[position] = numel + torch.arange(len(assigned))
    scaled = None if bool((factor == 1.0).all()) else factor
    return Patch(sources, torch.tensor(pick), scaled, position, take, multiply)


def patched(nominal: Tensor, patches: Sequence[Patch], columns: Mapping[str, Tensor]) -> Tensor:
    """The field `[1 or B, *shape]` from its nominal `[1, *shape]` and the entries of theta as `[1 or B, width]`."""
    flat = nominal.to(columns[patches[0].sources[0]]).reshape(1, -1)
    for patch in patches:
        parts = [columns[name] for name in patch.sources]
        count = max(len(part) for part in (*parts, flat))
        joined = torch.cat([part.expand(count, -1) for part in parts], -1) if len(parts) > 1 else parts[0]
        new = joined[:, patch.pick.to(joined.device)]
        if patch.factor is not None:
            new = new * patch.factor.to(new)
        if patch.multiply:
            new = new * flat[:, patch.position.to(flat.device)]
        flat = torch.cat([flat.expand(count, -1), new.expand(count, -1)], -1)[:, patch.take.to(flat.device)]
    return flat.reshape(-1, *nominal.shape[1:])
