"""The search behind `tune`: quasi-Newton steps in a trust region, as pure functions of one frozen state.

An iteration takes a candidate from the model, scores it on the data already there (which also teaches the model its
curvature), runs its policy on the real system, evaluates both ends of the step on all data, and keeps the better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from sim2real.estimators.logged_policy_gradient import jackknife_stderr
from sim2real.estimators.transitions import Transitions, merge_transitions
from sim2real.params import Params
from sim2real.solve_report import UnconvergedError
from sim2real.solvers.convex import InfeasibleError
from sim2real.trust_region import bfgs_update, next_radius, predicted_gain
from sim2real.tune_constraints import correction, feasible, inside, merit, next_step, unheld, violated, violation
from sim2real.tune_state import Point, Search, Space, TuneSettings, moved

UNUSABLE = (ValueError, UnconvergedError, InfeasibleError, torch.linalg.LinAlgError)
"""what says that a theta has no optimum, no sensitivity or no critic"""

Evaluate = Callable[[Params, Params, Transitions | None, Callable[["Point"], bool]], Point]
"""theta, nu to start from, data, and which points are worth the cost of a certificate"""
Gather = Callable[[Params, int], tuple[Transitions, tuple[float, float]] | None]
"""nu, iteration -> new transitions of its policy and their mean return with its standard error; None: not there yet"""
CERTIFICATE = ("certified", "error_bound", "relative_bound", "audit_error")
"""what a certificate leaves in a point's info"""


@dataclass(frozen=True)
class Trial:
    """A candidate, the step `[d]` to it from the anchor, and the gain the model promised."""

    point: Point
    step: Tensor
    predicted: float


def begin(
    theta: Params,
    nu: Params,
    known: Transitions | None,
    settings: TuneSettings,
    space: Space,
    evaluate: Evaluate,
    gather: Gather | None,
) -> Search | None:
    """Iteration 0: the start, evaluated on the log and on rollouts of its policy; None: those are not there yet.

    Raises `ValueError` when the start cannot be trusted; a start whose gradient is not certified ends the search.
    """
    new = gather(nu, 0) if gather is not None else None
    if gather is not None and new is None:
        return None
    data, measured = (known, None) if new is None else (_joined(known, new[0]), new[1])
    anchor = evaluate(theta, nu, data, lambda point: True)
    refused = anchor.info.get("certified") == 0.0
    if not (anchor.trusted or refused):
        raise ValueError(f"the start cannot be evaluated: {anchor.reason}")
    search = Search(0, anchor, torch.zeros_like(anchor.curvature), settings.radius, measured, data)
    row = _row(search, space, anchor, measured) | {"accepted": 1.0}
    search = replace(search, history=(row,), notes=_warned(anchor, 0))
    if refused:
        way_out = "a larger error_tol allows more, certify = False goes on without"
        note = f"the start was refused, its gradient is {anchor.reason} ({way_out})"
        return replace(search, notes=(*search.notes, note), finished=f"refused: the gradient is {anchor.reason}")
    return _ended(search, settings, space)


def advance(
    search: Search, settings: TuneSettings, space: Space, evaluate: Evaluate, gather: Gather | None
) -> Search | Point:
    """The next state, or the point whose policy must run on the real system before there is one."""
    tried, trial = _candidate(search, space, evaluate)
    if gather is None:
        return _decided(tried, settings, space, trial, None)
    if not bool(search.curvature.any()):
        tried, trial = _tempered(tried, trial, space, evaluate)
    for _ in range(5):
        if _improves(trial.point, search.anchor):
            break
        tried, trial = _candidate(replace(tried, radius=0.5 * float(trial.step.norm())), space, evaluate)
    chosen = trial.point if _improves(trial.point, search.anchor) else search.anchor
    new = gather(chosen.nu, search.iteration + 1)
    if new is None:
        return chosen
    data = _joined(search.data, new[0])
    anchor = _again(search.anchor, data, evaluate)
    tried = replace(tried, anchor=anchor, data=data)
    if not anchor.trusted:
        note = f"iteration {search.iteration + 1}: the best policy cannot be evaluated on the new data: {anchor.reason}"
        tried = replace(tried, notes=(*tried.notes, note))
    if chosen is not search.anchor:
        return _decided(tried, settings, space, replace(trial, point=_again(chosen, data, evaluate)), new[1])
    note = f"iteration {search.iteration + 1}: the data promised no better policy, the best one ran again"
    again = replace(tried, iteration=search.iteration + 1, radius=0.5 * search.radius, measured=new[1])
    row = _row(again, space, anchor, new[1]) | {"accepted": 0.0, "step_norm": 0.0}
    return _ended(replace(again, history=(*search.history, row), notes=(*tried.notes, note)), settings, space)


