"""What the daemon does under load, beside bad neighbours, and when it is stopped or killed at the worst moment."""

import contextlib
import errno
import http.client
import json
import random
import resource
import select
import socket
import struct
import subprocess
import threading
import time

import nbd
import pytest

from bystander import Bystander
from harness import QBD, KiB, MiB, SANITIZER, SLOWNESS, environment, run, wait_for
from wire import (
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, OPT_GO, OPT_LIST,
    REQUEST_MAGIC, Closed, Session, info_data,
)  # fmt: skip


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


@contextlib.contextmanager
def connected(uri):
    handle = connect(uri)
    try:
        yield handle
    finally:
        handle.shutdown()


# Clients that do not read, or hardly write


def flood(session, message, limit=400000):
    """Sends `message` over and over until the server takes no more for a while; returns how many it took.

    The tail of the last one may be missing: `session.owed` is what must be sent before anything else."""
    batch = message * max(1, 65536 // len(message))
    sent = 0
    pending = memoryview(batch)
    session.socket.setblocking(False)
    while sent // len(message) < limit:
        try:
            count = session.socket.send(pending)
        except BlockingIOError:
            if not select.select([], [session.socket], [], 0.3 * SLOWNESS)[1]:
                break
            continue
        sent += count
        pending = pending[count:] if count < len(pending) else memoryview(batch)
    session.socket.settimeout(20 * SLOWNESS)
    session.owed = message[sent % len(message) :] if sent % len(message) else b""
    return sent // len(message) + bool(session.owed)


def read_request(length, cookie=1):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, cookie, 0, length)


@pytest.mark.parametrize("length, structured", [(4 * KiB, False), (MiB, True)], ids=["4K simple", "1M structured"])
def test_client_that_stops_reading_costs_its_own_buffers(daemon, pool, length, structured):
    """Reads are asked for and their data is never taken, by four clients; when one takes it at last, all is there."""
    uri = daemon.volume(f"{pool}/flooded")
    same = Bystander(uri, (32 * MiB, 16 * MiB))
    other = Bystander(daemon.volume(f"{pool}/other"), (0, 16 * MiB))
    content = random.Random(6).randbytes(length)
    with connected(uri) as handle:
        handle.pwrite(content, 0)
    same.assert_unharmed(rounds=20)
    other.assert_unharmed(rounds=20)
    before = daemon.resident()
    with contextlib.ExitStack() as stack:
        sessions = []
        for _ in range(4):
            session = stack.enter_context(Session(daemon.nbd_socket, timeout=20)).greet()
            session.go(f"{pool}/flooded", structured=structured)
            session.taken = flood(session, read_request(length))
            sessions.append(session)
            assert session.taken < 400000, "the server takes requests without end"
        same.forget(), other.forget()
        same.assert_unharmed(rounds=100, seconds=5)
        other.assert_unharmed(rounds=100, seconds=5)
        grown = daemon.resident() - before
        slowest = max(same.slowest, other.slowest)
        print(f"4 clients that never read, {length // KiB} KiB reads on {pool}: {grown / MiB:.1f} MiB more resident,")
        print(f"requests taken {[one.taken for one in sessions]}, slowest round beside them {slowest * 1000:.1f} ms")
        if not SANITIZER:
            assert grown < 4 * 24 * MiB, f"{grown // MiB} MiB more for four clients"
        assert slowest < 1 * SLOWNESS
        # One of them reads at last.
        session = sessions[0]

        def finish():
            with contextlib.suppress(OSError):
                session.send(session.owed, struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 2, 0, 0))

        # Its last bytes may have to wait for room, so they are sent from beside.
        sender = threading.Thread(target=finish, daemon=True)
        sender.start()
        for _ in range(min(session.taken, (1 << 30) // length)):
            assert session.answer({1: (CMD_READ, 0, length)}).data == content
        if session.taken * length < 1 << 30:
            sender.join()
            session.assert_closed()
        else:
            # Ends the sender's wait too.
            session.socket.shutdown(socket.SHUT_RDWR)
            sender.join()
    same.stop()
    other.stop()
    wait_for(lambda: daemon.json("info", f"{pool}/flooded")["connections"] == 0, "the clients are forgotten")


def test_client_that_stops_reading_replies_to_writes(daemon, pool):
    uri = daemon.volume(f"{pool}/flooded")
    same = Bystander(uri, (32 * MiB, 16 * MiB))
    same.assert_unharmed(rounds=20)
    before = daemon.resident()
    message = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, 512) + b"\x77" * 512
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            session = stack.enter_context(Session(daemon.nbd_socket)).greet()
            session.go(f"{pool}/flooded")
            assert flood(session, message) < 400000, "the server takes requests without end"
        same.assert_unharmed(rounds=100, seconds=5)
        grown = daemon.resident() - before
        print(f"4 clients that never read the replies to their writes on {pool}: {grown / MiB:.1f} MiB more resident")
        if not SANITIZER:
            assert grown < 4 * 8 * MiB
    same.stop()


def test_what_a_client_does_not_take_holds_up_nobody(daemon, pool):
    daemon.volume(f"{pool}/a")
    with Session(daemon.nbd_socket, timeout=10) as lazy, Session(daemon.nbd_socket, timeout=10) as other:
        lazy.greet()
        lazy.go(f"{pool}/a")
        for _ in range(4):
            lazy.request(CMD_READ, 0, 4 * MiB)
        lazy.request(CMD_TRIM, 0, 64 * MiB)
        wait_for(lambda: daemon.json("info", f"{pool}/a")["counters"]["in_flight"] == 5, "all requests are there")
        # It may be one that comes back on another connection.
        lazy.socket.shutdown(socket.SHUT_WR)
        other.greet()
        other.go(f"{pool}/a")
        assert other.call(CMD_WRITE, 0, payload=b"x" * 4096).error == 0
        assert other.call(CMD_READ, 0, 4096).data == b"x" * 4096


def test_clients_that_do_not_read_leave_the_others_their_parts(new_daemon):
    daemon = new_daemon(configuration="\n[nbd]\nmax_connections=4\n").start()
    daemon.create("disk/a", "64M")
    daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    daemon.map("disk/a")
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(daemon.nbd_socket, timeout=20)) for _ in range(4)]
        for session in sessions:
            session.greet()
            session.go("disk/a")
        for session in sessions[1:]:
            # One that is not aligned, in pieces of a layer's grain.
            session.request(CMD_READ, 512, 32 * MiB)
        wait_for(lambda: daemon.json("info", "disk/a")["counters"]["in_flight"] == 3, "all requests are there")
        assert sessions[0].call(CMD_READ, 0, 4096).error == 0
        assert sessions[0].call(CMD_WRITE, 0, payload=b"x" * 4096).error == 0


