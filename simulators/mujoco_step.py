"""One control step of a MuJoCo system: delayed commands, engine steps, and what keeps long gradients in bounds.

A control acts `delay` = (n + f) h seconds late. In engine step j it is (1 - f) c_{j-n} + f c_{j-n-1}, where c_i is the
command held in engine step i: the mean of the delayed command over that step. It is piecewise linear in the delay,
which is therefore a parameter like another.

Truncation cuts the state from its past every so many control steps. A `GradientGuard` bounds the cotangent of each
environment's state in reverse mode and counts where it did; forward mode passes it unchanged.
Reference: Xu et al., Accelerated Policy Learning with Parallel Differentiable Simulation, ICLR 2022 (short horizons).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mujoco
import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals, saved
from sim2real.params import Params
from sim2real.simulators.mujoco_parameters import DELAY
from sim2real.simulators.mujoco_system import MujocoSystem, State, advance, split_state


@dataclass(frozen=True, eq=False)
class GradientGuard:
    """Bound on the norm of the cotangent of each environment's state, at every control step of a reverse pass."""

    bound: float
    mode: Literal["scale", "drop"] = "scale"
    """above the bound (or not finite): scale to the bound, or drop"""
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.long))
    """(cotangents seen, cotangents bounded): written by the reverse passes; zero it to count anew"""

    def __post_init__(self) -> None:
        if not self.bound > 0.0:
            raise ValueError(f"the bound of a gradient guard must be positive, got {self.bound}")
        if self.mode not in ("scale", "drop"):
            raise ValueError(f"the mode of a gradient guard must be 'scale' or 'drop', got {self.mode!r}")


@dataclass(frozen=True, eq=False)
class StepSettings:
    """How engine steps make a control step."""

    fields: Callable[[Params], Mapping[str, Tensor]]
    frame_skip: int = 1
    delay: float = 0.0
    """s, where theta has no "delay\""""
    commands: int = 0
    """control steps whose commands may be under way"""
    force_std: Tensor | None = None
    """`[nv]` of the generalised force"""
    truncation: int | None = None
    guard: GradientGuard | None = None


def control_step(
    system: MujocoSystem, settings: StepSettings, theta: Params, state: Tensor, action: Tensor, e: Tensor
) -> Tensor:
    """s' `[B, n]` of s, a `[B, nu]` and e: states are (qpos, qvel, act, commands under way, number of steps)."""
    s = to_engine(state)
    if settings.guard is not None:
        s = _Guarded.apply(settings.guard, s)
    if settings.truncation is not None:
        steps = s[..., -1:]
        s = torch.where((steps > 0.0) & (steps % settings.truncation == 0.0), s.detach(), s)
    inputs = engine_inputs(system, settings, theta, s, to_engine(action), to_engine(e))
    now = inputs.state
    for control in inputs.controls:
        now = advance(system, inputs.fields, now, control, inputs.force)
    count = [] if settings.truncation is None else [s[..., -1:] + 1.0]
    return torch.cat([*now, inputs.pending, *count], -1).to(state)


@dataclass(frozen=True, eq=False)
class EngineInputs:
    """What the engine steps of one control step are given."""

    state: State
    fields: Mapping[str, Tensor]
    controls: list[Tensor]
    """one `[B, nu]` for each engine step"""
    force: Tensor
    pending: Tensor
    """`[B, commands nu]` the commands under way afterwards"""


def engine_inputs(
    system: MujocoSystem, settings: StepSettings, theta: Params, s: Tensor, a: Tensor, e: Tensor
) -> EngineInputs:
    """Split a state (float64, on the CPU) and find the controls that act."""
    model = system.structure.model
    first, last = _pending(model, settings)
    theta = {key: to_engine(value) for key, value in theta.items()}
    state = split_state(model, s)
    force = torch.zeros_like(state[1])
    if settings.force_std is not None:
        force = settings.force_std * e[..., : model.nv]
    known = torch.cat([s[..., first:last].unflatten(-1, (settings.commands, model.nu)), a.unsqueeze(-2)], -2)
    controls = _controls(theta, known, settings, float(model.opt.timestep))
    return EngineInputs(state, settings.fields(theta), controls, force, known[..., 1:, :].flatten(-2))


def engine_roll(
    system: MujocoSystem, settings: StepSettings, theta: Params, start: Tensor, actions: Tensor, noise: Tensor
) -> Tensor | None:
    """States `[B, T+1, n]` of `control_step` T times, without derivatives, in one call of the engine.

    None where the engine complained: the chained steps then say of what.
    """
    model = system.structure.model
    theta = {key: to_engine(value) for key, value in theta.items()}
    s, a = to_engine(start), to_engine(actions)
    size = max(len(s), len(a))
    first, last = _pending(model, settings)
    before = s[:, first:last].unflatten(-1, (settings.commands, model.nu))
    sequence = torch.cat([before.expand(size, -1, -1), a.expand(size, -1, -1)], 1)
    windows = sequence.unfold(1, settings.commands + 1, 1).transpose(2, 3)  # [B, T, commands + 1, nu]
    steps = windows.shape[1]
    each = {k: v.repeat_interleave(steps, 0) if k == DELAY and v.ndim else v for k, v in theta.items()}
    controls = torch.stack(_controls(each, windows.flatten(0, 1), settings, float(model.opt.timestep)), 1)
    controls = controls.reshape(size, steps * settings.frame_skip, model.nu)
    force = torch.zeros(size, steps, model.nv, dtype=torch.float64)
    if settings.force_std is not None:
        force = settings.force_std * to_engine(noise)[..., : model.nv].expand(size, -1, -1)
    found = system.roll(
        split_state(model, s), controls, force.repeat_interleave(settings.frame_skip, 1), settings.fields(theta)
    )
    if found is None:
        return None
    states, residual = found
    system.check(residual)
    parts = [states[:, settings.frame_skip - 1 :: settings.frame_skip], windows[:, :, 1:].flatten(2)]
    if settings.truncation is not None:
        parts.append((s[:, None, -1:] + torch.arange(1.0, steps + 1.0, dtype=s.dtype)[:, None]).expand(size, -1, -1))
    return torch.cat([s.expand(size, -1).unsqueeze(1), torch.cat(parts, -1)], 1).to(start)


