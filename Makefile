# What there is to do with this project. `make` alone lists it.

CARGO ?= cargo
BEACON = --manifest-path guest-images/beacon/Cargo.toml

.PHONY: help demo test check unit smoke guest-images bench bench-migration build clean

help:
	@echo 'make demo   build, boot the built-in guest, save it, restore it in a new process, verified'
	@echo 'make test   format, lints, unit tests, and the tests on /dev/kvm'
	@echo 'make smoke  real Linux guests, on hardware virtualization or in an emulated machine (the lab)'
	@echo 'make bench  start-up, memory, exits, save and restore, beside QEMU where it has the like'
	@echo 'make bench-migration   live migration beside QEMU, with the targets; about half an hour'
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
	tests/run.sh $(CARGO)

# Also part of `make test`.
smoke: guest-images
	$(CARGO) build --locked -p vmm
	$(CARGO) test --locked -p tests --test smoke

# The distribution's kernel and busybox, downloaded and unpacked; built again when they are newer.
guest-images:
	guest-images/linux/build.sh target/guest-images/linux

bench: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench

# ARGS='--quick' for a look; ARGS=--help for what there is.
bench-migration: build
	$(CARGO) run --release --locked --quiet -p tests --bin bench-migration -- $(ARGS)

clean:
	$(CARGO) clean
	$(CARGO) clean $(BEACON)
