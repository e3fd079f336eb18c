"""`sim2real tune`: every source of real data, the policy files, waiting and resuming, named errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sim2real.cli import main
from sim2real.conf.compose import UsageError
from sim2real.parameter_file import ParameterSet, read_parameters
from sim2real.tune_posterior import gaussian

WORLD = """
import gymnasium, torch
from sim2real import rollout, sample_noise
from sim2real.gym import to_gym
from sim2real.simulators import linear_gaussian

A, B = torch.tensor([[1.0, 0.2], [0.0, 0.9]]).double(), torch.tensor([[0.0], [0.3]]).double()
TRUE = {"A": A - 0.05 * torch.eye(2).double(), "B": 2 * B}

def model(dt=1.0):
    return linear_gaussian(A, B, noise_covariance=0.01 * torch.eye(2).double(), dt=dt)

def collect(policy, nu, iteration, generator):
    real = model()
    return rollout(real, policy, TRUE, nu, sample_noise(real, policy, 12, 20, generator))

def reward(state, action, following):
    return -(state**2).sum(-1) - (action**2).sum(-1)

gymnasium.register(
    "TuneWorld-v0",
    entry_point=lambda: to_gym(model(), TRUE, action_space=gymnasium.spaces.Box(-9.0, 9.0, (1,), "f8"), horizon=20))
"""
SCHEMA = """
time: {column: time, unit: s}
signals: {s1: {column: s1, unit: "1"}, s2: {column: s2, unit: "1"}}
actions: {a1: {column: a1, unit: "1"}}
dt: 1.0
"""
SMALL = [
    "model._target_=tune_world.model", "policy=linear", "horizon=4", "batch=4", "discount=0.9", "free=[B]",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tune_world.py").write_text(WORLD)
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str, str]:
    code = main(["tune", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_rollouts(folder: Path, policy: Path, names: list[str], seed: int) -> None:
    """Run the exported policy with numpy alone, as a robot would, and log it as CSV."""
    rng = np.random.default_rng(seed)
    file = np.load(policy / "policy.npz", allow_pickle=False)
    assert list(file["activations"]) == ["identity"]
    A, B = np.array([[0.95, 0.2], [0.0, 0.85]]), np.array([[0.0], [0.6]])
    folder.mkdir(exist_ok=True)
    for name in names:
        state, rows = rng.normal(size=2), []
        for t in range(20):
            action = file["weight0"] @ state + file["bias0"] + 0.2 * rng.normal(size=1)
            rows.append([t, *state, *action])
            state = A @ state + B @ action + 0.1 * rng.normal(size=2)
        np.savetxt(folder / f"{name}.csv", rows, "%.9f", ",", header="time,s1,s2,a1", comments="")


def test_a_callable_improves_the_real_return_and_exports_the_policy(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SMALL,
        "policy.std=0.2",
        "data.mode=callable",
        "data.callable=tune_world.collect",
        "horizon=8",
        "tune.max_steps=2",
    ]
    code, out, err = run(capsys, [*words, "out=run", "--json"])
    document = json.loads(out)
    assert code == 0, err
    history = document["history"]
    kept = [record for record in history if record["accepted"]]
    # the world differs from the model in A and B: moving B alone already raises the estimated return (by 10 % here)
    assert kept[-1]["real_return"] > kept[0]["real_return"]
    assert document["parameters"]["A"]["value"] == document["parameters"]["A"]["initial"]
    assert document["parameters"]["B"]["value"] != document["parameters"]["B"]["initial"]
    assert {file.name for file in Path("run/policy").iterdir()} >= {"policy.npz", "policy.pt2", "run_policy.py"}
    gain = np.array(document["report"]["policy"]["gain"])
    assert np.allclose(np.load("run/policy/policy.npz")["weight0"], -gain, rtol=0, atol=0)
    html = Path("run/report.html").read_text()
    assert "Real return" in html
    assert read_parameters(Path("run")).kind == "tune"


SCALARS = """
from dataclasses import replace
import torch
from sim2real import Box
from sim2real.simulators import linear_gaussian
from tune_world import A, B

