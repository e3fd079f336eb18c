"""Translated kernels against torch: values, tangents, gradients and Hessian-vector products, and what is refused."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

wp = pytest.importorskip("warp")

import warp_phrases  # noqa: E402

from sim2real.simulators.warp_kernels import launch, over_time  # noqa: E402
from sim2real.simulators.warp_language import Argument, Translated, WarpLanguageError, translate  # noqa: E402
from sim2real.simulators.warp_native import warp_function  # noqa: E402
from sim2real.simulators.warp_tiles import Tiles, tiles  # noqa: E402

wp.config.quiet = True
wp.init()
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
    """For each phrase, from torch in float64: value, tangent, and each result's gradient and Hessian-vector product."""
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
            h = (
                torch.autograd.grad(tangents[-1].sum(), x, retain_graph=True, allow_unused=True)[0]
                if g.requires_grad
                else None
            )
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


@pytest.mark.parametrize(
    "precision",
    [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)],  # slow: compiles for 10 s
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("name", list(warp_phrases.twins(torch.full((1, 4), 0.5), torch.full((1, 4), 0.4))))
def test_phrases_equal_torch_to_second_order(name: str, precision: torch.dtype) -> None:
    # float64: 1e-10 of the size of each result; float32: its rounding, about 1e-7, times the condition of divisions
    tolerance = 1e-10 if precision == torch.float64 else 2e-4
    for ours, theirs in zip(computed(precision)[name], reference()[name], strict=True):
        scale = theirs.abs().clamp(min=1.0)
        assert ((ours.double() - theirs) / scale).abs().max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_phrases_compile_for_cuda(precision: torch.dtype, tmp_path: Path) -> None:
    # Warp brings the CUDA compiler along: no device is needed
    for tile in vars(translated(precision)[1]).values():
        module = over_time(tile, backward=False).module
        wp.compile_aot_module(module, arch=80, module_dir=tmp_path, use_ptx=True)
        assert list(tmp_path.glob(f"*{tile.key}*.ptx"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["trigonometry", "exponentials", "kinks", "steps", "branches", "matrices", "rotations"]
)
def test_warp_itself_reads_the_same_language(name: str) -> None:
    a, b = points(torch.float32)[:2]
    expected = reference()[name][0]
    width, vector = expected.shape[1], wp.types.vector(4, wp.float32)
    names = ", ".join(f"y{k}" for k in range(width))
    body = f"i = wp.tid()\n    {names} = function(a[i], b[i])" + "".join(
        f"\n    y[i, {k}] = y{k}" for k in range(width)
    )
    phrase = getattr(warp_phrases, name)
    typed = FunctionType(phrase.__code__, phrase.__globals__, name)  # a copy: Warp wants types at the arguments
    typed.__annotations__ = {"a": vector, "b": vector}
    types = {"a": wp.array(dtype=vector), "b": wp.array(dtype=vector), "y": wp.array(dtype=wp.float32, ndim=2)}
    kernel = warp_function("@wp.kernel(module='unique')", f"plain_{name}", types, body, {"function": wp.func(typed)})
    y = torch.empty(POINTS, width)
    arrays = [wp.from_torch(x, dtype=vector) for x in (a, b)] + [wp.from_torch(y)]
    wp.launch(kernel, dim=POINTS, inputs=arrays, device="cpu")
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-6)  # float32


# ----------------------------------------------------------------------------------------------- functions for kernels


def small(theta, state):
    if state[0] > theta.limit:
        return wp.vector(theta.gain * state[0] * state[1], wp.sin(state[1]))
    return wp.vector(state[1] ** 2, theta.limit * state[0])


def _small_twin(theta: Tensor, state: Tensor) -> Tensor:
    over = state[:, :1] > theta[:, 1:]
    one = torch.stack([theta[:, 0] * state[:, 0] * state[:, 1], state[:, 1].sin()], -1)
    other = torch.stack([state[:, 1] ** 2, theta[:, 1] * state[:, 0]], -1)
    return torch.where(over, one, other)


