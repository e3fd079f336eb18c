"""The peer MJX: microseconds of one step and of one step with its gradient by state and control, as one JSON object.

    python benchmarks/mujoco_mjx.py 256

Hopper at its reset pose, float32, one solver iteration (MJX has no reverse mode with more), on one processor. Needs
`pip install "jax[cpu]" mujoco-mjx` in an environment of its own; `mujoco_gradients.py` starts this file with the Python
that SIM2REAL_MJX_PYTHON names. Nothing of this library is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def microseconds(function: Callable[..., Any], *arguments: Any, copies: int) -> tuple[float, float]:
    """Least of 20 runs per copy, and the seconds that compiling took."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    compiling = time.perf_counter() - start
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - start)
    return 1e6 * min(taken) / copies, compiling


def main(copies: int, file: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    import mujoco
    from mujoco import mjx

    model = mujoco.MjModel.from_xml_path(file)
    model.opt.iterations, model.opt.ls_iterations = 1, 4
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    device_model = mjx.put_model(model)
    data = mjx.make_data(device_model)

    def after(qpos: Any, qvel: Any, ctrl: Any) -> Any:
        moved = mjx.step(device_model, data.replace(qpos=qpos, qvel=qvel, ctrl=ctrl))
        return jnp.concatenate([moved.qpos, moved.qvel])

    def loss(qpos: Any, qvel: Any, ctrl: Any) -> Any:
        return (after(qpos, qvel, ctrl) ** 2).sum()

    def rows(x: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(x, dtype=jnp.float32), (copies, len(x)))

    state = rows(data.qpos), rows(data.qvel), rows(data.ctrl)
    step, compiled_step = microseconds(jax.jit(jax.vmap(after)), *state, copies=copies)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2))))
    gradient, compiled_gradient = microseconds(both, *state, copies=copies)
    print(
        json.dumps(
            {
                "step": step,
                "gradient": gradient,
                "compile_step": compiled_step,
                "compile_gradient": compiled_gradient,
                "version": mujoco.__version__,
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
