"""Levenberg-Marquardt against scipy.optimize.least_squares and closed forms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares as scipy_least_squares
from torch import Tensor

from sim2real.solvers.least_squares import Objective, QuadraticModel, least_squares, levenberg_marquardt, soft_l1

INFINITY = float("inf")


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def powell_singular(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def helical_valley(x: Tensor) -> Tensor:
    angle = torch.atan2(x[1], x[0]) / (2 * torch.pi)
    return torch.stack([10 * (x[2] - 10 * angle), 10 * (torch.hypot(x[0], x[1]) - 1), x[2]])


NOISE = 0.05 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exponential_fit(x: Tensor) -> Tensor:
    t = torch.linspace(0, 4, 40, dtype=torch.float64)
    data = 2.0 * torch.exp(-0.8 * t) + 0.5 + NOISE
    outliers = torch.zeros_like(data).index_fill(0, torch.tensor([3, 17, 31]), 2.0)
    return x[0] * torch.exp(-x[1] * t) + x[2] - data - outliers


def bard(x: Tensor) -> Tensor:
    y = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
    u = torch.arange(1.0, 16.0, dtype=torch.float64)
    v = 16 - u
    return torch.tensor(y, dtype=torch.float64) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


CASES = {  # residual, start, low, high, loss scale
    "rosenbrock": (rosenbrock, [-1.2, 1.0], -INFINITY, INFINITY, None),
    "rosenbrock bounded below the valley": (rosenbrock, [-1.2, 0.4], [-2.0, -1.0], [0.8, 0.5], None),
    "rosenbrock, bound through the start": (rosenbrock, [-2.0, 1.5], [-2.0, 1.5], [2.0, 3.0], None),
    "rosenbrock, start in a corner": (rosenbrock, [0.0, 0.0], [0.0, 0.0], [3.0, 3.0], None),
    "helical valley": (helical_valley, [-1.0, 0.1, 0.2], -INFINITY, INFINITY, None),
    "bard": (bard, [1.0, 1.0, 1.0], -INFINITY, INFINITY, None),
    "bard bounded": (bard, [1.0, 1.0, 1.0], [0.1, 0.0, 0.0], [2.0, 1.05, 2.2], None),
    "exponential": (exponential_fit, [1.0, 0.3, 0.0], -INFINITY, INFINITY, None),
    "exponential robust": (exponential_fit, [1.0, 0.3, 0.0], -INFINITY, INFINITY, 0.1),
    "exponential robust bounded": (exponential_fit, [1.0, 0.3, 0.0], [0.0, 0.0, 0.0], [3.0, 0.7, 1.0], 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_same_optimum_as_scipy(name: str) -> None:
    residual, start, low, high, scale = CASES[name]
    as_numpy = lambda x: residual(torch.tensor(x)).numpy()
    reference = scipy_least_squares(
        as_numpy,
        # scipy moves a start off its bound by itself
        start,
        bounds=(low, high),
        loss="linear" if scale is None else "soft_l1",
        f_scale=scale or 1.0,
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        jac="3-point",
    )
    box = {"low": torch.tensor(low, dtype=torch.float64), "high": torch.tensor(high, dtype=torch.float64)}
    found = least_squares(residual, torch.tensor(start, dtype=torch.float64), loss_scale=scale, **box)
    assert found.report.converged, found.report
    # scipy's interior iterates stop within about 1e-8 of a bound
    np.testing.assert_allclose(found.x.numpy(), reference.x, atol=1e-6, rtol=1e-6)
    assert float(found.value) <= reference.cost * (1 + 1e-9) + 1e-12


def test_powell_singular_reaches_the_optimum_despite_a_singular_jacobian() -> None:
    # J has rank 2 at the optimum 0: convergence is linear, and the value falls with the fourth power of x
    found = least_squares(powell_singular, torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=torch.float64), tolerance=1e-14)
    assert found.report.converged
    assert float(found.x.abs().max()) < 1e-5


def test_linear_problem_is_solved_in_closed_form_with_any_scaling() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    exact = torch.linalg.lstsq(A, b).solution
    for scales in ([1.0, 1.0, 1.0, 1.0], [1e6, 1e-6, 1.0, 1e3]):
        s = torch.tensor(scales, dtype=torch.float64)
        found = least_squares(lambda x, s=s: A @ (s * x) - b, torch.zeros(4, dtype=torch.float64))
        assert found.report.converged
        # the tolerance 1e-12 on the decrease leaves 1e-6 of the residual's size, damped steps leave less
        torch.testing.assert_close(found.x * s, exact, atol=1e-6, rtol=1e-6)


def test_start_on_a_bound_leaves_it_and_an_outward_gradient_stays() -> None:
    target = torch.tensor([0.7, -0.4], dtype=torch.float64)
    found = least_squares(lambda x: x - target, torch.zeros(2, dtype=torch.float64), low=0.0, high=1.0)
    # a decrease of 1e-12 of the value 0.08 is a distance of 4e-7
    torch.testing.assert_close(found.x, torch.tensor([0.7, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.x[1] == 0.0  # on the bound exactly
    assert found.held.tolist() == [False, True]


def test_a_variable_without_effect_stays_where_it_started() -> None:
    found = least_squares(lambda x: x[:1] - 1, torch.tensor([0.0, 5.0], dtype=torch.float64))
    assert found.report.converged
    assert found.x.tolist() == pytest.approx([1.0, 5.0], abs=1e-9)


def test_a_region_without_finite_values_is_backed_out_of() -> None:
    # sqrt(x) is NaN for x < 0; from 9 the full Gauss-Newton step to sqrt(x) = 0.1 lands at -8.4
    found = least_squares(lambda x: torch.sqrt(x) - 0.1, torch.tensor([9.0], dtype=torch.float64))
    assert found.report.converged
    assert float(found.x) == pytest.approx(0.01, rel=1e-6)
    assert (found.history[:, 3] == 0).any()


def test_too_few_steps_are_reported_as_unconverged() -> None:
    found = least_squares(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), max_steps=3)
    assert not found.report.converged
    assert found.report.steps == 3
    assert "3 steps" in found.report.status


def test_a_wrong_gradient_is_reported() -> None:
    objective = Objective(
        lambda x: (x.square().sum() / 2 + 1, None), lambda x, _: QuadraticModel(-x, torch.eye(2).to(x))
    )
    found = levenberg_marquardt(objective, torch.ones(2, dtype=torch.float64))
    assert not found.report.converged
    assert "gradient" in found.report.status


@pytest.mark.parametrize("bounded", [False, True])
def test_matrix_free_model_finds_the_same_optimum(bounded: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(80, 60, generator=generator, dtype=torch.float64)
    b = torch.randn(80, generator=generator, dtype=torch.float64)
    residual = lambda x: torch.sinh(0.1 * (A @ x)) - b

    def model(x: Tensor, r: Tensor) -> QuadraticModel:
        slope = 0.1 * torch.cosh(0.1 * (A @ x))
        product = lambda v: A.mT @ (slope.square() * (A @ v))
        return QuadraticModel(A.mT @ (slope * r), product, diagonal=slope.square() @ A.square())

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        r = residual(x)
        return r.square().sum() / 2, r

    box = {"low": -0.5, "high": 0.5} if bounded else {}
    start = torch.zeros(60, dtype=torch.float64)
    dense = least_squares(residual, start, **box)
    free = levenberg_marquardt(Objective(value, model), start, **box)
    assert dense.report.converged
    assert free.report.converged
    torch.testing.assert_close(free.x, dense.x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("product", [lambda v: -2 * v, lambda v: 0 * v], ids=["negative", "none"])
def test_a_product_without_positive_curvature_still_descends(product: Callable) -> None:
    model = lambda x, _: QuadraticModel(2 * x, product, diagonal=torch.full_like(x, 2.0))
    objective = Objective(lambda x: (x.square().sum(), None), model)
    found = levenberg_marquardt(objective, torch.ones(2, dtype=torch.float64), low=-3.0, high=3.0)
    # never "converged" away from the minimum
    assert not found.report.converged or float(found.x.abs().max()) < 1e-6
    assert float(found.value) < 0.1


def test_matrix_free_model_needs_a_scale() -> None:
    objective = Objective(lambda x: (x.square().sum(), None), lambda x, _: QuadraticModel(2 * x, lambda v: 2 * v))
    with pytest.raises(ValueError, match="diagonal"):
        levenberg_marquardt(objective, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["rosenbrock", "exponential robust bounded"])
def test_resuming_after_any_step_is_bitwise_equal(name: str) -> None:
    residual, start, low, high, scale = CASES[name]
    options = {"low": torch.tensor(low), "high": torch.tensor(high), "loss_scale": scale}
    start = torch.tensor(start, dtype=torch.float64)
    snapshots: list[dict[str, Tensor]] = []
    whole = least_squares(residual, start, on_step=snapshots.append, **options)
    assert len(snapshots) == whole.report.steps
    for snapshot in snapshots:
        resumed = least_squares(residual, start, state=snapshot, **options)
        assert torch.equal(resumed.x, whole.x)
        assert torch.equal(resumed.history, whole.history)
        assert resumed.report == whole.report


def test_soft_l1_is_scipys_loss() -> None:
    r = torch.linspace(-3, 3, 13, dtype=torch.float64)
    z = (r / 0.5) ** 2
    loss, weight = soft_l1(r, 0.5)
    torch.testing.assert_close(loss, 0.5**2 * 0.5 * 2 * ((1 + z).sqrt() - 1))
    torch.testing.assert_close(weight, (1 + z).rsqrt())


def test_bad_starts_and_snapshots_are_named() -> None:
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="variable 1 starts at 2"):
        least_squares(rosenbrock, x, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="start is nan"):
        least_squares(lambda x: torch.sqrt(x - 10), x)
    with pytest.raises(ValueError, match="snapshot"):
        least_squares(rosenbrock, x, state={"x": x})


def test_a_wrong_jacobian_does_not_look_converged() -> None:
    # the Jacobian of another function: after a first step that happens to descend, no step does
    residual = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    wrong = lambda x: torch.tensor([[3.0, 10.0], [1.0, 0.0]], dtype=x.dtype)
    found = least_squares(residual, torch.tensor([-1.2, 1.0], dtype=torch.float64), jacobian=wrong, max_steps=60)
    assert found.value > 1e-3  # Rosenbrock's minimum is 0
    assert not found.report.converged
