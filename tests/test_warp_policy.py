"""Closed loops in one kernel: Warp rollouts of linear policies and networks against the torch path, to second order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import scalar, seeded
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

pytest.importorskip("warp")

from sim2real.bounds import default_params
from sim2real.estimators import policy_sensitivity
from sim2real.mdp import ModelMDP, Noise, sample_noise
from sim2real.outside_program import DerivativeOrderError
from sim2real.params import Params, ravel, unravel
from sim2real.policy import Policy, deterministic_policy, gaussian_policy, linear_policy, module_policy
from sim2real.rollout import discounted_return, expected_return, rollout
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.warp_cartpole import warp_cartpole
from sim2real.simulators.warp_model import warp_model
from sim2real.solvers import policy_optimum

LIMITS = {"initial_std": 0.2, "angle_limit": 0.3, "alive_reward": 1.0}
TWIN, FUSED = cartpole(**LIMITS), warp_cartpole(**LIMITS)
"""many of the episodes below end early"""
THETA = default_params(TWIN.box)
B, T = 70, 12  # more than a tile of 64, the last block not full
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""float64, sums of 1e3 terms in another order: 1e-13 expected"""


def network(outputs: int, *parts: nn.Module) -> tuple[nn.Module, Params]:
    module, generator = nn.Sequential(*parts).double(), seeded(outputs)
    draw = lambda value: 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return module, {key: draw(value) for key, value in module.named_parameters()}


def linear(std: float) -> tuple[Policy, Params]:
    return linear_policy(1, std=std), {"gain": torch.tensor([[-1.0, -9.0, -1.5, -2.0]], dtype=torch.float64)}


def wide() -> tuple[Policy, Params]:
    module, nu = network(1, nn.Linear(4, 18), nn.Tanh(), nn.Linear(18, 9), nn.SiLU(), nn.Linear(9, 1))
    return module_policy(module, std=0.3), nu


def head() -> tuple[Policy, Params]:
    module, nu = network(2, nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2), nn.ELU())
    return gaussian_policy(module), nu


def own() -> tuple[Policy, Params]:
    """A gain and an offset for each environment."""
    policy, nu = linear(0.1)
    draw = torch.randn(B, 1, 4, generator=seeded(3), dtype=torch.float64)
    return policy, {"gain": nu["gain"] + 0.1 * draw, "offset": 0.1 * draw[..., 0]}


POLICIES = {"linear": lambda: linear(0.0), "wide": wide, "head": head, "own": own}


def drawn(policy: Policy, batch: int = B, steps: int = T) -> Noise:
    return sample_noise(TWIN, policy, batch, steps, seeded(0))


def objective(mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, initial: Tensor, acting: Tensor) -> Tensor:
    """A scalar that all outputs reach, none of them linearly."""
    run = rollout(mdp, policy, theta, nu, Noise(initial, initial.new_zeros(len(initial), acting.shape[1], 0), acting))
    return discounted_return(run.rewards, 0.9).square().mean() + run.states.sin().mean() + run.actions.cos().mean()


def per_environment() -> Params:
    return THETA | {"length": THETA["length"] * (1.0 + 0.1 * torch.rand(B, generator=seeded(5), dtype=torch.float64))}


def each_key(function, params: Params) -> Params:
    return {key: function(value) for key, value in params.items()}


SLOW = {"wide", "own"}  # seconds of compiling each, the first time on a machine


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(POLICIES)]
)
def test_value_and_derivatives_are_those_of_the_torch_path(name: str) -> None:
    policy, nu = POLICIES[name]()
    noise, theta = drawn(policy), per_environment()
    fused, expected = (rollout(mdp, policy, theta, nu, noise) for mdp in (FUSED, TWIN))
    for field in ("states", "actions", "rewards"):
        torch.testing.assert_close(getattr(fused, field), getattr(expected, field), rtol=1e-12, atol=1e-12)
    assert torch.equal(fused.mask, expected.mask)
    assert 0.5 < float(fused.mask.double().mean()) < 0.99  # the end of an episode is in play

    point = (theta, nu, noise.initial, noise.policy)
    generator = seeded(8)
    draw = lambda value: torch.randn(value.shape, generator=generator, dtype=torch.float64)
    along = (each_key(draw, theta), each_key(draw, nu), draw(noise.initial), draw(noise.policy))
    found = []
    for mdp in (FUSED, TWIN):
        J = lambda *x, mdp=mdp: objective(mdp, policy, *x)
        slopes = grad(J, argnums=(0, 1, 2, 3))
        value, tangent = jvp(J, point, along)
        gradient, product = jvp(slopes, point, along)  # forward over reverse: exact Hessian-vector products
        found.append(
            [value, tangent, *(ravel(part) for part in (*gradient[:2], *product[:2])), *gradient[2:], *product[2:]]
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_double_backward_and_third_order() -> None:
    policy, nu = linear(0.2)
    noise = drawn(policy, 8, 5)
    gain = nu["gain"].requires_grad_()
    J = expected_return(FUSED, policy, THETA, {"gain": gain}, noise)
    (slope,) = torch.autograd.grad(J, gain, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), gain, create_graph=True)
    exact = hessian(lambda g: expected_return(TWIN, policy, THETA, {"gain": g}, noise))(gain.detach())
    torch.testing.assert_close(curve.flatten(), exact.reshape(4, 4).sum(0), **CLOSE)
    with pytest.raises(DerivativeOrderError, match="third"):
        torch.autograd.grad(curve.sum(), gain)


