"""Constraints, trade-off and policies given by a formula in `tune`, against closed forms and scipy.

The toy: nu*(theta) = theta, real return -(nu - best)' M (nu - best), margin of a constraint r - |nu|^2 (curved) or
b - a'nu (flat). With a log-likelihood of weight w, mean m and precision P the optimum is
(2 M + w P)^-1 (2 M best + w P m).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from sim2real.bounds import Box
from sim2real.calibration import Calibration
from sim2real.estimators.explicit_sensitivity import explicit_sensitivity
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import linear_policy
from sim2real.rollout import Rollout
from sim2real.safety import Constraint, Margin, constraint_gradient
from sim2real.simulators.linear_gaussian import linear_gaussian
from sim2real.solvers.mpc import mpc_policy
from sim2real.tune_constraints import feasible, inside, violated, violation
from sim2real.tune_state import Point, tuning_space
from sim2real.tuning import TuneResult, TuneSettings, tune

M = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 0.4]], dtype=torch.float64)
BEST = torch.tensor([0.7, -0.4, 1.5], dtype=torch.float64)
START = {"a": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor([0.2, 0.3], dtype=torch.float64)}
EYE = torch.eye(2, dtype=torch.float64)
NORMAL = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
DATA = Rollout(torch.zeros(2, 3, 2).double(), torch.zeros(2, 2, 2).double(), torch.zeros(2, 2).double())


def ball(nu: Params, data: Any) -> Margin:
    x = nu["x"]
    return Margin(0.8 - x @ x, {"x": -2 * x}, x @ x, torch.zeros(()))


def plane(nu: Params, data: Any) -> Margin:
    return Margin(0.6 - NORMAL @ nu["x"], {"x": -NORMAL}, NORMAL @ nu["x"], torch.zeros(()))


def tune_toy(**options: Any) -> TuneResult:
    def gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        gap = nu["x"] - BEST
        return Estimate(-(gap @ M @ gap) - 5.0, {"x": -2 * M @ gap})

    arguments: dict[str, Any] = {
        "real_reward": None,
        "real_discount": 0.9,
        "settings": TuneSettings(max_steps=60, certify=False),
        "box": Box(),
        "objective": lambda theta, nu: -(nu["x"] - ravel(theta)).square().sum(),
        "gradient": gradient,
        "scale": {key: torch.tensor(0.3, dtype=torch.float64) for key in START},
    }
    start, nu = options.pop("start", START), {"x": torch.zeros(3, dtype=torch.float64)}
    return tune(linear_gaussian(EYE, EYE), linear_policy(2), start, nu, DATA, None, **(arguments | options))


def independent(margins: list[Any], bounds: Any = None) -> np.ndarray:
    """The constrained optimum by scipy."""
    best, matrix = BEST.numpy(), M.numpy()
    found = minimize(
        lambda x: (x - best) @ matrix @ (x - best),
        np.array([0.1, 0.2, 0.3]),
        jac=lambda x: 2 * matrix @ (x - best),
        bounds=bounds,
        constraints=[
            {"type": "ineq", "fun": lambda x, f=f: float(f({"x": torch.tensor(x)}, None).value)} for f in margins
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 200},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("limits", [{"ball": ball}, {"plane": plane}, {"ball": ball, "plane": plane}], ids="+".join)
def test_the_constrained_optimum_is_scipys(limits: dict[str, Any]) -> None:
    result = tune_toy(constraints=limits)
    # scipy's constraint Jacobian by differences is good to 1e-8; the search stops within 1e-6 of the boundary
    np.testing.assert_allclose(ravel(result.theta).numpy(), independent(list(limits.values())), rtol=0, atol=2e-5)
    kept = [row for row in result.history if row["accepted"]]
    assert all(row[f"margin.{name}"] >= -1e-5 for row in kept for name in limits)
    assert result.report.converged, result.report.status


def test_a_constraint_and_the_box_hold_together() -> None:
    box = Box(high={"a": 0.2})
    result = tune_toy(constraints={"ball": ball}, box=box)
    wanted = independent([ball], bounds=[(None, 0.2), (None, None), (None, None)])
    np.testing.assert_allclose(ravel(result.theta).numpy(), wanted, rtol=0, atol=2e-5)


def test_a_constraint_that_does_not_bind_changes_nothing() -> None:
    loose = lambda nu, data: Margin(100 - nu["x"] @ nu["x"], {"x": -2 * nu["x"]}, torch.zeros(()), torch.zeros(()))
    result = tune_toy(constraints={"loose": loose})
    torch.testing.assert_close(ravel(result.theta), BEST, rtol=0, atol=1e-6)
    assert result.report.converged


def test_a_start_that_violates_is_led_back_first() -> None:
    start = {"a": torch.tensor(2.0).double(), "b": torch.tensor([1.0, 1.0]).double()}
    result = tune_toy(constraints={"ball": ball, "plane": plane}, start=start)
    margins = [min(row["margin.ball"], row["margin.plane"]) for row in result.history if row["accepted"]]
    assert margins[0] < 0
    assert margins[-1] >= -1e-5
    first = next(k for k, margin in enumerate(margins) if margin >= -1e-5)
    assert all(margin >= -1e-5 for margin in margins[first:])
    np.testing.assert_allclose(ravel(result.theta).numpy(), independent([ball, plane]), rtol=0, atol=2e-5)


def test_candidates_that_violate_are_refused_by_name() -> None:
    def treacherous(nu: Params, data: Any) -> Margin:  # its slope says nothing of the wall behind
        inside = float(nu["x"][0]) <= 0.3
        return Margin(torch.tensor(1.0 if inside else -1.0), {"x": torch.zeros(3).double()}, *(torch.zeros(()),) * 2)

    result = tune_toy(constraints={"wall": treacherous})
    assert float(result.theta["a"]) <= 0.3
    assert any("refused a candidate: it violates 'wall' (margin -1)" in note for note in result.notes)
    assert not any(row["accepted"] for row in result.history if row["margin.wall"] < 0)


def test_margins_that_cannot_be_judged_refuse_a_candidate() -> None:
    def doubtful(nu: Params, data: Any) -> Margin:
        bad = float(nu["x"][0]) > 0.3
        zero = torch.zeros((), dtype=torch.float64)
        grad = {"x": torch.zeros(3).double()}
        return Margin(zero + 1.0, grad, zero, zero, trusted=not bad, reason="the critic is unstable" if bad else "")

    result = tune_toy(constraints={"speed": doubtful})
    assert float(result.theta["a"]) <= 0.3
    assert any("the constraint 'speed' cannot be judged: the critic is unstable" in note for note in result.notes)


def test_constrained_runs_resume_bitwise() -> None:
    states: list[Params] = []
    whole = tune_toy(constraints={"ball": ball}, on_step=states.append)
    resumed = tune_toy(constraints={"ball": ball}, state=states[3])
    assert all(torch.equal(whole.state[key], resumed.state[key]) for key in whole.state)
    assert whole.history == resumed.history


def test_constraints_need_a_sensitivity_and_data() -> None:
    direct = lambda *_, **__: Estimate(torch.tensor(-1.0), {"a": torch.tensor(0.0), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="no hypergradient, and a log"):
        tune_toy(constraints={"ball": ball}, hypergradient=direct, optimum=lambda theta, nu: {"x": ravel(theta)})


def test_constraints_of_the_library_go_in_as_they_are() -> None:
    """Mean action cost of an LQR below a limit: the gain is held back, the return is what that leaves."""
    A, B = torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double(), torch.tensor([[0.0], [0.3]]).double()
    mdp, policy = linear_gaussian(A, B, noise_covariance=0.01 * EYE), linear_policy(1)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    states, actions = [draw(80, 2)], []
    for _ in range(15):
        actions.append(-states[-1] @ torch.tensor([[1.0], [1.5]]).double() + 0.7 * draw(80, 1))
        states.append(states[-1] @ A.T + actions[-1] @ B.T + 0.1 * draw(80, 2))
    log = Rollout(torch.stack(states, 1), torch.stack(actions, 1), torch.zeros(80, 15).double())
    effort = Constraint("effort", lambda s, a, following: a.square().sum(-1), 0.5, discount=0.95, confidence=0.9)
    from sim2real.solvers.riccati import lyapunov, riccati

    Q, R = torch.diag(torch.tensor([1.0, 0.1]).double()), torch.tensor([[0.01]]).double()

    def objective(theta: Params, nu: Params) -> Tensor:
        loop = theta["A"] - theta["B"] @ nu["gain"]
        return -torch.trace(lyapunov(loop, Q + nu["gain"].mT @ R @ nu["gain"], 0.95))

    arguments: dict[str, Any] = {
        "real_reward": lambda s, a, following: -(s @ Q * s).sum(-1) - 0.01 * a.square().sum(-1),
        "real_discount": 0.95,
        "settings": TuneSettings(max_steps=25, gradient_tol=1e-6),
        "objective": objective,
        "optimum": lambda theta, nu: {"gain": riccati(theta["A"], theta["B"], Q, R, 0.95)[1]},
    }
    theta, nu = {"A": A, "B": 2 * B}, {"gain": torch.zeros(1, 2).double()}
    limits = {"effort": lambda nu, data: constraint_gradient(effort, policy, nu, data)}
    open_ended = tune(mdp, policy, theta, nu, log, None, **arguments)
    held = tune(mdp, policy, theta, nu, log, None, constraints=limits, **arguments)
    margin = lambda result: float(constraint_gradient(effort, policy, result.nu, log).value)
    assert margin(open_ended) < 0
    assert margin(held) >= -1e-6
    assert margin(held) < 0.02 * abs(margin(open_ended))  # it binds
    value = lambda result: max(row["real_return"] for row in result.history if row["accepted"])
    assert value(held) < value(open_ended)


# ------------------------------------------------------------------------------------------------------- small parts


def point(margins: list[float], slopes: list[list[float]], gradient: list[float]) -> Point:
    flat = torch.zeros(0).double()
    values = (torch.tensor(x, dtype=torch.float64) for x in (margins, slopes, gradient))
    m, S, g = values
    info = {f"margin.c{k}": value for k, value in enumerate(margins)}
    theta = {"x": torch.zeros(len(gradient)).double()}
    return Point(theta, {}, 0.0, g, torch.zeros(2, 2).double(), flat, True, "", info, m, S)


def test_violations_are_lengths_and_named() -> None:
    bad = point([-0.5, 0.2, -1.0], [[1.0, 0.0], [0.0, 1.0], [4.0, 3.0]], [0.0, 0.0])
    assert violation(bad.margins, bad.slopes) == pytest.approx(0.5)
    assert not feasible(bad)
    assert violated(bad) == "'c0' (margin -0.5), 'c2' (margin -1)"
    flat = point([-0.5], [[0.0, 0.0]], [0.0, 0.0])
    assert violation(flat.margins, flat.slopes) == 0.5
    assert feasible(point([], [], [1.0, 0.0]))


def test_the_gradient_that_constraints_hold_back_does_not_count() -> None:
    space = tuning_space({"x": torch.zeros(2).double()}, Box(), (), {"x": torch.tensor(1.0)})
    against = inside(point([0.0], [[-1.0, 0.0]], [2.0, 1.0]), space)
    torch.testing.assert_close(against, torch.tensor([0.0, 1.0]).double())
    along = inside(point([0.0], [[1.0, 0.0]], [2.0, 1.0]), space)
    torch.testing.assert_close(along, torch.tensor([2.0, 1.0]).double())
    slack = inside(point([0.3], [[-1.0, 0.0]], [2.0, 1.0]), space)
    torch.testing.assert_close(slack, torch.tensor([2.0, 1.0]).double())


# -------------------------------------------------------------------------------------------------------- trade-off

MEAN = {"a": torch.tensor(-0.3, dtype=torch.float64), "b": torch.tensor([0.1, 0.2], dtype=torch.float64)}
PRECISION = torch.diag(torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64))


def test_the_trade_off_curve_is_the_closed_form_compromise_at_every_weight() -> None:
    result = tune_toy(
        start=MEAN, likelihood=(MEAN, PRECISION), settings=TuneSettings(max_steps=60, certify=False, trade_off=3)
    )
    curve = result.trade_off
    assert [entry.weight for entry in (curve[0], curve[-1])] == [0.0, math.inf]
    assert len(curve) == 5
    natural = (curve[0].real_return - curve[-1].real_return) / (curve[-1].log_likelihood - curve[0].log_likelihood)
    for entry, factor in zip(curve[1:-1], (0.1, 1.0, 10.0), strict=True):
        assert entry.weight == pytest.approx(factor * natural, rel=1e-12)
        w = entry.weight
        wanted = torch.linalg.solve(2 * M + w * PRECISION, 2 * M @ BEST + w * PRECISION @ ravel(MEAN))
        # ten iterations for each weight
        torch.testing.assert_close(ravel(entry.theta), wanted, rtol=0, atol=2e-2)
    returns, likelihoods = ([getattr(entry, name) for entry in curve] for name in ("real_return", "log_likelihood"))
    assert returns == sorted(returns, reverse=True)
    assert likelihoods == sorted(likelihoods)
    assert curve[-1].log_likelihood == 0.0
    torch.testing.assert_close(ravel(curve[-1].theta), ravel(MEAN))


def test_without_anything_to_trade_there_is_a_note() -> None:
    best = {"a": BEST[0], "b": BEST[1:]}
    result = tune_toy(
        start=best, likelihood=(best, PRECISION), settings=TuneSettings(max_steps=5, certify=False, trade_off=3)
    )
    assert len(result.trade_off) == 2
    assert any("no trade-off to show" in note for note in result.notes)


def test_weights_whose_search_fails_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> None:
        raise ValueError("no critic here")

    monkeypatch.setattr("sim2real.tune_finish.begin", begin)
    result = tune_toy(
        start=MEAN, likelihood=(MEAN, PRECISION), settings=TuneSettings(max_steps=60, certify=False, trade_off=2)
    )
    assert len(result.trade_off) == 2
    assert sum("the trade-off curve lacks the weight" in note for note in result.notes) == 2
    assert tune_toy(start=MEAN, likelihood=(MEAN, PRECISION)).trade_off == ()


def test_calibration_is_taken_before_and_after() -> None:
    def calibration(theta: Params) -> Calibration:
        if float(theta["a"]) > 5:
            raise ValueError("no window")
        empty = torch.zeros(1, 1).double()
        return Calibration(("s",), "1", (1.0,), ravel(theta), *(empty,) * 5, float(theta["a"]), 1, 0)

    result = tune_toy(calibration=calibration)
    assert result.calibration is not None
    assert [part.miscalibration for part in result.calibration] == [0.1, float(result.theta["a"])]
    calls: list[int] = []

    def failing(theta: Params) -> Calibration:
        calls.append(0)
        if len(calls) > 1:
            raise ValueError("no window fits")
        return calibration(theta)

    told = tune_toy(calibration=failing)
    assert told.calibration is None
    assert "the tuned theta has no calibration: no window fits" in told.notes[-1]

    def never(theta: Params) -> Calibration:
        raise ValueError("no window fits")

    without = tune_toy(calibration=never)
    assert without.calibration is None
    assert "no predictive calibration: no window fits" in without.notes
    assert torch.equal(ravel(without.theta), ravel(result.theta))


def test_a_likelihood_that_is_not_finite_moves_nothing_and_is_noted() -> None:
    def broken(theta: Params) -> Any:
        return (
            torch.tensor(math.nan),
            {key: torch.full_like(value, math.nan) for key, value in theta.items()},
            PRECISION,
        )

    # one number of nu: two directions of theta are free
    few = {
        "objective": lambda theta, nu: -((nu["x"] - ravel(theta)[:1]).square().sum()),
        "gradient": lambda policy, nu, log, **_: Estimate(-5 - (nu["x"] - 1).square().sum(), {"x": 2 - 2 * nu["x"]}),
        "optimum": lambda theta, nu: {"x": ravel(theta)[:1]},
    }
    result = tune_toy(likelihood=broken, **few)
    assert result.freedom is None
    assert any("freedom of equal policies was not used: the log-likelihood has" in note for note in result.notes)
    assert torch.equal(ravel(result.theta), ravel(tune_toy(**few).theta))


def test_constraints_freedom_and_certificates_resume_bitwise() -> None:
    states: list[Params] = []
    options: dict[str, Any] = {
        "constraints": {"ball": ball, "plane": plane},
        "likelihood": (MEAN, PRECISION),
        "settings": TuneSettings(max_steps=12, audit=1, likelihood_weight=0.1, trade_off=1),
        "optimum": lambda theta, nu: {"x": ravel(theta)},
    }
    whole = tune_toy(on_step=states.append, **options)
    assert all(row["certified"] == 1 for row in whole.history if row["accepted"])
    for state in states[:4]:
        again = tune_toy(state=state, **options)
        assert all(torch.equal(whole.theta[key], again.theta[key]) for key in whole.theta)
        assert (whole.history, whole.notes) == (again.history, again.notes)
        assert whole.freedom is not None
        assert again.freedom is not None
        assert whole.freedom.log_likelihood == again.freedom.log_likelihood
        assert [point.real_return for point in whole.trade_off] == [point.real_return for point in again.trade_off]


def test_a_search_that_ends_outside_a_limit_says_so() -> None:
    def never(nu: Params, data: Any) -> Margin:
        return Margin(-1 - nu["x"] @ nu["x"], {"x": -2 * nu["x"]}, torch.zeros(()), torch.zeros(()))

    result = tune_toy(constraints={"never": never}, settings=TuneSettings(max_steps=3, certify=False))
    assert not result.report.converged
    assert "the best theta violates 'never' (margin -1" in result.report.status


# ------------------------------------------------------------------------------------------- policies by a formula


def test_a_model_predictive_controller_is_tuned_and_certified_by_solving_it_anew() -> None:
    """The model inside an MPC is theta; the world has twice the input gain."""
    A, B = torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double(), torch.tensor([[0.0], [0.3]]).double()
    costs = {"Q": torch.diag(torch.tensor([1.0, 0.1]).double()), "R": torch.tensor([[0.05]]).double()}
    limits = {"low": torch.tensor([-2.0]).double(), "high": torch.tensor([2.0]).double()}
    policy = mpc_policy(8, {**costs, **limits, "A": A})
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    states, actions = [0.5 * draw(60, 2)], []
    for _ in range(12):
        actions.append(policy.act({"B": B}, states[-1], states[-1][:, :0]) + 0.3 * draw(60, 1))
        states.append(states[-1] @ A.T + 2 * actions[-1] @ B.T + 0.02 * draw(60, 2))
    log = Rollout(torch.stack(states, 1), torch.stack(actions, 1), torch.zeros(60, 12).double())
    formula = lambda theta: {"B": theta["B"]}
    result = tune(
        linear_gaussian(A, B),
        policy,
        {"B": B},
        {"B": B},
        log,
        None,
        real_reward=lambda s, a, following: -(s @ costs["Q"] * s).sum(-1) - 0.05 * a.square().sum(-1),
        real_discount=0.95,
        optimum=lambda theta, nu: formula(theta),
        sensitivity=partial(explicit_sensitivity, optimum=formula),
        settings=TuneSettings(max_steps=6),
    )
    kept = [row for row in result.history if row["accepted"]]
    assert all(row["certified"] == 1 for row in kept)
    # with the world's own matrices the return is -0.9092: six steps close more than half of the gap
    assert kept[0]["real_return"] < -0.95
    assert kept[-1]["real_return"] > -0.925


def test_a_formula_has_no_in_sim_return_to_ask_for() -> None:
    with pytest.raises(ValueError, match="there is no in-sim return"):
        tune_toy(objective=None, optimum=lambda theta, nu: {"x": ravel(theta)})