def product(theta, state, scale):
    return scale * theta[0] * state[1]


@cache
def _kernels() -> object:
    """A Warp kernel around the dual of a vector function, its theta not active, and the primal of a number."""
    step = translate(small, (Argument("theta", 2, ("gain", "limit"), active=False), Argument("state", 2)))
    pay = translate(product, (Argument("theta", 2), Argument("state", 2), Argument("scale", None)))
    dual, primal = step.dual, pay.primal

    @wp.kernel(module="unique")
    def dual_kernel(
        theta: wp.array(dtype=wp.vec2d), x: wp.array(dtype=wp.vec2d), dx: wp.array(dtype=wp.vec2d),
        y: wp.array(dtype=wp.vec2d), dy: wp.array(dtype=wp.vec2d), scale: wp.array(dtype=wp.float64),
        pay: wp.array(dtype=wp.float64),
    ):  # fmt: skip
        i = wp.tid()
        value, tangent = dual(theta[i], x[i], dx[i])
        y[i] = value
        dy[i] = tangent
        pay[i] = primal(theta[i], x[i], scale[i])

    return dual_kernel


def test_adjoint_of_the_dual_in_a_kernel_is_a_hessian_vector_product() -> None:
    kernel = _kernels()
    generator = torch.Generator().manual_seed(1)
    theta, x, dx = torch.rand(3, 6, 2, generator=generator, dtype=torch.float64)
    scale = torch.rand(6, generator=generator, dtype=torch.float64)
    arrays = [wp.from_torch(v.clone(), dtype=wp.vec2d, requires_grad=True) for v in (theta, x, dx)]
    arrays += [wp.zeros(6, dtype=wp.vec2d, requires_grad=True, device="cpu") for _ in range(2)]
    arrays += [wp.from_torch(scale.clone(), requires_grad=True)]
    arrays += [wp.zeros(6, dtype=wp.float64, requires_grad=True, device="cpu")]
    tape = wp.Tape()
    with tape:
        wp.launch(kernel, dim=6, inputs=arrays[:3], outputs=arrays[3:], device="cpu")
    one = torch.ones(6, 2, dtype=torch.float64)
    replies = {arrays[k]: wp.from_torch(one.clone(), dtype=wp.vec2d) for k in (3, 4)}
    tape.backward(grads={**replies, arrays[6]: wp.from_torch(one[:, 0].clone())})

    leaves = [v.clone().requires_grad_() for v in (theta, x, dx)]
    y, dy = torch.func.jvp(lambda state: _small_twin(leaves[0], state), (leaves[1],), (leaves[2],))
    pay = scale * leaves[0][:, 0] * leaves[1][:, 1]
    expected = torch.autograd.grad(y.sum() + dy.sum() + pay.sum(), leaves)
    torch.testing.assert_close(wp.to_torch(arrays[4]), dy.detach(), rtol=1e-12, atol=1e-12)
    for array, gradient in zip(arrays[:3], expected, strict=True):
        torch.testing.assert_close(wp.to_torch(array.grad), gradient, rtol=1e-12, atol=1e-12)


def test_same_function_is_the_same_warp_function() -> None:
    arguments = (Argument("theta", 2, ("gain", "limit")), Argument("state", 2))
    one, two = translate(small, arguments), translate(small, arguments)
    assert one.primal is two.primal
    assert one.dual is two.dual
    assert one.primal is not translate(small, arguments, precision=torch.float32).primal


