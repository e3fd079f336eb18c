"""A swing-up, learnt through Warp
===============================

Train a network to swing a hanging pole up: 99 % of new four-second episodes end with a second upright (seed 0).

Policy, step and reward run in one Warp kernel over all environments and steps, forward and backward: an exact gradient
of the return of 64 episodes of 200 steps is one launch each way. Plain gradient ascent (Adam) on it is enough for
some starts of the network and not for all (84 % with seed 1, none with seed 2); what lies beyond the four seconds is
not trained for. The left picture is the return while it learns, the right one what the
angles of new episodes do; the animation is one of them.

    python examples/warp_cartpole_swingup.py --device cuda --plot swingup.png --gif swingup.gif
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from sim2real import Noise, Params, Policy, Rollout, assign_grads, default_params, module_policy, rollout, sample_noise
from sim2real.estimators import pathwise_gradient
from sim2real.simulators.warp_cartpole import warp_cartpole

MODEL = warp_cartpole(initial_angle=math.pi, initial_std=0.1)  # hangs; angle 0 is upright
UPRIGHT = 0.1  # 1 - cos(angle): within 26 degrees


@dataclass(frozen=True)
class Settings:
    iterations: int = 600
    episodes: int = 64
    """per iteration, each from its own start"""
    steps: int = 200
    """4 s"""
    hidden: int = 32
    learning_rate: float = 0.005
    judged: int = 256
    """new episodes, after training"""


def network(hidden: int) -> nn.Module:
    """Force in N from the state; the last layer starts thirty times larger than usual, as forces are that large."""
    layers = [nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)]
    module = nn.Sequential(*layers).double()
    with torch.no_grad():
        module[-1].weight.mul_(30.0)
    return module


def drawn(policy: Policy, episodes: int, steps: int, generator: torch.Generator, device: str) -> Noise:
    """Random starts, the same on every device."""
    noise = sample_noise(MODEL, policy, episodes, steps, generator)
    return Noise(noise.initial.to(device), noise.process.to(device), noise.policy.to(device))


def train(
    settings: Settings, theta: Params, generator: torch.Generator, device: str
) -> tuple[Policy, Params, list[float]]:
    """Policy, weights and the return per iteration."""
    module = network(settings.hidden).to(device)
    policy, nu = module_policy(module), {key: value.detach() for key, value in module.named_parameters()}
    optimizer = torch.optim.Adam(nu.values(), lr=settings.learning_rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    returns = []
    for _ in track(range(settings.iterations), description="learning to swing up"):
        noise = drawn(policy, settings.episodes, settings.steps, generator, device)
        estimate = pathwise_gradient(MODEL, policy, theta, nu, noise)
        assign_grads(nu, estimate.grad)
        nn.utils.clip_grad_norm_(nu.values(), 1.0)  # where a pole falls, gradients grow by e every quarter second
        optimizer.step()
        schedule.step()
        returns.append(float(estimate.value))
    return policy, nu, returns


def stands(run: Rollout) -> Tensor:
    """Which episodes end with a second upright, `[B]`."""
    last = run.states[:, -round(1.0 / MODEL.dt) :, 1]
    return (1.0 - torch.cos(last)).amax(1) < UPRIGHT


def draw(returns: list[float], run: Rollout) -> Figure:
    """Left: the return while learning. Right: height of the tip in new episodes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(returns)
    left.set(xlabel="iteration", ylabel="return of 4 s", title="Learning curve", yscale="symlog")
    height = torch.cos(run.states[:, :, 1]).cpu()
    right.plot(MODEL.dt * torch.arange(height.shape[1]), height[:40].T, color="C0", alpha=0.3, linewidth=1)
    right.set(xlabel="time [s]", ylabel="height of the tip / length", title="40 new episodes")
    return figure


def animate(run: Rollout, file: str) -> None:
    """The first of the episodes that end upright, or the first."""
    states = run.states[int(stands(run).to(torch.int8).argmax())].cpu()
    frames, length = range(0, len(states), 3), float(default_params(MODEL.box)["length"])
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    middle = float(states[:, 0].mean())
    axes.set(xlim=(middle - 2.2, middle + 2.2), ylim=(-1.3, 1.3), aspect="equal", xlabel="position [m]")
    axes.axhline(0.0, color="0.8", zorder=0)
    (cart,) = axes.plot([], [], "s", color="C0", markersize=14)
    (pole,) = axes.plot([], [], "o-", color="C1", linewidth=4)

    def show(frame: int) -> None:
        x, angle = (float(value) for value in states[frame, :2])
        cart.set_data([x], [0.0])
        pole.set_data([x, x + length * math.sin(angle)], [0.0, length * math.cos(angle)])
        axes.set_title(f"{frame * MODEL.dt:.1f} s")

    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=round(1 / (3 * MODEL.dt))), dpi=70)


def main(settings: Settings, seed: int, device: str, gif: str | None) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    theta = {key: value.to(device) for key, value in default_params(MODEL.box).items()}
    start = time.perf_counter()
    policy, nu, returns = train(settings, theta, generator, device)
    steps = settings.iterations * settings.episodes * settings.steps
    print(f"{steps:.2e} steps and their gradients in {time.perf_counter() - start:.0f} s, compiling included")
    run = rollout(MODEL, policy, theta, nu, drawn(policy, settings.judged, settings.steps, generator, device))
    share = 100 * float(stands(run).double().mean())
    print(f"upright through the last second of {share:.1f} % of {len(run.states)} new episodes")
    if gif:
        animate(run, gif)
    return draw(returns, run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three iterations of a few episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"iterations": 3, "episodes": 4, "steps": 60, "hidden": 4, "judged": 8} if arguments.quick else {}
    drawn_figure = main(Settings(**tiny), arguments.seed, arguments.device, arguments.gif)
    if arguments.plot:
        drawn_figure.savefig(arguments.plot, dpi=120)
