# The commands of a developer and of a first visitor. `make setup` is all that the others need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo lint format test soak bench protos clean

setup: $(STAMP)

# Any change of the pinned set rebuilds what is installed; torch goes first and alone, since every
# other package that needs torch would otherwise pull a build of its own.
$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m jobs.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup
	$(BIN)/python -m pytest -m "not soak"

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600 -rP

protos: setup
	$(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) build *.egg-info runs
