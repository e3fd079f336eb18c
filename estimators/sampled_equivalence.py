"""MDP equivalence of simulators (see `equivalence.py`): r_hat by quadrature over the noise, given V*.

    r_hat(s, a) = sum_j w [r_world(s, a, e_j, s+_j) + gamma_world V*(s+_j)] - gamma_model sum_j w V*(s_hat+_j)

with D equally weighted standard normal nodes e_j (antithetic, unit covariance: exact for quadratic V* and linear
noise), s+_j the world's and s_hat+_j the model's next states, and V* = 0 after a terminal state. V* comes from the
caller: an exact solution, or a critic fitted on real data.

The conditions are checked along rollouts of the model, as far as samples can tell:

    support             V* is finite at every state the model visits and reaches from there
    finite expectation  the tail index of |V*(s+)|, by Hill's estimator over the largest hundredth, exceeds 1
    discount            gamma_model < 1, or every rollout ends in a terminal state
    transversality      gamma_model^t E|V*(s_t)| falls over the second half of the rollouts, to two standard errors
Reference: as in `equivalence.py`; B. Hill, Annals of Statistics 3 (1975) 1163 (the tail index).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.estimators.equivalence import Condition, demand
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout

Value = Callable[[Tensor], Tensor]
"""s `[N, n]` -> V*(s) `[N]` of the world"""


@dataclass(frozen=True)
class Simulator:
    """A model MDP at fixed parameters; one of the two sides of an equivalence. theta is shared by all environments."""

    mdp: ModelMDP
    theta: Params


@dataclass(frozen=True)
class SampledGap:
    """Bellman residual `delta(s, a) = Q*(s, a) - (r + gamma E V*)_model` at given state-action pairs."""

    residual: Tensor
    """`[N]`"""
    max: float
    rms: float
    bound: float
    """`max |delta| / (1 - gamma_model)`: bounds `|Q_hat* - Q*|` if delta is no larger elsewhere; inf at discount 1"""


def noise_grid(width: int, draws: int, generator: torch.Generator | None = None) -> Tensor:
    """`[draws, width]` antithetic standard normal nodes with mean 0 and covariance I exactly.

    Raises `ValueError` unless draws is even and at least 2 (width + 1).
    """
    if draws % 2 or draws < 2 * (width + 1):
        raise ValueError(f"draws must be even and at least {2 * (width + 1)} for {width} noise columns, got {draws}")
    device = generator.device if generator is not None else torch.device("cpu")
    half = torch.randn(draws // 2, width, generator=generator, dtype=torch.float64, device=device)
    factor = torch.linalg.cholesky(2 * half.T @ half / draws)
    half = torch.linalg.solve_triangular(factor, half.T, upper=False).T
    return torch.cat([half, -half])


def sampled_modified_reward(
    world: Simulator, model: Simulator, value: Value, *, draws: int = 256, generator: torch.Generator | None = None
) -> ModelMDP:
    """The model's MDP with the equivalent reward; its reward depends on (s, a) alone and is as smooth as V*.

    Each call costs `draws` steps of both simulators per state. Check the conditions with `sampled_conditions`.
    Raises `ValueError` for measured inputs (make them part of the state) or too few draws.
    """
    world_nodes, model_nodes = (_nodes(side, draws, generator) for side in (world, model))

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        at = replace(model, theta=theta)
        expected = _backup(world, value, world_nodes, state, action, with_reward=True)
        return expected - _backup(at, value, model_nodes, state, action, with_reward=False)

    return replace(model.mdp, reward=reward)


def sampled_equivalence_gap(
    world: Simulator,
    model: Simulator,
    value: Value,
    states: Tensor,
    actions: Tensor,
    *,
    draws: int = 256,
    generator: torch.Generator | None = None,
) -> SampledGap:
    """How far (model, its reward, its discount) is from `Q_hat* = Q*`, at states `[N, n]` and actions `[N, m]`."""
    sides = [
        _backup(side, value, _nodes(side, draws, generator), states, actions, with_reward=True)
        for side in (world, model)
    ]
    residual = sides[0] - sides[1]
    largest, gamma = float(residual.abs().max()), model.mdp.discount
    bound = largest / (1 - gamma) if gamma < 1 else float("inf")
    return SampledGap(residual, largest, float(residual.square().mean().sqrt()), bound)


def sampled_conditions(
    world: Simulator,
    model: Simulator,
    value: Value,
    policy: Policy,
    nu: Params,
    noise: Noise,
    *,
    draws: int = 10_000,
    generator: torch.Generator | None = None,
    strict: bool = True,
) -> tuple[Condition, ...]:
    """The conditions of the module docstring, along the model's rollouts of `policy` (the world's optimal one).

    `noise`: from `sample_noise`, at least 8 steps; `draws` next states at 4 visited pairs judge the expectations.
    Raises `EquivalenceError` naming each violated condition, unless `strict=False`; `ValueError` as above.
    """
    if noise.process.shape[1] < 8:
        raise ValueError(f"transversality needs rollouts of at least 8 steps, got {noise.process.shape[1]}")
    with torch.no_grad():
        run = rollout(model.mdp, policy, model.theta, nu, noise)
        visited = _values(model, value, run.states.flatten(0, 1)).reshape(run.states.shape[:2])
        conditions = [_support(run, visited), _discount(model.mdp, run)]
        if conditions[0].holds:  # without V* the other two cannot be judged
            conditions += _expectations(world, model, value, run, draws, generator)
            conditions.append(_transversality(model.mdp, run, visited))
    if strict:
        demand(conditions)
    return tuple(conditions)


def _nodes(side: Simulator, draws: int, generator: torch.Generator | None) -> Tensor:
    if side.mdp.exogenous_dim:
        raise ValueError(
            f"the simulator has {side.mdp.exogenous_dim} measured inputs, over which there is no expectation; "
            "make them part of the state"
        )
    width = side.mdp.noise_dims[1]
    return noise_grid(width, draws, generator) if width else torch.zeros(1, 0, dtype=torch.float64)


def _values(side: Simulator, value: Value, states: Tensor) -> Tensor:
    """V* `[N]`, 0 where the simulator has ended."""
    worth = value(states)
    if worth.shape != states.shape[:1]:
        raise ValueError(f"value(states) must be [{len(states)}], got {list(worth.shape)}")
    if side.mdp.terminal is None:
        return worth
    return torch.where(side.mdp.terminal(side.theta, states), torch.zeros_like(worth), worth)


def _backup(
    side: Simulator, value: Value, nodes: Tensor, state: Tensor, action: Tensor, *, with_reward: bool
) -> Tensor:
    """`E[r + gamma V*(s+)]`, `[N]`; without the reward `gamma E V*(s+)`."""
    count, draws = len(state), len(nodes)
    s, a = state.repeat_interleave(draws, 0), action.repeat_interleave(draws, 0)
    e = nodes.to(state).repeat(count, 1)
    following = side.mdp.step(side.theta, s, a, e)
    worth = side.mdp.discount * _values(side, value, following)
    if with_reward:
        worth = worth + side.mdp.reward(side.theta, s, a, e, following)
    return worth.reshape(count, draws).mean(1)


def _support(run: Rollout, visited: Tensor) -> Condition:
    wrong = ~torch.isfinite(visited)
    if not bool(wrong.any()):
        return Condition("support", True, f"V* is finite at all {visited.numel()} states visited")
    row, step = wrong.nonzero()[0].tolist()
    state = [round(x, 6) for x in run.states[row, step].tolist()]
    detail = f"V* is {float(visited[row, step])} at {state} (rollout {row}, step {step}): the model leaves the states"
    return Condition("support", False, f"{detail} on which V* is known ({int(wrong.sum())} of {wrong.numel()} visits)")


def _expectations(
    world: Simulator, model: Simulator, value: Value, run: Rollout, draws: int, generator: torch.Generator | None
) -> list[Condition]:
    """Of V* at the next states of both, at four pairs spread over the rollouts' steps until they end."""
    going = torch.ones_like(run.rewards, dtype=torch.bool) if run.mask is None else run.mask
    pairs = going.T.nonzero().tolist()  # (step, row), in time
    pairs = [pairs[round(k * (len(pairs) - 1) / 3)] for k in range(4)] if pairs else []
    conditions = []
    for name, side in (("world", world), ("model", model)):
        width, lowest, lost = side.mdp.noise_dims[1], float("inf"), 0
        for step, row in pairs:
            e = torch.randn(draws, width, generator=generator, dtype=torch.float64).to(run.states)
            s, a = (x[row, step].expand(draws, -1) for x in (run.states, run.actions))
            worth = _values(side, value, side.mdp.step(side.theta, s, a, e))
            finite = torch.isfinite(worth)
            lost += int((~finite).sum())
            lowest = min(lowest, tail_index(worth) if bool(finite.all()) else 0.0)
        if lost:
            known = "world value" if side is world else "support"
            detail = f"V* is not finite at {lost} of {4 * draws} next states in the {name}"
            conditions.append(Condition(known, False, detail))
        else:
            detail = f"the tail index of |V*(s+)| in the {name} is {lowest:.3g} at its lowest, needed: above 1"
            conditions.append(Condition("finite expectation", lowest > 1, detail))
    return conditions


