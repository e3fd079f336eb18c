"""Small logs simulated by a model, for the tests of windows, evaluation and fit."""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real import ModelMDP, Params, RolloutLog


def smooth_inputs(runs: int, steps: int, inputs: int, dt: float, seed: int) -> Tensor:
    """Sums of sines `[runs, steps, inputs]` of size about 1."""
    generator = torch.Generator().manual_seed(seed)
    frequency, phase = torch.rand(2, runs, 1, inputs, 4, generator=generator, dtype=torch.float64)
    time = torch.arange(steps, dtype=torch.float64).view(1, -1, 1, 1) * dt
    return torch.sin(6.3 * ((0.3 + 1.5 * frequency) * time + phase)).sum(-1) / 2


def simulated_log(
    mdp: ModelMDP, theta: Params, start: Tensor, actions: Tensor, exogenous: Tensor | None = None, noise: float = 0.0
) -> RolloutLog:
    """The model's own states as signals: start `[B, n]`, actions `[B, T, m]`, recorded at the grid."""
    e = actions[..., :0] if exogenous is None else exogenous
    path = [start]
    for action, column in zip(actions.unbind(1), e.unbind(1), strict=True):
        path.append(mdp.step(theta, path[-1], action, column))
    states = torch.stack(path, 1)
    signals = states if mdp.observe is None else mdp.observe(theta, states)
    generator = torch.Generator().manual_seed(0)
    signals = signals + noise * torch.randn(signals.shape, generator=generator, dtype=signals.dtype)
    runs, steps, _ = actions.shape
    names = {kind: mdp.names.get(kind, ()) for kind in ("action", "exogenous")}
    return RolloutLog(
        signals=signals,
        actions=actions,
        exogenous=exogenous,
        mask=torch.ones(runs, steps, dtype=torch.bool),
        dt=mdp.dt,
        names=names | {"signal": mdp.names["signal"], "episode": tuple(f"run{k}" for k in range(runs))},
        units=dict(mdp.units),
        source="simulated",
        recorded_actions=tuple((torch.arange(steps, dtype=torch.float64) * mdp.dt, run) for run in actions),
    )
