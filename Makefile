# `make help` lists the targets.

PREFIX ?= /usr/local
DESTDIR ?=
# mount(8) searches only there for mount.boxlite. Cargo builds it as mount-boxlite, since it allows no dot.
SBINDIR ?= /sbin
# The build to make and install: release, or debug, which has the crash points of the tests.
BUILD ?= release

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
BUILT := $(TARGET)/$(BUILD)
VENV := $(abspath target/venv)
CARGO_DEB := 3.8.0
# Of each fuzz target.
FUZZ_SECONDS ?= 600

.PHONY: help setup build check test test-all test-rest model fuzz torture demo bench screenshots install uninstall deb fresh-machine clean fmt

help:
	@echo 'make build                 boxlitefs, mount-boxlite, manual and completions, in $(BUILT)'
	@echo 'make check                 formatting, lints, and the tests that need no program but Rust'
	@echo 'make test                  and the tests that judge a change: real mounts, BoxLite, faults'
	@echo '     [T=NAME]              only tests with NAME in their names, with their output'
	@echo 'make test-all              and the rest: every program, longer slices, a new Debian, fuzzing'
	@echo 'make model                 random sequences of all changes, against a model of the disks'
	@echo '     [MODEL_STEPS=10000]   [MODEL_SEED=...] repeats a failure; make test-all runs 2000 steps'
	@echo 'make fuzz                  feeds damaged disks and archives to their readers; tests/fuzz'
	@echo '     [FUZZ_SECONDS=$(FUZZ_SECONDS)]    for each; FUZZ_TARGETS="guest chain archive manifest"'
	@echo '     [FUZZ_INPUT=FILE]     runs the input again that a target failed at'
	@echo 'make torture               kills, power loss, full disks, damaged archives, concurrency: at length, and a table'
	@echo '     [TORTURE_TESTS="power_loss many"]'
	@echo 'make demo [KEEP=1]         a walk through a throwaway home; KEEP=1 leaves it mounted'
	@echo 'make bench                 costs beside BoxLite, qemu-img and cp; docs/performance.md'
	@echo '     [BENCH_SIZE=2150]     MiB in the large box; BENCH_ROUNDS=3; UPDATE_DOCS=1 keeps the table'
	@echo 'make screenshots           docs/file-manager.png, docs/dragging.png: a file manager in a mount'
	@echo 'make install [PREFIX=$(PREFIX)] [SBINDIR=$(SBINDIR)] [DESTDIR=]'
	@echo 'make uninstall             the same arguments; removes the installed files'
	@echo 'make deb                   a package for Debian and Ubuntu, in target/debian'
	@echo 'make fresh-machine         installs and uses the package on a new Debian, as README.md says'
	@echo 'make setup                 installs what the tests need: programs (apt-get) and BoxLite (pip)'
	@echo 'make fmt, make clean'

setup:
	@tests/setup.sh $(VENV) all

# A debug build is that of the tests: without them, it would have other features and be built again.
build:
	$(if $(filter release,$(BUILD)),cargo build --workspace --release,tests/run build)
	$(BUILT)/manual $(BUILT)/share

.PHONY: lint
lint:
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	tests/run lint

check: lint
	tests/run check

# T=NAME: the tests with NAME in their names, with their output.
test:
	@tests/setup.sh $(VENV) test
ifdef T
	tests/run $(T)
else
	$(MAKE) --no-print-directory lint
	tests/run test
endif

test-all: test
	$(MAKE) --no-print-directory test-rest

# The rest of `make test-all`. The package is that of the debug build, which exists already. The fuzz
# targets are built meanwhile: the tests leave the processors idle for a third of the time.
test-rest: setup
	@mkdir -p $(TARGET)/fuzz; \
	nice -n 19 tests/fuzz/run.sh $(TARGET)/fuzz build >$(TARGET)/fuzz/build.log 2>&1 & building=$$!; \
	tests/run rest; tested=$$?; \
	wait $$building || { cat $(TARGET)/fuzz/build.log; exit 1; }; \
	exit $$tested
	$(MAKE) --no-print-directory fresh-machine BUILD=debug
	$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=15

model: export NEXTEST_PROFILE := torture
model: export MODEL_STEPS := $(or $(MODEL_STEPS),10000)
model: setup
	tests/run model::

# Continues from what earlier runs found, in $(TARGET)/fuzz.
fuzz: setup
	tests/fuzz/run.sh $(TARGET)/fuzz $(or $(FUZZ_INPUT),$(FUZZ_SECONDS)) $(FUZZ_TARGETS)

# Takes some hours; make test runs a slice of each.
torture: setup
	tests/torture.sh $(VENV) $(TARGET)/torture $(TORTURE_TESTS)

