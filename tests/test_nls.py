"""The least-squares layer against closed forms, 50-digit solutions and theseus."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from benchmarks.bars import Figure
from benchmarks.nls import decay_fit, decay_residual, exact_derivative, s_nls
from sim2real import Params, ravel
from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.nls import gauss_newton_gap, least_squares_layer, theseus_solver


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = randn(8, 3, seed=1)


def linear(theta: Params, nu: Params) -> Tensor:
    return A @ nu["x"] - theta["b"]


def cubic(theta: Params, nu: Params) -> Tensor:
    """r = (nu - a, nu^2 - c): stationary where nu - a + 2 nu (nu^2 - c) = 0, scalars."""
    return torch.stack([nu["x"] - theta["a"], nu["x"] ** 2 - theta["c"]])


def cubic_theta() -> Params:
    return {"a": torch.tensor(1.2, dtype=torch.float64), "c": torch.tensor(0.5, dtype=torch.float64)}


START = {"x": torch.tensor(1.0, dtype=torch.float64)}


def test_linear_least_squares_is_the_pseudoinverse() -> None:
    layer, nu0 = least_squares_layer(linear), {"x": torch.zeros(3, dtype=torch.float64)}
    b = randn(8, seed=2)
    for derivative in (jacrev, jacfwd):
        J = derivative(lambda b: layer({"b": b}, nu0)["x"])(b)
        torch.testing.assert_close(J, torch.linalg.pinv(A), rtol=0, atol=1e-13)
    nu = layer({"b": b}, nu0)
    torch.testing.assert_close(nu["x"], torch.linalg.pinv(A) @ b, rtol=0, atol=1e-13)
    # without curvature of r the Gauss-Newton Hessian is exact
    assert gauss_newton_gap(linear, {"b": b}, nu, {"x": randn(3)}) < 1e-13
    assert gauss_newton_gap(linear, {"b": b}, nu, {"x": torch.zeros(3, dtype=torch.float64)}) == 0.0


def test_scalar_layer_first_and_second_derivative() -> None:
    # F(a, c, x) = x - a + 2x(x^2 - c): dx/da = 1/F_x, dx/dc = 2x/F_x, d2x/da2 = -F_xx/F_x^3
    theta, layer = cubic_theta(), least_squares_layer(cubic)
    x = float(layer(theta, START)["x"])
    slope, bend = 1 + 6 * x**2 - 2 * 0.5, 12 * x
    first = jacrev(lambda th: layer(th, START)["x"])(theta)
    assert float(first["a"]) == pytest.approx(1 / slope, rel=1e-12)
    assert float(first["c"]) == pytest.approx(2 * x / slope, rel=1e-12)
    second = hessian(lambda a: layer(theta | {"a": a}, START)["x"])(theta["a"])
    assert float(second) == pytest.approx(-bend / slope**3, rel=1e-10)


def test_gauss_newton_gap_in_closed_form() -> None:
    # J'J = 1 + 4x^2 against H = 1 + 4x^2 + 2(x^2 - c)
    theta, layer = cubic_theta(), least_squares_layer(cubic)
    nu = layer(theta, START)
    x = float(nu["x"])
    expected = abs((1 + 6 * x**2 - 1.0) / (1 + 4 * x**2) - 1)
    one = {"x": torch.tensor(1.0, dtype=torch.float64)}
    assert gauss_newton_gap(cubic, theta, nu, one) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(KeyError, match="cotangent"):
        gauss_newton_gap(cubic, theta, nu, {"y": one["x"]})


def test_vmap_is_the_loop() -> None:
    layer, a = least_squares_layer(cubic), torch.tensor([0.8, 1.2, 2.0], dtype=torch.float64)
    slope = lambda a: jacrev(lambda s: layer(cubic_theta() | {"a": s}, START)["x"])(a)
    torch.testing.assert_close(vmap(slope)(a), torch.stack([slope(s) for s in a]), rtol=1e-12, atol=0)


def test_central_differences_of_a_re_solve() -> None:
    # an exponential fit; fourth-order differences of polished solutions are good to about 1e-11 at this step
    fit = decay_fit("well")
    layer = least_squares_layer(lambda theta, nu: decay_residual(fit.times, theta, nu))
    value = lambda s: layer(fit.theta | {"offset": fit.theta["offset"] + s}, fit.nu0)["rate"][0]
    h = 2e-3
    difference = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    exact = jacrev(value)(torch.zeros((), dtype=torch.float64))
    assert float(exact) == pytest.approx(float(difference), rel=1e-8)


@pytest.mark.parametrize("kind", ["well", "ill"])
def test_derivative_against_fifty_digits(kind: str) -> None:
    # rounding is amplified by the condition of the Hessian, 7 and 4e6: measured 3e-16 and 1e-10
    fit = decay_fit(kind)
    layer = least_squares_layer(lambda theta, nu: decay_residual(fit.times, theta, nu))
    direction = {key: randn(*x.shape, seed=3) for key, x in fit.theta.items()}
    nu, pushed = jvp(lambda theta: layer(theta, fit.nu0), (fit.theta,), (direction,))
    exact = exact_derivative(fit, {key: x.detach() for key, x in nu.items()}, direction)
    assert float((ravel(pushed) - exact).norm() / exact.norm()) < 1e-8


def test_bar_on_well_and_ill_conditioned_fits() -> None:
    pytest.importorskip("theseus")
    figures: dict[str, Figure] = {figure.metric: figure for figure in s_nls(True)}
    for kind in ("well", "ill"):
        assert figures[kind].value < 1e-8
        assert figures[f"{kind}-theseus-forward"].value < 1e-8
        # theseus differentiates its last Gauss-Newton step: off by the gap, a few per cent on these fits
        assert figures[f"{kind}-theseus-implicit"].value > 1e-2
        assert figures[f"{kind}-theseus-unroll"].value < 1e-6


def test_data_without_noise_give_the_true_decay() -> None:
    fit = decay_fit("well")
    clean = {"data": torch.exp(-fit.times), "offset": fit.theta["offset"]}
    nu = least_squares_layer(lambda theta, nu: decay_residual(fit.times, theta, nu))(clean, fit.nu0)
    assert float(nu["amplitude"]) == pytest.approx(1.0, abs=1e-12)
    assert float(nu["rate"]) == pytest.approx(1.0, abs=1e-12)


def test_polish_makes_a_coarse_solver_exact() -> None:
    theta = cubic_theta()
    coarse = lambda theta, nu0: {"x": torch.tensor(1.0, dtype=torch.float64)}
    exact = float(least_squares_layer(cubic)(theta, START)["x"])
    assert float(least_squares_layer(cubic, coarse)(theta, START)["x"]) == pytest.approx(exact, rel=1e-14)
    with pytest.warns(UnconvergedWarning, match="not stationary"):
        least_squares_layer(cubic, coarse, polish=0)(theta, START)
    with pytest.raises(UnconvergedError, match="not stationary"):
        least_squares_layer(cubic, coarse, polish=0, strict=True)(theta, START)
    with pytest.raises(ValueError, match="polish"):
        least_squares_layer(cubic, polish=-1)


def test_answer_outside_the_domain_is_refused() -> None:
    root = lambda theta, nu: (nu["x"].sqrt() - theta["a"])[None]
    outside = lambda theta, nu0: {"x": torch.tensor(-1.0, dtype=torch.float64)}
    with pytest.raises(UnconvergedError, match="not stationary"):
        least_squares_layer(root, outside, strict=True)({"a": cubic_theta()["a"]}, START)


def test_stationary_point_that_is_no_minimum_is_told() -> None:
    # r = x^2 - 1 at x = 0: f has a maximum there
    hill = lambda theta, nu: (nu["x"] ** 2 - theta["c"])[None]
    theta = {"c": torch.tensor(1.0, dtype=torch.float64)}
    zero = {"x": torch.tensor(0.0, dtype=torch.float64)}
    layer = least_squares_layer(hill, lambda theta, nu0: nu0, strict=True)
    with pytest.raises(UnconvergedError, match="eigenvalue"):
        jacrev(lambda th: layer(th, zero)["x"])(theta)


def test_gap_of_a_singular_gauss_newton_hessian_is_refused() -> None:
    # r = (nu_0 - a): nu_1 is not seen at all
    blind = lambda theta, nu: (nu["x"][0] - theta["a"])[None]
    theta, nu = {"a": torch.tensor(0.3, dtype=torch.float64)}, {"x": torch.tensor([0.3, 0.0], dtype=torch.float64)}
    with pytest.raises(UnconvergedError, match="system with H"):
        gauss_newton_gap(blind, theta, nu, {"x": torch.ones(2, dtype=torch.float64)})


def test_theseus_goes_forward_only() -> None:
    pytest.importorskip("theseus")
    theta = cubic_theta()
    layer = least_squares_layer(cubic, theseus_solver(cubic))
    expected = least_squares_layer(cubic)(theta, START)["x"]
    torch.testing.assert_close(layer(theta, START)["x"], expected, rtol=1e-13, atol=0)
    found = theseus_solver(cubic, tolerance=1e-10)(theta, START)
    assert not math.isnan(float(found["x"]))
    assert found["x"].shape == ()
