"""Linear programs against enumeration and scipy; their inverse against programs with known right-hand sides."""

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linprog

from sim2real.solvers import InfeasibleError
from sim2real.solvers.linear_program import LinearProgram, invert_right_hand_side, solve_linear_program


def random_program(seed: int, rows: int = 5, columns: int = 9) -> LinearProgram:
    rng = np.random.default_rng(seed)
    A = rng.integers(0, 3, (rows, columns)) * rng.choice([1.0, 0.5], (rows, columns))
    A[:, :rows] += np.eye(rows)
    equal = np.arange(rows) < 2
    return LinearProgram(rng.random(columns) + 0.1, scipy.sparse.csr_array(A), equal, np.full(columns, 20.0))


def right_hand_sides(program: LinearProgram, count: int, seed: int) -> torch.Tensor:
    """Reached by some x within the bounds, so that every row has a solution."""
    x = np.random.default_rng(seed).random((count, len(program.cost))) * 3
    return torch.from_numpy(x @ program.rows.T)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_equals_single_solves(seed: int) -> None:
    program = random_program(seed)
    b = right_hand_sides(program, 500, seed)  # two calls of the solver: 444 rows in the first
    found, equal = solve_linear_program(program, b), program.equal
    for k in (0, 17, 443, 444, 499):
        one = linprog(
            program.cost,
            A_ub=-program.rows[~equal],
            b_ub=-b[k, ~equal].numpy(),
            A_eq=program.rows[equal],
            b_eq=b[k, equal].numpy(),
            bounds=(0, 20),
        )
        assert float(found.cost[k]) == pytest.approx(one.fun, rel=1e-9)
    # strong duality with the bound's own multipliers, w = max(-reduced, 0)
    dual = (b * found.dual).sum(-1) - 20 * found.reduced.clamp(max=0).neg().sum(-1)
    torch.testing.assert_close(dual, found.cost, rtol=1e-8, atol=1e-8)
    assert bool((found.dual[:, ~equal] >= -1e-9).all())


def test_optimal_decisions_give_back_their_right_hand_side() -> None:
    program = random_program(5)
    b = right_hand_sides(program, 40, 5)
    x = solve_linear_program(program, b).x
    found = invert_right_hand_side(program, x, torch.full_like(b, torch.nan))
    assert bool(found.optimal.all())
    assert not bool(found.wasteful.any())
    tight = program.equal | (found.value - b < 1e-9).numpy()
    torch.testing.assert_close(found.value[tight], b[tight], rtol=1e-9, atol=1e-9)
    again = solve_linear_program(program, found.value)
    torch.testing.assert_close(again.cost, x @ torch.from_numpy(program.cost), rtol=1e-9, atol=1e-9)


def test_wasteful_decisions_are_named() -> None:
    """Two equal products, the second dearer: whoever buys it wastes the difference."""
    program = LinearProgram(
        np.array([1.0, 3.0]), scipy.sparse.csr_array(np.ones((1, 2))), np.array([False]), np.full(2, np.inf)
    )
    x = torch.tensor([[4.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    found = invert_right_hand_side(program, x, torch.full((2, 1), torch.nan, dtype=torch.float64))
    assert found.value.flatten().tolist() == [4.0, 4.0]
    assert found.optimal.tolist() == [True, False]
    assert found.saving.tolist() == [0.0, 2.0]
    assert found.wasteful.tolist() == [[False, False], [False, True]]


def test_a_known_row_with_slack_explains_nothing() -> None:
    """Only 3 are asked for, and that is known: 4 cannot be optimal."""
    program = LinearProgram(
        np.array([1.0]), scipy.sparse.csr_array(np.ones((1, 1))), np.array([False]), np.array([np.inf])
    )
    found = invert_right_hand_side(program, torch.tensor([[4.0]]).double(), torch.tensor([[3.0]]).double())
    assert found.optimal.tolist() == [False]
    assert found.saving.tolist() == [1.0]


def test_failures_say_what_is_wrong() -> None:
    program = random_program(1)
    b = right_hand_sides(program, 3, 1)
    b[1] = 1e6
    with pytest.raises(InfeasibleError, match="row 1 of"):
        solve_linear_program(program, b)
    with pytest.raises(ValueError, match=r"b must be \[B, 5\]"):
        solve_linear_program(program, b[:, :3])
    with pytest.raises(ValueError, match="and known"):
        invert_right_hand_side(program, torch.zeros(2, 9), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"decisions \[1\] break"):
        invert_right_hand_side(program, torch.tensor([[0.0] * 9, [21.0] * 9]), torch.full((2, 5), torch.nan))
    with pytest.raises(ValueError, match="cost and high must"):
        LinearProgram(program.cost[:3], program.rows, program.equal, program.high)


@pytest.mark.parametrize("unit", [1e-9, 1e5])
def test_the_unit_of_the_costs_does_not_matter(unit: float) -> None:
    program = random_program(2)
    scaled = LinearProgram(unit * program.cost, program.rows, program.equal, program.high)
    b = right_hand_sides(program, 30, 2)
    least, found = solve_linear_program(program, b), solve_linear_program(scaled, b)
    torch.testing.assert_close(found.cost / unit, least.cost, rtol=1e-7, atol=0)
    torch.testing.assert_close((found.dual * b).sum(-1) / unit, (least.dual * b).sum(-1), rtol=1e-7, atol=1e-7)
    dearer = LinearProgram(program.cost[::-1].copy(), program.rows, program.equal, program.high)
    other, unknown = solve_linear_program(dearer, b).x, torch.full_like(b, torch.nan)
    here, there = (invert_right_hand_side(each, other, unknown).optimal.tolist() for each in (program, scaled))
    assert here == there
    assert not all(here)


def test_decisions_in_float32_are_those_of_the_program() -> None:
    """Their rounding is no waste and breaks no known row."""
    program = random_program(6)
    b = right_hand_sides(program, 40, 6)
    found = invert_right_hand_side(program, solve_linear_program(program, b).x.float(), b)
    assert bool(found.optimal.all())


def test_data_that_say_nothing_are_refused() -> None:
    program = random_program(1)
    b = right_hand_sides(program, 3, 1)
    for wrong in (b[:0], torch.nan * b, torch.inf * b):
        with pytest.raises(ValueError, match="not empty and finite"):
            solve_linear_program(program, wrong)
    for x, known in ((torch.full((3, 9), torch.nan), b), (torch.zeros(3, 9), -torch.inf * torch.ones(3, 5))):
        with pytest.raises(ValueError, match="finite or NaN"):
            invert_right_hand_side(program, x, known)
    with pytest.raises(ValueError, match="equal must be bool"):
        LinearProgram(program.cost, program.rows, program.equal.astype(int), program.high)
    with pytest.raises(ValueError, match="cost must be finite"):
        LinearProgram(np.nan * program.cost, program.rows, program.equal, program.high)
    with pytest.raises(ValueError, match="cost must be finite"):
        LinearProgram(program.cost, program.rows, program.equal, -program.high)
