"""Entropy-regularised returns and action values of a policy in the simulator, by rollouts.

    J_soft(theta, nu) = E sum_t gamma^t (r_t - lambda log pi(a_t | s_t)),
    Q(s, a) = E[ r_0 + sum_{t >= 1} gamma^t (r_t - lambda log pi(a_t | s_t)) | s_0 = s, a_0 = a ],

gamma the model's discount, lambda the temperature. The maximiser of J_soft over all policies is the soft optimum
pi = exp((Q - V) / lambda), V = E_a[Q - lambda log pi]. There d Q / d theta is taken with pi held fixed, because V is
stationary in pi (envelope theorem). `soft_action_value` gives Q with that derivative, in one of three ways:

    pathwise   through the states and the reparameterised actions of the rollout,
    mixed      through the states; actions without a derivative by sum_t (G_t - b_t) log pi(a_t | s_t(theta)),
    score      by sum_t (G_t - b_t) log rho_theta(s_{t+1} | s_t, a_t), for black boxes that know their density.

With V known (`soft_value`; for pi = softmax(q / lambda) it is lambda log sum exp(q / lambda)) the chain is cut at every
step, d Q = E sum_t gamma^t d(r_t + gamma V(s_{t+1})) at fixed s_t and a_t, which needs no derivative of any action, and
the score meets r_t + gamma V(s_{t+1}) - Q(s_t, a_t), with Q = V + lambda log pi, in place of the return to go.
References: T. Haarnoja, H. Tang, P. Abbeel and S. Levine, Reinforcement Learning with Deep Energy-Based Policies, 2017
(theorem 1); J. Schulman et al., Gradient Estimation Using Stochastic Computation Graphs, 2015 (mixed).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import action_nodes
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.solve_report import UnconvergedWarning

StateValue = Callable[[Params, Tensor], Tensor]
"""nu, s `[N, n]` -> soft value V `[N]`, differentiable in s where the model is differentiable"""
Method = Literal["auto", "pathwise", "mixed", "score"]


def soft_return(
    mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, noise: Noise, *, temperature: float
) -> Tensor:
    """J_soft, a scalar: what in-sim training of a soft policy maximises; give it to `policy_optimum`.

    Differentiable in theta and nu for policies whose actions are (`gaussian_policy`), temperature in reward units. The
    gradient in nu of a hybrid policy lacks what its index decides: train that by scores.
    Raises `ValueError` for a negative temperature, a policy without a density, or a gradient in nu of discrete actions.
    """
    check_temperature(temperature, allow_zero=True)
    asked = torch.is_grad_enabled() and any(value.requires_grad for value in nu.values())
    state = mdp.initial_state(theta, noise.initial)
    alive, total = _alive(mdp, theta, state), state.new_zeros(len(state))
    for t, (e, acting) in enumerate(zip(noise.process.unbind(1), noise.policy.unbind(1), strict=True)):
        action = policy.act(nu, state, acting)
        if asked and not action.requires_grad:
            raise ValueError(
                "the policy's actions have no derivative in nu, so the soft return would give that of the entropy "
                "alone: train it another way, and pass that to tune as optimum=(theta, nu0 -> nu)"
            )
        following = _held(alive, mdp.step(theta, state, action, e), state)
        reward = mdp.reward(theta, state, action, e, following)
        bonus = temperature * policy.log_prob(nu, state, action)
        total = total + mdp.discount**t * alive * (reward - bonus)
        state, alive = following, alive * _alive(mdp, theta, following)
    return total.mean()


def soft_action_value(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    states: Tensor,
    actions: Tensor,
    *,
    temperature: float,
    soft_value: StateValue | None = None,
    method: Method = "auto",
    rows: Tensor | None = None,
) -> Tensor:
    """Q `[N]` from states `[N, n]` and actions `[N, m]`, one rollout each, with its derivative in theta alone.

    Rollout i uses row `rows[i]` of `noise` (None: i mod B; `initial` is not used), so that actions compared in one
    state can share their noise. Its T steps are the length of the rollout: what comes later is dropped. "auto" is
    "pathwise" for a differentiable model (derivative_order >= 1) whose policy has smooth actions or whose `soft_value`
    is known, "mixed" for other policies, "score" for a black box.
    Raises `ValueError` for a temperature that is not positive, a model that lacks what `method` needs, or rows that do
    not match.
    """
    check_temperature(temperature)
    if states.ndim != 2 or actions.ndim != 2 or len(states) != len(actions):
        raise ValueError(
            f"states must be [N, n] and actions [N, m], got {tuple(states.shape)} and {tuple(actions.shape)}"
        )
    chosen = _choose(mdp, policy, nu, states, noise, method, known=soft_value is not None)
    fixed = {key: value.detach() for key, value in nu.items()}
    if rows is None:
        rows = torch.arange(len(states), device=states.device) % len(noise.process)
    problem = _Problem(mdp, policy, fixed, noise, rows, temperature, soft_value)
    if chosen == "score" and mdp.log_prob is not None:
        return _score(problem, mdp.log_prob, theta, states, actions)
    if soft_value is not None:
        return _by_steps(problem, soft_value, theta, states, actions)
    return _through_states(problem, theta, states, actions, smooth=chosen == "pathwise")


def _choose(
    mdp: ModelMDP, policy: Policy, nu: Params, states: Tensor, noise: Noise, method: Method, *, known: bool
) -> Method:
    """What "auto" of `soft_action_value` means here; raises `ValueError` for a method the model cannot give."""
    if method not in ("auto", "pathwise", "mixed", "score"):
        raise ValueError(f"method must be 'auto', 'pathwise', 'mixed' or 'score', got {method!r}")
    if method == "auto":
        smooth = mdp.derivative_order > 0 and (known or smooth_actions(policy, nu, states[:1], noise.policy[:1, 0]))
        method = "score" if mdp.derivative_order == 0 else ("pathwise" if smooth else "mixed")
    if method == "score" and mdp.log_prob is None:
        raise ValueError("the score needs the model's log_prob, which it lacks; give it a density or a derivative")
    if method != "score" and mdp.derivative_order == 0:
        raise ValueError(f"method {method!r} needs a differentiable model, this one has derivative_order 0")
    return method


def smooth_actions(policy: Policy, nu: Params, state: Tensor, noise: Tensor) -> bool:
    """Whether every action column moves smoothly with the policy's noise: False for discrete and hybrid actions."""
    e = noise.detach().clone().requires_grad_()
    with torch.enable_grad():
        action = policy.act({key: value.detach() for key, value in nu.items()}, state.detach(), e)
        if not action.requires_grad:
            return False
        columns = [torch.autograd.grad(column.sum(), e, retain_graph=True)[0] for column in action.unbind(-1)]
    return all(bool(column.any()) for column in columns)


