# Each target works as the only command in a fresh clone. The environment is .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find src csrc -type f -not -path '*/__pycache__/*')
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test slow lint docs clean

demo: .venv/installed
	$(BIN)/lissom optimize

test: .venv/installed
	$(BIN)/pytest

slow: .venv/installed
	$(BIN)/pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/mkdocs build --strict --quiet

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt ".[dev,docs]"
	touch $@

clean:
	rm -rf .venv build site
