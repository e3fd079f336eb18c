"""Warp kernels that roll a model out, and the four passes over time that make them a `Program`.

With s_0 given and s_{t+1} = f(theta, s_t, a_t, e_t),

    value    t = 0 .. T-1    s_{t+1} = f(...)
    push     t = 0 .. T-1    ds_{t+1} = df(...)                            f on dual numbers
    pull     t = T-1 .. 0    l_t = g_t + (df/ds)' l_{t+1}                  theta's gradient is summed over time
    second   t = T-1 .. 0    the same for the pair (s, ds), with the gradient of <l, f> + <m, df>

The gradients are those of scalar functions `<l, f>` that Warp derives; they are called inside forward kernels, so the
adjoint l stays in place, no kernel adds to memory that another thread writes, and the memory beyond inputs and outputs
does not grow with T. One thread of the CPU takes a tile of environments through time (rows of a tile are independent,
which hides the latency of a step); a GPU has one environment per thread. No sum runs over environments, so results do
not depend on tiles or threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import warp as wp


@dataclass(frozen=True)
class Kernels:
    value: Any
    push: Any
    pull: Any
    second: Any


def roll_kernels(primal: Any, dual: Any, types: Sequence[Any]) -> Kernels:
    """Kernels of a step `primal(theta, state, action, noise) -> state`; types of the four arguments, all vectors.

    `dual(theta, d_theta, state, d_state, action, d_action, noise, d_noise)` returns the value and its tangent.
    """
    P, N, M, K = types

    @wp.func
    @no_type_check
    def product(theta: P, state: N, action: M, noise: K, adjoint: N):
        return wp.dot(adjoint, primal(theta, state, action, noise))

    @wp.func
    @no_type_check
    def dual_product(
        theta: P,
        d_theta: P,
        state: N,
        d_state: N,
        action: M,
        d_action: M,
        noise: K,
        d_noise: K,
        adjoint: N,
        d_adjoint: N,
    ):
        _y, dy = dual(theta, d_theta, state, d_state, action, d_action, noise, d_noise)
        return wp.dot(adjoint, y) + wp.dot(d_adjoint, dy)

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def roll_value(
        first: int, last: int, tile: int, steps: int,
        theta_in: wp.array2d(dtype=P), action_in: wp.array3d(dtype=M), noise_in: wp.array3d(dtype=K),
        state_in: wp.array3d(dtype=N), state_out: wp.array3d(dtype=N),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for t in range(steps):
            for i in range(low, high):
                state_out[c, t, i] = primal(theta_in[c, i], state_in[c, t, i], action_in[c, t, i], noise_in[c, t, i])

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def roll_push(
        first: int, last: int, tile: int, steps: int,
        theta_in: wp.array2d(dtype=P), d_theta_in: wp.array2d(dtype=P),
        action_in: wp.array3d(dtype=M), d_action_in: wp.array3d(dtype=M),
        noise_in: wp.array3d(dtype=K), d_noise_in: wp.array3d(dtype=K),
        state_in: wp.array3d(dtype=N), d_state_in: wp.array3d(dtype=N), d_state_out: wp.array3d(dtype=N),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for t in range(steps):
            for i in range(low, high):
                _y, dy = dual(
                    theta_in[c, i], d_theta_in[c, i], state_in[c, t, i], d_state_in[c, t, i],
                    action_in[c, t, i], d_action_in[c, t, i], noise_in[c, t, i], d_noise_in[c, t, i],
                )  # fmt: skip
                d_state_out[c, t, i] = dy

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def roll_pull(
        first: int, last: int, tile: int, steps: int,
        theta_in: wp.array2d(dtype=P), action_in: wp.array3d(dtype=M), noise_in: wp.array3d(dtype=K),
        state_in: wp.array3d(dtype=N), cotangent_in: wp.array3d(dtype=N),
        theta_out: wp.array2d(dtype=P), adjoint_out: wp.array2d(dtype=N),
        action_out: wp.array3d(dtype=M), noise_out: wp.array3d(dtype=K),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for back in range(steps):
            t = steps - 1 - back
            for i in range(low, high):
                adjoint = adjoint_out[c, i] + cotangent_in[c, t, i]
                by_theta, by_state, by_action, by_noise, _by_adjoint = wp.grad(product)(
                    theta_in[c, i], state_in[c, t, i], action_in[c, t, i], noise_in[c, t, i], adjoint
                )
                theta_out[c, i] = theta_out[c, i] + by_theta
                adjoint_out[c, i] = by_state
                action_out[c, t, i] = by_action
                noise_out[c, t, i] = by_noise

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def roll_second(
        first: int, last: int, tile: int, steps: int,
        theta_in: wp.array2d(dtype=P), d_theta_in: wp.array2d(dtype=P),
        action_in: wp.array3d(dtype=M), d_action_in: wp.array3d(dtype=M),
        noise_in: wp.array3d(dtype=K), d_noise_in: wp.array3d(dtype=K),
        state_in: wp.array3d(dtype=N), d_state_in: wp.array3d(dtype=N),
        cotangent_in: wp.array3d(dtype=N), d_cotangent_in: wp.array3d(dtype=N),
        theta_out: wp.array2d(dtype=P), d_theta_out: wp.array2d(dtype=P),
        adjoint_out: wp.array2d(dtype=N), d_adjoint_out: wp.array2d(dtype=N),
        action_out: wp.array3d(dtype=M), d_action_out: wp.array3d(dtype=M),
        noise_out: wp.array3d(dtype=K), d_noise_out: wp.array3d(dtype=K),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for back in range(steps):
            t = steps - 1 - back
            for i in range(low, high):
                adjoint = adjoint_out[c, i] + cotangent_in[c, t, i]
                d_adjoint = d_adjoint_out[c, i] + d_cotangent_in[c, t, i]
                (
                    by_theta, by_d_theta, by_state, by_d_state, by_action, by_d_action, by_noise, by_d_noise,
                    _by_adjoint, _by_d_adjoint,
                ) = wp.grad(dual_product)(
                    theta_in[c, i], d_theta_in[c, i], state_in[c, t, i], d_state_in[c, t, i],
                    action_in[c, t, i], d_action_in[c, t, i], noise_in[c, t, i], d_noise_in[c, t, i],
                    adjoint, d_adjoint,
                )  # fmt: skip
                theta_out[c, i] = theta_out[c, i] + by_theta
                d_theta_out[c, i] = d_theta_out[c, i] + by_d_theta
                adjoint_out[c, i] = by_state
                d_adjoint_out[c, i] = by_d_state
                action_out[c, t, i] = by_action
                d_action_out[c, t, i] = by_d_action
                noise_out[c, t, i] = by_noise
                d_noise_out[c, t, i] = by_d_noise

    return Kernels(roll_value, roll_push, roll_pull, roll_second)


def reward_kernels(primal: Any, dual: Any, types: Sequence[Any]) -> Kernels:
    """Kernels of a reward `primal(theta, state, action, noise, following) -> scalar`, one environment at a time.

    types: of theta, state, action, noise, following, and of a vector of one number, which rewards are stored as.
    """
    P, N, M, K, F, R = types

    @wp.func
    @no_type_check
    def product(theta: P, state: N, action: M, noise: K, following: F, adjoint: R):
        return adjoint[0] * primal(theta, state, action, noise, following)

    @wp.func
    @no_type_check
    def dual_product(
        theta: P, d_theta: P, state: N, d_state: N, action: M, d_action: M, noise: K, d_noise: K,
        following: F, d_following: F, adjoint: R, d_adjoint: R,
    ):  # fmt: skip
        _y, dy = dual(theta, d_theta, state, d_state, action, d_action, noise, d_noise, following, d_following)
        return adjoint[0] * y + d_adjoint[0] * dy

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def reward_value(
        first: int, last: int, tile: int,
        theta_in: wp.array2d(dtype=P), state_in: wp.array2d(dtype=N), action_in: wp.array2d(dtype=M),
        noise_in: wp.array2d(dtype=K), following_in: wp.array2d(dtype=F), reward_out: wp.array2d(dtype=R),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for i in range(low, high):
            reward_out[c, i] = R(
                primal(theta_in[c, i], state_in[c, i], action_in[c, i], noise_in[c, i], following_in[c, i])
            )

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def reward_push(
        first: int, last: int, tile: int,
        theta_in: wp.array2d(dtype=P), d_theta_in: wp.array2d(dtype=P),
        state_in: wp.array2d(dtype=N), d_state_in: wp.array2d(dtype=N),
        action_in: wp.array2d(dtype=M), d_action_in: wp.array2d(dtype=M),
        noise_in: wp.array2d(dtype=K), d_noise_in: wp.array2d(dtype=K),
        following_in: wp.array2d(dtype=F), d_following_in: wp.array2d(dtype=F), d_reward_out: wp.array2d(dtype=R),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for i in range(low, high):
            _y, dy = dual(
                theta_in[c, i], d_theta_in[c, i], state_in[c, i], d_state_in[c, i], action_in[c, i], d_action_in[c, i],
                noise_in[c, i], d_noise_in[c, i], following_in[c, i], d_following_in[c, i],
            )  # fmt: skip
            d_reward_out[c, i] = R(dy)

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def reward_pull(
        first: int, last: int, tile: int,
        theta_in: wp.array2d(dtype=P), state_in: wp.array2d(dtype=N), action_in: wp.array2d(dtype=M),
        noise_in: wp.array2d(dtype=K), following_in: wp.array2d(dtype=F), cotangent_in: wp.array2d(dtype=R),
        theta_out: wp.array2d(dtype=P), state_out: wp.array2d(dtype=N), action_out: wp.array2d(dtype=M),
        noise_out: wp.array2d(dtype=K), following_out: wp.array2d(dtype=F),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for i in range(low, high):
            by_theta, by_state, by_action, by_noise, by_following, _by_adjoint = wp.grad(product)(
                theta_in[c, i], state_in[c, i], action_in[c, i], noise_in[c, i], following_in[c, i], cotangent_in[c, i]
            )
            theta_out[c, i] = by_theta
            state_out[c, i] = by_state
            action_out[c, i] = by_action
            noise_out[c, i] = by_noise
            following_out[c, i] = by_following

    @wp.kernel(enable_backward=False, module="unique")
    @no_type_check
    def reward_second(
        first: int, last: int, tile: int,
        theta_in: wp.array2d(dtype=P), d_theta_in: wp.array2d(dtype=P),
        state_in: wp.array2d(dtype=N), d_state_in: wp.array2d(dtype=N),
        action_in: wp.array2d(dtype=M), d_action_in: wp.array2d(dtype=M),
        noise_in: wp.array2d(dtype=K), d_noise_in: wp.array2d(dtype=K),
        following_in: wp.array2d(dtype=F), d_following_in: wp.array2d(dtype=F),
        cotangent_in: wp.array2d(dtype=R), d_cotangent_in: wp.array2d(dtype=R),
        theta_out: wp.array2d(dtype=P), d_theta_out: wp.array2d(dtype=P),
        state_out: wp.array2d(dtype=N), d_state_out: wp.array2d(dtype=N),
        action_out: wp.array2d(dtype=M), d_action_out: wp.array2d(dtype=M),
        noise_out: wp.array2d(dtype=K), d_noise_out: wp.array2d(dtype=K),
        following_out: wp.array2d(dtype=F), d_following_out: wp.array2d(dtype=F),
    ):  # fmt: skip
        c, block = wp.tid()
        low = first + block * tile
        high = wp.min(low + tile, last)
        for i in range(low, high):
            (
                by_theta, by_d_theta, by_state, by_d_state, by_action, by_d_action, by_noise, by_d_noise,
                by_following, by_d_following, _by_adjoint, _by_d_adjoint
            ) = wp.grad(dual_product)(
                theta_in[c, i], d_theta_in[c, i], state_in[c, i], d_state_in[c, i], action_in[c, i], d_action_in[c, i],
                noise_in[c, i], d_noise_in[c, i], following_in[c, i], d_following_in[c, i],
                cotangent_in[c, i], d_cotangent_in[c, i],
            )  # fmt: skip
            theta_out[c, i] = by_theta
            d_theta_out[c, i] = by_d_theta
            state_out[c, i] = by_state
            d_state_out[c, i] = by_d_state
            action_out[c, i] = by_action
            d_action_out[c, i] = by_d_action
            noise_out[c, i] = by_noise
            d_noise_out[c, i] = by_d_noise
            following_out[c, i] = by_following
            d_following_out[c, i] = by_d_following

    return Kernels(reward_value, reward_push, reward_pull, reward_second)
