"""Predictive calibration on systems whose predictive distribution is known in closed form.

AR(1), s' = a s + sigma w: the residual h steps on has variance sigma^2 (1 - a^2h) / (1 - a^2), whatever the start. With
another model coefficient b the residual is (a^h - b^h) s + noise, s of variance sigma^2 / (1 - a^2).
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from sim2real.bounds import Box
from sim2real.calibration import Calibration, CalibrationSettings, calibrate
from sim2real.mdp import ModelMDP
from sim2real.rollout_log import RolloutLog
from sim2real.windows import WindowChoice, WindowError

A, SIGMA, STEPS = 0.9, 0.3, 16


def model(signals: int = 1) -> ModelMDP:
    """s' = a s, observed; the noise is what the model leaves out."""
    names = tuple(f"s{k}" for k in range(signals))
    return ModelMDP(
        initial_state=lambda theta, e: e,
        step=lambda theta, s, a, e: theta["a"] * s + 0.0 * a,
        reward=lambda theta, s, a, e, following: s[:, 0],
        noise_dims=(signals, 0),
        dt=0.5,
        names={"state": names, "signal": names, "action": ("u",)},
        units=dict.fromkeys((*names, "u"), "1"),
        box=Box(default={"a": A}),
    )


def recorded(runs: int = 20, length: int = 600, *, signals: int = 1, seed: int = 0) -> RolloutLog:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(runs, signals, generator=generator, dtype=torch.float64)
    states = [SIGMA / math.sqrt(1 - A**2) * draw()]
    for _ in range(length):
        states.append(A * states[-1] + SIGMA * draw())
    names = tuple(f"s{k}" for k in range(signals))
    return RolloutLog(
        signals=torch.stack(states, 1),
        actions=torch.zeros(runs, length, 1, dtype=torch.float64),
        exogenous=None,
        mask=torch.ones(runs, length, dtype=torch.bool),
        dt=0.5,
        names={"signal": names, "action": ("u",), "exogenous": (), "episode": tuple(f"r{k}" for k in range(runs))},
        units=dict.fromkeys((*names, "u"), "1"),
        source="ar1",
    )


WINDOWS = WindowChoice(horizon=0.5 * STEPS, stride=0.5 * STEPS, first_row=0, margin=0)
SETTINGS = CalibrationSettings(windows=WINDOWS)


def scored(a: float = A, reference: float | None = None, **options: Any) -> Calibration:
    theta = lambda value: {"a": torch.tensor(value, dtype=torch.float64)}
    settings = options.pop("settings", SETTINGS)
    log, mdp = options.pop("log", None) or recorded(), options.pop("mdp", model())
    return calibrate(
        mdp, log, theta(a), reference=None if reference is None else theta(reference), settings=settings, **options
    )


def spread(a: float, h: Tensor) -> Tensor:
    """Exact standard deviation of the residual of a model with coefficient a, h steps on."""
    own = SIGMA**2 * (1 - A ** (2 * h)) / (1 - A**2)
    return (own + (A**h - a**h) ** 2 * SIGMA**2 / (1 - A**2)).sqrt()


@pytest.mark.parametrize("a", [A, 0.6])
def test_errors_and_density_are_those_of_the_closed_form(a: float) -> None:
    found, steps = scored(a, reference=A), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).double()
    assert found.seconds == tuple((0.5 * steps).tolist())
    own, true = spread(a, steps), spread(A, steps)
    # 740 independent windows: the standard error of an RMSE is 1 / sqrt(2 * 740) = 2.6 %; 4 of them
    torch.testing.assert_close(found.rmse[:, 0], own, rtol=0.105, atol=0)
    expected = torch.log(true) + 0.5 * math.log(2 * math.pi) + 0.5 * (own / true) ** 2
    torch.testing.assert_close(found.nll, expected, rtol=0, atol=0.11 * float((own / true).max()) ** 2)
    exact = 2 * torch.tensor(norm.cdf(torch.outer(true / own, torch.tensor(norm.ppf(0.5 + found.levels / 2))))) - 1
    # a share of 740 windows: standard error at most 0.0184; 4 of them, and 0.02 for the estimated spread
    assert float((found.coverage - exact).abs().max()) < 0.094
    assert found.windows == 740
    assert found.lost == 0


def test_the_true_model_is_calibrated_and_its_histogram_uniform() -> None:
    found = scored()
    # mean of 55 dependent shares; each has a standard error of at most 0.0184
    assert found.miscalibration < 0.03
    assert float(found.histogram.sum(1).sub(1).abs().max()) < 1e-12
    # shares of 740 in 10 bins: standard error 0.011 each; 50 of them within 4.5
    assert float((found.histogram - 0.1).abs().max()) < 0.05
    worse = scored(0.6, reference=A)
    assert worse.miscalibration > 3 * found.miscalibration
    assert bool((worse.nll[:4] > found.nll[:4]).all())  # 16 steps on both have forgotten the start
    assert bool((worse.coverage[1:4, 2:] < found.coverage[1:4, 2:]).all())


