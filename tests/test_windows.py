"""Windows of a log, their start states, and the exact derivatives of batched rolls."""

from dataclasses import replace

import pytest
import torch
from problems import scalar, seeded, stack
from synthetic_logs import simulated_log, smooth_inputs
from torch import Tensor
from torch.func import jacrev

from sim2real import ModelMDP, Params, RolloutLog, WindowError, default_params
from sim2real.gauss_newton import global_jacobian, jacobian_products, objective
from sim2real.misfit import Misfit, linearize, roll_windows, start_error_growth
from sim2real.roll import (
    Path,
    WarmUp,
    adjoint_roll,
    forward_sensitivity,
    observe_jacobians,
    roll,
    step_jacobians,
    tangent_roll,
    warm_start,
)
from sim2real.simulators import building_rc, double_pendulum, linear_gaussian, pendulum
from sim2real.unknowns import Nuisance, make_unknowns
from sim2real.windows import WindowChoice, cut_windows, match_channels, subset, window_actions

HOUR = 3600.0


def pendulum_log(runs: int = 2, steps: int = 200) -> tuple[ModelMDP, Params, RolloutLog]:
    mdp = pendulum(dt=0.01)
    theta = default_params(mdp.box) | {"coulomb": scalar(0.05), "torque_offset": scalar(0.02)}
    start = torch.linspace(-0.5, 0.5, runs, dtype=torch.float64).unsqueeze(1) * stack(1.0, 0.0)
    return mdp, theta, simulated_log(mdp, theta, start, smooth_inputs(runs, steps, 1, mdp.dt, 0))


def house_log(days: int = 6) -> tuple[ModelMDP, Params, RolloutLog]:
    mdp = building_rc(3)
    theta = default_params(mdp.box)
    hours = torch.arange(24.0 * days, dtype=torch.float64)
    weather = (5 + 4 * torch.sin(hours / 24 * 6.283)).view(1, -1, 1)
    heating = 20 * (1 + smooth_inputs(1, len(hours), 1, 0.05, 1))
    start = stack([20.0, 19.0, 25.0])
    return mdp, theta, simulated_log(mdp, theta, start, heating, weather, noise=0.1)


def make_misfit(
    mdp: ModelMDP,
    log: RolloutLog,
    theta: Params,
    nuisance: Nuisance,
    choice: WindowChoice,
    free: tuple[str, ...] | None = None,
    scale: float | None = 0.02,
) -> Misfit:
    channels = match_channels(mdp, log, warmup=choice.warmup > 0)
    windows = cut_windows(mdp, log, channels, choice, sample_every=3)
    free = tuple(theta) if free is None else free
    unknowns = make_unknowns(mdp, log, channels, theta, free, nuisance, prior_width=1.0)
    return Misfit(mdp, log, channels, windows, unknowns, scale, 0.02)


# Which windows


def test_windows_of_the_protocol() -> None:
    mdp, _, log = pendulum_log(runs=1, steps=200)
    channels = match_channels(mdp, log)
    windows = cut_windows(mdp, log, channels, WindowChoice(horizon=0.5, stride=0.1))
    # i = 10, 20, ... while i + 50 <= 200 - 10
    assert windows.start.tolist() == list(range(10, 141, 10))
    assert windows.rows.tolist() == list(range(1, 51))
    torch.testing.assert_close(windows.anchor, log.signals[0, windows.start])
    torch.testing.assert_close(windows.measured[2, :, 0], log.signals[0, 31:81, 0])
    actions = window_actions(windows, log.actions)
    torch.testing.assert_close(actions[:, 2], log.actions[0, 30:80])
    every = cut_windows(mdp, log, channels, WindowChoice(horizon=0.5, stride=0.1), sample_every=20)
    assert every.rows.tolist() == [10, 30, 50]  # the last row always counts


