"""Launches of Warp kernels on torch tensors, and the `Program`s of a step, a rollout and a reward.

Tensors are views, never copies: shared parameters, what `vmap` did not batch and tangents that are zero are rows
repeated with stride 0. A launch runs on the tensors' device, on torch's current stream. On the CPU large launches are
cut into slices of environments, one per torch thread; no arithmetic depends on the cut.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
import warp as wp
from torch import Tensor

from sim2real.simulators.warp_functions import Program, Tensors, Wanted
from sim2real.simulators.warp_kernels import Kernels

TILE = 128
"""environments that a CPU thread takes through time together; times are flat from 64 to 1024"""
THREADED = 1 << 14
"""environment steps for each thread below which a launch on the CPU uses fewer threads"""
SCALARS = {torch.float32: wp.float32, torch.float64: wp.float64}
"""precisions a model computes in"""


def launch(kernel: Any, arrays: Sequence[Tensor], *, copies: int, batch: int, steps: int | None = None) -> None:
    """Run `kernel(first, last, tile, [steps,] *arrays)` for every copy and environment.

    arrays: `[copies or 1, (steps,) batch, length]`, vectors along the last axis; a length of 0 becomes one zero.
    """
    if copies == 0 or batch == 0:
        return
    views = [_whole(array, copies) for array in arrays]
    if copies > batch:  # the longer axis is the one that is tiled
        views, copies, batch = [view.transpose(0, -2) for view in views], batch, copies
    device = arrays[0].device
    scalars = () if steps is None else (steps,)
    described = [_describe(view) for view in views]
    if device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(device))
        inputs = [0, batch, 1, *scalars, *described]
        wp.launch(kernel, dim=(copies, batch), inputs=inputs, device=wp.device_from_torch(device), stream=stream)
        return

    def run(first: int, last: int) -> None:
        tiles = -(-(last - first) // TILE)
        wp.launch(kernel, dim=(copies, tiles), inputs=[first, last, TILE, *scalars, *described], device="cpu")

    work = copies * batch * (steps or 1)
    threads = max(1, min(torch.get_num_threads(), batch // TILE, work // THREADED))
    if threads > 1:
        kernel.module.load(wp.get_device("cpu"))  # before threads could race to compile it
    cuts = [batch * k // threads for k in range(threads + 1)]
    helpers = [threading.Thread(target=run, args=cut) for cut in itertools.pairwise(cuts[1:])]
    for helper in helpers:
        helper.start()
    run(cuts[0], cuts[1])
    for helper in helpers:
        helper.join()


def roll_program(kernels: Kernels, *, whole: bool) -> Program:
    """(theta `[C, B, p]`, start `[C, B, n]`, actions `[C, T, B, m]`, noise `[C, T, B, k]`) -> (states,).

    whole: the states are `[C, T+1, B, n]`, the first is the start; else T = 1 and they are `[C, 1, B, n]`, the next.
    """

    def before(start: Tensor, states: Tensor) -> Tensor:
        return states[:, :-1] if whole else start.unsqueeze(1)

    def after(states: Tensor) -> Tensor:
        return states[:, 1:] if whole else states

    def blank(start: Tensor, steps: int, arguments: Sequence[Tensor]) -> Tensor:
        states = start.new_empty(_copies(arguments), steps + whole, *start.shape[1:])
        if whole:
            states[:, 0] = start
        return states

    def value(x: Tensors) -> Tensors:
        theta, start, actions, noise = x
        states = blank(start, actions.shape[1], x)
        _roll(kernels.value, (theta, actions, noise, before(start, states), after(states)), states)
        return (states,)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        d_states = blank(dx[1], x[2].shape[1], (*x, *dx, *y))
        motion = (before(x[1], y[0]), before(dx[1], d_states), after(d_states))
        _roll(kernels.push, (*_paired(x, dx), *motion), d_states)
        return (d_states,)

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        grads = _gradients(x, (*x, *y, *g), wanted)
        theta, start, actions, noise = x
        _roll(kernels.pull, (theta, actions, noise, before(start, y[0]), after(g[0]), *grads), grads[2])
        if whole:
            grads[1].add_(g[0][:, 0])
        return _chosen(grads, wanted)

    def second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
        x, dx, y, dy, g, h = arguments
        every = [t for part in arguments for t in part]
        grads, d_grads = _gradients(x, every, wanted[:4]), _gradients(dx, every, wanted[4:])
        motion = (before(x[1], y[0]), before(dx[1], dy[0]), after(g[0]), after(h[0]))
        outputs = _alternate(grads, d_grads)
        _roll(kernels.second, (*_paired(x, dx), *motion, *outputs), grads[2])
        if whole:
            grads[1].add_(g[0][:, 0])
            d_grads[1].add_(h[0][:, 0])
        return _chosen((*grads, *d_grads), wanted)

    return Program(value, push, pull, second)


def reward_program(kernels: Kernels) -> Program:
    """(theta `[C, B, p]`, state, action, noise, following `[C, B, ...]`) -> (reward `[C, B, 1]`,)."""

    def run(kernel: Any, arrays: Sequence[Tensor], like: Tensor) -> None:
        launch(kernel, arrays, copies=like.shape[0], batch=like.shape[1])

    def blank(arguments: Sequence[Tensor]) -> Tensor:
        return arguments[0].new_empty(_copies(arguments), arguments[0].shape[1], 1)

    def value(x: Tensors) -> Tensors:
        reward = blank(x)
        run(kernels.value, (*x, reward), reward)
        return (reward,)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        d_reward = blank((*x, *dx))
        run(kernels.push, (*_alternate(x, dx), d_reward), d_reward)
        return (d_reward,)

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        grads = _room(x, (*x, *g), wanted)
        run(kernels.pull, (*x, *g, *grads), grads[0])
        return _chosen(grads, wanted)

    def second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
        x, dx, _, _, g, h = arguments
        every = (*x, *dx, *g, *h)
        grads, d_grads = _room(x, every, wanted[:5]), _room(dx, every, wanted[5:])
        run(kernels.second, (*_alternate(x, dx), *g, *h, *_alternate(grads, d_grads)), grads[0])
        return _chosen((*grads, *d_grads), wanted)

    return Program(value, push, pull, second)


def _roll(kernel: Any, arrays: Sequence[Tensor], like: Tensor) -> None:
    """Launch over copies, environments and time; `like [C, T or T + 1, B, ...]`."""
    launch(kernel, arrays, copies=like.shape[0], batch=like.shape[2], steps=arrays[-1].shape[1])


def _paired(x: Tensors, dx: Tensors) -> Tensors:
    """Theta, actions and noise, each followed by its tangent."""
    return _alternate((x[0], x[2], x[3]), (dx[0], dx[2], dx[3]))


def _alternate(tensors: Tensors, tangents: Tensors) -> Tensors:
    return tuple(t for pair in zip(tensors, tangents, strict=True) for t in pair)


def _copies(tensors: Sequence[Tensor]) -> int:
    return max(t.shape[0] for t in tensors)


def _gradients(x: Tensors, arguments: Sequence[Tensor], wanted: Wanted) -> Tensors:
    """Where a roll adds up the gradients by theta and the start, and writes those by actions and noise."""
    sums = tuple(t.new_zeros(_copies(arguments), *t.shape[1:]) for t in x[:2])
    return *sums, *_room(x[2:], arguments, wanted[2:])


def _room(x: Tensors, arguments: Sequence[Tensor], wanted: Wanted) -> Tensors:
    """Where gradients go; those not wanted all into one row."""
    shapes = [(_copies(arguments), *t.shape[1:]) for t in x]
    rows = zip(x, shapes, wanted, strict=True)
    return tuple(t.new_empty(s) if want else t.new_empty(s[-1:]).expand(s) for t, s, want in rows)


def _chosen(grads: Tensors, wanted: Wanted) -> Tensors:
    return tuple(grad for grad, want in zip(grads, wanted, strict=True) if want)


def _whole(array: Tensor, copies: int) -> Tensor:
    """The array with every copy and vectors that are contiguous and not empty; copied only if its vectors are not."""
    if array.shape[-1] == 0:
        array = array.new_zeros(1).expand(*array.shape[:-1], 1)
    if array.stride(-1) != 1:
        array = array.clone(memory_format=torch.contiguous_format)
    return array.expand(copies, *array.shape[1:])


def _describe(array: Tensor) -> Any:
    dtype = vector_type(array.shape[-1], array.dtype)
    return wp.from_torch(array, dtype=dtype, requires_grad=False, return_ctype=True)


def vector_type(length: int, precision: torch.dtype) -> Any:
    """Warp's vector of a length; of one unused component for length 0."""
    return wp.types.vector(max(length, 1), SCALARS[precision])
