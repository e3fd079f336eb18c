"""Is a model's kernel right? Values and derivatives to second order against a torch twin, or against differences.

With x = (theta, state, action, noise) of each environment, y = f(x) one of the model's functions, random directions dx
and weights w,

    value   y             jvp   (dy/dx) dx             vjp   (dy/dx)' w             hvp   d/dh grad <w, f>(x + h dx)

come from the model through `torch.func` and from the reference: the twin's, or central differences of the model's own
values (jvp, vjp) and gradients (hvp) with step h = 1e-5 of the size of each input. Every component is compared in units
of the input, relative to the largest of it over the environments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from sim2real.bounds import default_params
from sim2real.mdp import ModelMDP
from sim2real.params import Params

Quantity = Literal["value", "jvp", "vjp", "hvp"]
_STEP = 1e-5  # of an input's size: truncation and rounding of a difference are then both about 1e-10
_TOLERANCES = {("twin", torch.float64): 1e-10, ("twin", torch.float32): 1e-4, ("differences", torch.float64): 1e-6}


class KernelMismatchError(ValueError):
    """A kernel differs from its reference by more than the tolerance."""


@dataclass(frozen=True)
class CheckRow:
    """One function and quantity: the largest relative error, and the component of the output or input that has it."""

    function: str
    quantity: Quantity
    error: float
    where: str


@dataclass(frozen=True)
class KernelCheck:
    """What `check_kernel` found; `passed` says that every error is at most the tolerance."""

    rows: tuple[CheckRow, ...]
    reference: Literal["twin", "differences"]
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class _Function:
    """y = call(*x) with x in the order of `inputs`; each input's and the output's columns are named."""

    name: str
    call: Callable[..., Tensor]
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]


def check_kernel(
    model: ModelMDP,
    twin: ModelMDP | None = None,
    *,
    theta: Params | None = None,
    state: Tensor | None = None,
    batch: int = 8,
    horizon: int = 3,
    precision: torch.dtype = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
    strict: bool = False,
) -> KernelCheck:
    """Compare step, reward and open-loop rollout of a model with those of `twin`, or with differences where it is None.

    theta: values `[]` or `[batch]`, by default those of the box, scattered by 10 % for each environment; state:
    `[batch, n]`, by default a start of the model scattered by 0.3 and by 10 %. Actions and noise are standard normal.
    A rollout is compared with single steps (of the model itself, without a twin). tolerance: relative, by default
    1e-10 against a twin in float64, 1e-4 in float32, 1e-6 against differences, which need float64.

    Raises `ValueError` for names, sizes or precisions that do not fit, `KernelMismatchError` under strict if the check
    fails.
    """
    kind: Literal["twin", "differences"] = "differences" if twin is None else "twin"
    if (kind, precision) not in _TOLERANCES:
        raise ValueError(f"comparing with {kind} needs float64{' or float32' if twin else ''}, got {precision}")
    if batch < 1 or horizon < 1:
        raise ValueError(f"a check needs at least one environment and one step, got {batch=}, {horizon=}")
    allowed = _TOLERANCES[kind, precision] if tolerance is None else tolerance
    _check_names(model, twin)
    keys = tuple(theta) if theta is not None else tuple(model.box.default)
    points = _points(model, keys, theta, state, batch, horizon, precision, seed)
    ours = _functions(model, model, keys, points)
    theirs = _functions(twin or model, twin, keys, points)
    rows: list[CheckRow] = []
    for name, (function, x) in ours.items():
        reference = theirs[name][0]
        rows += _compare(function, reference, x, kind, seed)
    passed = all(row.error <= allowed for row in rows)
    check = KernelCheck(tuple(rows), kind, allowed, passed)
    if strict and not passed:
        raise KernelMismatchError(f"the kernel differs from its reference\n{check_table(check)}")
    return check


def check_table(check: KernelCheck) -> str:
    """The check as text, one line for each function and quantity."""
    lines = [f"against {check.reference}, relative tolerance {check.tolerance:.0e}"]
    for row in check.rows:
        verdict = "ok" if row.error <= check.tolerance else f"WRONG at {row.where}"
        lines.append(f"{row.function:<10} {row.quantity:<6} {row.error:9.1e}  {verdict}")
    return "\n".join(lines)


def _check_names(model: ModelMDP, twin: ModelMDP | None) -> None:
    for key in ("state", "action"):
        if key not in model.names:
            raise ValueError(f"the model does not name its {key}; set names['{key}']")
        if twin is not None and twin.names.get(key) != model.names[key]:
            raise ValueError(f"{key} of the model is {model.names[key]}, of the twin {twin.names.get(key)}")


def _points(
    model: ModelMDP,
    keys: Sequence[str],
    theta: Params | None,
    state: Tensor | None,
    batch: int,
    horizon: int,
    precision: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """theta `[B, p]`, state `[B, n]`, actions `[B, T, m]`, noise `[B, T, k]`, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    if theta is None:
        values = default_params(model.box)
        scatter = 1.0 + 0.1 * (2.0 * torch.rand(len(keys), batch, generator=generator, dtype=torch.float64) - 1.0)
        theta = {key: values[key] * scatter[k] for k, key in enumerate(keys)}
    if state is None:
        start = model.initial_state(theta, normal(batch, model.noise_dims[0])).double()
        state = start + (0.3 + 0.1 * start.abs()) * normal(start.shape)
    wide = [theta[key].double().expand(len(state)) for key in keys]
    packed = torch.stack(wide, -1) if wide else state.new_zeros(len(state), 0)
    actions = normal(len(state), horizon, len(model.names["action"]))
    noise = normal(len(state), horizon, model.noise_dims[1])
    return tuple(x.detach().to(precision) for x in (packed, state, actions, noise))  # type: ignore[return-value]


