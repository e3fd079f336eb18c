"""A MuJoCo model with identified numbers written back as XML, every digit kept, and read again."""

from __future__ import annotations

import mujoco

FROZEN = "sim2real_{}"
"""name of the custom numeric that keeps a weight which compiling would compute anew"""
_WEIGHTS = ("body_invweight0", "dof_invweight0", "tendon_invweight0")


def restore_weights(model: mujoco.MjModel) -> None:
    """Put frozen weights, which `save_xml` stored as custom numerics, back into a freshly compiled model (in place)."""
    for name in _WEIGHTS:
        array = getattr(model, name).reshape(-1)
        index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, FROZEN.format(name))
        if index < 0:
            continue
        first, size = int(model.numeric_adr[index]), int(model.numeric_size[index])
        if size == array.size:
            array[:] = model.numeric_data[first : first + size]
