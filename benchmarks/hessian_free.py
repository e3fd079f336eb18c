"""Real samples, time and bias of the two routes to grad_theta J_real: Hessian-free, and implicit differentiation.

Both get the same real log of the soft in-sim optimum, the same critic features and the same true gradient. `implicit`
is `logged_policy_gradient` in policy parameters, then `policy_sensitivity` (Hessian-vector products of the in-sim soft
return, conjugate gradients). `hessian-free` is `hessian_free_gradient`: in-sim rollouts from every real state and every
action node. `projected` (pendulum) keeps the real half of `implicit` and takes `soft_sensitivity` of nu for the other,
from in-sim states alone. Per problem class, and as CLASS-projected:

    ratio, low, high     real transitions hessian-free needs over those implicit needs at equal error, 90 % bootstrap
                         interval over seeds: error^2 ~ c / N, the ratio of the c
    ratio-of-variances   the same without the mean error, which no number of samples removes
    slope-ROUTE          of log error^2 on log N, -1 where sampling noise of the real log is all there is
    error-ROUTE          relative root mean square error at the largest N
    bias-ROUTE           relative norm of the mean error there, over all seeds (error / sqrt(seeds) of it is noise)
    seconds-ROUTE        of processor time per gradient at the largest N, without the training both need
    cost-ratio           hessian-free over implicit

lqr: linear system, 6 parameters, closed-form soft optimum; rollouts pathwise. finite: random tables, the model a black
box with a density; score with known values. pendulum: balancing upright, ten policy parameters trained on 256
in-sim rollouts; the world has Coulomb friction. `gap`: a soft policy trained short of its optimum, its
`soft_consistency` (nats) and the relative error of the gradient it gives.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from sim2real.estimators import (
    hessian_free_gradient,
    logged_policy_gradient,
    policy_sensitivity,
    soft_consistency,
    soft_return,
    soft_sensitivity,
)
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params, dot, ravel
from sim2real.policy import boltzmann_policy, gaussian_policy
from sim2real.rollout import Rollout, expected_return, rollout
from sim2real.simulators import linear_gaussian, pendulum
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers import cg, linear_noise_policy, lyapunov, optimal_values, policy_optimum, policy_values, soft_lqr

Route = Callable[[Rollout, torch.Generator], Tensor]
"""real log, generator for the in-sim noise -> gradient in theta, raveled"""


@dataclass(frozen=True)
class Task:
    """One problem class: the exact gradient, what records a real log of some episodes, and the two routes."""

    truth: Tensor
    collect: Callable[[int, torch.Generator], Rollout]
    hessian_free: Route
    implicit: Route
    nu: Params
    """the policy's"""
    gap: Callable[[Tensor], Tensor] | None = None
    """how far the policy is from soft-optimal, in nats, over some states"""
    projected: Route | None = None
    """`logged_policy_gradient`, then `soft_sensitivity` of nu: a Hessian-free in-sim half on the same real half"""
    solve_seconds: float = 0.0
    """of one linear solve, where `implicit` takes the Jacobian it has computed once"""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ linear-quadratic


def lqr_task() -> Task:
    """A lightly damped system whose model is 10 to 30 % off; temperature 0.1, discounts 0.9 (model) and 0.95 (real)."""
    tensor = partial(torch.tensor, dtype=torch.float64)
    eye, price, temperature, sim, real = torch.eye(2, dtype=torch.float64), tensor([[0.3]]), 0.1, 0.9, 0.95
    theta = {"A": tensor([[1.0, 0.2], [-0.1, 0.9]]), "B": tensor([[0.1], [0.3]])}
    world = {"A": tensor([[1.05, 0.25], [0.0, 0.8]]), "B": tensor([[0.05], [0.4]])}
    W = 0.05 * eye
    options = {"state_cost": eye, "action_cost": price, "noise_covariance": W}
    mdp, truth_mdp = (
        linear_gaussian(**system, **options, discount=discount) for system, discount in ((theta, sim), (world, real))
    )
    policy = linear_noise_policy(1)

    def optimum(th: Params) -> Params:
        return soft_lqr(th["A"], th["B"], eye, price, discount=sim, temperature=temperature).nu

    def value(system: Params, nu: Params, discount: float) -> Tensor:
        K, spread = nu["gain"], nu["factor"] @ nu["factor"].mT
        P = lyapunov(system["A"] - system["B"] @ K, eye + K.mT @ price @ K, discount)
        noise = ((price + discount * system["B"].mT @ P @ system["B"]) * spread).sum() + discount * (P * W).sum()
        return -P.diagonal().sum() - noise / (1 - discount)

    def in_sim(th: Params, nu: Params) -> Tensor:
        return value(th, nu, sim) + temperature * nu["factor"].diagonal().log().sum() / (1 - sim)

    nu = {key: item.detach() for key, item in optimum(theta).items()}

    def collect(episodes: int, generator: torch.Generator) -> Rollout:
        return rollout(truth_mdp, policy, world, nu, sample_noise(truth_mdp, policy, episodes, 20, generator))

    def hessian_free(log: Rollout, generator: torch.Generator) -> Tensor:
        noise = sample_noise(mdp, policy, log.rewards.numel() + len(log.rewards), 40, generator)
        chosen = {"temperature": temperature, "real_discount": real, "groups": 0}
        return ravel(hessian_free_gradient(mdp, policy, theta, nu, log, noise, **chosen).grad)

    def implicit(log: Rollout, generator: torch.Generator) -> Tensor:
        g = logged_policy_gradient(policy, nu, log, real_discount=real, groups=0).grad
        return ravel(policy_sensitivity(in_sim, theta, nu, cotangent=g).vjp(g))

    exact = torch.func.grad(lambda th: value(world, optimum(th), real))(theta)
    return Task(ravel(exact), collect, hessian_free, implicit, nu)


