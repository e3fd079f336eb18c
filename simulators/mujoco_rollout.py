"""Rollouts of a MuJoCo model for given actions in bounded memory, and what to know before trusting their gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sim2real.params import Params

Step = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
Fused = Callable[[Params, Tensor, Tensor, Tensor], Tensor | None]


def segmented_rollout(step: Step, fused: Fused, segment: int | None) -> Step:
    """theta, s0 `[B, n]`, a `[B, T, m]`, e `[B, T, k]` -> s `[B, T+1, n]`.

    Without derivatives, `fused` does it all in one call. In reverse mode only the first state of every segment is kept,
    and its steps are done again when their turn comes: memory of T / segment states and one segment, for one more
    forward pass. Under `torch.func` and in forward mode, where this has no meaning or no support, steps are chained.
    """

    def rollout(theta: Params, start: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        if not _differentiated(theta, start, actions, noise):
            states = fused(theta, start, actions, noise)
            if states is not None:
                return states
        length = segment or max(1, math.isqrt(actions.shape[1]))
        rows = [start]
        for first in range(0, actions.shape[1], length):
            part = slice(first, first + length)
            run = _chain if not _plain_reverse(theta, start, actions, noise) else _recomputed
            rows += run(step, theta, rows[-1], actions[:, part], noise[:, part])
        return torch.stack(rows, 1)

    return rollout


def _chain(step: Step, theta: Params, state: Tensor, actions: Tensor, noise: Tensor) -> list[Tensor]:
    states = []
    for action, e in zip(actions.unbind(1), noise.unbind(1), strict=True):
        state = step(theta, state, action, e)
        states.append(state)
    return states


def _recomputed(step: Step, theta: Params, state: Tensor, actions: Tensor, noise: Tensor) -> list[Tensor]:
    names, values = list(theta), list(theta.values())

    def run(*tensors: Any) -> tuple[Tensor, ...]:
        return tuple(_chain(step, dict(zip(names, tensors[3:], strict=True)), *tensors[:3]))

    return list(checkpoint(run, state, actions, noise, *values, use_reentrant=False, preserve_rng_state=False))


def _differentiated(theta: Params, *tensors: Tensor) -> bool:
    """Whether any derivative or vmap is being taken."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return _plain_reverse(theta, *tensors)


def _plain_reverse(theta: Params, *tensors: Tensor) -> bool:
    """Whether this call is recorded by autograd alone."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*theta.values(), *tensors))
