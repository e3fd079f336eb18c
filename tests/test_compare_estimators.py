"""Comparison of estimators on the enumerated problem, where bias, variance and cross term are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from problems import linear_gaussian_problem, seeded
from rich.console import Console
from scipy.stats import ttest_1samp, ttest_ind
from torch import Tensor

from benchmarks import mixed_instance as instance
from benchmarks.oracles import mixed_enumeration as oracle
from sim2real import Estimate, Noise, Params, ravel, sample_noise
from sim2real.estimator_report import comparison_figure, comparison_table
from sim2real.estimators import compare_estimators, mixed_gradient, score_function_gradient
from sim2real.estimators.compare_estimators import _noise_of_difference, _row
from sim2real.params import unravel


def at(point: str, **options: object) -> tuple[object, Tensor, Tensor]:
    """The comparison at a point, with the exact gradient and the exact one without cross term."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters(point)
    generator = seeded(0)
    numbers = ravel(nu).numpy()
    full, dropped = (torch.tensor(oracle.gradient(numbers, kind)) for kind in ("exact", "dropped"))
    draw = lambda: sample_noise(mdp, policy, 200, 3, generator)
    return compare_estimators(mdp, policy, {}, nu, draw, **options), full, dropped


@pytest.fixture(scope="module")
def far() -> tuple[object, Tensor, Tensor]:
    nu = instance.parameters("far")
    exact = torch.tensor(oracle.gradient(ravel(nu).numpy()))
    return at("far", reference=unravel(exact, nu), batches=30)


def test_the_cross_term_and_the_bias_without_it_are_found(far: tuple) -> None:
    """6000 rollouts; enumerated: cross term 16 % of the gradient, dropped bias 0.487. p < 0.001 for the biased one
    (its bias is 5 standard errors), p > 0.001 for the unbiased one: one false alarm in a thousand, seed fixed."""
    comparison, full, dropped = far
    rows = {row.name: row for row in comparison.rows}
    bias = float((full - dropped).norm())
    share = bias / float(full.norm())
    assert comparison.reference_noise == 0.0
    assert comparison.reference_norm == pytest.approx(float(full.norm()))
    # sampled with common noise: within 4 of its own errors
    assert abs(comparison.cross_share - share) < 4 * comparison.cross_share_noise
    without = rows["mixed, cross term dropped"]
    assert without.bias_low <= bias <= without.bias_high
    assert without.p_value < 1e-3
    assert rows["pathwise"].p_value < 1e-3
    assert rows["mixed"].p_value > 1e-3
    assert rows["mixed"].bias_low < 0.1 * without.bias_low
    assert rows["mixed, state baseline"].variance < rows["mixed"].variance * 1.2
    assert "deterministic" in comparison.failures["score function"]


def test_recommendation_table_and_figure_name_every_estimator(far: tuple) -> None:
    comparison = far[0]
    best = min(comparison.rows, key=lambda row: row.error)
    assert comparison.recommendation.startswith(best.name)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(comparison))
    text, svg = console.export_text(), comparison_figure(comparison)
    for row in comparison.rows:
        assert row.name in text
    assert "cross term" in text
    assert svg.startswith("<svg")
    assert svg == comparison_figure(comparison)


def test_a_sampled_reference_and_one_key_only() -> None:
    """Cosine in k and h; the reference's own noise is told, and an unbiased estimator is not called biased."""
    comparison, full, _ = at(
        "mid",
        estimators={"score-free": partial(mixed_gradient, groups=2)},
        keys=["k", "h"],
        batches=8,
        reference_batches=20,
    )
    assert [row.name for row in comparison.rows] == ["mixed", "mixed, cross term dropped", "score-free"]
    assert list(comparison.reference) == ["k", "h"]
    found = ravel(comparison.reference)
    # 4000 rollouts of variance 58: error 0.12 in norm, four of them
    assert float((found - full[9:]).norm()) < 4 * 0.12
    assert 0.05 < comparison.reference_noise < 0.25
    assert comparison.rows[0].p_value > 1e-3
    assert comparison.rows[0].cosine > 0.95


def test_common_noise_finds_what_a_sampled_reference_alone_does_not() -> None:
    """3200 rollouts at "far" in k and h: the dropped cross term is found (p < 0.001), and its size, 0.487, covered."""
    comparison, full, dropped = at("far", keys=["k", "h"], batches=16, reference_batches=8)
    rows = {row.name: row for row in comparison.rows}
    without = rows["mixed, cross term dropped"]
    assert without.p_value < 1e-3
    assert without.bias_low < float((full - dropped).norm()) < without.bias_high
    assert without.bias_high - without.bias_low < 0.5 * (rows["mixed"].bias_high - rows["mixed"].bias_low)
    assert rows["counterfactual branches"].p_value > 1e-3


