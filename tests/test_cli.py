"""The command as a stranger meets it: help, typed errors with the nearest name, exit codes, files, resuming."""

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sim2real import commands, workspace
from sim2real.cli import help_text, main
from sim2real.conf import COMMANDS, EvaluationOptions, FitOptions, TuneOptions
from sim2real.conf.compose import UsageError, compose_config, keys_of
from sim2real.evaluation import EvaluationSettings
from sim2real.fit import FitSettings
from sim2real.parameter_file import ParameterFileError, read_parameters
from sim2real.simulators import pendulum
from sim2real.tuning import TuneSettings

SCHEMA = """
time: {column: time, unit: s}
signals:
  angle: {column: angle, unit: rad}
  velocity: {derivative_of: angle, window: 5, order: 3}
actions:
  torque: {column: torque, unit: N m}
dt: 0.01
resample: true
"""
TRUTH = {"inertia": 0.15, "mgl": 3.0, "damping": 0.12, "coulomb": 0.02, "torque_offset": 0.05}
FAST = [
    "model=pendulum",
    "model.integrator=midpoint",
    "fit.horizon=0.3",
    "fit.stride=0.3",
    "fit.free=[mgl,damping]",
]
STARTS = [f"theta.{name}={value}" for name, value in TRUTH.items() if name not in ("mgl", "damping")]


def write_run(path: Path, seed: int, seconds: float = 6.0) -> None:
    """A pendulum with the parameters TRUTH under a random sum of sines, angles rounded to 0.1 mrad."""
    rng = np.random.default_rng(seed)
    mdp, theta = pendulum(dt=0.01, integrator="midpoint"), {k: torch.tensor(v).double() for k, v in TRUTH.items()}
    time = np.arange(0.0, seconds, 0.01)
    torque = sum(0.8 * np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in (0.4, 1.1, 1.9))
    state, rows = torch.zeros(1, 2, dtype=torch.float64), []
    for t, u in zip(time, torque, strict=True):
        rows.append([t, round(float(state[0, 0]), 4), u])
        state = mdp.step(theta, state, torch.tensor([[u]]), torch.zeros(1, 0))
    np.savetxt(path, rows, "%.6f", ",", header="time,angle,torque", comments="")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    (folder / "schema.yaml").write_text(SCHEMA)
    for seed in range(2):
        write_run(folder / f"run_{seed}.csv", seed)
    return folder


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted")
    assert main(["fit", f"log={data}", *FAST, *STARTS, "leave_out=[run_1]", f"out={out}"]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("mirror", "settings", "other"),
    [
        (FitOptions, FitSettings, {"fixed", "leave_out"}),
        (EvaluationOptions, EvaluationSettings, set()),
        (TuneOptions, TuneSettings, set()),
    ],
)
def test_configuration_mirrors_the_settings_of_the_library(mirror: type, settings: type, other: set[str]) -> None:
    ours, theirs = mirror(), settings()
    names = {f.name for f in dataclasses.fields(mirror)} ^ {f.name for f in dataclasses.fields(settings)}
    assert names <= other
    for field in dataclasses.fields(settings):
        if field.name not in other:
            value = getattr(ours, field.name)
            assert (tuple(value) if isinstance(value, list) else value) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_names_every_key_with_unit_and_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, [command, "--help"])
    assert code == 0
    assert out == help_text(command) + "\n"
    for key in keys_of(COMMANDS[command]):
        line = next(line for line in out.splitlines() if line.startswith(f"  {key.name}"))
        assert key.help in line
        assert f"[{key.unit}]" in line or not key.unit
    assert "exit codes:" in out


