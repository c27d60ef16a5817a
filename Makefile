# A fresh machine needs only Python 3.10 or newer with its venv module. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests: one a CPU, or as many as memory is for. 0: none but pytest's own, for a debugger.
# What slow tests of a module share takes minutes to train, so one process takes a whole module of them.
WORKERS ?= auto
BIN := $(VENV)/bin
# The environment is made once, and again when the dependencies change.
INSTALLED := $(VENV)/.installed
DOCUMENTED := $(VENV)/.documented
# What mlflow asks for differs from what is locked, so it lies over the environment instead of in it, and no other test sees it.
EXTRAS := $(VENV)-extras

.DEFAULT_GOAL := help
.PHONY: help demo compare mechanisms test slow extras stress check docs newest lowest lock gpu gpu-dry fmt clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; try: make PYTHON=python3.12"; exit 1; }; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	@touch $@

$(DOCUMENTED): $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,docs]'
	@touch $@

$(EXTRAS)/.installed: $(INSTALLED)
	$(BIN)/python -m venv --clear $(EXTRAS)
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  > "$$($(EXTRAS)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/under.pth"
	$(EXTRAS)/bin/python -m pip install --editable '.[fp8,mlflow,trl,wandb]'
	@touch $@

demo: $(INSTALLED) ## train and ask a tiny model, from nothing, on a CPU
	$(BIN)/lit-eemllm demo

compare: $(INSTALLED) ## the longer demo: EE-MLLM and self-attention, three seeds each
	$(BIN)/lit-eemllm demo compare

mechanisms: $(INSTALLED) ## every mechanism on the demo's data: accuracy and costs side by side
	$(BIN)/lit-eemllm demo mechanisms

test: $(INSTALLED) ## the tests, in minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

slow: $(INSTALLED) ## the tests that take longer: several processes, kills, measured peaks of memory
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m slow

extras: $(EXTRAS)/.installed ## the tests with W&B, MLflow, TRL and torchao, 750 MB beside the environment
	$(EXTRAS)/bin/python -m pytest -m extras tests/model tests/training

stress: $(INSTALLED) ## kill a tiny run 30 times at random moments; it must end as an unbroken one
	$(BIN)/python tools/stress.py

check: $(INSTALLED) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DOCUMENTED) ## the documentation as a site, build/site/docs/index.html; Python 3.11 or newer
	$(BIN)/python -m sphinx -W --keep-going --quiet -c docs . build/site

newest: $(INSTALLED) ## a short job with the newest version of every dependency; names the one that breaks it
	$(BIN)/python tools/versions.py newest

lowest: $(INSTALLED) ## the same with the lowest versions that pyproject.toml allows
	$(BIN)/python tools/versions.py lowest

lock: $(INSTALLED) ## look up the newest versions that pyproject.toml allows, and lock them in constraints.txt
	$(BIN)/python -m pip install 'uv>=0.13,<0.14'
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra test --extra docs --no-annotate --no-header pyproject.toml -o .lock.unfinished
	{ grep '^#' constraints.txt; grep -vE '^(nvidia-|cuda-|triton)' .lock.unfinished; } > .constraints.unfinished
	mv .constraints.unfinished constraints.txt && rm .lock.unfinished

gpu: ## everything that needs a GPU, in 12 minutes, into benchmarks/; without .venv in the environment that there is
	@$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) tools/gpu.py

gpu-dry: $(INSTALLED) ## the same code at small sizes, on a CPU, on the tests' fake device
	$(BIN)/python tools/gpu.py --dry

fmt: $(INSTALLED) ## format, and mend what lint can mend
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

clean: ## remove build products and caches; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
