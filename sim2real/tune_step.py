"""One pass through the chain from theta to the gradient of the real return in theta.

With J(theta, nu) the in-sim return, nu*(theta) its maximiser and J_real(nu) the real return,

    d J_real(nu*(theta)) / d theta = (d nu*/d theta)^T g_nu,    g_nu = grad_nu J_real(nu*),
    d nu*/d theta = -[J_nunu]^{-1} J_nutheta.

A certificate bounds the error of that gradient; a `hypergradient` replaces the last two factors at once (a soft policy
needs no Hessian: see `sim2real.estimators.hessian_free`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.auto_sensitivity import auto_sensitivity
from sim2real.estimators.certificate import Certificate
from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.soft_value import inconsistency
from sim2real.estimators.transitions import RealReward, Transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout, expected_return
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.solvers.optimum import policy_optimum

Objective = Callable[[Params, Params], Tensor]
"""theta, nu -> in-sim return, a scalar; twice differentiable"""
Trainer = Callable[[Params, Params], Params]
"""theta, nu0 -> nu*(theta)"""
Certify = Callable[..., Certificate]
"""J, theta, nu*, sensitivity, cotangent, *, optimum, derivative_order, ... -> `Certificate`, as `certify` does"""


@dataclass(frozen=True)
class TuneStep:
    """One pass through the chain: `nu = nu*(theta)` and `grad = dJ_real(nu*(theta))/dtheta`, uphill."""

    nu: Params
    grad: Params
    info: dict[str, Tensor]
    """"real_return", "real_return_stderr", "stationarity" (`|grad_nu J|`), "residual" (of the linear solve) and, where
    known, "error_bound"; with a certificate "certified" (1 or 0), its "error_bound", "relative_bound" and
    "audit_error"; and all that the gradient estimator reports ("effective_sample_size", "stderr", ...)"""
    report: SolveReport
    """it has converged when nu is a stationary in-sim optimum, the critic is stable, the linear solve reached its
    tolerance, and the certificate, if one was asked for, holds"""
    grad_nu: Params = field(default_factory=dict)
    """g_nu, the real-data gradient in policy parameters; empty with a `hypergradient`"""
    sensitivity: Sensitivity | None = None
    """dnu*/dtheta at nu; None with a `hypergradient`"""


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
    optimum: Trainer | None = None,
    gradient: Callable[..., Estimate] = logged_policy_gradient,
    sensitivity: Callable[..., Sensitivity] | Literal["auto"] = policy_sensitivity,
    hypergradient: Callable[..., Estimate] | None = None,
    certificate: Certify | None = None,
) -> TuneStep:
    """The whole chain once: nu*(theta) warm-started from nu, real-data gradient, sensitivity, gradient in theta.

    `objective` replaces the in-sim return sampled on `noise` (then None); `optimum(theta, nu0) -> nu*` replaces
    `policy_optimum`: any trainer, whose answer is checked for stationarity. `gradient(policy, nu, log, real_reward=,
    real_discount=)` and `sensitivity(objective, theta, nu, cotangent=, derivative_order=)` are options bound with
    `partial`, or replacements; "auto" takes the first route whose conditions hold (`auto_sensitivity`).
    `hypergradient(mdp, policy, theta, nu, log, noise, real_reward=, real_discount=)`, such as
    `partial(hessian_free_gradient, temperature=0.1)`, gives the real return with its gradient in theta at once and
    replaces both. `certificate(objective, theta, nu, sensitivity, g_nu, optimum=, derivative_order=)`, such as
    `certify`, bounds the error of the gradient. `report.converged` tells whether the gradient can be trusted; where it
    cannot, the sensitivity warns `UnconvergedWarning`, or raises `UnconvergedError` when bound with `strict=True`.
    """
    J = in_sim_return(mdp, policy, noise, objective, optimum)
    best = in_sim_optimum(J, theta, nu, optimum)
    if hypergradient is not None:
        task = {"real_reward": real_reward, "real_discount": real_discount}
        estimate = hypergradient(mdp, policy, theta, best, log, noise, **task)
        report = SolveReport(True, 0.0, 0, "gradient in theta without a linear solve")
        return _step(best, estimate.grad, estimate, report)
    real = gradient(policy, best, log, real_reward=real_reward, real_discount=real_discount)
    route = sensitivity_of(sensitivity, mdp, policy, noise)
    chain = route(J, theta, best, cotangent=real.grad, derivative_order=mdp.derivative_order)
    step = _step(best, chain.vjp(real.grad), real, chain.report)
    step = replace(step, grad_nu=real.grad, sensitivity=chain)
    if certificate is None:
        return step
    order = mdp.derivative_order
    return certified_step(step, certificate(J, theta, best, chain, real.grad, optimum=optimum, derivative_order=order))


def certified_step(step: TuneStep, found: Certificate) -> TuneStep:
    """`step` with what the certificate says of its gradient; not converged where it does not hold."""
    figures = {"certified": float(found.holds), "error_bound": found.error_bound, "audit_error": found.audit_error}
    figures["relative_bound"] = found.relative_bound
    info = step.info | {k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items() if v is not None}
    status = step.report.status if found.holds else f"not certified: {'; '.join(found.reasons)}"
    report = replace(step.report, converged=step.report.converged and found.holds, status=status)
    return replace(step, info=info, report=report)


def _step(nu: Params, grad: Params, real: Estimate, solve: SolveReport) -> TuneStep:
    """The step with the figures of the estimate and of the solve; converged only where neither is in doubt."""
    doubt = _doubt(real)
    report = replace(solve, converged=solve.converged and not doubt, status=doubt if doubt else solve.status)
    figures = {
        "real_return": real.value,
        "real_return_stderr": real.info.get("value_stderr", torch.zeros(())),
        "residual": torch.tensor(report.residual, dtype=torch.float64),
    }
    optional = {"stationarity": report.stationarity, "error_bound": report.error_bound}
    figures |= {k: torch.tensor(v, dtype=torch.float64) for k, v in optional.items() if v is not None}
    return TuneStep(nu, grad, dict(real.info) | figures, report)


def _doubt(real: Estimate) -> str:
    """Why the estimate of the real return or its gradient cannot be right; empty when nothing speaks against it."""
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
    return inconsistency(real.info, float(real.info.get("consistency_tol", math.inf)))


def sensitivity_of(
    sensitivity: Callable[..., Sensitivity] | Literal["auto"], mdp: ModelMDP, policy: Policy, noise: Noise | None
) -> Callable[..., Sensitivity]:
    """`sensitivity`, or `auto_sensitivity` on the noise of the in-sim return. Raises `ValueError` for anything else."""
    if not isinstance(sensitivity, str):
        return sensitivity
    if sensitivity != "auto":
        raise ValueError(f"sensitivity must be a function or 'auto', got {sensitivity!r}")
    if noise is None:
        raise ValueError("sensitivity='auto' rolls out the simulator: pass noise (sample_noise)")
    return lambda J, theta, nu, **options: auto_sensitivity(mdp, policy, theta, nu, noise, objective=J, **options)


def in_sim_return(
    mdp: ModelMDP, policy: Policy, noise: Noise | None, objective: Objective | None, optimum: Trainer | None
) -> Objective:
    """The objective, or the in-sim return on fixed noise.

    With neither, but an `optimum`, the policy is a formula of theta: a function that raises `ValueError` when something
    asks for a return after all. Raises `ValueError` when there is no `optimum` either.
    """
    if objective is not None:
        return objective
    if noise is not None:
        return lambda theta, nu: expected_return(mdp, policy, theta, nu, noise)
    if optimum is None:
        raise ValueError("pass noise (sample_noise) for the in-sim return, or an objective(theta, nu)")

    def missing(theta: Params, nu: Params) -> Tensor:
        raise ValueError("there is no in-sim return: pass noise or an objective, or a sensitivity that needs none")

    return missing


def in_sim_optimum(J: Objective, theta: Params, nu: Params, optimum: Trainer | None) -> Params:
    """nu*(theta), warm-started from nu, by `optimum` or, where it is None, `policy_optimum`."""
    # Newton's last step, taken in any case, squares this tolerance wherever the optimum is unique
    found = policy_optimum(J, theta, nu, tol=1e-7).nu if optimum is None else optimum(theta, nu)
    return {key: value.detach() for key, value in found.items()}
