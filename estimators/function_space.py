"""Function-space policy sensitivity: from how the critic moves with the simulator, no second derivative of it.

With Q the critic of the policy in the simulator and `G = d_theta Q` at fixed policy (`critic_derivative.py`),

    d pi(s) = -(E_e Q_aa)^-1 E_e d_a G(s, a)                    per state (`pointwise_sensitivity`),
    d nu    = -H_GN^-1 C_GN                                     in the policy class (`critic_gauss_newton.py`),

H_GN = E_d E_e[(d_nu a)^T Q_aa (d_nu a)] and C_GN = E_d E_e[(d_nu a)^T d_a G]. The critic and G are fitted on rollouts
of the policy itself; the simulator is differentiated once, or not at all ("score" takes its log density only). Neither
d nu/d theta nor G is formed: theta -> W (critic weights) -> nu, each link as its products.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import Features
from sim2real.estimators.critic_derivative import critic_jvp, critic_vjp
from sim2real.estimators.critic_gauss_newton import (
    QValues,
    action_slope,
    critic_gauss_newton,
    demand,
    expand,
    improvement,
)
from sim2real.estimators.logged_policy_gradient import jackknife_stderr
from sim2real.estimators.model_critic import (
    Derivative,
    ModelCritic,
    leave_out,
    model_critic,
    moves_smoothly,
)
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params, check_same_keys, ravel
from sim2real.policy import Policy
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Solve, cg


def function_space_sensitivity(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Noise | ModelCritic,
    *,
    features: Features | None = None,
    derivative: Derivative = "auto",
    behaviour: Policy | None = None,
    states: int = 2048,
    cotangent: Params | None = None,
    damping: float | Literal["auto"] = "auto",
    solve: Solve = cg,
    tolerance: float = 0.1,
    stderr: bool = True,
    strict: bool = False,
) -> Sensitivity:
    """dnu*/dtheta from the rollouts of `data`, or from a critic fitted already (then the fit's options are its own).

    `features`, `derivative`, `behaviour` as in `model_critic`; `states`: how many states carry the projection.
    `tolerance`, `damping`, `strict` and info as in `critic_gauss_newton`, and info "condition", "bellman_radius"; with
    a cotangent and `stderr` also "stderr" `[Q]` of vjp(cotangent) (raveled), by leaving out groups of rollouts in turn;
    `report.error_bound` is then twice its norm (sampling alone, not the bias of features that do not span Q).
    Raises `ValueError` for a policy whose action has no derivative in nu, `CriticError`, and `UnconvergedError` when
    the critic has no maximum in the action.
    """
    critic = _fitted(mdp, policy, theta, nu, data, features, derivative, behaviour)
    where, weights = visited(critic, mdp.discount, states)
    options: dict[str, Any] = {"cotangent": cotangent, "damping": damping, "solve": solve}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)  # judged once, below
        inner = critic_gauss_newton(
            _values(critic),
            policy,
            {"weights": critic.weights},
            nu,
            where,
            weights,
            nodes=critic.nodes,
            tolerance=tolerance,
            **options,
        )

    def vjp(g: Params) -> Params:
        pulled = inner.vjp(g)["weights"]
        return _like(critic_vjp(critic, mdp, theta, pulled), theta)

    def jvp(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        return inner.jvp({"weights": critic_jvp(critic, mdp, theta, v)})

    info = dict(inner.info) | {"condition": _scalar(critic.condition), "bellman_radius": _scalar(critic.bellman_radius)}
    report = inner.report
    if cotangent is not None and stderr and len(critic.sums.gram) > 1:
        options["damping"] = report.damping
        info["stderr"] = _stderr(critic, mdp, policy, theta, nu, cotangent, (where, weights), options)
        report = replace(report, error_bound=2 * float(info["stderr"].norm()))
    demand(report, strict)
    return Sensitivity(vjp, jvp, report, info)


def _stderr(
    critic: ModelCritic,
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    cotangent: Params,
    visits: tuple[Tensor, Tensor],
    options: dict[str, Any],
) -> Tensor:
    """Standard error `[Q]` of vjp(cotangent): everything refitted without each group of rollouts in turn."""
    replicates = []
    for group in range(len(critic.sums.gram)):
        other = leave_out(critic, policy, nu, group, mdp.discount)
        at = {"weights": other.weights}
        link, _ = improvement(_values(other), policy, at, nu, *visits, other.nodes, **options)
        replicates.append(ravel(critic_vjp(other, mdp, theta, link.vjp(cotangent)["weights"])))
    return jackknife_stderr(torch.stack(replicates))


def pointwise_sensitivity(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Noise | ModelCritic,
    states: Tensor,
    *,
    features: Features | None = None,
    derivative: Derivative = "auto",
    behaviour: Policy | None = None,
) -> Sensitivity:
    """d pi(s)/d theta of the optimal action in each of `states [M, n]`, whatever the policy's parameters can express.

    The protocol's nu is `{"action": [M, m]}`: vjp takes a cotangent of the actions, jvp returns their change. For
    over-parameterised policies this is identifiable where d nu is not. Options as in `function_space_sensitivity`.
    """
    critic = _fitted(mdp, policy, theta, nu, data, features, derivative, behaviour)
    held = expand(
        lambda s, a: critic.features(s, a) @ critic.weights,
        policy,
        nu,
        states,
        states.new_ones(len(states)),
        critic.nodes,
    )
    curvature = (held.shares[..., None, None] * held.curvature).sum(0)
    largest = float(torch.linalg.eigvalsh(curvature).max())
    if not largest < 0:
        raise UnconvergedError(
            f"the critic has no maximum in the action: the largest eigenvalue of Q_aa is {largest:.3g}"
        )
    improve = -torch.linalg.inv(curvature)

    def slopes(weights: Tensor) -> Tensor:
        """E_e grad_a of `features @ weights`, `[M, m]`."""
        values = lambda s, a: critic.features(s, a) @ weights
        parts = [
            share.unsqueeze(-1) * action_slope(values, states, base.clone().requires_grad_(), create_graph=True)
            for share, base in zip(held.shares, held.base, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def vjp(g: Params) -> Params:
        check_same_keys({"action": held.base[0]}, g, "the cotangent of vjp")
        leaf = critic.weights.clone().requires_grad_()
        pulled = (improve @ g["action"].detach().double().unsqueeze(-1)).squeeze(-1)
        with torch.enable_grad():
            (cotangent,) = torch.autograd.grad((slopes(leaf) * pulled).sum(), leaf)
        return _like(critic_vjp(critic, mdp, theta, cotangent), theta)

    def jvp(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        moved = slopes(critic_jvp(critic, mdp, theta, v)).detach()
        return {"action": (improve @ moved.unsqueeze(-1)).squeeze(-1)}

    step = (improve @ slopes(critic.weights).detach().unsqueeze(-1)).squeeze(-1)
    status = f"per-state Newton step of the critic: {float(step.norm(dim=-1).max()):.2g} at most, in action units"
    return Sensitivity(vjp, jvp, SolveReport(True, 0.0, 0, status), {"newton_step": step, "q_aa": curvature})


def visited(critic: ModelCritic, discount: float, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` states `[M, n]` with the discounted state weights of the rollouts `[M]`, in total an episode's.

    Systematic resampling: every (total / count) of weight, in the order recorded, contributes one state.
    """
    if count < 1:
        raise ValueError(f"states must be at least 1, got {count}")
    data = critic.data.transitions
    weights = discount ** data.step.double() / len(data.initial_states)
    if len(weights) <= count:
        return data.states.double(), weights
    cumulative = weights.cumsum(0)
    marks = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) * cumulative[-1] / count
    chosen = torch.searchsorted(cumulative, marks).clamp(max=len(weights) - 1)
    return data.states[chosen].double(), torch.full_like(marks, float(cumulative[-1]) / count)


def _values(critic: ModelCritic) -> QValues:
    return lambda th, s, a: critic.features(s, a) @ th["weights"]


def _fitted(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Noise | ModelCritic,
    features: Features | None,
    derivative: Derivative,
    behaviour: Policy | None,
) -> ModelCritic:
    """The critic given, or fitted; raises `ValueError` for a policy whose action does not follow nu smoothly."""
    states = data.data.transitions.states if isinstance(data, ModelCritic) else mdp.initial_state(theta, data.initial)
    if not moves_smoothly(policy, nu, states):
        raise ValueError(
            "the policy's action has no derivative in nu (a discrete policy?): the function-space route needs "
            "continuous actions; use soft_sensitivity, or score_sensitivity"
        )
    if isinstance(data, ModelCritic):
        return data
    options: dict[str, Any] = {"features": features, "derivative": derivative, "behaviour": behaviour}
    return model_critic(mdp, policy, theta, nu, data, groups=min(8, data.process.shape[0]), **options)


def _like(params: Params, like: Params) -> Params:
    return {key: params[key].to(like[key].dtype) for key in like}


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
