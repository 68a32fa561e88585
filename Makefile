# Each target does its own set-up: the first one run makes .venv from PYTHON.
PYTHON ?= python3
VENV ?= .venv
PINS ?= -c constraints.txt
NEWEST_PYTHON ?= python3.12
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
TARGETS := $(VENV)/.targets
PARITY := $(VENV)/.parity
MAXTEXT := .venv-maxtext

.PHONY: demo test test-newest test-parity test-parity-all record-parity test-recorded test-maxtext test-wheel targets test-targets test-targets-slow test-survival goldens test-goldens browser test-browser lint format soak gradients bench fuzz clean help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about a minute)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) -e ".[dev]"
	@touch $@

demo: $(READY)  ## train mixtral-tiny for 60 steps, its expert parallelism shown before step 0
	@rm -rf outputs/demo
	@$(RUN) -m moe_shard.train mixtral-tiny run_name=demo dump_hlo=true

test: $(READY)  ## the suite; kills, compilers and other programs have targets of their own
	$(RUN) -m pytest -n 2 --dist worksteal $(TESTS)

test-newest:  ## the suite on the newest jax, which needs NEWEST_PYTHON (TESTS="..." for some)
	@$(MAKE) test PYTHON=$(NEWEST_PYTHON) VENV=.venv-newest PINS=

fuzz: $(READY)  ## 20,000 generated hostile inputs of every command (COUNT=... FIRST=...; minutes)
	$(RUN) -m tests.hostile $(or $(COUNT),20000) $(or $(FIRST),0)

$(PARITY): $(READY)
	@echo "installing torch and transformers into $(VENV) (about 1 GB)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) -e ".[parity]"
	@touch $@

test-parity: $(PARITY)  ## small models of every family against transformers (minutes; ATTENTION=blockwise)
	$(RUN) -m pytest -n 2 -m "parity and not parity_all" tests/parity $(if $(ATTENTION),--attention $(ATTENTION))

test-parity-all: $(PARITY)  ## the same, with every shape of every family on every mesh (an hour)
	$(RUN) -m pytest -n 2 -m parity tests/parity $(if $(ATTENTION),--attention $(ATTENTION))

record-parity: $(PARITY)  ## keep transformers' numbers for the tests that run without it
	$(RUN) -m tests.parity.record

$(MAXTEXT)/.installed: pyproject.toml constraints-maxtext.txt
	@echo "installing MaxText into $(MAXTEXT) (about 2 GB)"
	@test -x $(MAXTEXT)/bin/python || $(NEWEST_PYTHON) -m venv $(MAXTEXT)
	@$(MAXTEXT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-maxtext.txt
	@$(MAXTEXT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-maxtext: $(MAXTEXT)/.installed  ## MaxText itself, watched and compared with; needs NEWEST_PYTHON (minutes)
	$(MAXTEXT)/bin/python -m pytest -m maxtext $(or $(TESTS),tests/maxtext)

test-recorded: $(READY)  ## all families against recorded numbers of transformers, without torch, and what else is long
	$(RUN) -m pytest -n 2 -m recorded

test-survival: $(READY)  ## kills, several processes and full disks (minutes)
	$(RUN) -m pytest -n 2 -m survival

test-wheel: $(READY)  ## the commands of a wheel, in an environment without a checkout
	$(RUN) -m pytest -m wheel tests/test_wheel.py

$(TARGETS): $(READY)
	@echo "installing the compilers of TPUs, NVIDIA and AMD GPUs into $(VENV) (about 2 GB)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) -e ".[targets]"
	@touch $@

targets: $(TARGETS)  ## compilers for hardware that is not there

test-targets: $(TARGETS)  ## compile for TPUs and GPUs that are not there (minutes)
	$(RUN) -m pytest -m "targets and not slow"

test-targets-slow: $(TARGETS)  ## the rest of them: minutes a program, the more so for TPUs
	$(RUN) -m pytest -m "targets and slow"

goldens: $(TARGETS)  ## compile every model for every kind of hardware and keep what it lowers to
	@$(RUN) tools/lowering_matrix.py --refresh

test-goldens: $(TARGETS)  ## compile them again and compare (up to an hour; CELLS="--model ... --target ..." for some)
	@$(RUN) tools/lowering_matrix.py $(CELLS)

browser:  ## a browser, from the distribution
	@command -v chromium chromium-browser google-chrome chrome-headless-shell >/dev/null || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; }

test-browser: $(READY) browser  ## the pages of reports and of runs in a real browser
	$(RUN) -m pytest -m browser

lint: $(READY)  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)  ## rewrite to the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

soak: $(READY)  ## kill a training 100 times, signal two processes at every moment, fill its disk (an hour; SOAK="--kills 20" for less)
	$(RUN) -m tests.soak.matrix
	$(RUN) -m tests.soak.full_disk
	$(RUN) -m tests.soak.kills $(SOAK)

gradients: $(READY)  ## a step's gradient against NumPy's, over expert axes, processes and microbatches (minutes)
	$(RUN) -m tests.program.grid

bench: $(READY)  ## one MoE layer, every strategy, flag on and off
	$(RUN) -m moe_shard bench

clean:  ## remove what the targets made, runs excepted
	rm -rf $(VENV) .venv-newest $(MAXTEXT) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
