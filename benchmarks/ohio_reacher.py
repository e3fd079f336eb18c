"""OHIO on the reacher, end to end: logs of a flat policy, inverted, cloned, and deployed over the lower level.

Data policy: a flat (state to torque) inverse-kinematics controller with noise, no training. With q* the solution of the
two-link arm whose wrist is bent to the left, the shoulder turned the shorter way,

    a = 0.9 tanh(kp wrap(q* - q) - kd w) + 0.05 e,    kp = 4 per rad, kd = 0.3 s per rad, e standard normal.

Lower level: linear feedback on gains that are recomputed every five steps, Q = diag(10, 10, 1, 1), R = 0.1 I, torques
clipped to [-1, 1]; "10S" and "10C" have Q or R ten times as large, at inversion and at deployment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.ohio_learning import Transitions
from sim2real.estimators.hierarchy import hierarchical_model
from sim2real.estimators.high_level import HighLevelLog, Segments, high_level_log, high_level_transitions
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.reacher import ARM, HAND, reacher, reacher_step
from sim2real.solvers.inversion import invert
from sim2real.solvers.inversion_maps import feedback_lower, transition_map
from sim2real.solvers.inversion_problem import Inversion
from sim2real.solvers.relinearised import relinearised_gains

STEPS = 5
ARM_SIGNALS = [0, 1, 4, 5]
"""columns of the observation that are the arm's state"""
INPUTS = ("goal_shoulder", "goal_wrist", "goal_shoulder_velocity", "goal_wrist_velocity")
INPUT_UNITS = dict(zip(INPUTS, ("rad", "rad", "rad/s", "rad/s"), strict=True))
VARIANTS = {"E2E": (1.0, 1.0), "10S": (10.0, 1.0), "10C": (1.0, 10.0)}
"""factors of Q and R"""


@dataclass(frozen=True)
class Controller:
    """The data policy's gains."""

    kp: float = 4.0
    kd: float = 0.3
    amplitude: float = 0.9
    noise: float = 0.05


def suite_theta() -> Params:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in reacher().box.default.items()}


def wrapped(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def joint_errors(state: Tensor) -> Tensor:
    """The turn `[B, 2]` that brings the tip to the target, or as near as it can reach, with the wrist bent left."""
    x, y = state[:, 4], state[:, 5]
    radius = (x * x + y * y).sqrt()
    wrist = torch.arccos(((radius * radius - ARM**2 - HAND**2) / (2 * ARM * HAND)).clamp(-1, 1))
    aim = torch.atan2(y, x) - torch.atan2(HAND * torch.sin(wrist), ARM + HAND * torch.cos(wrist))
    return torch.stack([wrapped(aim - state[:, 0]), wrist - state[:, 1]], -1)


def flat_policy(controller: Controller = Controller()) -> Policy:
    """The data policy."""

    def act(nu: Params, state: Tensor, e: Tensor) -> Tensor:
        pull = controller.kp * joint_errors(state) - controller.kd * state[:, 2:4]
        return controller.amplitude * torch.tanh(pull) + controller.noise * e

    return Policy(act, lambda nu, state, action: torch.zeros_like(state[:, 0]), 2)


def to_log(mdp: ModelMDP, theta: Params, rolled: Rollout, source: str) -> RolloutLog:
    """Signals of a simulated rollout, as a log."""
    assert mdp.observe is not None
    signals = mdp.observe(theta, rolled.states)
    episodes = tuple(f"episode_{k}" for k in range(len(signals)))
    names = {"signal": mdp.names["signal"], "action": mdp.names["action"], "episode": episodes}
    mask = torch.ones_like(rolled.rewards, dtype=torch.bool)
    actions = rolled.actions.clamp(-1.0, 1.0)
    return RolloutLog(signals, actions, None, mask, mdp.dt, names, mdp.units, source, rewards=rolled.rewards)


def weights(variant: str) -> tuple[Tensor, Tensor]:
    """Q and R of a lower level."""
    state, control = VARIANTS[variant]
    Q = state * torch.diag(torch.tensor([10.0, 10.0, 1.0, 1.0], dtype=torch.float64))
    return Q, control * 0.1 * torch.eye(2, dtype=torch.float64)


def gains(theta: Params, arm: Tensor, *, variant: str) -> Params:
    """What the lower level keeps for one goal."""
    step = partial(reacher_step, theta)
    return {"gain": relinearised_gains(step, arm, *weights(variant), STEPS)}


def explain(segments: Segments, theta: Params, variant: str) -> Inversion:
    """Goals of the lower level that lead where the segments went; torques are not read."""
    before, after = segments.signals[:, 0, ARM_SIGNALS], segments.signals[:, -1, ARM_SIGNALS]
    rows = {"state": before} | gains(theta, before, variant=variant)
    step: Callable[..., Tensor] = lambda theta, s, a, e: reacher_step(theta, s, a)
    predict = transition_map(step, feedback_lower(), STEPS, low=-1.0, high=1.0)
    return invert(predict, theta, rows, after, start=before, differentiable=False)


def inverted(log: RolloutLog, theta: Params, variant: str, *, far: float = math.inf) -> HighLevelLog:
    """The log of the upper level."""
    return high_level_log(
        log, partial(explain, theta=theta, variant=variant), STEPS, INPUTS, units=INPUT_UNITS, low=-far, high=far
    )


def features(signals: Tensor) -> Tensor:
    """Bend of the wrist, the way to the target as seen from the upper arm in dm, speeds: `[N, 6]`.

    Nothing else depends on the angle of the shoulder, so it is left out.
    """
    shoulder, wrist = signals[..., 0], signals[..., 1:2]
    x, y = signals[..., 2], signals[..., 3]
    along, across = x * shoulder.cos() + y * shoulder.sin(), y * shoulder.cos() - x * shoulder.sin()
    way = 10 * torch.stack([along, across], -1)
    return torch.cat([wrist.sin(), wrist.cos(), way, 0.2 * signals[..., 4:6]], -1).float()


def transitions(log: RolloutLog, scale: Tensor, *, observed: bool = False) -> Transitions:
    """Goals relative to the arm's state, in units of `scale [4]`; observed: the state reached instead of the goal."""
    s, u, r, after = high_level_transitions(log)
    goal = after[:, ARM_SIGNALS] if observed else u
    relative = (goal - s[:, ARM_SIGNALS]) / scale
    return Transitions(features(s), relative.float(), r.float(), features(after), torch.zeros_like(r, dtype=torch.bool))


def hierarchical_reacher(variant: str) -> ModelMDP:
    """The reacher under its lower level: actions are goals of the arm's state."""
    mdp = reacher()
    begin = lambda theta, state: gains(theta, state[:, :4], variant=variant)
    lower = feedback_lower(slice(0, 4))
    return hierarchical_model(mdp, lower, STEPS, begin=begin, low=-1.0, high=1.0, inputs=INPUTS)
