"""Newton's Featherstone solver on a cart-pole, forward and backward, on the CPU: one JSON line with seconds per step.

Run by `w-newton` in a Python that has `newton`; it imports nothing of sim2real. 256 worlds, 50 steps of 0.02 s, masses
and lengths of our cart-pole, forces on the carts. The gradient is that of the sum of squares of the last joint
positions and velocities by the first ones and the forces; it must not be zero.
"""

import itertools
import json
import time

import newton
import numpy as np
import warp as wp

WORLDS, STEPS, DT, REPEATS = 256, 50, 0.02, 3


@wp.kernel
def squares(q: wp.array(dtype=float), w: wp.array(dtype=float), total: wp.array(dtype=float)):
    i = wp.tid()
    wp.atomic_add(total, 0, q[i] * q[i] + w[i] * w[i])


def cartpole() -> newton.ModelBuilder:
    """Cart of 1 kg, uniform pole of 0.1 kg and 1 m."""
    builder = newton.ModelBuilder(up_axis=newton.Axis.Z)
    inertia = 0.1 * 1.0**2 / 12.0
    box = wp.mat33(0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.1)
    rod = wp.mat33(inertia, 0.0, 0.0, 0.0, inertia, 0.0, 0.0, 0.0, 1e-4)
    cart = builder.add_link(mass=1.0, inertia=box)
    pole = builder.add_link(mass=0.1, inertia=rod, com=wp.vec3(0.0, 0.0, 0.5))
    rail = builder.add_joint_prismatic(parent=-1, child=cart, axis=newton.Axis.X)
    hinge = builder.add_joint_revolute(parent=cart, child=pole, axis=newton.Axis.Y)
    builder.add_articulation([rail, hinge])
    return builder


def main() -> None:
    wp.set_device("cpu")
    scene = newton.ModelBuilder(up_axis=newton.Axis.Z)
    scene.replicate(cartpole(), WORLDS)
    model = scene.finalize(requires_grad=True)
    solver = newton.solvers.SolverFeatherstone(model)
    states = [model.state() for _ in range(STEPS + 1)]
    control = model.control()
    start = np.tile([0.0, 0.1], WORLDS).astype(np.float32)
    control.joint_f = wp.array(np.tile([1.0, 0.0], WORLDS).astype(np.float32), requires_grad=True)
    total = wp.zeros(1, dtype=float, requires_grad=True)

    def once() -> float:
        total.zero_()
        states[0].joint_q.assign(start)
        states[0].joint_qd.zero_()
        begin = time.process_time()
        tape = wp.Tape()
        with tape:
            for now, following in itertools.pairwise(states):
                now.clear_forces()
                solver.step(now, following, control, None, DT)
            wp.launch(squares, dim=2 * WORLDS, inputs=[states[-1].joint_q, states[-1].joint_qd, total])
        tape.backward(total)
        taken = time.process_time() - begin
        slope = float(np.abs(states[0].joint_q.grad.numpy()).max())
        if not (np.isfinite(slope) and slope > 0.0):
            raise RuntimeError(f"the gradient of the engine is {slope}")
        tape.zero()
        return taken

    once()
    seconds = min(once() for _ in range(REPEATS)) / (WORLDS * STEPS)
    print(json.dumps({"seconds": seconds, "n": REPEATS, "version": newton.__version__}))


if __name__ == "__main__":
    main()
