"""How long an old log stays usable
================================

One log of an arm serves several later controllers: inverted anew for each, it says which goals would have led there.

The log was made by torques of an arm whose friction and motors differ from their design values. Later, a feedback law
acts, whose goals are held five steps. Each segment of the log is inverted for laws from stiff to soft, through two
simulators: at the design values, and fitted to the same log (friction and motor gain). The goals found are then given
to the law on the *real* arm, from the same states, and the state that it reaches is compared with the log.

- Changed gains alone cost nothing: nearly every segment has a goal under any of the laws, which leads to the logged
  state exactly where the simulator is right. Softer laws need goals farther away.
- With the simulator at its design values the inversion succeeds as well, and every residual is zero; but the goals lead
  elsewhere. A small residual says that a goal exists in the simulator, not that the log is usable. After the fit it is.
- With weaker motors (60 % of the torque) segments that need more have no goal: they are dropped, and counted.

    python examples/ohio_old_logs.py --plot ohio_old_logs.png
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from sim2real import Params, Policy, RolloutLog, rollout, sample_noise
from sim2real.estimators import HighLevelLog, Segments, hierarchical_model, high_level_log
from sim2real.fit import FitSettings, fit
from sim2real.simulators.reacher import reacher, reacher_step
from sim2real.solvers import feedback_lower, invert, relinearised_gains, transition_map

STEPS = 5
JOINTS = ("shoulder", "wrist", "shoulder_velocity", "wrist_velocity")
ARM = replace(
    reacher(),
    initial_state=lambda theta, e0: e0 * torch.tensor([1.5, 0.5, 0.0, 0.0], dtype=e0.dtype),
    step=lambda theta, s, a, e: reacher_step(theta, s, a.clamp(-1, 1)),
    reward=lambda theta, s, a, e, after: after[:, 0] * 0,
    observe=None,
    names={"state": JOINTS, "action": ("shoulder_motor", "wrist_motor"), "signal": JOINTS},
)
REAL = {"damping": 0.014, "gear": 0.042}


@dataclass(frozen=True)
class Settings:
    episodes: int = 20
    steps: int = 100
    laws: int = 5
    fit_steps: int = 30


def wander(nu: Params, state: Tensor, e: Tensor) -> Tensor:
    """Torques of the old controller: a pull towards the middle, and noise."""
    return 0.9 * torch.tanh(-1.5 * state[:, :2] - 0.1 * state[:, 2:] + 0.5 * e)


def gains(theta: Params, state: Tensor, cost: float) -> Params:
    """Of the law that weighs torques by `cost`: a large one is soft."""
    Q = torch.diag(torch.tensor([10.0, 10.0, 1.0, 1.0], dtype=torch.float64))
    R = cost * torch.eye(2, dtype=torch.float64)
    return {"gain": relinearised_gains(partial(reacher_step, theta), state, Q, R, STEPS)}


def inverted(log: RolloutLog, theta: Params, cost: float, limit: float) -> HighLevelLog:
    predict = transition_map(ARM.step, feedback_lower(), STEPS, low=-limit, high=limit)

    def explain(segments: Segments):
        before, after = segments.signals[:, 0], segments.signals[:, -1]
        rows = {"state": before} | gains(theta, before, cost)
        return invert(predict, theta, rows, after, start=before, differentiable=False, max_steps=20)

    return high_level_log(log, explain, STEPS, tuple(f"goal_{name}" for name in JOINTS))


def replayed(high: HighLevelLog, design: Params, real: Params, cost: float, limit: float) -> Tensor:
    """Degrees between the joints that the real arm reaches under the goals found and those of the log."""
    begin = lambda theta, state: gains(design, state, cost)  # the law is computed with the simulator at hand
    upper = hierarchical_model(ARM, feedback_lower(), STEPS, begin=begin, low=-limit, high=limit)
    keep = high.log.mask
    start, logged = high.log.signals[:, :-1][keep], high.log.signals[:, 1:][keep]
    reached = upper.step(real, start, high.log.actions[keep], start.new_zeros(len(start), 0))
    return (reached - logged)[:, :2].norm(dim=-1) * 180 / math.pi


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--plot", type=Path)
    settings = Settings(2, 50, 2, 5) if parser.parse_args().quick else Settings()
    design = {key: torch.tensor(value, dtype=torch.float64) for key, value in ARM.box.default.items()}
    real = design | {key: torch.tensor(value, dtype=torch.float64) for key, value in REAL.items()}

    policy = Policy(wander, lambda nu, s, a: s[:, 0], noise_dim=2)
    noise = sample_noise(ARM, policy, settings.episodes, settings.steps, torch.Generator().manual_seed(0))
    old = rollout(ARM, policy, real, {}, noise)
    names = ARM.names | {"episode": tuple(f"run{k}" for k in range(settings.episodes))}
    mask = torch.ones_like(old.rewards, dtype=torch.bool)
    log = RolloutLog(old.states, old.actions, None, mask, ARM.dt, names, ARM.units, "old", rewards=old.rewards)
    tuned = fit(ARM, log, design, FitSettings(free=tuple(REAL), max_steps=settings.fit_steps)).theta
    print(", ".join(f"{key}: design {float(design[key]):.4g}, tuned {float(tuned[key]):.4g}" for key in REAL))

    costs = torch.logspace(-2, 2, settings.laws).tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for title, theta, limit in (("design", design, 1.0), ("tuned", tuned, 1.0), ("tuned, 60 % torque", tuned, 0.6)):
        shares, middle = [], []
        for cost in costs:
            high = inverted(log, theta, cost, limit)
            shares.append(100 * high.counts["kept"] / high.log.mask.numel())
            middle.append(float(replayed(high, theta, real, cost, limit).median()))
            print(f"{title}, torque weight {cost:.3g}: {high.counts['kept']} of {high.log.mask.numel()} segments have")
            print(f"    a goal; on the real arm it leads {middle[-1]:.2g} degrees from the log (median)")
        left.semilogx(costs, shares, "o-", label=title)
        right.loglog(costs, middle, "o-", label=title)
    left.set(xlabel="weight of torques in the law (stiff to soft)", ylabel="segments with a goal [%]", ylim=(0, 105))
    right.set(xlabel="weight of torques in the law (stiff to soft)", ylabel="real arm, from the log [degrees]")
    left.legend()
    if parser.parse_args().plot:
        figure.savefig(parser.parse_args().plot)


if __name__ == "__main__":
    main()
