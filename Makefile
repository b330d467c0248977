# Every target that needs the environment calls `setup` first; it costs milliseconds when nothing changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Images of containers set it. uv installs no bytecode, so with it every process compiles PyTorch and Megatron again:
# 11 s of CPU in place of 5.
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
# Passed through to pytest: make test PYTEST_ARGS="tests/ops -x --no-cov"
PYTEST_ARGS ?=

# pytest processes; tests/workers.py says how they share the tests.
WORKERS ?= 2

# Releases for test-versions; empty means all that are supported.
VERSIONS ?=

# A clone of Megatron-LM that has the release tags, for check-patches and test-megatron-lm.
MEGATRON_LM ?=

.PHONY: help setup quickstart beyond-llm test test-versions test-te test-newest compatibility test-megatron-lm test-slurm check-patches test-layouts lint format bench gpu-wheels gpu-rehearsal docs build clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with everything pinned (PYTHON=..., TORCH_INDEX_URL=... to choose)
	@bash scripts/setup.sh

quickstart: setup ## train, evaluate and compare a small RMSNorm and a small DyT LLaMA
	@bash examples/quickstart.sh

beyond-llm: setup ## train models of other domains with LayerNorm and DyT (build/beyond-llm)
	@OMP_NUM_THREADS=1 $(PY) examples/beyond_llm/run.py vit mae convnext resnet dit wav2vec2 hyena caduceus dino --skip-missing --seeds 3 --output build/beyond-llm

# sysmon is coverage's cheap measurement: no trace function is called for a line already seen.
test: setup ## run the tests with coverage (PYTEST_ARGS=... passes through)
	@COVERAGE_CORE=sysmon $(PY) -m pytest -n $(WORKERS) --cov=megatron_dyt \
		--cov-report=term-missing:skip-covered --cov-fail-under=90 --record-results=build/results $(PYTEST_ARGS)

test-versions: setup ## test other releases of megatron-core (VERSIONS="0.17.1 0.18.2"; default all)
	@WORKERS=$(WORKERS) bash scripts/test-versions.sh $(VERSIONS)

test-te: setup ## build Transformer Engine for a CPU, once, and test its models (VERSIONS=...)
	@te=$$(bash scripts/build-te.sh) && WITH_TE=$$te WORKERS=0 bash scripts/test-versions.sh $(VERSIONS)

test-newest: setup ## test the newest release of every dependency, in environments of its own
	@WORKERS=$(WORKERS) bash scripts/test-newest.sh

compatibility: setup ## make docs/compatibility.md of the results of the tests above and below
	@$(PY) scripts/compatibility.py collect build/results build/newest

check-patches: setup ## check patches/ (MEGATRON_LM=clone: against the releases too)
	@$(PY) scripts/fork_patches.py check "$(MEGATRON_LM)"

test-megatron-lm: setup ## run Megatron-LM's own scripts, unmodified and patched (MEGATRON_LM=clone)
	@MEGATRON_LM="$(MEGATRON_LM)" $(PY) -m pytest tests/megatron_lm --no-cov $(PYTEST_ARGS)

test-layouts: setup ## checkpoints of DP2, TP2, PP2 and EP2, each continued in every other (2 to 5 minutes)
	@MEGATRON_DYT_LAYOUTS=1 $(PY) -m pytest tests/distributed/test_checkpoints.py -k every_layout --no-cov \
		--record-results=build/results/layouts $(PYTEST_ARGS)

test-slurm: setup ## run the launch scripts on a Slurm cluster of two nodes, made on this machine (as root)
	@MEGATRON_DYT_SLURM=1 $(PY) -m pytest tests/slurm --no-cov \
		--record-results=build/results/slurm $(PYTEST_ARGS)

lint: setup ## ruff, mypy, shellcheck
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/shellcheck --external-sources .ci/run scripts/*.sh tests/slurm/*.sh $(wildcard examples/*.sh examples/*/*.sh)

format: setup ## sort imports and format the code
	@$(PY) -m ruff check --fix-only --select I .
	@$(PY) -m ruff format .

bench: setup ## run the benchmarks that this machine can; tables go to docs/benchmarks.md
	@$(PY) benchmarks/run.py

gpu-wheels: setup ## collect what benchmarks/gpu_hour.sh needs on a GPU machine without network (build/gpu-wheels)
	@$(PY) benchmarks/gpu_wheels.py

gpu-rehearsal: setup ## all of benchmarks/gpu_hour.sh with a CPU in the GPU's place and the network off (minutes)
	@MEGATRON_DYT_GPU_REHEARSAL=1 $(PY) -m pytest tests/benchmarks/test_gpu_hour.py -k everything --no-cov -s $(PYTEST_ARGS)

docs: setup ## the documentation as a site, in build/docs
	@$(PY) -m sphinx -W --keep-going -q -b html docs build/docs

build: setup ## wheel and sdist into dist/, tried in empty environments
	@rm -rf build/lib build/bdist.* dist
	@$(PY) -m build --no-isolation -o dist . >build.log 2>&1 || { cat build.log; exit 1; }; rm build.log
	@bash scripts/smoke.sh

clean: ## remove caches and build outputs; keeps .venv/ and quickstart/
	@rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
