"""Critic of a policy in the simulator, fitted on rollouts of it.

Q(s, a) = phi(s, a)^T W solves the least-squares Bellman equation over N simulated transitions,

    A W = sum_i c_i phi_i r_i,   A = sum_i c_i phi_i (phi_i - discount phi'_i)^T,   phi'_i = E_{a' ~ pi} phi(s'_i, a').

The expectation over actions is a third-degree cubature in the policy's noise (exact for quadratic features of an action
linear in it). c_i as in `critic.py`. The infinite horizon is meant: the last step of a rollout is no end. How W moves
with theta: `critic_derivative.py`.
References: M. Lagoudakis and R. Parr, Least-Squares Policy Iteration, 2003, section 5 (LSTD-Q); I. Arasaratnam and
S. Haykin, Cubature Kalman Filters, 2009, equation 32 (the nodes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import (
    CriticError,
    CriticSystem,
    Features,
    act,
    check_identified,
    expected_features,
    leverage_weights,
    noise_nodes,
    quadratic_features,
    scaled_features,
)
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import rollout

Derivative = Literal["auto", "score", "pathwise"]
Nodes = tuple[Tensor, Tensor]
"""noise of the policy `[K, noise_dim]` and weights `[K]`, summing to 1"""

ROWS = 65_536  # transitions in one graph: bounds memory, not the result


@dataclass(frozen=True)
class Simulated:
    """N simulated transitions with what the critic needs of each; q features."""

    transitions: Transitions
    noise: Tensor
    """`[N, k]` process noise"""
    phi: Tensor
    """`[N, q]`"""
    following: Tensor
    """`[N, q]` phi', zero after the end"""
    weights: Tensor
    """`[N]` c"""
    group: Tensor
    """`[N]` int64: which group of rollouts, for standard errors"""


@dataclass(frozen=True)
class ModelCritic:
    """`Q(s, a) = features(s, a) @ weights` of the policy in the simulator at theta."""

    weights: Tensor
    """W `[q]`"""
    features: Features
    nodes: Nodes
    actions: Tensor | None
    """`[A, m]` all actions of a discrete policy, which then replace the nodes"""
    system: Tensor
    """A `[q, q]`"""
    sums: CriticSystem
    """of A and the right-hand side, per group"""
    data: Simulated
    derivative: Literal["score", "pathwise"]
    price: Tensor
    """what the successor is worth: D `[N]` (score), or discount grad V `[N, n]` (pathwise)"""
    condition: float
    bellman_radius: float
    left_out: int | None = None
    """the group of rollouts that this fit does without"""


