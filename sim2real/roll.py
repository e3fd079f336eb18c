"""Batched open-loop rolls with exact derivatives: `s_{t+1} = f(p, s_t, a_t, e_t)` for W windows over T steps.

One forward roll without autograd stores the states. Then f is linearised at all W T samples in a few large batched
calls, A_t = df/ds, B_t = df/dp (one reverse pass batched over the n components, with one copy of p per sample), and

    forward    S_{t+1} = A_t S_t + B_t           Phi_{t+1} = A_t Phi_t,  Phi_0 = I     (all parameters at once)
    adjoint    l_t = A_t' l_{t+1} + c_t,         gradient = sum_t (df/dp)' l_{t+1}     (one product; many parameters)

Everything is time-major, `[T, W, ...]`, so that a step reads contiguous memory.
Reference: Bryson and Ho, Applied Optimal Control, 1975, section 2.2 (adjoint), 6.3 (transition matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from sim2real.mdp import ModelMDP
from sim2real.params import Params

# Samples per batched step call: fewer cost calls, more cost memory (4 states: flat within 5 % from 8e3 on).
CHUNK = 16384
_WARM_ITERATIONS = 20
_WARM_TOLERANCE = 1e-10


@dataclass(frozen=True)
class StepJacobians:
    """Derivatives of one step at M samples."""

    state: Tensor
    """`[M, n, n]`"""
    params: Tensor
    """`[M, n, d]`, the entries of the free parameters in order; d = 0 when none were asked for"""
    action: Tensor | None
    """`[M, n, m]`"""


def roll(mdp: ModelMDP, theta: Params, start: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
    """States `[T+1, W, n]` from `start [W, n]` under `actions [T, W, m]` and `noise [T, W, k]`."""
    if mdp.open_loop is not None:
        return mdp.open_loop(theta, start, actions.transpose(0, 1), noise.transpose(0, 1)).transpose(0, 1)
    states = [start]
    for action, e in zip(actions, noise, strict=True):
        states.append(mdp.step(theta, states[-1], action, e))
    return torch.stack(states)


def observe(mdp: ModelMDP, theta: Params, states: Tensor) -> Tensor:
    """What the model observes at states `[..., n]`, `[..., p]`."""
    return states if mdp.observe is None else mdp.observe(theta, states)


def step_jacobians(
    mdp: ModelMDP,
    theta: Params,
    free: Sequence[str],
    states: Tensor,
    actions: Tensor,
    noise: Tensor,
    *,
    wrt_action: bool = False,
    chunk: int = CHUNK,
) -> StepJacobians:
    """Linearise the step at M samples: states `[M, n]`, actions `[M, m]`, noise `[M, k]`."""
    if mdp.derivative_order == 0:
        raise ValueError("the model's step is a black box (derivative_order = 0); a fit needs first derivatives")
    M, n = states.shape
    d = sum(theta[key].numel() for key in free)
    A, B = states.new_empty(M, n, n), states.new_empty(M, n, d)
    C = states.new_empty(M, n, actions.shape[1]) if wrt_action else None
    for first in range(0, M, chunk):
        part = slice(first, min(first + chunk, M))
        e = noise[part]
        by_state, by_params, by_action = _pull(
            lambda s, copies, a, e=e: mdp.step(theta | copies, s, a, e),
            states[part],
            _copies(theta, free, states[part]),
            actions[part],
        )
        A[part] = by_state
        if C is not None and by_action is not None:
            C[part] = by_action
        if d:
            B[part] = by_params
    return StepJacobians(A, B, C)


def _copies(theta: Params, free: Sequence[str], states: Tensor) -> Params:
    """One copy of each free parameter per sample, so that one reverse pass gives every sample's own gradient."""
    return {key: theta[key].detach().expand(len(states), *theta[key].shape).contiguous() for key in free}


