# Two commands matter: `make demo` and `make test`. Each works on a fresh machine: it makes .venv first.

# The first interpreter that runs and that we support (a pyenv shim may exist and still not run).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
# Two test processes for two cores; with one, torch may use both cores itself.
WORKERS ?= 2

# Without it the working folder leads sys.path, and the top-level `kernels` would shadow a third-party package of that name.
export PYTHONSAFEPATH = 1

.PHONY: help demo test lint types pytest format clean

help:
	@echo "make demo    quantize the default target, generate with and without drafters, print one table"
	@echo "make test    ruff, mypy and pytest"
	@echo "make format  rewrite the sources with ruff"
	@echo "make clean   remove .venv and caches"

demo: $(STAMP)
	$(VENV)/bin/quantspec demo

test: lint types pytest

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(STAMP)
	$(RUN) mypy

# One torch thread per test process: two processes with two threads each fight over two cores.
pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) pytest -q -n $(WORKERS)

format: $(STAMP)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(STAMP): pyproject.toml constraints.txt
	@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
		echo "quantspec needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing quantspec and its pinned dependencies into $(VENV) (quiet; two minutes or so) ..."
	@"$(PYTHON)" -m venv $(VENV)
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