@pytest.mark.slow
def test_another_process_writes_the_same_code() -> None:
    # Warp's cache is keyed by this code, so a second process compiles nothing
    program = (
        "import test_warp_language as t, warp_phrases as p\n"
        "f = t.translate(p.phrases, t.PAIR)\n"
        "ts = t.tiles(f, ('each', 'each'))\n"
        "print(f.primal.key, f.dual.key, ts.value.key, ts.push.key, ts.pull.key, ts.second.key)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    function, passes = translated(torch.float64)
    keys = [
        function.primal.key,
        function.dual.key,
        passes.value.key,
        passes.push.key,
        passes.pull.key,
        passes.second.key,
    ]
    assert done.stdout.split()[-6:] == keys


def elementary(x, unused):
    y = wp.vector(wp.sin(x[0]), wp.cos(x[0]), wp.tan(x[0]), wp.atan(x[0]), wp.atan2(x[0], x[1]))
    return wp.vector(y, wp.exp(x[0]), wp.log(x[0]), wp.tanh(x[0]))


@cache
def elementary_value(precision: torch.dtype) -> object:
    arguments = (Argument("x", 2), Argument("unused", 0))
    return tiles(translate(elementary, arguments, precision=precision), ("each", "each")).value


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_elementary_functions_keep_their_digits(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-30.0, 1.9, 4001, dtype=torch.float64)  # exp stays a normal number
    x = torch.cat([sizes, -sizes, 20.0 * torch.rand(4001, generator=generator, dtype=torch.float64)])
    x = torch.stack([x, torch.randn(len(x), generator=generator, dtype=torch.float64)], -1).to(precision)
    (y,) = run(elementary_value(precision), [x, x], [8])
    a, b = x.numpy().astype(np.longdouble).T
    with np.errstate(invalid="ignore"):
        exact = [np.sin(a), np.cos(a), np.tan(a), np.arctan(a), np.arctan2(a, b), np.exp(a), np.log(a), np.tanh(a)]
    for ours, theirs in zip(y.T.numpy(), exact, strict=True):
        known = np.isfinite(theirs)
        error = np.abs(ours - theirs)[known] / np.abs(theirs)[known]
        assert np.isnan(ours[~known]).all()
        # two roundings of the number, and of the wider one where it is not wider on this machine
        assert error.max() < 3.0 * torch.finfo(precision).eps


def test_elementary_functions_at_the_ends_equal_the_library() -> None:
    ends = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-310, 710.0, -750.0, 89.0, -104.0, 1e30, -1.0, 1e7]
    for precision, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a = torch.tensor(ends, dtype=precision)
        x = torch.stack([a, -a.roll(3)], -1)
        (y,) = run(elementary_value(precision), [x, x], [8])
        theirs = [a.sin(), a.cos(), a.tan(), a.atan(), torch.atan2(a, x[:, 1]), a.exp(), a.log(), a.tanh()]
        torch.testing.assert_close(y, torch.stack(theirs, -1), rtol=tolerance, atol=0.0, equal_nan=True)


