# What one can do with this tree; `make help` lists it. Everything is built with one configuration, so that the
# dependencies are compiled once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:

# Debian's python3 is the one that python3-libnbd and python3-pytest belong to.
PYTHON ?= /usr/bin/python3
DESTDIR ?=
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
# Seconds of `make fuzz` for each target.
FUZZ_SECONDS ?= 600
FUZZ_SHORT_SECONDS ?= 30
FUZZ_LONG_SECONDS ?= 150
# A commit that `make bench` compares this tree with, in place of the peers.
BASE ?=
# Options for `make bench`, as in BENCH="--suite onehop-memory --seconds 10", and for pytest, as in PYTEST="-m long".
BENCH ?=
PYTEST ?=
# For Tests/VM/run; its --help lists options.
VM ?=

BIN := .build/release
LOGS := .build/logs
# Where bash-completion and zsh look, below PREFIX/share.
COMPLETIONS := bash:bash-completion/completions/qbd zsh:zsh/site-functions/_qbd
FORMATTED := Package.swift Sources Tests Fuzz Benchmarks

# What is needed, for scripts/need.sh. A target asks for all of it at its start, so that apt runs once.
BUILDING := swift git liburing-dev libzookeeper-mt-dev gcc:cc libc6-dev libstdc++-12-dev
CLIENTS := libnbd-bin:nbdcopy python3 python3-libnbd nbdkit:nbdkit qemu-utils:qemu-io fio:fio
MACHINE := qemu-system-x86 busybox-static cpio kmod nbd-client dmsetup e2fsprogs xfsprogs btrfs-progs:mkfs.btrfs fdisk systemd binutils:strip
NEED_BUILD := scripts/need.sh "build qbd" $(BUILDING)
NEED_DEMO := scripts/need.sh "run the demo" $(BUILDING) libnbd-bin:nbdcopy python3 python3-libnbd
NEED_BENCH := scripts/need.sh "measure beside the peers" $(BUILDING) $(CLIENTS)
# ZooKeeper's server, without the package that makes a user for it.
ZOOKEEPER := libzookeeper-java default-jre-headless:java python3-kazoo
NEED_TESTS := scripts/need.sh "run all tests" $(BUILDING) $(CLIENTS) $(ZOOKEEPER) python3-pytest mandoc:mandoc strace:strace zsh:zsh $(MACHINE)
NEED_VM := scripts/need.sh "run a virtual machine" $(BUILDING) $(CLIENTS) python3-pytest $(MACHINE)

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: need-demo need-bench need-tests
need-demo:
	@$(NEED_DEMO)
need-bench:
	@$(NEED_BENCH)
need-tests:
	@$(NEED_TESTS)

# Building

.PHONY: build
build: ## Build qbd, qbdd and qbd-store, optimised, into .build/release
	@$(NEED_BUILD)
	swift build -c release

.PHONY: build-tests
build-tests:
	@$(NEED_BUILD)
	swift build -c release --build-tests

