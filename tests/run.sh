#!/usr/bin/env bash
# Runs all tests and counts them: `N passed, N failed, N skipped` is the last line.
# Usage: tests/run.sh [CARGO]
set -u -o pipefail
cargo=${1:-cargo}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$cargo" test --workspace --locked --no-fail-fast 2>&1 | tee -a "$log" || status=$?
"$cargo" test --manifest-path guest-images/beacon/Cargo.toml --locked --no-fail-fast 2>&1 |
    tee -a "$log" || status=$?
awk -v status="$status" '
    /^test result:/ {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) ~ /^passed/) passed += $i
            if ($(i + 1) ~ /^failed/) failed += $i
            if ($(i + 1) ~ /^ignored/) skipped += $i
        }
    }
    END {
        # A test program that died before it counted is a failure too.
        if (status != 0 && failed == 0) failed = 1
        printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
        exit (status != 0 || passed == 0)
    }' "$log"
