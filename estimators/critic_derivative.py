"""How the critic of a policy moves with the simulator's parameters, at a fixed policy.

With `A W = sum_i c_i phi_i r_i` the critic of `model_critic.py`, `G = d_theta Q` solves the same equation with the
reward replaced by `y_i = d_theta` of

    score:     r(theta, s, a, e, s') + D_i log rho(theta, s, a, s'),    D_i = r_i + discount V(s'_i) - Q(s_i, a_i),
    pathwise:  r(theta, s, a, e, f) + discount grad V(s'_i)^T f,    f = step(theta, s, a, e),

V(s) = E_{a ~ pi} Q(s, a), and D_i held: it is the part of reward and value that chance decides, so `E[D grad log rho]`
is the derivative of their mean. dW/dtheta is never formed: a cotangent g of W costs the transposed solve
`A^T lambda = g` and one backward pass through `sum_i c_i (phi_i^T lambda) y_i`. The score form needs no derivative of
the simulator, only of its log density.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sim2real.estimators.model_critic import ROWS, ModelCritic, log_density
from sim2real.mdp import ModelMDP
from sim2real.params import Params, axpy, dot

Rows = slice | Tensor

_DIFFERENCE_STEP = 6e-6  # cube root of the float64 rounding


def critic_vjp(critic: ModelCritic, mdp: ModelMDP, theta: Params, cotangent: Tensor) -> Params:
    """`(dW/dtheta)^T cotangent` of a cotangent `[q]`, at fixed policy."""
    adjoint = torch.linalg.inv(critic.system).mT @ cotangent
    total = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in theta.items()}
    for rows in _blocks(critic):
        leaves = {key: value.detach().double().requires_grad_() for key, value in theta.items()}
        with torch.enable_grad():
            worth = _targets(critic, mdp, leaves, rows) @ (_weighted(critic, rows) @ adjoint)
        if worth.requires_grad:
            parts = torch.autograd.grad(worth, list(leaves.values()), allow_unused=True, materialize_grads=True)
            total = {key: total[key] + part for key, part in zip(leaves, parts, strict=True)}
    return total


def critic_jvp(critic: ModelCritic, mdp: ModelMDP, theta: Params, tangent: Params) -> Tensor:
    """`(dW/dtheta) tangent` `[q]`, at fixed policy; central differences where the step's derivative is first order."""
    theta64 = {key: value.detach().double() for key, value in theta.items()}
    tangent64 = {key: value.detach().double() for key, value in tangent.items()}
    derivative = _directional if critic.derivative == "score" or mdp.derivative_order == 2 else _difference
    total = torch.zeros_like(critic.weights)
    for rows in _blocks(critic):
        slope = derivative(partial(_targets, critic, mdp, rows=rows), theta64, tangent64)
        total = total + _weighted(critic, rows).mT @ slope
    return torch.linalg.inv(critic.system) @ total


def _blocks(critic: ModelCritic) -> list[Rows]:
    """The transitions in the fit, in blocks."""
    group = critic.data.group
    if critic.left_out is None:
        return [slice(start, start + ROWS) for start in range(0, len(group), ROWS)]
    return list((group != critic.left_out).nonzero().flatten().split(ROWS))


def _weighted(critic: ModelCritic, rows: Rows) -> Tensor:
    return critic.data.weights[rows].unsqueeze(-1) * critic.data.phi[rows]


def _targets(critic: ModelCritic, mdp: ModelMDP, theta: Params, rows: Rows) -> Tensor:
    """Whose derivative in theta is y, per transition `[M]`."""
    data, price = critic.data.transitions, critic.price[rows]
    s, a, e, after = data.states[rows], data.actions[rows], critic.data.noise[rows], data.next_states[rows]
    if critic.derivative == "score":
        return mdp.reward(theta, s, a, e, after) + price * log_density(mdp)(theta, s, a, after)
    moved = mdp.step(theta, s, a, e)
    return mdp.reward(theta, s, a, e, moved) + (price * moved).sum(-1)


def _directional(targets: Callable[[Params], Tensor], theta: Params, tangent: Params) -> Tensor:
    """Derivative of `targets` along `tangent`, by two backward passes (exact; no forward mode asked of the model)."""
    leaves = {key: value.detach().requires_grad_() for key, value in theta.items()}
    with torch.enable_grad():
        value = targets(leaves)
        if not value.requires_grad:
            return torch.zeros_like(value)
        along = torch.zeros_like(value, requires_grad=True)
        pulled = torch.autograd.grad(
            value, list(leaves.values()), along, create_graph=True, allow_unused=True, materialize_grads=True
        )
        slope = dot(dict(zip(leaves, pulled, strict=True)), tangent)
        return torch.autograd.grad(slope, along)[0]


def _difference(targets: Callable[[Params], Tensor], theta: Params, tangent: Params) -> Tensor:
    size = max(1e-300, float(dot(tangent, tangent)) ** 0.5)
    step = _DIFFERENCE_STEP * max(1.0, float(dot(theta, theta)) ** 0.5) / size
    with torch.no_grad():
        return (targets(axpy(step, tangent, theta)) - targets(axpy(-step, tangent, theta))) / (2 * step)
