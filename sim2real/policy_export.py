"""Policies as files for a real controller: `torch.export`, and plain numpy for linear and multilayer policies.

`policy.npz` (no pickle) holds `weight0, bias0, weight1, ...` and the text arrays `activations`, `state_names`,
`action_names`; the action is W_L f(... f(W_0 s + b_0)) + b_L. `run_policy.py` beside it evaluates the file with numpy
alone. `policy.pt2` is read by `torch.export.load(path).module()`. Both give the mean action, without exploration.
"""

from __future__ import annotations

import copy
import inspect
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sim2real.checkpoint import write_atomic
from sim2real.params import Params

Arrays = dict[str, NDArray[np.generic]]


class PolicyExportError(ValueError):
    """A policy cannot be written in the form asked for, or a file does not hold one."""


@dataclass(frozen=True)
class ExportedPolicy:
    """Where the files of one policy are; `numpy` and `script` are None for a module that numpy cannot express."""

    torch: Path
    numpy: Path | None
    script: Path | None


_ACTIVATIONS: dict[type[nn.Module], tuple[str, dict[str, object]]] = {
    nn.Identity: ("identity", {}),
    nn.Tanh: ("tanh", {}),
    nn.ReLU: ("relu", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.SiLU: ("silu", {}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    nn.ELU: ("elu", {"alpha": 1.0}),
}


_SCRIPT = """# Evaluates policy.npz with numpy alone: numpy_action(np.load("policy.npz"), state)
from typing import Any

import numpy as np


"""


def numpy_action(policy: Any, state: Any) -> Any:
    """Action [m] or [N, m] of a policy file, np.load("policy.npz"), in a state [n] or [N, n]."""
    functions: dict[str, Any] = {
        "identity": lambda x: x,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0.0),
        "sigmoid": lambda x: 0.5 * (1.0 + np.tanh(0.5 * x)),
        "silu": lambda x: x * 0.5 * (1.0 + np.tanh(0.5 * x)),
        "softplus": lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))),
        "elu": lambda x: np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0))),
    }
    x = np.asarray(state)
    for i, name in enumerate(policy["activations"]):
        x = functions[str(name)](x @ policy[f"weight{i}"].T + policy[f"bias{i}"])
    return x


def export_policy(
    folder: Path,
    nu: Params,
    module: nn.Module | None = None,
    *,
    state_names: tuple[str, ...] = (),
    action_names: tuple[str, ...] = (),
) -> ExportedPolicy:
    """Write the policy at nu into `folder`: `policy.pt2` and, for linear and multilayer policies, the numpy form.

    `module` None: `a = -K s + k` with `nu = {"gain": K [m, n], "offset": k [m]}` (as `linear_policy`). Else nu holds
    the module's parameters (as `module_policy`). Raises `PolicyExportError` when nu is not finite, nu and the module do
    not match, or the names are not one per state or action.
    """
    bad = sorted(key for key, value in nu.items() if not bool(torch.isfinite(value).all()))
    if bad:
        raise PolicyExportError(f"the policy parameters {bad} are not finite; nothing was written")
    network = _linear(nu) if module is None else _filled(module, nu)
    width, count = _widths(network)
    for name, given, wanted in (("state_names", state_names, width), ("action_names", action_names, count)):
        if given and len(given) != wanted:
            raise PolicyExportError(f"{name} {given} are {len(given)}, the policy has {wanted}")
    folder.mkdir(parents=True, exist_ok=True)
    program = _program(network, torch.zeros(2, width, dtype=next(iter(nu.values())).dtype))
    write_atomic(folder / "policy.pt2", program)
    layers = _layers(network)
    if layers is None:
        for stale in ("policy.npz", "run_policy.py"):  # of an earlier policy in this folder
            (folder / stale).unlink(missing_ok=True)
        return ExportedPolicy(folder / "policy.pt2", None, None)
    arrays = _arrays(layers) | {"state_names": np.array(state_names, "U"), "action_names": np.array(action_names, "U")}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(folder / "policy.npz", buffer.getvalue())
    script = _SCRIPT + inspect.getsource(numpy_action)
    write_atomic(folder / "run_policy.py", script.encode())
    return ExportedPolicy(folder / "policy.pt2", folder / "policy.npz", folder / "run_policy.py")


def load_numpy_policy(path: Path) -> Arrays:
    """The arrays of `policy.npz` for `numpy_action`. Raises `PolicyExportError` when the file holds none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as problem:
        raise PolicyExportError(f"'{path}' is no policy file: {problem}") from problem
    count = len(arrays.get("activations", ()))
    missing = [f"{name}{i}" for i in range(count) for name in ("weight", "bias") if f"{name}{i}" not in arrays]
    if not count or missing:
        raise PolicyExportError(f"'{path}' holds {sorted(arrays)}; missing: {missing or ['activations']}")
    return arrays


def _linear(nu: Params) -> nn.Module:
    fits = "gain" in nu and not nu.keys() - {"gain", "offset"} and nu["gain"].dim() == 2
    if not fits or ("offset" in nu and nu["offset"].shape != nu["gain"].shape[:1]):
        raise PolicyExportError(
            f"a linear policy has nu = {{'gain': [m, n], 'offset': [m]}}, got "
            f"{ {key: tuple(value.shape) for key, value in nu.items()} }; pass the module of any other policy"
        )
    gain = nu["gain"].detach()
    layer = nn.Linear(gain.shape[1], gain.shape[0], bias=True, dtype=gain.dtype, device=gain.device)
    with torch.no_grad():
        layer.weight.copy_(-gain)
        layer.bias.copy_(nu["offset"].detach() if "offset" in nu else torch.zeros_like(layer.bias))
    return nn.Sequential(layer)


def _filled(module: nn.Module, nu: Params) -> nn.Module:
    network = copy.deepcopy(module)
    own = dict(network.named_parameters())
    if own.keys() != nu.keys() or any(own[key].shape != value.shape for key, value in nu.items()):
        raise PolicyExportError(f"nu holds {sorted(nu)}, the module {sorted(own)}, or their shapes differ")
    with torch.no_grad():
        for key, value in own.items():
            value.data = nu[key].detach().clone()
    return network.eval().requires_grad_(False)


def _widths(network: nn.Module) -> tuple[int, int]:
    """Dimensions of the state and of the action."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise PolicyExportError("cannot tell the dimension of the state: the module has no nn.Linear layer")
    return layers[0].in_features, layers[-1].out_features


def _program(network: nn.Module, example: Tensor) -> bytes:
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _layers(network: nn.Module) -> list[tuple[nn.Linear, str]] | None:
    """Linear layers with the activation after each; None for a module that is not such a chain."""
    if not isinstance(network, nn.Sequential):
        return [(network, "identity")] if isinstance(network, nn.Linear) else None
    layers: list[tuple[nn.Linear, str]] = []
    for part in network:
        name, options = _ACTIVATIONS.get(type(part), ("", {}))
        if isinstance(part, nn.Linear):
            layers.append((part, "identity"))
        elif name and layers and layers[-1][1] == "identity" and all(getattr(part, k) == v for k, v in options.items()):
            layers[-1] = (layers[-1][0], name)
        else:
            return None
    return layers


def _arrays(layers: list[tuple[nn.Linear, str]]) -> Arrays:
    arrays: Arrays = {"activations": np.array([name for _, name in layers], "U")}
    for i, (layer, _) in enumerate(layers):
        weight = layer.weight.detach().cpu()
        bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.detach().cpu()
        arrays |= {f"weight{i}": weight.numpy(), f"bias{i}": bias.numpy()}
    return arrays
