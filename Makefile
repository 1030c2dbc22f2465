# Everything goes into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIMES := .runtimes
VENDOR := export/web/vendor
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-all setup setup-all lint types docs lock wheel clean runtimes web vendored

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.base ## teach a real model (SmolLM2-135M) function calls and compare, from nothing
	env -u OMP_NUM_THREADS $(BIN)/edgedisp build recipes/home_commands_smollm2_135m.yaml --out runs/home_commands

# Types are checked beside the tests: mypy takes one core for a minute.
test: setup ## lint, types and every test but tests/slow: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs=2 types tests

.PHONY: tests
tests:
	$(BIN)/python -m pytest tests/unit tests/model tests/e2e -n 2

test-fast: setup ## tests/unit alone, under a minute
	$(BIN)/python -m pytest tests/unit -n 2

test-all: setup-all runtimes web lint types ## every test, with node, Chromium, ssh and adb where they are there
	$(BIN)/python -m pytest -n 2

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

# Plain `torch` would bring several GB of CUDA libraries where no CPU build is offered; see README, Install.
# Most of the 13,000 modules are never imported, so that byte code is left to the first import.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock --editable
$(VENV)/.base: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) ".[lora]"
	touch $@

setup: $(VENV)/.test ## the environment of `make test`
$(VENV)/.test: $(VENV)/.base
	$(INSTALL) ".[test]"
	touch $@

setup-all: $(VENV)/.dev ## the environment of `make test-all`
$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) ".[dev]"
	touch $@

lock: setup-all ## write requirements.lock from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock

# docs/recipe.md is made from the schema, and so is the table of keys that ends docs/bundles.md;
# tests/unit/test_readme.py notices when one is out of date.
docs: setup ## write the tables of keys in docs/
	$(BIN)/python docs/key_tables.py

# With the phone page's libraries where `make web` can fetch them; `edgedisp phone` says so where they are missing.
wheel: setup-all web ## build the wheel
	$(BIN)/python -m build --wheel

clean: ## remove environments and build outputs
	rm -rf $(VENV) $(RUNTIMES) $(VENDOR) build dist *.egg-info

# ---------------------------------------------------------------- runtimes of tests/slow, each optional

NODE := $(RUNTIMES)/node/.installed
OPTIMUM := $(RUNTIMES)/optimum/.installed
runtimes: $(NODE) $(OPTIMUM) ## node packages and optimum-onnx for tests/slow

# Without the variable, onnxruntime-node fetches CUDA libraries that nothing here uses. transformers.js brings the
# onnxruntime-web that it was built with; playwright-core drives a Chromium that is there already, and fetches none.
$(NODE): Makefile
	mkdir -p $(@D)
	-ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-audit --no-fund --prefix $(@D) \
		@huggingface/transformers@4.3.1 playwright-core@1.65.1 && touch $@

# optimum-onnx needs transformers 4.
$(OPTIMUM):
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip install --quiet "optimum-onnx==0.1.0" "transformers<4.58" "onnxruntime>=1.27,<2" \
		"torch>=2.10,<2.14" && touch $@

# The libraries of the phone page, pinned by version here and by content in export/web/vendor.sha256. Of each
# package the few files that the page loads, with its licence; nothing is built and no script is run.
PACKED := $(RUNTIMES)/web
web: $(VENDOR)/.made ## the phone page's JavaScript libraries (npm)

$(VENDOR)/.made: export/web/vendor.sha256
	mkdir -p $(PACKED)
	if npm pack --silent --pack-destination $(PACKED) \
		onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0 @huggingface/jinja@0.5.11; then $(MAKE) vendored; fi

vendored: MADE := $(PACKED)/made
vendored:
	rm -rf $(MADE) $(VENDOR)
	mkdir -p $(MADE)/onnxruntime-web $(MADE)/tokenizers $(MADE)/jinja
	tar -xzf $(PACKED)/onnxruntime-web-1.30.0.tgz -C $(MADE)/onnxruntime-web --strip-components=2 \
		package/dist/ort.wasm.min.mjs package/dist/ort-wasm-simd-threaded.mjs package/dist/ort-wasm-simd-threaded.wasm
	tar -xzf $(PACKED)/huggingface-tokenizers-0.2.0.tgz -C $(MADE)/tokenizers --strip-components=1 \
		package/LICENSE package/dist/tokenizers.min.mjs
	tar -xzf $(PACKED)/huggingface-jinja-0.5.11.tgz -C $(MADE)/jinja --strip-components=1 \
		package/LICENSE package/dist/index.js
	cp export/web/licences/onnxruntime-web.txt $(MADE)/onnxruntime-web/LICENSE
	-cp $(VENV)/lib/python3*/site-packages/onnxruntime/ThirdPartyNotices.txt $(MADE)/onnxruntime-web/
	cd $(MADE) && sha256sum --quiet --check $(abspath export/web/vendor.sha256)
	touch $(MADE)/.made
	mv $(MADE) $(VENDOR)
