"""System identification of the half-cheetah next to MuJoCo's own toolbox, `mujoco.sysid`.

Twelve parameters (damping and armature of the six leg joints), 4 sequences of 200 steps with contacts, noise-free logs
of all joint positions and velocities, both started 40 % above the planted values.

    speedup      seconds of one Jacobian of all residuals by the parameters, the peer's over ours: best of interleaved
                 repeats; the peer with 2 threads, ours with one; the residual at the point is known to both
    processor-ratio                 the same of processor time, which other jobs on the machine change less
    seconds, peer-seconds           of those Jacobians
    with-residual                   the same ratio, of residual and Jacobian together
    jacobian-error                  ours against central differences of the simulation, worst entry over the largest
    error        worst relative error of `fit` (windows of 0.2 s that start at logged states)
    fit-seconds                     of that fit
    peer-error, peer-fit-seconds    of `mujoco.sysid.optimize`, which simulates all 200 steps from the first state
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from sim2real import ModelMDP, Params, default_params
from sim2real.fit import FitSettings, fit
from sim2real.roll import roll, roll_sensitivities
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.mujoco_model import mujoco_model

JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
KINDS = ("damping", "armature")
SEQUENCES, STEPS, START = 4, 200, 1.4
THREADS = 2
"""of the peer"""


def sysid(quick: bool) -> Iterator[Figure]:
    """Jacobians side by side, then the fits."""
    warnings.filterwarnings("ignore", message=".*settotalmass.*")
    mdp, truth = cheetah()
    starts, actions, states = recorded(mdp, truth)
    theta = {name: START * value for name, value in truth.items()}
    path = (roll(mdp, theta, starts, actions, noise(mdp, actions)), actions, noise(mdp, actions))
    rows = range(STEPS + 1)
    ours = lambda: roll_sensitivities(mdp, theta, list(theta), path, rows).params
    together = lambda: (roll(mdp, theta, starts, actions, path[2]), ours())
    peers = peer(starts, actions, states)
    (seconds, peer_seconds, both, peer_both), processor = _timed(ours, together, *peers, quick)
    count = SEQUENCES * STEPS
    yield Figure("speedup", peer_seconds / seconds, "x", count, 10.0)
    yield Figure("processor-ratio", processor[1] / processor[0], "x", count, 10.0)
    yield Figure("seconds", seconds, "s", count)
    yield Figure("peer-seconds", peer_seconds, "s", count, 0.364)
    yield Figure("with-residual", (peer_both + peer_seconds) / both, "x", count)
    yield Figure("jacobian-error", jacobian_error(mdp, theta, path, ours()), "1", count)
    yield from _fits(mdp, truth, theta, actions, states, peers, quick)


def cheetah() -> tuple[ModelMDP, Params]:
    """The half-cheetah of Gymnasium with its own parameters."""
    names = [f"joint:{joint}.{kind}" for kind in KINDS for joint in JOINTS]
    mdp = mujoco_model(asset(), names, lambda theta, s, a, e, following: s[:, 0])
    return mdp, default_params(mdp.box)


def asset() -> Path:
    """Its XML."""
    found = importlib.util.find_spec("gymnasium")
    if found is None or found.origin is None:
        raise MissingError("gymnasium, whose half-cheetah this is: pip install 'gymnasium[mujoco]'")
    return Path(found.origin).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"


def recorded(mdp: ModelMDP, truth: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Starts `[4, 18]`, actions `[200, 4, 6]` (a bounded random walk) and the states they lead to `[201, 4, 18]`."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    starts = mdp.initial_state(truth, torch.zeros(SEQUENCES, mdp.noise_dims[0], dtype=torch.float64))
    starts = starts + torch.cat([torch.zeros(SEQUENCES, 2), 0.05 * draw(SEQUENCES, 7), torch.zeros(SEQUENCES, 9)], 1)
    actions = torch.zeros(STEPS, SEQUENCES, 6, dtype=torch.float64)
    level = torch.zeros(SEQUENCES, 6, dtype=torch.float64)
    for k in range(STEPS):
        level = (level + 0.1 * draw(SEQUENCES, 6)).clamp(-0.6, 0.6)
        actions[k] = level
    return starts, actions, roll(mdp, truth, starts, actions, noise(mdp, actions))


def noise(mdp: ModelMDP, actions: Tensor) -> Tensor:
    """None."""
    return actions.new_zeros(*actions.shape[:2], mdp.noise_dims[1])


def jacobian_error(mdp: ModelMDP, theta: Params, path: tuple[Tensor, Tensor, Tensor], found: Tensor) -> float:
    """Against central differences over the first 30 steps: later, contacts make the states too sensitive for them."""
    steps = slice(30)
    worst = 0.0
    for column, (name, value) in enumerate(theta.items()):
        width = 1e-6 * value
        ends = [
            roll(mdp, theta | {name: value + s * width}, path[0][0], path[1][steps], path[2][steps]) for s in (1, -1)
        ]
        difference = (ends[0] - ends[1]) / (2 * width)
        worst = max(
            worst, float((found[: len(difference), ..., column] - difference).abs().max() / difference.abs().max())
        )
    return worst


def peer(starts: Tensor, actions: Tensor, states: Tensor) -> tuple[Callable[..., Any], Any]:
    """`mujoco.sysid` on the same data: its residual function and its parameters at the start values."""
    try:
        from mujoco import sysid as toolbox

        build = toolbox.build_residual_fn
    except (ImportError, AttributeError) as error:
        raise MissingError("mujoco.sysid: pip install 'mujoco[sysid]'") from error
    spec = mujoco.MjSpec.from_file(str(asset()))
    joints = [joint.name for joint in spec.joints]
    for kind in (mujoco.mjtSensor.mjSENS_JOINTPOS, mujoco.mjtSensor.mjSENS_JOINTVEL):
        for name in joints:
            label = f"{name}_{int(kind)}"
            spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=name, name=label)
    model = spec.compile()
    clock = np.arange(STEPS) * model.opt.timestep
    sequences = []
    for k in range(SEQUENCES):
        first, driven = starts[k].numpy(), actions[:, k].numpy()
        initial = toolbox.create_initial_state(model, first[:9].copy(), first[9:].copy(), np.zeros(0))
        control = toolbox.TimeSeries.from_control_names(clock, driven, model)
        sensed = toolbox.TimeSeries.from_names(clock + model.opt.timestep, states[1:, k].numpy(), model)
        sequences.append(toolbox.ModelSequences(f"m{k}", spec.copy(), f"s{k}", initial, control, sensed))
    parameters = toolbox.ParameterDict()
    for kind in KINDS:
        for name in JOINTS:
            nominal = float(np.atleast_1d(getattr(model.joint(name), kind))[0])
            change = _setter(name, kind)
            parameters.add(
                toolbox.Parameter(f"{name}_{kind}", START * nominal, 0.2 * nominal, 4 * nominal, modifier=change)
            )
    return build(models_sequences=sequences, n_threads=THREADS), parameters


def _setter(name: str, kind: str) -> Callable[[Any, Any], None]:
    def change(spec: Any, parameter: Any) -> None:
        joint, value = spec.joint(name), float(parameter.value[0])
        if isinstance(getattr(joint, kind), np.ndarray):
            getattr(joint, kind)[0] = value
        else:
            setattr(joint, kind, value)

    return change


def _timed(
    ours: Callable[[], Any], together: Callable[[], Any], residual: Callable[..., Any], parameters: Any, quick: bool
) -> tuple[list[float], list[float]]:
    """Best seconds, and processor seconds, of: our Jacobian, the peer's, our residual with it, the peer's alone."""
    x = parameters.as_vector()
    columns = np.tile(x[:, None], (1, len(x)))
    best, processor = [math.inf] * 4, [math.inf] * 4
    jobs = (ours, lambda: residual(columns, parameters), together, lambda: residual(x, parameters))
    for _ in range(4 if quick else 15):
        for index, job in enumerate(jobs):
            start, used = time.perf_counter(), time.process_time()
            job()
            best[index] = min(best[index], time.perf_counter() - start)
            processor[index] = min(processor[index], time.process_time() - used)
    return best, processor


def _fits(
    mdp: ModelMDP, truth: Params, theta: Params, actions: Tensor, states: Tensor, peers: tuple[Any, Any], quick: bool
) -> Iterator[Figure]:
    log = RolloutLog(
        signals=states.transpose(0, 1),
        actions=actions.transpose(0, 1),
        exogenous=None,
        mask=torch.ones(SEQUENCES, STEPS, dtype=torch.bool),
        dt=mdp.dt,
        names={
            "signal": mdp.names["state"],
            "action": mdp.names["action"],
            "episode": tuple(f"s{k}" for k in range(SEQUENCES)),
        },
        units={name: mdp.units[name] for name in (*mdp.names["state"], *mdp.names["action"])},
        source="half-cheetah",
    )
    settings = FitSettings(
        horizon=0.2, stride=0.1, sample_every=2, first_row=0, margin=0, prior_width=0.0, tolerance=1e-9, loss_scale=0.1
    )
    start = time.perf_counter()
    found = fit(mdp, log, theta, settings)
    worst = max(abs(float(found.theta[name] / value) - 1.0) for name, value in truth.items())
    yield Figure("error", worst, "1", len(truth), 0.01)
    yield Figure("fit-seconds", time.perf_counter() - start, "s", len(truth))
    yield Figure("fit-converged", float(found.report.converged), "1", found.report.steps)
    if quick:
        return
    from mujoco import sysid as toolbox

    residual, parameters = peers
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # it prints its iterations whatever `verbose` says
        ended, _ = toolbox.optimize(parameters, residual, optimizer="mujoco", verbose=False, max_iters=30)
    values = [float(truth[f"joint:{joint}.{kind}"]) for kind in KINDS for joint in JOINTS]
    yield Figure("peer-error", float(np.abs(ended.as_vector() / np.array(values) - 1.0).max()), "1", len(truth), 0.11)
    yield Figure("peer-fit-seconds", time.perf_counter() - start, "s", len(truth), 53.6)


if __name__ == "__main__":
    main({"j-sysid": sysid})
