"""The four passes of a translated function over rows of environments: value, push (tangents), pull (gradients), second.

    value    y = f(x)                         pull     x* = (df/dx)' l,                  l = carried adjoint + cotangent
    push     dy = (df/dx) dx                  second   (x, dx)* of <l, f(x)> + <m, (df/dx) dx>

Arguments are `each` (own rows at every time), `summed` (one row for all times, whose gradient is summed) or `carried`
(the state: its gradient is the adjoint that the pass hands to the time before).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from sim2real.simulators.warp_dual import adjoints, tangents
from sim2real.simulators.warp_language import Translated, grouped
from sim2real.simulators.warp_native import Rows, Store, read, tile_function

Role = Literal["each", "summed", "carried"]


@dataclass(frozen=True)
class Tiles:
    """Warp functions `(copy, time, first, last, *arrays)` of scalar arrays `[copies, (time,) environments, length]`.

    value    x..., y
    push     x, dx, ..., dy
    pull     x..., cotangent, [adjoint,] x*...
    second   x, dx, ..., cotangent, d_cotangent, [adjoint, d_adjoint,] x*, dx*, ...

    Arrays of summed arguments and of the carried adjoint have no time axis; `x*` of the carried argument is the same
    array as `adjoint`.
    """

    value: Any
    push: Any
    pull: Any
    second: Any


def tiles(function: Translated, roles: Sequence[Role]) -> Tiles:
    """The passes of a function; `roles` of its arguments in order, all of them active in `push` and `second`."""
    width = 1 if function.length is None else function.length
    names = [argument.name for argument in function.arguments]
    sizes = [1 if argument.length is None else argument.length for argument in function.arguments]
    xs = [Rows(f"x_{n}", k, role != "summed") for n, k, role in zip(names, sizes, roles, strict=True)]
    ds = [Rows(f"d_{n}", k, role != "summed") for n, k, role in zip(names, sizes, roles, strict=True)]
    targets = [Rows(f"x_{n}", k, role == "each") for n, k, role in zip(names, sizes, roles, strict=True)]
    d_targets = [Rows(f"d_{n}", k, role == "each") for n, k, role in zip(names, sizes, roles, strict=True)]
    carried = "carried" in roles
    cotangent, adjoint = Rows("cotangent", width), Rows("adjoint", width, False)
    d_cotangent, d_adjoint = Rows("d_cotangent", width), Rows("d_adjoint", width, False)
    x, d = [read(rows) for rows in xs], [read(rows) for rows in ds]
    y = list(function.value)
    dy = tangents(y, dict(zip(chain(*x), chain(*d), strict=True)))
    l, m = list(read(cotangent)), list(read(d_cotangent))
    if carried:
        l = [a + b for a, b in zip(l, read(adjoint), strict=True)]
        m = [a + b for a, b in zip(m, read(d_adjoint), strict=True)]
    pulled = grouped(adjoints(y, l, list(chain(*x))), x)
    second = grouped(adjoints([*y, *dy], [*l, *m], list(chain(*x, *d))), [*x, *d])
    grow = [role == "summed" for role in roles]

    def tile(kind: str, reads: Sequence[Rows], stores: Sequence[Store]) -> Any:
        return tile_function(f"{function.name}_{kind}", reads, stores, function.precision)

    paired = [rows for pair in zip(xs, ds, strict=True) for rows in pair]
    grads = [Store(*row) for row in zip(targets, pulled, grow, strict=True)]
    firsts, seconds = second[: len(x)], second[len(x) :]
    both = [
        store
        for t, a, dt, b, g in zip(targets, firsts, d_targets, seconds, grow, strict=True)
        for store in (Store(t, a, g), Store(dt, b, g))
    ]
    return Tiles(
        tile("value", xs, [Store(Rows("y", width), tuple(y))]),
        tile("push", paired, [Store(Rows("dy", width), tuple(dy))]),
        tile("pull", [*xs, cotangent, *([adjoint] if carried else [])], grads),
        tile("second", [*paired, cotangent, d_cotangent, *([adjoint, d_adjoint] if carried else [])], both),
    )
