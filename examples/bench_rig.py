"""The main job on a bench rig
===========================

Fit a pendulum to the log of a bench rig, then tune it for balancing on that rig: expect a higher real return.

    python examples/bench_rig.py                                   # the embedded rig: fit, tune, two reports
    python examples/bench_rig.py --log runs/ --schema rig.yaml --model pendulum fit.delay=true     # your own log: fit

The rig (`sim2real.simulators.bench_rig`) stands for the real system: it has play, stiction, delay and an encoder, which
the model lacks. Fitting makes the model's motion right; tuning makes right what its optimal policy earns on the rig.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sim2real.cli import main as sim2real
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.simulators.bench_rig import Array, rig_rollout

HERE = Path(__file__).parent
EPISODES, STEPS = 48, 120  # 1.2 s each, at the rig's 10 ms
EXPLORATION = 0.15  # N m, so that the critic sees what other torques would have done
SEED = 1
UPRIGHT = float(np.pi)


def balance(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
    """Rollouts of a policy on the rig, started near upright: what `data.callable` calls once per iteration."""
    rng = np.random.default_rng(SEED)  # the same starts and exploration every time: returns can be compared
    angle = UPRIGHT + np.where(np.arange(EPISODES) % 2, 1.0, -1.0) * rng.uniform(0.15, 0.2, EPISODES)
    initial = np.stack([angle, np.zeros(EPISODES)], axis=1)

    def act(state: Array, k: int) -> Array:
        mean = policy.act(nu, torch.from_numpy(state), torch.zeros(EPISODES, policy.noise_dim, dtype=torch.float64))
        return mean[:, 0].numpy() + rng.normal(0.0, EXPLORATION, EPISODES)

    run = rig_rollout(act, seed=SEED, steps=STEPS, episodes=EPISODES, initial=initial)
    states, torques = torch.from_numpy(run.states), torch.from_numpy(run.torques).unsqueeze(-1)
    return Rollout(states, torques, reward(states[:, :-1], torques, states[:, 1:]))


def reward(state: torch.Tensor, action: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The real task, per step: stay upright, move little, spend little torque."""
    angle, velocity = state[..., 0] - UPRIGHT, state[..., 1]
    return -(angle**2 + 0.1 * velocity**2 + 0.002 * action[..., 0] ** 2)


def run(*words: str) -> int:
    """Run one command as a user would type it."""
    print(f"\n$ sim2real {' '.join(words)}\n", flush=True)
    return sim2real(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--log", help="fit this log instead: file, folder or pattern")
    parser.add_argument("--schema", help="its schema (YAML)")
    parser.add_argument("--model", default="pendulum")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_rig"))
    parser.add_argument("--quick", action="store_true", help="one tuning iteration on short rollouts, no reports")
    parser.add_argument("words", nargs="*", help="further key=value for `sim2real fit`")
    options = parser.parse_args()
    start = time.perf_counter()
    sizes = ["report=false"] if options.quick else []
    rollouts = ["horizon=0.6", "batch=8", "tune.max_steps=4"]
    if options.quick:
        rollouts = ["horizon=0.3", "batch=4", "tune.max_steps=1"]
    fitted, tuned = options.out / "fit", options.out / "tune"
    if options.log:
        schema = [f"schema={options.schema}"] if options.schema else []
        words = [f"log={options.log}", *schema, f"model={options.model}", f"out={fitted}", *options.words]
        return run("fit", *words)
    files = runpy.run_path(str(HERE / "make_rig_log.py"))["write_log"](options.out / "log", 0)
    print(f"wrote {len(files)} files to {options.out / 'log'}")
    log = [f"log={options.out / 'log'}", f"schema={options.out / 'log' / 'schema.yaml'}"]
    code = run("fit", *log, "model=pendulum", "fit.delay=true", "fit.zeros=per_run", "leave_out=[run_3]",
               f"out={fitted}", *sizes, *options.words)  # fmt: skip
    sys.path.insert(0, str(HERE))  # so that the command finds bench_rig.balance
    task = [
        "model.integrator=semi_implicit",
        f"model.initial_angle={UPRIGHT}",
        "model.initial_std=0.2",
        "model.discount=0.99",
        "discount=0.99",
    ]
    policy = ["policy=linear", "policy.gain=[[8,1.5]]", f"policy.target=[{UPRIGHT},0]"]
    code = code or run("tune", f"params={fitted / 'params.json'}", "model=pendulum", *task, *policy,
                       *rollouts, "free=[inertia,mgl,damping]", "tune.radius=0.4",
                       "data.mode=callable", "data.callable=bench_rig.balance", "reward=bench_rig.reward",
                       f"out={tuned}", *sizes)  # fmt: skip
    print(f"\ndone in {time.perf_counter() - start:.0f} s; open\n  {fitted / 'report.html'}\n  {tuned / 'report.html'}")
    return code


if __name__ == "__main__":
    failed = main()
    if failed:
        sys.exit(failed)