.PHONY: install
install: ## Install programs, man pages, completions, units and configuration (DESTDIR, PREFIX, SYSCONFDIR)
	@scripts/need.sh "install qbd" binutils:strip
	@test -x $(BIN)/qbd -a -x $(BIN)/qbdd -a -x $(BIN)/qbd-store || { echo "make install: nothing is built yet; run 'make build' first" >&2; exit 1; }
	install -D -m 0755 -s $(BIN)/qbd $(DESTDIR)$(PREFIX)/bin/qbd
	install -D -m 0755 -s $(BIN)/qbdd $(DESTDIR)$(PREFIX)/sbin/qbdd
	install -D -m 0755 -s $(BIN)/qbd-store $(DESTDIR)$(PREFIX)/sbin/qbd-store
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/man/man8 man/*.8
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/man/man5 man/*.5
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/man/man7 man/*.7
	install -D -m 0644 -t $(DESTDIR)$(SYSCONFDIR)/udev/rules.d etc/udev/*.rules
	install -D -m 0644 -t $(DESTDIR)$(SYSCONFDIR)/systemd/system etc/systemd/*.service
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/lib/qbd etc/systemd/unmap-at-shutdown
	sed -i 's|/usr/local/|$(PREFIX)/|' $(DESTDIR)$(SYSCONFDIR)/systemd/system/qbdd.service \
		$(DESTDIR)$(SYSCONFDIR)/systemd/system/qbd-map.service $(DESTDIR)$(PREFIX)/lib/qbd/unmap-at-shutdown
	@for name in qbd.conf map.conf; do conf=$(DESTDIR)$(SYSCONFDIR)/neonsan/$$name; \
	if [ -e "$$conf" ]; then echo "$$conf is there and stays as it is"; \
	else echo "install -D -m 0644 etc/$$name $$conf"; install -D -m 0644 etc/$$name "$$conf"; fi; done
	@for shell in $(COMPLETIONS); do file=$(DESTDIR)$(PREFIX)/share/$${shell#*:}; mkdir -p "$${file%/*}"; \
	echo "qbd --generate-completion-script $${shell%%:*} >$$file"; \
	$(BIN)/qbd --generate-completion-script $${shell%%:*} >"$$file"; chmod 0644 "$$file"; done

.PHONY: clean
clean: ## Remove everything that was built
	rm -rf .build

# Looking at it

.PHONY: demo
demo: need-demo build ## Show a volume from its creation to its end, with a daemon of its own
	@PYTHON=$(PYTHON) scripts/demo.sh $(BIN)

.PHONY: bench
bench: need-bench .build/malloc_count.so ## Measure beside nbdkit and qemu-nbd, or beside BASE=COMMIT (BENCH="--help" lists options)
	QBD_BENCH=1 swift build -c release
	$(PYTHON) Benchmarks/$(if $(BASE),compare.py $(BASE),bench.py) $(BENCH)

.build/malloc_count.so: Benchmarks/malloc_count.c
	@mkdir -p $(@D)
	cc -std=c11 -O2 -Wall -Wextra -Werror -fPIC -shared -o $@ $<

# Testing

# The parts of `test` and `test-long`, for scripts/parts.sh. Those behind --beside NAME run beside that one.
TEST_PARTS := check build-tests fuzz-short unit --beside vm integration faults-short
LONG_PARTS := build-tests --beside vm-long faults integration-long fuzz-long test-address test-thread

.PHONY: test test-long
test: need-tests ## All tests: checks, short fuzzing, unit, integration, some faults, devices in a virtual machine
	@scripts/parts.sh "make test" $(TEST_PARTS)
test-long: need-tests ## What takes longer: all faults, long tests, longer fuzzing, the sanitizers (up to 90 minutes)
	@scripts/parts.sh "make test-long" --all $(LONG_PARTS)

.PHONY: test-unit
test-unit: build-tests unit ## Only the unit tests

.PHONY: test-integration
test-integration: need-tests build integration ## Only the tests of the programs from outside (PYTEST="-k name", PYTEST="-m long")

# Without a build of their own, so that `test` builds once, with --build-tests.
.PHONY: unit integration integration-long
unit:
	@mkdir -p $(LOGS)
	swift test -c release --disable-testable-imports --skip-build --disable-xctest 2>&1 | tee $(LOGS)/unit.log
integration:
	@mkdir -p $(LOGS)
	QBD_BIN_DIR=$(BIN) $(PYTHON) -m pytest $(PYTEST) Tests/Integration 2>&1 | tee $(LOGS)/integration.log

integration-long:
	@mkdir -p $(LOGS)
	QBD_BIN_DIR=$(BIN) $(PYTHON) -m pytest -m long $(PYTEST) Tests/Integration 2>&1 | tee $(LOGS)/integration-long.log

.PHONY: need-vm test-vm vm vm-long vm-shell
need-vm:
	@$(NEED_VM)
test-vm: need-vm build vm ## Only the tests of devices, in a virtual machine (VM="test_unmap.py", VM="-- -k name")
vm:
	@mkdir -p $(LOGS)
	QBD_BIN_DIR=$(BIN) Tests/VM/run $(VM) 2>&1 | tee $(LOGS)/vm.log
vm-long:
	@mkdir -p $(LOGS)
	QBD_BIN_DIR=$(BIN) Tests/VM/run --timeout 3600 test_pool_file_systems.py -- -m long 2>&1 | tee $(LOGS)/vm-long.log
vm-shell: need-vm build ## A shell in that virtual machine, which sees this file system, read-only
	QBD_BIN_DIR=$(BIN) Tests/VM/run --shell $(VM)

.PHONY: test-sanitize test-address test-thread
test-sanitize: test-address test-thread ## Unit and integration tests under AddressSanitizer and ThreadSanitizer
test-address test-thread: test-%:
	@$(NEED_TESTS)
	PYTHON=$(PYTHON) scripts/sanitize.sh $* $(PYTEST)

# Each system call of the daemon that touches a file fails in turn, and kills it. Not with a build of their own.
.PHONY: faults faults-short
faults: .build/faults ## Fail each system call of the daemon in turn, and kill it at each change (FAULTS="--only create")
	QBD_BIN_DIR=$(BIN) $(PYTHON) Tests/Faults/sweep.py $(or $(FAULTS),--all)
faults-short: .build/faults
	QBD_BIN_DIR=$(BIN) $(PYTHON) Tests/Faults/sweep.py --budget 150

.build/faults: Tests/Faults/faults.c
	@mkdir -p $(@D)
	cc -std=c11 -O2 -Wall -Wextra -Werror -o $@ $<

.PHONY: check check-format check-man
check: check-format check-man ## Format of the Swift sources, and the man pages
check-format:
	@scripts/need.sh "check the format" swift
	swift format lint --strict --parallel --recursive $(FORMATTED)
check-man:
	@scripts/need.sh "check the man pages" mandoc:mandoc
	mandoc -T lint -W warning man/*.[578]

.PHONY: format
format: ## Format the Swift sources in place
	@scripts/need.sh "format" swift
	swift format --in-place --parallel --recursive $(FORMATTED)

.PHONY: fuzz fuzz-short fuzz-long
fuzz: ## Fuzz the parsers, FUZZ_SECONDS (600) each
	@$(NEED_BUILD)
	scripts/fuzz.sh $(FUZZ_SECONDS)
fuzz-short:
	@$(NEED_BUILD)
	scripts/fuzz.sh $(FUZZ_SHORT_SECONDS)
fuzz-long:
	@$(NEED_BUILD)
	scripts/fuzz.sh $(FUZZ_LONG_SECONDS)
