# make demo | test | test-slow | test-s3 | bench | lint | setup. Each sets up .venv first, where that has not been done.
#   PYTHON=python3.12             another interpreter (3.10 to 3.13)
#   TORCH_INDEX=URL               a package index that holds another build of torch (see the README)
PYTHON ?= python3
BIN := .venv/bin
export DS_BUILD_OPS := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test test-slow test-s3 bench lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else "freeguide needs Python 3.10 to 3.13; name one with: make PYTHON=python3.12 ...")'
	@echo 'setting up .venv, once'
	@$(PYTHON) -m venv .venv || { echo 'No venv module: on Debian and Ubuntu, apt install python3-venv'; exit 1; }
	@$(BIN)/pip install --quiet --upgrade pip
	@$(if $(TORCH_INDEX),$(BIN)/pip install --quiet -c constraints.txt --index-url $(TORCH_INDEX) torch)
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch .venv/ready

demo: setup
	$(BIN)/freeguide demo

test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow --timeout 1800

# What of the data pipeline talks to a server, against a real one: Ceph's radosgw on loopback. Installs Debian's packages where it may.
test-s3: setup
	$(BIN)/python -m tests.faults.radosgw_s3 $(BIN)/python -m pytest tests/data_pipeline tests/faults/test_s3_faults.py

# Ours beside its peers, small: the peers stand in an environment of their own.
bench: .venv-bench/ready
	$(BIN)/python -m tests.faults.radosgw_s3 $(BIN)/python benchmarks/data.py --quick --peers .venv-bench/bin/python
	$(BIN)/python benchmarks/metrics.py --quick --peers .venv-bench/bin/python
	$(BIN)/python benchmarks/training.py --quick
	$(BIN)/python benchmarks/sampling.py --quick --peers .venv-bench/bin/python

.venv-bench/ready: benchmarks/requirements.txt setup
	$(PYTHON) -m venv .venv-bench
	$(if $(TORCH_INDEX),.venv-bench/bin/pip install --quiet -c constraints.txt --index-url $(TORCH_INDEX) torch)
	.venv-bench/bin/pip install --quiet -r benchmarks/requirements.txt
	touch .venv-bench/ready

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/freeguide && ln -s $(CURDIR)/freeguide/__init__.py build/types/freeguide/
	ln -s $(foreach room,configs data_pipeline trainer cluster,$(CURDIR)/$(room)) build/types/freeguide/
	MYPYPATH=build/types $(BIN)/mypy
	MYPYPATH=build/types:. $(BIN)/mypy benchmarks tests

clean:
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
