"""Models that the commands know by name: the options of each simulator, and of its Warp twin.

A twin has the options of the torch model, and its parameters with the same names and units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from sim2real.conf.keys import key

_INF = float("inf")


@dataclass
class PendulumModel:
    """Torque-driven pendulum with viscous and Coulomb friction."""

    _target_: str = "sim2real.simulators.pendulum"
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("midpoint", "", "time stepping", choices=("semi_implicit", "midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    initial_angle: float = key(0.0, "rad", "start angle of in-sim rollouts; 0 hangs, 3.1416 is upright")
    initial_std: float = key(0.05, "rad, rad/s", "standard deviation of the start state of in-sim rollouts")


@dataclass
class DoublePendulumModel:
    """Two-link pendulum through gears (9 base parameters, or masses, lengths and inertias)."""

    _target_: str = "sim2real.simulators.double_pendulum"
    parameters: str = key("base", "", "parameter set", choices=("base", "physical"))
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("midpoint", "", "time stepping", choices=("semi_implicit", "midpoint", "rk4"))
    substeps: int = key(2, "", "integration steps per time step; 2 keep stiff friction stable at 4 ms")
    discount: float = key(1.0, "1/step", "in-sim discount")
    initial_std: float = key(0.05, "rad, rad/s", "standard deviation of the start state of in-sim rollouts")


@dataclass
class BuildingModel:
    """Grey-box house: 1R1C, 2R2C or 3R3C network of air, envelope and heater temperatures."""

    _target_: str = "sim2real.simulators.building_rc"
    order: int = key(3, "", "number of temperatures, 1 to 3")
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("exact", "", "time stepping", choices=("exact", "midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    setpoint: float = key(20.0, "degC", "temperature the reward asks for")
    energy_price: float = key(0.01, "1/kWh", "price in the reward")
    initial_temperature: float = key(20.0, "degC", "start temperature of in-sim rollouts")
    initial_std: float = key(0.0, "K", "standard deviation of the start state of in-sim rollouts")


@dataclass
class CartpoleModel:
    """Cart on a rail with a pole; angle 0 is upright."""

    _target_: str = "sim2real.simulators.cartpole"
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("midpoint", "", "time stepping", choices=("semi_implicit", "midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    initial_angle: float = key(0.0, "rad", "start angle of in-sim rollouts")
    initial_std: float = key(0.05, "SI", "standard deviation of the start state of in-sim rollouts")
    position_limit: float = key(_INF, "m", "an episode ends beyond")
    angle_limit: float = key(_INF, "rad", "an episode ends beyond")
    alive_reward: float = key(0.0, "1/s", "reward for not having ended")


@dataclass
class QuadrotorModel:
    """Quadrotor in space with rotor drag and lagging motors."""

    _target_: str = "sim2real.simulators.quadrotor"
    command: str = key("thrust", "", "what motors are told, N or rad/s", choices=("thrust", "speed"))
    frame: str = key("plus", "", "rotors on the body axes or between them", choices=("plus", "cross"))
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("rk4", "", "time stepping", choices=("midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    initial_std: float = key(0.05, "SI", "standard deviation of the start state of in-sim rollouts")


@dataclass
class PlanarQuadrotorModel:
    """Quadrotor in a vertical plane with rotor drag and lagging motors."""

    _target_: str = "sim2real.simulators.planar_quadrotor"
    command: str = key("thrust", "", "what motors are told, N or rad/s", choices=("thrust", "speed"))
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("rk4", "", "time stepping", choices=("midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    initial_std: float = key(0.05, "SI", "standard deviation of the start state of in-sim rollouts")


@dataclass
class KinematicBicycleModel:
    """Car that does not slip, steered by its steering rate and acceleration."""

    _target_: str = "sim2real.simulators.kinematic_bicycle"
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("rk4", "", "time stepping", choices=("midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    speed: float = key(10.0, "m/s", "speed the reward asks for, and of the start")
    initial_std: float = key(0.05, "SI", "standard deviation of the start state of in-sim rollouts")


@dataclass
class DynamicBicycleModel:
    """Car on linear or Pacejka tyres, steered by its steering rate and acceleration."""

    _target_: str = "sim2real.simulators.dynamic_bicycle"
    tyre: str = key("pacejka", "", "tyre law", choices=("linear", "pacejka"))
    dt: float | None = key(None, "s", "time step; default: the sampling period of the log")
    integrator: str = key("rk4", "", "time stepping", choices=("midpoint", "rk4"))
    substeps: int = key(1, "", "integration steps per time step")
    discount: float = key(1.0, "1/step", "in-sim discount")
    speed: float = key(10.0, "m/s", "speed the reward asks for, and of the start")
    slow_speed: float = key(1.0, "m/s", "speed below which slip is smoothed")
    initial_std: float = key(0.05, "SI", "standard deviation of the start state of in-sim rollouts")


@dataclass
class MujocoModel:
    """A MuJoCo XML file; signals and actions are named after its joints (JOINT, JOINT_velocity) and actuators."""

    _target_: str = "sim2real.simulators.mujoco_command.mujoco_from_xml"
    xml: str = key(MISSING, "", "XML file, also xml=; it is taken as untrusted", path=True)
    theta: Any = key(  # noqa: RUF009
        MISSING, "", "its parameters, also theta=: [torso.mass,*.damping] or {torso.mass: [low,high]}"
    )
    dt: float | None = key(None, "s", "control period; default: the sampling period of the log")
    timestep: float | None = key(None, "s", "engine time step; default: the XML's")
    folder: str | None = key(None, "", "where files that the XML names may lie; default: its own folder", path=True)
    initial: str | None = key(None, "", "keyframe at which in-sim rollouts start; default: the reference pose")
    initial_std: float = key(0.0, "SI", "standard deviation of the start state of in-sim rollouts")
    delay: float = key(0.0, "s", "of the controls")
    weights: str = key(
        "frozen", "", "whether contact softness moves with mass, as compiling anew would", choices=("frozen", "moving")
    )
    discount: float = key(1.0, "1/step", "in-sim discount")


@dataclass
class WarpPendulumModel(PendulumModel):
    """The model pendulum as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_pendulum.warp_pendulum"


