# make demo, make test: each sets up what it needs first. Needs Python 3.11 or newer, g++ and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUNS ?= runs
# Test processes at a time, one thread each.
JOBS ?= 2

BIN := $(VENV)/bin
# The package alone, and with all that the tests need.
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-tests
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.inl csrc/cpu/*.cpp \
    csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
CPP_OF_TESTS := tests/arm/driver.cpp $(wildcard $(addprefix tests/helpers/,*.cu cuda_emulator/*.h cuda_emulator/*.cpp cuda_emulator/cuda/*))

.PHONY: install demo check test fuzz soak docs docs-serve test-gpu lint format bench bench-gpu bench-compare sanitize sanitize-gpu \
    sanitize-threads clean
install: compiler $(TESTED)

# Without a compiler the package would be installed without kernels, and training would take hours.
COMPILERS = $(if $(filter default,$(origin CXX)),c++ g++ clang++,$(firstword $(CXX)))
.PHONY: compiler
compiler:
	@for name in $(COMPILERS); do command -v $$name && break; done >/dev/null || \
	    { echo "There is no C++ compiler: install g++ 11 or newer. docs/install.md says how to go on without one."; exit 1; }
	@ls mopo_fast/_cpu*.so >/dev/null 2>&1 || rm -f $(INSTALLED)

OLDEST := import sys; sys.exit(sys.version_info < (3, 11))
# What the package needs is installed while the kernels are compiled.
DEPENDENCIES := import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'])
# Done again only when what is built or installed has changed. --no-compile: bytecode is made by the first
# import of a module, not at once for all of torch.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CPP)
	@$(PYTHON) -c "$(OLDEST)" || { echo "Name Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): PyTorch, MuJoCo and what else the package needs, and the compiled kernels."
	@echo "This takes one to three minutes and prints errors alone."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile $$($(BIN)/python -c "$(DEPENDENCIES)") & \
	    trap "kill $$! 2>/dev/null" EXIT; trap "exit 130" INT TERM; \
	    $(BIN)/python -m pip install --quiet --no-compile --no-deps --editable . && wait $$!
	@touch $@

# The extras alone: the package is installed already.
$(TESTED): $(INSTALLED)
	@echo "Adding what the tests need: pytest, mypy, Ray, Minari, ONNX and others. This takes about a minute."
	@$(BIN)/python -m pip install --quiet --no-compile 'mopo_fast[test,lint,triton,minari,ray,parquet,onnx,hub]'
	@touch $@

DEMO_DATA := $(RUNS)/demo/halfcheetah-random-local.hdf5
demo: compiler $(INSTALLED)
	rm -rf $(RUNS)/demo
	$(BIN)/mopo-fast collect halfcheetah-random --steps 60000 --out $(DEMO_DATA)
	$(BIN)/mopo-fast train $(DEMO_DATA) --steps 12000 --out $(RUNS)/demo/run \
	    --dynamics.max-epochs 20 --rollout.batch-size 10000 --evaluation.interval 2
	$(BIN)/mopo-fast evaluate $(RUNS)/demo/run
	@echo "Look at $(RUNS)/demo/run/report.html"

# fuzz and soak use all JOBS; docs and try-wheel use little more than one each, so they run side by side.
test: compiler $(TESTED) lint
	$(BIN)/python -m pytest -n $(JOBS)
	$(MAKE) fuzz soak $(VENV)/.installed-docs $(VENV)/.installed-wheel
	$(MAKE) --jobs=$(JOBS) --output-sync=target docs try-wheel
	$(if $(QEMU),$(MAKE) arm,@echo "NOT TESTED: the kernels for ARM, which take $(ARM_CXX) and qemu-aarch64.")

# For work in between, in under 90 seconds: lint, and tests of every room that are quick.
QUICK := utils core/test_buffer.py core/test_ensemble.py core/test_policy.py core/test_rollout.py core/test_tasks.py \
    core/test_presets.py run/test_folder.py data/test_data.py data/test_npz.py data/test_transitions.py \
    bulk/test_plan.py bench kernels/test_checked.py kernels/test_philox.py kernels/test_kernel_math.py \
    kernels/test_kernel_sac.py kernels/test_kernel_fit.py commands/test_layers.py commands/test_doctor.py
check: compiler $(TESTED) lint
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow" $(addprefix tests/,$(QUICK))

# Every reader of files, fed with mutated ones; what fails is kept in build/fuzz. Other cases: make fuzz SEED=7
CASES ?= 2000
SEED ?= 0
fuzz: $(TESTED)
	$(BIN)/python -m tests.fuzz --cases $(CASES) --jobs $(JOBS) --seed $(SEED)

# Commands killed, interrupted, and left without disk, rights or memory, at random moments of a seed:
# make soak MINUTES=30 SEED=7
MINUTES ?= 1
soak: $(TESTED)
	$(BIN)/python tests/soak --minutes $(MINUTES) --jobs $(JOBS) --seed $(SEED)

# The site, in build/site. A dead link, an unknown name or a warning ends the build; it runs the tutorial.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same at http://127.0.0.1:8000, built again when a file is saved. The tutorial runs only when it has changed.
docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 DOCS_REUSE=1 $(BIN)/mkdocs serve

# The extra alone: the package is installed already.
$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile 'mopo_fast[docs]'
	@touch $@

lint: $(TESTED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CPP_OF_TESTS)

format: $(TESTED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) $(CPP_OF_TESTS)

# The kernels for ARM on an emulated processor: takes a cross-compiler and QEMU, in Debian g++-aarch64-linux-gnu and
# qemu-user. A minute of the tests alone: make arm ARM_ARGS= runs them all, for more than half an hour.
ARM_CXX ?= aarch64-linux-gnu-g++
QEMU := $(if $(shell command -v $(ARM_CXX)),$(shell command -v qemu-aarch64))
ARM_ARGS ?= -k "linker or not canonical and ( \
    neon and not neon_bf16 and (math or fit or denormal or terminal or models_of_other) \
    or neon_bf16 and bfloat16 and not bfloat16x3 and (rounded_factors or few_rows))"
ARM_TESTS := $(patsubst %,tests/kernels/test_kernel_%.py,math rollout fit sac values) \
    tests/commands/test_packaging.py::test_the_linker_cannot_mix_instruction_sets
.PHONY: arm
arm: $(TESTED) $(VENV)/.installed-wheel
	$(BIN)/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DMOPO_FAST_DRIVER=ON
	$(BIN)/cmake --build build/arm
	MOPO_FAST_TEST_DRIVER="qemu-aarch64 build/arm/driver" $(BIN)/python -m pytest -q -n $(JOBS) $(ARM_TESTS) $(ARM_ARGS)

# A wheel in dist/ for this Python, which needs no compiler. Zig's compiler links against an old glibc.
# Without MAKEFLAGS ninja uses all cores, and not the one that make leaves it.
GLIBC ?= 2.28
MACHINE := $(shell uname -m)
$(VENV)/.installed-wheel: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --no-compile 'mopo_fast[wheel]'
	@touch $@

.PHONY: wheel
wheel: $(VENV)/.installed-wheel
	rm -rf build/wheel build/lib.* build/bdist.* dist/*.whl
	CXX="$(abspath $(BIN))/python -I -m ziglang c++ -target $(MACHINE)-linux-gnu.$(GLIBC)" MOPO_FAST_CUDA=0 MAKEFLAGS= \
	    $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --strip \
	    --plat manylinux_$(subst .,_,$(GLIBC))_$(MACHINE) --wheel-dir dist build/wheel/*.whl
	$(BIN)/python -m twine check --strict dist/*.whl

# The wheel, and the sources without a compiler, in an environment of their own.
.PHONY: try-wheel
try-wheel: wheel $(TESTED)
	$(BIN)/python -m tests.install dist/*.whl

# JAX is for the benchmarks alone. The timed ones run once the baselines are known to do the same work.
$(VENV)/.installed-bench: $(TESTED)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[bench]'
	@touch $@

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest benchmarks/test_*.py
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-columns=median,iqr,rounds
	for kernel in rollout sac fit; do $(BIN)/python -m benchmarks.compare $$kernel --dtype bfloat16 || exit 1; done
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.canonical --rounds 5

# On a machine with a GPU, each within five minutes: the kernels and recorded launches against the oracle; all
# that is measured there. Neither sets anything up: without $(VENV), what $(PYTHON) can import has to do.
# ARGS="--logs FOLDER" and the like are handed on.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:
	$(GPU_PYTHON) -m tests.gpu $(ARGS)

bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# Takes compute-sanitizer, of the CUDA toolkit. Small cases alone: everything is a hundred times slower.
sanitize-gpu: $(TESTED)
	for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	        $(BIN)/python -m pytest $(wildcard tests/kernels/test_kernel_cuda*.py) -k "not canonical" || exit 1; \
	done

# Against another commit: make bench-compare REF=HEAD~1
bench-compare: $(TESTED)
	$(BIN)/python -m benchmarks.against $(REF)

# The CPU's extension with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package of its own; and with
# ThreadSanitizer, which sees no races in what it did not compile. nvcc does not run under them.
SANITIZED := build/sanitized
comma := ,
sanitized = rm -rf $(SANITIZED) build/lib.* && \
    MOPO_FAST_SANITIZE=$(1) $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) .
runtime = $$($(CXX) -print-file-name=$(1))
SANITIZED_PYTHON = PYTHONPATH=$(SANITIZED) $(BIN)/python -P
SANITIZED_TESTS := $(filter-out tests/kernels/test_kernel_cuda.py,$(wildcard tests/kernels/test_kernel*.py)) \
    tests/kernels/test_checked.py tests/kernels/test_interrupt.py
sanitize: $(TESTED)
	$(call sanitized,address$(comma)undefined)
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libstdc++.so)"; \
	$(SANITIZED_PYTHON) -c 'from mopo_fast import _cpu; assert "$(SANITIZED)" in _cpu.__file__, _cpu.__file__' && \
	$(SANITIZED_PYTHON) -m pytest -p no:cacheprovider tests/kernels/test_philox.py $(SANITIZED_TESTS) -k "not registers"
sanitize-threads: $(TESTED)
	$(call sanitized,thread)
	export TSAN_OPTIONS=ignore_noninstrumented_modules=1 LD_PRELOAD="$(call runtime,libtsan.so)"; \
	$(SANITIZED_PYTHON) -m pytest -p no:cacheprovider $(SANITIZED_TESTS) -k "threads or splits or calls or interrupt"

clean:
	rm -rf $(VENV) build dist *.egg-info mopo_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mopo_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
