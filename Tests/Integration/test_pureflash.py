"""qbdd with volumes of a PureFlash cluster, which is one or more qbd-stores."""

import contextlib
import os
import random
import subprocess
import threading
import time

import nbd
import pytest
from harness import KiB, MiB, Daemon, run, wait_for
from pureflash import OBJECT, SHARD, Store, addresses

GiB = 1024 * MiB


def started(stores, **client):
    """A daemon that knows the conductor, the first of the stores, and nothing else."""
    first = stores[0]
    daemon = Daemon()
    keys = {"store_port": first.data_port, "io_timeout": 30, "conn_timeout": 3, "open_volume_timeout": 3, **client}
    daemon.config.write_text(
        f"[conductor]\nendpoints={first.address}:{first.conductor_port}\n[client]\n"
        + "".join(f"{key}={value}\n" for key, value in keys.items())
    )
    daemon.start()
    return daemon


@contextlib.contextmanager
def cluster(count=1, **client):
    hosts = addresses(count)
    stores = [Store(address=hosts[0], stores=hosts if count > 1 else None)]
    stores += [Store(address=host, ports=stores[0].ports, conductor=False) for host in hosts[1:]]
    daemon = None
    try:
        # The conductor needs the others when a volume is made.
        for store in reversed(stores):
            store.start()
        daemon = started(stores, **client)
        yield daemon, stores
    finally:
        if daemon:
            daemon.finish()
        for store in stores:
            store.finish()


