"""High-level data from logs, the model under a lower level, and what is learned from them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from benchmarks.ohio_reacher import (
    ARM_SIGNALS,
    STEPS,
    VARIANTS,
    explain,
    features,
    flat_policy,
    gains,
    hierarchical_reacher,
    inverted,
    suite_theta,
    to_log,
    weights,
)
from sim2real.estimators.hierarchy import hierarchical_model
from sim2real.estimators.high_level import Segments, high_level_log, high_level_transitions
from sim2real.log import load_log, save_log
from sim2real.log_errors import LogError
from sim2real.log_minari import save_minari
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.policy import Policy
from sim2real.rollout import rollout
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.reacher import reacher, reacher_step
from sim2real.solvers.inversion_lqr import feedback_law, invert_feedback
from sim2real.solvers.inversion_maps import feedback_lower
from sim2real.solvers.inversion_problem import Inversion
from sim2real.solvers.relinearised import relinearised_gains

A = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.125], [0.5]], dtype=torch.float64)
Q, R = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), torch.tensor([[0.2]], dtype=torch.float64)


def integrator(discount: float = 1.0) -> ModelMDP:
    """The paper's double integrator with a reward and a little noise."""
    return ModelMDP(
        initial_state=lambda theta, e0: e0,
        step=lambda theta, s, a, e: s @ A.mT + a @ B.mT + 0.01 * e,
        reward=lambda theta, s, a, e, after: -after.square().sum(-1) - 0.1 * a.square().sum(-1),
        noise_dims=(2, 2),
        dt=0.5,
        discount=discount,
        names={"state": ("position", "speed"), "action": ("force",)},
    )


def integrator_gains(theta: object, state: Tensor) -> dict[str, Tensor]:
    law = feedback_law(A, B, Q, R, 3)
    return {"gain": torch.stack(law.state_gain).expand(len(state), -1, -1, -1)}


def driven_log(goals: Tensor, start: Tensor) -> RolloutLog:
    """A log of the noise-free integrator under its own lower level with goals `[E, K, 2]`."""
    states, actions = [start], []
    for k in range(goals.shape[1]):
        law = feedback_law(A, B, Q, R, 3)
        for gain in law.state_gain:
            actions.append((states[-1] - goals[:, k]) @ gain.mT)
            states.append(states[-1] @ A.mT + actions[-1] @ B.mT)
    signals, inputs = torch.stack(states, 1), torch.stack(actions, 1)
    rewards = torch.arange(inputs.shape[1], dtype=torch.float64).expand(len(goals), -1)
    names = {"signal": ("position", "speed"), "action": ("force",)}
    names["episode"] = tuple(f"run{k}" for k in range(len(goals)))
    mask = torch.ones(inputs.shape[:2], dtype=torch.bool)
    return RolloutLog(signals, inputs, None, mask, 0.5, names, {}, "integrator", rewards=rewards)


def goals_of(segments: Segments) -> Inversion:
    before, after = segments.signals[:, 0], segments.signals[:, -1]
    return invert_feedback(A, B, torch.zeros(2, dtype=torch.float64), before, after, Q, R, 3)


def test_the_goals_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    goals = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
    log = driven_log(goals, torch.randn(4, 2, generator=generator, dtype=torch.float64))
    found = high_level_log(log, goals_of, 3, ("goal", "goal_speed"), discount=0.9)
    # three steps of a controllable pair: the goal is unique, and of condition about 10
    torch.testing.assert_close(found.log.actions, goals, rtol=0, atol=1e-11)
    assert found.counts == {"kept": 20, "saturated": 0, "unconverged": 0, "residual": 0, "bounds": 0, "incomplete": 0}
    assert found.log.dt == 1.5
    # rewards 0, 1, 2, ...: segment k sums 3k + 0.9 (3k + 1) + 0.81 (3k + 2)
    k = torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close(found.log.rewards[0], 3 * k + 0.9 * (3 * k + 1) + 0.81 * (3 * k + 2))
    s, u, r, after = high_level_transitions(found.log)
    torch.testing.assert_close(s[1:5], after[:4])
    assert u.shape == (20, 2)
    assert r.shape == (20,)


