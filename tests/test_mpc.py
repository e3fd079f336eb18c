"""Condensed MPC against the Riccati recursion, a sparse formulation solved by scipy, and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, hessian, vmap

from sim2real.mdp import sample_noise
from sim2real.params import Params
from sim2real.rollout import expected_return
from sim2real.simulators import linear_gaussian
from sim2real.solvers import (
    InfeasibleError,
    QPSolution,
    condensed_mpc,
    finite_horizon_riccati,
    mpc_policy,
    mpc_report,
    riccati,
)

N, M = 3, 2


def system(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    C, D = draw(N, N), draw(M, M)
    return {
        "A": torch.eye(N, dtype=torch.float64) + 0.2 * draw(N, N),
        "B": 0.5 * draw(N, M),
        "Q": C @ C.mT / N,
        "R": 0.1 * D @ D.mT + 0.1 * torch.eye(M, dtype=torch.float64),
    }


def starts(count: int) -> Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def cost(values: Params, states: Tensor, actions: Tensor, discount: float) -> Tensor:
    """Of trajectories `[..., T + 1, n]`, `[..., T, m]`, term by term as in the module's first lines."""
    steps, total = actions.shape[-2], torch.zeros(states.shape[:-2], dtype=torch.float64)
    quadratic = lambda W, z: torch.einsum("...i,ij,...j->...", z, W, z)
    for k in range(steps + 1):
        s = states[..., k, :]
        total = total + discount**k * (quadratic(values["Q"] if k < steps else values["P"], s) + s @ values["q"])
        if k < steps:
            a = actions[..., k, :]
            total = total + discount**k * (quadratic(values["R"], a) + a @ values["r"])
    return total


def test_without_bounds_it_is_the_finite_horizon_riccati_gain() -> None:
    p, discount, horizon = system(), 0.95, 6
    terminal = 2.0 * torch.eye(N, dtype=torch.float64)
    A, B, Q, R = (p[key] for key in ("A", "B", "Q", "R"))
    P = terminal
    for _ in range(horizon):
        K = discount * torch.linalg.solve(R + discount * B.mT @ P @ B, B.mT @ P @ A)
        P = Q + K.mT @ R @ K + discount * (A - B @ K).mT @ P @ (A - B @ K)
    plan = condensed_mpc(**p, x0=starts(5), horizon=horizon, P=terminal, discount=discount)
    torch.testing.assert_close(plan.actions[:, 0], -starts(5) @ K.mT, rtol=1e-11, atol=1e-12)
    total = cost({**p, "P": terminal, "q": A[0] * 0, "r": B[0] * 0}, plan.states, plan.actions, discount)
    torch.testing.assert_close(total, torch.einsum("bi,ij,bj->b", starts(5), P, starts(5)), rtol=1e-11, atol=1e-12)


def test_an_unstable_model_keeps_the_digits_that_the_docs_promise() -> None:
    A = torch.tensor([[1.2, 0.5], [0.0, 1.3]], dtype=torch.float64)
    B, Q = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    R, x0 = 0.1 * Q[:1, :1], torch.tensor([0.2, -0.1], dtype=torch.float64)
    for horizon, error in ((20, 1e-10), (30, 3e-8)):  # 1.3^(2N) times rounding
        K = finite_horizon_riccati(A, B, Q, R, horizon)[1][0]
        torch.testing.assert_close(condensed_mpc(A, B, Q, R, x0, horizon).actions[0], -K @ x0, rtol=0, atol=error)


def test_with_the_riccati_cost_at_the_end_the_horizon_does_not_matter() -> None:
    p = system(1)
    P, K = riccati(**p, discount=0.9)
    for horizon in (1, 4):
        policy = mpc_policy(horizon, {**p, "P": P}, discount=0.9)
        torch.testing.assert_close(
            policy.act({}, starts(4), starts(4)[:, :0]), -starts(4) @ K.mT, rtol=1e-10, atol=1e-11
        )


