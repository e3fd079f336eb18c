"""Batched inversion: hidden inputs are found again, limits are flagged, derivatives agree with independent ones."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev

from sim2real.params import Params
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.pendulum import pendulum
from sim2real.simulators.reacher import reacher as reacher_model
from sim2real.simulators.reacher import reacher_step
from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.box_qp import box_qp
from sim2real.solvers.inversion import invert
from sim2real.solvers.inversion_descent import invert_adam, invert_cem
from sim2real.solvers.inversion_lqr import feedback_law
from sim2real.solvers.inversion_maps import (
    feedback_lower,
    operational_space_torques,
    pid_lower,
    rotation,
    transition_map,
)
from sim2real.solvers.inversion_smoothing import block_tridiagonal_solve, invert_jointly

T = 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(theta: Params, rows: Params, u: Tensor) -> Tensor:
    """A smooth map `[N, 2] -> [N, 2]`, one to one."""
    return u * theta["k"] + 0.3 * torch.sin(u.flip(-1) + rows["s"])


def longer(theta: Params, rows: Params, u: Tensor) -> Tensor:
    """The same with a third outcome: overdetermined."""
    return torch.cat([curved(theta, rows, u), 0.5 * (u * u).sum(-1, keepdim=True)], -1)


def curved_data(count: int) -> tuple[Params, Params, Tensor]:
    return {"k": torch.tensor(1.3, dtype=torch.float64)}, {"s": draw(1, count, 2)}, draw(2, count, 2)


def reacher_data(count: int, far: float) -> tuple[Params, Params, Tensor]:
    """Parameters, rows with the gains of the linearisation, goals."""
    box = reacher_model().box.default
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in box.items()}
    state = draw(3, count, 4) * torch.tensor([1.5, 1.0, 2.0, 2.0], dtype=torch.float64)
    still = torch.zeros(count, 2, dtype=torch.float64)
    A = torch.vmap(jacfwd(partial(reacher_step, theta)))(state, still)
    B = torch.vmap(jacfwd(partial(reacher_step, theta), argnums=1))(state, still)
    cost = torch.diag(torch.tensor([10.0, 10.0, 1.0, 1.0], dtype=torch.float64))
    law = feedback_law(A, B, cost, 0.1 * torch.eye(2, dtype=torch.float64), T)
    return theta, {"state": state, "gain": torch.stack(law.state_gain, 1)}, state + far * draw(4, count, 4)


def limited(outcome: str = "state"):  # type: ignore[no-untyped-def]
    step = lambda theta, state, action, e: reacher_step(theta, state, action)
    return transition_map(step, feedback_lower(), T, low=-1.0, high=1.0, outcome=outcome)  # type: ignore[arg-type]


def test_goals_of_the_torque_limited_reacher_are_found_and_hidden_ones_flagged() -> None:
    theta, rows, goal = reacher_data(40, 0.7)
    rows = {key: value.clone() for key, value in rows.items()}
    goal[:3] = rows["state"][:3] + 40.0  # every torque of the segment at its limit
    outcome = limited()(theta, rows, goal)
    hidden = (limited("actions")(theta, rows, goal).abs() >= 1.0).all(-1)
    assert int(hidden.sum()) >= 2
    found = invert(limited(), theta, rows, outcome, rows["state"], differentiable=False)
    assert bool(found.saturated[hidden].all())
    assert bool(found.u[found.saturated].isnan().all())
    assert float((found.residual[~hidden] <= 1e-8).double().mean()) >= 0.95
    known = ~found.saturated & (found.residual <= 1e-8)
    assert bool(found.converged[known].all())
    # u itself, to the accuracy that a condition of up to 1e6 leaves of a residual of 1e-11
    near = (found.u - goal)[known].norm(dim=-1) < 1e-4
    assert float(near.double().mean()) > 0.85
    again = limited()(theta, rows, torch.where(known.unsqueeze(-1), found.u, goal))
    torch.testing.assert_close(again, outcome, atol=1e-8, rtol=0)


def test_pid_goals_and_actions_as_outcome() -> None:
    mdp = pendulum()
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in mdp.box.default.items()}
    theta |= {"kp": torch.tensor(3.0, dtype=torch.float64), "kd": torch.tensor(0.5, dtype=torch.float64)}
    lower = pid_lower(slice(0, 1), slice(1, 2))
    rows, goal = {"state": draw(5, 8, 2)}, draw(6, 8, 1)
    for kind in ("state", "states", "actions"):
        predict = transition_map(mdp.step, lower, 3, outcome=kind)  # type: ignore[arg-type]
        found = invert(predict, theta, rows, predict(theta, rows, goal), 0 * goal, differentiable=False)
        torch.testing.assert_close(found.u, goal, atol=1e-8, rtol=0)


def test_bounds_weights_and_prior_agree_with_scipy() -> None:
    theta, rows, _ = curved_data(4)
    outcome, start, prior = 1.5 * draw(7, 4, 3), 0 * draw(2, 4, 2), 0.3 * draw(8, 4, 2)
    root = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
    ridge = torch.tensor([0.2, 0.4], dtype=torch.float64)
    found = invert(
        longer, theta, rows, outcome, start,
        precision=root @ root.mT, prior=prior, prior_precision=ridge, low=-0.6, high=0.5, differentiable=False,
    )  # fmt: skip
    for i in range(4):
        one = {"s": rows["s"][i : i + 1]}

        def r(x: np.ndarray, i: int = i, one: Params = one) -> np.ndarray:
            u = torch.from_numpy(x).unsqueeze(0)
            data = (longer(theta, one, u)[0] - outcome[i]) @ root
            return torch.cat([data, ridge.sqrt() * (u[0] - prior[i])]).numpy()

        best = scipy.optimize.least_squares(r, start[i].numpy(), bounds=(-0.6, 0.5), xtol=1e-15, ftol=1e-15, gtol=1e-14)
        # scipy stops where the cost no longer changes: half of the digits of x
        np.testing.assert_allclose(found.u[i].numpy(), best.x, atol=2e-6)
    assert bool((found.u == 0.5).any() | (found.u == -0.6).any())
    assert bool(found.converged.all())


REACHER = """
<mujoco>
  <option timestep="0.02"><flag contact="disable"/></option>
  <default><joint type="hinge" axis="0 0 1" damping="0.01"/><motor gear="0.05"/></default>
  <worldbody>
    <body>
      <geom type="capsule" fromto="0 0 0 0.12 0 0" size="0.01"/><joint name="shoulder"/>
      <body pos="0.12 0 0">
        <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01"/><joint name="wrist"/>
        <body pos="0.12 0 0"><geom type="sphere" size="0.01"/></body>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