def soft_consistency(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    states: Tensor,
    *,
    temperature: float,
    actions: Tensor | None = None,
    method: Method = "auto",
) -> tuple[Tensor, Tensor]:
    """How far the policy is from soft-optimal in the model, in nats: `E_s Var_a[Q - lambda log pi] / (2 lambda^2)`.

    With its standard error. Zero exactly where pi = exp((Q - V) / lambda); to second order it is the
    divergence KL(pi || exp(Q / lambda) / Z). Two independent halves of `noise` (B >= 4) are multiplied, so that the
    noise of the rollouts adds no bias; near zero the figure may come out negative. `actions [A, m]` lists a finite set.
    States that are terminal in the model do not count: what the policy does there is worth nothing.
    Raises `ValueError` for noise of fewer rows, where all states are terminal, and as `soft_action_value` does.
    """
    check_temperature(temperature)
    half = len(noise.process) // 2
    if half < 2:
        raise ValueError(f"two pairs of independent rollouts are needed: pass noise of at least 4 rows, got {2 * half}")
    states = states[_alive(mdp, theta, states).bool()]
    if not len(states):
        raise ValueError("all states are terminal in the model: there is no policy to judge")
    options: dict[str, Any] = {"temperature": temperature, "method": method}
    with torch.no_grad():
        nodes = action_nodes(policy, nu, states, actions)
        shares = torch.stack([share for _, share in nodes])
        every = torch.cat([action for action, _ in nodes])
        tiled = states.repeat(len(nodes), 1)
        entropy = temperature * policy.log_prob(nu, tiled, every).reshape(shares.shape)
        own = torch.arange(len(states), device=states.device).repeat(len(nodes)) % half
        parts = []
        for rows in (own, own + half):
            q = soft_action_value(mdp, policy, theta, nu, noise, tiled, every, rows=rows, **options)
            excess = q.reshape(shares.shape) - entropy
            parts.append(excess - (shares * excess).sum(0))
    each = (shares * parts[0] * parts[1]).sum(0) / (2 * temperature**2)
    mean = each.mean()
    # states that share their noise err together
    together = torch.zeros_like(each[:1]).repeat(half).index_add(0, own[: len(each)], each - mean)
    count = min(half, len(each))
    stderr = (together.square().sum() * count / max(count - 1, 1)).sqrt() / len(each)
    return mean, stderr


