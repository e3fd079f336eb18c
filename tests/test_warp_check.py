"""`check_kernel` finds kernels right that are right, and says where others are wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.warp_check import KernelMismatchError, check_kernel, check_table

DT = 0.05


def spring_step(theta, state, action, noise):
    push = action[0] + noise[0] - theta.stiffness * wp.sin(state[0]) - theta.damping * state[1]
    speed = state[1] + DT * push
    return wp.vector(state[0] + DT * speed, speed)


def spring_reward(theta, state, action, noise, following):
    return -DT * (following[0] ** 2 + theta.damping * action[0] ** 2)


def spring(theta: Params, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
    push = action[:, 0] + noise[:, 0] - theta["stiffness"] * state[:, 0].sin() - theta["damping"] * state[:, 1]
    speed = state[:, 1] + DT * push
    return torch.stack([state[:, 0] + DT * speed, speed], -1)


def spring_cost(theta: Params, state: Tensor, action: Tensor, noise: Tensor, following: Tensor) -> Tensor:
    return -DT * (following[:, 0] ** 2 + theta["damping"] * action[:, 0] ** 2)


TWIN = ModelMDP(
    initial_state=lambda theta, e0: e0.new_zeros(*e0.shape[:-1], 2),
    step=spring,
    reward=spring_cost,
    noise_dims=(0, 1),
    dt=DT,
    names={"state": ("angle", "speed"), "action": ("torque",)},
    box=Box(default={"stiffness": 2.0, "damping": 0.3}),
)


class _HalfGradient(torch.autograd.Function):
    """The identity with half its derivative, as a kernel with a wrong adjoint has it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 0.5 * g

    @staticmethod
    def jvp(ctx, dx: Tensor) -> Tensor:
        return 1.0 * dx


wp = pytest.importorskip("warp")


@pytest.fixture(scope="module")
def kernel() -> ModelMDP:
    from sim2real.simulators.warp_model import warp_model

    names = TWIN.names
    return warp_model(
        spring_step, spring_reward, state=names["state"], action=names["action"], dt=DT, box=TWIN.box, noise=1
    )


def test_right_kernel_passes_against_its_twin(kernel: ModelMDP) -> None:
    check = check_kernel(kernel, TWIN, strict=True)
    assert check.passed
    assert check.reference == "twin"
    assert check.tolerance == 1e-10
    assert [row.function for row in check.rows[::4]] == ["step", "reward", "rollout"]
    assert [row.quantity for row in check.rows[:4]] == ["value", "jvp", "vjp", "hvp"]
    # sums of a few terms: rounding is a few units of the last place, 2e-16
    assert max(row.error for row in check.rows) < 1e-13
    assert "WRONG" not in check_table(check)


def test_right_kernel_passes_against_differences(kernel: ModelMDP) -> None:
    check = check_kernel(kernel, strict=True)
    assert check.passed
    assert check.reference == "differences"
    assert ("step", "value") not in {(row.function, row.quantity) for row in check.rows}
    assert 0.0 < max(row.error for row in check.rows) < 1e-7  # central differences of step 1e-5


def test_own_points_are_taken(kernel: ModelMDP) -> None:
    theta = {"stiffness": torch.full((3,), 1.5, dtype=torch.float64), "damping": torch.tensor(0.1)}
    state = torch.tensor([[0.1, 0.2], [2.0, -1.0], [0.0, 0.0]])
    assert check_kernel(kernel, TWIN, theta=theta, state=state).passed
    assert check_kernel(TWIN, TWIN, precision=torch.float32).tolerance == 1e-4


def test_wrong_value_is_named() -> None:
    wrong = replace(TWIN, step=lambda theta, s, a, e: spring(theta, s, a, e) + 1e-6 * torch.eye(2)[1].to(s))
    check = check_kernel(wrong, TWIN)
    assert not check.passed
    failed = {(row.function, row.quantity): row.where for row in check.rows if row.error > check.tolerance}
    assert failed["step", "value"] == "speed"
    assert ("step", "jvp") not in failed
    assert ("rollout", "value") in failed
    assert ("reward", "value") not in failed
    assert "step       value" in check_table(check)
    assert "WRONG at speed" in check_table(check)
    with pytest.raises(KernelMismatchError, match="the kernel differs from its reference"):
        check_kernel(wrong, TWIN, strict=True)


@pytest.mark.parametrize("twin", [TWIN, None], ids=["twin", "differences"])
def test_wrong_gradient_is_named(twin: ModelMDP | None) -> None:
    def step(theta: Params, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        return spring(theta | {"damping": _HalfGradient.apply(theta["damping"])}, state, action, noise)

    check = check_kernel(replace(TWIN, step=step), twin)
    failed = {(row.function, row.quantity): row for row in check.rows if row.error > check.tolerance}
    assert failed["step", "vjp"].where == "theta.damping"
    assert failed["step", "vjp"].error == pytest.approx(0.5, rel=1e-4)
    assert ("step", "jvp") not in failed


def test_gradients_that_are_nan_fail() -> None:
    def step(theta: Params, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        return spring(theta, state, action, noise) + 0.0 * torch.where(state > 1e9, state.sqrt(), 0.0)

    # torch's derivative of the branch not taken is 0 * nan for negative states
    check = check_kernel(replace(TWIN, step=step), TWIN)
    assert {row.quantity for row in check.rows if row.function == "step" and row.error == float("inf")} >= {"vjp"}


def test_rollout_is_compared_with_single_steps() -> None:
    def late(theta: Params, start: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        return torch.stack([start] * (actions.shape[1] + 1), 1)

    check = check_kernel(replace(TWIN, open_loop=late))
    assert {row.function for row in check.rows if row.error > check.tolerance} == {"rollout"}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"comparing with differences needs float64, got torch\.float32"):
        check_kernel(TWIN, precision=torch.float32)
    with pytest.raises(ValueError, match=r"comparing with twin needs float64 or float32, got torch\.float16"):
        check_kernel(TWIN, TWIN, precision=torch.float16)
    with pytest.raises(ValueError, match=r"state of the model is \('angle', 'speed'\), of the twin \('position', "):
        check_kernel(TWIN, cartpole())
    with pytest.raises(ValueError, match="the model does not name its state"):
        check_kernel(replace(TWIN, names={}))
    with pytest.raises(ValueError, match="at least one environment and one step, got batch=8, horizon=0"):
        check_kernel(TWIN, horizon=0)
