"""Policy sensitivity by second-order score functions: black-box simulators with a density, any policy with one.

A rollout is a sequence of draws a_0, s_1, a_1, s_2, ... with log densities l_k; L_k is their sum up to draw k. With R
the discounted return, at four levels of variance,

    plain     H = E[ R (grad L grad L' + grad^2 L) ],  L over the whole rollout: the estimator as usually written;
    baseline  R - b instead, b the mean return of the other rollouts;
    causal    sum_t discount^t (r_t - b_t) with L up to s_{t+1} only, b_t the mean of r_t over the other rollouts;
    critic    sum_k D_k ( ... of L_k minus ... of L_{k-1} ): only pairs with one score at the current draw survive.

D_k are the martingale differences of the return, from a fitted critic Q of the policy, V(s) = E_a Q(s, a):
discount^t (Q(s_t, a_t) - V(s_t)) of an action, discount^t (r_t + discount V(s_{t+1}) - Q(s_t, a_t)) of a next state
(which is discount^{t+1} (V(s') - E V(s')) for a reward that chance does not touch). H = J_nunu takes the scores in nu
twice, C = J_nutheta once in nu and once in theta, and in r_t(theta). All four are second derivatives of one surrogate,
`sum_k D_k exp(L_k - L_k held)`, whose derivatives are unbiased (plain to causal) or biased by the critic's error only.
A noisy H inverts to a biased sensitivity: standard errors come from leaving out groups of rollouts in turn.
References: J. Foerster et al., DiCE, 2018, equation 5 (the surrogate); J. Mao et al., A Baseline for Any Order Gradient
Estimation, 2019; G. Farquhar et al., Loaded DiCE, 2019, equation 13 (differences and critics).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import Features
from sim2real.estimators.critic_gauss_newton import demand
from sim2real.estimators.logged_policy_gradient import jackknife_stderr
from sim2real.estimators.model_critic import ModelCritic, log_density, model_critic, state_value
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params, check_same_keys, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout
from sim2real.solve_report import Sensitivity, SolveReport

Variance = Literal["plain", "baseline", "causal", "critic"]

LARGEST = 50_000_000  # entries of all the matrices kept, 400 MB


@dataclass(frozen=True)
class SecondOrder:
    """Estimates per group of rollouts; P parameters nu, Q parameters theta (raveled)."""

    gradient: Tensor
    """`[G, P]` grad_nu J"""
    hessian: Tensor
    """`[G, P, P]` J_nunu, symmetric"""
    cross: Tensor
    """`[G, P, Q]` J_nutheta"""


def score_sensitivity(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    variance: Variance = "critic",
    features: Features | None = None,
    critic: ModelCritic | None = None,
    actions: Tensor | None = None,
    groups: int = 20,
    cotangent: Params | None = None,
    damping: float = 0.0,
    tolerance: float = 0.1,
    strict: bool = False,
) -> Sensitivity:
    """dnu*/dtheta from the rollouts of `noise`, each group of which is one graph (more groups: less memory).

    `critic`: fitted already on rollouts of this policy (None: fitted here on those of `noise`, with `features` and
    `actions` as in `model_critic`; a discrete policy needs features of its own).
    `report.converged` asks for `-J_nunu + damping` positive definite by two standard errors of its lowest eigenvalue,
    and for a nu that is stationary: the Newton step, noise included, may change nu by at most `tolerance`, relative in
    the norm of -J_nunu. Where it is False this warns `UnconvergedWarning`, under `strict`
    raises `UnconvergedError`. info: "lowest_curvature" and "lowest_curvature_stderr" of -J_nunu, "hessian_stderr",
    "cross_stderr" (relative, Frobenius), "gradient" and "gradient_stderr" `[P]`, "newton_step" `[P]`, its "distance"
    and what noise alone gives, "distance_stderr", "gain" (of return, which it promises); "stderr" `[Q]` of
    vjp(cotangent) when one is given, and `report.error_bound`, twice its norm. Raises `ValueError` when the policy or
    the model has no log_prob, for fewer than two rollouts per group or two groups, and for more parameters than H and C
    per group can be kept of.
    """
    log_density(mdp)
    _check_sizes(noise, groups, theta, nu, variance)
    theta64 = {key: value.detach().double() for key, value in theta.items()}
    nu64 = {key: value.detach().double() for key, value in nu.items()}
    fitted = critic
    if variance == "critic" and critic is None:
        options: dict[str, Any] = {"features": features, "actions": actions, "derivative": "score", "groups": 1}
        fitted = model_critic(mdp, policy, theta64, nu64, noise, **options)
    parts = second_order(mdp, policy, theta64, nu64, noise, variance=variance, critic=fitted, groups=groups)
    hessian, cross = parts.hessian.mean(0), parts.cross.mean(0)
    values, vectors = torch.linalg.eigh(-hessian)
    inverse = lambda b: vectors @ ((vectors.mT @ b) / (values + damping))

    def vjp(g: Params) -> Params:
        check_same_keys(nu, g, "the cotangent of vjp")
        return _like(cross.mT @ inverse(ravel(_double(g, nu))), theta)

    def jvp(v: Params) -> Params:
        check_same_keys(theta, v, "the tangent of jvp")
        return _like(inverse(cross @ ravel(_double(v, theta))), nu)

    info = _figures(parts, values, vectors, ravel(nu64), damping)
    bound = None
    if cotangent is not None:
        check_same_keys(nu, cotangent, "cotangent")
        g = ravel(_double(cotangent, nu))
        info["stderr"] = jackknife_stderr(torch.stack([_without(parts, k, g, damping) for k in range(groups)]))
        bound = 2 * float(info["stderr"].norm())
    report = replace(_judged(info, values, damping, tolerance), error_bound=bound)
    demand(report, strict)
    return Sensitivity(vjp, jvp, report, info)


def second_order(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    variance: Variance,
    critic: ModelCritic | None,
    groups: int,
) -> SecondOrder:
    """grad_nu J, J_nunu and J_nutheta from each of `groups` equal blocks of the rollouts of `noise`."""
    size = noise.process.shape[0] // groups
    blocks = [slice(g * size, (g + 1) * size) for g in range(groups)]
    noises = [Noise(noise.initial[rows], noise.process[rows], noise.policy[rows]) for rows in blocks]
    estimates = [_derivatives(mdp, policy, theta, nu, block, variance, critic) for block in noises]
    return SecondOrder(*(torch.stack(part) for part in zip(*estimates, strict=True)))


def _check_sizes(noise: Noise, groups: int, theta: Params, nu: Params, variance: str) -> None:
    if variance not in ("plain", "baseline", "causal", "critic"):
        raise ValueError(f"variance must be 'plain', 'baseline', 'causal' or 'critic', got {variance!r}")
    batch = noise.process.shape[0]
    if groups < 2 or batch < 2 * groups:
        raise ValueError(f"groups must be at least 2, of two rollouts or more; got {groups} groups of {batch} rollouts")
    P, Q = len(ravel(nu)), len(ravel(theta))
    if groups * P * (P + Q) > LARGEST:
        raise ValueError(
            f"{P} policy and {Q} model parameters in {groups} groups are too many for second-order scores, which need "
            "far more rollouts than parameters: use function_space_sensitivity, or fewer groups"
        )


def _derivatives(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    variance: Variance,
    critic: ModelCritic | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_nu J `[P]`, J_nunu `[P, P]` and J_nutheta `[P, Q]` of the surrogate over one block."""
    with torch.no_grad():
        drawn = rollout(mdp, policy, theta, nu, noise)
    theta, nu = _leaves(theta), _leaves(nu)
    inputs = [*nu.values(), *theta.values()]
    with torch.enable_grad():
        value = _surrogate(mdp, policy, theta, nu, noise, drawn, variance, critic)
        if not value.requires_grad:
            raise ValueError("the densities of policy and model depend neither on nu nor on theta")
        slopes = torch.autograd.grad(
            value, list(nu.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = ravel(dict(zip(nu, slopes, strict=True)))
    rows = []
    for entry in gradient:
        second = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in second]))
    both = torch.stack(rows)
    P = len(gradient)
    if not bool(torch.isfinite(both).all()):
        raise ValueError("second-order scores are not finite: check the log densities at the simulated transitions")
    return gradient.detach(), 0.5 * (both[:, :P] + both[:, :P].mT), both[:, P:]


