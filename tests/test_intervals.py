"""The delete-one-block jackknife against refits, closed forms and planted noise."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import least_squares
from scipy.stats import t as student

from sim2real.intervals import (
    Linearization,
    block_sums,
    correlation,
    deleted_block_shifts,
    jackknife,
    make_blocks,
    soft_l1_weights,
)


def some_windows(jacobian=None, residual=None, *, W=120, R=5, P=3, seed=0, runs=2, horizon=0.5):
    """W windows of R rows, one start every 0.25 s, in `runs` runs of equal length."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(W, R, P, generator=g, dtype=torch.float64) if jacobian is None else jacobian
    W, R = J.shape[:2]
    r = torch.randn(W, R, generator=g, dtype=torch.float64) if residual is None else residual
    each = W // runs
    start = (torch.arange(W) % each).double() * 0.25
    return Linearization(J, r, torch.ones_like(r), torch.arange(W) // each, start, horizon)


def least_squares_residual(windows: Linearization, keep=None, precision=None) -> torch.Tensor:
    """Step `[P]` to the minimum of the linear problem, over the windows `keep` and with priors of mean 0."""
    keep = torch.ones(len(windows.run), dtype=torch.bool) if keep is None else keep
    J, r = windows.jacobian[keep].flatten(0, 1), windows.residual[keep].flatten()
    if precision is not None:
        J, r = torch.cat([J, precision.sqrt().diag()]), torch.cat([r, torch.zeros(len(precision)).to(r)])
    return -torch.linalg.lstsq(J, r.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def solved(windows: Linearization) -> Linearization:
    """The same windows with the residual at the least-squares solution (the model is linear)."""
    return replace(windows, residual=windows.residual + windows.jacobian @ least_squares_residual(windows))


def test_shifts_of_a_linear_model_are_refits_without_the_block():
    windows = solved(some_windows())
    blocks = make_blocks(windows)
    shifts, null = deleted_block_shifts(*block_sums(windows, blocks), torch.zeros(3, 3, dtype=torch.float64))
    for g in range(blocks.count):
        refit = least_squares_residual(windows, blocks.index != g)
        torch.testing.assert_close(shifts[g], refit, rtol=1e-10, atol=1e-12)
    assert len(null) == 0


def test_zeros_per_run_are_refitted_with_each_block_even_when_a_run_is_one_block():
    """Columns 2.. are offsets of one run each; run 2 is a single block. Independent answer: refits by lstsq."""
    windows = some_windows(W=140, P=2)
    run = torch.tensor([0] * 64 + [1] * 72 + [2] * 4)
    start = torch.cat([torch.arange(n).double() * 0.25 for n in (64, 72, 4)])
    zeros = (run.unsqueeze(1) == torch.arange(3)).double().unsqueeze(1).expand(-1, 5, -1)
    windows = replace(windows, jacobian=torch.cat([windows.jacobian, zeros], -1), run=run, start=start)
    windows = solved(windows)
    blocks = make_blocks(windows)
    shifts, _ = deleted_block_shifts(*block_sums(windows, blocks), torch.zeros(5, 5, dtype=torch.float64))
    for g in range(blocks.count):
        refit = least_squares_residual(windows, blocks.index != g)  # minimum norm where run 2 is gone
        torch.testing.assert_close(shifts[g], refit, rtol=1e-9, atol=1e-11)
    answer = jackknife(windows)
    assert answer.open.tolist() == [False, False, False, False, True]  # one block says nothing of its own spread
    assert math.isinf(answer.half_width[4])
    assert torch.isfinite(answer.half_width[:4]).all()


def test_mean_of_equal_blocks_gives_the_textbook_t_interval():
    """One parameter, r = x - y: the jackknife of a mean of G block means is s / sqrt(G), exactly."""
    windows = some_windows(torch.ones(80, 4, 1, dtype=torch.float64), runs=1)
    windows = solved(windows)
    answer = jackknife(windows, level=0.95)
    blocks = answer.blocks
    assert torch.bincount(blocks.index).unique().numel() == 1
    means = torch.stack([windows.residual[blocks.index == g].mean() for g in range(blocks.count)])
    std = means.std() / math.sqrt(blocks.count)
    assert answer.std[0] == pytest.approx(float(std), rel=1e-12)
    assert answer.half_width[0] == pytest.approx(float(student.ppf(0.975, blocks.count - 1) * std), rel=1e-12)


def test_covariance_under_block_noise_matches_the_closed_form():
    """r = J x + c_g + white noise, c_g shared by a block: cov = (J'J)^-1 J' Sigma J (J'J)^-1.

    300 draws, 15 blocks: a variance estimate scatters by sqrt(2/14) = 0.38 per draw, 0.022 in the mean; the jackknife
    is biased upwards by about the leverage 1/15 per parameter. So the mean must lie within 0.93 .. 1.3 (3 standard
    errors below 1; above, the bias and 6).
    """
    g = torch.Generator().manual_seed(3)
    windows = some_windows(0.3 + torch.randn(120, 4, 2, generator=g, dtype=torch.float64), runs=1)
    blocks = make_blocks(windows)
    J = windows.jacobian.flatten(0, 1)
    same = blocks.index.repeat_interleave(4)
    sigma = (same.unsqueeze(0) == same.unsqueeze(1)).double() + 0.25 * torch.eye(len(J), dtype=torch.float64)
    inverse = torch.linalg.inv(J.mT @ J)
    exact = inverse @ J.mT @ sigma @ J @ inverse
    ratios, naive = [], []
    for _ in range(300):
        shared = torch.randn(blocks.count, generator=g, dtype=torch.float64)[blocks.index].unsqueeze(1)
        noise = shared + 0.5 * torch.randn(120, 4, generator=g, dtype=torch.float64)
        fitted = solved(replace(windows, residual=noise))
        ratios.append(jackknife(fitted).covariance.diagonal() / exact.diagonal())
        naive.append(fitted.residual.var() * inverse.diagonal() / exact.diagonal())
    mean = torch.stack(ratios).mean(0)
    assert (mean > 0.93).all()
    assert (mean < 1.3).all()
    assert (torch.stack(naive).mean(0) < 0.6).all()  # what J'J would claim


def decay_problem(seed):
    """Robust fit of x0 exp(-rate t), scipy's soft-L1: returns the fit function and its data, 15 windows of 8 rows."""
    g = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 3, 8, dtype=torch.float64).expand(60, -1)
    gain = 1 + torch.rand(60, 1, generator=g, dtype=torch.float64)
    y = gain * 2.0 * torch.exp(-0.7 * time) + 0.1 * torch.randn(60, 8, generator=g, dtype=torch.float64)
    y = y + 0.1 * torch.randn(15, 1, generator=g, dtype=torch.float64).repeat_interleave(4, 0)

    def residual(x, keep):
        model = gain * x[0] * torch.exp(-x[1] * time)
        return (model - y)[keep]

    def refit(keep):
        answer = least_squares(
            lambda x: residual(x, keep).flatten().numpy(), [1.0, 1.0], loss="soft_l1", f_scale=0.1, xtol=1e-12
        )
        return torch.tensor(answer.x)

    return residual, refit


def test_nonlinear_robust_jackknife_is_close_to_actual_refits():
    """One Newton step leaves a second-order error: the shifts are small, so 10 % of the standard error is ample."""
    residual, refit = decay_problem(0)
    everything = torch.ones(60, dtype=torch.bool)
    x = refit(everything)
    J = torch.func.jacfwd(lambda x: residual(x, everything))(x)
    r = residual(x, everything)
    start = torch.arange(60).double() * 0.5
    windows = Linearization(J, r, soft_l1_weights(r, 0.1), torch.zeros(60, dtype=torch.long), start, 0.5)
    answer = jackknife(windows)
    blocks = answer.blocks
    refits = torch.stack([refit(blocks.index != g) - x for g in range(blocks.count)])
    factor = (blocks.count - 1) / blocks.count
    exact = factor * refits.mT @ refits
    torch.testing.assert_close(answer.std, exact.diagonal().sqrt(), rtol=0.1, atol=0)
    torch.testing.assert_close(correlation(answer.covariance), correlation(exact), rtol=0, atol=0.1)


def test_intervals_cover_under_correlated_noise():
    """AR(1) disturbance with a memory of 0.3 s, 60 windows 0.25 s apart, 3 parameters: 90 % intervals, 400 draws.

    1200 intervals; those of one draw are correlated, so count 400 independent ones: standard error 1.5 %. The band
    85 .. 95 % is then 3.3 standard errors wide on each side: false alarm below 0.1 %, seed fixed.
    """
    g = torch.Generator().manual_seed(11)
    W, R, draws = 60, 5, 400
    hits = 0
    time = torch.arange(W, dtype=torch.float64).unsqueeze(1) * 0.25 + torch.linspace(0.1, 0.5, R, dtype=torch.float64)
    lags = (time.flatten().unsqueeze(0) - time.flatten().unsqueeze(1)).abs()
    root = torch.linalg.cholesky(torch.exp(-lags / 0.3) + 1e-9 * torch.eye(W * R, dtype=torch.float64))
    J = torch.stack([torch.ones_like(time), torch.sin(time), torch.cos(2.3 * time)], -1)
    for _ in range(draws):
        noise = (root @ torch.randn(W * R, generator=g, dtype=torch.float64)).reshape(W, R)
        windows = some_windows(J, noise, runs=1)
        step = least_squares_residual(windows)
        answer = jackknife(replace(windows, residual=noise + J @ step))
        hits += int((step.abs() <= answer.half_width).sum())
    assert 0.85 <= hits / (3 * draws) <= 0.95


def test_a_parameter_held_by_its_prior_alone_has_the_prior_interval():
    windows = some_windows()
    J = windows.jacobian.clone()
    J[..., 2] = 0.0
    precision = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64)
    windows = solved(replace(windows, jacobian=J))
    answer = jackknife(windows, prior_precision=precision)
    assert answer.std[2] == pytest.approx(0.5, rel=1e-12)
    assert not answer.open.any()
    # a loss in other units: the precision in the loss is 4, the claimed deviation 0.1 of the parameter
    answer = jackknife(windows, prior_precision=precision, prior_std=torch.full((3,), 0.1, dtype=torch.float64))
    assert answer.std[2] == pytest.approx(0.1, rel=1e-12)


