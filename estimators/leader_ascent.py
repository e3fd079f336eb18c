"""Ascent of a leader's return: two remedies that were measured to work against poor local optima.

The exact gradient can end in a worse local optimum than a noisy one: a leader who pays for penalties removes them all,
if the follower's response to the first of them is weak. Noise is no cure. Two that are:

    restarts    several starts at the follower's own temperature, the best by estimated return continued;
    annealing   natural steps while the temperature of the follower, where the leader may set it, falls to its own.

Figures in `docs/boltzmann.rst`. The leader owns the loop; these are its parts.
Reference: S. Amari, Natural Gradient Works Efficiently in Learning, 1998.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isnan

import torch
from torch import Tensor

from sim2real.params import Params


def natural_softmax_step(logits: Tensor, grad: Tensor, length: float, *, floor: float = 14.0) -> Tensor:
    """One ascent step of the given length in the Fisher metric of `p = softmax(logits [n])`; `grad [n]` by the logits.

    The direction is d = grad / p, centred under p; its length is `sqrt(sum p d^2)`. Logits come back with maximum 0 and
    are kept above `-floor`, below which a share could not come back. Raises `ValueError` for a length or floor that is
    not positive and finite, shapes that differ, or numbers that are not finite.
    """
    if not (0 < length < inf and 0 < floor < inf):
        raise ValueError(f"length and floor must be positive and finite, got {length} and {floor}")
    if logits.shape != grad.shape or logits.ndim != 1:
        raise ValueError(f"logits and grad must be [n], got {tuple(logits.shape)} and {tuple(grad.shape)}")
    if not bool(torch.isfinite(logits).all() and torch.isfinite(grad).all()):
        raise ValueError(f"logits and grad must be finite, got {logits.tolist()} and {grad.tolist()}")
    p = torch.softmax(logits, -1)
    direction = grad / p.clamp(min=1e-6)
    direction = direction - p @ direction
    size = (p @ direction.square()).sqrt()
    moved = logits + length * direction / size.clamp(min=1e-300)
    return (moved - moved.max()).clamp(min=-floor)


def annealed_temperature(step: int, steps: int, hot: float, temperature: float) -> float:
    """Falls geometrically from `hot` at step 0 to `temperature` at `steps`, and stays there.

    Raises `ValueError` unless `hot >= temperature > 0` and `steps > 0`.
    """
    if not (hot >= temperature > 0 and steps > 0):
        raise ValueError(f"need hot >= temperature > 0 and steps > 0, got {hot}, {temperature}, {steps}")
    return float(max(temperature, hot * (temperature / hot) ** (step / steps)))


def best_of_restarts(
    ascend: Callable[[Params, int], tuple[Params, float]], starts: Sequence[Params], steps: int
) -> tuple[Params, float]:
    """Ascend from every start for an equal share of `steps`, then go on from the best for one more share.

    `ascend(theta, steps)` -> theta and its estimated return. One share of `steps / (len(starts) + 1)` each. What the
    leader learns of the world may be shared by all starts. Raises `ValueError` for no start, too few steps, or a return
    that is not a number.
    """
    share = steps // (len(starts) + 1)
    if not starts or share < 1:
        raise ValueError(f"{steps} steps cannot be shared by {len(starts)} starts and one continuation")
    ended = [ascend(theta, share) for theta in starts]
    lost = [i for i, (_, value) in enumerate(ended) if isnan(value)]
    if lost:
        raise ValueError(f"the return from the starts {lost} is not a number; shorten the steps of ascend")
    best = max(ended, key=lambda pair: pair[1])
    return ascend(best[0], steps - share * len(starts))
