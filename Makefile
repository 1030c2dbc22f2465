# Two commands for a fresh machine: `make quickstart` and `make test`. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The other runtimes that open a bundle, in environments of their own: tests/test_runtimes.py.
RUNTIMES := .runtimes
NODE := $(RUNTIMES)/node/.installed
OPTIMUM := $(RUNTIMES)/optimum/.installed

.PHONY: quickstart test lint types unit real docs wheel clean setup runtimes

quickstart: setup
	$(BIN)/edgedisp build recipes/quickstart.yaml

test: setup runtimes lint types unit real

setup: $(INSTALLED)

# Plain `torch` would bring several GB of CUDA libraries where no CPU build is offered; see README, Install.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Where node or a package cannot be had, the tests of that runtime are skipped and say so.
runtimes: $(NODE) $(OPTIMUM)

# Without the variable, onnxruntime-node fetches CUDA libraries that nothing here uses. transformers.js brings the
# onnxruntime-web that it was built with; playwright-core drives a chromium that is there already, and fetches none.
# Again where this file, and so a version, has changed.
$(NODE): Makefile
	mkdir -p $(@D)
	-ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-audit --no-fund --prefix $(@D) \
		@huggingface/transformers@4.3.1 playwright-core@1.65.1 && touch $@

# optimum-onnx needs transformers 4.
$(OPTIMUM):
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip install --quiet "optimum-onnx==0.1.0" "transformers<4.58" "onnxruntime>=1.27,<2" \
		"torch>=2.10,<2.14" && touch $@

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

# docs/recipe.md is made from the schema, and so is the table of keys that ends docs/bundles.md;
# tests/test_readme.py notices when one is out of date.
docs: setup
	( echo "# Every key of a recipe"; echo; $(BIN)/python -c "from edgedisp.recipe import reference; print(reference())" ) > docs/recipe.md
	sed -i '/^| key |/,$$d' docs/bundles.md
	$(BIN)/python -c "from edgedisp.recipe import Target, reference; print(reference(Target), end='')" >> docs/bundles.md

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(RUNTIMES) build dist *.egg-info
