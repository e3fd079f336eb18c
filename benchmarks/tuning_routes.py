"""`b-tuning`: simulator tuning as a configurable MDP, against tuning by implicit differentiation, in the same `tune`.

Leader = real return, configuration = theta, follower = the soft optimum of the model at theta. The gradient of the
leader is `hessian_free_gradient`, handed to `tune` as its `hypergradient`; `implicit` is `logged_policy_gradient` in
policy parameters, then the sensitivity of the in-sim optimum. Both see the same starts, the same exploration and the
same number of real transitions; the seeds are common, so differences are paired. Every end is judged by its gain,
without exploration. Knowledge: real transitions and rewards, the model, and the follower's policy, a formula here.

    exact-NAME       six cases of benchmark A without sampling, at most 40 evaluations: cost over the optimal cost - 1;
                     the reference is that of the implicit route
    CASE-difference  from samples: real return of hessian-free minus implicit, mean over seeds, in units of what tuning
                     has to gain (rig: of what implicit tuning gained); -low and -high bound it with 95 % confidence
    CASE-ROUTE       that gain, mean over seeds
    CASE-transitions-ROUTE   real transitions per seed, largest
    CASE-to-95-ROUTE         those until a policy ran that closes 95 % of the gap, worst seed (benchmark A)

double-integrator-0.8: benchmark A. rig: the cart-pole of `mujoco_world.py` (stiction, play, a delay of 50 ms).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import closed_loop
from benchmarks.bars import Figure, main
from benchmarks.oracles.multiplicative_lqr import WORLDS, World, case_of, cost_and_gradient, fitted_gain, optimal_gain
from sim2real.bounds import Box
from sim2real.estimators import hessian_free_gradient
from sim2real.mdp import sample_noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy, linear_policy
from sim2real.rollout import Rollout
from sim2real.rollout_log import RolloutLog
from sim2real.solvers import linear_noise_policy, lyapunov, soft_lqr
from sim2real.tuning import TuneResult, TuneSettings, tune


@dataclass(frozen=True)
class Model:
    """A linear model with quadratic costs in which the soft follower is trained."""

    matrices: Callable[[Params], tuple[Tensor, Tensor]]
    """theta -> A `[n, n]`, B `[n, m]`"""
    state_cost: Tensor
    action_cost: Tensor
    discount: float
    temperature: float
    """of the follower, in units of its return"""


@dataclass(frozen=True)
class Route:
    """How a route fills in `tune`: the policy, and the options that give the gradient."""

    policy: Policy
    options: dict[str, Any]


def follower(model: Model, theta: Params) -> Params:
    """The soft optimum of the model: gain and factor of `linear_noise_policy`."""
    A, B = model.matrices({key: value.detach() for key, value in theta.items()})
    options = {"discount": model.discount, "temperature": model.temperature}
    return soft_lqr(A, B, model.state_cost, model.action_cost, **options).nu


def _advantage(model: Model, theta: Params, gain: Tensor) -> tuple[Tensor, Tensor]:
    """S, M of the in-sim cost e'S e - 2 e'M s + c(s) of the action -K s + e, the policy held fixed afterwards."""
    A, B = model.matrices(theta)
    R, discount = model.action_cost, model.discount
    P = lyapunov(A - B @ gain, model.state_cost + gain.mT @ R @ gain, discount)
    S = R + discount * B.mT @ P @ B
    return S, S @ gain - discount * B.mT @ P @ A


def action_value(model: Model, theta: Params, states: Tensor, actions: Tensor) -> Tensor:
    """In-sim Q up to a function of the state, its derivative in theta at the follower's policy held fixed."""
    gain = follower(model, theta)["gain"]
    S, M = _advantage(model, theta, gain)
    known = states[:, : gain.shape[1]]
    e = actions + known @ gain.mT
    return 2 * (e * (known @ M.mT)).sum(-1) - (e @ S * e).sum(-1)