def _candidate(search: Search, space: Space, evaluate: Evaluate) -> tuple[Search, Trial]:
    """The model's best step, evaluated on the data already there; the search learns the curvature along it."""
    anchor, total = search.anchor, search.curvature + search.anchor.curvature
    step, multipliers = next_step(anchor, total, search.radius, space)
    search, point = _tried(search, step, multipliers, space, evaluate)
    missed = correction(anchor, point, step)
    if missed is not None:
        again, multipliers = next_step(anchor, total, search.radius, space, missed)
        search, second = _tried(search, again, multipliers, space, evaluate)
        if _improves(second, anchor):
            point, step = second, again
    return search, Trial(point, step, predicted_gain(anchor.gradient, total, step))


def _tried(search: Search, step: Tensor, multipliers: Tensor, space: Space, evaluate: Evaluate) -> tuple[Search, Point]:
    """The point after a step; a note when it is refused, else the curvature of the Lagrangian along the step."""
    anchor, iteration = search.anchor, search.iteration + 1
    theta = moved(space, anchor.theta, step)
    try:
        point = evaluate(theta, anchor.nu, search.data, lambda point: _improves(point, anchor))
    except UNUSABLE as problem:  # no optimum or no critic at this theta
        point = replace(anchor, theta=theta, value=-math.inf, trusted=False, reason=str(problem), info={}, warned=())
    search = replace(search, notes=(*search.notes, *_warned(point, iteration)))
    reason = point.reason
    if point.trusted and feasible(anchor) and (broken := violated(point)):
        reason = f"it violates {broken}"
    if reason:
        search = replace(search, notes=(*search.notes, f"iteration {iteration}: refused a candidate: {reason}"))
    if not point.trusted:
        return search, point
    fall = (anchor.gradient - anchor.curvature @ step) - point.gradient
    fall = fall + (anchor.slopes - point.slopes).T @ multipliers
    return replace(search, curvature=bfgs_update(search.curvature, step, fall)), point


def _tempered(search: Search, trial: Trial, space: Space, evaluate: Evaluate) -> tuple[Search, Trial]:
    """A first step without any curvature has the length of the radius, however small the gradient. Where the curvature
    it taught makes the step clearly shorter (a fifth: less costs 6 % of a quadratic gain), the better one is run."""
    total = search.curvature + search.anchor.curvature
    shorter, _ = next_step(search.anchor, total, search.radius, space)
    if not trial.point.trusted or float(shorter.norm()) >= 0.8 * float(trial.step.norm()):
        return search, trial
    again, second = _candidate(search, space, evaluate)
    return again, second if _improves(second.point, trial.point) else trial


def _again(point: Point, data: Transitions, evaluate: Evaluate) -> Point:
    """The same theta on more data; its certificate is kept. Not to be trusted where it cannot be evaluated any more."""
    try:
        renewed = evaluate(point.theta, point.nu, data, lambda point: False)
    except UNUSABLE as problem:
        return replace(point, trusted=False, reason=str(problem), warned=())
    return replace(renewed, info=renewed.info | {key: point.info[key] for key in CERTIFICATE if key in point.info})


def _warned(point: Point, iteration: int) -> tuple[str, ...]:
    """Notes of what was not solved to its tolerance on the way to a point; what made it refused stands there anyway."""
    told = [text for text in point.warned if point.trusted or point.reason not in text]
    rest = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return (f"iteration {iteration}: {told[0]}{rest}",) if told else ()


def _improves(point: Point, anchor: Point) -> bool:
    """A higher value, constraints first; where the change drowns in rounding, a smaller gradient."""
    if not (point.trusted and anchor.trusted):
        return point.trusted
    if not feasible(anchor):
        return violation(point.margins, anchor.slopes) < violation(anchor.margins, anchor.slopes)
    if not feasible(point):
        return False
    if abs(point.value - anchor.value) <= 1e-14 * abs(anchor.value):
        free = torch.ones_like(anchor.gradient, dtype=torch.bool)
        return float(unheld(point, free).norm()) < float(unheld(anchor, free).norm())
    return point.value > anchor.value


