# What there is to do with this project. `make` alone lists it.

CARGO ?= cargo
BEACON = --manifest-path guest-images/beacon/Cargo.toml

.PHONY: help demo test check unit smoke lab guest-images bench bench-linux bench-migration bench-postcopy bench-network fuzz soak build clean

help:
	@echo 'make demo   build, boot the built-in guest, move it live to another process, verified, and on by post-copy'
	@echo 'make test   format, lints, unit tests, and the tests on /dev/kvm'
	@echo 'make smoke  real Linux guests, on hardware virtualization or in an emulated machine (the lab)'
	@echo 'make lab    a shell in that machine, with minivmm; CMD=... runs a command there'
	@echo 'make bench  start-up, memory, exits, save and restore, beside QEMU where it has the like'
	@echo 'make bench-migration   live migration beside QEMU, with targets, half an hour; ARGS=--quick for a look'
	@echo 'make bench-postcopy   post-copy beside QEMU, with targets, half an hour; ARGS=--quick for a look'
	@echo 'make bench-network   traffic of a guest that moves, beside QEMU, with targets, half an hour; ARGS=--quick for a look'
	@echo 'make fuzz   the fuzz targets of devices, engine and VMM, FUZZ_SECONDS (60) each; needs cargo-fuzz'
	@echo 'make soak   every fault in every phase of a migration, every way of post-copy, then 50 moves of one VM with faults on the way; half an hour'
	@echo 'make build  the release binary, target/release/minivmm'

build:
	$(CARGO) build --release --locked -p vmm

demo: build
	$(CARGO) run --release --locked --quiet -p tests --bin demo

test: check unit

check:
	$(CARGO) fmt --all --check
	$(CARGO) fmt $(BEACON) --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) clippy $(BEACON) --all-targets --locked -- -D warnings

# The tests drive the built program, so it is built first. The last line counts all of them;
# a test that needs what this machine lacks is counted as skipped.
unit:
	$(CARGO) build --workspace --bins --locked
	$(MAKE) guest-images || echo 'No Linux image: the smoke tests are skipped.'
	tests/run.sh $(CARGO)

# Also part of `make test`.
smoke: guest-images
	$(CARGO) build --locked -p vmm
	$(CARGO) test --locked -p tests --test smoke --test smoke_network

# The distribution's kernel and busybox, downloaded and unpacked; built again when they are newer.
guest-images:
	guest-images/linux/build.sh target/guest-images/linux

# A shell, or a command, in the machine that the smoke tests run in.
lab: guest-images
	$(CARGO) build --locked -p vmm -p tests --bins
	target/debug/lab $(if $(CMD),'$(subst ','\'',$(CMD))')

bench: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench

# See devices/fuzz/README.md. The sanitizers are unstable options of a stable compiler.
FUZZ_SECONDS ?= 60
fuzz: export RUSTC_BOOTSTRAP = 1
fuzz:
	for folder in devices:2048 migration:2048 vmm:12288; do (cd $${folder%:*}/fuzz && for target in $$($(CARGO) fuzz list); do \
	    $(CARGO) fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=$${folder#*:} -len_control=0 || exit 1; \
	done) || exit 1; done

# A part of it: Linux to its first process, beside QEMU. Without virtualization, in the lab.
bench-linux: build guest-images
	$(CARGO) run --release --locked --quiet -p tests --bin bench -- linux

# Post-copy beside QEMU's; the guest that is not migrated is there for its gaps.
bench-postcopy: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench-migration -- --parts cells --subjects baseline,postcopy $(ARGS)

# ARGS='--quick' for a look; ARGS=--help for what there is.
bench-migration: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench-migration -- $(ARGS)

# ARGS='--quick' for a look; ARGS=--help for what there is.
bench-network: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench-network -- $(ARGS)

# SOAK_SEED=... makes the choices of another run again; SOAK_MOVES=500; ARGS=--help for what there is. Not the release
# profile: its assertions are wanted, and what a process says when it fails.
soak:
	$(CARGO) build --locked -p vmm
	$(CARGO) run --locked --quiet -p tests --bin soak -- $(ARGS)

clean:
	$(CARGO) clean
	$(CARGO) clean $(BEACON)