def test_client_that_stops_reading_in_the_handshake(daemon):
    """NBD_OPT_LIST has long answers."""
    for index in range(32):
        daemon.volume(f"ram/{index}-{'x' * 100}", MiB)
    bystander = Bystander(daemon.volume("ram/other"), (0, 16 * MiB))
    bystander.assert_unharmed(rounds=20)
    before = daemon.resident()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            session = stack.enter_context(Session(daemon.nbd_socket)).greet()
            message = struct.pack(">QII", IHAVEOPT, OPT_LIST, 0)
            assert flood(session, message, 100000) < 100000, "the server takes options without end"
        bystander.assert_unharmed(rounds=50)
        run(["nbdinfo", daemon.uri("ram/other")]).succeeded()
        grown = daemon.resident() - before
        print(f"4 clients that never read the answers to their options: {grown / MiB:.1f} MiB more resident")
        if not SANITIZER:
            assert grown < 4 * 2 * MiB
    bystander.stop()


def test_client_of_one_byte_a_second_delays_nobody(daemon, pool):
    """In the handshake, in a request's header, in a write's payload, and on the control socket."""
    uri = daemon.volume(f"{pool}/slow")
    same = Bystander(uri, (32 * MiB, 16 * MiB))
    other = Bystander(daemon.volume(f"{pool}/other"), (0, 16 * MiB))
    handshake = Session(daemon.nbd_socket)
    header, payload = (Session(daemon.nbd_socket).greet() for _ in range(2))
    header.go(f"{pool}/slow")
    payload.go(f"{pool}/slow")
    payload.request(CMD_WRITE, 0, 4096, payload=b"\x01")
    control = Session(daemon.socket)
    drips = [
        (handshake, struct.pack(">I", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)),
        (header, read_request(512)),
        (payload, b"\x01" * 4095),
        (control, b"POST /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\n"),
    ]
    same.assert_unharmed(rounds=20)
    other.assert_unharmed(rounds=20)
    same.forget(), other.forget()
    connects = 0
    for index in range(4):
        for session, data in drips:
            session.send(data[index : index + 1])
        until = time.monotonic() + 1
        while time.monotonic() < until:
            started = time.monotonic()
            with connected(uri) as handle:
                handle.pread(4096, 0)
            assert time.monotonic() - started < 0.5 * SLOWNESS, "a new client had to wait"
            connects += 1
            time.sleep(0.01)
    assert daemon.qbd("list").succeeded().seconds < 1 * SLOWNESS
    assert same.slowest < 0.5 * SLOWNESS and other.slowest < 0.5 * SLOWNESS
    same.assert_unharmed(), other.assert_unharmed()
    print(f"beside clients of a byte a second on {pool}: {same.rounds} rounds, the slowest {same.slowest * 1000:.1f} ms")
    # What dripped in is complete at last, and answered.
    header.send(read_request(512)[4:])
    assert len(header.answer({1: (CMD_READ, 0, 512)}).data) == 512
    payload.send(b"\x01" * 4091)
    assert payload.answer({payload.cookies: (CMD_WRITE, 0, 4096)}).error == 0
    assert payload.read(0, 4096) == b"\x01" * 4096
    for session, _ in drips:
        session.close()
    same.stop()
    other.stop()


