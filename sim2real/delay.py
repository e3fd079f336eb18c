"""Inputs as they acted `delay` seconds after they were recorded: `a_k = mean of u(t - delay) over [T_k, T_{k+1}]`."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sim2real.rollout_log import RolloutLog


def delayed_actions(log: RolloutLog, delay: Tensor) -> Tensor:
    """Step means `[B, T, m]` of the recorded inputs `delay` (scalar, s) earlier, differentiable in `delay`.

    hold="linear": `(u(T_k - delay) + u(T_{k+1} - delay)) / 2` with u linear between its rows; hold="previous": the mean
    of the held input over `[T_k - delay, T_{k+1} - delay]`. Before its first row an input holds that row. At a row the
    derivative is the one towards larger delays. Raises `ValueError` for a log without recorded inputs.
    """
    if delay.ndim != 0:
        raise ValueError(f"delay must be a scalar in s, got shape {tuple(delay.shape)}")
    batch, steps, inputs = log.actions.shape
    if len(log.recorded_actions) != batch:
        raise ValueError(
            f"'{log.source}' has {batch} episodes but recorded inputs of {len(log.recorded_actions)}; "
            "a delay needs `recorded_actions`, which load_log fills"
        )
    # one column of padding more than the longest, so that "the row after" exists for each row
    times = pad(
        pad_sequence([t for t, _ in log.recorded_actions], batch_first=True, padding_value=inf), (0, 1), value=inf
    )
    values = pad(pad_sequence([u for _, u in log.recorded_actions], batch_first=True), (0, 0, 0, 1))
    times, values = times.to(log.actions), values.to(log.actions)
    last = torch.tensor([[len(t) - 1] for t, _ in log.recorded_actions], device=log.actions.device)
    when = (log.dt * torch.arange(steps + 1).to(log.actions) - delay).expand(batch, -1)
    # the row strictly before each instant, so that its slope is the one that a larger delay meets
    row = torch.minimum((torch.searchsorted(times, when.detach().contiguous()) - 1).clamp(min=0), last)
    wide = row[..., None].expand(-1, -1, inputs)
    here, ahead = values.gather(1, wide), (when - times.gather(1, row))[..., None]
    if log.hold == "linear":
        period = (times.gather(1, row + 1) - times.gather(1, row))[..., None]  # inf after the last row: it is held
        at_grid = here + (values.gather(1, wide + 1) - here) * (ahead / period).clamp(0.0, 1.0)
        return 0.5 * (at_grid[:, 1:] + at_grid[:, :-1])
    periods = torch.where(times[:, 1:] < inf, times[:, 1:] - times[:, :-1], 0.0)
    area = torch.cat([values.new_zeros(batch, 1, inputs), (values[:, :-1] * periods[..., None]).cumsum(1)], dim=1)
    integral = area.gather(1, wide) + here * ahead
    return (integral[:, 1:] - integral[:, :-1]) / log.dt
