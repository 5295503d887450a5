# Everything in one place: `make demo` and `make test` set themselves up on a machine with Python >= 3.11.
#   make demo      the main job on real input (about 5 minutes on 2 cores after installation)
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

.PHONY: cluster cluster-down demo test lint verify generate deploy-manifests bench lock install clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/python examples/demo/run.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

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
