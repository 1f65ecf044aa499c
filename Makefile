# The two commands a newcomer needs: `make train` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test test-all lint setup clean

# OpenMP's waiting threads spin for milliseconds; on cores that others use too, that makes small steps 10 times slower.
train: export GOMP_SPINCOUNT ?= 10000
train: $(READY)
	$(BIN)/zeroprompt-train experiment=demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# Of some 15,000 files few are used: those are compiled when they are first imported.
# torch goes first and by itself: resolved together with the rest, a newer build with gigabytes of CUDA packages can be chosen.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist
