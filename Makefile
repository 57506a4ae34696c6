# Every target sets up what it needs. `make help` lists them.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# pip's folder of local wheels, where one is configured: uv does not read pip's settings.
UV := UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(VENV)/bin/uv
COMPILE := $(UV) pip compile --quiet --no-header --no-annotate --python-version 3.11 -c requirements/constraints.txt pyproject.toml
# Neither this project nor the local build of a wheel belongs into a pin.
BARE_PINS := grep -v '^lom' | sed 's/+cpu$$//'
STUBS_VENV := build/stubs-venv
SERVING_VENV := build/serving-venv
BASELINES_VENV := build/baselines-venv
# Arguments of bench-learning; empty: the generated tasks, every method, five seeds.
LEARNING :=
CPP_BUILD := build/cpp
CPP_PACKAGES := g++ make cmake pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libgtest-dev nlohmann-json3-dev
SERVING_TESTS := tests/server tests/clients tests/protos tests/faults

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-serving cpp-packages test-cpp lint types roads protos requirements study bench-learning learning-report bench-training bench-data bench-serving bench-control bench-export clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## create .venv with the pinned requirements and this project

$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --python $(PYTHON) -r requirements/dev.txt
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

demo: setup ## demonstrations → LOM → bundle → server → episodes over gRPC; leaves build/demo/report.png
	$(PYTHON) clients/examples/fork_demo.py

test: setup test-serving ## every test of Python
	$(PYTHON) -m pytest $(addprefix --ignore=,$(SERVING_TESTS))

test-serving: ## those of the server and the client, in an environment without torch
	test -x $(SERVING_VENV)/bin/python || python3 -m venv $(SERVING_VENV)
	$(SERVING_VENV)/bin/pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(SERVING_VENV)/bin/uv pip install --quiet --python $(SERVING_VENV)/bin/python -r requirements/serving.txt
	$(SERVING_VENV)/bin/uv pip install --quiet --python $(SERVING_VENV)/bin/python --no-deps --editable .
	$(SERVING_VENV)/bin/python -c "import importlib.util as u; assert u.find_spec('torch') is None, 'torch is installed here'"
	$(SERVING_VENV)/bin/python -m pytest $(SERVING_TESTS)

cpp-packages: ## install what the C++ client is built with (Debian and Ubuntu; as root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CPP_PACKAGES)

test-cpp: setup ## the C++ client: golden traces, real and hostile servers; wants packages of the distribution
	@mkdir -p $(CPP_BUILD)
	@cmake -S clients/cpp -B $(CPP_BUILD) > $(CPP_BUILD)/configure.log 2>&1 || \
	  { echo "test-cpp: $(CPP_BUILD)/configure.log says what is missing; make cpp-packages installs it" >&2; exit 1; }
	cmake --build $(CPP_BUILD) --parallel 2
	ctest --test-dir $(CPP_BUILD) --output-on-failure
	LOM_CPP_BUILD=$(CPP_BUILD) $(PYTHON) -m pytest tests/clients_cpp

lint: setup ## style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup ## mypy, strict, over the packages and the tests
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests clients/examples

roads: setup ## who may import whom
	$(VENV)/bin/lint-imports

protos: ## regenerate the stubs (in an environment of its own: the newest generator would raise the protobuf floor)
	test -x $(STUBS_VENV)/bin/python || python3 -m venv $(STUBS_VENV)
	$(STUBS_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/stubs.txt
	PATH=$(STUBS_VENV)/bin:$$PATH $(STUBS_VENV)/bin/python -m grpc_tools.protoc -I protos --python_out=protos \
	  --grpc_python_out=protos --mypy_out=quiet:protos --mypy_grpc_out=quiet:protos \
	  lom_api/v1/policy.proto lom_api/v1/admin.proto

requirements: setup ## pin again what pyproject.toml asks for
	$(COMPILE) --extra dev | $(BARE_PINS) > requirements/dev.txt
	$(COMPILE) requirements/serving.in --extra server -c requirements/dev.txt | $(BARE_PINS) > requirements/serving.txt
	$(UV) pip compile --quiet --no-header --no-annotate --python-version 3.11 requirements/baselines.in | $(BARE_PINS) > requirements/baselines.txt
	! grep -n '://' requirements/*.txt

bench-learning: setup $(BASELINES_VENV)/.installed ## LOM against other methods; adds to docs/results/learning.jsonl
	$(PYTHON) -m tests.bench.learning $(LEARNING)

learning-report: setup ## tables and pictures of docs/results/learning.jsonl, into docs/results.md
	$(PYTHON) -m tests.bench.learning report

$(BASELINES_VENV)/.installed: requirements/baselines.txt
	test -x $(BASELINES_VENV)/bin/python || python3 -m venv $(BASELINES_VENV)
	$(BASELINES_VENV)/bin/pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BASELINES_VENV)/bin/uv pip install --quiet --python $(BASELINES_VENV)/bin/python -r requirements/baselines.txt
	@touch $@

study: setup ## LOM against problems with exact answers; renews the pictures in docs/
	$(PYTHON) -m lom.study

bench-training: setup ## steps per second against a naive transcription, and of eight seeds at once
	$(PYTHON) -m tests.bench.training

bench-data: setup ## memory of a training with a million rows
	$(PYTHON) -m tests.bench.dataset_memory

bench-serving: setup ## swaps, failed loads, overload, transports, what the batcher and the metrics cost
	$(PYTHON) -m tests.bench.serving
	$(PYTHON) -m tests.bench.overload
	$(PYTHON) -m tests.bench.observability

bench-control: setup ## lateness of the control loop over a bare sleep loop; kills and other faults; what recording costs
	$(PYTHON) -m tests.bench.control_loop
	$(PYTHON) -m tests.bench.recorder

bench-export: setup ## what bundles cost and what their warnings see; wants LOM_BENCH_DATA=FOLDER
	$(PYTHON) -m tests.bench.bundles

clean: ## remove everything that was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