def _pull(
    function: Callable[..., Tensor], states: Tensor, copies: Params, *more: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of outputs `[M, p]` sample by sample: by states `[M, p, n]`, copies `[M, p, d]`, and one more input.

    One reverse pass batched over the p components; a custom autograd Function in a step needs its vmap rule.
    """
    outputs, pull = vjp(function, states, copies, *more)[:2]
    M, p = outputs.shape
    picks = torch.eye(p).to(outputs).unsqueeze(1).expand(p, M, p)
    by_state, by_copies, *rest = (part for part in vmap(pull)(picks))
    flat = [grad.reshape(p, M, copies[key][0].numel()) for key, grad in by_copies.items()]
    by_params = torch.cat(flat, 2) if flat else states.new_zeros(p, M, 0)
    return by_state.transpose(0, 1), by_params.transpose(0, 1), rest[0].transpose(0, 1) if rest else None


def observe_jacobians(mdp: ModelMDP, theta: Params, free: Sequence[str], states: Tensor) -> tuple[Tensor, Tensor]:
    """`[M, p, n]` and `[M, p, d]`: derivatives of what is observed at states `[M, n]`."""
    M, n = states.shape
    if mdp.observe is None:
        return torch.eye(n).to(states).expand(M, n, n), states.new_zeros(M, n, sum(theta[k].numel() for k in free))
    see = mdp.observe
    by_state, by_params, _ = _pull(lambda s, copies: see(theta | copies, s), states, _copies(theta, free, states))
    return by_state, by_params


def forward_sensitivity(A: Tensor, B: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`S [R, W, n, d]` and `Phi [R, W, n, n]` at the states `rows` (0 is the start), from A and B `[T, W, n, ...]`.

    S_0 = 0: a start that depends on the parameters adds `Phi ds_0/dp`.
    """
    T, W, n, d = B.shape
    column = {row: index for index, row in enumerate(rows)}
    S_at, Phi_at = B.new_zeros(len(rows), W, n, d), B.new_empty(len(rows), W, n, n)
    S, Phi = B.new_zeros(W, n, d), torch.eye(n).to(B).repeat(W, 1, 1)
    S_next, Phi_next = torch.empty_like(S), torch.empty_like(Phi)
    for t in range(T + 1):
        if t in column:
            S_at[column[t]], Phi_at[column[t]] = S, Phi
        if t < T:
            torch.baddbmm(B[t], A[t], S, out=S_next)
            torch.bmm(A[t], Phi, out=Phi_next)
            S, S_next, Phi, Phi_next = S_next, S, Phi_next, Phi
    return S_at, Phi_at


@dataclass(frozen=True)
class Sensitivities:
    """Derivatives of the states of a roll, at R of its rows."""

    params: Tensor
    """`[R, W, n, d]` by the free parameters, then along the change of the actions if one was given"""
    start: Tensor
    """`[R, W, n, n]`"""
    A: Tensor | None
    """`[T, W, n, n]` ds_{t+1}/ds_t; None where the model's engine kept them to itself"""


def roll_sensitivities(
    mdp: ModelMDP,
    theta: Params,
    free: Sequence[str],
    path: tuple[Tensor, Tensor, Tensor],
    rows: Sequence[int],
    d_actions: Tensor | None = None,
) -> Sensitivities:
    """Derivatives of a roll: path is its states `[T+1, W, n]`, actions `[T, W, m]` and noise `[T, W, k]`.

    `d_actions [T, W, m]`: a change of the actions whose effect is one more column.
    """
    states, actions, noise = path
    engine = mdp.sensitivity
    if engine is not None and engine.step is mdp.step and all(value.ndim == 0 for value in theta.values()):
        found = engine.run(theta, free, (*path, d_actions), rows)
        if found is not None:
            return Sensitivities(*found, None)
    T, W = actions.shape[:2]
    flat = (states[:-1].flatten(0, 1), actions.flatten(0, 1), noise.flatten(0, 1))
    steps = step_jacobians(mdp, theta, free, *flat, wrt_action=d_actions is not None)
    A, B = steps.state.unflatten(0, (T, W)), steps.params.unflatten(0, (T, W))
    if steps.action is not None and d_actions is not None:
        B = torch.cat([B, steps.action.unflatten(0, (T, W)) @ d_actions.unsqueeze(-1)], -1)
    return Sensitivities(*forward_sensitivity(A, B, rows), A)


@dataclass(frozen=True)
class Path:
    """A roll of W windows over T steps with its transition matrices."""

    states: Tensor
    """`[T+1, W, n]`"""
    actions: Tensor
    """`[T, W, m]`"""
    noise: Tensor
    """`[T, W, k]`"""
    A: Tensor
    """`[T, W, n, n]` ds_{t+1}/ds_t"""


def tangent_roll(mdp: ModelMDP, theta: Params, path: Path, dtheta: Params, ds0: Tensor) -> Tensor:
    """Change `[T+1, W, n]` of the states as theta moves along `dtheta` (a subset of its keys) and the start by ds0."""
    flat = (path.states[:-1].flatten(0, 1), path.actions.flatten(0, 1), path.noise.flatten(0, 1))
    step = lambda moved: mdp.step(theta | moved, *flat)
    push = jvp(step, ({key: theta[key] for key in dtheta},), (dtheta,))[1].unflatten(0, path.A.shape[:2])
    moved = [ds0]
    for pushed, A in zip(push, path.A, strict=True):
        moved.append(torch.baddbmm(pushed.unsqueeze(-1), A, moved[-1].unsqueeze(-1)).squeeze(-1))
    return torch.stack(moved)


def adjoint_roll(
    mdp: ModelMDP, theta: Params, free: Sequence[str], path: Path, cotangent: Tensor
) -> tuple[Params, Tensor, Tensor]:
    """Transpose of `tangent_roll`: gradients with respect to the free parameters, the start `[W, n]`, the actions.

    cotangent `[T+1, W, n]` of the states. Costs one reverse pass however many parameters there are.
    """
    adjoint = cotangent.clone()
    for t in range(len(path.A) - 1, -1, -1):
        adjoint[t] += (path.A[t].mT @ adjoint[t + 1].unsqueeze(-1)).squeeze(-1)
    states, noise = path.states[:-1].flatten(0, 1), path.noise.flatten(0, 1)
    step = lambda p, a: mdp.step(theta | p, states, a, noise)
    pull = vjp(step, {key: theta[key] for key in free}, path.actions.flatten(0, 1))[1]
    by_params, by_action = pull(adjoint[1:].flatten(0, 1))
    return by_params, adjoint[0], by_action.view(path.actions.shape)


@dataclass(frozen=True)
class WarmUp:
    """What determines the start state x of W windows from their first r rows, r = T_w + 1:

    x minimises  sum |y(x) + zero - target|^2 + pull |x - anchor + own zero|^2,   y: what the model observes there.
    """

    anchor: Tensor
    """`[W, n]` as logged"""
    own: Tensor
    """`[n, q]` 1 where the anchor of a state is a signal with that zero"""
    target: Tensor
    """`[r, W, q]`"""
    columns: Tensor
    """`[q]` which observed columns are compared"""
    pull: float
    zero: Tensor
    """`[W, q]`"""


def _without_zero(warm: WarmUp, zero: Tensor) -> Tensor:
    return warm.anchor - zero @ warm.own.mT


def warm_start(mdp: ModelMDP, theta: Params, warm: WarmUp, actions: Tensor, noise: Tensor) -> Tensor:
    """Start states `[W, n]` by Gauss-Newton, exact after one step for a model affine in its state.

    actions and noise `[T_w, W, ...]`. A window that does not converge in 20 steps is returned as NaN.
    """
    anchor = _without_zero(warm, warm.zero)
    x, move = anchor, torch.full_like(anchor, torch.inf)
    for _ in range(_WARM_ITERATIONS):
        states = roll(mdp, theta, x, actions, noise)
        A = step_jacobians(mdp, theta, (), states[:-1].flatten(0, 1), actions.flatten(0, 1), noise.flatten(0, 1)).state
        T, (W, n) = len(actions), x.shape
        _, Phi = forward_sensitivity(A.unflatten(0, (T, W)), A.new_zeros(T, W, n, 0), range(T + 1))
        C, _ = observe_jacobians(mdp, theta, (), states.flatten(0, 1))
        G = (C[:, warm.columns].unflatten(0, (T + 1, W)) @ Phi).permute(1, 0, 2, 3).flatten(1, 2)
        r = (observe(mdp, theta, states)[..., warm.columns] + warm.zero - warm.target).transpose(0, 1).flatten(1)
        normal = G.mT @ G + warm.pull * torch.eye(n).to(x)
        gradient = (G.mT @ r.unsqueeze(-1)).squeeze(-1) + warm.pull * (x - anchor)
        move = -torch.linalg.solve(normal, gradient)
        x = x + move
        if bool((move.abs() <= _WARM_TOLERANCE * (1 + x.abs())).all()):
            return x
    lost = ~(move.abs() <= _WARM_TOLERANCE * (1 + x.abs())).all(-1, keepdim=True)
    return x.masked_fill(lost, torch.nan)


def warm_start_jacobians(
    mdp: ModelMDP, theta: Params, free: Sequence[str], warm: WarmUp, x: Tensor, actions: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the start x with respect to the free parameters `[W, n, d]`, zeros `[W, n, q]` and actions.

    Those of the actions: `[W, n, T_w, m]`. By the implicit function theorem on the gradient F(x, p) = 0 of what
    x minimises: dx/dp = -(dF/dx)^-1 dF/dp, with the exact second derivatives.
    """
    copies = {key: value.requires_grad_() for key, value in _copies(theta, free, x).items()}
    x = x.detach().requires_grad_()
    a, zero = actions.detach().requires_grad_(), warm.zero.detach().requires_grad_()
    state, total = x, x.new_zeros(len(x))
    with torch.enable_grad():
        for t in range(len(actions) + 1):
            seen = observe(mdp, theta | copies, state)[:, warm.columns]
            total = total + (seen + zero - warm.target[t]).square().sum(-1) / 2
            if t < len(actions):
                state = mdp.step(theta | copies, state, a[t], noise[t])
        (F,) = torch.autograd.grad(total.sum(), x, create_graph=True)
        F = F + warm.pull * (x - _without_zero(warm, zero))
    leaves, rows = [x, zero, a, *copies.values()], []
    for i in range(x.shape[1]):
        grads = torch.autograd.grad(F[:, i].sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append([grads[0], grads[1], grads[2].transpose(0, 1), *(g.reshape(len(x), -1) for g in grads[3:])])
    stacked = [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]
    solve = lambda right: -torch.linalg.solve(stacked[0], right)
    by_params = solve(torch.cat(stacked[3:], -1)) if copies else x.new_zeros(*x.shape, 0)
    by_action = solve(stacked[2].flatten(2)).view_as(stacked[2])
    return by_params.detach(), solve(stacked[1]).detach(), by_action.detach()
