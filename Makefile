# Two commands on a fresh clone: `make quickstart` runs the whole loop on a CPU, `make test` runs every test.
# Both set up .venv/ first. PYTHON, TORCH and TORCH_INDEX can be overridden: make quickstart PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
OUT ?= runs/quickstart

.PHONY: quickstart test lint install clean
.DELETE_ON_ERROR:

quickstart: install
	$(BIN)/agentic-r iterate --config recipes/quickstart/loop.yaml out=$(OUT) --resume

test: install
	$(BIN)/ruff check agentic_r_plugin tests
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check agentic_r_plugin tests
	$(BIN)/ruff format --check agentic_r_plugin tests
	$(BIN)/mypy agentic_r_plugin

install: .venv/installed

# torch first, and from the index of CPU builds: on Linux, PyPI's own brings several gigabytes of CUDA. An index that cannot
# be reached is passed over with warnings; TORCH_INDEX= asks PyPI alone.
.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --retries 1 --timeout 15 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[quickstart,test]"
	$(BIN)/pip check
	touch $@

clean:
	rm -rf .venv runs
