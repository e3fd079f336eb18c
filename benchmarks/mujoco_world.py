"""A richer world: tuning a torch cart-pole for a MuJoCo rig with stiction, backlash and a delay of 50 ms.

The story: the rig is identified with the pole hanging, where it is safe. The fit finds the masses well, but the model
has no delay, so the controller that is optimal for the best-fitting model is too aggressive and rings on the rig. No
theta makes the model delayed; a theta of another mass, length and friction makes its optimal controller calmer.
`tune` finds it from balancing episodes on the rig alone.

The policy is linear state feedback, optimal for the model linearised at upright (discounted LQR, exact). The critic of
the real-data gradient also sees the commands still under way, which the controller has sent and therefore knows:
without them the rig is not Markov and the gradient is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from benchmarks.bars import Figure
from sim2real.bounds import Box, default_params
from sim2real.fit import FitSettings, fit
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise, sample_noise
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy, linear_policy
from sim2real.rollout import Rollout, discounted_return, rollout
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.mujoco_cartpole import mujoco_cartpole
from sim2real.solvers.riccati import lyapunov, riccati
from sim2real.tuning import TuneResult, TuneSettings, tune

DISCOUNT = 0.99
EXPLORATION = 1.0
"""N, standard deviation of the force added while tuning; evaluation runs without"""
SEEDS = 5
HORIZON = 200
"""control steps of 20 ms per balancing episode"""
FREE = ("cart_mass", "pole_mass", "length", "cart_friction")
MODEL = cartpole(discount=DISCOUNT, initial_std=0.05)
STATE_COST = torch.diag(torch.tensor([1.0, 5.0, 0.1, 0.1], dtype=torch.float64)) * MODEL.dt
ACTION_COST = torch.tensor([[0.001]], dtype=torch.float64) * MODEL.dt
"""the task of `cartpole` near upright: 10 (1 - cos) is 5 angle^2"""


@dataclass(frozen=True)
class Outcome:
    """One seed: theta and real returns before and after tuning, evaluated without exploration on the same starts."""

    fitted: Params
    tuned: Params
    fitted_return: float
    tuned_return: float
    transitions: int


def rig(*, initial_angle: float = 0.0, initial_std: float = 0.05) -> ModelMDP:
    """The world: friction loss, 6 mm of play, commands act 50 ms late."""
    return mujoco_cartpole(discount=DISCOUNT, initial_angle=initial_angle, initial_std=initial_std, delay=0.05)


def feedback(std: float) -> Policy:
    """Linear feedback of the four measured states, whatever the state carries behind them."""
    inner = linear_policy(1, std=std)
    if std == 0.0:
        return deterministic_policy(lambda nu, s: inner.act(nu, s[..., :4], s[..., :0]))
    return Policy(lambda nu, s, e: inner.act(nu, s[..., :4], e), lambda nu, s, a: inner.log_prob(nu, s[..., :4], a), 1)


def linearised(theta: Params) -> tuple[Tensor, Tensor]:
    """A `[4, 4]`, B `[4, 1]` of the model at upright; differentiable in theta."""
    upright = torch.zeros(1, 4, dtype=torch.float64)
    step = lambda s, a: MODEL.step(theta, s, a, upright[:, :0]).squeeze(0)
    A, B = torch.func.jacrev(step, (0, 1))(upright, upright[:, :1])
    return A.squeeze(1), B.squeeze(1)


def train(theta: Params, nu: Params) -> Params:
    """The gain that is optimal in the model."""
    A, B = linearised(theta)
    return {"gain": riccati(A, B, STATE_COST, ACTION_COST, DISCOUNT)[1]}


def in_sim_return(theta: Params, nu: Params) -> Tensor:
    """J(theta, nu) of a gain in the linearised model from independent starts of unit variance, exact."""
    A, B = linearised(theta)
    K = nu["gain"]
    return -torch.trace(lyapunov(A - B @ K, STATE_COST + K.mT @ ACTION_COST @ K, DISCOUNT))


def task(state: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """The real reward, that of the model."""
    return MODEL.reward({}, state[..., :4], action, state[..., :0], following)


def excitation(seed: int, *, runs: int = 3, seconds: float = 20.0) -> RolloutLog:
    """A log of the rig with the pole hanging: sums of five sines of 0.1 to 2 Hz around a soft hold, encoder noise."""
    generator = torch.Generator().manual_seed(1000 + seed)
    world, steps = rig(initial_angle=math.pi, initial_std=0.0), round(seconds / MODEL.dt)
    time = MODEL.dt * torch.arange(steps, dtype=torch.float64)
    frequency = 0.1 * 20 ** torch.rand(runs, 5, 1, generator=generator, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(runs, 5, 1, generator=generator, dtype=torch.float64)
    sines = (1.5 * torch.sin(2 * math.pi * frequency * time + phase)).sum(1)
    state = world.initial_state({}, torch.zeros(runs, 4, dtype=torch.float64))
    states, commands = [state], []
    for sine in sines.unbind(1):
        commands.append((sine - 8.0 * state[:, 0] - 2.0 * state[:, 2]).unsqueeze(-1))
        state = world.step({}, state, commands[-1], state[:, :0])
        states.append(state)
    signals, force = torch.stack(states, 1)[..., :4], torch.stack(commands, 1)
    noise = torch.tensor([5e-4, 5e-4, 5e-3, 5e-3], dtype=torch.float64)
    return RolloutLog(
        signals=signals + noise * torch.randn(signals.shape, generator=generator, dtype=torch.float64),
        actions=force,
        exogenous=None,
        mask=torch.ones(runs, steps, dtype=torch.bool),
        dt=MODEL.dt,
        names=MODEL.names | {"episode": tuple(f"run {i}" for i in range(runs))},
        units=MODEL.units,
        source=f"MuJoCo cart-pole rig, pole hanging, seed {seed}",
        recorded_actions=tuple((time, run) for run in force),
    )


def balance(world: ModelMDP, nu: Params, std: float, noise: Noise) -> Rollout:
    """Episodes on the rig; the states kept are the four measured ones and the commands under way."""
    run = rollout(world, feedback(std), {}, nu, noise)
    return Rollout(torch.cat([run.states[..., :4], run.states[..., 6:]], -1), run.actions, run.rewards)


def tune_on_rig(world: ModelMDP, theta: Params, seed: int, *, steps: int, episodes: int) -> TuneResult:
    """The library's loop with real episodes only: `episodes` per evaluation, at most `steps + 1` evaluations."""
    acting = feedback(EXPLORATION)

    def collect(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        return balance(world, nu, EXPLORATION, sample_noise(world, acting, episodes, HORIZON, generator))

    box = Box(low={key: 0.2 * float(theta[key]) for key in FREE}, high={key: 5.0 * float(theta[key]) for key in FREE})
    return tune(
        MODEL,
        acting,
        theta,
        {"gain": torch.zeros(1, 4, dtype=torch.float64)},
        None,
        None,
        real_reward=task,
        real_discount=DISCOUNT,
        collect=collect,
        settings=TuneSettings(max_steps=steps),
        box=box,
        free=FREE,
        scale={key: 0.2 * theta[key] for key in FREE},
        objective=in_sim_return,
        optimum=train,
        generator=torch.Generator().manual_seed(seed),
    )


def real_returns(world: ModelMDP, gains: list[Params], episodes: int, seed: int) -> list[float]:
    """Mean real return of each gain without exploration, from new starts that are common to the gains."""
    noise = sample_noise(world, feedback(0.0), episodes, 2 * HORIZON, torch.Generator().manual_seed(10_000 + seed))
    return [float(discounted_return(balance(world, nu, 0.0, noise).rewards, DISCOUNT).mean()) for nu in gains]


def identified(seed: int) -> Params:
    """The best-fitting theta: `fit` on the excitation log, the delay fitted along so that it does not bias theta."""
    design = default_params(MODEL.box)
    settings = FitSettings(
        free=("cart_mass", "pole_mass", "length", "cart_friction", "pole_friction"),
        signals=("position", "angle"),
        stride=0.25,
        sample_every=5,
        delay=True,
        delay_bounds=(0.0, 0.1),
    )
    return fit(MODEL, excitation(seed), design, settings).theta


def outcome(seed: int, *, steps: int, episodes: int, judged: int) -> Outcome:
    """Identify, tune, and judge both policies on `judged` episodes of twice the length, from the same starts."""
    world, theta = rig(), identified(seed)
    result = tune_on_rig(world, theta, seed, steps=steps, episodes=episodes)
    before, after = real_returns(world, [train(theta, {}), result.nu], judged, seed)
    return Outcome(theta, result.theta, before, after, int(result.history[-1]["transitions"]))


def a_mujoco(quick: bool) -> Iterator[Figure]:
    """Real return of the tuned minus that of the best-fitting theta: mean and 95 % t interval over 5 seeds, paired."""
    sizes = {"steps": 4, "episodes": 16, "judged": 64} if quick else {"steps": 8, "episodes": 24, "judged": 256}
    runs = [outcome(seed, **sizes) for seed in range(SEEDS)]
    gain = np.array([run.tuned_return - run.fitted_return for run in runs])
    margin = float(student.ppf(0.975, SEEDS - 1)) * float(gain.std(ddof=1)) / SEEDS**0.5
    yield Figure("fitted-return", float(np.mean([run.fitted_return for run in runs])), "return", SEEDS)
    yield Figure("tuned-return", float(np.mean([run.tuned_return for run in runs])), "return", SEEDS)
    yield Figure("advantage", float(gain.mean()), "return", SEEDS)
    yield Figure("advantage-low", float(gain.mean()) - margin, "return", SEEDS)
    relative = np.array([run.tuned_return / run.fitted_return for run in runs])
    yield Figure("cost-ratio", float(relative.mean()), "tuned / fitted", SEEDS)
    yield Figure("worst-seed", float(gain.min()), "return", SEEDS)
    yield Figure("transitions", float(max(run.transitions for run in runs)), "real steps per seed", SEEDS)
