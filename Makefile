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
	@echo "make behaviour   the SSL methods over ten seeds each (hours): tables with paired gains and their bounds"
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

# ten paired seeds that chose nothing; an interrupted run is gone on with
behaviour: $(VENV)/.extra-ssl
	$(BIN)/python -m ssl_tasks bissl --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/bissl
	$(BIN)/python -m ssl_tasks bmssl --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/bmssl
	$(BIN)/python -m ssl_tasks gessl --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/gessl
	$(BIN)/python -m ssl_tasks gessl --variant threshold --seeds 10 --first-seed 100 --resume \
		--out $(RUNS)/behaviour/gessl-threshold
	$(BIN)/python -m ssl_tasks learned-pretext --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/learned-pretext
	$(BIN)/python -m ssl_tasks sources --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/sources
	$(BIN)/python -m ssl_tasks masked --seeds 10 --first-seed 100 --resume --out $(RUNS)/behaviour/masked

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
