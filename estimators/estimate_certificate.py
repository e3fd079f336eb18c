"""Certificate of a gradient estimated from real data: is its critic biased, looking at the data alone?

A critic `Q = phi^T w` that is right satisfies the Bellman equation in mean at every state and action, not just on its
own features: with the temporal differences `delta_i = r_i + discount phi'_i^T w - phi_i^T w`,

    E[psi(s, a) delta] = 0    for every function psi.

Moments of `count` random ridge functions `psi = tanh(omega^T z + b)` of the standardised (s, a) tell: with the effect
of the estimated w taken out (psi replaced by `psi - M A^-1 c phi`, `M = sum c psi (phi - discount phi')^T`, A and c
those of the critic), the sum m of `psi_i delta_i` has covariance `S = sum psi_i psi_i^T delta_i^2` (the differences
are uncorrelated given their states), and `m^T S^-1 m` the chi-square distribution with `count` degrees of freedom.
That test finds misfits of any size, given data enough; whether one matters is told by the gradient estimated with phi
and psi together. The estimate is refused when the moments are not zero (at the stated rate of false alarms) and the
gradient moves by more than `tol`, beyond the standard error of the move.
References: Newey, Econometrica 53 (1985) 1047 (conditional moment tests); Bierens, Econometrica 58 (1990) 1443 (random
functions find every misfit).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.stats import chi2, norm
from torch import Tensor

from sim2real.estimators.certificate import Certificate
from sim2real.estimators.critic import (
    Features,
    critic_system,
    expected_features,
    leverage_weights,
    quadratic_features,
    scaled_features,
    solve_critic,
)
from sim2real.estimators.logged_policy_gradient import jackknife_stderr, logged_policy_gradient
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout


def certify_estimate(
    estimate: Estimate,
    policy: Policy,
    nu: Params,
    log: Rollout | RolloutLog | Transitions,
    *,
    real_discount: float,
    real_reward: RealReward | None = None,
    features: Features | None = None,
    initial_states: Tensor | None = None,
    actions: Tensor | None = None,
    terminal: Callable[[Tensor], Tensor] | None = None,
    gradient: Callable[..., Estimate] = logged_policy_gradient,
    measured_return: tuple[float, float] | None = None,
    tol: float = 0.2,
    noise_tol: float = math.inf,
    false_alarm: float = 0.01,
    count: int = 12,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Certify an `estimate` of `logged_policy_gradient(policy, nu, log, ...)`; the options are those it was made with.

    `gradient` makes it again with more features (bind weights, method, ridge with `partial`). `measured_return`:
    mean and standard error of the returns of episodes of this very policy. Refused: a critic that fails the moment
    test at the level `false_alarm` and whose gradient then moves by more than `tol |g|`; a return that differs from the
    measured one beyond both errors (same level) and by more than `tol`; one outside what the rewards allow; a Bellman
    radius of 1 or more; a standard error above `noise_tol |g|` (infinite: the gradient is small near the best
    theta, which is no fault). `error_bound`: the move, plus two standard errors, in the units of the gradient in nu.
    info: "p_value", "move", "stderr", "gradient_norm", "moments".
    Raises `ValueError` for bad options and `CriticError` where the data do not identify the larger critic.
    """
    if not (tol > 0 and noise_tol > 0 and 0 < false_alarm < 1 and count >= 1):
        got = f"{tol}, {noise_tol}, {false_alarm} and {count}"
        raise ValueError(f"need tol > 0, noise_tol > 0, false_alarm in (0, 1) and count >= 1, got {got}")
    flat = ravel({key: estimate.grad[key] for key in nu}).double()
    if not (bool(torch.isfinite(flat).all()) and math.isfinite(float(estimate.value))):
        reason = "the estimated return or its gradient is not finite: mask or clean the log"
        return Certificate(False, math.inf, math.inf, None, (reason,), {})
    data = transitions(log, real_reward, terminal=terminal)
    fixed = {key: value.detach() for key, value in nu.items()}
    base = features if features is not None else quadratic_features(data)
    extra = ridge_functions(data, count, generator)
    options = {"initial_states": initial_states, "actions": actions}
    p_value, moments = moment_test(policy, fixed, data, base, extra, real_discount=real_discount, **options)
    both = lambda s, a: torch.cat([base(s, a).double(), extra(s, a)], -1)
    wider = gradient(policy, nu, data, real_discount=real_discount, features=both, **options)
    move, own = _move(estimate, wider, nu)
    size = float(flat.norm())
    reasons = list(_doubts(estimate, measured_return, tol, false_alarm))
    if p_value < false_alarm and move > tol * size:
        reasons.append(
            f"the critic is biased: its temporal differences do not average to zero (p = {p_value:.1e}, level "
            f"{false_alarm:g}), and {count} more features move the gradient by {move / max(size, 1e-300):.0%} of "
            f"itself, allowed {tol:.0%}: pass features that can represent the value, or data nearer to the policy"
        )
    if own > noise_tol * size:
        reasons.append(
            f"the gradient is lost in noise: standard error {own:.2e} against a norm of {size:.2e}, allowed "
            f"{noise_tol:g} times: record more episodes, or closer to this policy"
        )
    bound = move + 2 * own
    info = {"p_value": p_value, "move": move, "stderr": own, "gradient_norm": size, "moments": moments}
    return Certificate(not reasons, bound, bound / size if size > 0 else math.inf, None, tuple(reasons), info)


