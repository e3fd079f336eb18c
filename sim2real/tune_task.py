"""What does not change during a tuning run, and the evaluation of one theta: the chain as a point of the search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.certificate import Certificate
from sim2real.estimators.transitions import Transitions
from sim2real.mdp import ModelMDP
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.safety import Margin
from sim2real.solve_report import Sensitivity, UnconvergedWarning
from sim2real.tune_state import Likelihood, Point, Space, TuneSettings, log_likelihood
from sim2real.tune_step import Certify, Objective, Trainer, TuneStep, certified_step

Limit = Callable[[Params, Transitions], Margin]
"""nu, real transitions -> margin of a constraint with its gradient in nu"""


@dataclass(frozen=True)
class Task:
    """What does not change during a run."""

    chain: Callable[..., TuneStep]
    """theta, nu, log"""
    certificate: Callable[..., Certificate] | None
    """theta, nu, sensitivity, cotangent"""
    optimum: Trainer
    sensitivity: Callable[..., Sensitivity]
    """theta, nu, cotangent"""
    real: Callable[..., Estimate]
    """nu, log"""
    space: Space
    likelihood: Likelihood | None
    settings: TuneSettings
    constraints: Mapping[str, Limit]
    act: Callable[[Params, Tensor], Tensor] | None
    """nu, states -> actions of a deterministic policy"""


def evaluated(task: Task, theta: Params, nu: Params, data: Transitions | None, worth: Callable[[Point], bool]) -> Point:
    """The chain at theta as a point of the search; certified where `worth` the cost says so."""
    with unconverged() as heard:
        step = task.chain(theta=theta, nu=nu, log=data)
        point = _limited(_point(step, theta, task), step, data, task)
        if task.certificate is not None and step.sensitivity is not None and point.trusted and worth(point):
            found = task.certificate(theta, step.nu, step.sensitivity, step.grad_nu)
            judged = _point(certified_step(step, found), theta, task)
            point = replace(judged, margins=point.margins, slopes=point.slopes, info=point.info | judged.info)
    return replace(point, warned=tuple(dict.fromkeys(heard)))


def certificate_of(
    certificate: Certify | None,
    J: Objective | None,
    optimum: Trainer | None,
    derivative_order: Literal[0, 1, 2],
    space: Space,
    settings: TuneSettings,
) -> Callable[..., Certificate] | None:
    """The certificate of the free parameters, bound to the problem; None where it is unwanted or cannot be had.

    J None: a policy that is a formula of theta, cheap to compute anew; it is audited along 3 directions at least.
    """
    directions = max(settings.audit, 3) if J is None else settings.audit
    unable = (J is None or derivative_order == 0) and (optimum is None or directions == 0)
    if certificate is None or not settings.certify or unable:
        return None

    def bound(theta: Params, nu: Params, sensitivity: Sensitivity, cotangent: Params) -> Certificate:
        free = unravel(space.scale, {key: theta[key] for key in space.keys})
        return certificate(
            J,
            theta,
            nu,
            sensitivity,
            cotangent,
            tol=settings.error_tol,
            scale={key: free.get(key, torch.zeros_like(value)) for key, value in theta.items()},
            optimum=optimum,
            directions=directions,
            derivative_order=derivative_order,
        )

    return bound


def uncertified(task: Task, mdp: ModelMDP, *, direct: bool) -> tuple[str, ...]:
    """A note on why nothing is certified although it was asked for."""
    if task.certificate is not None or not task.settings.certify:
        return ()
    cause = "a hypergradient has no linear solve to judge" if direct else "no certificate was given"
    if not direct and mdp.derivative_order == 0:
        cause = "the simulator has no derivatives; with an optimum, audit > 0 judges by solving anew"
    return (f"no gradient was certified: {cause}",)


@contextmanager
def unconverged() -> Iterator[list[str]]:
    """Collects the texts of `UnconvergedWarning`: they become notes. Other warnings pass."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnconvergedWarning)
        yield heard
    heard.extend(str(item.message) for item in caught if issubclass(item.category, UnconvergedWarning))
    for item in caught:
        if not issubclass(item.category, UnconvergedWarning):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _point(step: TuneStep, theta: Params, task: Task) -> Point:
    """A `TuneStep` as value, gradient and known curvature in the scaled free parameters, the likelihood included."""
    space, weight = task.space, task.settings.likelihood_weight
    gradient = ravel({key: step.grad[key] for key in space.keys}).double() * space.scale
    value, curvature = float(step.info["real_return"]), torch.diag(torch.zeros_like(gradient))
    if task.likelihood is not None and weight > 0:
        fit, slope, precision = log_likelihood(task.likelihood, space, theta)
        value, gradient, curvature = value + weight * fit, gradient + weight * slope, weight * precision
    finite = math.isfinite(value) and bool(torch.isfinite(gradient).all())
    trusted = step.report.converged and finite
    reason = "" if trusted else (step.report.status if finite else "the real return or its gradient is not finite")
    replicates = step.info.get("value_replicates", gradient.new_zeros(0))
    info = {key: float(item) for key, item in step.info.items() if item.numel() == 1}
    none, flat = gradient.new_zeros(0), gradient.new_zeros(0, len(gradient))
    return Point(theta, step.nu, value, gradient, curvature, replicates, trusted, reason, info, none, flat)


def _limited(point: Point, step: TuneStep, data: Transitions | None, task: Task) -> Point:
    """`point` with the margins of the constraints and their slopes, by the same dnu*/dtheta as the return's."""
    if not task.constraints:
        return point
    if step.sensitivity is None or data is None:
        raise ValueError("constraints need dnu*/dtheta and real data: no hypergradient, and a log or a collect")
    margins, slopes, info, reason = [], [], dict(point.info), point.reason
    for name, limit in task.constraints.items():
        margin = limit(step.nu, data)
        down = step.sensitivity.vjp(margin.grad)
        margins.append(margin.value.detach().double().reshape(()))
        slopes.append(ravel({key: down[key] for key in task.space.keys}).double() * task.space.scale)
        info[f"margin.{name}"] = float(margin.value)
        if not margin.trusted or not bool(torch.isfinite(margins[-1]) & torch.isfinite(slopes[-1]).all()):
            reason = reason or f"the constraint '{name}' cannot be judged: {margin.reason or 'it is not finite'}"
    known = replace(point, margins=torch.stack(margins), slopes=torch.stack(slopes), info=info)
    return replace(known, trusted=point.trusted and not reason, reason=reason)