def test_plan_equals_a_minimiser_over_inputs_with_active_bounds() -> None:
    p = system(2)
    extra = {
        "P": 3 * p["Q"],
        "q": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64),
        "r": torch.tensor([0.05, -0.1], dtype=torch.float64),
        "c": torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64),
    }
    low, high = torch.tensor([-0.3, -math.inf], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
    plan = condensed_mpc(**p, **extra, x0=starts(4), horizon=4, low=low, high=high, discount=0.9)
    assert 0.1 < float((plan.solution.active != 0).double().mean()) < 0.9

    def rollout(actions: Tensor, x0: Tensor) -> Tensor:
        states = [x0]
        for a in actions:
            states.append(p["A"] @ states[-1] + p["B"] @ a + extra["c"])
        return torch.stack(states)

    for x0, actions, states in zip(starts(4), plan.actions, plan.states, strict=True):
        torch.testing.assert_close(states, rollout(actions, x0), rtol=1e-12, atol=1e-13)

        def value(flat: np.ndarray, x0: Tensor = x0) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(flat.reshape(4, M), requires_grad=True)
            total = cost({**p, **extra}, rollout(leaf, x0), leaf, 0.9)
            return float(total.detach()), torch.autograd.grad(total, leaf)[0].numpy().ravel()

        limits = list(zip(low.tolist(), high.tolist(), strict=True)) * 4
        found = minimize(
            value, np.zeros(8), jac=True, bounds=limits, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-11}
        )
        # L-BFGS-B stops at a projected gradient of rounding size, some 1e-9 of the inputs
        np.testing.assert_allclose(actions.numpy().ravel(), found.x, rtol=0, atol=1e-7)


def test_differentiable_in_model_cost_start_and_bounds() -> None:
    p, limit = system(3), torch.tensor([0.25, 0.4], dtype=torch.float64)
    plan = condensed_mpc(**p, x0=starts(40), horizon=3, low=-limit, high=limit)
    sure = starts(40)[plan.solution.margin > 1e-3][:3]  # away from kinks, for differences of 1e-6
    names = ("A", "B", "Q", "R")
    leaves = [x.clone().requires_grad_() for x in (*(p[key] for key in names), sure, limit)]

    def first(*args: Tensor) -> Tensor:
        values = dict(zip(names, args[:4], strict=True))
        return condensed_mpc(**values, x0=args[4], horizon=3, low=-args[5], high=args[5]).actions

    assert bool((condensed_mpc(**p, x0=sure, horizon=3, low=-limit, high=limit).solution.active != 0).any())
    assert gradcheck(first, leaves, check_forward_ad=True)


def test_batch_of_models_is_a_loop_over_models() -> None:
    models = [system(seed) for seed in range(3)]
    stacked = {key: torch.stack([p[key] for p in models]) for key in models[0]}
    together = condensed_mpc(**stacked, x0=starts(3), horizon=5, low=-0.2, high=0.2)
    shared = condensed_mpc(**models[0], x0=starts(3), horizon=5, low=-0.2, high=0.2)
    mapped = vmap(lambda p, x0: condensed_mpc(**p, x0=x0, horizon=5, low=-0.2, high=0.2).actions)(stacked, starts(3))
    for row, p in enumerate(models):
        alone = condensed_mpc(**p, x0=starts(3)[row], horizon=5, low=-0.2, high=0.2)
        torch.testing.assert_close(together.actions[row], alone.actions, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mapped[row], alone.actions, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shared.actions[0], together.actions[0], rtol=1e-11, atol=1e-12)


def test_the_policy_in_a_rollout_has_the_gradient_and_hessian_of_the_return() -> None:
    p = system(4)
    mdp = linear_gaussian(p["A"], p["B"], noise_covariance=0.01 * torch.eye(N, dtype=torch.float64))
    theta = {"A": p["A"] + 0.05, "B": p["B"]}
    policy = mpc_policy(4, {"Q": p["Q"], "R": p["R"], "B": p["B"]})
    generator = torch.Generator().manual_seed(0)
    noise = sample_noise(mdp, policy, batch=16, horizon=5, generator=generator)
    diagonal, limit = torch.zeros(N, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)

    def J(x: Tensor) -> Tensor:
        nu = {"A": p["A"] + torch.diag(x[:N]), "low": -x[N], "high": x[N]}
        return expected_return(mdp, policy, theta, nu, noise)

    at = torch.cat([diagonal, limit[None]])
    slope, curvature = grad(J)(at), hessian(J)(at)
    for index in range(N + 1):
        step = torch.zeros(N + 1, dtype=torch.float64)
        step[index] = 1e-6  # no active set of the 80 programs changes within it
        assert float(slope[index]) == pytest.approx(float(J(at + step) - J(at - step)) / 2e-6, rel=1e-6, abs=1e-8)
        differences = (grad(J)(at + step) - grad(J)(at - step)) / 2e-6
        torch.testing.assert_close(curvature[index], differences, rtol=1e-6, atol=1e-7)


