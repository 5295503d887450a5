# Everything in one place: `make demo` and `make test` set themselves up on a machine with Python >= 3.11.
#   make demo      the main job on real input (about 5 minutes on 2 cores after installation)
#   make demo-cluster  the same on Kubernetes: installed by Helm, two nodes (a cluster of its own, or KUBECONFIG=...)
#   make cluster   a real Kubernetes on this machine, without Docker               make cluster-down
#   make test      all tests         make lint    style, types, import rules      make verify  generated files are fresh
#   make generate  CRD, schema, docs make bench   beside TRL's SFTTrainer         make lock    requirements/*.txt
PYTHON ?= python3
UV_VERSION := 0.13.8

VENV := .venv
BIN := $(VENV)/bin
UV := .uv/bin/uv
INSTALLED := $(VENV)/.installed-dev
BENCH_INSTALLED := $(VENV)/.installed-bench
SOURCES := api storage trainer operator client deploy tests examples bench

export PYTHONUNBUFFERED := 1
export UV_PYTHON_DOWNLOADS := never

.PHONY: cluster cluster-down cluster-setup images demo demo-cluster test lint verify generate deploy-manifests bench lock install clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/python examples/demo/run.py

demo-cluster: $(INSTALLED)
	$(BIN)/python examples/demo/on_cluster.py

# Three workers on two cores: one of them mostly waits, for the pauses of Kubernetes' Job controller.
# The cluster tests run alone: they start real nodes, and switch them off.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal tests/unit tests/training tests/apiserver $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy api/finetune_api storage/finetune_storage client/finetune trainer/finetune_trainer operator/finetune_operator
	$(BIN)/lint-imports

verify: $(INSTALLED)
	$(BIN)/python -m finetune_api.generate --check
	$(BIN)/python -m deploy.render --check

generate: $(INSTALLED)
	$(BIN)/python -m finetune_api.generate

deploy-manifests: $(INSTALLED) # from the chart: deploy/install.yaml, rules, dashboard, docs/helm-values.md; needs helm
	$(BIN)/python -m deploy.render

cluster: # a real Kubernetes on this machine; docs/local-cluster.md
	@$(PYTHON) -m deploy.local.cluster up --nodes $(or $(NODES),2)

cluster-down:
	@$(PYTHON) -m deploy.local.cluster down

cluster-setup: # packages and tools of the local cluster; 8 to 16 minutes of compiling on a bare machine, then nothing
	@$(PYTHON) -m deploy.local.cluster setup

images: $(INSTALLED) # operator and trainer for the local cluster; about 5 minutes on a bare machine, then what changed
	$(BIN)/python -m deploy.local.cluster.images build

bench: $(BENCH_INSTALLED)
	$(BIN)/python -m bench

install: $(INSTALLED)

# ---- the environment -------------------------------------------------------------------------------------------------

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed and $(PYTHON) is older; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .uv \
	  || { rm -rf .uv; echo "$(PYTHON) cannot make virtual environments; install them: apt-get install python3-venv"; exit 1; }
	.uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"

$(INSTALLED): requirements/dev.txt pyproject.toml | $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

$(BENCH_INSTALLED): requirements/bench.txt $(INSTALLED)
	$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements/bench.txt
	touch $@

lock: | $(UV)
	for extra in client trainer operator dev bench; do \
	  $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	    pyproject.toml --extra $$extra -o requirements/$$extra.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) .uv .demo .finetune .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
