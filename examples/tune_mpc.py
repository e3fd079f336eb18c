"""An MPC and its constraints
============================

Tune the model inside an MPC for the real cost: the controller learns to keep its distance from the constraints.

The system of Gros and Zanon (Data-driven economic NMPC using reinforcement learning, IEEE TAC 65(2), 2020, section
VI.A): two unstable states to be kept in [0, 1] x [-1, 1], each violation costs dearly, and a disturbance between -0.1
and 0 pushes the first state, which the cost wants at 0, out of its bounds. The controller *is* a formula of the model:
predict with A, B, c, plan ten steps within the bounds, act. With the model that fits the data best, the expected
disturbance included, the plan rides on the bound, and the system is outside in one step of four: a real cost of 2.57.
`tune` moves the model, and the back-off of the constraints, along the derivative of the real cost through the quadratic
program; the cost falls to 0.31, with 0.6 % of the steps outside. The tuned model predicts worse, on the safe side.

    python examples/tune_mpc.py --plot mpc.png
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

from sim2real.bounds import Box
from sim2real.estimators import certify, explicit_sensitivity
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout, expected_return, rollout
from sim2real.solvers import condensed_mpc, mpc_policy, mpc_report, riccati
from sim2real.tuning import TuneResult, TuneSettings, tune


@dataclass(frozen=True)
class Settings:
    horizon: int = 10
    """of the plan, steps"""
    length: int = 40
    """of a real run, steps"""
    runs: int = 32
    """real runs per evaluation"""
    fresh: int = 128
    """runs on which the result is judged, of other disturbances"""
    steps: int = 15
    """evaluations of tune, at most"""


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


DISCOUNT = 0.9
LOW, HIGH = matrix((0.0, -1.0))[0], matrix((1.0, 1.0))[0]
WEIGHT = 50.0
"""cost per unit of violation and step"""
COST = {"Q": 0.5 * torch.eye(2, dtype=torch.float64), "R": matrix((0.25,))}
WORLD = {"A": matrix((0.9, 0.35), (0.0, 1.1)), "B": matrix((0.0813,), (0.2,))}


def plant() -> ModelMDP:
    """The real system; nothing below looks inside, except that its return is differentiated."""

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        push = torch.cat([-0.1 * torch.special.ndtr(e), torch.zeros_like(e)], -1)
        return state @ theta["A"].mT + action @ theta["B"].mT + push

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        violation = (LOW - state).clamp_min(0.0) + (state - HIGH).clamp_min(0.0)
        return -(0.5 * state.square() + WEIGHT * violation).sum(-1) - 0.25 * action.square().sum(-1)

    start = lambda theta, e0: matrix((0.0, 0.15)) + 0.05 * e0.abs()
    return ModelMDP(start, step, reward, noise_dims=(2, 1), dt=1.0, discount=DISCOUNT)


def controller(settings: Settings) -> Policy:
    """nu = {"A", "B", "c", "back_off", "P"}; the bounds of the states are soft, at the real price of a violation."""
    bounds = {"output_low": LOW, "output_high": HIGH, "low": matrix((-1.0,))[0], "high": matrix((1.0,))[0]}
    fixed = COST | bounds | {"penalty": torch.tensor(WEIGHT, dtype=torch.float64)}
    return mpc_policy(settings.horizon, fixed, discount=DISCOUNT)


def model_to_mpc(theta: Params) -> Params:
    """The in-sim optimum: the controller that is right for the model. Beyond the plan, the cost of its LQR."""
    return theta | {"P": riccati(theta["A"], theta["B"], **COST, discount=DISCOUNT)[0]}


def fit(generator: torch.Generator, count: int = 2000) -> Params:
    """Least squares from random transitions of the real system: consistent in A, B and the mean disturbance c."""
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    state, action = LOW + (HIGH - LOW) * draw(count, 2), 2 * draw(count, 1) - 1
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    following = plant().step(WORLD, state, action, noise)
    inputs = torch.cat([state, action, torch.ones_like(action)], -1)
    A, B, c = torch.linalg.lstsq(inputs, following).solution.mT.split([2, 1, 1], -1)
    return {"A": A.clone(), "B": B.clone(), "c": c[:, 0].clone(), "back_off": torch.zeros(2, dtype=torch.float64)}


def real_gradient(policy: Policy, nu: Params, log: Any, *, noise: Any, **_: Any) -> Estimate:
    """The arrow g_nu = dJ_real / dnu of the chain: exact on recorded disturbances here, from a log elsewhere."""
    J = lambda at: expected_return(plant(), policy, WORLD, at, noise)
    grad, value = torch.func.grad_and_value(J)(nu)
    return Estimate(value, grad)


def improve(theta: Params, policy: Policy, settings: Settings, generator: torch.Generator) -> TuneResult:
    mdp = plant()
    recorded = sample_noise(mdp, policy, settings.runs, settings.length, generator, dtype=torch.float64)
    return tune(
        mdp,
        policy,
        theta,
        model_to_mpc(theta),
        log=None,
        noise=recorded,
        real_reward=None,
        real_discount=DISCOUNT,
        settings=TuneSettings(max_steps=settings.steps, radius=0.5, gradient_tol=1e-5),
        box=Box(low={"back_off": 0.0}, high={"back_off": 0.3}),
        scale={key: torch.tensor(0.05, dtype=torch.float64) for key in theta},
        optimum=lambda at, nu0: model_to_mpc(at),
        sensitivity=partial(explicit_sensitivity, optimum=model_to_mpc),
        gradient=partial(real_gradient, noise=recorded),
        # a formula is no maximiser of a return: its derivative is certified by evaluating it again nearby
        certificate=lambda J, *chain, **options: certify(None, *chain, **(options | {"directions": 2})),
    )


def judged(policy: Policy, theta: Params, settings: Settings) -> tuple[Rollout, float, float]:
    """Fresh runs, their mean cost, and the share of steps outside the bounds."""
    generator = torch.Generator().manual_seed(1)
    noise = sample_noise(plant(), policy, settings.fresh, settings.length, generator, dtype=torch.float64)
    runs = rollout(plant(), policy, WORLD, model_to_mpc(theta), noise)
    cost = -float((runs.rewards @ DISCOUNT ** torch.arange(settings.length, dtype=torch.float64)).mean())
    outside = ((runs.states < LOW - 1e-9) | (runs.states > HIGH + 1e-9)).any(-1)
    return runs, cost, float(outside[:, 1:].double().mean())


def draw(runs: dict[str, Rollout], costs: list[float]) -> Figure:
    """Left: the first state in some runs of both controllers. Right: the real cost over the evaluations."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, run), color in zip(runs.items(), ("tab:red", "tab:blue"), strict=True):
        left.plot(run.states[:12, :, 0].T, color=color, alpha=0.35, lw=0.9)
        left.plot([], [], color=color, label=name)
    left.axhline(float(LOW[0]), color="black", lw=1)
    left.set(xlabel="step", ylabel="first state", title="The bound is 0")
    left.legend()
    right.plot(costs, "o-")
    right.set(xlabel="evaluation", ylabel="real cost", title="Best so far")
    return figure


def main(settings: Settings, seed: int) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    policy, fitted = controller(settings), fit(generator)
    result = improve(fitted, policy, settings, generator)
    runs = {}
    print(f"{'model':>8} {'real cost':>10} {'outside':>8}  back-off, bias of the first state")
    for name, theta in (("fitted", fitted), ("tuned", result.theta)):
        runs[name], cost, outside = judged(policy, theta, settings)
        numbers = ", ".join(f"{float(theta[key][0]):.4f}" for key in ("back_off", "c"))
        print(f"{name:>8} {cost:10.3f} {100 * outside:6.1f} %  {numbers}")
    met = runs["tuned"].states[:, :-1].flatten(0, 1)
    bounds = {"output_low": LOW, "output_high": HIGH, "penalty": WEIGHT, "low": -1.0, "high": 1.0}
    plans = condensed_mpc(
        **COST, **model_to_mpc(result.theta), x0=met, horizon=settings.horizon, discount=DISCOUNT, **bounds
    )
    for note in (*result.notes, *mpc_report(plans).notes):
        print(note)
    best = torch.tensor([-step["real_return"] for step in result.history]).cummin(0).values
    return draw(runs, best.tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0, help="of the data and the disturbances")
    parser.add_argument("--quick", action="store_true", help="short plans, few runs, few steps")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    tiny = {"horizon": 4, "length": 12, "runs": 4, "fresh": 8, "steps": 2} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
