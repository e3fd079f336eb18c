"""A hopper learns to hop from gradients
=====================================

Gymnasium's hopper, learnt through MuJoCo's own contacts: it hops for 1000 steps after a minute or two of one core.

Every iteration rolls a network for a few control steps from where the last iteration left each environment, adds what
a critic expects beyond, and differentiates the sum through policy, reward and simulator, contacts included: one exact
gradient instead of many noisy episodes (SHAC: Xu et al., Accelerated Policy Learning with Parallel Differentiable
Simulation, ICLR 2022). Horizons are short because gradients through many touch-downs grow; those that grow beyond a
bound are cut, per environment. The critic learns numbers near 1 from normalised observations: that decides whether
training goes on from standing to hopping. The judge is `Hopper-v5` itself: its own integrator, reward, termination
and starts, no noise in the actions.
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
from functools import partial
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
    goal: float = 2000.0
    """return of Hopper-v5 at which training ends"""
    environments: int = 64
    horizon: int = 32
    """control steps of 8 ms between updates"""
    hidden: int = 64
    rate: float = 2e-3
    """of actor and critic, at first; a tenth of it after `slowed` iterations"""
    slowed: int = 500
    noise: float = 0.6
    """standard deviation of the actions at first, before they are squashed into (-1, 1)"""
    discount: float = 0.99
    trace: float = 0.95
    """of TD(lambda) targets"""
    critic_steps: int = 16
    steepest: float = 200.0
    """bound on the change of the return with the state of an environment"""
    episode: int = 1000
    judge_every: int = 10
    """iterations"""
    episodes: int = 10
    """to judge"""


def hopper(bound: float) -> ModelMDP:
    """Reward and end of Hopper-v5; states are (x, z, angle, thigh, leg, foot) and their rates."""
    file = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "hopper.xml"
    spec = mujoco.MjSpec.from_file(str(file))
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # a quarter of the cost of RK4, which judges

    def reward(theta: Params, s: Tensor, a: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return 1.0 + (following[:, 0] - s[:, 0]) / 0.008 - 1e-3 * (a**2).sum(-1)

    def fallen(theta: Params, s: Tensor) -> Tensor:
        return (s[:, 1] <= 0.7) | (s[:, 2].abs() >= 0.2) | (s[:, 2:].abs() >= 100.0).any(-1)

    return mujoco_model(spec, (), reward, frame_skip=4, terminal=fallen, guard=GradientGuard(bound))


def observed(states: Tensor) -> Tensor:
    """What Hopper-v5 shows: all but x, speeds within 10."""
    return torch.cat([states[:, 1:6], states[:, 6:].clamp(-10.0, 10.0)], -1)


def network(outputs: int, hidden: int) -> nn.Sequential:
    layer = lambda inputs: (nn.Linear(inputs, hidden), nn.ELU(), nn.LayerNorm(hidden))
    last = nn.Linear(hidden, outputs)
    with torch.no_grad():
        last.weight.mul_(0.1)
    return nn.Sequential(*layer(11), *layer(hidden), last).double()


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and variance of the observations so far, and their number."""

    mean: Tensor
    variance: Tensor
    count: float


def extended(scale: Scale, o: Tensor) -> Scale:
    """With new observations `[N, 11]` (Chan et al., Updating formulae for computing sample variances, 1979)."""
    count, gap = scale.count + len(o), o.mean(0) - scale.mean
    squares = scale.variance * scale.count + o.var(0, correction=0) * len(o)
    squares = squares + gap**2 * (scale.count * len(o) / count)
    return Scale(scale.mean + gap * (len(o) / count), squares / count, count)


def normalised(scale: Scale, o: Tensor) -> Tensor:
    return ((o - scale.mean) / (scale.variance + 1e-5).sqrt()).clamp(-10.0, 10.0)


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


Value = Callable[[Tensor], Tensor]


