"""Worlds with planted parameters: a pendulum, a double pendulum, a house, and models with more than the logs can fix.

They have what spoils intervals: a torque (or heat) disturbance with memory, so that the errors of neighbouring windows
are correlated; measurement noise, which enters the start states too; and a setting with a short log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.signal import savgol_filter
from torch import Tensor

from sim2real.bounds import Box
from sim2real.fit import FitSettings
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators import base_parameters, building_rc, double_pendulum, pendulum

MEMORY = 0.3
"""s, of the torque disturbance"""
ANGLE_NOISE = 1e-3
"""rad"""
HOUR = 3600.0
WINDOW = 0.5
MECHANICAL = FitSettings(horizon=WINDOW, stride=0.25, sample_every=5, loss_scale=0.02)
HOUSE = FitSettings(
    horizon=24 * HOUR,
    warmup=24 * HOUR,
    stride=24 * HOUR,
    sample_every=2,
    first_row=0,
    margin=0,
    loss_scale=0.3,
)


@dataclass(frozen=True)
class Setting:
    """Length of the log (s; h for the house) and standard deviation of the disturbance (N m; kW)."""

    length: float
    disturbance: float


@dataclass(frozen=True)
class Planted:
    """A model, the parameters its logs are made with, and where the fit starts."""

    name: str
    mdp: ModelMDP
    truth: dict[str, float]
    start: dict[str, float]
    settings: FitSettings
    world: Callable[[Planted, int, Setting, torch.Generator], RolloutLog]
    cases: tuple[Setting, ...]
    drive: float = 1.0
    """amplitude of the excitation, N m or as a share of the heating power"""
    spread: bool = False
    """whether every run is driven over the whole band of frequencies"""
    released_at: float = 0.0
    """rad, start angle of every joint"""
    functions: Callable[[Params], Tensor] | None = None
    """what of the parameters reaches the motion, `[F]`: directions that leave it unchanged are planted"""


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def coloured(batch: int, steps: int, dt: float, memory: float, generator: torch.Generator) -> Tensor:
    """Stationary first-order noise of unit variance `[batch, steps]`."""
    decay = math.exp(-dt / memory)
    value, path = normal(batch, generator=generator), []
    for shock in normal(steps, batch, generator=generator):
        path.append(value)
        value = decay * value + math.sqrt(1 - decay**2) * shock
    return torch.stack(path, 1)


def multisine(batch: int, steps: int, dt: float, generator: torch.Generator, *, spread: bool) -> Tensor:
    """Six sines of 0.2 .. 2 Hz, random phases, rms 0.7, `[batch, steps]`; `spread`: one in each sixth of the band."""
    share, phase = torch.rand(2, batch, 6, 1, generator=generator, dtype=torch.float64)
    if spread:
        share = (share + torch.arange(6).view(6, 1)) / 6
    time = torch.arange(steps, dtype=torch.float64) * dt
    return torch.sin(2 * math.pi * ((0.2 + 1.8 * share) * time + phase)).sum(1) / math.sqrt(6)


def simulate(planted: Planted, state: Tensor, actions: Tensor, exogenous: Tensor) -> Tensor:
    """States `[B, T+1, n]` of the model with the planted parameters."""
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in planted.truth.items()}
    path = [state]
    for action, e in zip(actions.unbind(1), exogenous.unbind(1), strict=True):
        path.append(planted.mdp.step(theta, path[-1], action, e))
    return torch.stack(path, 1)


def machine(planted: Planted, seeds: int, setting: Setting, generator: torch.Generator) -> RolloutLog:
    """A driven machine from rest, one episode per seed: disturbed torques, noisy angles, their smoothed derivatives."""
    mdp = planted.mdp
    states, actions = mdp.names["state"], mdp.names["action"]
    joints, steps = len(actions), round(setting.length / mdp.dt)
    draw = lambda source: torch.stack([source(j) for j in range(joints)], -1)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)[:joints]
    torque = planted.drive * weights * draw(lambda j: multisine(seeds, steps, mdp.dt, generator, spread=planted.spread))
    disturbance = setting.disturbance * weights * draw(lambda j: coloured(seeds, steps, mdp.dt, MEMORY, generator))
    state = torch.zeros(seeds, len(states), dtype=torch.float64)
    state[:, :joints] = planted.released_at
    angles = simulate(planted, state, torque + disturbance, torque[..., :0])[..., :joints]
    angles = angles + ANGLE_NOISE * normal(*angles.shape, generator=generator)
    rates = torch.from_numpy(savgol_filter(angles.numpy(), 11, 3, deriv=1, delta=mdp.dt, axis=1))
    return as_log(mdp, torch.cat([angles, rates], -1), torque, None)


def house(planted: Planted, seeds: int, setting: Setting, generator: torch.Generator) -> RolloutLog:
    """A heated house in random weather with unmeasured heat gains of 3 h memory and a noisy thermometer (0.05 K)."""
    steps = round(setting.length)
    hour = torch.arange(steps, dtype=torch.float64)
    outdoor = 5 + 5 * torch.sin(2 * math.pi * hour / 24 - 2) + 3 * coloured(seeds, steps, 1.0, 48.0, generator)
    switched = (coloured(seeds, steps, 1.0, 4.0, generator) > 0).double()
    daytime = ((hour % 24 > 6) & (hour % 24 < 20)).double()
    power = planted.drive * (3 * switched * (1 + 0.5 * torch.sin(2 * math.pi * hour / 168)) + 2 * daytime)
    gains = setting.disturbance * coloured(seeds, steps, 1.0, 3.0, generator)
    state = torch.full((seeds, len(planted.mdp.names["state"])), 15.0, dtype=torch.float64)
    states = simulate(planted, state, (power + gains).unsqueeze(-1), outdoor.unsqueeze(-1))
    indoor = states[..., :1] + 0.05 * normal(seeds, steps + 1, 1, generator=generator)
    return as_log(planted.mdp, indoor, power.unsqueeze(-1), outdoor.unsqueeze(-1))


def as_log(mdp: ModelMDP, signals: Tensor, actions: Tensor, exogenous: Tensor | None) -> RolloutLog:
    names = {key: mdp.names[key] for key in ("signal", "action", "exogenous") if key in mdp.names}
    names["episode"] = tuple(f"seed{k}" for k in range(len(signals)))
    mask = torch.ones(actions.shape[:2], dtype=torch.bool)
    return RolloutLog(signals, actions, exogenous, mask, mdp.dt, names, dict(mdp.units), "planted")


LONG, DISTURBED, SHORT = Setting(30.0, 0.0), Setting(30.0, 0.05), Setting(12.0, 0.05)
DAYS = (Setting(60 * 24.0, 0.0), Setting(60 * 24.0, 0.5), Setting(24 * 24.0, 0.5))
PENDULUM = Planted(
    "pendulum",
    pendulum(dt=0.01),
    truth={"inertia": 0.17, "mgl": 3.3, "damping": 0.1, "coulomb": 0.08, "torque_offset": 0.05},
    start={"inertia": 0.22, "mgl": 2.6, "damping": 0.15, "coulomb": 0.04, "torque_offset": 0.0},
    settings=MECHANICAL,
    world=machine,
    cases=(LONG, DISTURBED, SHORT),
    drive=2.0,
)
_DP_FRICTION = {"b1": 0.02, "b2": 0.015, "cf1": 0.04, "cf2": 0.03, "torque_offset1": 0.0, "torque_offset2": 0.0}
_DP_BASE = {"A": 0.138, "B": 0.025, "C": 0.029, "h": 0.12, "mu": 0.358}
DOUBLE_PENDULUM = Planted(
    "double-pendulum",
    double_pendulum(dt=0.005),
    truth=_DP_BASE | _DP_FRICTION,
    start={"A": 0.16, "B": 0.02, "C": 0.032, "h": 0.11, "mu": 0.4, "b1": 0.03, "b2": 0.02, "cf1": 0.03, "cf2": 0.02}
    | {"torque_offset1": 0.0, "torque_offset2": 0.0},
    settings=replace(MECHANICAL, horizon=0.25, free=("A", "B", "C", "h", "mu", "b1", "b2", "cf1", "cf2")),
    world=machine,
    cases=(LONG, DISTURBED, SHORT),
)
HOUSE_2 = Planted(
    "house",
    building_rc(2, integrator="rk4"),
    truth={"Ci": 12.0, "Ce": 60.0, "Rie": 0.15, "Ria": 2.0, "Rea": 0.8},
    start={"Ci": 16.0, "Ce": 48.0, "Rie": 0.2, "Ria": 1.6, "Rea": 1.0},
    settings=HOUSE,
    world=house,
    cases=DAYS,
)


def through(mdp: ModelMDP, mapping: Callable[[Params], Params], new: dict[str, tuple[float, float, float]]) -> ModelMDP:
    """The model with parameters `new` (name: low, high, default) in place of those that `mapping` makes of them."""
    gone = mapping({key: torch.tensor(row[2]) for key, row in new.items()}).keys()
    box = mdp.box
    columns = [
        {key: value for key, value in side.items() if key not in gone} | {key: row[j] for key, row in new.items()}
        for j, side in enumerate((box.low, box.high, box.default))
    ]
    complete = lambda theta: theta | mapping(theta)
    fused = mdp.open_loop
    return replace(
        mdp,
        step=lambda theta, *rest: mdp.step(complete(theta), *rest),
        open_loop=None if fused is None else lambda theta, *rest: fused(complete(theta), *rest),
        box=Box(columns[0], columns[1], box.unit, columns[2]),
    )


def moved(truth: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Start values: the named parameters 10 % up and down by turns."""
    return truth | {name: truth[name] * (1.1 if j % 2 else 0.9) for j, name in enumerate(names)}


