# Every target works from a clean clone: it makes .venv, installs the pinned packages, builds, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/native
CXX_FILES = $(shell git ls-files -- 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 2>/dev/null)

.PHONY: build demo rl-demo diffusion-demo test gpu-test sanitize bench table wheel format lint clean

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(BUILD)/build.ninja: $(VENV)/.installed CMakeLists.txt
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python)

build: $(BUILD)/build.ninja
	$(BIN)/ninja -C $(BUILD) -j $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

demo: build
	$(BIN)/eightfold demo

rl-demo: build
	$(BIN)/eightfold rl --demo

diffusion-demo: build
	$(BIN)/eightfold generate --diffusion --demo

test: build
	$(BIN)/python -m pytest

gpu-test: build
	$(BIN)/python -m pytest -m gpu

sanitize: build
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python tests/sanitize.py

bench: build
	$(BIN)/eightfold bench

table: $(VENV)/.installed
	$(BIN)/python -m bench.table

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

format: $(VENV)/.installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix --quiet .
	$(BIN)/clang-format -i $(CXX_FILES)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist python/eightfold/*.so
