PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch reads sources of its own in the locale's encoding, which may be ASCII.
export PYTHONUTF8 = 1

.PHONY: demo test lint

# Installed once: again only when the dependencies change.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m medsegdiff_monai demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
