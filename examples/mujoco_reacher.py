"""An arm reaches for goals
========================

A two-joint arm learns to bring its tip towards goals, through MuJoCo: from 20 cm to 4 cm off new goals.

Gymnasium's reacher is read from its own XML and becomes a differentiable model; the goal is part of its state. A net
that sees joint angles, speeds and the goal is trained on the exact gradient of the mean distance over one second,
through the engine's steps: no critic, no exploration. The picture shows the learning curve and the distance to the goal
over time in new episodes; the animation shows some of them.

    python examples/mujoco_reacher.py --plot reacher.png --gif reacher.gif
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import mujoco
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from sim2real import ModelMDP, Params, Rollout, assign_grads, module_policy, rollout, sample_noise
from sim2real.estimators import pathwise_gradient
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_system import body_poses, mujoco_system

TIP, GOAL = 3, 4
"""bodies of the model"""
LENGTHS = (0.1, 0.11)
"""of the links, m"""


@dataclass(frozen=True)
class Settings:
    iterations: int = 250
    episodes: int = 48
    """per iteration"""
    steps: int = 50
    """of 20 ms"""
    hidden: int = 64
    rate: float = 1e-2
    judged: int = 256


def reacher() -> tuple[ModelMDP, mujoco.MjModel]:
    """State (joint0, joint1, goal x, goal y) and rates; the reward is minus the distance, in m, less some effort."""
    file = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "reacher.xml"
    spec = mujoco.MjSpec.from_file(str(file))
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
    for actuator in spec.actuators:
        actuator.gear[0] = 20.0  # the file's 200 is for agents that tremble
    model = spec.compile()
    system = mujoco_system(model)

    def reward(theta: Params, s: Tensor, a: Tensor, e: Tensor, following: Tensor) -> Tensor:
        position = body_poses(system, following[:, :4]).position
        gap = (position[:, TIP] - position[:, GOAL])[:, :2]
        return -(gap.square().sum(-1) + 1e-4).sqrt() - 1e-3 * (a**2).sum(-1)

    start = torch.zeros(8, dtype=torch.float64)
    spread = torch.tensor([1.0, 1.0, 0.08, 0.08, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    return mujoco_model(spec, (), reward, frame_skip=2, initial=start, initial_std=spread), model


class Features(nn.Module):
    """What the network sees of a state: angles on the circle, scaled speeds, the goal, and the way from tip to goal."""

    def forward(self, s: Tensor) -> Tensor:
        angles, goal = s[..., :2], s[..., 2:4]
        links = angles.cumsum(-1)  # directions from the x axis
        tip = (torch.stack([links.cos(), links.sin()], -2) * s.new_tensor(LENGTHS)).sum(-1)
        return torch.cat([angles.cos(), angles.sin(), s[..., 4:6] / 5.0, 10.0 * goal, 10.0 * (goal - tip)], -1)


def network(hidden: int) -> nn.Module:
    """Torques as shares of the largest, at first nearly none."""
    last = nn.Linear(hidden, 2)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    layers = (nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last, nn.Tanh())
    return nn.Sequential(Features(), *layers).double()


def distances(mdp: ModelMDP, model: mujoco.MjModel, run: Rollout) -> Tensor:
    """m between tip and goal, `[B, T+1]`."""
    q = run.states[..., :4]
    position = body_poses(mujoco_system(model), q.flatten(0, 1)).position
    return (position[:, TIP] - position[:, GOAL])[:, :2].norm(dim=-1).unflatten(0, q.shape[:2])


def draw(returns: list[float], distance: Tensor, dt: float) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([-value for value in returns])
    left.set(xlabel="iteration", ylabel="summed distance of 1 s [m]", yscale="log", title="Learning curve")
    clock = dt * torch.arange(distance.shape[1])
    right.plot(clock, 100 * distance.median(0).values, label="median")
    low, high = 100 * distance.quantile(0.05, 0), 100 * distance.quantile(0.95, 0)
    right.fill_between(clock, low, high, alpha=0.3, label="5 to 95 % of episodes")
    right.set(xlabel="time [s]", ylabel="distance [cm]", ylim=(0, None), title=f"{len(distance)} new goals")
    right.legend()
    return figure


def animate(model: mujoco.MjModel, run: Rollout, file: str, dt: float, episodes: int) -> None:
    """The arm from above, one episode after another."""
    frames = [state[:4] for states in run.states[:episodes] for state in states[::2]]
    position = body_poses(mujoco_system(model), torch.stack(frames)).position[..., :2]
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    axes.set(xlim=(-0.3, 0.3), ylim=(-0.3, 0.3), aspect="equal", xticks=[], yticks=[])
    (arm,) = axes.plot([], [], "o-", color="C0", linewidth=6)
    (goal,) = axes.plot([], [], "o", color="C3", markersize=9)

    def show(frame: int) -> None:
        arm.set_data(*position[frame, 1 : TIP + 1].T)
        goal.set_data(*position[frame, GOAL : GOAL + 1].T)

    FuncAnimation(figure, show, range(len(frames))).save(file, PillowWriter(fps=round(1 / (2 * dt))), dpi=70)


def main(settings: Settings, seed: int, gif: str | None) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mdp, model = reacher()
    module = network(settings.hidden)
    policy, nu = module_policy(module), {key: value.detach() for key, value in module.named_parameters()}
    optimizer = torch.optim.Adam(nu.values(), lr=settings.rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    start, returns = time.perf_counter(), []
    for _ in track(range(settings.iterations), description="learning to reach"):
        noise = sample_noise(mdp, policy, settings.episodes, settings.steps, generator)
        estimate = pathwise_gradient(mdp, policy, {}, nu, noise)
        assign_grads(nu, estimate.grad)
        nn.utils.clip_grad_norm_(nu.values(), 3.0)
        optimizer.step()
        schedule.step()
        returns.append(float(estimate.value))
    steps = settings.iterations * settings.episodes * settings.steps
    print(f"{steps:.2e} steps and their gradients in {time.perf_counter() - start:.0f} s")
    run = rollout(mdp, policy, {}, nu, sample_noise(mdp, policy, settings.judged, settings.steps, generator))
    distance = distances(mdp, model, run)
    near = (run.states[:, 0, 2:4].norm(dim=-1) < 0.2) if settings.judged > 8 else torch.ones(settings.judged) > 0
    last = 100 * distance[near, -1]
    print(f"{int(near.sum())} of {settings.judged} new goals are within reach")
    print(f"distance there: at first {100 * distance[near, 0].mean():.1f} cm, after {settings.steps * mdp.dt:.1f} s")
    print(f"{last.median():.2f} cm in the median, {last.quantile(0.95):.2f} cm or less in 95 %")
    if gif:
        animate(model, run, gif, mdp.dt, min(6, settings.judged))
    return draw(returns, distance[near], mdp.dt)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="MuJoCo runs on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two iterations of a few episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"iterations": 2, "episodes": 4, "steps": 6, "hidden": 4, "judged": 8} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed, arguments.gif)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