def matrices(theta):
    one, zero = torch.ones_like(theta["a"]), torch.zeros_like(theta["a"])
    rows = torch.stack([torch.stack([one, theta["d"]], -1), torch.stack([zero, theta["a"]], -1)], -2)
    return {"A": rows, "B": torch.stack([zero, theta["b"]], -1).unsqueeze(-1)}

def model(dt=1.0):
    plain = linear_gaussian(A, B, dt=dt, action_cost=0.1 * torch.eye(1).double())
    box = Box({"a": 0.0, "b": 0.0, "d": 0.0}, {"a": 1.5, "b": 2.0, "d": 1.0}, {}, {"a": 0.8, "b": 0.5, "d": 0.3})
    return replace(plain, step=lambda theta, s, a, e: plain.step(matrices(theta), s, a, e), box=box)

def effort(state, action, following):
    return (action**2).sum(-1)
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the world, a fit of three scalars to its log, and the log."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "tune_world.py").write_text(WORLD)
        (folder / "scalar_world.py").write_text(SCALARS)
        (folder / "schema.yaml").write_text(SCHEMA)
        (folder / "first").mkdir()
        np.savez("first/policy.npz", activations=["identity"], weight0=[[-0.6, -0.9]], bias0=[0.0])
        write_rollouts(Path("logs"), Path("first"), [f"run_{k}" for k in range(8)], 2)
        words = ["log=logs", "schema=schema.yaml", "model._target_=scalar_world.model", "out=fit", "report=false"]
        words += ["fit.horizon=1", "fit.stride=1", "fit.sample_every=1", "fit.first_row=0", "fit.margin=0"]
        assert main(["fit", *words, "fit.prior_width=0", "fit.loss_scale=10"]) == 0
    return folder


def after_fit(place: Path, fitted: Path) -> list[str]:
    (place / "scalar_world.py").write_text(SCALARS)
    return [
        f"params={fitted / 'fit'}", f"log={fitted / 'logs'}", f"schema={fitted / 'schema.yaml'}", "policy=linear",
        "model._target_=scalar_world.model", "horizon=4", "batch=4", "discount=0.9", "reward=tune_world.reward",
    ]  # fmt: skip


def test_after_a_fit_freedom_calibration_and_trade_off_are_reported(
    place: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*after_fit(place, fitted), "horizon=8", "tune.max_steps=2", "tune.trade_off=1", "out=run"]
    code, out, err = run(capsys, [*words, "--json"])
    assert code == 0, err
    document = json.loads(out)
    report = document["report"]
    # two gains cannot fix three parameters
    assert report["freedom"]["dimension"] == 1
    before, after = report["freedom"]["log_likelihood"]
    assert after >= before
    assert report["calibration"]["start"]["windows"] == report["calibration"]["tuned"]["windows"] > 100
    # the fit's own residuals cover what they promise; 152 windows of 8 runs, standard error at most 0.04
    assert report["calibration"]["start"]["miscalibration"] < 0.08
    assert [entry["weight"] for entry in report["trade_off"]][::2] == [0.0, None]  # tuned, in between, start
    assert all(row["certified"] == 1 for row in document["history"] if row["accepted"])
    html = Path("run/report.html").read_text()
    for text in ("Predictive calibration", "1 direction of the tuned parameters leaves it", "certified"):
        assert text in html


