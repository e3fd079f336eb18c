"""The built wheel installs and imports as `sim2real` and its three subpackages, from any working directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT_ALL = (
    "import sim2real, sim2real.simulators, sim2real.solvers, sim2real.estimators as e, pathlib;"
    "root = pathlib.Path(sim2real.__file__).parent;"
    "assert (root / 'py.typed').exists();"
    "assert pathlib.Path(e.__file__).parent == root / 'estimators';"
    "print(root)"
)


def test_wheel_installs_and_imports(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("sim2real", "simulators", "solvers", "estimators"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("sim2real-*.whl")

    fresh = tmp_path / "venv"
    venv.create(fresh, system_site_packages=True, with_pip=False)
    (site,) = (fresh / "lib").glob("python*/site-packages")
    # the dependencies of the running environment; its own .pth files (the editable install) are not processed there
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = subprocess.run(
        [str(fresh / "bin" / "python"), "-c", IMPORT_ALL],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(str(site))


def test_editable_install_imports_from_anywhere(tmp_path: Path) -> None:
    code = "import sim2real, sim2real.simulators, sim2real.solvers, sim2real.estimators"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
