"""Core types: parameters and their arithmetic, bounds, policies, noise, rollouts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import scalar, seeded
from torch import Tensor, nn
from torch.func import grad

from sim2real import (
    Box,
    ModelMDP,
    Noise,
    Params,
    assign_grads,
    axpy,
    boltzmann_policy,
    contains,
    copy_into,
    default_params,
    deterministic_policy,
    discounted_return,
    dot,
    expected_return,
    from_unbounded,
    gaussian_policy,
    linear_policy,
    map_params,
    module_policy,
    project,
    ravel,
    rollout,
    sample_noise,
    to_unbounded,
    unravel,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""the same few float64 operations in another order"""


def values(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


# Params --------------------------------------------------------------------------------------------------------------


def test_arithmetic_of_params() -> None:
    a = {"x": values(1.0, 2.0), "y": scalar(3.0)}
    b = {"y": scalar(-1.0), "x": values(0.5, 1.0)}
    assert float(dot(a, b)) == 1.0 * 0.5 + 2.0 * 1.0 - 3.0
    assert axpy(2.0, a, b)["x"].tolist() == [2.5, 5.0]
    assert axpy(scalar(2.0), a, b)["y"].item() == 5.0
    assert map_params(lambda u, v: u * v, a, b)["y"].item() == -3.0
    assert ravel(a).tolist() == [1.0, 2.0, 3.0]


def test_unravel_inverts_ravel_and_keeps_leading_dimensions() -> None:
    like = {"matrix": torch.zeros(2, 3, dtype=torch.float64), "scalar": scalar(0.0)}
    vector = torch.arange(7.0, dtype=torch.float64)
    parts = unravel(vector, like)
    assert {key: part.shape for key, part in parts.items()} == {"matrix": (2, 3), "scalar": ()}
    assert torch.equal(ravel(parts), vector)
    batch = unravel(vector.expand(4, 7), like)
    assert batch["matrix"].shape == (4, 2, 3)
    assert batch["scalar"].shape == (4,)
    with pytest.raises(ValueError, match="the vector has 6 entries"):
        unravel(vector[:6], like)


@pytest.mark.parametrize("call", [dot, lambda a, b: map_params(torch.add, a, b), assign_grads, copy_into])
def test_different_keys_are_named(call) -> None:
    with pytest.raises(KeyError, match=r"lacks the keys \['x'\] and has the unexpected keys \['y'\]"):
        call({"x": scalar(1.0)}, {"y": scalar(1.0)})


def test_assign_grads_climbs_with_maximize() -> None:
    theta = {"x": scalar(1.0).requires_grad_(), "y": values(1.0, 1.0).float().requires_grad_()}
    gradient = {"x": scalar(2.0), "y": values(0.5, -0.5)}
    assign_grads(theta, gradient)
    torch.optim.SGD(theta.values(), lr=0.1, maximize=True).step()
    assert theta["x"].item() == pytest.approx(1.2)
    assert theta["y"].tolist() == pytest.approx([1.05, 0.95])
    assert theta["y"].grad.dtype == torch.float32
    gradient["x"] += 1.0
    assert theta["x"].grad.item() == 2.0  # a copy


def test_copy_into_keeps_identity_and_records_nothing() -> None:
    target = {"x": values(1.0, 2.0).requires_grad_()}
    kept = target["x"]
    copy_into(target, {"x": values(3.0, 4.0)})
    assert target["x"] is kept
    assert kept.tolist() == [3.0, 4.0]
    assert kept.grad_fn is None


# Box -----------------------------------------------------------------------------------------------------------------

BOX = Box(low={"both": -1.0, "below": 0.0}, high={"both": 2.0, "above": 5.0}, default={"both": 0.1})


def test_project_and_contains() -> None:
    theta = {"both": values(-3.0, 0.5, 9.0), "below": scalar(-1.0), "above": scalar(7.0), "free": scalar(1e9)}
    inside = project(BOX, theta)
    assert inside["both"].tolist() == [-1.0, 0.5, 2.0]
    assert (inside["below"].item(), inside["above"].item(), inside["free"].item()) == (0.0, 5.0, 1e9)
    assert contains(BOX, inside)
    assert not contains(BOX, theta)
    assert not contains(BOX, {"free": scalar(math.nan)})
    assert not contains(BOX, {"free": scalar(math.inf)})


@settings(max_examples=50, deadline=None)
@given(st.floats(-8.0, 8.0), st.sampled_from(["both", "below", "above", "free"]))
def test_unbounded_map_goes_there_and_back(x: float, key: str) -> None:
    inside = from_unbounded(BOX, {key: scalar(x)})
    assert contains(BOX, inside)
    # 3 (1 - sigmoid(8)) = 1e-3: the logit loses at most 4 of 16 digits
    assert to_unbounded(BOX, inside)[key].item() == pytest.approx(x, abs=1e-9)


def test_unbounded_map_refuses_the_bound_itself() -> None:
    with pytest.raises(ValueError, match=r"'both' = -1.0 is not strictly inside \(-1.0, 2.0\)"):
        to_unbounded(BOX, {"both": scalar(-1.0)})
    with pytest.raises(ValueError, match="project it inside first"):
        to_unbounded(BOX, {"above": scalar(math.nan)})


def test_default_params_are_fresh_tensors() -> None:
    matrix = torch.eye(2, dtype=torch.float64)
    box = Box(default={"gain": 0.1, "matrix": matrix})
    theta = default_params(box)
    assert theta["gain"].item() == 0.1  # float64 all the way
    theta["matrix"].zero_()
    assert torch.equal(matrix, torch.eye(2, dtype=torch.float64))
    assert default_params(box, dtype=torch.float32)["gain"].dtype == torch.float32


@pytest.mark.parametrize(
    ("low", "high", "default", "message"),
    [
        ({"x": 1.0}, {"x": 1.0}, {}, "low = 1.0 must be below high = 1.0"),
        ({"x": math.nan}, {}, {}, "'x' is NaN"),
        ({}, {}, {"x": math.nan}, "'x' is NaN"),
        ({}, {}, {"x": torch.tensor([0.0, math.nan])}, "'x' is NaN"),
    ],
)
def test_bad_boxes_are_refused(low, high, default, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(low=low, high=high, default=default)


# Policies ------------------------------------------------------------------------------------------------------------


def test_linear_policy_density_matches_torch_and_per_environment_gains() -> None:
    policy = linear_policy(2, std=0.3)
    nu = {"gain": torch.randn(2, 3, generator=seeded(0), dtype=torch.float64), "offset": values(0.1, -0.2)}
    state = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    e = torch.randn(5, 2, generator=seeded(2), dtype=torch.float64)
    mean = nu["offset"] - state @ nu["gain"].T
    action = policy.act(nu, state, e)
    torch.testing.assert_close(action, mean + 0.3 * e, **EXACT)
    normal = torch.distributions.Normal(mean, 0.3)
    torch.testing.assert_close(policy.log_prob(nu, state, action), normal.log_prob(action).sum(-1), **EXACT)
    each = {"gain": nu["gain"].expand(5, 2, 3), "offset": nu["offset"]}
    torch.testing.assert_close(policy.act(each, state, e), action, **EXACT)
    plain = linear_policy(2)
    torch.testing.assert_close(plain.act({"gain": nu["gain"]}, state, e[:, :0]), -state @ nu["gain"].T, **EXACT)


def test_module_policies() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    nu, state = dict(net.named_parameters()), torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(module_policy(net).act(nu, state, state[:, :0]), net(state), **EXACT)
    policy = gaussian_policy(net)
    assert policy.noise_dim == 2
    mean, log_std = net(state).chunk(2, -1)
    e = torch.randn(5, 2, generator=seeded(2), dtype=torch.float64)
    action = policy.act(nu, state, e)
    torch.testing.assert_close(action, mean + log_std.exp() * e, **EXACT)
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(policy.log_prob(nu, state, action), normal.log_prob(action).sum(-1), **EXACT)


def test_boltzmann_policy_samples_its_own_distribution() -> None:
    """Frequencies of 100 000 draws within five binomial standard errors: a false alarm below 1e-5 over 3 actions."""
    policy = boltzmann_policy(lambda nu, state: state @ nu["q"], temperature=0.5)
    nu = {"q": values(1.0, 0.2, -0.5).reshape(1, 3)}
    count = 100_000
    state = torch.ones(count, 1, dtype=torch.float64)
    action = policy.act(nu, state, torch.randn(count, 1, generator=seeded(0), dtype=torch.float64))
    probability = torch.softmax(nu["q"][0] / 0.5, -1)
    frequency = torch.bincount(action.long()[:, 0], minlength=3) / count
    assert bool(((frequency - probability).abs() < 5 * (probability * (1 - probability) / count).sqrt()).all())
    torch.testing.assert_close(policy.log_prob(nu, state, action), probability.log()[action.long()[:, 0]], **EXACT)
    score = grad(lambda nu: policy.act(nu, state[:2], state[:2]).sum())(nu)
    assert float(score["q"].abs().max()) == 0.0  # the index carries no derivative


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear_policy(1, std=-1.0), "std must be >= 0"),
        (lambda: linear_policy(1, std=float("nan")), "std must be >= 0"),
        (lambda: gaussian_policy(nn.Linear(2, 3)), "the module returns 3 numbers"),
        (lambda: gaussian_policy(nn.Tanh()), "no nn.Linear layer"),
        (lambda: boltzmann_policy(lambda nu, s: s, temperature=0.0), "temperature must be > 0"),
        (lambda: linear_policy(1).log_prob({}, scalar(0.0), scalar(0.0)), "has no log_prob"),
    ],
)
def test_wrong_policies_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# Noise and rollouts --------------------------------------------------------------------------------------------------


