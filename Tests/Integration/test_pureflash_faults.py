"""Stores and conductors that fail under a load that verifies: no error, no wrong byte, one completion each, and I/O goes
on within a second of the cluster being well."""

import contextlib
import pathlib
import signal
import threading
import time

import nbd
import pytest
import test_pureflash
from harness import MiB, SLOWNESS, wait_for
from pureflash import SHARD
from test_pureflash import connected, verify
from unkind import unkind


@pytest.fixture(params=["kind", "as seen"], autouse=True)
def manner(request, monkeypatch):
    """Every test runs with a cluster that makes the best of a fault, and with one that does what PureFlash's was seen to."""
    @contextlib.contextmanager
    def as_seen(count=1, **client):
        with unkind(count, **client) as (daemon, _, stores):
            yield daemon, stores

    monkeypatch.setitem(globals(), "cluster", test_pureflash.cluster if request.param == "kind" else as_seen)


# What the client has after the cluster is well, and what a busy machine may add.
RESUMES = 1.0
BUSY = 0.5 + (SLOWNESS - 1)


class Load(threading.Thread):
    """Fio in a thread; `end` waits for it and says what it has done."""

    def __init__(self, uri, seconds, *options):
        super().__init__(daemon=True)
        self.arguments = (uri, seconds, *options)
        self.done = None
        self.failure = None
        self.start()

    def run(self):
        try:
            self.done = verify(*self.arguments)
        except Exception as failure:  # any: it is raised by the thread that asks
            self.failure = failure

    def end(self):
        self.join()
        if self.failure:
            raise self.failure
        return self.done


class Probe(threading.Thread):
    """Reads one block after the other, where the load does not write, and notes when each is done."""

    def __init__(self, uri, offset=512 * MiB):
        super().__init__(daemon=True)
        self.handle = connected(uri)
        self.offset = offset
        self.last = 0.0
        self.count = 0
        self.failures = []
        self.over = threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.005):
            try:
                self.handle.pread(4096, self.offset)
                self.last = time.monotonic()
                self.count += 1
            except nbd.Error as failure:
                self.failures.append(str(failure))
                return

    def resumed(self, well, what):
        """Fails when nothing was read within the time a client has after `well`."""
        wait_for(lambda: self.last > well or self.failures, f"I/O goes on after {what}", 30)
        assert not self.failures, self.failures
        late = self.last - well
        assert late < RESUMES + BUSY, f"I/O goes on {late:.2f} s after {what}"
        return late

    def end(self):
        self.over.set()
        self.join()
        self.handle.shutdown()
        assert not self.failures, self.failures


def mapped(daemon, volume="disk/v", size="1G"):
    daemon.qbd("create", volume, "-k", size).succeeded()
    return daemon.qbd("map", "--export", volume).succeeded().out.strip()


def stand_still(store):
    """SIGSTOP, and returns when no thread of it runs any more."""
    store.process.send_signal(signal.SIGSTOP)
    tasks = pathlib.Path(f"/proc/{store.process.pid}/task")
    wait_for(
        lambda: all(task.read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.glob("*/stat")),
        "the store stands still",
    )


MANY = 1_000_000


