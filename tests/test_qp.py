"""The general QP against Clarabel and closed forms; derivatives of every order and mode; failures, proved."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers import InfeasibleError, box_qp, qp

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(batch: int, n: int, p: int, m: int, seed: int, rank: int | None = None) -> Six:
    """A feasible program with H of the given rank, and about half of its inequalities in the way."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    L, A, G, inside = draw(batch, n, rank or n), draw(batch, p, n), draw(batch, m, n), draw(batch, n)
    apply = lambda M, v: (M @ v.unsqueeze(-1)).squeeze(-1)
    return L @ L.mT, 3 * draw(batch, n), A, apply(A, inside), G, apply(G, inside) + draw(batch, m).abs()


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def optimality(program: Six, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Largest violation of the Karush-Kuhn-Tucker conditions, absolute."""
    H, g, A, b, G, h = program
    apply = lambda M, v: (M @ v.unsqueeze(-1)).squeeze(-1)
    slack = h - apply(G, x)
    stationary = apply(H, x) + g + apply(A.mT, y) + apply(G.mT, z)
    return torch.cat([stationary, apply(A, x) - b, torch.minimum(slack, z)], -1).abs().amax()


@pytest.mark.parametrize(
    ("n", "p", "m", "rank"), [(1, 0, 2, None), (6, 2, 10, None), (20, 0, 60, None), (12, 4, 30, 2), (5, 0, 0, None)]
)
def test_equals_clarabel_and_satisfies_the_optimality_conditions(n: int, p: int, m: int, rank: int | None) -> None:
    cp = pytest.importorskip("cvxpy")
    program = problem(6, n, p, m, seed=n, rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)  # of rank 2 not every minimiser is unique
        solution = qp(*program, on_failure="nan")
    compared = 0
    for row in range(6):
        H, g, A, b, G, h = (value[row].numpy() for value in program)
        x = cp.Variable(n)
        constraints = ([A @ x == b] if p else []) + ([G @ x <= h] if m else [])
        task = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(H)) + g @ x), constraints)
        task.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        assert bool(solution.unbounded[row]) == (task.status == "unbounded")
        if solution.unbounded[row]:
            continue
        compared += 1
        assert bool(solution.converged[row])
        # Clarabel stops at gaps of 1e-12, half of the digits of x where the objective is flat
        if solution.unique[row]:
            np.testing.assert_allclose(solution.x[row], x.value, rtol=0, atol=1e-5)
        ours = solution.x[row].numpy()
        assert 0.5 * ours @ H @ ours + g @ ours == pytest.approx(task.value, rel=1e-9, abs=1e-9)
        alone = tuple(value[row] for value in program)
        found = (solution.x[row], solution.equality_multipliers[row], solution.inequality_multipliers[row])
        assert float(optimality(alone, *found)) < 1e-10
    assert compared >= 3


def test_is_the_box_qp_where_the_constraints_are_a_box() -> None:
    H, g, *_ = problem(16, 8, 0, 0, seed=1)
    eye = torch.eye(8, dtype=torch.float64)
    general = qp(H, g, G=torch.cat([eye, -eye]), h=torch.cat([t(0.5).expand(8), t(math.inf).expand(8)]))
    box = box_qp(H, g, high=0.5)
    torch.testing.assert_close(general.x, box.x, rtol=1e-11, atol=1e-12)
    assert bool((general.active[:, :8] == (box.active > 0)).all())
    assert not bool(general.active[:, 8:].any())


def test_linear_program_at_a_vertex() -> None:
    # max x + 2 y over x + y <= 4, x <= 3, y <= 2, x, y >= 0: (2, 2), multipliers of rows 1 and 3
    G = torch.tensor([[1, 1], [1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    solution = qp(torch.zeros(2, 2, dtype=torch.float64), t(-1, -2), G=G, h=t(4, 3, 2, 0, 0))
    torch.testing.assert_close(solution.x, t(2, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.inequality_multipliers, t(1, 0, 1, 0, 0), rtol=0, atol=1e-12)
    assert bool(solution.unique)


def test_units_do_not_matter() -> None:
    H, g, A, b, G, h = problem(8, 6, 2, 8, seed=2)
    unit, row = torch.logspace(-5, 5, 6, dtype=torch.float64), torch.logspace(4, -4, 8, dtype=torch.float64)
    scaled = qp(1e3 * H / (unit[:, None] * unit), 1e3 * g / unit, A / unit, b, row[:, None] * G / unit, row * h)
    plain = qp(H, g, A, b, G, h)
    torch.testing.assert_close(scaled.x / unit, plain.x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        scaled.inequality_multipliers * row / 1e3, plain.inequality_multipliers, rtol=1e-8, atol=1e-9
    )


def test_batch_is_loop_and_leading_dimensions_broadcast() -> None:
    program = problem(6, 4, 1, 6, seed=3)
    together = qp(*program)
    for row in range(6):
        single = qp(*(value[row] for value in program))
        torch.testing.assert_close(single.x, together.x[row], rtol=1e-11, atol=1e-12)
        assert single.converged.shape == ()
    torch.testing.assert_close(vmap(lambda *rows: qp(*rows).x)(*program), together.x, rtol=0, atol=0)
    H, _, A, b, G, h = (value[0] for value in program)
    shared = qp(H, program[1].reshape(2, 3, 4), A, b, G, h)
    assert shared.x.shape == (2, 3, 4)
    torch.testing.assert_close(shared.x[1, 2], qp(H, program[1][5], A, b, G, h).x, rtol=1e-11, atol=1e-12)


def away_from_kinks(batch: int, n: int, p: int, m: int, seed: int) -> Six:
    """Programs whose active set differences of 1e-6 cannot change, with both kinds of inequalities."""
    program = problem(20 * batch, n, p, m, seed)
    solution = qp(*program)
    share = solution.active.double().mean(-1)
    sure = ((solution.margin > 1e-2) & (share > 0) & (share < 1)).nonzero()[:batch, 0]
    assert len(sure) == batch
    return tuple(value[sure].clone().requires_grad_() for value in program)


def all_outputs(*program: Tensor) -> Tensor:
    found = qp(*program)
    return torch.cat([found.x, found.equality_multipliers, found.inequality_multipliers], -1)


def test_derivatives_of_first_and_second_order_against_differences() -> None:
    program = away_from_kinks(1, 3, 1, 3, seed=5)
    assert gradcheck(all_outputs, program, check_forward_ad=True)
    assert gradcheck(all_outputs, program, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(all_outputs, program, check_fwd_over_rev=True, fast_mode=True)


def test_forward_and_reverse_modes_agree_at_second_order() -> None:
    H, g, A, b, G, h = (value.detach()[0] for value in away_from_kinks(1, 4, 1, 4, seed=6))
    loss = lambda u: (all_outputs(H + u[0] ** 2 * H @ H, g * u[1], A * u[2], b, G, h + u.sum())).pow(3).sum()
    at = t(0.01, 1.0, 1.0)
    expected = jacrev(jacrev(loss))(at)
    for derivative in (hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        # one program, four orders of operations: rounding only
        torch.testing.assert_close(derivative(at), expected, rtol=1e-8, atol=1e-9)
    step = 1e-6
    differences = torch.stack(
        [(grad(loss)(at + e) - grad(loss)(at - e)) / (2 * step) for e in step * torch.eye(3, dtype=torch.float64)]
    )
    torch.testing.assert_close(expected, differences, rtol=1e-5, atol=1e-5)


def test_vjp_and_jvp_agree_and_vmap_over_gradients() -> None:
    program = tuple(value.detach() for value in away_from_kinks(4, 5, 2, 6, seed=7))
    generator = torch.Generator().manual_seed(1)
    tangent = tuple(torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in program)
    cotangent = torch.randn(4, 13, generator=generator, dtype=torch.float64)
    pushed = jvp(all_outputs, program, tangent)[1]
    every = tuple(range(6))
    pulled = grad(lambda *args: (all_outputs(*args) * cotangent).sum(), argnums=every)(*program)
    product = sum(float((a * b).sum()) for a, b in zip(pulled, tangent, strict=True))
    assert float((pushed * cotangent).sum()) == pytest.approx(product, rel=1e-11)
    rowwise = vmap(grad(lambda *args: (all_outputs(*args[:-1]) * args[-1]).sum(), argnums=every))(*program, cotangent)
    for row, whole in zip(rowwise, pulled, strict=True):
        torch.testing.assert_close(row, whole, rtol=1e-11, atol=1e-12)


def test_repeated_and_superfluous_rows_change_nothing() -> None:
    program = tuple(value.detach() for value in away_from_kinks(3, 4, 1, 3, seed=8))
    H, g, A, b, G, h = program
    doubled = (H, g, torch.cat([A, 2 * A], 1), torch.cat([b, 2 * b], 1), torch.cat([G, G], 1), torch.cat([h, h], 1))
    plain, found = qp(*program), qp(*doubled)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.x, plain.x, rtol=1e-10, atol=1e-11)
    assert float(optimality(doubled, found.x, found.equality_multipliers, found.inequality_multipliers)) < 1e-10
    # a row that moves alone is a kink; both together are not, and g and H never are
    assert found.margin.tolist() == [0.0] * 3
    once = lambda g, b, h: qp(H, g, A, b, G, h).x
    twice = lambda g, b, h: qp(H, g, doubled[2], torch.cat([b, 2 * b], 1), doubled[4], torch.cat([h, h], 1)).x
    slopes = [grad(lambda *v, f=f: f(*v).pow(3).sum(), argnums=(0, 1, 2))(g, b, h) for f in (once, twice)]
    for expected, got in zip(*slopes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_vertex_with_more_active_rows_than_dimensions() -> None:
    # the tip of a pyramid: four faces meet in three dimensions, pushed straight down on it
    faces = torch.tensor([[1, 0, -1], [-1, 0, -1], [0, 1, -1], [0, -1, -1]], dtype=torch.float64)
    flat = torch.eye(3, dtype=torch.float64) * 1e-3
    tip = qp(flat, t(0, 0, 1), G=faces, h=torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(tip.x, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool(tip.converged)
    assert float(tip.margin) == 0.0
    z = tip.inequality_multipliers
    assert float(z.min()) >= 0.0
    torch.testing.assert_close(faces.T @ z, -t(0, 0, 1), rtol=0, atol=1e-12)
    # raising every face by 1 lifts the tip by 1 whichever rows carry the derivative
    lift = jvp(lambda h: qp(flat, t(0, 0, 1), G=faces, h=h).x, (torch.zeros(4).double(),), (-torch.ones(4).double(),))
    torch.testing.assert_close(lift[1], t(0, 0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["integers", "thin", "loose", "drawn"])
def test_hard_programs_are_all_decided_and_every_verdict_is_proved(kind: str, linear: bool) -> None:
    """Ties everywhere, an interior of 1e-6, bounds of 1e6, and constraints drawn without a feasible point in mind."""
    batch, n, m = 24, 6, 14
    H, g, A, b, G, h = problem(batch, n, 0, m, seed=31)
    H = torch.zeros_like(H) if linear else torch.eye(n, dtype=torch.float64).expand(batch, n, n)
    eye = torch.eye(n, dtype=torch.float64).expand(batch, n, n)
    if kind == "integers":
        generator = torch.Generator().manual_seed(7)
        whole = lambda low, high, *shape: torch.randint(low, high + 1, shape, generator=generator).double()
        g, G, h = whole(-3, 3, batch, n), whole(-2, 2, batch, m, n), whole(0, 3, batch, m)
    elif kind == "thin":
        inside = h - 1e-6
        G, h = torch.cat([G, -G], 1), torch.cat([h, 2e-6 - inside - 1e-6], 1)
    elif kind == "loose":
        G, h = torch.cat([G, eye, -eye], 1), torch.cat([h, torch.full((batch, 2 * n), 1e6, dtype=torch.float64)], 1)
    else:
        h = 0.5 * g.repeat(1, 3)[:, :m]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)  # minimisers of linear programs need not be unique
        found = qp(H, g, A, b, G, h, on_failure="nan")
    assert bool((found.converged | found.infeasible | found.unbounded).all())
    for row in range(batch):
        z, ray = found.inequality_multipliers[row], found.ray[row]
        size = 1e-9 * float(h[row].abs().max() + 10)  # rounding, in units of the bounds
        if found.converged[row]:
            whole_row = tuple(value[row] for value in (H, g, A, b, G, h))
            assert float(optimality(whole_row, found.x[row], found.equality_multipliers[row], z)) < size
        elif found.infeasible[row]:
            assert float(z.min()) >= 0
            assert float((G[row].T @ z).abs().max()) <= 1e-6 * -float(h[row] @ z)
        else:
            fall = -float(g[row] @ ray)
            assert fall > 0
            assert float((G[row] @ ray).max()) <= 1e-6 * fall
            assert float((H[row] @ ray).abs().max()) <= 1e-6 * fall
    if kind == "drawn":
        assert bool(found.infeasible.any())


def test_equalities_that_inequalities_imply() -> None:
    # x0 <= 1 and x0 >= 1 leave no interior
    H, G = torch.eye(2, dtype=torch.float64), torch.tensor([[1, 0], [-1, 0], [0, 1]], dtype=torch.float64)
    found = qp(H, t(0, -3), G=G, h=t(1, -1, 2))
    torch.testing.assert_close(found.x, t(1, 2), rtol=0, atol=1e-10)
    assert bool(found.converged)


def test_margin_and_kinks() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    kink = qp(eye, t(-1.0, 0.0), G=eye, h=t(1.0, 5.0))
    assert float(kink.margin) == pytest.approx(0.0, abs=1e-12)
    assert float(qp(eye, t(-1.5, 0.0), G=eye, h=t(1.0, 5.0)).margin) > 0.1
    assert float(qp(eye, t(-1.5, 0.0)).margin) == math.inf


def test_an_infeasible_program_is_proved_and_named() -> None:
    H, g, A, b, G, h = problem(5, 4, 1, 6, seed=9)
    h = h.clone()
    G = G.clone()
    G[3, 4], h[3, 4] = -G[3, 1], -h[3, 1] - 0.1  # G_1 x >= h_1 + 0.1
    with pytest.raises(
        InfeasibleError, match=r"1 of 5 .*sample 3 is infeasible: rows \[\] of A and \[1, 4\]"
    ) as caught:
        qp(H, g, A, b, G, h)
    assert caught.value.sample == 3
    found = qp(H, g, A, b, G, h, on_failure="nan")
    assert found.infeasible.tolist() == [False, False, False, True, False]
    assert bool(found.x[3].isnan().all())
    assert bool(found.x[[0, 1, 2, 4]].isfinite().all())
    y, z = found.equality_multipliers[3], found.inequality_multipliers[3]
    assert float((A[3].T @ y + G[3].T @ z).abs().max()) < 1e-8
    assert float(b[3] @ y + h[3] @ z) < -1e-3
    assert float(z.min()) >= 0.0


def test_contradicting_equalities_are_infeasible() -> None:
    A = torch.tensor([[1, 1], [2, 2]], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match=r"infeasible: rows \[0, 1\] of A and \[\] of G"):
        qp(torch.eye(2, dtype=torch.float64), t(0, 0), A, t(1, 3))
    with pytest.raises(InfeasibleError, match="infeasible"):
        qp(torch.eye(2, dtype=torch.float64), t(0, 0), G=torch.zeros(1, 2, dtype=torch.float64), h=t(-1))


def test_an_unbounded_program_is_proved_and_named() -> None:
    H = torch.diag(t(1, 0, 0))
    G = torch.tensor([[0, -1, 0], [0, 1, -1]], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match="unbounded: the objective falls for ever along"):
        qp(H, t(1, 0, -1), G=G, h=t(0, 1))
    found = qp(H, t(1, 0, -1), G=G, h=t(0, 1), on_failure="nan")
    assert bool(found.unbounded)
    assert bool(found.x.isnan().all())
    ray = found.ray
    assert float((H @ ray).abs().max()) < 1e-9
    assert float((G @ ray).max()) < 1e-9
    assert float(-ray[2]) < -0.5


def test_no_gradient_comes_from_a_program_without_a_solution() -> None:
    H, g, A, b, G, h = problem(3, 3, 0, 4, seed=10)
    G, h = G.clone(), h.clone()
    G[1, 3], h[1, 3] = -G[1, 0], -h[1, 0] - 1.0

    def loss(g: Tensor, scale: Tensor) -> Tensor:
        x = qp(H, scale * g, A, b, G, h, on_failure="nan").x
        return torch.where(x.isnan(), 0.0, x).pow(2).sum()

    slope, shared = grad(loss, argnums=(0, 1))(g, t(1.0))
    assert slope[1].tolist() == [0.0] * 3
    assert bool(torch.isfinite(slope).all())
    expected = (slope * g).sum()
    torch.testing.assert_close(shared.sum(), expected, rtol=1e-10, atol=1e-12)


def test_more_than_one_minimiser_is_said() -> None:
    # min (x + y)^2 / 2 over x, y >= 1 is unique; over x + y >= 2 it is a line
    H, both = torch.ones(2, 2, dtype=torch.float64), torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    assert bool(qp(H, t(0, 0), G=-torch.eye(2, dtype=torch.float64), h=t(-1, -1)).unique)
    with pytest.warns(UnconvergedWarning, match="more than one minimiser"):
        found = qp(H, t(0, 0), G=both, h=t(-2))
    assert float(found.x.sum()) == pytest.approx(2.0, abs=1e-10)
    with pytest.raises(UnconvergedError, match="more than one minimiser"):
        qp(H, t(0, 0), G=both, h=t(-2), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        moved = jvp(lambda h: qp(H, t(0, 0), G=both, h=h).x, (t(-2),), (t(-1),))[1]
    assert float(moved.sum()) == pytest.approx(1.0, abs=1e-9)


def test_an_unconverged_sample_is_named_warned_and_raised() -> None:
    program = problem(4, 12, 2, 40, seed=11)
    with pytest.warns(UnconvergedWarning, match=r"of 4 samples .* raise max_steps"):
        found = qp(*program, max_steps=1)
    assert not bool(found.converged.all())
    with pytest.raises(UnconvergedError, match="raise max_steps"):
        qp(*program, max_steps=1, strict=True)


def test_float32_is_solved_in_float64() -> None:
    program = tuple(value.float() for value in problem(4, 5, 1, 6, seed=12))
    single, double = qp(*program), qp(*(value.double() for value in program))
    assert single.x.dtype == torch.float32
    torch.testing.assert_close(single.x, double.x.float(), rtol=0, atol=0)


def test_bad_input_is_refused_by_name() -> None:
    H, g, A, b, G, h = problem(3, 2, 1, 2, seed=13)
    with pytest.raises(ValueError, match="sample 1 of 3: H is not positive semi-definite"):
        qp(torch.where(torch.arange(3)[:, None, None] == 1, -H, H), g)
    for concave in (t(1e12, -0.5), t(1e6, -1e-7)):  # large units of one variable do not hide the other
        with pytest.raises(ValueError, match="not positive semi-definite"):
            qp(torch.diag(concave), t(0, 0.1), G=torch.eye(2, dtype=torch.float64), h=t(1, 1))
    with pytest.raises(ValueError, match=r"on_failure .* must be 'raise' or 'nan', got 'none'"):
        qp(H, g, on_failure="none")
    with pytest.raises(ValueError, match="A and b, and G and h, must be given together"):
        qp(H, g, A)
    with pytest.raises(ValueError, match=r"G must be floating point \[..., 2, 2\]"):
        qp(H, g, A, b, G[..., :1], h)
    with pytest.raises(ValueError, match=r"g must be floating point"):
        qp(H, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be finite"):
        qp(H, g * math.nan)
    with pytest.raises(ValueError, match="h must be finite or inf"):
        qp(H, g, G=G, h=-h.abs() * math.inf)
    with pytest.raises(ValueError, match="tol must lie in"):
        qp(H, g, tol=2.0)