def ridge_functions(data: Transitions, count: int, generator: torch.Generator | None = None) -> Features:
    """`tanh(omega^T z + b)`, z the standardised (s, a), omega ~ N(0, 4/d), b uniform in [-2, 2]: `[N, count]`."""
    both = torch.cat([data.states, data.actions], -1).double()
    center, spread = both.mean(0), both.std(0, correction=0).clamp(min=1e-300)
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    width = both.shape[1]
    omega = 2 * torch.randn(width, count, generator=rng, dtype=torch.float64).to(both.device) / width**0.5
    offset = 4 * torch.rand(count, generator=rng, dtype=torch.float64).to(both.device) - 2
    return lambda s, a: torch.tanh(((torch.cat([s, a], -1).double() - center) / spread) @ omega + offset)


def moment_test(
    policy: Policy,
    nu: Params,
    data: Transitions,
    features: Features,
    extra: Features,
    *,
    real_discount: float,
    initial_states: Tensor | None = None,
    actions: Tensor | None = None,
) -> tuple[float, float]:
    """p-value of `E[psi delta] = 0` for psi = `extra`, and the statistic, chi-square under the hypothesis."""
    phi_of = scaled_features(features, data)
    system, weighted = critic_system(policy, nu, data, initial_states, phi_of, 1, actions=actions)
    weights, _, _ = solve_critic(system, real_discount, 0.0)
    phi = phi_of(data.states, data.actions)
    following = expected_features(policy, nu, data.next_states, phi_of, actions) * ~data.ended.unsqueeze(-1)
    drop = phi - real_discount * following
    rewards = data.rewards.double()
    delta = rewards - drop @ weights
    if float(delta.norm()) <= 1e-8 * float(rewards.norm() + (phi @ weights).norm()):
        return 1.0, 0.0  # no noise and no misfit
    psi = leverage_weights(phi).unsqueeze(-1) * extra(data.states, data.actions)
    A = weighted.T @ drop
    cleaned = psi - weighted @ torch.linalg.lstsq(A.T, drop.T @ psi, driver="gelsd").solution
    scores = cleaned * delta.unsqueeze(-1)
    total, covariance = scores.sum(0), scores.T @ scores
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-10 * values[-1]
    statistic = float(((vectors[:, kept].T @ total).square() / values[kept]).sum())
    return float(chi2.sf(statistic, int(kept.sum()))), statistic


def _move(estimate: Estimate, wider: Estimate, nu: Params) -> tuple[float, float]:
    """How far the gradient moves, less the noise of the move, and its own standard error (norms)."""
    difference = ravel({k: wider.grad[k] for k in nu}).double() - ravel({k: estimate.grad[k] for k in nu}).double()
    own = float(estimate.info["stderr"].norm()) if "stderr" in estimate.info else 0.0
    square = float(difference.square().sum())
    if "replicates" in estimate.info and "replicates" in wider.info:
        shapes = tuple(wider.info["replicates"].shape), tuple(estimate.info["replicates"].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`gradient` left out groups {shapes[0]}, the estimate {shapes[1]}: bind the options of the estimate, "
                "partial(logged_policy_gradient, groups=...)"
            )
        noise = jackknife_stderr(wider.info["replicates"] - estimate.info["replicates"])
        square -= float(noise.square().sum())
    return max(square, 0.0) ** 0.5, own


def _doubts(
    estimate: Estimate, measured: tuple[float, float] | None, tol: float, false_alarm: float
) -> tuple[str, ...]:
    """What the estimate's own figures and the measured return speak against it."""
    info, value = estimate.info, float(estimate.value)
    found = []
    if "bellman_radius" in info and float(info["bellman_radius"]) >= 1:
        found.append(
            f"the Bellman radius is {float(info['bellman_radius']):.3g}, allowed below 1: the policy is unstable on "
            "the data, or too far from them for the features; record data nearer to it"
        )
    low, high = float(info.get("return_low", -math.inf)), float(info.get("return_high", math.inf))
    if not low <= value <= high:
        found.append(
            f"the critic's return {value:.4g} is outside {low:.4g} to {high:.4g}, which the recorded rewards allow: "
            "pass other features, or data nearer to the policy"
        )
    if measured is not None:
        off, error = abs(value - measured[0]), math.hypot(measured[1], float(info.get("value_stderr", 0.0)))
        limit = float(norm.isf(false_alarm / 2)) * error
        if off > limit and off > tol * abs(measured[0]):
            found.append(
                f"the critic's return {value:.4g} differs from the measured {measured[0]:.4g} by {off:.2g}, allowed "
                f"{max(limit, tol * abs(measured[0])):.2g}: pass features that can represent the value"
            )
    return tuple(found)
