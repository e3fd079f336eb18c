"""Closed loops through Warp and through torch: the return of a policy in the cart-pole, its gradient and HVP in nu.

1024 environments, 50 steps, float64, one thread; kernels compiled before, the least of interleaved runs. The products
of `policy_sensitivity` are such HVPs.

    <policy>-gradient      seconds of value and gradient through torch over those through Warp
    <policy>-hvp           the same for one product with the Hessian, on a graph that is kept
    <policy>-gradient-ms, <policy>-hvp-ms     milliseconds through Warp
    stepped-gradient       gradient with a policy that only torch can evaluate: steps through Warp, one Function each

    python benchmarks/warp_closed_loop.py --json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.bars import Figure, MissingError, main
from sim2real import (
    ModelMDP,
    Params,
    Policy,
    default_params,
    expected_return,
    linear_policy,
    module_policy,
    sample_noise,
)
from sim2real.simulators import cartpole

BATCH, STEPS = 1024, 50


def policies(quick: bool) -> dict[str, tuple[Policy, Params]]:
    """A gain and networks with two hidden layers."""
    torch.manual_seed(0)
    found = {"linear": (linear_policy(1), {"gain": torch.tensor([[-1.0, -9.0, -1.5, -2.0]], dtype=torch.float64)})}
    for width in (16,) if quick else (8, 16, 32, 64):
        layers = [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        module = nn.Sequential(*layers).double()
        found[f"mlp{width}"] = (module_policy(module), {key: x.detach() for key, x in module.named_parameters()})
    return found


def products(mdp: ModelMDP, policy: Policy, nu: Params) -> dict[str, Callable[[], object]]:
    """What is timed."""
    theta, noise = default_params(mdp.box), sample_noise(mdp, policy, BATCH, STEPS, torch.Generator().manual_seed(1))
    leaves = {key: value.clone().requires_grad_() for key, value in nu.items()}
    inputs = list(leaves.values())
    gradient = lambda: torch.autograd.grad(expected_return(mdp, policy, theta, leaves, noise), inputs)
    kept = torch.autograd.grad(expected_return(mdp, policy, theta, leaves, noise), inputs, create_graph=True)
    along = [torch.randn_like(value) for value in kept]
    return {"gradient": gradient, "hvp": lambda: torch.autograd.grad(kept, inputs, along, retain_graph=True)}


def least(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, the least of interleaved runs."""
    seconds = [float("inf")] * len(functions)
    for turn in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn:
                seconds[index] = min(seconds[index], time.perf_counter() - start)
    return seconds


def w_closed_loop(quick: bool) -> Iterator[Figure]:
    """Gradient and HVP per policy."""
    try:
        from sim2real.simulators.warp_cartpole import warp_cartpole
    except ImportError as error:
        raise MissingError(f"Warp is not installed ({error}); pip install 'sim2real[warp]'") from error
    fused, repeats = warp_cartpole(), 5 if quick else 15
    for name, (policy, nu) in policies(quick).items():
        ours, theirs = products(fused, policy, nu), products(cartpole(), policy, nu)
        for kind in ours:
            warp, torch_ = least([ours[kind], theirs[kind]], repeats)
            yield Figure(f"{name}-{kind}", torch_ / warp, "x", repeats)
            yield Figure(f"{name}-{kind}-ms", 1e3 * warp, "ms", repeats)
    policy, nu = policies(True)["mlp16"]
    stepped = products(replace(fused, closed_loop=None), policy, nu)["gradient"]
    warp, torch_ = least([stepped, products(cartpole(), policy, nu)["gradient"]], repeats)
    yield Figure("stepped-gradient", torch_ / warp, "x", repeats)
    yield Figure("stepped-gradient-ms", 1e3 * warp, "ms", repeats)


if __name__ == "__main__":
    main({"w-closed-loop": w_closed_loop})
