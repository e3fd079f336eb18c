"""The unknowns of a fit as one flat vector x, with bounds and priors.

x: entries of the free parameters of the model, then, as far as they are fitted, the input delay, the sensor zeros of
the compared signals and corrections of the measured start rates, the last two per run or shared by all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params, unravel
from sim2real.rollout_log import RolloutLog
from sim2real.windows import Channels

Scope = Literal["none", "shared", "per_run"]


@dataclass(frozen=True)
class Unknowns:
    """The layout of x `[P]` with bounds and priors (std infinite: none)."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    free: tuple[str, ...]
    theta: Params
    """start values of all parameters of the model"""
    start: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor
    count: int
    """d: entries of theta among the unknowns, the first of x"""
    delay: bool
    """the entry after them"""
    zero: Tensor
    """`[E, q]` index in x of every run's zeros, or `[E, 0]`"""
    rate: Tensor
    """`[E, n_r]` index in x of every run's corrections of the start rates, or `[E, 0]`"""


@dataclass(frozen=True)
class Values:
    """x, taken apart."""

    theta: Params
    delay: Tensor | None
    zero: Tensor
    """`[E, q]`"""
    rate: Tensor
    """`[E, n_r]`"""


def take_apart(unknowns: Unknowns, x: Tensor) -> Values:
    """theta (all of it), delay, zeros and rates of x."""
    theta = dict(unknowns.theta)
    if unknowns.free:
        theta |= unravel(x[: unknowns.count], {key: theta[key] for key in unknowns.free})
    return Values(theta, x[unknowns.count] if unknowns.delay else None, x[unknowns.zero], x[unknowns.rate])


def local_columns(unknowns: Unknowns) -> Tensor:
    """`[E, L]` index in x of the unknowns that a window of each run sees, in the order of the local Jacobian."""
    runs = len(unknowns.zero)
    shared = torch.arange(unknowns.count + int(unknowns.delay)).expand(runs, -1)
    return torch.cat([shared, unknowns.zero, unknowns.rate], 1)


@dataclass(frozen=True)
class Nuisance:
    """What is fitted beside theta: a delay (start, low, high) in s, zeros and start rates with their weak priors."""

    delay: tuple[float, float, float] | None = None
    zeros: Scope = "none"
    zero_std: float = float("inf")
    rates: Scope = "none"
    rate_std: float = float("inf")


def make_unknowns(
    mdp: ModelMDP,
    log: RolloutLog,
    channels: Channels,
    theta: Params,
    free: Sequence[str],
    nuisance: Nuisance = Nuisance(),
    *,
    priors: Mapping[str, tuple[float, float]] | None = None,
    prior_width: float = 0.0,
) -> Unknowns:
    """Lay out x. A parameter without an entry in `priors` gets (start, prior_width times its box), if both are finite.

    Raises `ValueError` for unknown names, starts outside their bounds, and priors or bounds that make no sense.
    """
    priors = dict(priors or {})
    _check_names(theta, free, priors, nuisance)
    inf, entries = float("inf"), []  # name, unit, start, low, high, mean, std
    for key in free:
        low, high = mdp.box.low.get(key, -inf), mdp.box.high.get(key, inf)
        for name, start in _entries(key, theta[key]):
            if not low <= start <= high:
                raise ValueError(f"'{name}' starts at {start:.6g}, outside its bounds [{low:.6g}, {high:.6g}]")
            default = (start, prior_width * (high - low) if prior_width > 0 else inf)
            entries.append((name, mdp.box.unit.get(key, ""), start, low, high, *priors.get(key, default)))
    count = len(entries)
    if nuisance.delay is not None:
        first, low, high = nuisance.delay
        if not low <= first <= high or low == high:
            raise ValueError(f"the delay starts at {first} s; its bounds are {low} and {high} s")
        entries.append(("delay", "s", first, low, high, *priors.get("delay", (first, inf))))
    runs = log.names["episode"]
    rates = [mdp.names["state"][j] for j in channels.rates.tolist()]
    zero = _lay_out(entries, "zero", nuisance.zeros, runs, channels.signals, mdp.units, nuisance.zero_std)
    rate = _lay_out(entries, "start", nuisance.rates, runs, rates, mdp.units, nuisance.rate_std)
    columns = list(zip(*entries, strict=True)) if entries else [()] * 7
    numbers = torch.tensor([list(column) for column in columns[2:]], dtype=log.signals.dtype)
    if not bool((numbers[4] > 0).all()):
        raise ValueError("every prior needs a standard deviation > 0")
    return Unknowns(
        names=tuple(columns[0]),
        units=tuple(columns[1]),
        free=tuple(free),
        theta=dict(theta),
        start=numbers[0],
        low=numbers[1],
        high=numbers[2],
        mean=numbers[3],
        std=numbers[4],
        count=count,
        delay=nuisance.delay is not None,
        zero=zero,
        rate=rate,
    )


def _check_names(theta: Params, free: Sequence[str], priors: Mapping[str, object], nuisance: Nuisance) -> None:
    missing = [key for key in free if key not in theta]
    if missing:
        raise ValueError(f"free names {missing}, which theta does not hold; it holds {sorted(theta)}")
    stray = [key for key in priors if key not in free and not (key == "delay" and nuisance.delay is not None)]
    if stray:
        raise ValueError(f"priors name {stray}, which are not fitted; fitted are {list(free)}")
    odd = [key for key, value in theta.items() if not bool(torch.isfinite(value).all())]
    if odd:
        raise ValueError(f"theta is not finite in {odd}")


def _entries(key: str, value: Tensor) -> list[tuple[str, float]]:
    """Names and values of the entries of a parameter: "A" or "A[0,1]"."""
    names = [",".join(map(str, index)) for index in product(*map(range, value.shape))]
    flat = value.detach().reshape(-1).tolist()
    return [(f"{key}[{name}]" if name else key, number) for name, number in zip(names, flat, strict=True)]


def _lay_out(
    entries: list[tuple[str, str, float, float, float, float, float]],
    what: str,
    scope: Scope,
    runs: Sequence[str],
    signals: Sequence[str],
    units: Mapping[str, str],
    std: float,
) -> Tensor:
    """Append zero-mean offsets of `signals` to `entries`; their index in x for every run `[E, q]` (or `[E, 0]`)."""
    if scope == "none":
        return torch.zeros(len(runs), 0, dtype=torch.long)
    inf, first = float("inf"), len(entries)
    for run in runs if scope == "per_run" else [""]:
        entries += [
            (f"{what}.{signal}" + (f".{run}" if run else ""), units.get(signal, ""), 0.0, -inf, inf, 0.0, std)
            for signal in signals
        ]
    index = torch.arange(first, len(entries)).view(-1, len(signals))
    return index.expand(len(runs), -1)
