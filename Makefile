# make demo: train a network on real data. make test: the fast tests. make test-all:
# these and the slow ones. make check: what has to pass before a change lands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-all test-oldest test-newest lint types check bench bench-quality clean

demo: .venv/examples.stamp
	$(BIN)/python examples/01_super_convergence.py

test: .venv/dev.stamp
	$(BIN)/pytest

test-slow: .venv/dev.stamp
	$(BIN)/pytest -m 'slow and not timed'
	$(BIN)/pytest -m timed -n 0

test-all: test test-slow

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev.stamp
	$(BIN)/pyright

check: lint types test-all

# These measure what the documents quote, and write it into them; run them on an
# otherwise idle machine. On two cores `bench` takes about 35 minutes, most of them
# `overhead`; `bench-quality`, which needs CIFAR-10, two hours for all but
# `super_convergence`, and about five for that: make bench-quality DATA=path/to/cifar10
bench: .venv/dev.stamp
	for name in overhead late_decay_minimum_norm large_rate_regimes schedule_peaks; do \
	    $(BIN)/python benchmarks/$$name.py --out benchmarks/results || exit 1; \
	done
	$(BIN)/python benchmarks/documents.py

bench-quality: .venv/dev.stamp
	for name in peaks_and_probes transfer late_decay_training super_convergence; do \
	    $(BIN)/python benchmarks/$$name.py --data $(DATA) --out benchmarks/results \
	        || exit 1; \
	done
	for name in range_test_quality range_test_spread; do \
	    $(BIN)/python benchmarks/$$name.py --out benchmarks/results || exit 1; \
	done
	$(BIN)/python benchmarks/no_dials.py --data $(DATA) --out benchmarks/results
	$(BIN)/python benchmarks/documents.py

# The oldest JAX, Optax and Flax that pyproject.toml admits.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]' \
	    jax==0.8.0 jaxlib==0.8.0 optax==0.2.6 flax==0.12.0
	.venv-oldest/bin/pytest

# JAX's newest release needs a newer Python: make test-newest PYTHON=python3.13
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade \
	    --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/pytest

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/examples.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/examples.stamp

clean:
	rm -rf .venv .venv-oldest .venv-newest .jax_cache out build dist *.egg-info
