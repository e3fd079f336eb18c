"""Every simulator: the contract of torch.func, derivatives, declared names and bounds, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from problems import CASES, EXACT, closed_loop, returns_of, seeded, stack
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from benchmarks.derivatives import gradient_error, random_problem, romberg_gradient, step_derivatives_hold
from sim2real import Noise, Params, contains, default_params, ravel, unravel
from sim2real.simulators import (
    building_rc,
    cartpole,
    double_pendulum,
    linear_gaussian,
    multiplicative_noise_lqr,
    pendulum,
)


@pytest.mark.parametrize("name", CASES)
def test_contract_of_torch_func(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=3, horizon=3)
    returns = returns_of(case, policy, nu, noise)
    x = ravel(case.theta)

    def objective(x: Tensor) -> Tensor:
        return returns(unravel(x, case.theta)).mean()

    def vector(x: Tensor) -> Tensor:
        return returns(unravel(x, case.theta))

    tangent = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    cotangent = torch.randn(3, generator=seeded(2), dtype=torch.float64)
    value, pushed = jvp(vector, (x,), (tangent,))
    _, pull = vjp(vector, x)
    torch.testing.assert_close(cotangent @ pushed, pull(cotangent)[0] @ tangent, **EXACT)
    jacobian = jacrev(vector)(x)
    torch.testing.assert_close(jacobian, jacfwd(vector)(x), **EXACT)
    torch.testing.assert_close(jacobian @ tangent, pushed, **EXACT)
    second = hessian(objective)(x)
    torch.testing.assert_close(second, second.mT, rtol=1e-8, atol=1e-9)  # cancelling terms cost two digits more
    torch.testing.assert_close(jvp(grad(objective), (x,), (tangent,))[1], second @ tangent, rtol=1e-8, atol=1e-9)
    assert value.shape == (3,)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_environments_equals_the_batch(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=4, horizon=3)
    factor = 1.0 + 0.1 * torch.rand(4, generator=seeded(3), dtype=torch.float64)
    each = {key: torch.stack([f * value for f in factor]) for key, value in case.theta.items()}
    batch = returns_of(case, policy, nu, noise)

    def single(theta: Params, noise: Noise) -> Tensor:
        one = Noise(*(part.unsqueeze(0) for part in (noise.initial, noise.process, noise.policy)))
        return returns_of(case, policy, nu, one)(theta)[0]

    parts = (noise.initial, noise.process, noise.policy)
    by_vmap = vmap(lambda theta, *parts: single(theta, Noise(*parts)))
    torch.testing.assert_close(by_vmap(each, *parts), batch(each), **EXACT)
    common = vmap(lambda *parts: single(case.theta, Noise(*parts)))
    torch.testing.assert_close(common(*parts), batch(case.theta), **EXACT)
    gradients = vmap(grad(lambda theta, *parts: single(theta, Noise(*parts))))(each, *parts)
    together = grad(lambda theta: batch(theta).sum())(each)
    for key, value in gradients.items():
        torch.testing.assert_close(value, together[key], **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_mixed_shared_and_per_environment_parameters(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=3, horizon=2)
    returns = returns_of(case, policy, nu, noise)
    for key in case.theta:
        mixed = case.theta | {key: case.theta[key].expand(3, *case.theta[key].shape)}
        torch.testing.assert_close(returns(mixed), returns(case.theta), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_step_and_rollout_derivatives(name: str) -> None:
    generator = seeded(11)
    assert step_derivatives_hold(CASES[name], generator)
    assert max(gradient_error(random_problem(CASES[name], generator)) for _ in range(3)) < 1.0


def test_the_reference_of_the_derivative_bar_sees_a_wrong_gradient() -> None:
    x = stack(0.3, -2.0)
    reference, doubt = romberg_gradient(lambda x: torch.sin(x[:, 0]) * x[:, 1] ** 2, x, x.abs())
    exact = stack(math.cos(0.3) * 4.0, math.sin(0.3) * -4.0)
    assert float(((reference - exact).abs() / exact.abs()).max()) < 1e-11
    assert float(doubt.max()) < 1e-9
    case = CASES["pendulum rk4"]
    problem = random_problem(case, seeded(0))
    detached = type(problem)(lambda x: problem.value(x) + 1e-5 * x.detach()[:, 0], problem.x, problem.scale)
    assert gradient_error(detached) > 1.0


@pytest.mark.parametrize("name", CASES)
def test_declared_names_units_and_bounds(name: str) -> None:
    mdp = CASES[name].mdp
    theta = default_params(mdp.box)
    assert contains(mdp.box, theta)
    assert theta.keys() == mdp.box.unit.keys()
    _, _, noise = closed_loop(CASES[name], batch=2, horizon=2)
    state = mdp.initial_state(theta, noise.initial)
    assert state.shape == (2, len(mdp.names["state"]))
    seen = state if mdp.observe is None else mdp.observe(theta, state)
    assert seen.shape == (2, len(mdp.names["signal"]))
    assert len(mdp.names.get("exogenous", ())) == mdp.exogenous_dim
    columns = {column for group in mdp.names.values() for column in group}
    assert columns <= mdp.units.keys()
    assert mdp.derivative_order == 2


@pytest.mark.parametrize("name", CASES)
def test_dtype_follows_the_inputs_and_inputs_stay_as_they_were(name: str) -> None:
    case = CASES[name]
    theta = {key: value.float() for key, value in case.theta.items()}
    _, _, noise = closed_loop(case, batch=2, horizon=1)
    state = case.mdp.initial_state(theta, noise.initial.float())
    action, e = torch.ones(2, len(case.mdp.names["action"])), noise.process[:, 0].float()
    before = state.clone()
    following = case.mdp.step(theta, state, action, e)
    assert following.dtype == torch.float32
    assert case.mdp.reward(theta, state, action, e, following).dtype == torch.float32
    if case.mdp.log_prob is not None:
        assert case.mdp.log_prob(theta, state, action, following).dtype == torch.float32
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pendulum(dt=0.0), "dt must be a positive"),
        (lambda: pendulum(dt=math.nan), "dt must be a positive"),
        (lambda: pendulum(substeps=0), "substeps must be at least 1"),
        (lambda: double_pendulum(integrator="euler"), "integrator must be one of"),
        (lambda: double_pendulum(parameters="urdf"), "parameters must be 'base' or 'physical'"),
        (lambda: cartpole(angle_limit=0.0), "limits must be > 0"),
        (lambda: building_rc(4), "order must be 1, 2 or 3"),
        (lambda: building_rc(integrator="semi_implicit"), "integrator must be one of"),
        (lambda: linear_gaussian(torch.zeros(2, 3), torch.zeros(2, 1)), r"A must be \[n, n\]"),
        (lambda: linear_gaussian(torch.eye(2), torch.zeros(3, 1)), r"A must be \[n, n\]"),
        (lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), state_cost=torch.eye(3)), "state_cost must be"),
        (
            lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), action_cost=torch.tensor([[1.0, 2.0]])),
            "action_cost must be a symmetric",
        ),
        (
            lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), noise_covariance=-torch.eye(2)),
            "noise_covariance must be positive definite",
        ),
        (lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), initial_mean=torch.ones(3)), "initial_mean must be"),
        (lambda: multiplicative_noise_lqr(torch.eye(2), torch.ones(2, 1), -0.1), "sigma must be finite"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
