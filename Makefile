# `make serve` serves, `make check` is the fast check, `make test` runs everything. Each makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/local.yaml

# uv does not read pip's settings; pass on pip's wheel locations.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[cpu,model,dev]' \
	--constraints constraints-cpu.txt

.PHONY: serve check test e2e install lint types fast tests faults soak docs clean

serve: install
	@$(BIN)/headrace up $(CONFIG)

# Lint, types and every quick test that needs neither vLLM, Ray nor helm; types are checked beside the tests, which wait now and then.
check: install lint
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types fast

test: install lint types tests

install: $(VENV)/.installed

# The CPU build of torch is on PyTorch's own index; --torch-backend makes uv look there if nothing nearer has it.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing about 4 GB into $(VENV), a few minutes"
	@$(INSTALL) 2>$(VENV)/install.log || $(INSTALL) --torch-backend cpu || { cat $(VENV)/install.log; exit 1; }
	@$(BIN)/python -c "import transformers, vllm"
	@touch $@

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

fast: install
	$(BIN)/pytest --fast --numprocesses 2

tests: install
	$(BIN)/pytest -m "not long"

# What `make test` has no time for: faults, drains, live changes, several models, overload at the front door.
e2e: install
	$(BIN)/pytest -m long

# The whole table of docs/evidence/faults.md, hours; what is in runs/faults already is not run again.
faults: install
	$(BIN)/python -m benchmarks.faults --runs runs/faults
	$(BIN)/python benchmarks/evidence/faults_page.py --runs runs/faults

SOAK_MINUTES ?= 30
SOAK_QUIET_MINUTES ?= 15

soak: install
	$(BIN)/python -m benchmarks.faults.soak --minutes $(SOAK_MINUTES) --quiet $(SOAK_QUIET_MINUTES)

# The documentation as a site in site/, its reference pages written from the code.
docs: install
	$(BIN)/python -m tools.docs.reference
	$(BIN)/python helm/readme.py
	PYTHONPATH=. $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .models site
