# make run    sets up and runs the main study on real data to a finished report
# make test   sets up and runs the default tests
SHELL := /bin/bash
PY ?= python3
RUNS ?= runs
# Compilation takes most of the time of the tests, and it uses one core.
WORKERS ?= -n 2 --dist worksteal

# Python 3.12 or newer for test-newest: the first that really starts, also among pyenv's.
NEWEST ?= $(shell for v in 3.14 3.13 3.12; do for p in python$$v "$$HOME"/.pyenv/versions/$$v*/bin/python; do \
	"$$p" -c '' 2>/dev/null && { echo "$$p"; exit; }; done; done)

# uv where there is one, pip otherwise: $(call install,python,folder,extras)
define install
	@$(1) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is due, this is {sys.version}; try make PY=python3.12"'
	@if command -v uv >/dev/null; then uv venv -q --allow-existing -p $(1) $(2) && uv pip install -q -p $(2) -e '.[$(3)]'; \
	else $(1) -m venv $(2) && $(2)/bin/python -m pip install -q -e '.[$(3)]'; fi
	@touch $@
endef

.venv/run.ok: pyproject.toml
	$(call install,$(PY),.venv,plot$(,)data)

.venv/test.ok: pyproject.toml
	$(call install,$(PY),.venv,dev)
	@touch .venv/run.ok

.venv-newest/test.ok: pyproject.toml
	$(call install,$(NEWEST),.venv-newest,dev)

, := ,

.PHONY: run test test-slow test-newest check bench peers clean

run: .venv/run.ok
	.venv/bin/jaxhpo run configs/digits_pso.toml --out $(RUNS)/digits_pso-$$(date +%Y%m%d-%H%M%S)

test: .venv/test.ok
	.venv/bin/python -m pytest $(WORKERS)

test-slow: .venv/test.ok
	XLA_FLAGS= .venv/bin/python -m pytest $(WORKERS) -m 'slow or not slow'

test-newest: .venv-newest/test.ok
	XLA_FLAGS= .venv-newest/bin/python -m pytest $(WORKERS)

check: .venv/test.ok
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check --python .venv jaxhpo experiments

# The figures of experiments/README.md. Nothing else should run meanwhile.
bench: .venv/test.ok
	for name in mnist5k letter r8 grimm; do .venv/bin/jaxhpo data fetch $$name; done
	.venv/bin/python -m experiments.lanes
	.venv/bin/python -m experiments.quickstart
	.venv/bin/python -m experiments.nan_cliff
	for kind in pso asha hyperband pbt static race; do .venv/bin/python -m experiments.crash --kind $$kind; done
	.venv/bin/python -m experiments.bayes
	.venv/bin/python -m experiments.hypergradients
	.venv/bin/python -m experiments.chaos
	.venv/bin/python -m experiments.optax_hypergradients
	.venv/bin/python -m experiments.cleaning
	.venv/bin/python -m experiments.learned_schedule
	.venv/bin/python -m experiments.global_hyperparameters
	.venv/bin/python -m experiments.early_stopping
	.venv/bin/python -m experiments.static_choices
	.venv/bin/python -m experiments.populations
	.venv/bin/python -m experiments.ranks --cells $(RUNS)/ranks

.venv/peers.ok: .venv/test.ok
	$(call install,$(PY),.venv,dev$(,)peers)

peers: .venv/peers.ok
	.venv/bin/jaxhpo data fetch letter
	.venv/bin/python -m experiments.peers_pso --speed
	.venv/bin/python -m experiments.peers_bayes --cells runs/peers_bayes
	.venv/bin/python -m experiments.peers_bayes --speed
	.venv/bin/python -m experiments.peers_evolution
	.venv/bin/python -m experiments.peers_studies

clean:
	rm -rf .venv .venv-newest .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