def test_false_alarms_of_the_bias_test_are_as_stated() -> None:
    """500 comparisons of two normal samples, 30 x 40 numbers of unequal variance: 5 % +- 4 standard errors (3.9 %).

    The matched distribution is not exact: another 1.5 % are allowed for it.
    """
    generator, alarms, inside = seeded(3), 0, 0
    scale = torch.logspace(0, -1.5, 40, dtype=torch.float64)
    for _ in range(500):
        x, y = (torch.randn(n, 40, generator=generator, dtype=torch.float64) * scale for n in (30, 60))
        row = _row("x", x, y, (x, y), 1.0, scale=1.0, size=10, budget=10.0)
        alarms += row.p_value < 0.05
        inside += row.bias_low == 0.0
    assert abs(alarms / 500 - 0.05) < 0.039 + 0.015
    assert inside / 500 > 0.95 - 0.039 - 0.015


@pytest.mark.parametrize(("batches", "sampled"), [(4, False), (4, True), (12, False)])
def test_few_batches_of_one_parameter_give_the_t_test(batches: int, sampled: bool) -> None:
    """p of one number is that of Student's or Welch's t (scipy); by chi-square four batches alarm too often."""
    x = torch.randn(batches, 1, generator=seeded(6), dtype=torch.float64)
    y = torch.randn(9, 1, generator=seeded(7), dtype=torch.float64) if sampled else torch.zeros(1, 1).double()
    row = _row("x", x, y, (x, y), 1.0, scale=1.0, size=10, budget=10.0)
    if sampled:
        expected = ttest_ind(x[:, 0].numpy(), y[:, 0].numpy(), equal_var=False).pvalue
    else:
        expected = ttest_1samp(x[:, 0].numpy(), 0.0).pvalue
    assert row.p_value == pytest.approx(float(expected), rel=1e-6)


def test_the_noise_of_a_difference_is_estimated_without_bias() -> None:
    """tr C and tr C^2 of 2000 samples of 12 and 20 rows, against the truth; 4 standard errors of the mean."""
    generator, scale = seeded(4), torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    found = []
    for _ in range(2000):
        x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) * scale for n in (12, 20))
        found.append(_noise_of_difference(x, y))
    truth = scale**2 * (1 / 12 + 1 / 20)
    sample = torch.tensor(found, dtype=torch.float64)
    expected = torch.stack([truth.sum(), truth.square().sum()])
    assert bool(((sample.mean(0) - expected).abs() <= 4 * sample.std(0) / 2000**0.5 + 0.002 * expected).all())


def test_bad_requests_are_named() -> None:
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    draw = lambda: sample_noise(mdp, policy, 8, 3, seeded(0))
    with pytest.raises(ValueError, match="at least 4 batches"):
        compare_estimators(mdp, policy, {}, nu, draw, batches=2)
    with pytest.raises(KeyError, match="are no parameters in nu"):
        compare_estimators(mdp, policy, {}, nu, draw, keys=["q"])
    plain, linear, theta, gains = linear_gaussian_problem()
    with pytest.raises(ValueError, match="HybridPolicy"):
        compare_estimators(plain, linear, theta, gains, lambda: sample_noise(plain, linear, 8, 3, seeded(0)))


def test_estimators_that_agree_exactly_are_not_called_biased() -> None:
    """An estimator that always returns the reference: nothing varies, nothing is biased; a shifted one is."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    exact = unravel(torch.tensor(oracle.gradient(ravel(nu).numpy())), nu)

    def fixed(shift: float) -> object:
        def estimator(
            mdp: object, policy: object, theta: Params, nu: Params, noise: Noise, **options: object
        ) -> Estimate:
            return Estimate(torch.zeros(()), {key: value + shift for key, value in exact.items()})

        return estimator

    draw = lambda: sample_noise(mdp, policy, 50, 3, seeded(0))
    named = {"right": fixed(0.0), "wrong": fixed(0.1), "score": score_function_gradient}
    comparison = compare_estimators(mdp, policy, {}, nu, draw, estimators=named, reference=exact, batches=4)
    rows = {row.name: row for row in comparison.rows}
    assert (rows["right"].p_value, rows["wrong"].p_value) == (1.0, 0.0)
    assert rows["wrong"].bias == pytest.approx(0.1 * 18**0.5)
    assert comparison.recommendation.startswith("right: ")
    assert list(comparison.failures) == ["score"]
