"""Constrained steps against scipy's SLSQP and exact vertices, and a whole constrained search on exact LQR functions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov
from scipy.optimize import minimize

from sim2real import SafeStep, lagrangian_step, penalized_return, safe_step
from sim2real.solvers import lyapunov, riccati
from sim2real.trust_region import bfgs_update, trust_region_step
from tests.problems import scalar, stack

INF = float("inf")


def random_program(seed: int) -> tuple[np.ndarray, ...]:
    """g, B (singular for odd seeds), low, high, margins, slopes and radius; some constraints violated at 0."""
    draw = np.random.default_rng(seed)
    size, count = int(draw.integers(1, 6)), int(draw.integers(0, 4))
    root = draw.standard_normal((size, max(1, size - seed % 2)))
    high = draw.random(size)
    high[draw.random(size) < 0.3] = np.inf
    margins, slopes = 0.3 * draw.standard_normal(count) + 0.1, draw.standard_normal((count, size))
    radius = np.array(draw.random() + 0.1)
    return draw.standard_normal(size), root @ root.T, -draw.random(size), high, margins, slopes, radius


def solved(program: tuple[np.ndarray, ...]) -> SafeStep:
    g, B, low, high, margins, slopes, radius = (torch.tensor(x) for x in program)
    return safe_step(g, B, float(radius), low, high, margins, slopes)


@pytest.mark.parametrize("seed", range(25))
def test_step_is_the_best_one(seed: int) -> None:
    program = random_program(seed)
    g, B, low, high, m, S, radius = program
    found = solved(program)
    step = found.step.numpy()
    assert np.linalg.norm(step) <= radius * (1 + 1e-9)
    assert ((low <= step) & (step <= high)).all()
    np.testing.assert_allclose(found.margins, m + S @ step, atol=1e-14)
    cons: list[dict] = [{"type": "ineq", "fun": lambda x: radius**2 - x @ x}]
    if len(m):
        cons.append({"type": "ineq", "fun": lambda x: m + S @ x})
    bounds = list(zip(low, high, strict=True))
    value = lambda x: -(g @ x - 0.5 * x @ B @ x)
    tries = [
        minimize(value, start, bounds=bounds, constraints=cons, method="SLSQP", options={"ftol": 1e-13, "maxiter": 500})
        for start in 0.01 * np.random.default_rng(0).standard_normal((3, len(g)))
    ]
    feasible = [t.fun for t in tries if t.success and (not len(m) or (m + S @ t.x).min() > -1e-8)]
    assert bool(feasible) != found.conceded
    if feasible:
        # SLSQP stops within about 1e-7 of the optimum
        assert value(step) == pytest.approx(min(feasible), abs=2e-6)
        assert not len(m) or float(found.margins.min()) > -1e-9
        # stationarity off the box and the ball
        lagrange = g - B @ step + S.T @ found.multipliers.numpy()
        loose = (step > low + 1e-7) & (step < high - 1e-7)
        if np.linalg.norm(step) < radius * (1 - 1e-7):
            np.testing.assert_allclose(lagrange[loose], 0, atol=1e-6)
        assert float(found.multipliers @ found.margins.clamp(min=0.0)) < 1e-6 if len(m) else True


def test_what_cannot_be_met_is_approached() -> None:
    # margin -2 with slope (1, 0) in a ball of 1: the first step goes 0.8 that way, the rest is free for the return
    found = safe_step(
        stack(0.0, 1.0),
        torch.zeros(2, 2).double(),
        1.0,
        stack(-9.0, -9.0),
        stack(9.0, 9.0),
        stack(-2.0),
        stack([1.0, 0.0]),
    )
    torch.testing.assert_close(found.step, stack(0.8, 0.6), rtol=0, atol=1e-6)
    assert found.conceded
    assert float(found.margins) == pytest.approx(-1.2, abs=1e-6)
    # two that exclude one another, x >= 1 and x <= -1: least squares meet in the middle
    found = safe_step(
        stack(0.1), torch.eye(1).double(), 0.5, stack(-9.0), stack(9.0), stack(-1.0, -1.0), stack([1.0], [-1.0])
    )
    torch.testing.assert_close(found.step, stack(0.0), rtol=0, atol=1e-6)
    assert found.conceded
    # a constraint that nothing moves
    found = safe_step(stack(1.0), torch.eye(1).double(), 0.5, stack(-9.0), stack(9.0), stack(-1.0), stack([0.0]))
    torch.testing.assert_close(found.step, stack(0.5), rtol=0, atol=1e-9)
    assert found.conceded


@pytest.mark.parametrize("seed", [58, 77, 135, 155, 565])
def test_thin_sets_of_stiff_problems_are_not_lost(seed: int) -> None:
    # variables without room, constraints out of reach and curvatures from 1e-8 to 1e4: what can be met is still met
    draw, size, count = np.random.default_rng(seed), 10, 8
    turn = np.linalg.qr(draw.standard_normal((size, size)))[0]
    B, S = turn @ np.diag(10 ** draw.uniform(-8, 4, size)) @ turn.T, draw.standard_normal((count, size))
    scale = np.linalg.norm(S, axis=1)
    m = scale * (0.3 * draw.standard_normal(count) - 0.2)
    low, high = -draw.random(size) * (draw.random(size) < 0.9), draw.random(size) * (draw.random(size) < 0.9)
    found = solved((draw.standard_normal(size), B, low, high, m, S, np.array(1.0)))
    violated = lambda x: float((np.minimum((m + S @ x) / scale, 0) ** 2).sum())
    best = minimize(
        violated,
        np.zeros(size),
        bounds=list(zip(low, high, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda x: 0.64 - x @ x}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.conceded
    assert violated(found.step.numpy()) <= 1.001 * best.fun + 1e-9


def test_without_constraints_it_is_the_trust_region_step() -> None:
    for seed in range(4):
        g, B, _, _, _, _, radius = (torch.tensor(x) for x in random_program(2 * seed))
        far = torch.full_like(g, INF)
        found = safe_step(g, B, float(radius), -far, far, torch.zeros(0).double(), torch.zeros(0, len(g)).double())
        expected = trust_region_step(g, B, float(radius), -far, far)
        torch.testing.assert_close(found.step, expected, rtol=1e-8, atol=1e-10)


def test_no_radius_no_step() -> None:
    program = random_program(3)
    found = solved((*program[:-1], np.array(0.0)))
    assert not bool(found.step.any())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"radius": -1.0}, "radius"),
        ({"margins": torch.tensor([torch.nan])}, "margins must be finite"),
        ({"slopes": torch.zeros(1, 3)}, r"slopes \[1, 2\]"),
        ({"low": torch.tensor([0.1, -1.0])}, "exclude"),
        ({"low": stack(-1.0), "high": stack(1.0)}, r"bounds \[2\]"),
        ({"low": stack(-1.0)}, r"bounds \[2\]"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, words: str) -> None:
    fine: dict = {
        "gradient": stack(1.0, 0.0),
        "curvature": torch.eye(2).double(),
        "radius": 1.0,
        "low": stack(-1.0, -1.0),
        "high": stack(1.0, 1.0),
        "margins": stack(1.0),
        "slopes": stack([1.0, 0.0]),
    }
    with pytest.raises(ValueError, match=words):
        safe_step(**fine | change)
    for multiplier, penalty in ((0.0, 0.0), (-1.0, 1.0), (torch.nan, 1.0)):
        with pytest.raises(ValueError, match="penalty > 0"):
            lagrangian_step(**fine, multipliers=stack(multiplier), penalty=penalty)


def test_multipliers_of_the_augmented_lagrangian_converge() -> None:
    # max -(x^2 + 2 y^2)/2 + 3 x + 2 y  subject to  1 - x - y >= 0:  x = 5/3, y = -1/3... solved by its KKT system
    B, g, S = torch.diag(stack(1.0, 2.0)), stack(3.0, 2.0), stack([-1.0, -1.0])
    kkt = np.block([[B.numpy(), -S.numpy().T], [S.numpy(), np.zeros((1, 1))]])
    x, y, mu = np.linalg.solve(kkt, np.array([3.0, 2.0, -1.0]))
    at, multipliers, far = stack(0.0, 0.0), stack(0.0), stack(9.0, 9.0)
    for _ in range(60):
        margin = 1 + S @ at
        out = lagrangian_step(g - B @ at, B, 5.0, -far, far, margin, S, multipliers=multipliers, penalty=2.0)
        at, multipliers = at + out.step, out.multipliers
    torch.testing.assert_close(at, stack(x, y), rtol=0, atol=1e-9)
    torch.testing.assert_close(multipliers, stack(mu), rtol=0, atol=1e-9)


def test_penalized_return() -> None:
    assert penalized_return(1.0, stack(0.5, -0.2, -0.1), 10.0) == pytest.approx(-2.0)


# A constrained search on exact functions: model theta = (damping, input gain) -> K*(theta), judged in a world with
# other matrices; the input's variance must stay below a limit.

WORLD = (np.array([[1.0, 0.2], [0.0, 1.0]]), np.array([[0.0], [0.3]]))
COST, R, GAMMA, LIMIT = np.diag([1.0, 0.1]), np.array([[0.01]]), 0.95, 2.0


def scipy_functions(theta: np.ndarray) -> tuple[float, float]:
    """Return and margin of the world under the gain that is optimal in the model, by scipy."""
    A, B = np.array([[1.0, 0.2], [0.0, theta[0]]]), np.array([[0.0], [theta[1]]])
    P = solve_discrete_are(np.sqrt(GAMMA) * A, np.sqrt(GAMMA) * B, COST, R)
    K = GAMMA * np.linalg.solve(R + GAMMA * B.T @ P @ B, B.T @ P @ A)
    closed = np.sqrt(GAMMA) * (WORLD[0] - WORLD[1] @ K)
    start = np.eye(2) + GAMMA / (1 - GAMMA) * 0.05 * np.eye(2)
    X = solve_discrete_lyapunov(closed, start)
    return -float(((COST + K.T @ R @ K) * X).sum()), LIMIT - (1 - GAMMA) * float((K @ X @ K.T)[0, 0])


def library_functions(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    A = stack([1.0, 0.2], [0.0, 0.0]) + theta[0] * stack([0.0, 0.0], [0.0, 1.0])
    B = theta[1] * stack([0.0], [1.0])
    K = riccati(A, B, torch.tensor(COST), torch.tensor(R), GAMMA)[1]
    world_A, world_B = map(torch.tensor, WORLD)
    start = (1 + GAMMA / (1 - GAMMA) * 0.05) * torch.eye(2).double()
    X = lyapunov((world_A - world_B @ K).mT, start, GAMMA)
    value = -((torch.tensor(COST) + K.mT @ torch.tensor(R) @ K) * X).sum()
    return value, LIMIT - (1 - GAMMA) * (K @ X @ K.mT).squeeze()


def test_constrained_optimum_of_theta_on_lqr() -> None:
    start, low, high = np.array([1.0, 0.3]), np.array([0.5, 0.05]), np.array([1.3, 2.0])
    free = minimize(lambda t: -scipy_functions(t)[0], start, bounds=list(zip(low, high, strict=True)))
    assert scipy_functions(free.x)[1] < -1.0  # the constraint matters
    reference = minimize(
        lambda t: -scipy_functions(t)[0],
        start,
        bounds=list(zip(low, high, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda t: scipy_functions(t)[1]}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert reference.success
    theta, margin, multipliers = search(torch.tensor(start), torch.tensor(low), torch.tensor(high), library_functions)
    assert float(margin) > -1e-9
    value, reference_value = scipy_functions(theta.numpy())[0], scipy_functions(reference.x)[0]
    # SLSQP differentiates numerically, which leaves about 1e-8 of the optimum
    assert value == pytest.approx(reference_value, rel=1e-6)
    np.testing.assert_allclose(theta, reference.x, atol=2e-3)
    # sensitivity of the optimum to the limit is the multiplier
    assert float(multipliers) > 0.1


def search(
    theta: torch.Tensor, low: torch.Tensor, high: torch.Tensor, functions: Callable
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequential quadratic programming with `safe_step`: theta, margin and multiplier at the end."""

    def linearised(at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, margin = functions(at)
        slopes = torch.stack([torch.autograd.functional.jacobian(lambda t, k=k: functions(t)[k], at) for k in (0, 1)])
        return value, margin.reshape(1), slopes[0], slopes[1:]

    curvature, radius, multipliers = torch.zeros(2, 2).double(), 0.1, stack(0.0)
    value, margin, g, S = linearised(theta)
    for _ in range(60):
        out = safe_step(g, curvature, radius, low - theta, high - theta, margin, S)
        there = linearised(theta + out.step)
        penalty = 2 * float(torch.maximum(out.multipliers, multipliers)) + 1e-3
        gain = penalized_return(float(there[0]), there[1], penalty) - penalized_return(float(value), margin, penalty)
        fall = (g + S.T @ out.multipliers) - (there[2] + there[3].T @ out.multipliers)
        curvature = bfgs_update(curvature, out.step, fall)
        if float(out.step.norm()) < 1e-7:
            break
        if gain > -1e-13:
            theta, (value, margin, g, S), multipliers = theta + out.step, there, out.multipliers
            radius = min(2 * radius, 1.0)
        else:
            radius = 0.5 * min(radius, float(out.step.norm()))
    return theta, margin, multipliers


def test_the_multiplier_is_the_price_of_the_limit() -> None:
    # max -x^2/2 + 2x subject to limit - x >= 0: the return is 2 l - l^2/2 and its slope in l is 2 - l
    for limit in (0.5, 1.0):
        out = safe_step(stack(2.0), torch.eye(1).double(), 5.0, stack(-9.0), stack(9.0), stack(limit), stack([-1.0]))
        torch.testing.assert_close(out.step, stack(limit), rtol=1e-9, atol=0)
        torch.testing.assert_close(out.multipliers[0], scalar(2 - limit), rtol=1e-9, atol=0)


def test_single_precision_comes_back() -> None:
    program = random_program(2)
    single = tuple(x.astype(np.float32) for x in program)
    assert solved(single).step.dtype == torch.float32
    # the data are rounded to 7 digits
    np.testing.assert_allclose(solved(single).step, solved(program).step, atol=1e-4)
