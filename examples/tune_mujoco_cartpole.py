"""A cart-pole with delay, play and stiction
=========================================

Tune a torch cart-pole for a MuJoCo rig with delay, play and stiction: balancing costs a quarter less or better.

The rig is identified with its pole hanging, where nothing can go wrong, and the fit is good. Yet the model knows no
delay, so the controller that is optimal for the best-fitting model is too aggressive: on the rig it rings. No theta
makes the model delayed; but another mass, length and friction make its optimal controller calmer, and balancing
episodes on the rig tell which. In-sim training is discounted LQR of the model linearised at upright; the critic sees
the measured state and the commands still under way, which the controller has sent and so knows.

    python examples/tune_mujoco_cartpole.py --seed 1 --plot cartpole.png      (needs `pip install sim2real[mujoco]`)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sim2real import Box, Params, Policy, Rollout, RolloutLog, default_params, linear_policy, rollout, sample_noise
from sim2real.fit import FitSettings, fit
from sim2real.rollout import discounted_return
from sim2real.simulators import cartpole
from sim2real.simulators.mujoco_cartpole import mujoco_cartpole
from sim2real.solvers import lyapunov, riccati
from sim2real.tuning import TuneSettings, tune

DISCOUNT, DELAY = 0.99, 0.05
FREE = ("cart_mass", "pole_mass", "length", "cart_friction")
"""parameters to tune; g is known and the hinge hardly rubs"""


@dataclass(frozen=True)
class Settings:
    exploration: float = 1.0
    """N, standard deviation of the force added while tuning"""
    horizon: int = 200
    """control steps of 20 ms per episode"""
    episodes: int = 24
    """per iteration"""
    steps: int = 8
    """iterations"""
    judged: int = 64
    """episodes without exploration to compare on, twice as long"""


MODEL = cartpole(discount=DISCOUNT, initial_std=0.05)
STATE_COST = MODEL.dt * torch.diag(torch.tensor([1.0, 5.0, 0.1, 0.1], dtype=torch.float64))
FORCE_COST = MODEL.dt * torch.tensor([[0.001]], dtype=torch.float64)


def identify(seed: int) -> Params:
    """theta that fits 20 s of the rig under sines around a soft hold, pole hanging, encoder noise included."""
    generator = torch.Generator().manual_seed(seed)
    rig = mujoco_cartpole(delay=DELAY, initial_angle=math.pi, initial_std=0.0)
    frequency = 0.1 * 20 ** torch.rand(5, generator=generator, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(5, generator=generator, dtype=torch.float64)
    states, forces = [rig.initial_state({}, torch.zeros(1, 4, dtype=torch.float64))], []
    for k in range(1000):
        sines = 1.5 * torch.sin(2 * math.pi * frequency * k * rig.dt + phase).sum()
        forces.append(sines - 8.0 * states[-1][:, :1] - 2.0 * states[-1][:, 2:3])
        states.append(rig.step({}, states[-1], forces[-1], torch.zeros(1, 0)))
    signals, actions = torch.stack(states, 1)[..., :4], torch.stack(forces, 1)
    signals = signals + torch.randn(signals.shape, generator=generator, dtype=torch.float64) * torch.tensor(
        [5e-4, 5e-4, 5e-3, 5e-3]
    )
    log = RolloutLog(
        signals=signals,
        actions=actions,
        exogenous=None,
        mask=torch.ones(1, 1000, dtype=torch.bool),
        dt=rig.dt,
        names=MODEL.names | {"episode": ("hanging",)},
        units=MODEL.units,
        source="MuJoCo cart-pole, hanging",
        recorded_actions=((rig.dt * torch.arange(1000, dtype=torch.float64), actions[0]),),
    )
    settings = FitSettings(
        free=(*FREE, "pole_friction"), signals=("position", "angle"), delay=True, delay_bounds=(0.0, 0.1)
    )
    return fit(MODEL, log, default_params(MODEL.box), settings).theta


def linearised(theta: Params) -> tuple[Tensor, Tensor]:
    upright = torch.zeros(1, 4, dtype=torch.float64)
    step = lambda s, a: MODEL.step(theta, s, a, upright[:, :0]).squeeze(0)
    A, B = torch.func.jacrev(step, (0, 1))(upright, upright[:, :1])
    return A.squeeze(1), B.squeeze(1)


def train(theta: Params, nu0: Params) -> Params:
    """nu*(theta): the model's optimal gain."""
    return {"gain": riccati(*linearised(theta), STATE_COST, FORCE_COST, DISCOUNT)[1]}