def hessian_free(model: Model, policy: Policy) -> Route:
    """`hessian_free_gradient` as the hypergradient of `tune`."""
    gradient = partial(
        hessian_free_gradient,
        temperature=model.temperature,
        action_value=partial(action_value, model),
    )
    return Route(policy, {"optimum": lambda theta, nu: follower(model, theta), "hypergradient": gradient})


# ------------------------------------------------------------------------------------------------- benchmark A, exact


def world_moments(world: World, nu: Params) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a soft policy in the world: J_real, S and M of its real cost as in `_advantage`, X = sum_t g^t E s s'."""
    A, B, Q, R = (torch.tensor(x) for x in (world.A, world.B, world.Q, world.R))
    g, K, spread = world.discount, nu["gain"], nu["factor"] @ nu["factor"].mT
    eye = torch.eye(len(A), dtype=A.dtype)
    closed = A - B @ K
    kicked = [world.sigma * torch.outer(B[:, i], K[i]) for i in range(B.shape[1])]
    transfer = sum((torch.kron(x, x) for x in (closed, *kicked)), torch.zeros(1, dtype=A.dtype))
    resolvent = torch.linalg.inv(torch.eye(len(A) ** 2, dtype=A.dtype) - g * transfer)
    P = (resolvent.mT @ (Q + K.mT @ R @ K).reshape(-1)).reshape(A.shape)
    price = lambda x: x + world.sigma**2 * torch.diag(x.diagonal())
    S = R + g * price(B.mT @ P @ B)
    noise = world.noise * eye + B @ price(spread) @ B.mT
    X = (resolvent @ (eye + g / (1 - g) * noise).reshape(-1)).reshape(A.shape)
    cost = ((1 + world.noise * g / (1 - g)) * P.trace()) + (S * spread).sum() / (1 - g)
    return -cost, S, S @ K - g * B.mT @ P @ A, X


def exact_hypergradient(world: World, model: Model, theta: Params, nu: Params) -> Estimate:
    """(1 / lambda) E[A_real grad Q_sim] in closed form: both are quadratic in the policy's Gaussian noise.

    With e ~ N(0, Sigma), Cov(e'S e - 2 e'M s, e'T e - 2 e'N s) = 2 tr(S Sigma T Sigma) + 4 s'M'Sigma N s.
    """
    value, S, M, X = world_moments(world, nu)
    spread = nu["factor"] @ nu["factor"].mT

    def surrogate(th: Params) -> Tensor:
        S_sim, M_sim = _advantage(model, th, nu["gain"])
        squares = 2 * (spread @ S @ spread * S_sim).sum() / (1 - world.discount)
        return (squares + 4 * (spread @ M @ X * M_sim).sum()) / model.temperature

    return Estimate(value, torch.func.grad(surrogate)(theta))


def soft_model(world: World, matrices: Callable[[Params], Params], temperature: float) -> Model:
    """The model class of benchmark A."""
    pair = lambda theta: (matrices(theta)["A"], matrices(theta)["B"])
    return Model(pair, torch.tensor(world.Q), torch.tensor(world.R), world.discount, temperature)


def tune_exactly(world: World, steps: int) -> TuneResult:
    """The library's loop on exact hypergradients, from the theta of system identification."""
    mdp, theta = closed_loop.model_of(world)
    model = soft_model(world, lambda th: th, EXACT_TEMPERATURE)
    return tune(
        mdp,
        linear_noise_policy(world.B.shape[1]),
        theta,
        follower(model, theta),
        None,
        None,
        real_reward=None,
        real_discount=world.discount,
        settings=TuneSettings(max_steps=steps, gradient_tol=1e-10),
        optimum=lambda th, nu: follower(model, th),
        hypergradient=lambda mdp, policy, th, nu, log, noise, **_: exact_hypergradient(world, model, th, nu),
    )


EXACT_TEMPERATURE = 1e-6
"""the soft policy's own noise costs as little; the gradient does not suffer, because nothing is sampled"""