def bounded(values: Params, x0: Tensor, **options: object) -> object:
    """A plan with one output, `s_1 + s_2 / 2`, between -0.4 and 0.3, inputs within 1."""
    C = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    arguments = {
        "C": C,
        "output_low": -0.4,
        "output_high": 0.3,
        "low": -1.0,
        "high": 1.0,
        "horizon": 4,
        "discount": 0.9,
    }
    return condensed_mpc(**{**values, **arguments, **options}, x0=x0)


def cvxpy_plan(values: Params, x0: Tensor, penalties: tuple[float, float] | None, back_off: float) -> np.ndarray | None:
    """The same program with the states as variables, by Clarabel; None when it is infeasible."""
    cp = pytest.importorskip("cvxpy")
    A, B, Q, R = (values[key].numpy() for key in ("A", "B", "Q", "R"))
    s, a, e = cp.Variable((5, N)), cp.Variable((4, M)), cp.Variable(4, nonneg=True)
    total, rules = 0, [s[0] == x0.numpy(), cp.abs(a) <= 1.0]
    for k in range(5):
        total += 0.9**k * cp.quad_form(s[k], Q)
        if k < 4:
            total += 0.9**k * cp.quad_form(a[k], R)
            rules.append(s[k + 1] == A @ s[k] + B @ a[k])
        if k > 0:
            excess = e[k - 1] if penalties else 0
            rules += [
                s[k, 0] + s[k, 1] / 2 <= 0.3 - back_off + excess,
                s[k, 0] + s[k, 1] / 2 >= -0.4 + back_off - excess,
            ]
            if penalties:
                total += 0.9**k * (penalties[0] * e[k - 1] + penalties[1] * e[k - 1] ** 2)
    task = cp.Problem(cp.Minimize(total), rules)
    task.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return a.value


@pytest.mark.parametrize("back_off", [0.0, 0.1])
def test_hard_bounds_of_outputs_equal_clarabel_or_are_infeasible_for_both(back_off: float) -> None:
    p = system(5)
    plan = bounded(p, starts(12), back_off=back_off, on_infeasible="nan")
    assert isinstance(plan.solution, QPSolution)
    kinds = plan.solution.infeasible
    assert 0 < int(kinds.sum()) < 12
    for row, x0 in enumerate(starts(12)):
        expected = cvxpy_plan(p, x0, None, back_off)
        assert (expected is None) == bool(kinds[row])
        if expected is None:
            assert bool(plan.actions[row].isnan().all())
        else:  # Clarabel's gap of 1e-12 leaves half of the digits in flat directions
            np.testing.assert_allclose(plan.actions[row], expected, rtol=0, atol=1e-5)
            outputs = plan.states[row, 1:] @ torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
            assert float(outputs.max()) <= 0.3 - back_off + 1e-9
            assert float(outputs.min()) >= -0.4 + back_off - 1e-9
    assert bool((plan.solution.active & ~kinds[:, None]).any())


@pytest.mark.parametrize("penalties", [(0.5, 0.0), (0.1, 2.0), (0.0, 3.0)])
def test_soft_bounds_of_outputs_equal_clarabel(penalties: tuple[float, float]) -> None:
    p = system(5)
    plan = bounded(p, starts(6), penalty=penalties[0], penalty_quadratic=penalties[1])
    assert bool(plan.solution.converged.all())
    assert plan.slack is not None
    assert plan.slack.shape == (6, 4, 1)
    assert float(plan.slack.min()) > -1e-12
    for row, x0 in enumerate(starts(6)):
        np.testing.assert_allclose(plan.actions[row], cvxpy_plan(p, x0, penalties, 0.0), rtol=0, atol=2e-5)


def test_an_exact_penalty_above_the_multipliers_changes_nothing_that_is_feasible() -> None:
    p = system(5)
    hard = bounded(p, starts(12), on_infeasible="nan")
    feasible = ~hard.solution.infeasible
    needed = float(hard.pressure[feasible].max())
    assert needed > 0.01
    above = bounded(p, starts(12), penalty=1.01 * needed)
    torch.testing.assert_close(above.actions[feasible], hard.actions[feasible], rtol=1e-8, atol=1e-9)
    assert float(above.slack[feasible].max()) < 1e-9
    assert bool((above.slack[~feasible].amax((-2, -1)) > 1e-3).all())
    below = bounded(p, starts(12), penalty=0.5 * needed)
    assert float(below.slack[feasible].max()) > 1e-4


