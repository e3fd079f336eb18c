"""The box QP against scipy and central differences; derivatives of every order and mode; failure paths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers import box_qp

INF = math.inf


def problem(batch: int, n: int, seed: int, condition: float = 100.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H with the given condition number, g and a box, of which about half the bounds are active."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(draw(batch, n, n)).Q
    H = basis * torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64) @ basis.mT
    return H, 0.3 * draw(batch, n), -draw(batch, n).abs() - 0.1, draw(batch, n).abs() + 0.1


@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (3, 10.0), (8, 1e3), (20, 1e5)])
def test_equals_scipy_with_active_sets(n: int, condition: float) -> None:
    H, g, low, high = problem(12, n, seed=n, condition=condition)
    low[0], high[1] = -INF, INF
    solution = box_qp(H, g, low, high)
    assert bool(solution.converged.all())
    share = float((solution.active != 0).double().mean())
    assert 0.05 < share < 0.95
    for row in range(12):  # |L'x + L^-1 g|^2 / 2 with H = L L' is the objective
        L = np.linalg.cholesky(H[row].numpy())
        bounds = (low[row].numpy(), high[row].numpy())
        expected = lsq_linear(L.T, -np.linalg.solve(L, g[row].numpy()), bounds, method="bvls", tol=1e-14).x
        # scipy solves by QR of L, whose condition is the root of that of H: 1e-13 relative at worst
        np.testing.assert_allclose(solution.x[row], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "condition"), [(5, 1e8), (20, 1e9), (60, 1e10)])
def test_converges_to_rounding_however_badly_conditioned(n: int, condition: float) -> None:
    H, g, low, high = problem(64, n, seed=3, condition=condition)
    solution = box_qp(H, 0.05 * g, low, high)
    assert bool(solution.converged.all())
    assert float(solution.residual.max()) < 1e-13


def test_units_do_not_matter() -> None:
    H, g, low, high = problem(16, 6, seed=1)
    unit = torch.logspace(-6, 6, 6, dtype=torch.float64)
    scaled = box_qp(H / (unit[:, None] * unit), g / unit, low * unit, high * unit)
    # the scaling is by powers that do not round alike, hence not to the bit
    torch.testing.assert_close(scaled.x / unit, box_qp(H, g, low, high).x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [1e-100, 1e100])
def test_costs_beyond_single_precision_are_solved_too(size: float) -> None:
    H, g, low, high = problem(16, 6, seed=1)
    solution = box_qp(size * H, size * g, low, high)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, box_qp(H, g, low, high).x, rtol=1e-11, atol=1e-12)


def test_unconstrained_and_pinned_and_tight_boxes() -> None:
    H, g, _, _ = problem(8, 5, seed=2)
    free = box_qp(H, g)
    torch.testing.assert_close(free.x, -torch.linalg.solve(H, g), rtol=1e-11, atol=1e-12)
    assert bool((free.active == 0).all())
    assert bool(free.margin.isinf().all())
    pinned = torch.full((5,), INF, dtype=torch.float64)
    pinned[2] = 0.7
    x = box_qp(H, g, -pinned.where(pinned.isinf(), -pinned), pinned).x
    assert x[:, 2].tolist() == [0.7] * 8
    rest = [0, 1, 3, 4]
    H_rest = H[:, rest][:, :, rest]
    expected = -torch.linalg.solve(H_rest, g[:, rest] + 0.7 * H[:, rest, 2])
    torch.testing.assert_close(x[:, rest], expected, rtol=1e-11, atol=1e-12)


def test_batch_is_loop_and_leading_dimensions_broadcast() -> None:
    H, g, low, high = problem(6, 4, seed=4)
    together = box_qp(H, g, low, high)
    for row in range(6):
        single = box_qp(H[row], g[row], low[row], high[row])
        torch.testing.assert_close(single.x, together.x[row], rtol=1e-13, atol=1e-14)
        assert single.converged.shape == ()
    mapped = vmap(lambda *rows: box_qp(*rows).x)(H, g, low, high)
    torch.testing.assert_close(mapped, together.x, rtol=0, atol=0)
    shared = box_qp(H[0], g.reshape(2, 3, 4), low[0], 0.4)
    assert shared.x.shape == (2, 3, 4)
    torch.testing.assert_close(shared.x[1, 2], box_qp(H[0], g[5], low[0], 0.4).x, rtol=1e-13, atol=1e-14)


def away_from_kinks(batch: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Problems whose active set differences of 1e-6 cannot change; every kind of variable occurs."""
    tensors = problem(10 * batch, n, seed)
    solution = box_qp(*tensors)
    sure = (solution.margin > 1e-2).nonzero()[:batch, 0]
    assert len(sure) == batch
    assert set(solution.active[sure].flatten().tolist()) == {-1.0, 0.0, 1.0}
    H, g, low, high = (x[sure].clone().requires_grad_() for x in tensors)
    return H, g, low, high


def test_derivatives_of_first_and_second_order_against_differences() -> None:
    tensors = away_from_kinks(1, 3, seed=6)
    layer = lambda *args: box_qp(*args).x
    assert gradcheck(layer, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, tensors, check_fwd_over_rev=True)


