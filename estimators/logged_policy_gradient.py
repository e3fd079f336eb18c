"""Policy gradient of the real return from logged transitions.

With Q and the discounted visits zeta of the policy estimated by the least-squares critic on any log of the real system,

    deterministic:  g_nu = E_{s ~ d}[ grad_nu pi(s) grad_a Q(s, pi(s)) ],
    stochastic:     g_nu = E_{s ~ d, a ~ pi}[ grad_nu log pi(a | s) (Q(s, a) - V(s)) ],

d the discounted state visits of pi (total 1 / (1 - discount)): the first states, and discount * zeta_i at the successor
s'_i of every transition ("ratio", for data of any policy), or discount^t at the recorded states ("discounted", for
data of the policy itself). With "ratio" the deterministic form is the exact derivative of the estimated return
J = E phi(s_0, pi)^T w. The expectation over actions is a quadrature over the policy's noise; for a discrete policy it
takes the probabilities of the actions as multiples of 1/64, unless `actions` lists them all.
References: D. Silver et al., Deterministic Policy Gradient Algorithms, 2014, eq. 9 (states weighted by discount^t);
K. Ciosek and S. Whiteson, Expected Policy Gradients, 2018; the critic: see `critic.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import jvp

from sim2real.estimators.critic import (
    CriticSystem,
    Features,
    act,
    action_nodes,
    check_identified,
    critic_system,
    expected_features,
    noise_nodes,
    quadratic_features,
    scaled_features,
    solve_critic,
)
from sim2real.estimators.transitions import RealReward, Transitions, groups_of, transitions
from sim2real.log import RolloutLog
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout

Graph = tuple[Tensor, list[Tensor]]
"""what nu moves, `[M, k]` with its graph, and for each of its k columns the features `[M, q]` that price it"""


def logged_policy_gradient(
    policy: Policy,
    nu: Params,
    log: Rollout | RolloutLog | Transitions,
    *,
    real_reward: RealReward | None = None,
    real_discount: float,
    features: Features | None = None,
    initial_states: Tensor | None = None,
    actions: Tensor | None = None,
    terminal: Callable[[Tensor], Tensor] | None = None,
    weights: Literal["ratio", "discounted"] = "ratio",
    method: Literal["auto", "pathwise", "score"] = "auto",
    ridge: float = 0.0,
    groups: int = 16,
) -> Estimate:
    """Gradient of the real discounted return in nu, with the estimated return as `value`.

    `features(s, a) -> [N, q]` (None: all quadratic monomials) span the critic. `initial_states [E, n]`: where the real
    task starts (None: where the logged episodes do). `actions [A, m]`: all actions of a finite set, for exact
    expectations over them. `method` "auto" takes "pathwise" (grad pi grad_a Q) for a
    deterministic policy and "score" (grad log pi A) for a stochastic one; "pathwise" also suits reparameterised noise.
    info: "stderr" `[P]` of the gradient (raveled) and "value_stderr", by leaving out `groups` groups of episodes (or
    blocks of time) in turn, with "replicates" `[G, P]` and "value_replicates" `[G]`; "effective_sample_size" (of the
    state weights), "transitions", "condition", "bellman_radius", "ridge", and the range "return_low", "return_high" of
    returns that rewards between the extremes recorded allow. A Bellman radius >= 1, or a return outside that range,
    means that the policy is unstable on the data, or too far from them for the features: do not trust the estimate.
    Raises `CriticError` when the data cannot identify the critic, `ValueError` for data that do not match.
    """
    check_options(real_discount, weights, method, ridge, groups)
    data = transitions(log, real_reward, terminal=terminal)
    fixed = {key: value.detach() for key, value in nu.items()}
    phi = scaled_features(features if features is not None else quadratic_features(data), data)
    system, weighted = critic_system(policy, fixed, data, initial_states, phi, max(groups, 1), actions=actions)
    condition, radius = check_identified(system, real_discount, ridge)
    chosen = method if method != "auto" else ("pathwise" if policy.noise_dim == 0 else "score")
    states, weigh = visit_weights(data, initial_states, weighted, real_discount, weights, max(groups, 1))
    leaves = {key: value.clone().requires_grad_() for key, value in fixed.items()}
    graphs = _policy_graphs(policy, leaves, states, phi, chosen, actions)

    def estimate(left_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        keep = [g for g in range(len(system.gram)) if g != left_out]
        kept = CriticSystem(*(value[keep] for value in vars(system).values()))
        critic_weights, visits, value = solve_critic(kept, real_discount, ridge)
        state_weights = weigh(visits, left_out)
        return value, _pull(graphs, leaves, critic_weights, state_weights), state_weights

    value, gradient, state_weights = estimate(None)
    info = {
        "effective_sample_size": state_weights.sum().square() / state_weights.square().sum(),
    }
    low, high = return_range(data, real_discount)
    figures = {"transitions": len(data.rewards), "condition": condition, "bellman_radius": radius, "ridge": ridge}
    figures |= {"return_low": low, "return_high": high}
    info |= {key: torch.tensor(figure, dtype=torch.float64) for key, figure in figures.items()}
    if groups and len(system.gram) > 1:
        left = [estimate(g) for g in range(len(system.gram))]
        info["value_replicates"], info["replicates"] = (
            torch.stack([x[0] for x in left]),
            torch.stack([x[1] for x in left]),
        )
        info["value_stderr"] = jackknife_stderr(info["value_replicates"])
        info["stderr"] = jackknife_stderr(info["replicates"])
    grad = {key: part.to(nu[key].dtype) for key, part in unravel(gradient, fixed).items()}
    return Estimate(value=value.detach(), grad=grad, info={key: item.detach() for key, item in info.items()})


def check_options(real_discount: float, weights: str, method: str, ridge: float, groups: int) -> None:
    """Raise `ValueError` naming the first option of a logged gradient that is out of range."""
    if not 0 < real_discount <= 1:
        raise ValueError(f"real_discount must be in (0, 1], got {real_discount}")
    if weights not in ("ratio", "discounted"):
        raise ValueError(f"weights must be 'ratio' or 'discounted', got {weights!r}")
    if method not in ("auto", "pathwise", "score"):
        raise ValueError(f"method must be 'auto', 'pathwise' or 'score', got {method!r}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and >= 0 (relative to the features), got {ridge}")
    if groups < 0 or groups == 1:
        raise ValueError(f"groups must be 0 (no standard errors) or at least 2, got {groups}")


def return_range(data: Transitions, real_discount: float) -> tuple[float, float]:
    """Returns of the smallest and the largest reward recorded, received for ever; 0 is possible where episodes end."""
    span = 1 / (1 - real_discount) if real_discount < 1 else math.inf
    low, high = float(data.rewards.min()), float(data.rewards.max())
    if bool(data.ended.any()):
        low, high = min(low, 0.0), max(high, 0.0)
    return low * span if low else 0.0, high * span if high else 0.0


def jackknife_stderr(replicates: Tensor) -> Tensor:
    """Standard error from delete-one-group estimates `[G, ...]`: sqrt((G-1)/G sum (x_g - mean)^2)."""
    count = len(replicates)
    return (replicates - replicates.mean(0)).square().sum(0).mul((count - 1) / count).sqrt()


def visit_weights(
    data: Transitions,
    initial_states: Tensor | None,
    weighted: Tensor,
    real_discount: float,
    weights: Literal["ratio", "discounted"],
    groups: int,
) -> tuple[Tensor, Callable[[Tensor, int | None], Tensor]]:
    """States `[M, n]` that carry the discounted visits, and their weights `[M]` given lambda and the group left out."""
    group, first_group = groups_of(data, groups)
    if weights == "discounted":
        power = math.log(real_discount) * data.step.double()

        def by_time(visits: Tensor, left_out: int | None) -> Tensor:
            kept = power.exp() * (group != left_out if left_out is not None else torch.ones_like(power))
            return kept / (kept * (data.step == 0)).sum().clamp(min=1)

        return data.states, by_time
    first = data.initial_states if initial_states is None else initial_states
    belongs = first_group if initial_states is None else torch.full((len(first),), -1, device=first.device)
    going_on = real_discount * (~data.ended).double()

    def by_ratio(visits: Tensor, left_out: int | None) -> Tensor:
        start, later = torch.ones(len(first), dtype=visits.dtype, device=visits.device), (weighted @ visits) * going_on
        if left_out is not None:
            start, later = start * (belongs != left_out), later * (group != left_out)
        return torch.cat([start / start.sum(), later])

    return torch.cat([first, data.next_states]), by_ratio


def _policy_graphs(
    policy: Policy, leaves: Params, states: Tensor, phi: Features, method: str, actions: Tensor | None
) -> list[Graph]:
    """Per noise node: what nu moves (actions, or log pi of fixed actions), and what a unit of it is worth."""
    fixed = {key: value.detach() for key, value in leaves.items()}

    def pathwise(node: Tensor, share: Tensor) -> Graph:
        actions = act(policy, leaves, states, node)
        if not actions.requires_grad:
            raise ValueError("the policy's action has no derivative in nu; use method='score'")
        at = actions.detach()
        directions = torch.eye(at.shape[-1], dtype=at.dtype, device=at.device)
        slopes = [jvp(lambda a: phi(states, a), (at,), (along.expand_as(at),))[1] for along in directions]
        return actions, [share * slope for slope in slopes]

    if method == "pathwise":
        nodes, node_weights = noise_nodes(policy, leaves, states)
        return [pathwise(node, share) for node, share in zip(nodes, node_weights, strict=True)]
    sampled = action_nodes(policy, fixed, states, actions)
    average = expected_features(policy, fixed, states, phi, actions)

    def score(action: Tensor, share: Tensor) -> Graph:
        log_prob = policy.log_prob(leaves, states.to(action.dtype), action).unsqueeze(-1)
        return log_prob, [share.unsqueeze(-1) * (phi(states, action) - average)]

    return [score(action, share) for action, share in sampled]


def _pull(graphs: list[Graph], leaves: Params, critic_weights: Tensor, state_weights: Tensor) -> Tensor:
    """The gradient in nu, raveled, in float64."""
    total = torch.zeros_like(ravel(leaves), dtype=torch.float64, requires_grad=False)
    for output, priced in graphs:
        worth = torch.stack([basis @ critic_weights for basis in priced], -1) * state_weights.unsqueeze(-1)
        cotangent, targets = worth.to(output.dtype), list(leaves.values())
        parts = torch.autograd.grad(
            output, targets, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        total = total + ravel(dict(zip(leaves, parts, strict=True))).double()
    return total