def consistency_info(
    mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, noise: Noise | None, states: Tensor, **options: Any
) -> dict[str, Tensor]:
    """`soft_consistency` as the entries "consistency" and "consistency_stderr"; none without four rows of noise."""
    if noise is None or len(noise.process) < 4 or not bool(_alive(mdp, theta, states).any()):
        return {}
    measured = soft_consistency(mdp, policy, theta, nu, noise, states, **options)
    return dict(zip(("consistency", "consistency_stderr"), measured, strict=True))


def inconsistency(info: dict[str, Tensor], tol: float) -> str:
    """Why "consistency" with its "consistency_stderr" says that the policy is no soft optimum; empty if it does not."""
    gap, stderr = (float(info.get(key, 0.0)) for key in ("consistency", "consistency_stderr"))
    if gap - 2 * stderr <= tol:
        return ""
    return f"the policy is {gap:.2g} nats from soft-optimal in the model, allowed {tol:g}: train it further"


def check_temperature(temperature: float, *, allow_zero: bool = False) -> None:
    """Raise `ValueError` unless the temperature is positive and finite (or zero, where that is allowed)."""
    if not (0 < temperature < float("inf") or (allow_zero and temperature == 0)):
        raise ValueError(f"temperature must be positive and finite (reward units), got {temperature}")


@dataclass(frozen=True)
class _Problem:
    """What all rollouts share; `rows [N]` says which rows of the noise drawn a state uses."""

    mdp: ModelMDP
    policy: Policy
    nu: Params
    noise: Noise
    rows: Tensor
    temperature: float
    soft_value: StateValue | None


def _steps(p: _Problem) -> Iterator[tuple[float, Tensor, Tensor]]:
    """gamma^t, the model's noise `[N, k]` and the policy's `[N, d]` of every step."""
    steps = zip(p.noise.process.unbind(1), p.noise.policy.unbind(1), strict=True)
    for t, (e, acting) in enumerate(steps):
        yield p.mdp.discount**t, e[p.rows], acting[p.rows]


def _alive(mdp: ModelMDP, theta: Params, state: Tensor) -> Tensor:
    ones = torch.ones_like(state[:, 0])
    return ones if mdp.terminal is None else ones * ~mdp.terminal(theta, state)


def _held(alive: Tensor, following: Tensor, state: Tensor) -> Tensor:
    """The successor, or the terminal state itself: what a model does beyond its end may not be finite."""
    return torch.where(alive.bool().unsqueeze(-1), following, state)


def _warn_of_ends(total: Tensor, begun: Tensor, alive: Tensor) -> None:
    ended = (begun - alive).sum()
    if total.requires_grad and bool(ended > 0):
        message = (
            f"{int(ended)} of {len(alive)} in-sim rollouts end early, and derivatives along them miss how theta moves "
            "the end: method='score' does not, where the model has a log_prob"
        )
        warnings.warn(message, UnconvergedWarning, stacklevel=4)


