# make demo: an unlearning run from nothing; make test: everything that is checked.
# Both first make .venv and install into it; pip takes packages from wherever it is configured to.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/unlearn demo --out demo-out

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# triton 3.6 beside the newest: the kernels are compiled with both (tests/kernels/test_triton_compile.py); Linux only
# torch first: the native library is compiled against the torch that will load it
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/native/*)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core cmake ninja
	$(PIP) --no-build-isolation --editable ".[dev]"
	-$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
		--target $(VENV)/triton-3.6 triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) build demo-out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
