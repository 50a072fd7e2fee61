#!/usr/bin/env bash
# Runs the unit and integration tests under a sanitizer and fails when a test fails or anything was reported, by
# whatever process.
#
# usage: sanitize.sh address|thread [PYTEST-OPTION...]
#
# Debug builds, each with a build directory of its own (.build/asan, .build/tsan).
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizer=$1
shift
case $sanitizer in
    address) build=.build/asan ;;
    thread) build=.build/tsan ;;
    *) echo "usage: sanitize.sh address|thread [PYTEST-OPTION...]" >&2 && exit 64 ;;
esac
reports=$PWD/$build/reports
rm -rf "$reports"
mkdir -p "$reports"

# Swift's own crash handler would hide what the sanitizer has to say.
export SWIFT_BACKTRACE=enable=no
# Swift keeps type metadata for ever where LeakSanitizer does not look; memory that grows is what the test of ten
# thousand connections is for.
# What was freed is kept for some time, and tests that measure memory allow for no more of it than this.
export ASAN_OPTIONS=log_path=$reports/address:detect_leaks=0:detect_stack_use_after_return=1:quarantine_size_mb=8
# No thread of ours is of interest when a program ends, for which each would wait a second.
export TSAN_OPTIONS=log_path=$reports/thread:halt_on_error=0:second_deadlock_stack=1:atexit_sleep_ms=0

swift build --build-tests --scratch-path "$build" --sanitize "$sanitizer"
preload=()
if [ "$sanitizer" = thread ]; then
    clang=$(dirname "$(readlink -f "$(command -v swift)")")/clang
    "$clang" -std=c11 -O1 -Wall -Wextra -Werror -fPIC -shared -o "$build/tsan_swift.so" scripts/tsan_swift.c
    preload=("LD_PRELOAD=$PWD/$build/tsan_swift.so")
fi
status=0
env "${preload[@]}" swift test --scratch-path "$build" --sanitize "$sanitizer" --skip-build --disable-xctest || status=1
env "${preload[@]}" QBD_BIN_DIR="$build/debug" "${PYTHON:-/usr/bin/python3}" -m pytest "$@" Tests/Integration ||
    status=1

shopt -s nullglob
for report in "$reports"/*; do
    status=1
    echo "--- $report"
    cat "$report"
done
if [ $status -eq 0 ]; then
    echo "test-$sanitizer: every test passed, and the $sanitizer sanitizer has reported nothing"
else
    echo "test-$sanitizer: FAILED, see above" >&2
fi
exit $status
