# make demo    accelerate the real all-MiniLM-L6-v2 and show what happened
# make test    every test: ruff, the public API's types, the kernels' machine code, pytest; of pytest a part also with the
#              oldest supported transformers, and with Python 3.12 where python3.12 runs
# make test-oldest   that part with the oldest transformers; make test-newer-python: with Python 3.12
# make lint    ruff and types only
# make fuzz    random models, batches and kernel calls against stock and references, for MINUTES=30 on every core; prints what
#              fails as a test, and exits with 1
# make kernels every kernel compiled for every kind of GPU, on two releases of Triton; needs no GPU. KERNELS_ARGS='9.0 --only bf16'
# make fingerprints  which layer classes changed in the installed transformers, against the tested versions
# make drift   the newest transformers, torch and triton: which layer classes changed, which conformance rows fail (.venv-drift).
#              DRIFT_ARGS='--here' examines .venv as it is
# make audit   asks pip-audit about every version in requirements.lock; says so where its database cannot be reached
# make lock    requirements.lock anew: every dependency pinned, with hashes
# make docs    the documentation site in site/; make docs-serve shows it at 127.0.0.1:8000 and follows changes
# make models   docs/models.md anew: every model type of the installed transformers is built and asked (some minutes)
# make gpu     the examination on a CUDA machine, under ten minutes, goes on where it was stopped; uses that machine's own
#              Python, installs nothing. PART=kernels|parity|speed|launches|rates|dispatch|compile, GPU_ARGS='--minutes 4'
# make bench-setup  the environments of the CPU benchmark's peers and its models, in .bench/ (some gigabytes, half an hour)
# make bench   fastencoder beside ONNX Runtime, OpenVINO, CTranslate2, torch.compile and others on this CPU.
#              BENCH_ARGS='--quick' ends within ten minutes; BENCH_ARGS='--models minilm --workloads W1,W4 --dtypes fp32'
# make bench-scaling  how time and memory grow with padding, batch, length and threads
# make bench-encode   SentenceTransformer.encode beside sentence-transformers' own backends
# make soak    the example server under load for ten minutes, converted and not: every answer compared, memory watched, hostile
#              clients, killed and restarted. MINUTES=2, SOAK_ARGS='--clients 16'
# make clean   remove .venv and everything that was generated
#
# Everything that needs packages runs in .venv, which is made once and again only when pyproject.toml changes.
#
#   PYTHON=python3.12                      another interpreter for .venv
#   TORCH=torch==2.11.0                    another torch (anything pip accepts: a version, a wheel's path)
#   TRANSFORMERS=transformers==5.17.0      another transformers
#   VENV_ARGS=--system-site-packages       see the machine's own packages, e.g. a CUDA torch that is installed already

# python3.11 may exist as a name without an interpreter behind it, so it is run and not only looked up.
PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV ?= .venv
VENV_ARGS ?=

# torch is installed before anything else, or the package's own requirement would be resolved to the newest release
# with its gigabytes of CUDA libraries. On a machine with an NVIDIA driver those libraries are what is wanted.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')

# Empty: the newest that pip finds.
TRANSFORMERS ?=

# Worker processes of pytest. One thread each: more only fight over the cores.
WORKERS ?= 2
PYTEST_ARGS ?=

# Of `make test-oldest` and `make test-newer-python`: what depends on the versions of transformers and of Python, in minutes.
OLDEST ?= transformers==5.17.*
NEWER_PYTHON ?= python3.12
PART_OF_TESTS = -m 'not slow' tests/conformance/test_conformance.py tests/conformance/test_registry_complete.py \
    $(foreach name,attention_level calls cli conversion eligibility embeddings fingerprints registry trial,tests/test_$(name).py) \
    $(wildcard tests/ecosystem)

# Of `make gpu`: which part, and what else benchmarks/gpu.py takes.
PART ?= all
GPU_ARGS ?=

# Of `make bench`, `make bench-scaling` and `make bench-encode`: what `python -m benchmarks.cpu run --help` (or scaling, encode) lists.
BENCH_ARGS ?=

# Of `make drift`: what `python -m tools.drift --help` lists.
DRIFT_ARGS ?=

# Of `make fuzz` and `make soak`: how long (30 and 10 minutes), and what else `python -m tests.fuzz --help` and
# `python -m tools.soak --help` list.
MINUTES ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=

