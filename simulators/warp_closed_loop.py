"""Rollouts of a policy inside one kernel: policy, step and reward, forward and back through time.

    a_t = policy(nu, s_t),  s_{t+1} = f(theta, s_t, a_t, e_t),  r_t = rho(theta, s_t, a_t, e_t, s_{t+1})

are one `Program` of (s_0, theta, nu, process noise, policy noise, alive) with the outputs states, actions and rewards.
Where alive is 0 the state is held and the reward is 0, as in `sim2real.rollout`; a model with terminal states is rolled
twice, first without end to see where the episodes do end. For the cotangents (S, A, R) of the outputs, backward:

    (theta*, l, a*, e*) += gradient of <l + S_{t+1}, f> + R_t rho,      (nu*, l) += gradient of <a* + A_t, policy>

The adjoint l stays in place, so that memory beyond inputs and outputs does not grow with T. The gradient of shared
weights is summed along each tile of environments, tiles in order: the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
import warp as wp
from torch import Tensor

from sim2real.mdp import Noise
from sim2real.outside_program import Program, Tensors, Wanted, evaluate
from sim2real.params import Params
from sim2real.policy import Layers
from sim2real.simulators.warp_algebra import Vector, parts
from sim2real.simulators.warp_dual import adjoints, tangents
from sim2real.simulators.warp_graph import Node, as_node, constant, less, select
from sim2real.simulators.warp_kernels import in_slices
from sim2real.simulators.warp_native import Rows, Store, launch_array, read, tile_function, warp_function
from sim2real.simulators.warp_policy import (
    Network,
    PolicyFunctions,
    action_length,
    network_of,
    pack_weights,
    policy_functions,
)
from sim2real.simulators.warp_reader import run_function

TILE = 64
"""environments that a CPU thread takes through time together"""
SUMS = 1 << 23
"""numbers that the running sums of shared weights may take on a GPU: more threads than that allows share one"""
THREADED = 1 << 13
"""environment steps for each thread below which a launch on the CPU uses fewer threads"""

Run = Callable[[Params, Params, Layers, Tensor, Noise], tuple[Tensor, Tensor, Tensor, Tensor] | None]


@dataclass(frozen=True)
class KernelSource:
    """A model's functions as written, and the lengths and names they are read with."""

    step: Callable[..., Any]
    """theta, state, action, noise -> following, a vector like the state"""
    reward: Callable[..., Any] | None
    """theta, state, action, noise, following -> a number; None: the reward is not a kernel (here: 0)"""
    parameters: tuple[str, ...]
    """theta's components, in order"""
    state: int
    action: int
    noise: int


