# One word a job. Each target makes .venv on its first run and needs only python3, make and a C
# compiler. Which torch is fetched: see scripts/make_venv.sh.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SCALE := .venv-scale/installed

.PHONY: demo test test-slow test-gpu test-scale docs wheel coverage fuzz lint bench results format clean

demo: $(INSTALLED)
	$(BIN)/sidepath demo --output demo-output

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow and not scale" -q

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -q

# Replicas on Ray Serve, in an environment of its own: Ray listens on all interfaces while this runs
# (docs/security.md), and is in no other target's environment.
test-scale: $(SCALE)
	OMP_NUM_THREADS=1 .venv-scale/bin/python -m pytest -m scale -q tests/scale

# Where torch sees a GPU; elsewhere all of tests/gpu is skipped, and the kernels are interpreted.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/gpu tests/kernels

# The code of every page, then the site, warnings as errors; it ends in site/.
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs
	$(BIN)/mkdocs build --strict

# The package: built, installed into an empty environment, and the demo run there.
wheel: $(INSTALLED)
	rm -rf build/wheel
	BUILDER=$(BIN)/python sh scripts/try_wheel.sh build/wheel

# The quick tests with coverage: 95 % of the lines of src, or it fails; branches are told.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow and not scale" -q --cov=sidepath --cov-branch --cov-report=json:coverage.json
	$(BIN)/python scripts/coverage_gate.py coverage.json

fuzz: $(INSTALLED)
	MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --count 25000 --seed 1

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/sidepath bench --output bench-output
	$(BIN)/python benchmarks/qlora.py
	$(BIN)/python benchmarks/together.py

results: $(INSTALLED)
	$(BIN)/python benchmarks/stories_e2e.py
	$(BIN)/python benchmarks/minilm_sst2.py
	$(BIN)/python benchmarks/qlora_metric.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_table.py

$(INSTALLED): pyproject.toml constraints.txt scripts/make_venv.sh
	PYTHON="$(PYTHON)" sh scripts/make_venv.sh

$(SCALE): pyproject.toml constraints.txt scripts/make_venv.sh
	PYTHON="$(PYTHON)" EXTRAS=scale-test sh scripts/make_venv.sh .venv-scale

clean:
	rm -rf .venv .venv-scale build site coverage.json .coverage demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
