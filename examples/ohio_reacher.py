"""An upper policy from the log of another controller
==================================================

A log of torques that move an arm to a target becomes a policy that never gives a torque: it gives goals to a linear
feedback law. The law's goals are not in the log; they are found by inversion (OHIO).

1. A flat controller (inverse kinematics, torques, noise) makes the log.
2. Each five steps of the log are inverted: which goal would have led our feedback law, whose gains are recomputed every
   five steps, to the same state? Rows without a single answer are dropped, and counted.
3. A network is fitted to the goals, as seen from the arm's state (behaviour cloning), and to the states that were
   reached, taken for goals: the baseline without inversion.
4. Both act over the feedback law in new episodes.

The first comes close to the flat controller. The second moves slowly: five steps of the law cover only part of the way
to a goal. The picture shows the distance to the target over time. Offline reinforcement learning on the same data, and
the figures of several seeds, are made by `benchmarks/study_ohio.py`.

    python examples/ohio_reacher.py --plot ohio_reacher.png
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from sim2real import Params, Policy, RolloutLog, rollout, sample_noise
from sim2real.estimators import Segments, hierarchical_model, high_level_log, high_level_transitions
from sim2real.simulators.reacher import ARM, HAND, reacher, reacher_step
from sim2real.solvers import feedback_lower, invert, relinearised_gains, transition_map

STEPS = 5
JOINTS = [0, 1, 4, 5]
"""columns of the signals that are angles and speeds of the arm"""


@dataclass(frozen=True)
class Settings:
    episodes: int = 100
    steps: int = 500
    updates: int = 4000
    judged: int = 50
    seed: int = 0


def flat(nu: Params, state: Tensor, e: Tensor) -> Tensor:
    """Torques towards the joint angles that put the tip on the target, wrist bent to the left."""
    x, y = state[:, 4], state[:, 5]
    wrist = torch.arccos(((x * x + y * y - ARM**2 - HAND**2) / (2 * ARM * HAND)).clamp(-1, 1))
    shoulder = torch.atan2(y, x) - torch.atan2(HAND * wrist.sin(), ARM + HAND * wrist.cos())
    turn = torch.remainder(shoulder - state[:, 0] + math.pi, 2 * math.pi) - math.pi
    error = torch.stack([turn, wrist - state[:, 1]], -1)
    return 0.9 * torch.tanh(4 * error - 0.3 * state[:, 2:4]) + 0.05 * e


def gains(theta: Params, state: Tensor) -> Params:
    Q = torch.diag(torch.tensor([10.0, 10.0, 1.0, 1.0], dtype=torch.float64))
    R = 0.1 * torch.eye(2, dtype=torch.float64)
    return {"gain": relinearised_gains(partial(reacher_step, theta), state[:, :4], Q, R, STEPS)}


def features(signals: Tensor) -> Tensor:
    """Bend of the wrist, the way to the target as seen from the upper arm, speeds."""
    q, x, y = signals[:, :1], signals[:, 2:3], signals[:, 3:4]
    way = [x * q.cos() + y * q.sin(), y * q.cos() - x * q.sin()]
    parts = [signals[:, 1:2].sin(), signals[:, 1:2].cos(), 10 * torch.cat(way, -1), 0.2 * signals[:, 4:6]]
    return torch.cat(parts, -1).float()


def cloned(seen: Tensor, goals: Tensor, settings: Settings) -> tuple[nn.Module, Tensor]:
    """A network of the mean goal, in units of `scale`: the likelihood of normal noise whose size is learned too."""
    torch.manual_seed(settings.seed)
    net = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
    scale = goals.abs().mean(0)
    target, optimizer = (goals / scale).float(), torch.optim.Adam(net.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.updates)
    for _ in range(settings.updates):
        index = torch.randint(len(seen), (256,))
        mean, raw = net(seen[index]).chunk(2, -1)
        loss = nn.functional.gaussian_nll_loss(mean, target[index], nn.functional.softplus(raw).square(), eps=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return net, scale


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    settings = Settings(12, 100, 300, 10) if arguments.quick else Settings()
    mdp, generator = reacher(), torch.Generator().manual_seed(settings.seed)
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in mdp.box.default.items()}
    observe = partial(mdp.observe, theta) if mdp.observe else None
    assert observe is not None

    policy = Policy(flat, lambda nu, s, a: s[:, 0], noise_dim=2)
    noise = sample_noise(mdp, policy, settings.episodes, settings.steps, generator)
    logged = rollout(mdp, policy, theta, {}, noise)
    names = {"signal": mdp.names["signal"], "action": mdp.names["action"]}
    names["episode"] = tuple(str(k) for k in range(settings.episodes))
    mask = torch.ones_like(logged.rewards, dtype=torch.bool)
    signals, torques = observe(logged.states), logged.actions.clamp(-1, 1)
    log = RolloutLog(signals, torques, None, mask, mdp.dt, names, mdp.units, "flat", rewards=logged.rewards)

    predict = transition_map(lambda th, s, a, e: reacher_step(th, s, a), feedback_lower(), STEPS, low=-1, high=1)

    def explain(segments: Segments):
        before, after = segments.signals[:, 0, JOINTS], segments.signals[:, -1, JOINTS]
        rows = {"state": before} | gains(theta, before)
        return invert(predict, theta, rows, after, start=before, differentiable=False)

    inputs = ("goal_shoulder", "goal_wrist", "goal_shoulder_velocity", "goal_wrist_velocity")
    high = high_level_log(log, explain, STEPS, inputs)
    print("segments:", ", ".join(f"{count} {what}" for what, count in high.counts.items()))
    s, goals, _, after = high_level_transitions(high.log)

    upper = hierarchical_model(mdp, feedback_lower(slice(0, 4)), STEPS, begin=gains, low=-1, high=1, inputs=inputs)
    judged = sample_noise(mdp, policy, settings.judged, settings.steps, generator)
    runs = {"flat controller": rollout(mdp, policy, theta, {}, judged)}
    for name, wanted in {"inverted goals": goals, "states reached": after[:, JOINTS]}.items():
        net, scale = cloned(features(s), wanted - s[:, JOINTS], settings)

        def act(nu: Params, state: Tensor, e: Tensor, net: nn.Module = net, scale: Tensor = scale) -> Tensor:
            return state[:, :4] + scale * net(features(observe(state)))[:, :4].double()

        learner = Policy(act, lambda nu, s, a: s[:, 0], noise_dim=0)
        start = sample_noise(upper, learner, settings.judged, settings.steps // STEPS)
        start = type(start)(judged.initial, start.process, start.policy)  # the same starts for all
        with torch.no_grad():
            runs[name] = rollout(upper, learner, theta, {}, start)
    for name, run in runs.items():
        print(f"{name}: return {float(run.rewards.sum(1).mean()):.0f} of {settings.steps}")

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, run in runs.items():
        distance = 100 * observe(run.states)[..., 2:4].norm(dim=-1)
        time = torch.linspace(0, settings.steps * mdp.dt, distance.shape[1])
        low, middle, high_ = distance.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0)
        axes.plot(time, middle, label=name)
        axes.fill_between(time, low, high_, alpha=0.2)
    axes.axhline(2.5, color="black", linestyle=":", label="rewarded below")
    axes.set(xlabel="time [s]", ylabel="tip to target [cm]", xlim=(0, min(4.0, settings.steps * mdp.dt)))
    axes.legend()
    if arguments.plot:
        figure.savefig(arguments.plot)


if __name__ == "__main__":
    main()
