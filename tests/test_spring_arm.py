"""The arm that a leader designs: motion, kernels, exact answers and the leader's gradient at the exact follower."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import learned_follower
from benchmarks.bars import MissingError
from benchmarks.oracles import spring_arm as oracle
from sim2real import default_params, rollout, sample_noise
from sim2real.estimators import CriticOptions, boltzmann_covariance_gradient, inverse_noise_weights, transitions
from sim2real.simulators import spring_arm, spring_arm_matrices
from sim2real.simulators.spring_arm import FOLLOWER_COST, LEADER_COST, PRICE, START
from sim2real.solvers import linear_noise_policy, soft_lqr

TEMPERATURE, DISCOUNT, DT, NOISE = 0.1, 0.9, 0.1, 0.1
THETA = default_params(spring_arm().follower.box)
DESIGN = np.array([float(value) for value in THETA.values()])
PUSH = torch.tensor([[DT], [1.0]], dtype=torch.float64)
"""of the noise on angle and speed"""


def batch(count=6):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (2, 1, 1))


def follower(theta):
    A, B = spring_arm_matrices(theta)
    rates = DT * torch.tensor(FOLLOWER_COST, dtype=torch.float64)
    covariance = NOISE**2 * PUSH @ PUSH.T
    return (
        A,
        B,
        soft_lqr(
            A,
            B,
            rates[:2].diag(),
            rates[2:].diag(),
            discount=DISCOUNT,
            temperature=TEMPERATURE,
            noise_covariance=covariance,
        ),
    )


def exact_return(theta):
    """J of the linear arm by its discounted second moments X = sum_t g^t E s s', differentiable."""
    A, B, best = follower(theta)
    K, spread = best.nu["gain"], best.nu["factor"] @ best.nu["factor"].T
    first = torch.tensor(START, dtype=torch.float64).square().diag()
    noise = B @ spread @ B.T + NOISE**2 * PUSH @ PUSH.T
    closed, left = A - B @ K, 1 / (1 - DISCOUNT)
    system = torch.eye(4, dtype=torch.float64) - DISCOUNT * torch.kron(closed, closed)
    X = (torch.linalg.inv(system) @ (first + DISCOUNT * left * noise).reshape(-1)).reshape(2, 2)
    cost = LEADER_COST[0] * X[0, 0] + LEADER_COST[1] * X[1, 1]
    cost = cost + LEADER_COST[2] * ((K @ X @ K.T).sum() + left * spread.sum())
    return -DT * (cost + left * sum(rate * theta[key] ** 2 for key, rate in PRICE.items()))


@pytest.mark.parametrize("linear", [False, True])
def test_step_follows_the_equation_of_motion(linear):
    s, a, e = batch()
    found = spring_arm(linear=linear).follower.step(THETA, s, a, e)
    expected = oracle.drift(SimpleNamespace(linear=linear), DESIGN, s.numpy(), a[:, 0].numpy())  # without noise
    torch.testing.assert_close(found, torch.from_numpy(expected) + NOISE * e @ PUSH.T)  # to rounding


def test_linear_arm_is_that_of_its_matrices():
    s, a, e = batch()
    A, B = spring_arm_matrices(THETA)
    found = spring_arm(linear=True).follower.step(THETA, s, a, 0 * e)
    torch.testing.assert_close(found, s @ A.T + a @ B.T)
    upright = torch.zeros(1, 2, dtype=torch.float64)
    step = lambda state: spring_arm().follower.step(THETA, state, 0 * a[:1], 0 * e[:1])
    torch.testing.assert_close(torch.func.jacrev(step)(upright)[0, :, 0], A)


@pytest.mark.parametrize("linear", [False, True])
def test_kernels_are_the_torch_arm(linear):
    warp_arm = pytest.importorskip("sim2real.simulators.warp_spring_arm")
    s, a, e = batch()
    ours, twin = warp_arm.warp_spring_arm(linear=linear).follower, spring_arm(linear=linear).follower
    after = twin.step(THETA, s, a, e)
    torch.testing.assert_close(ours.step(THETA, s, a, e), after)
    torch.testing.assert_close(ours.reward(THETA, s, a, e, after), twin.reward(THETA, s, a, e, after))
    assert ours.closed_loop is not None
    assert ours.names == twin.names


def test_grid_finds_the_closed_form():
    # splines of width 0.35 and 0.9 under a quadratic value: measured 5e-5, from the edge and the last sweeps
    assert oracle.leader_return(oracle.prepare(linear=True), DESIGN, TEMPERATURE) == pytest.approx(
        float(exact_return(THETA)), abs=3e-4
    )


def test_leader_climbs_with_the_exact_follower():
    leaves = {key: value.clone().requires_grad_() for key, value in THETA.items()}
    slopes = torch.autograd.grad(exact_return(leaves), list(leaves.values()))
    exact = torch.stack([slope * value for slope, value in zip(slopes, THETA.values(), strict=True)])
    task, policy = spring_arm(linear=True), linear_noise_policy(1)
    best = follower(THETA)[2]
    found = []
    for seed in range(4):
        noise = sample_noise(task.follower, policy, 100, 100, torch.Generator().manual_seed(seed))
        data = transitions(rollout(task.follower, policy, THETA, best.nu, noise))
        data = replace(data, rewards=task.reward(THETA, data.states, data.actions, data.next_states))
        grad = boltzmann_covariance_gradient(
            task,
            policy,
            THETA,
            best.nu,
            data,
            temperature=TEMPERATURE,
            soft_value=lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset,
            critics=CriticOptions(kind="state", row_weights=inverse_noise_weights(data.states, floor=0.05)),
        ).grad
        found.append(torch.stack([THETA[key] * grad[key] for key in THETA]))
    # each of the 4 is off by about a tenth (100 first states of the outer sum), their mean by half of that
    assert torch.stack(found).mean(0).sub(exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("options", [{"dt": 0.0}, {"noise_std": 0.0}, {"noise_std": math.inf}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        spring_arm(**options)


def test_cosines_come_with_their_bounds():
    right, off = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.6, 0.8, 0.0])
    figures = {figure.metric: figure.value for figure in learned_follower.compared("x", [right, off], right)}
    assert figures["x-cosine"] == pytest.approx(0.8)
    assert figures["x-cosine-worst"] == pytest.approx(0.6)
    # t(0.975, 1) = 12.706, standard deviation 0.4 / sqrt(2)
    assert figures["x-cosine-low"] == pytest.approx(0.8 - 12.706 * 0.4 / 2, abs=1e-3)
    assert figures["x-error"] == pytest.approx(math.sqrt(0.8 / 2))


def test_the_bar_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(learned_follower.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="torchrl is not installed"):
        next(learned_follower.b_sac(True))
