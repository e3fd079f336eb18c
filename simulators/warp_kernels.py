"""Kernels that take rows of environments through time, and their launches on torch tensors.

A kernel calls a tile function (`warp_tiles`) at t = 0 .. T-1 or T-1 .. 0 for a tile of environments: on the CPU many
environments are one tile, computed side by side; a GPU has one environment per thread. Nothing is summed over
environments, so results depend neither on tiles nor on threads.

Tensors are views, never copies: shared parameters, what `vmap` did not batch and tangents that are zero are rows
repeated with stride 0. A launch runs on the tensors' device, on torch's current stream. On the CPU a large one is cut
into slices of environments, one per torch thread.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import warp as wp
from torch import Tensor

from sim2real.simulators.warp_native import launch_array, warp_function

TILE = 128
"""environments that a CPU thread takes through time together"""
THREADED = 1 << 15
"""environment steps for each thread below which a launch on the CPU uses fewer threads"""


@cache
def over_time(tile: Any, *, backward: bool) -> Any:
    """The kernel `(first, last, width, steps, *arrays)` that calls `tile(copy, time, low, high, *arrays)`."""
    arrays = dict(list(tile.input_types.items())[4:])
    time = "steps - 1 - k" if backward else "k"
    body = (
        "copy, block = wp.tid()\n"
        "    low = first + block * width\n"
        "    high = wp.min(low + width, last)\n"
        "    for k in range(steps):\n"
        f"        tile(copy, {time}, low, high, {', '.join(arrays)})"
    )
    types = dict.fromkeys(("first", "last", "width", "steps"), wp.int32) | arrays
    decorator = "@wp.kernel(enable_backward=False, module='unique')"
    return warp_function(decorator, f"{tile.key}_{'back' if backward else 'on'}", types, body, {"tile": tile})


def launch(kernel: Any, arrays: Sequence[Tensor], *, copies: int, batch: int, steps: int) -> None:
    """Run a kernel of `over_time` for every copy and environment; arrays `[copies or 1, (steps,) batch, length]`."""
    if copies == 0 or batch == 0:
        return
    views = [array if len(array) == copies else array.expand(copies, *array.shape[1:]) for array in arrays]
    if copies > batch:  # the longer axis is the one that is tiled
        views, copies, batch = [view.transpose(0, -2) for view in views], batch, copies
    device = arrays[0].device
    described = [launch_array(view) for view in views]
    if device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(device))
        inputs = [0, batch, 1, steps, *described]
        wp.launch(kernel, dim=(copies, batch), inputs=inputs, device=wp.device_from_torch(device), stream=stream)
        return

    def run(first: int, last: int) -> None:
        tiles = -(-(last - first) // TILE)
        wp.launch(kernel, dim=(copies, tiles), inputs=[first, last, TILE, steps, *described], device="cpu")

    threads = max(1, min(torch.get_num_threads(), batch // TILE, copies * batch * steps // THREADED))
    tiles = -(-batch // TILE)
    in_slices(kernel, lambda first, last: run(first * TILE, min(batch, last * TILE)), tiles, threads)


def in_slices(kernel: Any, run: Callable[[int, int], None], count: int, threads: int) -> None:
    """`run(first, last)` over slices of `count` items, one for each thread."""
    if threads > 1:
        kernel.module.load(wp.get_device("cpu"), 1)  # as a launch does, before threads could compile it twice
    mine, *slices = itertools.pairwise([count * k // threads for k in range(threads + 1)])
    others = [_pool(os.getpid(), threads).submit(run, *cut) for cut in slices]
    run(*mine)
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that wait for slices; a forked process gets its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="warp-slice")
