"""The reacher against MuJoCo on the suite's geometry, written from its stated numbers."""

import mujoco
import numpy as np
import torch

from benchmarks.inversion import XML
from sim2real.simulators.reacher import WRIST_LIMIT, reacher, reacher_step, to_target, wrist_free


def _theta() -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in reacher().box.default.items()}


def test_every_step_agrees_with_mujoco_away_from_the_wrist_limit() -> None:
    mdp, theta, rng = reacher(), _theta(), np.random.default_rng(0)
    start = mdp.initial_state(theta, torch.from_numpy(rng.normal(size=(10, 4))))
    model = mujoco.MjModel.from_xml_string(XML)
    data = mujoco.MjData(model)
    states, actions, tips = [], rng.uniform(-1.3, 1.3, (10, 40, 2)), []  # beyond the range: clipped by both
    for episode in range(10):
        data.qpos[:], data.qvel[:] = start[episode, :2].numpy(), 3.0 * rng.normal(size=2)
        for action in actions[episode]:
            before = np.r_[data.qpos, data.qvel]
            mujoco.mj_forward(model, data)
            tips.append(data.geom("finger").xpos[:2].copy())
            data.ctrl[:] = action
            mujoco.mj_step(model, data)
            states.append(np.stack([before, np.r_[data.qpos, data.qvel]]))
    pair = torch.from_numpy(np.array(states))
    free = wrist_free(pair)[:, 0]
    padded = torch.cat([pair[:, 0], torch.zeros(400, 2, dtype=torch.float64)], -1)
    ours = mdp.step(theta, padded, torch.from_numpy(actions.reshape(-1, 2)), padded[:, :0])
    # 1e-12 is the bar; rounding of velocities of some 10 rad/s leaves 1e-14
    torch.testing.assert_close(ours[free, :4], pair[free, 1], atol=1e-12, rtol=0)
    assert int(free.sum()) > 380
    torch.testing.assert_close(-to_target(padded), torch.from_numpy(np.array(tips)), atol=1e-12, rtol=0)


def test_start_reward_and_signals_are_those_of_the_suite() -> None:
    mdp, theta = reacher(), _theta()
    generator = torch.Generator().manual_seed(0)
    state = mdp.initial_state(theta, torch.randn(2000, 4, generator=generator, dtype=torch.float64))
    radius = state[:, 4:].norm(dim=-1)
    assert float(radius.min()) >= 0.05
    assert float(radius.max()) <= 0.20
    assert float(state[:, 1].abs().max()) <= WRIST_LIMIT
    assert float(state[:, 2:4].abs().max()) == 0.0
    tip = to_target(torch.cat([state[:, :4], torch.zeros_like(state[:, 4:])], -1)).neg()
    for distance, worth in ((0.024, 1.0), (0.026, 0.0)):  # 0.015 m target, 0.01 m finger
        near = torch.cat([state[:, :4], tip + torch.tensor([distance, 0.0], dtype=torch.float64)], -1)
        assert bool((mdp.reward(theta, near, near[:, :2], near[:, :0], near) == worth).all())
    assert mdp.observe is not None
    signals = mdp.observe(theta, state)
    torch.testing.assert_close(signals[:, [0, 1, 4, 5]], state[:, :4])
    torch.testing.assert_close(signals[:, 2:4], state[:, 4:] - tip)


def test_parameters_per_environment_equal_shared_ones() -> None:
    theta = _theta()
    generator = torch.Generator().manual_seed(1)
    arm, action = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 2))
    apart = {key: value.expand(5) for key, value in theta.items()}
    torch.testing.assert_close(reacher_step(apart, arm, action), reacher_step(theta, arm, action))
    gradient = torch.func.jacrev(lambda th: reacher_step(th, arm, action).sum())(theta)
    h = 1e-6  # second differences of order h^2: relative 1e-7 of gradients that reach 1e5 per kg m^2
    for key, value in theta.items():
        size = h * float(value)
        up, down = (reacher_step(theta | {key: value + s * size}, arm, action).sum() for s in (1, -1))
        torch.testing.assert_close(gradient[key], (up - down) / (2 * size), rtol=1e-6, atol=1e-6)