def model_critic(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    features: Features | None = None,
    derivative: Derivative = "auto",
    behaviour: Policy | None = None,
    actions: Tensor | None = None,
    ridge: float = 0.0,
    groups: int = 8,
) -> ModelCritic:
    """Q of `policy` in `mdp` at theta from the rollouts of `noise`, in float64.

    `features(s, a) -> [N, q]` (None: all monomials up to degree 2). `derivative` "auto": pathwise where the model has a
    derivative, else score. `behaviour`: who acts in the rollouts, with the same nu (None: the policy itself); a
    deterministic policy needs one, say `exploring_policy(policy, std)`, and `noise.policy` then holds its columns.
    `actions [A, m]`: all actions of a discrete policy (None: 64 nodes stand for its probabilities).
    Memory: two features `[N, q]`. Raises `CriticError` when the data fix no critic or it diverges, `ValueError` when
    the model has neither a derivative nor a log_prob, or the options do not fit.
    """
    mode = derivative_mode(mdp, derivative)
    if not 1 <= groups <= noise.process.shape[0]:
        raise ValueError(f"groups must be between 1 and the {noise.process.shape[0]} rollouts, got {groups}")
    acting = policy if behaviour is None else behaviour
    if noise.policy.shape[-1] != acting.noise_dim:
        raise ValueError(
            f"noise.policy has {noise.policy.shape[-1]} columns, the acting policy needs {acting.noise_dim}"
        )
    with torch.no_grad():
        drawn = rollout(mdp, acting, theta, nu, noise)
        over = partial(mdp.terminal, theta) if mdp.terminal is not None else None
        flat = _in_double(transitions(drawn, terminal=over))
        mask = torch.ones_like(drawn.rewards, dtype=torch.bool) if drawn.mask is None else drawn.mask
        some = slice(None, None, 1 + len(flat.rewards) // ROWS)
        sample = replace(flat, states=flat.states[some], actions=flat.actions[some])
        basis = scaled_features(features if features is not None else quadratic_features(flat), sample)
        nodes = policy_nodes(policy, nu, flat.states)
        phi = by_rows(lambda rows: basis(flat.states[rows], flat.actions[rows]), len(flat.rewards))
        mean = lambda rows: expected(policy, nu, flat.next_states[rows], basis, nodes, actions)
        following = by_rows(mean, len(flat.rewards)).mul_(~flat.ended.unsqueeze(-1))
        group = flat.episode * groups // len(flat.initial_states)
        data = Simulated(flat, noise.process[mask].double(), phi, following, _leverage(phi, some), group)
    sums = _ridged(_sums(data, groups), ridge)
    condition, radius = _identified(sums, mdp.discount)
    weights, system = _solution(sums, list(range(groups)), mdp.discount)
    critic = ModelCritic(weights, basis, nodes, actions, system, sums, data, mode, weights, condition, radius)
    return replace(critic, price=_price(critic, policy, nu, mdp.discount))


def derivative_mode(mdp: ModelMDP, derivative: Derivative) -> Literal["score", "pathwise"]:
    """What "auto" means for this model; raises `ValueError` for what the model cannot give."""
    if derivative not in ("auto", "score", "pathwise"):
        raise ValueError(f"derivative must be 'auto', 'score' or 'pathwise', got {derivative!r}")
    mode: Literal["score", "pathwise"] = "pathwise" if mdp.derivative_order else "score"
    if derivative != "auto":
        mode = derivative
    if mode == "pathwise" and mdp.derivative_order == 0:
        raise ValueError("the model declares derivative_order 0: no pathwise derivative; use derivative='score'")
    if mode == "score":
        log_density(mdp)
    return mode


def leave_out(critic: ModelCritic, policy: Policy, nu: Params, group: int, discount: float) -> ModelCritic:
    """The critic refitted without one group of rollouts: a jackknife replicate."""
    keep = [g for g in range(len(critic.sums.gram)) if g != group]
    weights, system = _solution(critic.sums, keep, discount)
    other = replace(critic, weights=weights, system=system, left_out=group)
    return replace(other, price=_price(other, policy, nu, discount))


def policy_nodes(policy: Policy, nu: Params, states: Tensor) -> Nodes:
    """Nodes for expectations over the policy's noise: `+-sqrt(d) e_i` of d columns, or those of `critic.noise_nodes`
    where the action does not follow its noise smoothly."""
    d = policy.noise_dim
    if d == 0 or not moves_smoothly(policy, nu, states):
        return noise_nodes(policy, nu, states)
    eye = torch.eye(d, dtype=torch.float64, device=states.device) * d**0.5
    return torch.cat([eye, -eye]), torch.full((2 * d,), 1 / (2 * d), dtype=torch.float64, device=states.device)


def moves_smoothly(policy: Policy, nu: Params, states: Tensor) -> bool:
    """Whether the action has a derivative in nu, as those of continuous reparameterised policies do."""
    leaves = {key: value.detach().requires_grad_() for key, value in nu.items()}
    with torch.enable_grad():
        noise = torch.zeros(policy.noise_dim, dtype=torch.float64, device=states.device)
        return bool(act(policy, leaves, states[:1], noise).requires_grad)


def expected(
    policy: Policy, nu: Params, states: Tensor, features: Features, nodes: Nodes, actions: Tensor | None = None
) -> Tensor:
    """`E_{a ~ pi} phi(s, a)` `[N, q]`."""
    if actions is not None:
        return expected_features(policy, nu, states, features, actions)
    parts = [weight * features(states, act(policy, nu, states, node)) for node, weight in zip(*nodes, strict=True)]
    return torch.stack(parts).sum(0)


def state_value(critic: ModelCritic, policy: Policy, nu: Params, states: Tensor) -> Tensor:
    """`V(s) = E_{a ~ pi} Q(s, a)` `[N]`."""
    return expected(policy, nu, states, critic.features, critic.nodes, critic.actions) @ critic.weights


def by_rows(function: Callable[[slice], Tensor], count: int) -> Tensor:
    """`function` of slices of at most 65 536 rows, joined."""
    whole = torch.empty(0)
    for start in range(0, count, ROWS):
        part = function(slice(start, start + ROWS))
        if start == 0:
            whole = part.new_empty(count, *part.shape[1:])
        whole[start : start + ROWS] = part
    return whole


def _leverage(phi: Tensor, some: slice) -> Tensor:
    """`leverage_weights` of all rows, by the second moments of some."""
    sample = phi[some]
    kept = leverage_weights(sample)
    values, vectors = torch.linalg.eigh((kept.unsqueeze(-1) * sample).mT @ sample / kept.sum())
    main = values > 1e-11 * values[-1]
    unit = vectors[:, main] / values[main].sqrt()
    return by_rows(lambda rows: 1 / (1 + (phi[rows] @ unit).square().sum(-1) / phi.shape[1]), len(phi))


def _in_double(data: Transitions) -> Transitions:
    wide = ("states", "actions", "rewards", "next_states", "initial_states")
    return replace(data, **{name: getattr(data, name).double() for name in wide})


def _sums(data: Simulated, groups: int) -> CriticSystem:
    rewards, parts = data.transitions.rewards, []
    for g in range(groups):
        rows = data.group == g
        chosen = data.weights[rows].unsqueeze(-1) * data.phi[rows]
        parts.append((chosen.mT @ data.phi[rows], chosen.mT @ data.following[rows], chosen.mT @ rewards[rows]))
    gram, cross, reward = (torch.stack(part) for part in zip(*parts, strict=True))
    return CriticSystem(gram, cross, reward, torch.zeros_like(reward), torch.ones_like(reward[:, 0]))


def _identified(sums: CriticSystem, discount: float) -> tuple[float, float]:
    """Condition of the Gram matrix and Bellman radius; raises `CriticError` where there is no critic."""
    try:
        condition, radius = check_identified(sums, discount, 0.0)
    except CriticError as error:
        raise CriticError(f"of the simulated rollouts: {error}") from error
    if radius >= 1:
        raise CriticError(
            f"the policy's value diverges in the simulator (Bellman radius {radius:.4g} >= 1): train it further, "
            "lower the discount, or draw more rollouts"
        )
    return condition, radius


def _solution(sums: CriticSystem, keep: list[int], discount: float) -> tuple[Tensor, Tensor]:
    system = (sums.gram[keep] - discount * sums.cross[keep]).sum(0)
    return torch.linalg.inv(system) @ sums.reward[keep].sum(0), system


def _ridged(sums: CriticSystem, ridge: float) -> CriticSystem:
    """`ridge` times the mean square of the features, added to each group's share of A."""
    eye = torch.eye(sums.gram.shape[-1], dtype=sums.gram.dtype, device=sums.gram.device)
    size = sums.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return replace(sums, gram=sums.gram + ridge * size * eye)


def _price(critic: ModelCritic, policy: Policy, nu: Params, discount: float) -> Tensor:
    """What the target's derivative needs of the value function: D `[N]`, or discount grad V at s' `[N, n]`."""
    data, flat = critic.data, critic.data.transitions
    if critic.derivative == "score":
        return flat.rewards + (discount * data.following - data.phi) @ critic.weights

    def slope(rows: slice) -> Tensor:
        states = flat.next_states[rows].clone().requires_grad_()
        with torch.enable_grad():
            value = state_value(critic, policy, nu, states).sum()
            return torch.autograd.grad(value, states)[0]

    return discount * by_rows(slope, len(flat.rewards)) * ~flat.ended.unsqueeze(-1)


def log_density(mdp: ModelMDP) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """`mdp.log_prob`; raises `ValueError` where the model has none."""
    if mdp.log_prob is None:
        raise ValueError("the model declares no log_prob: no score; give it a density, or a derivative of its step")
    return mdp.log_prob
