# Two commands do everything on a machine with only Python >= 3.11:
#   make demo   trains, prunes and shows the table and the figure (ARGS="--help" lists the flags)
#   make test   runs the whole test suite (ARGS="-m 'not long'" for the quick part)
# And make bench measures selection against its peers, in ten minutes: benchmarks/README.md.
# Another interpreter, another place: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KERNELS := setup.py $(wildcard csrc/*.cc csrc/*.h csrc/*.inl)
RESULTS ?= benchmarks/results/selection.json

.PHONY: demo test check bench
demo: $(VENV)/examples.stamp
	$(BIN)/python examples/mnist.py $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/benchmarks.stamp
	$(BIN)/python -m pytest -v benchmarks --benchmark-json=$(RESULTS) \
	  --benchmark-columns=median,min,max,rounds --benchmark-group-by=group $(ARGS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

$(VENV)/%.stamp: pyproject.toml $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsejax needs Python >= 3.11, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$*]'
	touch $@
