# Everything that a fresh Linux machine needs: `make demo` and `make test`.
# Each target makes its virtual environment first, with the exact versions in
# requirements/. To choose the Python: make test PYTHON=python3.12

# The first Python that runs and is in range; a name on the path may be a shim
# that only prints an error.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    2>/dev/null && echo "$$p" && break; done)
endif
VERSION := $(if $(PYTHON),$(shell "$(PYTHON)" -c \
  'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
NO_PYTHON := $(if $(PYTHON),$(PYTHON) does not run,none was found)
LOCK := requirements/py$(subst .,,$(VERSION)).txt
VENV := .venv-$(VERSION)
STAMP := $(VENV)/.complete
PY := $(VENV)/bin/python

# Tests run in this many processes; options for pytest: make unit ARGS="-k kl"
WORKERS := 2
ARGS :=
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=15 -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help check-python venv demo test lint format types unit doctest \
  results catalogue clean

help: ## list the targets
	@echo "kd_jax: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' Makefile | expand -t 14

demo: $(STAMP) ## train a teacher, distil students on real digits, report
	@$(PY) -m experiments.hinton --config=configs/hinton/mnist5k.py:demo \
	  --workdir=runs/demo

test: lint types ## everything that CI runs
	@$(PYTEST) $(ARGS)

lint: $(STAMP) ## check the format and the code with ruff
	@$(PY) -m ruff format --check --quiet . || { echo \
	  "Not formatted: see 'make format'." >&2; exit 1; }
	@$(PY) -m ruff check --quiet .

format: $(STAMP) ## format the code and mend what ruff can mend
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

types: $(STAMP) ## check the types of kd_jax with mypy
	@$(PY) -m mypy

unit: $(STAMP) ## run the tests alone
	@$(PYTEST) tests $(ARGS)

doctest: $(STAMP) ## run the examples in kd_jax's docstrings alone
	@$(PYTEST) kd_jax $(ARGS)

results: $(STAMP) ## write RESULTS.md anew from results/
	@$(PY) -m kd_jax.results 'results/*/*.json' --write RESULTS.md

catalogue: $(STAMP) ## write the README's catalogue anew from docstrings
	@$(PY) -m kd_jax.catalogue --write README.md

venv: $(STAMP) ## make the virtual environment

clean: ## remove the virtual environments and the caches; runs/ stays
	@rm -rf .venv-* .cache .hypothesis .pytest_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@case "$(VERSION)" in \
	3.11|3.12|3.13) ;; \
	*) echo "kd_jax needs Python 3.11, 3.12 or 3.13, but" \
	  "$(if $(VERSION),$(PYTHON) is Python $(VERSION),$(NO_PYTHON)):" \
	  "name one with PYTHON=/path/to/python3.11" >&2; exit 1;; \
	esac
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "$(PYTHON) has no venv module: install it" \
	  "(Debian, Ubuntu: apt install python$(VERSION)-venv)" >&2; exit 1; }

# The stamp comes last, so a venv that was left half-made is made anew.
$(STAMP): $(LOCK) setup.py | check-python
	@echo "Making $(VENV) with the versions in $(LOCK); a few minutes ..."
	@rm -rf "$(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(PY) -m pip install -qq --disable-pip-version-check -r $(LOCK)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	@touch "$(STAMP)"

# Without a usable Python there is no lock file: check-python says it better.
requirements/%.txt: | check-python ;