@dataclass
class WarpDoublePendulumModel(DoublePendulumModel):
    """The model double_pendulum as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_double_pendulum.warp_double_pendulum"


@dataclass
class WarpCartpoleModel(CartpoleModel):
    """The model cartpole as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_cartpole.warp_cartpole"


@dataclass
class WarpBuildingModel(BuildingModel):
    """The model building_rc as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_building_rc.warp_building_rc"


@dataclass
class WarpQuadrotorModel(QuadrotorModel):
    """The model quadrotor as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_quadrotor.warp_quadrotor"


@dataclass
class WarpPlanarQuadrotorModel(PlanarQuadrotorModel):
    """The model planar_quadrotor as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_quadrotor.warp_planar_quadrotor"


@dataclass
class WarpKinematicBicycleModel(KinematicBicycleModel):
    """The model kinematic_bicycle as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_bicycle.warp_kinematic_bicycle"


@dataclass
class WarpDynamicBicycleModel(DynamicBicycleModel):
    """The model dynamic_bicycle as a Warp kernel."""

    _target_: str = "sim2real.simulators.warp_bicycle.warp_dynamic_bicycle"


MODELS: dict[str, type] = {
    "pendulum": PendulumModel,
    "double_pendulum": DoublePendulumModel,
    "cartpole": CartpoleModel,
    "building_rc": BuildingModel,
    "quadrotor": QuadrotorModel,
    "planar_quadrotor": PlanarQuadrotorModel,
    "kinematic_bicycle": KinematicBicycleModel,
    "dynamic_bicycle": DynamicBicycleModel,
    "mujoco": MujocoModel,
    "warp_pendulum": WarpPendulumModel,
    "warp_double_pendulum": WarpDoublePendulumModel,
    "warp_cartpole": WarpCartpoleModel,
    "warp_building_rc": WarpBuildingModel,
    "warp_quadrotor": WarpQuadrotorModel,
    "warp_planar_quadrotor": WarpPlanarQuadrotorModel,
    "warp_kinematic_bicycle": WarpKinematicBicycleModel,
    "warp_dynamic_bicycle": WarpDynamicBicycleModel,
}
