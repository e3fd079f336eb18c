"""The identifiability spectrum against planted null spaces and hand-made Jacobians."""

import math
from dataclasses import replace

import pytest
import torch

from sim2real.bounds import default_params
from sim2real.identifiability import describe, identifiability, parameter_range
from sim2real.intervals import Linearization, jackknife
from sim2real.simulators.double_pendulum import double_pendulum


def some_windows(J, residual=None, seed=0):
    """One run, a window every 0.25 s."""
    g = torch.Generator().manual_seed(seed)
    W, R = J.shape[:2]
    r = 0.1 * torch.randn(W, R, generator=g, dtype=torch.float64) if residual is None else residual
    run = torch.zeros(W, dtype=torch.long)
    return Linearization(J, r, torch.ones_like(r), run, torch.arange(W).double() * 0.25, 0.5)


def random_jacobian(P, W=100, R=6, seed=1):
    return torch.randn(W, R, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(P):
    return torch.ones(P, dtype=torch.float64)


def open_span(found):
    """Orthonormal basis `[P, K]` of the directions that are not fixed."""
    return found.vectors[:, ~found.fixed]


def test_planted_difference_is_named():
    J = random_jacobian(2)[..., [0, 0, 1]]  # only m1 + m2 reaches the output
    found = identifiability(some_windows(J), ("m1", "m2", "b"), ones(3))
    assert [describe(d) for d in found.directions] in (["0.71 m1 - 0.71 m2"], ["0.71 m2 - 0.71 m1"])
    assert found.identified.tolist() == [False, False, True]
    assert found.reaches_output.all()
    assert found.fixed.tolist() == [True, True, False]
    assert math.isinf(found.half_width[2])


def test_spectrum_is_that_of_the_scaled_normal_matrix():
    J = random_jacobian(4)
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)
    found = identifiability(some_windows(J), "abcd", scale)
    K = J.flatten(0, 1) * scale
    torch.testing.assert_close(found.spectrum, torch.linalg.eigvalsh(K.mT @ K).flip(0), rtol=1e-10, atol=0)
    assert found.fixed.all()
    assert found.identified.all()
    assert found.directions == ()


def test_half_widths_are_those_of_the_jackknife():
    windows = some_windows(random_jacobian(3))
    step = torch.linalg.lstsq(windows.jacobian.flatten(0, 1), -windows.residual.flatten().unsqueeze(1)).solution[:, 0]
    windows = replace(windows, residual=windows.residual + windows.jacobian @ step)
    found = identifiability(windows, "abc", ones(3))
    answer = jackknife(windows)
    variance = (found.vectors.mT @ answer.covariance @ found.vectors).diagonal()
    ratio = answer.half_width[0] / answer.std[0]
    torch.testing.assert_close(found.half_width, ratio * variance.sqrt(), rtol=1e-9, atol=0)


def test_nuisance_columns_are_projected_out():
    """Independent answer: the Schur complement of the nuisance block, its prior included."""
    J = random_jacobian(4)
    J[..., 2] = 0.9 * J[..., 0] + 0.1 * J[..., 2]
    precision = torch.tensor([0.0, 0.0, 7.0, 0.0], dtype=torch.float64)
    nuisance = torch.tensor([False, False, True, True])
    found = identifiability(some_windows(J), "abzd", ones(4), nuisance=nuisance, prior_precision=precision)
    A = J.flatten(0, 1).mT @ J.flatten(0, 1) + precision.diag()
    schur = A[:2, :2] - A[:2, 2:] @ torch.linalg.inv(A[2:, 2:]) @ A[2:, :2]
    torch.testing.assert_close(found.spectrum, torch.linalg.eigvalsh(schur).flip(0), rtol=1e-9, atol=0)
    assert found.names == ("a", "b")


def test_a_parameter_confused_with_a_free_zero_is_not_identified():
    J = random_jacobian(2)[..., [0, 1, 1]]
    nuisance = torch.tensor([False, False, True])
    found = identifiability(some_windows(J), ("m", "offset", "zero"), ones(3), nuisance=nuisance)
    assert found.identified.tolist() == [True, False]
    assert [describe(d) for d in found.directions] == ["1.00 offset"]
    J[..., 2] = 0.0  # a dead nuisance column takes nothing away
    assert identifiability(some_windows(J), ("m", "offset", "zero"), ones(3), nuisance=nuisance).identified.all()


def test_a_parameter_that_does_not_reach_the_output_is_named():
    J = random_jacobian(3)
    J[..., 1] = 0.0
    found = identifiability(some_windows(J), ("m", "ghost", "b"), ones(3))
    assert found.reaches_output.tolist() == [True, False, True]
    assert found.identified.tolist() == [True, False, True]
    assert found.directions == ({"ghost": 1.0},)


def test_a_direction_wider_than_its_range_is_not_fixed():
    """Noise 0.1 over 600 rows of unit size: half-width about 1.66 * 0.1 / sqrt(600) = 0.007 per unit of the column."""
    J = random_jacobian(2) * torch.tensor([1.0, 1e-3], dtype=torch.float64)
    wide = identifiability(some_windows(J), ("m", "b"), ones(2))
    assert wide.fixed.tolist() == [True, False]
    assert 3 < wide.half_width[1] < 15
    assert wide.identified.tolist() == [True, False]
    assert identifiability(some_windows(J), ("m", "b"), torch.tensor([1.0, 100.0]).double()).fixed.all()


