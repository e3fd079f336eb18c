"""The delete-one-block jackknife against refits, closed forms and planted noise."""


import torch

from sim2real.intervals import (
    Linearization,
    block_sums,
    deleted_block_shifts,
    make_blocks,
    soft_l1_weights,
)


def line_windows(residual=None, jacobian=None, *, W=120, R=5, P=3, seed=0, runs=2, horizon=0.5, loss_scale=None):
    """W windows of R rows, one start every 0.25 s, split over `runs` runs."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(W, R, P, generator=g, dtype=torch.float64) if jacobian is None else jacobian
    r = torch.randn(W, R, generator=g, dtype=torch.float64) if residual is None else residual
    each = W // runs
    run = torch.arange(W) // each
    start = (torch.arange(W) % each).double() * 0.25
    return Linearization(J, r, soft_l1_weights(r, loss_scale), run, start, horizon)


def solved(windows: Linearization) -> Linearization:
    """The same windows with the residual of the least-squares solution (the model is linear)."""
    J, r = windows.jacobian.flatten(0, 1), windows.residual.flatten()
    fitted = r - J @ torch.linalg.lstsq(J, r.unsqueeze(1)).solution.squeeze(1)
    r = fitted.reshape(windows.residual.shape)
    return Linearization(windows.jacobian, r, torch.ones_like(r), windows.run, windows.start, windows.horizon)


def test_linear_jackknife_is_the_refit_without_the_block():
    windows = solved(line_windows())
    blocks = make_blocks(windows)
    shifts, opened = deleted_block_shifts(*block_sums(windows, blocks), torch.zeros(3, 3, dtype=torch.float64))
    for g in range(blocks.count):
        keep = blocks.index != g
        J, r = windows.jacobian[keep].flatten(0, 1), windows.residual[keep].flatten()
        refit = -torch.linalg.lstsq(J, r.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(shifts[g], refit, rtol=1e-10, atol=1e-12)
    assert not opened.any()
