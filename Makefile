# Two commands for a fresh machine: `make quickstart` and `make test`. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint types unit real docs wheel clean setup

quickstart: setup
	$(BIN)/edgedisp build recipes/quickstart.yaml

test: setup lint types unit real

setup: $(INSTALLED)

# Plain `torch` would bring several GB of CUDA libraries where no CPU build is offered; see README, Install.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -m "not real"

# One small build of a real pretrained model, through the real command.
real: setup
	$(BIN)/python -m pytest -m real

# docs/recipe.md is made from the schema; tests/test_readme.py notices when it is out of date.
docs: setup
	( echo "# Every key of a recipe"; echo; $(BIN)/python -c "from edgedisp.recipe import reference; print(reference())" ) > docs/recipe.md

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info