def choices(x, unused):
    return wp.vector(wp.min(x[0], x[1]), wp.max(x[0], x[1]), wp.asin(x[0]), wp.acos(x[0]))


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_an_environment_beyond_the_ordinary_changes_no_other(precision: torch.dtype) -> None:
    # one of 16 numbers that an instruction computes together; the others must stay the same to the last bit
    x = torch.stack([torch.linspace(-0.9, 1.9, 32), torch.linspace(2.0, -0.4, 32)], -1).to(precision)
    (usual,) = run(elementary_value(precision), [x, x], [8])
    others = torch.arange(32) != 5
    for end in (torch.nan, torch.inf, -torch.inf, 0.0, 1e-310, 1e10, -1e30, 750.0, -750.0):
        a = x.clone()
        a[5, 0] = end
        (y,) = run(elementary_value(precision), [a, a], [8])
        torch.testing.assert_close(y[others], usual[others], rtol=0.0, atol=0.0, equal_nan=True)
        b = a[5, 0]
        library = [b.sin(), b.cos(), b.tan(), b.atan(), torch.atan2(b, a[5, 1]), b.exp(), b.log(), b.tanh()]
        tolerance = 4.0 * torch.finfo(precision).eps
        torch.testing.assert_close(y[5], torch.stack(library), rtol=tolerance, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_choices_keep_nan(precision: torch.dtype) -> None:
    function = translate(choices, (Argument("x", 2), Argument("unused", 0)), precision=precision)
    x = torch.tensor([[0.5, 0.25], [torch.nan, 0.5], [0.5, torch.nan], [-0.25, 0.75]], dtype=precision)
    (y,) = run(tiles(function, ("each", "each")).value, [x, x], [4])
    a, b = x.T
    theirs = torch.stack([torch.minimum(a, b), torch.maximum(a, b), a.asin(), a.acos()], -1)
    torch.testing.assert_close(y, theirs, rtol=4.0 * torch.finfo(precision).eps, atol=0.0, equal_nan=True)


def constants(a, b):
    flag = True
    if a[0] > 0.5:
        flag = False
    if b[0] > 0.0:  # noqa: SIM108
        kinds = (1.0, wp.mat22(2.0), wp.vec2(a[0], 3.0))
    else:
        kinds = (1.0, wp.mat22(2.0), wp.vec2(b[1], 3.0))
    sure = flag and not b[0] > 10.0
    eye = wp.identity(n=2, dtype=float)
    low = wp.matrix(0.0, shape=(2, 3))
    low[1, 2] = 4.0
    point = wp.quat_identity()
    point[1] = 0.5
    corner = wp.matrix_from_rows(wp.vec2(1.0, 2.0), wp.vec2(3.0, 4.0))
    side = wp.matrix_from_cols(wp.vec2(1.0, 2.0), wp.vec2(3.0, 4.0))
    big = wp.max(wp.vec2(1.0, 5.0), wp.vec2(2.0, 3.0))
    total = 0
    for i in range(300):
        if i % 2 == 0:
            total += i // 2
    if total > 0 and WHICH[1] == 2:
        total -= 1
    if len(a) != 4:
        total = 0
    return wp.vector(
        wp.degrees(math.pi), wp.radians(180.0), wp.lerp(1.0, 3.0, 0.25), wp.log2(8.0), wp.sqrt(2.0), pow(2.0, 3.0),
        eye[0, 0] + eye[0][1], low[1][2] + wp.trace(wp.diag(wp.vec2(1.0, 2.0))), point.y + point.w, corner[0, 1],
        side[0, 1],
        big[0] + big[1], wp.min(wp.vec3(3.0, 1.0, 2.0)), wp.cw_mul(big, big)[0], wp.cw_div(big, big)[1],
        total, int(3.9), float(True), float(bool(0.0)), wp.float64(2.0), 7 // 2 + 7 % 4, wp.where(True, 1.0, 2.0),
        SETTINGS.gain, NUMPY,
        wp.where(sure, 1.0, 0.0) - wp.where(a[0] > 0.5, 0.0, 1.0), 1.0 if 1 < 2 < 3 else 0.0,
        wp.vec3(2.0).y, wp.vec3().x, wp.vector(length=3, dtype=float)[1],
        wp.inverse(wp.matrix(2.0, shape=(1, 1)))[0, 0],
        (wp.vec2(1.0, 2.0) * corner)[0], abs(wp.vec2(-1.0, 2.0))[0], wp.exp(0.0) ** 2,
        wp.where(1.0 == 1.0 or a[0] > b[0], 1.0, 2.0),
        wp.dot(point, point), wp.atan2(0.0, 1.0), PAIRS[0], kinds[1][1, 0] + kinds[2][1],
    )  # fmt: skip


WHICH = [1, 2]
PAIRS = np.array([0.5])[0:1].tolist()
NUMPY = np.float32(0.25)
SETTINGS = SimpleNamespace(gain=1.5)


def test_constants_are_folded() -> None:
    function = translate(constants, PAIR)
    expected = [
        180.0, math.pi, 1.5, 3.0, math.sqrt(2.0), 8.0,
        1.0, 7.0, 1.5, 2.0,
        3.0, 7.0, 1.0, 4.0, 1.0,
        sum(range(150)) - 1, 3.0, 1.0, 0.0, 2.0, 6.0, 1.0,
        1.5, 0.25, None, 1.0,
        2.0, 0.0, 0.0, 0.5,
        7.0, 1.0, 1.0, 1.0,
        1.25, 0.0, 0.5, 5.0,
    ]  # fmt: skip
    for node, number in zip(function.value, expected, strict=True):
        if number is not None:  # a[0] is not known: the difference of two choices
            assert node.operation == "constant"
            assert node.value == pytest.approx(number, rel=1e-15)


def test_huge_and_infinite_constants_are_written() -> None:
    def numbers(a, b):
        return wp.vector(a[0] * 1e300, a[0] + math.inf, a[0] - math.inf, a[0] * math.nan)

    def calm(a, b):
        return a[0] + 0.0

    for precision in (torch.float32, torch.float64):
        snippet = translate(numbers, PAIR, precision=precision).primal.native_snippet
        assert {"V(INFINITY)", "V(NAN)"} <= set(re.findall(r"V\(\w+\)", snippet))
        assert ("1e+300" in snippet) == (precision == torch.float64)
    assert [node.name for node in translate(calm, PAIR).value] == ["x_a[0]"]


# --------------------------------------------------------------------------------------------------- what is refused


def _count_bounds(a, b):
    total = 0.0
    for _ in range(a[0]):
        total += b[0]
    return total


def _while(a, b):
    total = a[0]
    while total < 1.0:
        total = total * 2.0
    return total


def _break(a, b):
    total = 0.0
    for i in range(3):
        total += a[i]
        if total > 1.0:
            break
    return total


def _over_vector(a, b):
    total = 0.0
    for x in a:
        total += x
    return total


def _long_loop(a, b):
    total = 0.0
    for i in range(100000):
        total += a[0] + i
    return total


def _unknown_function(a, b):
    return wp.erf(a[0])


def _random(a, b):
    return a[0] + wp.randf(wp.rand_init(1))


def _print(a, b):
    print(a[0])  # noqa: T201
    return a[0]


def _write_argument(a, b):
    a[0] = 1.0
    return a[0]


def _one_branch(a, b):
    if a[0] > 0.5:
        y = b[0]
    return y


def _no_return(a, b):  # noqa: RET503
    if a[0] > 0.5:
        return b[0]


def _whole(a, b):
    return int(a[0]) * b[0]


def _remainder(a, b):
    return a[0] % b[0]


def _active_index(a, b):
    return a[b[0]]


def _index_outside(a, b):
    return a[4]


def _field(a, b):
    return a.mass


def _numpy(a, b):
    return np.sin(a[0])


def _mixed(a, b):
    return a + b[0]


def _number_as_condition(a, b):
    return 1.0 if a[0] else b[0]


def _kinds(a, b):
    if a[0] > 0.5:  # noqa: SIM108
        y = wp.vec2(a[0], b[0])
    else:
        y = b[0]
    return y[0]


def _recursive(a, b):
    return _recursive(a, b)


def _anything(a, *rest):
    return a[0]


def _tensor(a, b):
    return a[0] * WEIGHT


def _unnamed(a, b):
    return a[0] * missing  # noqa: F821


def _text(a, b):
    return "a"


def _tuple(a, b):
    return a[0], b[0]


def _listing(a, b):
    return [a[0], b[0]][0]


def _divided(a, b):
    return a[0] + 1.0 / 0.0


def _number_divided(a, b):
    return b[0] / 0


def _wrong_count(a, b):
    return warp_phrases.pair(a[0])


def _too_many(a, b):
    return wp.sin(a[0], b[0])


def _matrix_sizes(a, b):
    return (wp.mat22(a[0], a[1], a[2], a[3]) * wp.vec3(b[0], b[1], b[2]))[0]


def _quaternion_of_vector(a, b):
    return wp.quat_rotate(a, wp.vec3(b[0], b[1], b[2]))[0]


def _nested(a, b):
    def inside(x):
        return x

    return inside(a[0])


def _nested_loops(a, b):
    total = 0.0
    for i in range(100):
        for j in range(100):
            total += a[0] * i * j
    return total


def _backwards(a, b):
    total = 0.0
    for i in range(3):
        total += a[i]
    else:
        total = 0.0
    return total


def _empty_return(a, b):
    return


def _count_of_names(a, b):
    x, y = a[0]
    return x * y


def _attribute_target(a, b):
    a.x = 1.0
    return a[0]


def _matrix_as_component(a, b):
    v = wp.vec2(a[0], a[1])
    v[0] = wp.vec2(b[0], b[1])
    return v[0]


def _index_of_number(a, b):
    return b[0][1]


def _slice_of_number(a, b):
    return b[0][1:]


def _variable_store(a, b):
    v = wp.vec2(a[0], a[1])
    v[b[0]] = 1.0
    return v[0]


def _membership(a, b):
    return 1.0 if a[0] in (1.0, 2.0) else 0.0


def _inverted(a, b):
    return ~a[0]


def _not_of_number(a, b):
    return 1.0 if not a[0] else 0.0


def _starred(a, b):
    return wp.max(*PAIRS)


def _where_number(a, b):
    return wp.where(a[0], 1.0, 2.0)


def _added_conditions(a, b):
    return (a[0] > 0.0) + 1.0


def _negated_tuple(a, b):
    return -(a[0], b[0])


def _divided_vectors(a, b):
    return (a / b)[0]


def _crossed(a, b):
    return wp.cross(a, b)[0]


def _outer_numbers(a, b):
    return wp.outer(a[0], b[0])[0, 0]


def _transposed_vector(a, b):
    return wp.transpose(a)[0]


def _determinant_of_oblong(a, b):
    return wp.determinant(wp.matrix(1.0, shape=(2, 3)))


def _compared_vectors(a, b):
    return 1.0 if a > b else 0.0


def _length_of_number(a, b):
    return wp.length(a[0])


def _products_of_unequal(a, b):
    return wp.cw_mul(a, wp.vec2(b[0], b[1]))[0]


def _float_of_vector(a, b):
    return float(a)


def _bool_of_number(a, b):
    return 1.0 if bool(a[0]) else 0.0


def _len_of_number(a, b):
    return len(a[0])


def _short_vector(a, b):
    return wp.vec3(a[0], a[1])[0]


def _vector_of_conditions(a, b):
    return wp.vec2(a[0] > 0.0, b[0])[0]


def _free_vector_of_conditions(a, b):
    return wp.vector(a[0] > 0.0, b[0])


def _wrong_length(a, b):
    return wp.vector(a[0], b[0], length=3)


def _shapeless(a, b):
    return wp.matrix(a[0], b[0])[0, 0]


def _matrix_of_rows(a, b):
    return wp.mat22(wp.vec2(a[0], b[0]), wp.vec2(a[0], b[0]))[0, 0]


def _identity_unknown(a, b):
    return wp.identity(dtype=float)[0, 0]


def _typed_call(a, b):
    return wp.sin(a[0], dtype=float)


def _functions_chosen(a, b):
    rule = wp.sin
    if a[0] > 0.5:
        rule = wp.cos
    return rule(b[0])


def _attribute_of_number(a, b):
    return a[0].real


def _no_arguments(a, b):
    return wp.normalize()


def _made():
    def unset_yet(a, b):
        return a[0] * later

    yield unset_yet
    later = 1.0


_unset = next(_made())
WEIGHT = torch.ones(())
REFUSED = {
    _count_bounds: "`range` of a number; its bounds must be whole numbers known beforehand",
    _while: "a loop of variable length has wrong derivatives",
    _break: "`break`; let the loop run and choose with `if`",
    _over_vector: "a loop over `a`; loop over `range` of constants",
    _long_loop: "more than 4096 iterations of loops",
    _nested_loops: "more than 4096 iterations of loops",
    _backwards: "this form of `for`",
    _empty_return: "`return` without a value",
    _count_of_names: "2 names for a number",
    _attribute_target: "assignment to `a.x`",
    _matrix_as_component: "a component set to a vector of length 2",
    _index_of_number: "an index into a number",
    _slice_of_number: "`b[0][1:]`; slice vectors, with constant bounds",
    _variable_store: "a write into a vector of length 2; write single components",
    _membership: "`a[0] in (1.0, 2.0)`; compare numbers",
    _inverted: "`~a[0]`; use - or not",
    _not_of_number: "'not' needs conditions such as x > 0.0, got a number",
    _starred: "`wp.max(*PAIRS)`; write the arguments one by one",
    _where_number: "wp.where needs a condition such as x > 0.0, got a number",
    _added_conditions: "+ of a condition and the constant 1.0",
    _negated_tuple: "- of a tuple of 2 values",
    _divided_vectors: "/ of a vector of length 4 and a vector of length 4; component by component is wp.cw_div",
    _crossed: "wp.cross of a vector of length 4 and a vector of length 4",
    _outer_numbers: "wp.outer of a number and a number",
    _transposed_vector: "wp.transpose of a vector of length 4",
    _determinant_of_oblong: "wp.determinant needs a square matrix up to 4x4, got a 2x3 matrix",
    _compared_vectors: "the comparison > needs numbers, got a vector of length 4",
    _length_of_number: "wp.length of a number",
    _products_of_unequal: "wp.cw_mul of a vector of length 4 and a vector of length 2",
    _float_of_vector: "float of a vector of length 4",
    _bool_of_number: "bool of a number: compare it",
    _len_of_number: "len of a number",
    _short_vector: "vec3f of 2 numbers, it has 3",
    _vector_of_conditions: "vec2f of a condition and a number",
    _free_vector_of_conditions: "wp.vector of a condition and a number",
    _wrong_length: "wp.vector of 2 numbers, length=3",
    _shapeless: "wp.matrix without shape=(rows, columns)",
    _matrix_of_rows: "a matrix of vectors: use wp.matrix_from_rows or wp.matrix_from_cols",
    _identity_unknown: "wp.identity without a constant n=",
    _typed_call: "`wp.sin(a[0], dtype=float)`",
    _functions_chosen: "`rule`: one branch gives",
    _attribute_of_number: "`a[0].real`; there is no such attribute",
    _no_arguments: "`wp.normalize()` with no arguments",
    _unset: "the unknown name `later`",
    _unknown_function: "the function `wp.erf`; its derivative is not known; known are abs, ",
    _random: "the function `wp.rand_init`",
    _print: "`print(a[0])`; a step only computes values",
    _write_argument: "a write into `a`; arguments are not written to",
    _one_branch: "`y` has a value on one branch only of the `if` in line",
    _no_return: "a path ends without `return`",
    _whole: "int of a number, whose derivative is lost: use wp.floor",
    _remainder: "`a[0] % b[0]`; use + - * / ** @; a remainder is x - y * wp.floor(x / y)",
    _active_index: "a number as an index; indices are whole numbers known beforehand",
    _index_outside: "index 4 of 4 components; use 0 to 3",
    _field: "`a.mass`; it has x, y, z, w",
    _numpy: "the function `np.sin`",
    _mixed: "+ of a vector of length 4 and a number",
    _number_as_condition: "a number as a condition; compare it with something",
    _kinds: "`y`: one branch gives a vector of length 2, the other a number",
    _recursive: "it calls itself",
    _anything: "the argument *rest; name every argument",
    _tensor: "a tensor: make it a parameter of the model, or take float(...) of it outside",
    _unnamed: "the unknown name `missing`",
    _text: "the constant 'a'; a step computes with numbers only",
    _tuple: "returns a tuple of 2 values; return a number or wp.vector(...)",
    _listing: "`[a[0], b[0]]`",
    _divided: "`1.0 / 0.0` of constants",
    _number_divided: "`b[0] / 0` of constants: division by zero",
    _wrong_count: "missing a required argument: 'y'",
    _too_many: "wp.sin of 2 numbers",
    _matrix_sizes: "* of a 2x2 matrix and a vector of length 3",
    _quaternion_of_vector: "needs a quaternion, got a vector of length 4",
    _nested: "`def inside(x):`; define it outside and call it",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__.strip("_"))
def test_what_has_no_right_derivative_is_refused_with_its_line(function) -> None:
    with pytest.raises(WarpLanguageError) as caught:
        translate(function, PAIR)
    message = str(caught.value)
    assert REFUSED[function] in message
    if function is _wrong_count:
        assert "warp_phrases.py:" in message
    elif function is not _tuple:
        first = function.__code__.co_firstlineno
        line = int(message.split("test_warp_language.py:")[1].split(":")[0])
        assert first <= line < first + 8


def test_what_is_not_a_function_in_a_file_is_refused() -> None:
    with pytest.raises(WarpLanguageError, match="not a function written with `def`"):
        translate(lambda a, b: a[0], PAIR)
    space: dict = {}
    exec("def typed(a, b):\n    return a[0]", space)
    with pytest.raises(WarpLanguageError, match="its source cannot be read"):
        translate(space["typed"], PAIR)
    with pytest.raises(ValueError, match=r"precision must be torch.float32 or torch.float64, got torch.float16"):
        translate(small, (Argument("theta", 2, ("gain", "limit")), Argument("state", 2)), precision=torch.float16)


# ------------------------------------------------------------------------------------ Warp's adjoint of dynamic loops


@wp.kernel
def second_loop(x: wp.array(dtype=wp.float64), n: int, y: wp.array(dtype=wp.float64)):
    i = wp.tid()
    s = wp.float64(0.0)
    for j in range(n):
        s += wp.float64(j)
    p = wp.float64(0.0)
    for k in range(n):  # noqa: B007
        p += s * x[i]
    y[i] = p


def second_loop_unrolled(a, b):
    s = 0.0
    for j in range(4):
        s += float(j)
    p = 0.0
    for _ in range(4):
        p += s * a[0]
    for _ in range(20):  # longer than Warp unrolls
        p = wp.sin(p) + b[0]
    return p


def test_second_loop_that_warp_differentiates_to_zero() -> None:
    x = wp.full(1, value=0.5, dtype=wp.float64, requires_grad=True, device="cpu")
    y = wp.zeros(1, dtype=wp.float64, requires_grad=True, device="cpu")
    tape = wp.Tape()
    with tape:
        wp.launch(second_loop, dim=1, inputs=[x, 4], outputs=[y], device="cpu")
    tape.backward(grads={y: wp.ones(1, dtype=wp.float64, device="cpu")})
    assert y.numpy()[0] == 12.0  # 4 times (0 + 1 + 2 + 3) x
    if x.grad.numpy()[0] != 0.0:
        pytest.skip("this Warp differentiates the second loop: the note in warp_language is out of date")

    a, b = torch.full((2, 1, 4), 0.1, dtype=torch.float64).requires_grad_()
    p = 24.0 * a[0, 0]
    for _ in range(20):
        p = p.sin() + b[0, 0]
    expected = torch.autograd.grad(p, (a, b))
    passes = tiles(translate(second_loop_unrolled, PAIR), ("each", "each"))
    found = run(passes.pull, [a.detach(), b.detach(), torch.ones(1, 1, dtype=torch.float64)], [4, 4])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