def test_u_is_uniform_by_an_independent_test() -> None:
    fine = replace(SETTINGS, bins=1000, horizons=1)
    counts = (scored(settings=fine).histogram[0] * 740).round().long()
    u = ((torch.arange(1000) + 0.5) / 1000).repeat_interleave(counts)
    # one fixed seed; a false alarm happens at a fraction 1e-3 of seeds
    assert kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_the_standard_error_is_that_of_a_share() -> None:
    found = scored()
    p = found.coverage
    exact = (p * (1 - p) / found.windows).sqrt()
    ratio = (found.coverage_stderr / exact)[:, 2:9]
    # 20 runs: a standard deviation from 20 draws is known to 1 / sqrt(38) = 16 %; 4 of them
    assert float(ratio.min()) > 0.36
    assert float(ratio.max()) < 1.65


def test_a_run_is_predicted_with_the_spread_of_the_others() -> None:
    log = recorded(runs=3)
    wild = replace(log, signals=log.signals * torch.tensor([1.0, 1.0, 100.0])[:, None, None])
    found = scored(log=wild)
    # the wild third lies outside of what the other two promise, though not outside of what it would promise itself
    assert float(found.coverage[0, -1]) < 0.72
    tame = scored(log=log)
    assert float(tame.coverage[0, -1]) > 0.95


def test_two_signals_have_a_joint_density() -> None:
    found = scored(mdp=model(2), log=recorded(signals=2), settings=replace(SETTINGS, horizons=1))
    assert found.rmse.shape == (1, 2)
    # two independent signals: twice the entropy of one, to the error of a mean of 740 with standard deviation 1
    entropy = math.log(2 * math.pi * math.e * float(spread(A, torch.tensor(16.0).double())) ** 2)
    assert float(found.nll[0]) == pytest.approx(entropy, abs=4 / math.sqrt(740) + 0.01)


def test_one_run_is_cut_into_blocks() -> None:
    found = scored(log=recorded(runs=1, length=16 * 100))
    assert found.windows == 100
    assert bool(torch.isfinite(found.coverage_stderr).all())
    # a share of 100: standard error at most 0.05; 4 of them
    assert float((found.coverage - found.levels).abs().max()) < 0.2
    lonely = scored(log=recorded(runs=1, length=16))
    assert bool(torch.isnan(lonely.coverage_stderr).all())


def test_windows_that_diverge_are_lost_not_hidden() -> None:
    found = scored(10**19.26, reference=A)  # 16 steps on beyond the largest float, for starts above 1.2
    assert 0 < found.lost < found.windows
    assert math.isinf(float(found.rmse[-1, 0]))
    assert math.isinf(float(found.nll[-1]))
    assert float(found.coverage.max()) <= 1 - found.lost / found.windows
    everywhere = scored(1e300, reference=A)
    assert everywhere.lost == everywhere.windows
    assert float(everywhere.histogram.abs().max()) == 0.0


def test_zeros_and_delays_of_the_fit_are_used() -> None:
    log = recorded()
    shifted = replace(log, signals=log.signals + 5.0)
    plain, moved = scored(log=log), scored(log=shifted, nuisance={"zero": torch.tensor([5.0])})
    torch.testing.assert_close(plain.rmse, moved.rmse, rtol=1e-10, atol=0)
    time = 0.5 * torch.arange(601, dtype=torch.float64)
    inputs = replace(log, recorded_actions=tuple((time, torch.zeros(601, 1, dtype=torch.float64)) for _ in range(20)))
    delayed = scored(log=inputs, nuisance={"delay": torch.tensor(0.1, dtype=torch.float64)})
    torch.testing.assert_close(plain.nll, delayed.nll, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizons": 0}, "horizons must be >= 1"),
        ({"levels": (0.5, 1.0)}, "levels must be in"),
        ({"levels": ()}, "levels must be in"),
        ({"bins": 1}, "bins must be >= 2"),
        ({"pull": math.nan}, "pull must be"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CalibrationSettings(**options)


def test_logs_that_cannot_be_used_are_named() -> None:
    with pytest.raises(WindowError, match=r"nuisance\['zero'\] has shape \[3\]; expected \[1\] or \[20, 1\]"):
        scored(nuisance={"zero": torch.zeros(3)})
    with pytest.raises(ValueError, match="the model diverges on the log at the reference"):
        scored(reference=1e300)
    exact = recorded()
    still = replace(exact, signals=torch.zeros_like(exact.signals))
    with pytest.raises(ValueError, match=r"residuals of \['s0'\] at the reference do not span"):
        scored(log=still)