def test_bounds_of_outputs_are_differentiable_in_everything() -> None:
    p = system(5)
    for soft in (False, True):
        extra = {"penalty": 0.5, "penalty_quadratic": 1.0} if soft else {}
        extra["horizon"] = 2
        plan = bounded(p, starts(60), on_infeasible="nan", **extra)
        busy = (plan.pressure.amax((-2, -1)) > 1e-2) & (plan.solution.margin > 1e-3)
        sure = starts(60)[busy][:1]
        high, back_off, weight = (torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.02, 0.5))
        C = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for x in (p["A"], p["B"], p["Q"], p["R"], sure, high, back_off, weight, C)]

        def plan_of(*args: Tensor, soft: bool = soft) -> Tensor:
            values = dict(zip(("A", "B", "Q", "R"), args[:4], strict=True))
            prices = {"penalty": args[7], "penalty_quadratic": 2 * args[7]} if soft else {}
            return bounded(
                values, args[4], output_high=args[5], back_off=args[6], C=args[8], horizon=2, **prices
            ).actions

        margin = bounded(p, sure, back_off=back_off, **extra).solution.margin
        assert float(margin.min()) > 1e-3  # no active set changes within differences of 1e-6
        assert gradcheck(plan_of, leaves, check_forward_ad=True, fast_mode=True)


def test_a_policy_with_hard_bounds_names_the_state_without_a_plan() -> None:
    p = system(5)
    C = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    hard = {"C": C, "output_high": torch.tensor([0.3], dtype=torch.float64), "low": -C[0, :1].abs().expand(M)}
    hard["high"] = -hard["low"]
    far = torch.cat([0.1 * starts(2), 50.0 + starts(1)])
    with pytest.raises(InfeasibleError, match="sample 2 is infeasible"):
        mpc_policy(4, hard).act(p, far, far[:, :0])
    nan = mpc_policy(4, hard, on_infeasible="nan").act(p, far, far[:, :0])
    assert nan.isnan().all(-1).tolist() == [False, False, True]
    soft = mpc_policy(4, hard | {"penalty": torch.tensor(10.0, dtype=torch.float64)}).act(p, far, far[:, :0])
    assert bool(torch.isfinite(soft).all())
    torch.testing.assert_close(soft[:2], nan[:2], rtol=1e-8, atol=1e-9)


def test_the_report_counts_what_the_plans_do_not_keep() -> None:
    p = system(5)
    quiet = mpc_report(condensed_mpc(**p, x0=starts(12), horizon=4, low=-1.0, high=1.0))
    assert (quiet.samples, quiet.infeasible, quiet.unconverged, quiet.relaxed, quiet.notes) == (12, 0, 0, 0, ())
    hard = bounded(p, starts(12), on_infeasible="nan")
    report = mpc_report(hard)
    assert report.infeasible == int(hard.solution.infeasible.sum())
    assert "have no plan within the hard bounds" in report.notes[0]
    assert float(report.largest_pressure) == float(hard.pressure[~hard.solution.infeasible].max())
    soft = bounded(p, starts(12), penalty=0.2)
    report = mpc_report(soft)
    assert report.relaxed == int((soft.slack.amax((-2, -1)) > 1e-8).sum()) > 0
    assert float(report.largest_slack) == pytest.approx(float(soft.slack.max()))
    # at a slack above zero the pressure is the penalty
    assert float(report.largest_pressure) == pytest.approx(0.2, rel=1e-9)
    assert any("exceed soft bounds" in note for note in report.notes)
    zero = condensed_mpc(**p, x0=torch.zeros(1, N, dtype=torch.float64), horizon=2, output_high=0.0, output_low=-1.0)
    assert mpc_report(zero).kinks == 1
    with pytest.warns(UserWarning, match="raise max_steps"):
        late = bounded(p, starts(12), penalty=0.2, max_steps=1)
    assert mpc_report(late).unconverged > 0


