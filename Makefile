# `make demo` and `make test` each set up .venv on a fresh machine and do their job.
PYTHON ?= python3
BIN := .venv/bin
# Waiting threads that spin take the core that another needs: several times slower on small machines.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.PHONY: install demo test test-all matrix check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Here a thread spins for some 20 microseconds before it sleeps: without, two would be slower than one on products so small.
demo: install
	GOMP_SPINCOUNT=20000 $(BIN)/ijepa demo --output runs/demo

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

# Hours, and 6 GB of disk for each CUDA build of torch; ENVIRONMENTS keeps the virtual environments.
ENVIRONMENTS ?= .cache/environments
matrix: install
	$(BIN)/python benchmarks/matrix.py --environments $(ENVIRONMENTS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_language.py

clean:
	rm -rf .venv build dist src/*.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
