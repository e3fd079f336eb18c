"""mujoco_warp as the forward engine, against MuJoCo's C engine: accelerations, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import mujoco
import pytest
import torch
from torch import Tensor

from sim2real.params import Params
from sim2real.simulators import mujoco_warp_engine
from sim2real.simulators.mujoco_forward import SimulationDivergedError, accelerate, integration
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_structure import Structure, nominal_fields, structure
from sim2real.simulators.mujoco_warp_engine import warp_acceleration
from sim2real.simulators.mujoco_xml import load_xml

GYM = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
pytestmark = pytest.mark.filterwarnings("ignore:compiler attribute .settotalmass:UserWarning")
NAMES = ("body_mass", "body_inertia", "dof_damping", "geom_friction", "gravity")
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _structure(name: str) -> Structure:
    return structure(load_xml(GYM / f"{name}.xml"))


def _states(tables: Structure, count: int = 12) -> tuple[State, dict[str, Tensor]]:
    """Random states near the ground and masses, friction, damping of each environment."""
    model, rng = tables.model, torch.Generator().manual_seed(0)
    normal = lambda n: torch.randn(count, n, generator=rng, dtype=torch.float64)
    q = torch.tensor(model.qpos0) + 0.1 * normal(model.nq)
    if model.jnt_type[0] == int(mujoco.mjtJoint.mjJNT_FREE):
        q[:, 3:7] /= q[:, 3:7].norm(dim=-1, keepdim=True)
        q[:, 2] -= 0.2
    else:
        q[:, 1] -= 0.05
    state = (q, normal(model.nv), torch.zeros(count, model.na).double(), normal(model.nu).tanh(), normal(model.nv))
    nominal = nominal_fields(tables)
    varied = lambda x: x * (1.0 + 0.1 * torch.rand(count, *x.shape[1:], generator=rng, dtype=torch.float64))
    fields = {name: nominal[name] if name in ("gravity", "body_inertia") else varied(nominal[name]) for name in NAMES}
    return state, fields


def _rounded_engine(model: mujoco.MjModel, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """Stands for mujoco_warp: the C engine's acceleration with an error as of float32."""
    exact = accelerate(model, names, "explicit")

    def engine(state: State, fields: Mapping[str, Tensor]) -> Tensor:
        a = exact(state, fields)[1]
        return a * (1.0 + 1e-5 * torch.sin(torch.arange(a.numel(), dtype=a.dtype)).reshape(a.shape))

    return engine


@pytest.mark.parametrize("name", ["hopper", "half_cheetah"])
def test_corrections_reach_the_solution_of_the_c_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The independent answer is MuJoCo's Newton solver in float64, whose residual is 1e-14 here. 1e-9 of the largest
    # acceleration is what H's condition (1e5) leaves of it.
    monkeypatch.setattr(mujoco_warp_engine, "_engine", _rounded_engine)
    tables = _structure(name)
    kind = integration(tables.model)[1]
    state, fields = _states(tables)
    for found, exact in zip(
        warp_acceleration(tables, NAMES, kind)(state, fields)[:2],
        accelerate(tables.model, NAMES, kind)(state, fields)[:2],
        strict=True,
    ):
        assert (found - exact).abs().max() <= 1e-9 * exact.abs().max()


def test_engines_are_named() -> None:
    with pytest.raises(ValueError, match="engine must be 'mujoco' or 'mujoco_warp', got 'bullet'"):
        _hopper("bullet")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mujoco_warp_engine, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"install sim2real\[mujoco-warp\]"):
        _hopper("mujoco_warp")


def _hopper(engine: str) -> tuple[Tensor, ...]:
    """Next state of a hopper on the ground, and gradients by state, action and parameters."""
    reward = lambda theta, s, a, e, s_next: s_next[:, 0]
    theta_names = ("torso.mass", "floor.friction.slide")
    mdp = mujoco_model(GYM / "hopper.xml", theta_names, reward, frame_skip=2, initial_std=0.05, engine=engine)
    rng = torch.Generator().manual_seed(1)
    theta: Params = {key: torch.tensor(float(value)).double() for key, value in mdp.box.default.items()}
    start = mdp.initial_state(theta, torch.randn(6, mdp.noise_dims[0], generator=rng, dtype=torch.float64))
    start[:, 1] -= 0.03
    action = torch.rand(6, 3, generator=rng, dtype=torch.float64) - 0.5
    leaves = [start.requires_grad_(), action.requires_grad_(), *(value.requires_grad_() for value in theta.values())]
    after = mdp.step(theta, start, action, torch.zeros(6, 0, dtype=torch.float64))
    weight = torch.randn(after.shape, generator=rng, dtype=torch.float64)
    return (after.detach(), *torch.autograd.grad((after * weight).sum(), leaves))


needs_port = pytest.mark.skipif(find_spec("mujoco_warp") is None, reason="mujoco-warp is not installed")


@needs_port
@pytest.mark.slow  # its kernels compile for 20 s
@pytest.mark.parametrize("name", ["hopper", "half_cheetah", "ant", "humanoid"])
def test_mujoco_warp_agrees_with_the_c_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the corrections to the accuracy of float32: in the median 1e-4 of the largest acceleration, 1000 roundings
    # of 6e-8; 1e-2 where a contact is only just made and its depth is of that size (one state of the humanoid: 2e-3).
    # A lost contact is an error of order 1: the buffers start too small and must grow. Afterwards as above.
    monkeypatch.setattr(mujoco_warp_engine, "_ROWS", (1, 1))
    tables = _structure(name)
    kind = integration(tables.model)[1]
    state, fields = _states(tables)
    w, a, _ = accelerate(tables.model, NAMES, kind)(state, fields)
    raw = mujoco_warp_engine._engine(tables.model, NAMES)(list(state), fields)
    error = (raw - a).abs().amax(-1) / a.abs().amax(-1)
    assert error.median() <= 1e-4
    assert error.max() <= 1e-2
    found_w, found_a, residual = warp_acceleration(tables, NAMES, kind)(state, fields)
    assert residual.max() <= 1e-12
    assert (found_a - a).abs().max() <= 1e-9 * a.abs().max()
    assert (found_w - w).abs().max() <= 1e-9 * w.abs().max()


@needs_port
@pytest.mark.slow
def test_gradients_through_mujoco_warp() -> None:
    # MuJoCo's C engine is the independent forward solve; the products are those of the same states
    for found, exact in zip(_hopper("mujoco_warp"), _hopper("mujoco"), strict=True):
        assert (found - exact).abs().max() <= 1e-9 * exact.abs().max()


@needs_port
@pytest.mark.slow
def test_divergence_is_named() -> None:
    tables = _structure("hopper")
    (q, v, act, ctrl, force), fields = _states(tables)
    with pytest.raises(SimulationDivergedError, match="1 of 12 environments"):
        warp_acceleration(tables, NAMES, "explicit")(
            (q, v.index_fill(0, torch.tensor([3]), 1e30), act, ctrl, force), fields
        )
