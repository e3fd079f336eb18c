"""A hopper learns to stay up from gradients
=========================================

Gymnasium's hopper, learnt through MuJoCo's own contacts: after half a minute of one core it stays up for 1000 steps.

Every iteration rolls a network for a few control steps from where the last iteration left each environment, adds what
a critic expects beyond, and differentiates the sum through policy, reward and simulator, contacts included: one exact
gradient instead of many noisy episodes (SHAC: Xu et al., Accelerated Policy Learning with Parallel Differentiable
Simulation, ICLR 2022). Horizons are short because gradients through many touch-downs grow; those that grow beyond a
bound are cut, per environment. Training goes on to the `goal`; it is not yet steady there: what is gained in speed can
be lost in a fall. The judge is `Hopper-v5` itself: its own integrator, reward, termination and starts.
The picture shows its return over seconds of training; the animation is one of its episodes.

    python examples/mujoco_hopper.py --plot hopper.png --gif hopper.gif
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import mujoco
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn

from sim2real import ModelMDP, Params
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_step import GradientGuard


@dataclass(frozen=True)
class Settings:
    seconds: float = 600.0
    """of training, at most"""
    goal: float = 1000.0
    """return of Hopper-v5 at which training ends"""
    environments: int = 64
    horizon: int = 16
    """control steps of 8 ms between updates"""
    hidden: int = 64
    rate: float = 2e-3
    critic_rate: float = 1e-3
    discount: float = 0.99
    trace: float = 0.95
    """of TD(lambda) targets"""
    critic_steps: int = 8
    episode: int = 1000
    judge_every: int = 10
    """iterations"""
    episodes: int = 5
    """to judge"""


def hopper() -> ModelMDP:
    """Reward and end of Hopper-v5; states are (x, z, angle, thigh, leg, foot) and their rates."""
    file = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "hopper.xml"
    spec = mujoco.MjSpec.from_file(str(file))
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # a quarter of the cost of RK4, which judges

    def reward(theta: Params, s: Tensor, a: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return 1.0 + (following[:, 0] - s[:, 0]) / 0.008 - 1e-3 * (a**2).sum(-1)

    def fallen(theta: Params, s: Tensor) -> Tensor:
        return (s[:, 1] <= 0.7) | (s[:, 2].abs() >= 0.2) | (s[:, 2:].abs() >= 100.0).any(-1)

    return mujoco_model(spec, (), reward, frame_skip=4, terminal=fallen, guard=GradientGuard(10.0))


def observed(states: Tensor) -> Tensor:
    """What Hopper-v5 shows: all but x, speeds within 10."""
    return torch.cat([states[:, 1:6], states[:, 6:].clamp(-10.0, 10.0)], -1)


def network(outputs: int, hidden: int) -> nn.Sequential:
    layer = lambda inputs: (nn.Linear(inputs, hidden), nn.ELU(), nn.LayerNorm(hidden))
    return nn.Sequential(*layer(11), *layer(hidden), nn.Linear(hidden, outputs)).double()


def started(count: int, generator: torch.Generator) -> Tensor:
    """States from Hopper-v5's starts."""
    noise = torch.rand(count, 12, generator=generator, dtype=torch.float64)
    return (noise - 0.5) * 1e-2 + torch.tensor([0, 1.25] + [0] * 10, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Stretch:
    """One short rollout: observations `[T+1, B, 11]`, rewards, ends and cuts `[T, B]`, and those of `following`."""

    observations: Tensor
    following: Tensor
    rewards: Tensor
    fallen: Tensor
    cut: Tensor


Actor = Callable[[Tensor], Tensor]


def roll(
    mdp: ModelMDP, actor: Actor, states: Tensor, ages: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Stretch, Tensor, Tensor]:
    """A stretch with its graph, and where it leaves states and ages: fallen or old environments start anew."""
    assert mdp.terminal is not None
    rows: list[list[Tensor]] = [[], [], [], [], []]
    e = states.new_zeros(len(states), 0)
    s = states
    for _ in range(settings.horizon):
        o = observed(s)
        a = actor(o)
        after = mdp.step({}, s, a, e)
        ages = ages + 1
        fallen = mdp.terminal({}, after.detach())
        cut = ~fallen & (ages >= settings.episode)
        for row, x in zip(rows, (o, observed(after), mdp.reward({}, s, a, e, after), fallen, cut), strict=True):
            row.append(x)
        ended = fallen | cut
        s = torch.where(ended[:, None], started(len(s), generator), after)
        ages = torch.where(ended, torch.zeros_like(ages), ages)
    return Stretch(*(torch.stack(row) for row in rows)), s.detach(), ages


def objective(stretch: Stretch, value: nn.Module, discount: float) -> Tensor:
    """Mean discounted return of the stretch, the critic's expectation where it stops; falling is worth nothing."""
    total = torch.zeros(())
    weight = torch.ones_like(stretch.rewards[0])
    last = len(stretch.rewards) - 1
    for t, reward in enumerate(stretch.rewards):
        total = total + (weight * reward).sum()
        stops = stretch.cut[t] | (t == last) & ~stretch.fallen[t]
        beyond = discount * value(stretch.following[t])[:, 0]
        total = total + (weight * beyond * stops).sum()
        ended = stretch.fallen[t] | stretch.cut[t]
        weight = torch.where(ended, torch.ones_like(weight), weight * discount)
    return total / stretch.rewards.numel()


@torch.no_grad()
def targets(stretch: Stretch, value: nn.Module, settings: Settings) -> Tensor:
    """TD(lambda) `[T, B]`."""
    out, ahead = [], value(stretch.following[-1])[:, 0]
    for t in reversed(range(len(stretch.rewards))):
        here = value(stretch.following[t])[:, 0]
        mixed = torch.where(stretch.cut[t], here, (1 - settings.trace) * here + settings.trace * ahead)
        ahead = stretch.rewards[t] + settings.discount * torch.where(stretch.fallen[t], torch.zeros_like(mixed), mixed)
        out.append(ahead)
    return torch.stack(out[::-1])


def training(settings: Settings, seed: int) -> Iterator[tuple[nn.Module, int]]:
    """Trains for ever; now and then the network, and how many control steps it has seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mdp = hopper()
    mean, value = network(3, settings.hidden), network(1, settings.hidden)
    spread = nn.Parameter(torch.full((3,), -1.0, dtype=torch.float64))
    slow = copy.deepcopy(value).requires_grad_(False)
    learnt = [*mean.parameters(), spread]
    policy_steps = torch.optim.Adam(learnt, lr=settings.rate, betas=(0.7, 0.95))
    value_steps = torch.optim.Adam(value.parameters(), lr=settings.critic_rate, betas=(0.7, 0.95))
    states = started(settings.environments, generator)
    ages = torch.randint(0, settings.episode, (len(states),), generator=generator)

    def actor(o: Tensor) -> Tensor:
        noise = torch.randn(len(o), 3, generator=generator, dtype=torch.float64)
        return torch.tanh(mean(o) + spread.exp() * noise)

    for iteration in itertools.count():
        if iteration % settings.judge_every == 0:
            yield mean, iteration * settings.environments * settings.horizon
        stretch, states, ages = roll(mdp, actor, states, ages, settings, generator)
        policy_steps.zero_grad()
        (-objective(stretch, slow, settings.discount)).backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        policy_steps.step()
        learn_value(value, slow, value_steps, stretch, settings)


def learn_value(
    value: nn.Module, slow: nn.Module, steps: torch.optim.Optimizer, stretch: Stretch, settings: Settings
) -> None:
    """Fit the critic to its targets, then move the slow copy towards it."""
    goal, o = targets(stretch, slow, settings).flatten(), stretch.observations.detach().flatten(0, 1)
    for _ in range(settings.critic_steps):
        for rows in torch.randperm(len(o)).chunk(4):
            steps.zero_grad()
            ((value(o[rows])[:, 0] - goal[rows]) ** 2).mean().backward()
            steps.step()
    with torch.no_grad():
        for kept, new in zip(slow.parameters(), value.parameters(), strict=True):
            kept.lerp_(new, 0.8)


def episode(act: Callable[[Tensor], Tensor], seed: int, limit: int) -> tuple[float, list[np.ndarray]]:
    """Return of a policy in Hopper-v5, and positions and axes of the geoms on the way."""
    world = gymnasium.make("Hopper-v5", max_episode_steps=limit)
    o, _ = world.reset(seed=seed)
    total, poses, done = 0.0, [], False
    with torch.no_grad():
        while not done:
            o, reward, ended, late, _ = world.step(act(torch.from_numpy(o)[None])[0].numpy())
            total, done = total + float(reward), ended or late
            data = world.unwrapped.data  # type: ignore[attr-defined]
            poses.append(np.concatenate([data.geom_xpos, data.geom_xmat[:, [2, 5, 8]]], 1))
    world.close()
    return total, poses


def draw(history: list[tuple[float, float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axes.plot(*zip(*history, strict=True), "o-", markersize=3)
    axes.set(xlabel="seconds of training", ylabel="return in Hopper-v5", title="Learning curve")
    return figure


def animate(poses: list[np.ndarray], file: str, halves: np.ndarray, radii: np.ndarray) -> None:
    """Capsules of the hopper, seen from the side."""
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    axes.set(ylim=(-0.1, 1.7), aspect="equal", yticks=[])
    axes.axhline(0, color="0.5")
    lines = [axes.plot([], [], color="C0", linewidth=200 * r, solid_capstyle="round")[0] for r in radii[1:]]

    def show(frame: int) -> None:
        for line, pose, half in zip(lines, poses[frame][1:], halves[1:], strict=True):
            ends = pose[:3] + half * pose[3:] * np.array([[-1.0], [1.0]])
            line.set_data(ends[:, 0], ends[:, 2])
        centre = poses[frame][1, 0]
        axes.set(xlim=(centre - 1.2, centre + 1.2), title=f"{0.008 * frame:.1f} s")

    frames = range(0, min(len(poses), 500), 5)
    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=25), dpi=70)


def main(settings: Settings, seed: int, gif: str | None) -> Figure:
    history: list[tuple[float, float]] = []
    spent = 0.0
    rounds = training(settings, seed)
    with Progress() as progress:
        task = progress.add_task("learning to hop", total=settings.seconds)
        while spent < settings.seconds and (not history or history[-1][1] < settings.goal):
            start = time.perf_counter()
            mean, steps = next(rounds)
            spent += time.perf_counter() - start
            act = lambda o, mean=mean: torch.tanh(mean(o))
            played = [episode(act, 1000 + k, settings.episode) for k in range(settings.episodes)]
            history.append((spent, float(np.mean([value for value, _ in played]))))
            progress.update(task, completed=spent, description=f"learning to hop: return {history[-1][1]:.0f}")
    print(f"return of {history[-1][1]:.0f} in Hopper-v5 after {spent:.0f} s of training, {steps} control steps")
    if gif:
        model = gymnasium.make("Hopper-v5").unwrapped.model  # type: ignore[attr-defined]
        animate(max(played, key=lambda one: one[0])[1], gif, model.geom_size[:, 1], model.geom_size[:, 0])
    return draw(history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="MuJoCo runs on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two iterations of a few environments")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"seconds": 1e-3, "environments": 4, "horizon": 2, "hidden": 4, "judge_every": 1, "episodes": 1}
    figure = main(Settings(**tiny) if arguments.quick else Settings(), arguments.seed, arguments.gif)
    if arguments.plot:
        figure.savefig(arguments.plot, dpi=120)