def _surrogate(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    drawn: Rollout,
    variance: Variance,
    critic: ModelCritic | None,
) -> Tensor:
    """The scalar whose derivatives at the parameters that drew the rollouts are the estimates."""
    batch, horizon = drawn.rewards.shape
    alive = torch.ones_like(drawn.rewards) if drawn.mask is None else drawn.mask.to(drawn.rewards.dtype)
    first = mdp.initial_state(theta, noise.initial)
    before = torch.cat([first.unsqueeze(1), drawn.states[:, 1:-1]], 1).flatten(0, 1)
    a, e, after = drawn.actions.flatten(0, 1), noise.process.flatten(0, 1), drawn.states[:, 1:].flatten(0, 1)
    acting = policy.log_prob(nu, before, a).reshape(batch, horizon) * alive
    moving = log_density(mdp)(theta, before, a, after).reshape(batch, horizon) * alive
    powers = mdp.discount ** torch.arange(horizon, dtype=drawn.rewards.dtype, device=drawn.rewards.device)
    rewards = mdp.reward(theta, before, a, e, after).reshape(batch, horizon) * alive * powers
    held = rewards.detach()
    moved = (acting + moving).cumsum(1)
    at_state = _ratio(moved)  # of all draws up to s_{t+1}
    if variance == "plain":
        return (rewards.sum(1) * at_state[:, -1]).mean()
    if variance == "baseline":
        return ((rewards.sum(1) - _others(held.sum(1))) * at_state[:, -1]).mean()
    if variance == "causal":
        return ((rewards - _others(held)) * at_state).sum(1).mean()
    if critic is None:
        raise ValueError("variance 'critic' needs a critic")
    at_action = _ratio(moved - moving)
    earlier = torch.cat([torch.ones_like(at_state[:, :1]), at_state[:, :-1]], 1)
    advantage, surprise = _differences(mdp, policy, theta, nu, drawn, held, powers * alive, critic)
    explicit = (rewards - held) * at_state  # zero, but for its derivative through r(theta)
    return (advantage * (at_action - earlier) + surprise * (at_state - at_action) + explicit).sum(1).mean()


