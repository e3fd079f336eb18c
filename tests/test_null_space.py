"""The likeliest model of the same policy, against scipy's constrained optimum and closed forms.

Linear toy: nu*(theta) = W theta and log-likelihood -(theta - m)' P (theta - m) / 2 give, with nu held, the projection
theta = m + P^-1 W' (W P^-1 W')^-1 (nu - W m).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.closed_loop import exact_gradient, in_sim_optimum, in_sim_return, model_of
from benchmarks.oracles.multiplicative_lqr import WORLDS, World, cost_and_gradient
from sim2real.bounds import Box
from sim2real.estimators import Transitions
from sim2real.null_space import (
    EqualPolicies,
    Freedom,
    complement,
    free_step,
    likeliest_equal_policy,
    policy_directions,
)
from sim2real.params import Params, ravel, unravel
from sim2real.policy import linear_policy
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError
from sim2real.tune_finish import held_output
from sim2real.tune_state import tuning_space
from sim2real.tuning import TuneResult, TuneSettings, tune

W = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 1.0, 0.3, -2.0]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2, 0.5, 1.0, 0.1], dtype=torch.float64)
ROOT = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
P = ROOT @ ROOT.T + torch.eye(5)
FAR = torch.full((5,), torch.inf, dtype=torch.float64)


def linear_sensitivity(matrix: Tensor) -> Sensitivity:
    return Sensitivity(
        lambda g: {"x": matrix.T @ g["n"]}, lambda v: {"n": matrix @ v["x"]}, SolveReport(True, 0.0, 0, "exact")
    )


def toy(**changes: Any) -> EqualPolicies:
    start = {"x": torch.ones(5, dtype=torch.float64)}
    space = changes.pop("space", tuning_space(start, Box(), (), {"x": torch.tensor(0.1)}))

    def likelihood(theta: Params) -> tuple[float, Tensor, Tensor]:
        gap = theta["x"] - MEAN
        return -0.5 * float(gap @ P @ gap), -(P @ gap) * space.scale, P * torch.outer(space.scale, space.scale)

    arguments: dict[str, Any] = {
        "log_likelihood": likelihood,
        "optimum": lambda theta, nu0: {"n": W @ theta["x"]},
        "sensitivity": lambda theta, nu: linear_sensitivity(W),
        "real_return": lambda nu: -float(nu["n"].square().sum()),
    }
    return EqualPolicies(space, **(arguments | changes))


def freed(problem: EqualPolicies, **options: Any) -> Freedom:
    theta = {"x": torch.ones(5, dtype=torch.float64)}
    return likeliest_equal_policy(problem, theta, {"n": W @ theta["x"]}, **options)


def test_a_linear_problem_has_a_closed_form() -> None:
    found = freed(toy(), radius=100.0)
    inverse = torch.linalg.inv(P)
    gap = W @ torch.ones(5, dtype=torch.float64) - W @ MEAN
    wanted = MEAN + inverse @ W.T @ torch.linalg.inv(W @ inverse @ W.T) @ gap
    torch.testing.assert_close(found.theta["x"], wanted, rtol=0, atol=1e-10)
    assert found.dimension == 3
    assert found.steps == 1
    assert found.log_likelihood[1] > found.log_likelihood[0]
    assert found.real_return[1] == pytest.approx(found.real_return[0], rel=1e-12)
    assert found.status.startswith("converged")


def test_small_radii_get_there_too_and_few_steps_say_so() -> None:
    whole, small = freed(toy(), radius=100.0), freed(toy(), radius=0.3)
    torch.testing.assert_close(small.theta["x"], whole.theta["x"], rtol=0, atol=1e-4)
    assert small.steps > whole.steps
    short = freed(toy(), radius=0.3, max_steps=1)
    assert short.status == "stopped after the allowed 1 steps"
    assert whole.log_likelihood[1] > short.log_likelihood[1] > short.log_likelihood[0]


def test_bounds_hold() -> None:
    start = {"x": torch.ones(5, dtype=torch.float64)}
    box = Box(low={"x": 0.4}, high={"x": 1.8})
    space = tuning_space(start, box, (), {"x": torch.tensor(0.1)})
    found = freed(toy(space=space), radius=100.0)
    x = found.theta["x"]
    assert float(x.min()) >= 0.4
    assert float(x.max()) <= 1.8
    torch.testing.assert_close(W @ x, W @ start["x"], rtol=0, atol=1e-9)
    inner = minimize(
        lambda v: 0.5 * (v - MEAN.numpy()) @ P.numpy() @ (v - MEAN.numpy()),
        np.ones(5),
        jac=lambda v: P.numpy() @ (v - MEAN.numpy()),
        bounds=[(0.4, 1.8)] * 5,
        constraints={"type": "eq", "fun": lambda v: W.numpy() @ (v - 1), "jac": lambda v: W.numpy()},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert -found.log_likelihood[1] == pytest.approx(inner.fun, rel=1e-6)


def test_a_policy_that_every_parameter_moves_leaves_no_freedom() -> None:
    square = torch.eye(5, dtype=torch.float64)
    problem = toy(
        optimum=lambda theta, nu0: {"n": theta["x"]}, sensitivity=lambda theta, nu: linear_sensitivity(square)
    )
    found = likeliest_equal_policy(problem, {"x": torch.ones(5).double()}, {"n": torch.ones(5).double()})
    assert found.dimension == 0
    assert torch.equal(found.theta["x"], torch.ones(5).double())


def test_a_policy_that_nothing_moves_lets_theta_go_to_the_likeliest() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.float64)
    fixed = {"n": torch.ones(2, dtype=torch.float64)}
    problem = toy(optimum=lambda theta, nu0: fixed, sensitivity=lambda theta, nu: linear_sensitivity(nothing))
    found = likeliest_equal_policy(problem, {"x": torch.ones(5).double()}, fixed, radius=100.0)
    assert found.dimension == 5
    torch.testing.assert_close(found.theta["x"], MEAN, rtol=0, atol=1e-10)


def test_a_theta_without_optimum_shortens_the_step() -> None:
    def optimum(theta: Params, nu0: Params) -> Params:
        if float((theta["x"] - 1).norm()) > 0.3:
            raise UnconvergedError("no policy here")
        return {"n": W @ theta["x"]}

    found = freed(toy(optimum=optimum), radius=100.0)
    assert 0.25 < float((found.theta["x"] - 1).norm()) <= 0.3
    assert found.status.startswith("stopped: no gain within a radius")


def test_the_real_return_may_not_fall() -> None:
    # a return that sees what the policy parameters do not: the check on data holds it
    seen: list[float] = []

    def real_return(nu: Params) -> float:
        seen.append(1.0)
        return -1.0 - (0.0 if len(seen) == 1 else 1e-3)

    found = freed(toy(real_return=real_return))
    assert torch.equal(found.theta["x"], torch.ones(5).double())
    assert found.real_return == (-1.0, -1.0)
    loose = freed(toy(real_return=lambda nu: -1.0), return_tol=0.0, radius=100.0)
    assert loose.log_likelihood[1] > loose.log_likelihood[0]


@pytest.mark.parametrize(("rank", "wanted"), [(1e-6, 2), (0.5, 1)])
def test_weak_directions_count_as_free_and_are_told(rank: float, wanted: int) -> None:
    weak = torch.stack([W[0], 0.1 * W[1]])
    theta, nu = {"x": torch.ones(5).double()}, {"n": torch.ones(2).double()}
    space = tuning_space(theta, Box(), (), {"x": torch.tensor(1.0)})
    found = policy_directions(linear_sensitivity(weak), theta, nu, space, ravel, rank_tol=rank)
    exact = torch.linalg.svdvals(weak)
    torch.testing.assert_close(found.singular, exact[:wanted], rtol=1e-12, atol=0)
    assert found.neglected == pytest.approx(0.0 if wanted == 2 else float(exact[1] / exact[0]), rel=1e-9)
    rebuilt = found.left @ torch.diag(found.singular) @ found.moving.T
    if wanted == 2:
        torch.testing.assert_close(rebuilt, weak, rtol=0, atol=1e-12)


def test_the_free_directions_of_a_network_are_those_of_its_actions() -> None:
    """Two networks of equal actions count as one policy: dnu has more rank than dpi."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1)).double()
    nu = {key: value.detach() for key, value in net.named_parameters()}
    states = torch.linspace(-1, 1, 7, dtype=torch.float64).unsqueeze(1)
    actions = lambda nu: functional_call(net, nu, (states,)).reshape(-1)
    mixing = torch.randn(len(ravel(nu)), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chain = Sensitivity(
        lambda g: {"x": mixing.T @ ravel(g)},
        lambda v: unravel(mixing @ v["x"], nu),
        SolveReport(True, 0.0, 0, "exact"),
    )
    theta = {"x": torch.ones(5).double()}
    space = tuning_space(theta, Box(), (), {"x": torch.tensor(1.0)})
    own = policy_directions(chain, theta, nu, space, ravel)
    seen = policy_directions(chain, theta, nu, space, actions)
    assert len(own.singular) == 5
    assert len(seen.singular) == 2  # a deep linear network is one line: slope and offset
    exact = torch.cat([block.reshape(7, -1) for block in jacrev(actions)(nu).values()], 1) @ mixing
    torch.testing.assert_close(seen.singular, torch.linalg.svdvals(exact)[:2], rtol=1e-9, atol=0)


def test_the_actions_of_networks_are_held_and_the_parameters_of_others() -> None:
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    nu = {key: value.detach() for key, value in net.named_parameters()}
    act = lambda nu, states: functional_call(net, nu, (states,))
    zero, some = torch.zeros(600, dtype=torch.float64), torch.randn(600, 2, dtype=torch.float64)
    data = Transitions(some, some[:, :1], zero, some, zero > 0, zero.long(), zero.long(), some[:1])
    seen = held_output(act, nu, data)(nu)
    torch.testing.assert_close(seen, act(nu, some[::3]).reshape(-1).detach(), rtol=0, atol=0)
    small = {"gain": torch.ones(1, 2, dtype=torch.float64)}
    for output in (held_output(act, small, data), held_output(None, small, data), held_output(act, small, None)):
        assert torch.equal(output(small), torch.ones(2, dtype=torch.float64))


def test_products_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="is not finite: the null space"):
        freed(toy(sensitivity=lambda theta, nu: linear_sensitivity(W * math.nan)))


