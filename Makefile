# From a fresh clone: Python >= 3.10, a C++20 compiler and make. Everything else is installed into
# .venv. Each target says what it does and does nothing twice: stamps compare the sources.
#
#   make demo    the demo model answers questions             make lint   formats and types
#   make test    C++ and Python tests                         make soak   long tests, sanitizers
#   make bench   benchmarks against torch                     make clean  removes what was built
#   make gpu     all that needs a GPU, with the torch installed there (tests/gpu/run.py)
#
# PYTHON=... picks the interpreter; TORCH=... the torch to install first, for example
# make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
# Processes of the test runners: each has two threads of torch, so that more of them only wait.
JOBS ?= 2
BUILD := build/release
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
SOURCES := $(shell find csrc include python -type f -not -name '*.so' -not -path '*/__pycache__/*')
SOURCES += CMakeLists.txt setup.py pyproject.toml $(wildcard README.md)
CXX_FILES := $(shell find csrc include tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

# One CMake tree serves the package and the C++ tests, so that the kernels are compiled once. The
# package is installed for real (not editable): the tests test what a user gets.
INSTALL := $(RUN) QWEN1M_BUILD_DIR=$(BUILD) python -m pip install --quiet --no-build-isolation

.PHONY: demo test soak bench gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) qwen1m demo

test: $(VENV)/.installed-test
	@echo "== C++ tests"
	$(RUN) cmake -S . -B $(BUILD) -DQWEN1M_TESTS=ON -DQWEN1M_CUDA=$${QWEN1M_CUDA:-auto} -DCMAKE_MESSAGE_LOG_LEVEL=NOTICE
	$(RUN) cmake --build $(BUILD)
	$(RUN) ctest --test-dir $(BUILD) --parallel $(JOBS) --output-on-failure --no-tests=error
	@echo "== Python tests"
	$(RUN) python -m pytest -n $(JOBS)

soak: $(VENV)/.installed-test
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	$(RUN) cmake --workflow --preset asan
	@echo "== Long Python tests"
	$(RUN) python -m pytest -n $(JOBS) -m soak

bench: $(VENV)/.installed-bench
	@for script in bench/*_cpu.py; do echo "== $$script"; $(RUN) python "$$script" || exit 1; done

# No venv, no pip: the machine's own python, torch, nvcc and pytest.
gpu:
	$(PYTHON) tests/gpu/run.py

lint: $(VENV)/.installed-lint
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	@$(RUN) clang-format --dry-run -Werror $(CXX_FILES) && echo "clang-format: no changes"

clean:
	rm -rf build dist $(VENV) python/*.egg-info python/qwen1m_ext/*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The build requirements stand in pyproject.toml too; torch comes first and by its own pin, because
# the package itself asks for a range only.
$(VENV)/.tools: pyproject.toml
	@echo "== Creating $(VENV) and installing $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) python -m pip install --quiet $(TORCH)
	$(RUN) python -m pip install --quiet "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "== Building and installing qwen1m_ext"
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.tools $(SOURCES)
	@echo "== Building and installing qwen1m_ext[$*]"
	$(INSTALL) ".[$*]"
	@touch $@ $(VENV)/.installed
