"""d action / d theta of trained tanh policies of 1e3, 1e4 and 1e5 parameters, with automatic damping.

The task (32 states drawn once, 4 state and 2 action variables, horizon 8, discount 0.95, deterministic):

    s+ = A s + B a + 0.1 sin s,   reward -(|s|^2 + 0.3 |a|^2 + 0.05 sum a^4),   at the end -3 |s|^2,   theta = (A, B).

Where the network represents the optimum, its action in each state is the first of the best action *sequence* from
that state. That sequence, 16 unknowns per state, is optimised to rounding and differentiated by its own dense Hessian:
the reference, which knows no network. A policy is trained by 2000 steps of L-BFGS (1000 at 1e5 parameters, quick: 300).
The system, the states and the initial weights change with the seed.

    s-scale/P           relative Frobenius error of d action / d theta, all 32 x 2 actions by all 24 parameters,
                        the worst seed; by 24 jvp of one sensitivity
    s-scale/P-median    the median seed
    s-scale/P-vjp       the error of the one VJP below, the worst seed
    s-scale/seconds     processor time of one thread for one VJP of an action cotangent at 1e5 parameters, all of it:
                        graph, probe of the spectrum, damping, solve; the median seed
    s-scale/MB          peak resident memory (Linux VmHWM) of a fresh process that imports torch and sim2real, takes
                        that VJP and nothing else: everything counts, interpreter and libraries included
    s-scale/MB-above-imports   how much of it lies above the peak right after the imports
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from sim2real.estimators import action_sensitivity, policy_sensitivity
from sim2real.params import Params, ravel, unravel
from sim2real.policy import Policy, module_policy
from sim2real.solve_report import Sensitivity
from sim2real.solvers import policy_optimum

STATES, ACTIONS, HORIZON, BATCH, DISCOUNT = 4, 2, 8, 32, 0.95
WIDTHS = {"1e3": 28, "1e4": 96, "1e5": 312}
STEPS = {"1e3": 2000, "1e4": 2000, "1e5": 1000}


@dataclass(frozen=True)
class Trained:
    """A task, the policy trained on it, an action cotangent, and the reference: actions and their derivatives."""

    theta: Params
    states: Tensor
    policy: Policy
    nu: Params
    cotangent: Params
    actions: Tensor
    derivative: Tensor


def total_reward(theta: Params, states: Tensor, act: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Discounted reward from each state, `[...]`, of the actions `act(state, time)`."""
    s, total = states, states.new_zeros(states.shape[:-1])
    for t in range(HORIZON):
        a = act(s, t)
        cost = (s * s).sum(-1) + 0.3 * (a * a).sum(-1) + 0.05 * (a**4).sum(-1)
        total = total - DISCOUNT**t * cost
        s = s @ theta["A"].mT + a @ theta["B"].mT + 0.1 * torch.sin(s)
    return total - DISCOUNT**HORIZON * 3 * (s * s).sum(-1)


def task(seed: int) -> tuple[Params, Tensor]:
    """theta and the states: A has spectral radius 1.02."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    A = draw(STATES, STATES)
    B = draw(STATES, ACTIONS) / math.sqrt(STATES)
    return {"A": A * (1.02 / torch.linalg.eigvals(A).abs().max()), "B": B}, draw(BATCH, STATES)


def open_loop(theta: Params, states: Tensor) -> tuple[Tensor, Tensor]:
    """The best first action from each state `[B, m]` and its derivative `[B, m, p]` in the p entries of theta."""

    def value(u: Tensor, state: Tensor, theta: Params) -> Tensor:
        return total_reward(theta, state, lambda _, t: u.reshape(HORIZON, ACTIONS)[t])

    each = partial(vmap, in_dims=(0, 0, None))
    gradient, curvature = each(grad(value)), each(hessian(value))
    u = states.new_zeros(len(states), HORIZON * ACTIONS)
    u = policy_optimum(lambda theta, nu: each(value)(nu["u"], states, theta).sum(), theta, {"u": u}).nu["u"]
    for _ in range(2):
        H = curvature(u, states, theta)
        u = u - (torch.linalg.inv(H) @ gradient(u, states, theta)[..., None])[..., 0]
    H, rest = curvature(u, states, theta), gradient(u, states, theta)
    if not (float(rest.abs().max()) < 1e-11 and float(torch.linalg.eigvalsh(H).max()) < 0):
        raise RuntimeError(f"the action sequences are no maximum: gradient {float(rest.abs().max()):.1e}")
    cross = each(jacfwd(grad(value), argnums=2))(u, states, theta)
    C = torch.cat([value.flatten(2) for value in cross.values()], -1)
    return u[:, :ACTIONS], -(torch.linalg.inv(H) @ C)[:, :ACTIONS]


def network(width: int) -> nn.Module:
    """Two hidden layers of tanh, in float64; weights from torch's global generator."""
    hidden = [nn.Linear(STATES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, ACTIONS)).double()


