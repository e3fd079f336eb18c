"""The `Program`s of a step, a rollout and a reward: which arrays each pass over time reads and writes.

With s_0 given and s_{t+1} = f(theta, s_t, a_t, e_t),

    value    t = 0 .. T-1    s_{t+1} = f(...)
    push     t = 0 .. T-1    ds_{t+1} = df(...)                                   f on dual numbers
    pull     t = T-1 .. 0    l <- (df/ds)' (l + g_{t+1}),  theta* += (df/dtheta)' (l + g_{t+1}),  likewise a_t*, e_t*
    second   t = T-1 .. 0    the same for the pair (s, ds)

The adjoint l stays in one row per environment: memory beyond inputs and outputs does not grow with T. New arrays
are component-major, viewed as `[C, T, B, n]`: environments lie side by side in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sim2real.outside_program import Program, Tensors, Wanted
from sim2real.simulators.warp_kernels import launch, over_time
from sim2real.simulators.warp_tiles import Tiles


def roll_program(tiles: Tiles, *, whole: bool) -> Program:
    """(theta `[C, B, p]`, start `[C, B, n]`, actions `[C, T, B, m]`, noise `[C, T, B, k]`) -> (states,).

    tiles of a step with theta summed, the state carried, action and noise each. whole: the states are `[C, T+1, B, n]`,
    the first is the start; else T = 1 and they are `[C, 1, B, n]`, the next.
    """

    def before(start: Tensor, states: Tensor) -> Tensor:
        return states[:, :-1] if whole else start.unsqueeze(1)

    def after(states: Tensor) -> Tensor:
        return states[:, 1:] if whole else states

    def blank(start: Tensor, steps: int, arguments: Sequence[Tensor]) -> Tensor:
        states = _empty(start, (_copies(arguments), steps + whole, *start.shape[1:]))
        if whole:
            states[:, 0] = start
        return states

    def value(x: Tensors) -> Tensors:
        theta, start, actions, noise = x
        states = blank(start, actions.shape[1], x)
        _run(tiles.value, (theta, before(start, states), actions, noise, after(states)), after(states))
        return (states,)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        d_states = blank(dx[1], x[2].shape[1], (*x, *dx, *y))
        arrays = _alternate(_with_state(x, before(x[1], y[0])), _with_state(dx, before(dx[1], d_states)))
        _run(tiles.push, (*arrays, after(d_states)), after(d_states))
        return (d_states,)

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        grads = _gradients(x, (*x, *y, *g), wanted)
        arrays = (*_with_state(x, before(x[1], y[0])), after(g[0]), grads[1], *grads)
        _run(tiles.pull, arrays, grads[2], backward=True)
        if whole:
            grads[1].add_(g[0][:, 0])
        return _chosen(grads, wanted)

    def second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
        x, dx, y, dy, g, h = arguments
        every = [t for part in arguments for t in part]
        grads, d_grads = _gradients(x, every, wanted[:4]), _gradients(dx, every, wanted[4:])
        inputs = _alternate(_with_state(x, before(x[1], y[0])), _with_state(dx, before(dx[1], dy[0])))
        adjoints = (after(g[0]), after(h[0]), grads[1], d_grads[1])
        _run(tiles.second, (*inputs, *adjoints, *_alternate(grads, d_grads)), grads[2], backward=True)
        if whole:
            grads[1].add_(g[0][:, 0])
            d_grads[1].add_(h[0][:, 0])
        return _chosen((*grads, *d_grads), wanted)

    return Program(value, push, pull, second)


def reward_program(tiles: Tiles) -> Program:
    """(theta, state, action, noise, following, all `[C, 1, B, ...]`) -> (reward `[C, 1, B, 1]`,).

    tiles of a reward with every argument each.
    """

    def blank(x: Tensors, arguments: Sequence[Tensor]) -> Tensor:
        return x[0].new_empty(_copies(arguments), *x[0].shape[1:3], 1)

    def value(x: Tensors) -> Tensors:
        reward = blank(x, x)
        _run(tiles.value, (*x, reward), reward)
        return (reward,)

    def push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
        d_reward = blank(x, (*x, *dx))
        _run(tiles.push, (*_alternate(x, dx), d_reward), d_reward)
        return (d_reward,)

    def pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
        grads = _room(x, (*x, *g), wanted)
        _run(tiles.pull, (*x, *g, *grads), grads[0], backward=True)
        return _chosen(grads, wanted)

    def second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
        x, dx, _, _, g, h = arguments
        every = (*x, *dx, *g, *h)
        grads, d_grads = _room(x, every, wanted[:5]), _room(dx, every, wanted[5:])
        _run(tiles.second, (*_alternate(x, dx), *g, *h, *_alternate(grads, d_grads)), grads[0], backward=True)
        return _chosen((*grads, *d_grads), wanted)

    return Program(value, push, pull, second)


def _run(tile: object, arrays: Sequence[Tensor], like: Tensor, *, backward: bool = False) -> None:
    """Launch over the copies, steps and environments of `like [C, T, B, ...]`."""
    copies, steps, batch = like.shape[:3]
    launch(over_time(tile, backward=backward), arrays, copies=copies, batch=batch, steps=steps)


def _with_state(x: Tensors, states: Tensor) -> Tensors:
    return x[0], states, x[2], x[3]


def _alternate(tensors: Tensors, tangents: Tensors) -> Tensors:
    return tuple(t for pair in zip(tensors, tangents, strict=True) for t in pair)


def _copies(tensors: Sequence[Tensor]) -> int:
    return max(t.shape[0] for t in tensors)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A new array `[..., B, n]` with the environments side by side."""
    *axes, batch, length = shape
    return like.new_empty(*axes, length, batch).transpose(-1, -2)


def _gradients(x: Tensors, arguments: Sequence[Tensor], wanted: Wanted) -> Tensors:
    """Where a roll adds up the gradients by theta and the start, and writes those by actions and noise."""
    sums = tuple(_empty(t, (_copies(arguments), *t.shape[1:])).zero_() for t in x[:2])
    return *sums, *_room(x[2:], arguments, wanted[2:])


def _room(x: Tensors, arguments: Sequence[Tensor], wanted: Wanted) -> Tensors:
    """Where gradients `[C, T, B, ...]` are written; those not wanted all into the row of one time."""
    copies = _copies(arguments)
    rows = zip(x, wanted, strict=True)
    return tuple(
        _empty(t, (copies, t.shape[1] if want else 1, *t.shape[2:])).expand(-1, t.shape[1], -1, -1) for t, want in rows
    )


def _chosen(grads: Tensors, wanted: Wanted) -> Tensors:
    return tuple(grad for grad, want in zip(grads, wanted, strict=True) if want)