def objective(stretch: Stretch, value: Value, discount: float) -> Tensor:
    """Mean discounted return of the stretch, the critic's expectation where it stops; falling is worth nothing."""
    total = torch.zeros(())
    weight = torch.ones_like(stretch.rewards[0])
    last = len(stretch.rewards) - 1
    for t, reward in enumerate(stretch.rewards):
        total = total + (weight * reward).sum()
        stops = stretch.cut[t] | (t == last) & ~stretch.fallen[t]
        if stops.any():
            total = total + (weight * discount * value(stretch.following[t]) * stops).sum()
        ended = stretch.fallen[t] | stretch.cut[t]
        weight = torch.where(ended, torch.ones_like(weight), weight * discount)
    return total / stretch.rewards.numel()


@torch.no_grad()
def targets(stretch: Stretch, value: Value, settings: Settings) -> Tensor:
    """TD(lambda) `[T, B]`."""
    out, ahead = [], value(stretch.following[-1])
    for t in reversed(range(len(stretch.rewards))):
        here = value(stretch.following[t])
        mixed = torch.where(stretch.cut[t], here, (1 - settings.trace) * here + settings.trace * ahead)
        ahead = stretch.rewards[t] + settings.discount * torch.where(stretch.fallen[t], torch.zeros_like(mixed), mixed)
        out.append(ahead)
    return torch.stack(out[::-1])


def training(settings: Settings, seed: int) -> Iterator[tuple[Actor, int]]:
    """Trains for ever; now and then the actor without its noise, and how many control steps it has seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    together = settings.environments * settings.horizon
    mdp = hopper(settings.steepest / together)
    mean, critic = network(3, settings.hidden), network(1, settings.hidden)
    spread = nn.Parameter(torch.full((3,), settings.noise, dtype=torch.float64).log())
    slow = copy.deepcopy(critic).requires_grad_(False)
    learnt = [*mean.parameters(), spread]
    adam = partial(torch.optim.Adam, lr=settings.rate, betas=(0.7, 0.95))
    optimizers = adam(learnt), adam(critic.parameters())
    scale = Scale(torch.zeros(11, dtype=torch.float64), torch.ones(11, dtype=torch.float64), 1e-4)
    states = started(settings.environments, generator)
    ages = torch.randint(0, settings.episode, (len(states),), generator=generator)

    def act(scale: Scale, noise: float, o: Tensor) -> Tensor:
        e = noise * torch.randn(len(o), 3, generator=generator, dtype=torch.float64)
        return torch.tanh(mean(normalised(scale, o)) + spread.exp() * e)

    def value(scale: Scale, o: Tensor) -> Tensor:
        """Networks learn numbers near 1: the largest sum of rewards of 1 is the unit."""
        return slow(normalised(scale, o))[..., 0] / (1.0 - settings.discount)

    for iteration in itertools.count():
        if iteration % settings.judge_every == 0:
            yield partial(act, scale, 0.0), iteration * together
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = settings.rate * max(1.0 - 0.9 * iteration / settings.slowed, 0.1)
        stretch, states, ages = roll(mdp, partial(act, scale, 1.0), states, ages, settings, generator)
        optimizers[0].zero_grad()
        (-objective(stretch, partial(value, scale), settings.discount)).backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizers[0].step()
        goal = (1.0 - settings.discount) * targets(stretch, partial(value, scale), settings).flatten()
        o = stretch.observations.detach().flatten(0, 1)
        learn_value(critic, slow, optimizers[1], normalised(scale, o), goal, settings.critic_steps)
        scale = extended(scale, o)


def learn_value(
    critic: nn.Module, slow: nn.Module, optimizer: torch.optim.Optimizer, o: Tensor, goal: Tensor, steps: int
) -> None:
    """Fit the critic to its targets, then move the slow copy towards it."""
    for _ in range(max(1, steps // 4)):
        for rows in torch.randperm(len(o)).chunk(4):
            optimizer.zero_grad()
            ((critic(o[rows])[:, 0] - goal[rows]) ** 2).mean().backward()
            optimizer.step()
    with torch.no_grad():
        for kept, new in zip(slow.parameters(), critic.parameters(), strict=True):
            kept.lerp_(new, 0.8)


def episode(act: Actor, seed: int, limit: int) -> tuple[float, list[np.ndarray]]:
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
            act, steps = next(rounds)
            spent += time.perf_counter() - start
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