def test_what_is_dropped_is_masked_and_counted() -> None:
    goals = torch.zeros(2, 4, 2, dtype=torch.float64)
    goals[1, 3] = 9.0
    log = driven_log(goals, torch.ones(2, 2, dtype=torch.float64))
    log.mask[0, 4] = False

    def judged(segments: Segments) -> Inversion:
        found = goals_of(segments)
        residual, saturated = found.residual.clone(), found.saturated.clone()
        residual[0], saturated[1] = 1.0, True
        done = torch.ones_like(saturated)
        done[2], residual[2] = False, 0.5
        u = torch.where(saturated.unsqueeze(-1), math.nan, found.u)
        return replace(found, u=u, residual=residual, saturated=saturated, converged=done)

    found = high_level_log(log, judged, 3, ("goal", "goal_speed"), high=5.0)
    wanted = {"kept": 3, "saturated": 1, "unconverged": 1, "residual": 1, "bounds": 1, "incomplete": 1}
    assert found.counts == wanted
    assert found.log.mask.tolist() == [[False, False, False, False], [True, True, True, False]]
    assert math.isnan(found.residual[0, 1])  # never inverted
    assert not found.log.actions[~found.log.mask].any()
    assert "1 saturated" in found.log.notes[-1]


def test_high_level_log_says_what_does_not_fit() -> None:
    log = driven_log(torch.zeros(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="horizon must lie between 1 and the 6 steps"):
        high_level_log(log, goals_of, 7, ("goal", "goal_speed"))
    with pytest.raises(ValueError, match="no rewards"):
        high_level_log(replace(log, rewards=None), goals_of, 3, ("goal", "goal_speed"))
    with pytest.raises(ValueError, match=r"expected \(2, 1\)"):
        high_level_log(log, goals_of, 3, ("goal",))
    with pytest.raises(ValueError, match="no rewards"):
        high_level_transitions(replace(log, rewards=None))


def test_exogenous_inputs_reach_the_inversion() -> None:
    log = driven_log(torch.zeros(2, 2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    log = replace(log, exogenous=torch.arange(12, dtype=torch.float64).reshape(2, 6, 1))
    seen: list[Tensor | None] = []

    def noted(segments: Segments) -> Inversion:
        seen.append(segments.exogenous)
        return goals_of(segments)

    high_level_log(log, noted, 3, ("goal", "goal_speed"))
    assert seen[0] is not None
    assert seen[0][1].flatten().tolist() == [3.0, 4.0, 5.0]


def test_saved_and_loaded_bit_for_bit(tmp_path) -> None:
    log = driven_log(torch.ones(2, 3, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    upper = high_level_log(log, goals_of, 3, ("goal", "goal_speed")).log
    save_log(upper, tmp_path / "upper.parquet")
    again = load_log(tmp_path / "upper.parquet")
    assert torch.equal(again.actions, upper.actions)
    assert torch.equal(again.rewards, upper.rewards)
    assert again.names == upper.names


def test_minari_keeps_stretches_of_valid_steps(tmp_path, monkeypatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    log = driven_log(torch.ones(2, 2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    log.mask[0, 2] = False
    saved = save_minari(log, "integrator/high-v0", description="a test.")
    assert [len(episode) for episode in minari.load_dataset("integrator/high-v0")] == [2, 3, 6]
    assert torch.equal(torch.from_numpy(saved[2].observations), log.signals[1])
    assert saved[0].truncations.tolist() == [False, True]
    with pytest.raises(LogError, match="nothing to save"):
        save_minari(replace(log, mask=torch.zeros_like(log.mask)), "integrator/none-v0")
    with pytest.raises(LogError, match="rewards"):
        save_minari(replace(log, rewards=None), "integrator/none-v0")


def test_minari_is_named_when_absent(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    log = driven_log(torch.ones(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ModuleNotFoundError, match=r"install sim2real\[logs\]"):
        save_minari(log, "integrator/high-v0")


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_model_under_a_lower_level_equals_the_steps_one_by_one(discount: float) -> None:
    mdp = integrator(discount)
    upper = hierarchical_model(
        mdp, feedback_lower(), 3, begin=integrator_gains, low=-0.5, high=0.5, inputs=("goal", "goal_speed")
    )
    generator = torch.Generator().manual_seed(1)
    state, u = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    e = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    after, reward = upper.step({}, state, u, e), upper.reward({}, state, u, e, state)
    gain, now, total = integrator_gains(None, state)["gain"], state, torch.zeros(6, dtype=torch.float64)
    for t in range(3):
        action = (gain[:, t] @ (now - u).unsqueeze(-1)).squeeze(-1).clamp(-0.5, 0.5)
        following = mdp.step({}, now, action, e[:, 2 * t : 2 * t + 2])
        total = total + discount**t * mdp.reward({}, now, action, e, following)
        now = following
    torch.testing.assert_close(after, now)
    torch.testing.assert_close(reward, total)
    assert upper.dt == 1.5
    assert upper.discount == discount**3
    assert upper.names["action"] == ("goal", "goal_speed")


def test_terminal_states_hold_within_a_segment() -> None:
    mdp = replace(integrator(), terminal=lambda theta, s: s[:, 0] > 1.0)
    upper = hierarchical_model(mdp, feedback_lower(), 3, begin=integrator_gains)
    state = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    e = torch.zeros(2, 6, dtype=torch.float64)
    after = upper.step({}, state, state.new_zeros(2, 2), e)
    assert torch.equal(after[0], state[0])
    assert float(upper.reward({}, state, state.new_zeros(2, 2), e, after)[0]) == 0.0
    assert not torch.equal(after[1], state[1])


def test_hierarchical_model_refuses() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hierarchical_model(integrator(), feedback_lower(), 0)
    with pytest.raises(ValueError, match="measured inputs"):
        hierarchical_model(replace(integrator(), exogenous_dim=1), feedback_lower(), 3)


def test_relinearised_gains_are_those_of_the_jacobians() -> None:
    theta = suite_theta()
    state = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    still = state.new_zeros(5, 2)
    A_, B_ = (vmap(jacrev(partial(reacher_step, theta), argnums=k))(state, still) for k in (0, 1))
    wanted = torch.stack(feedback_law(A_, B_, *weights("10C"), STEPS).state_gain, 1)
    torch.testing.assert_close(gains(theta, state, variant="10C")["gain"], wanted)
    with pytest.raises(ValueError, match=r"Q \[n, n\]"):
        relinearised_gains(partial(reacher_step, theta), state, Q, R, STEPS)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_reacher_log_is_explained_and_replayed(variant: str) -> None:
    """The goals found in a flat policy's log lead our lower level through the same states, torques limited or not."""
    mdp, theta, policy = reacher(), suite_theta(), flat_policy()
    noise = sample_noise(mdp, policy, 4, 50, torch.Generator().manual_seed(3))
    log = to_log(mdp, theta, rollout(mdp, policy, theta, {}, noise), "flat policy")
    found = inverted(log, theta, variant)
    assert found.counts["kept"] >= 39  # one row in ten thousand is not met
    upper = hierarchical_reacher(variant)
    s = log.signals[:, ::STEPS][:, :-1]
    target = log.signals[:, :1, 2:4] * 0  # the arm alone: any target
    state = torch.cat([s[..., ARM_SIGNALS], target.expand(-1, s.shape[1], -1)], -1)[found.log.mask]
    after = upper.step(theta, state, found.log.actions[found.log.mask], state.new_zeros(len(state), 0))
    wanted = log.signals[:, STEPS::STEPS][..., ARM_SIGNALS][found.log.mask]
    # residuals at most 1e-6 are kept; met rows are far below
    torch.testing.assert_close(after[:, :4], wanted, rtol=0, atol=1e-6)


def test_features_do_not_see_the_shoulder() -> None:
    mdp = reacher()
    assert mdp.observe is not None
    state = torch.randn(6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    turn = torch.tensor(0.7, dtype=torch.float64)
    x, y = state[:, 4], state[:, 5]
    turned = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)
    other = torch.cat([state[:, :1] + turn, state[:, 1:4], turned], -1)
    torch.testing.assert_close(features(mdp.observe({}, state)), features(mdp.observe({}, other)), rtol=0, atol=1e-5)


def test_explain_flags_saturated_segments() -> None:
    """Full torque on both motors throughout: any far goal explains it, none is given."""
    theta = suite_theta()
    state = torch.zeros(1, 4, dtype=torch.float64)
    states = [state]
    for _ in range(STEPS):
        states.append(reacher_step(theta, states[-1], torch.ones(1, 2, dtype=torch.float64)))
    arm = torch.stack(states, 1)
    signals = torch.cat([arm[..., :2], torch.zeros_like(arm[..., :2]), arm[..., 2:]], -1)
    found = explain(Segments(signals, arm.new_ones(1, STEPS, 2), None), theta, "E2E")
    assert bool(found.saturated.all() | (found.residual > 1e-6).all())
    assert found.u.isnan().all() == found.saturated.all()


def test_upper_policy_can_be_tuned_through_the_lower_level() -> None:
    """Online fine-tuning is gradient ascent on the hierarchical model: the gradient agrees with differences."""
    upper = hierarchical_model(integrator(), feedback_lower(), 3, begin=integrator_gains)
    policy = Policy(lambda nu, s, e: s * nu["shrink"], lambda nu, s, a: s[:, 0], 0)
    noise = sample_noise(upper, policy, 8, 3, torch.Generator().manual_seed(5))
    value = lambda x: rollout(upper, policy, {}, {"shrink": x}, noise).rewards.sum(1).mean()
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(at), at)
    h = 1e-5
    with torch.no_grad():
        wanted = (value(at + h) - value(at - h)) / (2 * h)
    torch.testing.assert_close(slope, wanted, rtol=1e-7, atol=1e-9)  # central differences: h^2