def test_times_ranges_and_gaps_choose_windows() -> None:
    mdp, _, log = pendulum_log(runs=1, steps=200)
    channels = match_channels(mdp, log)
    choose = lambda log=log, **more: cut_windows(mdp, log, channels, WindowChoice(0.5, 0.1, **more)).start.tolist()
    assert choose(start_after=0.5) == list(range(50, 141, 10))
    assert choose(end_before=1.0) == list(range(10, 51, 10))
    mask = log.mask.clone()
    mask[0, 100] = False
    assert choose(replace(log, mask=mask)) == [10, 20, 30, 40, 50, 110, 120, 130, 140]
    angles = log.signals.clone()
    angles[0, 75, 0] += 2 * torch.pi * 3 + 2.0  # wrapped, this is about 2 rad away
    allowed = [k for k in choose() if not k <= 75 <= k + 50]
    assert choose(replace(log, signals=angles), keep={"angle": (-1.0, 1.0)}) == allowed
    assert choose(replace(log, signals=angles), keep={"angle": (-3.0, 3.0)}) == choose()


def test_shorter_runs_end_where_they_were_recorded() -> None:
    mdp, _, log = pendulum_log(runs=2, steps=200)
    mask = log.mask.clone()
    mask[1, 100:] = False
    windows = cut_windows(mdp, replace(log, mask=mask), match_channels(mdp, log), WindowChoice(0.5, 0.1))
    assert windows.start[windows.episode == 1].tolist() == [10, 20, 30, 40]
    chosen = subset(windows, windows.episode == 1)
    torch.testing.assert_close(chosen.measured, log.signals[1, 11:91, :1].unfold(0, 50, 10).transpose(1, 2))


def test_no_window_and_bad_choices_are_errors() -> None:
    mdp, _, log = pendulum_log(runs=1, steps=60)
    channels = match_channels(mdp, log)
    with pytest.raises(WindowError, match=r"no window of 50 steps .*\[60\]"):
        cut_windows(mdp, log, channels, WindowChoice(0.5, 0.1))
    with pytest.raises(WindowError, match="shorter than one step"):
        cut_windows(mdp, log, channels, WindowChoice(0.001, 0.1))
    with pytest.raises(WindowError, match="sample_every"):
        cut_windows(mdp, log, channels, WindowChoice(0.1, 0.1), sample_every=0)
    with pytest.raises(WindowError, match="keep names 'speed'"):
        cut_windows(mdp, log, channels, WindowChoice(0.1, 0.1, keep={"speed": (0.0, 1.0)}))


def test_mismatched_logs_are_named() -> None:
    mdp, _, log = pendulum_log()
    rename = lambda **kinds: replace(log, names=log.names | kinds)
    cases = [
        (mdp, replace(log, dt=0.02), (), "steps at 0.02 s, the model at 0.01"),
        (mdp, log, ("speed",), "signal 'speed' must be in the model"),
        (mdp, rename(signal=("angle", "speed")), (), "derivative_of"),
        (mdp, rename(signal=("a", "b")), (), "no signal is in both"),
        (mdp, rename(action=("force",)), (), r"the model needs the action \['torque'\]"),
        (mdp, replace(log, units=log.units | {"angle": "deg"}), (), "'angle' is in deg"),
        (mdp, replace(log, units=log.units | {"torque": "mN m"}), (), "'torque' is in mN m"),
        (replace(mdp, names={}), log, (), "names no states"),
    ]
    for model, other, signals, message in cases:
        with pytest.raises(WindowError, match=message):
            match_channels(model, other, signals)


