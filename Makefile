PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
JOBS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: setup demo test test-fast test-slow lint docs lock clean

setup: $(READY)

# uv where it is installed, else venv and pip; the same pinned versions either way.
$(READY): requirements.txt pyproject.toml
	if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install -q --python $(BIN)/python -r requirements.txt && \
	  uv pip install -q --python $(BIN)/python --no-deps -e . ; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q -r requirements.txt && \
	  $(BIN)/python -m pip install -q --no-deps -e . ; \
	fi
	touch $@

# The built-in scene through views, shards, training, evaluation and report, from the beginning.
demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/sitdist shards build shards/demo.yaml --out $(DEMO)/data
	$(BIN)/sitdist train configs/demo.yaml --set data=$(DEMO)/data --out $(DEMO)/run
	$(BIN)/sitdist eval $(DEMO)/run --radii 1:7 --views-per-radius 32 --out $(DEMO)/eval

test: test-fast
	$(BIN)/python -m pytest -m "distributed and not slow" -n $(JOBS) --dist worksteal

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not distributed" -n $(JOBS) --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

# Pin the newest versions that pyproject.toml admits, for every platform, without naming an index.
lock:
	uv pip compile -q --universal --no-header --python-version 3.11 --all-extras --upgrade pyproject.toml -o requirements.txt

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .ruff_cache .mypy_cache