# Many volumes


@pytest.fixture(scope="module")
def count():
    return 64


def fio_jobs(uris, seconds, depth, rw="randread", jobs=1):
    """Starts fio with a job for each URI; returns the process."""
    lines = ["[global]", "ioengine=nbd", f"rw={rw}", "bs=4k", f"iodepth={depth}", "time_based", f"runtime={seconds}"]
    lines += ["size=4m", f"numjobs={jobs}", "group_reporting=0", "norandommap", "thread"]
    for index, uri in enumerate(uris):
        lines += [f"[v{index}]", f"uri={uri}"]
    process = subprocess.Popen(
        ["fio", "--output-format=json", "-"], env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write("\n".join(lines).encode())
    process.stdin.close()
    process.stdin = None
    return process


def operations(process):
    """I/Os a second of each job of a fio that has ended by itself."""
    out, err = process.communicate(timeout=60 * SLOWNESS)
    assert process.returncode == 0, f"fio: {err.decode()}"
    jobs = json.loads(out[out.index(b"{") :])["jobs"]
    assert all(job["error"] == 0 for job in jobs)
    return [job["read"]["iops"] + job["write"]["iops"] for job in jobs]


@pytest.mark.deadline(120)
@pytest.mark.parametrize("with_snapshots", [False, True], ids=["plain", "snapshots"])
def test_all_requests_of_many_clients_in_flight(new_daemon, with_snapshots):
    """Each client has as many as it may; held back, they begin at the same moment."""
    clients, depth = 72, 128
    daemon = new_daemon(configuration=f"\n[nbd]\nmax_connections={clients}\n").start()
    daemon.create("disk/a", "64M")
    if with_snapshots:
        daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    daemon.map("disk/a")
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(daemon.nbd_socket)) for _ in range(clients)]
        for session in sessions:
            session.greet().go("disk/a")
        daemon.qbd("suspend", "disk/a").succeeded()
        pending = []
        for index, session in enumerate(sessions):
            offsets = [(index * depth + number) * 4096 for number in range(depth)]
            pending.append({session.request(CMD_READ, at, 512): (CMD_READ, at, 512) for at in offsets})
        wait_for(
            lambda: daemon.json("info", "disk/a")["held_back"]["requests"] == clients * depth, "all are held back"
        )
        daemon.qbd("resume", "disk/a", "-t", "normal").succeeded()
        for session, left in zip(sessions, pending):
            while left:
                answer = session.answer(left)
                assert (answer.error, answer.data) == (0, bytes(512))


