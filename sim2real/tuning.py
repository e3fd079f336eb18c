"""Tune simulator parameters for the real return of the policy that training in the simulator finds.

With J(theta, nu) the in-sim return, nu*(theta) its maximiser and J_real(nu) the real return, the gradient is

    d J_real(nu*(theta)) / d theta = (d nu*/d theta)^T g_nu,    g_nu = grad_nu J_real(nu*),
    d nu*/d theta = -[J_nunu]^{-1} J_nutheta.

`tune_step` is that chain, once. `tune` repeats it: a quasi-Newton model of J_real(nu*(theta)) inside a trust region on
theta, steps kept in the box, undone when the real return falls. Every candidate is first scored on the real transitions
already there, and only then run; both ends of a step are always compared, and their gradients differenced, on the
same data, so that most of the noise cancels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, check_same_keys, ravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, expected_return
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedWarning
from sim2real.solvers.optimum import policy_optimum
from sim2real.tune_search import Gather, Likelihood, advance, begin, log_likelihood, measured_return
from sim2real.tune_state import Point, Search, Space, TuneSettings, restore, snapshot, tuning_space

Collect = Callable[[Policy, Params, int, torch.Generator], Rollout | RolloutLog | Transitions | None]
"""policy, nu, iteration, generator -> real rollouts of that policy (exploration included); None: not there yet"""
Objective = Callable[[Params, Params], Tensor]
"""theta, nu -> in-sim return, a scalar; twice differentiable"""


@dataclass(frozen=True)
class TuneStep:
    """One pass through the chain: `nu = nu*(theta)` and `grad = dJ_real(nu*(theta))/dtheta`, uphill."""

    nu: Params
    grad: Params
    info: dict[str, Tensor]
    """"real_return", "real_return_stderr", "stationarity" (`|grad_nu J|`), "residual" (of the linear solve) and, where
    known, "error_bound"; and all that the gradient estimator reports ("effective_sample_size", "stderr", ...)"""
    report: SolveReport
    """converged: nu is a stationary in-sim optimum, the critic is stable, the linear solve reached its tolerance"""
    grad_nu: Params = field(default_factory=dict)
    """g_nu, the real-data gradient in policy parameters"""


@dataclass(frozen=True)
class TuneResult:
    """The best theta found, its in-sim optimal policy parameters, and how the search went."""

    theta: Params
    nu: Params
    history: tuple[dict[str, float], ...]
    """per iteration, of the values tried: "iteration", "accepted", "converged", "real_return", "real_return_stderr",
    "gain", "gain_stderr" (against the best so far, on the same data), "predicted_gain", "measured_return",
    "measured_stderr" (of the rollouts just recorded), "radius", "step_norm", "gradient_norm" (where the step began,
    scaled, free of the box), "stationarity", "residual", "effective_sample_size", "bellman_radius", "transitions", and
    "theta.NAME" for scalar parameters; absent where they do not apply"""
    report: SolveReport
    notes: tuple[str, ...]
    """one sentence per refused or undone step, and why the search ended"""
    waiting: bool
    """True when `collect` returned None: gather rollouts of `nu` (the policy to run next, that of `theta`) and call
    `tune` again with `state`"""
    state: Params
    """exact snapshot: handing it back as `state` continues bitwise as if nothing had stopped"""


def tune_step(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    log: Rollout | RolloutLog | Transitions | None,
    noise: Noise | None,
    *,
    real_reward: RealReward | None,
    real_discount: float,
    objective: Objective | None = None,
    optimum: Callable[[Params, Params], Params] | None = None,
    gradient: Callable[..., Estimate] = logged_policy_gradient,
    sensitivity: Callable[..., Sensitivity] = policy_sensitivity,
) -> TuneStep:
    """The whole chain once: nu*(theta) warm-started from nu, real-data gradient, sensitivity, gradient in theta.

    `objective` replaces the in-sim return sampled on `noise` (then None); `optimum(theta, nu0) -> nu*` replaces
    `policy_optimum`: any trainer, whose answer is checked for stationarity. `gradient(policy, nu, log, real_reward=,
    real_discount=)` and `sensitivity(objective, theta, nu, cotangent=, derivative_order=)` are options bound with
    `partial`, or replacements. `report.converged` tells whether the gradient can be trusted; where it cannot, the
    sensitivity warns `UnconvergedWarning`, or raises `UnconvergedError` when bound with `strict=True`.
    """
    J = objective if objective is not None else _sampled_return(mdp, policy, noise)
    best = _in_sim_optimum(J, theta, nu, optimum)
    real = gradient(policy, best, log, real_reward=real_reward, real_discount=real_discount)
    chain = sensitivity(J, theta, best, cotangent=real.grad, derivative_order=mdp.derivative_order)
    grad = chain.vjp(real.grad)
    doubt = _doubt(real)
    status = doubt if doubt else chain.report.status
    report = replace(chain.report, converged=chain.report.converged and not doubt, status=status)
    figures = {
        "real_return": real.value,
        "real_return_stderr": real.info.get("value_stderr", torch.zeros(())),
        "residual": torch.tensor(report.residual, dtype=torch.float64),
    }
    optional = {"stationarity": report.stationarity, "error_bound": report.error_bound}
    figures |= {k: torch.tensor(v, dtype=torch.float64) for k, v in optional.items() if v is not None}
    return TuneStep(best, grad, dict(real.info) | figures, report, real.grad)


def _doubt(real: Estimate) -> str:
    """Why the estimate of the real return cannot be right; empty when nothing speaks against it."""
    figures = {
        key: float(real.info[key]) for key in ("bellman_radius", "return_low", "return_high") if key in real.info
    }
    value, radius = float(real.value), figures.get("bellman_radius", 0.0)
    low, high = figures.get("return_low", -math.inf), figures.get("return_high", math.inf)
    if not math.isfinite(value):
        return f"the real return is {value}"
    if radius >= 1:
        return f"the policy is unstable on the real data (Bellman radius {radius:.4g})"
    if not low <= value <= high:
        return f"the critic's return {value:.4g} is outside what the recorded rewards allow, {low:.4g} to {high:.4g}"
    return ""


def _sampled_return(mdp: ModelMDP, policy: Policy, noise: Noise | None) -> Objective:
    if noise is None:
        raise ValueError("pass noise (sample_noise) for the in-sim return, or an objective(theta, nu)")
    return lambda theta, nu: expected_return(mdp, policy, theta, nu, noise)


def _in_sim_optimum(
    J: Objective, theta: Params, nu: Params, optimum: Callable[[Params, Params], Params] | None
) -> Params:
    # Newton's last step, taken in any case, squares this tolerance wherever the optimum is unique
    found = policy_optimum(J, theta, nu, tol=1e-7).nu if optimum is None else optimum(theta, nu)
    return {key: value.detach() for key, value in found.items()}


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
    optimum: Callable[[Params, Params], Params] | None = None,
    gradient: Callable[..., Estimate] = logged_policy_gradient,
    sensitivity: Callable[..., Sensitivity] = policy_sensitivity,
    generator: torch.Generator | None = None,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> TuneResult:
    """Repeat `tune_step` inside a trust region on theta, with rollback; resumable exactly.

    `log`: real rollouts already there (or None); `collect`: gathers more with each iteration's policy (iteration 0 runs
    that of the start), or None to tune against `log` alone. All transitions ever recorded are used. `box` None: the
    model's. `free`: names of the parameters to move (empty: all). `likelihood`, weighted by the settings, keeps theta
    near what the log says. `terminal` (s' -> bool) marks successors after which nothing is worth anything; pass it for
    environments that terminate, because a recording cannot tell an end from a time limit.
    The rest as in `tune_step`. A candidate whose optimum, solve or critic cannot be trusted is refused, with a note.
    `on_step(state)` is called after every iteration; passing that `state` back continues bitwise.
    Raises `ValueError` when the start itself cannot be evaluated, data are missing or `state` is none of `tune`'s, and
    `KeyError` when it is one of another theta.
    """
    options = settings if settings is not None else TuneSettings()
    space = tuning_space(theta, box if box is not None else mdp.box, free, scale)
    J = objective if objective is not None else _sampled_return(mdp, policy, noise)
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    damped = partial(sensitivity, damping=options.damping) if options.damping else sensitivity
    chain = partial(tune_step, mdp, policy, noise=noise, objective=J, optimum=optimum, gradient=gradient)
    chain = partial(chain, real_reward=real_reward, real_discount=real_discount, sensitivity=damped)

    def evaluate(at: Params, start: Params, data: Transitions | None) -> Point:
        return _point(chain(theta=at, nu=start, log=data), at, space, likelihood, options.likelihood_weight)

    source = _source(collect, policy, rng, real_reward, real_discount, terminal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)  # such points are refused, and noted, instead
        if state:
            search = restore(state, rng)
            check_same_keys(theta, search.anchor.theta, "the theta of the state")
        else:
            first = _in_sim_optimum(J, theta, nu, optimum)
            known = None if log is None else transitions(log, real_reward, terminal=terminal)
            begun = begin(theta, first, known, options, space, evaluate, source)
            if begun is None:
                return TuneResult(theta, first, (), _report(None), (), waiting=True, state={})
            search = begun
            if on_step is not None:
                on_step(snapshot(search, rng))
        return _run(search, lambda s: advance(s, options, space, evaluate, source), rng, on_step)


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
) -> TuneResult:
    """Iterate until the search ends or must wait for rollouts of a point."""
    saved = snapshot(search, generator)
    while not search.finished:
        following = step(search)
        if isinstance(following, Point):
            # the snapshot of before the step: what was drawn while waiting is drawn again
            return _result(following, search, saved, waiting=True)
        search = following
        saved = snapshot(search, generator)
        if on_step is not None:
            on_step(saved)
    return _result(search.anchor, search, saved, waiting=False)


def _result(point: Point, search: Search, state: Params, *, waiting: bool) -> TuneResult:
    report = _report(search)
    return TuneResult(point.theta, point.nu, search.history, report, search.notes, waiting=waiting, state=state)


def _point(step: TuneStep, theta: Params, space: Space, likelihood: Likelihood | None, weight: float) -> Point:
    """A `TuneStep` as value, gradient and known curvature in the scaled free parameters, the likelihood included."""
    gradient = ravel({key: step.grad[key] for key in space.keys}).double() * space.scale
    value, curvature = float(step.info["real_return"]), torch.diag(torch.zeros_like(gradient))
    if likelihood is not None and weight > 0:
        fit, slope, precision = log_likelihood(likelihood, space, theta)
        value, gradient, curvature = value + weight * fit, gradient + weight * slope, weight * precision
    finite = math.isfinite(value) and bool(torch.isfinite(gradient).all())
    trusted = step.report.converged and finite
    reason = "" if trusted else (step.report.status if finite else "the real return or its gradient is not finite")
    replicates = step.info.get("value_replicates", gradient.new_zeros(0))
    info = {key: float(item) for key, item in step.info.items() if item.numel() == 1}
    return Point(theta, step.nu, value, gradient, curvature, replicates, trusted, reason, info)


def _report(search: Search | None) -> SolveReport:
    if search is None:
        return SolveReport(False, math.inf, 0, "waiting for rollouts of the first policy")
    slope = float(search.anchor.gradient.norm()) / max(abs(search.anchor.value), 1e-300)
    status = search.finished if search.finished else f"waiting for rollouts of iteration {search.iteration + 1}"
    return SolveReport(search.finished.startswith("converged"), slope, search.iteration, status)
