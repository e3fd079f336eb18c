"""Warp models next to torch eager, and to a generic engine: accuracy, time, memory.

One torch thread but in `w-threads`, torch eager in the same run, interleaved; times are the least of the repeats, in
seconds of the CPU, which other jobs disturb less than those of the clock (`w-threads`: of the clock). A rollout is 50
steps of the cart-pole with given actions, in float32, with parameters per environment; its gradient is that of the sum
of squares of all states by start, actions and parameters, forward and backward.

`w-contract`: every library kernel, its step, its reward and a rollout of 5 steps against the torch twin in float64.
    float64   largest difference of value, VJP, JVP and Hessian-vector product, relative to the largest entry of the
              twin's or to 1, whichever is larger
    float32   the same of kernels in float32, relative to the norm of the twin's
`w-cartpole`: at 1024 and 8192 environments
    1024, 8192          torch eager over ours, forward + backward
    1024-semi, 8192-semi  the same with one evaluation of the acceleration per step (semi-implicit Euler)
    seconds-1024, ...   ours
`w-newton/ratio`: Newton's Featherstone cart-pole over ours, forward + backward, per environment and step, 256 worlds: a
    generic engine against a specialised kernel; needs `newton` in the Python that NEWTON_PYTHON names, or in this one.
`w-hvp`: exact product with the Hessian, by start, actions and parameters, of a random weighted sum of all states; 1024
    environments
    over-gradient       forward over reverse, over the gradient of the same sum
    over-gradient-reverse  reverse over reverse
    over-torch          torch's double backward over ours (the faster of our two ways)
`w-memory`: double pendulum, 1024 environments, float64, forward and backward with given cotangents: peak of the
    resident memory beyond inputs and outputs
    GiB                 at T = 4000
    growth              that over the one at T = 1000, both counted from 64 MiB on: less is the allocator's noise
`w-threads/speedup`: one thread over two, gradient at 8192 environments; needs two free cores. Idle threads of torch
    sleep (OMP_WAIT_POLICY=passive): by default they spin for a while, on the core that the kernel's thread needs
`w-fit`: see `warp_fit.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.warp_fit import w_fit
from benchmarks.warp_library import LIBRARY, points
from sim2real import ModelMDP, Params, default_params
from sim2real.simulators import cartpole, double_pendulum
from sim2real.simulators.warp_cartpole import warp_cartpole
from sim2real.simulators.warp_double_pendulum import warp_double_pendulum

HORIZON = 50
NOISE_FLOOR = 64.0  # MiB

# ---------------------------------------------------------------------------------------------------- accuracy


def open_loop(mdp: ModelMDP, theta: Params, start: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
    """States `[B, T+1, n]`, by the model's own rollout or step by step."""
    if mdp.open_loop is not None:
        return mdp.open_loop(theta, start, actions, noise)
    states = [start]
    for action, e in zip(actions.unbind(1), noise.unbind(1), strict=True):
        states.append(mdp.step(theta, states[-1], action, e))
    return torch.stack(states, 1)


