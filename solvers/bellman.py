"""Exact optima of finite MDPs and their derivatives through the (soft) Bellman fixed point.

    V = B(V),   B(V)(s) = max_a Q(s, a)                       temperature 0
                B(V)(s) = tau log sum_a exp(Q(s, a) / tau)    temperature tau > 0 (entropy-regularised)
    Q(s, a) = r(s, a) + gamma sum_s' P(s' | s, a) V(s')

`V*(r, P)` is found by Newton's method, which is policy iteration (Puterman and Brumelle, 1979), and differentiated
from the condition `B(V) - V = 0` alone: with `A = I - gamma P_pi` frozen at the optimum, each chord step

    V <- V + A^-1 (B(V) - V)

leaves V* in place and adds one exact order of derivatives, so first order costs one linear solve of size S.

Arrays are batch first: reward `[..., S, A]`, transition `[..., S, A, S]`. Where the next state depends on (s, a) only
through a post-decision state `post[s, a]` of Y possible ones, pass `post` (integers `[S, A]`) and the far smaller
transition `[..., Y, S]`. Returns are maximised; discount < 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sim2real.solve_report import SolveReport, UnconvergedError, UnconvergedWarning


@dataclass(frozen=True)
class BellmanOptimum:
    """`value [..., S]` and `q [..., S, A]` at the fixed point, with the report of the search."""

    value: Tensor
    q: Tensor
    report: SolveReport


def q_values(
    value: Tensor, reward: Tensor, transition: Tensor, discount: float, *, post: Tensor | None = None
) -> Tensor:
    """`Q = r + gamma P V`, `[..., S, A]`, from `value [..., S]`."""
    if post is None:
        return reward + discount * (transition @ value[..., None, :, None]).squeeze(-1)
    following = (transition @ value.unsqueeze(-1)).squeeze(-1)
    return reward + discount * following[..., post]


def state_values(q: Tensor, temperature: float = 0.0) -> Tensor:
    """`max_a q` at temperature 0, `tau log sum_a exp(q / tau)` above; at a tie the first action's derivative.

    Raises `ValueError` for a negative temperature (reward units).
    """
    _check_temperature(temperature)
    if temperature == 0.0:
        return q.max(-1).values
    return temperature * torch.logsumexp(q / temperature, -1)


def optimal_actions(q: Tensor, temperature: float = 0.0) -> Tensor:
    """Action probabilities `[..., S, A]`: all on the first best action at temperature 0, `softmax(q / tau)` above.

    Raises as `state_values` does.
    """
    _check_temperature(temperature)
    if temperature == 0.0:
        indices = torch.arange(q.shape[-1], device=q.device)
        return (indices == q.argmax(-1, keepdim=True)).to(q.dtype)
    return torch.softmax(q / temperature, -1)


def state_transition(actions: Tensor, transition: Tensor, *, post: Tensor | None = None) -> Tensor:
    """`P_pi[s, s'] = sum_a pi(a | s) P(s' | s, a)`, `[..., S, S]`, of action probabilities `[..., S, A]`."""
    if post is None:
        return (actions.unsqueeze(-2) @ transition).squeeze(-2)
    index = post.expand(actions.shape)
    reached = actions.new_zeros(*actions.shape[:-1], transition.shape[-2]).scatter_add(-1, index, actions)
    return reached @ transition


def policy_values(
    actions: Tensor, reward: Tensor, transition: Tensor, discount: float, *, post: Tensor | None = None
) -> Tensor:
    """Exact value `V_pi = (I - gamma P_pi)^-1 r_pi`, `[..., S]`, of action probabilities `[..., S, A]`.

    Raises `ValueError` for shapes that do not fit or a discount outside [0, 1).
    """
    _check(reward, transition, discount, post)
    kernel = state_transition(actions, transition, post=post)
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    # inv, not linalg.solve, whose derivatives are wrong in nested forward mode and in vmap(jacfwd): pytorch 192540
    return (torch.linalg.inv(eye - discount * kernel) @ (actions * reward).sum(-1).unsqueeze(-1)).squeeze(-1)


def discounted_visits(
    start: Tensor, actions: Tensor, transition: Tensor, discount: float, *, post: Tensor | None = None
) -> Tensor:
    """`d = (I - gamma P_pi')^-1 start`, `[..., S]`: discounted state weights, which sum to `1 / (1 - gamma)`.

    Raises as `policy_values` does.
    """
    _check(actions, transition, discount, post)
    kernel = state_transition(actions, transition, post=post)
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return (torch.linalg.inv(eye - discount * kernel.mT) @ start.unsqueeze(-1)).squeeze(-1)


def optimal_values(
    reward: Tensor,
    transition: Tensor,
    discount: float,
    *,
    post: Tensor | None = None,
    temperature: float = 0.0,
    order: int = 1,
    tol: float = 1e-11,
    max_steps: int = 100,
    strict: bool = False,
) -> BellmanOptimum:
    """The fixed point of the Bellman operator, differentiable in `reward` and `transition` up to `order`.

    temperature in reward units; `tol` bounds `max |B(V) - V|` relative to `max |V|` (at least 1). Works under
    grad, jvp, vmap and their compositions. At temperature 0 the derivative is that of the chosen policy (envelope
    theorem). Raises `ValueError` for shapes that do not fit, rows of `transition` that are no distributions,
    non-finite data or a discount outside [0, 1); warns (`UnconvergedWarning`), or raises `UnconvergedError` under
    `strict=True`, when `max_steps` Newton steps did not reach `tol`.
    """
    _check(reward, transition, discount, post)
    _check_temperature(temperature)
    if order < 0:
        raise ValueError(f"order must be >= 0, got {order}")
    reports: list[SolveReport] = []
    settings = _Settings(discount, post, temperature, tol, max_steps)
    value = _FixedPoint.apply(reward.detach(), transition.detach(), settings, reports.append)
    report = reports[-1]
    if not report.converged:
        message = f"{report.status}: relative Bellman residual {report.residual:.2e}; raise max_steps or tol"
        if strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=2)
    q = q_values(value, reward, transition, discount, post=post)
    if order:
        kernel = state_transition(optimal_actions(q.detach(), temperature), transition.detach(), post=post)
        eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        for _ in range(order):
            gap = (state_values(q, temperature) - value).unsqueeze(-1)
            value = value + (torch.linalg.inv(eye - discount * kernel) @ gap).squeeze(-1)
            q = q_values(value, reward, transition, discount, post=post)
    return BellmanOptimum(value, q, report)


@dataclass(frozen=True)
class _Settings:
    discount: float
    post: Tensor | None
    temperature: float
    tol: float
    max_steps: int


class _FixedPoint(torch.autograd.Function):
    """The search alone, without derivative; a Function so that its stopping test sees plain tensors under vmap."""

    @staticmethod
    def forward(
        reward: Tensor, transition: Tensor, settings: _Settings, record: Callable[[SolveReport], None]
    ) -> Tensor:
        value, report = _newton(reward, transition, settings)
        record(report)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], reward: Tensor, transition: Tensor, settings: _Settings, record: Any
    ) -> tuple[Tensor, int]:
        tail = 2 if settings.post is not None else 3
        batched = [
            x.movedim(dim, 0) if dim is not None else x.unsqueeze(0)
            for x, dim in zip((reward, transition), in_dims, strict=False)
        ]
        depth = max(batched[0].ndim - 2, batched[1].ndim - tail)
        reward, transition = (
            x.reshape(x.shape[0], *[1] * (depth - (x.ndim - own)), *x.shape[1:])
            for x, own in zip(batched, (2, tail), strict=True)
        )
        return _FixedPoint.apply(reward, transition, settings, record), 0


def _newton(reward: Tensor, transition: Tensor, settings: _Settings) -> tuple[Tensor, SolveReport]:
    """Policy iteration from the myopic values; the residual falls monotonically and, near V*, quadratically."""
    discount, temperature, post = settings.discount, settings.temperature, settings.post
    tail = 2 if post is not None else 3
    if not bool(torch.isfinite(reward).all() and torch.isfinite(transition).all()):
        raise ValueError("reward and transition must be finite; got NaN or infinity")
    if bool((transition < 0).any()) or bool(((transition.sum(-1) - 1).abs() > 1e-6).any()):
        raise ValueError("every row transition[..., :] must be a distribution: entries >= 0 that sum to 1 within 1e-6")
    batch = torch.broadcast_shapes(reward.shape[:-2], transition.shape[:-tail])
    value = state_values(reward, temperature).expand(*batch, reward.shape[-2])
    eye = torch.eye(value.shape[-1], dtype=reward.dtype, device=reward.device)
    for steps in range(settings.max_steps + 1):
        q = q_values(value, reward, transition, discount, post=post)
        gap = state_values(q, temperature) - value
        residual = float((gap.abs().amax(-1) / value.abs().amax(-1).clamp(min=1.0)).max())
        if residual <= settings.tol:
            return value, SolveReport(True, residual, steps, "the Bellman residual reached tol")
        if steps == settings.max_steps:
            break
        kernel = state_transition(optimal_actions(q, temperature), transition, post=post)
        value = value + torch.linalg.solve(eye - discount * kernel, gap.unsqueeze(-1)).squeeze(-1)
    status = f"policy iteration stopped after max_steps = {settings.max_steps}"
    return value, SolveReport(False, residual, settings.max_steps, status)


def _check_temperature(temperature: float) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0 (reward units), got {temperature}")


def _check(reward: Tensor, transition: Tensor, discount: float, post: Tensor | None) -> None:
    if not 0.0 <= discount < 1.0:
        raise ValueError(f"discount must lie in [0, 1) for a fixed point to exist, got {discount}")
    if reward.ndim < 2:
        raise ValueError(f"reward must be [..., S, A], got shape {tuple(reward.shape)}")
    states, actions = reward.shape[-2:]
    if post is None:
        if transition.shape[-3:] != (states, actions, states):
            raise ValueError(
                f"transition must be [..., {states}, {actions}, {states}] for a reward of shape "
                f"{tuple(reward.shape)}, got {tuple(transition.shape)}; pass post= for a [..., Y, S] transition"
            )
    elif post.shape != (states, actions) or transition.ndim < 2 or transition.shape[-1] != states:
        raise ValueError(
            f"with post, post must be [{states}, {actions}] and transition [..., Y, {states}], "
            f"got {tuple(post.shape)} and {tuple(transition.shape)}"
        )
    elif post.is_floating_point() or int(post.min()) < 0 or int(post.max()) >= transition.shape[-2]:
        raise ValueError(f"post must hold integers in [0, {transition.shape[-2]}), the rows of transition")
