# One virtual environment, made once. torch goes in first and pinned, so that no other requirement can pull another
# build of it; to choose a build or an index, say for example  make test TORCH="torch==2.13.0 --index-url URL".
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
RIVALS := betty boat higher moskomule torchopt
DEMO ?= --preset small --seeds 2 --method cg one-step no-implicit

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo behaviour speed test check docs slow lint format types clean rivals $(RIVALS:%=rival-%)
.DELETE_ON_ERROR:

help:
	@echo "make demo    BiSSL on the images of the repository: a table and a figure"
	@echo "make behaviour   the SSL methods over ten seeds each: tables with paired gains and their bounds; behaviour-gessl for one"
	@echo "make speed   vmapped tasks against a loop over them, BMSSL and GeSSL"
	@echo "make test    the tests, on $(WORKERS) workers"
	@echo "make check   what continuous integration runs: lint, types, tests, docs"
	@echo "make docs    the documentation, built strictly into site/"
	@echo "make slow    the tests that take minutes"
	@echo "make rivals  an environment in .rivals/ for each library that the benchmark compares; rival-higher makes one"
	@echo "make lint | format | types | clean"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off $(TORCH)
	@touch $@

# one stamp for each extra of pyproject.toml
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --progress-bar off -e '.[$*]'
	@touch $@

demo: $(VENV)/.extra-ssl
	$(BIN)/python -m ssl_tasks bissl $(DEMO) --out $(RUNS)/bissl
	@echo "table and options: $(RUNS)/bissl/results.json    figure: $(RUNS)/bissl/figure.png"

# ten paired seeds that chose nothing, sizes of minutes; an interrupted run is gone on with
TEN := --seeds 10 --first-seed 100 --keep none --resume
SHORT := --evaluation.penalties 0.01 --evaluation.rates 0.03 --evaluation.steps 50 --evaluation.episodes 20
BEHAVIOUR := bissl bmssl gessl gessl-threshold maxl umtra cactus learned-pretext sources masked
bissl_OPTIONS := bissl --method cg layerwise-cg damped neumann one-step no-implicit
bmssl_OPTIONS := bmssl --method unrolled --evaluation.steps 100
gessl_OPTIONS := gessl --method unrolled --evaluation.steps 100
gessl-threshold_OPTIONS := gessl --variant threshold --method unrolled --rate 5e-4 --evaluation.steps 100
maxl_OPTIONS := maxl --steps 100 $(SHORT)
umtra_OPTIONS := umtra --method unrolled --steps 60 --rate 3e-3 $(SHORT)
cactus_OPTIONS := cactus --method unrolled --steps 60 --rate 3e-3 $(SHORT)
learned-pretext_OPTIONS := learned-pretext
sources_OPTIONS := sources
masked_OPTIONS := masked

behaviour: $(BEHAVIOUR:%=behaviour-%)

.PHONY: $(BEHAVIOUR:%=behaviour-%)

$(BEHAVIOUR:%=behaviour-%): behaviour-%: $(VENV)/.extra-ssl
	$(BIN)/python -m ssl_tasks $($*_OPTIONS) $(TEN) --out $(RUNS)/behaviour/$*

speed: export OMP_NUM_THREADS := $(shell nproc)
speed: $(VENV)/.extra-ssl
	$(BIN)/python -m ssl_tasks.speed

test: $(VENV)/.extra-test
	$(BIN)/python -m pytest -n $(WORKERS)

slow: $(VENV)/.extra-test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(VENV)/.extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.extra-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.extra-dev
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.extra-docs
	$(BIN)/mkdocs build --strict --quiet --site-dir site

rivals: $(RIVALS:%=rival-%)

$(RIVALS:%=rival-%): rival-%: .rivals/%/.made

# requirements.txt pins everything beside torch, hence --no-deps
.rivals/%/.made: hypergrad/bench/rivals/%/requirements.txt
	$(PYTHON) -m venv .rivals/$*
	.rivals/$*/bin/pip install --quiet --progress-bar off $(TORCH)
	.rivals/$*/bin/pip install --quiet --progress-bar off --no-deps --ignore-requires-python -r $<
	@touch $@

check: lint types test docs

clean:
	rm -rf $(VENV) .rivals site build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
