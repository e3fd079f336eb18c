"""The engine's own sensitivities against the general chain of steps; parameters that reach nothing are named."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sim2real.bounds import default_params
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.roll import roll, roll_sensitivities
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_parameters import Parameter
from sim2real.simulators.mujoco_reach import NoEffectError, check_reaches_output, without_reach

CART = """<mujoco>
  <option timestep="0.01"/>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1" pos="0 0 -1"/>
    <body name="cart"><joint name="slide" type="slide" axis="1 0 0" damping="0.3" range="-0.05 0.05" limited="true"/>
      <geom name="box" size="0.1" mass="1"/>
      <body name="pole"><joint name="hinge" axis="0 1 0" damping="0.05" armature="0.01"/>
        <geom name="rod" type="capsule" fromto="0 0 0 0 0 -0.95" size="0.04" mass="0.4"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="push" joint="slide" gear="5"/><motor name="idle" joint="hinge"/></actuator>
</mujoco>"""
THETA = {
    "pole.mass": None,
    "damping": Parameter(targets=("*.damping",), scale=True),
    "hinge.armature": None,
    "push.gear": None,
    "gravity.z": None,
    "floor.friction.slide": None,
}


def no_reward(
    theta: Params, s: torch.Tensor, a: torch.Tensor, e: torch.Tensor, following: torch.Tensor
) -> torch.Tensor:
    return s[:, 0]


def path(mdp: ModelMDP, windows: int = 3, steps: int = 12) -> tuple[Params, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    theta = default_params(mdp.box)
    actions, noise = draw(steps, windows, 2), draw(steps, windows, mdp.noise_dims[1])
    start = mdp.initial_state(theta, 0.3 * draw(windows, mdp.noise_dims[0]))
    return theta, roll(mdp, theta, start, actions, noise), actions, noise


@pytest.mark.parametrize(
    ("frame_skip", "force_std", "weights", "backend"),
    [
        (1, None, "moving", "torch"),
        (3, 0.2, "frozen", "torch"),
        (1, None, "frozen", "auto"),
        (2, 0.2, "moving", "auto"),
    ],
)
def test_sensitivities_equal_those_of_the_chain_of_steps(
    frame_skip: int, force_std: float | None, weights: Any, backend: Any
) -> None:
    given = {"frame_skip": frame_skip, "force_std": force_std, "weights": weights, "initial_std": 1.0}
    mdp = mujoco_model(CART, THETA, no_reward, backend=backend, **given)
    assert (mdp.step.args[0].cotangents is not None) == (backend == "auto")
    theta, states, actions, noise = path(mdp)
    assert mdp.sensitivity is not None
    reference = mujoco_model(CART, THETA, no_reward, backend="torch", **given)
    general = replace(reference, sensitivity=None)
    rows, free = (0, 5, 12), ["pole.mass", "damping", "push.gear", "gravity.z", "floor.friction.slide"]
    for along in (None, torch.ones_like(actions)):
        ours = roll_sensitivities(mdp, theta, free, (states, actions, noise), rows, along)
        other = roll_sensitivities(general, theta, free, (states, actions, noise), rows, along)
        assert ours.params.shape == (3, 3, 4, 5 + (along is not None))
        # the same derivatives in another order of sums: rounding, magnified by the limit's stiffness
        torch.testing.assert_close(ours.params, other.params, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(ours.start, other.start, rtol=1e-9, atol=1e-10)
    nothing = roll_sensitivities(mdp, theta, [], (states, actions, noise), rows)
    torch.testing.assert_close(nothing.start, other.start, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ('integrator="RK4" timestep="0.01"', {}),
        ('timestep="0.01"', {"delay": 0.02}),
        ('timestep="0.01"', {"truncation": 4}),
    ],
)
def test_other_models_take_the_general_way(change: str, options: dict[str, float]) -> None:
    xml = CART.replace('timestep="0.01"', change)
    assert mujoco_model(xml, ["pole.mass"], no_reward, backend="torch", **options).sensitivity is None


def test_a_parameter_without_effect_is_named_with_its_reason() -> None:
    theta = {"pole.mass": None, "idle.gear": None, "box.friction": None}
    mdp = mujoco_model(CART, theta, no_reward, backend="torch")
    structure = mdp.step.args[0].structure
    values = default_params(mdp.box)
    state = mdp.initial_state(values, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
    actions = torch.zeros(1, 8, 2, dtype=torch.float64)
    actions[..., 0] = 1.0
    expected = ["idle.gear", "box.friction[0]", "box.friction[1]", "box.friction[2]"]
    assert without_reach(mdp, values, state, actions) == expected
    with pytest.raises(
        NoEffectError, match=r"4 numbers in theta .*'idle.gear' \(the actuator's command is zero"
    ) as caught:
        check_reaches_output(mdp, values, state, actions, structure=structure, spec=theta)
    assert "'box.friction[0]' (no contact of the geom carries force here" in str(caught.value)
    with pytest.raises(NoEffectError, match="its element never acts here"):
        check_reaches_output(mdp, values, state, actions)
    assert without_reach(mdp, values, state, actions + 1.0)[0] != "idle.gear"
    with pytest.raises(ValueError, match=r"state must be \[B, n\] and actions \[B, T, m\]"):
        without_reach(mdp, values, state[0], actions)


def test_a_constant_command_does_not_show_its_delay() -> None:
    theta = {"delay": (0.0, 0.02), "pole.mass": None}
    mdp = mujoco_model(CART, theta, no_reward, backend="torch")
    values = default_params(mdp.box) | {"delay": torch.tensor(0.005, dtype=torch.float64)}
    state = mdp.initial_state(values, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
    actions = torch.zeros(1, 6, 2, dtype=torch.float64)
    with pytest.raises(NoEffectError, match=r"'delay' \(the commands are constant\)"):
        check_reaches_output(mdp, values, state, actions)
    actions[:, ::2] = 1.0
    check_reaches_output(mdp, values, state, actions)
