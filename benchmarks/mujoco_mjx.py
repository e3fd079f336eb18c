"""The peer MJX: microseconds of one step and of one step with its gradient by state and control, as one JSON object.

    python benchmarks/mujoco_mjx.py model.mjb states.npz

The compiled model and the states (qpos, qvel, ctrl `[B, ...]`) are those of `mujoco_cost.py`; float32, one solver
iteration of four line-search steps (MJX has no reverse mode with more), jit and vmap over all states, on one processor.
Compile times are measured apart. Needs `pip install "jax[cpu]" mujoco-mjx` in an environment of its own;
`mujoco_gradients.py` starts this file with the Python that SIM2REAL_MJX_PYTHON names. Nothing of this library is
imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

REPEATS = 20


def microseconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Least time of several runs per state, us, and that of compiling, s."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    compiling = time.perf_counter() - start
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - start)
    return 1e6 * min(taken) / len(arguments[0]), compiling


def main(model_file: str, states_file: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    import mujoco
    import numpy as np
    from mujoco import mjx

    model = mujoco.MjModel.from_binary_path(model_file)
    model.opt.iterations, model.opt.ls_iterations = 1, 4
    device_model = mjx.put_model(model)
    data = mjx.make_data(device_model)

    def after(qpos: Any, qvel: Any, ctrl: Any) -> Any:
        moved = mjx.step(device_model, data.replace(qpos=qpos, qvel=qvel, ctrl=ctrl))
        return jnp.concatenate([moved.qpos, moved.qvel])

    def loss(qpos: Any, qvel: Any, ctrl: Any) -> Any:
        return (after(qpos, qvel, ctrl) ** 2).sum()

    found = np.load(states_file)
    state = tuple(jnp.asarray(found[name], dtype=jnp.float32) for name in ("qpos", "qvel", "ctrl"))
    step, compiled_step = microseconds(jax.jit(jax.vmap(after)), *state)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2))))
    gradient, compiled_gradient = microseconds(both, *state)
    slopes = both(*state)[1]
    result = {
        "step": step,
        "gradient": gradient,
        "compile_step": compiled_step,
        "compile_gradient": compiled_gradient,
        "finite": float(np.mean([np.isfinite(np.asarray(slope)).mean() for slope in slopes])),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
