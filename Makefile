# Run `make` or `make help` for what there is.

SHELL := /bin/bash
PY := .venv/bin/python

PORT ?= 8000
export PORT MODEL ARGS PREPARE_ARGS

# Each worker runs whole groups of tests (tests/support/grouping.py); `-n auto` is this machine's share of cores and
# memory. A worker that dies ends the run.
PYTEST = HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0 --durations 20

.PHONY: help setup serve test test-fast test-next test-install lint demo bench bench-turns clean

help:
	@echo "make setup   make .venv with everything installed (the others do it first)"
	@echo "make serve   serve the demo model llava-hybrid; PORT=8000, ARGS='flags of vllm serve'"
	@echo "             MODEL=/path/to/llava-1.5-7b-hf prepares that checkpoint and serves it;"
	@echo "             PREPARE_ARGS='flags of vllm-hybrid prepare'"
	@echo "make demo    ask the running server questions; PORT=8000, DEMO_ARGS='flags of examples/demo.py'"
	@echo "make bench   run the benchmark; BENCH_ARGS='flags of benchmarks/run.py'"
	@echo "make bench-turns  conversations with prefix caching; BENCH_ARGS='flags of benchmarks/turns.py'"
	@echo "make test    run the test suite; TEST_ARGS='flags of pytest'"
	@echo "make test-fast  the tests that start no engine and take no minute"
	@echo "make test-next  tests beside a newer vLLM without a build for CPUs: see scripts/test_next.sh"
	@echo "make test-install  a pip user's way, in an environment that is thrown away: see scripts/test_install.sh"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the environment and the checkpoints that were made"
	@echo "Set-up reads HYBRID_DEVICE=cpu|cuda, HYBRID_PYTHON and TORCH_INDEX_URL: see setup_hybrid.sh."

setup:
	@./setup_hybrid.sh

serve: setup
	@exec ./scripts/serve.sh

test: setup
	$(PYTEST) $(TEST_ARGS)

test-fast: setup
	$(PYTEST) -m "not engine and not slow" $(TEST_ARGS)

test-next: setup
	./scripts/test_next.sh $(TEST_ARGS)

test-install: setup
	./scripts/test_install.sh

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: setup
	BASE_URL=$${BASE_URL:-http://localhost:$(PORT)} $(PY) examples/demo.py $(DEMO_ARGS)

bench: setup
	HF_HUB_OFFLINE=1 $(PY) benchmarks/run.py $(BENCH_ARGS)

bench-turns: setup
	HF_HUB_OFFLINE=1 $(PY) benchmarks/turns.py $(BENCH_ARGS)

clean:
	rm -rf .venv .venv.new .venv-next .setup.lock llava-hybrid .llava-hybrid.partial prepared
