"""Kernels of finite problems estimated from transitions, for the linear solves of `boltzmann_tables.py`.

Tabular least-squares temporal differences *are* the linear solve with the empirical kernel; so is the outer sum over
the batch when it is replaced by the discounted visits of that kernel, which is what makes short batches usable. Where
theta does not enter the kernel, counts are kept over iterations. What is known of the follower sharpens it: with soft
values V_F and policy pi known, so is `gamma P(. | s, a) V_F = V_F + lambda log pi - r_F`, and `tilted_transition` gives
each row the nearest (relative entropy) distribution for which that holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transition_counts(
    states: Tensor, actions: Tensor, next_states: Tensor, ended: Tensor, *, shape: tuple[int, int]
) -> Tensor:
    """`[S, A, S + 1]` of indices `[N]`, the last column for transitions that `ended [N]`; add counts to keep them.

    Raises `ValueError` for indices outside `shape` (S, A).
    """
    size, moves = shape
    for name, index, bound in (("states", states, size), ("actions", actions, moves)):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= bound):
            raise ValueError(f"{name} must lie in [0, {bound}), got {int(index.min())} to {int(index.max())}")
    after = torch.where(ended, torch.full_like(next_states, size), next_states)
    if after.numel() and (int(after.min()) < 0 or int(after.max()) > size):
        raise ValueError(f"next_states must lie in [0, {size}) where the episode goes on, got {int(after.max())}")
    flat = (states * moves + actions) * (size + 1) + after
    return torch.bincount(flat, minlength=size * moves * (size + 1)).reshape(size, moves, size + 1).double()


def empirical_transition(counts: Tensor) -> Tensor:
    """`[S, A, S]` from `counts [S, A, S + 1]`; rows sum to less than 1 where episodes ended.

    Each pair gets one pseudo-count, spread like all transitions from its state; a state never left is taken to hold.
    """
    size = len(counts)
    hold = 0.5 * torch.eye(size, size + 1, dtype=counts.dtype, device=counts.device)
    pooled = counts.sum(1) + hold
    prior = pooled / pooled.sum(-1, keepdim=True)
    return ((counts + prior.unsqueeze(1)) / (counts.sum(-1, keepdim=True) + 1))[..., :size]


def tilted_transition(
    transition: Tensor,
    policy: Tensor,
    soft_value: Tensor,
    follower_reward: Tensor,
    *,
    temperature: float,
    discount: float,
    steps: int = 60,
) -> Tensor:
    """`transition [S, A, S]` with each row tilted by `exp(k V_F)` until `gamma P V_F` is what the follower says it is.

    `policy [S, A]`, `soft_value [S]` and `follower_reward [S, A]` are the follower's; k by bisection, `steps` halvings.
    Rows whose support cannot reach that value, or that hold no mass, stay as they are.
    Raises `ValueError` for shapes that do not fit, or a discount outside (0, 1).
    """
    if not 0 < discount < 1:
        raise ValueError(f"discount must lie in (0, 1), got {discount}")
    if soft_value.shape != transition.shape[2:]:
        raise ValueError(f"soft_value must be {tuple(transition.shape[2:])}, got {tuple(soft_value.shape)}")
    if transition.shape[:2] != policy.shape or follower_reward.shape != policy.shape:
        raise ValueError(
            f"transition {tuple(transition.shape)}, policy {tuple(policy.shape)} and follower_reward "
            f"{tuple(follower_reward.shape)} must be [S, A, S], [S, A] and [S, A]"
        )
    wanted = (soft_value.unsqueeze(-1) + temperature * policy.clamp(min=1e-300).log() - follower_reward) / discount
    mass = transition.sum(-1, keepdim=True)
    rows = (transition / mass.clamp(min=1e-12)).flatten(0, 1)
    wanted = (wanted / mass.squeeze(-1).clamp(min=1e-12)).flatten()
    seen = rows > 0
    infinite = torch.full_like(rows, torch.inf)
    low = torch.where(seen, soft_value, infinite).amin(-1)
    high = torch.where(seen, soft_value, -infinite).amax(-1)
    width = high - low
    todo = (width > 1e-12) & (wanted > low + 1e-9 * width) & (wanted < high - 1e-9 * width)
    todo &= (mass.flatten() > 1e-12) & (policy.flatten() > 1e-250)
    rows, seen, wanted, low, width = rows[todo], seen[todo], wanted[todo], low[todo], width[todo]
    z = (soft_value - low.unsqueeze(-1)) / width.unsqueeze(-1)  # in [0, 1] on the support
    target = (wanted - low) / width
    log_rows = torch.where(seen, rows, torch.ones_like(rows)).log()
    log_rows = torch.where(seen, log_rows, torch.full_like(rows, -torch.inf))
    left, right = torch.full_like(target, -200.0), torch.full_like(target, 200.0)
    tilted = rows
    for _ in range(steps):
        middle = 0.5 * (left + right)
        tilted = torch.softmax(log_rows + middle.unsqueeze(-1) * torch.where(seen, z, 0.0), -1)
        below = (tilted * torch.where(seen, z, 0.0)).sum(-1) < target
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    answer = (transition / mass.clamp(min=1e-12)).flatten(0, 1).clone()
    answer[todo] = tilted
    return answer.reshape(transition.shape) * mass
