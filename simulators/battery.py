"""Battery storage with asymmetric prices and an uncertain net load, as a continuous model and as exact tables.

    s' = s + a + w,   w ~ N(mean, std),
    r(s, a) = -(buy max(a, 0) + sell min(a, 0)) - penalty (max(-s, 0) + max(s - 1, 0)).

State of charge s (1: full), energy bought a per step (negative: sold) and net production w, all as fractions of the
capacity; prices per capacity. A performance-optimal model differs from the most likely one because selling pays half
of what buying costs while running empty or full is dear.

The tables discretise the same problem on 161 charges of [-0.3, 1.3], 51 powers of [-0.25, 0.25] and 61 loads of
[-0.3, 0.3], all multiples of 0.01, the charge clipped to its grid: s + a is one of 211 post-decision states, and a load
distribution is one matrix `[211, 161]`. They go, as plain tensors, into `sim2real.solvers.optimal_values`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

_BOX = Box(
    low={"mean": -0.1, "std": 0.02},
    high={"mean": 0.1, "std": 0.2},
    unit={"mean": "1", "std": "1"},
    default={"mean": 0.0, "std": 0.05},
)


@dataclass(frozen=True)
class BatteryTables:
    """The grid problem: all but the load distribution, which `load_transition` turns into `[..., Y, S]`."""

    charges: Tensor
    """`[S]`"""
    powers: Tensor
    """`[A]`"""
    loads: Tensor
    """`[W]`"""
    reward: Tensor
    """`[S, A]`"""
    post: Tensor
    """`[S, A]` index of the post-decision charge s + a, of Y"""
    start: Tensor
    """`[S]` uniform over the charges in [0, 1]"""


def battery(
    *, buy: float = 1.0, sell: float = 0.5, penalty: float = 10.0, discount: float = 0.98, dt: float = 3600.0
) -> ModelMDP:
    """Battery with a Gaussian net load: state (charge,), action (power,), theta mean and std of the load per step.

    The start charge is uniform on [0, 1]. Raises `ValueError` when selling pays more than buying costs (the optimum
    would be unbounded trade).
    """
    _check_prices(buy, sell, penalty)

    def initial_state(theta: Params, e: Tensor) -> Tensor:
        return torch.special.ndtr(e)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        return state + action + theta["mean"].unsqueeze(-1) + theta["std"].unsqueeze(-1) * e

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return _reward(state, action, buy, sell, penalty).squeeze(-1)

    def log_prob(theta: Params, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        normal = torch.distributions.Normal(theta["mean"].unsqueeze(-1), theta["std"].unsqueeze(-1))
        return normal.log_prob(following - state - action).squeeze(-1)

    return ModelMDP(
        initial_state=initial_state,
        step=step,
        reward=reward,
        noise_dims=(1, 1),
        dt=dt,
        discount=discount,
        log_prob=log_prob,
        names={"state": ("charge",), "action": ("power",), "signal": ("charge",)},
        units={"charge": "1", "power": "1"},
        box=_BOX,
    )


def battery_tables(
    *,
    buy: float = 1.0,
    sell: float = 0.5,
    penalty: float = 10.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> BatteryTables:
    """The grid problem of the module docstring; raises as `battery` does."""
    _check_prices(buy, sell, penalty)

    def hundredths(low: int, high: int) -> Tensor:
        return torch.arange(low, high + 1, dtype=dtype, device=device) / 100

    charges, powers = hundredths(-30, 130), hundredths(-25, 25)
    start = ((charges >= 0) & (charges <= 1)).to(dtype)
    return BatteryTables(
        charges=charges,
        powers=powers,
        loads=hundredths(-30, 30),
        reward=_reward(charges.unsqueeze(-1), powers, buy, sell, penalty),
        post=torch.arange(161, device=device).unsqueeze(-1) + torch.arange(51, device=device),
        start=start / start.sum(),
    )


def gaussian_load(tables: BatteryTables, theta: Params) -> Tensor:
    """Probabilities `[..., W]` of a Gaussian load on the load grid; theta mean, std of shape `[...]`."""
    z = (tables.loads - theta["mean"].unsqueeze(-1)) / theta["std"].unsqueeze(-1)
    return torch.softmax(-0.5 * z * z, -1)


def drift_load(tables: BatteryTables, drift: Tensor) -> Tensor:
    """Probabilities `[..., W]` of a certain load `drift [...]`, split between the two nearest grid points."""
    spacing = tables.loads[1] - tables.loads[0]
    return torch.relu(1 - (tables.loads - drift.unsqueeze(-1)).abs() / spacing)


def mixed_load(tables: BatteryTables) -> Tensor:
    """The real load `[W]`: mostly a small surplus, in one step of five a large draw."""

    def bell(mean: float, std: float) -> Tensor:
        return gaussian_load(tables, {"mean": tables.loads.new_tensor(mean), "std": tables.loads.new_tensor(std)})

    return 0.8 * bell(0.02, 0.03) + 0.2 * bell(-0.15, 0.05)


def load_transition(tables: BatteryTables, load: Tensor) -> Tensor:
    """`[..., Y, S]`: next charge from each post-decision charge under load probabilities `[..., W]`; linear in them."""
    states, posts = len(tables.charges), int(tables.post.max()) + 1
    # the lowest post-decision charge lies 25 points below the charge grid, the lowest load 30 points below zero
    shift = -(len(tables.powers) // 2) - len(tables.loads) // 2
    post = torch.arange(posts, device=load.device).unsqueeze(-1)
    target = (post + torch.arange(load.shape[-1], device=load.device) + shift).clamp(0, states - 1)
    shape = load.shape[:-1] + target.shape
    return load.new_zeros(*shape[:-1], states).scatter_add(-1, target.expand(shape), load.unsqueeze(-2).expand(shape))


def _reward(charge: Tensor, power: Tensor, buy: float, sell: float, penalty: float) -> Tensor:
    energy = buy * torch.relu(power) - sell * torch.relu(-power)
    return -energy - penalty * (torch.relu(-charge) + torch.relu(charge - 1))


def _check_prices(buy: float, sell: float, penalty: float) -> None:
    if not 0.0 <= sell <= buy or penalty <= 0.0:
        raise ValueError(f"prices must satisfy 0 <= sell <= buy and penalty > 0, got {sell}, {buy}, {penalty}")
