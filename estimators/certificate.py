"""Certificate of a policy sensitivity: how far `w = (dnu*/dtheta)^T g` may be from the truth, and why to refuse it.

Nothing that a backend says of itself is believed. Where the in-sim return J is given, w is computed anew from J alone,
at the maximiser next to nu (`recomputation.py`), and

    |w - w*| <= |w - w_new| (1 + way left / way gone) + error of w_new.

Where an `optimum` is given, it is run again at shifted theta (`audit.py`), and the slopes found are compared with w;
without J these alone give the bound, with 95 % confidence. The certificate holds when the bound is within `tol` of
|w|, nu is a maximum, J smooth there, and no audit contradicts: a gradient that is off by 5 % points at most 3 degrees
away from the true one. Over-parameterised policies have no unique dnu*/dtheta; w, which is all that tuning uses, is
what is certified. A residual r in `A x = g` leaves the error `C' A^-1 r`, at most `|C| |r|` over the lowest curvature;
for what a nu off the maximum adds: Blondel et al., NeurIPS 2022, theorem 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.audit import Audit, Resolve, audit
from sim2real.estimators.recomputation import Recomputation, product_at, recompute
from sim2real.params import Params, axpy, check_same_keys, dot, map_params
from sim2real.solve_report import Sensitivity, UnconvergedError, UnconvergedWarning
from sim2real.solvers.optimum import policy_optimum

Objective = Callable[[Params, Params], Tensor]
Norm = Callable[[Params], float]


@dataclass(frozen=True)
class Certificate:
    """Whether a gradient may be used. Norms are those of `scale w`, in the units of the product."""

    holds: bool
    error_bound: float
    """bound on the norm of the error of vjp(cotangent); infinite where there is none"""
    relative_bound: float
    """`error_bound` over the norm of the product as it was found anew"""
    audit_error: float | None
    """norm of the error as the re-solves estimate it; None without an audit"""
    reasons: tuple[str, ...] = ()
    """why it does not hold: one sentence each, with the figure, the limit and what to do"""
    info: dict[str, float] = field(default_factory=dict)
    """"tolerance", "product_norm", "gap" (`|w - w_new|`), "uncertainty" (of w_new), "stationarity", "newton_move",
    "newton_remainder", "damping", "residual", "lowest_curvature", "largest_curvature", "roughness", "mismatch" (of the
    second derivatives with differences of gradients); with an audit "audit_bound", "audit_noise", "audit_size",
    "audit_kink"."""


def certify(
    J: Objective | None,
    theta: Params,
    nu: Params,
    sensitivity: Sensitivity,
    cotangent: Params,
    *,
    tol: float = 0.05,
    atol: float = 0.0,
    scale: Params | None = None,
    optimum: Resolve | None = None,
    directions: int | None = None,
    step: float | None = None,
    derivative_order: Literal[0, 1, 2] = 2,
    max_steps: int = 300,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Certify `sensitivity.vjp(cotangent)` at the in-sim optimum nu of `J(theta, .)`.

    It holds when the error is bounded by `max(tol |w|, atol)`, `|w|` the norm of `scale w` (scale: how far each part of
    theta may move, ones when None). `J` None (a layer, or a trainer whose objective is unknown) leaves the audit alone.
    `optimum(theta, nu0) -> nu*` is what the audit runs again, 4 `directions` + 1 times; `directions` None: 3 where an
    optimum is given, else 0. `step`: see `audit`. `derivative_order`: of the model behind J; 0 leaves the audit alone.
    Costs about three products and 50 Hessian-vector products, and the audit.
    Raises `ValueError` for bad options or when neither J nor an optimum is there to judge by, `KeyError` for keys that
    do not match; what is not finite, not converged or not a maximum is a reason, not an error.
    """
    count = directions if directions is not None else (3 if optimum is not None else 0)
    usable = J is not None and derivative_order > 0
    if not (0 < tol < math.inf and 0 <= atol < math.inf and count >= 0):
        raise ValueError(f"need tol > 0, atol >= 0 and directions >= 0, got {tol}, {atol} and {count}")
    if not usable and (optimum is None or count == 0):
        raise ValueError("nothing to judge by: pass J with derivatives, or an optimum(theta, nu0) to run again")
    _check_shapes(nu, cotangent, "the cotangent of certify")
    if scale is not None:
        _check_shapes(theta, scale, "scale")
        if not all(bool((value >= 0).all()) for value in scale.values()):
            raise ValueError("scale must hold numbers >= 0: how far each entry of theta may move")
    norm = _norm(theta, scale)
    claim, refusal = _claim(sensitivity, theta, cotangent)
    if claim is None:
        return Certificate(False, math.inf, math.inf, None, (refusal,), {"tolerance": tol})
    if not any(bool(value.any()) for value in cotangent.values()):
        return _of_zero(norm(claim), atol, tol)
    checked = _audited(J, theta, nu, claim, cotangent, optimum, count, step, scale, generator)
    if J is None or derivative_order == 0:
        return _from_audit(checked, norm(claim), tol, atol)
    found = recompute(J, theta, nu, cotangent, norm=norm, derivative_order=derivative_order, max_steps=max_steps)
    if found.value is None:
        return _concluded(math.inf, norm(claim), found.obstacles, checked, tol, atol, found.info)
    gap, size = norm(axpy(-1.0, found.value, claim)), norm(found.value)
    bound = gap * (1.0 + found.remainder) + found.uncertainty
    reasons = found.obstacles
    if bound > max(tol * size, atol):
        at = found.value
        if found.info["newton_move"] > 0:
            at = product_at(J, theta, nu, cotangent, norm=norm, derivative_order=derivative_order)
        reasons = (*_causes(claim, found, at, norm, max(tol * size, atol)), *reasons)
    info = found.info | {"gap": gap, "uncertainty": found.uncertainty}
    return _concluded(bound, size, reasons, checked, tol, atol, info)


