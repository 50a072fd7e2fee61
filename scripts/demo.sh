#!/usr/bin/env bash
# Shows the life of a volume: created in a pool, served, written, read back, listed, taken away again.
#
# usage: demo.sh DIRECTORY-OF-qbd-AND-qbdd
#
# The daemon is one of the demo's own, with every path in a new directory under /tmp: an installed qbdd is not touched.
set -euo pipefail

bin=$(cd "$1" && pwd)
export PATH=$bin:$PATH
home=$(mktemp -d /tmp/qbd-demo.XXXXXX)
# The command and the daemon find each other by these; an installed qbdd has its places in /run and /var/lib.
export QBD_SOCKET=$home/qbdctl.sock QBD_NBD_SOCKET=$home/nbd.sock QBD_CONFIG=$home/qbd.conf QBD_STATE=$home/state
daemon=""
doing="preparing"

finish() {
    local status=$?
    trap - EXIT
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    if [ "$status" -ne 0 ]; then
        printf '\nmake demo: FAILED at: %s\n' "$doing" >&2
        if [ -s "$home/qbdd.log" ]; then
            echo "The daemon's log:" >&2
            cat "$home/qbdd.log" >&2
        fi
    fi
    rm -rf "$home"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Says what comes, shows the command as one would type it, runs it.
step() {
    doing=$1
    printf '\n# %s\n$ %s\n' "$1" "$2"
    eval "$2"
}

# Waits until the daemon answers, at most ten seconds.
wait_for_daemon() {
    local deadline=$((SECONDS + 10))
    until qbd list >/dev/null 2>&1; do
        kill -0 "$daemon" 2>/dev/null || { echo "qbdd has ended" >&2 && return 1; }
        [ $SECONDS -lt $deadline ] || { echo "qbdd does not answer" >&2 && return 1; }
        sleep 0.05
    done
}

mkdir "$home/pool" "$home/state"
cd "$home"
echo "A volume of qbd from its creation to its end. Everything happens in $home, which is removed afterwards."

cat >qbd.conf <<END
[pool.demo]
type = local
path = $home/pool
END
step "The daemon's configuration: one pool, 'demo', whose volumes are files in a directory." "cat qbd.conf"

doing="starting the daemon"
printf '\n# %s\n$ %s\n' "Start the daemon. QBD_CONFIG, QBD_SOCKET and others in the environment name its files." "qbdd &"
qbdd >qbdd.log 2>&1 &
daemon=$!
wait_for_daemon
echo "qbdd runs as process $daemon"

step "Create the volume 'disk1' of 256 MiB in the pool 'demo'. It is thin: it takes no space yet." \
    "qbd create demo/disk1 -k 256M"
step "The pool has it now." "qbd volumes demo"

step "Map it: serve it over NBD on a Unix socket. What is printed is its URI, for any NBD client." \
    "qbd map demo/disk1 --export | tee uri"
uri=$(cat uri)

step "Another program, libnbd's nbdinfo, asks the server what it offers." "nbdinfo '$uri'"
step "Make 64 MiB of random bytes ..." "head -c 64M /dev/urandom >data"
step "... and write them to the front of the volume, through NBD, with a flush at the end." "nbdcopy --flush data '$uri'"
step "Read the whole volume back, 256 MiB." "nbdcopy '$uri' back"
step "The first 64 MiB must be what was written (cmp is silent when it is) ..." "cmp -n $((64 << 20)) data back"
step "... and the rest, never written, must be zeros." "cmp -n $((192 << 20)) -i $((64 << 20)):0 back /dev/zero"
step "Only what was written takes space on the disk." "du -ch pool | tail -n 1"

step "What is mapped on this host. A kernel device would stand under 'device'." "qbd list"
step "All about one volume: its state, its counters, how long its I/O took." "qbd info demo/disk1"

step "Unmap it: it is served no more, the data stays." "qbd unmap demo/disk1"
step "Nothing is mapped any more." "qbd list"
step "Delete the volume and its data." "qbd delete demo/disk1"

doing="stopping the daemon"
printf '\n# %s\n$ %s\n' "Stop the daemon, as systemd does. It ends what is in flight first." "kill -TERM $daemon; wait $daemon"
kill -TERM "$daemon"
stopped=0
wait "$daemon" || stopped=$?
daemon=""
[ "$stopped" -eq 0 ] || { echo "qbdd ended with status $stopped" >&2 && exit 1; }

printf '\nmake demo: done. 64 MiB were written to demo/disk1, read back and found equal.\n'
