"""A building designed for the controller that will run it
=======================================================

Choose insulation and airflow of a building whose heating controller will adapt to them: the leader's cost falls by more
than a third, close to the least possible (162.5), though the leader never sees how the controller is computed.

The controller (the follower) minimises its own discomfort and energy and is the soft optimum for whatever building it
gets. The designer (the leader) dislikes uneven zones, energy, and expensive construction. Following the direct effect
of the construction alone ends at -197: what matters is how the controller answers. Every iteration runs the building
for 100 episodes and fits least-squares critics of its own return and of the follower's gradient to those transitions.

    python examples/design_building.py --seed 0 --plot building.png
    python examples/design_building.py --device cuda
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from sim2real import Params, assign_grads, rollout, sample_noise
from sim2real.estimators import CriticOptions, boltzmann_covariance_gradient, inverse_noise_weights, transitions
from sim2real.rollout import Rollout, discounted_return
from sim2real.simulators import ThermalBuilding, building_thermal, four_zones, thermal_matrix
from sim2real.solvers import SoftLQR, linear_noise_policy, soft_lqr

POLICY = linear_noise_policy(2)


@dataclass(frozen=True)
class Settings:
    iterations: int = 80
    episodes: int = 100
    horizon: int = 100
    learning_rate: float = 0.3
    judged: int = 2000
    """episodes to compare on"""


def respond(theta: Params, building: ThermalBuilding) -> SoftLQR:
    """The follower's controller for this building."""
    A = thermal_matrix(theta, building)
    return soft_lqr(
        A,
        building.B,
        building.Q,
        building.R,
        discount=building.follower_discount,
        temperature=building.temperature,
        noise_covariance=building.noise_std**2 * torch.eye(len(A), dtype=A.dtype, device=A.device),
    )


def operate(
    theta: Params, building: ThermalBuilding, episodes: int, horizon: int, generator: torch.Generator
) -> Rollout:
    """Episodes of the building under the controller it gets, with the leader's rewards."""
    task = building_thermal(building)
    noise = sample_noise(task.follower, POLICY, episodes, horizon, generator)
    run = rollout(task.follower, POLICY, theta, respond(theta, building).nu, noise)
    flat = (run.states[:, :-1].flatten(0, 1), run.actions.flatten(0, 1), run.states[:, 1:].flatten(0, 1))
    return replace(run, rewards=task.reward(theta, *flat).reshape(run.rewards.shape))


def hypergradient(theta: Params, building: ThermalBuilding, run: Rollout) -> Params:
    """The leader's gradient from one batch of transitions."""
    best, data = respond(theta, building), transitions(run)
    soft_value = lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    critics = CriticOptions(row_weights=inverse_noise_weights(data.states), kind="state")
    return boltzmann_covariance_gradient(
        building_thermal(building),
        POLICY,
        theta,
        best.nu,
        data,
        temperature=building.temperature,
        soft_value=soft_value,
        critics=critics,
    ).grad


def draw(runs: dict[str, Rollout], theta: Params, curve: list[float]) -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=False):
        for zone in range(run.states.shape[-1]):
            axis.plot(run.states[:, :12, zone].square().mean(0).sqrt().cpu(), marker=".", label=f"zone {zone + 1}")
        axis.set(xlabel="step", ylabel="rms deviation [K]", title=f"{name}: the controller's answer", ylim=(0, None))
    axes[0].legend()
    chosen = torch.sigmoid(torch.cat([theta["insulation"], theta["airflow"]])).cpu()
    axes[2].bar([f"i{k}" for k in range(1, 5)] + [f"a{k}" for k in range(1, 5)], chosen.tolist())
    axes[2].set(title="insulation and airflow chosen", ylim=(0, 1))
    axes[3].plot(curve)
    axes[3].axhline(-162.5, color="black", linestyle=":")
    axes[3].set(xlabel="iteration", ylabel="leader's return (sampled)", title="dotted: the best possible")
    return figure


def main(settings: Settings, seed: int, device: str) -> Figure:
    generator = torch.Generator(device).manual_seed(seed)
    data = four_zones()
    moved = {name: getattr(data, name).to(device) for name in ("coupling", "leak", "B", "Q", "R")}
    building = replace(data, **moved)
    zero = torch.zeros(4, dtype=torch.float64, device=device)
    first = {"insulation": zero, "airflow": zero.clone()}
    theta = {key: value.clone().requires_grad_() for key, value in first.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=settings.learning_rate, betas=(0.9, 0.99), maximize=True)
    curve = []
    for k in range(settings.iterations):
        now = {key: value.detach() for key, value in theta.items()}
        run = operate(now, building, settings.episodes, settings.horizon, generator)
        curve.append(float(discounted_return(run.rewards, building.leader_discount).mean()))
        assign_grads(theta, hypergradient(now, building, run))
        optimizer.step()
        if k % 10 == 0:
            print(f"iteration {k:3d}   leader's return of this batch {curve[-1]:8.2f}")
    last = {key: value.detach() for key, value in theta.items()}
    runs = {}
    for name, design in (("first design", first), ("last design", last)):
        same_starts = torch.Generator(device).manual_seed(10_000 + seed)
        runs[name] = operate(design, building, settings.judged, settings.horizon, same_starts)
        returns = discounted_return(runs[name].rewards, building.leader_discount)
        error = 2 * float(returns.std()) / len(returns) ** 0.5
        print(f"{name:12} leader's return {returns.mean():8.2f} +- {error:.2f} over {len(returns)} episodes")
    return draw(runs, last, curve)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="three iterations of a few episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    tiny = {"iterations": 3, "episodes": 20, "horizon": 40, "judged": 50} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed, arguments.device)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