def to_engine(tensor: Tensor) -> Tensor:
    """In the precision and on the device of the engine."""
    return tensor.to(device="cpu", dtype=torch.float64)


def _pending(model: mujoco.MjModel, settings: StepSettings) -> tuple[int, int]:
    """First and last column of the commands under way."""
    first = model.nq + model.nv + model.na
    return first, first + settings.commands * model.nu


def _controls(theta: Params, known: Tensor, settings: StepSettings, time_step: float) -> list[Tensor]:
    """The control of every engine step; known `[B, commands + 1, nu]`, the oldest first, the new one last."""
    if DELAY in theta:
        _check_delay(theta[DELAY], settings.commands * settings.frame_skip * time_step)
    if not settings.commands:
        return [known[..., -1, :]] * settings.frame_skip
    delay = theta.get(DELAY, torch.tensor(settings.delay, dtype=torch.float64))
    lag = (delay / time_step).reshape(-1, 1, 1)
    whole = lag.detach().floor()
    controls = []
    for j in range(settings.frame_skip):
        late, later = (_command(known, j - whole - k, settings.frame_skip) for k in (0, 1))
        controls.append((late + (lag - whole) * (later - late))[:, 0])
    return controls


def _check_delay(delay: Tensor, longest: float) -> None:
    """Raise `ValueError` for a delay beyond the commands under way, whose derivative would be a silent zero.

    Only plain tensors have values to look at, those inside a transform of `torch.func` do not.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(delay):
        return
    low, high = float(delay.detach().min()), float(delay.detach().max())
    if not (low >= 0.0 and high <= longest * (1.0 + 1e-9)):
        raise ValueError(
            f"theta's 'delay' is {low if low < 0.0 else high:.6g} s, but commands are kept from 0 to {longest:.6g} s: "
            "project theta on the model's box, or give the delay a wider one"
        )


def _command(known: Tensor, engine_step: Tensor, frame_skip: int) -> Tensor:
    """The command held in an engine step counted from the start of this control step; before the oldest, the oldest."""
    last = known.shape[1] - 1
    index = (last + torch.div(engine_step, frame_skip, rounding_mode="floor")).clamp(0, last).long()
    return known.gather(1, index.expand(known.shape[0], 1, known.shape[2]))


def commands_under_way(longest: float, frame_skip: int, time_step: float) -> int:
    """Control steps whose commands a delay of up to `longest` s can need."""
    return math.ceil(longest / (frame_skip * time_step) - 1e-9)


class _Guarded(torch.autograd.Function):
    """The identity; its cotangent goes through `_Bounded`."""

    @staticmethod
    def forward(guard: GradientGuard, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.guard = inputs[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, _Bounded.apply(ctx.guard, cotangent)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], guard: GradientGuard, state: Tensor) -> tuple[Tensor, int]:
        return _Guarded.apply(guard, state), in_dims[1]


class _Bounded(torch.autograd.Function):
    """The bounded cotangent; linear in it for the factor it got."""

    @staticmethod
    def forward(guard: GradientGuard, cotangent: Tensor) -> Tensor:
        factor = _factor(guard, cotangent)
        guard.counts.add_(torch.tensor([factor.numel(), int((factor < 1.0).sum())]))
        return _scaled(cotangent, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.guard = inputs[0]
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[None, Tensor]:
        return None, _scaled(u, _factor(ctx.guard, saved(ctx)[0].detach()))

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _scaled(tangent, _factor(ctx.guard, primals(ctx)[0].detach()))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], guard: GradientGuard, cotangent: Tensor) -> tuple[Tensor, int]:
        return _Bounded.apply(guard, cotangent.movedim(in_dims[1], 0)), 0


def _factor(guard: GradientGuard, cotangent: Tensor) -> Tensor:
    """`[..., 1]` in [0, 1]: 1 where the norm is within the bound, 0 where it is not finite."""
    norm = cotangent.norm(dim=-1, keepdim=True)
    above = torch.zeros_like(norm) if guard.mode == "drop" else guard.bound / norm.clamp(min=guard.bound)
    bounded = torch.where(norm <= guard.bound, torch.ones_like(norm), above)
    return torch.where(torch.isfinite(norm), bounded, torch.zeros_like(norm))


def _scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    return torch.where(factor > 0.0, tensor * factor, torch.zeros_like(tensor))
