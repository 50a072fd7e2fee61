#!/usr/bin/env bash
# Builds the libFuzzer programs of Fuzz/ and runs them side by side, as many at a time as there are processors.
#
# usage: fuzz.sh SECONDS [TARGET...]
#
# The committed corpus (Fuzz/corpus/TARGET) is only read; what a run discovers is kept in .build/fuzz/corpus/TARGET for
# the next one. An input that breaks something is written to .build/fuzz/findings.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=$1
shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for directory in Fuzz/Fuzz*/; do targets+=("$(basename "$directory")"); done
fi

build=.build/fuzz
# `--sanitize fuzzer` lets libFuzzer's main be; the flags behind it add AddressSanitizer.
for target in "${targets[@]}"; do
    QBD_FUZZ=1 swift build -c release --scratch-path $build --product "$target" --sanitize fuzzer \
        -Xswiftc -sanitize=fuzzer,address -Xcc -fsanitize=fuzzer-no-link,address
done

# Swift's own crash handler would come before libFuzzer's, which keeps the input.
export SWIFT_BACKTRACE=enable=no
mkdir -p $build/findings

run() {
    local target=$1 found=$build/corpus/$1 dictionary=()
    mkdir -p "$found"
    [ ! -f "Fuzz/dictionaries/$target" ] || dictionary=("-dict=Fuzz/dictionaries/$target")
    $build/release/"$target" "$found" "Fuzz/corpus/$target" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=2048 -artifact_prefix="$build/findings/$target-" -print_final_stats=1 \
        "${dictionary[@]}" >"$build/$target.log" 2>&1
}

echo "fuzz: ${targets[*]}, $seconds s each"
running=()
failed=()
collect() {
    local target=${running[0]%%:*} pid=${running[0]##*:}
    running=("${running[@]:1}")
    if wait "$pid"; then
        printf 'fuzz: %s: no finding, %s\n' "$target" "$(sed -n 's/^Done \(.*\)/\1/p' "$build/$target.log")"
    else
        failed+=("$target")
        tail -n 60 "$build/$target.log"
        printf 'fuzz: %s: FINDING, see above and %s; again with\n  %s FILE\nwhere FILE is the input it wrote to %s\n' \
            "$target" "$build/$target.log" "$build/release/$target" "$build/findings"
    fi
}
for target in "${targets[@]}"; do
    [ ${#running[@]} -lt "$(nproc)" ] || collect
    run "$target" &
    running+=("$target:$!")
done
while [ ${#running[@]} -gt 0 ]; do collect; done
[ ${#failed[@]} -eq 0 ]
