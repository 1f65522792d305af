# Each target sets up what it needs in .venv, once.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
OUT ?= out

.PHONY: bench test gpu-check digits lint clean

bench: $(READY)
	$(VENV)/bin/python benchmarks/bench_psa.py --out $(OUT)

test: $(READY)
	$(VENV)/bin/python -m pytest tests --ignore=tests/gpu -n 2 --dist loadfile --timeout 600

digits: $(READY)
	$(VENV)/bin/python recipes/digits.py --out $(OUT)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Runs with what the machine has: no network, no .venv. See benchmarks/gpu_check.py.
gpu-check:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_check.py --out $(OUT)

$(READY): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
