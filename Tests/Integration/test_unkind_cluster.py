"""Clusters that behave as PureFlash's was seen to: a conductor that believes in a store for seconds after its death, writes
off for good what it could not reach, makes snapshots store by store, and ends when a store comes back."""

import signal
import struct
import threading
import time

import nbd
import pytest
from harness import SLOWNESS, wait_for
from pureflash import SHARD
from test_pureflash import connected
from test_pureflash_faults import BUSY, Probe, RESUMES, mapped, stand_still
from unkind import BELIEF, unkind

def is_written_off(conductor, volume="v"):
    return "written_off" in (conductor.pool_path / f"{volume}.pureflash").read_text()


def store_nodes(conductor):
    return {node["mngt_ip"]: node["status"] for node in conductor.ok("list_store")["store_nodes"]}


def test_the_conductor_writes_off_what_it_cannot_reach():
    """What the others of this file stand on."""
    with unkind(supervised=False) as (daemon, conductor, (store,)):
        daemon.qbd("create", "disk/v", "-k", "64M").succeeded()
        store.kill()
        assert store_nodes(conductor) == {store.address: "OK"}
        assert conductor.open("disk", "v")["shards"][0]["store_ips"] == ""
        wait_for(lambda: store_nodes(conductor) == {store.address: "OFFLINE"}, "the store is missed", 20)
        store.start()
        wait_for(lambda: store_nodes(conductor) == {store.address: "OK"}, "the store is back", 20)
        assert conductor.open("disk", "v")["shards"][0]["store_ips"] == "", "for good"


@pytest.mark.deadline(180)
@pytest.mark.parametrize("away", [0.3, 2, 10, pytest.param(60, marks=pytest.mark.long)])
def test_a_store_that_is_the_only_one_restarts(away):
    with unkind(io_timeout=120) as (daemon, conductor, (store,)):
        probe = Probe(mapped(daemon, "disk/v"))
        wait_for(lambda: probe.count > 20, "I/O before", 20)
        opens = conductor.faults()["seen"]["opens"]
        store.kill()
        end = time.monotonic() + away
        while time.monotonic() < min(end, end - away + BELIEF / 1000):
            assert conductor.faults()["seen"]["opens"] <= opens, "the conductor is asked while it believes in the store"
            time.sleep(0.05)
        while time.monotonic() < end:
            time.sleep(0.05)
        store.start()
        late = probe.resumed(time.monotonic(), "the store's start")
        probe.end()
        assert not is_written_off(conductor)
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0
        print(f"away for {away} s: I/O goes on {late:.2f} s after the start")


@pytest.mark.deadline(120)
def test_a_store_that_is_away_for_too_long():
    """What waits fails in time; new I/O works as soon as the store is back."""
    with unkind(io_timeout=4) as (daemon, conductor, (store,)):
        handle = connected(mapped(daemon, "disk/v"))
        handle.pwrite(b"a" * 4096, 0)
        store.kill()
        began = time.monotonic()
        with pytest.raises(nbd.Error, match="(?i)input/output error"):
            handle.pread(4096, 0)
        assert 3.9 < time.monotonic() - began < 4 + RESUMES + BUSY
        while time.monotonic() - began < 9:
            time.sleep(0.1)
        store.start()
        well = time.monotonic()
        assert handle.pread(4096, 0) == b"a" * 4096
        assert time.monotonic() - well < RESUMES + BUSY
        assert not is_written_off(conductor)
        handle.shutdown()


@pytest.mark.deadline(120)
def test_map_while_the_only_store_restarts():
    with unkind(io_timeout=30, open_volume_timeout=20) as (daemon, conductor, (store,)):
        daemon.qbd("create", "disk/v", "-k", "64M").succeeded()
        store.kill()
        answer = []
        mapping = threading.Thread(target=lambda: answer.append(daemon.qbd("map", "--export", "disk/v")))
        mapping.start()
        wait_for(lambda: "does not answer" in daemon.log(), "it is said why the map waits", 20)
        time.sleep(2)
        assert mapping.is_alive()
        store.start()
        mapping.join()
        handle = connected(answer[0].succeeded().out.strip())
        handle.pwrite(b"m" * 4096, 0)
        handle.shutdown()
        assert not is_written_off(conductor)


def test_a_store_that_stands_still_is_not_written_off():
    with unkind(io_timeout=8, conn_timeout=1) as (daemon, conductor, (store,)):
        probe = Probe(mapped(daemon, "disk/v"))
        wait_for(lambda: probe.count > 20, "I/O before", 20)
        stand_still(store)
        # It is late from here on, and the conductor would be asked whether another store has the shard.
        time.sleep(3.5)
        store.process.send_signal(signal.SIGCONT)
        probe.resumed(time.monotonic(), "the store's going on")
        probe.end()
        assert not is_written_off(conductor)


