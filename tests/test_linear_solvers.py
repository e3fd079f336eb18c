"""What every linear solver keeps to: rows on their own, honest options, and its place as `solve=` of the layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from problems import on_flat, on_rows, random_vector, spectrum
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

from benchmarks.oracles.lqr import gain_jvp, optimal_gain, random_system
from sim2real import Params, UnconvergedError, UnconvergedWarning
from sim2real.estimators import policy_sensitivity
from sim2real.solvers import (
    cg,
    dense,
    gmres,
    implicit_argmax,
    implicit_root,
    lyapunov,
    minres,
    neumann,
    nystrom_cg,
)

NEW = {
    "minres": partial(minres, tol=1e-12),
    "gmres": partial(gmres, tol=1e-12),
    "neumann": partial(neumann, tol=1e-12, max_steps=20_000),
    "nystrom": partial(nystrom_cg, tol=1e-12, rank=3),
}
EVERY = {"cg": partial(cg, tol=1e-12), "dense": partial(dense, tol=1e-12), **NEW}
POSITIVE = [0.5, 1.0, 2.0, 4.0, 7.0, 10.0]


@pytest.mark.parametrize("solve", EVERY.values(), ids=EVERY)
def test_a_batch_equals_a_loop_whatever_the_scales_of_its_rows(solve: Callable) -> None:
    # rows of different spectra, sizes of A and of b, and one with nothing to solve
    rows = [
        (POSITIVE, 1.0, 1.0),
        ([1.0, 1.0, 1.0, 3.0, 3.0, 3.0], 1e3, 1e-6),
        (POSITIVE, 1e-2, 1e2),
        (POSITIVE, 1.0, 0.0),
    ]
    matrices = torch.stack([size * spectrum(values, seed=k) for k, (values, size, _) in enumerate(rows)])
    b = torch.stack([size * random_vector(6, k) for k, (_, _, size) in enumerate(rows)])
    together = solve(on_rows(matrices), {"x": b}, batch_dims=1)
    assert together.report.converged
    worst = 0.0
    for k in range(len(rows)):
        alone = solve(on_flat(matrices[k]), {"x": b[k]})
        worst = max(worst, alone.report.residual)
        assert alone.report.converged
        # condition 20, residuals 1e-12, relative to the row's own size
        scale = float(alone.x["x"].abs().max())
        torch.testing.assert_close(together.x["x"][k], alone.x["x"], rtol=0, atol=1e-10 * scale)
    assert together.report.residual <= max(1e-12, worst)
    nested = solve(vmap(on_rows(matrices)), {"x": b.unsqueeze(0)}, batch_dims=2)
    torch.testing.assert_close(nested.x["x"][0], together.x["x"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("solve", EVERY.values(), ids=EVERY)
def test_one_bad_row_makes_the_batch_unconverged_and_leaves_the_others_right(solve: Callable) -> None:
    matrices = torch.stack([spectrum(POSITIVE), torch.zeros(6, 6, dtype=torch.float64)])
    b = torch.stack([random_vector(6, 1), random_vector(6, 2)])
    solution = solve(on_rows(matrices), {"x": b}, batch_dims=1)
    assert not solution.report.converged
    assert solution.report.residual == pytest.approx(1.0)
    torch.testing.assert_close(solution.x["x"][0], torch.linalg.solve(matrices[0], b[0]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solve", EVERY.values(), ids=EVERY)
def test_several_tensors_and_a_zero_right_hand_side(solve: Callable) -> None:
    A = spectrum(POSITIVE)

    def matvec(v: Params) -> Params:
        out = A @ torch.cat([v["x"].flatten(), v["y"], v["z"][None]])
        return {"z": out[5], "x": out[:4].reshape(2, 2), "y": out[4:5]}

    flat = random_vector(6)
    solution = solve(matvec, {"x": flat[:4].reshape(2, 2), "y": flat[4:5], "z": flat[5]})
    expected = torch.linalg.solve(A, flat)
    torch.testing.assert_close(solution.x["x"].flatten(), expected[:4], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(solution.x["z"], expected[5], rtol=1e-10, atol=1e-11)
    zero = solve(on_flat(A), {"x": torch.zeros(6, dtype=torch.float64)})
    assert zero.report.converged
    assert zero.report.residual == 0.0
    assert float(zero.x["x"].norm()) == 0.0


@pytest.mark.parametrize("solve", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("matvec", "b", "options", "message"),
    [
        (lambda v: v, {}, {}, "no parameters"),
        (lambda v: v, {"x": torch.tensor([1.0, float("nan")])}, {}, "not finite"),
        (lambda v: v, {"x": torch.ones(2)}, {"damping": -1.0}, "damping"),
        (lambda v: v, {"x": torch.ones(2)}, {"tol": 0.0}, "tol"),
        (lambda v: v, {"x": torch.ones(2)}, {"damping": float("nan")}, "damping"),
        (lambda v: {"x": v["x"][:1]}, {"x": torch.ones(2)}, {}, "matvec returned shape"),
        (lambda v: {"z": v["x"]}, {"x": torch.ones(2)}, {}, "matvec returned"),
        (lambda v: {"x": v["x"] * float("nan")}, {"x": torch.ones(2)}, {}, "not finite"),
        (lambda v: v, {"x": torch.ones(2, 3), "y": torch.ones(3)}, {"batch_dims": 1}, "batch dimensions"),
    ],
)
def test_bad_inputs_are_named(solve: Callable, matvec: Callable, b: Params, options: dict, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        solve(matvec, b, **options)


@pytest.mark.parametrize("solve", NEW.values(), ids=NEW)
def test_a_step_limit_below_one_is_named(solve: Callable) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        solve(lambda v: v, {"x": torch.ones(2)}, max_steps=0)


@pytest.mark.parametrize("solve", EVERY.values(), ids=EVERY)
def test_negative_curvature_met_in_the_first_step_is_reported(solve: Callable) -> None:
    b = {"x": random_vector(6)}
    solution = solve(lambda v: {"x": -2.0 * v["x"]}, b)
    assert solution.report.negative_curvature == pytest.approx(-2.0)
    if solution.report.converged:  # by the solvers that take any sign
        torch.testing.assert_close(solution.x["x"], -0.5 * b["x"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("solve", [gmres, partial(neumann, step=0.16)])
def test_negative_curvature_of_an_unsymmetric_operator_is_a_rayleigh_quotient(solve: Callable) -> None:
    A = torch.eye(6, dtype=torch.float64)
    A[0, 1] = 6.0  # eigenvalues 1, Rayleigh quotients from 1 - 3 to 1 + 3
    report = solve(on_flat(A), {"x": torch.eye(6, dtype=torch.float64)[1]}).report
    assert report.eigenvalues is None
    assert report.negative_curvature is not None
    assert -2.0 - 1e-12 <= report.negative_curvature < 0


@pytest.mark.parametrize("solve", [dense, minres, gmres, nystrom_cg, partial(neumann, max_steps=100)])
def test_rounding_of_float32_is_not_called_negative_curvature(solve: Callable) -> None:
    A = spectrum([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]).float()  # semidefinite, its null values rounded to about -1e-7
    solution = solve(on_flat(A), {"x": A @ random_vector(6).float()}, tol=1e-4)
    assert solution.x["x"].dtype == torch.float32
    assert solution.report.converged
    assert solution.report.negative_curvature is None


def lqr_return(theta: Params, nu: Params) -> Tensor:
    """-tr P of a fixed gain; its maximiser is the optimal gain."""
    closed, K = theta["A"] - theta["B"] @ nu["gain"], nu["gain"]
    return -lyapunov(closed, theta["Q"] + K.mT @ theta["R"] @ K, theta["discount"]).diagonal().sum()


@pytest.mark.parametrize("solve", NEW.values(), ids=NEW)
def test_policy_sensitivity_equals_bellman_by_scipy(solve: Callable) -> None:
    numbers = random_system(2, 1, 1)
    theta = {key: torch.tensor(value) for key, value in numbers.items()}
    nu = {"gain": torch.tensor(optimal_gain(numbers)[1])}
    v = {key: torch.zeros_like(value) for key, value in theta.items()}
    v["A"] = random_vector(4).reshape(2, 2)
    expected = torch.tensor(gain_jvp(numbers, {key: value.numpy() for key, value in v.items()}))
    sensitivity = policy_sensitivity(lqr_return, theta, nu, solve=solve, strict=True)
    assert sensitivity.report.converged
    # nu is optimal to 1e-13, residual 1e-12, condition below 1e3
    torch.testing.assert_close(sensitivity.jvp(v)["gain"], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("solve", NEW.values(), ids=NEW)
def test_policy_sensitivity_refuses_an_indefinite_hessian_whatever_solves_it(solve: Callable) -> None:
    saddle = lambda theta, nu: (theta["a"] * nu["x"]).sum() - 2 * nu["x"][0] ** 2 + nu["x"][1] ** 2 - nu["x"][2] ** 2
    a, nu = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with pytest.warns(UnconvergedWarning):
        report = policy_sensitivity(saddle, {"a": a}, {"x": nu}, solve=solve).report
    assert not report.converged
    assert report.negative_curvature is not None
    assert -2.0 * (1 + 1e-9) <= report.negative_curvature < 0
    with pytest.raises(UnconvergedError):
        policy_sensitivity(saddle, {"a": a}, {"x": nu}, solve=solve, strict=True)


def concave(theta: Params, nu: Params) -> Tensor:
    return nu["x"] @ theta["c"] - nu["x"] @ theta["M"] @ nu["x"] - 0.1 * nu["x"].sum() ** 4


@pytest.mark.parametrize("solve", NEW.values(), ids=NEW)
def test_implicit_argmax_equals_the_dense_solve_in_every_mode(solve: Callable) -> None:
    M, c, start = 0.1 * spectrum(POSITIVE), random_vector(6, 3), {"x": torch.zeros(6, dtype=torch.float64)}
    solver = newton(lambda theta, nu: grad(concave, argnums=1)(theta, nu))
    layer = implicit_argmax(concave, solver, solve=solve, strict=True)
    exact = implicit_argmax(concave, solver, solve=dense, strict=True)
    for mode in (jacrev, jacfwd):  # both solve all rows at once, by batch_dims
        ours, theirs = (mode(lambda c, f=f: f({"M": M, "c": c}, start)["x"])(c) for f in (layer, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


SYMMETRIC = spectrum(POSITIVE)
UNSYMMETRIC = torch.eye(6, dtype=torch.float64) + 0.1 * random_vector(36, 5).reshape(6, 6)


def balance(theta: Params, nu: Params) -> Params:
    return {"x": UNSYMMETRIC @ nu["x"] + 0.1 * torch.tanh(nu["x"]) - theta["c"]}


def symmetric_balance(theta: Params, nu: Params) -> Params:
    return {"x": SYMMETRIC @ nu["x"] + 0.1 * torch.tanh(nu["x"]) - theta["c"]}


def newton(residual: Callable[[Params, Params], Params]) -> Callable[[Params, Params], Params]:
    def solver(theta: Params, nu: Params) -> Params:
        x = nu["x"]
        for _ in range(20):
            slope = jacrev(lambda x: residual(theta, {"x": x})["x"])(x)
            x = x - torch.linalg.solve(slope, residual(theta, {"x": x})["x"])
        return {"x": x}

    return solver


@pytest.mark.parametrize("name", NEW)
def test_implicit_root_equals_the_inverse_of_its_jacobian(name: str) -> None:
    symmetric = name in ("minres", "nystrom")  # the solvers that need it
    residual, start = symmetric_balance if symmetric else balance, {"x": torch.zeros(6, dtype=torch.float64)}
    layer = implicit_root(residual, newton(residual), solve=NEW[name], symmetric=symmetric, strict=True)
    c, g = random_vector(6, 3), random_vector(6, 4)
    nu = layer({"c": c}, start)
    jacobian = jacrev(lambda x: residual({"c": c}, {"x": x})["x"])(nu["x"])
    pulled = grad(lambda c: layer({"c": c}, start)["x"] @ g)(c)
    torch.testing.assert_close(pulled, torch.linalg.solve(jacobian.T, g), rtol=1e-9, atol=1e-10)
    pushed = jacfwd(lambda c: layer({"c": c}, start)["x"])(c)
    torch.testing.assert_close(pushed, torch.linalg.inv(jacobian), rtol=1e-9, atol=1e-10)
