"""The identifiability spectrum against planted null spaces and hand-made Jacobians."""

import math

import torch

from sim2real.identifiability import describe, identifiability
from sim2real.intervals import Linearization


def windows_of(J, r=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    W, R, _ = J.shape
    r = 0.1 * torch.randn(W, R, generator=g, dtype=torch.float64) if r is None else r
    return Linearization(
        J, r, torch.ones_like(r), torch.zeros(W, dtype=torch.long), torch.arange(W).double() * 0.25, 0.5
    )


def random_jacobian(P, W=100, R=6, seed=1):
    return torch.randn(W, R, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_planted_difference_is_named():
    J = random_jacobian(2)
    J = torch.stack([J[..., 0], J[..., 0], J[..., 1]], -1)  # only m1 + m2 reaches the output
    found = identifiability(windows_of(J), ("m1", "m2", "b"), torch.ones(3, dtype=torch.float64))
    assert [describe(d) for d in found.directions] in (["0.71 m1 - 0.71 m2"], ["0.71 m2 - 0.71 m1"])
    assert found.identified.tolist() == [False, False, True]
    assert found.reaches_output.all()
    assert found.fixed.tolist() == [True, True, False]
    assert math.isinf(found.half_width[2])


def test_spectrum_is_that_of_the_scaled_normal_matrix():
    J = random_jacobian(4)
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)
    found = identifiability(windows_of(J), "abcd", scale)
    K = J.flatten(0, 1) * scale
    torch.testing.assert_close(found.spectrum, torch.linalg.eigvalsh(K.mT @ K).flip(0), rtol=1e-10, atol=0)
