"""Box bounds on named parameters: low, high, unit and design value of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sim2real.params import Params


@dataclass(frozen=True)
class Box:
    """`low[k] <= theta[k] <= high[k]`; a key absent from `low` or `high` is unbounded on that side.

    `unit[k]` is the SI unit, `default[k]` the design value a simulator starts from
    (a tensor where the parameter is one).
    Raises `ValueError` when a lower bound is not below its upper bound, or a bound is NaN.
    """

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    unit: dict[str, str] = field(default_factory=dict)
    default: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.low.keys() & self.high.keys():
            if not self.low[key] < self.high[key]:
                raise ValueError(f"bounds of '{key}': low = {self.low[key]} must be below high = {self.high[key]}")
        for side in (self.low, self.high, self.default):
            for key, value in side.items():
                if bool(torch.as_tensor(value, dtype=torch.float64).isnan().any()):
                    raise ValueError(f"a bound or default of '{key}' is NaN")


def default_params(box: Box, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Params:
    """The design values of a box as new tensors: scalars, or of the shape of the design value."""
    return {
        key: torch.as_tensor(value, dtype=dtype, device=device).detach().clone() for key, value in box.default.items()
    }


def _limits(box: Box, key: str, value: Tensor) -> tuple[float, float]:
    return box.low.get(key, -float("inf")), box.high.get(key, float("inf"))


def project(box: Box, theta: Params) -> Params:
    """Nearest point of the box, key by key."""
    return {key: value.clamp(*_limits(box, key, value)) for key, value in theta.items()}


def contains(box: Box, theta: Params) -> bool:
    """Whether every value lies in the box (bounds included) and is finite."""
    for key, value in theta.items():
        low, high = _limits(box, key, value)
        if not bool((torch.isfinite(value) & (value >= low) & (value <= high)).all()):
            return False
    return True


def to_unbounded(box: Box, theta: Params) -> Params:
    """Smooth one-to-one map of the open box to all reals: logit between two bounds, log past one, identity without.

    Raises `ValueError` for a value on or outside its bounds, where the map is not defined.
    """
    result = {}
    for key, value in theta.items():
        low, high = _limits(box, key, value)
        if not bool(((value > low) & (value < high)).all()):
            raise ValueError(
                f"'{key}' = {value.tolist()} is not strictly inside ({low}, {high}); project it inside first"
            )
        if low > -float("inf") and high < float("inf"):
            result[key] = torch.logit((value - low) / (high - low))
        elif low > -float("inf"):
            result[key] = torch.log(value - low)
        elif high < float("inf"):
            result[key] = -torch.log(high - value)
        else:
            result[key] = value
    return result


def from_unbounded(box: Box, x: Params) -> Params:
    """Inverse of `to_unbounded`."""
    result = {}
    for key, value in x.items():
        low, high = _limits(box, key, value)
        if low > -float("inf") and high < float("inf"):
            result[key] = low + (high - low) * torch.sigmoid(value)
        elif low > -float("inf"):
            result[key] = low + torch.exp(value)
        elif high < float("inf"):
            result[key] = high - torch.exp(-value)
        else:
            result[key] = value
    return result