def test_an_unmeasured_state_needs_a_warm_up() -> None:
    mdp, _, log = house_log()
    with pytest.raises(WindowError, match="set a warmup"):
        match_channels(mdp, log)
    channels = match_channels(mdp, log, warmup=True)
    assert channels.anchor.tolist() == [0, 0, 0]
    assert channels.own[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_all_signals_are_compared_where_none_is_the_rate_of_another() -> None:
    mdp, _, log = pendulum_log()
    assert match_channels(mdp, log).signals == ("angle",)
    assert match_channels(mdp, log).rates.tolist() == [1]
    assert match_channels(mdp, log, ("angle", "velocity")).signals == ("angle", "velocity")


# Derivatives of rolls, against automatic differentiation through the loop


def small_roll(seed: int = 0) -> tuple[ModelMDP, Params, Tensor, Tensor, Tensor]:
    mdp = double_pendulum(dt=0.01)
    theta = default_params(mdp.box)
    start = 0.3 * torch.randn(3, 4, generator=seeded(seed), dtype=torch.float64)
    actions = 0.2 * torch.randn(7, 3, 2, generator=seeded(seed + 1), dtype=torch.float64)
    return mdp, theta, start, actions, actions[..., :0]


def test_forward_sensitivity_equals_differentiation_through_the_loop() -> None:
    mdp, theta, start, actions, noise = small_roll()
    free = ("A", "h", "b1", "cf2")
    states = roll(mdp, theta, start, actions, noise)
    flat = (states[:-1].flatten(0, 1), actions.flatten(0, 1), noise.flatten(0, 1))
    # chunks of 5 do not divide the 21 samples
    steps = step_jacobians(mdp, theta, free, *flat, wrt_action=True, chunk=5)
    A, B = steps.state.view(7, 3, 4, 4), steps.params.view(7, 3, 4, 4)
    S, Phi = forward_sensitivity(A, B, [0, 4, 7])
    through = jacrev(lambda part: roll(mdp, theta | part, start, actions, noise))({key: theta[key] for key in free})
    by_start = jacrev(lambda s: roll(mdp, theta, s, actions, noise))(start)
    for index, row in enumerate((0, 4, 7)):
        for column, key in enumerate(free):
            torch.testing.assert_close(S[index, ..., column], through[key][row], rtol=1e-10, atol=1e-12)
        for w in range(3):
            torch.testing.assert_close(Phi[index, w], by_start[row, w, :, w], rtol=1e-10, atol=1e-12)
    by_action = jacrev(lambda a: mdp.step(theta, flat[0], a, flat[2]))(flat[1])
    assert steps.action is not None
    torch.testing.assert_close(steps.action, torch.einsum("kikm->kim", by_action))


def test_tangent_and_adjoint_rolls_are_transposes_of_each_other() -> None:
    mdp, theta, start, actions, noise = small_roll()
    free = ("A", "mu", "cf1")
    states = roll(mdp, theta, start, actions, noise)
    flat = (states[:-1].flatten(0, 1), actions.flatten(0, 1), noise.flatten(0, 1))
    path = Path(states, actions, noise, step_jacobians(mdp, theta, (), *flat).state.view(7, 3, 4, 4))
    generator = seeded(5)
    dtheta = {key: torch.randn((), generator=generator, dtype=torch.float64) for key in free}
    ds0 = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(8, 3, 4, generator=generator, dtype=torch.float64)
    moved = tangent_roll(mdp, theta, path, dtheta, ds0)
    by_theta, by_start, by_action = adjoint_roll(mdp, theta, free, path, cotangent)
    left = (moved * cotangent).sum()
    right = sum(dtheta[key] * by_theta[key] for key in free) + (ds0 * by_start).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(
        (roll(mdp, theta, start, a := actions.clone().requires_grad_(), noise) * cotangent).sum(), a
    )[0]
    torch.testing.assert_close(by_action, expected, rtol=1e-10, atol=1e-12)


def test_observation_with_parameters_is_differentiated_too() -> None:
    mdp = replace(
        pendulum(), observe=lambda theta, s: torch.stack([theta["mgl"] * torch.sin(s[..., 0]), s[..., 1]], -1)
    )
    theta, states = default_params(mdp.box), torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    by_state, by_params = observe_jacobians(mdp, theta, ("mgl", "inertia"), states)
    torch.testing.assert_close(by_state[:, 0, 0], theta["mgl"] * torch.cos(states[:, 0]))
    torch.testing.assert_close(by_params[:, 0], torch.stack([torch.sin(states[:, 0]), torch.zeros(5).double()], -1))


def test_a_black_box_step_is_refused() -> None:
    mdp, theta, _, _, _ = small_roll()
    blind = replace(mdp, derivative_order=0)
    with pytest.raises(ValueError, match="black box"):
        step_jacobians(blind, theta, ("A",), torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 0))


def test_matrix_parameters_and_steps_without_a_parameter() -> None:
    A0, B0 = stack([0.9, 0.1], [-0.2, 0.8]), stack([0.0], [0.5])
    mdp = linear_gaussian(A0, B0)
    states, actions = torch.randn(4, 2, generator=seeded(0)).double(), torch.ones(4, 1).double()
    theta = {"A": A0, "B": B0, "unused": scalar(1.0)}
    noise = torch.zeros(4, mdp.noise_dims[1], dtype=torch.float64)
    steps = step_jacobians(mdp, theta, ("A", "unused"), states, actions, noise)
    torch.testing.assert_close(steps.state, A0.expand(4, 2, 2))
    expected = torch.zeros(4, 2, 2, 2, dtype=torch.float64)
    expected[:, 0, 0], expected[:, 1, 1] = states, states  # d(A s)_i / dA_ij = s_j
    torch.testing.assert_close(steps.params[..., :4].view(4, 2, 2, 2), expected)
    assert not steps.params[..., 4].any()