demo:
	@tests/setup.sh $(VENV) demo
	@$(MAKE) --no-print-directory build
	@PATH="$(TARGET)/release:$$PATH" BOXLITE_PYTHON=$(VENV)/bin/python KEEP=$(KEEP) tests/demo.sh

bench: export BENCH_SIZE := $(BENCH_SIZE)
bench: export BENCH_ROUNDS := $(BENCH_ROUNDS)
bench: setup build
	floor=$$(cargo bench --no-run --bench floor --message-format json | sed -n 's/.*"name":"floor".*"executable":"\([^"]*\)".*/\1/p') && \
	$(VENV)/bin/python tests/bench/bench.py --boxlitefs $(TARGET)/release/boxlitefs --floor "$$floor" \
		--out $(TARGET)/bench $(if $(UPDATE_DOCS),--update-docs)

screenshots: setup build
	PATH="$(TARGET)/release:$$PATH" tests/desktop/screenshots.sh $(VENV)/bin/python docs

# Does not build, so that `sudo make install` runs no compiler as root.
install:
	@test -x $(BUILT)/boxlitefs && test -d $(BUILT)/share || { echo 'run `make build` first' >&2; exit 1; }
	install -D -m 0755 $(BUILT)/boxlitefs $(DESTDIR)$(PREFIX)/bin/boxlitefs
	install -D -m 0755 $(BUILT)/mount-boxlite $(DESTDIR)$(SBINDIR)/mount.boxlite
	ln -sf mount.boxlite $(DESTDIR)$(SBINDIR)/mount.fuse.boxlite
	cd $(BUILT)/share && find . -type f -exec install -D -m 0644 '{}' '$(abspath $(DESTDIR)/$(PREFIX))/share/{}' ';'
	install -D -m 0644 mount-helper/desktop/boxlitefs.xml $(DESTDIR)$(PREFIX)/share/mime/packages/boxlitefs.xml
	install -D -m 0644 mount-helper/desktop/boxlitefs.desktop $(DESTDIR)$(PREFIX)/share/applications/boxlitefs.desktop
	for scope in user:boxlitefs.service user:boxlitefs-snapshots.service user:boxlitefs-snapshots.timer system:boxlitefs@.service; do \
		unit=$(DESTDIR)$(PREFIX)/lib/systemd/$${scope%%:*}/$${scope##*:} && \
		install -D -m 0644 mount-helper/systemd/$${scope##*:} $$unit && \
		sed -i 's|/usr/bin/boxlitefs|$(PREFIX)/bin/boxlitefs|' $$unit || exit 1; \
	done
	for text in README.md CONTRIBUTING.md LICENSE docs/*.md docs/design/*.md docs/*.png; do \
		install -D -m 0644 $$text $(DESTDIR)$(PREFIX)/share/doc/boxlitefs/$$text || exit 1; \
	done

# Empty directories stay: they may belong to others.
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/boxlitefs $(DESTDIR)$(SBINDIR)/mount.boxlite $(DESTDIR)$(SBINDIR)/mount.fuse.boxlite
	cd $(BUILT)/share && find . -type f -exec rm -f '$(abspath $(DESTDIR)/$(PREFIX))/share/{}' ';'
	rm -f $(DESTDIR)$(PREFIX)/share/mime/packages/boxlitefs.xml $(DESTDIR)$(PREFIX)/share/applications/boxlitefs.desktop
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/user/boxlitefs-snapshots.service $(DESTDIR)$(PREFIX)/lib/systemd/user/boxlitefs-snapshots.timer
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/user/boxlitefs.service $(DESTDIR)$(PREFIX)/lib/systemd/system/boxlitefs@.service
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/boxlitefs

# The package has the files of install. mount(8) also finds its helpers in /usr/sbin: /sbin links there.
deb: export PATH := $(abspath target/tools/bin):$(PATH)
deb: build
	rm -rf target/deb target/debian
	$(MAKE) --no-print-directory install DESTDIR=$(abspath target/deb) PREFIX=/usr SBINDIR=/usr/sbin
	strip target/deb/usr/bin/boxlitefs target/deb/usr/sbin/mount.boxlite
	[ "$$(cargo deb --version 2>/dev/null | sed 's/cargo-deb //')" = $(CARGO_DEB) ] || \
		CARGO_TARGET_DIR=$(abspath target/tools/build) cargo install --quiet --locked --debug --root target/tools cargo-deb@$(CARGO_DEB)
	cargo deb --no-build --no-strip --output target/debian/
	@ls -l target/debian

fresh-machine: deb
	tests/fresh_machine.sh target/debian/boxlitefs_*.deb

fmt:
	cargo fmt --all
	cargo fmt --manifest-path tests/fuzz/Cargo.toml

clean:
	cargo clean
	rm -rf target