def test_a_weak_prior_leaves_well_measured_parameters_alone():
    windows = solved(some_windows())
    plain = jackknife(windows)
    weak = jackknife(windows, prior_precision=torch.full((3,), 1e-6, dtype=torch.float64))
    torch.testing.assert_close(weak.std, plain.std, rtol=1e-6, atol=0)


def test_directions_that_nothing_fixes_are_open_and_the_rest_is_untouched():
    windows = solved(some_windows(P=2))
    J = windows.jacobian
    wide = replace(windows, jacobian=torch.cat([J, J[..., 1:] * 0, J[..., 1:]], -1))  # a dead column, a copy of x1
    answer = jackknife(wide)
    assert answer.open.tolist() == [False, True, True, True]
    assert answer.std[0] == pytest.approx(float(jackknife(windows).std[0]), rel=1e-9)
    assert torch.isinf(answer.half_width[1:]).all()


def test_a_parameter_seen_in_one_block_only_is_open():
    windows = some_windows()
    J = windows.jacobian.clone()
    J[:, :, 2] = 0
    J[7, :, 2] = 1
    answer = jackknife(solved(replace(windows, jacobian=J)))
    assert answer.open.tolist() == [False, False, True]


def test_held_parameters_stay_while_blocks_are_deleted():
    windows = solved(some_windows())
    held = torch.tensor([False, True, False])
    answer = jackknife(windows, held=held)
    others = replace(windows, jacobian=windows.jacobian[..., [0, 2]])
    torch.testing.assert_close(answer.std[[0, 2]], jackknife(others).std)
    torch.testing.assert_close(answer.std[1], jackknife(windows).std[1])
    assert answer.covariance[1, 0] == 0


