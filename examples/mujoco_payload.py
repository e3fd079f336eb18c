"""An arm's payload, identified from a log
=======================================

What does the arm carry, and how stiff are its joints? Payload, friction and damping come back to within one per cent.

A three-joint arm, written as MuJoCo XML, holds something of unknown mass whose centre is off the grip, and its joints
rub in ways the drawing does not say. It follows a few waves; motor torques and encoders are logged. `fit` then finds
eight parameters from windows of 0.3 s, by exact derivatives through MuJoCo, and says how sure it is of each. The log is
written here, by the same arm with other numbers and encoder noise, so the truth is known. The picture shows the misfit
as it falls, and estimates with their intervals relative to the truth; the animation shows the arm at work.

    python examples/mujoco_payload.py --plot payload.png --gif payload.gif
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from sim2real import FitResult, FitSettings, ModelMDP, Params, RolloutLog, default_params
from sim2real.fit import fit
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_system import body_poses

ARM = """<mujoco><option timestep=".002"/>
<default><geom type="capsule" size=".04" density="600" contype="0" conaffinity="0"/>
  <joint damping="1" frictionloss="1" armature=".05"/></default>
<worldbody><body name="turret" pos="0 0 .4"><joint name="turn" axis="0 0 1"/><geom fromto="0 0 -.1 0 0 .05"/>
  <body name="upper" pos="0 0 .05"><joint name="shoulder" axis="0 1 0"/><geom fromto="0 0 0 .4 0 0"/>
    <body name="lower" pos=".4 0 0"><joint name="elbow" axis="0 1 0"/><geom fromto="0 0 0 .35 0 0" size=".03"/>
      <body name="payload" pos=".35 0 0"><inertial pos="0 0 0" mass=".5" diaginertia=".002 .002 .002"/></body>
    </body></body></body></worldbody>