def closed_loop_run(
    source: KernelSource,
    pack: Callable[[Params, Tensor], Tensor],
    terminal: Callable[[Params, Tensor], Tensor] | None,
) -> Run:
    """The `run` of a `ClosedLoop`: `pack(theta, s0)` gives the parameters `[B or 1, P]`, terminal is the model's."""

    def run(
        theta: Params, nu: Params, layers: Layers, start: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        weights = layers.weights(nu)
        network = network_of(weights, layers.activations, head=layers.std == "head")
        if network is None or (network.widths[0], action_length(network)) != (source.state, source.action):
            return None
        acting = (noise.policy if layers.std else noise.policy[..., :0]).transpose(0, 1)
        inputs = (start, pack(theta, start), pack_weights(weights), noise.process.transpose(0, 1), acting)
        if any(
            x.dtype != start.dtype or x.device != start.device or x.shape[-2] not in (1, len(start)) for x in inputs
        ):
            return None
        rows = tuple(x.unsqueeze(0) for x in inputs)
        std = 0.0 if layers.std == "head" else float(layers.std)
        program = closed_loop_program(closed_loop_kernels(source, network, start.dtype), network, std)
        alive = start.new_ones(1).expand(*noise.process.shape[1::-1], 1)
        if terminal is not None:
            states = evaluate(program, *(x.detach() for x in rows), alive.unsqueeze(0))[0][0]
            over = torch.stack([terminal(theta, state) for state in states[:-1]])
            alive = (over.cumsum(0) == 0).to(start.dtype).unsqueeze(-1)
        states, actions, rewards = (y[0].transpose(0, 1) for y in evaluate(program, *rows, alive.unsqueeze(0)))
        return states, actions, rewards[..., 0], (alive[..., 0] > 0).transpose(0, 1)

    return run


# Kernels -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """`(first, tiles, width, batch, steps, wanted, std, *arrays)`: the policy's arrays, then the model's."""

    value: Any
    push: Any
    pull: Any
    second: Any


@cache
def closed_loop_kernels(source: KernelSource, network: Network, precision: torch.dtype) -> Kernels:
    """The kernels of a model and the shape of a policy; compiled when first launched."""
    policy, model = policy_functions(network, precision), _model_tiles(source, precision)
    return Kernels(
        _kernel(policy.value, model.value, backward=False),
        _kernel(policy.push, model.push, backward=False),
        _kernel(policy.pull, model.pull, backward=True),
        _kernel(policy.second, model.second, backward=True),
    )


def _kernel(policy: Any, model: Any, *, backward: bool) -> Any:
    """One thread takes a tile through time: the policy acts, then the model moves; backward the other way round."""
    acting = {f"p_{name}": kind for name, kind in list(policy.input_types.items())[7:]}
    moving = {f"m_{name}": kind for name, kind in list(model.input_types.items())[4:]}
    std = policy.input_types["std"]
    calls = [
        f"policy(copy, time, low, high, block, wanted, std, {', '.join(acting)})",
        f"model(copy, time, low, high, {', '.join(moving)})",
    ]
    lines = [
        "index = first + wp.tid()",
        "copy = index // tiles",
        "block = index % tiles",
        "low = block * width",
        "high = wp.min(low + width, batch)",
        "for k in range(steps):",
        "    time = " + ("steps - 1 - k" if backward else "k"),
        *(f"    {call}" for call in (reversed(calls) if backward else calls)),
    ]
    types = dict.fromkeys(("first", "tiles", "width", "batch", "steps", "wanted"), wp.int32) | {"std": std}
    names = {"policy": policy, "model": model}
    name = f"{policy.key}_{model.key}"
    return warp_function(
        "@wp.kernel(enable_backward=False, module='unique')", name, types | acting | moving, "\n    ".join(lines), names
    )


def _model_tiles(source: KernelSource, precision: torch.dtype) -> PolicyFunctions:
    """Step and reward over rows of environments, with what is held and worth nothing after the end.

    value    theta, state, action, noise, alive, state_out, reward_out
    push     theta, d_theta, ..., noise, d_noise, alive, d_state_out, d_reward_out
    pull     theta, ..., alive, by_state, by_action, by_reward, adjoint, theta*, adjoint*, g, noise*
    second   theta, d_theta, ..., alive, the cotangents, adjoint, d_adjoint, the same outputs, each with its d_

    g is the whole cotangent of the action. theta, its gradient, the adjoints and g have no time axis.
    """
    lengths = {"theta": len(source.parameters), "state": source.state, "action": source.action, "noise": source.noise}
    rows = [Rows(name, length, name != "theta") for name, length in lengths.items()]
    d_rows = [Rows(f"d_{row.name}", row.length, row.timed) for row in rows]
    ends = Rows("alive", 1)
    x, d = [read(row) for row in rows], [read(row) for row in d_rows]
    y = _outcome(source, x, read(ends)[0])
    dy = tangents(y, dict(zip(chain(*x), chain(*d), strict=True)))
    n = source.state
    cotangents = [Rows("by_state", n), Rows("by_action", source.action), Rows("by_reward", 1)]
    d_cotangents = [Rows(f"by_d_{row.name[3:]}", row.length) for row in cotangents]
    adjoint, d_adjoint = Rows("adjoint", n, False), Rows("d_adjoint", n, False)

    def arriving(cotangents: list[Rows], adjoint: Rows) -> list[Node]:
        by_state, _, by_reward = (read(row) for row in cotangents)
        return [*(a + b for a, b in zip(by_state, read(adjoint), strict=True)), *by_reward]

    def stores(prefix: str, grads: Sequence[Node], by_action: Rows) -> list[Store]:
        flat = iter(grads)
        theta, state, action, noise = ([next(flat) for _ in row] for row in x)
        g = [a + b for a, b in zip(action, read(by_action), strict=True)]
        return [
            Store(Rows(f"{prefix}theta", lengths["theta"], False), tuple(theta), grow=True),
            Store(Rows(f"{prefix}adjoint", n, False), tuple(state)),
            Store(Rows(f"{prefix}g", source.action, False), tuple(g)),
            Store(Rows(f"{prefix}noise", source.noise), tuple(noise)),
        ]

    l, m = arriving(cotangents, adjoint), arriving(d_cotangents, d_adjoint)
    pulled = adjoints(y, l, list(chain(*x)))
    second = adjoints([*y, *dy], [*l, *m], list(chain(*x, *d)))
    half = len(second) // 2
    both = zip(
        stores("", second[:half], cotangents[1]), stores("d_", second[half:], d_cotangents[1]), strict=True
    )  # fmt: skip
    paired = list(chain(*zip(rows, d_rows, strict=True)))
    outputs = lambda prefix, values: [
        Store(Rows(f"{prefix}state", n), tuple(values[:n])), Store(Rows(f"{prefix}reward", 1), tuple(values[n:]))
    ]  # fmt: skip
    tile = lambda kind, reads, writes: tile_function(f"loop_{kind}", reads, writes, precision)
    all_cotangents = list(chain(*zip(cotangents, d_cotangents, strict=True)))
    return PolicyFunctions(
        tile("value", [*rows, ends], outputs("", y)),
        tile("push", [*paired, ends], outputs("d_", dy)),
        tile("pull", [*rows, ends, *cotangents, adjoint], stores("", pulled, cotangents[1])),
        tile("second", [*paired, ends, *all_cotangents, adjoint, d_adjoint], list(chain(*both))),
    )


def _outcome(source: KernelSource, x: list[tuple[Node, ...]], alive: Node) -> list[Node]:
    """The next state and, after it, the reward."""
    theta, state, action, noise = (Vector(row) for row in x)
    arguments = (Vector(theta.items, source.parameters), state, action, noise)
    following = parts(run_function(source.step, arguments, {}))
    reward = constant(0.0)
    if source.reward is not None:
        reward = as_node(parts(run_function(source.reward, (*arguments, Vector(tuple(following))), {}))[0])
    lives = less(0.0, alive)
    held = [select(lives, as_node(new), old) for new, old in zip(following, x[1], strict=True)]
    return [*held, select(lives, reward, 0.0)]


# Passes over time ----------------------------------------------------------------------------------------------------


def closed_loop_program(kernels: Kernels, network: Network, std: float) -> Program:
    """Inputs s_0 `[C, B, n]`, theta `[C, B or 1, P]`, nu `[C, B or 1, W]`, noises `[C, T, B, k]`, alive `[C, T, B, 1]`.

    Outputs states `[C, T+1, B, n]`, actions `[C, T, B, m]`, rewards `[C, T, B, 1]`.
    """
    m = action_length(network)

    def value(x: Tensors) -> Tensors:
        start, theta, weights, noise, acting, alive = x
        C, (T, B) = _copies(x), alive.shape[1:3]
        states, actions, rewards = (
            _empty(start, C, *shape) for shape in ((T + 1, B, start.shape[-1]), (T, B, m), (T, B, 1))
        )
        states[:, 0] = start
        now, following = states[:, :-1], states[:, 1:]
        arrays = (weights, now, acting, actions, theta, now, actions, noise, alive, following, rewards)
        _launch(kernels.value, 0, std, arrays, actions, _tile(weights, B))
        return states, actions, rewards

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        C, B = _copies((*x, *dx, *y)), y[1].shape[2]
        d_states, d_actions, d_rewards = (_empty(t, C, *t.shape[1:]) for t in y)
        d_states[:, 0] = dx[0]
        now = (y[0][:, :-1], d_states[:, :-1])
        acting = (x[2], dx[2], *now, x[4], dx[4], d_actions)
        moving = (x[1], dx[1], *now, y[1], d_actions, x[3], dx[3], x[5], d_states[:, 1:], d_rewards)
        _launch(kernels.push, 0, std, (*acting, *moving), d_actions, _tile(x[2], B))
        return d_states, d_actions, d_rewards

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        C, B = _copies((*x, *y, *g)), y[1].shape[2]
        tile = _tile(x[2], B)
        into = _gradients(x, wanted, C, B, tile)
        adjoint, by_theta, by_weights, by_noise, by_acting = into
        by_action = _empty(x[0], C, B, m)
        now = y[0][:, :-1]
        acting = (x[2], now, x[4], by_action, by_weights, adjoint, by_acting)
        moving = (x[1], now, y[1], x[3], x[5], g[0][:, 1:], g[1], g[2], adjoint, by_theta, adjoint, by_action, by_noise)
        _launch(kernels.pull, int(wanted[2]), std, (*acting, *moving), y[1].expand(C, -1, -1, -1), tile)
        adjoint.add_(g[0][:, 0])
        return _chosen(x, into, wanted)

    def second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
        x, dx, y, dy, g, h = arguments
        C, B = _copies([t for part in arguments for t in part]), y[1].shape[2]
        tile = _tile(x[2], B)
        into, d_into = _gradients(x, wanted[:6], C, B, tile), _gradients(dx, wanted[6:], C, B, tile)
        (adjoint, d_adjoint), by_theta, by_weights, by_noise, by_acting = zip(into, d_into, strict=True)
        by_action = (_empty(x[0], C, B, m), _empty(x[0], C, B, m))
        now = (y[0][:, :-1], dy[0][:, :-1])
        acting = (x[2], dx[2], *now, x[4], dx[4], *by_action, *by_weights, adjoint, d_adjoint, *by_acting)
        cotangents = (g[0][:, 1:], h[0][:, 1:], g[1], h[1], g[2], h[2], adjoint, d_adjoint)
        outputs = (*by_theta, adjoint, d_adjoint, *by_action, *by_noise)
        moving = (x[1], dx[1], *now, y[1], dy[1], x[3], dx[3], x[5], *cotangents, *outputs)
        flags = int(wanted[2]) + 2 * int(wanted[8])
        _launch(kernels.second, flags, std, (*acting, *moving), y[1].expand(C, -1, -1, -1), tile)
        adjoint.add_(g[0][:, 0])
        d_adjoint.add_(h[0][:, 0])
        return (*_chosen(x, into, wanted[:6]), *_chosen(dx, d_into, wanted[6:]))

    return Program(value, push, pull, second)


def _copies(tensors: Sequence[Tensor]) -> int:
    return max(t.shape[0] for t in tensors)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """A new array `[..., B, n]` with the environments side by side."""
    return like.new_empty(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def _tile(weights: Tensor, batch: int) -> int:
    """Environments per thread: many on a CPU; on a GPU as few as the running sums of shared weights allow."""
    if weights.device.type == "cpu":
        return TILE
    return 1 if weights.shape[1] == batch else max(1, -(-batch * weights.shape[-1] // SUMS))


def _gradients(x: Tensors, wanted: Wanted, copies: int, batch: int, tile: int) -> Tensors:
    """Zeros to add to or write, weights per tile or environment; what is not wanted goes into one row over and over."""
    start, theta, weights, noise, acting, _ = x
    rows = batch if weights.shape[1] == batch else -(-batch // tile)
    sums = [_empty(start, copies, batch, t.shape[-1]).zero_() for t in (start, theta)]
    shape = (copies, rows, weights.shape[-1])
    sums.append(start.new_zeros(shape) if wanted[2] else start.new_zeros(1, 1, 1).expand(shape))
    for tensor, want in zip((noise, acting), wanted[3:5], strict=True):
        steps, length = tensor.shape[1], tensor.shape[-1]
        rooms = _empty(start, copies, steps if want else 1, batch, length).zero_()
        sums.append(rooms.expand(-1, steps, -1, -1))
    return tuple(sums)


def _chosen(x: Tensors, grads: Tensors, wanted: Wanted) -> Tensors:
    """The wanted gradients, summed over environments that share theta or the weights; alive has none."""
    found = list(grads)
    for k in (1, 2):
        if x[k].shape[1] == 1 < grads[k].shape[1]:
            found[k] = grads[k].sum(1, keepdim=True)
    found.append(x[0].new_zeros(1).expand(len(grads[0]), *x[5].shape[1:]))
    return tuple(grad for grad, want in zip(found, wanted, strict=True) if want)


def _launch(kernel: Any, wanted: int, std: float, arrays: Sequence[Tensor], like: Tensor, tile: int) -> None:
    """Run a kernel over copies and tiles of environments; `like [C, T, B, m]`."""
    C, T, B = like.shape[:3]
    if C * B == 0:
        return
    tiles = -(-B // tile)
    described = [_describe(array, C, B) for array in arrays]
    numbers = [tiles, tile, B, T, wanted, std]
    if like.device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(like.device))
        device = wp.device_from_torch(like.device)
        wp.launch(kernel, dim=C * tiles, inputs=[0, *numbers, *described], device=device, stream=stream)
        return

    def run(first: int, last: int) -> None:
        wp.launch(kernel, dim=last - first, inputs=[first, *numbers, *described], device="cpu")

    threads = max(1, min(torch.get_num_threads(), C * tiles, C * B * T // THREADED))
    in_slices(kernel, run, C * tiles, threads)


def _describe(array: Tensor, copies: int, batch: int) -> Any:
    """The array with every copy and environment; what they share is repeated with stride 0."""
    rows = batch if array.shape[-2] == 1 else array.shape[-2]
    array = array.expand(copies, *array.shape[1:-2], rows, array.shape[-1])
    return launch_array(array)