def _through_states(p: _Problem, theta: Params, state: Tensor, action: Tensor, *, smooth: bool) -> Tensor:
    """Pathwise and mixed: the graph runs through all states, and through the actions only where they are smooth."""
    begun = alive = _alive(p.mdp, theta, state)
    rewards: list[Tensor] = []
    scores: list[Tensor] = []
    for weight, e, acting in _steps(p):
        bonus = torch.zeros_like(alive)
        if rewards:
            action = p.policy.act(p.nu, state, acting)
            action = action if smooth else action.detach()
            log_pi = p.policy.log_prob(p.nu, state, action)
            scores.append(alive * log_pi)
            bonus = -p.temperature * log_pi
        following = _held(alive, p.mdp.step(theta, state, action, e), state)
        reward = p.mdp.reward(theta, state, action, e, following)
        rewards.append(weight * alive * (reward + bonus))
        state, alive = following, alive * _alive(p.mdp, theta, following)
    total = torch.stack(rewards).sum(0)
    _warn_of_ends(total, begun, alive)
    if smooth or not scores:
        return total
    to_go = _centred_to_go(torch.stack(rewards).detach(), p.rows)[1:]
    return total + _derivative_only((to_go * torch.stack(scores)).sum(0))


def _by_steps(p: _Problem, value: StateValue, theta: Params, state: Tensor, action: Tensor) -> Tensor:
    """With V known: `d(r_t + gamma V(s_{t+1}))` at fixed s_t, a_t; the value is the one-step target of t = 0."""
    begun = alive = _alive(p.mdp, theta, state)
    targets: list[Tensor] = []
    for weight, e, acting in _steps(p):
        state = state.detach()
        if targets:
            action = p.policy.act(p.nu, state, acting).detach()
        following = _held(alive, p.mdp.step(theta, state, action, e), state)
        going_on = alive * _alive(p.mdp, theta, following)
        reward = p.mdp.reward(theta, state, action, e, following)
        targets.append(weight * (alive * reward + p.mdp.discount * going_on * value(p.nu, following)))
        state, alive = following, going_on
    total = torch.stack(targets).sum(0)
    _warn_of_ends(total, begun, alive)
    return targets[0].detach() + _derivative_only(total)


def _score(
    p: _Problem,
    density: Callable[[Params, Tensor, Tensor, Tensor], Tensor],
    theta: Params,
    state: Tensor,
    action: Tensor,
) -> Tensor:
    """Densities only: log rho times the centred return to go, or times the temporal difference where V is known."""
    alive = _alive(p.mdp, theta, state)
    frozen = {key: item.detach() for key, item in theta.items()}
    rewards: list[Tensor] = []
    scores: list[Tensor] = []
    surprises: list[Tensor] = []
    for weight, e, acting in _steps(p):
        with torch.no_grad():
            if rewards:
                action = p.policy.act(p.nu, state, acting)
            bonus = -p.temperature * p.policy.log_prob(p.nu, state, action)
            following = _held(alive, p.mdp.step(frozen, state, action, e), state)
            going_on = alive * _alive(p.mdp, frozen, following)
        reward = p.mdp.reward(theta, state, action, e, following)
        scores.append(alive * density(theta, state, action, following))
        if p.soft_value is not None:
            target = reward.detach() + p.mdp.discount * going_on * p.soft_value(p.nu, following)
            surprises.append(weight * (target - p.soft_value(p.nu, state) + bonus))
        rewards.append(weight * alive * (reward + bonus if rewards else reward))
        state, alive = following, going_on
    total = torch.stack(rewards).sum(0)
    weights = torch.stack(surprises) if surprises else _centred_to_go(torch.stack(rewards).detach(), p.rows)
    return total + _derivative_only((weights.detach() * torch.stack(scores)).sum(0))


def _derivative_only(x: Tensor) -> Tensor:
    return x - x.detach()


def _centred_to_go(rewards: Tensor, rows: Tensor) -> Tensor:
    """Returns to go `[T, N]` minus their mean over the rollouts of other noise rows: the mean of the score stays."""
    to_go = rewards.flip(0).cumsum(0).flip(0)
    _, group = torch.unique(rows, return_inverse=True)
    size = torch.bincount(group)
    if len(size) < 2:
        return to_go
    own = to_go.new_zeros(len(to_go), len(size)).index_add(1, group, to_go)
    others = (to_go.sum(1, keepdim=True) - own) / (len(rows) - size)
    return to_go - others[:, group]
