"""What MuJoCo says while it runs, as Python warnings.

Left alone, MuJoCo prints its warnings and appends them to a file MUJOCO_LOG.TXT in the working folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import mujoco

_NOT_FINITE = "Nan, Inf or huge value"  # reported by name where the acceleration is read


class MujocoWarning(UserWarning):
    """A warning of MuJoCo itself: a buffer that is full, an inertia that is singular, a deprecated attribute."""


@contextmanager
def engine_messages() -> Iterator[None]:
    """Inside, MuJoCo's warnings are collected; afterwards each kind is given once as a `MujocoWarning`."""
    found: dict[str, None] = {}
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: found.setdefault(text))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
    for text in found:
        if not text.startswith(_NOT_FINITE):
            warnings.warn(f"MuJoCo: {text}", MujocoWarning, stacklevel=3)
