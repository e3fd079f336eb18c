"""Forward sensitivities of a MuJoCo model: all its steps linearised at once, without the chain of torch steps.

Along states that are known, the acceleration w of all steps is linearised at once, nv cotangents for each:

    W_q = dw/dq,  W_v = dw/dv,  W_p = dw/d fields . d fields/dp          at every (step, window)
    v' = v + h w,  q' = q + h v':      A = [[1 + h^2 W_q, h (1 + h W_v)], [h W_q, 1 + h W_v]],  B = [h^2 W_p, h W_p]

and only the products of these small matrices run through time. For hinges and slides under an Euler scheme, without
activations, delayed commands, guards or truncation; other models take the general way (`sim2real.roll`).
Reference: Bryson and Ho, Applied Optimal Control, 1975, section 6.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mujoco
import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from sim2real.mdp import ForwardSensitivity
from sim2real.params import Params
from sim2real.simulators.mujoco_products import STATE
from sim2real.simulators.mujoco_step import StepSettings, to_engine
from sim2real.simulators.mujoco_system import MujocoSystem

Step = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
Path = tuple[Tensor, Tensor, Tensor, Tensor | None]
COPIES = 32768
"""pairs of a sample and a cotangent in one call"""


def engine_sensitivity(system: MujocoSystem, settings: StepSettings, step: Step) -> ForwardSensitivity | None:
    """The engine's own derivatives of a rollout with respect to shared scalars in theta; None where it has none."""
    if not is_plain(system, settings):
        return None

    def run(theta: Params, free: Sequence[str], path: Path, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        return _sensitivities(system, settings, theta, free, path, rows)

    return ForwardSensitivity(run, step)


def is_plain(system: MujocoSystem, settings: StepSettings) -> bool:
    """Whether the state is (q, v) of hinges and slides, stepped by an Euler scheme."""
    model = system.structure.model
    linear = all(int(kind) >= int(mujoco.mjtJoint.mjJNT_SLIDE) for kind in model.jnt_type)
    bare = not settings.commands and settings.truncation is None and settings.guard is None
    return linear and model.na == 0 and model.nv > 0 and system.scheme == "euler" and bare


def _sensitivities(
    system: MujocoSystem, settings: StepSettings, theta: Params, free: Sequence[str], path: Path, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """S `[R, W, n, d (+ 1)]` and Phi `[R, W, n, n]` at the states `rows`."""
    states, actions, noise, d_actions = (None if part is None else to_engine(part.detach()) for part in path)
    assert states is not None and actions is not None and noise is not None  # noqa: PT018  only d_actions may be None
    (T, W), nv = actions.shape[:2], system.structure.model.nv
    theta = {key: to_engine(value.detach()) for key, value in theta.items()}
    fields = settings.fields(theta)
    slopes = _field_slopes(system, settings, theta, free)
    flat = states[:-1].flatten(0, 1)
    force = torch.zeros_like(flat[:, :nv])
    if settings.force_std is not None:
        force = settings.force_std * noise.flatten(0, 1)[:, :nv]
    moved = None if d_actions is None else d_actions.flatten(0, 1)
    h, q, v = float(system.structure.model.opt.timestep), flat[:, :nv], flat[:, nv:]
    A, B = None, None
    for _ in range(settings.frame_skip):
        given = (q, torch.zeros_like(v), v, v.new_zeros(len(v), 0), actions.flatten(0, 1), force)
        w, by_q, by_v, by_p = _linearised(system, (*given, *(fields[name] for name in system.names)), slopes, moved)
        a, b = _euler_matrices(by_q, by_v, by_p, h)
        A, B = (a, b) if A is None or B is None else (a @ A, a @ B + b)
        v = v + h * w
        q = q + h * v
    assert A is not None and B is not None  # noqa: PT018  frame_skip is at least 1
    return _through_time(A.unflatten(0, (T, W)), B.unflatten(0, (T, W)), rows)


def _field_slopes(system: MujocoSystem, settings: StepSettings, theta: Params, free: Sequence[str]) -> list[Tensor]:
    """d field / d theta `[numel, d]` of every field that theta reaches: one pass over d copies, each moved."""
    d = len(free)
    copies = tuple(theta[key].repeat(d) for key in free)
    along = tuple(torch.eye(d, dtype=torch.float64).unbind())

    def fields(*values: Tensor) -> tuple[Tensor, ...]:
        found = settings.fields(theta | dict(zip(free, values, strict=True)))
        return tuple(found[name] for name in system.names)

    if not d:
        return [torch.zeros(field.numel(), 0, dtype=torch.float64) for field in fields()]
    moved = jvp(fields, copies, along)[1]
    return [change.expand(d, *change.shape[1:]).flatten(1).mT for change in moved]


def _linearised(
    system: MujocoSystem, x: tuple[Tensor, ...], slopes: Sequence[Tensor], moved: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w `[M, nv]` and its derivatives by q, v `[M, nv, nv]` and by the parameters (and along d_action) `[M, nv, d]`."""
    (M, nv), program = x[0].shape, system.program
    y = program.value(x)
    wanted = (False, True, True, False, moved is not None, False, *(True for _ in slopes))
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, M, max(COPIES // nv, 1)):
        part = slice(first, first + max(COPIES // nv, 1))
        count = len(x[0][part])
        # components side by side in memory, as the kernels read them
        many = lambda t, part=part: t if len(t) == 1 else t[part].mT.repeat(1, nv).mT
        g = torch.eye(nv, dtype=torch.float64).repeat_interleave(count, 1).mT
        state, rest = x[: len(STATE)], x[len(STATE) :]
        big = (*(many(t) if t.shape[1] else t.new_zeros(count * nv, 0) for t in state), *rest)
        grads = program.pull(big, tuple(many(t) for t in y), (g, torch.zeros_like(g)), wanted)
        parts.append(tuple(grad.reshape(nv, count, -1).transpose(0, 1) for grad in grads))
    by_q, by_v, *more = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    columns = (
        [sum_of([grad @ slope for grad, slope in zip(more[-len(slopes) :], slopes, strict=True)])] if slopes else []
    )
    if moved is not None:
        columns.append(more[0] @ moved.unsqueeze(-1))
    by_p = torch.cat(columns, -1) if columns else by_q.new_zeros(M, nv, 0)
    return y[0], by_q, by_v, by_p


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _euler_matrices(by_q: Tensor, by_v: Tensor, by_p: Tensor, h: float) -> tuple[Tensor, Tensor]:
    one = torch.eye(by_q.shape[-1], dtype=by_q.dtype)
    speed_q, speed_v, speed_p = h * by_q, one + h * by_v, h * by_p
    upper, lower = torch.cat([one + h * speed_q, h * speed_v], -1), torch.cat([speed_q, speed_v], -1)
    return torch.cat([upper, lower], -2), torch.cat([h * speed_p, speed_p], -2)


def _through_time(A: Tensor, B: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(S, Phi) at `rows`: both are columns of one matrix, one product a step."""
    T, W, n, d = B.shape
    source = torch.cat([B, B.new_zeros(T, W, n, n)], -1).numpy()
    carried = torch.cat([B.new_zeros(W, n, d), torch.eye(n, dtype=B.dtype).expand(W, n, n)], -1).numpy()
    kept, wanted, steps = {0: carried}, set(rows), A.numpy()
    for t in range(T):  # numpy: half the cost of a call, and there are many small ones
        carried = np.matmul(steps[t], carried)
        carried += source[t]
        if t + 1 in wanted:
            kept[t + 1] = carried
    found = torch.from_numpy(np.stack([kept[row] for row in rows]))
    return found[..., :d], found[..., d:]