@pytest.mark.parametrize(
    "name, switches",
    [
        ("drop", {"drop": 50}), ("drop all", {"drop": 1}), ("reopen", {"reopen": MANY}), ("twice", {"twice": MANY}),
        ("wrong id", {"wrong_id": MANY}), ("half", {"half": MANY}), ("delay", {"delay": 700}), ("stop", {"stop": 1}),
        ("refuse", {"refuse": 1, "drop": 1}), ("no stores", {"empty_stores": 1, "reopen": MANY}),
        ("silent", {"silent_conductor": 1, "drop": 1}), ("stale", {"stale": "disk/v"}), ("some", {
            "twice": 3, "wrong_id": 3, "half": 3, "reopen": 30}),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_a_faulty_store_costs_time_and_nothing_else(name, switches):
    with cluster() as (daemon, (store,)):
        uri = mapped(daemon)
        load = Load(uri, 4)
        probe = Probe(uri)
        late = []
        for _ in range(2):
            count = probe.count
            wait_for(lambda: probe.count > count + 20, "I/O before the fault", 20)
            store.faults(**switches)
            time.sleep(0.7)
            store.faults(clear=1)
            late.append(probe.resumed(time.monotonic(), name))
        reads, writes = load.end()
        probe.end()
        counters = daemon.json("info", "disk/v")["counters"]
        assert counters["errors"] == 0
        # Each once: libnbd ends a connection that answers twice.
        assert (counters["reads"], counters["writes"]) == (reads + probe.count, writes)
        print(f"{name}: I/O goes on after", " ".join(f"{seconds:.3f}" for seconds in late), "s")


@pytest.mark.deadline(300)
@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_store_that_dies_under_load_and_comes_back(times):
    with cluster() as (daemon, (store,)):
        uri = mapped(daemon, "disk/v")
        load = Load(uri, times * 1.5)
        probe = Probe(uri)
        for _ in range(times):
            count = probe.count
            wait_for(lambda: probe.count > count + 20, "I/O before it is killed", 20)
            store.kill()
            time.sleep(0.3)
            store.start()
            probe.resumed(time.monotonic(), "the store's start")
        load.end()
        probe.end()
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


@pytest.mark.deadline(120)
@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_store_that_stands_still_and_goes_on(seconds):
    with cluster() as (daemon, (store,)):
        uri = mapped(daemon)
        load = Load(uri, seconds + 3)
        probe = Probe(uri)
        wait_for(lambda: probe.count > 20, "I/O before", 20)
        stand_still(store)
        time.sleep(seconds)
        store.process.send_signal(signal.SIGCONT)
        probe.resumed(time.monotonic(), "the store's going on")
        load.end()
        probe.end()
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


def test_a_store_that_stands_still_does_not_hold_up_the_end():
    """Of the daemon, for which the devices of all other volumes would wait; the volume comes back with the next one."""
    with cluster(io_timeout=60) as (daemon, (store,)):
        daemon.qbd("create", "disk/other", "-k", "1M").succeeded()
        daemon.qbd("map", "--export", "disk/other").succeeded()
        handle = connected(mapped(daemon))
        handle.pwrite(b"a" * MiB, 0)
        stand_still(store)
        written = handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"b" * 4096)), 0)
        wait_for(lambda: daemon.json("info", "disk/v")["counters"]["in_flight"] == 1, "the write is in flight")
        began = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_exit(20)
        print(f"ended after {time.monotonic() - began:.1f} s")
        given_up = [line for line in daemon.log().splitlines() if "given up: its store" in line]
        assert len(given_up) == 1 and "disk/v" in given_up[0], daemon.log()
        with pytest.raises(nbd.Error):
            while not handle.aio_command_completed(written):
                handle.poll(1000)
        store.process.send_signal(signal.SIGCONT)
        daemon.start()
        wait_for(lambda: len(daemon.json("list")) == 2, "both volumes are back", 20)
        handle = wait_for(lambda: _connected(daemon.uri("disk/v")), "the volume is served", 20)
        assert handle.pread(MiB - 4096, 4096) == b"a" * (MiB - 4096)
        handle.pwrite(b"c" * 4096, 0)
        assert handle.pread(4096, 0) == b"c" * 4096
        handle.shutdown()


def test_a_store_that_stands_still_for_long_keeps_its_connection():
    """Longer than conn_timeout, and with more unsent than the sockets hold: were it given up without a reset, the store
    would do what it has of it beside what is sent again."""
    with cluster(conn_timeout=1) as (daemon, (store,)):
        handle = connected(mapped(daemon))
        handle.pwrite(bytes(MiB), 0)
        stand_still(store)
        began = time.monotonic()
        done = []
        for index in range(64):
            data = nbd.Buffer.from_bytearray(bytearray([index + 1]) * 131072)
            handle.aio_pwrite(data, index * 131072, completion=lambda error: done.append(error.value) or 1)
        while time.monotonic() - began < 4:
            handle.poll(100)
        assert not done
        store.process.send_signal(signal.SIGCONT)
        while handle.aio_in_flight():
            assert handle.poll(20_000 * SLOWNESS) == 1
        assert done == [0] * 64
        for index in range(64):
            assert handle.pread(131072, index * 131072) == bytes([index + 1]) * 131072
        assert store.faults()["seen"]["handshakes"] == 1, "the connection was made anew:\n" + daemon.log()
        handle.shutdown()


def test_a_cluster_that_is_away_for_a_while():
    """Store and conductor, for less than io_timeout."""
    with cluster(io_timeout=20) as (daemon, (store,)):
        uri = mapped(daemon, "disk/v")
        load = Load(uri, 6)
        probe = Probe(uri)
        wait_for(lambda: probe.count > 20, "I/O before", 20)
        store.kill()
        time.sleep(3)
        store.start()
        probe.resumed(time.monotonic(), "the cluster's start")
        load.end()
        probe.end()
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


