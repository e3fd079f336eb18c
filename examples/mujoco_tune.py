"""Tuned to fit, tuned to perform
==============================

A model that fits its log best is not the one whose policy does best: how near a real sled stops to its goal, both ways.

A launcher pushes a sled over the ground; sliding friction stops it. Friction and mass of the MuJoCo model are fitted
to gentle slides, and the fit is good. But the real ground also drags in proportion to speed, which the model cannot
say: launches for far goals, optimal in the fitted model, fall short. "Tuned to perform" moves friction and mass along

    d J_real(nu*(theta)) / d theta = (d nu*/d theta)' dJ_real/d nu,

nu* being the launches that are optimal in the model: a layer over contacts, `implicit_argmax`. The real side is only
measured, by launching a little harder and a little softer. The picture shows the misses over the goals and how they
fall; the animation shows both sleds.

    python examples/mujoco_tune.py --plot tune.png --gif tune.gif
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from sim2real import FitSettings, ModelMDP, Params, Rollout, RolloutLog, default_params, rollout
from sim2real.fit import fit
from sim2real.mdp import Noise
from sim2real.policy import Policy, deterministic_policy
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_parameters import Parameter
from sim2real.solvers import cg, implicit_argmax, policy_optimum

SLED = """<mujoco><option timestep=".01"/>
<worldbody><geom name="ground" type="plane" size="5 5 .1" friction=".05 .001 .001"/>
<body name="sled" pos="0 0 .05"><joint name="x" type="slide" axis="1 0 0" damping="{drag}"/>
  <joint name="z" type="slide" axis="0 0 1"/>
  <geom name="runner1" type="sphere" size=".05" pos="-.1 0 0" friction=".3 .001 .001" mass=".5"/>
  <geom name="runner2" type="sphere" size=".05" pos=".1 0 0" friction=".3 .001 .001" mass=".5"/></body></worldbody>
