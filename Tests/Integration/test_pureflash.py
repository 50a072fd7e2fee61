"""qbdd with volumes of a PureFlash cluster, which is one or more qbd-stores."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time

import nbd
import pytest
from harness import KiB, MiB, QBD, SLOWNESS, Daemon, environment, run, wait_for
from pureflash import OBJECT, SHARD, Store, addresses

GiB = 1024 * MiB


def started(stores, **client):
    """A daemon that knows the conductor, the first of the stores, and nothing else."""
    first = stores[0]
    daemon = Daemon()
    keys = {
        "store_port": first.data_port, "store_http_port": first.store_port, "io_timeout": 30, "conn_timeout": 3,
        "open_volume_timeout": 3, **client,
    }  # fmt: skip
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
    """Fio's own check of what it has written, with I/O of all sizes. Returns how many reads and writes it did."""
    done = subprocess.run(
        ["fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=512-256k", "--iodepth=32",
         # Not time_based: with that fio begins the next pass while it still verifies the last, and reads what it writes.
         "--size=256M", "--loops=10000", f"--runtime={seconds}", "--verify=crc32c", "--verify_state_save=0",
         "--verify_fatal=1", "--verify_backlog=64", "--output-format=json", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    return job["read"]["total_ios"], job["write"]["total_ios"]


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


def test_one_open_for_all_that_wait():
    with cluster() as (daemon, (store,)):
        daemon.qbd("create", "ram/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "ram/v").succeeded().out.strip()
        handle = connected(uri)
        handle.pread(512, 0)
        before = store.faults()["seen"]["opens"]
        store.faults(reopen=64)
        # All at once, also where the client is slower than the store.
        daemon.qbd("suspend", "ram/v").succeeded()
        pending = []
        for index in range(32):
            pending.append(handle.aio_pread(nbd.Buffer(4096), index * 4096))
            pending.append(handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), MiB + index * 4096))
        while daemon.json("info", "ram/v")["held_back"]["requests"] < len(pending):
            handle.poll(10)
        daemon.qbd("resume", "ram/v", "-t", "normal").succeeded()
        while handle.aio_in_flight():
            assert handle.poll(10_000) == 1
        for cookie in pending:
            assert handle.aio_command_completed(cookie)
        assert store.faults()["seen"]["opens"] - before == 1
        handle.shutdown()


def test_no_conductor():
    with cluster() as (daemon, (store,)):
        store.kill()
        began = time.monotonic()
        failed = daemon.qbd("map", "--export", "disk/v")
        failed.failed(110, "not ready within 3 s: the conductor", "cannot be reached")
        assert time.monotonic() - began < 30
        # 111 would say that qbdd is not running.
        for words in (("create", "disk/v", "-k", "1M"), ("volumes", "disk"), ("delete", "disk/v")):
            daemon.qbd(*words).failed(112, f"the conductor {store.address}", "refused", "[conductor] endpoints")
        # The pools are listed all the same, of which there are none.
        result = daemon.qbd("volumes")
        assert result.status == 112 and "tenants" in result.err and len(result.out.splitlines()) == 1, str(result)
        store.start()


def test_a_host_name_that_is_not_known(daemon):
    daemon.config.write_text("[conductor]\nendpoints=nosuchhost.invalid\n")
    failed = daemon.qbd("create", "disk/v", "-k", "1M").failed(113, "nosuchhost.invalid")
    # "Name or service not known", or why it could not be looked up.
    assert "name" in failed.err.split("reached:")[1].lower() and "no route" not in failed.err.lower(), str(failed)


def test_time_to_become_ready_is_of_the_configuration_of_the_map(daemon):
    other = daemon.directory / "cluster.conf"
    for seconds in (1, 2):
        # Nobody listens at port 1.
        other.write_text(f"[conductor]\nendpoints=127.0.0.1:1\n[client]\nopen_volume_timeout={seconds}\n")
        daemon.qbd("map", "--export", "disk/v", "-c", other).failed(110, f"not ready within {seconds} s:")


def test_a_map_that_waits_is_given_up(daemon):
    """By an unmap, and by the end of the daemon."""
    daemon.config.write_text("[conductor]\nendpoints=127.0.0.1:1\n")
    other = daemon.directory / "other.conf"
    other.write_text(daemon.config.read_text())

    def begin():
        began = time.monotonic()
        maps = [
            subprocess.Popen(
                [QBD, "map", "--export", "disk/v"], env=environment(**daemon.variables), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]  # fmt: skip
        wait_for(lambda: "cannot be reached" in daemon.qbd("info", "disk/v").failed(25).err, "a try has failed")
        return began, maps

    for force in ((), ("--force",)):
        began, maps = begin()
        daemon.qbd("info", "disk/v").failed(25, "is being mapped", "the conductor 127.0.0.1:1", "qbd unmap disk/v")
        assert daemon.json("list") == []
        daemon.qbd("unmap", "disk/v", "-c", other).failed(25, "not mapped with")
        assert all(one.poll() is None for one in maps)
        daemon.qbd("unmap", "disk/v", *force).succeeded()
        for one in maps:
            out, err = one.communicate(timeout=30)
            assert (one.returncode, out) == (125, "") and "disk/v was unmapped before it was ready" in err
        daemon.qbd("unmap", "disk/v", *force).failed(25, "not mapped")
        assert time.monotonic() - began < 60 * SLOWNESS
    began, maps = begin()
    daemon.stop()
    for one in maps:
        out, err = one.communicate(timeout=30)
        assert (one.returncode, out) == (108, "") and "qbdd is stopping" in err


def test_volumes_of_a_cluster():
    with cluster() as (daemon, _):
        daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
        daemon.qbd("create", "ram/v", "-k", "64M").succeeded()
        local = daemon.directory / "local"
        daemon.config.write_text(daemon.config.read_text() + f"[pool.ram]\ntype=local\npath={local}\n")
        daemon.qbd("create", "ram/w", "-k", "1M").succeeded()
        # All tenants, but not the one whose name a pool has.
        rows = [line.split() for line in daemon.qbd("volumes").succeeded().out.splitlines()]
        assert [row[1] for row in rows] == ["volume", "disk/v", "ram/w"]
        assert rows[1][4] == "-" and rows[2][4].startswith("20")
        first, second = daemon.json("volumes")
        assert "created" not in first and second["created"] > 0
        # No such tenant.
        daemon.qbd("volumes", "nope").failed(2, "nope")
        daemon.qbd("map", "nope/v", "--export").failed(2, "nope")
        daemon.qbd("create", "nope/v", "-k", "1G").failed(2, "no tenant 'nope'")
        daemon.qbd("create", "disk/w", "-k", "1000").failed(22)


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

        # The store was started again, and another client was the first to open the volume.
        snapshot = connected(daemon.uri("disk/v@first"))
        assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == b"a" * MiB
        store.kill()
        store.start()
        store.open("disk", "v")
        assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == b"a" * MiB
        snapshot.shutdown()

        # What a conductor cannot do.
        daemon.qbd("snapshot", "list", "disk/v").failed(95, "a PureFlash conductor has no operation to", "disk/v")
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
        # Without the one before it, the other is as it was.
        daemon.qbd("snapshot", "delete", "disk/v@empty").succeeded()
        daemon.qbd("snapshot", "delete", "disk/v@empty").failed(2, "empty")
        mapped = daemon.qbd("map", "--export", "disk/v@first").succeeded().out.strip()
        daemon.qbd("snapshot", "delete", "disk/v@first").failed(16, "disk/v@first", "unmap it")
        snapshot = connected(mapped)
        assert snapshot.pread(MiB, 63 * MiB + 512 * KiB) == b"a" * MiB
        snapshot.shutdown()
        daemon.qbd("unmap", "disk/v@first").succeeded()
        daemon.qbd("snapshot", "delete", "disk/v@first").succeeded()
        daemon.qbd("map", "--export", "disk/v@first").failed(2, "first")
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


def stand_still(process):
    """SIGSTOP, and returns when the last thread has stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def handshakes(stores):
    return [store.faults()["seen"]["handshakes"] for store in stores]


def test_info_of_a_cluster_s_volume():
    with cluster(3) as (daemon, stores):
        daemon.qbd("create", "disk/v", "-k", "200G").succeeded()
        mapped = daemon.qbd("map", "--export", "disk/v", "-V").succeeded()
        uri = mapped.out.strip()
        addresses = [store.address for store in stores]
        assert mapped.err.splitlines()[1:] == [
            f"conductor {addresses[0]}:{stores[0].conductor_port}", "shards 4",
            f"store {addresses[0]}, unused, shards 0 3, 0 connections, 0 in flight",
            f"store {addresses[1]}, unused, shard 1, 0 connections, 0 in flight",
            f"store {addresses[2]}, unused, shard 2, 0 connections, 0 in flight",
        ]

        def info():
            return daemon.json("info", "disk/v")

        def state(index):
            return next(store for store in info()["stores"] if store["address"] == addresses[index])

        # Shard n is at store n modulo three, and nothing was asked yet.
        shards = info()["shards"]
        assert [(shard["index"], shard["stores"], shard["store"]) for shard in shards] == [
            (index, [addresses[index % 3]], addresses[index % 3]) for index in range(4)
        ]
        assert [(store["address"], store["state"], store["connections"]) for store in info()["stores"]] == [
            (address, "unused", 0) for address in addresses
        ]
        handle = connected(uri)
        handle.pread(4096, 0)
        assert [state(index)["state"] for index in range(3)] == ["connected", "unused", "unused"]
        for shard in range(4):
            handle.pread(4096, shard * SHARD)
        assert [(state(index)["state"], state(index)["connections"]) for index in range(3)] == [("connected", 1)] * 3
        assert handshakes(stores) == [1, 1, 1], "two shards at one store share its connection"
        text = daemon.qbd("info", "disk/v").succeeded().out
        assert f"{addresses[0]}, connected, shards 0 3, 1 connection, 0 in flight" in text
        assert "waits:         no\n" in text and "waits" not in info()

        # A store that stands still.
        stand_still(stores[1].process)
        try:
            cookie = handle.aio_pread(nbd.Buffer(4096), SHARD)
            waits = wait_for(lambda: info().get("waits"), "info says that I/O waits")
            assert f"the store {addresses[1]} does not answer" in waits and waits.startswith("a request waits for 1.")
            assert (state(1)["state"], state(1)["in_flight"]) == ("connected", 1)
            # The others go on.
            handle.pread(4096, 0)
        finally:
            stores[1].process.send_signal(signal.SIGCONT)
        wait_for(lambda: handle.poll(10) == 1 and handle.aio_command_completed(cookie), "the read is done")
        assert "waits" not in info()

        # One that is gone.
        stores[2].kill()
        wait_for(lambda: state(2)["state"] == "lost", "the lost connection is noticed")
        handle.pread(4096, 0)
        assert "waits" not in info(), "nobody waits for it"
        cookie = handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 2 * SHARD)

        # At first the connection is lost; then the conductor says that nobody has the shard.
        waits = wait_for(lambda: info().get("waits"), "info says that I/O waits")
        assert waits.startswith("a request waits for") and ("refused" in waits or "shard 2" in waits)
        wait_for(lambda: "no store serves shard 2" in info()["waits"], "info says what is wrong")
        handle.pread(4096, 0)
        assert "no store serves shard 2" in info()["waits"], "what other stores answer is no reason to be content"
        text = daemon.qbd("info", "disk/v").succeeded().out
        assert "shards:        4, no store serves 2\n" in text and "waits:         a request waits for" in text
        assert info()["shards"][2] == {"index": 2, "stores": []}
        stores[2].start()
        wait_for(lambda: handle.poll(10) == 1 and handle.aio_command_completed(cookie), "the write is done")
        assert state(2)["state"] == "connected" and "trouble" not in state(2) and "waits" not in info()
        handle.shutdown()
        unmapped = daemon.qbd("unmap", "disk/v", "-V").succeeded()
        lines = unmapped.err.splitlines()
        assert unmapped.out == "" and lines[0].startswith("unmapped disk/v id=0x"), str(unmapped)
        assert lines[1:3] == [f"conductor {addresses[0]}:{stores[0].conductor_port}", "shards 4"]
        assert [line.split(",")[0] for line in lines[3:]] == [f"store {address}" for address in addresses]
        daemon.qbd("unmap", "disk/v", "-V").failed(25)


def test_several_connections_to_a_store():
    with cluster(connections_per_store=4) as (daemon, (store,)):
        daemon.qbd("create", "ram/v", "-k", "1G").succeeded()
        uri = daemon.qbd("map", "--export", "ram/v").succeeded().out.strip()
        handle = connected(uri)
        handle.pread(512, 0)
        assert handshakes([store]) == [1], "connections are made on demand"
        verify(uri, 2)
        assert handshakes([store]) == [4]
        assert daemon.json("info", "ram/v")["stores"][0]["connections"] == 4
        # One that is lost with requests on it takes the others with it: none may overtake what the store still does.
        store.faults(drop=300)
        verify(uri, 2)
        store.faults(clear=1)
        handle.pwrite(b"a" * 512, 0)
        before = handshakes([store])[0]
        store.faults(stop=1)
        cookie = handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"b" * 512)), 0)
        wait_for(lambda: daemon.json("info", "ram/v")["stores"][0]["in_flight"] == 1, "the write is at the store")
        store.faults(wrong_id=1, stop=0)
        wait_for(lambda: handle.poll(10) == 1 and handle.aio_command_completed(cookie), "the write is done")
        verify(uri, 1)
        assert handshakes([store])[0] == before + 4
        assert daemon.json("info", "ram/v")["counters"]["errors"] == 0
        handle.shutdown()
