# make serve                    serve the demo model on port 8000 (PORT=, ARGS= for flags of `vllm serve`)
# make serve MODEL=/path/to/llava-1.5-7b-hf    prepare that checkpoint and serve it
# make test | lint              the test suite | ruff and mypy
# make demo                     questions to a running server
# make bench                    the benchmark (BENCH_ARGS= for its flags)
# make clean                    remove the environment and the checkpoints that were made

SHELL := /bin/bash
PY := .venv/bin/python

PORT ?= 8000
export PORT MODEL ARGS PREPARE_ARGS

.PHONY: setup serve test lint demo bench clean

setup:
	@./setup_hybrid.sh

serve: setup
	@exec ./scripts/serve.sh

test: setup
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q tests $(TEST_ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: setup
	$(PY) examples/demo.py $(DEMO_ARGS)

bench: setup
	HF_HUB_OFFLINE=1 $(PY) benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf .venv .venv.new .setup.lock llava-hybrid .llava-hybrid.partial prepared
