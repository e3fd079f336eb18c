"""Hessian-free gradient of the real return: simulator tuning as a configurable MDP.

Training in the simulator ends in the soft optimum `pi_theta = exp((Q_sim - V_sim) / lambda)` of the model at theta,
with the model's own reward and discount. Then `d log pi_theta = (d Q_sim - d V_sim) / lambda`, and for the real return

    grad_theta J_real = (1 / lambda) E_{s ~ d, a ~ pi}[ A_real(s, a) (grad_theta Q_sim(s, a) - grad_theta V_sim(s)) ],

d the discounted state visits of the *real* system (total 1 / (1 - real_discount)), A_real the real advantage of pi.
No Hessian and no inverse, for any policy class and any kind of action. grad_theta Q_sim is that of in-sim rollouts from
the real state and action with the policy held fixed (envelope theorem; `soft_value.py`), all of them pulled back in one
reverse pass. A_real comes from the least-squares critic on the log. In every state the action is summed out over nodes
that share the noise of their rollouts; the advantages of the nodes sum to zero, which subtracts grad_theta V_sim and
most of that noise exactly. For lambda -> 0 and continuous actions this is -E[grad_a A' Q_aa^-1 grad_a grad_theta Q].

The formula needs the policy to *be* the soft optimum in the states it is used: `soft_consistency` measures that.
References: Kudo, Tanabe, Wachi and Akimoto (Boltzmann-covariance hypergradients), ICAPS 2026, arXiv 2603.14867, theorem
1; Thoma et al., Contextual Bilevel Reinforcement Learning for Incentive Alignment (HPGD), 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import (
    CriticSystem,
    Features,
    action_nodes,
    check_identified,
    critic_system,
    quadratic_features,
    scaled_features,
    solve_critic,
)
from sim2real.estimators.logged_policy_gradient import check_options, jackknife_stderr, return_range, visit_weights
from sim2real.estimators.soft_value import (
    Method,
    StateValue,
    check_temperature,
    consistency_info,
    inconsistency,
    soft_action_value,
)
from sim2real.estimators.transitions import RealReward, Transitions, transitions
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.solve_report import UnconvergedWarning

ActionValue = Callable[[Params, Tensor, Tensor], Tensor]
"""theta, s `[N, n]`, a `[N, m]` -> in-sim soft action value `[N]`, with its derivative in theta"""

_RowValue = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
"""the same with the index `[N]` of the state, which says what noise is shared"""


def hessian_free_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    log: Rollout | RolloutLog | Transitions,
    noise: Noise | None,
    *,
    temperature: float,
    real_reward: RealReward | None = None,
    real_discount: float,
    features: Features | None = None,
    initial_states: Tensor | None = None,
    actions: Tensor | None = None,
    terminal: Callable[[Tensor], Tensor] | None = None,
    weights: Literal["ratio", "discounted"] = "ratio",
    ridge: float = 0.0,
    groups: int = 16,
    action_value: ActionValue | None = None,
    soft_value: StateValue | None = None,
    method: Method = "auto",
    rollouts: int = 1,
    rows_at_once: int = 65536,
    consistency_tol: float = 0.01,
) -> Estimate:
    """Gradient of the real discounted return in theta through the soft optimum, with the estimated return as `value`.

    `temperature` lambda is that of the in-sim training, in units of its reward. `noise [B, T, ...]` drives the in-sim
    rollouts of T steps, `rollouts` per state and action; `action_value` replaces them (then `noise` may be None), for
    example by an exact or fitted Q. `soft_value` and `method` as in `soft_action_value`, the rest as in
    `logged_policy_gradient`, `info` too: "stderr" `[P]` of the raveled gradient in theta, "value_stderr",
    "effective_sample_size", "bellman_radius" and so on; "rollouts" counts the in-sim rollouts. At most `rows_at_once`
    of them are in memory together. Standard errors cost one reverse pass per group; `groups=0` leaves them out. They
    are those of the real data: the noise of the in-sim rollouts, which all groups share, comes on top.
    "consistency" and "consistency_stderr": how far the policy is from soft-optimal over up to 200 of the states, in
    nats (`soft_consistency`; not with `action_value`, or noise of fewer than four rows); above `consistency_tol` by two
    standard errors this warns `UnconvergedWarning`, and `tune` does not take the step.
    Raises `ValueError` for missing noise, a gradient that is not finite or that misses theta, `CriticError` when the
    data cannot identify the critic, and as `soft_action_value` does.
    """
    check_temperature(temperature)
    check_options(real_discount, weights, "auto", ridge, groups)
    if rows_at_once < 1 or rollouts < 1:
        raise ValueError(f"rows_at_once and rollouts must be at least 1, got {rows_at_once} and {rollouts}")
    data = transitions(log, real_reward, terminal=terminal)
    fixed = {key: value.detach() for key, value in nu.items()}
    phi = scaled_features(features if features is not None else quadratic_features(data), data)
    system, weighted = critic_system(policy, fixed, data, initial_states, phi, max(groups, 1), actions=actions)
    condition, radius = check_identified(system, real_discount, ridge)
    states, weigh = visit_weights(data, initial_states, weighted, real_discount, weights, max(groups, 1))
    fits = _fits(system, weigh, real_discount, ridge, jackknife=groups > 0)
    info: dict[str, Tensor] = {}
    if action_value is not None:
        value_of = _without_noise(action_value)
    elif noise is None:
        raise ValueError("pass noise (sample_noise) for the in-sim rollouts, or an action_value")
    else:
        value_of = _rollouts(mdp, policy, fixed, noise, temperature, soft_value, method, rollouts)
        counted = states[fits.state_weights[:, 0] != 0]
        some = counted[:: -(-len(counted) // 200)].to(noise.process.dtype)
        options = {"temperature": temperature, "actions": actions, "method": method}
        info = consistency_info(mdp, policy, theta, fixed, noise, some, **options)
        _warn(inconsistency(info, consistency_tol))
        info["consistency_tol"] = torch.tensor(consistency_tol, dtype=torch.float64)
    nodes = action_nodes(policy, fixed, states, actions)
    grads = _pull(value_of, theta, states, nodes, phi, fits, temperature, rows_at_once // rollouts)
    figures = {"transitions": len(data.rewards), "condition": condition, "bellman_radius": radius, "ridge": ridge}
    figures |= dict(zip(("return_low", "return_high"), return_range(data, real_discount), strict=True))
    figures["rollouts"] = 0 if action_value is not None else len(states) * len(nodes) * rollouts
    info |= {key: torch.tensor(float(figure), dtype=torch.float64) for key, figure in figures.items()}
    info |= _spread(fits, grads)
    like = {key: value.detach() for key, value in theta.items()}
    grad = {key: part.to(theta[key].dtype) for key, part in unravel(grads[0], like).items()}
    return Estimate(fits.values[0], grad, info)


@dataclass(frozen=True)
class _Fits:
    """The critic on all of the data (first column), and with each group left out."""

    critic_weights: Tensor
    """`[q, F]`"""
    state_weights: Tensor
    """`[M, F]`"""
    values: Tensor
    """`[F]`"""


def _fits(
    system: CriticSystem,
    weigh: Callable[[Tensor, int | None], Tensor],
    real_discount: float,
    ridge: float,
    *,
    jackknife: bool,
) -> _Fits:
    count = len(system.gram)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for left_out in [None, *range(count)] if jackknife and count > 1 else [None]:
        keep = [g for g in range(count) if g != left_out]
        kept = CriticSystem(*(value[keep] for value in vars(system).values()))
        critic_weights, visits, value = solve_critic(kept, real_discount, ridge)
        columns.append((critic_weights, weigh(visits, left_out), value))
    critic_weights, state_weights, values = (torch.stack(parts, -1) for parts in zip(*columns, strict=True))
    return _Fits(critic_weights, state_weights, values)


def _spread(fits: _Fits, grads: Tensor) -> dict[str, Tensor]:
    """The effective sample size, and standard errors from the groups left out."""
    visits = fits.state_weights[:, 0]
    info = {"effective_sample_size": visits.sum().square() / visits.square().sum()}
    if len(grads) > 1:
        info |= {"replicates": grads[1:], "stderr": jackknife_stderr(grads[1:])}
        info |= {"value_replicates": fits.values[1:], "value_stderr": jackknife_stderr(fits.values[1:])}
    return info


def _warn(doubt: str) -> None:
    if doubt:
        message = f"the Hessian-free gradient is not to be trusted: {doubt}"
        warnings.warn(message, UnconvergedWarning, stacklevel=3)


def _without_noise(action_value: ActionValue) -> _RowValue:
    return lambda theta, states, actions, index: action_value(theta, states, actions)


def _rollouts(
    mdp: ModelMDP,
    policy: Policy,
    nu: Params,
    noise: Noise,
    temperature: float,
    soft_value: StateValue | None,
    method: Method,
    rollouts: int,
) -> _RowValue:
    """Q_sim as the mean of several rollouts; those of all actions compared in one state share their rows of noise."""
    dtype = noise.process.dtype

    def value(theta: Params, states: Tensor, actions: Tensor, index: Tensor) -> Tensor:
        rows = (index * rollouts).unsqueeze(-1) + torch.arange(rollouts, device=index.device)
        tiled = (x.to(dtype).repeat_interleave(rollouts, 0) for x in (states, actions))
        rows = rows.reshape(-1) % len(noise.process)
        options: dict[str, Any] = {"soft_value": soft_value, "method": method, "rows": rows}
        q = soft_action_value(mdp, policy, theta, nu, noise, *tiled, temperature=temperature, **options)
        return q.reshape(-1, rollouts).mean(-1)

    return value


def _pull(
    value_of: _RowValue,
    theta: Params,
    states: Tensor,
    nodes: list[tuple[Tensor, Tensor]],
    phi: Features,
    fits: _Fits,
    temperature: float,
    rows_at_once: int,
) -> Tensor:
    """Gradients `[F, P]` of all fits: the cotangent of Q_sim(s, a) is visits(s) pi(a | s) A_real(s, a) / lambda."""
    leaves = {key: value.detach().requires_grad_() for key, value in theta.items()}
    total = states.new_zeros(fits.values.shape[0], sum(v.numel() for v in leaves.values()), dtype=torch.float64)
    size = max(1, rows_at_once // len(nodes))
    for start in range(0, len(states), size):
        index = torch.arange(start, min(start + size, len(states)), device=states.device)
        here = states[index]
        worths = [phi(here, action[index]) @ fits.critic_weights for action, _ in nodes]  # Q_real, [rows, F]
        shares = [share[index].unsqueeze(-1) for _, share in nodes]
        mean = torch.stack([share * worth for share, worth in zip(shares, worths, strict=True)]).sum(0)
        scale = fits.state_weights[index] / temperature
        cotangent = torch.cat([share * (q - mean) * scale for share, q in zip(shares, worths, strict=True)])
        with torch.enable_grad():
            tiled = (here.repeat(len(nodes), 1), torch.cat([action[index] for action, _ in nodes]))
            q_sim = value_of(leaves, *tiled, index.repeat(len(nodes)))
        if q_sim.shape != cotangent.shape[:1]:
            raise ValueError(f"the action value gave {tuple(q_sim.shape)}, expected [{len(cotangent)}]")
        if not q_sim.requires_grad:
            raise ValueError("the in-sim action value does not depend differentiably on theta; check step and log_prob")
        for f, column in enumerate(cotangent.unbind(-1)):
            grads = torch.autograd.grad(
                q_sim,
                list(leaves.values()),
                column.to(q_sim.dtype),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total[f] += ravel(dict(zip(leaves, grads, strict=True))).double()
    if not bool(torch.isfinite(total).all()):
        raise ValueError("the gradient is not finite: shorten the in-sim rollouts, or start from a stable policy")
    return total
