# make quickstart   install into .venv and train a small model on a CPU
# make test         install what the tests need and run them, two at a time (JOBS=4 for four)
# make lint         ruff
# make install      .venv alone
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/blagpt fit --config configs/quickstart.yaml

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; fix: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its pin, so that nothing that needs it can choose another build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch first, then the rest (once; a minute, or as long as the download of torch takes)"
	@$(PIP) torch
	@$(PIP) --quiet -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
