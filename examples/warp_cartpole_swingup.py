"""A swing-up, learnt through Warp
===============================

Train a network to swing a pole up and hold it, half a minute on one core: 97 to 100 % of new episodes (seeds 0 to 2).

Step, policy and reward run in one Warp kernel over all environments and steps, forward and backward: an exact gradient
of the return of 64 episodes is one launch each way, some 15 ms on one core. Plain gradient ascent (Adam) on it
suffices, as

* episodes start anywhere, hanging, falling or upright: what to do on top is learnt first, then the way there;
* they grow from 1 s to 4 s while it learns: a short one has a smooth return, a long one the return that is meant;
* the state holds the sine and cosine of the angle: a turn more or less is the same state;
* the force saturates smoothly, and the norm of the gradient is clipped.

New episodes hang and last 8 s, twice what was trained. The left picture is the return while it learns, the right one
what new episodes do; the animation is one of them.

    python examples/warp_cartpole_swingup.py --device cuda --plot swingup.png --gif swingup.gif
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
import warp as wp
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from sim2real import Box, Noise, Params, Policy, Rollout, assign_grads, default_params, module_policy, rollout
from sim2real.estimators import pathwise_gradient
from sim2real.simulators.warp_model import warp_model

DT = 0.02  # s
FORCE = 15.0  # N, at most
BOX = Box(
    default={"cart_mass": 1, "pole_mass": 0.1, "length": 1, "cart_friction": 0.1, "pole_friction": 0.002, "g": 9.81}
)  # SI units


def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
    """The cart-pole of `sim2real.simulators.cartpole`, pushed by `FORCE tanh(action)`."""
    v, w, sine, cosine = state[1], state[2], state[3], state[4]
    lever = 0.5 * theta.pole_mass * theta.length
    total, inertia, coupling = theta.cart_mass + theta.pole_mass, lever * theta.length / 1.5, lever * cosine
    push = FORCE * wp.tanh(action[0]) + lever * sine * w * w - theta.cart_friction * v
    torque = lever * theta.g * sine - theta.pole_friction * w
    determinant = total * inertia - coupling * coupling
    v = v + DT * (inertia * push - coupling * torque) / determinant
    w = w + DT * (total * torque - coupling * push) / determinant
    s, c = wp.sin(DT * w), wp.cos(DT * w)
    return wp.vector(state[0] + DT * v, v, w, sine * c + cosine * s, cosine * c - sine * s)


def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
    """Upright, in the middle of the track, without haste."""
    x, v, w, force = following[0], following[1], following[2], wp.tanh(action[0])
    return -DT * (1.0 - following[4] + 0.3 * x * x + 0.01 * (v * v + w * w + force * force))


MODEL = warp_model(
    step,
    reward,
    state=("position", "velocity", "angular_velocity", "sine", "cosine"),  # of the angle from upright
    action=("push",),
    dt=DT,
    box=BOX,
    initial_state=lambda theta, start: start,
    initial_noise=5,
)


@dataclass(frozen=True)
class Settings:
    iterations: int = 1500
    episodes: int = 64
    """per iteration, each from its own start"""
    steps: tuple[int, int] = (50, 200)
    """of an episode: at first, and after the first 60 % of the iterations"""
    hidden: int = 32
    learning_rate: float = 0.01
    judged: int = 256
    """new episodes of 8 s, after training"""


def hanging(episodes: int, generator: torch.Generator) -> Tensor:
    """Starts near rest, in SI units."""
    x, v, w, angle = 0.1 * torch.randn(4, episodes, generator=generator, dtype=torch.float64)
    return torch.stack([x, v, w, torch.sin(math.pi + angle), torch.cos(math.pi + angle)], 1)


def anywhere(episodes: int, generator: torch.Generator) -> Tensor:
    """Starts at any angle, in motion."""
    x, v, w = torch.randn(3, episodes, generator=generator, dtype=torch.float64)
    angle = 2.0 * math.pi * torch.rand(episodes, generator=generator, dtype=torch.float64)
    return torch.stack([0.5 * x, v, 3.0 * w, torch.sin(angle), torch.cos(angle)], 1)


def episodes_of(start: Tensor, steps: int) -> Noise:
    """All that is random in an episode is its start."""
    nothing = start.new_zeros(len(start), steps, 0)
    return Noise(start, nothing, nothing)


def train(
    settings: Settings, theta: Params, generator: torch.Generator, device: str
) -> tuple[Policy, Params, list[float]]:
    """Policy, weights and the return per second and iteration."""
    hidden = settings.hidden
    layers = [nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)]
    module = nn.Sequential(*layers).double().to(device)
    policy, nu = module_policy(module), {key: value.detach() for key, value in module.named_parameters()}
    optimizer = torch.optim.Adam(nu.values(), lr=settings.learning_rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    first, last = settings.steps
    returns = []
    for iteration in track(range(settings.iterations), description="learning to swing up"):
        steps = round(first + (last - first) * min(1.0, iteration / (0.6 * settings.iterations)))
        start = anywhere(settings.episodes, generator).to(device)
        estimate = pathwise_gradient(MODEL, policy, theta, nu, episodes_of(start, steps))
        assign_grads(nu, estimate.grad)
        nn.utils.clip_grad_norm_(nu.values(), 1.0)  # where a pole falls, gradients grow by e every quarter second
        optimizer.step()
        schedule.step()
        returns.append(float(estimate.value) / (steps * DT))
    return policy, nu, returns


def draw(returns: list[float], run: Rollout) -> Figure:
    """Left: the return while learning. Right: height of the tip in new episodes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(returns, linewidth=0.8)
    left.set(xlabel="iteration", ylabel="return per second", title="Learning curve")
    height = run.states[:40, :, 4].cpu()
    right.plot(DT * torch.arange(height.shape[1]), height.T, color="C0", alpha=0.3, linewidth=1)
    right.set(xlabel="time [s]", ylabel="height of the tip / length", title=f"{len(height)} new episodes")
    return figure


