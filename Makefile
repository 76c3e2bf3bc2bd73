# Two commands do all the set-up: `make demo` and `make test`. Each builds .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-corpus coverage docs lint clean

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14" "triton>=3.6,<3.8"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv/.ready
	$(BIN)/python -m examples.demo

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two workers with one thread each: the tests are many and small, and CI has two cores.
test: lint
	OMP_NUM_THREADS=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 $(BIN)/python -m pytest -n 2 --dist loadscope tests

# Every model of tests/models/corpus with every implementation of its attention; `make test` runs the core, one implementation each.
# Takes hours on two cores. One worker takes all tests of a model, which share what was seen of it.
test-corpus: .venv/.ready
	REWRITE_CORPUS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/models/test_corpus.py

# docs/coverage.md. Goes on where an interrupted run stopped; FRESH=--fresh measures all again.
coverage: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage $(FRESH)

# docs/passes.md, from the registry of passes.
docs: .venv/.ready
	$(BIN)/python docs/write_passes.py

clean:
	rm -rf .venv demo