def test_a_limit_and_draws_from_the_posterior(place: Path, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*after_fit(place, fitted), "tune.max_steps=0", "calibration=false", "tune.certify=false", "report=false"]
    words += ["tune.use_freedom=false"]
    limit = ["constraint.cost=scalar_world.effort", "constraint.limit=100", "constraint.name=effort"]
    code, out, err = run(capsys, [*words, *limit, "randomize=8", "out=run", "--json"])
    assert code == 0, err
    history = json.loads(out)["history"]
    assert all(row["margin.effort"] > 0 for row in history)
    assert "calibration" not in json.loads(Path("run/params.json").read_text())["report"]
    plain = json.loads(run(capsys, [*words, "out=plain", "--json"])[1])
    drawn = json.loads(Path("run/params.json").read_text())
    assert drawn["report"]["policy"]["gain"] != plain["report"]["policy"]["gain"]
    for wrong, message in (
        (["randomize=3"], "randomize=3: matched draws of 3 numbers must be even"),
        (["randomize=-2"], "randomize=-2: expected >= 0"),
        ([*limit, "constraint.probability=2", "constraint.kind=chance"], "probability = 2"),
        (["constraint.cost=scalar_world.efort"], "no such function"),
    ):
        code, _, err = run(capsys, [*words, *wrong, "out=bad"])
        assert code == 2
        assert message in err
    code, _, err = run(capsys, [*SMALL, "randomize=8", "data.mode=callable", "data.callable=tune_world.collect"])
    assert code == 2
    assert "randomize=8: needs params of a fit" in err


def test_a_growing_folder_waits_with_code_4_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "model.dt=1.0", "schema=schema.yaml", "data.mode=folder", "data.folder=new", "out=run",
             "tune.max_steps=1", "reward=tune_world.reward"]  # fmt: skip
    code, _, err = run(capsys, words)
    assert code == 4
    assert "put the logs into 'new'" in err
    assert Path("run/policy/run_policy.py").exists()
    assert run(capsys, words)[0] == 4  # nothing has arrived: it still waits
    write_rollouts(Path("new"), Path("run/policy"), [f"first_{k}" for k in range(6)], 0)
    code, _, err = run(capsys, words)
    assert code == 4, err
    write_rollouts(Path("new"), Path("run/policy"), [f"second_{k}" for k in range(6)], 1)
    code, _, err = run(capsys, words)
    assert code == 0, err
    batches = json.loads(Path("run/batches.json").read_text())
    assert batches == {"0": [f"first_{k}.csv" for k in range(6)], "1": [f"second_{k}.csv" for k in range(6)]}
    before = Path("run/params.json").read_bytes()
    assert run(capsys, words)[0] == 0
    assert Path("run/params.json").read_bytes() == before


def test_a_new_start_takes_no_rollouts_of_the_policies_before(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "model.dt=1.0", "schema=schema.yaml", "data.mode=folder", "data.folder=new", "out=run",
             "tune.max_steps=1", "reward=tune_world.reward"]  # fmt: skip
    assert run(capsys, words)[0] == 4
    # other settings would make another first policy than the one that was exported
    code, _, err = run(capsys, [*words, "horizon=9"])
    assert code == 5
    assert "settings.horizon was 4.0, is 9.0" in err
    write_rollouts(Path("new"), Path("run/policy"), [f"first_{k}" for k in range(6)], 0)
    assert run(capsys, words)[0] == 4
    code, _, err = run(capsys, [*words, "horizon=9", "resume=false"])
    assert code == 1
    assert "holds 6 logs before any policy was exported" in err
    assert run(capsys, [*words, "horizon=9", "resume=false", "data.folder=newer"])[0] == 4
    assert json.loads(Path("run/batches.json").read_text()) == {}


def test_a_folder_with_logs_of_unknown_policies_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("new").mkdir()
    Path("new/old.csv").write_text("time,s1,s2,a1\n0,0,0,0\n")
    code, _, err = run(capsys, [*SMALL, "model.dt=1.0", "data.mode=folder", "data.folder=new", "schema=schema.yaml"])
    assert code == 1
    assert "before any policy was exported (first: old.csv)" in err