def in_sim_return(theta: Params, nu: Params) -> Tensor:
    """J(theta, nu), of which `train` returns the maximiser."""
    (A, B), K = linearised(theta), nu["gain"]
    return -torch.trace(lyapunov(A - B @ K, STATE_COST + K.mT @ FORCE_COST @ K, DISCOUNT))


def feedback(std: float) -> Policy:
    """Linear feedback of the four measured states; what a state carries behind them is for the critic."""
    inner = linear_policy(1, std=std)
    act = lambda nu, s, e: inner.act(nu, s[..., :4], e)
    return Policy(act, lambda nu, s, a: inner.log_prob(nu, s[..., :4], a), inner.noise_dim)


def balance(nu: Params, std: float, episodes: int, horizon: int, generator: torch.Generator) -> Rollout:
    """Episodes on the rig: measured states and the commands under way, forces, rewards."""
    rig, policy = mujoco_cartpole(delay=DELAY, initial_std=0.05), feedback(std)
    run = rollout(rig, policy, {}, nu, sample_noise(rig, policy, episodes, horizon, generator))
    return Rollout(torch.cat([run.states[..., :4], run.states[..., 6:]], -1), run.actions, run.rewards)


def draw(runs: dict[str, Rollout], history: tuple[dict[str, float], ...]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, run in runs.items():
        left.plot(MODEL.dt * torch.arange(run.states.shape[1]), run.states[0, :, 1], label=label)
    left.set(xlim=(0, 4), xlabel="time [s]", ylabel="pole angle [rad]", title="The same start on the rig")
    left.legend()
    start = history[0]
    for name in FREE:
        right.plot([step[f"theta.{name}"] / start[f"theta.{name}"] for step in history], ".-", label=name)
    right.set(xlabel="iteration", ylabel="tried value / fitted value", title="Where the rig moves the model")
    right.legend()
    return figure


def main(settings: Settings, seed: int) -> Figure:
    theta = identify(seed)
    print("fitted theta  " + "  ".join(f"{name} {float(value):.3f}" for name, value in theta.items()))
    result = tune(
        MODEL,
        feedback(settings.exploration),
        theta,
        {"gain": torch.zeros(1, 4, dtype=torch.float64)},
        log=None,
        noise=None,
        real_reward=lambda s, a, s2: MODEL.reward({}, s[..., :4], a, s[..., :0], s2),
        real_discount=DISCOUNT,
        collect=lambda policy, nu, iteration, generator: balance(
            nu, settings.exploration, settings.episodes, settings.horizon, generator
        ),
        settings=TuneSettings(max_steps=settings.steps),
        box=Box(low={k: 0.2 * float(theta[k]) for k in FREE}, high={k: 5 * float(theta[k]) for k in FREE}),
        free=FREE,
        scale={name: 0.2 * theta[name] for name in FREE},
        objective=in_sim_return,
        optimum=train,
        generator=torch.Generator().manual_seed(seed),
    )
    for step in result.history:
        values = "  ".join(f"{name} {step[f'theta.{name}']:.3f}" for name in FREE)
        print(f"{step['iteration']:3.0f}  {step['transitions']:6.0f} transitions  {values}")
    runs, returns = {}, {}
    for label, nu in (("fitted", train(theta, {})), ("tuned", result.nu)):
        starts = torch.Generator().manual_seed(10_000 + seed)
        runs[label] = balance(nu, 0.0, settings.judged, 2 * settings.horizon, starts)
        returns[label] = discounted_return(runs[label].rewards, DISCOUNT)
    gain = returns["tuned"] - returns["fitted"]
    error = float(gain.std()) / len(gain) ** 0.5
    print(f"real return: fitted {returns['fitted'].mean():.4f}, tuned {returns['tuned'].mean():.4f}")
    print(f"paired gain over {len(gain)} starts: {gain.mean():.4f} +- {2 * error:.4f}")
    return draw(runs, result.history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one iteration of a few short episodes")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments = parser.parse_args()
    tiny = {"steps": 1, "episodes": 8, "horizon": 60, "judged": 8} if arguments.quick else {}
    drawn = main(Settings(**tiny), arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
