"""Safety constraints on the real system: their margins and gradients in the policy's parameters.

A cost signal c(s, a, s+) of a real transition, in its own unit, and the discounted share of time `w_t` (sum 1):

    mean         E_real sum_t w_t c_t                        <= limit,       w_t = (1 - discount) discount^t
    chance       E_real sum_t w_t 1[c_t > limit]             <= probability
    worst_case   max_k E_sim(theta_k) sum_t w_t c_t          <= limit        theta_k drawn from the fitted posterior

The margin is the limit minus the upper confidence limit of the left-hand side at `confidence` (one-sided); it must be
>= 0, and its gradient points towards safety. In theta it is `(dnu*/dtheta)'` times that, the same vjp as for the
return; the gradient of the confidence term is left out. Costs are skewed, so the limit comes from the bootstrap-t over
the jackknife's pseudo-values (resampled alike at every call); with fewer than 8 groups from Student's t. Data
without any exceedance show no spread: they leave a share of `1 - (1 - confidence)^(1/E)` possible after E episodes, the
exact limit for the probability of an event not seen. After the end of an episode the cost counts as 0.

A chance constraint bounds the discounted share p of steps, hence the probability of any violation at t < T by at most
`p / w_{T-1}` (Boole; the weights fall), which says something only for T up to a few times 1 / (1 - discount). Its
indicator may be smoothed,

    h(x) = u^3 (10 - 15 u + 6 u^2),   u = min(1, max(0, 1 + x / width)),   x = c - limit,

twice differentiable and never below the indicator: the smoothed constraint is the stricter one, by at most the
probability that c lies within `width` below the limit. Reference: E. Altman, Constrained Markov Decision Processes,
1999 (discounted constraints as further returns); B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993,
section 12.5 (bootstrap-t); R. Tempo, E. Bai and F. Dabbene, Systems & Control Letters 30 (1997)
237, theorem 3.1 (draws for a probable worst case).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from scipy.stats import t as student
from torch import Tensor

from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout

_LOGGED_GRADIENT = partial(logged_policy_gradient, groups=32)
"""more groups than for a return: the bootstrap needs to see the skew"""


@dataclass(frozen=True)
class Constraint:
    """One of the constraints above. Raises `ValueError` naming a value that makes no sense."""

    name: str
    cost: RealReward
    """s `[N, n]`, a `[N, m]`, s+ `[N, n]` -> c `[N]`; high is bad"""
    limit: float
    """in the unit of the cost"""
    kind: Literal["mean", "chance", "worst_case"] = "mean"
    discount: float = 0.99
    confidence: float = 0.95
    """one-sided, of the estimate from real data, or of the worst case over draws; 0.5: take estimates at face value"""
    probability: float = 0.05
    """chance: allowed share of steps with c > limit; worst_case: share of the posterior that may be worse"""
    width: float = 0.0
    """chance: smoothing, in the unit of the cost; 0: the plain indicator. worst_case: smoothing of the maximum"""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)} (must be {wanted})"
            for name, wanted, holds in (
                ("limit", "finite", math.isfinite(self.limit)),
                ("kind", "'mean', 'chance' or 'worst_case'", self.kind in ("mean", "chance", "worst_case")),
                ("discount", "in (0, 1)", 0 < self.discount < 1),
                ("confidence", "in [0.5, 1)", 0.5 <= self.confidence < 1),
                ("probability", "in (0, 1)", 0 < self.probability < 1),
                ("width", ">= 0 and finite", 0 <= self.width < math.inf),
            )
            if not holds
        ]
        if wrong:
            raise ValueError(f"the constraint '{self.name}' has {', '.join(wrong)}")


@dataclass(frozen=True)
class Margin:
    """`value >= 0` is safe; `grad` (in nu) points towards safety."""

    value: Tensor
    grad: Params
    estimate: Tensor
    """left-hand side of the constraint: mean cost, share of steps, or worst case"""
    stderr: Tensor
    trusted: bool = True
    reason: str = ""
    """why not, when not trusted"""
    info: dict[str, Tensor] = field(default_factory=dict)


def exceedance(cost: Tensor, limit: float, width: float = 0.0) -> Tensor:
    """`1[c > limit]`, or its smooth upper bound h of the module docstring, in the shape of `cost`."""
    if width == 0.0:
        return torch.where(cost.isnan(), cost, (cost > limit).to(cost.dtype))  # a NaN is no safe step
    u = (1 + (cost - limit) / width).clamp(0.0, 1.0)
    return u**3 * (10 - 15 * u + 6 * u**2)


def constraint_signal(constraint: Constraint) -> RealReward:
    """(s, a, s+) -> what is averaged over time: the cost, or for a chance constraint its exceedance."""
    if constraint.kind != "chance":
        return constraint.cost
    return lambda s, a, following: exceedance(constraint.cost(s, a, following), constraint.limit, constraint.width)


def constraint_gradient(
    constraint: Constraint,
    policy: Policy,
    nu: Params,
    log: Rollout | RolloutLog | Transitions,
    *,
    terminal: Callable[[Tensor], Tensor] | None = None,
    gradient: Callable[..., Estimate] = _LOGGED_GRADIENT,
) -> Margin:
    """Margin of a "mean" or "chance" constraint and its gradient in nu, from real transitions of any policy.

    `gradient(policy, nu, transitions, real_reward=None, real_discount=)` prices the signal as it does rewards: the
    rewards of a log are replaced, and features must be able to express the value of the signal (an indicator is far
    from quadratic: give features, or a width). `trusted` is False when the critic is unstable, its value outside
    what the recorded signal allows, or its standard error missing where a confidence above 0.5 needs it. Raises
    `ValueError` for kind "worst_case", and as `gradient` does.
    """
    if constraint.kind == "worst_case":
        raise ValueError(f"'{constraint.name}' is a worst case over models: use worst_case_gradient")
    data = _priced(constraint, log, terminal)
    found = gradient(policy, nu, data, real_reward=None, real_discount=constraint.discount)
    share = 1 - constraint.discount
    value, stderr = share * found.value, share * found.info.get("value_stderr", torch.zeros_like(found.value))
    allowed = constraint.limit if constraint.kind == "mean" else constraint.probability
    replicates = share * found.info.get("value_replicates", value.new_zeros(0))
    upper = upper_limit(value, stderr, replicates, constraint.confidence)
    if constraint.kind == "chance" and constraint.confidence > 0.5 and not bool(data.rewards.any()):
        upper = upper.clamp(min=unseen_share(max(len(data.initial_states), len(replicates)), constraint.confidence))
    margin = allowed - upper
    reason = _doubt(found, constraint.confidence)
    grad = {key: -share * part for key, part in found.grad.items()}
    return Margin(margin, grad, value, stderr, trusted=not reason, reason=reason, info=found.info)


def upper_limit(value: Tensor, stderr: Tensor, replicates: Tensor, confidence: float) -> Tensor:
    """One-sided upper confidence limit of an estimate with delete-one-group `replicates [G]`; at 0.5 the estimate.

    Bootstrap-t over the pseudo-values `G value - (G - 1) replicate_g`, with 2000 resamples that are always the same;
    `value + t stderr` with Student's t for fewer than 8 groups, the normal quantile for none.
    """
    if confidence == 0.5:
        return value
    groups = len(replicates)
    if groups < 8 or not float(stderr) > 0:
        return value + float(student.ppf(confidence, groups - 1 if groups > 1 else math.inf)) * stderr
    pseudo = (groups - 1) * (replicates.mean() - replicates)  # centred
    chosen = torch.randint(groups, (2000, groups), generator=torch.Generator().manual_seed(0))
    drawn = pseudo[chosen.to(pseudo.device)]
    spread = drawn.std(1) / groups**0.5
    studentised = drawn.mean(1) / torch.maximum(spread, 1e-3 * stderr)
    return value - torch.quantile(studentised, 1 - confidence) * stderr


def unseen_share(count: int, confidence: float) -> float:
    """Upper limit `1 - (1 - confidence)^(1 / count)` of the probability of what `count` trials never saw."""
    return -math.expm1(math.log1p(-confidence) / count)


def measured_constraint(
    constraint: Constraint,
    log: Rollout | RolloutLog | Transitions,
    *,
    terminal: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """The discounted time average of the signal as recorded, over episodes, and its standard error (inf for one).

    Holds for the policy that acted; weights sum to 1 over an episode that was cut short, and over all time, at cost 0
    after its end, for one that has ended. Raises as `transitions` does.
    """
    data = _priced(constraint, log, terminal)
    weight = constraint.discount ** data.step.double()
    zero = torch.zeros(len(data.initial_states), dtype=torch.float64, device=weight.device)
    over = zero.index_add(0, data.episode, data.ended.double()) > 0
    whole = torch.where(over, 1 / (1 - constraint.discount), zero.index_add(0, data.episode, weight))
    totals = zero.index_add(0, data.episode, weight * data.rewards.double()) / whole
    spread = float(totals.std()) / len(totals) ** 0.5 if len(totals) > 1 else math.inf
    return float(totals.mean()), spread


def worst_case_gradient(
    constraint: Constraint, mdp: ModelMDP, policy: Policy, draws: Params, nu: Params, noise: Noise
) -> Margin:
    """Margin of the largest mean cost among simulators with parameters `draws` (values `[K, ...]`), and its gradient.

    Each draw is rolled out on the same `noise`; weights sum to 1 over its T steps. `constraint.width` w > 0 takes
    `w log sum_k exp(J_k / w)` for the maximum, which exceeds it by at most `w log K`. The maximum over as many draws as
    `worst_case_draws(constraint)` is exceeded by at most the share `probability` of the posterior, with `confidence`,
    for a policy chosen without them: judge a policy trained on some draws on new ones. info: "costs" `[K]`, and
    "confidence", what the draws given are worth.
    Raises `ValueError` for another kind, draws that do not match, or costs that are not finite.
    """
    if constraint.kind != "worst_case":
        raise ValueError(f"'{constraint.name}' is of kind {constraint.kind!r}: use constraint_gradient")
    counts = {len(value) if value.ndim else 0 for value in draws.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"draws must hold the same number K >= 1 of values per name, got {sorted(counts)}")
    leaves = {key: value.detach().clone().requires_grad_() for key, value in nu.items()}
    cost = partial(_simulated_cost, constraint, mdp, policy, nu=leaves, noise=noise)
    with torch.enable_grad():
        costs = torch.stack([cost({key: value[k] for key, value in draws.items()}) for k in range(counts.pop())])
        if not bool(torch.isfinite(costs).all()):
            bad = (~torch.isfinite(costs)).nonzero().flatten().tolist()
            raise ValueError(f"'{constraint.name}': the mean cost of draws {bad} is not finite; the policy loses them")
        w = constraint.width
        worst = w * torch.logsumexp(costs / w, 0) if w else costs.max()
        parts = torch.autograd.grad(worst, list(leaves.values()), allow_unused=True, materialize_grads=True)
    grad = {key: -part for key, part in zip(leaves, parts, strict=True)}
    worst = worst.detach()
    info = {"costs": costs.detach(), "confidence": worst.new_tensor(1 - (1 - constraint.probability) ** len(costs))}
    return Margin(constraint.limit - worst, grad, worst, torch.zeros_like(worst), info=info)


def worst_case_draws(constraint: Constraint) -> int:
    """K with `(1 - probability)^K <= 1 - confidence` (Tempo, Bai and Dabbene 1997)."""
    return math.ceil(math.log(1 - constraint.confidence) / math.log(1 - constraint.probability))


def _simulated_cost(
    constraint: Constraint, mdp: ModelMDP, policy: Policy, theta: Params, *, nu: Params, noise: Noise
) -> Tensor:
    def cost(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return constraint.cost(state, action, following)

    signal = rollout(replace(mdp, reward=cost), policy, theta, nu, noise).rewards
    weight = constraint.discount ** torch.arange(signal.shape[1], dtype=signal.dtype, device=signal.device)
    return (signal @ (weight / weight.sum())).mean()


def _priced(
    constraint: Constraint, log: Rollout | RolloutLog | Transitions, terminal: Callable[[Tensor], Tensor] | None
) -> Transitions:
    """The transitions with the signal in place of the rewards."""
    signal = constraint_signal(constraint)
    if not isinstance(log, Transitions):
        return transitions(log, signal, terminal=terminal)
    rewards = signal(log.states, log.actions, log.next_states)
    if rewards.shape != log.rewards.shape:
        raise ValueError(
            f"the cost of '{constraint.name}' gave {list(rewards.shape)}, expected {list(log.rewards.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        bad = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(f"the cost of '{constraint.name}' is not finite (first at transition {bad})")
    return transitions(replace(log, rewards=rewards))


def _doubt(found: Estimate, confidence: float) -> str:
    figures = {
        key: float(found.info[key]) for key in ("bellman_radius", "return_low", "return_high") if key in found.info
    }
    value, radius = float(found.value), figures.get("bellman_radius", 0.0)
    if not math.isfinite(value):
        return f"the estimate is {value}"
    if confidence > 0.5 and "value_stderr" not in found.info:
        return f"there is no standard error for the confidence {confidence}; 0.5 takes the estimate at face value"
    if radius >= 1:
        return f"the policy is unstable on the real data (Bellman radius {radius:.4g})"
    low, high = figures.get("return_low", -math.inf), figures.get("return_high", math.inf)
    slack = 1e-9 * max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else 0.0
    if not low - slack <= value <= high + slack:
        return f"the estimate {value:.4g} is outside what the recorded signal allows, {low:.4g} to {high:.4g}"
    return ""