def test_a_gymnasium_environment(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tune_world  # noqa: F401  (registers the environment)

    words = [*SMALL, "data.mode=env", "data.env=TuneWorld-v0", "data.exploration=0.3", "data.rollouts=8"]
    words += ["horizon=8", "tune.max_steps=1", "report=false", "policy.target=[0.1,0]"]
    code, _, err = run(capsys, [*words, "out=a"])
    assert code == 0, err
    assert run(capsys, [*words, "out=b"])[0] == 0
    assert Path("a/params.json").read_bytes() == Path("b/params.json").read_bytes()
    policy = np.load("a/policy/policy.npz")
    # the target is folded in: no action at the target
    assert np.allclose(policy["weight0"] @ np.array([0.1, 0.0]) + policy["bias0"], 0.0, atol=1e-15)


def test_an_mlp_policy_against_a_log(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("first").mkdir()
    np.savez("first/policy.npz", activations=["identity"], weight0=[[-0.6, -0.9]], bias0=[0.0])
    write_rollouts(Path("logs"), Path("first"), [f"run_{k}" for k in range(8)], 2)
    words = [*SMALL, "policy=mlp", "policy.hidden=[4]", "policy.target=[0.2,-0.1]", "tune.damping=1e-2", "log=logs",
             "horizon=8", "tune.certify=false",  # so large a damping biases the gradient
             "schema=schema.yaml", "tune.max_steps=0", "reward=tune_world.reward", "out=run"]  # fmt: skip
    code, _, err = run(capsys, [word for word in words if word != "policy=linear"])
    assert code == 0, err
    exported = torch.export.load("run/policy/policy.pt2").module()
    policy = read_parameters(Path("run")).report["policy"]
    nu = {name: torch.tensor(value, dtype=torch.float64) for name, value in policy.items()}
    state = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.tanh((state - torch.tensor([0.2, -0.1], dtype=torch.float64)) @ nu["0.weight"].T + nu["0.bias"])
    # rounding of weights of about 5 with the target folded into the bias
    assert torch.allclose(exported(state), hidden @ nu["2.weight"].T + nu["2.bias"], rtol=1e-12, atol=1e-12)


def test_a_fit_becomes_a_gaussian_over_the_free_parameters() -> None:
    rows = {name: {"value": value} for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    covariance = {"names": ["b", "delay", "a"], "matrix": [[4.0, 0.0, 1.0], [0.0, 9.0, None], [1.0, None, 2.0]]}
    fitted = ParameterSet("fit", {"_target_": "m"}, rows, {}, {"covariance": covariance})
    likelihood = gaussian(fitted, ("a", "b", "c"))
    assert likelihood is not None
    # the inverse of [[2, 1], [1, 4]]; c was held in the fit, so the log says nothing of it
    inverse = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64) / 7
    assert torch.allclose(likelihood[1], inverse, rtol=1e-14, atol=1e-15)
    assert {name: float(value) for name, value in likelihood[0].items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert gaussian(fitted, ("c",)) is None
    with pytest.raises(UsageError, match="params: the file has no d, it has a, b, c"):
        gaussian(fitted, ("a", "d"))
    assert gaussian(None, ("a",)) is None


def test_parameters_of_another_model_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "policy.std=0.2", "data.mode=callable", "data.callable=tune_world.collect", "tune.max_steps=1"]
    assert run(capsys, [*words, "free=[]", "tune.max_steps=0", "report=false", "out=first"])[0] == 0
    document = json.loads(Path("first/params.json").read_text())
    document["parameters"] = {"gain": {"value": 1.0}}
    Path("first/params.json").write_text(json.dumps(document))
    code, _, err = run(capsys, [*words, "params=first", "model._target_=tune_world.model", "out=second"])
    assert code == 2
    assert "params: the model has no parameter 'gain'" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data.mode=fodler"], 2, "did you mean 'folder'"),
        (["data.mode=folder"], 2, "data.folder=PATH"),
        (["data.mode=callable"], 2, "data.callable=package.function"),
        (["data.mode=callable", "data.callable=tune_world.colect"], 2, "no such function"),
        (["data.mode=env", "data.env=NoSuchEnv-v0"], 2, "data.env=NoSuchEnv-v0"),
        (["data.mode=env"], 2, "data.env=ID"),
        (["data.mode=log"], 2, "needs log="),
        (["policy=quadratic"], 2, "there are linear, mlp"),
        (["policy.gain=[[1,2,3]]"], 2, "policy.gain has shape [1, 3]"),
        (["policy.target=[1]"], 2, "policy.target has 1 entries"),
        (["free=[C]"], 2, "free: there is no 'C'"),
        (["params=missing"], 1, "'missing' cannot be read"),
        (["policy.gain=[[a,b]]"], 2, "expected rows of numbers"),
        (["policy.gain=[[1,2],[3]]"], 2, "expected rows of numbers"),
        (["policy.std=-1"], 2, "policy.std=-1"),
        (["policy=mlp", "policy.hidden=[-1]"], 2, "policy.hidden=[-1]: expected widths >= 1"),
        (["discount=nan"], 2, "discount=nan: expected 0 to 1"),
        (["horizon=nan"], 2, "horizon=nan"),
        (["batch=0"], 2, "batch=0"),
        (["data.rollouts=0"], 2, "data.rollouts=0"),
        (["tune.radius=-1"], 2, "radius = -1.0"),
        (["tune.certify=maybe"], 2, "tune.certify"),
        (["tune.error_tol=nan"], 2, "error_tol = nan"),
        (["tune.error_tol=1"], 2, "error_tol = 1.0 (must be in (0, 1))"),
        (["tune.use_freedom=2"], 2, "tune.use_freedom=2: expected true or false"),
        (["tune.audit=-1"], 2, "audit = -1"),
        (["tune.audit=1", "tune.certify=false"], 2, "tune.audit=1: expected 0 with tune.certify=false"),
        (["tune.freedom_tol=-1"], 2, "freedom_tol = -1.0"),
        (["tune.trade_off=3"], 2, "tune.trade_off: needs params of a fit"),
        (["tune.likelihood_weight=1"], 2, "tune.likelihood_weight: needs params of a fit"),
        (["constraint.limit=3"], 2, "constraint.limit needs constraint.cost"),
        (["constraint.kind=worst"], 2, "expected one of mean, chance"),
        (["constraint.cost=tune_world.A"], 2, "constraint.cost=tune_world.A: is a Tensor, expected a function"),
        (["constraint.cost=tune_world.reward", "constraint.name="], 2, "constraint.name= is empty"),
        (["randomize=1.5"], 2, "randomize"),
    ],
)
def test_named_errors(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    got, _, err = run(capsys, [*(word for word in SMALL if word != "policy=linear" or "policy=quadratic" not in words),
                               *words, "out=run"])  # fmt: skip
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_a_result_that_must_not_run_has_exit_code_3(
    place: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*after_fit(place, fitted), "tune.max_steps=0", "report=false", "horizon=4", "resume=false", "out=run"]
    code, out, err = run(capsys, [*words, "tune.damping=1e6"])
    assert code == 3
    assert "refused: the gradient is not certified" in err
    assert "tune.certify=false goes on without" in err
    assert "refused" in out
    code, out, err = run(capsys, [*words, "constraint.cost=scalar_world.effort", "constraint.name=effort"])
    assert code == 3  # the action is never zero
    assert "the best theta violates 'effort' (margin -" in err
    assert "margin effort" in out


def test_runs_too_short_for_the_windows_of_the_fit_are_tuned_on_all_the_same(
    place: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((fitted / "fit/params.json").read_text())
    document["provenance"]["settings"]["fit"]["horizon"] = 1000.0
    (place / "params.json").write_text(json.dumps(document))
    words = [
        *after_fit(place, fitted),
        "tune.max_steps=0",
        "report=false",
        "horizon=4",
        "out=run",
        "params=params.json",
    ]
    assert run(capsys, words)[0] == 0
    assert any("no predictive calibration: no window of" in note for note in read_parameters(Path("run")).notes)
