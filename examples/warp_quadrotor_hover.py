"""Hover, learnt through Warp
==========================

Train a quadrotor's network to hover in a minute: from half a metre away, tilted, it settles within 10 cm of its target.

The model is a Warp kernel: 17 states, rotor drag, lagging motors. Policy, step and reward run in one kernel over all
environments and steps, forward and backward, so that an exact gradient of 128 flights of two seconds takes a fraction
of a second on one core. Plain gradient ascent (Adam) on the network's weights does the rest. The picture shows the
return while it learns and how far new flights are from the target; the animation is one of them.

    python examples/warp_quadrotor_hover.py --device cuda --plot hover.png --gif hover.gif
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from sim2real import Noise, Params, Policy, Rollout, assign_grads, default_params, module_policy, rollout, sample_noise
from sim2real.estimators import pathwise_gradient
from sim2real.simulators.warp_quadrotor import warp_quadrotor

MODEL = warp_quadrotor(dt=0.02, initial_std=0.3)
ARM = 0.17  # m


@dataclass(frozen=True)
class Settings:
    iterations: int = 150
    flights: int = 128
    """per iteration, each from its own start"""
    steps: int = 100
    """2 s"""
    hidden: int = 32
    learning_rate: float = 0.01
    judged: int = 256
    """flights of 8 s, after training"""


def network(settings: Settings, hover: float) -> nn.Module:
    """Thrusts in N from the state; at first little more than the thrust of hover."""
    states, rotors = len(MODEL.names["state"]), len(MODEL.names["action"])
    module = nn.Sequential(nn.Linear(states, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, rotors)).double()
    with torch.no_grad():
        module[-1].weight.mul_(0.1)
        module[-1].bias.fill_(hover)
    return module


def drawn(policy: Policy, flights: int, steps: int, generator: torch.Generator, device: str) -> Noise:
    """Random starts, the same on every device."""
    noise = sample_noise(MODEL, policy, flights, steps, generator)
    return Noise(noise.initial.to(device), noise.process.to(device), noise.policy.to(device))


def train(
    settings: Settings, theta: Params, generator: torch.Generator, device: str
) -> tuple[Policy, Params, list[float]]:
    """Policy, weights and the return per iteration."""
    module = network(settings, float(theta["mass"] * theta["g"]) / 4).to(device)
    policy, nu = module_policy(module), {key: value.detach() for key, value in module.named_parameters()}
    optimizer = torch.optim.Adam(nu.values(), lr=settings.learning_rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    returns = []
    for _ in track(range(settings.iterations), description="learning to hover"):
        noise = drawn(policy, settings.flights, settings.steps, generator, device)
        estimate = pathwise_gradient(MODEL, policy, theta, nu, noise)
        assign_grads(nu, estimate.grad)
        nn.utils.clip_grad_norm_(nu.values(), 10.0)  # the first flights tumble
        optimizer.step()
        schedule.step()
        returns.append(float(estimate.value))
    return policy, nu, returns


def distances(run: Rollout) -> Tensor:
    """m from the target, `[B, T+1]`."""
    return run.states[..., :3].norm(dim=-1)


def draw(returns: list[float], run: Rollout) -> Figure:
    """Left: the return while learning. Right: distance from the target in new flights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([-value for value in returns])
    left.set(xlabel="iteration", ylabel="cost of 2 s", yscale="log", title="Learning curve")
    distance = distances(run).cpu()
    time_axis = MODEL.dt * torch.arange(distance.shape[1])
    middle, high = distance.median(0).values, distance.quantile(0.95, 0)
    right.plot(time_axis, middle, label="median")
    right.fill_between(time_axis, distance.quantile(0.05, 0), high, alpha=0.3, label="5 to 95 % of flights")
    right.set(xlabel="time [s]", ylabel="distance [m]", ylim=(0, None), title=f"{len(distance)} new flights")
    right.legend()
    return figure


def animate(run: Rollout, file: str, seconds: float) -> None:
    """The flight that starts furthest away."""
    states = run.states[int(distances(run)[:, 0].argmax())].cpu()
    frames = range(0, min(len(states), round(seconds / MODEL.dt)), 3)
    axes: Any
    figure, axes = plt.subplots(figsize=(4.2, 4), subplot_kw={"projection": "3d"}, layout="constrained")
    axes.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), zlim=(-0.7, 0.7), xlabel="x [m]", ylabel="y [m]", zlabel="z [m]")
    axes.plot([0], [0], [0], "k+", markersize=12)
    (trace,) = axes.plot([], [], [], color="0.6", linewidth=1)
    arms = [axes.plot([], [], [], "o-", color=color, linewidth=3, markersize=4)[0] for color in ("C0", "C1")]

    def show(frame: int) -> None:
        position, attitude = states[frame, :3], states[frame, 3:7] / states[frame, 3:7].norm()
        for line, arm in zip(arms, ([ARM, 0.0, 0.0], [0.0, ARM, 0.0]), strict=True):
            offset = turned(attitude, torch.tensor(arm, dtype=states.dtype))
            line.set_data_3d(*torch.stack([position - offset, position + offset], 1).tolist())
        trace.set_data_3d(*states[: frame + 1, :3].T.tolist())
        axes.set_title(f"{frame * MODEL.dt:.1f} s")

    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=round(1 / (3 * MODEL.dt))), dpi=70)


def turned(q: Tensor, v: Tensor) -> Tensor:
    """v in body axes to world axes, by q = (w, x, y, z)."""
    axis = q[1:]
    return v + 2 * torch.linalg.cross(axis, torch.linalg.cross(axis, v) + q[0] * v)


def main(settings: Settings, seed: int, device: str, gif: str | None) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    theta = {key: value.to(device) for key, value in default_params(MODEL.box).items()}
    start = time.perf_counter()
    policy, nu, returns = train(settings, theta, generator, device)
    steps = settings.iterations * settings.flights * settings.steps
    print(f"{steps:.2e} steps and their gradients in {time.perf_counter() - start:.0f} s, compiling included")
    run = rollout(MODEL, policy, theta, nu, drawn(policy, settings.judged, 4 * settings.steps, generator, device))
    distance = distances(run)
    print(f"new flights start {distance[:, 0].mean():.2f} m away (tilted by 30 degrees and more)")
    print(
        f"after half the time {distance[:, 2 * settings.steps :].amax(1).quantile(0.95):.3f} m or less in 95 % of them"
    )
    if gif:
        animate(run, gif, seconds=4.0)
    return draw(returns, run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three iterations of a few flights")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"iterations": 3, "flights": 4, "steps": 10, "hidden": 4, "judged": 8} if arguments.quick else {}
    drawn_figure = main(Settings(**tiny), arguments.seed, arguments.device, arguments.gif)
    if arguments.plot:
        drawn_figure.savefig(arguments.plot, dpi=120)
