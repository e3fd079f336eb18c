"""Forward sensitivities along a rollout in one Warp kernel: the Jacobians of a step are never stored.

    S_{t+1} = A_t S_t + B_t,  S_0 = 0,       Phi_{t+1} = A_t Phi_t,  Phi_0 = I,       A = df/ds,  B = (df/dp, df/da da)

p: the free parameters; da, if given, is a change of the actions and makes the last column. One graph holds the
Jacobian, whose rows share all that a step computes, and its product with the carried (S, Phi).
Reference: Bryson and Ho, Applied Optimal Control, 1975, section 6.3; Griewank and Walther, Evaluating Derivatives,
2008, 3.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sim2real.simulators.warp_dual import adjoints
from sim2real.simulators.warp_graph import Node, constant, in_order
from sim2real.simulators.warp_kernels import launch, over_time
from sim2real.simulators.warp_language import Translated, grouped
from sim2real.simulators.warp_native import Rows, Store, read, tile_function

Path = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""states `[T+1, W, n]`, actions `[T, W, m]`, noise `[T, W, k]`, a change da `[T, W, m]` of the actions or None"""
LARGEST = 6000
"""operations of a kernel beyond which compiling it takes longer than a fit gains"""


def roll_sensitivity(
    step: Translated,
    free: tuple[int, ...],
    theta: Tensor,
    path: Path,
    rows: Sequence[int],
) -> tuple[Tensor, Tensor] | None:
    """S `[R, W, n, d (+ 1)]` and Phi `[R, W, n, n]` at the states `rows`; None where the kernel would be too large.

    step: of theta, state, action and noise. free: which components of theta `[1, W, p]`.
    """
    states, actions, noise, d_actions = path
    tile = _tile(step, free, d_actions is not None)
    if tile is None:
        return None
    (steps, W), n = actions.shape[:2], states.shape[2]
    d = len(free) + (d_actions is not None)
    carried = states.new_zeros(1, n, d + n, W)
    carried[0, :, d:] = torch.eye(n).to(carried).unsqueeze(-1)
    moved = carried.view(1, n * (d + n), W).transpose(1, 2)
    timed = [part[:steps].unsqueeze(0) for part in (states, actions, noise)]
    timed += [] if d_actions is None else [d_actions.unsqueeze(0)]
    kernel, found = over_time(tile, backward=False), carried.new_empty(len(rows), W, n, d + n)
    column = {row: index for index, row in enumerate(rows)}
    for first, last in itertools.pairwise(sorted({0, *rows})):
        if first in column:
            found[column[first]] = carried[0].permute(2, 0, 1)
        arrays = [theta, *(part[:, first:last] for part in timed), moved, moved]
        launch(kernel, arrays, copies=1, batch=W, steps=last - first)
    found[column[max(rows)]] = carried[0].permute(2, 0, 1)
    return found[..., :d], found[..., d:]


@cache
def _tile(step: Translated, free: tuple[int, ...], pushed: bool) -> Any:
    """The Warp function that takes (S, Phi) of one time to the next."""
    names = [argument.name for argument in step.arguments]
    sizes = [argument.length or 1 for argument in step.arguments]
    reads = [Rows(f"x_{name}", k, index > 0) for index, (name, k) in enumerate(zip(names, sizes, strict=True))]
    x = [read(part) for part in reads]
    n, width = sizes[1], len(free) + pushed + sizes[1]
    sense = Rows("sense", n * width, False)
    d_action = Rows("d_action", sizes[2])
    before = [read(sense)[row * width : (row + 1) * width] for row in range(n)]
    after: list[Node] = []
    for row in range(n):
        seeds = [constant(float(row == other)) for other in range(n)]
        by_theta, by_state, by_action, _ = grouped(adjoints(list(step.value), seeds, list(chain(*x))), x)
        direct = [by_theta[index] for index in free]
        if pushed:
            direct.append(_sum(a * b for a, b in zip(by_action, read(d_action), strict=True)))
        direct += [constant(0.0)] * n
        for column in range(width):
            through = _sum(by_state[k] * before[k][column] for k in range(n))
            after.append(direct[column] + through)
    if len(in_order(after)) > LARGEST:
        return None
    reads += [d_action] if pushed else []
    return tile_function(f"{step.name}_sensitivity", [*reads, sense], [Store(sense, tuple(after))], step.precision)


def _sum(terms: Any) -> Node:
    return sum(terms, constant(0.0))
