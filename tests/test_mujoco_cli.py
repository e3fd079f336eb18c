"""`sim2real fit|evaluate|tune model=mujoco xml=... theta=...`: a planted arm is found, its XML comes back."""

import json
from collections.abc import Sequence
from pathlib import Path

import mujoco
import numpy as np
import pytest

from sim2real.cli import main
from sim2real.conf.compose import compose_config

ROBOT = """<mujoco model="arm">
  <option timestep="0.005"/>
  <worldbody>
    <body name="upper" pos="0 0 1">
      <joint name="shoulder" axis="0 1 0" damping="0.1"/>
      <geom type="capsule" fromto="0 0 0 0 0 -0.3" size="0.03"/>
      <body name="fore" pos="0 0 -0.3" simple="false">
        <joint name="elbow" axis="0 1 0" damping="0.1"/>
        <geom type="capsule" fromto="0 0 0 0 0 -0.2" size="0.02"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="upper_motor" joint="shoulder"/><motor name="fore_motor" joint="elbow"/></actuator>
</mujoco>
"""
SCHEMA = """
time: {column: time, unit: s}
signals:
  shoulder: {column: q1, unit: rad}
  elbow: {column: q2, unit: rad}
  shoulder_velocity: {column: v1, unit: rad/s}
  elbow_velocity: {column: v2, unit: rad/s}
actions:
  upper_motor: {column: u1, unit: N m}
  fore_motor: {column: u2, unit: N m}
dt: 0.01
resample: true
"""
TRUTH = {"fore.mass": 0.4, "shoulder.damping": 0.25, "elbow.damping": 0.06}
THETA = "theta={fore.mass: [0.05,2], shoulder.damping: null, elbow.damping: [0.01,1]}"
TASK = """
from sim2real import default_params, rollout, sample_noise
from sim2real.simulators.mujoco_command import mujoco_from_xml

def reward(state, action, following):
    return -(following[:, :2] ** 2).sum(-1) - 0.1 * (action ** 2).sum(-1)

def collect(policy, nu, iteration, generator):
    real = mujoco_from_xml(xml="robot.xml", theta=["elbow.damping"], dt=0.01, initial_std=0.1)
    theta = {"elbow.damping": 3 * default_params(real.box)["elbow.damping"]}
    rolled = rollout(replaced(real), policy, theta, nu, sample_noise(real, policy, 4, 20, generator))
    return rolled

def replaced(mdp):
    from dataclasses import replace
    return replace(mdp, reward=lambda theta, s, a, e, following: reward(s, a, following))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of the arm with the parameters TRUTH, made by MuJoCo itself."""
    folder = tmp_path_factory.mktemp("arm")
    (folder / "robot.xml").write_text(ROBOT)
    (folder / "schema.yaml").write_text(SCHEMA)
    (folder / "mujoco_task.py").write_text(TASK)
    model = mujoco.MjModel.from_xml_string(ROBOT)
    model.body_mass[2] = TRUTH["fore.mass"]
    model.dof_damping[:] = TRUTH["shoulder.damping"], TRUTH["elbow.damping"]
    data, rows = mujoco.MjData(model), []
    for k in range(300):
        t = 0.01 * k
        data.ctrl[:] = 2.0 * np.sin(5 * t) + np.sin(11 * t), 0.8 * np.sin(7 * t + 1)
        rows.append([t, *data.qpos, *data.qvel, *data.ctrl])
        mujoco.mj_step(model, data, 2)
    np.savetxt(folder / "run.csv", rows, "%.9f", ",", header="time,q1,q2,v1,v2,u1,u2", comments="")
    return folder


def words(data: Path, command: str, *more: str) -> list[str]:
    log = [f"log={data / 'run.csv'}", f"schema={data / 'schema.yaml'}", "model=mujoco", f"xml={data / 'robot.xml'}"]
    fast = ["fit.horizon=0.2", "fit.stride=0.4"] if command == "fit" else []
    return [command, *log, *fast, *more]


