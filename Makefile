# make demo: set up and train the demonstration.   make test: the test suite.   make test-all: the full matrices.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export HYDRA_FULL_ERROR ?= 0

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	echo "set-up took $$(( $$(date +%s) - start )) s" && touch $@

demo: setup
	$(RUN) train.py

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not full and not slow" -n 2 --dist loadfile

test-all: setup
	$(RUN) -m pytest

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
