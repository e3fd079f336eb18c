"""Exported policies give the action of the policy they came from, in every form."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sim2real.policy import linear_policy, module_policy
from sim2real.policy_export import PolicyExportError, export_policy, load_numpy_policy, numpy_action

STATES = torch.linspace(-3.0, 3.0, 21, dtype=torch.float64).reshape(7, 3)


def mlp(*activations: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for activation in activations:
        layers += [nn.Linear(3, 3), activation]
    return nn.Sequential(*layers, nn.Linear(3, 2)).to(dtype)


@pytest.mark.parametrize("offset", [False, True])
def test_linear_policy_in_both_forms(tmp_path: Path, offset: bool) -> None:
    nu = {"gain": torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    if offset:
        nu["offset"] = torch.tensor([0.3, -2.0], dtype=torch.float64)
    files = export_policy(tmp_path, nu, state_names=("x", "y", "z"), action_names=("u", "v"))
    wanted = linear_policy(2).act(nu, STATES, STATES[:, :0])
    assert files.numpy is not None
    arrays = load_numpy_policy(files.numpy)
    # the same sums of three products in another order: rounding only
    np.testing.assert_allclose(numpy_action(arrays, STATES.numpy()), wanted.numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(numpy_action(arrays, STATES[0].numpy()), wanted[0].numpy(), rtol=0, atol=1e-14)
    assert list(arrays["state_names"]) == ["x", "y", "z"]
    assert list(arrays["action_names"]) == ["u", "v"]
    program = torch.export.load(files.torch).module()
    torch.testing.assert_close(program(STATES), wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(program(STATES[:1]), wanted[:1], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.Identity()]
)
def test_every_activation_that_numpy_knows(tmp_path: Path, activation: nn.Module) -> None:
    module = mlp(activation, nn.Tanh())
    nu = {key: value.detach() * 1.5 for key, value in module.named_parameters()}
    files = export_policy(tmp_path, nu, module)
    wanted = module_policy(module).act(nu, STATES, STATES[:, :0]).detach()
    assert files.numpy is not None
    # double precision through three layers
    np.testing.assert_allclose(
        numpy_action(load_numpy_policy(files.numpy), STATES.numpy()), wanted, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(torch.export.load(files.torch).module()(STATES), wanted, rtol=1e-13, atol=1e-13)


def test_the_module_keeps_its_own_parameters_and_float32_stays_float32(tmp_path: Path) -> None:
    module = mlp(nn.Tanh(), dtype=torch.float32)
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    files = export_policy(tmp_path, {key: value + 1 for key, value in before.items()}, module)
    assert all(torch.equal(before[key], value) for key, value in module.named_parameters())
    assert files.numpy is not None
    assert load_numpy_policy(files.numpy)["weight0"].dtype == np.float32


def test_the_script_runs_with_numpy_alone(tmp_path: Path) -> None:
    module = mlp(nn.Tanh())
    nu = {key: value.detach() for key, value in module.named_parameters()}
    export_policy(tmp_path, nu, module)
    code = (
        "import sys, numpy as np, run_policy\n"
        "action = run_policy.numpy_action(np.load('policy.npz'), np.array([0.1, -0.2, 0.3]))\n"
        "assert 'torch' not in sys.modules and 'sim2real' not in sys.modules\n"
        "print(*action.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = module(torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)).detach()[0]
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], wanted.numpy(), rtol=1e-13)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.layer(state * state)


@pytest.mark.parametrize(
    "module", [Squared(), mlp(nn.ELU(alpha=0.5)), nn.Sequential(nn.Tanh(), nn.Linear(3, 2).double())]
)
def test_modules_that_numpy_cannot_express_are_exported_for_torch_only(tmp_path: Path, module: nn.Module) -> None:
    nu = {key: value.detach() for key, value in module.named_parameters()}
    export_policy(tmp_path, {"gain": torch.zeros(2, 3)})  # whose numpy form must not outlive it
    files = export_policy(tmp_path, nu, module)
    assert files.numpy is None
    assert not (tmp_path / "run_policy.py").exists()
    assert not (tmp_path / "policy.npz").exists()
    torch.testing.assert_close(torch.export.load(files.torch).module()(STATES), module(STATES).detach())


def test_a_single_linear_layer_without_bias(tmp_path: Path) -> None:
    module = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    files = export_policy(tmp_path, {"weight": module.weight.detach()}, module)
    assert files.numpy is not None
    np.testing.assert_allclose(
        numpy_action(load_numpy_policy(files.numpy), STATES.numpy()), module(STATES).detach().numpy(), atol=1e-14
    )


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    module = mlp(nn.Tanh())
    with pytest.raises(PolicyExportError, match="linear policy has nu"):
        export_policy(tmp_path, {"weights": torch.zeros(2, 3)})
    with pytest.raises(PolicyExportError, match="shapes differ"):
        export_policy(tmp_path, {key: value.detach()[:1] for key, value in module.named_parameters()}, module)
    with pytest.raises(PolicyExportError, match="linear policy has nu"):
        export_policy(tmp_path, {"gain": torch.zeros(2, 3), "offset": torch.zeros(3)})
    with pytest.raises(PolicyExportError, match=r"'gain'\] are not finite"):
        export_policy(tmp_path, {"gain": torch.full((2, 3), torch.nan)})
    with pytest.raises(PolicyExportError, match=r"state_names \('x',\) are 1, the policy has 3"):
        export_policy(tmp_path, {"gain": torch.zeros(2, 3)}, state_names=("x",))
    assert not list(tmp_path.iterdir())
    with pytest.raises(PolicyExportError, match="cannot tell the dimension"):
        export_policy(tmp_path, {}, nn.Sequential(nn.Tanh()))


def test_files_that_hold_no_policy_are_named(tmp_path: Path) -> None:
    missing, text, other, pickled = (tmp_path / name for name in ("a.npz", "b.npz", "c.npz", "d.npz"))
    text.write_text("not a policy")
    np.savez(other, activations=np.array(["tanh"]), weight0=np.eye(2))
    np.savez(pickled, activations=np.array([{"a": 1}], dtype=object))
    for path, words in (
        (missing, "no policy file"),
        (text, "no policy file"),
        (other, "bias0"),
        (pickled, "no policy"),
    ):
        with pytest.raises(PolicyExportError, match=words):
            load_numpy_policy(path)
