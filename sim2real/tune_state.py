"""The state of a tuning run: its settings, the free parameters as one scaled vector, and exact snapshots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import Box, project
from sim2real.estimators.transitions import Transitions
from sim2real.params import Params, ravel, unravel


@dataclass(frozen=True)
class TuneSettings:
    """Options of `tune`; lengths in theta are relative to `scale` (default: a tenth of the box, else of theta)."""

    max_steps: int = 20
    """iterations after the first: each runs a policy on the real system (with `collect`) or evaluates it on the log"""
    radius: float = 0.5
    """first trust-region radius, in scaled units"""
    max_radius: float = 4.0
    min_radius: float = 1e-6
    """the search ends when the radius falls below it"""
    confidence: float = 0.95
    """one-sided confidence with which the recorded returns must have fallen for a step to be undone on their account"""
    gradient_tol: float = 1e-8
    """the search has converged when the scaled gradient (free of the box) is below this, relative to `|J_real|`"""
    damping: float = 0.0
    """added to -J_nunu in the sensitivity, in its units; 0: what the sensitivity itself chooses"""
    likelihood_weight: float = 0.0
    """weight of the log-likelihood, in units of return per nat"""
    use_freedom: bool = True
    """with a likelihood: in the end move theta, where the policy does not change, to the likeliest such model"""
    freedom_tol: float = 1e-6
    """largest fall of the real return, relative to `|J_real|`, that this may cost"""
    trade_off: int = 0
    """with a likelihood: weights of the curve of real return against likelihood, each a search on the data at hand"""
    certify: bool = True
    """refuse a candidate whose gradient is not certified: the error known to be below `error_tol` of its norm"""
    error_tol: float = 0.05
    audit: int = 0
    """directions along which the certificate also solves the optimum anew, each four times; 0: none"""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)} (must be {wanted})"
            for name, wanted, holds in (
                ("max_steps", ">= 0", self.max_steps >= 0),
                ("radius", "in (0, max_radius]", 0 < self.radius <= self.max_radius < float("inf")),
                ("min_radius", ">= 0", self.min_radius >= 0),
                ("confidence", "in (0, 1)", 0 < self.confidence < 1),
                ("gradient_tol", ">= 0", self.gradient_tol >= 0),
                ("damping", ">= 0 and finite", 0 <= self.damping < float("inf")),
                ("likelihood_weight", ">= 0 and finite", 0 <= self.likelihood_weight < float("inf")),
                ("error_tol", "in (0, 1)", 0 < self.error_tol < 1),
                ("audit", ">= 0", self.audit >= 0),
                ("use_freedom", "True or False", isinstance(self.use_freedom, bool)),
                ("certify", "True or False", isinstance(self.certify, bool)),
                ("trade_off", ">= 0", self.trade_off >= 0),
                ("freedom_tol", ">= 0 and finite", 0 <= self.freedom_tol < float("inf")),
            )
            if not holds
        ]
        if wrong:
            raise ValueError(f"the settings of tune hold {', '.join(wrong)}")


@dataclass(frozen=True)
class Space:
    """The free parameters as x = theta / scale, `[d]`; the bounds are those of theta."""

    keys: tuple[str, ...]
    scale: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Point:
    """One theta evaluated on the data: `value` = real return + weighted log-likelihood, `gradient [d]` in x."""

    theta: Params
    nu: Params
    value: float
    gradient: Tensor
    curvature: Tensor
    """`[d, d]` minus the known part of the Hessian in x (the likelihood's)"""
    replicates: Tensor
    """`[G]` real returns with one group of the data left out; empty when there is no noise"""
    trusted: bool
    reason: str
    """why not, when not trusted"""
    info: dict[str, float]
    margins: Tensor
    """`[C]` of the constraints: >= 0 where they hold"""
    slopes: Tensor
    """`[C, d]` their gradients in x"""
    warned: tuple[str, ...] = ()
    """what was not solved to its tolerance on the way here"""


@dataclass(frozen=True)
class Search:
    """Everything the next iteration depends on."""

    iteration: int
    anchor: Point
    curvature: Tensor
    radius: float
    measured: tuple[float, float] | None
    """mean and standard error of the discounted returns recorded when the anchor's policy last ran"""
    data: Transitions | None
    history: tuple[dict[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    finished: str = ""


def tuning_space(theta: Params, box: Box, free: tuple[str, ...], scale: Params | None) -> Space:
    """Bounds and scales of the free parameters (empty `free`: all).

    The default scale is a tenth of the box, or of the root mean square of the value where the box is open.
    Raises `ValueError` for unknown names, a theta outside the box, or scales that are not positive and finite.
    """
    for name, names in (("free", free), ("scale", tuple(scale or ()))):
        unknown = sorted(set(names) - theta.keys())
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"{name} names {unknown or list(names)}, theta has {sorted(theta)}, each to be named once")
    keys = free if free else tuple(theta)
    for key in keys:
        if not torch.equal(project(box, {key: theta[key]})[key], theta[key]):
            raise ValueError(f"theta['{key}'] = {theta[key].tolist()} lies outside its box; project it first")

    def width(key: str) -> Tensor:
        value = theta[key].detach().double()
        if scale is not None and key in scale:
            if scale[key].shape not in (value.shape, torch.Size([])):
                raise ValueError(f"scale['{key}'] is {list(scale[key].shape)}, theta['{key}'] {list(value.shape)}")
            return scale[key].double().expand_as(value)
        span = box.high.get(key, float("inf")) - box.low.get(key, -float("inf"))
        size = float(value.square().mean().sqrt()) or 1.0
        return torch.full_like(value, 0.1 * (span if span < float("inf") else size))

    scales = torch.cat([width(key).reshape(-1) for key in keys])
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"scale must be positive and finite, got {scales.tolist()}")

    def bound(side: dict[str, float], otherwise: float) -> Tensor:
        full = [torch.full_like(theta[key].detach().double(), side.get(key, otherwise)).reshape(-1) for key in keys]
        return torch.cat(full)

    return Space(keys, scales, bound(box.low, -float("inf")), bound(box.high, float("inf")))


def moved(space: Space, theta: Params, step: Tensor) -> Params:
    """theta after `step [d]` in x, exactly inside the bounds."""
    inside = {key: theta[key] for key in space.keys}
    vector = (ravel(inside).double() + step * space.scale).clamp(space.low, space.high)
    return theta | {key: value.to(theta[key].dtype) for key, value in unravel(vector, inside).items()}


Likelihood = Callable[[Params], tuple[Tensor, Params, Tensor]] | tuple[Params, Tensor]
"""theta -> (log-likelihood, gradient, Gauss-Newton matrix `[d, d]` over the raveled free parameters), or a Gaussian
(mean, precision `[d, d]`)"""


def log_likelihood(likelihood: Likelihood, space: Space, theta: Params) -> tuple[float, Tensor, Tensor]:
    """Value, gradient `[d]` and Gauss-Newton matrix `[d, d]` of the log-likelihood, in scaled free parameters."""
    if callable(likelihood):
        value, slope, precision = likelihood(theta)
        gradient, fit = ravel({key: slope[key] for key in space.keys}).double(), float(value)
    else:
        mean, precision = likelihood
        gap = ravel({key: theta[key].detach().double() - mean[key] for key in space.keys})
        gradient, fit = -precision @ gap, -0.5 * float(gap @ precision @ gap)
    return fit, gradient * space.scale, precision * space.scale * space.scale.unsqueeze(-1)


def room(space: Space, theta: Params) -> tuple[Tensor, Tensor]:
    """Bounds on a step in x from theta, `low <= 0 <= high` whatever the rounding."""
    vector = ravel({key: theta[key] for key in space.keys}).double()
    low, high = (space.low - vector) / space.scale, (space.high - vector) / space.scale
    return low.clamp(max=0.0), high.clamp(min=0.0)


def snapshot(search: Search, generator: torch.Generator | None) -> Params:
    """A flat dict of tensors that `restore` turns into the same search, bit by bit."""
    anchor = search.anchor
    state = {f"theta.{key}": value for key, value in anchor.theta.items()}
    state |= {f"nu.{key}": value for key, value in anchor.nu.items()}
    tensors = {"gradient": anchor.gradient, "known_curvature": anchor.curvature, "replicates": anchor.replicates}
    tensors |= {"margins": anchor.margins, "slopes": anchor.slopes}
    state |= tensors | {"curvature": search.curvature}
    if search.data is not None:
        state |= {f"data.{key}": value for key, value in vars(search.data).items()}
    if generator is not None:
        state["generator"] = generator.get_state()
    record = {
        "iteration": search.iteration,
        "radius": search.radius,
        "measured": search.measured,
        "history": search.history,
        "notes": search.notes,
        "finished": search.finished,
        "anchor": {"value": anchor.value, "trusted": anchor.trusted, "reason": anchor.reason, "info": anchor.info},
    }
    state["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    return {key: value.detach().clone() for key, value in state.items()}


def restore(state: Params, generator: torch.Generator | None) -> Search:
    """The search of a snapshot; sets `generator` as it was. Raises `ValueError` when the snapshot does not fit."""
    missing = {"record", "gradient", "known_curvature", "replicates", "curvature", "margins", "slopes"} - state.keys()
    if missing or (generator is not None) != ("generator" in state):
        what = f"lacks {sorted(missing)}" if missing else "and the generator passed do not go together"
        raise ValueError(f"the state {what}; pass a state that tune handed out, and a generator as in that run")
    if generator is not None:
        generator.set_state(state["generator"].cpu())
    record = json.loads(bytes(state["record"].cpu().numpy()).decode())

    def under(prefix: str) -> Params:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    data = under("data.")
    anchor = record["anchor"]
    point = Point(
        theta=under("theta."),
        nu=under("nu."),
        value=anchor["value"],
        gradient=state["gradient"],
        curvature=state["known_curvature"],
        replicates=state["replicates"],
        trusted=anchor["trusted"],
        reason=anchor["reason"],
        info=anchor["info"],
        margins=state["margins"],
        slopes=state["slopes"],
    )
    return Search(
        iteration=record["iteration"],
        anchor=point,
        curvature=state["curvature"],
        radius=record["radius"],
        measured=None if record["measured"] is None else (record["measured"][0], record["measured"][1]),
        data=Transitions(**data) if data else None,
        history=tuple(record["history"]),
        notes=tuple(record["notes"]),
        finished=record["finished"],
    )
