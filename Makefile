# Each target sets up what it needs in .venv, once, and builds the compiled library again when its
# sources have changed. EPSANET_FUSED_BUILD (auto, 0, cpu, cuda) says what goes into the library.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
OUT ?= out
SECOND := .venv-integrations
TIMM := $(shell sed -n 's/^timm==//p' requirements-integrations.txt)
# The tests of the public functions, which run in the second environment, too.
AGAIN := tests/ops tests/nn tests/fusion/test_fuse.py tests/fusion/test_modules.py
# The providers that need packages of that environment.
AGAIN += tests/benchmarks/test_exported.py
RIVALS := eager compile-freezing onnxruntime openvino optimized optimized-compile
RIVALS += $(addprefix resnet50:,$(RIVALS))

.PHONY: bench bench-rivals test test-slow test-integrations test-sanitized test-matrix gpu-check digits lint clean

bench: $(BUILT)
	$(VENV)/bin/python benchmarks/bench_psa.py --out $(OUT)

# ONNX Runtime and OpenVINO beside us and ResNet-50: a quarter of an hour, after some installing.
bench-rivals: $(VENV)/.rivals
	$(VENV)/bin/python benchmarks/bench_psa.py --scope network --batch 1 --memory-format best \
	    --providers $(RIVALS) --seconds 1500 --out $(OUT)

# Files run in the order of their names: the fullest first would start the slowest last.
test: $(BUILT)
	$(VENV)/bin/python -m pytest tests --ignore=tests/gpu --ignore=tests/integrations -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --timeout 600

# The tests that `make test` leaves out, so that it ends within five minutes: most cases of the
# interpreted and emulated kernels, the Triton kernels compiled for all targets, a network that
# learns, a build from scratch, and the like.
test-slow: $(BUILT)
	$(VENV)/bin/python -m pytest tests --ignore=tests/gpu --ignore=tests/integrations -m slow -n 2 --dist loadgroup --timeout 600

# timm, torchvision, ONNX and the recipes, in an environment of their own with another torch, which
# takes gigabytes and some minutes to install; the operator's tests once more, there.
test-integrations: $(BUILT) $(SECOND)/.ready
	$(SECOND)/bin/python -m pytest tests/integrations tests/recipes $(AGAIN) -n 2 --dist loadfile --timeout 600

# The CPU kernels under AddressSanitizer and UBSan.
test-sanitized: $(BUILT)
	$(VENV)/bin/python tests/tools/sanitized.py

# One wheel under every torch and on two Pythons: half an hour, gigabytes of downloads.
test-matrix: $(READY)
	$(VENV)/bin/python tests/tools/matrix.py

digits: $(BUILT)
	$(VENV)/bin/python recipes/digits.py --out $(OUT)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*' 'tests/helpers/emulator/*.cpp' 'tests/helpers/emulator/*.h')

# Runs with what the machine has: no network, no .venv. PART=1, 2 or 3: see benchmarks/visit.py.
gpu-check:
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/visit.py --out $(OUT) $(if $(PART),--part $(PART))

$(READY): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(BUILT): $(READY) $(SOURCES)
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VENV)/bin/python -m epsanet_fused
	touch $@

$(VENV)/.rivals: $(BUILT)
	$(VENV)/bin/python -m pip install --quiet onnx onnxscript onnxruntime openvino
	touch $@

# The library that the first environment built serves this one, too. The source archive of timm has
# its tests.
$(SECOND)/.ready: requirements-integrations.txt
	$(PYTHON) -m venv $(SECOND)
	$(SECOND)/bin/python -m pip install --quiet -r requirements-integrations.txt
	EPSANET_FUSED_BUILD=0 $(SECOND)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(SECOND)/bin/python -m pip download --quiet --no-deps --no-binary timm -d $(SECOND)/sources timm==$(TIMM)
	tar -xzf $(SECOND)/sources/timm-$(TIMM).tar.gz -C $(SECOND)/sources
	touch $@

clean:
	rm -rf $(VENV) $(SECOND) $(OUT) build dist *.egg-info epsanet_fused/*.so