</mujoco>
"""


def test_actions_of_a_mujoco_model_are_found_and_differentiated() -> None:
    box = reacher_model().box.default
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in box.items()}
    model = mujoco_model(REACHER, (), lambda theta, s, a, e, following: s[:, 0])
    state, action = draw(30, 3, 4), draw(31, 3, 2)
    lower = lambda theta, rows, u, state, t: u
    ours = transition_map(lambda theta, s, a, e: reacher_step(theta, s, a), lower, 2)
    theirs = transition_map(model.step, lower, 2)
    outcome = ours(theta, {"state": state}, action)
    start = torch.zeros_like(action)
    slopes = []
    for predict, parameters in ((ours, theta), (theirs, {})):
        y = outcome.clone().requires_grad_()
        found = invert(predict, parameters, {"state": state}, y, start, curvature="gauss_newton")
        torch.testing.assert_close(found.u, action, atol=1e-9, rtol=0)
        slopes.append(torch.autograd.grad((found.u * draw(32, 3, 2)).sum(), y)[0])
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-7, rtol=1e-7)


def test_goals_of_an_implicit_lower_level_are_found() -> None:
    """The action is the minimiser of `a'H a / 2 - u'a` within its limits, a box QP for each row."""
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    lower = lambda theta, rows, u, state, t: box_qp(theta["H"], -u, -1.0, 1.0).x
    predict = transition_map(lambda theta, s, a, e: 0.9 * s + torch.sin(a), lower, 1)
    rows, goal = {"state": draw(35, 12, 2)}, draw(36, 12, 2)
    outcome = predict({"H": H}, rows, goal)
    action = box_qp(H, -goal, -1.0, 1.0)
    y = outcome.clone().requires_grad_()
    found = invert(predict, {"H": H}, rows, y, torch.zeros_like(goal))
    free = (action.active == 0).all(-1)
    assert 2 <= int(free.sum()) <= 10
    assert not bool(found.saturated[free].any())
    # an answer exactly at the edge of its set has full rank on one side
    assert float(found.saturated[~free].double().mean()) > 0.5
    torch.testing.assert_close(found.u[free], goal[free], atol=1e-9, rtol=0)
    assert float(found.residual.max().detach()) < 1e-9
    (slope,) = torch.autograd.grad(found.u[free].sum(), y)
    # u = H asin(y - 0.9 s)
    torch.testing.assert_close(slope[free], H.sum(0) / torch.cos(action.x[free]), atol=1e-9, rtol=1e-9)


def test_actions_of_a_warp_model_are_found() -> None:
    pytest.importorskip("warp")
    from sim2real.simulators.warp_pendulum import warp_pendulum

    twin, model = pendulum(), warp_pendulum()
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in twin.box.default.items()}
    state, action = draw(33, 4, 2), 0.5 * draw(34, 4, 1)
    lower = lambda theta, rows, u, state, t: u
    outcome = transition_map(twin.step, lower, 2)(theta, {"state": state}, action)
    predict = transition_map(model.step, lower, 2)
    found = invert(predict, theta, {"state": state}, outcome, torch.zeros_like(action), differentiable=False)
    torch.testing.assert_close(found.u, action, atol=1e-8, rtol=0)


@pytest.mark.parametrize("width", [2, 3])
def test_derivatives_by_the_implicit_function_theorem(width: int) -> None:
    theta, rows, goal = curved_data(2)
    predict = curved if width == 2 else longer
    outcome = predict(theta, rows, goal) + (0.0 if width == 2 else 0.02) * draw(9, 2, width)

    def u(k: Tensor, s: Tensor, y: Tensor) -> Tensor:
        return invert(predict, {"k": k}, {"s": s}, y, torch.zeros_like(goal), high=0.3).u

    inputs = [x.clone().requires_grad_() for x in (theta["k"], rows["s"], outcome)]
    assert bool((u(*inputs) == 0.3).any())
    # differences of step 1e-6 of a solution exact to 1e-12: an error of 1e-6
    assert torch.autograd.gradcheck(u, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)
    forward, backward = (jac(u, argnums=(0, 2))(*inputs) for jac in (jacfwd, jacrev))
    for a, b in zip(forward, backward, strict=True):
        torch.testing.assert_close(a, b)
    slope = lambda k: jacrev(lambda x: u(x, inputs[1], outcome).sum())(k)
    second = jacrev(slope)(theta["k"])
    h = 1e-4  # h^2 of the third derivative, 1e-7
    difference = (slope(theta["k"] + h) - slope(theta["k"] - h)) / (2 * h)
    torch.testing.assert_close(second, difference, rtol=1e-4, atol=1e-5)


def test_the_gauss_newton_derivative_is_exact_where_the_outcome_is_met() -> None:
    theta, rows, goal = curved_data(3)
    outcome = longer(theta, rows, goal)
    start = torch.zeros_like(goal)
    found = [
        jacrev(lambda y, c=c: invert(longer, theta, rows, y, start, curvature=c).u)(outcome)  # type: ignore[misc]
        for c in ("full", "gauss_newton")
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-8)


def test_hidden_rows_get_no_derivative() -> None:
    predict = lambda theta, rows, u: (theta["k"] * u).clamp(-1.0, 1.0)
    outcome = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = invert(predict, {"k": k}, {}, outcome, torch.tensor([[0.1], [5.0]], dtype=torch.float64))
    assert found.saturated.tolist() == [False, True]
    assert found.rank.tolist() == [1, 0]
    found.u[~found.saturated].sum().backward()
    assert k.grad is not None
    torch.testing.assert_close(k.grad, torch.tensor(-0.125, dtype=torch.float64))  # u = y / k


def test_adam_and_cem_take_the_same_arguments() -> None:
    theta, rows, goal = curved_data(5)
    outcome, start = curved(theta, rows, goal), torch.zeros_like(goal)
    adam = invert_adam(curved, theta, rows, outcome, start, max_steps=1500, rate=0.05, tolerance=1e-6)
    assert bool(adam.converged.all())
    torch.testing.assert_close(adam.u, goal, atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    cem = invert_cem(curved, theta, rows, outcome, start, tolerance=1e-4, generator=generator, spread=1.5)
    torch.testing.assert_close(cem.u, goal, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="elite must lie"):
        invert_cem(curved, theta, rows, outcome, start, elite=1)


def poses(count: int) -> tuple[Params, Params, Tensor]:
    """Synthetic arm states: random maps, five runs; goals within 90 degrees."""
    theta = {"kp": torch.full((6,), 150.0, dtype=torch.float64), "zeta": torch.ones(6, dtype=torch.float64)}
    drift = 0.01 * draw(13, count, T, 3).cumsum(1)
    rows = {
        "position_map": draw(10, count, T, 7, 3),
        "rotation_map": 0.3 * draw(11, count, T, 7, 3),
        "position": drift,
        "velocity": 0.1 * draw(12, count, T, 6),
        "axes": rotation(drift + draw(14, count, 1, 3)),
        "bias": draw(15, count, T, 7),
    }
    return theta, rows, torch.cat([0.1 * draw(16, count, 3), 0.3 * draw(17, count, 3)], -1)


@pytest.mark.parametrize("limit", [math.inf, 40.0])
def test_operational_space_goals_are_found_from_torques(limit: float) -> None:
    theta, rows, goal = poses(20)
    predict = operational_space_torques(limit=limit)
    torque = predict(theta, rows, goal)
    found = invert(predict, theta, rows, torque, torch.zeros_like(goal), differentiable=False)
    assert found.rank.tolist() == [6] * 20
    torch.testing.assert_close(found.u, goal, atol=1e-8, rtol=0)
    assert bool((torque.abs() == limit).any()) == math.isfinite(limit)


def test_rotations_are_exact() -> None:
    vector = torch.cat([draw(18, 3, 3), 1e-5 * draw(19, 1, 3), torch.zeros(1, 3, dtype=torch.float64)])
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    torch.testing.assert_close(rotation(vector), torch.linalg.matrix_exp(skew), atol=1e-13, rtol=0)


def test_joint_inversion_agrees_with_one_large_problem_and_is_differentiable() -> None:
    theta, length = {"k": torch.tensor(1.3, dtype=torch.float64, requires_grad=True)}, 4
    rows, outcome = {"s": draw(20, 2, length, 2)}, draw(21, 2, length, 3)
    D, start = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64), torch.zeros(2, length, 2).double()
    found = invert_jointly(longer, theta, rows, outcome, start, D)
    root = torch.linalg.cholesky(D)
    for e in range(2):

        def r(x: np.ndarray, e: int = e) -> np.ndarray:
            u = torch.from_numpy(x).reshape(length, 2)
            data = longer({"k": theta["k"].detach()}, {"s": rows["s"][e]}, u) - outcome[e]
            return torch.cat([data.flatten(), (u.diff(dim=0) @ root).flatten()]).numpy()

        best = scipy.optimize.least_squares(r, np.zeros(2 * length), xtol=1e-15, ftol=1e-15, gtol=1e-14)
        np.testing.assert_allclose(found.u[e].detach().numpy().ravel(), best.x, atol=2e-6)
    assert bool(found.converged.all())
    weight = draw(22, 2, length, 2)
    total = lambda k: (invert_jointly(longer, {"k": k}, rows, outcome, start, D).u * weight).sum()
    (slope,) = torch.autograd.grad(total(theta["k"]), theta["k"])
    h = 1e-5
    difference = (total(theta["k"] + h) - total(theta["k"] - h)) / (2 * h)
    torch.testing.assert_close(slope, difference.detach(), rtol=1e-5, atol=1e-6)


def test_neighbours_decide_what_one_transition_leaves_open() -> None:
    predict = lambda theta, rows, u: (rows["h"] * u).sum(-1, keepdim=True)
    goal, h = torch.tensor([0.5, -0.7], dtype=torch.float64), draw(26, 2, 5, 2)
    outcome = (h * goal).sum(-1, keepdim=True)
    start, coupling = torch.zeros(2, 5, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found = invert_jointly(predict, {}, {"h": h}, outcome, start, coupling, full_rank=2)
    assert bool(found.saturated.all())
    torch.testing.assert_close(found.u, goal.expand(2, 5, 2), atol=1e-8, rtol=0)


def test_block_tridiagonal_solve_agrees_with_a_dense_one() -> None:
    lower, right = 0.3 * draw(23, 2, 4, 3, 3), draw(24, 2, 5, 3)
    diagonal = draw(25, 2, 5, 3, 3)
    diagonal = diagonal @ diagonal.mT + 3 * torch.eye(3, dtype=torch.float64)
    matrix = torch.zeros(2, 5, 3, 5, 3, dtype=torch.float64)
    for t in range(5):
        matrix[:, t, :, t] = diagonal[:, t]
        if t:
            matrix[:, t, :, t - 1], matrix[:, t - 1, :, t] = lower[:, t - 1], lower[:, t - 1].mT
    dense = torch.linalg.solve(matrix.reshape(2, 15, 15), right.reshape(2, 15))
    torch.testing.assert_close(block_tridiagonal_solve(diagonal, lower, right).reshape(2, 15), dense)


def test_unconverged_rows_warn_and_data_that_do_not_fit_are_named() -> None:
    theta, rows, goal = curved_data(3)
    outcome, start = curved(theta, rows, goal), torch.zeros_like(goal)
    wild = lambda theta, rows, u: torch.exp(3 * u)
    call = partial(invert, wild, theta, rows, 50 + 0 * outcome, start, max_steps=1)
    with pytest.warns(UnconvergedWarning, match="3 of 3 rows"):
        assert not bool(call(tolerance=1e-300).converged.any())
    with pytest.raises(UnconvergedError, match="3 of 3 rows"):
        call(tolerance=1e-300, strict=True)
    call = partial(invert, curved, theta)
    with pytest.raises(ValueError, match="rows\\['s'\\] must be"):
        call({"s": rows["s"][:2]}, outcome, start)
    with pytest.raises(ValueError, match="outcome must be"):
        call(rows, outcome[0], start)
    with pytest.raises(ValueError, match="not finite"):
        call(rows, outcome * math.nan, start)
    with pytest.raises(ValueError, match="outside"):
        call(rows, outcome, start, low=1.0)
    with pytest.raises(ValueError, match="needs prior_precision"):
        call(rows, outcome, start, prior=start)
    with pytest.raises(ValueError, match="predict"):
        call(rows, torch.cat([outcome, outcome], -1), start)
    with pytest.raises(ValueError, match="coupling"):
        invert_jointly(curved, theta, rows, outcome, start, torch.eye(2).double())
    with pytest.raises(ValueError, match="horizon"):
        transition_map(lambda *_: goal, feedback_lower(), 0)