def counter(terminal: bool = False, exogenous_dim: int = 0) -> ModelMDP:
    """s' = s + a + theta drift (+ the exogenous input), reward s; s_0 = e_0; terminal from 2.5 on."""

    def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
        return s + a + theta["drift"] + e[..., 1:].sum(-1, keepdim=True)

    return ModelMDP(
        initial_state=lambda theta, e0: e0,
        step=step,
        reward=lambda theta, s, a, e, following: s[:, 0],
        noise_dims=(1, 1 + exogenous_dim),
        dt=0.1,
        discount=0.5,
        terminal=(lambda theta, s: s[:, 0] >= 2.5) if terminal else None,
        exogenous_dim=exogenous_dim,
        names={"exogenous": ("rain",)} if exogenous_dim else {},
    )


STILL = deterministic_policy(lambda nu, state: nu["push"] * torch.ones_like(state))


def test_rollout_by_hand() -> None:
    noise = Noise(values(0.0, 1.0).reshape(2, 1), torch.zeros(2, 3, 1), torch.zeros(2, 3, 0))
    theta, nu = {"drift": values(1.0, 2.0).reshape(2, 1)}, {"push": scalar(0.5)}
    run = rollout(counter(), STILL, theta, nu, noise)
    assert run.states[..., 0].tolist() == [[0.0, 1.5, 3.0, 4.5], [1.0, 3.5, 6.0, 8.5]]
    assert run.rewards.tolist() == [[0.0, 1.5, 3.0], [1.0, 3.5, 6.0]]
    assert run.actions.shape == (2, 3, 1)
    assert bool(run.mask.all())
    assert discounted_return(run.rewards, 0.5).tolist() == [1.5, 4.25]
    assert expected_return(counter(), STILL, theta, nu, noise).item() == (1.5 + 4.25) / 2