def test_shared_inputs_get_the_sum_over_the_batch() -> None:
    H, g, low, high = (x.detach() for x in away_from_kinks(4, 4, seed=6))
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = high[0].clone().requires_grad_()
    expanded = high[0].expand(4, 4).clone().requires_grad_()
    (box_qp(H, g, low, bound).x * weight).sum().backward()
    (box_qp(H, g, low, expanded).x * weight).sum().backward()
    torch.testing.assert_close(bound.grad, expanded.grad.sum(0), rtol=1e-12, atol=1e-13)


def test_forward_and_reverse_modes_agree_at_second_order() -> None:
    H, g, low, high = (x.detach()[0] for x in away_from_kinks(2, 4, seed=7))
    loss = lambda t: box_qp(H + t.sum() * H @ H, g * t[0] + t[1] ** 2, low * t[1], high * t[2]).x.pow(3).sum()
    at = torch.ones(3, dtype=torch.float64)
    expected = jacrev(jacrev(loss))(at)
    for derivative in (hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        # one problem, four orders of operations: rounding only
        torch.testing.assert_close(derivative(at), expected, rtol=1e-9, atol=1e-11)
    step = 1e-5
    steps = step * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(grad(loss)(at + e) - grad(loss)(at - e)) / (2 * step) for e in steps])
    torch.testing.assert_close(expected, differences, rtol=1e-5, atol=1e-6)


def test_vjp_and_jvp_agree_and_vmap_over_gradients() -> None:
    H, g, low, high = (x.detach() for x in away_from_kinks(4, 5, seed=8))
    generator = torch.Generator().manual_seed(1)
    tangent = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (H, g, low, high))
    cotangent = torch.randn(g.shape, generator=generator, dtype=torch.float64)
    layer = lambda *args: box_qp(*args).x
    pushed = jvp(layer, (H, g, low, high), tangent)[1]
    pulled = grad(lambda *args: (layer(*args) * cotangent).sum(), argnums=(0, 1, 2, 3))(H, g, low, high)
    product = sum(float((a * b).sum()) for a, b in zip(pulled, tangent, strict=True))
    assert float((pushed * cotangent).sum()) == pytest.approx(product, rel=1e-11)
    rowwise = vmap(grad(lambda G, g, v: (layer(G, g, -0.3, 0.4) * v).sum(), argnums=(0, 1)))(H, g, cotangent)
    batched = grad(lambda G, g: (layer(G, g, -0.3, 0.4) * cotangent).sum(), argnums=(0, 1))(H, g)
    for row, whole in zip(rowwise, batched, strict=True):
        torch.testing.assert_close(row, whole, rtol=1e-12, atol=1e-13)


def test_margin_tells_the_distance_to_the_next_kink() -> None:
    H = torch.eye(2, dtype=torch.float64)
    g = torch.tensor([[-2.0, -0.75], [-1.25, 0.0]], dtype=torch.float64)
    solution = box_qp(H, g, -1.0, 1.0)
    # multiplier 1 and slack 0.25 over the scale 2; multiplier 0.25 and slack 1 over 1.25
    assert solution.margin.tolist() == [0.125, 0.2]
    assert solution.active.tolist() == [[1, 0], [1, 0]]
    kink = box_qp(H, torch.tensor([-1.0, 0.5], dtype=torch.float64), -1.0, 1.0)
    assert float(kink.margin) == 0.0


def test_float32_is_solved_in_float64() -> None:
    H, g, low, high = problem(4, 6, seed=9, condition=1e6)
    assert bool((box_qp(H, g, -1, 1).x == box_qp(H, g, -1.0, 1.0).x).all())  # whole numbers are numbers
    single = box_qp(H.float(), g.float(), low.float(), high.float())
    assert single.x.dtype == torch.float32
    same = box_qp(H.float().double(), g.float().double(), low.float().double(), high.float().double())
    torch.testing.assert_close(single.x, same.x.float(), rtol=0, atol=0)


def test_an_unconverged_sample_is_named_warned_and_raised() -> None:
    H, g, low, high = problem(8, 20, seed=12, condition=1e8)
    easy = torch.eye(20, dtype=torch.float64)
    H, g = torch.where(torch.arange(8)[:, None, None] == 3, H, easy), 0.05 * g
    with pytest.warns(UnconvergedWarning, match=r"1 of 8 samples \(first: \[3\]\)"):
        solution = box_qp(H, g, low, high, max_steps=1)
    assert solution.converged.tolist() == [row != 3 for row in range(8)]
    assert bool(((solution.x >= low) & (solution.x <= high)).all())
    with pytest.raises(UnconvergedError, match="raise max_steps"):
        box_qp(H, g, low, high, max_steps=1, strict=True)


def test_bad_input_is_refused_by_name() -> None:
    H, g, low, high = problem(3, 2, seed=11)
    indefinite = H.clone()
    indefinite[1] = -H[1]
    with pytest.raises(ValueError, match="sample 1 of 3: H is not positive definite"):
        box_qp(indefinite, g, low, high)
    with pytest.raises(ValueError, match="sample 2 of 3: infeasible"):
        box_qp(H, g, low, torch.where(torch.arange(3)[:, None] == 2, low - 1, high))
    with pytest.raises(ValueError, match="H and g must be finite"):
        box_qp(H, g * math.nan, low, high)
    with pytest.raises(ValueError, match="leaves no number"):
        box_qp(H, g, INF, INF)
    with pytest.raises(ValueError, match=r"H must be floating point \[..., 2, 2\]"):
        box_qp(H[..., :1], g)
    with pytest.raises(ValueError, match="g must be floating point"):
        box_qp(H, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tol must lie in"):
        box_qp(H, g, tol=0.0)
