"""Translated kernels against torch: values, tangents, gradients and Hessian-vector products, and what is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

wp = pytest.importorskip("warp")

import warp_phrases  # noqa: E402

from sim2real.simulators.warp_kernels import launch, over_time  # noqa: E402
from sim2real.simulators.warp_language import Argument, Translated, WarpLanguageError, translate  # noqa: E402
from sim2real.simulators.warp_tiles import Tiles, tiles  # noqa: E402

wp.config.quiet = True
PAIR = (Argument("a", 4), Argument("b", 4))
POINTS = 37  # not a multiple of the vector width: the last rows are a partial vector


@cache
def translated(precision: torch.dtype) -> tuple[Translated, Tiles]:
    function = translate(warp_phrases.phrases, PAIR, precision=precision)
    return function, tiles(function, ("each", "each"))


def run(tile: object, reads: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Results `[rows, length]` of a tile function at one time; reads `[rows, length]`."""
    rows = len(reads[0])
    outputs = [reads[0].new_empty(rows, length) for length in lengths]
    launch(over_time(tile, backward=False), [x[None, None] for x in (*reads, *outputs)], copies=1, batch=rows, steps=1)
    return outputs


@cache
def points(precision: torch.dtype) -> tuple[Tensor, ...]:
    """a, b and their directions."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(2, POINTS, 4, generator=generator, dtype=torch.float64)
    moves = torch.randn(2, POINTS, 4, generator=generator, dtype=torch.float64)
    return tuple(x.to(precision) for x in (0.2 + 0.7 * uniform[0], 1.8 * uniform[1] - 0.9, *moves))


@cache
def reference() -> dict[str, tuple[Tensor, ...]]:
    """For each phrase, from torch in float64: value, tangent, and for each result its gradient and Hessian-vector product."""
    a, b, da, db = points(torch.float64)
    found = {}
    names = list(warp_phrases.twins(a, b))
    for name in names:
        x = torch.cat([a, b], -1).requires_grad_()
        dx = torch.cat([da, db], -1)
        y = warp_phrases.twins(x[:, :4], x[:, 4:])[name]
        tangents, gradients, products = [], [], []
        for k in range(y.shape[1]):
            (g,) = torch.autograd.grad(y[:, k].sum(), x, create_graph=True, materialize_grads=True)
            tangents.append((g * dx).sum(-1))
            h = torch.autograd.grad(tangents[-1].sum(), x, retain_graph=True, allow_unused=True)[0] if g.requires_grad else None
            gradients.append(g)
            products.append(torch.zeros_like(x) if h is None else h)
        rows = (y, torch.stack(tangents, 1), torch.stack(gradients, 1), torch.stack(products, 1))
        found[name] = tuple(row.detach() for row in rows)
    return found


@cache
def computed(precision: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """The same of the translated kernels."""
    function, passes = translated(precision)
    width = function.length
    assert width is not None
    a, b, da, db = points(precision)
    (y,) = run(passes.value, [a, b], [width])
    (dy,) = run(passes.push, [a, da, b, db], [width])
    each = torch.eye(width, dtype=precision).repeat(POINTS, 1)
    many = [x.repeat_interleave(width, 0) for x in (a, da, b, db)]
    gradient = torch.cat(run(passes.pull, [many[0], many[2], each], [4, 4]), -1)
    second = run(passes.second, [*many, torch.zeros_like(each), each], [4, 4, 4, 4])
    product = torch.cat([second[0], second[2]], -1)
    found, start = {}, 0
    for name, (value, *_) in reference().items():
        cut = slice(start, start := start + value.shape[1])
        shaped = [x.view(POINTS, width, 8)[:, cut] for x in (gradient, product)]
        found[name] = (y[:, cut], dy[:, cut], *shaped)
    assert start == width
    return found


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", list(warp_phrases.twins(torch.full((1, 4), 0.5), torch.full((1, 4), 0.4))))
def test_phrases_equal_torch_to_second_order(name: str, precision: torch.dtype) -> None:
    # float64: 1e-10 of the size of each result; float32: its rounding, about 1e-7, times the condition of divisions
    tolerance = 1e-10 if precision == torch.float64 else 2e-4
    for ours, theirs in zip(computed(precision)[name], reference()[name], strict=True):
        scale = theirs.abs().clamp(min=1.0)
        assert ((ours.double() - theirs) / scale).abs().max() < tolerance