def distance(world: World, gain: Tensor) -> float:
    """Cost over the optimal cost, minus 1."""
    best, _ = cost_and_gradient(world, optimal_gain(world))
    return cost_and_gradient(world, gain.detach().numpy())[0] / best - 1


def exact_figures(quick: bool) -> Iterator[Figure]:
    """Six cases of benchmark A (quick: three), both routes."""
    for world in WORLDS[::2] if quick else WORLDS:
        ours, implicit = (f(world, closed_loop.EXACT_STEPS - 1) for f in (tune_exactly, closed_loop.tune_exactly))
        ends = [distance(world, result.nu["gain"]) for result in (ours, implicit)]
        yield Figure(f"exact-{world.name}", ends[0], "relative", len(ours.history), ends[1])


# ------------------------------------------------------------------------------------------- from samples, both worlds


@dataclass(frozen=True)
class Runs:
    """Per seed and route: what tuning gained in real return, and the real transitions it took."""

    gains: dict[str, list[float]]
    transitions: dict[str, list[int]]
    whole: float
    """the unit of `gains`: what there is to gain"""
    to_95: dict[str, list[int]] = field(default_factory=dict)
    """real transitions until 95 % of that are gained"""


def sampled_a(world: World, seed: int, rounds: int, route: Route) -> list[float]:
    """Exact cost of each policy that ran, and of the end; 2000 real transitions to fit, and 2000 for each that ran."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.tensor(world.Q), torch.tensor(world.R)
    costs: list[float] = []

    def collect(policy: Policy, nu: Params, iteration: int, rng: torch.Generator) -> RolloutLog:
        costs.append(cost_and_gradient(world, nu["gain"].numpy())[0])
        return closed_loop.record(world, lambda s: -s @ nu["gain"].mT, rng, f"round-{iteration}")

    mdp = closed_loop.named_model(world)
    first = closed_loop.record(world, lambda s: 0.0 * s[:, :1], generator, "fit")
    result = tune(
        mdp,
        route.policy,
        closed_loop.fitted(mdp, first),
        {"gain": torch.zeros(1, 2, dtype=torch.float64)},
        first,
        None,
        real_reward=lambda s, a, following: -(s @ Q * s).sum(-1) - (a @ R * a).sum(-1),
        real_discount=world.discount,
        collect=collect,
        settings=TuneSettings(max_steps=rounds - 1),
        generator=generator,
        **route.options,
    )
    return [*costs, cost_and_gradient(world, result.nu["gain"].numpy())[0]]


def runs_a(world: World, seeds: int, rounds: int) -> Runs:
    """Benchmark A: gains relative to the cost of the gain that infinitely many data would identify."""
    implicit = {
        "objective": lambda theta, nu: closed_loop.in_sim_return(world, closed_loop.matrices(theta), nu),
        "optimum": lambda theta, nu: closed_loop.in_sim_optimum(world, closed_loop.matrices(theta), nu),
    }
    model = soft_model(world, closed_loop.matrices, 1e-3)
    routes = {"hessian-free": hessian_free(model, linear_noise_policy(1))}
    routes |= {"implicit": Route(linear_policy(1), implicit)}
    start, best = (cost_and_gradient(world, gain(world))[0] for gain in (fitted_gain, optimal_gain))
    batch = closed_loop.BATCH * closed_loop.HORIZON
    costs = {name: [sampled_a(world, seed, rounds, route) for seed in range(seeds)] for name, route in routes.items()}
    return Runs(
        gains={name: [start - run[-1] for run in runs] for name, runs in costs.items()},
        transitions={name: [batch * len(run) for run in runs] for name, runs in costs.items()},
        whole=start - best,
        to_95={name: [batch * (2 + rounds_to(run, start, best)) for run in runs] for name, runs in costs.items()},
    )


def rounds_to(costs: list[float], start: float, best: float) -> int:
    """Rounds before the first policy that closes 95 % of the gap runs; all of them where none does."""
    return next((i for i, cost in enumerate(costs) if start - cost >= 0.95 * (start - best)), len(costs))


def runs_rig(seeds: int, *, steps: int, episodes: int, judged: int) -> Runs:
    """The rig: gains over the gain that is optimal for the identified theta, on starts that all ends share."""
    from benchmarks import mujoco_world as cart

    world, plain = cart.rig(), linear_noise_policy(1)
    model = Model(cart.linearised, cart.STATE_COST, cart.ACTION_COST, cart.DISCOUNT, 1e-5)
    acting = Policy(
        lambda nu, s, e: plain.act(nu, s[..., :4], e), lambda nu, s, a: plain.log_prob(nu, s[..., :4], a), 1
    )
    route = hessian_free(model, acting)
    noise_of = partial(sample_noise, world, cart.feedback(cart.EXPLORATION), episodes, cart.HORIZON)

    def collect(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        return cart.balance(world, nu, cart.EXPLORATION, noise_of(generator))

    def tune_without_hessian(theta: Params, seed: int) -> TuneResult:
        low, high = ({key: factor * float(theta[key]) for key in cart.FREE} for factor in (0.2, 5.0))
        return tune(
            cart.MODEL,
            route.policy,
            theta,
            {"gain": torch.zeros(1, 4, dtype=torch.float64)},
            None,
            None,
            real_reward=cart.task,
            real_discount=cart.DISCOUNT,
            collect=collect,
            settings=TuneSettings(max_steps=steps),
            box=Box(low=low, high=high),
            free=cart.FREE,
            scale={key: 0.2 * theta[key] for key in cart.FREE},
            generator=torch.Generator().manual_seed(seed),
            **route.options,
        )

    gains: dict[str, list[float]] = {"hessian-free": [], "implicit": []}
    transitions: dict[str, list[int]] = {"hessian-free": [], "implicit": []}
    for seed in range(seeds):
        theta = cart.identified(seed)
        results = {"hessian-free": tune_without_hessian(theta, seed)}
        results["implicit"] = cart.tune_on_rig(world, theta, seed, steps=steps, episodes=episodes)
        ends = [cart.train(theta, {}), *({"gain": result.nu["gain"]} for result in results.values())]
        before, *after = cart.real_returns(world, ends, judged, seed)
        for (name, result), value in zip(results.items(), after, strict=True):
            gains[name].append(value - before)
            transitions[name].append(int(result.history[-1]["transitions"]))
    return Runs(gains, transitions, float(np.mean(gains["implicit"])))


def sampled_figures(case: str, runs: Runs) -> Iterator[Figure]:
    """The paired difference with its 95 % t interval, and both routes."""
    share = {name: np.array(values) / runs.whole for name, values in runs.gains.items()}
    difference = share["hessian-free"] - share["implicit"]
    n = len(difference)
    margin = float(student.ppf(0.975, n - 1) * difference.std(ddof=1) / n**0.5)
    for label, value in (("", 0.0), ("-low", -margin), ("-high", margin)):
        yield Figure(f"{case}-difference{label}", float(difference.mean()) + value, "share of the gain", n)
    for name, values in share.items():
        yield Figure(f"{case}-{name}", float(values.mean()), "share of the gain", n)
        yield Figure(f"{case}-worst-{name}", float(values.min()), "share of the gain", n)
        yield Figure(f"{case}-transitions-{name}", max(runs.transitions[name]), "real transitions per seed", n)
    for name, counts in runs.to_95.items():
        yield Figure(f"{case}-to-95-{name}", max(counts), "real transitions", n)


def b_tuning(quick: bool) -> Iterator[Figure]:
    """Exact and sampled benchmark A, then the rig."""
    yield from exact_figures(quick)
    world = case_of("double-integrator", 0.8)
    yield from sampled_figures(world.name, runs_a(world, *((3, 6) if quick else (8, 12))))
    sizes = {"steps": 4, "episodes": 16, "judged": 64} if quick else {"steps": 6, "episodes": 24, "judged": 128}
    yield from sampled_figures("rig", runs_rig(3 if quick else 5, **sizes))


if __name__ == "__main__":
    main({"b-tuning": b_tuning})
