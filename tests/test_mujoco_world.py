"""The MuJoCo rig: deterministic, row by row, equal to the torch model without its extras, each extra seen alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mujoco")

from benchmarks import mujoco_world
from sim2real.bounds import default_params
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params
from sim2real.policy import Policy, linear_policy
from sim2real.rollout import discounted_return, rollout
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.mujoco_cartpole import mujoco_cartpole

IDEAL: dict[str, Any] = {"delay": 0.0, "backlash": 0.0, "rail_stiction": 0.0, "hinge_stiction": 0.0}
GAIN = {"gain": torch.tensor([[-11.0, -73.0, -13.0, -17.0]], dtype=torch.float64)}


def observed(policy: Policy) -> Policy:
    return Policy(lambda nu, s, e: policy.act(nu, s[:, :4], e), policy.log_prob, policy.noise_dim)


def drive(world: ModelMDP, forces: Tensor) -> Tensor:
    """States `[1, T+1, n]` under a force sequence, from rest."""
    state = world.initial_state({}, torch.zeros(1, 4, dtype=torch.float64))
    states = [state]
    for force in forces:
        state = world.step({}, state, force.reshape(1, 1), state[:, :0])
        states.append(state)
    return torch.stack(states, 1)


def hanging(**options: Any) -> ModelMDP:
    return mujoco_cartpole(initial_angle=torch.pi, initial_std=0.0, **options)


def test_same_noise_same_rollout_and_rows_do_not_depend_on_their_neighbours():
    world, policy = mujoco_cartpole(initial_std=0.1), observed(linear_policy(1, std=0.5))
    noise = sample_noise(world, policy, 6, 40, torch.Generator().manual_seed(0))
    first, again = rollout(world, policy, {}, GAIN, noise), rollout(world, policy, {}, GAIN, noise)
    assert torch.equal(first.states, again.states)
    for row in range(6):
        alone = type(noise)(*(part[row : row + 1] for part in (noise.initial, noise.process, noise.policy)))
        # the action is a product of another batch size, whose rounding the tooth contact amplifies a little
        torch.testing.assert_close(
            rollout(world, policy, {}, GAIN, alone).states, first.states[row : row + 1], rtol=1e-7, atol=1e-7
        )


def test_threads_and_vmap_change_nothing():
    generator = torch.Generator().manual_seed(1)
    world, threaded = mujoco_cartpole(), mujoco_cartpole(threads=2)
    noise = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    state, force = world.initial_state({}, noise), torch.randn(8, 1, generator=generator, dtype=torch.float64)
    following = world.step({}, state, force, noise[:, :0])
    assert torch.equal(threaded.step({}, state, force, noise[:, :0]), following)
    pairs = torch.func.vmap(lambda s, a: world.step({}, s, a, s[:, :0]))(
        state.unflatten(0, (4, 2)), force.unflatten(0, (4, 2))
    )
    assert torch.equal(pairs.flatten(0, 1), following)
    shared = torch.func.vmap(lambda s: world.step({}, s, force[:2], s[:, :0]))(state.unflatten(0, (4, 2)))
    assert torch.equal(shared[0], following[:2])


def test_without_its_extras_the_rig_is_the_torch_model():
    world = mujoco_cartpole(**IDEAL, initial_std=0.1, substeps=40, rail_damping=0.5)
    model = cartpole(dt=0.02, integrator="rk4", initial_std=0.1)
    values = (1.0, 0.1, 1.0, 0.5, 0.002, 9.81)
    names = ("cart_mass", "pole_mass", "length", "cart_friction", "pole_friction", "g")
    theta: Params = {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}
    policy = observed(linear_policy(1))
    noise = sample_noise(world, policy, 8, 100, torch.Generator().manual_seed(0))
    rig, ideal = rollout(world, policy, {}, GAIN, noise), rollout(model, policy, theta, GAIN, noise)
    # engine integrator of first order at 0.5 ms, and a joint in place of the gear that gives by 0.1 mm under 20 N
    torch.testing.assert_close(rig.states[..., :2], ideal.states[..., :2], rtol=0, atol=3e-3)
    torch.testing.assert_close(rig.rewards, ideal.rewards, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(("delay", "first"), [(0.0, 1), (0.02, 2), (0.05, 3), (0.06, 4)])
def test_a_command_acts_after_its_delay(delay, first):
    world = hanging(**{**IDEAL, "delay": delay})
    moved = drive(world, torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))[0, :, 0].abs() > 1e-6
    assert int(moved.int().argmax()) == first


def test_delay_between_control_steps_splits_the_command():
    """1.5 control steps: the impulse of one command is spread over two steps, and is the same in all."""
    still = {**IDEAL, "rail_damping": 0.0, "pole_mass": 1e-6}
    command = torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    whole = drive(hanging(**{**still, "delay": 0.02}), command)[0, :, 2]
    split = drive(hanging(**{**still, "delay": 0.03}), command)[0, :, 2]
    # impulse 5 N x 20 ms on 1 kg; the joint that stands for the gear keeps a ripple
    assert float(whole[-1]) == pytest.approx(0.1, rel=0.03)
    assert float(split[-1]) == pytest.approx(0.1, rel=0.03)
    assert float(split[2]) == pytest.approx(0.05, rel=0.1)


def test_stiction_holds_the_carriage_below_its_level():
    rest = drive(hanging(**{**IDEAL, "rail_stiction": 1.0}), torch.full((50,), 0.8, dtype=torch.float64))
    slides = drive(hanging(**{**IDEAL, "rail_stiction": 1.0}), torch.full((50,), 1.5, dtype=torch.float64))
    assert float(rest[0, -1, 0].abs()) < 1e-3  # the engine's friction creeps by a fraction of a millimetre
    # 0.5 N of net force on 1.1 kg for 1 s: about 0.2 m, less the damping
    assert 0.1 < float(slides[0, -1, 0]) < 0.25


def test_backlash_lets_the_carriage_move_before_the_cart():
    loose = drive(hanging(**{**IDEAL, "backlash": 0.01}), torch.full((6,), 2.0, dtype=torch.float64))[0]
    carriage = loose[:, 0] - loose[:, 4]
    # the free carriage (0.3 kg) runs ahead until the play of 10 mm is used up, then takes the cart along
    assert float(carriage[3]) > 5 * float(loose[3, 0].abs())
    assert float(loose[:, 4].min()) == pytest.approx(-0.01, abs=1.5e-3)


def test_the_force_saturates():
    full, more = (
        drive(hanging(**IDEAL, force_limit=5.0), torch.full((5,), force, dtype=torch.float64)) for force in (5.0, 50.0)
    )
    assert torch.equal(full, more)


def test_a_derivative_is_refused_and_not_silently_zero():
    world = mujoco_cartpole()
    state = world.initial_state({}, torch.zeros(1, 4, dtype=torch.float64))
    force = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    following = world.step({}, state, force, state[:, :0])
    with pytest.raises(NotImplementedError, match="derivative_order = 0"):
        following.sum().backward()
    with pytest.raises(NotImplementedError, match="derivative_order = 0"):
        torch.func.jvp(lambda a: world.step({}, state, a, state[:, :0]), (force.detach(),), (force.detach(),))
    assert world.derivative_order == 0


def test_reward_sees_the_observed_state_and_observe_gives_it():
    world = mujoco_cartpole(reward=lambda theta, s, a, e, f: s.sum(-1) + f.sum(-1))
    state = torch.arange(18.0, dtype=torch.float64).reshape(2, 9)
    assert world.reward({}, state, state[:, :1], state[:, :0], 2 * state).tolist() == [3 * 6.0, 3 * (9 + 10 + 11 + 12)]
    assert torch.equal(world.observe({}, state), state[:, :4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt": 0.0}, "dt, substeps and force_limit must be positive"),
        ({"substeps": 0}, "must be positive"),
        ({"delay": -0.1}, "at least 0"),
        ({"backlash": -0.1}, "at least 0"),
        ({"force_limit": 0.0}, "must be positive"),
        ({"delay": 0.0311}, "not a whole number of engine steps"),
    ],
)
def test_impossible_rigs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mujoco_cartpole(**options)


def test_in_sim_training_of_the_benchmark_is_the_models_optimum():
    theta = default_params(mujoco_world.MODEL.box)
    nu = mujoco_world.train(theta, {})
    slope = torch.func.grad(mujoco_world.in_sim_return, argnums=1)(theta, nu)["gain"]
    assert float(slope.abs().max()) < 1e-9
    # the exact value of the linearised model against a rollout of the model itself, from one small start
    start = torch.tensor([[0.02, 0.03, -0.02, 0.01]], dtype=torch.float64)
    A, B = mujoco_world.linearised(theta)
    state, rewards = start, []
    for _ in range(600):
        action = -(state @ nu["gain"].mT)
        following = mujoco_world.MODEL.step(theta, state, action, state[:, :0])
        rewards.append(mujoco_world.MODEL.reward(theta, state, action, state[:, :0], following))
        state = following
    cost = mujoco_world.STATE_COST + nu["gain"].mT @ mujoco_world.ACTION_COST @ nu["gain"]
    P = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(3000):
        P = cost + mujoco_world.DISCOUNT * (A - B @ nu["gain"]).mT @ P @ (A - B @ nu["gain"])
    exact = -float(start @ P @ start.mT)
    # cubic terms of the pole at 0.03 rad: relative 1e-3
    total = float(discounted_return(torch.stack(rewards, 1), mujoco_world.DISCOUNT))
    assert total == pytest.approx(exact, rel=5e-3)
    assert float(mujoco_world.in_sim_return(theta, nu)) == pytest.approx(-float(torch.trace(P)), rel=1e-9)


def test_excitation_log_of_the_benchmark():
    log = mujoco_world.excitation(0, runs=2, seconds=2.0)
    assert log.signals.shape == (2, 101, 4)
    assert log.actions.shape == (2, 100, 1)
    assert torch.equal(log.signals, mujoco_world.excitation(0, runs=2, seconds=2.0).signals)
    assert not torch.equal(log.signals, mujoco_world.excitation(1, runs=2, seconds=2.0).signals)


@pytest.mark.slow
def test_tuned_theta_beats_the_best_fitting_one_on_the_rig():
    """Bar a-mujoco/advantage, quick: paired 95 % interval over 5 seeds."""
    figures = {figure.metric: figure.value for figure in mujoco_world.a_mujoco(quick=True)}
    assert figures["advantage-low"] > 0
    assert figures["worst-seed"] > 0
