"""A battery, exactly
==================

Tune the load model of a battery for profit, exactly: the cost falls from 0.657 to 0.635, the best there is.

A battery buys at 1.0, sells at 0.5 and pays dearly for running empty or over. Its net load is mostly a small surplus
and in one step of five a large draw; the model knows only Gaussian loads. The best-fitting Gaussian (mean and standard
deviation of the real load) is not the one that leads to the best policy. Everything here is exact, no sampling: the
in-sim policy is soft-optimal at a temperature (value iteration on a grid), its derivative comes from the Bellman
equation by one linear solve, and `tune` climbs the real return while the temperature falls in stages. The real cost
of the *hard*-optimal policy is piecewise constant in the model (the map on the left): the temperature makes it smooth.

    python examples/tune_battery.py --plot battery.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sim2real.params import Estimate, Params
from sim2real.policy import boltzmann_policy
from sim2real.simulators import BatteryTables, battery, battery_tables, gaussian_load, load_transition, mixed_load
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.solvers import optimal_actions, optimal_values, policy_values
from sim2real.tuning import TuneResult, TuneSettings, tune


@dataclass(frozen=True)
class Settings:
    temperatures: tuple[float, ...] = (1e-3, 3e-4, 1e-4)
    """in units of reward; a typical step costs 0.01"""
    steps: int = 20
    """evaluations of the real return per temperature, at most"""
    grid: int = 41
    """points per axis of the map in the figure"""
    spread: float = 0.0
    """standard deviation of a random shift of the start, relative; 0 starts at the best-fitting model"""


MODEL, TABLES = battery(), battery_tables()
REAL = load_transition(TABLES, mixed_load(TABLES))


def in_sim_values(theta: Params, temperature: float) -> Tensor:
    """Q*(s, a) of the model, `[161, 51]`, differentiable in theta through the Bellman equation."""
    transition = load_transition(TABLES, gaussian_load(TABLES, theta))
    return optimal_values(TABLES.reward, transition, MODEL.discount, post=TABLES.post, temperature=temperature).q


def in_sim_return(theta: Params, nu: Params, temperature: float) -> Tensor:
    """J(theta, nu) of the policy softmax(nu / temperature) in the model, with its entropy bonus."""
    transition = load_transition(TABLES, gaussian_load(TABLES, theta))
    log_pi = torch.log_softmax(nu["q"] / temperature, -1)
    reward = TABLES.reward - temperature * log_pi
    return TABLES.start @ policy_values(log_pi.exp(), reward, transition, MODEL.discount, post=TABLES.post)


def real_return(nu: Params, temperature: float) -> Tensor:
    """Return of the policy on the real battery; temperature 0 takes the best power for certain."""
    actions = optimal_actions(nu["q"], temperature)
    return TABLES.start @ policy_values(actions, TABLES.reward, REAL, MODEL.discount, post=TABLES.post)


def real_gradient(policy: Any, nu: Params, log: Any, *, temperature: float, **_: Any) -> Estimate:
    """The arrow g_nu = dJ_real / dnu of the chain: exact here, estimated from a log elsewhere."""
    grad, value = torch.func.grad_and_value(real_return)(nu, temperature)
    return Estimate(value, grad)


def sensitivity(J: Any, theta: Params, nu: Params, *, temperature: float, **_: Any) -> Sensitivity:
    """The arrow dnu*/dtheta of the chain, through the Bellman fixed point in place of a Hessian."""
    values = lambda at: {"q": in_sim_values(at, temperature)}
    slope = float(torch.func.grad(J, argnums=1)(theta, nu)["q"].norm())
    return Sensitivity(
        vjp=lambda g: torch.func.vjp(values, theta)[1](g)[0],
        jvp=lambda v: torch.func.jvp(values, (theta,), (v,))[1],
        report=SolveReport(slope < 1e-8, slope, 1, "Bellman equation solved", stationarity=slope),
    )


def tune_at(theta: Params, temperature: float, steps: int) -> TuneResult:
    """One stage: a trust-region ascent at a fixed temperature."""
    index = lambda state: ((state[..., 0] - TABLES.charges[0]) * 100).round().long()
    return tune(
        MODEL,
        boltzmann_policy(lambda nu, state: nu["q"][index(state)], temperature),
        theta,
        {"q": TABLES.reward},
        log=None,
        noise=None,
        real_reward=None,
        real_discount=MODEL.discount,
        # the derivative of the Bellman equation is exact: no certificate of a linear solve is needed
        settings=TuneSettings(max_steps=steps, gradient_tol=1e-6, certify=False),
        scale={name: torch.tensor(0.02, dtype=torch.float64) for name in theta},
        objective=partial(in_sim_return, temperature=temperature),
        optimum=lambda at, nu0: {"q": in_sim_values(at, temperature)},
        gradient=partial(real_gradient, temperature=temperature),
        sensitivity=partial(sensitivity, temperature=temperature),
    )


def hard_cost(theta: Params) -> float:
    """Real cost of the policy that is optimal, without temperature, in the model."""
    return -float(real_return({"q": in_sim_values(theta, 0.0)}, 0.0))


def draw(tables: BatteryTables, path: list[Params], costs: list[float], best: float, points: int) -> Figure:
    """Left: real cost over the models and the way taken. Right: the real load and the two models of it."""
    means = torch.linspace(-0.08, 0.04, points, dtype=torch.float64)
    stds = torch.linspace(0.05, 0.12, points, dtype=torch.float64)
    cost = [[hard_cost({"mean": mean, "std": std}) for mean in means] for std in stds]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shade = left.pcolormesh(means, stds, torch.tensor(cost).clamp(max=best + 0.04), cmap="viridis_r")
    figure.colorbar(shade, label="real cost of the model's best policy")
    left.plot(*([float(theta[name]) for theta in path] for name in ("mean", "std")), "o-", color="white", mec="black")
    left.set(xlabel="mean of the model's load", ylabel="standard deviation", title="From the fitted to the tuned model")
    right.bar(tables.loads, mixed_load(tables), width=0.008, color="lightgray", label="real load")
    for name, theta, value in (("fitted", path[0], costs[0]), ("tuned", path[-1], costs[-1])):
        right.plot(tables.loads, gaussian_load(tables, theta), label=f"{name} model: cost {value:.4f}")
    right.set(xlabel="net load per step", ylabel="probability", title=f"Optimum of the real battery: {best:.4f}")
    right.legend(loc="upper left")
    return figure


def main(settings: Settings, seed: int) -> Figure:
    load = mixed_load(TABLES)
    mean = load @ TABLES.loads
    theta = {"mean": mean, "std": (load @ (TABLES.loads - mean) ** 2).sqrt()}
    shift = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * settings.spread
    theta = {name: value * (1 + s) for (name, value), s in zip(theta.items(), shift, strict=True)}
    optimal = optimal_values(TABLES.reward, REAL, MODEL.discount, post=TABLES.post).q
    best = -float(real_return({"q": optimal}, 0.0))
    path, costs = [theta], [hard_cost(theta)]
    print(f"{'temperature':>12} {'mean':>8} {'std':>8} {'soft cost':>10} {'hard cost':>10} evaluations")
    print(f"{'start':>12} {theta['mean']:8.4f} {theta['std']:8.4f} {'':>10} {costs[0]:10.5f}")
    for temperature in settings.temperatures:
        result = tune_at(path[-1], temperature, settings.steps)
        path, costs = [*path, result.theta], [*costs, hard_cost(result.theta)]
        soft = -max(step["real_return"] for step in result.history)
        numbers = f"{path[-1]['mean']:8.4f} {path[-1]['std']:8.4f} {soft:10.5f} {costs[-1]:10.5f}"
        print(f"{temperature:12g} {numbers} {len(result.history)}")
    print(f"{100 * (costs[0] - costs[-1]) / (costs[0] - best):.1f} % of the gap to the real optimum {best:.5f} closed")
    return draw(TABLES, path, costs, best, settings.grid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0, help="of the random shift of the start, with --spread")
    parser.add_argument("--spread", type=float, default=0.0, help="relative size of that shift")
    parser.add_argument("--quick", action="store_true", help="one temperature, few steps, a coarse map")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    tiny = {"temperatures": (3e-4,), "steps": 6, "grid": 5} if arguments.quick else {}
    drawn = main(Settings(spread=arguments.spread, **tiny), arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
