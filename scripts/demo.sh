#!/usr/bin/env bash
# Shows the life of a volume: created in a pool, served, written, read back, listed, taken away again. Then a volume on
# two stores, of which one dies while data is being written.
#
# usage: demo.sh DIRECTORY-OF-qbd-qbdd-AND-qbd-store
#
# The daemon is one of the demo's own, with every path in a new directory under /tmp: an installed qbdd is not touched.
set -euo pipefail

bin=$(cd "$1" && pwd)
# Debian's python3 is the one that python3-libnbd belongs to.
python=${PYTHON:-/usr/bin/python3}
export PATH=$bin:$PATH
home=$(mktemp -d /tmp/qbd-demo.XXXXXX)
# The command and the daemon find each other by these; an installed qbdd has its places in /run and /var/lib.
export QBD_SOCKET=$home/qbdctl.sock QBD_NBD_SOCKET=$home/nbd.sock QBD_CONFIG=$home/qbd.conf QBD_STATE=$home/state
daemon=""
declare -A stores=()
copy=""
doing="preparing"

finish() {
    local status=$?
    trap - EXIT
    for process in $copy $daemon "${stores[@]}"; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    if [ "$status" -ne 0 ]; then
        printf '\nmake demo: FAILED at: %s\n' "$doing" >&2
        for log in "$home"/*.log; do
            [ -s "$log" ] || continue
            echo "$(basename "$log"):" >&2
            cat "$log" >&2
        done
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

# Waits until a command succeeds, at most so many seconds, while a process lives.
wait_until() {
    local seconds=$1 process=$2 deadline
    shift 2
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        kill -0 "$process" 2>/dev/null || { echo "process $process has ended" >&2 && return 1; }
        [ $SECONDS -lt $deadline ] || { echo "after $seconds seconds still not: $*" >&2 && return 1; }
        sleep 0.05
    done
}

start_daemon() {
    doing="starting the daemon"
    printf '\n# %s\n$ %s\n' "$1" "qbdd &"
    qbdd >>qbdd.log 2>&1 &
    daemon=$!
    wait_until 10 $daemon qbd list
    echo "qbdd runs as process $daemon"
}

stop_daemon() {
    doing="stopping the daemon"
    printf '\n# %s\n$ %s\n' "$1" "kill -TERM $daemon; wait $daemon"
    kill -TERM "$daemon"
    local stopped=0
    wait "$daemon" || stopped=$?
    daemon=""
    [ "$stopped" -eq 0 ] || { echo "qbdd ended with status $stopped" >&2 && exit 1; }
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

start_daemon "Start the daemon. QBD_CONFIG, QBD_SOCKET and others in the environment name its files."

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

stop_daemon "Stop the daemon, as systemd does. It ends what is in flight first."

printf '\n%s\n' "The same with data that is elsewhere: a volume on two stores, of which one dies while data is being written."

mkdir store1 store2
for number in 1 2; do printf '[pool.demo]\ntype = local\npath = %s\n' "$home/store$number" >store$number.conf; done
base=$((20000 + RANDOM % 10000))
ports="--data-port $base --conductor-port $((base + 1)) --store-port $((base + 2))"
cat >qbd.conf <<END
[conductor]
endpoints = 127.0.0.1:$((base + 1))
[client]
store_port = $base
END

# start_store NUMBER WORDS...: a store of its own address.
start_store() {
    local number=$1
    shift
    printf '$ %s &\n' "qbd-store --config store$number.conf --listen 127.0.0.$number $ports $*"
    # shellcheck disable=SC2086 # the ports are words
    qbd-store --config "store$number.conf" --listen "127.0.0.$number" $ports "$@" >"store$number.log" 2>&1 &
    stores[$number]=$!
    wait_until 10 ${stores[$number]} grep -q "qbd-store.*runs" "store$number.log"
}

doing="starting the stores"
printf '\n# %s\n' "Start two stores, here on one machine. The first is the conductor too: it knows which store has what."
start_store 2 --no-conductor
start_store 1 --stores 127.0.0.1,127.0.0.2
step "The daemon's configuration now names the conductor; its tenants are pools." "cat qbd.conf"
start_daemon "Start the daemon."

step "A volume of 128 GiB has two shards of 64 GiB, one on each store." "qbd create demo/big -k 128G"
step "Map it." "qbd map demo/big --export | tee uri"
uri=$(cat uri)
step "Let writes pass at 32 MiB a second, so that there is time to look." "qbd throttle demo/big -t write_bps=32M"

# Piece by piece to both shards.
cat >write.py <<'END'
import nbd, sys

h = nbd.NBD()
h.connect_uri(sys.argv[1])
data = open("data", "rb").read()
for place in range(0, len(data), 1 << 20):
    for shard in 0, 64 << 30:
        h.pwrite(data[place : place + (1 << 20)], shard + place)
h.flush()
END
cat >read.py <<'END'
import nbd, sys

h = nbd.NBD()
h.connect_uri(sys.argv[1])
for shard, name in (0, "back1"), (64 << 30, "back2"):
    with open(name, "wb") as file:
        for place in range(0, 64 << 20, 1 << 20):
            file.write(h.pread(1 << 20, shard + place))
END
doing="writing"
printf '\n# %s\n$ %s\n' "Write the 64 MiB of random bytes to both shards, in the background." "$python write.py '$uri' &"
"$python" write.py "$uri" &
copy=$!

# Bytes that have been written to the second store.
stored() { [ "$(du -s --block-size=1M store2 | cut -f1)" -ge "$1" ]; }
wait_until 30 $copy stored 16
doing="killing a store"
printf '\n# %s\n$ %s\n' "In the middle of it, kill the second store." "kill -9 ${stores[2]}"
kill -9 "${stores[2]}"
wait "${stores[2]}" 2>/dev/null || true
unset 'stores[2]'
wait_until 30 $copy grep -q "I/O waits" qbdd.log
step "The daemon says what is wrong; whoever writes sees a pause, and no error." "grep 'I/O waits' qbdd.log | head -n 1"
printf '\n# %s\n' "Start the store again."
start_store 2 --no-conductor
step "Lift the limit ..." "qbd throttle demo/big -t write_bps=0"
doing="waiting for the copy"
printf '\n# %s\n$ wait\n' "... and wait for the copy to end."
wait "$copy"
copy=""
step "It went on as soon as the store was back." "grep 'I/O goes on' qbdd.log | tail -n 1"
step "Read both shards back ..." "$python read.py '$uri'"
step "... and compare (cmp is silent when all is equal)." "cmp data back1; cmp data back2"
step "Unmap the volume and delete it." "qbd unmap demo/big; qbd delete demo/big"
stop_daemon "Stop the daemon ..."
doing="stopping the stores"
printf '\n# %s\n$ %s\n' "... and the stores." "kill -TERM ${stores[*]}; wait"
kill -TERM "${stores[@]}"
for store in "${stores[@]}"; do wait "$store"; done
stores=()

printf '\nmake demo: done. 64 MiB were written to demo/disk1, and to each shard of demo/big while a store was killed; all was\n'
printf 'read back and found equal.\n'
