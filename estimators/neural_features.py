"""Features of the state from networks, for critics whose output layer is solved by least squares.

    phi(s) = (1, s / scale, h(s)),      h the last hidden layer of a smooth network,

of random weights, or trained to predict discounted returns of what was recorded. The benefit is a small difference
across actions that lead to states a few per cent apart, so an error of a per cent of the value swamps it: a network
fitted by gradients alone fails there, its features with an output layer solved exactly do not. Keep features smooth
over the data: `width` is the slope of a unit per standard deviation of the state.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sim2real.estimators.leader_critic import StateFeatures
from sim2real.estimators.transitions import Transitions


def random_features(
    states: Tensor, count: int, generator: torch.Generator, *, width: float = 0.12, scale: Tensor | float | None = None
) -> StateFeatures:
    """1, s / scale and `count` SiLU units `silu(W s / scale + b)`, W ~ N(0, width^2), b uniform in [-2, 2].

    `scale` (units of the state; a number, or `[n]`) None: the root mean square of `states [N, n]`. Raises `ValueError`
    for a width or scale that is not positive.
    """
    size = _scale(states, scale)
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    W = width * torch.randn(count, states.shape[1], generator=generator, dtype=states.dtype)
    b = 4 * torch.rand(count, generator=generator, dtype=states.dtype) - 2

    def features(s: Tensor) -> Tensor:
        x = s / size
        return torch.cat([torch.ones_like(x[:, :1]), x, nn.functional.silu(x @ W.T + b)], -1)

    return features


def trained_features(
    data: Transitions,
    targets: Tensor,
    discount: float,
    generator: torch.Generator,
    *,
    hidden: tuple[int, ...] = (100,),
    width: float = 0.12,
    scale: Tensor | float | None = None,
    row_weights: Tensor | None = None,
    steps: int = 300,
    batch: int = 1024,
    learning_rate: float = 3e-4,
) -> StateFeatures:
    """1, s / scale and the `units` of the last hidden layer of a network trained on returns of `targets [N, k]`.

    Two SiLU layers and k outputs, started as smooth as `random_features`; Adam on minibatches, squared errors of the
    discounted returns to go of each column (rewards of the leader, of the follower), weighted by `row_weights [N]` and
    in units of their own size. Raises `ValueError` for targets that do not fit, a width or scale that is not positive.
    """
    if targets.shape[:1] != data.rewards.shape or targets.ndim != 2:
        raise ValueError(f"targets must be [{len(data.rewards)}, k], got {tuple(targets.shape)}")
    size = _scale(data.states, scale)
    net = _network((data.states.shape[1], *hidden, targets.shape[1]), width, generator, data.states.dtype)
    rows = torch.ones_like(data.rewards) if row_weights is None else row_weights
    returns = returns_to_go(data, targets, discount)
    center = (rows.unsqueeze(-1) * returns).sum(0) / rows.sum()
    spread = ((rows.unsqueeze(-1) * (returns - center).square()).sum(0) / rows.sum()).sqrt()
    wanted, inputs = (returns - center) / spread.clamp(min=1e-12), data.states / size
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        index = torch.randint(len(inputs), (batch,), generator=generator)
        error = (net(inputs[index]) - wanted[index]).square().sum(-1)
        loss = (rows[index] * error).sum() / rows[index].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    body = net[:-1].requires_grad_(False)

    def features(s: Tensor) -> Tensor:
        x = s / size
        return torch.cat([torch.ones_like(x[:, :1]), x, body(x)], -1)

    return features


def returns_to_go(data: Transitions, rewards: Tensor, discount: float) -> Tensor:
    """`sum_{k >= t} discount^(k - t) r_k` to the end of the episode, of `rewards [N, k]` in the order recorded."""
    by_step = rewards.new_zeros(int(data.step.max()) + 1, len(data.initial_states), rewards.shape[1])
    by_step[data.step, data.episode] = rewards
    for k in range(len(by_step) - 2, -1, -1):
        by_step[k] += discount * by_step[k + 1]
    return by_step[data.step, data.episode]


def _scale(states: Tensor, scale: Tensor | float | None) -> Tensor:
    size = states.square().mean(0).sqrt() if scale is None else torch.as_tensor(scale, dtype=states.dtype)
    if not bool((size > 0).all()):
        raise ValueError(f"scale must be positive (units of the state), got {size.tolist()}")
    return size


def _network(sizes: tuple[int, ...], width: float, generator: torch.Generator, dtype: torch.dtype) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs, dtype=dtype)
        with torch.no_grad():
            std = width if i == 0 else inputs**-0.5
            layer.weight.copy_(std * torch.randn(outputs, inputs, generator=generator, dtype=dtype))
            layer.bias.copy_(4 * torch.rand(outputs, generator=generator, dtype=dtype) - 2)
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers[:-1])
