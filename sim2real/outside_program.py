"""Programs outside torch as functions of torch, exact to second order under `autograd` and `torch.func`.

A program knows, for y = f(x), its value and three products, each one pass outside torch:

    push     dy = J dx                                       J = df/dx
    pull     J' g
    second   gradients, by x and by dx, of  <g, f(x)> + <h, J(x) dx>

`second` is what reverse mode makes of the pair (y, dy) on dual numbers. It is all that second order needs:

    d/dx <u, J' g> = second by x at (dx = u, g = 0, h = g),      d/dg <u, J' g> = J u,
    forward over reverse: d(J' g) along (dx, dg) = second by x at (dx, g = dg, h = g).

Third order, and forward mode over forward mode, raise `DerivativeOrderError`.

Every tensor has a leading axis of copies, of length 1 (shared by all copies) or C. `vmap` folds its batch into that
axis, so what it did not batch is not copied either.
Reference: Griewank and Walther, Evaluating Derivatives, 2008, 5.1 (forward over reverse).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals, saved, undifferentiated

Tensors = tuple[Tensor, ...]
Wanted = tuple[bool, ...]


class DerivativeOrderError(RuntimeError):
    """A derivative was asked for that the program cannot give: third order, or forward mode over forward mode."""


@dataclass(frozen=True, eq=False)
class Program:
    """y = f(x) and its products outside torch; inputs x and outputs y are tuples of tensors `[C, ...]` or `[1, ...]`.

    Every function gets plain tensors without a graph, must not write to them, and returns new tensors `[C, ...]`, where
    C is the largest number of copies among its arguments. The outputs y are handed back to save work.
    """

    value: Callable[[Tensors], Tensors]
    """x -> y"""
    push: Callable[[Tensors, Tensors, Tensors], Tensors]
    """x, dx, y -> dy"""
    pull: Callable[[Tensors, Tensors, Tensors, Wanted], Tensors]
    """x, y, g, wanted -> J' g of the wanted inputs"""
    second: Callable[[tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors], Wanted], Tensors]
    """(x, dx, y, dy, g, h), wanted -> gradients by the wanted of (x, dx) of `<g, y> + <h, dy>`"""


def evaluate(program: Program, *inputs: Tensor) -> Tensors:
    """Outputs of the program, differentiable to second order in every input."""
    if undifferentiated():
        return program.value(_plain(inputs))
    outputs: Tensors = _Value.apply(_Call(program, len(inputs)), *inputs)
    return outputs


@dataclass(frozen=True, eq=False)
class _Call:
    program: Program
    count: int
    """number of inputs"""
    wanted: Wanted = ()