# ----------------------------------------------------------------------------------------------------- finite MDP


def index(x: Tensor) -> Tensor:
    """Column 0 as an index `[N]`."""
    return x[:, 0].round().long()


def black_box(tables: Callable[[Params], tuple[Tensor, Tensor]], discount: float, states: int) -> ModelMDP:
    """Tables as a simulator that draws the next index without a derivative and knows its probability."""

    def pick(probability: Tensor, e: Tensor) -> Tensor:
        return (torch.special.ndtr(e) > probability.cumsum(-1)[..., :-1]).sum(-1, keepdim=True).double()

    return ModelMDP(
        initial_state=lambda th, e: pick(torch.full((len(e), states), 1 / states, dtype=e.dtype), e),
        step=lambda th, s, a, e: pick(tables(th)[0].detach()[index(s), index(a)], e),
        reward=lambda th, s, a, e, x: tables(th)[1][index(s), index(a)],
        noise_dims=(1, 1),
        dt=1.0,
        discount=discount,
        log_prob=lambda th, s, a, x: tables(th)[0].log()[index(s), index(a), index(x)],
        derivative_order=0,
    )


def finite_task(rollouts: int = 1) -> Task:
    """Random tables: softmax transitions and rewards linear in theta; temperature 1, discounts 0.9 and 0.95."""
    states, actions, parameters = 8, 3, 4
    draw = partial(torch.randn, generator=seeded(0), dtype=torch.float64)
    base, slope = draw(states, actions, states), 0.5 * draw(parameters, states, actions, states)
    bonus, theta = draw(parameters, states, actions), {"x": 0.5 * draw(parameters)}
    P_real, r_real = torch.softmax(draw(states, actions, states), -1), draw(states, actions)
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    temperature, sim, real = 1.0, 0.9, 0.95
    every = torch.arange(actions, dtype=torch.float64).unsqueeze(-1)

    def tables(th: Params) -> tuple[Tensor, Tensor]:
        return torch.softmax(base + torch.tensordot(th["x"], slope, 1), -1), torch.tensordot(th["x"], bonus, 1)

    def soft_q(th: Params) -> Tensor:
        P, r = tables(th)
        return optimal_values(r, P, sim, temperature=temperature).q

    def in_sim(th: Params, nu: Params) -> Tensor:
        P, r = tables(th)
        log_pi = torch.log_softmax(nu["q"] / temperature, -1)
        return start @ policy_values(log_pi.exp(), r - temperature * log_pi, P, sim)

    def real_return(th: Params) -> Tensor:
        return start @ policy_values(torch.softmax(soft_q(th) / temperature, -1), r_real, P_real, real)

    policy = boltzmann_policy(lambda nu, state: nu["q"][index(state)], temperature)
    known = lambda nu, state: temperature * torch.logsumexp(nu["q"][index(state)] / temperature, -1)
    features = lambda s, a: nn.functional.one_hot(actions * index(s) + index(a), states * actions).double()

    mdp, world = black_box(tables, sim, states), black_box(lambda th: (P_real, r_real), real, states)
    nu = {"q": soft_q(theta).detach()}
    shared = {"real_discount": real, "features": features, "actions": every, "groups": 0}

    def collect(episodes: int, generator: torch.Generator) -> Rollout:
        # at three times the temperature, so that every action is seen in every state
        exploring = {"q": nu["q"] / 3}
        return rollout(world, policy, theta, exploring, sample_noise(world, policy, episodes, 20, generator))

    def hessian_free(log: Rollout, generator: torch.Generator) -> Tensor:
        rows = rollouts * (log.rewards.numel() + len(log.rewards))
        noise = sample_noise(mdp, policy, rows, 50, generator)
        chosen = {"temperature": temperature, "soft_value": known, "rollouts": rollouts}
        return ravel(hessian_free_gradient(mdp, policy, theta, nu, log, noise, **chosen, **shared).grad)

    def implicit(log: Rollout, generator: torch.Generator) -> Tensor:
        g = logged_policy_gradient(policy, nu, log, **shared).grad
        return ravel(policy_sensitivity(in_sim, theta, nu, cotangent=g, solve=partial(cg, tol=1e-8)).vjp(g))

    return Task(ravel(torch.func.grad(real_return)(theta)), collect, hessian_free, implicit, nu)


