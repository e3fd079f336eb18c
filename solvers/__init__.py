"""Solvers: linear systems, implicit derivatives, optima, least squares."""

from sim2real.solvers.bellman import (
    BellmanOptimum,
    discounted_visits,
    optimal_actions,
    optimal_values,
    policy_values,
    q_values,
    state_transition,
    state_values,
)
from sim2real.solvers.box_qp import BoxQPSolution, box_qp
from sim2real.solvers.convex import (
    DerivativeError,
    DerivativeWarning,
    InfeasibleError,
    convex_layer,
    derivative_error,
)
from sim2real.solvers.finite_horizon import finite_horizon_riccati
from sim2real.solvers.flow_inverse import integer_target, invert_flows, target_shares
from sim2real.solvers.flow_program import flow_program, rebalance_flows
from sim2real.solvers.implicit import implicit_argmax, implicit_fixed_point, implicit_root, root_jvp, root_vjp
from sim2real.solvers.inverse_optimization import (
    Experts,
    action_error_bound,
    fit_lower_level,
    kink_rank,
)
from sim2real.solvers.inverse_scip import fit_globally
from sim2real.solvers.inversion import invert
from sim2real.solvers.inversion_descent import invert_adam, invert_cem
from sim2real.solvers.inversion_lqr import (
    AffineLaw,
    feedback_law,
    goal_tracking_law,
    invert_feedback,
    invert_goal_tracking,
    invert_law,
    invert_linear,
)
from sim2real.solvers.inversion_maps import feedback_lower, operational_space_torques, pid_lower, transition_map
from sim2real.solvers.inversion_problem import Inversion
from sim2real.solvers.inversion_smoothing import block_tridiagonal_solve, invert_jointly
from sim2real.solvers.krylov import gmres, minres
from sim2real.solvers.least_squares import Minimum, Objective, QuadraticModel, least_squares, levenberg_marquardt
from sim2real.solvers.linear import cg, dense
from sim2real.solvers.linear_program import LinearProgram, invert_right_hand_side, solve_linear_program
from sim2real.solvers.mpc import MPCPlan, condensed_mpc, mpc_policy
from sim2real.solvers.mpc_report import MPCReport, mpc_report
from sim2real.solvers.neumann import neumann
from sim2real.solvers.nls import gauss_newton_gap, least_squares_layer, theseus_solver
from sim2real.solvers.nystrom import NystromSketch, nystrom_cg, nystrom_sketch
from sim2real.solvers.optimum import policy_optimum
from sim2real.solvers.qp import QPSolution, qp
from sim2real.solvers.relinearised import relinearised_gains
from sim2real.solvers.relu_program import ReluCost, relu_cost, relu_program
from sim2real.solvers.riccati import UnstableError, lyapunov, mean_square_radius, riccati, riccati_residual
from sim2real.solvers.shipping_plan import PlanCosts, PlanStart, plan_shipments
from sim2real.solvers.shipping_program import ShippingLimits, invert_shipments, ship, shipping_goals
from sim2real.solvers.smooth_qp import smooth_qp
from sim2real.solvers.soft_follower import SoftFollower, soft_q_learning, soft_value_iteration
from sim2real.solvers.soft_lqr import SoftLQR, linear_noise_policy, soft_lqr
from sim2real.solvers.soft_lqr_game import ObservedSoftLQR, observed_soft_lqr
from sim2real.solvers.spectrum import Spectrum, spectrum

__all__ = [
    "AffineLaw",
    "BellmanOptimum",
    "BoxQPSolution",
    "DerivativeError",
    "DerivativeWarning",
    "Experts",
    "InfeasibleError",
    "Inversion",
    "LinearProgram",
    "MPCPlan",
    "MPCReport",
    "Minimum",
    "NystromSketch",
    "Objective",
    "ObservedSoftLQR",
    "PlanCosts",
    "PlanStart",
    "QPSolution",
    "QuadraticModel",
    "ReluCost",
    "ShippingLimits",
    "SoftFollower",
    "SoftLQR",
    "Spectrum",
    "UnstableError",
    "action_error_bound",
    "block_tridiagonal_solve",
    "box_qp",
    "cg",
    "condensed_mpc",
    "convex_layer",
    "dense",
    "derivative_error",
    "discounted_visits",
    "feedback_law",
    "feedback_lower",
    "finite_horizon_riccati",
    "fit_globally",
    "fit_lower_level",
    "flow_program",
    "gauss_newton_gap",
    "gmres",
    "goal_tracking_law",
    "implicit_argmax",
    "implicit_fixed_point",
    "implicit_root",
    "integer_target",
    "invert",
    "invert_adam",
    "invert_cem",
    "invert_feedback",
    "invert_flows",
    "invert_goal_tracking",
    "invert_jointly",
    "invert_law",
    "invert_linear",
    "invert_right_hand_side",
    "invert_shipments",
    "kink_rank",
    "least_squares",
    "least_squares_layer",
    "levenberg_marquardt",
    "linear_noise_policy",
    "lyapunov",
    "mean_square_radius",
    "minres",
    "mpc_policy",
    "mpc_report",
    "neumann",
    "nystrom_cg",
    "nystrom_sketch",
    "observed_soft_lqr",
    "operational_space_torques",
    "optimal_actions",
    "optimal_values",
    "pid_lower",
    "plan_shipments",
    "policy_optimum",
    "policy_values",
    "q_values",
    "qp",
    "rebalance_flows",
    "relinearised_gains",
    "relu_cost",
    "relu_program",
    "riccati",
    "riccati_residual",
    "root_jvp",
    "root_vjp",
    "ship",
    "shipping_goals",
    "smooth_qp",
    "soft_lqr",
    "soft_q_learning",
    "soft_value_iteration",
    "solve_linear_program",
    "spectrum",
    "state_transition",
    "state_values",
    "target_shares",
    "theseus_solver",
    "transition_map",
]