def _decided(
    search: Search, settings: TuneSettings, space: Space, trial: Trial, measured: tuple[float, float] | None
) -> Search:
    """Keep the candidate or return to the anchor, adapt the radius, write the history."""
    anchor, point, iteration = search.anchor, trial.point, search.iteration + 1
    # on the way back into the limits a lower return is the price, not a reason to turn round
    fell = feasible(anchor) and _fell(measured, search.measured, settings.confidence)
    accepted = _improves(point, anchor) and not fell
    worthless = fell or not point.trusted
    worthless = worthless or (feasible(anchor) and not feasible(point))
    gained, promised = merit(point, anchor, trial.step, trial.predicted)
    gain, length = -math.inf if worthless else gained, float(trial.step.norm())
    radius = next_radius(search.radius, length, gain, promised, settings.max_radius)
    row = _row(replace(search, iteration=iteration), space, point, measured)
    row |= {"accepted": float(accepted), "predicted_gain": trial.predicted, "step_norm": length}
    if point.trusted:
        row |= {"gain": point.value - anchor.value, "gain_stderr": _paired_stderr(point, anchor)}
    notes = search.notes
    if point.trusted and not accepted and (fell or feasible(point)):
        cause = "the recorded returns fell by more than their confidence"
        cause = cause if fell else f"the return changed by {gain:.4g}"
        notes = (*notes, f"iteration {iteration}: step undone: {cause}")
    kept = replace(search, anchor=point, measured=measured) if accepted else search
    following = replace(kept, iteration=iteration, radius=radius, history=(*search.history, row), notes=notes)
    return _ended(following, settings, space)


def _paired_stderr(point: Point, anchor: Point) -> float:
    if point.replicates.shape != anchor.replicates.shape or not len(point.replicates):
        return 0.0
    return float(jackknife_stderr(point.replicates - anchor.replicates))


def _fell(new: tuple[float, float] | None, old: tuple[float, float] | None, confidence: float) -> bool:
    """Whether the mean return `new` lies below `old` by more than the confidence of their difference."""
    if new is None or old is None:
        return False
    return new[0] < old[0] - NormalDist().inv_cdf(confidence) * math.hypot(new[1], old[1])


def measured_return(data: Transitions, real_discount: float) -> tuple[float, float]:
    """Mean over episodes of the discounted return recorded, and its standard error (infinite for one episode)."""
    weighted = data.rewards.double() * real_discount ** data.step.double()
    totals = torch.zeros(len(data.initial_states), dtype=weighted.dtype, device=weighted.device)
    totals = totals.index_add(0, data.episode, weighted)
    spread = float(totals.std()) / len(totals) ** 0.5 if len(totals) > 1 else math.inf
    return float(totals.mean()), spread


def _joined(known: Transitions | None, new: Transitions) -> Transitions:
    return new if known is None else merge_transitions((known, new))


def _row(search: Search, space: Space, point: Point, measured: tuple[float, float] | None) -> dict[str, float]:
    """What the history says of one point, at the radius it was sought with."""
    row = {"iteration": float(search.iteration), "converged": float(point.trusted), "radius": search.radius}
    row |= {key: value for key, value in point.info.items() if key != "value_stderr"}
    row["gradient_norm"] = float(inside(search.anchor, space).norm())
    if measured is not None:
        row |= {"measured_return": measured[0], "measured_stderr": measured[1]}
    return row | {f"theta.{key}": float(point.theta[key]) for key in space.keys if point.theta[key].numel() == 1}


def _ended(search: Search, settings: TuneSettings, space: Space) -> Search:
    """The search with the reason why it is over, when it is."""
    slope, allowed = float(inside(search.anchor, space).norm()), settings.gradient_tol * abs(search.anchor.value)
    if search.anchor.trusted and feasible(search.anchor) and slope <= allowed:
        finished = f"converged: the scaled gradient is {slope:.1e}, below {allowed:.1e}"
    elif search.radius < settings.min_radius:
        finished = f"stopped: no gain within a radius of {search.radius:.1e} in scaled units"
    elif search.iteration >= settings.max_steps:
        finished = f"stopped after the allowed {settings.max_steps} iterations"
    else:
        return search
    broken = violated(search.anchor)
    return replace(search, finished=f"{finished}; the best theta violates {broken}" if broken else finished)