# Derivatives of the misfit, against central differences

PENDULUM_CHOICE = WindowChoice(horizon=0.3, stride=0.15)
MISFITS = {
    "measured starts": lambda: make_misfit(*_order(pendulum_log()), Nuisance(), PENDULUM_CHOICE),
    "zeros and rates per run, delay": lambda: make_misfit(
        *_order(pendulum_log()),
        Nuisance(delay=(0.0033, 0.0, 0.05), zeros="per_run", zero_std=0.1, rates="per_run", rate_std=0.5),
        PENDULUM_CHOICE,
    ),
    "shared zeros, plain squares": lambda: make_misfit(
        *_order(pendulum_log()), Nuisance(zeros="shared"), PENDULUM_CHOICE, scale=None
    ),
    "warm-up, affine": lambda: make_misfit(
        *_order(house_log()),
        Nuisance(delay=(1000.0, 0.0, 7200.0), zeros="shared", zero_std=1.0),
        WindowChoice(24 * HOUR, 12 * HOUR, first_row=0, margin=0, warmup=12 * HOUR),
        scale=0.3,
    ),
    "warm-up, nonlinear": lambda: make_misfit(
        *_order(pendulum_log()),
        Nuisance(delay=(0.0033, 0.0, 0.05), zeros="per_run", zero_std=0.1),
        replace(PENDULUM_CHOICE, warmup=0.1),
    ),
}


def _order(problem: tuple[ModelMDP, Params, RolloutLog]) -> tuple[ModelMDP, RolloutLog, Params]:
    mdp, theta, log = problem
    return mdp, log, theta


def point(misfit: Misfit) -> Tensor:
    """Somewhere off the start, inside the bounds and off the kinks of the delay."""
    x = misfit.unknowns.start
    moved = x + 0.02 * (x.abs() + 0.1) * torch.rand(len(x), generator=seeded(3), dtype=torch.float64)
    if misfit.unknowns.delay:
        moved[misfit.unknowns.count] = x[misfit.unknowns.count]
    return moved


@pytest.mark.parametrize("name", MISFITS)
def test_jacobian_and_gradient_equal_central_differences(name: str) -> None:
    misfit = MISFITS[name]()
    x = point(misfit)
    problem = objective(misfit)
    value, rolled = problem.value(x)
    jacobian = global_jacobian(misfit, linearize(misfit, rolled).jacobian.flatten(1, 2))
    gradient = problem.model(x, rolled).gradient
    for column in range(len(x)):
        step = torch.zeros_like(x)
        step[column] = 1e-5 * (1 + x[column].abs())
        above, below = roll_windows(misfit, x + step), roll_windows(misfit, x - step)
        slope = (above.residual - below.residual).flatten(1) / (2 * step[column])
        # differences of O(1) numbers at h = 1e-5: truncation h^2, rounding 1e-11, both times the scale of the slope
        size = float(slope.abs().max()) + 1e-3
        torch.testing.assert_close(
            jacobian[..., column], slope, rtol=1e-5, atol=1e-6 * size, msg=misfit.unknowns.names[column]
        )
        rise = (problem.value(x + step)[0] - problem.value(x - step)[0]) / (2 * step[column])
        torch.testing.assert_close(gradient[column], rise, rtol=1e-4, atol=1e-6 * (1 + float(value)))