def test_smoothing_is_a_barrier_on_every_bound() -> None:
    p = system(5)
    near = bounded(p, starts(6), penalty=1.0, smoothing=1e-7)
    sharp = bounded(p, starts(6), penalty=1.0)
    torch.testing.assert_close(near.actions, sharp.actions, rtol=0, atol=1e-3)
    assert float(near.actions.abs().max()) < 1.0
    assert mpc_report(near).kinks == 0
    # slack is what the outputs exceed, not e, which a barrier keeps above zero at every step
    C = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    for smoothing in (1e-2, 1e-7):
        plan = bounded(p, starts(6), penalty=1.0, smoothing=smoothing)
        outputs = plan.states[:, 1:] @ C
        excess = torch.maximum(outputs - 0.3, -0.4 - outputs).clamp_min(0.0)
        torch.testing.assert_close(plan.slack[..., 0], excess, rtol=1e-6, atol=1e-10)
        assert mpc_report(plan).relaxed == int((excess.amax(-1) > 1e-8).sum())
        assert 0 < mpc_report(plan).relaxed < 6
    inputs = condensed_mpc(**p, x0=starts(6), horizon=4, low=-0.3, high=0.3, smoothing=1e-7)
    expected = condensed_mpc(**p, x0=starts(6), horizon=4, low=-0.3, high=0.3)
    assert inputs.pressure is None
    torch.testing.assert_close(inputs.actions, expected.actions, rtol=0, atol=1e-3)
    free = condensed_mpc(**p, x0=starts(6), horizon=4, smoothing=1e-7)
    torch.testing.assert_close(free.actions, condensed_mpc(**p, x0=starts(6), horizon=4).actions, rtol=1e-9, atol=1e-10)


def test_outputs_of_a_batch_of_models_is_a_loop_over_models() -> None:
    models = [system(seed) for seed in (5, 6)]
    stacked = {key: torch.stack([p[key] for p in models]) for key in models[0]}
    together = bounded(stacked, starts(2), penalty=1.0)
    mapped = vmap(lambda p, x0: bounded(p, x0, penalty=1.0).actions)(stacked, starts(2))
    for row, p in enumerate(models):
        alone = bounded(p, starts(2)[row], penalty=1.0)
        torch.testing.assert_close(together.actions[row], alone.actions, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(mapped[row], alone.actions, rtol=1e-10, atol=1e-11)


def test_bad_input_is_refused_by_name() -> None:
    p = system()
    with pytest.raises(KeyError, match=r"missing \['Q', 'R'\], unknown \['gain'\]"):
        mpc_policy(3, {"A": p["A"], "B": p["B"]}).act({"gain": p["R"]}, starts(2), starts(2)[:, :0])
    with pytest.raises(ValueError, match=r"q must be floating point \[..., 3\]"):
        condensed_mpc(**p, x0=starts(2), horizon=3, q=p["R"][0])
    with pytest.raises(ValueError, match=r"A is torch.float32 on cpu, B torch.float64"):
        condensed_mpc(**{**p, "A": p["A"].float()}, x0=starts(2), horizon=3)
    with pytest.raises(ValueError, match=r"on_infeasible.* must be 'raise' or 'nan', got 'warn'"):
        condensed_mpc(**p, x0=starts(2), horizon=3, output_high=1.0, on_infeasible="warn")
    with pytest.raises(ValueError, match=r"B must be \[..., n, m\]"):
        condensed_mpc(**{**p, "B": p["B"][0]}, x0=starts(2), horizon=3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        condensed_mpc(**p, x0=starts(2), horizon=0)
    with pytest.raises(ValueError, match="not positive definite"):
        condensed_mpc(**{**p, "R": -10 * p["R"]}, x0=starts(2), horizon=3)
    with pytest.raises(ValueError, match="infeasible"):
        condensed_mpc(**p, x0=starts(2), horizon=3, low=1.0, high=0.5)
    with pytest.raises(ValueError, match=r"\['penalty'\] belong to bounds of outputs"):
        condensed_mpc(**p, x0=starts(2), horizon=3, penalty=1.0)
    with pytest.raises(ValueError, match="back_off must be >= 0"):
        condensed_mpc(**p, x0=starts(2), horizon=3, output_high=1.0, back_off=-1.0)
    with pytest.raises(ValueError, match=r"output_high must be \[..., 3\], one per output"):
        condensed_mpc(**p, x0=starts(2), horizon=3, output_high=p["R"][0])
    with pytest.raises(ValueError, match=r"C must be floating point \[..., 2, 3\]"):
        condensed_mpc(**p, x0=starts(2), horizon=3, C=p["B"].mT @ p["B"], output_high=1.0)
