#!/usr/bin/env bash
# All that goes wrong, at length, and one table of it: faults, operations, what was compared, losses.
#
#     torture.sh VENV OUT [TEST…]         OUT is a directory for the table and the logs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- crash faulty_disk full_disk hostile shared running many model never_lost

export TORTURE=1 TORTURE_TABLE=$out/table.tsv BOXLITE_PYTHON=$venv/bin/python
export MODEL_STEPS=${MODEL_STEPS:-10000}
rm -f "$TORTURE_TABLE"
cargo build --workspace --features crash-points
status=0
for test; do
    echo "torture: $test"
    if ! cargo test --features crash-points --test "$test" -- --nocapture >"$out/$test.log" 2>&1; then
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
