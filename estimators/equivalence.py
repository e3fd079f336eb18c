"""MDP equivalence: the reward with which a wrong model has the right action values.

    r_hat(s, a) = r(s, a) + gamma_world E_world V*(s+) - gamma_model E_model V*(s+)                                (1)

V* and Q* belong to the world. `Q*(s, a) = r_hat(s, a) + gamma_model E_model V*(s+)` then holds for every (s, a), so
Q* solves the Bellman equation of the model under r_hat, with the model's own discount: `Q_hat* = Q*`, and the policy
that is optimal in the model is optimal in the world, whatever the model. It needs what this module checks:

    world value         V* is finite
    support             the model stays where V* is known
    contraction         gamma_model^t E_model V*(s_t) -> 0 along the model's trajectories, so that no other solution of
                        the Bellman equation is the optimum: gamma_model < 1, or every policy ends in absorbing states
                        worth 0

Here for finite MDPs, where both expectations are sums; `lqr_equivalence.py` and `sampled_equivalence.py` do the same
for linear-quadratic problems and for simulators. Returns are maximised. A temperature > 0 (reward units) makes all
values soft (entropy-regularised); equation (1) stays as it is.
Reference: S. Gros and M. Zanon, Data-Driven Economic NMPC Using Reinforcement Learning, IEEE TAC 65 (2020) 636,
theorem 1 (one discount); with two discounts the same proof holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.solvers.bellman import optimal_actions, optimal_values, q_values, state_transition


class EquivalenceError(ValueError):
    """A condition for `Q_hat* = Q*` is violated; the message names it."""


@dataclass(frozen=True)
class Condition:
    """One condition of the equivalence, with what was found."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class TabularMDP:
    """reward `[S, A]`, transition `[S, A, S]`, or `[Y, S]` with `post [S, A]` (see `solvers/bellman.py`), discount.

    A state is absorbing when no action leaves it and the best pays 0; only with such states may discount reach 1.
    """

    reward: Tensor
    transition: Tensor
    discount: float
    post: Tensor | None = None


@dataclass(frozen=True)
class TabularEquivalent:
    """The model with the reward (1), the world's V* `[S]` and Q* `[S, A]`, and the conditions."""

    model: TabularMDP
    value: Tensor
    q: Tensor
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class EquivalenceGap:
    """How far a model's action values are from the world's; zero for an equivalent model. Units of return."""

    q_max: float
    """max over (s, a) of `|Q_hat* - Q*|`"""
    q_weighted: float
    """root of the weighted mean of its square"""
    advantage_max: float
    """max of `|A_hat* - A*|`, A = Q - V: blind to what shifts all actions of a state alike"""
    regret_max: float
    """max over states of `V* - V_pi` in the world, pi optimal in the model"""
    regret_weighted: float
    """its weighted mean"""
    disagreement: float
    """weighted share of states where the model's action is worse in the world than the best one"""


def demand(conditions: Sequence[Condition]) -> None:
    """Raise `EquivalenceError` naming every condition that is violated."""
    broken = [f"{condition.name}: {condition.detail}" for condition in conditions if not condition.holds]
    if broken:
        raise EquivalenceError(f"the model has no equivalent reward; violated: {'; '.join(broken)}")


def modified_reward(
    world: TabularMDP, model: TabularMDP, *, temperature: float = 0.0, strict: bool = True
) -> TabularEquivalent:
    """The model with reward (1), under which its optimal action values are the world's.

    Of `model` only the transition and the discount are used; all is computed in float64. `strict=False` returns the
    violated conditions instead of raising; the reward is then NaN where it does not exist. Raises `EquivalenceError`
    naming each violated condition, `ValueError` for shapes that do not go together, negative discounts or a world whose
    rows are no distributions.
    """
    world, model = _checked_pair(world, model)
    conditions = [_world_condition(world, temperature)]
    if conditions[0].holds:
        value, q = optimal_q(world, temperature=temperature)
    else:
        value, q = torch.full_like(world.reward[..., 0], torch.nan), torch.full_like(world.reward, torch.nan)
    conditions += [_support_condition(model), _contraction_condition(model, value, temperature)]
    if strict:
        demand(conditions)
    reward = q - q_values(value, torch.zeros_like(q), model.transition, model.discount, post=model.post)
    return TabularEquivalent(replace(model, reward=reward), value, q, tuple(conditions))


