#!/usr/bin/env bash
# Virtual environment, system packages (as root), all extras but `bench`, theseus-ai. Prints what had to be left out.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
left_out() { echo "setup: left out: $*"; }

can_build() { "$PYTHON" -c 'import ensurepip, pathlib, sysconfig as s; assert pathlib.Path(s.get_path("include"), "Python.h").exists()' 2>/dev/null; }
if [ ! -e /usr/include/suitesparse/cholmod.h ] || ! command -v gcc >/dev/null || ! can_build; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -q && apt-get install -y -q --no-install-recommends libsuitesparse-dev gcc python3-dev python3-venv; } >/dev/null ||
            left_out "system packages (apt-get failed)"
    else
        left_out "system packages libsuitesparse-dev gcc python3-dev (not root)"
    fi
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install -U pip "setuptools>=77,<81" wheel
pip install -c constraints.txt torch numpy scipy
pip install -c constraints.txt -e ".[dev,docs,mujoco,mujoco-warp,warp,convex,logs,rl,scip]"
pip install -c constraints.txt pytest-xdist

# theseus-ai builds against the installed torch and wants scikit-sparse 0.4 (0.5 needs a newer SuiteSparse and breaks it)
if pip install -c constraints.txt "scikit-sparse==0.4.16"; then
    pip install -c constraints.txt --no-build-isolation "theseus-ai==0.2.3" || left_out "theseus-ai"
else
    left_out "scikit-sparse (no SuiteSparse headers); theseus-ai falls back to dense Cholesky"
    pip install -c constraints.txt pybind11 semantic-version "torchlie==0.1.0" "torchkin==0.1.1" &&
        pip install --no-build-isolation --no-deps "theseus-ai==0.2.3" || left_out "theseus-ai"
fi
echo "setup: ready in $VENV"