def test_units_and_order_of_windows_do_not_matter():
    windows = solved(some_windows())
    plain = jackknife(windows)
    scale = torch.tensor([1e-6, 1.0, 1e5], dtype=torch.float64)
    scaled = jackknife(replace(windows, jacobian=windows.jacobian * scale))
    torch.testing.assert_close(scaled.std * scale, plain.std, rtol=1e-9, atol=0)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    fields = {name: getattr(windows, name)[order] for name in ("jacobian", "residual", "weights", "run", "start")}
    torch.testing.assert_close(jackknife(replace(windows, **fields)).std, plain.std, rtol=1e-9, atol=0)


def test_blocks_lie_within_runs_and_are_four_windows_long():
    windows = some_windows(W=160, runs=2, horizon=0.75)  # 20 s each: 3 s blocks
    blocks = make_blocks(windows)
    assert blocks.seconds == 3.0
    assert blocks.count == 14  # round(20.5 / 3) per run
    assert not set(blocks.index[:80].tolist()) & set(blocks.index[80:].tolist())
    assert blocks.notes == ()
    assert torch.bincount(blocks.index).min() >= 11  # 80 starts in 7 blocks


def test_short_logs_get_shorter_blocks_and_a_note():
    windows = some_windows(W=24, runs=1)  # 6 s
    blocks = make_blocks(windows)
    assert blocks.count >= 6
    assert blocks.seconds < 2.0
    assert "short log" in blocks.notes[0]


