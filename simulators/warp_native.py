"""Arithmetic graphs as Warp functions: native snippets, of one environment or of many side by side.

A function is known to Warp by a digest of its text: the same function translated twice, or in another process, is the
same code, and Warp's kernel cache stays warm.

    native_function   y = f(x, ...) of one environment, with its adjoint, for kernels that hold a state in registers
    tile_function     rows first <= i < last of arrays [copies, (time,) environments, components], read and written

The second computes several environments with one instruction on a CPU, fastest where environments lie side by side in
memory (component-major arrays, viewed with their last two axes swapped), and one on a GPU.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import warp as wp
from torch import Tensor

from sim2real.simulators.warp_graph import Node, is_constant, variable
from sim2real.simulators.warp_source import CTYPES, LANES, prelude, statements

# Warp greets and reports on standard output, which belongs to the results of commands; older releases read `quiet`.
for _name, _value in (("quiet", True), ("log_level", getattr(wp, "LOG_WARNING", 30))):
    setattr(wp.config, _name, _value)

_FARTHEST = 2**31 - 1
Signature = tuple[tuple[str, int | None], ...]  # names and lengths of arguments, None for a scalar


def scalar_type(precision: torch.dtype) -> Any:
    """The Warp scalar of a precision, `wp.float32` or `wp.float64`."""
    if precision not in CTYPES:
        raise ValueError(f"precision must be torch.float32 or torch.float64, got {precision}")
    return wp.float32 if precision == torch.float32 else wp.float64


def launch_array(array: Tensor) -> Any:
    """A tensor as an argument of a launch, a view; raises `ValueError` where its strides are beyond Warp's 32 bits."""
    strides = zip(array.shape, array.stride(), strict=True)
    farthest = max((stride for length, stride in strides if length > 1), default=0) * array.element_size()
    if farthest > _FARTHEST:
        raise ValueError(
            f"an array {list(array.shape)} has parts {farthest} bytes apart, Warp reaches {_FARTHEST}; "
            "take fewer environments or steps at once, or give vmap a chunk_size"
        )
    return wp.from_torch(array, dtype=scalar_type(array.dtype), requires_grad=False, return_ctype=True)


def vector_type(length: int | None, precision: torch.dtype) -> Any:
    """The Warp type of an argument: a vector, a scalar for None; length 0 becomes a vector of one unused component."""
    scalar = scalar_type(precision)
    return scalar if length is None else wp.types.vector(length=max(length, 1), dtype=scalar)


def native_function(
    name: str,
    arguments: Signature,
    length: int | None,
    value: Sequence[Node],
    adjoint: Sequence[Sequence[Node]],
    precision: torch.dtype,
) -> Any:
    """A Warp function of the named arguments whose components are `value`, a scalar for length None.

    `adjoint` holds, for each argument, what its adjoint gains, as graphs of the arguments and of `adj_ret`.
    """
    lines, outputs = statements(value, precision)
    lines = [prelude(value, precision, lanes=1), *lines]
    if length is None:
        lines.append(f"return {outputs[0]};")
    else:
        lines.append(f"wp::vec_t<{max(length, 1)}, T> result;")
        lines += [f"result[{index}] = {output};" for index, output in enumerate(outputs)]
        lines.append("return result;")
    gains = [gain for row in adjoint for gain in row]
    back, amounts = statements(gains, precision)
    back = [prelude(gains, precision, lanes=1), *back]
    targets = [
        f"adj_{argument}" if size is None else f"adj_{argument}[{index}]"
        for (argument, size), row in zip(arguments, adjoint, strict=True)
        for index in range(len(row))
    ]
    for target, amount, gain in zip(targets, amounts, gains, strict=True):
        if not is_constant(gain, 0.0):
            back.append(f"{target} += {amount};")
    return _native(name, arguments, length, "\n".join(lines) + "\n", "\n".join(back) + "\n", precision)


@cache
def _native(
    name: str, arguments: Signature, length: int | None, snippet: str, reverse: str, precision: torch.dtype
) -> Any:
    types = {argument: vector_type(size, precision) for argument, size in arguments}
    names = {"snippet": snippet, "reverse": reverse, "Result": vector_type(length, precision)}
    label = f"{name}_{_digest(snippet + reverse)}"
    return warp_function("@wp.func_native(snippet, reverse)", label, types, "...", names)


@cache
def unstacked(stacked: Any, name: str, arguments: Signature, length: int | None, precision: torch.dtype) -> Any:
    """A Warp function returning the two halves of what `stacked` returns: two vectors, two scalars for length None."""
    width = 1 if length is None else length
    halves = [[f"both[{k + half * width}]" for k in range(width)] for half in (0, 1)]
    values = [half[0] if length is None else f"Pair({', '.join(half)})" for half in halves]
    body = f"both = stacked({', '.join(argument for argument, _ in arguments)})\n    return {values[0]}, {values[1]}"
    names = {"stacked": stacked, "Pair": vector_type(width, precision)}
    types = {argument: vector_type(size, precision) for argument, size in arguments}
    return warp_function("@wp.func", f"{name}_{stacked.key.rpartition('_')[2]}", types, body, names)


@dataclass(frozen=True)
class Rows:
    """An array of a tile function: `[copies, time, environments, length]`, without the time axis if not timed."""

    name: str
    length: int
    timed: bool = True