def overparameterised() -> tuple[Planted, ...]:
    """Models of which the logs cannot fix all parameters, whatever their length."""
    split = through(
        PENDULUM.mdp,
        lambda theta: {"mgl": theta["mass"] * theta["gravity"] * theta["length"]},
        {"mass": (0.01, 10.0, 0.7), "gravity": (1.0, 30.0, 9.81), "length": (0.01, 2.0, 0.5)},
    )
    rest = {key: value for key, value in PENDULUM.truth.items() if key != "mgl"}
    factors = rest | {"mass": 0.7, "gravity": 9.81, "length": 0.48}
    wall = through(
        HOUSE_2.mdp,
        lambda theta: {"Rea": theta["Rwall"] + theta["Rfilm"]},
        {"Rwall": (1e-3, 1e3, 0.7), "Rfilm": (1e-3, 1e3, 0.1)},
    )
    layers = {key: value for key, value in HOUSE_2.truth.items() if key != "Rea"} | {"Rwall": 0.7, "Rfilm": 0.1}
    physical = double_pendulum(parameters="physical", dt=0.005)
    machine_parts = physical.box.default | _DP_FRICTION
    chosen = tuple(key for key in machine_parts if not key.startswith("torque"))
    base = lambda p: base_parameters(p)
    return (
        replace(
            PENDULUM,
            name="pendulum-m-g-l",
            mdp=split,
            truth=factors,
            start=moved(factors, tuple(factors)),
            functions=lambda p: torch.stack([p["mass"] * p["gravity"] * p["length"], *(p[key] for key in rest)]),
        ),
        replace(
            PENDULUM,
            name="pendulum-undriven",
            truth=PENDULUM.truth | {"torque_offset": 0.0, "damping": 0.02, "coulomb": 0.01},
            start=PENDULUM.start,
            drive=0.0,
            released_at=2.5,
            cases=(Setting(20.0, 0.0),),
            functions=lambda p: torch.stack([p[key] / p["inertia"] for key in PENDULUM.truth if key != "inertia"]),
        ),
        replace(
            DOUBLE_PENDULUM,
            name="double-pendulum-physical",
            mdp=physical,
            truth=machine_parts,
            start=moved(machine_parts, chosen),
            settings=replace(MECHANICAL, horizon=0.25, free=chosen),
            functions=lambda p: torch.stack(
                [base(p)[key] for key in ("A", "B", "C", "b1", "b2", "cf1", "cf2")]
                + [base(p)["h"] * p["l1"], base(p)["h"] * p["g"], base(p)["mu"] * p["g"]]
            ),
        ),
        replace(
            HOUSE_2,
            name="house-two-layers",
            mdp=wall,
            truth=layers,
            start=moved(layers, tuple(layers)),
            functions=lambda p: torch.stack([p["Rwall"] + p["Rfilm"], *(p[key] for key in ("Ci", "Ce", "Rie", "Ria"))]),
        ),
    )
