"""Warp's kernel language, read from a user's function: one step written once, exact to second order.

`translate` runs the body of a plain Python function (or `wp.func`) on graphs of real numbers (`warp_graph`), takes its
tangent and the adjoints of both (`warp_dual`) and hands them back as Warp functions in float32 or float64
(`warp_native`). A body may hold

- numbers, `wp.vector`, `wp.vec2/3/4`, `wp.quat`, matrices, and the functions in `warp_builtins.FUNCTIONS`;
- `if`, conditional expressions, early `return`; `for` over a `range` that is known beforehand, which is unrolled;
- calls of other such functions, also of closures, with one result or several;
- numbers from globals and closures: constants of the model's precision. Integers are Python's: `1 / 2` is 0.5.

Both sides of an `if` are computed and one is chosen; the derivative of the other never enters, not even as nan. What
is not known is a `WarpLanguageError` that names the file, the line, what was found and what to write instead.

Why loops of variable length are refused, and why nothing is left to Warp's own adjoint. In the reverse pass of Warp
(1.19) the body of a dynamic loop is replayed once, without the jump back: what a loop leaves behind is, for all that
follows, the value after a single iteration, and inside it a carried variable does not have the value it had. So sums
that nothing reads (`s += x * x`) are right; wrong without a word are products (`s = s * x`), states carried in a local,
a `break`, constant loops longer than the `max_unroll` of the module, a loop that overwrites an array, and any second
loop that reads what a first one computed. That one gives zeros where the first iteration leaves zero: a count that
bounds it, or `for j in range(n): s += float(j)` before `for j in range(n): p += s * x`. Here a loop is unrolled or
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from sim2real.simulators.warp_algebra import Vector, describe, is_number, parts
from sim2real.simulators.warp_dual import adjoints, tangents
from sim2real.simulators.warp_expressions import WarpLanguageError
from sim2real.simulators.warp_graph import Node, as_node, variable
from sim2real.simulators.warp_native import native_function, scalar_type, unstacked
from sim2real.simulators.warp_reader import run_function

__all__ = ["Argument", "Translated", "WarpLanguageError", "grouped", "translate"]


@dataclass(frozen=True)
class Argument:
    """An argument of a step or reward: a vector of `length` components, or a scalar for None.

    `fields` names the components (`theta.mass`); an argument that is not `active` has no tangent in the dual. Length 0
    is an argument without components (no noise): its Warp type has one that is not used.
    """

    name: str
    length: int | None
    fields: tuple[str, ...] | None = None
    active: bool = True


@dataclass(frozen=True)
class Translated:
    """A function as Warp functions `primal(x, ...) -> y` and `dual(x, dx, ...) -> y, dy`, each with its exact adjoint.

    An inactive x goes without its dx. `inputs` and `moves` are the components of the arguments and of their tangents as
    graph inputs, `value` is the graph of the result: what `warp_tiles` derives its passes from.
    """

    name: str
    arguments: tuple[Argument, ...]
    length: int | None  # components of the result, None for a scalar
    precision: torch.dtype
    primal: Any
    dual: Any
    inputs: tuple[tuple[Node, ...], ...]
    moves: tuple[tuple[Node, ...], ...]
    value: tuple[Node, ...]


def translate(
    function: Callable[..., Any], arguments: tuple[Argument, ...], *, precision: torch.dtype = torch.float64
) -> Translated:
    """Read a function written in Warp's language and return it, with its derivatives, in the given precision.

    `function(x, ...)` takes the declared arguments in order and returns a number or a vector. Raises
    `WarpLanguageError` with file and line for what cannot be translated.
    """
    scalar_type(precision)  # refuses others before the function is read
    inputs = [_components(argument, f"x_{argument.name}") for argument in arguments]
    moves = [_components(argument, f"d_{argument.name}") if argument.active else () for argument in arguments]
    values = [
        xs[0] if argument.length is None else Vector(xs, argument.fields or ())
        for argument, xs in zip(arguments, inputs, strict=True)
    ]
    result = run_function(function, values, {})
    name = getattr(function, "__name__", "function")
    if not (is_number(result) or isinstance(result, Vector)):
        raise WarpLanguageError(f"{name} returns {describe(result)}; return a number or wp.vector(...)")
    length = len(result.items) if isinstance(result, Vector) else None
    value = tuple(as_node(item) for item in parts(result))
    primal, dual = _functions(name, arguments, inputs, moves, length, value, precision)
    return Translated(name, arguments, length, precision, primal, dual, tuple(inputs), tuple(moves), value)


def _functions(
    name: str,
    arguments: Sequence[Argument],
    inputs: Sequence[Sequence[Node]],
    moves: Sequence[Sequence[Node]],
    length: int | None,
    value: Sequence[Node],
    precision: torch.dtype,
) -> tuple[Any, Any]:
    """The primal and the dual as Warp functions."""
    signature = tuple((f"x_{argument.name}", argument.length) for argument in arguments)
    replies = [variable("adj_ret" if length is None else f"adj_ret[{k}]") for k in range(len(value))]
    pulled = adjoints(value, replies, list(chain(*inputs)))
    primal = native_function(f"{name}_primal", signature, length, value, grouped(pulled, inputs), precision)

    both, rows = [], []
    for argument, xs, ds in zip(arguments, inputs, moves, strict=True):
        both.append((f"x_{argument.name}", argument.length))
        rows.append(xs)
        if argument.active:
            both.append((f"d_{argument.name}", argument.length))
            rows.append(ds)
    seeds = {x: d for xs, ds in zip(inputs, moves, strict=True) for x, d in zip(xs, ds, strict=False)}
    stack = [*value, *tangents(value, seeds)]
    replies = [variable(f"adj_ret[{k}]") for k in range(len(stack))]
    pulled = adjoints(stack, replies, list(chain(*rows)))
    stacked = native_function(f"{name}_stacked", tuple(both), len(stack), stack, grouped(pulled, rows), precision)
    return primal, unstacked(stacked, f"{name}_dual", tuple(both), length, precision)


def _components(argument: Argument, name: str) -> tuple[Node, ...]:
    if argument.length is None:
        return (variable(name),)
    return tuple(variable(f"{name}[{index}]") for index in range(argument.length))


def grouped(flat: Sequence[Node], like: Sequence[Sequence[Node]]) -> list[tuple[Node, ...]]:
    """A flat sequence cut into groups of the same lengths as `like`."""
    rest = iter(flat)
    return [tuple(next(rest) for _ in row) for row in like]