class _Value(torch.autograd.Function):
    """x -> y."""

    @staticmethod
    def forward(call: _Call, *x: Tensor) -> Tensors:
        return call.program.value(_plain(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _keep(ctx, (*inputs, *output))

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        if all(cotangent is None for cotangent in g):  # as when only a product that was given y is differentiated
            return (None,) * (1 + ctx.call.count)
        call, plain = ctx.call, undifferentiated()
        tensors = _plain(ctx.saved_tensors) if plain else saved(ctx)
        x, y, wanted = tensors[: call.count], tensors[call.count :], ctx.needs_input_grad[1:]
        if not plain:
            return None, *_pull(call.program, x, y, _filled(g, y), wanted)
        return None, *_fitted(call.program.pull(x, y, _plain(_filled(g, y)), wanted), x, wanted)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *dx: Tensor | None) -> Tensors:
        call, tensors = ctx.call, primals(ctx)
        x, y = tensors[: call.count], tensors[call.count :]
        return _push(call.program, x, y, _filled(dx, x))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> Any:
        return _fold(_Value, info, in_dims, call, tensors)


class _Push(torch.autograd.Function):
    """x, y, dx -> dy; y is what `_Value` gave for x, not a variable of its own."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensors:
        x, y, dx = _split(_plain(tensors), call.count, -call.count)
        return call.program.push(x, dx, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _keep(ctx, (*inputs, *output))

    @staticmethod
    def backward(ctx: Any, *h: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, m = ctx.call, saved(ctx), len(h)
        (x, y, dx), dy = _split(tensors[:-m], call.count, -call.count), tensors[-m:]
        cotangents = _filled(h, dy)
        by_x, _, by_dx = _split(ctx.needs_input_grad[1:], call.count, -call.count)
        if any(by_x):
            grads = _second(call.program, (x, dx, y, dy, _zeros(y), cotangents), (*by_x, *by_dx))
        else:
            grads = (None,) * len(x) + _pull(call.program, x, y, cotangents, by_dx, like=dx)
        return None, *grads[: call.count], *(None for _ in y), *grads[call.count :]

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        call = ctx.call
        tensors = primals(ctx)[: len(tangents)]
        x, y, dx = _split(tensors, call.count, -call.count)
        if any(t is not None for t in tangents[: call.count]):
            raise DerivativeOrderError(
                "forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not available through this model; "
                "use reverse mode for one of the two: torch.func.hessian, jvp of grad, or grad of jvp"
            )
        return _push(call.program, x, y, _filled(tangents[-call.count :], dx))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> Any:
        return _fold(_Push, info, in_dims, call, tensors)


class _Pull(torch.autograd.Function):
    """x, y, g -> J' g of the wanted inputs; y as in `_Push`."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensors:
        x, y, g = _thirds(_plain(tensors), call.count)
        return call.program.pull(x, y, g, call.wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        x, y, g = _thirds(saved(ctx), call.count)
        by_x = _thirds(ctx.needs_input_grad[1:], call.count)[0]
        rows = iter(u)
        dx = tuple(next(rows) if wanted else None for wanted in call.wanted)
        dx = _filled(dx, x)
        dy = _push(call.program, x, y, dx)
        grads: tuple[Tensor | None, ...] = (None,) * call.count
        if any(by_x):
            none = (False,) * call.count
            grads = _second(call.program, (x, dx, y, dy, _zeros(y), g), (*by_x, *none))[: call.count]
        return None, *grads, *(None for _ in y), *(_fit(d, like) for d, like in zip(dy, g, strict=True))

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        call = ctx.call
        x, y, g = _thirds(primals(ctx), call.count)
        dx, dy, dg = _thirds(tangents, call.count)
        if all(t is None for t in dx):
            return _Pull.apply(call, *x, *y, *_filled(dg, g))
        dx = _filled(dx, x)
        if any(t is None for t in dy):
            dy = _push(call.program, x, y, dx)
        none = (False,) * call.count
        grads = _second(call.program, (x, dx, y, dy, _filled(dg, g), g), (*call.wanted, *none), fit=False)
        return tuple(grad for grad in grads if grad is not None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> Any:
        return _fold(_Pull, info, in_dims, call, tensors)


class _Second(torch.autograd.Function):
    """x, dx, y, dy, g, h -> the wanted gradients of `<g, y> + <h, dy>`.

    They are linear in dx and in g, and may be differentiated by these: so a product is transposed. By x and h it would
    be third order; `_second` sees to it that this raises.
    """

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensors:
        return call.program.second(_sixths(_plain(tensors), call.count), call.wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Tensor | None, ...]:
        call, n = ctx.call, ctx.call.count
        x, dx, y, _, g, h = _sixths(saved(ctx), n)
        rows = iter(u)
        by_x = [next(rows) if wanted else None for wanted in call.wanted[:n]]  # by_dx = J' h has neither dx nor g
        none: tuple[Tensor | None, ...] = (None,) * n
        if all(row is None for row in by_x):
            return None, *none, *none, *(None for _ in (*y, *y, *g, *h))
        ux = _filled(by_x, x)
        uy = _push(call.program, x, y, ux)
        needed = tuple(ctx.needs_input_grad[1 + n : 1 + 2 * n])
        if any(needed):
            none = _second(call.program, (x, ux, y, uy, _zeros(y), h), (*needed, *(False,) * n), like=dx)[:n]
        by_g = (_fit(d, like) for d, like in zip(uy, g, strict=True))
        return None, *(None for _ in x), *none, *(None for _ in (*y, *y)), *by_g, *(None for _ in h)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Any:
        raise _third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> Any:
        return _fold(_Second, info, in_dims, call, tensors)


class _Limit(torch.autograd.Function):
    """Zero, with derivatives that raise: added to what must not be differentiated by these tensors."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise _third_order()

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Any:
        raise _third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, None]:
        return _Limit.apply(*tensors), None


def _third_order() -> DerivativeOrderError:
    return DerivativeOrderError(
        "third derivatives are not available through this model: it is exact to second order (derivative_order = 2); "
        "detach one factor, or use the torch model"
    )


def _push(program: Program, x: Tensors, y: Tensors, dx: Tensors) -> Tensors:
    dy: Tensors = _Push.apply(_Call(program, len(x)), *x, *y, *dx)
    return dy


def _pull(
    program: Program, x: Tensors, y: Tensors, g: Tensors, wanted: Wanted, *, like: Tensors | None = None
) -> tuple[Tensor | None, ...]:
    """J' g for every input, None where not wanted, summed over the copies that share the input."""
    return _fitted(_Pull.apply(_Call(program, len(x), tuple(wanted)), *x, *y, *g), like or x, wanted)


def _second(
    program: Program,
    arguments: tuple[Tensors, ...],
    wanted: Wanted,
    *,
    fit: bool = True,
    like: Tensors | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients by x and dx, None where not wanted, summed over the copies that share x and dx (or `like`)."""
    tensors = [t for part in arguments for t in part]
    found = _Second.apply(_Call(program, len(arguments[0]), tuple(wanted)), *tensors)
    if torch.is_grad_enabled():
        limit = _Limit.apply(*arguments[0], *arguments[5])
        found = tuple(grad + limit for grad in found)
    grads = iter(found)
    shapes = zip((*(like or arguments[0]), *arguments[1]), wanted, strict=True)
    return tuple((_fit(next(grads), t) if fit else next(grads)) if want else None for t, want in shapes)


def _keep(ctx: Any, values: tuple[Any, ...]) -> None:
    ctx.call, *tensors = values
    ctx.set_materialize_grads(False)  # None says that there is no tangent; zeros would cost a pass
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _split(values: Sequence[Any], first: int, last: int) -> tuple[Any, Any, Any]:
    return tuple(values[:first]), tuple(values[first:last]), tuple(values[last:])


def _sixths(values: Sequence[Any], count: int) -> tuple[Any, Any, Any, Any, Any, Any]:
    """x, dx, y, dy, g, h."""
    x, dx, rest = tuple(values[:count]), tuple(values[count : 2 * count]), tuple(values[2 * count :])
    m = len(rest) // 4
    return x, dx, rest[:m], rest[m : 2 * m], rest[2 * m : 3 * m], rest[3 * m :]


def _thirds(values: Sequence[Any], count: int) -> tuple[Any, Any, Any]:
    """x, y and as many of what belongs to y."""
    half = (len(values) - count) // 2
    return tuple(values[:count]), tuple(values[count : count + half]), tuple(values[count + half :])


def _plain(tensors: Sequence[Tensor]) -> Tensors:
    return tuple(t.detach() for t in tensors)


def _zeros(tensors: Sequence[Tensor]) -> Tensors:
    """Zeros of the same shapes that take no memory: one row, expanded."""
    return tuple(t.new_zeros(t.shape[-1:]).expand(t.shape) for t in tensors)


def _filled(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    return tuple(_zeros((x,))[0] if t is None else t for t, x in zip(tangents, like, strict=True))


def _fitted(found: Tensors, like: Tensors, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """The gradients of the wanted inputs in their places, summed over the copies that share an input."""
    grads = iter(found)
    return tuple(_fit(next(grads), t) if want else None for t, want in zip(like, wanted, strict=True))


def _fit(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the copies that share `like`."""
    return grad.sum(0, keepdim=True) if like.shape[0] == 1 < grad.shape[0] else grad


def _fold(function: Any, info: Any, in_dims: tuple[Any, ...], call: _Call, tensors: Sequence[Tensor]) -> Any:
    """Apply `function` with the batch of vmap folded into the copies: `[V, C, ...] -> [V C, ...]`."""
    dims = in_dims[1:]
    copies = max(t.shape[1 if d == 0 else 0] for t, d in zip(tensors, dims, strict=True))
    outputs = function.apply(call, *(_merge(t, d, info.batch_size, copies) for t, d in zip(tensors, dims, strict=True)))
    return tuple(y.unflatten(0, (info.batch_size, copies)) for y in outputs), (0,) * len(outputs)


def _merge(tensor: Tensor, dim: int | None, batch: int, copies: int) -> Tensor:
    if dim is None and tensor.shape[0] == 1:
        return tensor
    rows = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return rows.expand(batch, copies, *rows.shape[2:]).flatten(0, 1)
