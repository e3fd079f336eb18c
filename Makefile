# Everything from a bare Debian 12 machine with Python 3.11: each target does its own set-up.
PYTHON ?= python3
MODEL ?= pendulum
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
EXPORTS := OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: setup run test test-slow lint bench study-hpo study-hdpo study-mujoco study-ohio docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash setup.sh
	@touch $(STAMP)

# The main job on the embedded bench rig: fit, table, tune, reports. A log of your own is fitted instead:
#   make run LOG='runs/*.csv' SCHEMA=rig.yaml MODEL=double_pendulum ARGS="fit.zeros=per_run leave_out=[run_3]"
run: $(STAMP)
	$(EXPORTS) $(BIN)/python examples/bench_rig.py $(if $(LOG),--log '$(LOG)') $(if $(SCHEMA),--schema '$(SCHEMA)') \
		$(if $(MODEL),--model $(MODEL)) $(if $(OUT),--out '$(OUT)') $(ARGS)

test: $(STAMP)
	$(EXPORTS) $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal --cov --cov-report=term:skip-covered

test-slow: $(STAMP)
	$(EXPORTS) $(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --upgrade --target build/installed .
	cd build && MYPYPATH=installed ../$(BIN)/mypy --config-file ../pyproject.toml -p sim2real

bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench,convex]"
	for file in real_logs closed_loop sensitivity layers warp_rollouts mixed_gradients hypergradients inventory mujoco_gradients inversion design routing supply arm; do $(EXPORTS) $(BIN)/python benchmarks/$$file.py --json || exit 1; done

# Training of hybrid policies (HPO, branches, PPO), and through MuJoCo against PPO: resumable, hours; rows to
# benchmarks/results/hpo.json and mujoco_training.json
study-hpo study-mujoco: $(STAMP)
	$(EXPORTS) $(BIN)/python benchmarks/$(subst -,_,$@).py $(ARGS)

# Hindsight training on the published inventory instances: resumable, hours; rows to benchmarks/results/hdpo.json
study-hdpo: $(STAMP)
	$(EXPORTS) $(BIN)/python benchmarks/study_hdpo.py $(ARGS)

# Upper policies learned offline from inverted logs (reacher, supply chain, arm, vehicle routing): resumable, hours; rows
# to benchmarks/results/ohio.json, ohio_supply.json, arm.json, ohio_routing.json
study-ohio: $(STAMP)
	for study in study_ohio study_supply "arm --run" study_routing; do \
		set -- $$study; file=$$1; shift; $(EXPORTS) $(BIN)/python benchmarks/$$file.py "$$@" $(ARGS) || exit 1; done

docs: $(STAMP)
	$(EXPORTS) $(BIN)/python -m sphinx -W -b html docs docs/_build

clean:
	rm -rf build dist *.egg-info docs/_build docs/gallery docs/api/generated
