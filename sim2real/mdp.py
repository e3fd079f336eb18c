"""Model MDPs: `s_0 = initial_state(theta, e_0)`, `s_{t+1} = step(theta, s_t, a_t, e_t)`.

All randomness is an argument. `e` has standard normal columns first and, after them, `exogenous_dim` columns of
measured inputs (weather, demand) in physical units, so the same noise gives the same rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.params import Params
from sim2real.policy import Layers, Policy


@dataclass(frozen=True)
class Noise:
    """Randomness of B rollouts over T steps: `initial [B, k0]`, `process [B, T, k]`, `policy [B, T, noise_dim]`."""

    initial: Tensor
    process: Tensor
    policy: Tensor


@dataclass(frozen=True)
class ClosedLoop:
    """An engine's own rollout of a policy that says its layers, for exactly these functions of the model.

    `rollout` takes it where the model still has this step and terminal; rewards are its own where the model still has
    this reward.
    """

    run: Callable[[Params, Params, Layers, Tensor, Noise], tuple[Tensor, Tensor, Tensor, Tensor] | None]
    """theta, nu, layers, s0, noise -> s `[B, T+1, n]`, a `[B, T, m]`, r `[B, T]`, mask `[B, T]`; None: cannot"""
    step: Callable[[Params, Tensor, Tensor, Tensor], Tensor]
    reward: Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]
    terminal: Callable[[Params, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class ForwardSensitivity:
    """An engine's own derivatives of a rollout with respect to shared parameters and the start, for exactly this step.

    A fit takes it where the model still has this step.
    """

    run: Callable[
        [Params, Sequence[str], tuple[Tensor, Tensor, Tensor, Tensor | None], Sequence[int]],
        tuple[Tensor, Tensor] | None,
    ]
    """theta, names of d scalars in it, (s `[T+1, W, n]`, a `[T, W, m]`, e `[T, W, k]`, da `[T, W, m]` or None), rows

    -> `[R, W, n, d (+ 1)]` (the last column along da) and d s / d s_0 `[R, W, n, n]` at those rows; None: cannot
    """
    step: Callable[[Params, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelMDP:
    """A simulator as pure functions of theta. theta values have shape `[...]` (shared) or `[B, ...]` (per environment).

    `names` may hold the keys "state", "action", "signal", "exogenous", each a tuple as long as that vector;
    `units` maps those names to units (SI, angles in rad). `fit` matches them with the columns of a log.
    """

    initial_state: Callable[[Params, Tensor], Tensor]
    """theta, e0 `[B, k0]` -> s `[B, n]`"""
    step: Callable[[Params, Tensor, Tensor, Tensor], Tensor]
    """theta, s `[B, n]`, a `[B, m]`, e `[B, k]` -> s' `[B, n]`"""
    reward: Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]
    """theta, s, a, e, s' -> r `[B]`"""
    noise_dims: tuple[int, int]
    """(k0, k): columns of e_0 and of e, the measured exogenous ones included"""
    dt: float
    """s"""
    discount: float = 1.0
    terminal: Callable[[Params, Tensor], Tensor] | None = None
    """theta, s -> `[B]` bool; later steps are masked and worth 0"""
    observe: Callable[[Params, Tensor], Tensor] | None = None
    """theta, s -> measured signals `[B, p]`; None: all of s"""
    log_prob: Callable[[Params, Tensor, Tensor, Tensor], Tensor] | None = None
    """theta, s, a, s' -> log density of s' `[B]`"""
    open_loop: Callable[[Params, Tensor, Tensor, Tensor], Tensor] | None = None
    """theta, s0, a `[B, T, m]`, e `[B, T, k]` -> s `[B, T+1, n]`, an engine-fused rollout"""
    closed_loop: ClosedLoop | None = None
    """an engine-fused rollout of a linear or layered policy"""
    sensitivity: ForwardSensitivity | None = None
    """engine-fused derivatives of `open_loop`"""
    derivative_order: Literal[0, 1, 2] = 2
    """what `step` can truly give: 0 black box, 1 first order, 2 second order"""
    exogenous_dim: int = 0
    """how many of the last columns of e are measured inputs"""
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    box: Box = field(default_factory=Box)
    """theta's names, bounds, units and design values"""


def sample_noise(
    mdp: ModelMDP,
    policy: Policy,
    batch: int,
    horizon: int,
    generator: torch.Generator | None = None,
    *,
    exogenous: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Noise:
    """Draw standard normal noise once; `exogenous [B, T, exogenous_dim]` (or `[T, ...]`) fills the measured columns.

    Raises `ValueError` when the model has measured inputs and none were given, or their shape is not as stated.
    """
    if batch < 1 or horizon < 1:
        raise ValueError(f"batch and horizon must be at least 1, got batch={batch}, horizon={horizon}")
    device = generator.device if generator is not None else torch.device("cpu")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    initial = normal(batch, mdp.noise_dims[0])
    process = normal(batch, horizon, mdp.noise_dims[1] - mdp.exogenous_dim)
    acting = normal(batch, horizon, policy.noise_dim)
    if mdp.exogenous_dim:
        wanted = (batch, horizon, mdp.exogenous_dim)
        if exogenous is None or exogenous.shape[-2:] != wanted[1:]:
            got = "none" if exogenous is None else str(tuple(exogenous.shape))
            raise ValueError(
                f"the model has measured inputs {mdp.names.get('exogenous', ())}: "
                f"pass exogenous of shape {wanted}, got {got}"
            )
        process = torch.cat([process, exogenous.to(process).expand(wanted)], dim=-1)
    elif exogenous is not None:
        raise ValueError("exogenous was given, but the model declares exogenous_dim = 0")
    return Noise(initial, process, acting)
