"""Robots whose XML ships with installable packages construct and differentiate (dm_control, gymnasium-robotics).

`PYTHONPATH` may point to the unpacked packages; without them these tests skip.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

mujoco = pytest.importorskip("mujoco")

from sim2real.mdp import ModelMDP  # noqa: E402
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError  # noqa: E402
from sim2real.simulators.mujoco_model import mujoco_model  # noqa: E402
from sim2real.simulators.mujoco_structure import structure  # noqa: E402


def packaged(package: str, path: str) -> Path:
    """The file of a package, found without importing it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.origin).parent / path


def model_mdp(model: mujoco.MjModel, *, check_pairs: bool = True) -> ModelMDP:
    reward = lambda theta, s, a, e, following: following.square().sum(-1)
    return mujoco_model(model, (), reward, check_pairs=check_pairs, backend="torch")


def settled(model: mujoco.MjModel, steps: int, seed: int = 0) -> tuple[mujoco.MjData, np.random.Generator]:
    """A state after some driven steps of the engine."""
    rng, data = np.random.default_rng(seed), mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, 0) if model.nkey else mujoco.mj_resetData(model, data)
    for step in range(steps):
        if step % 10 == 0:
            data.ctrl[:] = 0.3 * rng.uniform(-1, 1, model.nu)
        mujoco.mj_step(model, data)
    return data, rng


ROBOTS = [
    ("dm_control", "suite/reacher.xml", 20, True),
    ("dm_control", "suite/quadruped.xml", 150, False),
    ("dm_control", "suite/humanoid.xml", 150, True),
    ("gymnasium_robotics", "envs/assets/fetch/reach.xml", 50, True),
    ("gymnasium_robotics", "envs/assets/hand/reach.xml", 50, True),
]


@pytest.mark.parametrize(("package", "path", "steps", "check_pairs"), ROBOTS, ids=[r[1] for r in ROBOTS])
def test_robots_of_packages_differentiate(package: str, path: str, steps: int, check_pairs: bool) -> None:
    """One step along a random direction of velocity and control equals differences of the engine's step."""
    model = mujoco.MjModel.from_xml_path(str(packaged(package, path)))
    mdp = model_mdp(model, check_pairs=check_pairs)
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for seed in range(10):
        data, rng = settled(model, steps, seed)
        state = torch.from_numpy(np.concatenate([data.qpos, data.qvel, data.act]))[None]
        action = torch.from_numpy(data.ctrl.copy())[None]
        ds = torch.zeros_like(state)
        ds[0, model.nq :] = 0.1 * torch.from_numpy(rng.normal(size=model.nv + model.na))
        ds[0, model.nq : model.nq + model.nv][model.dof_damping > 1e6] = 0.0  # locked: forces of 1e10 leave no digits
        da = torch.from_numpy(0.1 * rng.normal(size=(1, model.nu)))
        step = lambda t, s=state, ds=ds, a=action, da=da: mdp.step({}, s + t * ds, a + t * da, nothing)
        h = 1e-5 * one
        with torch.no_grad():
            near, far = (step(h) - step(-h)) / (2 * h), (step(2 * h) - step(-2 * h)) / (4 * h)
        if (near - far).abs().max() < 1e-4 * near.abs().max():  # else the active set changes within the differences
            break
    else:
        pytest.fail("no state of ten is smooth")
    _, slope = torch.func.jvp(step, (zero,), (one,))
    # rounding 1e-13/1e-5 of velocities of 1 .. 100
    assert float((slope - (4 * near - far) / 3).abs().max()) < 1e-6 * max(1.0, float(slope.abs().max()))


def test_the_quadruped_names_what_may_have_no_derivative() -> None:
    model = mujoco.MjModel.from_xml_path(str(packaged("dm_control", "suite/quadruped.xml")))
    with pytest.raises(MujocoUnsupportedError, match=r"(?s)'terrain' \(hfield\) and 'eye_r'.*check_pairs=False"):
        model_mdp(model)


def test_edited_inertias_keep_the_contacts() -> None:
    """MuJoCo's midphase lives in the inertial frames: with it, a moved centre of mass loses contacts of a body with
    several geoms, and so does another choice of principal axes."""
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody><geom type="plane" size="5 5 .1"/><body name="post"><geom size=".1" pos="0 0 .5"/>
        <geom size=".1" pos="0 0 .9"/></body><body name="dumbbell" pos=".15 0 .7"><freejoint/>
        <geom type="capsule" size=".06 .05" pos="0 0 -.2"/><geom type="capsule" size=".06 .08" pos="0 .02 .2"/></body>
        </worldbody></mujoco>"""
    )
    prepared = structure(model).model
    data = mujoco.MjData(prepared)
    mujoco.mj_forward(prepared, data)
    contacts = data.ncon
    assert contacts > 0
    prepared.body_ipos[1:] += 0.4
    prepared.body_iquat[:] = [0.5, 0.5, 0.5, 0.5]
    mujoco.mj_forward(prepared, data)
    assert data.ncon == contacts
