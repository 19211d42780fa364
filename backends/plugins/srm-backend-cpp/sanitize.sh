#!/usr/bin/env bash
# Build with the address and undefined-behaviour sanitizers into a virtual environment of its own, run every operator on
# every small case at every level that this CPU has, and fail at the first report.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q -c "$root/constraints.txt" "$root"
"$venv/bin/pip" install -q -C cmake.define.SRM_SANITIZE=ON -C build-dir="$venv/build" -C install.strip=false "$here"

runtime() { "${CXX:-g++}" -print-file-name="$1"; }
sample() { LD_PRELOAD="$(runtime libasan.so) $(runtime libstdc++.so)" "$venv/bin/python" -P "$here/sanitize_sample.py" "$@"; }
export ASAN_OPTIONS=detect_leaks=0  # the interpreter leaks by design
export UBSAN_OPTIONS=print_stacktrace=1
cd "$venv"
levels=$(sample levels)
for level in $levels; do
    for threads in 1 3; do
        echo "x86-64 $level, $threads threads"
        SRM_CPP_LEVEL=$level OMP_NUM_THREADS=$threads sample
    done
done
echo "no reports"
