# Written for GNU make 3.81 (macOS) and later. Every target makes .venv first, once.

TORCH  ?= torch==2.13.0
TRITON ?= 3.6.0
CONFIG := nano
RUN    := runs/nano
ARGS   :=
JOBS   := 2

# The versions that are tested come first; each is run, because a name in PATH may be a shim with nothing behind it.
PROBE  := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
            $$p -c '$(PROBE)' 2>/dev/null && echo $$p && break; done)

PY      := .venv/bin/python
READY   := .venv/.ready
HARNESS := .venv-eval/.ready
# One thread a process: two processes with two threads each wait for one another.
ONE     := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# A kernel that was registered for this user must not run instead of .venv's own.
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test kernels soak lab nb bench eval-harness gpu lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F '|' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(READY) ## only install, into .venv (PYTHON=... and TORCH="torch==..." choose others)

train: $(READY) ## train a model on this machine (CONFIG=micro; ARGS="--train.steps 50")
	$(PY) -m nanomai train $(CONFIG) $(ARGS)

test: $(READY) ## run every test, then every notebook against its stored outputs
	$(ONE) $(PY) -m pytest -n $(JOBS) --dist loadfile tests
	$(if $(wildcard notebooks),$(ONE) env -u MPLBACKEND $(PY) -m pytest --nbval -n $(JOBS) --dist loadscope notebooks)

kernels: $(READY) ## run the tests of the Triton kernels on the oldest Triton that they support (TRITON=3.7.0 on another)
	test -d .venv/triton-$(TRITON)/triton || \
	  $(PY) -m pip install --no-deps --target .venv/triton-$(TRITON) triton==$(TRITON)
	$(ONE) PYTHONPATH=$(CURDIR)/.venv/triton-$(TRITON) $(PY) -m pytest -n $(JOBS) --dist loadfile tests/test_triton_*.py

soak: $(READY) ## run the long versions of the fault tests
	$(ONE) $(PY) -m pytest -m soak $(or $(ARGS),tests)

lab: $(READY) ## open JupyterLab on the notebooks (as root, in a container: ARGS=--allow-root)
	$(PY) -m jupyterlab notebooks $(ARGS)

nb: $(READY) ## execute the notebooks anew from their .py halves (ARGS="notebooks/01_bpe.py" for one)
	$(ONE) env -u MPLBACKEND $(PY) tools/execute.py $(ARGS)

bench: $(READY) ## measure training and sampling speed (ARGS="--peer ../nanoGPT" beside a checkout of yours)
	$(PY) benchmarks/train_step.py $(ARGS)
	$(PY) benchmarks/generate.py $(ARGS)

eval-harness: $(READY) $(RUN)/config.yaml $(HARNESS) ## measure a run with lm-evaluation-harness too (RUN=runs/micro)
	$(PY) benchmarks/eval_harness.py $(RUN) $(ARGS)

$(RUN)/config.yaml:
	@echo 'no run in $(RUN): `make train` makes runs/nano; for another, make eval-harness RUN=runs/micro' >&2; exit 1

gpu: ## on a CUDA GPU: test every kernel, measure it and training (no install: PYTHON=python3 has torch)
	$(or $(wildcard $(PY)),$(PYTHON),python3) benchmarks/gpu.py $(ARGS)

lint: $(READY) ## check the style
	$(PY) -m ruff check .

clean: ## remove .venv, .venv-eval, caches and build leftovers; runs/ and data/ stay
	rm -rf .venv .venv-eval build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find nanomai tests tools -name __pycache__ -prune -exec rm -rf {} +

# A .venv without its stamp is the rest of a killed install and is made anew. torch goes first and is then held to
# the very build that was installed, so that no other requirement can move it. lm-eval has a .venv of its own, so that
# what it needs cannot move what nanomai is tested with.
$(READY):   WANTED = -e '.[dev]'
$(HARNESS): WANTED = 'lm-eval[hf]>=0.4.13,<0.5' 'transformers>=5,<6'
$(READY) $(HARNESS): pyproject.toml Makefile
	@test -f $@ || $(or $(PYTHON),false) -c '$(PROBE)' 2>/dev/null || { echo \
	  "nanomai needs Python 3.11 or later with venv and ensurepip; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -f $@ || $(PYTHON) -m venv --clear $(@D)
	rm -f $@
	$(@D)/bin/python -m pip install $(TORCH)
	$(@D)/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt $(WANTED)
	touch $@

# A torch that is asked for by name is installed even where .venv is ready.
ifneq ($(origin TORCH),file)
$(READY) $(HARNESS): FORCE
endif
FORCE:
