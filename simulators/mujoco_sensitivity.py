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
from sim2real.outside_program import Tensors, Wanted
from sim2real.params import Params
from sim2real.simulators.mujoco_products import STATE, Cotangents
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
    # one engine step a time step: the states say what w was
    known = (states[1:].flatten(0, 1)[:, nv:] - v) / h if settings.frame_skip == 1 else None
    A, B = flat.new_empty(0), flat.new_empty(0)
    for index in range(settings.frame_skip):
        given = (q, torch.zeros_like(v), v, v.new_zeros(len(v), 0), actions.flatten(0, 1), force)
        x = (*given, *(fields[name] for name in system.names))
        w, by_q, by_v, by_p = _linearised(system, x, slopes, moved, known)
        a, b = _euler_matrices(by_q, by_v, by_p, h)
        A, B = (a, b) if index == 0 else (a @ A, a @ B + b)
        v = v + h * w
        q = q + h * v
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
    system: MujocoSystem, x: Tensors, slopes: Sequence[Tensor], moved: Tensor | None, known: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w `[M, nv]` and its derivatives by q, v `[M, nv, nv]` and by the parameters (and along d_action) `[M, nv, d]`."""
    M, nv = x[1].shape
    wanted = (False, True, True, False, moved is not None, False, *(True for _ in slopes))
    w, found = known, None
    if system.cotangents is not None and known is not None:
        found = _shared(system.cotangents, x, (known,), wanted)
    if w is None or found is None:
        y = system.program.value(x)
        w = y[0]
        found = None if system.cotangents is None else _shared(system.cotangents, x, y, wanted)
        if found is None:
            found = _repeated(system.program.pull, x, y, wanted)
    by_q, by_v, *more = found
    # samples are side by side in memory: [nv, length, M] is the quick order
    columns = [slope.mT @ grad.permute(1, 2, 0) for grad, slope in zip(more[-len(slopes) :], slopes, strict=True)]
    by_p = [torch.stack(columns).sum(0).permute(2, 0, 1)] if columns else []
    if moved is not None:
        by_p.append(more[0] @ moved.unsqueeze(-1))
    return w, by_q, by_v, torch.cat(by_p, -1) if by_p else by_q.new_zeros(M, nv, 0)


def _shared(cotangents: Cotangents, x: Tensors, y: Tensors, wanted: Wanted) -> Tensors | None:
    """J' of the wanted inputs `[M, nv, length]` in one pass; None where the kernels miss contacts of a state."""
    M, nv = y[0].shape
    found, covered = cotangents(x, y, torch.eye(nv, dtype=torch.float64).expand(M, nv, nv), wanted)
    return found if bool(covered.all()) else None


def _repeated(pull: Callable[..., Tensors], x: Tensors, y: Tensors, wanted: Wanted) -> Tensors:
    """The same by one copy of each state for each cotangent."""
    M, nv = y[0].shape
    parts: list[Tensors] = []
    for first in range(0, M, max(COPIES // nv, 1)):
        part = slice(first, first + max(COPIES // nv, 1))
        count = len(y[0][part])
        # components side by side in memory, as the kernels read them
        many = lambda t, part=part: t[part].mT.repeat(1, nv).mT
        g = torch.eye(nv, dtype=torch.float64).repeat_interleave(count, 1).mT
        state, rest = x[: len(STATE)], x[len(STATE) :]
        big = (*(many(t) if t.shape[1] else t.new_zeros(count * nv, 0) for t in state), *rest)
        grads = pull(big, tuple(many(t) for t in y), (g, torch.zeros_like(g)), wanted)
        parts.append(tuple(grad.reshape(nv, count, -1).transpose(0, 1) for grad in grads))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _euler_matrices(by_q: Tensor, by_v: Tensor, by_p: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """A `[M, 2 nv, 2 nv]` and B `[M, 2 nv, d]` of the module's first equations."""
    M, nv, d = by_p.shape
    A, B = by_q.new_empty(M, 2 * nv, 2 * nv), by_q.new_empty(M, 2 * nv, d)
    A[:, nv:, :nv], A[:, nv:, nv:], B[:, nv:] = h * by_q, h * by_v, h * by_p
    A[:, nv:, nv:].diagonal(dim1=1, dim2=2).add_(1.0)
    A[:, :nv], B[:, :nv] = h * A[:, nv:], h * B[:, nv:]
    A[:, :nv, :nv].diagonal(dim1=1, dim2=2).add_(1.0)
    return A, B


def _through_time(A: Tensor, B: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(S, Phi) at `rows`: both are columns of one matrix, one product a step."""
    T, W, n, d = B.shape
    carried, steps, sources = np.zeros((T + 1, W, n, d + n)), A.numpy(), B.numpy()
    carried[0, :, :, d:] = np.eye(n)
    for t in range(T):  # numpy: half the cost of a call, and there are many small ones
        np.matmul(steps[t], carried[t], out=carried[t + 1])
        carried[t + 1, :, :, :d] += sources[t]
    found = torch.from_numpy(carried[list(rows)])
    return found[..., :d], found[..., d:]
