"""Followers of finite problems: soft value iteration with the model, soft Q-learning from transitions.

Both look for the soft optimum

    Q = r + gamma P V,    V(s) = lambda log sum_a exp(Q(s, a) / lambda),    pi(a | s) = exp((Q - V) / lambda),

the first by Newton steps (soft policy iteration) or, to stop short of it on purpose, by plain sweeps; the second by
temporal differences along recorded transitions. What they return is all that a leader needs of a follower. Rows of P
that sum to less than 1 say that episodes may end there.
References: B. Ziebart, Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal Entropy, 2010;
T. Haarnoja, H. Tang, P. Abbeel and S. Levine, Reinforcement Learning with Deep Energy-Based Policies, 2017.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solve_report import SolveReport, UnconvergedError, UnconvergedWarning


@dataclass(frozen=True)
class SoftFollower:
    """A follower's `policy [S, A]`, soft `value [S]` and `q [S, A]` (reward units)."""

    policy: Tensor
    value: Tensor
    q: Tensor
    report: SolveReport


def soft_value_iteration(
    reward: Tensor,
    transition: Tensor,
    *,
    discount: float,
    temperature: float,
    value: Tensor | None = None,
    sweeps: int | None = None,
    tol: float = 1e-12,
    max_steps: int = 500,
    strict: bool = False,
) -> SoftFollower:
    """The soft optimum of `reward [S, A]`, `transition [S, A, S]`, from `value [S]` (None: 0).

    `sweeps` None: Newton steps until the Bellman residual is below `tol` times `max |V|` (at least 1); an integer: that
    many plain Bellman sweeps before the one that gives q, value and policy, a follower that may stop short. The
    report's residual is in those units. Not differentiable: the leader's gradient needs no derivative of the search.
    Raises `ValueError` for shapes that do not fit, rewards that are not finite, rows of `transition` that sum to more
    than 1, a discount outside [0, 1), a temperature that is not positive and finite, or negative counts. An answer
    short of `tol` warns `UnconvergedWarning` (not under `sweeps`), or raises `UnconvergedError` under `strict=True`.
    """
    _check(reward, transition, discount, temperature)
    if max_steps < 0 or (sweeps is not None and sweeps < 0):
        raise ValueError(f"max_steps and sweeps must be >= 0, got {max_steps} and {sweeps}")
    if value is not None and value.shape != reward.shape[:1]:
        raise ValueError(f"value must be [{len(reward)}], one per state, got {tuple(value.shape)}")
    with torch.no_grad():
        V = reward.new_zeros(len(reward)) if value is None else value
        eye = torch.eye(len(reward), dtype=reward.dtype, device=reward.device)
        for step in range((max_steps if sweeps is None else sweeps) + 1):
            q = reward + discount * transition @ V
            policy = torch.softmax(q / temperature, -1)
            improved = temperature * torch.logsumexp(q / temperature, -1)
            gap = improved - V
            residual = float(gap.abs().max() / improved.abs().max().clamp(min=1.0))
            if sweeps is None and residual <= tol:
                break
            if step == (max_steps if sweeps is None else sweeps):
                break
            if sweeps is None:
                closed = (policy.unsqueeze(1) @ transition).squeeze(1)
                V = V + torch.linalg.solve(eye - discount * closed, gap)
            else:
                V = improved
    converged = residual <= tol
    status = f"the Bellman residual {'reached' if converged else 'did not reach'} tol = {tol:g} in {step} steps"
    if not converged and sweeps is None:
        if strict:
            raise UnconvergedError(f"soft value iteration: {status} (residual {residual:.2e}); raise max_steps")
        warnings.warn(f"soft value iteration: {status} (residual {residual:.2e})", UnconvergedWarning, stacklevel=2)
    return SoftFollower(policy, improved, q, SolveReport(converged, residual, step, status))


def soft_q_learning(
    states: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_states: Tensor,
    ended: Tensor,
    *,
    shape: tuple[int, int],
    discount: float,
    temperature: float,
    q: Tensor | None = None,
    passes: int = 50,
) -> SoftFollower:
    """Soft Q-learning over recorded transitions, indices `[N]` and `ended [N]` bool, for `shape` (S, A).

    `passes` sweeps over the data, in the order given, from `q [S, A]` (None: 0); the step size of a pair is
    1 / (visits of it so far)^0.7. The report's residual is the largest mean temporal difference of a pair seen,
    relative to `max |V|` (at least 1); `converged` says whether it is below 1e-2. Pairs never seen stay as they are.
    Raises `ValueError` for indices outside `shape`, rewards that are not finite, no pass, a discount outside [0, 1) or
    a temperature that is not positive and finite.
    """
    _check_scalars(discount, temperature)
    _check_finite(rewards)
    if passes < 1:
        raise ValueError(f"passes must be >= 1, got {passes}")
    for name, index, size in (
        ("states", states, shape[0]),
        ("actions", actions, shape[1]),
        ("next_states", next_states, shape[0]),
    ):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"{name} must lie in [0, {size}), got {int(index.min())} to {int(index.max())}")
    columns = (states, actions, rewards, next_states, ended)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    first = torch.zeros(shape, dtype=rewards.dtype) if q is None else q
    cells, seen = first.tolist(), [[0] * shape[1] for _ in range(shape[0])]
    values = [_soft_maximum(cell, temperature) for cell in cells]
    for _ in range(passes):
        for s, a, r, after, end in rows:  # in plain numbers: tensors of one element cost a hundred times as much
            seen[s][a] += 1
            target = r if end else r + discount * values[after]
            cells[s][a] += (target - cells[s][a]) / seen[s][a] ** 0.7
            values[s] = _soft_maximum(cells[s], temperature)
    table, value = first.new_tensor(cells), first.new_tensor(values)
    gap = (
        rewards + discount * torch.where(ended, torch.zeros_like(rewards), value[next_states]) - table[states, actions]
    )
    pair = states * shape[1] + actions
    sums = torch.zeros(shape[0] * shape[1], dtype=rewards.dtype).index_add(0, pair, gap)
    count = torch.bincount(pair, minlength=len(sums)).clamp(min=1)
    residual = float((sums / count).abs().max() / value.abs().max().clamp(min=1.0))
    status = f"{passes} passes over {len(rows)} transitions"
    report = SolveReport(residual < 1e-2, residual, passes, status)
    return SoftFollower(torch.softmax(table / temperature, -1), value, table, report)


def _soft_maximum(values: list[float], temperature: float) -> float:
    top = max(values)
    return top + temperature * math.log(sum(math.exp((value - top) / temperature) for value in values))


def _check(reward: Tensor, transition: Tensor, discount: float, temperature: float) -> None:
    _check_scalars(discount, temperature)
    wanted = (*reward.shape, len(reward))
    if reward.ndim != 2 or transition.shape != wanted:
        raise ValueError(
            f"transition must be {wanted} for a reward {tuple(reward.shape)}, got {tuple(transition.shape)}"
        )
    _check_finite(reward)
    if not bool((transition >= 0).all()) or not bool((transition.sum(-1) <= 1 + 1e-6).all()):
        raise ValueError("rows transition[s, a, :] must be >= 0 and sum to 1, or to less where episodes may end")


def _check_finite(rewards: Tensor) -> None:
    wrong = int((~torch.isfinite(rewards)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {rewards.numel()} rewards are not finite; forbid an action by a large negative one"
        )


def _check_scalars(discount: float, temperature: float) -> None:
    if not 0.0 <= discount < 1.0:
        raise ValueError(f"discount must lie in [0, 1), got {discount}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite (reward units), got {temperature}")
