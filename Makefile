# Set-up, tests and the two demonstrations. EXTRA=gpu installs the CUDA build of vLLM instead of the CPU one.
EXTRA ?= cpu
PYTHON ?= python3.11
VENV := .venv
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

# A local wheel folder given to pip is handed on to uv; elsewhere the CPU build of torch comes from uv's torch backend.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else ifeq ($(EXTRA),cpu)
export UV_TORCH_BACKEND ?= cpu
endif

.PHONY: setup demo smollm2 gpu-pack test test-unit check clean
setup: $(VENV)/.ready-$(EXTRA)

$(VENV)/.ready-$(EXTRA): pyproject.toml constraints.txt
	@echo "==> setting up $(VENV) ($(EXTRA))"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv==0.13.9
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python -c constraints.txt -e '.[$(EXTRA),dev]'
	touch $@

demo: setup
	$(VENV)/bin/spct run conf/demo.yaml

smollm2: setup
	$(VENV)/bin/spct run conf/smollm2.yaml

gpu-pack: setup  # what the checks on a GPU machine without a network need, see jobs/gpu_pack.py
	$(VENV)/bin/python jobs/gpu_pack.py

test: setup  # most of it waits for processes to start, so two at a time, a file each
	$(VENV)/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-unit: setup
	$(VENV)/bin/python -m pytest tests -n 2 --dist loadfile -m "not slow and not gpu"

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy spct_ray jobs
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
