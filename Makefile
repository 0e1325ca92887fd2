PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
DEMO := runs/demo
JOBS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: setup setup-dev demo test test-fast test-slow lint docs lock clean

setup: $(READY)

setup-dev: $(READY_DEV)

# Install a file of pinned versions: with uv where it is installed, else with pip.
install = if command -v uv >/dev/null; then uv pip install -q --python $(BIN)/python $(1); \
  else $(BIN)/python -m pip install -q $(1); fi

# What the demo, training and evaluation need.
$(READY): requirements.txt pyproject.toml
	@echo "Installing sitdist and the packages of requirements.txt into $(VENV), at the versions pinned there."
	@echo "On Linux this downloads roughly 3 GB and takes 6 GB of disk: PyTorch and its CUDA libraries are most of it."
	if command -v uv >/dev/null; then uv venv -q --allow-existing --python $(PYTHON) $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi
	@$(call install,-r requirements.txt)
	@$(call install,--no-deps -e .)
	touch $@

# What tests, linters and the documentation need besides.
$(READY_DEV): requirements-dev.txt $(READY)
	@echo "Adding the packages of requirements-dev.txt: roughly 100 MB more to download, 0.4 GB of disk."
	@$(call install,-r requirements-dev.txt)
	touch $@

# The built-in scene through views, shards, training, evaluation and report, from the beginning.
demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/sitdist shards build shards/demo.yaml --out $(DEMO)/data
	$(BIN)/sitdist train configs/demo.yaml --set data=$(DEMO)/data --out $(DEMO)/run
	$(BIN)/sitdist eval $(DEMO)/run --radii 1:7 --views-per-radius 32 --out $(DEMO)/eval

test: test-fast
	$(BIN)/python -m pytest -m "distributed and not slow" -n $(JOBS) --dist worksteal

test-fast: $(READY_DEV)
	$(BIN)/python -m pytest -m "not slow and not distributed" -n $(JOBS) --dist worksteal

test-slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY_DEV)
	$(BIN)/mkdocs build --strict

# Pin the newest versions that pyproject.toml admits, for every platform, without naming an index.
lock:
	uv pip compile -q --universal --no-header --python-version 3.11 --upgrade pyproject.toml -o requirements.txt
	uv pip compile -q --universal --no-header --python-version 3.11 --upgrade --all-extras -c requirements.txt \
	  pyproject.toml -o requirements-dev.txt

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .ruff_cache .mypy_cache