@pytest.mark.deadline(120)
def test_one_of_two_stores_restarts():
    """The other's shard goes on, and asking for that costs the first nothing."""
    with unkind(2, io_timeout=60) as (daemon, conductor, stores):
        uri = mapped(daemon, "disk/v", "100G")
        first, second = Probe(uri, 0), Probe(uri, SHARD)
        wait_for(lambda: first.count > 20 and second.count > 20, "I/O before", 20)
        stores[0].kill()
        time.sleep(1)
        count = second.count
        wait_for(lambda: second.count > count + 20, "the other store's I/O", 5)
        stores[0].start()
        first.resumed(time.monotonic(), "the store's start")
        for probe in (first, second):
            probe.end()
        assert not is_written_off(conductor)


def test_no_snapshot_while_a_store_is_away():
    with unkind(2, supervised=False, io_timeout=60) as (daemon, conductor, stores):
        conductor.faults(apart=1)
        mapped(daemon, "disk/v", "100G")
        stores[1].kill()
        daemon.qbd("snapshot", "create", "disk/v@s").failed(112, stores[1].address)
        assert not is_written_off(conductor)
        stores[1].start()
        daemon.qbd("snapshot", "create", "disk/v@s").succeeded()


@pytest.mark.deadline(120)
def test_a_snapshot_over_two_stores_is_of_one_moment():
    """Each number is written to the second store after it was acknowledged by the first."""
    with unkind(2, io_timeout=60) as (daemon, conductor, stores):
        uri = mapped(daemon, "disk/v", "100G")
        over = threading.Event()
        count = 0

        def write():
            nonlocal count
            writer = connected(uri)
            while not over.is_set():
                count += 1
                for offset in (0, SHARD):
                    writer.pwrite(struct.pack("<512Q", *[count] * 512), offset)
            writer.shutdown()

        load = threading.Thread(target=write)
        load.start()
        try:
            conductor.faults(apart=500)
            for number in range(4):
                before = count
                wait_for(lambda: count > before + 10, "writes between the snapshots", 20)
                daemon.qbd("snapshot", "create", f"disk/v@s{number}").succeeded()
        finally:
            over.set()
            load.join()
        for number in range(4):
            handle = connected(daemon.qbd("map", "--export", f"disk/v@s{number}").succeeded().out.strip())
            first, second = (struct.unpack("<512Q", handle.pread(4096, offset))[0] for offset in (0, SHARD))
            handle.shutdown()
            assert first - second in (0, 1), f"s{number} has {first} at one store and {second} at the other"
        assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


@pytest.mark.deadline(120)
def test_a_conductor_that_takes_too_long_for_a_snapshot():
    """I/O goes on after 15 s, and it is said that the snapshot may be made yet."""
    with unkind(2, io_timeout=60) as (daemon, conductor, stores):
        handle = connected(mapped(daemon, "disk/v", "100G"))
        handle.pwrite(b"a" * 4096, 0)
        conductor.faults(apart=22_000)
        answer = []
        began = time.monotonic()
        making = threading.Thread(target=lambda: answer.append(daemon.qbd("snapshot", "create", "disk/v@s")))
        making.start()
        wait_for(lambda: daemon.json("info", "disk/v")["state"] == "suspended", "I/O is held back", 20)
        handle.pwrite(b"b" * 4096, 0)
        assert 13 < time.monotonic() - began < 17 * SLOWNESS
        making.join()
        answer[0].failed(110, "disk/v", "not of one moment", "delete it")
        wait_for(lambda: "made the snapshot disk/v@s" in conductor.log(), "it is made after all", 30)
        daemon.qbd("snapshot", "delete", "disk/v@s").succeeded()
        handle.shutdown()


def test_readonly_passes():
    with unkind() as (daemon, conductor, (store,)):
        handle = connected(mapped(daemon, "disk/v"))
        handle.pwrite(b"a" * 4096, 0)
        opens = conductor.faults()["seen"]["opens"]
        store.faults(read_only=3)
        handle.pwrite(b"b" * 4096, 0)
        assert handle.pread(4096, 0) == b"b" * 4096
        assert conductor.faults()["seen"]["opens"] == opens, "the conductor cannot help"
        info = daemon.json("info", "disk/v")
        assert info["counters"]["errors"] == 0 and info["health"] in ("idle", "active")
        wait_for(lambda: "I/O waits: " in daemon.log() and "READONLY" in daemon.log(), "the log says why I/O waited")
        wait_for(lambda: "I/O goes on" in daemon.log(), "the log says that it goes on")
        handle.shutdown()


