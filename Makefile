# `make SHELL=1 demo` asks for a shell in the guest, but SHELL is also the name of the shell that make runs recipes with:
# keep what the command line said, then give make its shell back.
GUEST_SHELL := $(if $(findstring command,$(origin SHELL)),$(SHELL))
override SHELL := /bin/bash
.SHELLFLAGS := -euc

PYTHON ?= python3
GUEST ?= uml
BIN := .venv/bin
PYTEST_ARGS ?= -n auto
SECONDS ?= 60
KILLS_PER_SECOND ?= 2

.PHONY: all packages venv guests format check test test-all fuzz fuzz-seeds coverage-record audit demo demo-crash soak bench clean
all: check

packages:                       # Debian packages, only those that are missing
	@tools/install_packages

venv: .venv/installed           # the virtual environment, made again when pyproject.toml changes

.venv/installed: pyproject.toml | packages
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && touch $@

guests: venv                    # guest kernels, initramfs images and the Rust daemon, into .cache
	@$(BIN)/python -m tests.support.guest

format: venv
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: venv                     # under a minute
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/pytest tests/unit $(PYTEST_ARGS)

test: venv                      # everything, in everyday sizes, on all CPUs; PYTEST_ARGS= takes one test after another
	$(BIN)/pytest $(PYTEST_ARGS)

test-all: venv                  # everything, in full size and on every guest kernel
	VFSD_TEST_FULL=1 $(BIN)/pytest $(PYTEST_ARGS)

.venv/fuzz: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]' && touch $@

fuzz: .venv/fuzz                # TARGET=name SECONDS=n; TARGET=name INPUT=file repeats one input. docs/fuzzing.md
	@$(BIN)/python -m tests.fuzz $(TARGET) --seconds '$(SECONDS)' $(if $(INPUT),--input '$(INPUT)')

fuzz-seeds: venv                # the seeds in tests/fuzz/corpus, written again when a target reads its input otherwise
	@$(BIN)/python -m tests.fuzz --write-seeds

demo: venv                      # SHARE=directory GUEST=uml|qemu SHELL=1
	@$(BIN)/python -m tools.demo --guest '$(GUEST)' $(if $(filter-out 0 no,$(GUEST_SHELL)),--shell)

demo-crash: venv                # a guest copies a tree while its worker is killed: KILLS_PER_SECOND=n GUEST=uml|qemu
	@$(BIN)/python -m tools.demo_crash --guest '$(GUEST)' --kills-per-second '$(KILLS_PER_SECOND)'

soak: venv                      # as long as one likes: SECONDS=n KILLS_PER_SECOND=n GUEST=uml|qemu; or REQUESTS=n without a guest
	@$(BIN)/python -m tools.soak $(if $(REQUESTS),--requests '$(REQUESTS)',--guest '$(GUEST)' --seconds '$(SECONDS)' --kills-per-second '$(KILLS_PER_SECOND)')

bench: venv
	@$(BIN)/python -m tools.bench $(BENCH_ARGS)

coverage-record: venv           # which rules of the system call policy the tests' daemons exercise; minutes
	@$(BIN)/python tools/record_coverage

audit: venv                     # everything that speaks for the confinement, tried now and here: a report of one page; AUDIT_ARGS=--full
	@$(BIN)/python -m tools.audit $(AUDIT_ARGS)

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