def test_too_few_windows_leave_everything_open():
    windows = some_windows(W=3, runs=1)
    answer = jackknife(windows)
    assert "only 3 blocks" in answer.notes[0]
    single = jackknife(some_windows(W=1, runs=1))
    assert single.open.all()
    assert torch.isinf(single.half_width).all()


def test_a_block_that_amplifies_everything_is_named():
    windows = some_windows()
    J = windows.jacobian.clone()
    J[75] *= 1e3
    answer = jackknife(replace(windows, jacobian=J))
    assert "from one block (from 3.75 s of run 1): the model is near an instability" in answer.notes[0]
    zeros = (windows.run.unsqueeze(1) == torch.arange(2)).double().unsqueeze(1).expand(-1, 5, -1)
    assert jackknife(replace(windows, jacobian=zeros)).notes == ()  # each column belongs to a run of its own


def test_soft_l1_weights():
    r = torch.tensor([0.0, 0.02, -0.06], dtype=torch.float64)
    torch.testing.assert_close(soft_l1_weights(r, 0.02), 1 / torch.sqrt(1 + torch.tensor([0.0, 1.0, 9.0]).double()))
    assert (soft_l1_weights(r, None) == 1).all()


def test_correlation_of_a_parameter_without_variance_is_zero():
    covariance = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(correlation(covariance), expected)


def _nan_in_window_5() -> torch.Tensor:
    J = torch.ones(120, 5, 3, dtype=torch.float64)
    J[5, 0, 0] = math.nan
    return J


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"jacobian": torch.ones(120, 5)}, {}, "must be \\[windows, rows, parameters\\]"),
        ({"residual": torch.ones(120, 4)}, {}, "residual has shape \\(120, 4\\)"),
        ({"run": torch.zeros(3)}, {}, "run has shape \\(3,\\)"),
        ({"jacobian": _nan_in_window_5()}, {}, "jacobian is not finite in 1 of 120 windows \\(first: window 5\\)"),
        ({"horizon": 0.0}, {}, "horizon must be positive"),
        ({}, {"level": 1.0}, "level must lie between 0 and 1"),
        ({}, {"prior_precision": torch.ones(2)}, "prior_precision has shape \\(2,\\)"),
        ({}, {"held": torch.ones(2, dtype=torch.bool)}, "held has shape \\(2,\\)"),
        ({}, {"block_seconds": 0.0}, "block length must be positive"),
    ],
)
def test_bad_input_is_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        jackknife(replace(some_windows(), **change), **options)