# -------------------------------------------------------------------------------------------------------- pendulum


class Corrected(nn.Module):
    """Mean (odd in the deviation from upright) and log standard deviation (even): linear, with bounded corrections."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 2, bias=False, dtype=torch.float64)

    def forward(self, state: Tensor) -> Tensor:
        z, w = state[..., 0] - math.pi, 0.2 * state[..., 1]
        u, v = torch.tanh(2 * z), torch.tanh(2 * w)
        odd = torch.stack([z, w, u**3, u * u * v, u * v * v], -1)
        even = torch.stack([torch.ones_like(z), u * u, u * v, v * v, u**4], -1)
        return (torch.stack([odd, even], -2) * self.out.weight).sum(-1)


def deviations(state: Tensor, action: Tensor) -> Tensor:
    """Monomials of degree 0, 2 and 4 in angle, velocity and torque, scaled to order one: 22 features, even as Q is."""
    x = torch.stack([(state[:, 0] - math.pi) / 0.3, state[:, 1] / 1.5, action[:, 0] / 3.0], -1)
    columns = [torch.ones_like(x[:, 0])]
    for degree in (2, 4):
        for powers in combinations_with_replacement(range(3), degree):
            columns.append(x[:, list(powers)].prod(-1))
    return torch.stack(columns, -1)


def pendulum_task(short: float = 0.0, like: Task | None = None, rollouts: int = 1) -> Task:
    """Balancing at dt 0.05 s; theta inertia, mgl and damping; the world is heavier and has Coulomb friction.

    `short`: how far the policy stops on the way from the start of the training to its end, which `like` has found.
    """
    tensor = partial(torch.tensor, dtype=torch.float64)
    temperature, sim, real = 2e-3, 0.85, 0.95
    options = {"dt": 0.05, "initial_angle": math.pi, "initial_std": 0.3}
    fixed = {"coulomb": tensor(0.0), "torque_offset": tensor(0.0)}
    theta = {"inertia": tensor(0.17), "mgl": tensor(3.3), "damping": tensor(0.1)}
    rough = {"inertia": tensor(0.2), "mgl": tensor(4.0), "damping": tensor(0.05)} | fixed | {"coulomb": tensor(0.02)}
    base, world = pendulum(**options, discount=sim), pendulum(**options, discount=real, substeps=10)
    mdp = replace(base, step=lambda th, s, a, e: base.step(th | fixed, s, a, e))
    policy = gaussian_policy(Corrected())
    start = {"out.weight": torch.zeros(2, 5, dtype=torch.float64)}
    start["out.weight"][0, :2] = tensor([-7.5, -7.5])
    training = sample_noise(mdp, policy, 256, 40, seeded(1))

    def in_sim(th: Params, nu: Params) -> Tensor:
        return soft_return(mdp, policy, th, nu, training, temperature=temperature)

    optimum = like.nu if like is not None else policy_optimum(in_sim, theta, start, tol=1e-6).nu
    nu = {key: value + short * (start[key] - value) for key, value in optimum.items()}
    testing = sample_noise(world, policy, 4000, 100, seeded(2))

    def collect(episodes: int, generator: torch.Generator) -> Rollout:
        return rollout(world, policy, rough, nu, sample_noise(world, policy, episodes, 20, generator))

    def real_return(th: Params) -> float:
        with torch.no_grad():
            found = policy_optimum(in_sim, th, optimum, tol=1e-6).nu
            return float(expected_return(world, policy, rough, found, testing))

    def hessian_free(log: Rollout, generator: torch.Generator) -> Tensor:
        rows = rollouts * (log.rewards.numel() + len(log.rewards))
        noise = sample_noise(mdp, policy, rows, 40, generator)
        chosen = {"temperature": temperature, "rollouts": rollouts}
        shared = {"real_discount": real, "groups": 0, "features": deviations}
        return ravel(hessian_free_gradient(mdp, policy, theta, nu, log, noise, **chosen, **shared).grad)

    def gradient(log: Rollout) -> Params:
        return logged_policy_gradient(policy, nu, log, real_discount=real, groups=0, features=deviations).grad

    begun = time.process_time()
    chain = policy_sensitivity(in_sim, theta, nu, solve=partial(cg, tol=1e-6))  # with one solve, for its report
    solve_seconds = time.process_time() - begun
    columns = [chain.jvp({k: torch.full_like(v, float(k == key)) for k, v in theta.items()}) for key in theta]

    def implicit(log: Rollout, generator: torch.Generator) -> Tensor:
        g = gradient(log)
        return torch.stack([dot(column, g) for column in columns])

    visited = in_sim_states(rollout(mdp, policy, theta, nu, training).states, sim)

    def projected(log: Rollout, generator: torch.Generator) -> Tensor:
        g, noise = gradient(log), sample_noise(mdp, policy, len(visited), 40, generator)
        chosen = {"temperature": temperature, "cotangent": g, "solve": partial(cg, tol=1e-6)}
        return ravel(soft_sensitivity(mdp, policy, theta, nu, visited, noise, **chosen).vjp(g))

    def gap(states: Tensor) -> Tensor:
        noise = sample_noise(mdp, policy, 2 * len(states), 40, seeded(3))
        return soft_consistency(mdp, policy, theta, nu, noise, states, temperature=temperature)[0]

    truth = like.truth if like is not None else central_differences(real_return, theta, 0.02)
    return Task(truth, collect, hessian_free, implicit, nu, gap, projected, solve_seconds)


def in_sim_states(states: Tensor, discount: float) -> Tensor:
    """One state of each rollout `[B, T+1, n]`, its time drawn with the weights discount^t."""
    rows = torch.arange(len(states))
    weights = discount ** torch.arange(states.shape[1] - 1, dtype=torch.float64)
    marks = (rows + 0.5)[torch.randperm(len(states), generator=seeded(8))] / len(states)
    return states[rows, torch.searchsorted(weights.cumsum(0) / weights.sum(), marks)]


def central_differences(function: Callable[[Params], float], at: Params, step: float) -> Tensor:
    """Entry by entry for scalar parameters; `step` is relative."""
    slopes = []
    for key, value in at.items():
        up, down = (function(at | {key: value * (1 + sign * step)}) for sign in (1, -1))
        slopes.append((up - down) / (2 * step * float(value)))
    return torch.tensor(slopes, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Errors:
    """Relative errors `[sizes, seeds, P]` of one route, and its seconds per gradient at the largest size."""

    values: Tensor
    seconds: float


def measure(task: Task, episodes: tuple[int, ...], seeds: int) -> dict[str, Errors]:
    """Both routes on the same logs, one log per size and seed."""
    routes = {"hessian-free": task.hessian_free, "implicit": task.implicit}
    routes |= {"projected": task.projected} if task.projected is not None else {}
    found: dict[str, list[Tensor]] = {name: [] for name in routes}
    seconds = dict.fromkeys(found, 0.0)
    for count in episodes:
        for seed in range(seeds):
            log = task.collect(count, seeded(1000 * count + seed))
            for name, route in routes.items():
                begun = time.process_time()
                found[name].append((route(log, seeded(seed)) - task.truth) / task.truth.norm())
                seconds[name] += (time.process_time() - begun) * (count == episodes[-1]) / seeds
    seconds["implicit"] += task.solve_seconds
    return {k: Errors(torch.stack(v).reshape(len(episodes), seeds, -1), seconds[k]) for k, v in found.items()}


def sample_ratio(ours: Errors, implicit: Errors, generator: torch.Generator) -> tuple[float, float, float]:
    """Ratio of the c of error^2 ~ c / N and its 90 % interval; seeds are drawn anew, both routes together."""
    squares = [e.values.square().sum(-1) for e in (ours, implicit)]  # [sizes, seeds]

    def ratio(rows: Tensor) -> Tensor:
        mean, other = (square[:, rows].mean(-1).log() for square in squares)
        return (mean - other).mean().exp()

    seeds = squares[0].shape[1]
    drawn = torch.stack([ratio(torch.randint(seeds, (seeds,), generator=generator)) for _ in range(2000)])
    low, high = drawn.quantile(torch.tensor([0.05, 0.95], dtype=drawn.dtype)).tolist()
    return float(ratio(torch.arange(seeds))), low, high


def slope(errors: Errors, episodes: tuple[int, ...]) -> float:
    """Least-squares slope of log mean error^2 on log N."""
    x = torch.tensor(episodes, dtype=torch.float64).log()
    y = errors.values.square().sum(-1).mean(-1).log()
    return float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())


def class_figures(name: str, task: Task, episodes: tuple[int, ...], seeds: int) -> Iterator[Figure]:
    """All figures of one problem class."""
    errors = measure(task, episodes, seeds)
    n, implicit = len(episodes) * seeds, errors["implicit"]
    for route in (name for name in errors if name != "implicit"):
        suffix = name if route == "hessian-free" else f"{name}-{route}"
        figures = zip(("ratio", "low", "high"), sample_ratio(errors[route], implicit, seeded(0)), strict=True)
        for label, value in figures:
            yield Figure(f"{label}/{suffix}", value, "1", n)
        spread = [e.values - e.values.mean(1, keepdim=True) for e in (errors[route], implicit)]
        size = [x.square().sum(-1).mean(-1).log() for x in spread]
        yield Figure(f"ratio-of-variances/{suffix}", float((size[0] - size[1]).mean().exp()), "1", n)
        yield Figure(f"cost-ratio/{suffix}", errors[route].seconds / implicit.seconds, "1", seeds)
    for route, e in errors.items():
        last = e.values[-1]
        yield Figure(f"slope-{route}/{name}", slope(e, episodes), "1", n)
        yield Figure(f"error-{route}/{name}", float(last.square().sum(-1).mean().sqrt()), "1", seeds)
        yield Figure(f"bias-{route}/{name}", float(last.mean(0).norm()), "1", seeds)
        yield Figure(f"seconds-{route}/{name}", e.seconds, "s", seeds)


def gap_figures(trained: Task, quick: bool) -> Iterator[Figure]:
    """Gradients on one long log of policies that stop 0 to 100 % short of the optimum, against the truth at it."""
    truth = trained.truth
    for short in (0.0, 0.3) if quick else (0.0, 0.1, 0.3, 1.0):
        task = pendulum_task(short, trained)
        log = task.collect(200 if quick else 1000, seeded(4))
        if task.gap is not None:
            yield Figure(f"gap-{short:g}/pendulum", float(task.gap(log.states[:, 0])), "nats", len(log.states))
        routes = {"hessian-free": task.hessian_free, "implicit": task.implicit, "projected": task.projected}
        for name, route in routes.items():
            error = (route(log, seeded(5)) - truth).norm() / truth.norm()
            yield Figure(f"gap-{short:g}-error-{name}/pendulum", float(error), "1", 1)


def lqr_figures(quick: bool) -> Iterator[Figure]:
    """Linear-quadratic: pathwise rollouts against the Hessian of the exact soft return."""
    yield from class_figures("lqr", lqr_task(), (50, 100, 200), 5 if quick else 30)


def finite_figures(quick: bool) -> Iterator[Figure]:
    """Finite: score rollouts, one or four per state and action, against the Hessian of the exact soft return."""
    yield from class_figures("finite", finite_task(), (50, 100, 200), 5 if quick else 40)
    if not quick:
        yield from class_figures("finite-4-rollouts", finite_task(rollouts=4), (50, 100, 200), 20)


def pendulum_figures(quick: bool) -> Iterator[Figure]:
    """Smooth and nonlinear: pathwise rollouts against the Hessian of a sampled soft return; policies cut short."""
    trained = pendulum_task()
    yield from class_figures("pendulum", trained, (10, 20, 40, 80), 3 if quick else 30)
    if not quick:
        more = pendulum_task(like=trained, rollouts=4)
        yield from class_figures("pendulum-4-rollouts", more, (10, 20, 40, 80), 20)
    yield from gap_figures(trained, quick)


def s_hessian_free(quick: bool) -> Iterator[Figure]:
    """All classes, then what an imperfectly trained policy does to both routes."""
    warnings.simplefilter("ignore", UnconvergedWarning)  # policies stopped short are part of the measurement
    for figures in (lqr_figures, finite_figures, pendulum_figures):
        yield from figures(quick)


if __name__ == "__main__":
    main({"s-hessian-free": s_hessian_free})