def tail_index(values: Tensor) -> float:
    """Hill's estimate of the tail index of `|values - median|`, `values [N]`, N >= 200; infinite without a tail.

    Moments of an order above the index do not exist. Its standard error is the index over the root of N / 100.
    """
    if values.ndim != 1 or len(values) < 200:
        raise ValueError(f"values must be [N] with N >= 200, got {list(values.shape)}")
    kept = len(values) // 100
    largest = (values - values.median()).abs().topk(kept + 1).values
    if not float(largest[-1]) > 1e-12 * float(values.abs().max()):
        return float("inf")
    mean = float((largest[:-1] / largest[-1]).log().mean())
    return 1 / mean if mean > 0 else float("inf")


def _discount(mdp: ModelMDP, run: Rollout) -> Condition:
    if mdp.discount < 1:
        return Condition("discount", True, f"the model's discount {mdp.discount} is below 1")
    ended = run.mask is not None and not bool(run.mask[:, -1].any())
    detail = "every rollout ends" if ended else "rollouts go on without a terminal state"
    return Condition("discount", ended and mdp.discount == 1, f"the model's discount is {mdp.discount}; {detail}")


def _transversality(mdp: ModelMDP, run: Rollout, visited: Tensor) -> Condition:
    """The mean of `gamma^t |V*(s_t)|` over the last quarter of the steps against the quarter before."""
    horizon = run.actions.shape[1]
    power = mdp.discount ** torch.arange(horizon + 1, dtype=visited.dtype, device=visited.device)
    size, quarter = power * visited.abs(), horizon // 4
    late, early = size[:, -quarter:].mean(1), size[:, -2 * quarter : -quarter].mean(1)
    before, after = float(early.mean()), float(late.mean())
    if before == 0.0 and after == 0.0:
        return Condition("transversality", True, "V* is 0 on the second half of the model's rollouts")
    ratio = after / before if before > 0 else float("inf")
    # where V* settles the factor is the discount, and sampling noise may take it beyond 1
    sampled = len(late) > 1 and before > 0
    noise = 2 * float((late - ratio * early).std()) / len(late) ** 0.5 / before if sampled else 0.0
    rate, low = (max(factor, 0.0) ** (1 / quarter) for factor in (ratio, ratio - noise))
    detail = f"gamma_model^t E|V*(s_t)| changes by the factor {rate:.6g} a step along the model, needed: below 1"
    return Condition("transversality", low < 1, detail + (" to sampling error" if rate >= 1 > low else ""))
