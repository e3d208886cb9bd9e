# Each target makes all it needs: python3 and a C++ compiler are enough to start from. On a machine that has its torch already (a GPU
# machine, say), `make gpu-test VENV= PYTHON=python3` uses that torch, installs nothing into it and fetches nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TRITON ?= 3.6.0
# where pip looks for torch besides its own index: https://download.pytorch.org/whl/cpu saves the gigabytes of a CUDA build
TORCH_INDEX ?=
# tests run on so many cores, each with one thread
JOBS ?= 2
# for pytest or the benchmark CLI: make test ARGS="-k dispatch"
ARGS ?=
# of gpu-test and gpu-bench; cpu rehearses them: make gpu-test gpu-bench DEVICE=cpu GPU_BENCH="--preset quick"
DEVICE ?= cuda
# what should fit into three minutes, some of which go to compiling rivals: both GPU backends in the type that counts there; from the
# beginning of a name, without the video cases: to read one takes a package that a GPU machine need not have
GPU_BENCH ?= --preset full --seconds 0.3 --dtype bf16 --backend triton --backend cuda $(patsubst %,--case '%*',large- per-sample- ragged- short- \
  match-merge-N1569 soft-merge top-k halt-all attention-N4096 linear-N4096-K768)

venv := $(or $(VENV),build/borrowed)
environment := $(venv)/.ready-$(if $(VENV),torch$(TORCH)-triton$(TRITON),borrowed)
python := $(venv)/bin/python
pip := $(python) -m pip --quiet --disable-pip-version-check install
library := build/.library
results = benchmarks/results/$(if $(filter cpu,$(DEVICE)),rehearsal,$(shell $(python) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))'))
export PATH := $(abspath $(venv)/bin):$(PATH)

.PHONY: help test test-full bench gpu-check gpu-test gpu-bench sanitize lint lint-python lint-types lint-cpp format clean
.DELETE_ON_ERROR:

help:
	@echo "make test        build, run every test (12 minutes at most on 2 cores)"
	@echo "make bench       build, run the benchmark's quick preset on real video (3 minutes at most)"
	@echo "make test-full   the long tests and the sanitizers too"
	@echo "make sanitize    the C++ kernels, the emulated CUDA ones too, under AddressSanitizer and UBSan"
	@echo "make gpu-check   compile the GPU kernels for sm_80, sm_90, sm_100 without a GPU: registers, spills, shared memory"
	@echo "make gpu-test    the tests on a GPU           make gpu-bench   the benchmark on a GPU (both: DEVICE=cpu rehearses)"
	@echo "make lint        ruff, clang-format, mypy     make format      let them rewrite"

# pinned tools, and the package in place; the library is built by the rule below, so that it is rebuilt when only csrc/ changes
$(VENV)/.ready-torch$(TORCH)-triton$(TRITON): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(venv)
	$(pip) torch==$(TORCH) -r requirements-dev.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(pip) --no-deps triton==$(TRITON)
	TOKENOPS_BUILD=none $(pip) --no-deps --no-build-isolation --editable .
	@touch $@

# a second environment over the first one's packages: not --system-site-packages, which skips those of an interpreter that is a venv itself
build/borrowed/.ready-borrowed: pyproject.toml
	$(PYTHON) -m venv --without-pip $(venv)
	$(PYTHON) -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
	  > "$$($(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	TOKENOPS_BUILD=none $(pip) --no-deps --no-build-isolation --editable .
	@touch $@

# with the CUDA kernels for CPU tensors, which only the tests load
$(library): $(environment) setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/* tests/emulator/*)
	TOKENOPS_EMULATED=1 $(python) setup.py --quiet build_ext --inplace
	@touch $@

# a file that builds or installs something stays on one core
beside = --numprocesses $(JOBS) --dist loadgroup

test: $(library)
	$(python) -m pytest $(beside) $(ARGS)

test-full: sanitize $(library)
	$(python) -m pytest $(beside) -m "full or not full" --hypothesis-profile=full $(ARGS)

# the Python tests run on a second package whose libraries hold the sanitizers; torch itself does not, hence the preloading
sanitized = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
  TOKENOPS_SANITIZE=1 PYTHONPATH=build/sanitize/lib pytest tests $(beside)

sanitize: $(library)
	TOKENOPS_SANITIZE=1 TOKENOPS_EMULATED=1 TOKENOPS_BUILD=cpu $(python) setup.py --quiet build --build-lib build/sanitize/lib
	isas=$$($(python) -c 'from tokenops import native; print(*native.cpu_isas())'); \
	for test in $(patsubst tests/cpp/%.cpp,build/sanitize/%,$(wildcard tests/cpp/test_*.cpp)); do $$test $$isas || exit 1; done
	$(sanitized) -k "(cpu or cuda or emulator) and not (compile or benchmark or interpreter or cuda_check or one_build) or record_describes" $(ARGS)
	$(sanitized) -m full -k many_calls_in_any_order

bench: $(library)
	$(python) -m tokenops.benchmarks bench --preset quick $(ARGS)

gpu-check: $(environment)
	$(python) tests/gpu_check.py $(ARGS)
	$(python) tests/cuda_check.py

gpu-test: $(library)
	$(python) tests/gpu_test.py --device $(DEVICE) $(ARGS)

gpu-bench: $(library)
	mkdir -p benchmarks/results
	$(python) -m tokenops.benchmarks bench --device $(DEVICE) $(GPU_BENCH) --chart $(results).png --json $(results).json

cpp_files = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# three, so that `make -k lint` hears all of them
lint: lint-python lint-types lint-cpp

lint-python: $(environment)
	ruff check .
	ruff format --check .

lint-types: $(environment)
	mypy

lint-cpp: $(environment)
	clang-format --dry-run -Werror $(cpp_files)

format: $(environment)
	ruff check --fix .
	ruff format .
	clang-format -i $(cpp_files)

clean:
	rm -rf build dist *.egg-info tokenops/_C_* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
