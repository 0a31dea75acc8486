.DEFAULT_GOAL := help
PYTHON ?= python3
# Where torch comes from besides PyPI, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Further options for pip, e.g. PIP_ARGS="--index-url https://pypi.hospital.example/simple"
PIP_ARGS ?=
# Test processes; two suit two cores.
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
STAMP := .venv/.installed
# The containers' demo does without torch on this machine, and takes what is there.
DEMO_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),.demo/tools/.installed)
PROTOS := $(wildcard protos/fedlink/v1/*.proto)
PROTOC := $(BIN)/python -m grpc_tools.protoc -I protos

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the pinned dependencies

$(STAMP): pyproject.toml deploy/constraints.txt
	@echo "installing into .venv ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) 'pip>=25.1'
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c deploy/constraints.txt "$$(grep '^torch==' deploy/constraints.txt)"
	@$(PIP) -c deploy/constraints.txt -e '.[server,client,text,quantized,hf,trl,lightning,demo]' --group dev
	@touch $@

TRAINING = $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(LEARNING_RATE),--learning-rate $(LEARNING_RATE))

demo: $(STAMP) ## Four hospitals train one model: server, four daemons, comparison, plot
	@$(BIN)/python -m examples.heart.demo .demo/heart

demo-llm: $(STAMP) ## Three sites fine-tune a language model by LoRA: samples, comparison, plot (SECONDS=300 PROCESSES=2 LEARNING_RATE=auto)
	@$(BIN)/python -m examples.llm.demo $(if $(SECONDS),--seconds $(SECONDS)) $(TRAINING) .demo/llm

reproduce-heart: $(STAMP) ## FLamby's accuracies on Fed-Heart-Disease, beside its own (a minute or two)
	@$(BIN)/python -m examples.heart.reproduce .demo/reproduce

demo-classify: $(STAMP) ## Three sites fine-tune a text classifier, every parameter: comparison, plot (SECONDS=300 PROCESSES=2 LEARNING_RATE=auto)
	@$(BIN)/python -m examples.classify.demo $(if $(SECONDS),--seconds $(SECONDS)) $(TRAINING) .demo/classify

reproduce-r8: $(STAMP) ## Reuters R8 over four sites: federated, alone, pooled (up to 45 minutes; SEEDS=1,2,3 FULL=1)
	@$(BIN)/python -m examples.classify.reproduce $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FULL),--full) .demo/reproduce-r8

demo-compose: $(DEMO_STAMP) ## The same in containers, docker or podman (KILL=1: the server and a site are killed)
	@$(dir $(DEMO_STAMP))bin/python deploy/demo_compose.py .demo/compose $(if $(KILL),--kill)

.demo/tools/.installed: pyproject.toml deploy/constraints.txt
	@echo "installing into .demo/tools what the containers' demo needs on this machine ..."
	@$(PYTHON) -m venv .demo/tools
	@.demo/tools/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		-c deploy/constraints.txt -e '.[server,demo]'
	@touch $@

test: $(STAMP) ## Run the tests (about 10 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not slow and not demos"

test-slow: $(STAMP) ## Run those that take longer: demo, published numbers, doctor, slow lines, disks, certificates
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m slow

test-demos: $(STAMP) ## Run the demos of the text workloads at their smallest, and look at the results (an hour and a half)
	@$(BIN)/python -m pytest -q -m demos -rs

test-gpu: $(STAMP) ## Run those that need a GPU: tokens/s and memory as a table and JSON; said so where there is none
	@$(BIN)/python -m pytest -q -m gpu -rs

SEED ?= 7
CASES ?= 50
fault: $(STAMP) ## Faults on randomized schedules, all survived (SEED=7 CASES=50 JOBS=2)
	@$(BIN)/python -m tests.fault.campaign --seed $(SEED) --cases $(CASES) --jobs $(JOBS)

DIR ?= .bench
bench: $(STAMP) ## Measure every target beside its baseline: an hour (ROWS=gpt2x4,tls REPEAT=3 DIR=.bench; docs/performance.md)
	@$(BIN)/python -m tests.bench --dir $(DIR) $(if $(ROWS),--rows $(ROWS)) $(if $(REPEAT),--repeat $(REPEAT))

bench-smoke: $(STAMP) ## Fail if a round costs twice what it should; part of make test (half a minute)
	@$(BIN)/python -m pytest -q -s tests/bench/test_smoke.py

MODEL ?= gpt2
CLIENTS ?= 4
ROUNDS ?= 3
TRAINER ?= numpy
bench-round: $(STAMP) ## Time a round (MODEL=tiny|resnet18|gpt2|... CLIENTS=4 ROUNDS=3 TRAINER=numpy|torch TLS= DIR=.bench KEEP=)
	@$(BIN)/python -m tests.bench.bench_round $(MODEL) $(CLIENTS) $(ROUNDS) --trainer $(TRAINER) $(if $(TLS),--tls) \
		--dir $(DIR) $(if $(KEEP),--keep)

bench-processes: $(STAMP) ## Throughput of two trainer processes against one, on this machine (a few minutes; PROCESSES=2)
	@$(BIN)/python -m tests.bench.several $(if $(PROCESSES),--processes $(PROCESSES))

check: $(STAMP) ## Lint, format, types, import rules, protocol, generated code (under a minute)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports > .venv/imports.log || { cat .venv/imports.log; exit 1; }
	@cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	@cd protos && ../$(BIN)/buf breaking --against baseline.binpb
	@$(MAKE) --no-print-directory check-protos
	@$(BIN)/mypy
	@echo "all checks passed"

check-protos: $(STAMP) ## Fail if the generated code is not what the .proto files give
	@rm -rf .venv/protos && mkdir .venv/protos
	@$(MAKE) --no-print-directory generate OUT=.venv/protos
	@for f in protos/fedlink/v1/*_pb2*; do cmp "$$f" ".venv/protos/fedlink/v1/$$(basename $$f)" || \
		{ echo "$$f is stale: run make protos"; exit 1; }; done
	@test "$$(ls .venv/protos/fedlink/v1 | wc -l)" = "$$(ls protos/fedlink/v1/*_pb2* | wc -l)"

protos: $(STAMP) ## Write the generated code anew
	@$(MAKE) --no-print-directory generate OUT=protos

generate:
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PROTOC) --python_out=$(OUT) --grpc_python_out=$(OUT) \
		--mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) $(PROTOS)
	@rm -f $(OUT)/fedlink/v1/types_pb2_grpc.py $(OUT)/fedlink/v1/types_pb2_grpc.pyi

baseline: $(STAMP) ## Take the protocol as it is for the one that must not break (at a release)
	@cd protos && ../$(BIN)/buf build -o baseline.binpb

format: $(STAMP) ## Format and fix what can be fixed
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .
	@cd protos && ../$(BIN)/buf format -w

constraints: ## Pin what .venv holds now
	@{ head -n 2 deploy/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > .venv/pins
	@mv .venv/pins deploy/constraints.txt

clean: ## Remove what the demo and the tools wrote, not .venv
	@rm -rf .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help install demo demo-llm demo-classify demo-compose reproduce-heart reproduce-r8 test test-slow fault bench bench-smoke bench-round bench-processes check check-protos protos generate baseline format constraints clean test-gpu test-demos