@pytest.mark.parametrize("name", MISFITS)
def test_products_equal_the_dense_jacobian(name: str) -> None:
    misfit = MISFITS[name]()
    rolled = roll_windows(misfit, point(misfit))
    dense = global_jacobian(misfit, linearize(misfit, rolled).jacobian.flatten(1, 2))
    tangent, adjoint = jacobian_products(misfit, rolled)
    v = torch.randn(dense.shape[2], generator=seeded(0), dtype=torch.float64)
    u = torch.randn(dense.shape[:2], generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(tangent(v), dense @ v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adjoint(u), torch.einsum("wkp,wk->p", dense, u), rtol=1e-9, atol=1e-9)


def test_the_hessian_is_the_curvature_of_the_loss_where_the_model_is_linear() -> None:
    mdp, theta, log = house_log()
    choice = WindowChoice(24 * HOUR, 12 * HOUR, first_row=0, margin=0, warmup=12 * HOUR)
    misfit = make_misfit(mdp, log, theta, Nuisance(zeros="shared", zero_std=1.0), choice, free=(), scale=0.3)
    problem = objective(misfit)
    x = misfit.unknowns.start
    hessian = problem.model(x, problem.value(x)[1]).hessian
    values = [float(problem.value(x + h)[0]) for h in (-1e-3, 0.0, 1e-3)]
    # second differences: rounding 1e-15 * value / h^2
    assert float(hessian) == pytest.approx((values[0] - 2 * values[1] + values[2]) / 1e-6, rel=1e-4)


# Start states and growth


def test_warm_start_solves_the_linear_least_squares_problem() -> None:
    mdp, theta, log = house_log()
    channels = match_channels(mdp, log, warmup=True)
    windows = cut_windows(mdp, log, channels, WindowChoice(24 * HOUR, 24 * HOUR, 0, 0, warmup=24 * HOUR))
    actions = window_actions(windows, log.actions)[:23]
    target, zero = windows.warm_signals.transpose(0, 1), torch.zeros(len(windows.start), 1, dtype=torch.float64)
    warm = WarmUp(windows.anchor, channels.own, target, channels.observed, 0.02, zero)
    found = warm_start(mdp, theta, warm, actions, windows.noise[:23])
    # the response of the readings to the start, column by column
    respond = lambda s: roll(mdp, theta, s, actions, windows.noise[:23])[..., 0].T
    offset = respond(torch.zeros_like(found))
    columns = torch.stack([respond(e.expand_as(found)) - offset for e in torch.eye(3, dtype=torch.float64)], -1)
    for w in range(len(found)):
        G = torch.cat([columns[w], 0.02**0.5 * torch.eye(3, dtype=torch.float64)])
        y = torch.cat([windows.warm_signals[w, :, 0] - offset[w], 0.02**0.5 * windows.anchor[w]])
        torch.testing.assert_close(found[w], torch.linalg.lstsq(G, y).solution, rtol=1e-8, atol=1e-8)


def test_a_warm_start_that_does_not_converge_is_not_a_number() -> None:
    mdp = replace(pendulum(), step=lambda theta, s, a, e: s + torch.sin(300 * s) * theta["mgl"])
    target = torch.randn(4, 2, 1, generator=seeded(0), dtype=torch.float64)
    anchor = torch.randn(2, 2, generator=seeded(1), dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    warm = WarmUp(anchor, stack([1.0], [0.0]), target, torch.tensor([0]), 1e-9, zero)
    start = warm_start(mdp, {"mgl": scalar(3.0)}, warm, torch.zeros(3, 2, 1).double(), torch.zeros(3, 2, 0).double())
    assert torch.isnan(start).any()


def test_growth_of_a_start_error_is_that_of_the_linearised_pendulum() -> None:
    mdp = pendulum(dt=0.01, substeps=4, integrator="rk4")
    theta = default_params(mdp.box) | {"damping": scalar(0.0)}
    rate = float((theta["mgl"] / theta["inertia"]).sqrt())
    for angle, growth in ((torch.pi, torch.cosh(scalar(0.5 * rate))), (0.0, 1.0)):
        log = simulated_log(mdp, theta, stack([angle, 0.0]), torch.zeros(1, 100, 1, dtype=torch.float64))
        misfit = make_misfit(mdp, log, theta, Nuisance(), WindowChoice(0.5, 0.1))
        rolled = roll_windows(misfit, misfit.unknowns.start)
        found = start_error_growth(misfit, linearize(misfit, rolled, ()))
        # hanging: cos(rate t) on the scored rows, of which every third is scored from the second on
        limit = growth if angle else torch.cos(rate * torch.arange(0.02, 0.51, 0.03, dtype=torch.float64)).abs().max()
        torch.testing.assert_close(found, limit.expand_as(found), rtol=1e-5, atol=1e-5)