def equivalence_gap(
    world: TabularMDP, model: TabularMDP, *, temperature: float = 0.0, weights: Tensor | None = None
) -> EquivalenceGap:
    """Distance of the optimal action values of (model, its reward, its discount) from those of the world.

    weights `[S, A]` (None: uniform), scaled to sum 1; their sums over actions weigh the states. Raises
    `EquivalenceError` when world or model has no finite optimum, `ValueError` as `modified_reward`.
    """
    world, model = _checked_pair(world, model)
    demand([_world_condition(world, temperature), _support_condition(model)])
    solvable = _world_condition(model, temperature)
    demand([replace(solvable, name="contraction")])
    (value, q), (model_value, model_q) = (optimal_q(mdp, temperature=temperature) for mdp in (world, model))
    share = torch.ones_like(q) if weights is None else weights.to(q)
    if share.shape != q.shape or not bool((share >= 0).all()) or not bool(torch.isfinite(share).all() & share.any()):
        raise ValueError(f"weights must be [S, A] = {list(q.shape)}, finite, >= 0 and not all 0, got {weights}")
    share = share / share.sum()
    states = share.sum(-1)
    actions = optimal_actions(model_q, temperature)
    regret = value - _policy_value(world, actions, temperature)
    shortfall = (actions * (value.unsqueeze(-1) - q)).sum(-1)
    best = (optimal_actions(q, temperature) * (value.unsqueeze(-1) - q)).sum(-1)
    worse = shortfall - best > 1e-9 * (1 + value.abs())
    return EquivalenceGap(
        q_max=float((model_q - q).abs().max()),
        q_weighted=float((share * (model_q - q).square()).sum().sqrt()),
        advantage_max=float((model_q - model_value.unsqueeze(-1) - q + value.unsqueeze(-1)).abs().max()),
        regret_max=float(regret.max()),
        regret_weighted=float(states @ regret),
        disagreement=float(states @ worse.to(states)),
    )