def test_likelihoods_that_are_not_finite_are_refused() -> None:
    nan, none = torch.full((5,), torch.nan).double(), torch.zeros(5, 0).double()
    for gradient, curvature in ((nan, P), (FAR, P), (MEAN, P * torch.nan)):
        with pytest.raises(ValueError, match="not finite"):
            free_step(gradient, curvature, none, -FAR, FAR, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        likeliest_equal_policy(toy(log_likelihood=lambda theta: (0.0, nan, P)), {"x": MEAN + 1}, {"n": W @ (MEAN + 1)})


def test_free_steps_are_optimal_and_feasible() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        moving = torch.linalg.qr(torch.randn(5, 2, generator=generator, dtype=torch.float64))[0]
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        open_step = free_step(gradient, P, moving, -FAR, FAR, 100.0)
        kkt = torch.cat([torch.cat([P, moving], 1), torch.cat([moving.T, torch.zeros(2, 2).double()], 1)])
        exact = torch.linalg.solve(kkt, torch.cat([gradient, torch.zeros(2).double()]))[:5]
        torch.testing.assert_close(open_step, exact, rtol=1e-9, atol=1e-12)
        side = 0.05 + 0.1 * torch.rand(5, generator=generator).double()
        boxed = free_step(gradient, P, moving, -side, side, 0.2)
        assert bool((boxed.abs() <= side).all()), trial
        assert float((moving.T @ boxed).abs().max()) < 1e-12
        assert float(boxed.norm()) <= 0.2 * (1 + 1e-9)
        assert float(gradient @ boxed - 0.5 * boxed @ P @ boxed) >= 0
    pushed = free_step(torch.ones(5).double(), P, torch.zeros(5, 0).double(), -FAR, torch.zeros(5).double(), 1.0)
    assert float(pushed.abs().max()) < 1e-15  # pushed against its bounds


def test_free_steps_are_scipys_where_bounds_meet_the_null_space() -> None:
    """A variable on its bound may have to leave it again: SLSQP, an independent solver, on 40 random programs."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 9))
        N = np.linalg.qr(rng.standard_normal((n, n)))[0][:, : int(rng.integers(0, n))]
        root, g = rng.standard_normal((n, max(1, n - seed % 3))), rng.standard_normal(n)
        low, high = -rng.random(n) * (rng.random(n) < 0.8), rng.random(n) * (rng.random(n) < 0.8)
        radius, L = float(rng.random() + 0.1), root @ root.T
        gain = lambda d, g=g, L=L: float(g @ d - 0.5 * d @ L @ d)
        found = free_step(*(torch.from_numpy(x) for x in (g, L, N, low, high)), radius).numpy()
        inside = [{"type": "ineq", "fun": lambda d, radius=radius: radius**2 - d @ d}]
        free = [{"type": "eq", "fun": lambda d, N=N: N.T @ d}] if N.shape[1] else []
        bounds, options = list(zip(low, high, strict=True)), {"ftol": 1e-14, "maxiter": 300}
        other = minimize(
            lambda d, gain=gain: -gain(d), 0 * g, bounds=bounds, constraints=free + inside, options=options
        )
        assert np.abs(N.T @ found).max(initial=0.0) < 1e-8
        assert (found >= low).all()
        assert (found <= high).all()
        assert np.linalg.norm(found) < radius + 1e-8
        assert gain(found) >= gain(other.x) - 1e-6 or np.abs(N.T @ other.x).max(initial=0.0) > 1e-9


def test_complements_have_the_right_rank() -> None:
    columns = torch.stack([W[0], 2 * W[0], W[1]], 1)
    basis = complement(columns)
    assert basis.shape == (5, 3)
    assert float((basis.T @ columns).abs().max()) < 1e-12
    assert complement(torch.zeros(5, 0).double()).shape == (5, 5)


# ------------------------------------------------------------------------------------ benchmark A, against scipy


def gaussian(world: World, seed: int = 0) -> tuple[Params, Tensor]:
    """Mean and precision of a fit of (A, B): the truth, and a random well-conditioned precision."""
    _, mean = model_of(world)
    size = len(ravel(mean))
    root = torch.tensor(np.random.default_rng(seed).normal(size=(size, size)))
    return mean, 100 * (root @ root.T + torch.eye(size, dtype=torch.float64))


def tuned(world: World, *, use_freedom: bool) -> TuneResult:
    mdp, theta = model_of(world)
    return tune(
        mdp,
        linear_policy(world.B.shape[1]),
        theta,
        {"gain": torch.zeros(world.B.shape[::-1], dtype=torch.float64)},
        None,
        None,
        real_reward=None,
        real_discount=world.discount,
        settings=TuneSettings(max_steps=20, gradient_tol=1e-10, use_freedom=use_freedom, certify=False),
        likelihood=gaussian(world),
        objective=partial(in_sim_return, world),
        optimum=partial(in_sim_optimum, world),
        gradient=partial(exact_gradient, world),
    )


def log_likelihood(theta: Params, likelihood: tuple[Params, Tensor]) -> float:
    gap = ravel(theta) - ravel(likelihood[0])
    return -0.5 * float(gap @ likelihood[1] @ gap)


@pytest.mark.parametrize("world", [WORLDS[1], WORLDS[2], WORLDS[3]], ids=lambda world: world.name)
def test_tuning_ends_at_the_likeliest_model_of_the_best_policy(world: World) -> None:
    plain, free = tuned(world, use_freedom=False), tuned(world, use_freedom=True)
    assert plain.freedom is None
    assert free.freedom is not None
    likelihood = gaussian(world)
    K = plain.nu["gain"]
    before, after = (log_likelihood(result.theta, likelihood) for result in (plain, free))
    assert free.freedom.log_likelihood == (pytest.approx(before), pytest.approx(after))
    assert after > before + 0.05
    # the same policy to 1e-7, hence the same return to second order of that
    torch.testing.assert_close(free.nu["gain"], K, rtol=1e-6, atol=1e-7)
    ends = [cost_and_gradient(world, result.nu["gain"].numpy())[0] for result in (plain, free)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)
    assert any("the policy as it is: moved there" in note for note in free.notes)

    # maximise the likelihood subject to K(theta) = K: an independent solver, started at the tuned theta
    mean, precision = ravel(likelihood[0]).numpy(), likelihood[1].numpy()
    gain = lambda v: in_sim_optimum(world, unravel(v, plain.theta), {})["gain"].reshape(-1)
    independent = minimize(
        lambda x: 0.5 * (x - mean) @ precision @ (x - mean),
        ravel(plain.theta).numpy(),
        jac=lambda x: precision @ (x - mean),
        constraints={
            "type": "eq",
            "fun": lambda x: (gain(torch.tensor(x)) - K.reshape(-1)).numpy(),
            "jac": lambda x: jacrev(gain)(torch.tensor(x)).numpy(),
        },
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-13},
    )
    assert independent.success
    # tune stops within about 1e-6 nat of the optimum, where theta is known to sqrt(2e-6 / 100)
    assert after == pytest.approx(-independent.fun, abs=5e-6)
    np.testing.assert_allclose(ravel(free.theta).numpy(), independent.x, rtol=0, atol=2e-4)


def test_resuming_a_finished_run_moves_theta_to_the_same_place() -> None:
    world = WORLDS[1]
    whole = tuned(world, use_freedom=True)
    mdp, theta = model_of(world)
    again = tune(
        mdp,
        linear_policy(1),
        theta,
        {"gain": torch.zeros(1, 1, dtype=torch.float64)},
        None,
        None,
        real_reward=None,
        real_discount=world.discount,
        settings=TuneSettings(max_steps=20, gradient_tol=1e-10, certify=False),
        likelihood=gaussian(world),
        objective=partial(in_sim_return, world),
        optimum=partial(in_sim_optimum, world),
        gradient=partial(exact_gradient, world),
        state=whole.state,
    )
    assert all(torch.equal(again.theta[key], whole.theta[key]) for key in theta)
    assert again.freedom == whole.freedom or str(again.freedom) == str(whole.freedom)