def test_readonly_that_does_not_pass():
    with unkind(io_timeout=2) as (daemon, conductor, (store,)):
        handle = connected(mapped(daemon, "disk/v"))
        store.faults(read_only=1_000_000)
        with pytest.raises(nbd.Error, match="(?i)input/output error"):
            handle.pwrite(b"b" * 4096, 0)
        assert "READONLY" in daemon.log().split("fails: not done after 2 s")[1]
        store.faults(read_only=0)
        handle.pwrite(b"b" * 4096, 0)
        wait_for(lambda: daemon.json("info", "disk/v")["health"] in ("idle", "active"), "the health is good again", 20)
        handle.shutdown()


def test_a_full_store():
    """Bare REOPEN to each write, for as long as there is no space."""
    with unkind(io_timeout=2) as (daemon, conductor, (store,)):
        handle = connected(mapped(daemon, "disk/v"))
        handle.pwrite(b"a" * 4096, 0)
        store.faults(full=1)
        with pytest.raises(nbd.Error, match="(?i)input/output error"):
            handle.pwrite(b"b" * 4096, 0)
        assert handle.pread(4096, 0) == b"a" * 4096
        store.faults(full=0)
        handle.pwrite(b"b" * 4096, 0)
        handle.shutdown()


def test_a_store_that_closes_before_its_first_answer():
    with unkind() as (daemon, conductor, (store,)):
        uri = mapped(daemon, "disk/v")
        store.faults(close_first=1)
        handle = connected(uri)
        handle.pwrite(b"a" * 4096, 0)
        handle.shutdown()
        assert "closed the connection before its first answer" in daemon.log()
        assert "no room" not in daemon.log()


def test_no_volume_takes_all_the_room_of_a_store():
    with unkind(connections_per_store=4) as (daemon, conductor, (store,)):
        store.faults(room=4)
        first, second = (connected(mapped(daemon, f"disk/{name}", "64M")) for name in "vw")
        for number in range(16):
            first.pwrite(b"a" * 4096, number * 4096)
        wait_for(lambda: daemon.json("info", "disk/v")["stores"][0]["connections"] == 4, "all the room is taken")
        second.pwrite(b"b" * 4096, 0)
        assert second.pread(4096, 0) == b"b" * 4096
        assert first.pread(4096, 0) == b"a" * 4096
        assert daemon.json("info", "disk/v")["stores"][0]["connections"] == 3
        log = daemon.log()
        assert "is given back: it has no room for one of disk/w" in log and "disk/v gives one of its own back" in log, log
        for handle in (first, second):
            handle.shutdown()


def test_a_size_that_needs_another_shard_is_refused():
    with unkind() as (daemon, conductor, (store,)):
        daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
        daemon.qbd("resize", "disk/v", "-k", "2G").succeeded()
        daemon.qbd("resize", "disk/v", "-k", "65G").failed(95, "its shards hold 68719476736")
        assert daemon.json("volumes", "disk")[0]["size"] == 2 << 30
        handle = connected(daemon.qbd("map", "--export", "disk/v").succeeded().out.strip())
        daemon.qbd("resize", "disk/v", "-k", "65G").failed(95, "its shards hold 68719476736")
        daemon.qbd("resize", "disk/v", "-k", "64G").succeeded()
        handle.shutdown()
        assert conductor.open("disk", "v")["volume_size"] == 64 << 30


@pytest.mark.deadline(180)
def test_a_conductor_that_hangs():
    """What it was asked to change ends after a minute, and nobody knows what became of it."""
    with unkind(supervised=False) as (daemon, conductor, _):
        daemon.qbd("create", "disk/v", "-k", "64M").succeeded()
        stand_still(conductor)
        try:
            answers = {}
            commands = {"create": ("create", "disk/w", "-k", "64M"), "delete": ("delete", "disk/v")}
            threads = [
                threading.Thread(target=lambda name=name: answers.update({name: daemon.qbd(*commands[name], timeout=90)}))
                for name in commands
            ]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert 59 < time.monotonic() - began < 70 + 10 * (SLOWNESS - 1)
        finally:
            conductor.process.send_signal(signal.SIGCONT)
        for answer in answers.values():
            answer.failed(110, "may have done what it was asked, or still do it")
        wait_for(lambda: [volume["volume"] for volume in daemon.json("volumes", "disk")] == ["disk/w"], "it did both", 20)