def animate(states: Tensor, file: str) -> None:
    """One episode, `[T+1, 5]`."""
    frames, length = range(0, len(states), 4), BOX.default["length"]
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.set(xlim=(-2.2, 2.2), ylim=(-1.2, 1.2), aspect="equal", xlabel="position [m]")
    axes.axhline(0.0, color="0.8", zorder=0)
    (cart,) = axes.plot([], [], "s", color="C0", markersize=14)
    (pole,) = axes.plot([], [], "o-", color="C1", linewidth=4)

    def show(frame: int) -> None:
        x, _, _, sine, cosine = states[frame].tolist()
        cart.set_data([x], [0.0])
        pole.set_data([x, x + length * sine], [0.0, length * cosine])
        axes.set_title(f"{frame * DT:.1f} s")

    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=round(1 / (4 * DT))), dpi=70)


def main(settings: Settings, seed: int, device: str, gif: str | None) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    theta = {key: value.to(device) for key, value in default_params(BOX).items()}
    began, busy = time.perf_counter(), time.process_time()
    policy, nu, returns = train(settings, theta, generator, device)
    print(f"trained in {time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s of CPU, with compiling")
    new = episodes_of(hanging(settings.judged, generator).to(device), 2 * settings.steps[1])
    run = rollout(MODEL, policy, theta, nu, new)
    upright = run.states[:, settings.steps[1] :, 4].amin(1) > math.cos(math.radians(20.0))
    share, far = 100.0 * float(upright.double().mean()), float(run.states[..., 0].abs().max())
    print(f"within 20 degrees of upright all through the second half: {share:.1f} % of {len(upright)} new episodes")
    print(f"furthest from the middle of the track: {far:.2f} m")
    if gif:
        animate(run.states[0].cpu(), gif)
    return draw(returns, run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three iterations of a few episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny: dict[str, Any] = {"iterations": 3, "episodes": 4, "steps": (4, 8), "hidden": 4, "judged": 8}
    drawn_figure = main(Settings(**(tiny if arguments.quick else {})), arguments.seed, arguments.device, arguments.gif)
    if arguments.plot:
        drawn_figure.savefig(arguments.plot, dpi=120)