def _norm(theta: Params, scale: Params | None) -> Norm:
    if scale is None:
        return lambda w: float(dot(w, w)) ** 0.5
    units = {key: value.detach().double() for key, value in scale.items()}

    def scaled(w: Params) -> float:
        product = map_params(lambda value, unit: value * unit, w, units)
        return float(dot(product, product)) ** 0.5

    return scaled


def _check_shapes(reference: Params, other: Params, what: str) -> None:
    check_same_keys(reference, other, what)
    for key, value in reference.items():
        if other[key].shape != value.shape or other[key].is_complex():
            got = f"{tuple(other[key].shape)}, {other[key].dtype}"
            raise ValueError(f"{what} is {got} for '{key}', expected real numbers of shape {tuple(value.shape)}")


def _claim(sensitivity: Sensitivity, theta: Params, cotangent: Params) -> tuple[Params | None, str]:
    """The product as the backend gives it, in float64, or why there is none."""
    if not all(bool(torch.isfinite(value).all()) for value in cotangent.values()):
        return None, "the cotangent is not finite: the gradient of the real return failed; mend it first"
    largest = max((float(value.abs().max()) for value in cotangent.values() if value.numel()), default=0.0)
    if largest > 0 and not 1e-100 < largest < 1e100:  # squares of it, and so norms, leave the range of float64
        return None, f"the cotangent is of size {largest:.1e}, where norms underflow or overflow: rescale it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)  # judged here, whatever the backend says of itself
            product = sensitivity.vjp(cotangent)
    except UnconvergedError as refused:
        return None, f"the backend refused: {refused}"
    _check_shapes(theta, product, "the product of the backend")
    claim = {key: value.detach().double() for key, value in product.items()}
    bad = [key for key, value in claim.items() if not bool(torch.isfinite(value).all())]
    if bad:
        return None, f"the product is not finite for {bad}: mask what diverges in the rollouts, or raise the damping"
    return claim, ""


def _of_zero(size: float, atol: float, tol: float) -> Certificate:
    """The product of a zero cotangent is zero."""
    reason = f"the cotangent is zero but the product has norm {size:.2e}: the backend is not linear"
    holds = size <= atol
    return Certificate(holds, size, 0.0 if holds else math.inf, None, () if holds else (reason,), {"tolerance": tol})


def _audited(
    J: Objective | None,
    theta: Params,
    nu: Params,
    claim: Params,
    cotangent: Params,
    optimum: Resolve | None,
    count: int,
    step: float | None,
    scale: Params | None,
    generator: torch.Generator | None,
) -> Audit | None:
    if count == 0:
        return None
    again = optimum
    if again is None:
        if J is None:
            raise ValueError("an audit needs an optimum(theta, nu0) to run again, or J to maximise")
        again = lambda th, nu0: policy_optimum(J, th, nu0, tol=1e-10).nu
    return audit(again, theta, nu, claim, cotangent, directions=count, step=step, scale=scale, generator=generator)


