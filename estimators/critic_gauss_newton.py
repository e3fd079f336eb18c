"""Policy sensitivity from a critic: critic Gauss-Newton.

With a(nu, s, e) the action, Q(s, a) the critic of the policy held fixed, d the discounted state weights of the
simulator and the expectation over the policy's noise e,

    H_GN = E_d E_e[ (d_nu a)^T Q_aa (d_nu a) ],    C_GN = E_d E_e[ (d_nu a)^T d_theta grad_a Q ],
    dnu*/dtheta = -H_GN^-1 C_GN.

Where the policy class can choose the action freely in every state, an optimum has `E_e grad_a Q(s, a) = 0` in every
state that counts. H_GN then equals the Hessian J_nunu, and C_GN the cross derivative J_nutheta, because all other terms
(the shift of d, the change of Q with nu, the second derivative of a) carry that factor. Returns are maximised: Q_aa is
negative definite. Where the policy class binds, the factor is not zero and the answer is biased; two figures tell:

    representability  sqrt( E_d[delta' (-Q_aa) delta] / E_d E_e[(a - mean a)' (-Q_aa) (a - mean a)] ),
                      delta(s) = -(E_e Q_aa)^-1 E_e grad_a Q, the change of action the critic still wants,
    stationarity      |E_d E_e (d_nu a)^T grad_a Q| = |grad_nu J|, and what the Newton step would gain in return.

The part of representability that a step in nu removes is non-stationarity, the rest belongs to the policy class. Where
the class binds, the relative error of a product was 0.1 to 2.6 times that rest over ten LQRs with masked gains. A
fitted critic adds its noise, and the misfit of its features, to both figures.
Reference: D. Silver et al., Deterministic Policy Gradient Algorithms, 2014, eq. 9, differentiated once more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import act
from sim2real.estimators.model_critic import Nodes, policy_nodes
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params, check_same_keys, ravel
from sim2real.policy import Policy
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Solve, cg

QValues = Callable[[Params, Tensor, Tensor], Tensor]
"""theta, state `[N, n]`, action `[N, m]` -> Q `[N]` of the policy held fixed; twice differentiable in the action"""

_SCALE = "critic scale"  # a parameter that multiplies Q: its sensitivity is the Newton step of nu


@dataclass(frozen=True)
class Expansion:
    """Second-order expansion of Q in the action at K noise nodes of N states; `base [K, N, m]`."""

    base: Tensor
    slope: Tensor
    """`[K, N, m]` grad_a Q"""
    curvature: Tensor
    """`[K, N, m, m]` Q_aa"""
    shares: Tensor
    """`[K, N]` node weight times state weight"""


def critic_gauss_newton(
    q_values: QValues,
    policy: Policy,
    theta: Params,
    nu: Params,
    states: Tensor,
    weights: Tensor,
    *,
    nodes: Nodes | None = None,
    cotangent: Params | None = None,
    damping: float | Literal["auto"] = "auto",
    solve: Solve = cg,
    tolerance: float = 0.1,
    strict: bool = False,
) -> Sensitivity:
    """dnu*/dtheta from the critic `q_values(theta, s, a)` at `states [N, n]` with the state weights `weights [N]`.

    The critic: a formula, a fitted one (`function_space_sensitivity`) or `rollout_q_values`.

    `nodes`: noise `[K, noise_dim]` and weights for expectations over the policy (None: `policy_nodes`).
    `report.converged` asks for a converged solve, a negative definite Q_aa, and stationarity and representability at
    most `tolerance` (relative to the spread of the actions); where it is False this warns `UnconvergedWarning`, under
    `strict` raises `UnconvergedError`.
    info: "representability", "unrepresentable" (the part that no nu removes), "distance" (the part that the Newton step
    removes), "newton_step" `[P]` (raveled), "gain" (of return, which that step promises), "largest_q_aa" (largest
    eigenvalue of E_e Q_aa over the states; must be negative).
    """
    nu64 = {key: value.detach().double() for key, value in nu.items()}
    nodes = policy_nodes(policy, nu64, states) if nodes is None else nodes
    inner, held = improvement(
        q_values, policy, theta, nu64, states, weights, nodes, cotangent=cotangent, damping=damping, solve=solve
    )
    step = inner.jvp({key: torch.zeros_like(value).double() for key, value in theta.items()} | _scale(states))
    largest = float(torch.linalg.eigvalsh(_mean_curvature(held)).max())
    figures = _figures(held, step, policy, nu64, states.detach().double(), nodes)
    info = {key: torch.tensor(value, dtype=torch.float64) for key, value in figures.items()}
    info |= {"largest_q_aa": torch.tensor(largest, dtype=torch.float64), "newton_step": ravel(step)}
    report = judged(inner.report, figures, tolerance)
    demand(report, strict)

    def vjp(g: Params) -> Params:
        pulled = inner.vjp(g)
        return {key: pulled[key].to(theta[key].dtype) for key in theta}

    def jvp(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        pushed = inner.jvp(v | {_SCALE: torch.zeros_like(_scale(states)[_SCALE])})
        return {key: pushed[key].to(nu[key].dtype) for key in nu}

    return Sensitivity(vjp, jvp, report, info)


def rollout_q_values(mdp: ModelMDP, policy: Policy, nu: Params, noise: Noise) -> QValues:
    """The pathwise critic: Q by one differentiable rollout from (s, a), the T steps of `noise` long, the policy fixed.

    State i uses row i mod B of the noise (`initial` is not used), so the expectation over the model's noise is taken
    together with that over the states, and the noise of single rollouts counts into "representability". What comes
    after T steps is dropped. Draw `noise` anew: the one that led to the states is not independent of them.
    Raises `ValueError` for a model of derivative order below 2.
    """
    if mdp.derivative_order < 2:
        raise ValueError(
            f"the model declares derivative_order {mdp.derivative_order}, but Q_aa needs two derivatives of its step; "
            "use function_space_sensitivity, which fits its critic"
        )
    fixed = {key: value.detach() for key, value in nu.items()}

    def q_values(theta: Params, state: Tensor, action: Tensor) -> Tensor:
        rows = torch.arange(len(state), device=state.device) % len(noise.process)
        total, alive = torch.zeros_like(state[:, 0]), torch.ones_like(state[:, 0])
        for t, e in enumerate(noise.process[rows].unbind(1)):
            # beyond its end a model may not be finite
            following = torch.where(alive.bool().unsqueeze(-1), mdp.step(theta, state, action, e), state)
            total = total + mdp.discount**t * alive * mdp.reward(theta, state, action, e, following)
            if mdp.terminal is not None:
                alive = alive * ~mdp.terminal(theta, following)
            state, action = following, policy.act(fixed, following, noise.policy[rows, t])
        return total

    return q_values


def improvement(
    q_values: QValues,
    policy: Policy,
    theta: Params,
    nu: Params,
    states: Tensor,
    weights: Tensor,
    nodes: Nodes,
    *,
    cotangent: Params | None = None,
    damping: float | Literal["auto"] = "auto",
    solve: Solve = cg,
) -> tuple[Sensitivity, Expansion]:
    """`-H_GN^-1 C_GN` as products and the critic's expansion, unjudged; theta gains a factor of Q, `_SCALE`.

    Raises `UnconvergedError` when E_e Q_aa is not negative definite somewhere.
    """
    states, weights = states.detach().double(), weights.detach().double()
    nu = {key: value.detach().double() for key, value in nu.items()}
    theta = {key: value.detach().double() for key, value in theta.items()}
    held = expand(partial(q_values, theta), policy, nu, states, weights, nodes)
    largest = float(torch.linalg.eigvalsh(_mean_curvature(held)).max())
    if not largest < 0:
        raise UnconvergedError(
            f"the critic has no maximum in the action: the largest eigenvalue of Q_aa is {largest:.3g}, it must be "
            "negative. Draw more rollouts, explore more, or choose features with less freedom in the action"
        )

    def J(th: Params, at: Params) -> Tensor:
        scaled = lambda s, a: th[_SCALE] * q_values({key: th[key] for key in theta}, s, a)
        return _surrogate(scaled, policy, at, states, nodes, held)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)  # for the caller to judge, with the critic's conditions
        scale = _scale(states)
        return policy_sensitivity(J, theta | scale, nu, cotangent=cotangent, damping=damping, solve=solve), held


def _scale(states: Tensor) -> Params:
    return {_SCALE: torch.ones((), dtype=torch.float64, device=states.device)}


def expand(
    q_values: Callable[[Tensor, Tensor], Tensor],
    policy: Policy,
    nu: Params,
    states: Tensor,
    weights: Tensor,
    nodes: Nodes,
) -> Expansion:
    """Slope and curvature of `q_values(s, a)` in the action, where the policy acts."""
    base, slope, curvature = [], [], []
    for node in nodes[0]:
        with torch.no_grad():
            action = act(policy, nu, states, node).double()
        slopes = action_slope(q_values, states, action.requires_grad_(), create_graph=True)
        rows = [
            torch.autograd.grad(slopes[:, j].sum(), action, retain_graph=True, materialize_grads=True)[0]
            if slopes.requires_grad
            else torch.zeros_like(action)
            for j in range(action.shape[-1])
        ]
        base.append(action.detach())
        slope.append(slopes.detach())
        curvature.append(torch.stack(rows, -2))
    matrices = torch.stack(curvature)
    shares = nodes[1].unsqueeze(-1) * weights
    return Expansion(torch.stack(base), torch.stack(slope), 0.5 * (matrices + matrices.mT), shares)


def action_slope(
    q_values: Callable[[Tensor, Tensor], Tensor], states: Tensor, actions: Tensor, *, create_graph: bool
) -> Tensor:
    """grad_a Q `[N, m]` at actions that require a gradient."""
    with torch.enable_grad():
        values = q_values(states, actions)
        if values.shape != states.shape[:1]:
            raise ValueError(f"q_values gave {tuple(values.shape)} for {len(states)} states; expected [N]")
        if not values.requires_grad:
            raise ValueError("q_values does not depend differentiably on the action")
        (slope,) = torch.autograd.grad(values.sum(), actions, create_graph=create_graph, materialize_grads=True)
    return slope


def _surrogate(
    q_values: Callable[[Tensor, Tensor], Tensor],
    policy: Policy,
    nu: Params,
    states: Tensor,
    nodes: Nodes,
    held: Expansion,
) -> Tensor:
    """The quadratic model whose Hessian in nu is H_GN and whose cross derivative is C_GN; its gradient is zero."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for k, node in enumerate(nodes[0]):
        change = act(policy, nu, states, node) - held.base[k]
        moved = action_slope(q_values, states, held.base[k].clone().requires_grad_(), create_graph=True)
        bent = (held.curvature[k] @ change.unsqueeze(-1)).squeeze(-1)
        total = total + (held.shares[k] * (change * (moved - held.slope[k] + 0.5 * bent)).sum(-1)).sum()
    return total


