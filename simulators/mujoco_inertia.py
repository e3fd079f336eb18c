"""Inertia of a body as ten free numbers that always stay physical, and the constraint weights that follow inertia.

Log-Cholesky parameters (alpha, d1, d2, d3, s12, s23, s13, t1, t2, t3) of the pseudo-inertia J = U U',

    U = e^alpha [[e^d1, s12, s13, t1], [0, e^d2, s23, t2], [0, 0, e^d3, t3], [0, 0, 0, 1]],   J = [[S, m c], [m c', m]],

S: second moments of mass about the body's origin, kg m^2. So m = e^(2 alpha), centre of mass c = t, and with V the
upper 3 x 3 block of U without e^alpha, second moments about c are m V V' and the inertia tr(m V V') 1 - m V V'.
Every real vector gives a body that a positive mass density can have.
Reference: Rucker, Wensing, Smooth parameterization of rigid-body inertia, IEEE RA-L 7(2), 2022, eq. 9 to 12.

Weights: MuJoCo scales constraint forces by "invweight0", inverse inertias at the reference pose (`mj_setConst`), with
A = J M^-1 J' of a body's centre of mass: body_invweight0 = (tr A_translation / 3, tr A_rotation / 3), dof_invweight0 =
diag M^-1 averaged over the degrees of a joint that share it, tendon_invweight0 = J M^-1 J' of its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_ROWS = torch.tensor([0, 1, 2, 0, 0, 1])
_COLUMNS = torch.tensor([0, 1, 2, 1, 2, 2])
WEIGHTS = ("body_invweight0", "dof_invweight0", "tendon_invweight0")
STORED = "sim2real_{}"
"""name of the custom numeric that keeps what compiling would compute anew"""
_FULL = torch.tensor([0, 3, 4, 3, 1, 5, 4, 5, 2])
"""positions of (xx, yy, zz, xy, xz, yz) in a 3 x 3 matrix, row by row"""


def inertia_matrix(six: Tensor) -> Tensor:
    """`[..., 3, 3]` of (xx, yy, zz, xy, xz, yz) `[..., 6]`."""
    return six[..., _FULL.to(six.device)].reshape(*six.shape[:-1], 3, 3)


def pseudo_inertia(value: Tensor) -> Tensor:
    """(mass kg, centre of mass m, inertia about it kg m^2 as xx, yy, zz, xy, xz, yz) `[..., 10]` of ten numbers."""
    alpha, (d1, d2, d3), (s12, s23, s13) = value[..., 0], value[..., 1:4].unbind(-1), value[..., 4:7].unbind(-1)
    zero = torch.zeros_like(alpha)
    rows = [torch.stack(row, -1) for row in ((d1.exp(), s12, s13), (zero, d2.exp(), s23), (zero, zero, d3.exp()))]
    root, mass = torch.stack(rows, -2), torch.exp(2.0 * alpha)
    moments = mass[..., None, None] * (root @ root.transpose(-1, -2))
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
    inertia = trace[..., None, None] * torch.eye(3, dtype=value.dtype, device=value.device) - moments
    six = inertia[..., _ROWS.to(value.device), _COLUMNS.to(value.device)]
    return torch.cat([mass[..., None], value[..., 7:], six], -1)


def log_cholesky(mass: Tensor, com: Tensor, six: Tensor) -> Tensor:
    """The ten numbers `[10]` of a mass `[]`, centre of mass `[3]` and inertia `[6]`; inverse of `pseudo_inertia`.

    Raises `ValueError` for an inertia that no volume of positive density has (a point, a rod, or beyond).
    """
    inertia = inertia_matrix(six)
    moments = 0.5 * inertia.diagonal().sum() * torch.eye(3, dtype=six.dtype) - inertia
    least = float(torch.linalg.eigvalsh(moments).min())
    if not (float(mass) > 0 and least > 1e-12 * float(inertia.diagonal().sum())):
        raise ValueError(
            f"mass {float(mass):.6g} kg with inertia {six.tolist()} kg m^2 is no body of positive density "
            f"(smallest second moment {least:.3g}); use mass, com and inertia, or give the body a volume"
        )
    root = torch.linalg.cholesky((moments / mass).flip(0, 1)).flip(0, 1)  # upper: V V'
    shear = torch.stack([root[0, 1], root[1, 2], root[0, 2]])
    return torch.cat([0.5 * torch.log(mass)[None], torch.log(root.diagonal()), shear, com])


def inverse_weights(
    model: mujoco.MjModel, simple: Sequence[int] = ()
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Function from fields (body_mass, body_ipos, body_inertia, dof_armature, tendon_armature; `[B, ...]`) to the three
    invweight0 fields, as `mj_setConst` gives them; derivatives of every order.

    `simple`: bodies compiled as simple, whose weights MuJoCo takes from mass alone: they stay as they are.
    """  # fmt: skip
    data = mujoco.MjData(model)
    data.qpos[:] = model.qpos0
    mujoco.mj_forward(model, data)
    linear, angular = np.zeros((model.nbody, 3, model.nv)), np.zeros((model.nbody, 3, model.nv))
    for body in range(model.nbody):
        mujoco.mj_jac(model, data, linear[body], angular[body], data.xpos[body], body)
    tendon = np.zeros((model.ntendon, model.nv))
    for k in range(model.ntendon):  # stored sparse
        row = slice(int(model.ten_J_rowadr[k]), int(model.ten_J_rowadr[k]) + int(model.ten_J_rownnz[k]))
        tendon[k, model.ten_J_colind[row]] = data.ten_J[row]
    at_origin, turning, lines = (torch.as_tensor(x) for x in (linear, angular, tendon))
    frames = torch.as_tensor(np.array(data.xmat).reshape(-1, 3, 3))
    average = torch.as_tensor(_averages(model))
    moves = torch.as_tensor(np.asarray(model.body_weldid) != 0)
    kept_body = torch.zeros(model.nbody, dtype=torch.bool)
    kept_body[list(simple)] = True
    kept_dof = kept_body[torch.as_tensor(np.array(model.dof_bodyid), dtype=torch.long)]
    old_body, old_dof = (torch.as_tensor(np.array(getattr(model, name))) for name in WEIGHTS[:2])

    def weights(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mass, offset, six = fields["body_mass"], fields["body_ipos"], fields["body_inertia"]
        lever = (frames.to(mass) @ offset[..., None])[..., 0]
        turn = turning.to(mass)
        moving = at_origin.to(mass) + torch.linalg.cross(turn.movedim(-2, -1)[None], lever[:, :, None]).movedim(-1, -2)
        body = frames.to(mass).transpose(-1, -2) @ turn
        inertia = (mass[..., None, None] * moving.transpose(-1, -2) @ moving).sum(-3)
        inertia = inertia + (body.transpose(-1, -2) @ inertia_matrix(six) @ body).sum(-3)
        armature = fields["tendon_armature"]
        rows = lines.to(mass)
        inertia = inertia + torch.diag_embed(fields["dof_armature"])
        inertia = inertia + (rows.T * armature[..., None, :]) @ rows
        inverse = torch.linalg.inv(inertia)
        translation = ((moving @ inverse[..., None, :, :]) * moving).sum((-1, -2)) / 3.0
        rotation = ((turn @ inverse[..., None, :, :]) * turn).sum((-1, -2)) / 3.0
        new_body = torch.stack([translation, rotation], -1) * moves.to(mass)[:, None]
        new_dof = inverse.diagonal(dim1=-2, dim2=-1) @ average.to(mass).T
        found = {
            "body_invweight0": torch.where(kept_body[:, None], old_body.to(mass), new_body),
            "dof_invweight0": torch.where(kept_dof, old_dof.to(mass), new_dof),
        }
        return found | ({"tendon_invweight0": ((rows @ inverse) * rows).sum(-1)} if model.ntendon else {})

    return weights


def _averages(model: mujoco.MjModel) -> Array:
    """`[nv, nv]` matrix that averages over the three translations or rotations of a free or ball joint."""
    matrix = np.eye(model.nv)
    for joint in range(model.njnt):
        first, kind = int(model.jnt_dofadr[joint]), int(model.jnt_type[joint])
        for start in {0: (0, 3), 1: (0,)}.get(kind, ()):
            block = slice(first + start, first + start + 3)
            matrix[block, block] = 1.0 / 3.0
    return matrix


def restore_weights(model: mujoco.MjModel) -> None:
    """Put the weights that `save_xml` stored as custom numerics back into a freshly compiled model (in place)."""
    for name in WEIGHTS:
        array, found = getattr(model, name).reshape(-1), stored_numbers(model, name)
        if found is not None and found.size == array.size:
            array[:] = found


def stored_numbers(model: mujoco.MjModel, name: str) -> NDArray[np.float64] | None:
    """The numbers that `save_xml` stored under a name."""
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, STORED.format(name))
    if index < 0:
        return None
    first = int(model.numeric_adr[index])
    found: NDArray[np.float64] = model.numeric_data[first : first + int(model.numeric_size[index])]
    return found