def _causes(claim: Params, found: Recomputation, at: Params, norm: Norm, allowed: float) -> tuple[str, ...]:
    """What the gap comes from: the product at nu itself, the way to the maximum, or the recomputation."""
    assert found.value is not None
    off, moved = norm(axpy(-1.0, at, claim)), norm(axpy(-1.0, found.value, at))
    causes = []
    if off > 0.5 * allowed:
        causes.append(
            f"the product differs by {off:.2e} from C'(-H)^-1 g computed anew at the same nu, allowed {allowed:.2e}: "
            "lower the damping, solve more tightly, use the full Hessian, and check signs and weights of the backend"
        )
    if moved > 0.5 * allowed:
        causes.append(
            f"nu is not stationary: Newton's way to the maximum, {found.info['newton_move']:.2e} long, changes the "
            f"product by {moved:.2e}, allowed {allowed:.2e}: train on, or start from this theta's own optimum"
        )
    mismatch = found.info.get("mismatch", 0.0)
    if mismatch > 0.5 * allowed:
        causes.append(
            f"products with the second derivatives of J differ from differences of its gradient, by {mismatch:.2e} in "
            f"the product, allowed {allowed:.2e}: a part of the model has a wrong or silently zero second derivative, "
            "or a kink; pass derivative_order=1, or mend its backward"
        )
    elif found.uncertainty > 0.5 * allowed or found.remainder > 0.5 or not causes:
        causes.append(
            f"the product is known to {found.uncertainty:.2e} only, allowed {allowed:.2e}: the curvature of J is "
            "singular for this cotangent, or no maximum is near; train on, or use fewer or regularised parameters"
        )
    return tuple(causes)


def _from_audit(checked: Audit | None, claimed: float, tol: float, atol: float) -> Certificate:
    assert checked is not None
    size = checked.size
    reasons: tuple[str, ...] = ()
    allowed = max(tol * size, atol)
    if checked.failure:
        reasons += (f"a re-solve near theta failed, so nothing bounds the error: {checked.failure}",)
    elif not checked.noise <= 0.5 * allowed:
        reasons += (
            f"the re-solves are too noisy to judge by: {checked.noise:.2e} against {allowed:.2e} allowed; solve more "
            "tightly, or pass a larger step",
        )
    elif checked.bound > allowed and checked.kink <= allowed:
        reasons += (_contradiction(checked, allowed),)
    return _concluded(checked.bound, size, reasons, checked, tol, atol, {"claimed_norm": claimed})


def _contradiction(checked: Audit, allowed: float) -> str:
    return (
        f"re-solved optima move otherwise: the error is about {checked.error:.2e}, below {checked.bound:.2e} with 95 % "
        f"confidence, allowed {allowed:.2e}: use a more accurate derivative of the layer, or more directions"
    )


def _concluded(
    bound: float,
    size: float,
    reasons: tuple[str, ...],
    checked: Audit | None,
    tol: float,
    atol: float,
    info: dict[str, float],
) -> Certificate:
    """Everything known, put together; an audit contradicts only beyond its own noise."""
    allowed = max(tol * size, atol)
    info = info | {"tolerance": tol, "product_norm": size}
    if checked is not None:
        info |= {
            "audit_bound": checked.bound,
            "audit_noise": checked.noise,
            "audit_size": checked.size,
            "audit_kink": checked.kink,
        }
        if checked.kink > allowed:
            reasons += (
                f"the slope of the re-solved optima jumps by {checked.kink:.2e} at theta, allowed {allowed:.2e}: an "
                "active set changes there, and the derivative is one-sided; move theta, or smooth the constraint",
            )
        elif not reasons and checked.error - 2 * checked.noise > max(allowed, bound):
            reasons += (_contradiction(checked, allowed),)
    holds = not reasons and bound <= allowed
    relative = bound / size if size > 0 else (0.0 if bound == 0 else math.inf)
    return Certificate(holds, bound, relative, checked.error if checked is not None else None, reasons, info)