NO_MORE_THREADS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    if (access(getenv("NO_MORE_THREADS"), F_OK) == 0) return EAGAIN;
    return real(thread, attributes, body, argument);
}
"""


@pytest.mark.skipif(SANITIZER is not None, reason="its library has to be the first")
def test_no_more_threads(new_daemon, scratch):
    """What is mapped goes on, also with what it never did before; what needs another thread waits for one."""
    (scratch / "threads.c").write_text(NO_MORE_THREADS)
    run(["cc", "-shared", "-fPIC", "-o", scratch / "threads.so", scratch / "threads.c", "-ldl"]).succeeded()
    gone = scratch / "gone"
    daemon = new_daemon()
    daemon.start(variables={"LD_PRELOAD": scratch / "threads.so", "NO_MORE_THREADS": gone})
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(daemon.volume("disk/a"))
    daemon.create("disk/b")
    gone.touch()
    extents = []
    handle.block_status(MiB, 0, lambda context, offset, entries, error: extents.extend(entries))
    assert sum(extents[::2]) == MiB
    content = bytes(range(256)) * (8 * MiB // 256)
    handle.pwrite(content, 0)
    assert handle.pread(len(content), 0) == content
    with subprocess.Popen([QBD, "map", "--export", "disk/b"], env=environment(**daemon.variables)) as mapping:
        wait_for(lambda: "start thread" in daemon.log(), "the daemon tells that it has no thread")
        gone.unlink()
        assert mapping.wait(30 * SLOWNESS) == 0
    handle.shutdown()


@pytest.mark.deadline(120)
def test_64_volumes_with_a_client_each(daemon, count):
    """All verify; an idle exported volume takes at most 1 MiB; one that is flooded does not stop the others."""
    for index in range(count):
        daemon.create(f"disk/v{index}", "16M")
    # The first command and the first volume bring memory and threads that are the daemon's own.
    daemon.map("disk/v0")
    daemon.qbd("unmap", "disk/v0").succeeded()
    empty = daemon.resident()
    uris = [daemon.map(f"disk/v{index}") for index in range(count)]
    exported = (daemon.resident() - empty) / count
    handles = [connect(uri) for uri in uris]
    for handle in handles:
        assert handle.pread(4096, 0) == bytes(4096)
    with_client = (daemon.resident() - empty) / count
    print(f"empty daemon {empty / MiB:.1f} MiB; for each of {count} idle volumes {exported / KiB:.0f} KiB,")
    print(f"with a client that has read a block {with_client / KiB:.0f} KiB")
    failures = verify(handles)
    assert not failures, failures[0]
    used = (daemon.resident() - empty) / count
    print(f"after each client has written and verified 4 MiB {used / KiB:.0f} KiB, {daemon.threads()} threads")
    for handle in handles:
        handle.shutdown()
    if not SANITIZER:
        assert exported <= MiB, f"an idle exported volume takes {exported / KiB:.0f} KiB"
        assert with_client <= MiB, f"an exported volume with an idle client takes {with_client / KiB:.0f} KiB"
    assert_fair(daemon, uris)
    for index in range(count):
        daemon.qbd("unmap", f"disk/v{index}").succeeded()
    left = daemon.resident() - empty
    print(f"all unmapped: {left / MiB:.1f} MiB more than the empty daemon, {daemon.threads()} threads")
    if not SANITIZER:
        assert left < 32 * MiB, "unmapped volumes keep memory"


def verify(handles):
    """Each client writes 4 MiB of its own in requests of 64 KiB, 16 in flight, and reads them back."""
    failures = []

    def work(index, handle):
        try:
            content = random.Random(index).randbytes(4 * MiB)
            for offset in range(0, len(content), 64 * KiB):
                while handle.aio_in_flight() >= 16:
                    handle.poll(1000)
                part = nbd.Buffer.from_bytearray(bytearray(content[offset : offset + 64 * KiB]))
                handle.aio_pwrite(part, offset, completion=check)
            while handle.aio_in_flight():
                handle.poll(1000)
            handle.flush()
            assert handle.pread(4 * MiB, 0) == content, f"volume {index} reads something else than was written"
        except Exception as failure:  # any: reported by the caller
            failures.append(f"volume {index}: {failure}")

    def check(error):
        if error.value:
            failures.append(f"a write failed: {error.value}")
        return 1

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(handles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def assert_fair(daemon, uris):
    """The share of a client is what it gets when all ask for the same. When the first one is flooded, by deep queues
    of large requests and by a client that never reads, each of the others still gets half of it."""
    seconds = 3 * (2 if SANITIZER else 1)
    alone = operations(fio_jobs(uris, seconds, 2))
    share = sum(alone) / len(alone)
    flooder = Session(daemon.nbd_socket).greet()
    flooder.go("disk/v0")
    flood(flooder, read_request(256 * KiB))
    deep = fio_jobs(uris[:1], seconds + 2, 64, jobs=2)
    others = operations(fio_jobs(uris[1:], seconds, 2))
    flooded = sum(operations(deep))
    flooder.close()
    print(f"{len(uris)} clients get {share:.0f} reads a second each ({min(alone):.0f} to {max(alone):.0f}); with one")
    print(f"volume flooded by {flooded:.0f} the others get {min(others):.0f} to {max(others):.0f}")
    # Equals get unequal shares of two processors even without a flood, so the slowest is held against the slowest.
    mean = sum(others) / len(others)
    assert mean >= share / 2, f"the others get {mean:.0f} in the mean, half a fair share is {share / 2:.0f}"
    assert min(others) >= min(alone) / 2, f"the slowest gets {min(others):.0f}, the slowest without a flood {min(alone):.0f}"


# Connections that come and go


def cycle(daemon, uri, volume, turn):
    """One connection: most are proper sessions, the others break off at every stage."""
    kind = turn % 8
    if kind < 4:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        if kind == 0:
            handle.pread(4096, 0)
        if kind != 1:
            handle.shutdown()
        return
    with Session(daemon.nbd_socket) as session:
        if kind == 4:
            return
        session.greet()
        if kind == 5:
            data = info_data(volume)
            session.send((struct.pack(">QII", IHAVEOPT, OPT_GO, len(data)) + data)[: turn % 40])
        elif kind == 6:
            session.list()
        else:
            session.go(volume)
            session.request(CMD_READ, 0, 4096)
            session.request(CMD_WRITE, 0, 4096, payload=b"half of it")


def settled(daemon):
    """(descriptors, threads, resident bytes) when the connections of before are all closed."""
    wait_for(lambda: all(one["connections"] <= 1 for one in daemon.json("list")), "all sessions end")
    seen = []

    def steady():
        seen.append(daemon.descriptors())
        return len(seen) >= 20 and len(set(seen[-20:])) == 1

    wait_for(steady, "the number of descriptors stays the same", pause=0.01)
    return daemon.descriptors(), daemon.threads(), daemon.resident()


@pytest.mark.deadline(240)
def test_10000_connections_leave_nothing_behind(daemon, pool):
    """Descriptors, threads and memory are flat, for proper sessions and for those that break off."""
    uri = daemon.volume(f"{pool}/volume", "16M")
    other = Bystander(daemon.volume(f"{pool}/other", "16M"), (0, 16 * MiB), pause=0.02)

    total = 10000 // SLOWNESS
    warm = total // 5
    for turn in range(warm):
        cycle(daemon, uri, f"{pool}/volume", turn)
    descriptors, threads, memory = settled(daemon)
    started = time.monotonic()
    for turn in range(total):
        cycle(daemon, uri, f"{pool}/volume", turn)
    seconds = time.monotonic() - started
    after = settled(daemon)
    print(f"{total} connections in {seconds:.1f} s: descriptors {descriptors} -> {after[0]}, threads {threads} ->")
    print(f"{after[1]}, resident {memory / KiB:.0f} -> {after[2] / KiB:.0f} KiB")
    assert after[0] <= descriptors, f"descriptors grew from {descriptors} to {after[0]}"
    assert after[1] <= threads, f"threads grew from {threads} to {after[1]}"
    if not SANITIZER:
        # A leak of 100 bytes a connection would be 1 MB.
        assert after[2] - memory < MiB, f"resident memory grew by {(after[2] - memory) / KiB:.0f} KiB"
    other.assert_unharmed()
    other.stop()


def test_mapping_and_unmapping_leaves_nothing_behind(daemon, pool):
    daemon.create(f"{pool}/volume", "16M")
    config = str(daemon.config)

    def turns(number):
        for _ in range(number):
            status, answer = daemon.post(
                "QBD_IOC_MAP_VOLUME", volume=f"{pool}/volume", config=config, read_only=False, export=True
            )
            assert status == 200, answer
            with connected(answer["uri"]) as handle:
                handle.pwrite(bytes(4096), 0)
            assert daemon.post("QBD_IOC_UNMAP_VOLUME", volume=f"{pool}/volume")[0] == 200
        return settled(daemon)

    before = turns(100 // SLOWNESS)
    after = turns(500 // SLOWNESS)
    print(f"500 times mapped and unmapped on {pool}: descriptors {before[0]} -> {after[0]}, threads {before[1]} ->")
    print(f"{after[1]}, resident {before[2] / KiB:.0f} -> {after[2] / KiB:.0f} KiB")
    assert after[0] <= before[0] and after[1] <= before[1]
    if not SANITIZER:
        assert after[2] - before[2] < 2 * MiB


def test_more_clients_than_a_volume_takes(daemon):
    """The one too many is turned away; the others go on, and there is room again when one has left."""
    uri = daemon.volume("disk/volume")
    handles = [connect(uri) for _ in range(64)]
    for handle in handles:
        handle.pread(512, 0)
    with pytest.raises(nbd.Error), connected(uri) as handle:
        handle.pread(512, 0)
    for handle in handles:
        assert handle.pread(512, 0) == bytes(512)
    handles.pop().shutdown()

    def served():
        with contextlib.suppress(nbd.Error), connected(uri) as handle:
            return len(handle.pread(512, 0)) == 512

    wait_for(served, "there is room for a client again")
    for handle in handles:
        handle.shutdown()


@pytest.mark.parametrize("over", ["Unix socket", "TCP"])
def test_clients_that_say_nothing_keep_nobody_out(new_daemon, over):
    """As many as there can be in their handshake: those who come next are served at once, and the oldest make room."""
    daemon = new_daemon(tcp=True).start()
    uri = daemon.volume("disk/volume")
    served = connect(uri)
    address = daemon.nbd_socket if over == "Unix socket" else ("127.0.0.1", daemon.port)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Session(address)) for _ in range(512)]
        # All of them are in.
        silent[-1].receive(18)
        for _ in range(3):
            with Session(address, timeout=5).greet() as session:
                session.go("disk/volume")
                assert session.read(0, 512) == bytes(512)
        for session in silent[:-1]:
            session.receive(18)
        # One of them had to make room, the oldest.
        wait_for(lambda: select.select([silent[0].socket], [], [], 0)[0], "the oldest is ended")
        assert silent[0].socket.recv(1) == b""
        assert not select.select([session.socket for session in silent[1:]], [], [], 0.2)[0], "more than needed"
    assert served.pread(512, 0) == bytes(512)
    served.shutdown()
    assert "made room" in daemon.log()


def test_out_of_descriptors(daemon):
    """More clients than descriptors: those that are connected go on, and others get in when some have left."""
    uri = daemon.volume("disk/volume")
    bystander = Bystander(uri, (0, 16 * MiB))
    bystander.assert_unharmed()
    limit = daemon.descriptors() + 20
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, limit))
    sessions = []
    for _ in range(60):
        session = Session(daemon.nbd_socket)
        sessions.append(session)
    bystander.assert_unharmed(rounds=50)
    for session in sessions:
        session.close()

    def served():
        with contextlib.suppress(nbd.Error), connected(uri) as handle:
            return len(handle.pread(512, 0)) == 512

    wait_for(served, "a new client is served when descriptors are free again")
    bystander.assert_unharmed()
    bystander.stop()


# The end at the worst moment

BLOCK = 4096


def stamp(block, sequence):
    """The content of a block: its own number and that of the write, all over it."""
    return struct.pack(">QQ", block, sequence) * (BLOCK // 16)


class Journal(threading.Thread):
    """Writes stamped blocks and flushes now and then, until the connection breaks; knows what must not be lost."""

    def __init__(self, uri, blocks, seed, fua=False):
        super().__init__(daemon=True)
        self.handle = connect(uri)
        self.blocks = blocks
        self.chance = random.Random(seed)
        self.fua = fua
        self.sequence = 0
        self.sent = {}
        self.acknowledged = {}
        self.durable = {}
        self.flushes = 0

    def run(self):
        with contextlib.suppress(nbd.Error):
            while True:
                self.write_some()
                covered = dict(self.acknowledged)
                if self.fua:
                    self.durable.update(covered)
                    self.flushes += 1
                elif self.chance.random() < 0.3:
                    self.handle.flush()
                    self.durable.update(covered)
                    self.flushes += 1

    def write_some(self):
        """32 writes to different blocks in flight together."""
        flags = nbd.CMD_FLAG_FUA if self.fua else 0
        for block in self.chance.sample(range(self.blocks), 32):
            self.sequence += 1
            self.sent.setdefault(block, set()).add(self.sequence)

            def completed(error, block=block, sequence=self.sequence):
                if error.value == 0:
                    self.acknowledged[block] = sequence
                return 1

            content = nbd.Buffer.from_bytearray(bytearray(stamp(block, self.sequence)))
            self.handle.aio_pwrite(content, block * BLOCK, completion=completed, flags=flags)
        while self.handle.aio_in_flight():
            self.handle.poll(-1)

    def check(self, uri):
        """Every block holds a whole write, and not one older than what was durable."""
        found = connect(uri)
        for block in range(self.blocks):
            data = found.pread(BLOCK, block * BLOCK)
            owner, sequence = struct.unpack(">QQ", data[:16])
            least = self.durable.get(block, 0)
            if not any(data):
                assert least == 0, f"block {block} is empty, write {least} to it was flushed"
                continue
            assert owner == block and data == stamp(block, sequence), f"block {block} holds a mixture"
            assert sequence in self.sent[block], f"block {block} holds a write that was never sent"
            assert sequence >= least, f"block {block} holds write {sequence}, write {least} was flushed"
        found.shutdown()


@pytest.mark.deadline(120)
@pytest.mark.parametrize("fua", [False, True], ids=["flush", "fua"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_nothing_flushed_is_lost(daemon, how, fua):
    """The daemon is stopped in the middle of a load, again and again, and started again on the same pool."""
    daemon.create("disk/journal", "16M")
    daemon.create("disk/second", "16M")
    chance = random.Random(how)
    flushes = 0
    for turn in range(6):
        journals = [Journal(daemon.map(f"disk/{name}"), 512, turn, fua) for name in ("journal", "second")]
        if turn:
            # What the turn before left is no stamp of this one.
            for journal in journals:
                journal.handle.zero(512 * BLOCK, 0)
                journal.handle.flush()
        for journal in journals:
            journal.start()
        wait_for(lambda: all(journal.flushes > 2 for journal in journals), "the load gets going")
        time.sleep(chance.uniform(0, 0.2))
        if how == "SIGTERM":
            daemon.stop()
        else:
            daemon.kill()
        for journal in journals:
            journal.join(10 * SLOWNESS)
            assert not journal.is_alive(), "the client was not disconnected"
        daemon.start()
        for journal, name in zip(journals, ("journal", "second")):
            journal.check(daemon.map(f"disk/{name}"))
            flushes += journal.flushes
    print(f"{how} six times in the middle of a load; {flushes} flushes, nothing lost")


def test_what_was_answered_before_the_end_is_there(daemon):
    """SIGTERM finishes what is in flight: a write answered with success is in the volume, flushed or not."""
    daemon.create("disk/volume", "16M")
    for turn in range(5):
        daemon.map("disk/volume")
        session = Session(daemon.nbd_socket).greet()
        session.go("disk/volume")
        pending = {}
        content = bytes([turn + 1]) * 64 * KiB
        for index in range(64):
            pending[session.request(CMD_WRITE, index * 64 * KiB, payload=content)] = (CMD_WRITE, index, 64 * KiB)
        flush = session.request(CMD_FLUSH)
        pending[flush] = (CMD_FLUSH, 0, 0)
        places = {cookie: place for cookie, (command, place, _) in pending.items() if command == CMD_WRITE}
        first = session.answer(pending)
        daemon.stop()
        answered = [first]
        with contextlib.suppress(Closed):
            while pending:
                answered.append(session.answer(pending))
        daemon.start()
        with connected(daemon.map("disk/volume")) as handle:
            for answer in answered:
                if answer.cookie in places and answer.error == 0:
                    assert handle.pread(64 * KiB, places[answer.cookie] * 64 * KiB) == content
        session.close()


def files(daemon):
    return sorted(str(path.relative_to(daemon.pool_path)) for path in daemon.pool_path.rglob("*"))


@pytest.mark.deadline(180)
def test_kill_in_the_middle_of_create_and_delete(daemon):
    """A hundred times: every volume is wholly there or wholly gone, no file is left over, the name is free again."""
    baseline = set(files(daemon))
    daemon.create("disk/model", "4M")
    baseline = {name for name in files(daemon) if "model" not in name} | baseline
    suffixes = {name.replace("model", "", 1) for name in files(daemon) if "model" in name}
    assert len(suffixes) >= 2, "a volume is its data and its description"
    config = str(daemon.config)
    chance = random.Random(9)
    create = {"volume": "disk/new", "config": config, "size": 4 * MiB, "block_size": 512}
    delete = {"volume": "disk/old", "config": config}

    # How long the two take, so that the kill falls into their middle.
    started = time.monotonic()
    for _ in range(10):
        assert daemon.post("QBD_IOC_CREATE_VOLUME", **create)[0] == 200
        assert daemon.post("QBD_IOC_DELETE_VOLUME", **{**delete, "volume": "disk/new"})[0] == 200
    duration = (time.monotonic() - started) / 10

    def ask(command, fields):
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            daemon.post(command, **fields)

    outcomes = {"created": 0, "not created": 0, "deleted": 0, "not deleted": 0}
    turns = 100 // (4 if SANITIZER else 1)
    for turn in range(turns):
        daemon.create("disk/old", "4M")
        with connected(daemon.map("disk/old")) as handle:
            handle.pwrite(b"\x3c" * 4096, 4096)
            handle.flush()
        daemon.qbd("unmap", "disk/old").succeeded()
        threads = [
            threading.Thread(target=ask, args=pair)
            for pair in (("QBD_IOC_CREATE_VOLUME", create), ("QBD_IOC_DELETE_VOLUME", delete))
        ]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0, 1.5 * duration))
        daemon.kill()
        for thread in threads:
            thread.join()
        daemon.start()
        volumes = {one["volume"]: one for one in daemon.json("volumes")}
        assert set(volumes) <= {"disk/model", "disk/new", "disk/old"} and "disk/model" in volumes
        expected = baseline | {name.split("/")[1] + suffix for name in volumes for suffix in suffixes}
        assert set(files(daemon)) == expected, f"turn {turn}: volumes {sorted(volumes)}, files {files(daemon)}"
        if "disk/old" in volumes:
            outcomes["not deleted"] += 1
            with connected(daemon.map("disk/old")) as handle:
                assert handle.pread(4096, 4096) == b"\x3c" * 4096, "a volume that was not deleted has lost its data"
            daemon.qbd("unmap", "disk/old").succeeded()
            daemon.qbd("delete", "disk/old").succeeded()
        else:
            outcomes["deleted"] += 1
        if "disk/new" in volumes:
            outcomes["created"] += 1
            assert volumes["disk/new"]["size"] == 4 * MiB
            with connected(daemon.map("disk/new")) as handle:
                assert handle.get_size() == 4 * MiB and handle.pread(MiB, 0) == bytes(MiB)
            daemon.qbd("unmap", "disk/new").succeeded()
        else:
            outcomes["not created"] += 1
            daemon.create("disk/new", "4M")
        daemon.qbd("delete", "disk/new").succeeded()
    print(f"killed {turns} times: {outcomes}; create and delete take {duration * 1000:.1f} ms")
    assert files(daemon) == sorted(baseline | {"model" + suffix for suffix in suffixes})


@pytest.fixture
def small_pool(new_daemon):
    """A daemon whose pool directory is a file system of 16 MiB."""
    daemon = new_daemon()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=16m", "qbd", daemon.pool_path])
    if mounted.status:
        pytest.skip(f"cannot mount: {mounted.err}")
    yield daemon.start()
    if daemon.alive:
        daemon.stop()
    run(["umount", daemon.pool_path]).succeeded()


def test_pool_that_is_full(small_pool):
    """A write that finds no space says so; the session, other volumes and what was written go on."""
    uri, other = small_pool.volume("disk/big", "64M"), small_pool.volume("ram/other")
    bystander = Bystander(other, (0, 16 * MiB))
    with connected(uri) as handle:
        written = []
        with pytest.raises(nbd.Error) as failure:
            for offset in range(0, 64 * MiB, MiB):
                handle.pwrite(bytes([len(written) + 1]) * MiB, offset)
                written.append(offset)
        assert failure.value.errnum == errno.ENOSPC
        assert 8 <= len(written) <= 16
        for index, offset in enumerate(written):
            assert handle.pread(MiB, offset) == bytes([index + 1]) * MiB
        handle.trim(4 * MiB, 0)
        handle.pwrite(b"\xaa" * MiB, 32 * MiB)
        handle.flush()
        assert handle.pread(MiB, 32 * MiB) == b"\xaa" * MiB
    assert small_pool.json("info", "disk/big")["counters"]["errors"] >= 1
    bystander.assert_unharmed()
    bystander.stop()