def _ratio(log_density_: Tensor) -> Tensor:
    """1, with the derivatives of the likelihood ratio."""
    return torch.exp(log_density_ - log_density_.detach())


def _others(values: Tensor) -> Tensor:
    """Mean over the other rollouts, for each `[B, ...]`."""
    return (values.sum(0) - values) / (len(values) - 1)


@torch.no_grad()
def _differences(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    drawn: Rollout,
    rewards: Tensor,
    powers: Tensor,
    critic: ModelCritic,
) -> tuple[Tensor, Tensor]:
    """The martingale differences D of actions and of next states, discounted, `[B, T]` each."""
    batch, horizon = drawn.rewards.shape
    states, actions = drawn.states.flatten(0, 1), drawn.actions.flatten(0, 1)
    value = state_value(critic, policy, nu, states)
    if mdp.terminal is not None:
        value = value * ~mdp.terminal(theta, states)
    value = value.reshape(batch, horizon + 1)
    q = (critic.features(drawn.states[:, :-1].flatten(0, 1), actions) @ critic.weights).reshape(batch, horizon)
    return powers * (q - value[:, :-1]), rewards + powers * (mdp.discount * value[:, 1:] - q)


def _figures(parts: SecondOrder, values: Tensor, vectors: Tensor, nu: Tensor, damping: float) -> dict[str, Tensor]:
    gradient, hessian = parts.gradient.mean(0), parts.hessian.mean(0)
    relative = lambda part: _mean_stderr(part).norm() / part.mean(0).norm().clamp(min=1e-300)
    stderr = _mean_stderr(parts.gradient)
    lowest = vectors[:, 0]
    step = lambda g: vectors @ ((vectors.mT @ g) / (values + damping))
    size = -(nu @ hessian @ nu)
    relative_norm = lambda g: (g @ step(g)).clamp(min=0).sqrt() / size.clamp(min=1e-300).sqrt()
    return {
        "lowest_curvature": values[0],
        "lowest_curvature_stderr": _mean_stderr(-(parts.hessian @ lowest) @ lowest),
        "hessian_stderr": relative(parts.hessian),
        "cross_stderr": relative(parts.cross),
        "gradient": gradient,
        "gradient_stderr": stderr,
        "distance": relative_norm(gradient),
        "distance_stderr": relative_norm(stderr),
        "newton_step": step(gradient),
        "gain": 0.5 * gradient @ step(gradient),
    }


def _mean_stderr(parts: Tensor) -> Tensor:
    """Standard error of the mean over the groups `[G, ...]`."""
    return parts.std(0) / len(parts) ** 0.5


def _without(parts: SecondOrder, group: int, cotangent: Tensor, damping: float) -> Tensor:
    """vjp(cotangent) `[Q]` of all groups but one."""
    keep = [k for k in range(len(parts.hessian)) if k != group]
    damped = damping * torch.eye(len(cotangent), dtype=cotangent.dtype, device=cotangent.device)
    curvature = damped - parts.hessian[keep].mean(0)
    return parts.cross[keep].mean(0).mT @ (torch.linalg.inv(curvature) @ cotangent)


def _judged(info: dict[str, Tensor], values: Tensor, damping: float, tolerance: float) -> SolveReport:
    """Why the estimates may not do for a sensitivity."""
    lowest, spread, distance = (float(info[k]) for k in ("lowest_curvature", "lowest_curvature_stderr", "distance"))
    low, high = float(values[0]), float(values[-1])
    status = f"-J_nunu has the eigenvalues {low:.3g} +- {spread:.1g} to {high:.3g}"
    reasons = []
    if lowest + damping - 2 * spread <= 0:
        reasons.append(
            "-J_nunu is not positive definite by two standard errors: draw more rollouts, choose a variance further "
            "down the list (plain, baseline, causal, critic), or damp"
        )
    elif distance > tolerance:
        reasons.append(
            f"nu is not stationary: a Newton step changes it by {distance:.2g} of its size, allowed {tolerance:.2g}, "
            f"for {float(info['gain']):.2g} of return (noise alone: {float(info['distance_stderr']):.2g})"
        )
    return SolveReport(
        converged=not reasons,
        residual=0.0,
        steps=0,
        status="; ".join([status, *reasons]),
        negative_curvature=low if low < 0 else None,
        damping=damping,
        stationarity=float(info["gradient"].norm()),
        eigenvalues=(low, high),
    )


def _leaves(params: Params) -> Params:
    return {key: value.detach().requires_grad_() for key, value in params.items()}


def _double(params: Params, order: Params) -> Params:
    return {key: params[key].detach().double() for key in order}


def _like(vector: Tensor, like: Params) -> Params:
    return {key: value.to(like[key].dtype) for key, value in unravel(vector, like).items()}