def test_without_a_command_it_shows_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, [])
    assert code == 2
    assert "fit" in err
    assert "exit codes:" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["log=x", "model=pendulm"], r"model=pendulm: there are .*did you mean 'pendulum'"),
        (["log=x", "model=pendulum", "fit.horizn=1"], r"unknown key 'fit.horizn'; did you mean 'fit.horizon'"),
        (["log=x", "model=pendulum", "model.integratr=rk4"], r"'model.integratr'; did you mean 'model.integrator'"),
        (["log=x", "model=pendulum", "model.integrator=rk5"], r"model.integrator=rk5: expected one of .*'rk4'"),
        (["log=x", "model=pendulum", "fit.zeros=per_runs"], r"one of none, shared, per_run; did you mean 'per_run'"),
        (["log=x", "model=pendulum", "fit.horizon=long"], r"fit.horizon: Value 'long'.*Float"),
        (["log=x", "horizon"], r"'horizon' is not of the form key=value"),
        (["model=pendulum"], r"log is missing: give log="),
        (["log=x", "model=pendulum", "out="], r"out= is empty: give a path"),
        (["log=x", "model=pendulum", "fit.free=[a"], r"fit.free"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_the_nearest_right_one(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compose_config("fit", words)


def test_paths_keep_the_characters_hydra_gives_a_meaning() -> None:
    config = compose_config("fit", ["log=/tmp/a b,c=d (1)'x.csv", r"out=C:\runs", "model=pendulum"])
    assert config.log == "/tmp/a b,c=d (1)'x.csv"
    assert config.out == r"C:\runs"
    assert compose_config("fit", ["log=[a.csv,b.csv]", "leave_out=run_1"]).leave_out == ["run_1"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["log=nothing.csv", "model=pendulum"], 1, "nothing.csv"),
        (["log={data}", "schema={data}/none.yaml", "model=pendulum"], 1, "none.yaml"),
        (["log={data}", "schema.signals.angle.column=anglee", "model=pendulum"], 1, "anglee"),
        (["log={data}"], 2, "no model: give model=NAME"),
        (["log={data}", "model=pendulum", "leave_out=[run1]"], 2, "there is no 'run1'; did you mean 'run_1'"),
        (["log={data}", "model=pendulum", "theta.mg=1"], 2, "no parameter 'mg'; did you mean 'mgl'"),
        (["log={data}", "model=pendulum", "fit.free=[inertial]"], 2, "there is no 'inertial'; did you mean 'inertia'"),
        (["log={data}", "model=pendulum", "fit.free=[mgl]", "fit.fixed=[mgl]"], 2, "nothing is left to fit"),
        (["log={data}", "model._target_=no_such_package.model"], 2, "no such function"),
        (["log={data}", "model._target_=math.sqrt", "model.x=4"], 2, "model math.sqrt"),
        (["log={data}", "model=pendulum", "out={data}/run_0.csv/deep"], 5, "run_0.csv"),
        (["log={data}", "model=pendulum", "out=/proc/no_such_folder"], 5, "/proc/no_such_folder"),
        (["log={data}", "model=pendulum", "fit.horizon=nan"], 2, "horizon must be > 0 and finite, got nan"),
        (["log={data}", "model=pendulum", "fit.keep.angle=3"], 2, "keep needs (low, high)"),
        (["log={data}", "model=pendulum", "fit.priors.mgl=[1,x]"], 2, "the prior of 'mgl' needs"),
        (["log={data}", "model=pendulum", "threads=0"], 2, "threads=0: expected at least 1"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_a_name_and_an_exit_code(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    filled = [word.replace("{data}", str(data)) for word in words]
    out = [] if any(word.startswith("out=") for word in filled) else [f"out={tmp_path}"]
    got, _, err = run(capsys, ["fit", *filled, *out])
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_fit_finds_the_truth_and_writes_everything(data: Path, fitted: Path) -> None:
    parameters = read_parameters(fitted)
    # angles are rounded to 0.1 mrad, 6 s of log: the fit of two parameters is good to 2 % (it is 0.5 % here)
    for name in ("mgl", "damping"):
        assert parameters.parameters[name]["value"] == pytest.approx(TRUTH[name], rel=0.02)
        assert parameters.parameters[name]["fitted"]
    assert not parameters.parameters["inertia"]["fitted"]
    assert parameters.provenance["settings"]["leave_out"] == ["run_1"]
    assert len(parameters.provenance["log"]["sha256"]) == 64
    assert parameters.report["left_out"]["fitted"]["rmse"] < 0.3 * parameters.report["left_out"]["initial"]["rmse"]
    names = {file.name for file in fitted.iterdir()}
    assert {"params.json", "params.safetensors", "report.html", "fit.log", "checkpoint.safetensors"} <= names
    assert not [name for name in names if name.endswith(".tmp")]


def test_running_again_changes_no_byte_and_other_settings_are_refused(
    data: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", f"log={data}", *FAST, *STARTS, "leave_out=[run_1]", f"out={fitted}"]
    before = {name: (fitted / name).read_bytes() for name in ("params.json", "params.safetensors", "report.html")}
    assert run(capsys, words)[0] == 0
    assert {name: (fitted / name).read_bytes() for name in before} == before
    code, _, err = run(capsys, [*words, "fit.loss_scale=0.1"])
    assert code == 5
    assert "settings.fit.loss_scale was 0.02, is 0.1" in err


def test_json_is_the_only_output_and_parses(data: Path, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", f"params={fitted}", f"log={data / 'run_1.csv'}", f"schema={data / 'schema.yaml'}", "--json"]
    code, out, _ = run(capsys, words)
    document = json.loads(out)
    assert code == 0
    stored = read_parameters(fitted).report["left_out"]["fitted"]
    code, out, _ = run(capsys, [*words, "evaluation.horizon=0.3", "evaluation.stride=0.3"])
    # the same windows as the fit scored: the same figure, to the last bit
    assert json.loads(out)["rmse"] == stored["rmse"]
    assert document["windows"] > 0
    assert document["runs"][0]["episode"] == "run_1"


def test_evaluate_prints_a_table_and_takes_other_values(
    data: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", f"params={fitted / 'params.json'}", f"log={data}"]
    code, out, _ = run(capsys, [*words, "episodes=[run_0]"])
    assert code == 0
    assert "run_0" in out
    assert "run_1" not in out
    worse = json.loads(run(capsys, [*words, "theta.mgl=5.0", "--json"])[1])["rmse"]
    assert worse > 3 * json.loads(run(capsys, [*words, "--json"])[1])["rmse"]


def test_names_with_brackets_are_printed_as_they_are(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run[a].csv").write_bytes((data / "run_0.csv").read_bytes())

    code, out, err = run(capsys, ["evaluate", f"log={tmp_path}", f"schema={data / 'schema.yaml'}", "model=pendulum"])
    assert code == 0, err
    assert "run[a]" in out


def test_a_report_of_an_earlier_result_does_not_stay(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("old")
    words = ["fit", f"log={data}", *FAST, *STARTS, f"out={tmp_path}", "report=false"]
    assert run(capsys, words)[0] == 0
    assert not (tmp_path / "report.html").exists()


def test_a_list_of_files_is_one_log(data: Path, fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = f"log=[{data / 'run_0.csv'},{data / 'run_1.csv'}]"
    words = ["evaluate", f"params={fitted}", files, "model.integrator=rk4", "--json"]
    document = json.loads(run(capsys, words)[1])
    assert [score["episode"] for score in document["runs"]] == ["run_0", "run_1"]
    # a coarser grid was asked for: the log is resampled to it
    coarse = ["evaluate", "model=pendulum", "model.dt=0.02", f"log={data}", "--json"]
    assert json.loads(run(capsys, coarse)[1])["dt"] == 0.02


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["fitt"], ["fit", "--jsn"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "unknown option --jsn" in capsys.readouterr().err


def test_strict_fails_what_is_flagged(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # far too much damping held: Coulomb friction wants to be negative and ends at its bound
    words = ["fit", f"log={data}", *FAST[:-1], "fit.free=[coulomb]", "theta.damping=0.6", "report=false"]
    code, out, _ = run(capsys, [*words, f"out={tmp_path / 'a'}"])
    assert code == 0
    assert "at a bound" in out
    code, _, err = run(capsys, [*words, f"out={tmp_path / 'b'}", "strict=true"])
    assert code == 3
    assert "look at coulomb" in err


def test_what_does_not_converge_says_so_and_keeps_what_it_has(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", f"log={data}", *FAST, *STARTS, f"out={tmp_path}", "fit.max_steps=1", "fit.tolerance=1e-30"]
    code, _, err = run(capsys, [*words, "report=false"])
    assert code == 3
    assert "NOT converged" in err
    assert (tmp_path / "params.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_is_a_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(capsys, ["fit", f"log={data}", *FAST, *STARTS, f"out={tmp_path}"])
    assert code == 5
    assert "No space left on device" in err
    assert "Traceback" not in err


def test_interrupting_exits_130_and_resumes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fitted: Path
) -> None:
    save = workspace.save_snapshot
    calls = []

    def interrupted(*arguments: object, **record: object) -> None:
        save(*arguments, **record)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    words = ["fit", f"log={data}", *FAST, *STARTS, "leave_out=[run_1]", f"out={tmp_path}", "report=false"]
    monkeypatch.setattr(commands, "save_snapshot", interrupted)
    code, _, err = run(capsys, words)
    assert code == 130
    assert "run the same command again to resume" in err
    monkeypatch.undo()
    assert run(capsys, words)[0] == 0
    for name in ("params.json", "params.safetensors"):
        assert (tmp_path / name).read_bytes() == (fitted / name).read_bytes()
    assert "resumed after step 2" in (tmp_path / "fit.log").read_text()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        main(["fit", "log=x", "modle=pendulum", "--debug"])


def test_a_parameter_file_may_not_name_foreign_code(
    data: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((fitted / "params.json").read_text())
    document["model"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    (tmp_path / "params.json").write_text(json.dumps(document))
    code, _, err = run(capsys, ["evaluate", f"params={tmp_path}", f"log={data}"])
    assert code == 1
    assert "model._target_=os.system" in err
    assert not (tmp_path / "owned").exists()


def test_a_model_of_the_users_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rig.py").write_text(
        "from sim2real.simulators import pendulum\n"
        "def model(dt, integrator): return pendulum(dt=dt, integrator=integrator)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ["model._target_=my_rig.model", "model.integrator=midpoint", *FAST[2:], *STARTS, "report=false"]
    code, _, err = run(capsys, ["fit", f"log={data}", *own, "out=run"])
    assert code == 0, err
    assert read_parameters(Path("run")).model["_target_"] == "my_rig.model"
    assert run(capsys, ["evaluate", "params=run", f"log={data}"])[0] == 1
    assert run(capsys, ["evaluate", "params=run", f"log={data}", "model._target_=my_rig.model"])[0] == 0


def _edit(document: dict[str, object], place: str, value: object) -> None:
    *parents, last = place.split(".")
    node: object = document
    for name in parents:
        node = node[name]  # type: ignore[index]
    node[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", "other", "is not a sim2real-params file"),
        ("version", 99, "has version 99"),
        ("model", {}, "model._target_"),
        ("model", [], "model: expected dict, found list"),
        ("parameters", {}, "expected at least one"),
        ("parameters.mgl", 3.0, "parameters.mgl: expected an object with a value"),
        ("parameters.mgl.value", "three", "parameters.mgl.value: expected a number"),
        ("parameters.mgl.value", float("nan"), "parameters.mgl.value: expected finite"),
        ("parameters.mgl.value", [[1.0], [1.0, 2.0]], "expected a number or nested lists"),
        ("notes", None, "notes: expected list"),
    ],
)
def test_a_damaged_parameter_file_is_named_by_place(
    fitted: Path, tmp_path: Path, place: str, value: object, message: str
) -> None:
    document = json.loads((fitted / "params.json").read_text())
    _edit(document, place, value)
    (tmp_path / "params.json").write_text(json.dumps(document))
    with pytest.raises(ParameterFileError, match=message):
        read_parameters(tmp_path)


def test_a_parameter_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ParameterFileError, match="is not JSON"):
        read_parameters(tmp_path)