def test_rollout_holds_and_masks_after_the_terminal_state() -> None:
    noise = Noise(values(0.0, 2.5).reshape(2, 1), torch.zeros(2, 4, 1), torch.zeros(2, 4, 0))
    theta, nu = {"drift": scalar(1.0)}, {"push": scalar(0.5)}
    run = rollout(counter(terminal=True), STILL, theta, nu, noise)
    assert run.states[..., 0].tolist() == [[0.0, 1.5, 3.0, 3.0, 3.0], [2.5, 2.5, 2.5, 2.5, 2.5]]
    assert run.mask.tolist() == [[True, True, False, False], [False] * 4]
    assert run.rewards.tolist() == [[0.0, 1.5, 0.0, 0.0], [0.0] * 4]
    slope = grad(lambda th: expected_return(counter(terminal=True), STILL, th, nu, noise))(theta)
    assert slope["drift"].item() == 0.5 * 1.0 / 2  # only the second reward of the first run depends on the drift


def test_noise_is_drawn_once_and_carries_the_exogenous_columns_last() -> None:
    mdp, policy = counter(exogenous_dim=1), linear_policy(1, std=1.0)
    rain = torch.arange(3.0, dtype=torch.float64).reshape(3, 1)
    noise = sample_noise(mdp, policy, 2, 3, seeded(0), exogenous=rain)
    assert (noise.initial.shape, noise.process.shape, noise.policy.shape) == ((2, 1), (2, 3, 2), (2, 3, 1))
    assert noise.process[1, :, 1].tolist() == [0.0, 1.0, 2.0]
    again = sample_noise(mdp, policy, 2, 3, seeded(0), exogenous=rain.expand(2, 3, 1))
    assert all(torch.equal(getattr(noise, f.name), getattr(again, f.name)) for f in dataclasses.fields(Noise))
    assert sample_noise(counter(), policy, 2, 3, dtype=torch.float32).process.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0, "horizon": 3}, "batch and horizon must be at least 1"),
        ({"batch": 2, "horizon": 0}, "batch and horizon must be at least 1"),
        ({"batch": 2, "horizon": 3}, r"measured inputs \('rain',\): pass exogenous of shape \(2, 3, 1\), got none"),
        ({"batch": 2, "horizon": 3, "exogenous": torch.zeros(4, 1)}, r"got \(4, 1\)"),
    ],
)
def test_wrong_noise_requests_are_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_noise(counter(exogenous_dim=1), STILL, **options)
    with pytest.raises(ValueError, match="declares exogenous_dim = 0"):
        sample_noise(counter(), STILL, 1, 1, exogenous=torch.zeros(1, 1))