<actuator><motor name="launcher" joint="x"/></actuator></mujoco>"""
THETA = {
    "friction": Parameter(("runner*.friction.slide",), low=0.1, high=0.8),
    "mass": Parameter(("sled.mass",), low=0.3, high=3.0),
}
REAL = {"friction": 0.25, "mass": 1.2}
DRAG = 0.6
"""N s/m, of the real ground"""
LAUNCH = 0.2
"""m over which the launcher pushes"""


@dataclass(frozen=True)
class Settings:
    iterations: int = 8
    goals: int = 6
    steps: int = 60
    """of 20 ms"""
    rate: float = 0.06
    seconds: float = 8.0
    """of the log"""


def sled(drag: float) -> ModelMDP:
    """State (x, z) and rates, action the force in N."""
    nothing = lambda theta, s, a, e, following: torch.zeros_like(s[:, 0])
    return mujoco_model(SLED.format(drag=drag), THETA, nothing, frame_skip=2)


def launches(goals: Tensor) -> Policy:
    """Force on the way through the launcher: a polynomial nu of the goal."""

    def act(nu: Params, s: Tensor) -> Tensor:
        powers = torch.stack([torch.ones_like(goals), goals, goals**2], -1)
        force = 10.0 * (powers * nu["force"]).sum(-1)
        return (force * torch.sigmoid((LAUNCH - s[:, 0]) / 0.01))[:, None]

    return deterministic_policy(act)


def run(mdp: ModelMDP, theta: Params, nu: Params, goals: Tensor, steps: int) -> Rollout:
    """One launch per goal, from rest."""
    zero = lambda *shape: torch.zeros(len(goals), *shape, dtype=torch.float64)
    noise = Noise(zero(mdp.noise_dims[0]), zero(steps, mdp.noise_dims[1]), zero(steps, 0))
    return rollout(mdp, launches(goals), theta, nu, noise)


def expected(mdp: ModelMDP, goals: Tensor, steps: int) -> Callable[[Params, Params], Tensor]:
    """J(theta, nu): minus the mean squared miss in cm^2."""
    return lambda theta, nu: -((100.0 * (run(mdp, theta, nu, goals, steps).states[:, -1, 0] - goals)) ** 2).mean()


def gentle_log(real: ModelMDP, truth: Params, seconds: float, generator: torch.Generator) -> RolloutLog:
    """Slow pushes to and fro, at most a few cm/s: what is safe to do with an unknown sled."""
    T = round(seconds / real.dt)
    s, states, forces = torch.zeros(1, 4, dtype=torch.float64), [], []
    for t in range(T):
        wave = torch.sin(torch.tensor(2.0 * t * real.dt)) + 0.6 * torch.sin(torch.tensor(5.3 * t * real.dt))
        states.append(s)
        forces.append(4.0 * wave.double().reshape(1, 1))
        s = real.step(truth, s, forces[-1], s[:, :0])
    clean, actions = torch.stack([*states, s], 1), torch.stack(forces, 1)
    noise = torch.tensor([1e-4, 1e-6, 1e-3, 1e-6], dtype=torch.float64)
    names = {"signal": real.names["state"], "action": real.names["action"], "exogenous": (), "episode": ("gentle",)}
    return RolloutLog(
        signals=clean + noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64),
        actions=actions,
        exogenous=None,
        mask=torch.ones(1, T, dtype=torch.bool),
        dt=real.dt,
        names=names,
        units=dict(real.units),
        source="gentle pushes",
    )


def measured_gradient(J: Callable[[Params], float], nu: Params, step: float = 0.02) -> Tensor:
    """dJ_real/dnu from real launches: each coefficient a little up, a little down."""
    rows = []
    for unit in torch.eye(len(nu["force"]), dtype=torch.float64):
        up, down = ({"force": nu["force"] + sign * step * unit} for sign in (1, -1))
        rows.append((J(up) - J(down)) / (2 * step))
    return torch.tensor(rows, dtype=torch.float64)


def tuned(
    model: ModelMDP, theta: Params, nu: Params, goals: Tensor, J_real: Callable[[Params], float], settings: Settings
) -> tuple[Params, Params, list[float]]:
    """theta, the launches that are optimal there, and the real return per iteration."""
    J = expected(model, goals, settings.steps)
    optimum = lambda theta, nu0: policy_optimum(J, theta, nu0, tol=1e-5, warmup=0).nu
    layer = implicit_argmax(J, optimum, solve=cg)
    unknown = {name: value.log().requires_grad_() for name, value in theta.items()}
    optimizer = torch.optim.Adam(unknown.values(), lr=settings.rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    best, found, returns = float("-inf"), theta, []
    for _ in track(range(settings.iterations), description="tuning to perform"):
        here = {name: value.exp() for name, value in unknown.items()}
        launched = layer(here, nu)
        nu_here = {"force": launched["force"].detach()}
        returns.append(J_real(nu_here))
        if returns[-1] > best:
            best, nu, found = returns[-1], nu_here, {name: value.detach() for name, value in here.items()}
        optimizer.zero_grad()
        (launched["force"] * measured_gradient(J_real, nu_here)).sum().backward()  # the chain through nu*(theta)
        optimizer.step()
        schedule.step()
    return found, nu, returns


def draw(misses: dict[str, Tensor], goals: Tensor, returns: list[float]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, miss in misses.items():
        left.plot(goals, 100 * miss, "o-", label=name)
    left.axhline(0.0, color="k", linewidth=0.8)
    left.set(xlabel="goal [m]", ylabel="real miss [cm]", title="Where the real sled stops")
    left.legend()
    right.plot([(-value) ** 0.5 for value in returns], "o-")
    right.set(xlabel="iteration", ylabel="root mean squared miss [cm]", ylim=(0, None), title="Tuning to perform")
    return figure


def animate(runs: dict[str, Rollout], goal: float, file: str) -> None:
    """The launch for the farthest goal, with both launches, seen from the side."""
    figure, axes = plt.subplots(figsize=(6, 1.8), layout="constrained")
    axes.set(xlim=(-0.3, goal + 0.4), ylim=(0, 2.6), yticks=[], xlabel="x [m]")
    axes.axvline(goal, color="C3")
    lines = [axes.plot([], [], "o-", color=f"C{k}", linewidth=5, label=name)[0] for k, name in enumerate(runs)]
    axes.legend(loc="upper left", ncols=2)

    def show(frame: int) -> None:
        for height, (line, rolled) in enumerate(zip(lines, runs.values(), strict=True)):
            x = float(rolled.states[-1, frame, 0])
            line.set_data([x - 0.1, x + 0.1], [0.4 + 0.6 * height] * 2)

    frames = range(next(iter(runs.values())).states.shape[1])
    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=25), dpi=70)


def main(settings: Settings, seed: int, gif: str | None) -> Figure:
    model, real = sled(0.0), sled(DRAG)
    truth = {name: torch.tensor(value, dtype=torch.float64) for name, value in REAL.items()}
    log = gentle_log(real, truth, settings.seconds, torch.Generator().manual_seed(seed))
    choice = FitSettings(signals=("x", "x_velocity"), horizon=0.3, loss_scale=0.01)
    fitted = fit(model, log, default_params(model.box), choice).theta
    goals = torch.linspace(0.4, 1.2, settings.goals, dtype=torch.float64)
    start = {"force": torch.tensor([0.0, 1.4, 0.0], dtype=torch.float64)}
    nu = policy_optimum(expected(model, goals, settings.steps), fitted, start, tol=1e-5, warmup=0).nu
    J = expected(real, goals, settings.steps)
    J_real = lambda nu: float(J(truth, nu))
    theta, tuned_nu, returns = tuned(model, fitted, nu, goals, J_real, settings)
    for name, parameters in (("real", truth), ("tuned to fit", fitted), ("tuned to perform", theta)):
        print(f"{name:18}" + "".join(f"{key} {float(value):.3f}  " for key, value in parameters.items()))
    runs = {
        name: run(real, truth, at, goals, settings.steps)
        for name, at in (("tuned to fit", nu), ("tuned to perform", tuned_nu))
    }
    misses = {name: rolled.states[:, -1, 0] - goals for name, rolled in runs.items()}
    for name, miss in misses.items():
        print(f"{name}: real sleds stop {100 * miss.square().mean().sqrt():.2f} cm from their goals")
    if gif:
        animate(runs, float(goals[-1]), gif)
    return draw(misses, goals, returns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="MuJoCo runs on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the noise in the log")
    parser.add_argument("--quick", action="store_true", help="one iteration of short launches")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"iterations": 1, "goals": 3, "steps": 25, "seconds": 2.0} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed, arguments.gif)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
