"""All bars of the two-level problems; the knowledge that each row uses stands in the module that measures it.

`b-oracle` (here): the exact hypergradients of the four tasks against central differences (extrapolated once), and the
processor time of one gradient. `b-theorems`: `theorems.py`. `b-thermal-*`, `b-blackbox`, `b-siblings`: `thermal.py`.
`b-rooms-*`, `b-suboptimal`: `rooms.py`. `b-game`, `b-lqr-game`: `games.py`. `b-tuning`: `tuning_routes.py`. `b-sac`:
`learned_follower.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.games import b_game, b_lqr_game
from benchmarks.learned_follower import b_sac
from benchmarks.oracles import building_thermal, discrete_game, four_rooms, lqr_game
from benchmarks.rooms import b_rooms_gradient, b_rooms_return, b_suboptimal
from benchmarks.theorems import b_theorems
from benchmarks.thermal import b_blackbox, b_siblings, b_thermal_gradient, b_thermal_return
from benchmarks.tuning_routes import b_tuning

Array = NDArray[np.float64]


def misfit(value: Callable[[Array], float], gradient: Array, at: Array, step: float) -> float:
    """Relative error of a gradient along each of up to 8 directions, against extrapolated central differences."""
    generator = np.random.default_rng(0)
    directions = np.eye(len(at)) if len(at) <= 8 else generator.standard_normal((8, len(at)))
    worst = 0.0
    for direction in directions:
        slopes = [(value(at + h * direction) - value(at - h * direction)) / (2 * h) for h in (step, step / 2)]
        expected = (4 * slopes[1] - slopes[0]) / 3
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
        worst = max(worst, abs(float(gradient @ direction) - expected) / scale)
    return worst


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor time of one call."""
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        spent.append(1e3 * (time.process_time() - begin))
    return statistics.median(spent)


def b_oracle(quick: bool) -> Iterator[Figure]:
    """Errors relative to the gradient norm, and milliseconds."""
    logits, temperature = four_rooms.trained_point()
    rooms = lambda x: four_rooms.exact(x, temperature).value
    thermal = lambda x: building_thermal.exact(x, with_gradient=False).value
    errors = {
        "rooms": misfit(rooms, four_rooms.exact(logits, temperature).gradient, logits, 4e-5),
        "thermal": misfit(thermal, building_thermal.exact(np.zeros(8)).gradient, np.zeros(8), 1e-3),
    }
    for bonus in (1.0, 2.0):
        value = lambda x, bonus=bonus: discrete_game.exact(float(x[0]), bonus)[0]
        slope = np.array([discrete_game.exact(0.4, bonus)[1]])
        errors[f"game-R{bonus:.0f}"] = misfit(value, slope, np.array([0.4]), 1e-4)
    gain = np.array([-5.0, -5.0])
    errors["lqr-game"] = misfit(lambda x: lqr_game.exact(x)[0], lqr_game.exact(gain)[1], gain, 1e-3)
    yield Figure("error", max(errors.values()), "relative", len(errors))
    for name, error in errors.items():
        yield Figure(f"error-{name}", error, "relative", 1)
    repeats = 20 if quick else 100
    yield Figure("rooms-ms", milliseconds(lambda: four_rooms.exact(logits, temperature), repeats), "ms", repeats, 2.3)
    yield Figure("thermal-ms", milliseconds(lambda: building_thermal.exact(np.zeros(8)), repeats), "ms", repeats, 11.0)


if __name__ == "__main__":
    main(
        {
            "b-oracle": b_oracle,
            "b-theorems": b_theorems,
            "b-thermal-gradient": b_thermal_gradient,
            "b-thermal-return": b_thermal_return,
            "b-blackbox": b_blackbox,
            "b-siblings": b_siblings,
            "b-rooms-gradient": b_rooms_gradient,
            "b-rooms-return": b_rooms_return,
            "b-suboptimal": b_suboptimal,
            "b-game": b_game,
            "b-lqr-game": b_lqr_game,
            "b-tuning": b_tuning,
            "b-sac": b_sac,
        }
    )
