# Two commands for a fresh machine: `make quickstart` and `make test`. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The other runtimes that open a bundle, in environments of their own: tests/slow/test_runtimes.py.
RUNTIMES := .runtimes
NODE := $(RUNTIMES)/node/.installed
OPTIMUM := $(RUNTIMES)/optimum/.installed

.PHONY: quickstart test lint types unit real emulated docs wheel clean setup runtimes servers

quickstart: setup
	$(BIN)/edgedisp build recipes/quickstart.yaml

# What waits for the network goes beside what waits for the processor.
test: setup
	$(MAKE) --jobs=2 --output-sync=target runtimes web lint types
	$(MAKE) unit real

setup: $(INSTALLED)

# Plain `torch` would bring several GB of CUDA libraries where no CPU build is offered; see README, Install.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Where node or a package cannot be had, the tests of that runtime are skipped and say so.
runtimes: $(NODE) $(OPTIMUM) servers

# A real sshd for tests/slow/test_bench_ssh.py, a real adb (with its server) for tests/slow/test_bench_adb.py. The packages are
# installed where that needs no question.
servers:
	-{ test -x /usr/sbin/sshd && command -v adb; } >/dev/null || ! command -v apt-get >/dev/null || \
		test "$$(id -u)" != 0 || \
		{ apt-get -qq update; apt-get -qq -y install --no-install-recommends openssh-server adb; } >/dev/null 2>&1

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

# The libraries of the phone page, pinned by version here and by content in export/web/vendor.sha256. Of each
# package the few files that the page loads, with its licence; nothing is built and no script is run.
# Without npm the page is missing, and `edgedisp phone` says so; the rest works.
VENDOR := export/web/vendor
PACKED := $(RUNTIMES)/web

.PHONY: web vendored
web: $(VENDOR)/.made

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

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Small models gain little from a second thread, and two processes of tests nearly halve the time.
TESTERS := 2

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not real and not emulated" -n $(TESTERS) --dist loadfile

# ARM64 kernels in qemu: needs qemu-user-static, and fetches an ARM64 Python.
emulated: setup
	$(BIN)/python -m pytest -m emulated

# One small build of a real pretrained model, through the real command.
real: setup
	$(BIN)/python -m pytest -m real

# docs/recipe.md is made from the schema, and so is the table of keys that ends docs/bundles.md;
# tests/unit/test_readme.py notices when one is out of date.
docs: setup
	( echo "# Every key of a recipe"; echo; $(BIN)/python -c "from edgedisp.recipe import reference; print(reference())" ) > docs/recipe.md
	sed -i '/^| key |/,$$d' docs/bundles.md
	$(BIN)/python -c "from edgedisp.recipe import Target, reference; print(reference(Target), end='')" >> docs/bundles.md

# With the phone page's libraries where `make web` can fetch them; `edgedisp phone` says so where they are missing.
wheel: setup web
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(RUNTIMES) $(VENDOR) build dist *.egg-info
