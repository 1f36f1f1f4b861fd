# Everything a person or a machine does with this repository. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

UV_VERSION := 0.13.9

# No tool reports home.
export DO_NOT_TRACK := 1
export DAGSTER_DISABLE_TELEMETRY := yes
export GX_ANALYTICS_ENABLED := False
export DBT_SEND_ANONYMOUS_USAGE_STATS := False
# An environment that happens to be active is not this project's.
unexport VIRTUAL_ENV

# The uv of the machine, or one of our own in .uv-bootstrap.
UV := $(shell if uv --version >/dev/null 2>&1; then echo uv; else echo .uv-bootstrap/bin/uv; fi)
RUN := $(UV) run --frozen --no-sync
STAMP := .venv/.compiled-$(shell cat uv.lock pyproject.toml | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-16)
OWN_CODE := orchestration spark_jobs expectations services samples
PYTEST_ARGS ?=
# Two test processes: each has a Spark session of its own. A file's tests stay together, for they share what takes long to make.
WORKERS ?= 2

.PHONY: help
help: ## List the targets
	@echo "adtally: exactly-once ad-event accounting on a lakehouse. Two commands to start with: make demo, make test."
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Set up, run the main job on the samples and simulated traffic, compare with the known truth
	@$(RUN) adtally demo

.PHONY: test
test: setup lint ## Set up, lint, and run the tests (without the long ones below)
	@$(RUN) pytest -n $(WORKERS) --max-worker-restart 0 --dist loadfile -m "not homes and not crash and not services and not soak and not e2e" $(PYTEST_ARGS)

# Where Chromium cannot be installed, this says so, and the tests of pages are skipped.
GET_CHROMIUM := $(RUN) python scripts/setup_browser.py

# What takes minutes a test comes first, so that no process is left with a long one at the end (tests/conftest.py).
LONG := $(RUN) pytest -n $(WORKERS) --max-worker-restart 0 --dist loadgroup --no-loadscope-reorder

.PHONY: test-homes
test-homes: setup ## Set up and break and repair whole homes: reviews, recounts, backfills, marts
	@$(LONG) -m "homes and not crash and not services and not e2e" $(PYTEST_ARGS)

.PHONY: test-crash
test-crash: setup ## Set up and kill a real process at every durable step of a batch
	@$(LONG) -m crash $(PYTEST_ARGS)

.PHONY: test-soak
test-soak: setup ## Set up and run everything at once for minutes: ingest, compaction, recounts, backfills, mart builds
	@$(RUN) pytest -m soak $(PYTEST_ARGS)

.PHONY: test-e2e
test-e2e: setup ## Set up and run whole programs: adtally up with files that land, marts and Ctrl-C; small benchmarks
	-@$(GET_CHROMIUM)
	@$(LONG) -m e2e $(PYTEST_ARGS)

.PHONY: test-services
test-services: setup ## Set up and run on real Kafkas, a real Pinot, a real object store and a Spark cluster (jars are downloaded once)
	@$(LONG) -m services $(PYTEST_ARGS)

.PHONY: test-long
test-long: setup ## Set up and run what make test leaves out, but for the trials of services that take many minutes each
	-@$(GET_CHROMIUM)
	@$(LONG) -m "(homes or crash or services or soak or e2e) and not trial" $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## ruff, mypy, sqlfluff, dbt parse, dagster definitions
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(RUN) python scripts/lint_project.py

.PHONY: format
format: setup ## Format Python and SQL, and apply the safe fixes
	@$(RUN) ruff check --fix-only --exit-zero .
	@$(RUN) ruff format .
	@$(RUN) sqlfluff fix --quiet dbt_project/models dbt_project/tests || true

.PHONY: bench
bench: setup ## Measure the ingest against its contestants (see benchmarks/README.md)
	@$(RUN) adtally bench ingest

# Each writes a file with its revision into benchmarks/results. Nothing else should run for the hours that it takes.
BENCHMARK := $(RUN) python -m benchmarks

.PHONY: bench-all
bench-all: setup ## Measure everything anew on a quiet machine, at one revision: hours, and 40 GB of disk
	@git diff --quiet HEAD -- || { echo "adtally: error: commit first: each result names its revision" >&2; exit 2; }
	@$(BENCHMARK).run ingest
	@$(BENCHMARK).run ingest --events 40000000
	@for scenario in freshness history batch10 memory; do $(BENCHMARK).run ingest --scenario $$scenario; done
	@$(BENCHMARK).recount
	@$(BENCHMARK).quality
	@$(BENCHMARK).attribution
	@$(BENCHMARK).attribution --touches 50 --orders 30000 --batches 3 --histories 1500000 --at-least 10000 --name attribution-deep
	@$(BENCHMARK).run flat --days 90
	@$(BENCHMARK).run marts --days 90
	@$(BENCHMARK).run starts
	@$(BENCHMARK).workers
	@$(BENCHMARK).compaction

.PHONY: audit
audit: setup ## Look for known vulnerabilities of all packages, jars and browser code; fails where it cannot (needs a network)
	@$(RUN) python scripts/audit.py
	@$(UV) export --frozen --all-groups --no-emit-project --no-hashes --quiet | $(RUN) pip-audit --strict --no-deps --disable-pip -r /dev/stdin

.PHONY: sbom
sbom: setup ## Build the bill of materials of packages, jars and browser code (CycloneDX, dist/adtally.cdx.json) and check it
	@$(RUN) python scripts/sbom.py

.PHONY: setup
setup: $(filter-out uv,$(UV)) $(STAMP) ## Environment, Java, jars, DuckDB extension: what the other targets do by themselves
	@.venv/bin/python -m compileall -qq $(OWN_CODE)
	@$(RUN) python scripts/setup_machine.py

.PHONY: browser
browser: setup ## Chromium, with which tests open pages: what test-e2e and test-long do by themselves
	@$(GET_CHROMIUM)

# The stamp's name holds the hash of the lock: another lock, another stamp, so nothing is done twice. The packages are compiled here,
# once, and our own code by each `make setup`: where PYTHONDONTWRITEBYTECODE is set, every start of a command would compile it again.
$(STAMP): | $(filter-out uv,$(UV))
	@echo "adtally: making the locked environment in .venv"
	@$(UV) sync --frozen --quiet --compile-bytecode
	@rm -f .venv/.synced-* .venv/.compiled-* && touch $@

.uv-bootstrap/bin/uv:
	@echo "adtally: uv is not installed; putting uv $(UV_VERSION) into .uv-bootstrap"
	@python3 -m venv .uv-bootstrap || { echo "adtally: error: python3 cannot make a virtual environment (install it: sudo apt-get install -y python3-venv)" >&2; exit 2; }
	@.uv-bootstrap/bin/pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"

.PHONY: clean
clean: ## Delete what was built and the demo's folder (never .adtally, never the environment)
	@if [ -f .adtally-demo/.adtally-demo-home ]; then rm -rf .adtally-demo; fi
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dbt_project/target dbt_project/logs dist logs \
		spark-warehouse metastore_db derby.log benchmarks/.work
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
