"""What a derivative of a MuJoCo step costs: `j-cost`, `j-peers`, `j-parameters`, `j-scale`.

Float64, one thread, 1024 environments in the midst of motion with contacts. Times are minima of interleaved repeats,
microseconds per environment and step. Forward is `mujoco.batch.Batch.step` of the model as it is; backward is
`torch.autograd.grad` of the next position and velocity by position, velocity, control and by seven fields per
environment (mass, centre of mass, inertia, armature, damping, stiffness, friction): packing, factor, solve, gradients.

    j-cost/MODEL         backward / forward, Euler without implicit damping; MODEL-eulerdamp with it
    j-cost/MODEL-kernel  the same of the products alone, without autograd and the integrator in torch
    j-peers/transitionfd one-sided `mjd_transitionFD` (no fields), per environment, over backward: worst of three models
    j-peers/hvp-over-vjp the derivative of the gradient along a direction of all inputs, over backward, on hopper;
                         `-and-vjp` with the gradient, which such a product needs only once for many directions
    j-parameters/ratio   backward by everything over backward by position, velocity and control, on hopper with the same
                         fields given per environment; `ratio-shared` over that where all environments share the model
    j-scale/flatness     largest deviation of the time per environment of a step with its gradient (`advance` with its
                         graph, then the gradient) from mid-range, 256 to 8192 environments; a measurement takes 8192
                         environment steps at every size, 32 calls in a row at 256, and is processor time, which on
                         one thread of an idle machine is the time, and on a shared one is disturbed less
    j-scale/flatness-backward   the same of the gradient alone
    j-scale/threads      backward of 4096 environments on one thread over that on two
    j-scale/threads-ceiling     what the machine gives two of these: two processes, each on one thread, over one alone
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.mujoco_tasks import stock, with_integrator
from sim2real.simulators.mujoco_structure import nominal_fields
from sim2real.simulators.mujoco_system import MujocoSystem, advance, mujoco_system

ENVIRONMENTS = 1024
FIELDS = (
    "body_mass",
    "body_ipos",
    "body_inertia",
    "dof_armature",
    "dof_damping",
    "jnt_stiffness",
    "geom_friction",
)
PLANAR = ("hopper", "half_cheetah", "walker2d")
LIMITS = {**dict.fromkeys(PLANAR, 1.0), "ant": 1.2, "humanoid": 2.0}
DAMPED_LIMIT = 1.6
EVERY = 16  # of the environments that the peer differentiates


@dataclass(frozen=True, eq=False)
class Case:
    """One model at one batch of states."""

    model: mujoco.MjModel
    system: MujocoSystem
    leaves: tuple[Tensor, ...]
    """q, v, ctrl, fields"""
    outputs: tuple[Tensor, Tensor]
    """next q and v, with their graph"""
    cotangents: tuple[Tensor, Tensor]


def load(name: str, *, damped: bool) -> mujoco.MjModel:
    """A stock model with the Euler integrator, with or without implicit damping."""
    model = with_integrator(stock(name), "euler").compile()
    if not damped:
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_EULERDAMP)
    return model


def moving_states(model: mujoco.MjModel, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, v and control of environments that started apart and were driven by random controls for different times."""
    rng = np.random.default_rng(0)
    batch = Batch(model, count, 1)
    q, v, ctrl = (batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
    found = [np.empty_like(array) for array in (q, v, ctrl)]
    for row in q:
        mujoco.mj_integratePos(model, row, rng.normal(0, 0.1, model.nv), 1.0)
    stops = rng.integers(40, 140, count)
    for step in range(140):
        if step % 7 == 0:
            ctrl[:] = rng.uniform(-0.4, 0.4, ctrl.shape)
        for array, source in zip(found, (q, v, ctrl), strict=True):
            array[stops == step] = source[stops == step]
        batch.step()
    return torch.from_numpy(found[0]), torch.from_numpy(found[1]), torch.from_numpy(found[2])


def case(
    name: str, *, damped: bool = False, count: int = ENVIRONMENTS, names: tuple[str, ...] = FIELDS, asked: bool = True
) -> Case:
    """A model with the graph of one step of all environments; asked: gradients by the fields, too."""
    model = load(name, damped=damped)
    system = mujoco_system(model, names)
    nominal = nominal_fields(system.structure)
    fields = [nominal[field].expand(count, *nominal[field].shape[1:]).clone() for field in names]
    q, v, ctrl = moving_states(model, count)
    leaves = tuple(t.requires_grad_(asked or k < 3) for k, t in enumerate((q, v, ctrl, *fields)))
    none = torch.zeros(count, model.na, dtype=torch.float64), torch.zeros(count, model.nv, dtype=torch.float64)
    given = dict(zip(names, leaves[3:], strict=True))
    q2, v2, _ = advance(system, given, (leaves[0], leaves[1], none[0]), leaves[2], none[1])
    rng = torch.Generator().manual_seed(0)
    g, h = (torch.randn(t.shape, dtype=t.dtype, generator=rng) for t in (q2, v2))
    return Case(model, system, leaves, (q2, v2), (g, h))


def forward(made: Case) -> Callable[[], None]:
    """`Batch.step` from the states of a case, the states written each time."""
    batch = Batch(made.model, len(made.leaves[0]), 1)
    bound = [(batch.bind(n), t.detach().numpy()) for n, t in zip(("qpos", "qvel", "ctrl"), made.leaves, strict=False)]

    def run() -> None:
        for target, source in bound:
            target[:] = source
        batch.step()

    return run


def backward(made: Case, *, wanted: int | None = None) -> Callable[[], object]:
    """The gradient by the first `wanted` leaves, None: by all."""
    leaves = made.leaves[:wanted]
    return lambda: torch.autograd.grad(made.outputs, leaves, made.cotangents, retain_graph=True, allow_unused=True)


def products(made: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """The reverse and the second-order product of the acceleration alone."""
    system, (q, v, ctrl, *fields) = made.system, (t.detach() for t in made.leaves)
    count, model = len(q), made.model
    rest = torch.zeros(count, model.nv, dtype=torch.float64)
    x = (q, rest, v, torch.zeros(count, model.na, dtype=torch.float64), ctrl, rest, *fields)
    y = system.program.value(x)
    g = made.cotangents[1], rest
    wanted = (False, *(True for _ in x[1:]))
    dx = tuple(torch.ones_like(t) for t in x)
    dy = system.program.push(x, dx, y)
    pull = partial(system.program.pull, x, y, g, wanted)
    return pull, partial(system.program.second, (x, dx, y, dy, g, g), (*wanted, *wanted))


def curvature(made: Case) -> Callable[[], object]:
    """The derivative of the gradient along a direction of all leaves."""
    slope = torch.autograd.grad(made.outputs, made.leaves, made.cotangents, create_graph=True)
    rng = torch.Generator().manual_seed(1)
    along = [torch.randn(t.shape, dtype=t.dtype, generator=rng) for t in made.leaves]
    return lambda: torch.autograd.grad(slope, made.leaves, along, retain_graph=True, allow_unused=True)


def transition_differences(made: Case) -> Callable[[], None]:
    """One-sided `mjd_transitionFD` at every 16th state."""
    model, data = made.model, mujoco.MjData(made.model)
    n = 2 * model.nv + model.na
    by_state, by_control = np.zeros((n, n)), np.zeros((n, model.nu))
    rows = [t.detach().numpy()[::EVERY] for t in made.leaves[:3]]

    def run() -> None:
        for q, v, ctrl in zip(*rows, strict=True):
            data.qpos[:], data.qvel[:], data.ctrl[:] = q, v, ctrl
            mujoco.mjd_transitionFD(model, data, 1e-6, False, by_state, by_control, None, None)

    return run


def minima(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Fastest time of each function, their repeats interleaved, s."""
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for k, run in enumerate(runs):
            start = clock()
            run()
            best[k] = min(best[k], clock() - start)
    return best


def cost(quick: bool) -> Iterator[Figure]:
    """`j-cost`."""
    for name, limit in LIMITS.items():
        for damped in (False, True) if name in PLANAR else (False,):
            made = case(name, damped=damped)
            runs = [forward(made), backward(made), products(made)[0]]
            ahead, back, alone = minima(runs, 30 if quick else 150)
            label = f"{name}-eulerdamp" if damped else name
            yield Figure(label, back / ahead, "times", ENVIRONMENTS, DAMPED_LIMIT if damped else limit)
            yield Figure(f"{label}-kernel", alone / ahead, "times", ENVIRONMENTS)
            yield Figure(f"{label}-forward", 1e6 * ahead / ENVIRONMENTS, "us", ENVIRONMENTS)
            yield Figure(f"{label}-backward", 1e6 * back / ENVIRONMENTS, "us", ENVIRONMENTS)


def peers(quick: bool) -> Iterator[Figure]:
    """`j-peers` but for MJX."""
    for damped, label, least in ((False, "transitionfd", 12.0), (True, "transitionfd-eulerdamp", 9.0)):
        ratios = []
        for name in PLANAR:
            made = case(name, damped=damped)
            back, peer = minima([backward(made), transition_differences(made)], 15 if quick else 60)
            ratios.append(peer * EVERY / back)
            yield Figure(f"{label}-{name}", ratios[-1], "times", ENVIRONMENTS)
        yield Figure(label, min(ratios), "times", ENVIRONMENTS, least)
    made = case("hopper")
    first, second, pull, twice = minima([backward(made), curvature(made), *products(made)], 30 if quick else 100)
    yield Figure("hvp-over-vjp", second / first, "times", ENVIRONMENTS, 4.0)
    yield Figure("hvp-over-vjp-and-vjp", (first + second) / first, "times", ENVIRONMENTS)
    yield Figure("hvp-over-vjp-kernel", twice / pull, "times", ENVIRONMENTS)


def parameters(quick: bool) -> Iterator[Figure]:
    """`j-parameters`."""
    made, given, bare = case("hopper"), case("hopper", asked=False), case("hopper", names=())
    runs = [backward(made), backward(given, wanted=3), backward(bare)]
    everything, state, shared = minima(runs, 60 if quick else 300)
    yield Figure("ratio", everything / state, "times", ENVIRONMENTS, 1.1)
    yield Figure("ratio-shared", everything / shared, "times", ENVIRONMENTS)


def step_and_gradient(made: Case) -> Callable[[], object]:
    """One step of the library with its graph, then its gradient by all leaves."""
    system, (q, v, ctrl, *fields) = made.system, made.leaves
    act, force = torch.zeros(len(q), made.model.na, dtype=q.dtype), torch.zeros(len(q), made.model.nv, dtype=q.dtype)
    given = dict(zip(system.names, fields, strict=True))

    def run() -> object:
        following = advance(system, given, (q, v, act), ctrl, force)[:2]
        return torch.autograd.grad(following, made.leaves, made.cotangents, allow_unused=True)

    return run


def _repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    """The same call several times in a row."""

    def burst() -> None:
        for _ in range(times):
            run()

    return burst


def flatness(times: Sequence[float]) -> float:
    """Largest deviation from mid-range, relative."""
    return (max(times) - min(times)) / (max(times) + min(times))


def scale(quick: bool) -> Iterator[Figure]:
    """`j-scale`, on hopper."""
    sizes = (256, 1024, 4096, 8192)
    cases = [case("hopper", count=count) for count in sizes]
    for label, run, name in ((step_and_gradient, "step", "flatness"), (backward, "backward", "flatness-backward")):
        runs = [_repeated(label(made), sizes[-1] // count) for count, made in zip(sizes, cases, strict=True)]
        times = [t / sizes[-1] for t in minima(runs, 15 if quick else 60, time.process_time)]
        for count, seconds in zip(sizes, times, strict=True):
            yield Figure(f"{run}-{count}", 1e6 * seconds, "us", count)
        yield Figure(name, flatness(times), "share", len(sizes), 0.2)
    yield from two_threads(quick)


def two_threads(quick: bool) -> Iterator[Figure]:
    """`j-scale/threads` and its ceiling; the ceiling is measured before and after, and its larger value told."""
    seconds = 2.0 if quick else 6.0
    before = ceiling(seconds)
    made = case("hopper", count=4096)
    run = backward(made)
    threads = torch.get_num_threads()

    def on_two() -> None:
        torch.set_num_threads(2)
        run()
        torch.set_num_threads(threads)

    one, two = minima([run, on_two], 30 if quick else 100)
    yield Figure("threads", one / two, "times", 4096, 1.6)
    yield Figure("threads-ceiling", max(before, ceiling(seconds)), "times", 4096)


def ceiling(seconds: float) -> float:
    """Backwards per second of two processes at once, each on one thread, over those of one alone."""
    context = get_context("spawn")
    starts = [context.Barrier(count) for count in (1, 2)]
    rates = context.Queue()
    workers = [context.Process(target=_backwards, args=(k, starts, seconds, rates)) for k in (0, 1)]
    for worker in workers:
        worker.start()
    found = [rates.get(timeout=300) for _ in range(3)]
    for worker in workers:
        worker.join()
    return sum(rate for kind, rate in found if kind == 1) / next(rate for kind, rate in found if kind == 0)


def _backwards(worker: int, starts: Any, seconds: float, rates: Any) -> None:
    """The first worker alone, then both: backwards of 4096 environments per second."""
    torch.set_num_threads(1)
    run = backward(case("hopper", count=4096))
    run()
    for kind, start in enumerate(starts):
        if kind == 0 and worker:
            continue
        start.wait()
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            run()
            done += 1
        rates.put((kind, done / (time.perf_counter() - begin)))


def step_microseconds(name: str, count: int) -> float:
    """Time of a model's step with its gradient by state, control and fields through the library, us/environment."""
    return 1e6 * minima([step_and_gradient(case(name, count=count))], 60)[0] / count


if __name__ == "__main__":
    main({"j-cost": cost, "j-peers": peers, "j-parameters": parameters, "j-scale": scale})
