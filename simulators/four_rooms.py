"""Four Rooms: a leader spends a budget of penalties on cells, a follower walks from the start to the goal around them.

13 x 13 cells, 104 of them free, four moves (up, right, down, left) that walls block and that slip: the move intended
happens with probability `intended`, the others share the rest. Penalties `c_i = -0.2 softmax(logits)_i` for the 104
cells; the last of the 105 logits is budget not spent. Rewards of acting in a cell:

    follower   1 in the goal, where the episode ends and which costs nothing; else c_s,
    leader     1 in the target cell, at every visit; -5 sum_i |c_i| in the goal.

Cells are numbered row by row; state 104 stands for "ended". Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026,
arXiv 2603.14867. The authors plan and report with `intended` 0.56 (`PLANNER`) but sample with 0.67 (`SIMULATOR`); here
one kernel serves for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.leader_task import ConfigurableTables, LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params

PLANNER, SIMULATOR = 0.56, 0.67
BUDGET, PENALTY_PRICE = 0.2, 5.0
MAP = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)
CELLS = tuple((row, column) for row, line in enumerate(MAP) for column, mark in enumerate(line) if mark == ".")
START, GOAL, TARGET = (CELLS.index(cell) for cell in ((4, 1), (1, 9), (8, 4)))
ENDED = len(CELLS)
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def four_rooms_transition(*, intended: float = PLANNER) -> Tensor:
    """`[104, 4, 104]`, zero from the goal, where the episode ends. Raises `ValueError` unless `0 <= intended <= 1`."""
    if not 0.0 <= intended <= 1.0:
        raise ValueError(f"intended must be a probability, got {intended}")
    slip = torch.full((4, 4), (1 - intended) / 3, dtype=torch.float64).fill_diagonal_(intended)
    transition = torch.einsum("ab,sbx->sax", slip, torch.nn.functional.one_hot(_next_cells(), len(CELLS)).double())
    transition[GOAL] = 0.0
    return transition


def four_rooms_penalties(theta: Params) -> Tensor:
    """c `[..., 104]`, all negative, of `theta["logits"] [..., 105]`."""
    return -BUDGET * torch.softmax(theta["logits"], -1)[..., :-1]


def four_rooms_tables(theta: Params, *, transition: Tensor | None = None) -> ConfigurableTables:
    """Rewards and start at theta, differentiable; `transition` is handed on."""
    penalties = four_rooms_penalties(theta)
    cell = torch.arange(len(CELLS), device=penalties.device)
    follower = torch.where(cell == GOAL, penalties.new_ones(()), penalties)
    leader = (cell == TARGET).to(penalties) + PENALTY_PRICE * penalties.sum(-1, keepdim=True) * (cell == GOAL)
    start = (cell == START).to(penalties)
    leader, follower = (reward.unsqueeze(-1).expand(*reward.shape, 4) for reward in (leader, follower))
    return ConfigurableTables(leader, follower, start, transition)


def four_rooms(*, intended: float = PLANNER) -> LeaderTask:
    """State (cell,), action (move,), both indices; theta: logits `[105]`. Both discounts are 0.99.

    Raises `ValueError` unless `0 <= intended <= 1`.
    """
    transition = four_rooms_transition(intended=intended)
    ends = torch.zeros(1, 4, len(CELLS), dtype=torch.float64)
    following = torch.cat([transition, ends])
    following = torch.cat([following, 1 - following.sum(-1, keepdim=True)], -1)
    cumulative = following.cumsum(-1)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_full((len(e0), 1), START)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rows = cumulative.to(state)[_index(state), _index(action)]
        reached = (torch.special.ndtr(e[:, :1]) >= rows).sum(-1, keepdim=True).clamp(max=ENDED)
        return reached.to(state.dtype)

    def log_prob(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return following.to(state)[_index(state), _index(action), _index(after)].log()

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, after: Tensor) -> Tensor:
        return _look_up(four_rooms_tables(theta).follower_reward[..., 0], state)

    def leader_reward(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return _look_up(four_rooms_tables(theta).leader_reward[..., 0], state)

    world = ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(0, 1),
        dt=1.0,
        discount=0.99,
        terminal=lambda theta, state: state[:, 0] == ENDED,
        log_prob=log_prob,
        derivative_order=0,
        names={"state": ("cell",), "action": ("move",)},
        box=Box(default={"logits": torch.zeros(len(CELLS) + 1, dtype=torch.float64)}),
    )
    return LeaderTask(world, leader_reward, discount=0.99)


def _next_cells() -> Tensor:
    """`[104, 4]`: the cell that each move leads to."""
    number = {cell: index for index, cell in enumerate(CELLS)}
    rows = [
        [number.get((row + up, column + right), here) for up, right in _MOVES] for (row, column), here in number.items()
    ]
    return torch.tensor(rows)


def _index(column: Tensor) -> Tensor:
    return column[:, 0].long()


def _look_up(cells: Tensor, state: Tensor) -> Tensor:
    """Values per cell `[104]` or `[B, 104]`, 0 once ended."""
    every = torch.cat([cells, torch.zeros_like(cells[..., :1])], -1).expand(len(state), -1)
    return every.gather(-1, state.long()).squeeze(-1)
