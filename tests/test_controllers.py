"""Controllers as policies: closed forms of the loops they close, state augmentation, and a published plan."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from problems import CASES, scalar, seeded, shared
from torch import Tensor
from torch.func import grad, jvp, vmap

from sim2real import (
    Noise,
    append_clock,
    append_integral,
    default_params,
    deterministic_policy,
    exploring_policy,
    gain_schedule_policy,
    linear_policy,
    lqr_policy,
    operational_space_policy,
    pid_policy,
    rollout,
    sample_noise,
    with_clock,
    with_integral,
)
from sim2real.simulators import (
    base_parameters,
    building_rc,
    cartpole,
    double_pendulum,
    linear_gaussian,
    pendulum,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""the same few float64 operations in another order"""


def stack(*values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quiet(start: Tensor, horizon: int, columns: int = 0) -> Noise:
    """Given start noise, no process and no policy noise."""
    batch = start.shape[0]
    zeros = torch.zeros(batch, horizon, columns, dtype=torch.float64)
    return Noise(start, zeros, torch.zeros(batch, horizon, 0, dtype=torch.float64))


def test_lqr_policy_settles_at_its_goal() -> None:
    A, B = stack([1.0, 0.1], [0.0, 1.0]), stack([0.0], [0.1])
    policy = lqr_policy(goal_state=stack(2.0, 0.0), goal_action=stack(0.0))
    nu = {"gain": stack([4.0, 4.0])}
    run = rollout(linear_gaussian(A, B), policy, {"A": A, "B": B}, nu, quiet(stack([0.0, 0.0]), 200))
    # double pole at exp(-2 * 0.1): after 200 steps the deviation is below 1e-14 of the start
    torch.testing.assert_close(run.states[0, -1], stack(2.0, 0.0), rtol=0.0, atol=1e-12)
    closed = torch.linalg.matrix_power(A - B @ nu["gain"], 50) @ stack(-2.0, 0.0) + stack(2.0, 0.0)
    torch.testing.assert_close(run.states[0, 50], closed, **EXACT)


def test_pid_without_integral_leaves_the_known_offset_and_with_it_none() -> None:
    """A pendulum held at angle g: kp (g - q) = mgl sin q at rest without "ki", q = g with it."""
    goal, theta = 0.8, default_params(pendulum().box)
    error = lambda state: goal - state[..., :1]
    policy = pid_policy(error, rate=lambda state: -state[..., 1:2])
    nu = {"kp": stack(20.0), "kd": stack(4.0)}
    run = rollout(pendulum(dt=0.01), policy, theta, nu, quiet(stack([0.0, 0.0]), 1000))
    rest = run.states[0, -1, 0]
    torch.testing.assert_close(20.0 * (goal - rest), theta["mgl"] * torch.sin(rest), rtol=1e-9, atol=0.0)
    assert float(goal - rest) > 0.05
    memory = with_integral(pendulum(dt=0.01), error, 1, unit="rad s")
    run = rollout(memory, policy, theta, nu | {"ki": stack(30.0)}, quiet(stack([0.0, 0.0]), 2000))
    # slowest closed-loop pole near -2 1/s: exp(-40) after 20 s
    torch.testing.assert_close(run.states[0, -1, :2], stack(goal, 0.0), rtol=0.0, atol=1e-10)
    feedforward = pid_policy(
        error, rate=lambda state: -state[..., 1:2], feedforward=lambda state: theta["mgl"] * torch.sin(state[..., :1])
    )
    run = rollout(pendulum(dt=0.01), feedforward, theta, nu, quiet(stack([0.0, 0.0]), 1000))
    torch.testing.assert_close(run.states[0, -1], stack(goal, 0.0), rtol=0.0, atol=1e-9)
    assert (memory.names["state"], memory.units["integral1"]) == (("angle", "velocity", "integral1"), "rad s")


def arm_maps(theta: dict[str, Tensor], reach: float):
    """Tip position of a two-link arm, its jacobian, inertia and bias torque, and the drift dJ/dt w, all batched."""
    base, l1, g = base_parameters(theta), theta["l1"], theta["g"]
    rows = lambda *entries: torch.stack([torch.stack(row, -1) for row in entries], -2)

    def position(s: Tensor) -> Tensor:
        q1, total = s[:, 0], s[:, 0] + s[:, 1]
        x, y = l1 * torch.sin(q1) + reach * torch.sin(total), -l1 * torch.cos(q1) - reach * torch.cos(total)
        return torch.stack([x, y], -1)

    def jacobian(s: Tensor) -> Tensor:
        q1, total = s[:, 0], s[:, 0] + s[:, 1]
        dx, dy = reach * torch.cos(total), reach * torch.sin(total)
        return rows([l1 * torch.cos(q1) + dx, dx], [l1 * torch.sin(q1) + dy, dy])

    def drift(s: Tensor) -> Tensor:
        q1, total, w1, turn = s[:, 0], s[:, 0] + s[:, 1], s[:, 2], s[:, 2] + s[:, 3]
        x = -l1 * torch.sin(q1) * w1**2 - reach * torch.sin(total) * turn**2
        return torch.stack([x, l1 * torch.cos(q1) * w1**2 + reach * torch.cos(total) * turn**2], -1)

    def mass(s: Tensor) -> Tensor:
        coupling = l1 * base["h"] * torch.cos(s[:, 1])
        off = base["B"] + coupling
        return rows([base["A"] + 2 * coupling, off], [off, base["C"].expand_as(off)])

    def bias(s: Tensor) -> Tensor:
        q1, q2, w1, w2 = s.unbind(-1)
        spin, fall = l1 * base["h"] * torch.sin(q2), g * base["h"] * torch.sin(q1 + q2)
        force1 = -spin * w2 * (2 * w1 + w2) + g * base["mu"] * torch.sin(q1) + fall
        force = torch.stack([force1, spin * w1**2 + fall], -1)
        return force + torch.stack([theta["b1"], theta["b2"]]) * s[:, 2:]

    return position, jacobian, mass, bias, drift


def test_operational_space_control_makes_the_tip_a_damped_mass() -> None:
    """x'' = kp (goal - x) - kd x', so after 0.25 s the tip is where that linear equation says."""
    mdp = double_pendulum(parameters="physical", dt=1e-3, integrator="midpoint", initial_std=1.0)
    theta = default_params(mdp.box) | {"b2": scalar(0.01), "cf1": scalar(0.0), "cf2": scalar(0.0)}
    position, jacobian, mass, bias, drift = arm_maps(theta, reach=0.2)
    policy = operational_space_policy(position, jacobian, mass, bias, drift=drift)
    goal, kp, kd = stack(0.25, -0.2), 40.0, 8.0
    nu = {"goal": goal, "kp": stack(kp, kp), "kd": stack(kd, kd)}
    with torch.no_grad():
        run = rollout(mdp, policy, theta, nu, quiet(stack([0.3, 0.9, 0.0, 0.0]), 250))
    start, tip = position(run.states[0, :1])[0], position(run.states[0, -1:])[0]
    frequency, decay = math.sqrt(kp - kd**2 / 4), math.exp(-kd / 2 * 0.25)
    shape = decay * (math.cos(frequency * 0.25) + kd / 2 / frequency * math.sin(frequency * 0.25))
    # the torque is held for 1 ms: an error of about dt * kd / 2 = 4e-3 of the way, 0.25 m
    torch.testing.assert_close(tip, goal + (start - goal) * shape, rtol=0.0, atol=1e-3)
    state = torch.randn(4, 4, generator=seeded(0), dtype=torch.float64)
    torque = policy.act(nu, state, state[:, :0])
    rate = jvp(jacobian, (state,), (torch.cat([state[:, 2:], torch.zeros_like(state[:, 2:])], -1),))[1]
    torch.testing.assert_close((rate @ state[:, 2:].unsqueeze(-1)).squeeze(-1), drift(state), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jvp(position, (state,), (torch.eye(4).double()[[0] * 4],))[1], jacobian(state)[:, :, 0])
    J, joint = jacobian(state), torch.linalg.solve(mass(state), (torque - bias(state)).unsqueeze(-1))
    found = (J @ joint).squeeze(-1) + drift(state)
    wanted = kp * (goal - position(state)) - kd * (J @ state[:, 2:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    plain = operational_space_policy(position, jacobian, mass, bias)
    still = torch.cat([state[:, :2], torch.zeros_like(state[:, 2:])], -1)  # at rest there is no drift
    torch.testing.assert_close(
        plain.act(nu, still, still[:, :0]), policy.act(nu, still, still[:, :0]), rtol=1e-10, atol=1e-10
    )


def test_gain_schedule_interpolates_and_holds_its_ends() -> None:
    times = stack(0.0, 0.1, 0.4, 1.0)
    generator = seeded(0)
    nu = {
        "gain": torch.randn(4, 1, 2, generator=generator, dtype=torch.float64),
        "state": torch.randn(4, 2, generator=generator, dtype=torch.float64),
        "action": torch.randn(4, 1, generator=generator, dtype=torch.float64),
    }
    policy = gain_schedule_policy(times)
    clock = stack(-1.0, 0.0, 0.05, 0.1, 0.3, 0.99, 1.0, 7.0)
    state = torch.cat([torch.randn(8, 2, generator=generator, dtype=torch.float64), clock.unsqueeze(-1)], -1)
    at = lambda knots: np.interp(clock.numpy(), times.numpy(), knots.numpy())
    expected = at(nu["action"][:, 0])
    for j in range(2):
        expected = expected - at(nu["gain"][:, 0, j]) * (state[:, j].numpy() - at(nu["state"][:, j]))
    np.testing.assert_allclose(policy.act(nu, state, state[:, :0])[:, 0].numpy(), expected, rtol=1e-12)
    each = vmap(lambda s: policy.act(nu, s.unsqueeze(0), s.new_zeros(1, 0))[0])(state)
    torch.testing.assert_close(each, policy.act(nu, state, state[:, :0]), **EXACT)
    slope = grad(lambda s: policy.act(nu, s, s[:, :0]).sum())(state)
    assert bool(slope.isfinite().all())
    assert slope[[0, 7], 2].tolist() == [0.0, 0.0]  # held ends do not depend on time


def test_published_gains_follow_the_published_plan() -> None:
    """The plan's iLQR gains act as u + K (x - x_ref): with them the model stays near the plan, without it does not."""
    text = shared("data/double_pendulum/published/design_A_model_2.0.yml").read_text()
    plan = np.genfromtxt(shared("data/double_pendulum/design_A/plan_pendubot.csv"), delimiter=",", names=True)
    physical = {key: scalar(float(value)) for key, value in (line.split(":") for line in text.split("\n") if line)}
    theta = base_parameters(physical | {"torque_offset1": scalar(0.0), "torque_offset2": scalar(0.0)})
    columns = lambda *names: torch.as_tensor(np.stack([plan[name] for name in names], 1))
    gain = torch.stack([columns("K11", "K12", "K13", "K14"), columns("K21", "K22", "K23", "K24")], 1)
    policy = gain_schedule_policy(torch.as_tensor(plan["time"].copy()))
    nu = {"state": columns("pos1", "pos2", "vel1", "vel2"), "action": columns("tau1", "tau2")}
    mdp = with_clock(double_pendulum(dt=0.004, integrator="midpoint"))
    error = {}
    for sign in (0.0, -1.0):
        with torch.no_grad():
            run = rollout(mdp, policy, theta, nu | {"gain": sign * gain}, quiet(stack([0.0] * 4), 1000))
        error[sign] = float((run.states[0, -1, :2] - nu["state"][4000, :2]).abs().max())
    assert error[-1.0] < 0.3 * error[0.0]  # 0.17 against 0.90 rad after 4 s


def test_memory_columns_match_those_appended_to_a_recorded_run() -> None:
    case = CASES["cart-pole midpoint"]
    error = lambda state: torch.stack([1.0 - state[..., 0], state[..., 1] ** 2], -1)
    policy = deterministic_policy(lambda nu, state: -(state[..., :4] @ nu["gain"]).unsqueeze(-1))
    nu, noise = {"gain": stack(-1.0, -20.0, -2.0, -3.0)}, quiet(torch.randn(3, 4, generator=seeded(0)).double(), 8)
    plain = rollout(case.mdp, policy, case.theta, nu, noise)
    timed = rollout(with_clock(case.mdp), policy, case.theta, nu, noise)
    kept = rollout(with_integral(case.mdp, error, 2), policy, case.theta, nu, noise)
    torch.testing.assert_close(timed.states, append_clock(plain, case.mdp.dt).states, **EXACT)
    torch.testing.assert_close(kept.states, append_integral(plain, error, case.mdp.dt).states, **EXACT)
    torch.testing.assert_close(timed.rewards, plain.rewards, **EXACT)
    assert timed.states[0, :, 4].tolist() == pytest.approx([0.02 * k for k in range(9)])


def test_augmentation_passes_the_rest_of_the_model_through() -> None:
    house = with_clock(building_rc(2))
    theta = default_params(house.box)
    state = stack([20.0, 18.0, 7200.0])
    assert house.observe is not None
    assert house.observe(theta, state).tolist() == [[20.0]]
    assert house.open_loop is None
    assert house.names == {**building_rc(2).names, "state": ("Ti", "Te", "time")}
    assert house.units["time"] == "s"
    case = CASES["linear Gaussian"]
    timed = with_clock(case.mdp)
    inner, action = torch.randn(2, 3, generator=seeded(0)).double(), torch.ones(2, 2, dtype=torch.float64)
    assert timed.log_prob is not None
    assert case.mdp.log_prob is not None
    outer = torch.cat([inner, torch.ones(2, 1, dtype=torch.float64)], -1)
    torch.testing.assert_close(
        timed.log_prob(case.theta, outer, action, outer), case.mdp.log_prob(case.theta, inner, action, inner)
    )
    assert timed.observe is not None
    assert torch.equal(timed.observe(case.theta, outer), inner)
    limited = with_clock(cartpole(angle_limit=0.2))
    assert limited.terminal is not None
    assert limited.terminal({}, stack([0.0, 0.3, 0.0, 0.0, 9.0], [0.0, 0.1, 0.0, 0.0, 9.0])).tolist() == [True, False]
    both = with_integral(with_clock(pendulum()), lambda state: state[..., :1], 1)
    assert both.names["state"] == ("angle", "velocity", "time", "integral1")


def test_exploring_policy_is_its_mean_with_a_density() -> None:
    policy = exploring_policy(lqr_policy(stack(0.5, 0.0), stack(0.1)), std=stack(0.4))
    nu = {"gain": stack([1.0, 2.0])}
    state = torch.randn(6, 2, generator=seeded(0), dtype=torch.float64)
    e = torch.randn(6, 1, generator=seeded(1), dtype=torch.float64)
    mean = 0.1 - (state - stack(0.5, 0.0)) @ stack([1.0], [2.0])
    action = policy.act(nu, state, e)
    torch.testing.assert_close(action, mean + 0.4 * e, **EXACT)
    normal = torch.distributions.Normal(mean[:, 0], 0.4)
    torch.testing.assert_close(policy.log_prob(nu, state, action), normal.log_prob(action[:, 0]), **EXACT)
    noise = sample_noise(pendulum(), policy, 2, 3, seeded(0))
    assert dataclasses.astuple(noise)[2].shape == (2, 3, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gain_schedule_policy(stack(0.0)), "at least two increasing knots"),
        (lambda: gain_schedule_policy(stack(0.0, 1.0, 1.0)), "at least two increasing knots"),
        (lambda: exploring_policy(linear_policy(1, std=1.0), stack(1.0)), "already draws 1 noise columns"),
        (lambda: exploring_policy(linear_policy(1), stack(0.0)), "std must be"),
        (lambda: exploring_policy(linear_policy(1), scalar(1.0)), "std must be"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
