"""Tune simulator parameters for the real return of the policy that training in the simulator finds.

With J(theta, nu) the in-sim return, nu*(theta) its maximiser and J_real(nu) the real return, the gradient is

    d J_real(nu*(theta)) / d theta = (d nu*/d theta)^T g_nu,    g_nu = grad_nu J_real(nu*),
    d nu*/d theta = -[J_nunu]^{-1} J_nutheta.

`tune_step` is that chain, once. `tune` repeats it: a quasi-Newton model of J_real(nu*(theta)) inside a trust region on
theta, steps kept in the box, undone when the real return falls by more than its confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.solve_report import Sensitivity, SolveReport

RealReward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""state `[N, n]`, action `[N, m]`, next state `[N, n]` -> reward `[N]`, in the real task"""
Collect = Callable[[Policy, Params, int, torch.Generator], Rollout | RolloutLog | None]
"""policy, nu, iteration, generator -> real rollouts of that policy (exploration included); None: not there yet"""
Objective = Callable[[Params, Params], Tensor]
"""theta, nu -> in-sim return, a scalar; twice differentiable"""


@dataclass(frozen=True)
class TuneStep:
    """One pass through the chain: `nu = nu*(theta)` and `grad = dJ_real(nu*(theta))/dtheta`, uphill."""

    nu: Params
    grad: Params
    info: dict[str, Tensor]
    """scalars: "real_return", "real_return_stderr", "effective_sample_size", "stationarity", "residual" (of the linear
    solve) and, where known, "error_bound", "bellman_radius", "condition", "ridge"; "grad_nu_stderr" by key of nu"""
    report: SolveReport
    """converged: nu is a stationary in-sim optimum, the critic is identified, the linear solve reached its tolerance"""
    grad_nu: Params = field(default_factory=dict)
    """g_nu, the real-data gradient in policy parameters"""


@dataclass(frozen=True)
class TuneSettings:
    """Options of `tune`; lengths in theta are relative to `scale` (default: a tenth of the box, else |theta| or 1)."""

    max_steps: int = 20
    """outer iterations; each runs one policy on the real system (with `collect`) or evaluates it on the log"""
    radius: float = 0.5
    """first trust-region radius, in scaled units"""
    max_radius: float = 4.0
    min_radius: float = 1e-6
    """the search ends (converged) when the radius falls below it"""
    confidence: float = 0.95
    """one-sided confidence with which the real return must have fallen before a step is undone"""
    gradient_tol: float = 1e-8
    """the search ends when the scaled gradient (free of the box) is below it, relative to |J_real|"""
    stationarity_tol: float = 1e-3
    """largest |grad_nu J| |nu| / |J| at which nu is accepted as an in-sim optimum"""
    likelihood_weight: float = 0.0
    """weight of the log-likelihood term, in units of return per nat"""


@dataclass(frozen=True)
class TuneResult:
    """The best theta found, its in-sim optimal policy parameters, and how the search went."""

    theta: Params
    nu: Params
    history: tuple[dict[str, float], ...]
    """per iteration: "iteration", "accepted", "real_return", "real_return_stderr", "measured_return",
    "measured_stderr", "predicted_gain", "radius", "step_norm", "gradient_norm", "stationarity", "residual",
    "effective_sample_size", "transitions", "converged", and "theta.NAME" for scalar parameters (the values tried)"""
    report: SolveReport
    notes: tuple[str, ...]
    """one sentence per refused or undone step, and why the search ended"""
    waiting: bool
    """True when `collect` returned None: export `nu`, gather rollouts of it, call `tune` again with `state`"""
    state: Params
    """exact snapshot: handing it back as `state` continues bitwise as if nothing had stopped"""


def tune_step(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    log: Rollout | RolloutLog,
    noise: Noise,
    *,
    real_reward: RealReward | None,
    real_discount: float,
    objective: Objective | None = None,
    optimum: Callable[[Params, Params], Params] | None = None,
    gradient: Callable[..., Estimate] | None = None,
    sensitivity: Callable[[Objective, Params, Params], Sensitivity] | None = None,
    stationarity_tol: float = 1e-3,
    strict: bool = False,
) -> TuneStep:
    """The whole chain once: nu*(theta), real-data gradient, sensitivity, gradient in theta.

    `objective` replaces the sampled in-sim return (default: `expected_return` on `noise`); `optimum` theta, nu0 -> nu*
    replaces `policy_optimum`; `gradient(policy, nu, log, real_reward=, real_discount=)` replaces
    `logged_policy_gradient`; `sensitivity(objective, theta, nu)` replaces `policy_sensitivity`.
    """
    raise NotImplementedError


def tune(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    log: Rollout | RolloutLog | None,
    noise: Noise,
    *,
    real_reward: RealReward | None,
    real_discount: float,
    collect: Collect | None = None,
    settings: TuneSettings | None = None,
    box: Box | None = None,
    free: tuple[str, ...] = (),
    scale: Params | None = None,
    likelihood: Callable[[Params], tuple[Tensor, Params, Tensor]] | tuple[Params, Tensor] | None = None,
    objective: Objective | None = None,
    optimum: Callable[[Params, Params], Params] | None = None,
    gradient: Callable[..., Estimate] | None = None,
    sensitivity: Callable[[Objective, Params, Params], Sensitivity] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> TuneResult:
    """Repeat `tune_step` inside a trust region on theta, with rollback; resumable exactly.

    `log`: real rollouts already there (or None); `collect`: gathers more with each iteration's policy, or None to tune
    against `log` alone. `free`: names of the parameters to move (empty: all of theta). `likelihood`: theta ->
    (log-likelihood, its gradient, its Gauss-Newton matrix over the free parameters), or a Gaussian (mean, precision).
    `on_step(state)` is called after every iteration; passing that `state` back continues bitwise.
    """
    raise NotImplementedError
