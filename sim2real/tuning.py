"""Tune simulator parameters for the real return of the policy that training in the simulator finds.

`tune` repeats `tune_step` (the chain from theta to dJ_real/dtheta): a quasi-Newton model of J_real(nu*(theta)) inside a
trust region on theta, steps kept in the box, undone when the real return falls. Every candidate is first scored on the
real transitions already there, and only then run; both ends of a step are always compared, and their gradients
differenced, on the same data, so that most of the noise cancels. A candidate is kept only where the error of its
gradient is certified. What the real return leaves open in theta goes to the likelihood of the log in the end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.estimators.certificate import Certificate, certify
from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.null_space import EqualPolicies, Freedom, likeliest_equal_policy
from sim2real.params import Estimate, Params, check_same_keys, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedWarning
from sim2real.tune_search import UNUSABLE, Gather, advance, begin, measured_return
from sim2real.tune_state import (
    Likelihood,
    Point,
    Search,
    Space,
    TuneSettings,
    log_likelihood,
    restore,
    snapshot,
    tuning_space,
)
from sim2real.tune_step import (
    Certify,
    Objective,
    Trainer,
    TuneStep,
    certified_step,
    in_sim_optimum,
    sampled_return,
    tune_step,
)

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
    scaled, free of the box), "stationarity", "residual", "certified" (1 or 0), "error_bound", "audit_error", "refused"
    (candidates), "effective_sample_size", "bellman_radius", "transitions", and "theta.NAME" for scalar parameters;
    absent where they do not apply"""
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


@dataclass(frozen=True)
class _Task:
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
    sensitivity: Callable[..., Sensitivity] = policy_sensitivity,
    hypergradient: Callable[..., Estimate] | None = None,
    certificate: Certify | None = certify,
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
    `on_step(state)` is called after every iteration; passing that `state` back continues bitwise.
    Raises `ValueError` when the start itself cannot be evaluated, data are missing or `state` is none of `tune`'s, and
    `KeyError` when it is one of another theta.
    """
    options = settings if settings is not None else TuneSettings()
    space = tuning_space(theta, box if box is not None else mdp.box, free, scale)
    J = objective if objective is not None else sampled_return(mdp, policy, noise)
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    damped = partial(sensitivity, damping=options.damping) if options.damping else sensitivity
    task = _Task(
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
        certificate=_certificate(mdp, J, optimum, certificate if hypergradient is None else None, space, options),
        optimum=partial(in_sim_optimum, J, optimum=optimum),
        sensitivity=partial(damped, J, derivative_order=mdp.derivative_order),
        real=partial(gradient, policy, real_reward=real_reward, real_discount=real_discount),
        space=space,
        likelihood=likelihood,
        settings=options,
    )
    evaluate = partial(_evaluated, task)
    source = _source(collect, policy, rng, real_reward, real_discount, terminal)
    if state:
        search = restore(state, rng)
        check_same_keys(theta, search.anchor.theta, "the theta of the state")
    else:
        first = task.optimum(theta, nu)
        known = None if log is None else transitions(log, real_reward, terminal=terminal)
        begun = begin(theta, first, known, options, space, evaluate, source)
        if begun is None:
            return TuneResult(theta, first, (), _report(None), (), waiting=True, state={})
        search = replace(begun, notes=(*begun.notes, *_uncertified(task, mdp, hypergradient is not None)))
        if on_step is not None:
            on_step(snapshot(search, rng))
    search, wanted, saved = _run(search, lambda s: advance(s, options, space, evaluate, source), rng, on_step)
    point = search.anchor if wanted is None else wanted
    notes, waiting = search.notes, wanted is not None
    result = TuneResult(point.theta, point.nu, search.history, _report(search), notes, waiting=waiting, state=saved)
    if waiting or likelihood is None or not options.use_freedom:
        return result
    if hypergradient is not None:
        note = "the freedom of equal policies was not used: a hypergradient does not give dnu*/dtheta"
        return replace(result, notes=(*notes, note))
    return _freed(result, task, search, likelihood)


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


def _evaluated(
    task: _Task, theta: Params, nu: Params, data: Transitions | None, worth: Callable[[Point], bool]
) -> Point:
    """The chain at theta as a point of the search; certified where `worth` the cost says so."""
    with _unconverged() as heard:
        step = task.chain(theta=theta, nu=nu, log=data)
        point = _point(step, theta, task)
        if task.certificate is not None and step.sensitivity is not None and point.trusted and worth(point):
            found = task.certificate(theta, step.nu, step.sensitivity, step.grad_nu)
            point = _point(certified_step(step, found), theta, task)
    return replace(point, warned=tuple(dict.fromkeys(heard)))


def _certificate(
    mdp: ModelMDP,
    J: Objective,
    optimum: Trainer | None,
    certificate: Certify | None,
    space: Space,
    settings: TuneSettings,
) -> Callable[..., Certificate] | None:
    """The certificate of the free parameters, bound to the problem; None where it is unwanted or cannot be had."""
    unable = mdp.derivative_order == 0 and (optimum is None or settings.audit == 0)
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
            directions=settings.audit,
            derivative_order=mdp.derivative_order,
        )

    return bound


def _uncertified(task: _Task, mdp: ModelMDP, direct: bool) -> tuple[str, ...]:
    """A note on why nothing is certified although it was asked for."""
    if task.certificate is not None or not task.settings.certify:
        return ()
    cause = "a hypergradient has no linear solve to judge" if direct else "no certificate was given"
    if not direct and mdp.derivative_order == 0:
        cause = "the simulator has no derivatives; with an optimum, audit > 0 judges by solving anew"
    return (f"no gradient was certified: {cause}",)


@contextmanager
def _unconverged() -> Iterator[list[str]]:
    """Collects the texts of `UnconvergedWarning`: they become notes. Other warnings pass."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnconvergedWarning)
        yield heard
    heard.extend(str(item.message) for item in caught if issubclass(item.category, UnconvergedWarning))
    for item in caught:
        if not issubclass(item.category, UnconvergedWarning):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _point(step: TuneStep, theta: Params, task: _Task) -> Point:
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
    return Point(theta, step.nu, value, gradient, curvature, replicates, trusted, reason, info)