def run(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted")
    assert main(words(data, "fit", THETA, "theta.shoulder.damping=0.15", f"out={out}")) == 0
    return out


def test_planted_parameters_are_found_with_units_and_intervals(fitted: Path) -> None:
    document = json.loads((fitted / "params.json").read_text())
    for name, truth in TRUTH.items():
        row = document["parameters"][name]
        # the log is exact to nine digits and the model is the same: what is left is the pull of the weak prior
        assert row["value"] == pytest.approx(truth, rel=1e-3)
        assert row["low"] <= row["value"] <= row["high"]
    assert document["parameters"]["fore.mass"]["unit"] == "kg"
    assert document["parameters"]["elbow.damping"]["unit"] == "N m s/rad"
    assert document["parameters"]["shoulder.damping"]["initial"] == 0.15
    report = (fitted / "report.html").read_text()
    assert "N m s/rad" in report
    assert "fore.mass" in report


def test_the_identified_xml_is_a_model_anyone_can_load(fitted: Path) -> None:
    found = json.loads((fitted / "params.json").read_text())["parameters"]
    model = mujoco.MjModel.from_xml_path(str(fitted / "model.xml"))
    assert model.body("fore").mass[0] == pytest.approx(found["fore.mass"]["value"], rel=1e-12)
    assert model.joint("elbow").damping[0] == pytest.approx(found["elbow.damping"]["value"], rel=1e-12)
    assert model.opt.timestep == 0.005


def test_evaluate_takes_the_parameter_file_or_the_written_xml(
    data: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = [f"log={data / 'run.csv'}", f"schema={data / 'schema.yaml'}", "--json"]
    fast = ["evaluation.horizon=0.2", "evaluation.stride=0.4"]
    code, out, err = run(capsys, ["evaluate", f"params={fitted}", *log, *fast])
    assert code == 0, err
    again = ["evaluate", "model=mujoco", f"xml={fitted / 'model.xml'}", "theta=[fore.mass]", *log, *fast]
    code, reloaded, err = run(capsys, again)
    assert code == 0, err
    assert json.loads(reloaded)["rmse"] == pytest.approx(json.loads(out)["rmse"], rel=1e-6, abs=1e-10)
    code, worse, _ = run(capsys, [*again, "theta.fore.mass=0.2"])
    assert code == 0
    assert json.loads(worse)["rmse"] > 100 * json.loads(reloaded)["rmse"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["theta=[fore.mas]"], 1, r"'fore.mas': a body has no 'mas'; did you mean 'mass'?"),
        (["theta=[for.mass]"], 1, "'for.mass': the model has no such element; did you mean 'fore.mass'"),
        (["theta={fore.mass: [1,2]}"], 1, "outside its bounds (1, 2)"),
        (["theta={d: {targts: '*.damping'}}"], 1, "expected the keys targets, low, high, default, scale"),
        (["theta={fore.mass: {low: light}}"], 1, "theta['fore.mass'] = {'low': 'light'}: expected"),
        (["theta={fore.mass: {default: x}}"], 1, "default must be a number, got 'x'"),
        (["theta={fore.mass: {scale: maybe}}"], 1, "scale must be true or false, got 'maybe'"),
        ([THETA, "theta.fore.mas=1"], 2, "no parameter 'fore.mas'; did you mean 'fore.mass'"),
        ([THETA, "theta.fore.mass=heavy"], 2, "heavy"),
        ([THETA, "fit.free=[fore.mas]"], 2, "there is no 'fore.mas'; did you mean 'fore.mass'"),
        ([THETA, "fit.priors.fore.mass=[1,x]"], 2, "the prior of 'fore.mass' needs"),
        ([THETA, "model.weights=thawed"], 2, "model.weights=thawed: expected one of frozen, moving"),
        ([THETA, "model.timestep=0.003"], 1, "steps at 0.003 s, which does not divide the control period of 0.01 s"),
        ([THETA, "model.timestep=-1"], 1, "timestep must be a positive number of seconds, got -1"),
        ([THETA, "model.dt=0"], 1, "dt must be a finite period above 0 s"),
        ([THETA, "xml={data}/stopped.xml"], 1, "steps at 0 s; give a sensible time step with model.timestep"),
        ([THETA, "model.initial=home"], 1, "has no keyframe 'home'"),
        ([THETA, "xml=none.xml"], 1, "xml='none.xml' cannot be read: No such file or directory"),
        ([THETA, "xml={data}/schema.yaml"], 1, "'schema.yaml', line 2: is not well-formed XML"),
        ([THETA, "xml={data}/hostile.xml"], 1, "'hostile.xml', line 1: '/etc/passwd' is an absolute path"),
        ([], 2, "model.theta is missing"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], code: int, message: str
) -> None:
    (data / "hostile.xml").write_text("<mujoco><include file='/etc/passwd'/></mujoco>")
    (data / "stopped.xml").write_text(ROBOT.replace("0.005", "0"))
    given = [word.replace("{data}", str(data)) for word in change]
    ended, _, err = run(capsys, words(data, "fit", f"out={tmp_path}", *given))
    assert ended == code, err
    assert message in err
    assert "Traceback" not in err


def test_columns_are_matched_with_joints_by_name(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = (data / "schema.yaml").read_text().replace("  elbow:", "  knee:").replace("upper_motor", "motor")
    (data / "other.yaml").write_text(renamed)
    code, _, err = run(capsys, words(data, "fit", THETA, f"schema={data / 'other.yaml'}"))
    assert code == 1
    assert "'elbow'" in err
    assert "knee" in err


def test_names_with_dots_are_one_name() -> None:
    said = ["log=x", "model=mujoco", "xml=a.xml", "theta=[fore.mass,*.damping,geom:ball.friction]"]
    config = compose_config("fit", [*said, "theta.fore.mass=0.2", "theta.geom:ball.friction=1", "fit.free=[fore.mass]"])
    assert config.model.xml == "a.xml"
    assert config.model.theta == ["fore.mass", "*.damping", "geom:ball.friction"]
    assert config.theta == {"fore.mass": 0.2, "geom:ball.friction": 1.0}
    # without such a model the word stays the table of start values
    assert compose_config("fit", ["log=x", "model=pendulum", "theta.mgl=2.0"]).theta == {"mgl": 2.0}


@pytest.mark.slow
def test_tune_writes_the_xml_of_what_it_found(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    small = ["tune.max_steps=1", "horizon=0.1", "batch=4", "discount=0.9", "policy.std=0.2", "report=false"]
    model = ["model=mujoco", "xml=robot.xml", "theta=[elbow.damping]", "model.dt=0.01", "model.initial_std=0.1"]
    source = ["data.mode=callable", "data.callable=mujoco_task.collect", "reward=mujoco_task.reward"]
    call = ["tune", *model, *small, *source, f"out={tmp_path}"]
    code, _, err = run(capsys, call)
    assert code in (0, 3), err
    value = json.loads((tmp_path / "params.json").read_text())["parameters"]["elbow.damping"]["value"]
    assert mujoco.MjModel.from_xml_path(str(tmp_path / "model.xml")).joint("elbow").damping[0] == pytest.approx(value)
    without = [word for word in call if not word.startswith(("reward=", "out="))]
    code, _, err = run(capsys, [*without, f"out={tmp_path / 'other'}"])
    assert code == 1
    assert "a MuJoCo XML names no task; give reward=module.function" in err
