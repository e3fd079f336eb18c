"""A model MDP from one step and one reward written in Warp's kernel language, exact to second order.

A step is a plain Python function of vectors; it is read, not run:

    def step(theta, state, action, noise):
        force = action[0] - theta.friction * state[1]
        speed = state[1] + DT * force / theta.mass
        return wp.vector(state[0] + DT * speed, speed)

    def reward(theta, state, action, noise, following):
        return -DT * (following[0] * following[0] + 0.1 * action[0] * action[0])

    box = Box(default={"mass": 1.0, "friction": 0.1})
    mdp = warp_model(step, reward, state=("position", "speed"), action=("force",), box=box, dt=DT)

What they may hold is said in `warp_language`; numbers from outside (`DT`) become constants when the model is made.
The model's functions take torch tensors in float32 or float64, on the CPU or a CUDA device, with theta shared or per
environment, and keep to `autograd` and `torch.func` up to second order (see `outside_program`). As in the torch
simulators, values that are not finite pass through: who asks for a result checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ClosedLoop, ForwardSensitivity, ModelMDP
from sim2real.outside_program import Program, evaluate
from sim2real.params import Params
from sim2real.simulators.warp_closed_loop import KernelSource, closed_loop_run
from sim2real.simulators.warp_language import Argument, Translated, translate
from sim2real.simulators.warp_programs import reward_program, roll_program
from sim2real.simulators.warp_reader import frozen
from sim2real.simulators.warp_sensitivity import Path, roll_sensitivity
from sim2real.simulators.warp_tiles import Tiles, tiles

MODELS = 128
"""of how many models the translated functions are kept; compiled kernels are kept on disk"""
Kernel = Callable[..., Any]
"""a function in Warp's kernel language, or a `wp.func`"""


def warp_model(
    step: Kernel,
    reward: Kernel | None,
    *,
    state: Sequence[str],
    action: Sequence[str],
    dt: float,
    box: Box | None = None,
    parameters: Sequence[str] = (),
    noise: int = 0,
    exogenous: Sequence[str] = (),
    initial_state: Callable[[Params, Tensor], Tensor] | None = None,
    initial_noise: int = 0,
    torch_reward: Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    terminal: Callable[[Params, Tensor], Tensor] | None = None,
    observe: Callable[[Params, Tensor], Tensor] | None = None,
    signal: Sequence[str] | None = None,
    discount: float = 1.0,
    units: dict[str, str] | None = None,
) -> ModelMDP:
    """A `ModelMDP` whose step, rollout and reward are Warp kernels made of two functions.

    `step(theta, state, action, noise)` returns the next state as `wp.vector(...)`; `reward(theta, state, action,
    noise, following)` returns a number, per step. Both read `state[i]`, `action[i]`, `noise[i]` and `theta.name`; the
    names are `parameters`, by default the defaults of the box, else its lower bounds, in order. They may hold
    arithmetic on numbers, vectors, matrices and quaternions, Warp's smooth functions, `if`, loops over constant ranges,
    calls of other such functions, and numbers from outside; see `warp_language`. They must not draw random numbers:
    randomness is `noise`, whose first `noise` columns are standard normal and whose last are the measured inputs
    `exogenous`.

    state, action, exogenous, signal: names of the columns; units: by name (SI, rad); dt in s. The start is
    `initial_state(theta, e0 [B, initial_noise])`, by default zero. `torch_reward`, `terminal` and `observe` are
    functions of tensors as in `ModelMDP`; exactly one of reward and torch_reward is given.

    Raises `WarpLanguageError` with file and line for what cannot be translated, `ValueError` for what does not fit.
    Kernels are compiled when first called (seconds, then cached on disk), once per precision and order of derivative.
    """
    if (reward is None) == (torch_reward is None):
        raise ValueError("give exactly one of reward (a kernel) and torch_reward (a function of tensors)")
    if not 0.0 < dt < float("inf"):
        raise ValueError(f"dt must be a positive number of seconds, got {dt}")
    if noise < 0 or initial_noise < 0:
        raise ValueError(f"numbers of noise columns must not be negative, got noise={noise}, {initial_noise=}")
    box = box or Box()
    names = tuple(parameters) or tuple(box.default) or tuple(box.low)
    _check_names(state=state, action=action, exogenous=exogenous, signal=signal or (), parameters=names)
    source = KernelSource(step, reward, names, len(state), len(action), noise + len(exogenous))
    width = len(state)
    frame = ModelMDP(
        initial_state=initial_state or (lambda theta, e0: e0.new_zeros(*e0.shape[:-1], width)),
        step=lambda theta, s, a, e: s,  # replaced below
        reward=torch_reward or (lambda theta, s, a, e, following: s[..., 0]),
        noise_dims=(initial_noise, source.noise),
        dt=dt,
        discount=discount,
        terminal=terminal,
        observe=observe,
        exogenous_dim=len(exogenous),
        names={
            "state": tuple(state),
            "action": tuple(action),
            "signal": tuple(state if signal is None else signal),
            **({"exogenous": tuple(exogenous)} if exogenous else {}),
        },
        units=units or {},
        box=box,
    )
    return _with_kernels(frame, source)