def connected(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def verify(uri, seconds=3, *options):
    """Fio's own check of what it has written, with I/O of all sizes."""
    done = subprocess.run(
        ["fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-256k", "--iodepth=32",
         "--size=256M", "--time_based", f"--runtime={seconds}", "--verify=crc32c", "--verify_state_save=0",
         "--verify_fatal=1", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_volume_from_its_creation_to_its_end(tmp_path):
    with cluster() as (daemon, _):
        for pool in ("disk", "ram"):
            daemon.qbd("create", f"{pool}/v", "-k", "1G").succeeded()
            assert f"{pool}/v" in daemon.qbd("volumes", pool).succeeded().out
            uri = daemon.qbd("map", "--export", f"{pool}/v").succeeded().out.strip()
            source, copy = tmp_path / "source", tmp_path / "copy"
            source.write_bytes(os.urandom(64 * MiB))
            run(["nbdcopy", source, uri]).succeeded()
            run(["nbdcopy", uri, copy]).succeeded()
            with open(copy, "rb") as file:
                assert file.read(64 * MiB) == source.read_bytes()
            run(["qemu-io", "-f", "raw", "-c", "write -P 7 4k 1M", "-c", "write -z 64k 300k", "-c", "read -P 0 64k 300k",
                "-c", "read -P 7 4k 60k", "-c", "flush", uri]).succeeded()  # fmt: skip
            verify(uri, 2)
            assert "tcp" in daemon.qbd("info", f"{pool}/v").succeeded().out
            daemon.qbd("resize", f"{pool}/v", "-k", "2G").succeeded()
            handle = connected(uri)
            assert handle.get_size() == 2 * GiB
            assert not handle.can_trim()
            handle.pwrite(b"z" * 512, 2 * GiB - 512)
            assert handle.pread(512, 2 * GiB - 512) == b"z" * 512
            handle.shutdown()
            daemon.qbd("unmap", f"{pool}/v").succeeded()
            daemon.qbd("delete", f"{pool}/v").succeeded()
            assert daemon.qbd("map", "--export", f"{pool}/v").status == 2


def test_three_shards_on_three_stores():
    size = 140 * GiB
    with cluster(3) as (daemon, stores):
        daemon.qbd("create", "disk/v", "-k", "140G").succeeded()
        uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
        handle = connected(uri)
        expected = {}
        for edge in (OBJECT, 700 * OBJECT, SHARD, 2 * SHARD, size):
            for length in (512, 4 * KiB, 1 * MiB, 8 * MiB):
                offset = min(edge - length // 2 // 512 * 512, size - length)
                expected[offset, length] = data = os.urandom(length)
                handle.pwrite(data, offset)
                assert handle.pread(length, offset) == data
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error):
            handle.pread(512, size)
        handle.shutdown()
        # Each store has its own shards, and no store those of another.
        for index, store in enumerate(stores):
            assert f"connected to the store {store.address}" in daemon.log()
            used = sum(file.stat().st_blocks * 512 for file in store.pool_path.glob("v*.raw"))
            assert used > 4 * MiB, f"store {index} has {used} bytes"


@pytest.mark.parametrize(
    "switch",
    [{"drop": 50}, {"reopen": 64}, {"twice": 1}, {"wrong_id": 1}, {"half": 1}, {"delay": 40}, {"empty_stores": 3}],
    ids=lambda switch: next(iter(switch)),
)
def test_a_faulty_store_costs_time_and_nothing_else(switch):
    with cluster() as (daemon, (store,)):
        daemon.qbd("create", "ram/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "ram/v").succeeded().out.strip()
        over = threading.Event()

        def disturb():
            while not over.wait(0.4):
                store.faults(**switch)
                if "delay" in switch:
                    over.wait(0.3)
                    store.faults(clear=1)

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            verify(uri, 4)
        finally:
            over.set()
            disturber.join()
        store.faults(clear=1)
        began = time.monotonic()
        handle = connected(uri)
        handle.pread(4096, 0)
        handle.shutdown()
        assert time.monotonic() - began < 10
        assert daemon.json("info", "ram/v")["counters"]["errors"] == 0


def test_one_open_for_all_that_wait():
    with cluster() as (daemon, (store,)):
        daemon.qbd("create", "ram/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "ram/v").succeeded().out.strip()
        handle = connected(uri)
        handle.pread(512, 0)
        before = store.faults()["seen"]["opens"]
        store.faults(reopen=64)
        pending = []
        for index in range(32):
            pending.append(handle.aio_pread(nbd.Buffer(4096), index * 4096))
            pending.append(handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), MiB + index * 4096))
        while handle.aio_in_flight():
            assert handle.poll(10_000) == 1
        for cookie in pending:
            assert handle.aio_command_completed(cookie)
        # A second one where the answers came in two pieces.
        assert 1 <= store.faults()["seen"]["opens"] - before <= 3
        handle.shutdown()


def test_a_store_that_dies_under_load_and_comes_back():
    with cluster() as (daemon, (store,)):
        daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
        failures = []

        def watched():
            try:
                verify(uri, 8)
            except AssertionError as failure:
                failures.append(failure)

        load = threading.Thread(target=watched)
        load.start()
        for _ in range(5):
            time.sleep(random.uniform(0.2, 0.8))
            store.kill()
            time.sleep(random.uniform(0, 0.5))
            store.start()
        load.join()
        assert not failures, failures
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


def test_a_store_that_stays_away_fails_io_and_recovers():
    with cluster(io_timeout=2) as (daemon, (store,)):
        daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
        handle = connected(uri)
        handle.pwrite(b"a" * 4096, 0)
        store.kill()
        began = time.monotonic()
        with pytest.raises(nbd.Error, match="(?i)input/output error"):
            handle.pwrite(b"b" * 4096, 0)
        assert 1.5 < time.monotonic() - began < 30
        store.start()
        wait_for(lambda: _reads(handle), "I/O again", 20)
        handle.shutdown()


def _reads(handle):
    try:
        return handle.pread(4096, 0)
    except nbd.Error:
        return None


def test_no_conductor():
    with cluster() as (daemon, (store,)):
        store.kill()
        began = time.monotonic()
        failed = daemon.qbd("map", "--export", "disk/v")
        failed.failed(110, "conductor", "cannot be reached")
        assert time.monotonic() - began < 30
        store.start()


def test_snapshots_of_a_cluster():
    with cluster() as (daemon, (store,)):
        daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
        # Of a volume that is not mapped, that is, and that has I/O.
        daemon.qbd("snapshot", "create", "disk/v@empty").succeeded()
        uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
        handle = connected(uri)
        handle.pwrite(b"a" * MiB, 63 * MiB + 512 * KiB)
        over = threading.Event()

        def write():
            writer = connected(uri)
            while not over.is_set():
                writer.pwrite(os.urandom(4096), 512 * MiB)
            writer.shutdown()

        load = threading.Thread(target=write)
        load.start()
        try:
            answer = daemon.json("snapshot", "create", "disk/v@first")
        finally:
            over.set()
            load.join()
        assert (answer["snapshot"], answer["size"]) == ("disk/v@first", GiB)
        handle.pwrite(b"b" * MiB, 63 * MiB + 512 * KiB)
        daemon.qbd("resize", "disk/v", "-k", "2G").succeeded()
        daemon.qbd("snapshot", "create", "disk/v@first").failed(17, "disk/v@first")
        daemon.qbd("snapshot", "create", "disk/none@s").failed(2, "none")
        daemon.qbd("create", "ram/v", "-k", "64M").succeeded()
        daemon.qbd("snapshot", "create", "ram/v@s").failed(121, "ram", "no snapshots")

        for name, expected in (("empty", bytes(MiB)), ("first", b"a" * MiB)):
            mapped = daemon.qbd("map", "--export", f"tcp://disk/v@{name}").succeeded().out.strip()
            snapshot = connected(mapped)
            assert snapshot.get_size() == GiB and snapshot.is_read_only()
            assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == expected
            snapshot.set_strict_mode(0)
            with pytest.raises(nbd.Error):
                snapshot.pwrite(bytes(4096), 0)
            # As after a failure of the store.
            store.faults(reopen=1)
            assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == expected
            snapshot.shutdown()
            status = daemon.json("info", f"disk/v@{name}")
            assert status["read_only"] and status["size"] == GiB
        assert handle.pread(MiB, 63 * MiB + 512 * KiB) == b"b" * MiB
        handle.shutdown()
        daemon.qbd("map", "--export", "disk/v@none").failed(2, "none")

        # What a conductor cannot do.
        for words in (["list", "disk/v"], ["delete", "disk/v@first"]):
            daemon.qbd("snapshot", *words).failed(95, "a PureFlash conductor has no operation to", "disk/v")
        daemon.qbd("clone", "disk/v@first", "disk/w").failed(95, "a PureFlash conductor has no operation to", "disk/w")

        # A new daemon has the snapshot mapped as well.
        daemon.stop()
        daemon.start()
        snapshot = connected(daemon.uri("disk/v@first"))
        assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == b"a" * MiB
        snapshot.shutdown()
        for name in ("disk/v@first", "disk/v@empty", "disk/v"):
            daemon.qbd("unmap", name).succeeded()
        daemon.qbd("snapshot", "rollback", "disk/v@first").failed(95, "a PureFlash conductor has no operation to")
        daemon.qbd("delete", "disk/v").succeeded()


def test_rdma_is_refused():
    with cluster() as (daemon, _):
        daemon.qbd("create", "ram/v", "-k", "64M").succeeded()
        for words in (
            ["create", "rdma://ram/w", "-k", "64M"], ["delete", "rdma://ram/v"], ["map", "--export", "rdma://ram/v"],
            ["resize", "rdma://ram/v", "-k", "128M"], ["snapshot", "create", "rdma://ram/v@s"],
        ):  # fmt: skip
            daemon.qbd(*words).failed(95, "rdma://", "later version", "use tcp://")
        daemon.stop()
        daemon.config.write_text(daemon.config.read_text() + "conn_type=rdma\n")
        daemon.start()
        daemon.qbd("map", "--export", "ram/v").failed(95, "rdma://", "later version", "use tcp://")
        # The name's scheme comes before the configuration, also for the next daemon.
        daemon.qbd("map", "--export", "tcp://ram/v").succeeded()
        daemon.stop()
        daemon.start()
        handle = connected(daemon.uri("ram/v"))
        handle.pwrite(b"x" * 512, 0)
        handle.shutdown()
        daemon.qbd("unmap", "tcp://ram/v").succeeded()
