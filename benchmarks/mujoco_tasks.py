"""Models and random states for the benchmarks of differentiable MuJoCo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import MissingError
from benchmarks.mujoco_reference import JOINT, State, World, place

STOCK = ("hopper", "half_cheetah", "walker2d_v5", "ant", "humanoid", "pusher_v5")
"""those of Gymnasium whose episodes have contacts"""


TRIES = 400
"""per state that is wanted"""


def stock(name: str) -> mujoco.MjSpec:
    """A model of Gymnasium's, by the name of its file."""
    try:
        import gymnasium
    except ImportError as error:
        raise MissingError(f"Gymnasium, whose models these are, is not installed ({error})") from error
    assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    return mujoco.MjSpec.from_file(str(assets / f"{name}.xml"))


def with_integrator(spec: mujoco.MjSpec, integrator: str) -> mujoco.MjSpec:
    """The specification with another integrator: `euler`, `implicitfast`, `implicit` or `rk4`."""
    spec.option.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{integrator.upper()}")
    return spec


def contact(d: mujoco.MjData) -> bool:
    return bool(d.ncon)


def touching(d: mujoco.MjData) -> bool:
    """A shallow contact that pushes."""
    return bool(d.ncon) and min(d.contact.dist) > -0.01 and bool((d.efc_force > 0).any())


def constraint(d: mujoco.MjData) -> bool:
    return bool(d.nefc)


def anything(d: mujoco.MjData) -> bool:
    return True


def states(
    w: World,
    count: int,
    *,
    seed: int = 0,
    steps: tuple[int, int] = (40, 200),
    spread: float = 0.1,
    speed: float = 0.0,
    kick: float = 0.0,
    control: float = 0.5,
    tumbled: float = 0.0,
    keep: Callable[[mujoco.MjData], bool] = contact,
) -> list[State]:
    """Random starts (`spread` in tangent coordinates, `speed`), driven by random controls for some steps.

    `kick` is added to the velocities at the end; a control holds for eight steps, within `control` times its range.
    With `tumbled` free bodies start in any attitude, that far from the origin.
    """
    m, d, rng = w.model, w.data, np.random.default_rng(seed)
    limited = m.actuator_ctrllimited.astype(bool)
    reach = np.where(limited, np.abs(m.actuator_ctrlrange).max(1) if m.nu else 0.0, 1.0)
    found: list[State] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            return found
        mujoco.mj_resetData(m, d)
        mujoco.mj_integratePos(m, d.qpos, rng.normal(0, spread, m.nv), 1.0)
        if tumbled:
            tumble(m, d, tumbled, rng)
        d.qvel[:] = rng.normal(0, speed, m.nv)
        for step in range(int(rng.integers(*steps))):
            if step % 8 == 0:
                d.ctrl[:] = control * reach * rng.uniform(-1, 1, m.nu)
            mujoco.mj_step(m, d)
        d.qvel[:] += rng.normal(0, kick, m.nv)
        state = State(d.qpos.copy(), d.qvel.copy(), d.act.copy(), d.ctrl.copy())
        place(w, state)
        mujoco.mj_forward(m, d)
        if np.isfinite(d.qacc).all() and np.abs(d.qacc).max() < 1e6 and keep(d):
            found.append(state)
    raise MissingError(f"only {len(found)} of {count} states of the wanted kind in {TRIES * count} tries")


def tumble(m: mujoco.MjModel, d: mujoco.MjData, spread: float, rng: np.random.Generator) -> None:
    """Put free bodies anywhere near the origin."""
    for joint in np.flatnonzero(m.jnt_type == JOINT.mjJNT_FREE.value):
        at = m.jnt_qposadr[joint]
        turn = rng.normal(size=4)
        d.qpos[at : at + 3] = rng.normal(0, spread, 3)
        d.qpos[at + 3 : at + 7] = turn / np.linalg.norm(turn)