def _mean_curvature(held: Expansion) -> Tensor:
    """E_e Q_aa `[N, m, m]`, of states with weight."""
    shares = held.shares / held.shares.sum(0).clamp(min=1e-300)
    return (shares[..., None, None] * held.curvature).sum(0)[held.shares.sum(0) > 0]


def _figures(
    held: Expansion, step: Params, policy: Policy, nu: Params, states: Tensor, nodes: Nodes
) -> dict[str, float]:
    leaves = {key: value.detach().requires_grad_() for key, value in nu.items()}
    with torch.enable_grad():
        pairs = zip(nodes[0], held.slope, held.shares, strict=True)
        promise = [(w * (act(policy, leaves, states, e) * g).sum(-1)).sum() for e, g, w in pairs]
        gradient = torch.autograd.grad(
            torch.stack(promise).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    weights = held.shares.sum(0)
    kept = weights > 0
    shares = held.shares[:, kept] / weights[kept]
    slope = (shares.unsqueeze(-1) * held.slope[:, kept]).sum(0)
    curvature = -_mean_curvature(held)
    wanted = (torch.linalg.inv(curvature) @ slope.unsqueeze(-1)).squeeze(-1)
    size = float((weights[kept] * (slope * wanted).sum(-1)).sum())
    total = held.shares.sum()
    centre = (held.shares.unsqueeze(-1) * held.base).sum((0, 1)) / total
    away = held.base[:, kept] - centre
    bent = (curvature @ away.unsqueeze(-1)).squeeze(-1)
    spread = float((held.shares[:, kept] * (away * bent).sum(-1)).sum())
    removed = float(sum((g * step[key]).sum() for g, key in zip(gradient, nu, strict=True)))
    relative = lambda part: math.sqrt(max(part, 0.0) / spread) if spread > 0 else (0.0 if part <= 0 else math.inf)
    return {
        "representability": relative(size),
        "unrepresentable": relative(size - removed),
        "distance": relative(removed),
        "gain": 0.5 * removed,
        "stationarity": math.sqrt(sum(float(g.square().sum()) for g in gradient)),
    }


def judged(report: SolveReport, figures: dict[str, float], tolerance: float) -> SolveReport:
    """The report with the critic's conditions."""
    reasons = [report.status]
    if figures["distance"] > tolerance:
        reasons.append(
            f"nu is not stationary: the critic's Newton step changes the actions by {figures['distance']:.2g} of their "
            f"spread, allowed {tolerance:.2g}, for {figures['gain']:.2g} of return"
        )
    if figures["unrepresentable"] > tolerance:
        reasons.append(
            f"the policy class binds: actions want to change by {figures['unrepresentable']:.2g} of their spread in "
            f"ways no nu gives, allowed {tolerance:.2g}; the full Hessian is needed"
        )
    converged = report.converged and len(reasons) == 1
    return replace(report, converged=converged, stationarity=figures["stationarity"], status="; ".join(reasons))


def demand(report: SolveReport, strict: bool) -> None:
    """Warn `UnconvergedWarning`, or raise `UnconvergedError` under `strict`, unless the report has converged."""
    if not report.converged:
        message = f"the policy sensitivity is not to be trusted: {report.status}"
        if strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=3)