def _freed(result: TuneResult, task: _Task, search: Search, likelihood: Likelihood) -> TuneResult:
    """`result` at the likeliest theta of the same policy, with a note; as it was where that cannot be found."""
    problem = EqualPolicies(
        task.space,
        log_likelihood=partial(log_likelihood, likelihood, task.space),
        optimum=task.optimum,
        sensitivity=lambda theta, nu: task.sensitivity(theta, nu, cotangent=task.real(nu, search.data).grad),
        real_return=lambda nu: float(task.real(nu, search.data).value),
    )
    try:
        with _unconverged():
            free = likeliest_equal_policy(problem, result.theta, result.nu, return_tol=task.settings.freedom_tol)
    except UNUSABLE as cause:
        return replace(result, notes=(*result.notes, f"the freedom of equal policies was not used: {cause}"))
    (before, after), (first, last) = free.log_likelihood, free.real_return
    note = (
        f"{free.dimension} directions of theta leave the policy as it is: moved there, log-likelihood {before:.4g} -> "
        f"{after:.4g} nat, real return {first:.6g} -> {last:.6g} ({free.status})"
    )
    return replace(result, theta=free.theta, nu=free.nu, notes=(*result.notes, note), freedom=free)


def _report(search: Search | None) -> SolveReport:
    if search is None:
        return SolveReport(False, math.inf, 0, "waiting for rollouts of the first policy")
    slope = float(search.anchor.gradient.norm()) / max(abs(search.anchor.value), 1e-300)
    status = search.finished if search.finished else f"waiting for rollouts of iteration {search.iteration + 1}"
    return SolveReport(search.finished.startswith("converged"), slope, search.iteration, status)
