#!/usr/bin/env bash
# Runs all tests and counts them. Says at the end which failed and why, and which test programs took longest;
# `N passed, N failed, N skipped` is the last line.
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
    /^ +Running |^ +Doc-tests / { program = $2 == "unittests" ? $2 " " $3 " " $4 : $2 }
    /^test .*\.\.\. FAILED$/ { why[++failures] = program ": " $2 }
    # What the compiler or the linker says, when there is no test to run.
    /^error/ && errors++ < 20 { why[++failures] = substr($0, 1, 600) }
    # The test harness repeats what the test said; a test that is a process of its own says it once.
    /^---- .* ----$/ { said = 16; next }
    /^failures:$/ { said = 0 }
    said > 0 && NF { why[++failures] = "    " substr($0, 1, 600); said-- }
    /^test result:/ {
        if (match($0, /finished in [0-9.]+s/)) {
            seconds = substr($0, RSTART + 12, RLENGTH - 13) + 0
            if (seconds >= 30) printf "%7.1f s  %s\n", seconds, program | "sort -rn"
        }
        for (i = 1; i < NF; i++) {
            if ($(i + 1) ~ /^passed/) passed += $i
            if ($(i + 1) ~ /^failed/) failed += $i
            if ($(i + 1) ~ /^ignored/) skipped += $i
        }
    }
    END {
        close("sort -rn")
        for (i = 1; i <= failures; i++) print why[i]
        # A test program that died before it counted is a failure too.
        if (status != 0 && failed == 0) failed = 1
        printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
        exit (status != 0 || passed == 0)
    }' "$log"