def in_sim_return(policy: Policy, states: Tensor, theta: Params, nu: Params) -> Tensor:
    """Mean reward over the states, the objective the policy is trained on."""
    return total_reward(theta, states, lambda s, t: policy.act(nu, s, s[:, :0])).mean()


def trained(width: int, seed: int, steps: int) -> Trained:
    """A policy after `steps` of L-BFGS."""
    theta, states = task(seed)
    torch.manual_seed(seed)
    net = network(width)
    policy, nu = module_policy(net), {key: value.detach().clone() for key, value in net.named_parameters()}
    J = partial(in_sim_return, policy, states)
    x = ravel(nu).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, history_size=40, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def cost() -> Tensor:
        optimizer.zero_grad()
        value = -J(theta, unravel(x, nu))
        value.backward()
        return value

    optimizer.step(cost)
    nu = unravel(x.detach(), nu)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(BATCH, ACTIONS, generator=generator, dtype=torch.float64)
    return Trained(theta, states, policy, nu, {"action": cotangent}, *open_loop(theta, states))


def sensitivity(p: Trained) -> Sensitivity:
    """d action / d theta with everything automatic."""
    J = partial(in_sim_return, p.policy, p.states)
    chain = partial(policy_sensitivity, strict=True)
    return action_sensitivity(J, p.policy, p.theta, p.nu, p.states, cotangent=p.cotangent, sensitivity=chain)


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((value - reference).norm() / reference.norm())


def one_vjp(p: Trained) -> tuple[Params, float, Sensitivity]:
    """One VJP, its processor seconds, and the sensitivity it came from."""
    start = time.process_time()
    found = sensitivity(p)
    pulled = found.vjp(p.cotangent)
    return pulled, time.process_time() - start, found


def vjp_error(p: Trained, pulled: Params) -> float:
    """Relative error of one VJP."""
    expected = torch.einsum("bm,bmp->p", p.cotangent["action"], p.derivative)
    return relative(ravel(pulled), expected)


def jacobian_error(p: Trained, found: Sensitivity) -> float:
    """Relative Frobenius error of all derivatives of all actions."""
    entries = torch.eye(ravel(p.theta).numel(), dtype=torch.float64)
    columns = [found.jvp(unravel(entry, p.theta))["action"] for entry in entries]
    return relative(torch.stack(columns, -1), p.derivative)


def peak_megabytes() -> float:
    """The largest resident size of this process so far, from Linux; 1 MB = 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def memory(p: Trained) -> tuple[float, float]:
    """Peak of a fresh process that takes the VJP of `p`, and its peak after the imports."""
    if not Path("/proc/self/status").exists():
        raise MissingError("peak memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trained.pt"
        torch.save({"theta": p.theta, "states": p.states, "nu": p.nu, "cotangent": p.cotangent}, path)
        width = str(len(p.nu["0.bias"]))
        command = [sys.executable, str(Path(__file__).resolve()), "--vjp-of", str(path), width]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, peak = map(float, run.stdout.split())
    return peak, imported


def vjp_of(path: str, width: str) -> None:
    """What the fresh process of `memory` does: prints its peak after the imports and at the end."""
    imported = peak_megabytes()
    torch.set_num_threads(1)
    saved = torch.load(path)
    nothing = torch.zeros(0)
    one_vjp(Trained(policy=module_policy(network(int(width))), **saved, actions=nothing, derivative=nothing))
    print(imported, peak_megabytes())


def s_scale(quick: bool) -> Iterator[Figure]:
    """The bar s-scale: five seeds per size (quick: one)."""
    seeds = range(1 if quick else 5)
    for name, width in WIDTHS.items():
        errors, products, seconds = [], [], []
        for seed in seeds:
            p = trained(width, seed, 300 if quick else STEPS[name])
            pulled, spent, found = one_vjp(p)
            products.append(vjp_error(p, pulled))
            seconds.append(spent)
            errors.append(jacobian_error(p, found))
        yield Figure(name, max(errors), "relative error", len(errors), 0.04)
        yield Figure(f"{name}-median", float(np.median(errors)), "relative error", len(errors))
        yield Figure(f"{name}-vjp", max(products), "relative error", len(products))
    yield Figure("seconds", float(np.median(seconds)), "s of one thread", len(seconds), 2.0)
    peak, imported = memory(p)
    yield Figure("MB", peak, "MB", 1, 512.0)
    yield Figure("MB-above-imports", peak - imported, "MB", 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--vjp-of"]:
        vjp_of(*sys.argv[2:])
    else:
        main({"s-scale": s_scale})