def _functions(
    model: ModelMDP, fused: ModelMDP | None, keys: tuple[str, ...], points: tuple[Tensor, ...]
) -> dict[str, tuple[_Function, tuple[Tensor, ...]]]:
    """Step, reward and rollout as functions of columns; the rollout in single steps unless `fused` has its own."""
    theta, state, actions, noise = points
    names = model.names["state"]
    times = range(actions.shape[1])
    inputs = tuple(f"theta.{key}" for key in keys), names, model.names["action"], _numbered("noise", noise.shape[-1])
    following = state + 0.1 * state.abs()

    def named(values: Tensor) -> Params:
        return dict(zip(keys, values.unbind(-1), strict=True))

    def step(values: Tensor, *x: Tensor) -> Tensor:
        return model.step(named(values), *x)

    def reward(values: Tensor, *x: Tensor) -> Tensor:
        return model.reward(named(values), *x).unsqueeze(-1)

    def rollout(values: Tensor, start: Tensor, *flat: Tensor) -> Tensor:
        given = [x.unflatten(-1, (len(times), width)) for x, width in zip(flat, widths, strict=True)]
        if fused is not None and fused.open_loop is not None:
            return fused.open_loop(named(values), start, *given)[:, 1:].flatten(1)
        states = [start]
        for t in times:
            states.append(step(values, states[-1], *(x[:, t] for x in given)))
        return torch.cat(states[1:], -1)

    widths = [actions.shape[-1], noise.shape[-1]]
    over_time = tuple(tuple(f"{name} at {t}" for t in times for name in part) for part in inputs[2:])
    rolled = tuple(f"{name} at {t + 1}" for t in times for name in names)
    one = (theta, state, actions[:, 0], noise[:, 0])
    after = tuple(f"next {name}" for name in names)
    return {
        "step": (_Function("step", step, inputs, names), one),
        "reward": (_Function("reward", reward, (*inputs, after), ("reward",)), (*one, following)),
        "rollout": (
            _Function("rollout", rollout, (*inputs[:2], *over_time), rolled),
            (theta, state, actions.flatten(1), noise.flatten(1)),
        ),
    }


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}[{k}]" for k in range(count))


