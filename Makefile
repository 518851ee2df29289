# Everything runs in .venv, which is created on first use and updated only when pyproject.toml changes.

WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# `python3` if it is new enough for Tutti, else the newest other Python.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help quickstart install dev test test-versions test-oldest test-newest soak sweep sweep-layouts sweep-classes sweep-media lint format bench gpu clean
.DEFAULT_GOAL := help

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

quickstart: $(VENV)/.stamp ## Install, then train a small language model on data/quickstart (minutes, no GPU needed)
	rm -rf runs/quickstart
	$(BIN)/tutti train configs/quickstart.yaml
	@echo
	@echo "Look at runs/quickstart/report.html in a browser. The model is in runs/quickstart/hf/final. To train it further:"
	@echo "  $(BIN)/tutti check configs/sft_lm.yaml    (shows what the run would do)"
	@echo "  $(BIN)/tutti train configs/sft_lm.yaml"

install: $(VENV)/.stamp ## Install Tutti into .venv

dev: $(VENV)/.stamp-dev ## Install Tutti and the tools for its tests and checks into .venv

test: $(VENV)/.stamp-dev ## Run the whole test suite (WORKERS=2 test processes)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Randomized tests, which find more with more tries: crashes, kills, corruption, random rows and templates.
SOAKED := tests/train/test_killed.py tests/train/test_signals.py tests/train/test_stop_anywhere.py \
	tests/train/test_elastic.py tests/checkpoint/test_faults.py tests/checkpoint/test_untrusted.py \
	tests/checkpoint/test_manager.py tests/kinds/test_export.py tests/cluster/test_nodes.py tests/data/test_formats.py \
	tests/data/test_template_property.py tests/data/test_no_row_lost.py tests/data/test_ledger.py \
	tests/parallel/test_mixed_steps.py

soak: $(VENV)/.stamp-dev ## Run the randomized tests with many more tries; takes hours
	SOAK=1 TUTTI_EXAMPLES=$${TUTTI_EXAMPLES:-5000} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist worksteal $(SOAKED)

sweep: $(VENV)/.stamp-dev ## Compare every transformers model family with its original forward, and write the table in docs/models.md
	$(BIN)/python -m tests.sweep --workers $(WORKERS)

sweep-layouts: $(VENV)/.stamp-dev ## Compare every model family on two ranks with one process, and write the second table in docs/models.md
	$(BIN)/python -m tests.sweep_layouts $(ARGS)

sweep-classes: $(VENV)/.stamp-dev ## Compare every sequence classifier, and write the third table in docs/models.md
	$(BIN)/python -m tests.sweep_classes $(ARGS)

sweep-media: $(VENV)/.stamp-dev ## Compare the model families with image, video and audio input, and write the table in docs/multimodal.md
	$(BIN)/python -m tests.sweep_multimodal $(ARGS)

# The oldest and the newest tested torch and transformers are installed on top of .venv and share its other packages. They
# take about 600 MB, or several GB with the newest CUDA libraries.
SMOKE := tests/core/test_compat.py tests/checkpoint/test_hf_load.py tests/model/test_build.py tests/model/test_initialize.py \
	tests/attention/test_ring.py tests/attention/test_flex.py tests/parallel/test_mesh.py tests/check/test_comm_volume.py \
	tests/train/test_loss.py tests/train/test_golden.py

test-versions: test-oldest test-newest ## Run selected tests with the oldest and the newest torch and transformers

test-oldest test-newest: test-%: $(VENV)/%/.stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/$*/bin/python -m pytest -n $(WORKERS) --dist worksteal $(SMOKE)

# The oldest torch runs without its own CUDA libraries; the newest needs them.
$(VENV)/oldest/.stamp: OVERLAY := --no-deps --force-reinstall

$(VENV)/oldest/.stamp $(VENV)/newest/.stamp: $(VENV)/%/.stamp: $(VENV)/.stamp-dev tutti/core/compat.py
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/base
	cp $(@D)/base "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install --disable-pip-version-check --quiet $(OVERLAY) \
		$$($(BIN)/python -m tutti.core.compat $*)
	@touch $@

lint: $(VENV)/.stamp-dev ## Check formatting, style, types, import directions, sizes and wording
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/limits.py
	$(BIN)/python .ci/words.py

format: $(VENV)/.stamp-dev ## Format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-dev ## Compare the speed with transformers' Trainer (ARGS=--quick for a short run)
	$(BIN)/python -m bench.speed $(ARGS)

gpu: $(VENV)/.stamp-dev ## Run the GPU tests and benchmarks on this machine's GPU, in about eight minutes
	$(BIN)/python -m bench.gpu $(ARGS)

clean: ## Remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Tutti needs Python 3.11 or newer: install it, or set its path: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing Tutti with PyTorch into $(VENV): several gigabytes, takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	@echo "Installing Tutti with PyTorch and the tools for its tests into $(VENV): several gigabytes, takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $(VENV)/.stamp $@