def test_a_gain_with_a_leading_axis_of_one_is_shared() -> None:
    policy, nu = linear(0.0)
    noise = drawn(policy)
    slope = lambda gain: grad(lambda g: expected_return(FUSED, policy, THETA, {"gain": g}, noise))(gain)
    torch.testing.assert_close(slope(nu["gain"].unsqueeze(0))[0], slope(nu["gain"]), **CLOSE)


def test_transforms_over_shared_weights() -> None:
    """vmap over weights, and all Jacobians of torch.func, of the return in the policy's weights."""
    policy, nu = head()
    noise = drawn(policy, 6, 4)
    J = lambda mdp: lambda bias: expected_return(mdp, policy, THETA, nu | {"2.bias": bias}, noise)
    bias = nu["2.bias"]
    for transform in (jacrev, jacfwd, hessian, lambda f: jacrev(grad(f))):
        torch.testing.assert_close(transform(J(FUSED))(bias), transform(J(TWIN))(bias), **CLOSE)
    many = bias + torch.randn(5, len(bias), generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(J(FUSED)))(many), vmap(grad(J(TWIN)))(many), **CLOSE)


def test_results_do_not_depend_on_threads() -> None:
    policy, nu = head()
    noise, threads = drawn(policy, 400, 50), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(grad(lambda weights: expected_return(FUSED, policy, THETA, weights, noise))(nu))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ravel(results[0]), ravel(results[1]))


@pytest.mark.slow
def test_float32() -> None:
    policy, nu = wide()
    noise = drawn(policy)
    single = lambda params: {key: value.float() for key, value in params.items()}
    low = Noise(*(part.float() for part in (noise.initial, noise.process, noise.policy)))
    ours = grad(lambda weights: expected_return(FUSED, policy, single(THETA), weights, low))(single(nu))
    exact = ravel(grad(lambda weights: expected_return(TWIN, policy, THETA, weights, noise))(nu))
    # float32 rounding 6e-8, grown over 12 steps and a sum over 70 environments
    assert float((ravel(ours).double() - exact).norm() / exact.norm()) < 1e-4


def test_policy_sensitivity_is_that_of_the_torch_path() -> None:
    """An optimum of a linear policy, then dnu*/dtheta through Warp and through torch."""
    twin, fused = cartpole(initial_std=0.2, discount=0.95), warp_cartpole(initial_std=0.2, discount=0.95)
    policy, nu = linear(0.0)
    noise = sample_noise(twin, policy, 16, 15, seeded(1))
    J = lambda mdp: lambda theta, weights: expected_return(mdp, policy, theta, weights, noise)
    nu = policy_optimum(J(fused), THETA, nu).nu
    g = unravel(torch.randn(4, generator=seeded(4), dtype=torch.float64), nu)
    ours, theirs = (policy_sensitivity(J(mdp), THETA, nu, cotangent=g) for mdp in (fused, twin))
    a, b = ravel(ours.vjp(g)), ravel(theirs.vjp(g))
    assert ours.report.converged
    # both solve to a relative residual of 1e-10 at most, times the condition number of a 4 x 4 Hessian
    assert float((a - b).norm() / b.norm()) < 1e-8


def test_what_cannot_be_fused_is_stepped() -> None:
    theta = per_environment()
    deep, weights = network(1, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    broad, many = network(1, nn.Linear(4, 65), nn.Tanh(), nn.Linear(65, 1))
    cases = [
        (module_policy(deep), weights),
        (module_policy(broad), many),
        (deterministic_policy(lambda nu, s: -s @ nu["gain"].mT), linear(0.0)[1]),
    ]
    for policy, nu in cases:
        noise = drawn(policy, steps=4)
        ours, theirs = (rollout(mdp, policy, theta, nu, noise) for mdp in (FUSED, TWIN))
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-12, atol=1e-12)


def test_process_noise_a_torch_reward_and_parameters_left_out() -> None:
    """A model with noise, without box, its reward a function of tensors; the parameters come in another order."""

    def step(theta, state, action, noise):
        return theta.decay * state + theta.push * action + 0.1 * noise

    reward = lambda theta, s, a, e, following: -(following**2).sum(-1) - theta["push"] * a[..., 0] * e[..., 1]
    names = {"state": ("x", "y"), "action": ("u", "v"), "parameters": ("decay", "push")}
    mdp = warp_model(step, None, torch_reward=reward, noise=2, initial_noise=2, dt=0.1, **names)
    mdp = replace(mdp, initial_state=lambda theta, e0: e0)
    plain = replace(
        mdp,
        step=lambda theta, s, a, e: theta["decay"] * s + theta["push"] * a + 0.1 * e,
        closed_loop=None,
        open_loop=None,
    )
    theta, nu = {"push": scalar(0.5), "decay": scalar(0.9)}, {"gain": 0.3 * torch.ones(2, 2, dtype=torch.float64)}
    policy = linear_policy(2, std=0.2)
    noise = sample_noise(mdp, policy, 9, 6, seeded(0))
    J = lambda m: lambda th, weights, e: expected_return(m, policy, th, weights, replace(noise, process=e))
    assert mdp.closed_loop is not None
    for argument in range(3):
        ours, theirs = (grad(J(m), argnums=argument)(theta, nu, noise.process) for m in (mdp, plain))
        if isinstance(ours, dict):
            ours, theirs = ravel(ours), ravel(theirs)
        torch.testing.assert_close(ours, theirs, **CLOSE)
