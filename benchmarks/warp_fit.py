"""The double pendulum fitted to real logs through Warp and through torch, in the same run.

`w-fit`: the fits of `real_logs.py`, whole (windows, search, intervals, scores), on one thread, kernels compiled before;
in seconds of the CPU, which other jobs disturb less than those of the clock.

    speedup, speedup-0.25s     seconds through torch over seconds through Warp, each the least of a few interleaved
                               runs: windows of 0.5 s, those of the timing bar; windows of 0.25 s, those of the fit bar
    difference, ...            largest relative difference of the nine fitted parameters
    seconds, torch-seconds     of the 0.5 s windows
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.real_logs import DOUBLE, DOUBLE_FIT, NINE, TRAINING, excitation
from sim2real import ModelMDP
from sim2real.bounds import default_params
from sim2real.fit import FitResult, FitSettings, fit
from sim2real.log import RolloutLog

CASES = {"": replace(DOUBLE_FIT, horizon=0.5, stride=0.068), "-0.25s": DOUBLE_FIT}


def w_fit(quick: bool) -> Iterator[Figure]:
    """Both fits through both engines."""
    try:
        from sim2real.simulators.warp_double_pendulum import warp_double_pendulum
    except ImportError as error:
        raise MissingError(f"Warp is not installed ({error}); pip install 'sim2real[warp]'") from error
    log, models = excitation("measured", TRAINING), {"warp": warp_double_pendulum(), "torch": DOUBLE}
    for name, settings in CASES.items():
        found, seconds = _race(models, log, settings, repeats=1 if quick else 3)
        ours, theirs = found["warp"], found["torch"]
        windows = ours.training.fitted.windows
        apart = max(abs(float(ours.theta[key] / theirs.theta[key]) - 1.0) for key in NINE)
        yield Figure(f"speedup{name}", seconds["torch"] / seconds["warp"], "x", windows, 3.0)
        yield Figure(f"difference{name}", apart, "relative", windows, 1e-4)
        if not name:
            yield Figure("seconds", seconds["warp"], "s", windows)
            yield Figure("torch-seconds", seconds["torch"], "s", windows)


def _race(
    models: dict[str, ModelMDP], log: RolloutLog, settings: FitSettings, *, repeats: int
) -> tuple[dict[str, FitResult], dict[str, float]]:
    found: dict[str, FitResult] = {}
    seconds = dict.fromkeys(models, float("inf"))
    for turn in range(repeats + 1):
        for name, mdp in models.items():
            start = time.process_time()
            found[name] = fit(mdp, log, default_params(mdp.box), settings)
            if turn:  # the first one compiles and warms up
                seconds[name] = min(seconds[name], time.process_time() - start)
    return found, seconds


if __name__ == "__main__":
    main({"w-fit": w_fit})
