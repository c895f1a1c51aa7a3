# Two commands do all the set-up, without root, GPU, display, Vulkan or OpenGL:
#   make train    creates the environment, then trains a robot arm from pixels
#   make test     creates the same environment if need be, then runs the tests
#
# make train ARGS="--seed 2 --track"      more arguments for the script (python algos/squint_sac.py --help)
# make test  ARGS="-k resume -x"          more arguments for pytest
# make train PYTHON=python3.12            another interpreter for the environment
# make setup EXTRAS=all                   every simulator; the extras are listed in pyproject.toml
# make test  VENV=/some/folder            another place for the environment
# make setup LOCK=                        the pins of pyproject.toml alone, without requirements/lock.txt

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= so101,dmc,go1,resfit,hardware,export,test
TASK   ?= SO101ReachCube-v1
ARGS   ?=
# What the pins bring along, to the version. torch's build, for a CPU or for CUDA, and what that build brings stay yours.
LOCK   ?= requirements/lock.txt

comma := ,
PY    := $(VENV)/bin/python
# One stamp per set of extras: a second call installs nothing, a changed pyproject.toml installs again.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup train test check lint reproduce figures docs gpu lock newest robosuite

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1:/p' Makefile | awk -F: '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## create the environment and nothing else

train: $(STAMP)  ## train a robot arm from pixels (TASK=SO101ReachCube-v1)
	$(PY) algos/squint_sac.py --env-id $(TASK) $(ARGS)

test: $(STAMP)  ## run the tests
	$(PY) -m pytest $(ARGS)

check: $(STAMP)  ## say which simulators and renderers work here
	$(PY) -m envs.check

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

reproduce: $(STAMP)  ## run what benchmarks/matrix.toml lists and docs/results lacks (ARGS=--list shows it)
	$(PY) benchmarks/reproduce.py $(ARGS)

figures: $(STAMP)  ## rebuild every figure and table of the docs from docs/results
	$(PY) scripts/plot_results.py

docs: .venv-docs/.installed  ## build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo "to look at it: $(PYTHON) -m http.server --directory site"

gpu: $(STAMP)  ## measure what only a GPU can tell, in ten minutes (ARGS="--minutes 30")
	$(PY) benchmarks/gpu.py $(ARGS)

lock:  ## renew requirements/lock.txt from the pins of pyproject.toml
	test -x .venv-lock/bin/pip || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	.venv-lock/bin/python scripts/lock.py

newest:  ## install the newest versions of everything and say what broke (ARGS=--help)
	$(PYTHON) scripts/newest.py $(ARGS)

robosuite: .venv-robosuite/.installed  ## create robosuite's environment, .venv-robosuite: it needs older packages

.venv-robosuite/.installed: requirements-robosuite.txt
	test -x .venv-robosuite/bin/pip || $(PYTHON) -m venv .venv-robosuite
	.venv-robosuite/bin/python -m pip install --requirement requirements-robosuite.txt
	.venv-robosuite/bin/python -m pip install --no-deps --editable .
	@touch $@

.venv-docs/.installed: pyproject.toml $(LOCK)
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python scripts/lock.py --extra docs | \
	    .venv-docs/bin/python -m pip install --requirement /dev/stdin $(addprefix --constraint ,$(LOCK))
	@touch $@

# pip is looked for, not python: a Debian without python3-venv leaves a python behind that has no pip.
$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "cleanrobot needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@case ",$(EXTRAS)," in *,dmc,*|*,all,*) $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
	    { echo "dm-control has no wheels for Python 3.13: name 3.12 or 3.11 with PYTHON=, or leave dmc out with EXTRAS=" >&2; exit 1; } ;; esac
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --editable ".[$(EXTRAS)]" $(addprefix --constraint ,$(LOCK))
	@touch $@
