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
from sim2real.simulators.building_thermal import (
    ThermalBuilding,
    building_thermal,
    four_zones,
    ring_building,
    thermal_matrix,
)
from sim2real.simulators.cartpole import cartpole, cartpole_energy
from sim2real.simulators.cstr import cstr
from sim2real.simulators.discrete_game import discrete_game, discrete_game_tables
from sim2real.simulators.double_pendulum import base_parameters, double_pendulum, double_pendulum_energy
from sim2real.simulators.evaporation import evaporation, evaporation_cost
from sim2real.simulators.four_rooms import four_rooms, four_rooms_penalties, four_rooms_tables, four_rooms_transition
from sim2real.simulators.integrate import Integrator, integrate_first_order, integrate_second_order
from sim2real.simulators.inventory import one_store, serial_line
from sim2real.simulators.inventory_network import Routes, inventory_network
from sim2real.simulators.joint_replenishment import OrderTerms, joint_replenishment
from sim2real.simulators.linear_gaussian import linear_gaussian, multiplicative_noise_lqr
from sim2real.simulators.lqr_game import LQRGame, lqr_game, lqr_game_data, lqr_game_leader
from sim2real.simulators.pendulum import pendulum, pendulum_energy
from sim2real.simulators.quadrotor import planar_quadrotor, quadrotor, quadrotor_energy
from sim2real.simulators.reacher import reacher, reacher_step
from sim2real.simulators.spring_arm import spring_arm, spring_arm_matrices
from sim2real.simulators.supply_chain import (
    SupplyTask,
    store_room,
    supply_chain,
    supply_features,
    ten_stores,
    three_stores,
)
from sim2real.simulators.switched_lqr import (
    switched_initial_noise,
    switched_initial_states,
    switched_lqr,
    switched_matrices,
    two_state_switched_lqr,
)
from sim2real.simulators.vehicle_routing import (
    NYC_BROOKLYN,
    SHENZHEN_DOWNTOWN_WEST,
    RoutingSettings,
    draw_requests,
    read_routing_scenario,
    routing_features,
    routing_rollout,
)

__all__ = [
    "NYC_BROOKLYN",
    "SHENZHEN_DOWNTOWN_WEST",
    "BatteryTables",
    "BenchRig",
    "Integrator",
    "LQRGame",
    "OrderTerms",
    "RigTrajectory",
    "Routes",
    "RoutingSettings",
    "SupplyTask",
    "ThermalBuilding",
    "base_parameters",
    "battery",
    "battery_tables",
    "building_rc",
    "building_thermal",
    "cartpole",
    "cartpole_energy",
    "cstr",
    "discrete_game",
    "discrete_game_tables",
    "double_pendulum",
    "double_pendulum_energy",
    "draw_requests",
    "drift_load",
    "dynamic_bicycle",
    "evaporation",
    "evaporation_cost",
    "four_rooms",
    "four_rooms_penalties",
    "four_rooms_tables",
    "four_rooms_transition",
    "four_zones",
    "gaussian_load",
    "integrate_first_order",
    "integrate_second_order",
    "inventory_network",
    "joint_replenishment",
    "kinematic_bicycle",
    "linear_gaussian",
    "load_transition",
    "logged_rows",
    "lqr_game",
    "lqr_game_data",
    "lqr_game_leader",
    "mixed_load",
    "multiplicative_noise_lqr",
    "one_store",
    "pendulum",
    "pendulum_energy",
    "planar_quadrotor",
    "quadrotor",
    "quadrotor_energy",
    "reacher",
    "reacher_step",
    "read_routing_scenario",
    "rig_rollout",
    "ring_building",
    "routing_features",
    "routing_rollout",
    "serial_line",
    "spring_arm",
    "spring_arm_matrices",
    "store_room",
    "supply_chain",
    "supply_features",
    "switched_initial_noise",
    "switched_initial_states",
    "switched_lqr",
    "switched_matrices",
    "ten_stores",
    "thermal_matrix",
    "three_stores",
    "two_state_switched_lqr",
]
