"""An arm designed for the controller that will learn to hold it
==============================================================

Choose the spring, the damper and the gear of an arm that a soft actor-critic learns to hold upright: the leader's cost
falls by a seventh (seed 0), though the follower is a network that the leader only watches.

The follower has torchrl's SAC with a fixed entropy temperature, in a simulator whose steps are Warp kernels. The
designer pays for the motor's heat and for the parts. At fixed behaviour a weaker gear looks cheaper; but the follower
answers it with more torque, and the naive gradient, which does not see that, points the other way. Every iteration the
follower learns on from where it was, in the arm as it is now; the leader then watches 100 episodes and fits
least-squares critics to them; of the follower it takes the policy and the soft value of its critics.
Needs ``pip install "sim2real[rl,warp]"``.

    python examples/design_arm.py --seed 0 --plot arm.png
    python examples/design_arm.py --device cuda
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from sim2real import Params, assign_grads, default_params, rollout, sample_noise
from sim2real.bounds import from_unbounded, to_unbounded
from sim2real.estimators import CriticOptions, boltzmann_covariance_gradient, inverse_noise_weights, transitions
from sim2real.leader_task import LeaderTask
from sim2real.rollout import Rollout, discounted_return
from sim2real.simulators.warp_spring_arm import warp_spring_arm
from sim2real.solvers.soft_actor_critic import LearnedFollower, SACSettings, soft_actor_critic

TEMPERATURE = 0.1  # reward units


@dataclass(frozen=True)
class Settings:
    iterations: int = 25
    first: SACSettings = field(default_factory=lambda: SACSettings(rounds=10))
    """the follower's training in the first arm"""
    later: SACSettings = field(default_factory=lambda: SACSettings(rounds=2, updates=50, learning_rate=5e-4))
    """in each of the next"""
    episodes: int = 100
    horizon: int = 100
    learning_rate: float = 0.1
    judged: int = 2000
    """episodes to compare on"""


def watch(
    task: LeaderTask, theta: Params, follower: LearnedFollower, episodes: int, horizon: int, generator: torch.Generator
) -> Rollout:
    """Episodes of the arm under the follower's policy, with the leader's rewards."""
    noise = sample_noise(task.follower, follower.policy, episodes, horizon, generator)
    run = rollout(task.follower, follower.policy, theta, follower.nu, noise)
    flat = (run.states[:, :-1].flatten(0, 1), run.actions.flatten(0, 1), run.states[:, 1:].flatten(0, 1))
    return replace(run, rewards=task.reward(theta, *flat).reshape(run.rewards.shape))


def quartics(states: Tensor) -> Tensor:
    """All monomials of angle and speed up to degree 4: what sin(angle) makes of a quadratic value, nearly."""
    angle, speed = states[:, 0], 0.5 * states[:, 1]
    return torch.stack([angle**i * speed**j for i in range(5) for j in range(5 - i)], -1)


def hypergradient(task: LeaderTask, theta: Params, follower: LearnedFollower, run: Rollout) -> Params:
    """The leader's gradient; it knows the arm that it builds, and sees the follower's policy and soft value."""
    data, quiet = transitions(run), run.states.new_zeros(1, 1)
    critics = CriticOptions(
        kind="state",
        value_features=quartics,
        row_weights=inverse_noise_weights(data.states, floor=0.05),
        next_state=lambda s, a: task.follower.step(theta, s, a, quiet.expand(len(s), 1)),
    )
    return boltzmann_covariance_gradient(
        task,
        follower.policy,
        theta,
        follower.nu,
        data,
        temperature=TEMPERATURE,
        soft_value=follower.soft_value,
        critics=critics,
    ).grad


def draw(runs: dict[str, Rollout], designs: dict[str, Params], curve: list[float]) -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=False):
        axis.plot(run.states[:30, :20, 0].T.cpu(), color="C0", alpha=0.4, linewidth=1)
        axis.plot(run.actions[:30, :20, 0].T.cpu() / 5, color="C1", alpha=0.4, linewidth=1)
        axis.set(xlabel="step", ylabel="angle [rad] (blue), torque [5 N m] (orange)", title=name, ylim=(-1.6, 1.6))
    for k, (name, theta) in enumerate(designs.items()):
        places = [i + 0.4 * k for i in range(len(theta))]
        axes[2].bar(places, [float(value) for value in theta.values()], width=0.4, label=name)
    axes[2].set_xticks([0.2, 1.2, 2.2], list(theta))
    axes[2].legend()
    axes[3].plot(curve)
    axes[3].set(xlabel="iteration", ylabel="leader's return (sampled)")
    return figure


def main(settings: Settings, seed: int, device: str) -> Figure:
    generator = torch.Generator(device).manual_seed(seed)
    task = warp_spring_arm()
    box = task.follower.box
    theta = default_params(box, device=device)
    train = lambda design, **options: soft_actor_critic(
        task.follower, design, temperature=TEMPERATURE, generator=generator, **options
    )
    follower = train(theta, settings=settings.first)
    print(f"the follower in the first arm: {follower.report.status}")
    designs, followers = {"first design": theta}, {"first design": follower}
    free = {key: value.requires_grad_() for key, value in to_unbounded(box, theta).items()}
    optimizer = torch.optim.Adam(free.values(), lr=settings.learning_rate, betas=(0.8, 0.95), maximize=True)
    curve = []
    for k in track(range(settings.iterations), description="designing"):
        run = watch(task, theta, follower, settings.episodes, settings.horizon, generator)
        curve.append(float(discounted_return(run.rewards, task.discount).mean()))
        uphill = hypergradient(task, theta, follower, run)
        moved = from_unbounded(box, free)
        pulled = torch.autograd.grad(sum((uphill[key] * moved[key]).sum() for key in moved), list(free.values()))
        assign_grads(free, dict(zip(free, pulled, strict=True)))
        optimizer.step()
        theta = {key: value.detach() for key, value in from_unbounded(box, free).items()}
        if k % 10 == 0:
            print(f"iteration {k:3d}   leader's return of this batch {curve[-1]:7.3f}")
        follower = train(theta, settings=settings.later, start=follower)
    designs["last design"] = theta
    followers["last design"] = train(theta, settings=settings.first)  # anew: what a follower would find in this arm
    runs = {}
    for name, design in designs.items():
        same = torch.Generator(device).manual_seed(10_000 + seed)
        runs[name] = watch(task, design, followers[name], settings.judged, settings.horizon, same)
        returns = discounted_return(runs[name].rewards, task.discount)
        error = 2 * float(returns.std()) / len(returns) ** 0.5
        chosen = ", ".join(f"{key} {float(value):.2f}" for key, value in design.items())
        print(f"{name:12} ({chosen}): leader's return {returns.mean():.3f} +- {error:.3f} over {len(returns)} episodes")
    return draw(runs, designs, curve)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two iterations of a few episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    chosen_settings = Settings()
    if arguments.quick:
        few = SACSettings(rounds=2, episodes=4, horizon=8, updates=2, batch=16, hidden=8)
        chosen_settings = Settings(2, few, few, episodes=20, horizon=30, judged=20)
    drawn = main(chosen_settings, arguments.seed, arguments.device)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
