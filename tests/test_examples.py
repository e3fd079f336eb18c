"""Every example runs, with tiny sizes, as a program of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    # file: (arguments, text expected in the output, modules it needs)
    "bench_rig.py": (("--quick", "--out", "rig"), "done in", ()),
    "compare_gradients.py": (("--quick", "--plot", "figure.png"), "cost per period", ()),
    "design_arm.py": (("--quick", "--plot", "figure.png"), "last design", ("torchrl", "warp")),
    "design_building.py": (("--quick", "--plot", "figure.png"), "last design", ()),
    "design_four_rooms.py": (("--quick", "--plot", "figure.png"), "exact leader value", ()),
    "hdpo_inventory.py": (("--quick", "--plot", "figure.png"), "sharing weights saves", ()),
    "hpo_joint_replenishment.py": (("--quick", "--plot", "figure.png"), "cost per product", ()),
    "hpo_switched_lqr.py": (("--quick", "--plot", "figure.png"), "gap to the optimum", ()),
    "lead_game.py": (("--quick", "--plot", "figure.png"), "exact return", ()),
    "ohio_old_logs.py": (("--quick", "--plot", "figure.png"), "on the real arm it leads", ()),
    "ohio_reacher.py": (("--quick", "--plot", "figure.png"), "inverted goals: return", ()),
    "ppo_hybrid.py": (("--quick", "--plot", "figure.png"), "gap to the optimum", ()),
    "tune_battery.py": (("--quick", "--plot", "figure.png"), "of the gap to the real optimum", ()),
    "tune_mpc.py": (("--quick", "--plot", "figure.png"), "tuned", ()),
    "tune_cstr.py": (("--quick", "--plot", "figure.png"), "paired gain over 20 episodes", ()),
    "warp_cartpole_swingup.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "of 8 new episodes",
        ("warp",),
    ),
    "warp_double_pendulum_fit.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "windows fitted",
        ("warp",),
    ),
    "warp_quadrotor_hover.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "new flights start",
        ("warp",),
    ),
    "mujoco_hopper.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "in Hopper-v5 after",
        ("mujoco", "gymnasium"),
    ),
    "mujoco_payload.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "payload.mass",
        ("mujoco",),
    ),
    "mujoco_reacher.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "new goals are within reach",
        ("mujoco", "gymnasium"),
    ),
    "mujoco_tune.py": (
        ("--quick", "--plot", "figure.png", "--gif", "motion.gif"),
        "tuned to perform: real sleds stop",
        ("mujoco",),
    ),
    "tune_mujoco_cartpole.py": (("--quick", "--plot", "figure.png"), "paired gain over 8 starts", ("mujoco",)),
}


LONG = ("mujoco_tune.py", "ohio_old_logs.py")  # many seconds even when short


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(EXAMPLES)]
)
def test_example_runs(name, tmp_path):
    arguments, expected, modules = EXAMPLES[name]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert expected in done.stdout
    for argument in arguments:
        if argument.endswith((".png", ".gif")):
            assert (tmp_path / argument).stat().st_size > 1000
