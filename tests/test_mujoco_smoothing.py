"""Smoothed contacts: derivatives that do not jump, and steps that stay as they are if only derivatives are smoothed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

mujoco = pytest.importorskip("mujoco")

from sim2real.mdp import ModelMDP  # noqa: E402
from sim2real.simulators.mujoco_model import mujoco_model  # noqa: E402
from sim2real.simulators.mujoco_smoothing import ContactSmoothing, smoothed_contacts  # noqa: E402

BALL = """<mujoco><option timestep="0.002"/><worldbody><geom name="floor" type="plane" size="5 5 .1"/>
  <body name="ball"><joint type="slide" axis="0 0 1"/><geom name="ball" type="sphere" size=".1" mass="1"/></body>
  </worldbody>{extra}</mujoco>"""
WIDTH = 0.01


def ball(smoothing: ContactSmoothing | None, extra: str = "", theta: tuple[str, ...] = ()) -> ModelMDP:
    xml = BALL.format(extra=extra)
    reward = lambda theta, s, a, e, following: following[:, 0]
    return mujoco_model(xml, theta, reward, smoothing=smoothing, backend="torch")


def velocities(mdp: ModelMDP, heights: torch.Tensor) -> torch.Tensor:
    """Velocity one step after resting at these distances from the floor (m)."""
    state = torch.stack([heights + 0.1, torch.zeros_like(heights)], 1)
    nothing = torch.zeros(len(heights), 0, dtype=torch.float64)
    return mdp.step({}, state, nothing, nothing)[:, 1]


def slopes(mdp: ModelMDP, heights: torch.Tensor) -> torch.Tensor:
    h = heights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(velocities(mdp, h).sum(), h)
    return grad


# 0.1 mm apart, none on a knot of the impedance (0 and 5 mm)
HEIGHTS = torch.linspace(-0.002, 0.006, 81, dtype=torch.float64) + 3e-5


def test_smoothed_derivatives_do_not_jump() -> None:
    """Over steps of 0.1 mm the hard derivative jumps to two thirds of its size, the smoothed one moves by per cents."""
    hard, soft = slopes(ball(None), HEIGHTS), slopes(ball(ContactSmoothing(WIDTH)), HEIGHTS)
    assert hard[-1] == 0.0
    assert hard.diff().abs().max() > 0.6 * hard.abs().max()
    assert soft.diff().abs().max() < 0.1 * soft.abs().max()


def test_smoothed_derivatives_are_those_of_the_smoothed_steps() -> None:
    mdp, step = ball(ContactSmoothing(WIDTH)), 1e-6
    reference = (velocities(mdp, HEIGHTS + step) - velocities(mdp, HEIGHTS - step)) / (2 * step)
    # rounding 1e-16/1e-6 of velocities near 0.1 m/s, truncation 1e-12 of a slope that bends on 5 mm
    assert torch.allclose(slopes(mdp, HEIGHTS), reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))


def test_forces_begin_half_a_width_above_the_floor() -> None:
    mdp = ball(ContactSmoothing(WIDTH))
    free = -9.81 * 0.002
    above, below = velocities(mdp, torch.tensor([1.01 * WIDTH / 2, 0.9 * WIDTH / 2], dtype=torch.float64))
    assert float(above) == pytest.approx(free, rel=1e-12)
    assert float(below) > free


def test_smoothed_derivatives_of_hard_steps() -> None:
    """`forward=False`: the values of the hard model, bit for bit, and the derivatives of the smoothed one."""
    both = ball(ContactSmoothing(WIDTH, forward=False))
    assert torch.equal(velocities(both, HEIGHTS), velocities(ball(None), HEIGHTS))
    soft = slopes(ball(ContactSmoothing(WIDTH)), HEIGHTS)
    assert torch.allclose(slopes(both, HEIGHTS), soft, rtol=1e-12)


def test_straight_through_serves_forward_mode_and_second_order() -> None:
    both, soft = ball(ContactSmoothing(WIDTH, forward=False)), ball(ContactSmoothing(WIDTH))
    one = torch.ones_like(HEIGHTS)
    push = lambda mdp: torch.func.jvp(lambda h: velocities(mdp, h), (HEIGHTS,), (one,))[1]
    twice = lambda mdp: torch.func.jvp(
        lambda h: torch.func.grad(lambda k: velocities(mdp, k).sum())(h), (HEIGHTS,), (one,)
    )
    assert torch.allclose(push(both), push(soft), rtol=1e-12)
    assert torch.allclose(twice(both)[1], twice(soft)[1], rtol=1e-12)


def test_forward_sensitivities_are_smoothed_as_the_steps() -> None:
    """The linearisation of whole rollouts takes its own way through the kernels; it must see the same contacts."""
    reward = lambda theta, s, a, e, following: following[:, 0]
    state = torch.tensor([[[0.1005, -0.2]]], dtype=torch.float64)
    nothing = torch.zeros(1, 1, 0, dtype=torch.float64)
    found = []
    for smoothing in (None, ContactSmoothing(WIDTH, forward=False)):
        mdp = mujoco_model(BALL.format(extra=""), {"gravity.z": (-12.0, -8.0)}, reward, smoothing=smoothing)
        assert mdp.sensitivity is not None
        theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in mdp.box.default.items()}
        after = mdp.step(theta, state[0], nothing[0], nothing[0])
        path = (torch.stack([state[0], after]), nothing, nothing, None)
        _, phi = mdp.sensitivity.run(theta, list(theta), path, [1])
        s = state[0].clone().requires_grad_()
        rows = [torch.autograd.grad(mdp.step(theta, s, nothing[0], nothing[0])[0, i], s)[0][0] for i in range(2)]
        assert torch.allclose(phi[-1, 0], torch.stack(rows), rtol=1e-10, atol=1e-12)
        found.append(phi[-1, 0])
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_explicit_pairs_are_smoothed_too() -> None:
    pair = '<contact><pair geom1="floor" geom2="ball" margin="0.001"/></contact>'
    model = mujoco.MjModel.from_xml_string(BALL.format(extra=pair))
    soft = smoothed_contacts(model, WIDTH)
    assert np.allclose(soft.pair_margin, 0.001 + WIDTH / 2)
    assert np.allclose(soft.pair_solimp[:, [0, 2, 3, 4]], [0.0, WIDTH, 0.5, 2.0])
    assert np.allclose(model.pair_margin, 0.001)
    slope = slopes(ball(ContactSmoothing(WIDTH), pair), HEIGHTS)
    assert slope.diff().abs().max() < 0.1 * slope.abs().max()


@pytest.mark.parametrize("width", [0.0, -1.0, float("inf"), float("nan")])
def test_a_width_that_is_none_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width of a contact smoothing must be positive"):
        ContactSmoothing(width)


def test_an_impedance_in_theta_is_refused() -> None:
    with pytest.raises(ValueError, match="smoothing sets the impedance"):
        ball(ContactSmoothing(WIDTH), theta=("floor.solimp",))
