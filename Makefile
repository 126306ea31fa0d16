PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# MONAI Label pins packages that would break the others, so it has an environment of its own.
LABEL_VENV := .venv-label
LABEL_PYTHON := $(LABEL_VENV)/bin/python
# torch reads sources of its own in the locale's encoding, which may be ASCII.
export PYTHONUTF8 = 1

.PHONY: demo test lint docs label test-label test-viewers

# Installed once: again only when the dependencies change.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

$(LABEL_VENV)/.installed: setup.cfg constraints.txt $(wildcard examples/label/requirements*.txt) examples/label/torchvision_without_cuda.py
	$(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_PYTHON) -m pip install --upgrade pip
	$(LABEL_PYTHON) -m pip install --constraint constraints.txt torch
	$(LABEL_PYTHON) -m pip install --constraint constraints.txt --editable '.[demo]' pytest \
		--requirement examples/label/requirements.txt
	$(LABEL_PYTHON) -m pip install --no-deps --requirement examples/label/requirements-no-deps.txt
	site=$$($(LABEL_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp examples/label/torchvision_without_cuda.py "$$site" && \
		echo "import torchvision_without_cuda" > "$$site/torchvision_without_cuda.pth"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m medsegdiff_monai demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	touch $@

# The site, which is read from disk.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "Written: build/docs/index.html"

# Options of examples/label/__main__.py, such as make label ARGS='--studies DIR --port 8001'
label: $(LABEL_VENV)/.installed
	$(LABEL_PYTHON) -m examples.label $(ARGS)

test-label: $(LABEL_VENV)/.installed
	$(LABEL_PYTHON) -m pytest tests/label

# Orthanc and Chromium are Debian's packages; where they cannot be installed, the tests say which are missing.
$(LABEL_VENV)/.viewers: $(LABEL_VENV)/.installed
	$(LABEL_PYTHON) -m pip install playwright
	$(LABEL_PYTHON) -c 'import sys; from tests.viewers.orthanc import missing; sys.exit(bool(missing()))' || \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes orthanc orthanc-dicomweb chromium || true
	touch $@

# Screenshots are kept in build/viewers.
test-viewers: $(LABEL_VENV)/.viewers
	$(LABEL_PYTHON) -m pytest -rs tests/viewers
