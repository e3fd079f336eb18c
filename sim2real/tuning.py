"""Tune simulator parameters for the real return of the policy that training in the simulator finds.

`tune` repeats `tune_step` (the chain from theta to dJ_real/dtheta): a quasi-Newton model of J_real(nu*(theta)) inside a
trust region on theta, steps kept in the box, undone when the real return falls. Every candidate is first scored on the
real transitions already there, and only then run; both ends of a step are always compared, and their gradients
differenced, on the same data, so that most of the noise cancels. A candidate is kept only where the error of its
gradient is certified. What the real return leaves open in theta goes to the likelihood of the log in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.calibration import Calibration
from sim2real.estimators.certificate import certify
from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.null_space import Freedom
from sim2real.params import Estimate, Params, check_same_keys
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.tune_finish import TradeOff, trade_off, use_freedom
from sim2real.tune_search import UNUSABLE, Gather, advance, begin, measured_return
from sim2real.tune_state import Likelihood, Point, Search, TuneSettings, restore, snapshot, tuning_space
from sim2real.tune_step import (
    Certify,
    Objective,
    Trainer,
    TuneStep,
    in_sim_optimum,
    in_sim_return,
    sensitivity_of,
    tune_step,
)
from sim2real.tune_task import Limit, Task, certificate_of, evaluated, uncertified

__all__ = [
    "Collect",
    "RealReward",
    "TradeOff",
    "TuneResult",
    "TuneSettings",
    "TuneStep",
    "tune",
    "tune_step",
]

Collect = Callable[[Policy, Params, int, torch.Generator], Rollout | RolloutLog | Transitions | None]
"""policy, nu, iteration, generator -> real rollouts of that policy (exploration included); None: not there yet"""


@dataclass(frozen=True)
class TuneResult:
    """The best theta found, its in-sim optimal policy parameters, and how the search went."""

    theta: Params
    nu: Params
    history: tuple[dict[str, float], ...]
    """per iteration, of the values tried: "iteration", "accepted", "converged", "real_return", "real_return_stderr",
    "gain", "gain_stderr" (against the best so far, on the same data), "predicted_gain", "measured_return",
    "measured_stderr" (of the rollouts just recorded), "radius", "step_norm", "gradient_norm" (where the step began,
    scaled, free of the box), "stationarity", "residual", "certified" (1 or 0), "error_bound", "relative_bound",
    "audit_error", "margin.NAME" (of a constraint), "effective_sample_size", "bellman_radius", "transitions", and
    "theta.NAME" for scalar parameters; absent where they do not apply"""
    report: SolveReport
    notes: tuple[str, ...]
    """one sentence per refused or undone step, and why the search ended"""
    waiting: bool
    """True when `collect` returned None: gather rollouts of `nu` (the policy to run next, that of `theta`) and call
    `tune` again with `state`"""
    state: Params
    """exact snapshot: handing it back as `state` continues bitwise as if nothing had stopped"""
    freedom: Freedom | None = None
    """the last move of theta, to the likeliest model of the same policy; None where there was no likelihood"""
    trade_off: tuple[TradeOff, ...] = ()
    """real return against log-likelihood, from the tuned theta to the start, with `settings.trade_off`"""
    calibration: tuple[Calibration, Calibration] | None = None
    """predictive calibration at the start and at the tuned theta, with `calibration`"""


def tune(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    log: Rollout | RolloutLog | Transitions | None,
    noise: Noise | None,
    *,
    real_reward: RealReward | None,
    real_discount: float,
    collect: Collect | None = None,
    settings: TuneSettings | None = None,
    box: Box | None = None,
    free: tuple[str, ...] = (),
    scale: Params | None = None,
    likelihood: Likelihood | None = None,
    terminal: Callable[[Tensor], Tensor] | None = None,
    objective: Objective | None = None,
    optimum: Trainer | None = None,
    gradient: Callable[..., Estimate] = logged_policy_gradient,
    sensitivity: Callable[..., Sensitivity] | Literal["auto"] = policy_sensitivity,
    hypergradient: Callable[..., Estimate] | None = None,
    certificate: Certify | None = certify,
    constraints: Mapping[str, Limit] = MappingProxyType({}),
    calibration: Callable[[Params], Calibration] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> TuneResult:
    """Repeat `tune_step` inside a trust region on theta, with rollback; resumable exactly.

    `log`: real rollouts already there (or None); `collect`: gathers more with each iteration's policy (iteration 0 runs
    that of the start), or None to tune against `log` alone. All transitions ever recorded are used. `box` None: the
    model's. `free`: names of the parameters to move (empty: all). `likelihood`, weighted by the settings, keeps theta
    near what the log says; at the end it decides among the models of equal policy (`settings.use_freedom`).
    `terminal` (s' -> bool) marks successors after which nothing is worth anything; pass it for environments that
    terminate, because a recording cannot tell an end from a time limit. `certificate`: as `certify`, called with `tol`,
    `scale` and `directions` besides; None: none. The rest as in `tune_step`. A candidate whose optimum, solve, critic
    or certificate cannot be trusted is refused, with a note; a start whose gradient is not certified ends the run.
    `constraints`: name -> function (nu, real transitions) -> `Margin`, such as
    `lambda nu, data: constraint_gradient(limit, policy, nu, data)`; candidates that violate one are refused, and a
    start that does is led back first. `calibration(theta)`, such as `partial(calibrate, mdp, log, reference=theta)`, is
    taken before and after. A policy that is a formula of theta rather than an optimum (MPC) takes
    `optimum=lambda theta, nu0: f(theta)`, `sensitivity=partial(explicit_sensitivity, optimum=f)` and neither noise nor
    objective.
    `on_step(state)` is called after every iteration; passing that `state` back continues bitwise.
    Raises `ValueError` when the start itself cannot be evaluated, data are missing or `state` is none of `tune`'s, and
    `KeyError` when it is one of another theta.
    """
    options = settings if settings is not None else TuneSettings()
    space = tuning_space(theta, box if box is not None else mdp.box, free, scale)
    J = in_sim_return(mdp, policy, noise, objective, optimum)
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    damped = sensitivity_of(sensitivity, mdp, policy, noise)
    damped = partial(damped, damping=options.damping) if options.damping else damped
    judged = J if objective is not None or noise is not None else None
    judge = certificate if hypergradient is None else None
    task = Task(
        chain=partial(
            tune_step,
            mdp,
            policy,
            noise=noise,
            real_reward=real_reward,
            real_discount=real_discount,
            objective=J,
            optimum=optimum,
            gradient=gradient,
            sensitivity=damped,
            hypergradient=hypergradient,
        ),
        certificate=certificate_of(judge, judged, optimum, mdp.derivative_order, space, options),
        optimum=partial(in_sim_optimum, J, optimum=optimum),
        sensitivity=partial(damped, J, derivative_order=mdp.derivative_order),
        real=partial(gradient, policy, real_reward=real_reward, real_discount=real_discount),
        space=space,
        likelihood=likelihood,
        settings=options,
        constraints=constraints,
        act=None if policy.noise_dim else lambda nu, states: policy.act(nu, states, states[:, :0]),
    )
    evaluate = partial(evaluated, task)
    source = _source(collect, policy, rng, real_reward, real_discount, terminal)
    before, uncalibrated = _at_start(calibration, theta)
    if state:
        search = restore(state, rng)
        check_same_keys(theta, search.anchor.theta, "the theta of the state")
    else:
        first = task.optimum(theta, nu)
        known = None if log is None else transitions(log, real_reward, terminal=terminal)
        begun = begin(theta, first, known, options, space, evaluate, source)
        if begun is None:
            return TuneResult(theta, first, (), _report(None), (), waiting=True, state={})
        search = replace(begun, notes=(*begun.notes, *uncertified(task, mdp, direct=hypergradient is not None)))
        if on_step is not None:
            on_step(snapshot(search, rng))
    search, wanted, saved = _run(search, lambda s: advance(s, options, space, evaluate, source), rng, on_step)
    point = search.anchor if wanted is None else wanted
    notes, waiting = (*search.notes, *uncalibrated), wanted is not None
    result = TuneResult(point.theta, point.nu, search.history, _report(search), notes, waiting=waiting, state=saved)
    if waiting:
        return result
    if likelihood is not None:
        result = _likelier(result, task, search, theta, direct=hypergradient is not None)
    return result if calibration is None or before is None else _calibrated(result, calibration, before)


def _likelier(result: TuneResult, task: Task, search: Search, start: Params, *, direct: bool) -> TuneResult:
    """`result` at the likeliest theta of the same policy, with the trade-off curve, as far as they are wanted."""
    assert task.likelihood is not None
    free, notes = None, result.notes
    if task.settings.use_freedom and direct:
        notes = (*notes, "the freedom of equal policies was not used: a hypergradient does not give dnu*/dtheta")
    elif task.settings.use_freedom:
        free, note = use_freedom(task, search, task.likelihood)
        notes = (*notes, note)
        if free is not None:
            result = replace(result, theta=free.theta, nu=free.nu, freedom=free)
    if task.settings.trade_off:
        curve, told = trade_off(task, search, task.likelihood, start, free)
        result, notes = replace(result, trade_off=curve), (*notes, *told)
    return replace(result, notes=notes)


def _at_start(
    calibration: Callable[[Params], Calibration] | None, theta: Params
) -> tuple[Calibration | None, tuple[str, ...]]:
    """The calibration of the start, and a note where it has none."""
    try:
        return None if calibration is None else calibration(theta), ()
    except UNUSABLE as cause:
        return None, (f"no predictive calibration: {cause}",)


def _calibrated(result: TuneResult, calibration: Callable[[Params], Calibration], before: Calibration) -> TuneResult:
    try:
        after = calibration(result.theta)
    except UNUSABLE as cause:
        return replace(result, notes=(*result.notes, f"the tuned theta has no calibration: {cause}"))
    return replace(result, calibration=(before, after))


def _source(
    collect: Collect | None,
    policy: Policy,
    generator: torch.Generator,
    real_reward: RealReward | None,
    real_discount: float,
    terminal: Callable[[Tensor], Tensor] | None,
) -> Gather | None:
    """`collect` as the search wants it: transitions and their measured return."""
    if collect is None:
        return None

    def gather(nu: Params, iteration: int) -> tuple[Transitions, tuple[float, float]] | None:
        recorded = collect(policy, nu, iteration, generator)
        if recorded is None:
            return None
        new = transitions(recorded, real_reward, terminal=terminal)
        return new, measured_return(new, real_discount)

    return gather


def _run(
    search: Search,
    step: Callable[[Search], Search | Point],
    generator: torch.Generator,
    on_step: Callable[[Params], None] | None,
) -> tuple[Search, Point | None, Params]:
    """Iterate until the search ends or must wait for rollouts of a point; the last state, that point, a snapshot."""
    saved = snapshot(search, generator)
    while not search.finished:
        following = step(search)
        if isinstance(following, Point):
            # the snapshot of before the step: what was drawn while waiting is drawn again
            return search, following, saved
        search = following
        saved = snapshot(search, generator)
        if on_step is not None:
            on_step(saved)
    return search, None, saved


def _report(search: Search | None) -> SolveReport:
    if search is None:
        return SolveReport(False, math.inf, 0, "waiting for rollouts of the first policy")
    slope = float(search.anchor.gradient.norm()) / max(abs(search.anchor.value), 1e-300)
    status = search.finished if search.finished else f"waiting for rollouts of iteration {search.iteration + 1}"
    return SolveReport(search.finished.startswith("converged"), slope, search.iteration, status)
