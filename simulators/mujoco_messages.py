"""What MuJoCo says while it runs, as Python warnings.

Left alone, MuJoCo prints its warnings and appends them to a file MUJOCO_LOG.TXT in the working folder.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mujoco

_NOT_FINITE = "Nan, Inf or huge value"  # reported by name where the acceleration is read


class MujocoWarning(UserWarning):
    """A warning of MuJoCo itself: a buffer that is full, an inertia that is singular, a deprecated attribute."""


_LOCK = threading.Lock()
_LISTENING: list[dict[str, None]] = []  # MuJoCo has one handler for all threads
_BEFORE: list[Any] = []  # the handler to put back


@contextmanager
def engine_messages() -> Iterator[dict[str, None]]:
    """Inside, MuJoCo's warnings are collected (and yielded); afterwards each is given once as a `MujocoWarning`."""
    found: dict[str, None] = {}
    with _LOCK:
        if not _LISTENING:
            _BEFORE.append(mujoco.get_mju_user_warning())
            mujoco.set_mju_user_warning(_tell)
        _LISTENING.append(found)
    try:
        yield found
    finally:
        with _LOCK:
            _LISTENING[:] = [other for other in _LISTENING if other is not found]
            if not _LISTENING:
                mujoco.set_mju_user_warning(_BEFORE.pop())
    for text in found:
        if not text.startswith(_NOT_FINITE):
            warnings.warn(f"MuJoCo: {text}", MujocoWarning, stacklevel=3)


def _tell(text: str) -> None:
    for found in list(_LISTENING):
        found[text] = None