def warp_twin(twin: ModelMDP, step: Kernel, reward: Kernel | None) -> ModelMDP:
    """The torch model `twin` with step, rollout and, unless it is None, reward replaced by kernels.

    theta holds the parameters that have a default in the twin's box, in its order. step and reward are as for
    `warp_model`; start, end of an episode, names, units and box stay the twin's.
    """
    missing = [key for key in ("state", "action") if key not in twin.names]
    if missing:
        raise ValueError(f"the torch model does not name its {' and '.join(missing)}; the kernel needs their lengths")
    lengths = len(twin.names["state"]), len(twin.names["action"])
    return _with_kernels(twin, KernelSource(step, reward, tuple(twin.box.default), *lengths, twin.noise_dims[1]))


def _check_names(**groups: Sequence[str]) -> None:
    for group, names in groups.items():
        if isinstance(names, str) or len(set(names)) < len(names):
            raise ValueError(f"{group} must be a sequence of distinct names, got {names!r}")
    for group in ("state", "action"):
        if not groups[group]:
            raise ValueError(f"the model needs at least one {group}")


def _with_kernels(frame: ModelMDP, source: KernelSource) -> ModelMDP:
    source = replace(source, step=frozen(source.step), reward=frozen(source.reward))
    translated_step(source, torch.float64)  # complain at once, not at the first rollout
    if source.reward is not None:
        translated_reward(source, torch.float64)

    def step(theta: Params, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        lead = _lead(source, theta, state, action, noise)
        start, *drive = (_flat(x, lead, state) for x in (state, action, noise))
        inputs = (pack(source, theta, lead, state), start, *(x.unsqueeze(1) for x in drive))
        (following,) = evaluate(_step_program(source, state.dtype), *inputs)
        return following.reshape(*lead, source.state)

    def reward(theta: Params, state: Tensor, action: Tensor, noise: Tensor, following: Tensor) -> Tensor:
        lead = _lead(source, theta, state, action, noise, following)
        rows = (pack(source, theta, lead, state), *(_flat(x, lead, state) for x in (state, action, noise, following)))
        (value,) = evaluate(_reward_program(source, state.dtype), *(x.unsqueeze(1) for x in rows))
        return value.reshape(lead)

    def open_loop(theta: Params, start: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        drive = (actions.transpose(0, 1), noise.transpose(0, 1))
        lead = _lead(source, theta, start, *drive)[-1:]
        over_time = (_given(x, start).expand(-1, *lead, -1).unsqueeze(0) for x in drive)
        program = _rollout_program(source, start.dtype)
        (states,) = evaluate(program, pack(source, theta, lead, start), _flat(start, lead, start), *over_time)
        return states.squeeze(0).transpose(0, 1)

    def sensitivity(
        theta: Params, free: Sequence[str], path: Path, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        if not set(free) <= set(source.parameters):
            return None
        index, states = tuple(source.parameters.index(name) for name in free), path[0]
        packed = pack(source, theta, states.shape[1:2], states)
        return roll_sensitivity(translated_step(source, states.dtype), index, packed, path, rows)

    return replace(
        frame,
        step=step,
        reward=frame.reward if source.reward is None else reward,
        open_loop=open_loop,
        closed_loop=ClosedLoop(
            closed_loop_run(
                source, lambda theta, s0: pack(source, theta, _lead(source, theta, s0), s0)[0], frame.terminal
            ),
            step,
            reward,
            frame.terminal,
        ),
        sensitivity=ForwardSensitivity(sensitivity, step),
        derivative_order=2,
    )


def _arguments(source: KernelSource) -> tuple[Argument, ...]:
    return (
        Argument("theta", len(source.parameters), source.parameters),
        Argument("state", source.state),
        Argument("action", source.action),
        Argument("noise", source.noise),
    )


@lru_cache(maxsize=MODELS)
def translated_step(source: KernelSource, precision: torch.dtype) -> Translated:
    """The step's Warp functions; raises `ValueError` when it does not return a state."""
    step = translate(source.step, _arguments(source), precision=precision)
    if step.length != source.state:
        found = "a number" if step.length is None else f"{step.length} components"
        raise ValueError(f"step returns {found}, the state has {source.state}; return wp.vector of the next state")
    return step


@lru_cache(maxsize=MODELS)
def translated_reward(source: KernelSource, precision: torch.dtype) -> Translated:
    """The reward's Warp functions; raises `ValueError` when it does not return a number."""
    if source.reward is None:
        raise ValueError("the reward of this model is not a kernel")
    reward = translate(source.reward, (*_arguments(source), Argument("following", source.state)), precision=precision)
    if reward.length is not None:
        raise ValueError(f"reward returns {reward.length} components; return one number, the reward of the step")
    return reward


@lru_cache(maxsize=MODELS)
def _step_program(source: KernelSource, precision: torch.dtype) -> Program:
    return roll_program(_step_tiles(source, precision), whole=False)


@lru_cache(maxsize=MODELS)
def _rollout_program(source: KernelSource, precision: torch.dtype) -> Program:
    return roll_program(_step_tiles(source, precision), whole=True)


@lru_cache(maxsize=MODELS)
def _step_tiles(source: KernelSource, precision: torch.dtype) -> Tiles:
    return tiles(translated_step(source, precision), ("summed", "carried", "each", "each"))


@lru_cache(maxsize=MODELS)
def _reward_program(source: KernelSource, precision: torch.dtype) -> Program:
    return reward_program(tiles(translated_reward(source, precision), ("each",) * 5))


def _lead(source: KernelSource, theta: Params, *tensors: Tensor) -> torch.Size:
    """The batch axes that state, action, noise and theta share; raises where they do not fit the model."""
    state = tensors[0]
    names = ("state", "action", "noise", "following")
    for name, length, x in zip(names, (source.state, source.action, source.noise, source.state), tensors, strict=False):
        if x.shape[-1] != length:
            raise ValueError(f"{name} has {x.shape[-1]} columns, the model has {length}")
        if length and (x.dtype != state.dtype or x.device != state.device):
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, the state {state.dtype} on {state.device}; "
                "give all of them in one precision, on one device"
            )
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a Warp model computes in float32 or float64, got states in {state.dtype}")
    missing = [key for key in source.parameters if key not in theta]
    if missing:
        raise KeyError(f"theta lacks {missing}; the model has the parameters {list(source.parameters)}")
    shapes = {x.shape[:-1] for x in tensors} | {theta[key].shape for key in source.parameters}
    batched = [shape for shape in shapes if shape]
    return torch.broadcast_shapes(*batched) if len(batched) != 1 else batched[0]  # the former costs 40 us


def _given(x: Tensor, like: Tensor) -> Tensor:
    """x, in the precision and on the device of `like` if it has no columns (noise of a model without)."""
    return x if x.shape[-1] else like.new_empty(x.shape)


def _flat(x: Tensor, lead: torch.Size, like: Tensor) -> Tensor:
    """`[1, B, columns]` with the batch axes `lead` folded into one."""
    x, length = _given(x, like), x.shape[-1]
    if x.shape[:-1] != lead:
        x = x.expand(*lead, length)
    return x.reshape(1, prod(lead), length)


def pack(source: KernelSource, theta: Params, lead: torch.Size, like: Tensor) -> Tensor:
    """theta as rows `[1, B, p]`, one row repeated where all parameters are shared; precision and device of `like`."""
    values = [theta[key] for key in source.parameters]
    if not values:
        return like.new_zeros(0).expand(1, prod(lead), 0)
    if any(value.dtype != like.dtype or value.device != like.device for value in values):
        values = [_alike(key, theta[key], like) for key in source.parameters]
    if all(value.ndim == 0 for value in values):
        # never one number alone: torch would sum its gradient in an order that depends on the number of threads
        row = torch.stack(values if len(values) > 1 else [*values, like.new_zeros(())])
        return row.expand(1, prod(lead), -1)[..., : len(values)]
    rows = torch.stack([value.expand(lead) for value in values])  # component-major: environments lie side by side
    return rows.reshape(1, len(values), prod(lead)).transpose(1, 2)


def _alike(key: str, value: Tensor, like: Tensor) -> Tensor:
    if value.ndim and (value.dtype != like.dtype or value.device != like.device):
        raise TypeError(
            f"parameter '{key}' is {value.dtype} on {value.device}, the state {like.dtype} on {like.device}; "
            "per-environment parameters are given in the precision and on the device of the state"
        )
    return value.to(like)
