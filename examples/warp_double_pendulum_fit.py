"""A double pendulum fitted to its log
===================================

Fit nine parameters of a two-link arm to real logs through Warp: 0.5 s ahead it errs 0.014 rad, the design 0.18 rad.

The arm was excited at both joints and its angles and motor currents were logged. The model's step is a Warp kernel, and
windows of a quarter of a second are rolled and differentiated in one launch. The picture shows the misfit as it falls,
and a second of a run that was not fitted: as measured, as predicted with the fitted parameters, and as with those of
the design. The animation shows the same second. Without the logs, `--synthetic` lets a pendulum of known parameters
write one.

    python examples/warp_double_pendulum_fit.py --data shared/data/double_pendulum --plot fit.png --gif fit.gif
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from sim2real import EvaluationSettings, FitResult, FitSettings, Params, RolloutLog, default_params, evaluate, load_log
from sim2real.fit import fit
from sim2real.simulators.warp_double_pendulum import warp_double_pendulum

HERE = Path(__file__).resolve().parent
MODEL = warp_double_pendulum()
NINE = ("A", "B", "C", "h", "mu", "b1", "b2", "cf1", "cf2")
LINKS = (0.3, 0.2)  # m, as drawn
TRAINING, LEFT_OUT = ("00", "01", "03", "04", "11"), ("12",)


@dataclass(frozen=True)
class Settings:
    horizon: float = 0.25
    """s, windows of the fit"""
    shown: float = 1.0
    """s, of the prediction in the picture"""
    runs: int = 3
    """synthetic ones, the last not fitted"""
    seconds: float = 12.0
    """of a synthetic run"""


def measured(folder: Path) -> tuple[RolloutLog, RolloutLog]:
    """The logs to fit and the one left out."""
    files = lambda runs: [folder / "design_A" / f"excitation_{run}.csv" for run in runs]
    schema = HERE / "schemas" / "double_pendulum_measured.yaml"
    return load_log(files(TRAINING), schema), load_log(files(LEFT_OUT), schema)


def synthetic(settings: Settings, generator: torch.Generator) -> tuple[RolloutLog, RolloutLog, Params]:
    """Runs of a pendulum whose parameters are the design's times 0.8 to 1.2, with encoder noise; and the parameters."""
    truth = default_params(MODEL.box) | {"b2": torch.tensor(0.02, dtype=torch.float64)}
    for key in NINE:
        truth[key] = truth[key] * (0.8 + 0.4 * torch.rand((), generator=generator, dtype=torch.float64))
    T = round(settings.seconds / MODEL.dt)
    clock = MODEL.dt * torch.arange(T, dtype=torch.float64)
    phases = 6.28 * torch.rand(settings.runs, 2, 4, 1, generator=generator, dtype=torch.float64)
    waves = torch.tensor([[1.2, 0.8, 0.5, 0.3], [0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)[:, :, None]
    speeds = torch.tensor([1.9, 4.1, 7.7, 13.0], dtype=torch.float64)[:, None]
    torques = (waves * torch.sin(speeds * clock + phases)).sum(2).transpose(1, 2).contiguous()
    still = torch.zeros(settings.runs, 4, dtype=torch.float64)
    assert MODEL.open_loop is not None
    states = MODEL.open_loop(truth, still, torques, torques.new_zeros(settings.runs, T, 0))
    signals = states + 0.002 * torch.randn(states.shape, generator=generator, dtype=torch.float64)

    def log(part: slice) -> RolloutLog:
        names = tuple(f"run_{index}" for index in range(settings.runs))[part]
        return RolloutLog(
            signals=signals[part],
            actions=torques[part],
            exogenous=None,
            mask=torch.ones(len(names), T, dtype=torch.bool),
            dt=MODEL.dt,
            names={"signal": MODEL.names["signal"], "action": MODEL.names["action"], "exogenous": (), "episode": names},
            units=dict(MODEL.units),
            source="synthetic",
        )

    return log(slice(0, -1)), log(slice(-1, None)), truth


def identify(log: RolloutLog, design: Params, settings: Settings) -> FitResult:
    """Nine parameters and the zeros of the encoders, shown as they are found."""
    with Progress() as progress:
        task = progress.add_task("fitting", total=None)
        choice = FitSettings(free=NINE, horizon=settings.horizon, zeros="per_run")
        return fit(MODEL, log, design, choice, on_step=lambda _: progress.advance(task))


def predicted(theta: Params, log: RolloutLog, zero: Tensor, first: int, steps: int) -> Tensor:
    """States from a measured one on, under the logged torques `[T+1, 4]`."""
    start = log.signals[:1, first].clone()
    start[:, :2] -= zero
    assert MODEL.open_loop is not None
    states = MODEL.open_loop(theta, start, log.actions[:1, first : first + steps], start.new_zeros(1, steps, 0))[0]
    states[:, :2] += zero
    return states


def draw(found: FitResult, paths: dict[str, Tensor]) -> Figure:
    """Left: the misfit. Right: angles over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for stage, name in ((0, "some of the windows"), (2, "all windows")):
        losses = {index: row["loss"] for index, row in enumerate(found.history) if row["stage"] == stage}
        left.plot(list(losses), list(losses.values()), "o-", label=name)
    left.set(xlabel="step", ylabel="misfit", yscale="log", title="Learning curve")
    left.legend()
    for (name, states), style in zip(paths.items(), ("k-", "C0--", "C1:"), strict=True):
        clock = MODEL.dt * torch.arange(len(states))
        for angle in range(2):
            right.plot(clock, states[:, angle], style, label=name if angle == 0 else None)
    right.set(xlabel="time [s]", ylabel="angles [rad]", title="A run that was not fitted")
    right.legend()
    return figure


def animate(paths: dict[str, Tensor], file: str) -> None:
    """Measured and predicted arms."""
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    axes.set(xlim=(-0.55, 0.55), ylim=(-0.55, 0.55), aspect="equal")
    axes.axis("off")
    styles = ({"color": "k", "linewidth": 5}, {"color": "C0", "linewidth": 2}, {"color": "C1", "linewidth": 2})
    arms = [axes.plot([], [], "o-", label=name, **style)[0] for name, style in zip(paths, styles, strict=True)]
    axes.legend(loc="upper right")
    every = max(1, round(0.02 / MODEL.dt))

    def show(frame: int) -> None:
        for arm, states in zip(arms, paths.values(), strict=True):
            first, second = float(states[frame, 0]), float(states[frame, 0] + states[frame, 1])
            bends = torch.tensor([0.0, first, second])
            steps = torch.tensor([0.0, *LINKS])
            arm.set_data((steps * torch.sin(bends)).cumsum(0), -(steps * torch.cos(bends)).cumsum(0))

    frames = range(0, len(next(iter(paths.values()))), every)
    FuncAnimation(figure, show, frames).save(file, PillowWriter(fps=25), dpi=70)  # half speed


def moved(log: RolloutLog, device: str) -> RolloutLog:
    """The log on a device."""
    return replace(log, signals=log.signals.to(device), actions=log.actions.to(device), mask=log.mask.to(device))


def main(settings: Settings, logs: tuple[RolloutLog, RolloutLog], truth: Params | None, gif: str | None) -> Figure:
    log, other = logs
    design = {key: value.to(log.signals) for key, value in default_params(MODEL.box).items()}
    start = time.perf_counter()
    found = identify(log, design, settings)
    print(f"{found.training.fitted.windows} windows fitted in {time.perf_counter() - start:.1f} s, compiling included")
    for key in NINE:
        known = "" if truth is None else f"   true {float(truth[key]):8.4f}"
        print(f"{key:4} design {float(design[key]):8.4f}   fitted {float(found.theta[key]):8.4f}{known}")
    scoring = EvaluationSettings(horizon=0.5, start_after=2.0, zeros="estimated")
    for name, theta in (("design", design), ("fitted", found.theta)):
        score = evaluate(MODEL, other, theta, None, scoring)
        print(
            f"{name}: error {score.rmse:.4f} rad over 0.5 s of the run left out; standing still {score.hold_first:.4f}"
        )
    first, steps = int(0.4 * other.signals.shape[1]), round(settings.shown / MODEL.dt)
    zero = other.signals.new_tensor(score.runs[0].zero[:2])
    paths = {"measured": other.signals[0, first : first + steps + 1]}
    paths |= {
        name: predicted(th, other, zero, first, steps) for name, th in (("fitted", found.theta), ("design", design))
    }
    if gif:
        animate(paths, gif)
    return draw(found, paths)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    default = Path(os.environ.get("SIM2REAL_DATA", HERE.parents[1] / "shared" / "data")) / "double_pendulum"
    parser.add_argument("--data", type=Path, default=default, help="folder of the real logs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--synthetic", action="store_true", help="fit a log of known parameters instead")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic log")
    parser.add_argument("--quick", action="store_true", help="a short synthetic log")
    parser.add_argument("--plot", help="write the figure to this file")
    parser.add_argument("--gif", help="write the animation to this file")
    arguments = parser.parse_args()
    chosen = Settings(seconds=3.0, runs=2, shown=0.2) if arguments.quick else Settings()
    known: Params | None = None
    if arguments.synthetic or arguments.quick:
        *both, known = synthetic(chosen, torch.Generator().manual_seed(arguments.seed))
    elif arguments.data.is_dir():
        both = [*measured(arguments.data)]
    else:
        raise SystemExit(f"skipped: no folder {arguments.data}; name the logs with --data, or try --synthetic")
    fitted, left_out = (moved(log, arguments.device) for log in both)
    figure = main(chosen, (fitted, left_out), known, arguments.gif)
    if arguments.plot:
        figure.savefig(arguments.plot, dpi=120)