def _compare(
    ours: _Function, theirs: _Function, x: tuple[Tensor, ...], kind: Literal["twin", "differences"], seed: int
) -> list[CheckRow]:
    generator = torch.Generator().manual_seed(seed + 1)
    units = [part.abs().amax(0).clamp(min=0.1) for part in x]
    dx = tuple(
        (unit * torch.randn(part.shape, generator=generator, dtype=torch.float64)).to(part)
        for unit, part in zip(units, x, strict=True)
    )
    y = theirs.call(*x)
    w = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    found = _exact(ours.call, x, dx, w)
    if kind == "twin":
        expected = _exact(theirs.call, x, dx, w)
    else:
        expected = {"value": [y], **_differences(ours.call, x, dx, w, units)}
    columns = {"value": (ours.outputs,), "jvp": (ours.outputs,), "vjp": ours.inputs, "hvp": ours.inputs}
    if kind == "differences" and ours.name != "rollout":
        del columns["value"]  # nothing else to compare it with
    rows = []
    for quantity, names in columns.items():
        scales = units if quantity in ("vjp", "hvp") else [torch.ones_like(y[0])]
        errors = _errors(found[quantity], expected[quantity], scales)
        worst = int(errors.argmax()) if len(errors) else 0
        flat = [name for part in names for name in part]
        rows.append(CheckRow(ours.name, quantity, float(errors[worst]), flat[worst]))  # type: ignore[arg-type]
    return rows


def _exact(
    call: Callable[..., Tensor], x: tuple[Tensor, ...], dx: tuple[Tensor, ...], w: Tensor
) -> dict[str, list[Tensor]]:
    """Value, jvp, vjp and hvp of a function through torch."""
    gradient = grad(lambda *x: (w * call(*x)).sum(), argnums=tuple(range(len(x))))
    value, pushed = jvp(call, x, dx)[:2]
    return {"value": [value], "jvp": [pushed], "vjp": list(vjp(call, *x)[1](w)), "hvp": list(jvp(gradient, x, dx)[1])}


def _differences(
    call: Callable[..., Tensor], x: tuple[Tensor, ...], dx: tuple[Tensor, ...], w: Tensor, units: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """jvp, vjp and hvp of a function by central differences of its values and gradients."""

    def moved(direction: Sequence[Tensor], size: float) -> tuple[Tensor, ...]:
        return tuple(part + size * d for part, d in zip(x, direction, strict=True))

    def gradient(*x: Tensor) -> tuple[Tensor, ...]:
        return vjp(call, *x)[1](w)

    pulled = [torch.zeros_like(part) for part in x]
    for k, part in enumerate(x):
        for column in range(part.shape[1]):
            direction = [torch.zeros_like(other) for other in x]
            direction[k][:, column] = units[k][column]
            change = call(*moved(direction, _STEP)) - call(*moved(direction, -_STEP))
            pulled[k][:, column] = (w * change).sum(-1) / (2.0 * _STEP * units[k][column])
    two_sided = zip(gradient(*moved(dx, _STEP)), gradient(*moved(dx, -_STEP)), strict=True)
    pushed = (call(*moved(dx, _STEP)) - call(*moved(dx, -_STEP))) / (2.0 * _STEP)
    return {"jvp": [pushed], "vjp": pulled, "hvp": [(a - b) / (2.0 * _STEP) for a, b in two_sided]}


def _errors(found: Sequence[Tensor], expected: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Largest error of every component over the environments, relative to its size, at least 1e-3 of the largest."""
    ours = torch.cat([part * scale for part, scale in zip(found, scales, strict=True)], -1).detach()
    theirs = torch.cat([part * scale for part, scale in zip(expected, scales, strict=True)], -1).detach()
    size = theirs.abs().amax(0)
    floor = 1e-3 * size.amax().clamp(min=torch.finfo(size.dtype).tiny)
    errors = (ours - theirs).abs().amax(0) / torch.maximum(size, floor)
    return errors.nan_to_num(nan=float("inf"))  # nan against a number is as wrong as can be
