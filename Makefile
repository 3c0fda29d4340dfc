# `make demo` and `make test` need nothing but Python 3.11 or later; all they install is in .venv.
#
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# takes PyTorch for CPUs only. On Linux the default index has the build for CUDA, which is gigabytes.

PYTHON ?= python3
TORCH_INDEX ?=

INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint clean .venv

demo: .venv/runtime-installed
	.venv/bin/prfaas demo

# The kernels are compiled once, rather than by every process that a test starts.
test: .venv
	.venv/bin/python -m shared.compile_kernels
	.venv/bin/python -m pytest

lint: .venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

clean:
	rm -rf .venv

.venv: .venv/development-installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp is older than what it was made from once that changes, and then installed anew.
.venv/runtime-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable .
	touch $@

.venv/development-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	touch .venv/runtime-installed $@
