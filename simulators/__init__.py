"""Simulators: one system each, one function returning a `ModelMDP`."""

from sim2real.simulators.battery import (
    BatteryTables,
    battery,
    battery_tables,
    drift_load,
    gaussian_load,
    load_transition,
    mixed_load,
)
from sim2real.simulators.bench_rig import BenchRig, RigTrajectory, logged_rows, rig_rollout
from sim2real.simulators.bicycle import dynamic_bicycle, kinematic_bicycle
from sim2real.simulators.building_rc import building_rc
from sim2real.simulators.cartpole import cartpole, cartpole_energy
from sim2real.simulators.cstr import cstr
from sim2real.simulators.double_pendulum import base_parameters, double_pendulum, double_pendulum_energy
from sim2real.simulators.evaporation import evaporation, evaporation_cost
from sim2real.simulators.integrate import Integrator, integrate_first_order, integrate_second_order
from sim2real.simulators.linear_gaussian import linear_gaussian, multiplicative_noise_lqr
from sim2real.simulators.pendulum import pendulum, pendulum_energy
from sim2real.simulators.quadrotor import planar_quadrotor, quadrotor, quadrotor_energy

__all__ = [
    "BatteryTables",
    "BenchRig",
    "Integrator",
    "RigTrajectory",
    "base_parameters",
    "battery",
    "battery_tables",
    "building_rc",
    "cartpole",
    "cartpole_energy",
    "cstr",
    "double_pendulum",
    "double_pendulum_energy",
    "drift_load",
    "dynamic_bicycle",
    "evaporation",
    "evaporation_cost",
    "gaussian_load",
    "integrate_first_order",
    "integrate_second_order",
    "kinematic_bicycle",
    "linear_gaussian",
    "load_transition",
    "logged_rows",
    "mixed_load",
    "multiplicative_noise_lqr",
    "pendulum",
    "pendulum_energy",
    "planar_quadrotor",
    "quadrotor",
    "quadrotor_energy",
    "rig_rollout",
]
