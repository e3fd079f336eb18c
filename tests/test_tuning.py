"""The tuning loop, on problems whose answer is known.

The toy: in-sim return -|nu - theta|^2, so nu*(theta) = theta, and real return -(nu - best)' M (nu - best). With a
Gaussian log-likelihood of weight w, mean m and precision P the optimum is (2 M + w P)^-1 (2 M best + w P m).
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sim2real.bounds import Box, project
from sim2real.estimators import logged_policy_gradient, policy_sensitivity
from sim2real.estimators.certificate import Certificate, certify
from sim2real.gym import record_rollout, to_gym
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Estimate, Params, assign_grads, copy_into, ravel
from sim2real.policy import deterministic_policy, linear_policy, module_policy
from sim2real.rollout import Rollout, rollout
from sim2real.simulators.linear_gaussian import linear_gaussian, multiplicative_noise_lqr
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.riccati import lyapunov, riccati
from sim2real.trust_region import bfgs_update, next_radius, predicted_gain, trust_region_step
from sim2real.tuning import TuneResult, TuneSettings, tune, tune_step

M = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 0.4]], dtype=torch.float64)
BEST = torch.tensor([0.7, -0.4, 1.5], dtype=torch.float64)
START = {"a": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor([0.2, 0.3], dtype=torch.float64)}
EYE = torch.eye(2, dtype=torch.float64)


def toy_objective(theta: Params, nu: Params) -> Tensor:
    return -(nu["x"] - ravel(theta)).square().sum()


def toy_gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
    gap = nu["x"] - BEST
    return Estimate(-(gap @ M @ gap) - 5.0, {"x": -2 * M @ gap})


def toy_mdp() -> ModelMDP:
    return linear_gaussian(EYE, EYE)


def tune_toy(**options: Any) -> TuneResult:
    settings = options.pop("settings", TuneSettings(max_steps=40))
    arguments: dict[str, Any] = {
        "real_reward": None,
        "real_discount": 0.9,
        "settings": settings,
        "box": Box(),
        "objective": toy_objective,
        "gradient": toy_gradient,
    }
    start = options.pop("start", START)
    nu = {"x": torch.zeros(3, dtype=torch.float64)}
    return tune(toy_mdp(), linear_policy(2), start, nu, None, None, **(arguments | options))


# ----------------------------------------------------------------------------------------------------- trust region


def test_step_inside_the_ball_is_newtons() -> None:
    g, far = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.full((3,), torch.inf, dtype=torch.float64)
    step = trust_region_step(g, M, 10.0, -far, far)
    torch.testing.assert_close(step, torch.linalg.solve(M, g), rtol=1e-12, atol=0)
    assert predicted_gain(g, M, step) == pytest.approx(float(0.5 * g @ torch.linalg.solve(M, g)))


@pytest.mark.parametrize("curvature", [M, torch.zeros(3, 3, dtype=torch.float64), torch.diag(M[0])])
def test_step_on_the_ball_satisfies_the_optimality_conditions(curvature: Tensor) -> None:
    g, far = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64), torch.full((3,), torch.inf, dtype=torch.float64)
    step = trust_region_step(g, curvature, 0.2, -far, far)
    assert float(step.norm()) == pytest.approx(0.2, rel=1e-9)
    shift = (g - curvature @ step) / step  # (B + shift I) d = g with one shift >= 0 (Nocedal and Wright, 4.8)
    assert float(shift.min()) == pytest.approx(float(shift.max()), rel=1e-6)
    assert float(shift.min()) > 0


def test_step_in_a_separable_box_is_the_clipped_one() -> None:
    g = torch.tensor([1.0, -4.0, 0.5, -1.0], dtype=torch.float64)
    B = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    low, high = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, -0.5, -1.0, 0.0], [0.2, 1.0, 1.0, 1.0]))
    step = trust_region_step(g, B, 100.0, low, high)
    torch.testing.assert_close(step, torch.tensor([0.2, -0.5, 0.5, 0.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_step_into_a_corner_and_from_a_stationary_point() -> None:
    g, side = torch.tensor([5.0, -5.0], dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    assert trust_region_step(g, EYE, 100.0, -side, side).tolist() == [0.1, -0.1]
    assert trust_region_step(0 * g, EYE, 100.0, -side, side).tolist() == [0.0, 0.0]


def test_step_never_leaves_box_or_ball_and_never_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        root, g = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 5), (5,)))
        low, high = -torch.rand(5, generator=generator).double(), torch.rand(5, generator=generator).double()
        step = trust_region_step(g, root @ root.T, 0.6, low, high)
        assert bool(((step >= low) & (step <= high)).all())
        assert float(step.norm()) <= 0.6 * (1 + 1e-12)
        assert predicted_gain(g, root @ root.T, step) >= 0


def test_bad_trust_regions_are_named() -> None:
    g, one = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="radius"):
        trust_region_step(g, EYE, math.nan, -one, one)
    with pytest.raises(ValueError, match="exclude the present point"):
        trust_region_step(g, EYE, 1.0, one, 2 * one)


def test_bfgs_satisfies_the_secant_equation_and_skips_convexity() -> None:
    B = bfgs_update(torch.zeros(3, 3, dtype=torch.float64), BEST, M @ BEST)
    torch.testing.assert_close(B @ BEST, M @ BEST, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(B)[0]) > 0
    again = bfgs_update(B, BEST.flip(0), M @ BEST.flip(0))
    torch.testing.assert_close(again @ BEST.flip(0), M @ BEST.flip(0), rtol=1e-12, atol=1e-12)
    assert bfgs_update(B, BEST, -BEST) is B


def test_radius_follows_the_ratio_of_gain_to_promise() -> None:
    assert next_radius(1.0, 1.0, 1.0, 1.0, 4.0) == 2.0
    assert next_radius(3.0, 3.0, 1.0, 1.0, 4.0) == 4.0
    assert next_radius(1.0, 0.4, 1.0, 1.0, 4.0) == 1.0
    assert next_radius(1.0, 0.4, 0.1, 1.0, 4.0) == 0.2
    assert next_radius(1.0, 1.0, -math.inf, 1.0, 4.0) == 0.5
    assert next_radius(1.0, 1.0, math.nan, 1.0, 4.0) == 0.5


# --------------------------------------------------------------------------------------------------------- tune_step


def lqr_problem(sigma: float = 0.0) -> dict[str, Any]:
    A = torch.tensor([[1.0, 0.2], [0.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[0.0], [0.3]], dtype=torch.float64)
    Q, R = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), torch.tensor([[0.1]], dtype=torch.float64)
    world = multiplicative_noise_lqr(A, B, sigma, state_cost=Q, action_cost=R)
    model = linear_gaussian(A, B, state_cost=Q, action_cost=R)

    def objective(theta: Params, nu: Params) -> Tensor:
        K = nu["gain"]
        return -torch.trace(lyapunov(theta["A"] - theta["B"] @ K, Q + K.mT @ R @ K, 0.95))

    def optimum(theta: Params, nu: Params) -> Params:
        return {"gain": riccati(theta["A"], theta["B"], Q, R, 0.95)[1]}

    return {
        "A": A,
        "B": B,
        "Q": Q,
        "R": R,
        "world": world,
        "model": model,
        "objective": objective,
        "optimum": optimum,
        "theta": {"A": 1.02 * A, "B": 0.9 * B},
        "nu": {"gain": torch.zeros(1, 2, dtype=torch.float64)},
    }


def real_reward(s: Tensor, a: Tensor, following: Tensor) -> Tensor:
    return -(s @ torch.diag(torch.tensor([1.0, 0.1]).double()) * s).sum(-1) - 0.1 * a.square().sum(-1)


def exploring_log(problem: dict[str, Any], seed: int, batch: int = 60, horizon: int = 20) -> Rollout:
    policy, world = linear_policy(1, std=0.7), problem["world"]
    sigma = world.box.default["sigma"]
    theta = {"A": problem["A"], "B": problem["B"], "sigma": torch.tensor(sigma, dtype=torch.float64)}
    noise = sample_noise(world, policy, batch, horizon, torch.Generator().manual_seed(seed))
    return rollout(world, policy, theta, {"gain": torch.tensor([[1.0, 1.5]], dtype=torch.float64)}, noise)


def test_tune_step_is_the_derivative_of_the_whole_chain() -> None:
    problem = lqr_problem(sigma=0.5)
    log = exploring_log(problem, 0)
    arguments = {"real_reward": real_reward, "real_discount": 0.95, "objective": problem["objective"]}
    step = tune_step(
        problem["model"],
        linear_policy(1),
        problem["theta"],
        problem["nu"],
        log,
        None,
        optimum=problem["optimum"],
        **arguments,
    )

    def value(theta: Params) -> Tensor:  # the estimated real return of the policy that the model finds best
        nu = problem["optimum"](theta, {})
        return logged_policy_gradient(
            linear_policy(1), nu, log, real_reward=real_reward, real_discount=0.95, groups=0
        ).value

    for key in ("A", "B"):
        for index in range(problem["theta"][key].numel()):
            bump = torch.zeros_like(problem["theta"][key]).reshape(-1)
            bump[index] = 1e-5
            ends = [value(problem["theta"] | {key: problem["theta"][key] + s * bump.reshape(2, -1)}) for s in (1, -1)]
            # central differences: truncation about 1e-9, rounding 1e-15 * 10 / 1e-5
            assert float(step.grad[key].reshape(-1)[index]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert step.report.converged
    assert float(step.info["residual"]) < 1e-9
    assert {
        "real_return",
        "real_return_stderr",
        "effective_sample_size",
        "stationarity",
        "error_bound",
    } <= step.info.keys()


def test_default_optimum_on_sampled_noise_equals_a_trainer_of_the_same_objective() -> None:
    problem = lqr_problem(sigma=0.5)
    log, policy = exploring_log(problem, 0), linear_policy(1)
    noise = sample_noise(problem["model"], policy, 8, 30, torch.Generator().manual_seed(1))
    arguments = {"real_reward": real_reward, "real_discount": 0.95}
    nu = {"gain": torch.tensor([[1.0, 1.0]], dtype=torch.float64)}
    default = tune_step(problem["model"], policy, problem["theta"], nu, log, noise, **arguments)
    trained = tune_step(
        problem["model"], policy, problem["theta"], nu, log, noise, optimum=lambda theta, nu0: default.nu, **arguments
    )
    assert default.report.converged
    for key in ("A", "B"):
        assert torch.equal(default.grad[key], trained.grad[key])


def test_a_trainer_that_is_not_finished_is_not_trusted() -> None:
    problem = lqr_problem(sigma=0.5)
    arguments: dict[str, Any] = {"real_reward": real_reward, "real_discount": 0.95, "objective": problem["objective"]}
    arguments["optimum"] = lambda theta, nu0: {"gain": torch.tensor([[1.0, 1.0]], dtype=torch.float64)}
    with pytest.warns(UnconvergedWarning, match="not stationary"):
        step = tune_step(
            problem["model"], linear_policy(1), problem["theta"], {}, exploring_log(problem, 0), None, **arguments
        )
    assert not step.report.converged


def test_a_policy_that_is_unstable_on_the_data_is_not_trusted() -> None:
    problem = lqr_problem(sigma=0.5)
    wrong = {"A": problem["A"], "B": -problem["B"]}  # pushes the wrong way
    step = tune_step(
        problem["model"],
        linear_policy(1),
        wrong,
        {},
        exploring_log(problem, 0),
        None,
        real_reward=real_reward,
        real_discount=0.95,
        objective=problem["objective"],
        optimum=problem["optimum"],
    )
    assert not step.report.converged
    assert "unstable on the real data" in step.report.status


def test_a_user_owned_loop_with_a_network_and_an_optimizer() -> None:
    problem = lqr_problem(sigma=0.8)
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, -1.5]]))
    mdp, policy, nu = problem["model"], module_policy(net), dict(net.named_parameters())
    noise = sample_noise(mdp, policy, 8, 25, torch.Generator().manual_seed(0))
    log = exploring_log(problem, 0, batch=300)
    theta = {key: value.clone().requires_grad_() for key, value in problem["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), lr=3e-2, maximize=True)
    returns = []
    for _ in range(5):
        step = tune_step(mdp, policy, theta, nu, log, noise, real_reward=real_reward, real_discount=0.95)
        nu = step.nu
        assert step.report.converged
        assert nu["weight"].dtype == torch.float32
        assign_grads(theta, step.grad)
        optimizer.step()
        copy_into(theta, project(mdp.box, theta))
        returns.append(float(step.info["real_return"]))
    assert returns[-1] > returns[0]


def test_damping_reaches_the_sensitivity_of_a_redundant_policy() -> None:
    problem = lqr_problem(sigma=0.5)
    policy = deterministic_policy(lambda nu, s: -(s @ (nu["u"] + nu["v"]).mT))  # only the sum matters
    arguments = {"real_reward": real_reward, "real_discount": 0.95, "settings": TuneSettings(max_steps=2)}

    def objective(theta: Params, nu: Params) -> Tensor:
        return problem["objective"](theta, {"gain": nu["u"] + nu["v"]})

    def optimum(theta: Params, nu: Params) -> Params:
        half = 0.5 * problem["optimum"](theta, {})["gain"]
        return {"u": half, "v": half}

    def run(**options: Any) -> TuneResult:
        return tune(
            problem["model"],
            policy,
            problem["theta"],
            {},
            exploring_log(problem, 0),
            None,
            objective=objective,
            optimum=optimum,
            **(arguments | options),
        )

    damped = run(settings=TuneSettings(max_steps=2, damping=1e-6))
    plain = tune_lqr(problem, log=exploring_log(problem, 0), **(arguments | {"settings": TuneSettings(max_steps=2)}))
    assert float(damped.history[1]["residual"]) < 1e-9
    # the damping shortens the sensitivity by 1e-6 over the curvature of about 10
    for key in ("A", "B"):
        torch.testing.assert_close(damped.theta[key], plain.theta[key], rtol=1e-4, atol=1e-5)


def test_returns_that_the_recorded_rewards_do_not_allow_are_doubted() -> None:
    def gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        bounds = {"return_low": torch.tensor(-10.0), "return_high": torch.tensor(0.0)}
        return Estimate(torch.tensor(3.0), {"x": torch.ones(3, dtype=torch.float64)}, bounds)

    with pytest.raises(ValueError, match="return 3 is outside what the recorded rewards allow, -10 to 0"):
        tune_toy(gradient=gradient)


def test_missing_noise_and_data_are_named() -> None:
    problem = lqr_problem()
    arguments = {"real_reward": None, "real_discount": 0.95}
    with pytest.raises(ValueError, match="pass noise"):
        tune_step(problem["model"], linear_policy(1), problem["theta"], problem["nu"], None, None, **arguments)
    with pytest.raises(TypeError, match="got NoneType"):
        tune_step(
            problem["model"],
            linear_policy(1),
            problem["theta"],
            problem["nu"],
            None,
            None,
            objective=problem["objective"],
            optimum=problem["optimum"],
            **arguments,
        )


# -------------------------------------------------------------------------------------------------------- tune, exact


def test_finds_the_optimum_of_a_quadratic() -> None:
    result = tune_toy()
    # the value is flat to rounding within 1e-8 of the optimum; the gradient test asks for 5e-8
    torch.testing.assert_close(ravel(result.theta), BEST, rtol=0, atol=1e-6)
    assert result.report.converged
    assert not result.waiting
    accepted = [row["real_return"] for row in result.history if row["accepted"]]
    assert accepted == sorted(accepted)
    assert result.history[0]["theta.a"] == 0.1
    assert all(row["step_norm"] <= row["radius"] * (1 + 1e-9) for row in result.history[1:])


def test_stays_in_the_box_and_finds_the_best_corner_of_it() -> None:
    box = Box(low={"a": 0.0, "b": -0.2}, high={"a": 1.0, "b": 0.9})
    result = tune_toy(box=box, settings=TuneSettings(max_steps=60))
    # active: b = (-0.2 or more, 0.9); solve the rest by the closed form of the quadratic with b1, b2 fixed
    b = result.theta["b"]
    assert b[1] == 0.9
    fixed = torch.tensor([b[0], b[1]])
    a = BEST[0] - (M[0, 1:] @ (fixed - BEST[1:])) / M[0, 0]
    assert float(result.theta["a"]) == pytest.approx(float(a), abs=1e-6)
    free = BEST[1] - (M[1, 0] * (a - BEST[0]) + M[1, 2] * (0.9 - BEST[2])) / M[1, 1]
    assert float(b[0]) == pytest.approx(max(float(free), -0.2), abs=1e-6)
    assert result.report.converged


def test_only_free_parameters_move() -> None:
    result = tune_toy(free=("b",))
    assert result.theta["a"] == START["a"]
    wanted = BEST[1:] - torch.linalg.solve(M[1:, 1:], M[1:, 0]) * (START["a"] - BEST[0])
    torch.testing.assert_close(result.theta["b"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("as_callable", [False, True])
def test_likelihood_weight_is_the_closed_form_compromise(as_callable: bool) -> None:
    mean = {"a": torch.tensor(-0.3, dtype=torch.float64), "b": torch.tensor([0.1, 0.2], dtype=torch.float64)}
    precision = torch.diag(torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64))

    def quadratic(theta: Params) -> tuple[Tensor, Params, Tensor]:
        gap = ravel(theta) - ravel(mean)
        slope = -precision @ gap
        return -0.5 * gap @ precision @ gap, {"a": slope[0], "b": slope[1:]}, precision

    likelihood = quadratic if as_callable else (mean, precision)
    result = tune_toy(likelihood=likelihood, settings=TuneSettings(max_steps=40, likelihood_weight=0.8))
    wanted = torch.linalg.solve(2 * M + 0.8 * precision, 2 * M @ BEST + 0.8 * precision @ ravel(mean))
    torch.testing.assert_close(ravel(result.theta), wanted, rtol=0, atol=1e-6)


def test_scale_sets_the_length_of_the_first_step() -> None:
    scale = {"a": torch.tensor(0.02, dtype=torch.float64), "b": torch.tensor(0.02, dtype=torch.float64)}
    moves = []
    tune_toy(
        scale=scale,
        settings=TuneSettings(max_steps=1, radius=1.0),
        on_step=lambda state: moves.append(torch.cat([state["theta.a"].reshape(1), state["theta.b"]])),
    )
    assert float((moves[1] - moves[0]).norm()) == pytest.approx(0.02, rel=1e-9)


def no_policy(theta: Params, nu: Params) -> Params:
    if float(theta["a"]) > 0.4:
        raise ValueError("no policy stabilises this model")
    return {"x": ravel(theta)}


def unfinished(theta: Params, nu: Params) -> Params:
    return {"x": ravel(theta) + (0.3 if float(theta["a"]) > 0.4 else 0.0)}


@pytest.mark.parametrize(
    ("optimum", "words"), [(no_policy, "refused a candidate: no policy stabilises"), (unfinished, "not stationary")]
)
def test_refuses_candidates_that_cannot_be_trusted_and_says_so(optimum: Any, words: str) -> None:
    result = tune_toy(optimum=optimum)
    assert float(result.theta["a"]) <= 0.4
    assert words in "\n".join(result.notes)
    refused = [row for row in result.history if not row["converged"]]
    assert refused
    assert not any(row["accepted"] for row in refused)
    # nothing was estimated where there is no policy
    assert all(("real_return" in row) == (optimum is unfinished) for row in refused)


def test_a_return_that_is_not_finite_is_refused() -> None:
    def gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        exact = toy_gradient(policy, nu, log)
        return replace(exact, value=torch.tensor(-math.inf)) if float(nu["x"][0]) > 0.4 else exact

    result = tune_toy(gradient=gradient)
    assert float(result.theta["a"]) <= 0.4
    assert any("refused" in note for note in result.notes)


def test_a_start_that_cannot_be_evaluated_raises() -> None:
    with pytest.raises(ValueError, match="the start cannot be evaluated"):
        tune_toy(optimum=lambda theta, nu: {"x": ravel(theta) + 1.0})


def test_worse_steps_are_undone() -> None:
    def misleading(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        exact = toy_gradient(policy, nu, log)
        return Estimate(exact.value, {"x": -exact.grad["x"]})  # points downhill

    result = tune_toy(gradient=misleading)
    torch.testing.assert_close(ravel(result.theta), ravel(START), rtol=0, atol=0)
    assert not result.report.converged
    assert "no gain within a radius" in result.report.status
    assert "step undone" in result.notes[0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"error_tol": 1.0}, r"error_tol = 1.0 \(must be in \(0, 1\)\)"), ({"use_freedom": 2}, "use_freedom = 2")],
)
def test_settings_that_mean_nothing_are_named(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TuneSettings(**setting)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"free": ("c",)}, "free names .'c'."),
        ({"box": Box(low={"a": 0.5})}, "outside its box"),
        ({"free": ("a", "a")}, "free names .'a', 'a'., theta has .*, each to be named once"),
        ({"scale": {"a": torch.tensor(0.0)}}, "scale must be positive"),
        ({"scale": {"c": torch.tensor(1.0)}}, "scale names .'c'."),
        ({"scale": {"b": torch.ones(3)}}, r"scale\['b'\] is \[3\], theta\['b'\] \[2\]"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tune_toy(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1},
        {"radius": 0.0},
        {"radius": 5.0},
        {"confidence": 1.0},
        {"gradient_tol": math.nan},
        {"damping": -1.0},
        {"likelihood_weight": math.nan},
        {"min_radius": -1.0},
    ],
)
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"settings of tune hold {name} = {options[name]} "):
        TuneSettings(**options)


# ----------------------------------------------------------------------------------------------------- tune, sampled


def collector(problem: dict[str, Any], ran: list[Params] | None = None) -> Callable[..., Rollout]:
    def collect(policy: Any, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        if ran is not None:
            ran.append(nu)
        world, behaviour = problem["world"], linear_policy(1, std=0.7)
        sigma = torch.tensor(world.box.default["sigma"], dtype=torch.float64)
        noise = sample_noise(world, behaviour, 50, 15, generator)
        return rollout(world, behaviour, {"A": problem["A"], "B": problem["B"], "sigma": sigma}, nu, noise)

    return collect


def tune_lqr(problem: dict[str, Any], **options: Any) -> TuneResult:
    arguments: dict[str, Any] = {
        "real_reward": None,
        "real_discount": 0.95,
        "settings": TuneSettings(max_steps=4),
        "objective": problem["objective"],
        "optimum": problem["optimum"],
    }
    log = options.pop("log", None)
    return tune(problem["model"], linear_policy(1), problem["theta"], problem["nu"], log, None, **(arguments | options))


def same(a: TuneResult, b: TuneResult) -> bool:
    tensors = all(torch.equal(a.state[key], b.state[key]) for key in a.state) and a.state.keys() == b.state.keys()
    return tensors and a.history == b.history and a.notes == b.notes and a.report == b.report


def test_resuming_from_any_iteration_is_bitwise_the_same() -> None:
    problem = lqr_problem(sigma=0.8)
    states: list[Params] = []
    generator = torch.Generator().manual_seed(7)
    whole = tune_lqr(problem, collect=collector(problem), generator=generator, on_step=states.append)
    assert len(states) == 5
    for state in states:
        resumed = tune_lqr(problem, collect=collector(problem), generator=torch.Generator(), state=state)
        assert same(whole, resumed)


def test_resuming_exact_runs_without_data() -> None:
    states: list[Params] = []
    whole = tune_toy(on_step=states.append)
    assert same(whole, tune_toy(state=states[3]))


def test_a_state_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"lacks \['curvature'"):
        tune_toy(state={"theta.a": torch.zeros(())})
    states: list[Params] = []
    tune_toy(on_step=states.append, settings=TuneSettings(max_steps=1))
    with pytest.raises(KeyError, match="the theta of the state"):
        tune_toy(state=states[0], start={"a": START["a"], "c": START["b"]})


def test_waiting_for_rollouts_and_going_on_equals_collecting_at_once() -> None:
    problem = lqr_problem(sigma=0.8)
    at_once = tune_lqr(problem, collect=collector(problem), generator=torch.Generator().manual_seed(7))
    state: Params = {}
    stops = []
    for ready in range(6):

        def gated(
            policy: Any, nu: Params, iteration: int, generator: torch.Generator, n: int = ready
        ) -> Rollout | None:
            return collector(problem)(policy, nu, iteration, generator) if iteration < n else None

        result = tune_lqr(problem, collect=gated, generator=torch.Generator().manual_seed(7), state=state)
        state = result.state
        stops.append(result)
    assert [stop.waiting for stop in stops] == [True] * 5 + [False]
    assert same(at_once, stops[-1])
    assert stops[0].report.status == "waiting for rollouts of the first policy"
    torch.testing.assert_close(stops[0].nu["gain"], problem["optimum"](problem["theta"], {})["gain"])
    assert "waiting for rollouts of iteration 3" in stops[3].report.status


def test_every_policy_that_ran_is_one_of_the_history_and_data_accumulate() -> None:
    problem, ran = lqr_problem(sigma=0.8), []
    result = tune_lqr(problem, collect=collector(problem, ran), generator=torch.Generator().manual_seed(1))
    assert len(ran) == len(result.history) == 5
    assert [row["transitions"] for row in result.history] == [750.0 * (k + 1) for k in range(5)]
    assert any(torch.equal(result.nu["gain"], nu["gain"]) for nu in ran)
    assert all("measured_return" in row for row in result.history)


def test_a_significant_fall_of_the_recorded_returns_undoes_a_step() -> None:
    problem = lqr_problem(sigma=0.3)
    honest = collector(problem)

    def sabotaged(policy: Any, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        recorded = honest(policy, nu, iteration, generator)
        # something the critic's features know nothing of: a cost of the day
        return replace(recorded, rewards=recorded.rewards - (30.0 if iteration == 1 else 0.0))

    result = tune_lqr(
        problem,
        collect=sabotaged,
        generator=torch.Generator().manual_seed(1),
        settings=TuneSettings(max_steps=1),
    )
    assert result.history[1]["accepted"] == 0
    assert "the recorded returns fell by more than their confidence" in result.notes[-1]
    assert all(torch.equal(result.theta[key], problem["theta"][key]) for key in problem["theta"])


def test_without_promise_in_the_data_the_best_policy_runs_again() -> None:
    problem, ran = lqr_problem(sigma=0.0), []
    right = {"A": problem["A"], "B": problem["B"]}
    problem["theta"] = right  # the model is the world: nothing to gain
    result = tune_lqr(
        problem,
        collect=collector(problem, ran),
        generator=torch.Generator().manual_seed(1),
        settings=TuneSettings(max_steps=3, gradient_tol=0.0),
        gradient=no_gain,
    )
    assert any("the best one ran again" in note for note in result.notes)
    assert all(torch.equal(nu["gain"], ran[0]["gain"]) for nu in ran)


def no_gain(policy: Any, nu: Params, log: Any, **options: Any) -> Estimate:
    """A return that falls in every direction the gradient points to."""
    estimate = logged_policy_gradient(policy, nu, log, **options)
    return replace(estimate, grad={key: torch.ones_like(value) for key, value in nu.items()}, value=-nu["gain"].sum())


def test_against_a_gymnasium_environment() -> None:
    problem = lqr_problem(sigma=0.5)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    wide = spaces.Box(-100.0, 100.0, (1,), dtype=np.float64)
    env = to_gym(
        problem["world"], {"A": problem["A"], "B": problem["B"], "sigma": sigma}, action_space=wide, horizon=15
    )

    def collect(policy: Any, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        explore = lambda s: policy.act(nu, s, s[:, :0]) + 0.7 * torch.randn(1, 1, generator=generator).double()
        return record_rollout(env, explore, episodes=30, seed=iteration)

    result = tune_lqr(problem, collect=collect, settings=TuneSettings(max_steps=2))
    assert [row["transitions"] for row in result.history] == [450.0, 900.0, 1350.0]


def test_against_a_fixed_log() -> None:
    problem = lqr_problem(sigma=0.8)
    log = exploring_log(problem, 0, batch=400)
    result = tune(
        problem["model"],
        linear_policy(1),
        problem["theta"],
        problem["nu"],
        log,
        None,
        real_reward=real_reward,
        real_discount=0.95,
        settings=TuneSettings(max_steps=25),
        objective=problem["objective"],
        optimum=problem["optimum"],
    )
    C = 0.8 * problem["B"]
    best = riccati(problem["A"], problem["B"], problem["Q"], problem["R"], 0.95, C)[1]

    def cost(K: Tensor) -> float:
        return float(
            torch.trace(lyapunov(problem["A"] - problem["B"] @ K, problem["Q"] + K.mT @ problem["R"] @ K, 0.95, C @ K))
        )

    start = cost(problem["optimum"](problem["theta"], {})["gain"])
    # 8 000 transitions: the share closed is 97-100 % over seeds; 80 % would be a broken chain
    assert (start - cost(result.nu["gain"])) / (start - cost(best)) > 0.8


def test_states_are_plain_tensors_and_json() -> None:
    states: list[Params] = []
    tune_toy(on_step=states.append, settings=TuneSettings(max_steps=2))
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in states[-1].values())
    record = json.loads(bytes(states[-1]["record"].numpy()).decode())
    assert record["iteration"] == 2
    assert "generator" in states[-1]


def test_strict_sensitivities_raise_in_a_step() -> None:
    with pytest.raises(UnconvergedError):
        tune_step(
            toy_mdp(),
            linear_policy(2),
            START,
            {},
            None,
            None,
            real_reward=None,
            real_discount=0.9,
            objective=toy_objective,
            optimum=lambda theta, nu: {"x": ravel(theta) + 1.0},
            gradient=toy_gradient,
            sensitivity=partial(policy_sensitivity, strict=True),
        )


# ------------------------------------------------------------------------------------------------------ certificates


def fake_certificate(holds: Callable[[Params], bool], asked: list[dict[str, Any]] | None = None) -> Callable[..., Any]:
    """A certificate that holds where the predicate of theta says so."""

    def certificate(J: Any, theta: Params, nu: Params, sensitivity: Any, cotangent: Params, **options: Any) -> Any:
        if asked is not None:
            asked.append({"theta": theta, **options})
        good = holds(theta)
        return Certificate(good, 0.1 if good else math.inf, 0.05, 0.2, () if good else ("the Hessian is a guess",))

    return certificate


def test_a_candidate_without_certificate_is_refused_and_the_radius_shrinks() -> None:
    result = tune_toy(certificate=fake_certificate(lambda theta: float(theta["a"]) <= 0.4))
    assert 0.3 < float(result.theta["a"]) <= 0.4
    assert any("refused a candidate: not certified: the Hessian is a guess" in note for note in result.notes)
    refused = [row for row in result.history if row.get("certified") == 0]
    assert refused
    assert not any(row["accepted"] for row in refused)
    assert all(math.isinf(row["error_bound"]) and row["audit_error"] == 0.2 for row in refused)
    kept = [row for row in result.history if row["accepted"]]
    assert all(row["certified"] == 1 and row["error_bound"] == 0.1 for row in kept)
    for before, after in zip(result.history, result.history[1:], strict=False):
        if before.get("certified") == 0:
            assert after["radius"] <= 0.5 * min(before["step_norm"], before["radius"]) * (1 + 1e-12)


def test_a_start_without_certificate_ends_the_run_and_says_why() -> None:
    result = tune_toy(certificate=fake_certificate(lambda theta: False))
    assert len(result.history) == 1
    assert all(torch.equal(result.theta[key], START[key]) for key in START)
    assert result.report.status == "refused: the gradient is not certified: the Hessian is a guess"
    assert not result.report.converged
    assert "certify = False goes on without" in result.notes[0]
    unasked = tune_toy(
        certificate=fake_certificate(lambda theta: False), settings=TuneSettings(max_steps=40, certify=False)
    )
    assert unasked.report.converged
    assert "certified" not in unasked.history[0]


def test_only_candidates_that_would_be_kept_are_certified_and_only_their_free_parameters() -> None:
    asked: list[dict[str, Any]] = []
    result = tune_toy(
        free=("b",),
        certificate=fake_certificate(lambda theta: True, asked),
        settings=TuneSettings(audit=2, max_steps=9),
    )
    assert len(asked) == sum(row["accepted"] for row in result.history)
    for call in asked:
        assert float(call["scale"]["a"]) == 0.0
        assert bool((call["scale"]["b"] > 0).all())
        assert (call["tol"], call["directions"], call["derivative_order"]) == (0.05, 2, 2)


def test_certified_runs_on_real_data_resume_bitwise() -> None:
    problem = lqr_problem(sigma=0.8)
    states: list[Params] = []
    seen = fake_certificate(lambda theta: abs(float(theta["A"][0, 1]) - 0.204) < 0.01)
    options = {"collect": collector(problem), "certificate": seen}
    whole = tune_lqr(problem, generator=torch.Generator().manual_seed(7), on_step=states.append, **options)
    assert any("refused a candidate: not certified" in note for note in whole.notes)
    assert all(row["certified"] == 1 for row in whole.history if row["accepted"])
    for state in states[1:3]:
        assert same(whole, tune_lqr(problem, generator=torch.Generator(), state=state, **options))


def test_the_librarys_certificate_tells_a_wrong_sensitivity() -> None:
    problem = lqr_problem()
    half = lambda J, theta, nu, **options: _scaled(policy_sensitivity(J, theta, nu, **options), 0.8)
    log = exploring_log(problem, 0)
    wrong = tune_lqr(problem, log=log, sensitivity=half)
    assert wrong.report.status.startswith("refused: the gradient is not certified")
    right = tune_lqr(problem, log=log, settings=TuneSettings(max_steps=2, audit=1))
    kept = [row for row in right.history if row["accepted"]]
    assert all(row["certified"] == 1 for row in kept)
    assert all(row["error_bound"] < 1e-6 and row["audit_error"] < 1e-3 for row in kept)
    loose = tune_lqr(problem, log=log, sensitivity=half, settings=TuneSettings(max_steps=1, error_tol=0.5))
    assert loose.history[0]["certified"] == 1


def _scaled(chain: Sensitivity, factor: float) -> Sensitivity:
    times = lambda params: {key: factor * value for key, value in params.items()}
    return replace(chain, vjp=lambda g: times(chain.vjp(g)), jvp=lambda v: times(chain.jvp(v)))


def test_a_step_carries_its_certificate() -> None:
    arguments: dict[str, Any] = {"objective": toy_objective, "gradient": toy_gradient, "real_reward": None}
    start = (toy_mdp(), linear_policy(2), START, {"x": torch.zeros(3, dtype=torch.float64)}, None, None)
    step = tune_step(*start, real_discount=0.9, certificate=certify, **arguments)
    assert float(step.info["certified"]) == 1.0
    assert float(step.info["error_bound"]) < 1e-6
    assert step.report.converged
    bad = tune_step(*start, real_discount=0.9, certificate=fake_certificate(lambda theta: False), **arguments)
    assert not bad.report.converged
    assert bad.report.status == "not certified: the Hessian is a guess"


def test_what_cannot_be_certified_is_not_called_certified() -> None:
    black_box = replace(toy_mdp(), derivative_order=0)
    own = lambda J, theta, nu, cotangent, derivative_order: Sensitivity(
        lambda g: {"a": g["x"][0], "b": g["x"][1:]}, lambda v: {"x": ravel(v)}, SolveReport(True, 0.0, 0, "exact")
    )
    options: dict[str, Any] = {"objective": toy_objective, "gradient": toy_gradient, "real_reward": None}
    arguments = (black_box, linear_policy(2), START, {"x": torch.zeros(3, dtype=torch.float64)}, None, None)
    result = tune(
        *arguments, real_discount=0.9, box=Box(), sensitivity=own, settings=TuneSettings(max_steps=40), **options
    )
    assert result.report.converged
    assert "certified" not in result.history[0]
    assert "no gradient was certified: the simulator has no derivatives" in "\n".join(result.notes)
    # its optimum solved anew can tell, though
    audited = tune(
        *arguments,
        real_discount=0.9,
        box=Box(),
        sensitivity=own,
        optimum=lambda theta, nu: {"x": ravel(theta)},
        settings=TuneSettings(audit=3),
        **options,
    )
    assert audited.history[0]["certified"] == 1


# ------------------------------------------------------------------------------------------- other ways and failures


def test_a_hypergradient_replaces_gradient_and_sensitivity() -> None:
    def direct(mdp: Any, policy: Any, theta: Params, nu: Params, log: Any, noise: Any, **_: Any) -> Estimate:
        gap = ravel(theta) - BEST
        slope = -2 * M @ gap
        return Estimate(-(gap @ M @ gap) - 5.0, {"a": slope[0], "b": slope[1:]}, {"value_stderr": torch.tensor(0.5)})

    forbidden = lambda *_, **__: pytest.fail("not needed")
    options: dict[str, Any] = {"gradient": forbidden, "sensitivity": forbidden, "hypergradient": direct}
    result = tune_toy(optimum=lambda theta, nu: {"x": ravel(theta)}, **options)
    torch.testing.assert_close(ravel(result.theta), BEST, rtol=0, atol=1e-6)
    assert result.report.converged
    assert "certified" not in result.history[0]
    assert result.history[0]["real_return_stderr"] == 0.5
    assert any("no gradient was certified: a hypergradient" in note for note in result.notes)
    likelihood = ({"a": torch.tensor(0.0).double(), "b": torch.zeros(2).double()}, torch.eye(3).double())
    told = tune_toy(optimum=lambda theta, nu: {"x": ravel(theta)}, likelihood=likelihood, **options)
    assert told.freedom is None
    assert any("the freedom of equal policies was not used" in note for note in told.notes)


def test_the_automatic_sensitivity_is_bound_to_the_problem() -> None:
    problem = lqr_problem(sigma=0.5)
    log, policy = exploring_log(problem, 0), linear_policy(1)
    noise = sample_noise(problem["model"], policy, 8, 30, torch.Generator().manual_seed(1))
    nu = {"gain": torch.tensor([[1.0, 1.0]], dtype=torch.float64)}
    start = (problem["model"], policy, problem["theta"], nu, log, noise)
    task: dict[str, Any] = {"real_reward": real_reward, "real_discount": 0.95}
    step, plain = tune_step(*start, sensitivity="auto", **task), tune_step(*start, **task)
    assert step.report.status.startswith("chose Hessian")
    for key in step.grad:
        torch.testing.assert_close(step.grad[key], plain.grad[key], rtol=1e-6, atol=1e-8)
    result = tune(*start, sensitivity="auto", settings=TuneSettings(max_steps=1), **task)
    assert result.history[0]["certified"] == 1
    with pytest.raises(ValueError, match="sensitivity must be a function or 'auto', got 'best'"):
        tune_step(*start, sensitivity="best", **task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rolls out the simulator: pass noise"):
        tune_step(*start[:-1], None, sensitivity="auto", objective=problem["objective"], **task)


def test_unconverged_parts_are_noted_and_other_warnings_pass() -> None:
    def gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        warnings.warn("2 of 8 quadratic programs did not converge", UnconvergedWarning)
        warnings.warn("something else", RuntimeWarning)
        return toy_gradient(policy, nu, log)

    with pytest.warns(RuntimeWarning, match="something else"):
        result = tune_toy(gradient=gradient, settings=TuneSettings(max_steps=2))
    noted = [note for note in result.notes if "2 of 8 quadratic programs did not converge" in note]
    assert noted[0].startswith("iteration 0: ")


def test_a_best_policy_that_new_data_cannot_price_does_not_end_the_run() -> None:
    problem = lqr_problem(sigma=0.8)
    calls: list[int] = []

    def fragile(policy: Any, nu: Params, log: Any, **options: Any) -> Estimate:
        calls.append(len(log.rewards))
        if len(log.rewards) == 1500 and 1500 not in calls[:-1]:  # the first look at the data of iteration 1
            raise ValueError("the data do not identify the critic")
        return logged_policy_gradient(policy, nu, log, **options)

    result = tune_lqr(problem, collect=collector(problem), gradient=fragile, generator=torch.Generator().manual_seed(7))
    assert "iteration 1: the best policy cannot be evaluated on the new data: the data do not identify" in "\n".join(
        result.notes
    )
    assert len(result.history) == 5
    assert result.history[1]["accepted"] == 1


def test_the_first_step_of_a_flat_start_is_not_as_long_as_the_radius() -> None:
    """The real return falls off so steeply that a step of the whole radius overshoots twofold and still gains."""
    curved = torch.eye(3, dtype=torch.float64) * 20
    goal = ravel(START) + 0.13

    def gradient(policy: Any, nu: Params, log: Any, **_: Any) -> Estimate:
        gap = nu["x"] - goal
        return Estimate(-(gap @ curved @ gap), {"x": -2 * curved @ gap})

    ran: list[Params] = []

    def collect(policy: Any, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        ran.append(nu)
        return exploring_log(lqr_problem(), iteration, batch=2, horizon=3)

    unit = {key: torch.tensor(1.0, dtype=torch.float64) for key in START}
    tune_toy(gradient=gradient, collect=collect, scale=unit, settings=TuneSettings(max_steps=1, radius=0.44))
    torch.testing.assert_close(ran[1]["x"], goal, rtol=0, atol=1e-9)  # the curvature taught makes it Newton's step
