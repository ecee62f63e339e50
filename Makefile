# Two commands do all the set-up: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.lock)
UV := $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)

.PHONY: quickstart test test-slow check format lock bench clean

quickstart: $(VENV)/.run
	$(BIN)/longspan run quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu and not network"

check: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/ops_cpu.py
	$(BIN)/python benchmarks/training_step_cpu.py
	$(BIN)/python benchmarks/mamba1_cpu.py
	$(BIN)/python benchmarks/decode_cpu.py
	$(BIN)/python benchmarks/gated_delta_cpu.py
	$(BIN)/python benchmarks/task_throughput.py
	$(BIN)/python benchmarks/suffix_identification.py
	$(BIN)/python benchmarks/shared_context_scoring.py
	$(BIN)/python benchmarks/openai_overhead.py
	$(BIN)/python benchmarks/rescoring_cpu.py
	$(BIN)/python benchmarks/corpus_preparation.py
	$(BIN)/python benchmarks/wikipedia_extraction.py

# PyTorch is upgraded by hand, in the lock file: every other package follows it.
lock: $(VENV)/.torch
	echo "$(TORCH)" | $(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		--upgrade -c - pyproject.toml -o requirements.lock

# PyTorch comes first and through pip, so that no other package chooses its build.
$(VENV)/.torch: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Longspan needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(UV)"
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q -c requirements.lock -e '.[quickstart]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q -c requirements.lock -e '.[dev]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) runs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
