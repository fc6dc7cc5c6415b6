# Commands for people and CI; each sets up the environment first if it has to.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.flashnorm-stamp

# Parallel test processes, and what is handed to the command: make train ARGS="--epsilon 1"
JOBS ?= 2
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup train test lint format typecheck bench clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | \
		awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Create the environment in .venv (CPU; ./setup_env.sh --gpu for CUDA)

$(STAMP): pyproject.toml setup.py constraints.txt setup_env.sh
	./setup_env.sh
	@touch $@

train: $(STAMP) ## Train a private digits classifier; curve and metrics go to runs/digits
	$(BIN)/flashnorm train $(ARGS)

test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .

format: $(STAMP) ## Sort imports and mend what can be mended
	$(BIN)/ruff check --fix .

# mypy sees the package as it is installed: passes/ and kernels/ inside flashnorm_compile/.
typecheck: $(STAMP) ## Check types
	@rm -rf build/typecheck && mkdir -p build/typecheck/flashnorm_compile
	@ln -s $(addprefix $(CURDIR)/,$(wildcard flashnorm_compile/*.py flashnorm_compile/*/) passes kernels) \
		$(CURDIR)/flashnorm_compile/py.typed build/typecheck/flashnorm_compile/
	@MYPYPATH=build/typecheck $(BIN)/mypy -p flashnorm_compile | \
		sed -E 's,^build/typecheck/(flashnorm_compile/(passes|kernels)/)?,\2/,; s,^/,,'

bench: $(STAMP) ## Time a private step; a quick CPU run unless ARGS says otherwise
	$(BIN)/python benchmarks/step.py $(if $(ARGS),$(ARGS),--smoke --device cpu)

clean: ## Remove the environment, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