<actuator><motor name="turn" joint="turn"/><motor name="shoulder" joint="shoulder"/><motor name="elbow" joint="elbow"/>
</actuator></mujoco>"""
JOINTS = ("turn", "shoulder", "elbow")
TRUTH = {
    "payload.mass": 1.8,
    "payload.com.x": 0.06,
    **{f"{joint}.frictionloss": value for joint, value in zip(JOINTS, (0.6, 1.7, 1.3), strict=True)},
    **{f"{joint}.damping": value for joint, value in zip(JOINTS, (1.4, 2.2, 0.7), strict=True)},
}


@dataclass(frozen=True)
class Settings:
    runs: int = 2
    seconds: float = 8.0
    horizon: float = 0.3
    stride: float = 0.2
    angle_noise: float = 2e-4
    """rad, standard deviation"""
    speed_noise: float = 2e-3
    """rad/s"""


def arm() -> ModelMDP:
    """State (turn, shoulder, elbow) and rates, actions torques in N m; all of the state is measured."""
    reward = lambda theta, s, a, e, following: torch.zeros_like(s[:, 0])  # a fit has none
    bounds = {name: (-0.2, 0.2) if "com" in name else (0.0, 10.0) for name in TRUTH}
    return mujoco_model(ARM, bounds, reward, frame_skip=5)


def wave(settings: Settings, time_axis: Tensor, generator: torch.Generator) -> Tensor:
    """Angles to follow `[runs, T, 3]`."""
    phase = 6.28 * torch.rand(settings.runs, 3, 3, 1, generator=generator, dtype=torch.float64)
    size = torch.tensor([0.5, 0.25, 0.12], dtype=torch.float64)[:, None]
    speed = torch.tensor([1.3, 2.9, 5.7], dtype=torch.float64)[:, None]
    return (size * torch.sin(speed * time_axis + phase)).sum(2).transpose(1, 2)


def logged(mdp: ModelMDP, truth: Params, settings: Settings, generator: torch.Generator) -> RolloutLog:
    """Joint servos follow the waves; what is logged are their torques and noisy encoders."""
    T = round(settings.seconds / mdp.dt)
    goal = wave(settings, mdp.dt * torch.arange(T, dtype=torch.float64), generator)
    e = torch.zeros(settings.runs, 0, dtype=torch.float64)
    states, torques = [torch.cat([goal[:, 0], torch.zeros_like(goal[:, 0])], -1)], []
    for t in range(T):
        s = states[-1]
        torques.append(150.0 * (goal[:, t] - s[:, :3]) - 15.0 * s[:, 3:])
        states.append(mdp.step(truth, s, torques[-1], e))
    clean, actions = torch.stack(states, 1), torch.stack(torques, 1)
    size = torch.tensor([settings.angle_noise] * 3 + [settings.speed_noise] * 3, dtype=torch.float64)
    names = {"signal": mdp.names["state"], "action": mdp.names["action"], "exogenous": ()}
    return RolloutLog(
        signals=clean + size * torch.randn(clean.shape, generator=generator, dtype=torch.float64),
        actions=actions,
        exogenous=None,
        mask=torch.ones(settings.runs, T, dtype=torch.bool),
        dt=mdp.dt,
        names=names | {"episode": tuple(f"run_{k}" for k in range(settings.runs))},
        units=dict(mdp.units),
        source="synthetic",
    )


def draw(found: FitResult) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for stage, name in ((0, "some of the windows"), (2, "all windows")):
        losses = {index: row["loss"] for index, row in enumerate(found.history) if row["stage"] == stage}
        left.plot(list(losses), list(losses.values()), "o-", label=name)
    left.set(xlabel="step", ylabel="misfit", yscale="log", title="Learning curve")
    left.legend()
    rows = [row for row in found.rows if row.name in TRUTH]
    for place, row in enumerate(rows):
        truth = TRUTH[row.name]
        right.plot([row.low / truth, row.high / truth], [place, place], color="C0", linewidth=4, alpha=0.4)
        right.plot(row.value / truth, place, "o", color="C0")
    right.axvline(1.0, color="k", linewidth=0.8)
    right.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], xlabel="estimate over truth")
    right.set_title("Estimates and 90 % intervals")
    return figure


def animate(mdp: ModelMDP, states: Tensor, file: str) -> None:
    """The arm seen obliquely."""
    every = max(1, round(0.05 / mdp.dt))
    points = body_poses(mdp.step.args[0], states[::every, :3]).position[:, 1:]  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(4, 4), subplot_kw={"projection": "3d"}, layout="constrained")
    axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(0, 1))
    (line,) = axes.plot([], [], [], "o-", linewidth=5, color="C0")
    (load,) = axes.plot([], [], [], "o", markersize=14, color="C3")

    def show(frame: int) -> None:
        line.set_data_3d(*points[frame].T)
        load.set_data_3d(*points[frame, -1:].T)

    FuncAnimation(figure, show, range(len(points))).save(file, PillowWriter(fps=20), dpi=60)


def main(settings: Settings, seed: int, gif: str | None) -> Figure:
    mdp = arm()
    truth = {name: torch.tensor(value, dtype=torch.float64) for name, value in TRUTH.items()}
    log = logged(mdp, truth, settings, torch.Generator().manual_seed(seed))
    design, start = default_params(mdp.box), time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("fitting", total=None)
        choice = FitSettings(horizon=settings.horizon, stride=settings.stride, loss_scale=0.01, block=0.5)
        found = fit(mdp, log, design, choice, on_step=lambda _: progress.advance(task))
    print(f"{found.training.fitted.windows} windows fitted in {time.perf_counter() - start:.0f} s")
    print(f"{'':22}{'drawing':>9}{'fitted':>9}{'interval':>20}{'true':>9}")
    for row in found.rows:
        interval = f"{row.low:.4f} .. {row.high:.4f}"
        print(f"{row.name:22}{float(design[row.name]):9.4f}{row.value:9.4f}{interval:>20}{TRUTH[row.name]:9.4f}")
    if gif:
        animate(mdp, log.signals[0], gif)
    return draw(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="MuJoCo runs on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short log")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    tiny = {"runs": 1, "seconds": 1.5, "horizon": 0.05} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed, arguments.gif)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