def test_a_cluster_that_stays_away_fails_io_and_recovers():
    """For longer than io_timeout: each read and write fails once, in time, with the reason in the log."""
    with cluster(io_timeout=2) as (daemon, (store,)):
        handle = connected(mapped(daemon, "disk/v"))
        handle.pwrite(b"a" * 4096, 0)
        store.kill()
        began = time.monotonic()
        failed = []

        def done(error):
            failed.append((error.value, time.monotonic() - began))
            return 1

        for index in range(16):
            handle.aio_pread(nbd.Buffer(4096), index * 4096, completion=done)
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), MiB + index * 4096, completion=done)
        while handle.aio_in_flight():
            assert handle.poll(20_000 * SLOWNESS) == 1, "a request is never completed"
        assert [error for error, _ in failed] == [5] * 32
        assert all(1.9 < seconds < 2 + RESUMES + BUSY for _, seconds in failed), failed
        log = daemon.log()
        assert "I/O waits: " in log and "fails: not done after 2 s: " in log, log
        # While it is away, one request after the other fails, and the log stays short.
        with pytest.raises(nbd.Error, match="(?i)input/output error"):
            handle.pwrite(b"b" * 4096, 0)
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 33
        store.start()
        well = time.monotonic()
        wait_for(lambda: _read(handle) == b"a" * 4096, "I/O again", 20)
        assert time.monotonic() - well < RESUMES + BUSY
        handle.shutdown()
        wait_for(lambda: "I/O goes on" in daemon.log(), "the log says so")


def _connected(uri):
    try:
        return connected(uri)
    except nbd.Error:
        return None


def _read(handle):
    try:
        return bytes(handle.pread(4096, 0))
    except nbd.Error:
        return None


def test_what_is_left_of_a_cluster_goes_on():
    """The conductor dies with the store of the first shard: the other shard's I/O does not wait."""
    with cluster(2, io_timeout=30) as (daemon, stores):
        uri = mapped(daemon, "disk/v", "100G")
        first, second = Probe(uri, 0), Probe(uri, SHARD)
        wait_for(lambda: first.count > 20 and second.count > 20, "I/O before", 20)
        stores[0].kill()
        began = time.monotonic()
        slowest = 0.0
        while time.monotonic() - began < 5:
            slowest = max(slowest, time.monotonic() - second.last)
            time.sleep(0.01)
        assert slowest < RESUMES * SLOWNESS, f"the store that is well did nothing for {slowest:.2f} s"
        assert first.last < began + BUSY
        stores[0].start()
        # The volume is known to the conductor again when somebody opens it.
        first.resumed(time.monotonic(), "the first store's start")
        for probe in (first, second):
            probe.end()
        lines = [line for line in daemon.log().splitlines() if "I/O waits" in line or "I/O goes on" in line]
        assert len(lines) < 12, "the log flaps:\n" + "\n".join(lines)


@pytest.mark.parametrize("way", ("delay", "stop"))
def test_a_write_that_was_given_up_does_not_land_on_a_newer_one(way):
    """The store holds old writes, some begun and some unread in its socket, when their connection is given up."""
    with cluster(io_timeout=2, conn_timeout=1) as (daemon, (store,)):
        handle = connected(mapped(daemon))
        handle.pwrite(bytes(8 * MiB), 0)
        if way == "delay":
            store.faults(delay=4000)
        else:
            stand_still(store)
        began = time.monotonic()
        errors = []
        for index in range(64):
            old = nbd.Buffer.from_bytearray(bytearray(b"o" * 131072))
            handle.aio_pwrite(old, index * 131072, completion=lambda error: errors.append(error.value) or 1)
        while handle.aio_in_flight():
            assert handle.poll(20_000 * SLOWNESS) == 1
        assert errors == [5] * 64
        if way == "delay":
            # The old ones are still due when they were.
            store.faults(delay=1)
        else:
            store.process.send_signal(signal.SIGCONT)
        for index in range(64):
            wait_for(lambda: _written(handle, index), "the newer write", 20)
        while time.monotonic() - began < 4.5:
            assert handle.pread(8 * MiB, 0) == b"n" * 8 * MiB, "an old write landed after a newer one"
            time.sleep(0.05)
        assert handle.pread(8 * MiB, 0) == b"n" * 8 * MiB, "an old write landed after a newer one"
        handle.shutdown()


def _written(handle, index):
    try:
        handle.pwrite(b"n" * 131072, index * 131072)
        return True
    except nbd.Error:
        return False