def products(function: Callable[..., Tensor], x: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Value, JVP, VJP and Hessian-vector product along tangents and cotangents that depend on the seed only."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda t: torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype)
    tangents = tuple(normal(t) * (t.abs() + 0.1) for t in x)
    value, pushed = jvp(function, x, tangents)
    g = normal(value)
    gradient = lambda *q: vjp(function, *q)[1](g)
    pulled, second = jvp(gradient, x, tangents)
    return [value, pushed, *pulled, *second]


def model_products(mdp: ModelMDP, at: tuple[Params, Tensor, Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Products of step, reward and a rollout of 5 steps."""
    names, theta = list(at[0]), tuple(at[0].values())
    state, action, noise = at[1:]
    named = lambda values: dict(zip(names, values, strict=True))
    step = lambda *x: mdp.step(named(x[:-3]), *x[-3:])
    reward = lambda *x: mdp.reward(named(x[:-4]), *x[-4:])
    drive = (action.unsqueeze(1) * torch.linspace(1.0, -1.0, 5).double()[:, None], noise.unsqueeze(1).repeat(1, 5, 1))
    roll = lambda *x: open_loop(mdp, named(x[:-3]), *x[-3:])
    following = mdp.step(named(tuple(t.to(dtype) for t in theta)), *(t.to(dtype) for t in at[1:])).double()
    cases = ((step, at[1:]), (reward, (*at[1:], following)), (roll, (state, *drive)))
    return [
        part
        for seed, (function, rest) in enumerate(cases)
        for part in products(function, tuple(t.to(dtype) for t in (*theta, *rest)), seed)
    ]


def contract(quick: bool) -> Iterator[Figure]:
    """`w-contract`."""
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for name, kernel, twin in LIBRARY:
        if quick and " " in name:
            continue
        at = points(twin(), 6, torch.Generator().manual_seed(0))
        expected = model_products(twin(), at, torch.float64)
        for dtype in worst:
            for found, reference in zip(model_products(kernel(), at, dtype), expected, strict=True):
                off = found.double() - reference
                if not off.numel() or not bool(reference.any()):
                    error = float(off.abs().max()) if off.numel() else 0.0
                elif dtype == torch.float64:
                    error = float(off.abs().max()) / max(1.0, float(reference.abs().max()))
                else:
                    error = float(off.norm() / reference.norm())
                worst[dtype] = max(worst[dtype], error)
    count = sum(1 for name, _, _ in LIBRARY if not (quick and " " in name))
    yield Figure("float64", worst[torch.float64], "relative", count, 1e-7)
    yield Figure("float32", worst[torch.float32], "relative", count)


# -------------------------------------------------------------------------------------------------------- time


def fastest(
    *functions: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """The least time of each of the functions, run in turn."""
    least = [float("inf")] * len(functions)
    for round_ in range(repeats + 1):
        for k, function in enumerate(functions):
            start = clock()
            function()
            if round_:  # the first round compiles and fills caches
                least[k] = min(least[k], clock() - start)
    return least


def rollout_inputs(mdp: ModelMDP, batch: int, horizon: int, dtype: torch.dtype) -> tuple[list[str], list[Tensor]]:
    """Names of the parameters; their values, start and time-major actions, all as leaves."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    theta = {
        key: value * (1.0 + 0.1 * normal(batch)) for key, value in default_params(mdp.box, dtype=torch.float64).items()
    }
    n, m = len(mdp.names["state"]), len(mdp.names["action"])
    leaves = [*theta.values(), 0.1 * normal(batch, n), normal(horizon, batch, m)]
    return list(theta), [x.to(dtype).requires_grad_() for x in leaves]


def squares(mdp: ModelMDP, names: list[str], leaves: list[Tensor]) -> Tensor:
    """Sum of squares of all states."""
    *theta, start, actions = leaves
    drive = actions.transpose(0, 1)
    states = open_loop(mdp, dict(zip(names, theta, strict=True)), start, drive, drive.detach()[..., :0])
    return (states * states).sum()


def gradient(mdp: ModelMDP, names: list[str], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(squares(mdp, names, leaves), leaves)


def slope(
    mdp: ModelMDP, names: list[str], leaves: list[Tensor], weights: Tensor, *, graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of `<weights, states>`."""
    *theta, start, actions = leaves
    drive = actions.transpose(0, 1)
    states = open_loop(mdp, dict(zip(names, theta, strict=True)), start, drive, drive.detach()[..., :0])
    return torch.autograd.grad(states, leaves, weights, create_graph=graph)


def double_backward(
    mdp: ModelMDP, names: list[str], leaves: list[Tensor], weights: Tensor, along: list[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(slope(mdp, names, leaves, weights, graph=True), leaves, along)


def forward_over_reverse(
    mdp: ModelMDP, names: list[str], leaves: list[Tensor], weights: Tensor, along: list[Tensor]
) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(leaves, along, strict=True)]
        return tuple(forward_ad.unpack_dual(g).tangent for g in slope(mdp, names, duals, weights))


def race(batch: int, options: dict[str, object], repeats: int) -> tuple[float, float]:
    """Seconds of ours and of torch eager."""
    ours, twin = warp_cartpole(**options), cartpole(**options)  # type: ignore[arg-type]
    names, leaves = rollout_inputs(twin, batch, HORIZON, torch.float32)
    first, second = fastest(
        lambda: gradient(ours, names, leaves), lambda: gradient(twin, names, leaves), repeats=repeats
    )
    return first, second


def cartpole_race(quick: bool) -> Iterator[Figure]:
    """`w-cartpole`."""
    for batch, reference in ((1024, 9.0), (8192, 2.3)):
        repeats = 5 if quick else 20
        ours, torch_eager = race(batch, {}, repeats)
        yield Figure(f"seconds-{batch}", ours, "s", repeats)
        yield Figure(f"{batch}", torch_eager / ours, "times", repeats, reference)
        ours, torch_eager = race(batch, {"integrator": "semi_implicit"}, repeats)
        yield Figure(f"{batch}-semi", torch_eager / ours, "times", repeats, reference)


def hvp(quick: bool) -> Iterator[Figure]:
    """`w-hvp`."""
    repeats = 5 if quick else 20
    ours, twin = warp_cartpole(), cartpole()
    names, leaves = rollout_inputs(twin, 1024, HORIZON, torch.float32)
    rng = torch.Generator().manual_seed(1)
    along = [torch.randn(x.shape, generator=rng) * x.detach() for x in leaves]
    weights = torch.randn(HORIZON + 1, 1024, 4, generator=rng).transpose(0, 1)
    first, forward, reverse, peer = fastest(
        lambda: slope(ours, names, leaves, weights),
        lambda: forward_over_reverse(ours, names, leaves, weights, along),
        lambda: double_backward(ours, names, leaves, weights, along),
        lambda: double_backward(twin, names, leaves, weights, along),
        repeats=repeats,
    )
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = double_backward(twin, names, wide, weights.double(), [d.double() for d in along])
    found = forward_over_reverse(ours, names, leaves, weights, along)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    yield Figure("seconds", forward, "s", repeats)
    yield Figure("error", worst, "relative", len(leaves))
    yield Figure("over-gradient", forward / first, "times", repeats)
    yield Figure("over-gradient-reverse", reverse / first, "times", repeats)
    yield Figure("over-torch", peer / min(forward, reverse), "times", repeats)


def threaded(repeats: int) -> tuple[float, float]:
    """Seconds of one thread and of two; call it where idle threads sleep (OMP_WAIT_POLICY=passive)."""
    mdp = warp_cartpole()
    names, leaves = rollout_inputs(mdp, 8192, HORIZON, torch.float32)

    def on(count: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(count)
        return gradient(mdp, names, leaves)

    if any(not torch.equal(a, b) for a, b in zip(on(1), on(2), strict=True)):
        raise RuntimeError("the gradient depends on the number of threads")
    least = {1: float("inf"), 2: float("inf")}
    for count in (1, 2) * 5:  # in blocks: torch starts its threads anew when their number changes
        found = fastest(lambda count=count: on(count), repeats=repeats, clock=time.perf_counter)
        least[count] = min(least[count], *found)
    return least[1], least[2]


def threads(quick: bool) -> Iterator[Figure]:
    """`w-threads`."""
    repeats = 5 if quick else 20
    sleepy = os.environ | {"OMP_WAIT_POLICY": "passive"}
    one, two = map(float, fresh("print(*threaded(int(sys.argv[1])))", repeats, sleepy).split())
    yield Figure("seconds-1", one, "s", 5 * repeats)
    yield Figure("seconds-2", two, "s", 5 * repeats)
    yield Figure("speedup", one / two, "times", 5 * repeats)


def fresh(code: str, number: int, environment: dict[str, str] | None = None) -> str:
    """The last line that `code` prints in a process of its own, where this file's functions are names."""
    load = "import sys, torch; torch.set_num_threads(1); from benchmarks.warp_rollouts import *"
    done = subprocess.run(
        [sys.executable, "-c", f"{load}; {code}", str(number)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
    )
    return done.stdout.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- newton


def newton(quick: bool) -> Iterator[Figure]:
    """`w-newton`."""
    python = os.environ.get("NEWTON_PYTHON", sys.executable)
    script = Path(__file__).with_name("newton_cartpole.py")
    done = subprocess.run([python, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MissingError(f"not measured: {python} could not run {script.name} ({reason[0]})")
    engine = json.loads(done.stdout.splitlines()[-1])
    names, leaves = rollout_inputs(cartpole(), 256, HORIZON, torch.float32)
    ours = warp_cartpole(integrator="semi_implicit")  # as the engine: one evaluation per step
    (seconds,) = fastest(lambda: gradient(ours, names, leaves), repeats=5 if quick else 20)
    each = seconds / (256 * HORIZON)
    yield Figure("engine", engine["seconds"], "s per environment and step", engine["n"])
    yield Figure("ours", each, "s per environment and step", 256 * HORIZON)
    yield Figure("ratio", engine["seconds"] / each, "times", engine["n"], 700.0)


# ------------------------------------------------------------------------------------------------------- memory


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak(horizon: int) -> float:
    """MiB beyond inputs and outputs at the peak of forward and backward; call it in a process of its own."""
    mdp = warp_double_pendulum()

    def run(steps: int) -> float:
        names, leaves = rollout_inputs(double_pendulum(), 1024, steps, torch.float64)
        *theta, start, actions = leaves
        cotangent = torch.randn(steps + 1, 1024, 4, dtype=torch.float64).transpose(0, 1)
        drive = actions.transpose(0, 1)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        states = open_loop(mdp, dict(zip(names, theta, strict=True)), start, drive, drive.detach()[..., :0])
        grads = torch.autograd.grad(states, leaves, cotangent)
        outputs = sum(t.numel() * t.element_size() for t in (states, *grads)) / 2**20
        return resident("VmHWM") - before - outputs

    run(2)
    return run(horizon)


def memory(quick: bool) -> Iterator[Figure]:
    """`w-memory`."""
    if not Path("/proc/self/clear_refs").exists():
        raise MissingError("the peak of the resident memory is read from /proc")
    found = {}
    for horizon in (1000, 4000):
        found[horizon] = float(fresh("print(peak(int(sys.argv[1])))", horizon))
        yield Figure(f"MiB-{horizon}", found[horizon], "MiB", 1)
    yield Figure("growth", max(found[4000], NOISE_FLOOR) / max(found[1000], NOISE_FLOOR), "times", 1)
    yield Figure("GiB", found[4000] / 1024, "GiB", 1)


if __name__ == "__main__":
    bars = {
        "w-contract": contract,
        "w-cartpole": cartpole_race,
        "w-newton": newton,
        "w-hvp": hvp,
        "w-memory": memory,
        "w-threads": threads,
        "w-fit": w_fit,
    }
    main(bars)
