"""Simulator tuning as a configurable MDP: its gradient against differences of the real return, and the loop on it.

Every outcome of the world stands in the data in exact proportion, so the sampled estimator must be exact; the expected
values come from numpy alone: value iteration, or the oracle of benchmark A.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from problems import seeded
from torch import Tensor, nn

from benchmarks import closed_loop, tuning_routes
from benchmarks.hessian_free import black_box, index
from benchmarks.oracles.multiplicative_lqr import WORLDS, World, case_of, cost_and_gradient, optimal_gain
from benchmarks.tuning_routes import (
    Model,
    Runs,
    b_tuning,
    distance,
    exact_hypergradient,
    follower,
    hessian_free,
    rounds_to,
    runs_a,
    sampled_figures,
    soft_model,
    tune_exactly,
    world_moments,
)
from sim2real.estimators import Transitions, hessian_free_gradient
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.policy import boltzmann_policy
from sim2real.solvers import linear_noise_policy, optimal_values, policy_values
from sim2real.tuning import tune_step

Array = NDArray[np.float64]
S, A, TEMPERATURE, SIM, REAL = 5, 3, 0.4, 0.9, 0.95
"""states, actions, temperature of the follower, discounts of model and world"""


def differences(function: Callable[[Params], float], at: Params, step: float) -> Tensor:
    """Central differences, extrapolated twice: the error is of sixth order in the step, rounding 1e-16 / step."""
    vector, slopes = ravel(at), []
    for direction in torch.eye(len(vector), dtype=torch.float64):
        ends = [[function(unravel(vector + s * h * direction, at)) for s in (1, -1)] for h in step / 2 ** np.arange(3)]
        d = [(up - down) / (2 * step / 2**i) for i, (up, down) in enumerate(ends)]
        d = [(4 * fine - coarse) / 3 for coarse, fine in pairwise(d)]
        slopes.append((16 * d[1] - d[0]) / 15)
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_tuning_a_finite_model_is_that_of_the_real_return(seed: int) -> None:
    generator = seeded(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    base, slope, bonus, theta = draw(S, A, S), 0.5 * draw(4, S, A, S), draw(4, S, A), {"x": 0.5 * draw(4)}
    counts = torch.multinomial(torch.softmax(draw(S * A, S), -1), 8, replacement=True, generator=seeded(seed))
    cells = torch.cat([torch.arange(S * A).repeat_interleave(8).unsqueeze(-1), counts.reshape(-1, 1)], -1)
    world, reward = nn.functional.one_hot(counts, S).double().mean(1), draw(S, A)  # [S A, S], multiples of 1/8

    def tables(th: Params) -> tuple[Tensor, Tensor]:
        return torch.softmax(base + torch.tensordot(th["x"], slope, 1), -1), torch.tensordot(th["x"], bonus, 1)

    def soft_q(th: Params) -> Array:
        P, r = (x.numpy() for x in tables(th))
        q = np.zeros((S, A))
        for _ in range(350):  # 0.9^350 is rounding
            q = r + SIM * P @ (TEMPERATURE * np.log(np.exp(q / TEMPERATURE).sum(-1)))
        return q

    def real_return(th: Params) -> float:
        q = soft_q(th)
        pi = np.exp(q / TEMPERATURE) / np.exp(q / TEMPERATURE).sum(-1, keepdims=True)
        transfer = np.einsum("sa,sax->sx", pi, world.reshape(S, A, S).numpy())
        return float(np.linalg.solve(np.eye(S) - REAL * transfer, (pi * reward.numpy()).sum(-1)).mean())

    def follow(th: Params, nu: Params) -> Params:
        P, r = tables(th)
        return {"q": optimal_values(r, P, SIM, temperature=TEMPERATURE).q}

    def value(th: Params, states: Tensor, actions: Tensor) -> Tensor:
        P, r = tables(th)
        log_pi = torch.log_softmax(follow({"x": th["x"].detach()}, {})["q"] / TEMPERATURE, -1)
        V = policy_values(log_pi.exp(), r - TEMPERATURE * log_pi, P, SIM)
        return (r + SIM * P @ V)[index(states), index(actions)]

    column, none = lambda i: i.double().unsqueeze(-1), torch.zeros(len(cells), dtype=torch.int64)
    s, a = cells[:, 0] // A, cells[:, 0] % A
    log = Transitions(
        column(s), column(a), reward[s, a], column(cells[:, 1]), none.bool(), none, torch.arange(len(s)), column(s)
    )

    def gradient(*problem: Any, **task: Any) -> Estimate:
        return hessian_free_gradient(
            *problem,
            temperature=TEMPERATURE,
            action_value=value,
            actions=torch.arange(A, dtype=torch.float64).unsqueeze(-1),
            features=lambda s, a: nn.functional.one_hot(A * index(s) + index(a), S * A).double(),
            groups=0,
            **task,
        )

    step = tune_step(
        black_box(tables, SIM, S),
        boltzmann_policy(lambda nu, state: nu["q"][index(state)], TEMPERATURE),
        theta,
        {"q": torch.zeros(S, A, dtype=torch.float64)},
        log,
        None,
        real_reward=None,
        real_discount=REAL,
        optimum=follow,
        hypergradient=gradient,
    )
    assert float(step.info["real_return"]) == pytest.approx(real_return(theta), rel=1e-11)
    # the bar; the differences are good to about 1e-11, the estimate to the rounding of two linear systems
    expected = differences(real_return, theta, 0.02)
    assert float((step.grad["x"] - expected).norm() / expected.norm()) < 1e-9


def soft_cost(world: World, model: Model, theta: Params) -> float:
    """Real cost of the follower, by the oracle: its mean, plus what its own noise costs in the matrix S."""
    nu = follower(model, theta)
    gain, spread = nu["gain"].numpy(), (nu["factor"] @ nu["factor"].mT).numpy()
    g, scale = world.discount, 1 + world.noise * world.discount / (1 - world.discount)
    closed, kicks = world.A - world.B @ gain, world.sigma * world.B
    P = np.zeros_like(world.A)
    for _ in range(4000):
        kicked = gain.T @ np.diag(np.diag(kicks.T @ P @ kicks)) @ gain
        before, P = P, world.Q + gain.T @ world.R @ gain + g * (closed.T @ P @ closed + kicked)
        if np.abs(before - P).max() <= 1e-15 * np.abs(P).max():
            break
    assert scale * np.trace(P) == pytest.approx(cost_and_gradient(world, gain)[0], rel=1e-12)
    price = world.R + g * (world.B.T @ P @ world.B + np.diag(np.diag(kicks.T @ P @ kicks)))
    return float(scale * np.trace(P) + np.trace(price @ spread) / (1 - g))


@pytest.mark.parametrize("world", [WORLDS[0], WORLDS[3], WORLDS[5]], ids=lambda world: world.name)
def test_the_exact_gradient_on_benchmark_a_is_that_of_the_oracle(world: World) -> None:
    _, theta = closed_loop.model_of(world)
    theta = theta | {"B": 1.1 * theta["B"]}  # a follower that is not the identified one
    model = soft_model(world, lambda th: th, 0.1)
    estimate = exact_hypergradient(world, model, theta, follower(model, theta))
    assert float(estimate.value) == pytest.approx(-soft_cost(world, model, theta), rel=1e-11)
    direction = unravel(torch.randn(len(ravel(theta)), generator=seeded(0), dtype=torch.float64), theta)
    along = lambda t: -soft_cost(world, model, {k: v + float(t["t"]) * direction[k] for k, v in theta.items()})
    (slope,) = differences(along, {"t": torch.zeros((), dtype=torch.float64)}, 4e-4)
    found = float(ravel(estimate.grad) @ ravel(direction))
    # the bar: sixth-order truncation and 1e-13 of the cost over the step are below it
    assert found == pytest.approx(float(slope), abs=1e-9 * float(ravel(estimate.grad).norm()))


def outcomes(world: World) -> Transitions:
    """A grid of states and actions, with every outcome of noises that have the moments of the world's."""
    line = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64)
    s, a, kick = torch.cartesian_prod(line, line, line, torch.tensor([-1.0, 1.0], dtype=torch.float64)).split(
        (2, 1, 1), 1
    )
    corners = torch.cat([torch.eye(2), -torch.eye(2)]).double() * 2**0.5
    s, a, kick = (x.repeat_interleave(4, 0) for x in (s, a, kick))
    w = world.noise**0.5 * corners.repeat(len(s) // 4, 1)
    Aw, Bw, Q, R = (torch.tensor(x) for x in (world.A, world.B, world.Q, world.R))
    following = s @ Aw.mT + (a * (1 + world.sigma * kick)) @ Bw.mT + w
    none = torch.zeros(len(s), dtype=torch.int64)
    reward = -(s @ Q * s).sum(-1) - (a @ R * a).sum(-1)
    return Transitions(s, a, reward, following, none.bool(), none, torch.arange(len(s)), s)


def test_the_sampled_estimator_on_enumerated_outcomes_is_the_exact_gradient() -> None:
    world = case_of("double-integrator", 0.8)
    mdp, theta = closed_loop.model_of(world)
    model = soft_model(world, lambda th: th, 0.1)
    policy, nu = linear_noise_policy(1), follower(model, theta)
    first = torch.cat([torch.eye(2), -torch.eye(2)]).double() * 2**0.5  # of the moments of N(0, I)
    route = hessian_free(model, policy).options["hypergradient"]
    estimate = route(
        mdp, policy, theta, nu, outcomes(world), None, real_discount=world.discount, initial_states=first, groups=0
    )
    exact = exact_hypergradient(world, model, theta, nu)
    assert float(estimate.value) == pytest.approx(float(exact.value), rel=1e-9)
    for key, value in exact.grad.items():
        torch.testing.assert_close(estimate.grad[key], value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))


