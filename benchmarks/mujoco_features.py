"""`j-features`: one small model per feature of the derivative, against differences of a converged MuJoCo.

    ROW              median error over states, the worst of its inputs (position, velocity, activation, control, fields)
    ROW-max          largest error of all states and inputs of which the reference is sure to 1e-6
    ROW-hvp          largest error of products with the Hessian
    ROW-order        in its place where these raise `DerivativeOrderError`: 1 where the feature is only of first order,
                     0 where it should have had them
    ROW-refused      share of states at which the library says that there is no derivative, where there are such
    ROW-uncertain    in place of these bars where the reference is limited (noise of the collider): its own median error
    refused-NAME     1 where construction raises `MujocoUnsupportedError`, 0 otherwise
    worst-median, worst-max, worst-hvp, all-refused     of all rows that are not limited by the reference

See `mujoco_judge` for what an error is, `mujoco_models` for the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.mujoco_judge import RESIDUAL, Judged, batch, entries, fields_of, gradients, judge, largest, library_step
from benchmarks.mujoco_models import Feature, features, refused
from benchmarks.mujoco_reference import State, World, world
from benchmarks.mujoco_second import judge_second
from benchmarks.mujoco_tasks import states
from sim2real.outside_program import DerivativeOrderError
from sim2real.simulators.mujoco_acceleration import Backend
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_model import mujoco_model


def measured(feature: Feature, count: int, second: int, *, backend: Backend = "auto") -> tuple[Judged, float | None]:
    """Errors of one feature; the largest of products with the Hessian, None where these are refused."""
    w = world(mujoco.MjSpec.from_string(feature.xml))
    drawn = [s for s in states(w, count, keep=feature.keep, **feature.draw) if derivative_exists(w, s, backend)]
    picked = entries(w.model, fields_of(w.model), 6, np.random.default_rng(1))
    found = judge(w, drawn, picked, backend=backend)
    try:
        hvp = judge_second(w, drawn[:second], picked, backend=backend)
    except DerivativeOrderError:
        return found, None
    good = found.residual[:second] <= RESIDUAL
    return found, max(float(np.nanmax(e[good], initial=0.0)) for e in hvp.errors.values())


def derivative_exists(w: World, state: State, backend: Backend) -> bool:
    """Whether the library gives derivatives at this state: it refuses those at which the collider is not smooth."""
    inputs = batch(w.model, [state], ())
    step = library_step(w.model, (), backend)
    try:
        gradients(step, inputs, ["v"], [torch.ones_like(y) for y in step(inputs)])
    except MujocoUnsupportedError:
        return False
    return True


def row(name: str, feature: Feature, count: int, second: int) -> Iterator[Figure]:
    """Figures of one feature."""
    found, hvp = measured(feature, count, second)
    good = found.residual <= RESIDUAL
    median = max(float(np.nanmedian(e[good])) for e in found.errors.values())
    sure = not feature.noisy
    yield Figure(name, median, "relative", len(good), 1e-8 if sure else None)
    yield Figure(f"{name}-max", largest(found), "relative", len(good), 1e-6 if sure else None)
    if len(good) < count:
        yield Figure(f"{name}-refused", 1 - len(good) / count, "share", count)
    if not sure:
        own = max(float(np.median(u[good])) for u in found.uncertain.values())
        yield Figure(f"{name}-uncertain", own, "relative", count)
    if hvp is not None:
        yield Figure(f"{name}-hvp", hvp, "relative", second, 1e-6 if sure else None)
    else:
        yield Figure(f"{name}-order", float(not feature.second), "share", 1, 1.0)


def features_bar(quick: bool) -> Iterator[Figure]:
    """`j-features`."""
    count, second = (6, 3) if quick else (24, 8)
    worst: dict[str, float] = {}
    for name, feature in features().items():
        for figure in row(name, feature, count, second):
            kind = figure.metric.removeprefix(name) or "-median"
            if figure.reference is not None and kind != "-order":
                worst[kind] = max(worst.get(kind, 0.0), figure.value)
            yield figure
    raised = []
    for name, xml in refused().items():
        raised.append(refuses(xml))
        yield Figure(f"refused-{name}", float(raised[-1]), "share", 1, 1.0)
    for kind, value in worst.items():
        yield Figure(f"worst{kind}", value, "relative", len(features()))
    yield Figure("all-refused", float(np.mean(raised)), "share", len(raised), 1.0)


def refuses(xml: str) -> bool:
    """Whether the library refuses the model by name."""
    try:
        mujoco_model(mujoco.MjSpec.from_string(xml), (), lambda theta, s, a, e, following: s[:, 0])
    except MujocoUnsupportedError:
        return True
    return False


if __name__ == "__main__":
    main({"j-features": features_bar})