def test_a_parameter_pulled_along_by_an_open_one_is_not_identified():
    """b is open by some 270 ranges (the direction is all but b alone); m moves by 0.05 of it, 13 of its own ranges."""
    J = random_jacobian(2)
    J[..., 1] = 1e-3 * J[..., 1] - 0.05 * J[..., 0]  # m = 0.05 b leaves the output all but unchanged
    residual = 4 * torch.randn(J.shape[:2], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = identifiability(some_windows(J, residual), ("m", "b"), ones(2))
    assert found.directions[0]["m"] < 0.1
    assert found.identified.tolist() == [False, False]


def test_a_parameter_seen_in_one_block_only_is_not_fixed():
    J = random_jacobian(2)
    J[:, :, 1] = 0.0
    J[10, :, 1] = 1.0
    found = identifiability(some_windows(J), ("m", "b"), ones(2))
    assert found.identified.tolist() == [True, False]


def test_one_window_fixes_nothing():
    assert not identifiability(some_windows(random_jacobian(2, W=1)), "ab", ones(2)).fixed.any()


def base_map(physical):
    """The six functions of the ten physical parameters that the motion depends on, written out by hand."""
    m1, m2, l1, r1, r2, I1, I2, Ir, gr, g = physical
    return torch.stack(
        [
            I1 + I2 + m2 * l1**2 + gr**2 * Ir + Ir,
            I2 - gr * Ir,
            I2 + gr**2 * Ir,
            m2 * r2 * l1,
            m2 * r2 * g,
            (m1 * r1 + m2 * l1) * g,
        ]
    )


def test_null_space_of_the_physical_double_pendulum():
    """Ten physical parameters reach the motion through six functions: four planted directions, all found, none more."""
    mdp = double_pendulum(parameters="physical", dt=0.01)
    names = ("m1", "m2", "l1", "r1", "r2", "I1", "I2", "Ir", "gr", "g")
    theta = default_params(mdp.box)
    g = torch.Generator().manual_seed(5)
    start = torch.randn(60, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1.0, 3.0, 3.0]).double()
    torque = torch.randn(60, 30, 2, generator=g, dtype=torch.float64)

    def angles(x):
        params = theta | dict(zip(names, x.unbind(0), strict=True))
        state, path = start, []
        for action in torch.repeat_interleave(torque[:, ::10], 10, 1).unbind(1):
            state = mdp.step(params, state, action, start.new_zeros(60, 0))
            path.append(state[:, :2])
        return torch.cat(path[4::5], 1)

    x = torch.stack([theta[name] for name in names])
    J = torch.func.jacfwd(angles)(x)
    noise = 0.01 * torch.randn(J.shape[:2], generator=g, dtype=torch.float64)
    limits = [torch.tensor([side[name] for name in names], dtype=torch.float64) for side in (mdp.box.low, mdp.box.high)]
    scale = parameter_range(x, *limits, torch.full_like(x, torch.inf))
    found = identifiability(some_windows(J, noise), names, scale)
    null = torch.linalg.svd(torch.func.jacfwd(base_map)(x) * scale).Vh[6:]
    assert int(torch.isinf(found.half_width).sum()) == 4
    exact = found.vectors[:, torch.isinf(found.half_width)]
    # rounding 1e-16 over the smallest fixed singular value, about 1e-5 of the largest
    torch.testing.assert_close((null @ exact).norm(dim=1), torch.ones(4).double(), rtol=0, atol=1e-8)
    assert found.identified.sum() < 10


def test_identifiable_directions_are_rarely_flagged():
    """Columns 100 times stronger than needed: no false flag in 200 draws of noise (3 x 200 directions)."""
    J = random_jacobian(3)
    assert all(identifiability(some_windows(J, seed=seed), "abc", ones(3)).fixed.all() for seed in range(200))


def test_open_plane_has_a_sparse_basis():
    """m g l: only the product matters, so m/g and m/l trade: two directions of two parameters each."""
    J = random_jacobian(1).expand(-1, -1, 3)
    found = identifiability(some_windows(J), ("m", "g", "l"), ones(3))
    assert len(found.directions) == 2
    assert all(len(direction) == 2 for direction in found.directions)
    for direction in found.directions:
        assert sum(direction.values()) == pytest.approx(0.0, abs=1e-12)
        assert math.hypot(*direction.values()) == pytest.approx(1.0)


def test_describe():
    assert describe({"m1": -0.6, "m2": 0.8}) == "0.80 m2 - 0.60 m1"
    assert describe({"a": -0.02, "b": 0.7, "c": -0.7}) == "0.70 b - 0.70 c"
    assert describe({"m1": -0.8, "m2": -0.6, "b": 0.01}) == "0.80 m1 + 0.60 m2"


def test_range_is_what_is_known_before_the_data():
    """In turn: positive, signed, nearly known, with a prior, positive with a wide prior, unbounded, unbounded at 0."""
    rows = [
        (0.6, 0.01, 10.0, math.inf, 0.6),
        (0.0, -2.0, 2.0, math.inf, 4.0),
        (0.55, 0.5, 0.6, math.inf, 0.1),
        (1.0, 0.0, 10.0, 0.2, 0.2),
        (1.0, 0.1, 10.0, 5.0, 1.0),
        (-3.0, -math.inf, math.inf, math.inf, 3.0),
        (0.0, 0.0, math.inf, math.inf, 1.0),
    ]
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(parameter_range(*columns[:4]), columns[4])


@pytest.mark.parametrize(
    ("names", "scale", "message"),
    [
        ("ab", [1.0, 1.0, 1.0], "3 columns; got 2 names"),
        ("abc", [1.0, 1.0], "3 columns; got 3 names and scale \\(2,\\)"),
        ("abc", [1.0, 0.0, 1.0], "must be positive and finite, got .*'b': 0.0"),
        ("abc", [1.0, math.inf, 1.0], "must be positive and finite"),
    ],
)
def test_bad_input_is_named(names, scale, message):
    with pytest.raises(ValueError, match=message):
        identifiability(some_windows(random_jacobian(3)), names, torch.tensor(scale, dtype=torch.float64))
