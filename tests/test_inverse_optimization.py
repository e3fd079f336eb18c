"""Lower levels with kinks, their derivatives, and their design from experts, against independent answers."""

import math
import warnings
from dataclasses import replace

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.convex import InfeasibleError
from sim2real.solvers.dual_step import dual_step
from sim2real.solvers.inverse_optimization import Experts, fit_lower_level, kink_rank, prepare
from sim2real.solvers.relu_program import ReluCost, quadratic, relu_cost, relu_program, suboptimality

F64 = torch.float64


def instance(seed: int, T: int, m: int = 6, K: int = 2, p: int = 2) -> tuple[ReluCost, tuple[Tensor, ...]]:
    """Random kinks and T programs with unit boxes."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    cost = ReluCost(draw(K, m), 0.3 * draw(K), 0.05)
    B, eye = draw(p, m), torch.eye(m, dtype=F64)
    b = torch.rand(T, m, generator=g, dtype=F64) @ B.mT
    H, h = torch.cat([eye, -eye]), torch.cat([torch.ones(m, dtype=F64), torch.zeros(m, dtype=F64)])
    return cost, (draw(T, m), B, b, H, h)


def pairs_of(cost: ReluCost, program: tuple[Tensor, ...], noise: float = 0.0) -> Experts:
    c, B, b, H, h = program
    u = relu_program(cost, c, B, b, H, h).u
    if noise:
        move = noise * torch.rand(u.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
        u = u + move * (torch.full_like(u, 0.5) - u)  # towards the middle of the box: still inside
        b = u @ B.mT
    return Experts(u, c, B, b, H, h)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_lower_level_agrees_with_cvxpy(seed: int) -> None:
    cost, (c, B, b, H, h) = instance(seed, T=4)
    R = torch.diag(torch.arange(6.0, dtype=F64))
    cost = ReluCost(cost.theta, cost.nu, cost.ridge, R)
    found = relu_program(cost, c, B, b, H, h)
    Q = quadratic(cost, c).numpy()
    for t in range(4):
        u = cvxpy.Variable(6)
        kinks = cvxpy.sum(cvxpy.pos(cost.theta.numpy() @ u - cost.nu.numpy()))
        limits = [B.numpy() @ u == b[t].numpy(), H.numpy() @ u <= h.numpy()]
        problem = cvxpy.Problem(cvxpy.Minimize(c[t].numpy() @ u + kinks + cvxpy.quad_form(u, Q)), limits)
        problem.solve(solver="CLARABEL")
        # Clarabel's own tolerance is 1e-8
        assert float(relu_cost(cost, c[t], found.u[t])) == pytest.approx(problem.value, abs=1e-7)
        assert np.abs(u.value - found.u[t].numpy()).max() < 1e-4
    assert bool(found.converged.all())
    assert bool(((found.slopes > -1e-9) & (found.slopes < 1 + 1e-9)).all())


def test_one_action_in_closed_form() -> None:
    # min c u + max(2 u - 1, 0) + u^2 / 2: u = -c below the kink at 1/2, -(c + 2) above it, 1/2 between
    cost = ReluCost(torch.tensor([[2.0]], dtype=F64), torch.tensor([1.0], dtype=F64), 0.5)
    c = torch.tensor([[1.0], [-1.0], [-4.0]], dtype=F64)
    none = torch.zeros(0, 1, dtype=F64)
    found = relu_program(cost, c, none, torch.zeros(3, 0, dtype=F64), none, torch.zeros(3, 0, dtype=F64))
    torch.testing.assert_close(found.u, torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64))
    torch.testing.assert_close(found.slopes, torch.tensor([[0.0], [0.25], [1.0]], dtype=F64))


def test_the_layer_is_differentiable_in_all_that_a_policy_may_tune() -> None:
    cost, (c, B, b, H, h) = instance(3, T=1, m=3, p=1)

    def layer(theta: Tensor, nu: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return relu_program(ReluCost(theta, nu, cost.ridge), c, B, b, H, h).u

    inputs = [x.clone().requires_grad_() for x in (cost.theta, cost.nu, c, b)]
    assert float(relu_program(cost, c, B, b, H, h).margin.min()) > 1e-4  # away from changes of the active set
    assert torch.autograd.gradcheck(layer, inputs, eps=1e-7, atol=1e-5)


def test_suboptimality_is_the_difference_of_costs() -> None:
    cost, (c, B, b, H, h) = instance(4, T=5)
    found = relu_program(cost, c, B, b, H, h)
    other = relu_program(ReluCost(-cost.theta, cost.nu, 1.0), c, B, b, H, h)  # another feasible action
    difference = relu_cost(cost, c, other.u) - relu_cost(cost, c, found.u)
    torch.testing.assert_close(suboptimality(cost, found, H, h, other.u), difference, atol=1e-9, rtol=1e-7)


def test_the_dual_step_finds_the_kinks_of_given_slopes() -> None:
    # with the slopes of the truth, the convex half has objective at most rho |truth|^2: the gap is zero there
    cost, program = instance(0, T=12)
    experts = pairs_of(cost, program)
    full = Experts(experts.actions, experts.c, experts.B, experts.b, experts.H, experts.h.expand(12, -1))
    pairs = prepare(full, quadratic(cost, experts.actions))
    slopes = relu_program(cost, *program).slopes.clamp(0, 1)
    weight = 1e-5
    p = dual_step(pairs, slopes.unsqueeze(0), weight=weight)[0]
    scale = -pairs.features[0, -1]
    learned = ReluCost(p[:, :-1], p[:, -1] * scale, cost.ridge)
    gap = suboptimality(learned, relu_program(learned, *program), experts.H, experts.h, experts.actions).sum()
    truth = weight * (cost.theta.square().sum() + (cost.nu / scale).square().sum())
    assert float(gap + weight * p.square().sum()) <= float(truth) * (1 + 1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_fit_explains_its_experts_and_others(noise: float) -> None:
    cost, program = instance(1, T=12)
    train = pairs_of(cost, program, noise)
    fit = fit_lower_level(train, ridge=0.05, terms=2, tol=1.0)
    found = relu_program(cost, train.c, train.B, train.b, train.H, train.h)
    true_gap = suboptimality(cost, found, train.H, train.h, train.actions).sum()  # 0 without noise
    assert float(fit.gap.sum()) < 0.1 * float(fit.plain_gap.sum()) + float(true_gap)
    assert bool((fit.error <= fit.error_bound).all())
    _, (c, _, _, _, _) = instance(9, T=30)
    g = torch.Generator().manual_seed(8)
    b = torch.rand(30, 6, generator=g, dtype=F64) @ program[1].mT
    new = (c, program[1], b, program[3], program[4])
    plain = ReluCost(cost.theta[:0], cost.nu[:0], 0.05)
    truth = relu_program(cost, *new).u
    if noise:
        return  # twelve noisy experts are better explained than by the truth; others need not be
    errors = [float((relu_program(x, *new).u - truth).norm(dim=-1).mean()) for x in (plain, fit.cost)]
    assert errors[1] < 0.75 * errors[0]  # twelve experts for twelve numbers of theta; `o-design` has the bar


def test_experts_of_a_plain_lower_level_need_no_kinks() -> None:
    cost, program = instance(2, T=6)
    plain = ReluCost(cost.theta[:0], cost.nu[:0], 0.05)
    fit = fit_lower_level(pairs_of(plain, program), ridge=0.05, terms=1, starts=2, rounds=4)
    # the penalty of kinks alone is left to lower; errors of 1e-3 would cost 5e-8
    assert float(fit.gap.sum()) < 1e-6
    assert fit.converged


def test_the_error_bound_with_curvature_is_never_violated() -> None:
    # the paper's Corollary 1, sqrt(lambda_min(R) / l), does not even depend on the gap
    cost, program = instance(5, T=10)
    R = torch.diag(torch.linspace(0.2, 1.0, 6, dtype=F64))
    fit = fit_lower_level(pairs_of(cost, program), ridge=0.05, curvature=R, terms=1, starts=2, rounds=3, tol=1.0)
    assert bool((fit.error <= fit.error_bound).all())
    torch.testing.assert_close(fit.error_bound, (fit.gap / 0.25).sqrt())
    assert float(fit.error.max()) > 1e-3  # the bound was put to a test


def test_rank_of_inner_experts() -> None:
    # without limits, -P(c + 2 Q u) at u = minimiser of a lower level with two kinks lies in the span of their P theta
    cost, (c, B, b, _, _) = instance(6, T=8)
    cost = ReluCost(cost.theta, torch.full((2,), -100.0, dtype=F64), 0.05)
    H, h = torch.eye(6, dtype=F64), torch.full((6,), math.inf, dtype=F64)
    weights = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows = [
        relu_program(ReluCost(w[:, None] * cost.theta, cost.nu, 0.05), c[i], B, b[i], H, h).u
        for i, w in enumerate(weights)
    ]
    assert kink_rank(Experts(torch.stack(rows), c, B, b, H, h), ridge=0.05, tol=1e-6) == 2
    plain = ReluCost(cost.theta[:0], cost.nu[:0], 0.05)
    experts = pairs_of(plain, (c, B, b, H, h))
    assert float(fit_lower_level(experts, ridge=0.05, starts=1, rounds=2).gap.sum()) < 1e-6


def test_an_unconverged_fit_is_flagged() -> None:
    experts = pairs_of(*instance(0, T=12))
    with pytest.warns(UnconvergedWarning, match="still fell"):
        fit = fit_lower_level(experts, ridge=0.05, terms=2, starts=1, rounds=2, polish=0, tol=1e-9)
    assert not fit.converged
    with pytest.raises(UnconvergedError):
        fit_lower_level(experts, ridge=0.05, terms=2, starts=1, rounds=2, polish=0, tol=1e-9, strict=True)


def test_failures_are_named() -> None:
    cost, (c, B, b, H, h) = instance(0, T=3)
    experts = pairs_of(cost, (c, B, b, H, h))
    with pytest.raises(ValueError, match="ridge must be > 0"):
        fit_lower_level(experts, ridge=0.0)
    moved = b + torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
    with pytest.raises(ValueError, match="expert 1 breaks B u = b"):
        fit_lower_level(Experts(experts.actions, c, B, moved, H, h), ridge=0.05)
    with pytest.raises(ValueError, match="breaks H u <= h"):
        fit_lower_level(Experts(experts.actions, c, B, b, H, h - 2), ridge=0.05)
    with pytest.raises(ValueError, match=r"b must be \(3, 2\)"):
        fit_lower_level(Experts(experts.actions, c, B, b[0], H, h), ridge=0.05)
    with pytest.raises(ValueError, match="c must be finite"):
        fit_lower_level(Experts(experts.actions, c * math.nan, B, b, H, h), ridge=0.05)
    with pytest.raises(ValueError, match="actions must be"):
        fit_lower_level(Experts(experts.actions[0], c, B, b, H, h), ridge=0.05)
    with pytest.raises(ValueError, match="starts, rounds"):
        fit_lower_level(experts, ridge=0.05, starts=0)
    with pytest.raises(ValueError, match="terms must be"):
        fit_lower_level(experts, ridge=0.05, terms=0)
    with pytest.raises(ValueError, match="theta must be"):
        relu_program(ReluCost(cost.theta[:, :3], cost.nu, 0.05), c, B, b, H, h)
    with pytest.raises(ValueError, match="curvature must be"):
        relu_program(ReluCost(cost.theta, cost.nu, 0.05, -torch.eye(6, dtype=F64)), c, B, b, H, h)
    with pytest.raises(InfeasibleError):
        relu_program(cost, c, B, b + 100, H, h)
    named = relu_program(cost, c, B, b + 100, H, h, on_failure="nan")
    assert bool(named.infeasible.all())
    assert bool(named.u.isnan().all())


def test_the_same_seed_gives_the_same_fit() -> None:
    experts = pairs_of(*instance(7, T=6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        first, second = (fit_lower_level(experts, ridge=0.05, terms=2, starts=3, rounds=3, polish=1) for _ in range(2))
    assert torch.equal(first.cost.theta, second.cost.theta)


@pytest.mark.parametrize("seed", [0, 1])
def test_scip_proves_what_the_alternation_finds(seed: int) -> None:
    pytest.importorskip("pyscipopt")
    from sim2real.solvers.inverse_scip import fit_globally

    experts = pairs_of(*instance(seed, T=4, m=4, K=1, p=1))
    proof = fit_globally(experts, ridge=0.05, terms=1, weight=1e-6, box=5.0, time_limit=20.0)
    assert proof.proved
    assert proof.objective <= 1e-3  # experts of one kink can be explained by one
    fit = fit_lower_level(experts, ridge=0.05, terms=1, weight=1e-6, tol=1.0)
    assert float(fit.gap.sum()) >= proof.bound - 1e-6
    assert float(fit.gap.sum()) <= proof.objective + 1e-3


def test_scip_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from sim2real.solvers.inverse_scip import fit_globally

    monkeypatch.setitem(sys.modules, "pyscipopt", None)
    with pytest.raises(ImportError, match=r"sim2real\[scip\]"):
        fit_globally(pairs_of(*instance(0, T=3)), ridge=0.05, terms=1)


@pytest.mark.slow
def test_the_committed_tasks_reach_their_bars() -> None:
    # the quick benchmark has 4 episodes; the figures of 20 are 84 and 64 per cent
    from design import o_design

    before = torch.get_default_dtype()
    try:
        figures = {figure.metric: figure.value for figure in o_design(True)}
    finally:
        torch.set_default_dtype(before)
    assert figures["bound"] == 0
    assert figures["error-ratio"] <= 0.5
    assert figures["gap-vehicles"] >= 65
    assert figures["gap-inventory"] >= 50


def test_limits_that_are_never_reached_change_nothing() -> None:
    """Rows far away, infinitely far or absent leave the fit as it is."""
    experts, plain = _loose_experts()
    tried = [replace(experts, h=torch.full_like(experts.h, far)) for far in (1e2, 1e4, 1e6, math.inf)]
    tried.append(replace(experts, H=experts.H[:0], h=experts.h[:, :0]))
    fits = [fit_lower_level(e, ridge=0.3, terms=2, rounds=8, tol=1.0) for e in tried]
    # a local optimum after 8 rounds, the same for all; far rows once dominated the interior point
    gaps = [float(fit.gap.sum()) for fit in fits]
    assert max(gaps) < 1.05 * min(gaps)
    assert max(gaps) < 0.02 * float(fits[0].plain_gap.sum())
    assert kink_rank(replace(experts, actions=plain), ridge=0.3) == 0  # those need no kinks


def test_a_goal_that_fixes_the_action_is_refused() -> None:
    u, eye = torch.zeros(3, 2), torch.eye(2)
    with pytest.raises(ValueError, match="nothing to learn"):
        fit_lower_level(Experts(u, torch.ones(3, 2), eye, u, eye, torch.ones(3, 2)), ridge=0.3, terms=1)


def _loose_experts() -> tuple[Experts, Tensor]:
    """Experts of two kinks, never at a limit, and the actions they would take without kinks."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=F64)
    B, c, b = normal(1, 4), normal(12, 4), 0.1 * normal(12, 1)
    eye = torch.eye(4, dtype=F64)
    H, h = torch.cat([eye, -eye]), torch.full((12, 8), 50.0, dtype=F64)
    true = ReluCost(normal(2, 4), 0.1 * normal(2), 0.3)
    solve = lambda cost: relu_program(cost, c, B, b, H, h).u
    return Experts(solve(true), c, B, b, H, h), solve(ReluCost(true.theta[:0], true.nu[:0], 0.3))
