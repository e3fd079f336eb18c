"""What the `backward` and `jvp` rules of an `autograd.Function` need to be exact at every order under `torch.func`.

Three traps of PyTorch (2.6 to 2.13), none of which raises where it does harm:

1. Forward mode is off while a `jvp` rule runs, so nested forward mode gives zero (pytorch/pytorch issue 197867):
   `forward_rule` turns it on, `primals` strips the tangents of the level being differentiated.
2. Saved tensors may carry a level of `torch.func` that has ended; a transform inside the rule trips over it: `saved`.
3. `torch.func.jvp` does not nest in a plain forward-mode rule: `pushforward` is the transpose of vjp instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from sim2real.params import Params

Inputs = TypeVar("Inputs")


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a `jvp` rule that makes it differentiable in forward mode again; use with `primals(ctx)`."""

    @wraps(rule)
    def nested(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, *tangents)

    return nested


def primals(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors of a `jvp` rule without their tangents of the level being differentiated."""
    return tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors of a `backward` rule, without levels that have ended: any operation takes those off."""
    return tuple(x.view_as(x) for x in ctx.saved_tensors)


def undifferentiated() -> bool:
    """Whether nobody can ask for a derivative of what is computed now: no graph, no transform, no forward mode."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return not (torch.is_grad_enabled() or transformed) and forward_ad._current_level < 0


def pushforward(function: Callable[[Inputs], Params], x: Inputs, tangent: Inputs) -> Params:
    """Jacobian of `function` at x times the tangent."""
    value, pull = vjp(function, x)[:2]
    pushed: Params = vjp(pull, {key: torch.zeros_like(y) for key, y in value.items()})[1]((tangent,))[0]
    return pushed
