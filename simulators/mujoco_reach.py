"""Whether every parameter of a MuJoCo model moves the simulated states at all, before anything is fitted to them.

A parameter whose derivative is exactly zero over a rollout cannot be identified from it: it was misnamed, its element
never acts, or another number overrides it. The check is one reverse pass per random direction, exact, no threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.mujoco_parameters import DELAY, ThetaSpec, target_names
from sim2real.simulators.mujoco_properties import find_property
from sim2real.simulators.mujoco_structure import Structure


class NoEffectError(ValueError):
    """Parameters that do not move the states of a rollout; the message gives the likely reason of each."""


def check_reaches_output(
    mdp: ModelMDP,
    theta: Params,
    state: Tensor,
    actions: Tensor,
    *,
    structure: Structure | None = None,
    spec: ThetaSpec = (),
) -> None:
    """Raise `NoEffectError` if a number in theta has no influence on the states that `actions` lead to from `state`.

    state `[B, n]`, actions `[B, T, m]`, no noise; with `structure` and `spec` (of `field_map`) the error says why an
    element may be without effect. Differences of rollouts would not tell zero from small; derivatives do.
    """
    silent = without_reach(mdp, theta, state, actions)
    if not silent:
        return
    reasons = [f"'{name}' ({_reason(name, structure, spec)})" for name in silent]
    raise NoEffectError(
        f"{len(silent)} numbers in theta do not move any state over {actions.shape[1]} steps: "
        f"{'; '.join(reasons)}. Leave them out, or use actions and starts that excite them"
    )


def without_reach(mdp: ModelMDP, theta: Params, state: Tensor, actions: Tensor) -> list[str]:
    """Names (with the position in a vector) of the numbers in theta whose derivative is zero; see above."""
    if state.ndim != 2 or actions.ndim != 3 or len(state) != len(actions):
        raise ValueError(
            f"state must be [B, n] and actions [B, T, m], got {tuple(state.shape)}, {tuple(actions.shape)}"
        )
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    e, states = state.new_zeros(len(state), mdp.noise_dims[1]), []
    for k in range(actions.shape[1]):
        state = mdp.step(leaves, state, actions[:, k], e)
        states.append(state)
    visited = torch.stack(states, 1)
    generator = torch.Generator().manual_seed(0)
    reached = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in theta.items()}
    for direction in range(2):  # one may be orthogonal to the effect by chance, two are not
        weights = torch.randn(visited.shape, generator=generator, dtype=torch.float64).to(visited)
        output = (visited * weights).sum()
        if not output.requires_grad:
            break
        gradients = torch.autograd.grad(output, list(leaves.values()), retain_graph=direction == 0, allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                reached[name] |= gradient.detach().cpu() != 0
    return [
        name if not moved.ndim else f"{name}[{','.join(map(str, index.tolist()))}]"
        for name, moved in reached.items()
        for index in (~moved).nonzero()
    ]


def _reason(name: str, structure: Structure | None, spec: ThetaSpec) -> str:
    bare = name.partition("[")[0]
    if bare == DELAY:
        return "the commands are constant"
    if structure is None:
        return "its element never acts here"
    targets = target_names(structure.model, spec).get(bare, ())
    rows = [find_property(structure.model, target)[0] for target in targets]
    return rows[0].hint if rows else "no element of the model follows it"
