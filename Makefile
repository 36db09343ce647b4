# Two commands on a fresh machine with Python >= 3.11:
#   make run    set up, then cluster the digits through all three stages
#   make test   set up, then check style and types and run the quick tests
# Everything, as CI does: make test-all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test test-all lint docs setup bench science gpu-pack clean

run: setup
	$(BIN)/snscc run digits --overwrite

# Three files of tests at a time, on two cores: those with Ray mostly wait for processes to start. One
# thread each: two that share a core wait for each other, and a run takes five times as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: setup lint
	$(PYTEST) -m "not slow"

test-all: setup lint
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/: every link and every name of the API reference is checked.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

bench: setup
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.epoch
	$(BIN)/python -m benchmarks.mining
	$(BIN)/python -m benchmarks.ray

# The paper's experiments on every dataset in DATA, and its claims judged: make science DATA=DIR
science: setup
	$(BIN)/python -m benchmarks.science $(DATA)

# What a quarter of an hour on a GPU needs, in one ignored folder: make gpu-pack DATA=DIR [FROM=DIR]
gpu-pack: setup
	$(BIN)/python -m benchmarks.gpu.carry --data $(DATA) $(if $(FROM),--from $(FROM))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build site *.egg-info
