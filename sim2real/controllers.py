"""Lower-level controllers as policies: the gains are nu, so they are tuned and differentiated like any policy.

    lqr                    a = a_goal - K (s - s_goal)
    PID                    a = feedforward + kp err + ki integral + kd rate,      integral' = err
    operational space      a = J' F + bias,  F = (J M^-1 J')^-1 (kp (goal - x) - kd J w - drift)
    gain schedule          a = a_ref(t) - K(t) (s - s_ref(t)),   linear between the knots of a plan or a logged run

A policy is a function of the state alone, so what it remembers lives in the state: `with_clock` appends the time to a
model's state, `with_integral` the integral of an error. The appended columns come last, and a real run gets the same
columns from `append_clock` and `append_integral`, so that logged and simulated states match.
Reference: Khatib, A unified approach for motion and force control of robot manipulators: the operational space
formulation, IEEE Journal on Robotics and Automation 3(1), 1987, 43-53.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.rollout import Rollout

StateMap = Callable[[Tensor], Tensor]


def lqr_policy(goal_state: Tensor, goal_action: Tensor | float = 0.0) -> Policy:
    """`a = goal_action [m] - K (s - goal_state [n])` with nu = {"gain": K [m, n]}, over all columns of s."""
    return deterministic_policy(lambda nu, state: goal_action - _apply(nu["gain"], state - goal_state))


def pid_policy(error: StateMap, rate: StateMap, *, feedforward: StateMap | None = None) -> Policy:
    """PID of m loops with nu = {"kp": [m], "kd": [m]} and, optionally, "ki" [m].

    `error(s)` and `rate(s)` `[B, m]` are the error (goal minus measurement) and its time derivative. With "ki" the last
    m columns of s must be the integral that `with_integral` (or `append_integral`) keeps.
    """

    def mean(nu: Params, state: Tensor) -> Tensor:
        present = error(state)
        action = nu["kp"] * present + nu["kd"] * rate(state)
        if "ki" in nu:
            action = action + nu["ki"] * state[..., -present.shape[-1] :]
        return action if feedforward is None else feedforward(state) + action

    return deterministic_policy(mean)


def operational_space_policy(
    position: StateMap,
    jacobian: StateMap,
    mass_matrix: StateMap,
    bias: StateMap,
    *,
    drift: StateMap | None = None,
) -> Policy:
    """Task-space PD on an arm with state (q, w), each `[n]`, and nu = {"goal": [r], "kp": [r], "kd": [r]}.

    All maps take the state: task position x `[B, r]`, jacobian J `[B, r, n]`, joint inertia M `[B, n, n]`, the torque
    `bias` `[B, n]` (Coriolis, gravity, friction) that is compensated, and the task acceleration `drift` = dJ/dt w
    `[B, r]` (0 when None). With exact maps, x'' = kp (goal - x) - kd x' as long as J has full row rank.
    """

    def mean(nu: Params, state: Tensor) -> Tensor:
        J = jacobian(state)
        velocity = state[..., J.shape[-1] : 2 * J.shape[-1]]
        wanted = nu["kp"] * (nu["goal"] - position(state)) - nu["kd"] * _apply(J, velocity)
        if drift is not None:
            wanted = wanted - drift(state)
        # inv, not linalg.solve, whose derivatives are wrong in nested forward mode and in vmap(jacfwd): pytorch 192540
        mobility = J @ torch.linalg.inv(mass_matrix(state)) @ J.mT
        force = torch.linalg.inv(mobility) @ wanted.unsqueeze(-1)
        return (J.mT @ force).squeeze(-1) + bias(state)

    return deterministic_policy(mean)


def gain_schedule_policy(times: Tensor) -> Policy:
    """Time-varying feedback along a plan; the last column of s is the time in s (`with_clock`, `append_clock`).

    `times [R]` (s, increasing) are the knots; nu = {"gain": [R, m, n], "state": [R, n], "action": [R, m]} holds gain,
    reference state and feed-forward at each of them. Before the first and after the last knot their values are held.
    Raises `ValueError` when the knots do not increase or are fewer than two.
    """
    if times.ndim != 1 or times.shape[0] < 2 or not bool((times.diff() > 0).all()):
        raise ValueError(f"times must be at least two increasing knots [R] in s, got shape {list(times.shape)}")

    def mean(nu: Params, state: Tensor) -> Tensor:
        state, time = state[..., :-1], state[..., -1].clamp(float(times[0]), float(times[-1]))
        after = torch.searchsorted(times, time.detach().contiguous(), right=True).clamp(1, times.shape[0] - 1)
        weight = (time - times[after - 1]) / (times[after] - times[after - 1])

        def at(knots: Tensor) -> Tensor:
            fraction = weight.reshape(weight.shape + (1,) * (knots.ndim - 1))
            return torch.lerp(knots[after - 1], knots[after], fraction)

        return at(nu["action"]) - _apply(at(nu["gain"]), state - at(nu["state"]))

    return deterministic_policy(mean)


def exploring_policy(policy: Policy, std: Tensor) -> Policy:
    """A deterministic policy with Gaussian noise of standard deviation `std [m]` (action units) added.

    Raises `ValueError` when the policy is stochastic already or a standard deviation is not positive.
    """
    if policy.noise_dim:
        raise ValueError(
            f"the policy already draws {policy.noise_dim} noise columns; exploration noise would be a second"
        )
    if std.ndim != 1 or not bool((std > 0).all()):
        raise ValueError(f"std must be [m] and positive (action units), got {std.tolist()}")

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        z = (action - policy.act(nu, state, state[..., :0])) / std
        return (-0.5 * z * z - torch.log(std) - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    return Policy(lambda nu, state, e: policy.act(nu, state, e[..., :0]) + std * e, log_prob, std.shape[0])


def with_clock(mdp: ModelMDP) -> ModelMDP:
    """The model with the time since the start (s) as the last column of its state; everything else unchanged."""
    return _append(mdp, 1, lambda state: torch.full_like(state[..., :1], mdp.dt), ("time",), {"time": "s"})


def with_integral(mdp: ModelMDP, error: StateMap, width: int, *, unit: str = "") -> ModelMDP:
    """The model with `integral_{t+1} = integral_t + dt error(s_t)` `[width]`, from 0, as last columns of its state.

    `error(s) [B, width]` sees the model's own state; `unit` is the integral's.
    """
    names = tuple(f"integral{i + 1}" for i in range(width))
    return _append(mdp, width, lambda state: mdp.dt * error(state), names, dict.fromkeys(names, unit))


def append_clock(run: Rollout, dt: float) -> Rollout:
    """A recorded run with the time since its start (s) as the last column of the states, as in `with_clock`."""
    time = dt * torch.arange(run.states.shape[1], dtype=run.states.dtype, device=run.states.device)
    column = time.expand(run.states.shape[0], -1).unsqueeze(-1)
    return replace(run, states=torch.cat([run.states, column], -1))


def append_integral(run: Rollout, error: StateMap, dt: float) -> Rollout:
    """A recorded run with the integral of `error(s)` as last columns of the states, as in `with_integral`."""
    increments = dt * error(run.states[:, :-1])
    total = torch.cat([torch.zeros_like(increments[:, :1]), increments.cumsum(1)], 1)
    return replace(run, states=torch.cat([run.states, total], -1))


def _append(mdp: ModelMDP, width: int, increment: StateMap, names: tuple[str, ...], units: dict[str, str]) -> ModelMDP:
    """The model with `width` more state columns z, `z_0 = 0`, `z' = z + increment(s)`."""
    terminal, observe, log_prob = mdp.terminal, mdp.observe, mdp.log_prob

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        state = mdp.initial_state(theta, e0)
        return torch.cat([state, state.new_zeros(*state.shape[:-1], width)], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        inner, memory = state[..., :-width], state[..., -width:]
        return torch.cat([mdp.step(theta, inner, action, e), memory + increment(inner)], -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return mdp.reward(theta, state[..., :-width], action, e, following[..., :-width])

    def inner_observe(theta: Params, state: Tensor) -> Tensor:
        return state[..., :-width] if observe is None else observe(theta, state[..., :-width])

    return replace(
        mdp,
        initial_state=initial_state,
        step=step,
        reward=reward,
        terminal=None if terminal is None else lambda theta, state: terminal(theta, state[..., :-width]),
        observe=inner_observe,
        log_prob=None
        if log_prob is None
        else lambda theta, s, a, following: log_prob(theta, s[..., :-width], a, following[..., :-width]),
        open_loop=None,
        names=mdp.names | {"state": (*mdp.names.get("state", ()), *names)},
        units=mdp.units | units,
    )


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
