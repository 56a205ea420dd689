#!/usr/bin/env bash
# Builds the fuzz targets and lets them run, one on each processor.
#
#     run.sh OUT SECONDS [TARGET…]        for so long, beginning with what earlier runs have found
#     run.sh OUT build                    only builds them
#     run.sh OUT INPUT TARGET             for one input, as often as it fails
#
# OUT is a directory for all it makes. What a target fails at is kept in OUT/failed/TARGET.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

mkdir -p "$1"
out=$(cd "$1" && pwd)
what=$2
shift 2
[ $# -gt 0 ] || set -- guest chain archive manifest

# Hangs are what takes ten seconds. The largest that anything may keep is some tens of MiB; besides,
# the fuzzer itself keeps its inputs.
limits='-timeout=10 -rss_limit_mb=512 -len_control=10'
declare -A longest=([guest]=400 [chain]=32768 [archive]=65536 [manifest]=4096)

fuzz() {
    local verb=$1
    shift
    # No sanitizer, which needs no other compiler than the stable one: the code is safe Rust. Overflow
    # checks are on.
    # In 16 units, since one would keep but one processor busy.
    cargo fuzz "$verb" --fuzz-dir tests/fuzz --target-dir "$out/build" --sanitizer none \
        --codegen-units 16 "$@"
}

install_cargo_fuzz() {
    local version=0.13.2
    export PATH=$out/tools/bin:$PATH
    if [ "$(cargo fuzz --version 2>/dev/null)" != "cargo-fuzz $version" ]; then
        echo "fuzz: installing cargo-fuzz $version into $out/tools"
        # Unoptimised, since that is quicker here and it only starts others.
        CARGO_TARGET_DIR=$out/tools/build cargo install --quiet --locked --debug \
            --root "$out/tools" "cargo-fuzz@$version"
    fi
}

build() {
    # The same versions of everything as in what is built for use.
    cp Cargo.lock tests/fuzz/Cargo.lock
    fuzz build
}

# One target, its log in a file; the end of that is shown.
run() {
    local target=$1 failed=$out/failed/$1 corpus=$out/corpus/$1 log=$out/$1.log
    mkdir -p "$failed" "$corpus"
    # shellcheck disable=SC2086 # one word a limit
    if fuzz run "$target" "$corpus" "$out/made/seeds/$target" -- $limits "-artifact_prefix=$failed/" \
        "-max_len=${longest[$target]}" "-max_total_time=$what" -print_final_stats=1 >"$log" 2>&1; then
        echo "fuzz: $target: $(grep -o '#[0-9]*[[:space:]]DONE.*' "$log")"
    else
        # What it says of itself; the fuzzer's own progress and cargo's backtrace are not of interest.
        grep -v -e '^#' -e NEW_FUNC "$log" | sed '/^Stack backtrace:/,$d' | tail -n 60
        base64 -w 120 "$failed"/* | head -n 400
        echo "fuzz: $target FAILED, see $log; again: make fuzz FUZZ_TARGETS=$target FUZZ_INPUT=…" >&2
        return 1
    fi
}

install_cargo_fuzz
build
[ "$what" != build ] || exit 0
[ -d "$out/made" ] || python3 tests/fuzz/seeds.py "$out/made"
export BOXLITEFS_FUZZ_MADE=$out/made
# What is looked at is written for each input, and flushed: to memory where there is a file system.
TMPDIR=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

if [ -f "$what" ]; then
    # shellcheck disable=SC2086
    fuzz run "$1" "$what" -- $limits
    exit
fi
processors=$(nproc)
status=0
running=0
for target; do
    run "$target" &
    running=$((running + 1))
    if [ "$running" -ge "$processors" ]; then
        wait -n || status=1
        running=$((running - 1))
    fi
done
while [ "$running" -gt 0 ]; do
    wait -n || status=1
    running=$((running - 1))
done
exit "$status"
