# Everything a person or CI runs. Needs Python 3.11 or later and make; the rest is installed in .venv.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

# Workers share the cores: one thread each is faster than two fighting over one core.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# Nothing here asks or tells anyone outside.
export WANDB_MODE ?= offline
export NO_MKDOCS_2_WARNING := 1

.PHONY: install demo bench test test-isa check types docs serve check-site format constraints package clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

install: .venv/.installed .cache/runtimes/.made  ## Create .venv, environments of runtimes, and install everything in them

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[asr,cpu,deploy,dev,foreign,sweep]'
	touch $@

# Packages that ask for other versions than ours, each in an environment of its own.
RUNTIMES := .cache/runtimes/.made
$(RUNTIMES): .venv/.installed $(wildcard lightning_nna/deploy/runtimes/*_requirements.txt)
	mkdir -p $(@D)
	$(BIN)/python lightning_nna/deploy/runtimes/environment.py
	touch $@

# FROM_SCRATCH=1 trains its float network first.
demo: .venv/.installed  ## Show what is saved at which WER: one recognizer, emulated, trained, compressed, deployed
	$(BIN)/python -m recipes.demo $(if $(FROM_SCRATCH),--from-scratch)

bench: .venv/.installed  ## Measure time and memory of training steps, compared with other libraries
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[bench]'
	$(BIN)/python -m recipes.benchmark.emulation
	$(BIN)/python -m recipes.benchmark.weight_methods
	$(BIN)/python -m recipes.benchmark.lloyd_max
	$(BIN)/python -m recipes.benchmark.shift

test: .venv/.installed $(RUNTIMES)  ## Run the whole suite, doctests and the code blocks of the documentation
	$(BIN)/python -m pytest -n $(WORKERS)

# Emulation must not depend on the processor. These stand in for others: PyTorch's kernels without
# vector instructions and with AVX2, and oneDNN's likewise.
ISAS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2
ISA_TESTS := tests/test_processors.py tests/test_elementary.py tests/emulation tests/weights/test_pipeline.py \
	tests/deploy/test_tflite.py tests/callbacks

test-isa: .venv/.installed $(RUNTIMES)  ## Run exactness, learned scales, pipeline, export and contract as on other processors
	@for isa in $(ISAS); do echo "$$isa"; env $$isa $(BIN)/python -m pytest -n $(WORKERS) $(ISA_TESTS) || exit 1; done

check: .venv/.installed  ## Check format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --cache-dir .cache/import_linter
	$(BIN)/mypy

docs: .venv/.installed  ## Build the documentation in site/, with warnings as errors
	$(BIN)/mkdocs build --strict
	@echo "The documentation is in $(CURDIR)/site: open site/index.html in a browser, or run make serve."

serve: .venv/.installed  ## Serve the documentation, open it in a browser, and build it again after a change
	$(BIN)/mkdocs serve --open

# A browser from the registry of npm, for this target alone. It needs node, npm, and a Linux on x86-64.
SITE_CHECK := .cache/site_check
$(SITE_CHECK)/.installed: tests/site/package.json
	mkdir -p $(@D)
	cp $< $(@D)
	cd $(@D) && npm install --no-audit --no-fund --no-package-lock --loglevel=error
	touch $@

check-site: docs $(SITE_CHECK)/.installed  ## Walk the built documentation in Chromium: errors, links, widths; screenshots
	node tests/site/walk.mjs site $(SITE_CHECK) $(SITE_CHECK)/screenshots

format: .venv/.installed  ## Format the code and apply the linter's own repairs
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: .venv/.installed  ## Pin what pyproject.toml asks for again, keeping versions that still fit
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
		--no-emit-index-url --no-emit-find-links --custom-compile-command 'make constraints' \
		--output-file constraints.txt pyproject.toml

package: .venv/.installed  ## Build sdist and wheel in dist/, install the wheel in an empty environment, run README there
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python -m tests.installed_package dist/*.whl

clean:  ## Remove .venv, caches and builds; keeps runs/
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
