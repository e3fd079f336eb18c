"""Maps `g(theta, rows, u)` for inversion: T steps of a model under a lower level that is given the unseen input u.

    x_0 = rows["state"],   a_t = lower(theta, rows, u, x_t, t),   x_{t+1} = step(theta, x_t, clip(a_t), e_t)

A lower level is any torch function of that form: below, linear feedback on logged or recomputed gains, PID, and the
operational-space law

    F = kp_p (p_goal - p) - kd_p v,    m = kp_r e - kd_r omega,    kd = 2 sqrt(kp) zeta,
    torque = J_p' Lambda_p F + J_r' Lambda_r m + bias,             e = sum_i r_i x r_goal_i / 2

with r_i the axes (columns) of the rotations of hand and goal. e is unique for goals less than 90 degrees away only.
Reference: Khatib, A unified approach for motion and force control of robot manipulators, 1987; Schmidt et al., Offline
hierarchical reinforcement learning via inverse optimization, 2024, appendix B.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.solvers.inversion_problem import Predict

Step = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
"""theta, s `[N, n]`, a `[N, m]`, e `[N, k]` -> s', as `ModelMDP.step`"""
Lower = Callable[[Params, Params, Tensor, Tensor, int], Tensor]
"""theta, rows, u `[N, p]`, state `[N, n]`, step t -> action `[N, m]`"""


def transition_map(
    step: Step,
    lower: Lower,
    horizon: int,
    *,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
    outcome: Literal["state", "states", "actions"] = "state",
) -> Predict:
    """The state after `horizon` steps `[N, n]`, all of them `[N, T n]`, or the actions `[N, T m]`.

    Actions are clipped to [low, high]. rows: "state" `[N, n]`; "noise" `[N, T, k]` (measured inputs) if the step takes
    any; and whatever `lower` reads.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")

    def predict(theta: Params, rows: Params, u: Tensor) -> Tensor:
        state = rows["state"]
        noise = rows["noise"] if "noise" in rows else state.new_zeros(len(state), horizon, 0)
        states, actions = [], []
        for t in range(horizon):
            action = lower(theta, rows, u, state, t)
            limits = (torch.as_tensor(b, dtype=action.dtype, device=action.device) for b in (low, high))
            actions.append(action.clamp(*limits))
            if outcome != "actions" or t + 1 < horizon:
                state = step(theta, state, actions[-1], noise[:, t])
                states.append(state)
        chosen = {"state": states[-1:], "states": states, "actions": actions}[outcome]
        return torch.cat(chosen, -1)

    return predict


def feedback_lower(columns: slice = slice(None)) -> Lower:
    """`a = K_t (x - u)` on some columns of the state, with rows["gain"] `[N, T, m, n]`."""

    def lower(theta: Params, rows: Params, u: Tensor, state: Tensor, t: int) -> Tensor:
        return (rows["gain"][:, t] @ (state[:, columns] - u).unsqueeze(-1)).squeeze(-1)

    return lower


def pid_lower(position: slice, velocity: slice, *, integral: slice | None = None) -> Lower:
    """`a = kp (u - x) - kd w + ki z` with theta["kp"], ["kd"] and, with `integral`, ["ki"]; u the goal position."""

    def lower(theta: Params, rows: Params, u: Tensor, state: Tensor, t: int) -> Tensor:
        action = theta["kp"] * (u - state[:, position]) - theta["kd"] * state[:, velocity]
        return action if integral is None else action + theta["ki"] * state[:, integral]

    return lower


def operational_space_torques(*, limit: Tensor | float = math.inf) -> Predict:
    """The torques `[N, T n]` of T runs of the law towards one pose u `[N, 6]`: displacement in m, rotation vector.

    Both are relative to the first run. rows, of each run: "position_map" `J_p' Lambda_p` and "rotation_map"
    `J_r' Lambda_r` `[N, T, n, 3]`, "position" `[N, T, 3]`, "velocity" `[N, T, 6]`, "axes" `[N, T, 3, 3]`, "bias"
    `[N, T, n]`. theta: "kp" `[6]` and the damping ratio "zeta" `[6]`. Torques are clipped at +- limit.
    """

    def predict(theta: Params, rows: Params, u: Tensor) -> Tensor:
        kp, kd = theta["kp"], 2 * theta["kp"].sqrt() * theta["zeta"]
        goal = rows["position"][:, :1] + u[:, None, :3]
        axes = rotation(u[:, 3:]) @ rows["axes"][:, 0]
        error = 0.5 * torch.linalg.cross(rows["axes"], axes.unsqueeze(1), dim=-2).sum(-1)
        force = kp[:3] * (goal - rows["position"]) - kd[:3] * rows["velocity"][..., :3]
        turn = kp[3:] * error - kd[3:] * rows["velocity"][..., 3:]
        torque = rows["position_map"] @ force.unsqueeze(-1) + rows["rotation_map"] @ turn.unsqueeze(-1)
        bound = torch.as_tensor(limit, dtype=u.dtype, device=u.device)
        return (torque.squeeze(-1) + rows["bias"]).clamp(-bound, bound).flatten(1)

    return predict


def rotation(vector: Tensor) -> Tensor:
    """Rotation matrix `[..., 3, 3]` of a rotation vector `[..., 3]` in rad (Rodrigues), smooth at 0."""
    square = vector.square().sum(-1)
    small = square < 1e-8
    angle = torch.where(small, 1.0, square).sqrt()
    first = torch.where(small, 1 - square / 6, torch.sin(angle) / angle)[..., None, None]
    second = torch.where(small, 0.5 - square / 24, (1 - torch.cos(angle)) / angle.square())[..., None, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vector.shape, 3)
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + first * cross + second * (cross @ cross)
