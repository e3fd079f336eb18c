"""The misfit of a model on the windows of a log, as a function of a flat vector x of unknowns, and its derivatives.

    F(x) = sum_w 1/(R q) sum_j loss(r_wj) + sum_k ((x_k - mean_k) / std_k)^2 / 2,       r = model + zero - log,
    loss(r) = sqrt(1 + (r/c)^2) - 1   (soft-L1; near 0 a window counts as one measurement with standard deviation c)

x: entries of the free parameters, then, as far as they are fitted, the input delay, the sensor zeros and a correction
of the start rates, per run or shared. Each window sees only the L unknowns of its own run: Jacobians are `[W, R q, L]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.delay import delayed_actions
from sim2real.mdp import ModelMDP
from sim2real.roll import (
    WarmUp,
    observe,
    observe_jacobians,
    roll,
    roll_sensitivities,
    warm_start,
    warm_start_jacobians,
)
from sim2real.rollout_log import RolloutLog
from sim2real.unknowns import Unknowns, Values, take_apart
from sim2real.windows import Channels, Windows, window_actions


@dataclass(frozen=True)
class Misfit:
    """A model, windows and unknowns. `c` None: plain sum of squares r^2/2 without the average over samples."""

    mdp: ModelMDP
    log: RolloutLog
    channels: Channels
    windows: Windows
    unknowns: Unknowns
    scale: float | None
    pull: float


@dataclass(frozen=True)
class Rolled:
    """What one evaluation of the misfit leaves for its derivatives."""

    values: Values
    actions: Tensor
    """`[T, W, m]`"""
    states: Tensor
    """`[T+1, W, n]`"""
    predicted: Tensor
    """`[W, R, q]` model + zero"""
    residual: Tensor
    """`[W, R, q]`"""


def _inputs(misfit: Misfit, values: Values) -> Tensor:
    log = misfit.log
    actions = log.actions if values.delay is None else delayed_actions(log, values.delay)
    return window_actions(misfit.windows, actions[..., misfit.channels.actions])


def _zero_per_window(misfit: Misfit, values: Values) -> Tensor:
    """`[W, q]`"""
    if not values.zero.shape[1]:
        return misfit.windows.measured.new_zeros(len(misfit.windows.episode), len(misfit.channels.signals))
    return values.zero[misfit.windows.episode]


def _warm_up(misfit: Misfit, zero: Tensor) -> WarmUp:
    """zero `[W, q]`"""
    windows, channels = misfit.windows, misfit.channels
    target = windows.warm_signals.transpose(0, 1)
    return WarmUp(windows.anchor, channels.own.to(zero), target, channels.observed, misfit.pull, zero)


def roll_windows(misfit: Misfit, x: Tensor) -> Rolled:
    """Simulate every window at x."""
    values, windows = take_apart(misfit.unknowns, x), misfit.windows
    actions, zero = _inputs(misfit, values), _zero_per_window(misfit, values)
    if windows.warm > 1:
        first, warm = windows.warm - 1, _warm_up(misfit, zero)
        start = warm_start(misfit.mdp, values.theta, warm, actions[:first], windows.noise[:first])
    else:
        start = windows.anchor - zero @ misfit.channels.own.mT
        if values.rate.shape[1]:
            start = start.index_add(1, misfit.channels.rates, values.rate[windows.episode])
    with torch.no_grad():
        states = roll(misfit.mdp, values.theta, start, actions, windows.noise)
        seen = observe(misfit.mdp, values.theta, states[windows.rows])[..., misfit.channels.observed]
    predicted = seen.transpose(0, 1) + zero.unsqueeze(1)
    return Rolled(values, actions, states, predicted, predicted - windows.measured)


def start_columns(misfit: Misfit, rolled: Rolled, free: Sequence[str], pushed: Tensor) -> Tensor:
    """ds_0/d(local unknowns) `[W, n, L]`; pushed `[T, W, m]`: da/d delay."""
    unknowns, windows, channels = misfit.unknowns, misfit.windows, misfit.channels
    start, d = rolled.states[0], sum(unknowns.theta[key].numel() for key in free)
    W, n = start.shape
    own = -channels.own.to(start).expand(W, -1, -1)
    by_theta, by_delay, by_zero = start.new_zeros(W, n, d), start.new_zeros(W, n, 1), own
    if windows.warm > 1:
        first, warm = windows.warm - 1, _warm_up(misfit, _zero_per_window(misfit, rolled.values))
        actions, noise = rolled.actions[:first], windows.noise[:first]
        by_theta, by_zero, by_action = warm_start_jacobians(
            misfit.mdp, rolled.values.theta, free, warm, start, actions, noise
        )
        if unknowns.delay:
            by_delay = torch.einsum("wntm,twm->wn", by_action, pushed[:first]).unsqueeze(-1)
    by_rate = torch.eye(n).to(start)[:, channels.rates].expand(W, -1, -1)
    parts = [by_theta]
    if unknowns.delay:
        parts.append(by_delay)
    if unknowns.zero.shape[1]:
        parts.append(by_zero)
    if unknowns.rate.shape[1]:
        parts.append(by_rate)
    return torch.cat(parts, -1)


def _pushed(misfit: Misfit, delay: Tensor) -> Tensor:
    """`[T, W, m]` derivative of the inputs with respect to the delay."""
    delay = delay.detach().requires_grad_()
    with torch.enable_grad():
        actions = delayed_actions(misfit.log, delay)
        weights = torch.zeros_like(actions, requires_grad=True)
        # the gradient is linear in the weights of its outputs: differentiated by them it is the whole derivative
        (gradient,) = torch.autograd.grad(actions, delay, weights, create_graph=True)
        (slope,) = torch.autograd.grad(gradient, weights)
    return window_actions(misfit.windows, slope[..., misfit.channels.actions])


@dataclass(frozen=True)
class Linearized:
    """Derivatives on the scored rows: `jacobian [W, R, q, L]`, `growth [W, R, q, n]` = d observed / d start state."""

    jacobian: Tensor
    growth: Tensor
    A: Tensor | None
    """`[T, W, n, n]` of the steps, where they were formed"""


def linearize(misfit: Misfit, rolled: Rolled, free: Sequence[str] | None = None) -> Linearized:
    """Exact Jacobian of the model signals in the unknowns of each window; `free`: subset of theta, default all free."""
    unknowns, windows, channels = misfit.unknowns, misfit.windows, misfit.channels
    free = unknowns.free if free is None else free
    states, theta = rolled.states, rolled.values.theta
    path, rows, W = (states, rolled.actions, windows.noise), windows.rows.tolist(), states.shape[1]
    pushed = None
    if unknowns.delay and rolled.values.delay is not None:
        pushed = _pushed(misfit, rolled.values.delay)
    rolling = roll_sensitivities(misfit.mdp, theta, free, path, rows, pushed)
    S, Phi = rolling.params, rolling.start
    C, D = observe_jacobians(misfit.mdp, theta, free, states[windows.rows].flatten(0, 1))
    C, D = (part[:, channels.observed].unflatten(0, (len(windows.rows), W)) for part in (C, D))
    growth = C @ Phi
    jacobian = growth @ start_columns(misfit, rolled, free, rolled.actions.new_zeros(()) if pushed is None else pushed)
    jacobian[..., : S.shape[-1]] += C @ S
    jacobian[..., : D.shape[-1]] += D
    if unknowns.zero.shape[1]:
        first = S.shape[-1]
        jacobian[..., first : first + len(channels.signals)] += torch.eye(len(channels.signals)).to(jacobian)
    return Linearized(jacobian.transpose(0, 1), growth.transpose(0, 1), rolling.A)


def start_error_growth(misfit: Misfit, linearized: Linearized) -> Tensor:
    """`[W]` largest factor by which an error of the compared signals at the start grows over the scored rows.

    The spectral norm of d signals_t / d signals_0; windows near an unstable equilibrium have large ones, and where the
    model diverges it is infinite.
    """
    growth = linearized.growth @ misfit.channels.own.to(linearized.growth)
    lost = ~torch.isfinite(growth).flatten(1).all(1)
    norms = torch.linalg.matrix_norm(torch.where(lost[:, None, None, None], 0.0, growth), ord=2).amax(1)
    return norms.masked_fill(lost, torch.inf)
