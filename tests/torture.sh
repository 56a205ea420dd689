#!/usr/bin/env bash
# Runs all fault tests at full length and tabulates faults, operations, comparisons and losses.
#
#     torture.sh VENV OUT [TEST…]         OUT is a directory for the table and the logs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- named_points random_moments power_loss io_errors full_disk hostile shared running \
    real_guest many races model never_lost boxlite_0_11

export EXTENT=whole TORTURE_TABLE=$out/table.tsv BOXLITE_PYTHON=$venv/bin/python
export NEXTEST_PROFILE=torture MODEL_STEPS=${MODEL_STEPS:-10000}
rm -f "$TORTURE_TABLE"
cargo build --workspace
status=0

# Runs 32 processes at once against a program built with ThreadSanitizer, which exits with its own
# status after a race. The standard library is not instrumented; the fence in Arc's drop, which
# ThreadSanitizer cannot see, is suppressed.
races() {
    local target program
    target=$(rustc -vV | sed -n 's/^host: //p')
    program=$out/tsan/$target/debug/boxlitefs
    RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer' \
        cargo build --target "$target" --target-dir "$out/tsan" &&
        BOXLITEFS_PROGRAM=$program TSAN_OPTIONS="suppressions=$PWD/tests/torture.tsan exitcode=66" \
            cargo test --test faults -- --nocapture changes_by_32_processes
}

# Runs what happens beside BoxLite, and between two runs of it, with its version 0.11.0 as the judge:
# `boxlite serve`, built without the parts of the virtual machine.
boxlite_0_11() {
    command -v protoc >/dev/null || apt-get install -q -y --no-install-recommends protobuf-compiler
    BOXLITE_DEPS_STUB=1 cargo install --quiet --locked --root "$out/boxlite" --target-dir "$out/boxlite/build" \
        boxlite-cli@0.11.0 &&
        BOXLITE_CLI=$out/boxlite/bin/boxlite tests/run shared:: beside_boxlite:: moved_homes::
}

for test; do
    echo "torture: $test"
    if [ "$test" = races ] || [ "$test" = boxlite_0_11 ]; then
        "$test" >"$out/$test.log" 2>&1 || { status=1; echo "torture: $test FAILED, see $out/$test.log" >&2; }
    elif ! tests/run "$test::" >"$out/$test.log" 2>&1; then
        status=1
        tail -n 40 "$out/$test.log"
        echo "torture: $test FAILED, see $out/$test.log" >&2
    fi
done
{
    printf 'what\tfaults\toperations\tcompared\tlosses\n'
    cat "$TORTURE_TABLE"
    awk -F'\t' '{ for (n = 2; n <= 5; n++) sum[n] += $n } END { printf "together\t%d\t%d\t%d\t%d\n", sum[2], sum[3], sum[4], sum[5] }' "$TORTURE_TABLE"
} | column -t -s$'\t'
exit "$status"
