"""The barrier QP against its own optimality conditions, the sharp QP as a limit, and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers import InfeasibleError, qp, smooth_qp

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(batch: int, n: int, p: int, m: int, seed: int) -> Six:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    L, A, G, inside = draw(batch, n, n), draw(batch, p, n), draw(batch, m, n), draw(batch, n)
    apply = lambda M, v: (M @ v.unsqueeze(-1)).squeeze(-1)
    return L @ L.mT, 3 * draw(batch, n), A, apply(A, inside), G, apply(G, inside) + draw(batch, m).abs()


def test_one_variable_in_closed_form() -> None:
    # min x^2 / 2 - x - mu log(-x): x^2 - x - mu = 0 with x < 0
    one = torch.ones(1, 1, dtype=torch.float64)
    for mu in (1e-6, 1e-2, 1.0, 100.0):
        found = smooth_qp(one, -one[0], G=one, h=0 * one[0], smoothing=mu)
        # the root without cancellation
        expected = -2 * mu / (1 + math.sqrt(1 + 4 * mu))
        assert float(found.x) == pytest.approx(expected, rel=1e-9)
        assert float(found.inequality_multipliers) == pytest.approx(-mu / expected, rel=1e-9)


@pytest.mark.parametrize("mu", [1e-8, 1e-3, 10.0])
def test_is_the_minimiser_of_the_barrier(mu: float) -> None:
    H, g, A, b, G, h = problem(6, 5, 2, 9, seed=1)
    found = smooth_qp(H, g, A, b, G, h, smoothing=mu)
    assert bool(found.converged.all())
    slack = h - (G @ found.x.unsqueeze(-1)).squeeze(-1)
    assert float(slack.min()) > 0
    slope = (H @ found.x.unsqueeze(-1)).squeeze(-1) + g + (G.mT @ (mu / slack).unsqueeze(-1)).squeeze(-1)
    slope = slope + (A.mT @ found.equality_multipliers.unsqueeze(-1)).squeeze(-1)
    # mu / s of slacks near 1e-9 loses digits of h - G x: 1e-16 / 1e-9, times multipliers of 10 and more
    assert float(slope.abs().max()) < (1e-5 if mu < 1e-6 else 1e-8)
    torch.testing.assert_close((A @ found.x.unsqueeze(-1)).squeeze(-1), b, rtol=0, atol=1e-11)
    if mu == 10.0:  # the same by scipy, on the null space of A
        for row in range(2):
            null = torch.linalg.svd(A[row]).Vh[2:].mT.numpy()
            start = found.x[row].numpy() + 0.01 * null @ np.ones(3)

            def cost(t: np.ndarray, row: int = row, start: np.ndarray = start, null: np.ndarray = null) -> float:
                x = start + null @ t
                inside = h[row].numpy() - G[row].numpy() @ x
                if inside.min() <= 0:
                    return math.inf
                return 0.5 * x @ H[row].numpy() @ x + g[row].numpy() @ x - mu * np.log(inside).sum()

            best = minimize(cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
            np.testing.assert_allclose(found.x[row], start + null @ best.x, rtol=0, atol=1e-5)


def test_goes_to_the_sharp_solution_as_the_smoothing_goes_to_zero() -> None:
    program = problem(8, 4, 1, 6, seed=2)
    sharp = qp(*program)
    cost = lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, program[0], x) + (program[1] * x).sum(-1)
    last = math.inf
    for mu in (1e-2, 1e-4, 1e-6):
        found = smooth_qp(*program, smoothing=mu)
        excess = cost(found.x) - cost(sharp.x)
        assert float(excess.max()) <= 6 * mu  # the bound of the theory: rows times mu
        assert float(excess.min()) > -1e-12
        distance = float((found.x - sharp.x).abs().max())
        assert distance < last
        last = distance
    assert last < 1e-2


def both(*program: Tensor) -> Tensor:
    found = smooth_qp(*program, smoothing=0.1)
    return torch.cat([found.x, found.equality_multipliers, found.inequality_multipliers], -1)


def test_derivatives_of_first_and_second_order_against_differences() -> None:
    program = tuple(value.clone().requires_grad_() for value in problem(1, 3, 1, 3, seed=3))
    assert gradcheck(both, program, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(both, program, check_fwd_over_rev=True, fast_mode=True)


def test_every_mode_agrees_and_vmap_is_a_loop() -> None:
    H, g, A, b, G, h = (value[0] for value in problem(1, 4, 1, 4, seed=4))
    loss = lambda u: both(H * u[0], g * u[1], A * u[2], b, G, h + u.sum()).pow(2).sum()
    at = torch.ones(3, dtype=torch.float64)
    expected = jacrev(jacrev(loss))(at)
    for derivative in (hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        # the solve stops at 1e-12 of the path
        torch.testing.assert_close(derivative(at), expected, rtol=1e-7, atol=1e-8)
    many = at + 0.1 * torch.arange(3, dtype=torch.float64)[:, None]
    slopes = torch.stack([grad(loss)(u) for u in many])
    torch.testing.assert_close(vmap(grad(loss))(many), slopes, rtol=1e-8, atol=1e-9)


def test_crosses_a_kink_smoothly() -> None:
    """x = clip(t, high=1) has a corner at t = 1; of the smooth one the second derivative exists there."""
    one = torch.ones(1, 1, dtype=torch.float64)
    x = lambda t: smooth_qp(one, -t[None], G=one, h=one[0], smoothing=1e-3).x.sum()
    at = torch.tensor(1.0, dtype=torch.float64)
    bend = float(hessian(x)(at))
    h = 1e-4
    assert bend == pytest.approx(float(x(at + h) - 2 * x(at) + x(at - h)) / h**2, rel=1e-3)
    assert -100 < bend < -1


def test_absent_rows_units_and_dtype() -> None:
    H, g, A, b, G, h = problem(4, 3, 1, 4, seed=5)
    some = h.clone()
    some[:, 2] = math.inf
    kept = [0, 1, 3]
    found = smooth_qp(H, g, A, b, G, some, smoothing=0.1)
    torch.testing.assert_close(
        found.x, smooth_qp(H, g, A, b, G[:, kept], h[:, kept], smoothing=0.1).x, rtol=1e-9, atol=1e-10
    )
    assert found.inequality_multipliers[:, 2].tolist() == [0.0] * 4
    free = smooth_qp(H, g, smoothing=0.1)
    torch.testing.assert_close(free.x, -torch.linalg.inv(H).matmul(g.unsqueeze(-1)).squeeze(-1), rtol=1e-9, atol=1e-9)
    unit, row = torch.logspace(-4, 4, 3, dtype=torch.float64), torch.logspace(3, -3, 4, dtype=torch.float64)
    scaled = smooth_qp(
        H / (unit[:, None] * unit), g / unit, A / unit, b, row[:, None] * G / unit, row * h, smoothing=0.1
    )
    torch.testing.assert_close(scaled.x / unit, smooth_qp(H, g, A, b, G, h, smoothing=0.1).x, rtol=1e-8, atol=1e-9)
    assert smooth_qp(*(v.float() for v in (H, g, A, b, G, h)), smoothing=0.1).x.dtype == torch.float32


def test_failures_are_named() -> None:
    H, g, A, b, G, h = problem(3, 3, 0, 4, seed=6)
    with pytest.raises(ValueError, match="smoothing be positive"):
        smooth_qp(H, g, smoothing=0.0)
    with pytest.warns(UnconvergedWarning, match="off the central path"):
        smooth_qp(H, g, A, b, G, h, smoothing=1e-6, max_steps=2)
    with pytest.raises(UnconvergedError, match="off the central path"):
        smooth_qp(H, g, A, b, G, h, smoothing=1e-6, max_steps=2, strict=True)
    with pytest.raises(ValueError, match=r"on_failure .* must be 'raise' or 'nan', got 'none'"):
        smooth_qp(H, g, smoothing=0.1, on_failure="none")
    one, pinch = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    # x <= 1 and x >= 1 leave no interior; the distance of 5e-19 to a bound of 1 is lost to rounding
    for rows, limit, mu in ((pinch, pinch[:, 0], 1e-2), (-one, -one[0], 1e-18)):
        with pytest.warns(UnconvergedWarning, match="raise max_steps or smoothing"):
            assert not bool(smooth_qp(one, one[0], G=rows, h=limit, smoothing=mu).converged)
    G, h = G.clone(), h.clone()
    G[1, 3], h[1, 3] = -G[1, 0], -h[1, 0] - 1.0
    with pytest.raises(InfeasibleError, match="sample 1 is infeasible"):
        smooth_qp(H, g, A, b, G, h, smoothing=0.1)

    def loss(g: Tensor) -> Tensor:
        found = smooth_qp(H, g, A, b, G, h, smoothing=0.1, on_failure="nan")
        assert found.infeasible.tolist() == [False, True, False]
        return torch.where(found.x.isnan(), 0.0, found.x).sum()

    slope = torch.autograd.grad(loss(leaf := g.clone().requires_grad_()), leaf)[0]
    assert slope[1].tolist() == [0.0] * 3
    assert bool(torch.isfinite(slope).all())
