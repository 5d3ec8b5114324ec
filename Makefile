# Each target makes `.venv` if need be and installs what it needs, once: again only when pyproject.toml or constraints.txt
# change (stamp files in .venv). Another interpreter: `make test PYTHON=python3.12`, after `make clean`.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
# Tools that we start find theirs (ninja, node) in the environment, activated or not.
# Bytecode is kept, whatever the environment says: else each process that tests start compiles all of loopwright again.
RUN := PYTHONDONTWRITEBYTECODE= PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

# What is installed besides loopwright itself, for each target.
EXTRAS_demo := examples
EXTRAS_docs := docs,cli
EXTRAS_test := test,cli,comet,deepspeed,mlflow,monitors,parquet,s3,tqdm,trackio,tune,wandb
EXTRAS_check := $(EXTRAS_test),docs,dev
EXTRAS_bench := bench
EXTRAS_bench-gpu := bench,$(EXTRAS_test)
EXTRAS_clusters :=
# Those targets whose extras another one installs, too.
INCLUDED_check := docs test
# Without what they depend on: litdata wants torchvision, whose build on PyPI is for CUDA alone and cannot be imported
# beside a CPU build of torch. The other things that litdata needs stand in the extra `test`.
ALONE_test := litdata
ALONE_check := $(ALONE_test)
ALONE_bench-gpu := $(ALONE_test)

.PHONY: help demo test test-all clusters check format hooks bench bench-gpu docs clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo    train on scikit-learn's digits (examples/digits.py)"
	@echo "make test    run the tests but the slow ones; PYTEST_ARGS='tests/loggers' and the like are passed on"
	@echo "make test-all  all of them"
	@echo "make clusters  train on a SLURM, an MPI, a Ray and two machines of torchrun's, all on this machine; as root"
	@echo "make check   lint, format, types, docs with warnings as errors"
	@echo "make format  let ruff mend and format the code"
	@echo "make hooks   have git check each commit (.pre-commit-config.yaml)"
	@echo "make bench   compare with a raw loop and with other trainers; BENCH_ARGS are passed on"
	@echo "make bench-gpu  the same on one CUDA device, with the tests that need one, in at most ten minutes; BENCH_ARGS are passed on"
	@echo "make docs    build the documentation into docs/_build"
	@echo "make clean   remove whatever make has made, .venv too"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "loopwright needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$(if $(EXTRAS_$*),[$(EXTRAS_$*)])"
	$(if $(ALONE_$*),$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(ALONE_$*))
	@touch $@ $(INCLUDED_$*:%=$(VENV)/installed-%)

demo: $(VENV)/installed-demo
	$(RUN) python examples/digits.py

PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-test
	$(RUN) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: test
	$(RUN) $(PYTEST) -m slow $(PYTEST_ARGS)

# They install what they need, Debian's packages too, and skip what cannot run here.
clusters: $(VENV)/installed-clusters
	$(RUN) python -m tests.clusters $(CLUSTERS)

# The last two run at once, as each keeps one CPU busy.
check: $(VENV)/installed-check
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) sh -c 'pyright --pythonpath $(VENV)/bin/python & types=$$!; \
	  sphinx-build -W --keep-going -q -E -b html docs docs/_build; docs=$$?; \
	  wait $$types && exit $$docs'

format: $(VENV)/installed-check
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

hooks: $(VENV)/installed-check
	$(RUN) pre-commit install

bench: $(VENV)/installed-bench
	$(RUN) python -m benchmarks $(BENCH_ARGS)

# Without a CUDA device, `BENCH_ARGS=--quick` rehearses the code.
bench-gpu: $(VENV)/installed-bench-gpu
	$(RUN) python -m benchmarks gpu $(BENCH_ARGS)

docs: $(VENV)/installed-docs
	$(RUN) sphinx-build -W --keep-going -b html docs docs/_build

clean:
	rm -rf $(VENV) build dist src/loopwright.egg-info docs/_build .pytest_cache .ruff_cache
	find framework callbacks loggers strategies src tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