# Of `make kernels`: the second release of Triton, and what else fastencoder.runtime.inspect_kernels takes.
OTHER_TRITON ?= 3.6.0
KERNELS_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# What the C++ extension is built from.
NATIVE := $(wildcard fastencoder/native/*)
# The models used here are local; nothing may try to reach a model hub.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The stamp's name carries the requirement, so that `make TORCH=...` installs again.
empty :=
space := $(empty) $(empty)
TORCH_STAMP := $(VENV)/.torch-$(subst $(space),_,$(subst /,_,$(subst :,_,$(subst >,_,$(subst <,_,$(subst =,_,$(TORCH)))))))

.PHONY: drift audit lock help demo test test-oldest test-newer-python lint style types pytest kernels fingerprints docs docs-serve models format gpu
.PHONY: fuzz bench-setup bench bench-scaling bench-encode soak clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV) || \
	    { echo "python -m venv failed; on Debian or Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(TORCH_STAMP): | $(BIN)/python
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.demo: pyproject.toml setup.py $(NATIVE) $(TORCH_STAMP)
	@echo "installing fastencoder[demo] into $(VENV)"
	@$(PIP) --editable '.[demo]'
	@touch $@

# timm asks for torchvision, which would bring another torch; its transformers import without.
$(VENV)/.test: pyproject.toml setup.py $(NATIVE) $(TORCH_STAMP)
	@echo "installing fastencoder[test,demo] into $(VENV)"
	@$(PIP) --editable '.[test,demo]' $(TRANSFORMERS:%='%')
	@$(PIP) --no-deps 'timm>=1.0.20'
	@touch $@

$(VENV)/.docs: pyproject.toml setup.py $(NATIVE) $(TORCH_STAMP)
	@echo "installing fastencoder[docs] into $(VENV)"
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.bench: pyproject.toml setup.py $(NATIVE) $(TORCH_STAMP)
	@echo "installing fastencoder[bench] into $(VENV)"
	@$(PIP) --editable '.[bench]'
	@touch $@

demo: $(VENV)/.demo
	@$(RUN) $(BIN)/fastencoder demo

# All of them, also when one fails; the closing line of the whole pytest comes last.
test: $(VENV)/.test
	@failed=; for step in style types kernels test-oldest test-newer-python pytest; do $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; done; \
	    if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lint: style types

style: $(VENV)/.test
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

pytest: $(VENV)/.test
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

fuzz: $(VENV)/.test
	$(RUN) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),30) $(FUZZ_ARGS)

test-oldest:
	@echo "with $(OLDEST):"
	@$(MAKE) --no-print-directory pytest VENV=.venv-oldest TRANSFORMERS='$(OLDEST)' PYTEST_ARGS="$(PART_OF_TESTS)"

test-newer-python:
	@if $(NEWER_PYTHON) -c '' >/dev/null 2>&1; then \
	    echo "with $(NEWER_PYTHON):"; \
	    $(MAKE) --no-print-directory pytest VENV=.venv-newer PYTHON=$(NEWER_PYTHON) PYTEST_ARGS="$(PART_OF_TESTS)"; \
	else echo "$(NEWER_PYTHON) does not run here: not tested with it"; fi

# A folder, not a second environment: everything but Triton is the same.
$(VENV)/triton-$(OTHER_TRITON): $(VENV)/.test
	@echo "installing triton $(OTHER_TRITON) into $@"
	@rm -rf $@
	@$(PIP) --no-deps --target $@ 'triton==$(OTHER_TRITON)'
	@touch $@

kernels: $(VENV)/.test $(VENV)/triton-$(OTHER_TRITON)
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m fastencoder.runtime.inspect_kernels \
	    --also $(VENV)/triton-$(OTHER_TRITON) $(KERNELS_ARGS)

fingerprints: $(VENV)/.test
	$(RUN) $(BIN)/python -m fastencoder.fingerprints check

drift: $(VENV)/.test
	@$(RUN) $(BIN)/python -m tools.drift $(DRIFT_ARGS)

audit: $(VENV)/.test
	@$(PIP) 'pip-audit>=2.10'
	@$(BIN)/python -m tools.audit

# The comment at its top stays.
lock: $(VENV)/.test
	@$(PIP) 'pip-tools>=7.6'
	@sed -n '/^#/!q; p' requirements.lock > requirements.lock.new
	@echo '$(TORCH)' | $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --constraint - --output-file .lock.tmp pyproject.toml
	@cat .lock.tmp >> requirements.lock.new && rm .lock.tmp && mv requirements.lock.new requirements.lock

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/python -m mkdocs serve --strict --dev-addr 127.0.0.1:8000

models: $(VENV)/.test
	$(RUN) $(BIN)/python -m tools.survey docs/models.json
	$(BIN)/python -m tools.models_page

format: $(VENV)/.test
	$(BIN)/ruff check --fix .

gpu:
	PYTHONPATH=. $(RUN) python3 benchmarks/gpu.py --part $(PART) $(GPU_ARGS)

bench-setup: $(VENV)/.bench
	@$(RUN) $(BIN)/python -m benchmarks.cpu setup

bench: $(VENV)/.bench
	@$(RUN) $(BIN)/python -m benchmarks.cpu run $(BENCH_ARGS)

bench-scaling: $(VENV)/.bench
	@$(RUN) $(BIN)/python -m benchmarks.cpu scaling $(BENCH_ARGS)

bench-encode: $(VENV)/.bench
	@$(RUN) $(BIN)/python -m benchmarks.cpu encode $(BENCH_ARGS)

soak: $(VENV)/.test
	@$(RUN) $(BIN)/python -m tools.soak --minutes $(or $(MINUTES),10) $(SOAK_ARGS)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newer .venv-drift site .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis fastencoder-demo.png
	find fastencoder tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
