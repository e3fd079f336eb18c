"""Economic control with a wrong model: the share of the gap from best-fitting to best-performing that `tune` closes.

The standard studies of tuning a model for the real return: a battery (exact, see `battery.py`), a stirred-tank reactor
whose side reaction the model lacks, and an evaporator whose disturbances it lacks. For the last two:

    best-fitting      theta fitted by least squares to 40 000 real transitions under random inputs
    best-performing   theta that Nelder-Mead finds on the real return itself, with the world's noise frozen and the same
                      for every theta; nobody can do that on a plant
    tuned             theta that `tune` finds from rollouts of the real system, started at the best-fitting one

The policy is in all three the optimum of an affine feedback in the model. All are judged on the same held-out noise:

    closed = (J(tuned) - J(best-fitting)) / (J(best-performing) - J(best-fitting)),   J the real discounted return.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.battery import b_battery
from benchmarks.economic_tasks import Task, evaporator, policy_of, reactor, start_of, truth
from sim2real.controllers import exploring_policy
from sim2real.fit import FitSettings, fit
from sim2real.mdp import Noise, sample_noise
from sim2real.params import Params, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, discounted_return, expected_return, rollout
from sim2real.rollout_log import RolloutLog
from sim2real.solvers.optimum import policy_optimum
from sim2real.tuning import TuneResult, TuneSettings, tune


def in_sim_noise(task: Task, starts: int = 8) -> Noise:
    """Starts of the in-sim rollouts, in pairs mirrored at their mean; the model itself is without noise."""
    noise = sample_noise(task.model, policy_of(task), starts, task.horizon, torch.Generator().manual_seed(0))
    half = noise.initial[: starts // 2]
    return replace(noise, initial=torch.cat([half, -half]), process=torch.zeros_like(noise.process))


def in_sim_return(task: Task, noise: Noise, theta: Params, nu: Params) -> Tensor:
    """J(theta, nu)."""
    return expected_return(task.model, policy_of(task), theta, nu, noise)


def trained(task: Task, noise: Noise, theta: Params, nu: Params) -> Params:
    """nu*(theta) by Newton with halved steps; where it stalls, `policy_optimum` goes on.

    Half a dozen parameters take a second, a tenth of what `policy_optimum` takes, one Hessian-vector product at a time.
    Raises `ValueError` when the model diverges under `nu` and when the inputs rest at `base`.
    """
    around = slopes_around(task, noise, theta, nu)
    x, value, slope, hessian = around(ravel(nu))
    if not value > -float("inf"):
        x, value, slope, hessian = around(ravel(start_of(task)))
    if not value > -float("inf"):
        raise ValueError(f"the model of {task.name} diverges at theta = {theta}")
    for _ in range(40):
        curvature, along = torch.linalg.eigh(0.5 * (hessian + hessian.T))
        step = along @ ((along.T @ slope) / curvature.abs().clamp(min=1e-6 * float(curvature.abs().max())))
        moved, allowed = float(step.norm()), value - 1e-12 * abs(value)
        if moved < 1e-9 * (1 + float(x.norm())):
            return unravel(x, nu)
        trial = around(x + step)
        while trial[1] < allowed and float(step.norm()) > 1e-3 * moved:
            step = 0.5 * step
            trial = around(x + step)
        if trial[1] < allowed:
            break
        x, value, slope, hessian = trial
    return policy_optimum(partial(in_sim_return, task, noise), theta, unravel(x, nu), tol=1e-8).nu


def slopes_around(
    task: Task, noise: Noise, theta: Params, like: Params
) -> Callable[[Tensor], tuple[Tensor, float, Tensor, Tensor]]:
    """x `[P]` -> x, J (minus infinity where not finite), its gradient and Hessian, all from one batch of rollouts.

    The Hessian is the central difference of exact gradients, at x +- 1e-5 in every direction.
    """
    size, starts, h = ravel(like).numel(), len(noise.initial), 1e-5
    eye = torch.eye(size, dtype=torch.float64)
    ends = h * torch.cat([torch.zeros_like(eye[:1]), eye, -eye])
    tiled = Noise(*(part.repeat(2 * size + 1, *[1] * (part.dim() - 1)) for part in vars(noise).values()))

    def around(x: Tensor) -> tuple[Tensor, float, Tensor, Tensor]:
        points = (x + ends).requires_grad_()
        run = rollout(task.model, policy_of(task), theta, unravel(points.repeat_interleave(starts, 0), like), tiled)
        values = discounted_return(run.rewards, task.model.discount).reshape(-1, starts).mean(1)
        slopes = torch.autograd.grad(values.sum(), points)[0]
        finite = bool(torch.isfinite(values.detach()).all() & torch.isfinite(slopes).all())
        value = float(values[0].detach()) if finite else -float("inf")
        return x, value, slopes[0], (slopes[1 : size + 1] - slopes[size + 1 :]) / (2 * h)

    return around


def excitation(task: Task, seed: int, episodes: int, steps: int) -> RolloutLog:
    """Real transitions under random inputs: around `base`, three quarters of `span` strong, held for ten steps each."""
    generator = torch.Generator().manual_seed(seed)
    m = len(task.base)
    levels = torch.randn(episodes, -(-steps // 10), m, generator=generator, dtype=torch.float64).repeat_interleave(
        10, 1
    )
    actions = (task.base + 0.75 * task.span * levels)[:, :steps]
    noise = sample_noise(task.world, policy_of(task), episodes, steps, generator)
    states = [task.world.initial_state(truth(task), noise.initial)]
    for action, e in zip(actions.unbind(1), noise.process.unbind(1), strict=True):
        states.append(task.world.step(truth(task), states[-1], action, e))
    names = {"signal": task.world.names["state"], "action": task.world.names["action"], "exogenous": ()}
    return RolloutLog(
        signals=torch.stack(states, 1),
        actions=actions,
        exogenous=None,
        mask=torch.ones(episodes, steps, dtype=torch.bool),
        dt=task.world.dt,
        names=names | {"episode": tuple(f"run-{i}" for i in range(episodes))},
        units=dict(task.world.units),
        source=f"{task.name}-{seed}",
    )


def best_fitting(task: Task, seed: int, episodes: int = 100, steps: int = 400) -> Params:
    """theta of least squares on single steps, which is the maximum-likelihood fit of a model with additive noise."""
    settings = FitSettings(
        free=tuple(task.scale),
        signals=task.signals,
        horizon=task.world.dt,
        stride=task.world.dt,
        sample_every=1,
        first_row=0,
        margin=0,
        loss_scale=1e6,  # far above the residuals: plain squares
        prior_width=0.0,
    )
    return fit(task.model, excitation(task, seed, episodes, steps), truth(task), settings).theta


def tuned(task: Task, theta: Params, seed: int, episodes: int, rounds: int) -> TuneResult:
    """`tune` from theta: each round runs `episodes` on the real system, the policy's inputs plus a little noise."""
    noise = in_sim_noise(task)

    def collect(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        exploring = exploring_policy(policy, 0.5 * task.span)
        real = sample_noise(task.world, exploring, episodes, task.horizon, generator)
        return rollout(task.world, exploring, truth(task), nu, real)

    return tune(
        task.model,
        policy_of(task),
        theta,
        trained(task, noise, theta, start_of(task)),
        None,
        None,
        real_reward=None,
        real_discount=task.world.discount,
        collect=collect,
        settings=TuneSettings(max_steps=rounds, radius=1.0),
        free=tuple(task.scale),
        scale=task.scale,
        objective=partial(in_sim_return, task, noise),
        optimum=partial(trained, task, noise),
        generator=torch.Generator().manual_seed(seed),
    )


def real_returns(task: Task, nu: Params, episodes: int, seed: int) -> Tensor:
    """Real discounted return of each of `episodes` `[N]`, all but 0.2 % of it; the same noise for the same seed."""
    steps = round(np.log(2e-3) / np.log(task.world.discount))
    policy = policy_of(task)
    noise = sample_noise(task.world, policy, episodes, steps, torch.Generator().manual_seed(seed))
    return discounted_return(rollout(task.world, policy, truth(task), nu, noise).rewards, task.world.discount)


def best_performing(task: Task, theta: Params, evaluations: int) -> tuple[Params, Params]:
    """theta of the highest real return, and its policy: Nelder-Mead from theta, on 500 episodes with frozen noise."""
    keys, noise, nu = tuple(task.scale), in_sim_noise(task), start_of(task)
    best = [(float("inf"), theta, trained(task, noise, theta, nu))]

    def cost(x: np.ndarray) -> float:
        at = theta | {key: theta[key] + float(value) * task.scale[key] for key, value in zip(keys, x, strict=True)}
        try:
            nu = trained(task, noise, at, best[0][2])
        except ValueError:  # the model diverges
            return float("inf")
        value = -float(real_returns(task, nu, 500, seed=1).mean().nan_to_num(-float("inf")))
        best[0] = min(best[0], (value, at, nu), key=lambda tried: tried[0])
        return value

    simplex = np.concatenate([np.zeros((1, len(keys))), np.eye(len(keys))])
    options = {"maxfev": evaluations, "initial_simplex": simplex, "xatol": 1e-2, "fatol": 1e-4}
    minimize(cost, simplex[0], method="Nelder-Mead", options=options)
    return best[0][1:]


def task_figures(task: Task, quick: bool) -> Iterator[Figure]:
    """Share of the gap closed: the worst and the median seed, and what it is a share of."""
    noise, held_out, seeds = in_sim_noise(task), 4000, 1 if quick else 3

    def judged(theta: Params, nu: Params | None = None) -> Tensor:
        policy = trained(task, noise, theta, start_of(task)) if nu is None else nu
        return real_returns(task, policy, held_out, seed=2)

    fits = [best_fitting(task, seed) for seed in range(seeds)]
    fitted = [judged(theta) for theta in fits]
    best = judged(*best_performing(task, fits[0], 30 if quick else 50))
    results = [tuned(task, theta, seed, 100, 3 if quick else 5) for seed, theta in enumerate(fits)]
    ends = [judged(result.theta, result.nu) for result in results]
    closed = [float((end - start).mean() / (best - start).mean()) for end, start in zip(ends, fitted, strict=True)]
    rate = task.sign * (1 - task.world.discount) * 60.0 / task.world.dt
    stderr = float((best - fitted[0]).std()) / held_out**0.5
    yield Figure(task.name, min(closed), "fraction of the gap, worst seed", seeds)
    yield Figure(f"{task.name}-median", median(closed), "fraction of the gap", seeds)
    yield Figure(f"{task.name}-best-fitting", rate * float(fitted[0].mean()), task.unit, held_out)
    yield Figure(f"{task.name}-tuned", rate * float(ends[0].mean()), task.unit, held_out)
    yield Figure(f"{task.name}-best-performing", rate * float(best.mean()), task.unit, held_out)
    yield Figure(f"{task.name}-gap-stderr", abs(rate) * stderr, task.unit, held_out)
    transitions = int(results[0].history[-1]["transitions"])
    yield Figure(f"{task.name}-transitions", transitions, "real transitions of tune per seed", seeds)
    for key in task.scale:
        values = (fits[0][key], results[0].theta[key])
        yield Figure(f"{task.name}-tuned-{key}", float(values[1]), task.model.box.unit[key], 1, float(values[0]))


def s_economic(quick: bool) -> Iterator[Figure]:
    """Share of the gap closed on the three tasks; the references of the tuned theta are the fitted values."""
    names = {"closed": "battery", "fitted": "battery-best-fitting", "tuned": "battery-tuned"}
    names |= {"best-of-class": "battery-best-performing"}
    for figure in b_battery(quick):
        if figure.metric in names:
            yield replace(figure, metric=names[figure.metric], reference=None)
    yield from task_figures(reactor(), quick)
    yield from task_figures(evaporator(), quick)


if __name__ == "__main__":
    main({"s-economic": s_economic})