def optimal_q(mdp: TabularMDP, *, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """V* `[S]` and Q* `[S, A]`; with discount >= 1 by policy iteration on the states that are not absorbing.

    Raises `EquivalenceError` when there is no finite optimum, `ValueError` as `optimal_values`.
    """
    if mdp.discount < 1:
        found = optimal_values(
            mdp.reward, mdp.transition, mdp.discount, post=mdp.post, temperature=temperature, strict=True
        )
        return found.value, found.q
    demand([_world_condition(mdp, temperature)])
    q, value = mdp.reward, None
    for _ in range(1000):
        following = _policy_value(mdp, optimal_actions(q), temperature)
        # every policy ends, so the values rise from step to step until no action improves them
        if value is not None and not bool((following > value + 1e-14 * (1 + value.abs())).any()):
            break
        value, q = following, q_values(following, mdp.reward, mdp.transition, mdp.discount, post=mdp.post)
    return following, q


def absorbing(mdp: TabularMDP) -> Tensor:
    """`[S]` bool: states that no action leaves and whose best action pays 0, to rounding."""
    free = mdp.reward.amax(-1).abs() <= 1e-12 * (1 + mdp.reward.abs().max())
    return _stays(mdp) & free


def _stays(mdp: TabularMDP) -> Tensor:
    indices = torch.arange(len(mdp.reward), device=mdp.reward.device)
    return (_rows(mdp)[indices, :, indices] == 1).all(-1)


def _rows(mdp: TabularMDP) -> Tensor:
    """The transition as `[S, A, S]`."""
    return mdp.transition if mdp.post is None else mdp.transition[mdp.post]


def _policy_value(mdp: TabularMDP, actions: Tensor, temperature: float) -> Tensor:
    """`[S]` value of action probabilities `[S, A]`, entropy bonus included, 0 in absorbing states if discount >= 1."""
    bonus = temperature * torch.special.entr(actions).sum(-1)
    kernel = mdp.discount * state_transition(actions, mdp.transition, post=mdp.post)
    if mdp.discount >= 1:
        kernel = kernel * (~absorbing(mdp)).to(kernel)
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    gain = (actions * mdp.reward).sum(-1) + bonus
    return (torch.linalg.inv(eye - kernel) @ gain.unsqueeze(-1)).squeeze(-1)


def _largest_radius(rows: Tensor, discount: float, going_on: Tensor) -> float:
    """Spectral radius of `discount P_pi` among the states that go on, for the policy that stays longest; >= 1 or below.

    Policy iteration for `v = 1 + max_a discount P_a v`, whose solution is finite just when every policy's radius is
    below 1; it stops at the first policy whose radius is not.
    """
    moves = discount * rows[going_on][:, :, going_on]
    if not len(moves):
        return 0.0
    eye, one = torch.eye(len(moves), dtype=moves.dtype, device=moves.device), torch.ones_like(moves[:, 0, 0])
    stay, radius = one, 0.0
    for _ in range(1000):
        chosen = moves[torch.arange(len(moves), device=moves.device), (moves @ stay).argmax(-1)]
        radius = float(torch.linalg.eigvals(chosen).abs().max())
        if radius >= 1 - 1e-12:
            break
        longer = torch.linalg.inv(eye - chosen) @ one
        if not bool((longer > stay * (1 + 1e-12)).any()):
            break
        stay = longer
    return radius


def _world_condition(mdp: TabularMDP, temperature: float) -> Condition:
    name = "world value"
    if not bool(torch.isfinite(mdp.reward).all()):
        state, action = (~torch.isfinite(mdp.reward)).nonzero()[0].tolist()
        return Condition(name, False, f"the reward of state {state}, action {action} is not finite")
    if mdp.discount < 1:
        return Condition(name, True, f"discount {mdp.discount} < 1 and finite rewards")
    if temperature:
        return Condition(name, False, f"discount {mdp.discount} >= 1 adds up the entropy bonus without end")
    ends = absorbing(mdp)
    if not bool(ends.any()):
        return Condition(name, False, f"discount {mdp.discount} >= 1 and no absorbing state: returns do not converge")
    radius = _largest_radius(_rows(mdp), mdp.discount, ~ends)
    detail = f"discount {mdp.discount} >= 1; the policy that avoids absorbing states longest has radius {radius:.6g}"
    return Condition(name, radius < 1 - 1e-12, f"{detail}, needed: below 1")


def _support_condition(model: TabularMDP) -> Condition:
    rows = _rows(model)
    wrong = ~_distributions(rows)
    if not bool(wrong.any()):
        return Condition("support", True, "every row of the model is a distribution over the world's states")
    state, action = wrong.nonzero()[0].tolist()
    mass = float(rows[state, action].sum())
    return Condition(
        "support",
        False,
        f"the model leaves the states on which V* is known: from state {state}, action {action} it reaches them with "
        f"probability {mass:.6g} ({int(wrong.sum())} of {wrong.numel()} rows are no distribution)",
    )


def _contraction_condition(model: TabularMDP, value: Tensor, temperature: float) -> Condition:
    name, gamma = "contraction", model.discount
    if gamma < 1:
        return Condition(name, True, f"the model's Bellman operator contracts by its discount {gamma}")
    if temperature:
        return Condition(name, False, f"the model's discount {gamma} >= 1 adds up the entropy bonus without end")
    rows, stays = _rows(model), _stays(model)
    if not bool(stays.any()):
        return Condition(name, False, f"the model's discount is {gamma} >= 1 and it has no absorbing state")
    worth = float(value[stays].abs().max())
    if worth > 1e-12:
        return Condition(
            name,
            False,
            f"the model's discount is {gamma} >= 1 and V* is {worth:.6g}, not 0, in a state it never leaves",
        )
    radius = _largest_radius(rows, gamma, ~stays)
    detail = f"the model's discount is {gamma} >= 1; the policy that avoids its absorbing states longest has"
    return Condition(name, radius < 1 - 1e-12, f"{detail} radius {radius:.6g}, needed: below 1")


def _distributions(rows: Tensor) -> Tensor:
    """`[S, A]` bool: rows `[S, A, S]` that sum to 1 within 1e-6, which single precision needs; False for NaN."""
    return torch.maximum((rows.sum(-1) - 1).abs(), -rows.amin(-1)) <= 1e-6


def _checked_pair(world: TabularMDP, model: TabularMDP) -> tuple[TabularMDP, TabularMDP]:
    """World and model in float64."""
    for name, mdp in (("world", world), ("model", model)):
        if not 0 <= mdp.discount < float("inf"):
            raise ValueError(f"the discount of the {name} must be finite and >= 0, got {mdp.discount}")
        if mdp.reward.ndim != 2:
            raise ValueError(f"the reward of the {name} must be [S, A], got {list(mdp.reward.shape)}")
        post, known = mdp.post, len(mdp.transition)
        if post is not None and (post.dtype != torch.int64 or bool(((post < 0) | (post >= known)).any())):
            raise ValueError(f"post of the {name} must hold int64 in [0, {known}), the rows of its transition")
        rows = _rows(mdp).shape
        if rows != (*mdp.reward.shape, mdp.reward.shape[0]):
            raise ValueError(f"the {name} has reward {list(mdp.reward.shape)} and transition rows {list(rows)}")
    if world.reward.shape != model.reward.shape:
        raise ValueError(
            f"world and model must share states and actions, got {list(world.reward.shape)} and "
            f"{list(model.reward.shape)}"
        )
    if not bool(_distributions(_rows(world)).all()):
        raise ValueError("every row of the world's transition must be a distribution: entries >= 0 that sum to 1")
    double = lambda mdp: replace(mdp, reward=mdp.reward.double(), transition=mdp.transition.double())
    return double(world), double(model)
