# Every target does its own set-up; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up
SEED   ?= 0
OUTPUT ?= outputs/tiny
PAIR   ?= outputs/tiny-pair
ARGS   ?=
# cpu or gpu; empty: what .venv was made for, in a new one gpu where there is an NVIDIA driver.
BACKEND ?=

# A caller's own environment must not reach into ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup train test test-long test-containers mutants check bench bench-trl soak lock clean up down logs images

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install everything into .venv (other targets do it by themselves)

# The stamp holds what .venv was made for: asked for another build, it is made anew.
ifneq ($(BACKEND),)
ifneq ($(BACKEND),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

$(STAMP): pyproject.toml deploy/setup.sh deploy/locks/cpu.txt deploy/locks/gpu.txt
	@PYTHON="$(PYTHON)" VENV="$(VENV)" BACKEND="$(BACKEND)" bash deploy/setup.sh
	@echo "$(BACKEND)" > $@

train: $(STAMP)  ## the main job: distil the tiny teacher into the tiny student (SEED=0, BACKEND=cpu, ARGS="--option value")
	@$(BIN)/distillserve tiny --output "$(PAIR)" --seed $(SEED)
	@$(BIN)/distillserve up deploy/runs/tiny.toml --seed $(SEED) --output.dir "$(OUTPUT)" --output.overwrite true \
		--student.model "$(PAIR)/student" --teacher.model "$(PAIR)/teacher" \
		--data.path "$(PAIR)/train.jsonl" --data.eval_path "$(PAIR)/eval.jsonl" $(ARGS)

test: $(STAMP)  ## all tests, real vLLM included (ARGS="-k name")
	@$(BIN)/python -m tests $(ARGS)

test-long: $(STAMP)  ## the tests that take many minutes
	@$(BIN)/python -m pytest -m long -n 2 --dist loadfile $(ARGS)

test-containers: $(STAMP)  ## the CPU stack in real containers, from a new clone; needs Docker
	@$(BIN)/python -m pytest -m containers $(ARGS)

mutants: $(STAMP)  ## change the code in a copy, a place at a time, and count what tests notice (ARGS="batch --minutes 10")
	@$(BIN)/python -m tests.mutants $(ARGS)

check: $(STAMP)  ## lint, format, types, import boundaries
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## measure and write tests/benchmarks/results/*.json (ARGS="head" for one)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks $(ARGS)

bench-trl: $(STAMP)  ## measure beside TRL's trainers, in environments of their own (half an hour; ARGS=time for a part)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks.against_trl $(ARGS)

soak: $(STAMP)  ## a run whose parts are killed 20 times at random, beside one left alone (half an hour; ARGS="--kills 4")
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.soak $(ARGS)

lock: $(STAMP)  ## write deploy/locks/*.txt anew from the tested environment
	@$(BIN)/python deploy/locks/freeze.py

# BACKEND=cpu and PROFILE=several-gpus choose the stack (docs/deployment.md).
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) \
	$(if $(PROFILE),--env-file deploy/profiles/$(PROFILE).env) \
	-f compose.yaml $(if $(filter-out gpu,$(BACKEND)),-f deploy/compose.$(BACKEND).yaml)

images:  ## build the container image (BACKEND=gpu or cpu)
	@$(COMPOSE) build

up:  ## one run in containers: ends with its trainer and its exit code (BACKEND=gpu or cpu)
	@$(if $(filter cpu,$(BACKEND)),OVERWRITE=true) $(COMPOSE) up --build --exit-code-from trainer \
		|| { code=$$?; echo "up: ended with $$code; make logs shows what each container said"; exit $$code; }

down:  ## remove the containers; keys and caches stay in their volumes
	@$(COMPOSE) down --remove-orphans

logs:  ## what the containers say
	@$(COMPOSE) logs --follow --tail 100

clean:  ## remove .venv, caches and outputs
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
