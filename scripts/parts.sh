#!/usr/bin/env bash
# Makes targets of the Makefile one after the other, and says at the end what each took and what came out.
#
# usage: parts.sh NAME [--all] [--beside TARGET] TARGET...
#
# The first that fails is the last, or with --all all of them run. One after --beside runs together with those behind
# it, in the background: what it prints is in .build/logs/TARGET.log, of which the end is shown when it fails.
set -uo pipefail
# Each target is a process group of its own, which a signal to this script ends. The shell would have targets ignore
# Ctrl-C otherwise, and tests that need it with them.
set -m
cd "$(dirname "$0")/.."

name=$1
shift
logs=.build/logs
mkdir -p $logs
all=
beside=
# Of what runs now.
pid=
beside_pid=
failed=()
table=()
closing=()

# No target, and no virtual machine of one, is left behind, however this ends.
stop() {
    for group in $pid $beside_pid; do kill -TERM -- "-$group" 2>/dev/null; done
    for group in $pid $beside_pid; do wait "$group"; done
    pid=
    beside_pid=
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

run() {
    local status=0
    make --no-print-directory "$1" || status=$?
    date +%s >"$logs/$1.end"
    return $status
}

# What the tests' own programs say at their end; continuous integration reads these lines.
closing_lines() {
    case $1 in
        unit) grep -h 'Test run with' $logs/unit.log | tail -n 1 ;;
        integration | integration-long) tail -n 1 "$logs/$1.log" ;;
        vm) grep -hE '^=+ .* (passed|failed)' $logs/vm.log ;;
    esac
}

note() {
    local target=$1 seconds=$2 status=$3 verdict=passed lines
    [ "$status" -eq 0 ] || { verdict=FAILED && failed+=("$target"); }
    lines=$(closing_lines "$target")
    [ -z "$lines" ] || closing+=("$lines")
    table+=("$(printf '  %-16s %3d:%02d  %s' "$target" $((seconds / 60)) $((seconds % 60)) "$verdict")")
}

finish_beside() {
    [ -n "$beside_pid" ] || return 0
    local status=0
    wait "$beside_pid" || status=$?
    beside_pid=
    note "$beside" $(($(cat "$logs/$beside.end") - began_beside)) $status
    [ $status -eq 0 ] || { echo "--- the end of $logs/$beside.log" && tail -n 60 "$logs/$beside.log"; }
}

report() {
    finish_beside
    printf '\n%s: what each part took\n' "$name"
    printf '%s\n' "${table[@]}"
    printf '%s\n' ${closing[@]+"${closing[@]}"}
    if [ ${#failed[@]} -gt 0 ]; then
        echo "$name: FAILED: ${failed[*]}"
        exit 1
    fi
    printf '\n%s: all of it passed in %d:%02d\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
    exit 0
}

while [ $# -gt 0 ]; do
    case $1 in
        --all) all=yes ;;
        --beside)
            shift
            beside=$1
            began_beside=$(date +%s)
            echo "$name: $beside runs beside what follows; $logs/$beside.log has what it prints"
            run "$beside" >/dev/null 2>&1 </dev/null &
            beside_pid=$!
            ;;
        *)
            began=$SECONDS
            status=0
            printf '\n%s: %s\n' "$name" "$1"
            run "$1" </dev/null &
            pid=$!
            wait "$pid" || status=$?
            pid=
            note "$1" $((SECONDS - began)) $status
            if [ $status -ne 0 ] && [ -z "$all" ]; then
                stop
                report
            fi
            ;;
    esac
    shift
done
report
