"""After the search: what the real return leaves open in theta goes to the likelihood; what likelihood costs in return.

The trade-off curve maximises `J_real(nu*(theta)) + w l(theta)` for several weights w (return per nat of log-likelihood)
on the data already there. Its natural unit is `w = (J_tuned - J_fit) / (l_fit - l_tuned)`, the mean price of a nat on
the way from the fit to the tuned theta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sim2real.estimators.transitions import Transitions
from sim2real.null_space import EqualPolicies, Freedom, likeliest_equal_policy
from sim2real.params import Params, ravel
from sim2real.tune_search import UNUSABLE, advance, begin
from sim2real.tune_state import Likelihood, Point, Search, log_likelihood
from sim2real.tune_task import Task, evaluated, unconverged

_NATS = 1e-6  # likelihood not worth another training: a thousandth of a standard deviation in theta
_MANY = 50  # numbers in nu above which it counts as a network
_STEPS = 10  # iterations for each weight, each from the optimum of the weight before


@dataclass(frozen=True)
class TradeOff:
    """The best theta when a nat of log-likelihood is worth `weight` of real return."""

    weight: float
    """0: the tuned theta; infinite: the one tuning started from"""
    theta: Params
    nu: Params
    real_return: float
    """estimated on all data, the same for every weight"""
    real_return_stderr: float
    log_likelihood: float
    """nat"""


def use_freedom(task: Task, search: Search, likelihood: Likelihood) -> tuple[Freedom | None, str]:
    """The likeliest theta of the same policy as the search's, and a note; None where it cannot be found."""
    anchor = search.anchor
    problem = EqualPolicies(
        task.space,
        log_likelihood=partial(log_likelihood, likelihood, task.space),
        optimum=task.optimum,
        sensitivity=lambda theta, nu: task.sensitivity(theta, nu, cotangent=task.real(nu, search.data).grad),
        real_return=lambda nu: float(task.real(nu, search.data).value),
        output=held_output(task.act, anchor.nu, search.data),
    )
    try:
        with unconverged():
            free = likeliest_equal_policy(
                problem, anchor.theta, anchor.nu, return_tol=task.settings.freedom_tol, tol=_NATS
            )
    except UNUSABLE as cause:
        return None, f"the freedom of equal policies was not used: {cause}"
    (before, after), (first, last) = free.log_likelihood, free.real_return
    if not free.dimension:
        return free, "every direction of theta changes the policy: nothing is left to the likelihood"
    some = "1 direction of theta leaves" if free.dimension == 1 else f"{free.dimension} directions of theta leave"
    return free, (
        f"{some} the policy as it is: moved there, log-likelihood {before:.4g} -> {after:.4g} nat, "
        f"real return {first:.6g} -> {last:.6g} ({free.status})"
    )


def held_output(
    act: Callable[[Params, Tensor], Tensor] | None, nu: Params, data: Transitions | None
) -> Callable[[Params], Tensor]:
    """What of the policy is held: nu itself; for a deterministic network its actions at up to 256 recorded states.

    The many parameters of a network are not identifiable: retraining moves them though the policy stays as it is.
    """
    if act is None or data is None or len(ravel(nu)) <= _MANY:
        return ravel
    states = data.states[:: -(-len(data.states) // 256)].double()
    return lambda nu: act(nu, states).reshape(-1)


def trade_off(
    task: Task, search: Search, likelihood: Likelihood, start: Params, free: Freedom | None
) -> tuple[tuple[TradeOff, ...], tuple[str, ...]]:
    """`settings.trade_off` weights around the natural one, between the tuned theta and the start; and notes."""
    anchor, data = search.anchor, search.data
    value = lambda theta: log_likelihood(likelihood, task.space, theta)[0]
    look: Callable[[Params, Params], Point] = lambda theta, nu: evaluated(task, theta, nu, data, lambda point: False)
    try:
        fitted = look(start, anchor.nu)
        tuned = look(anchor.theta, anchor.nu) if free is None else look(free.theta, free.nu)
    except UNUSABLE as cause:
        return (), (f"no trade-off curve: {cause}",)
    ends = [_entry(0.0, tuned, value(tuned.theta)), _entry(torch.inf, fitted, value(start))]
    gain, cost = ends[0].real_return - ends[1].real_return, ends[1].log_likelihood - ends[0].log_likelihood
    if not (gain > 0 and cost > 0 and fitted.trusted):
        return tuple(ends), ("no trade-off to show: the tuned theta is no better than the start, or no less likely",)
    weights = (gain / cost) * torch.logspace(-1, 1, task.settings.trade_off, dtype=torch.float64)
    entries, notes, at = [ends[0]], [], tuned
    for weight in weights.tolist():
        try:
            at = _best(task, search, at, weight)
        except UNUSABLE as cause:
            notes.append(f"the trade-off curve lacks the weight {weight:.3g}: {cause}")
            continue
        entries.append(_entry(weight, at, value(at.theta)))
    return (*entries, ends[1]), tuple(notes)


def _best(task: Task, search: Search, start: Point, weight: float) -> Point:
    """The optimum at one weight, from the data already there."""
    settings = replace(task.settings, likelihood_weight=weight, max_steps=_STEPS, certify=False)
    weighted = replace(task, settings=settings, certificate=None)
    evaluate = partial(evaluated, weighted)
    here = begin(start.theta, start.nu, search.data, settings, task.space, evaluate, None)
    if here is None:
        raise ValueError("there are no data to trade on")
    while not here.finished:
        following = advance(here, settings, task.space, evaluate, None)
        if isinstance(following, Point):
            break
        here = following
    return here.anchor


def _entry(weight: float, point: Point, fit: float) -> TradeOff:
    info = point.info
    return TradeOff(weight, point.theta, point.nu, info["real_return"], info.get("real_return_stderr", 0.0), fit)
