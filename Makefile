# Every target sets up what it needs: on a fresh clone `make test` or `make demo` alone is enough.
# PYTHON is only used to make the environment; everything runs with .venv/bin/python afterwards.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
SEED ?=
FUZZ_EXAMPLES := 50000
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup test fuzz lint format types wheel docs changelog sanitize demo bench gpu golden clean distclean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## make .venv with everything the other targets need (once; again when the requirements change)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sparsedsl needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; say which one to use: make setup PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,demo,dev,docs]'
	@touch $@

test: $(READY)  ## run the tests on two processes (WORKERS=n; PYTEST_ARGS='-k tiles'); the same random cases every time
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The seed is drawn once a run and printed first; with it, the same budget and the same tests the same cases are drawn again.
fuzz: SEED := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))
fuzz: export SPARSEDSL_TEST_EXAMPLES := $(or $(SPARSEDSL_TEST_EXAMPLES),$(FUZZ_EXAMPLES))
fuzz: $(READY)  ## new random cases, SPARSEDSL_TEST_EXAMPLES of them (50000); prints its seed (SEED=n draws them again; PYTEST_ARGS='-k tiles')
	@echo "new random cases; to draw them again: SPARSEDSL_TEST_EXAMPLES=$$SPARSEDSL_TEST_EXAMPLES make fuzz SEED=$(SEED) PYTEST_ARGS='$(PYTEST_ARGS)'"
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal --hypothesis-seed=$(SEED) $(PYTEST_ARGS)

golden: $(READY)  ## rewrite the golden files; read the diff before you commit it
	$(RUN) -m pytest -q --update-golden $(PYTEST_ARGS)

lint: $(READY)  ## ruff: rules and format, over every Python file
	$(RUN) .ci/check_lint.py

format: $(READY)  ## let ruff mend what it can
	$(RUN) -m ruff check --fix --quiet . || true
	$(RUN) -m ruff format .

types: $(READY)  ## mypy over every file of the package, the examples and the benchmarks
	$(RUN) .ci/check_types.py

wheel: $(READY)  ## build the wheel and test it in an environment of its own, from another folder
	$(RUN) .ci/check_wheel.py

docs: $(READY)  ## build the site of the documentation in out/site; a warning is an error
	rm -rf out/site
	$(RUN) -m sphinx --builder html --quiet --fail-on-warning --keep-going --doctree-dir out/site/.doctrees docs out/site
	@echo "docs: out/site/index.html"

changelog: $(READY)  ## move the lines of changelog.d/ into CHANGELOG.md, under the version of the package
	$(RUN) .ci/collect_changelog.py

sanitize: $(READY)  ## the small cases of generated C++ with AddressSanitizer and UndefinedBehaviorSanitizer
	$(RUN) .ci/check_sanitizers.py

demo: $(READY)  ## the main job: a hybrid pattern in a real language model (DEMO_ARGS=--help)
	$(RUN) examples/gemma_hybrid.py $(DEMO_ARGS)

bench: $(READY)  ## the benchmarks, one after the other
	$(RUN) benchmarks/block_lists.py $(BENCH_ARGS)
	$(RUN) benchmarks/cpu.py $(BENCH_ARGS)
	$(RUN) benchmarks/gemma_prefill.py $(BENCH_ARGS)

# A GPU machine has its own torch, Triton and driver, and may have no network: nothing is set up, PYTHON runs it all. Failed tests do not
# keep the benchmark from being run: the machine may be there for half an hour only.
gpu:  ## on a GPU machine: the GPU tests, then the benchmark, 12 minutes in all (PYTHON=python3; GPU_ARGS=--tune)
	failed=0; $(PYTHON) -m pytest -q -n 6 --dist worksteal -p no:cacheprovider -m gpu tests/gpu_device || failed=$$?; \
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU_ARGS); exit $$failed

clean:  ## remove what builds, tests and tools leave behind; keep .venv
	rm -rf build dist out .typing .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf $(VENV)