@dataclass(frozen=True)
class Store:
    """Where results go: component k of row i is set to `values[k]`, or grows by it."""

    rows: Rows
    values: tuple[Node, ...]
    grow: bool = False


def read(rows: Rows) -> tuple[Node, ...]:
    """The components of a row, as inputs of a graph."""
    return tuple(variable(f"{rows.name}[{index}]") for index in range(rows.length))


def tile_function(name: str, reads: Sequence[Rows], stores: Sequence[Store], precision: torch.dtype) -> Any:
    """`tile(copy, time, first, last, *arrays)`: a Warp function for rows first..last-1 at one time; arrays of scalars.

    The arrays are those of `reads`, then those of `stores`. Every row is read before it is written, so that an array
    may be both.
    """
    outputs = [value for store in stores for value in store.values]
    lines, results = statements(outputs, precision)
    text = [prelude(outputs, precision, lanes=LANES[precision]), _MOVES]
    text += ["for (int i = first; i < last; i += W) {", "const int n = last - i < W ? last - i : W;"]
    for rows in reads:
        text.append(f"V {rows.name}[{max(rows.length, 1)}]; {{ {_base(rows, rows.name)}")
        text += [f"{rows.name}[{k}] = fetch(at + {k} * part, step, n);" for k in range(rows.length)]
        text.append("}")
    text += lines
    remaining = iter(results)
    for store in stores:
        text.append(f"{{ {_base(store.rows, f'{store.rows.name}_out')}")
        for k in range(len(store.values)):
            value = next(remaining)
            value = f"fetch(at + {k} * part, step, n) + {value}" if store.grow else f"V({value})"
            text.append(f"keep(at + {k} * part, step, n, {value});")
        text.append("}")
    text.append("}\n")
    arrays = tuple((rows.name, rows.timed) for rows in reads) + tuple(
        (f"{store.rows.name}_out", store.rows.timed) for store in stores
    )
    return _tile(name, arrays, "\n".join(text), precision)


# reading and writing W numbers `step` bytes apart, of which n exist
_MOVES = """#if defined(__CUDA_ARCH__)
auto fetch = [](char* at, long long step, int n) -> V { return *(T*)at; };
auto keep = [](char* at, long long step, int n, V x) { *(T*)at = x; };
#else
auto gather = [](char* at, long long step, int n, T* lanes) __attribute__((noinline)) {
    for (int j = 0; j < W; ++j) lanes[j] = *(T*)(at + (j < n ? j : 0) * step);
};
auto scatter = [](char* at, long long step, int n, T* lanes) __attribute__((noinline)) {
    for (int j = 0; j < n; ++j) *(T*)(at + j * step) = lanes[j];
};
auto fetch = [&](char* at, long long step, int n) -> V {
    alignas(V) T lanes[W];
    if (step == sizeof(T) && n == W) __builtin_memcpy(lanes, at, sizeof(V));
    else gather(at, step, n, lanes);
    return *(V*)lanes;
};
auto keep = [&](char* at, long long step, int n, V x) {
    alignas(V) T lanes[W];
    *(V*)lanes = x;
    if (step == sizeof(T) && n == W) __builtin_memcpy(at, lanes, sizeof(V));
    else scatter(at, step, n, lanes);
};
#endif"""


def _base(rows: Rows, name: str) -> str:
    """C++ for the address of component 0 of row i, and the strides of rows and components."""
    array, last = f"{name}_rows" if not name.endswith("_out") else name, 3 if rows.timed else 2
    time = f" + time * (long long){array}.strides[1]" if rows.timed else ""
    return (
        f"const long long step = {array}.strides[{last - 1}], part = {array}.strides[{last}]; "
        f"char* at = (char*){array}.data + copy * (long long){array}.strides[0]{time} + i * step;"
    )


@cache
def _tile(name: str, arrays: tuple[tuple[str, bool], ...], snippet: str, precision: torch.dtype) -> Any:
    scalar = scalar_type(precision)
    types: dict[str, Any] = dict.fromkeys(("copy", "time", "first", "last"), wp.int32)
    for array, timed in arrays:
        types[array if array.endswith("_out") else f"{array}_rows"] = wp.array(dtype=scalar, ndim=4 if timed else 3)
    names = {"snippet": snippet}
    return warp_function("@wp.func_native(snippet)", f"{name}_{_digest(snippet)}", types, "...", names)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def warp_function(decorator: str, name: str, types: dict[str, Any], body: str, names: dict[str, Any]) -> Any:
    """Define and decorate a function from its text; `names` are its globals, among them `Result` if it is declared.

    Warp reads the source of what it compiles, so the text is put where `inspect` finds it.
    """
    declared = {f"Type{index}": kind for index, kind in enumerate(types.values())}
    signature = ", ".join(f"{argument}: Type{index}" for index, argument in enumerate(types))
    arrow = " -> Result" if "Result" in names else ""
    source = f"{decorator}\ndef {name}({signature}){arrow}:\n    {body}\n"
    filename = f"<sim2real {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict[str, Any] = {"__name__": __name__, "wp": wp, **declared, **names}
    exec(compile(source, filename, "exec", dont_inherit=True), space)
    return space[name]
