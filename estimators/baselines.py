"""Advantages `A_t = sum_{k >= t} discount^k r_k - b_t` for gradients that sample decisions.

A baseline b_t leaves the mean of `sum_t A_t grad log pi(d_t | s_t)` unchanged when, given all that was decided before
d_t and all exogenous noise, it does not depend on d_t: `sum_d pi(d|s) grad log pi(d|s) = grad 1 = 0`. It may see

    nothing of this rollout         time_baseline      the mean of the other rollouts at t
    the state s_t                   state_baseline     least squares over the other rollouts
    s_t and all future noise        input_baseline     the same, with the demand, weather or wind to come
    s_t, through a learned value    critic_baseline    generalised advantage estimation

"Other rollouts" is exact: b_t of a rollout is its least-squares prediction from all rollouts but itself, in closed form
`y_i - b_i = (y_i - yhat_i) / (1 - h_i)` with the leverage h_i. The first three are therefore unbiased at any batch;
the fourth is for trace = 1 and a value that ends at 0, and trades bias for variance below that.
References: H. Mao et al., Variance reduction for reinforcement learning in input-driven environments, 2019 (input);
J. Schulman et al., High-dimensional continuous control using generalized advantage estimation, 2016, eq. 16 (critic);
W. Kool et al., Buy 4 REINFORCE samples, get a baseline for free, 2019 (leave-one-out).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.mdp import Noise
from sim2real.rollout import Rollout

Advantage = Callable[[Rollout, Noise, float], Tensor]
"""detached rollouts, their noise, discount -> A `[B, T]`, 0 where masked"""


def no_baseline(drawn: Rollout, noise: Noise, discount: float) -> Tensor:
    """`b_t = 0`: the discounted rewards to come, from t on."""
    return reward_to_go(drawn, discount)


def time_baseline(drawn: Rollout, noise: Noise, discount: float) -> Tensor:
    """b_t the mean of the other rollouts at t. Raises `ValueError` for a single rollout."""
    to_go = reward_to_go(drawn, discount)
    batch = len(to_go)
    if batch < 2:
        raise ValueError(f"the baseline needs at least two rollouts, got {batch}")
    return (to_go - (to_go.sum(0) - to_go) / (batch - 1)) * alive(drawn)


def state_baseline(features: Callable[[Tensor], Tensor] | None = None) -> Advantage:
    """b_t a least-squares function of s_t, fitted per t on the other rollouts; `features` None: `quadratic_states`.

    features: s `[B, n]` -> `[B, q]`. Raises `ValueError` when called with fewer than `2 q` rollouts.
    """
    chosen = quadratic_states if features is None else features

    def advantage(drawn: Rollout, noise: Noise, discount: float) -> Tensor:
        return _regressed(drawn, discount, lambda t: chosen(drawn.states[:, t]))

    return advantage


def input_baseline(features: Callable[[Tensor, Tensor], Tensor] | None = None) -> Advantage:
    """b_t a least-squares function of s_t and of the noise to come, fitted per t on the other rollouts.

    features: s `[B, n]`, future `[B, T - t, k]` -> `[B, q]`; None: `quadratic_states` of s, the next noise and the mean
    of the rest. `future` holds the process noise from t on and, one step later, the policy's (its own draw at t is the
    decision). Only for noise that is exogenous: a model that *draws a category* from e decides by it, too. Raises
    `ValueError` as `state_baseline` does.
    """
    chosen = _next_and_rest if features is None else features

    def advantage(drawn: Rollout, noise: Noise, discount: float) -> Tensor:
        after = torch.cat([noise.policy[:, 1:], torch.zeros_like(noise.policy[:, :1])], 1)
        inputs = torch.cat([noise.process, after], -1)
        return _regressed(drawn, discount, lambda t: chosen(drawn.states[:, t], inputs[:, t:]))

    return advantage


def critic_baseline(value: Callable[[Tensor], Tensor], *, trace: float = 1.0, bootstrap: bool = False) -> Advantage:
    """`A_t = discount^t sum_l (discount trace)^l delta_{t+l}`, `delta_t = r_t + discount V(s_{t+1}) - V(s_t)`.

    `value`: s `[N, n]` -> `[N]`, any critic (give the state a clock for a finite horizon). V is 0 after the last step,
    or the critic's with `bootstrap`. `trace` (lambda of the reference) 1 without bootstrap is unbiased, whatever the
    critic. Raises `ValueError` for a trace outside [0, 1] or values of another shape.
    """
    if not 0.0 <= trace <= 1.0:
        raise ValueError(f"trace must lie in [0, 1], got {trace}")

    def advantage(drawn: Rollout, noise: Noise, discount: float) -> Tensor:
        real = alive(drawn)
        with torch.no_grad():
            values = value(drawn.states.flatten(0, 1)).reshape(-1)
        if values.numel() != drawn.states.shape[0] * drawn.states.shape[1]:
            raise ValueError(f"value gave {values.numel()} numbers for {drawn.states.shape[:2].numel()} states")
        values = values.reshape(drawn.states.shape[:2]) * torch.cat([real, real[:, -1:]], 1)
        if not bootstrap:
            values = torch.cat([values[:, :-1], torch.zeros_like(values[:, :1])], 1)
        deltas = (drawn.rewards + discount * values[:, 1:] - values[:, :-1]) * real
        total, found = torch.zeros_like(deltas[:, 0]), []
        for delta in reversed(deltas.unbind(1)):
            total = delta + discount * trace * total
            found.append(total)
        return torch.stack(found[::-1], 1) * _discounts(drawn, discount) * real

    return advantage


def reward_to_go(drawn: Rollout, discount: float) -> Tensor:
    """`sum_{k >= t} discount^k r_k` `[B, T]`, discounted to the start, 0 where masked."""
    rewards = drawn.rewards * _discounts(drawn, discount)
    return rewards.flip(1).cumsum(1).flip(1) * alive(drawn)


def alive(drawn: Rollout) -> Tensor:
    """The mask as numbers `[B, T]`."""
    return torch.ones_like(drawn.rewards) if drawn.mask is None else drawn.mask.to(drawn.rewards.dtype)


def quadratic_states(state: Tensor) -> Tensor:
    """All monomials of degree <= 2, `[B, (n+1)(n+2)/2]`; for many columns pass fewer, as `square_states`."""
    rows, columns = torch.triu_indices(state.shape[-1], state.shape[-1], device=state.device)
    return torch.cat([torch.ones_like(state[:, :1]), state, state[:, rows] * state[:, columns]], -1)


def square_states(state: Tensor) -> Tensor:
    """`1, s_i, s_i^2`, `[B, 2 n + 1]`."""
    return torch.cat([torch.ones_like(state[:, :1]), state, state.square()], -1)


def _discounts(drawn: Rollout, discount: float) -> Tensor:
    steps = torch.arange(drawn.rewards.shape[1], dtype=drawn.rewards.dtype, device=drawn.rewards.device)
    return discount**steps


def _next_and_rest(state: Tensor, future: Tensor) -> Tensor:
    rest = future[:, 1:].mean(1) if future.shape[1] > 1 else future[:, 0, :0]
    return quadratic_states(torch.cat([state, future[:, 0], rest], -1))


def _regressed(drawn: Rollout, discount: float, features_at: Callable[[int], Tensor]) -> Tensor:
    to_go, real = reward_to_go(drawn, discount), alive(drawn)
    found = [
        _leave_one_out(features_at(t).to(to_go.dtype) * real[:, t : t + 1], to_go[:, t]) for t in range(to_go.shape[1])
    ]
    return torch.stack(found, 1) * real


def _leave_one_out(features: Tensor, y: Tensor) -> Tensor:
    """Residuals `[B]` of y, each from the least squares of all other rows of `features [B, q]`."""
    batch, width = features.shape
    if batch < 2 * width:
        raise ValueError(
            f"the baseline fits {width} features to {batch} rollouts; take at least {2 * width} rollouts or pass fewer "
            "features, such as square_states"
        )
    scaled = features / features.square().mean(0).sqrt().clamp_min(torch.finfo(features.dtype).tiny)
    vectors, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    basis = vectors * (values > 1e-9 * values[0])
    leverage = basis.square().sum(-1)
    residual = (y - basis @ (basis.T @ y)) / (1 - leverage).clamp_min(torch.finfo(y.dtype).eps)
    # a row that its own feature column alone explains has no prediction from the others: their mean instead
    plain = y - (y.sum() - y) / (batch - 1)
    return torch.where(leverage < 0.99, residual, plain)
