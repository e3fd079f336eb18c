"""`j-accuracy`: gradients of one step of Gymnasium's models with contacts against differences of a converged MuJoCo.

    q-median, v-median      of the errors by position and velocity, the worst model
    parameters-median       the same by physical fields, the worst field of the worst model
    max                     largest error of all inputs, states and models where the scaled residual is <= 1e-9
    gated                   largest share of a model's states that are not
    switched                largest share of a model's states without a reference by q or v: a kink on the way
    unsure                  largest share of states and inputs that are left out of max, since the differences say of
                            themselves that they are uncertain by more than 1e-6
    hvp                     largest error of products with the Hessian against differences of the VJP
    uncertain               largest median of what the differences say of their own error
    MODEL-...               the same of each model
    stock-...               the same with each file's own integrator (RK4 for most), fewer states

See `mujoco_judge` for what an error is (the worse of VJP and JVP), `mujoco_reference` for the differences. States are
random: 40 to 200 steps under random controls from random starts, kept if something touches. Friction of every geom is
moved by up to 1 % and the time constants of contacts by 1 %, at random: the files have ties, where no derivative by one
geom's friction exists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.mujoco_judge import RESIDUAL, Judged, entries, fields_of, judge, largest, unsure
from benchmarks.mujoco_reference import World, world
from benchmarks.mujoco_second import judge_second
from benchmarks.mujoco_tasks import STOCK, states, stock, with_integrator

STATE = ("q", "v", "act", "ctrl")


def untied(spec: mujoco.MjSpec, seed: int = 0) -> World:
    """A converged model whose contact parameters are no longer equal."""
    rng = np.random.default_rng(seed)
    w = world(spec)
    w.model.geom_friction[:] *= 1 + 0.01 * rng.uniform(-1, 1, w.model.geom_friction.shape)
    w.model.geom_solref[:, 0] *= 1.01 + 0.005 * rng.uniform(-1, 1, w.model.ngeom)
    return w


def judged_model(name: str, count: int, second: int, integrator: str | None) -> tuple[Judged, float]:
    """Errors of one model, and the largest of its products with the Hessian."""
    spec = stock(name)
    w = untied(spec if integrator is None else with_integrator(spec, integrator))
    drawn = states(w, count)
    picked = entries(w.model, fields_of(w.model), 6, np.random.default_rng(1))
    found = judge(w, drawn, picked)
    hvp = judge_second(w, drawn[:second], picked) if second else None
    good = found.residual[:second] <= RESIDUAL
    worst = max(float(np.nanmax(e[good], initial=0.0)) for e in hvp.errors.values()) if hvp else 0.0
    return found, worst


def summary(found: Judged) -> dict[str, float]:
    """Figures of one model."""
    good = found.residual <= RESIDUAL
    median = lambda kinds: max(float(np.nanmedian(found.errors[k][good])) for k in kinds)
    fields = [kind for kind in found.errors if kind not in STATE]
    return {
        "q-median": median(["q"]),
        "v-median": median(["v"]),
        "parameters-median": median(fields),
        "max": largest(found),
        "unsure": unsure(found),
        "gated": float(1 - good.mean()),
        "switched": float(np.mean(np.isnan(found.errors["q"]) | np.isnan(found.errors["v"]))),
        "uncertain": max(float(np.median(u[good])) for u in found.uncertain.values()),
    }


def accuracy(quick: bool, names: Sequence[str] = STOCK) -> Iterator[Figure]:
    """`j-accuracy`."""
    count, second, own = (20, 4, 4) if quick else (200, 40, 40)
    for prefix, integrator, size in (("", "euler", count), ("stock-", None, own)):
        worst: dict[str, float] = {}
        for name in names:
            found, hvp = judged_model(name, size, min(second, size), integrator)
            for metric, value in (summary(found) | {"hvp": hvp}).items():
                worst[metric] = max(worst.get(metric, 0.0), value)
                yield Figure(f"{prefix}{name}-{metric}", value, "share" if metric in SHARES else "relative", size)
        for metric, value in worst.items():
            yield Figure(
                f"{prefix}{metric}", value, "share" if metric in SHARES else "relative", size, BARS.get(metric)
            )


SHARES = ("gated", "switched", "unsure")
BARS = {"q-median": 1e-8, "v-median": 5e-8, "parameters-median": 5e-8, "max": 3e-6, "gated": 0.1, "hvp": 1e-6}


if __name__ == "__main__":
    main({"j-accuracy": accuracy})