def test_the_real_return_without_noise_of_the_policy_is_the_oracle_s() -> None:
    world = case_of("four-states", 0.8)
    gain = torch.tensor(optimal_gain(world))
    value, *_ = world_moments(world, {"gain": gain, "factor": torch.zeros(2, 2, dtype=torch.float64)})
    assert float(value) == pytest.approx(-cost_and_gradient(world, gain.numpy())[0], rel=1e-12)


def test_tuning_as_a_configurable_mdp_reaches_the_optimum() -> None:
    world = case_of("scalar", 1.0)
    assert 0 <= distance(world, tune_exactly(world, 12).nu["gain"]) < 1e-6  # the implicit route's bar


@pytest.mark.slow
def test_sampled_routes_end_together() -> None:
    world = case_of("double-integrator", 0.8)
    runs = runs_a(world, seeds=1, rounds=3)
    ours, implicit = (runs.gains[name][0] / runs.whole for name in ("hessian-free", "implicit"))
    assert runs.transitions == {"hessian-free": [8000], "implicit": [8000]}
    assert ours > 0.5
    # same data, both exact in the simulator: only the small noise of the soft policy tells them apart
    assert ours == pytest.approx(implicit, abs=0.02)


def test_differences_are_paired_and_come_with_their_interval() -> None:
    runs = Runs({"hessian-free": [1.0, 3.0], "implicit": [0.0, 4.0]}, {"hessian-free": [5, 6], "implicit": [7, 8]}, 2.0)
    figures = {figure.metric: figure.value for figure in sampled_figures("case", runs)}
    # differences 0.5 and -0.5: standard error 0.5, Student's t with one degree of freedom 12.706
    assert figures["case-difference"] == 0.0
    assert figures["case-difference-low"] == pytest.approx(-6.353, abs=1e-3)
    assert figures["case-difference-high"] == pytest.approx(6.353, abs=1e-3)
    assert figures["case-worst-implicit"] == 0.0
    assert figures["case-transitions-hessian-free"] == 6


def test_rounds_to_counts_the_rounds_before_the_gap_is_closed() -> None:
    assert rounds_to([10.0, 5.0, 1.02, 1.0], start=10.0, best=1.0) == 2
    assert rounds_to([10.0, 5.0], start=10.0, best=1.0) == 2


@pytest.mark.slow
def test_the_bar_of_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setattr(tuning_routes, "exact_figures", lambda quick: iter(()))
    figures = {figure.metric: figure.value for figure in b_tuning(quick=True)}
    for case in ("double-integrator-0.8", "rig"):
        assert figures[f"{case}-difference-high"] > -0.02  # of the gain
        assert figures[f"{case}-difference"] > -0.05
