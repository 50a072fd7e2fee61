"""A store, or a conductor, that means harm, beside good ones in the same daemon."""

import contextlib
import json
import re
import time

import nbd
import pytest
from bystander import Bystander
from harness import MiB, SANITIZER, SLOWNESS, Daemon, wait_for
from hostile import (
    CONDUCTORS, SIZE, SLOW_CONDUCTORS, STORES, Cluster, Spent, at, changed, degraded, dripping_reply, good, http, lying,
    refusing_once, saying, swallowing_reads, until_good, untidy, with_room_for,
)  # fmt: skip
from pureflash import DEGRADE, READ, Store
from test_pureflash import GiB, verify

IO_TIMEOUT = 1


@contextlib.contextmanager
def surroundings(stores=1, open_volume_timeout=2):
    """A daemon with a volume of its own and one of a good cluster, both under a load that verifies, and a hostile
    cluster with the configuration that leads there."""
    cluster = Cluster(stores)
    store = Store().start()
    daemon = Daemon(configuration=f"[client]\nopen_volume_timeout={open_volume_timeout}\n")
    bystanders = []
    try:
        daemon.start()
        friend = daemon.directory / "friend.conf"
        friend.write_text(
            f"[conductor]\nendpoints={store.address}:{store.conductor_port}\n[client]\nstore_port={store.data_port}\n"
        )
        hostile = daemon.directory / "hostile.conf"
        hostile.write_text(cluster.configuration(io_timeout=IO_TIMEOUT))
        daemon.create("ram/own", "64M")
        store.create("ram", "v", 64 * MiB)
        for volume, config in (("ram/own", daemon.config), ("ram/v", friend)):
            # One name, one volume: the good cluster's tenant has the name of the daemon's own pool.
            uri = daemon.qbd("map", "--export", volume, "-c", str(config)).succeeded().out.strip()
            bystanders.append(Bystander(uri, (0, 8 * MiB), pause=0.01))
        yield daemon, cluster, hostile, bystanders
        for bystander in bystanders:
            bystander.assert_unharmed()
            bystander.stop()
    finally:
        daemon.finish()
        store.finish()
        cluster.close()


def mapped(daemon, cluster, hostile, names):
    """Handles of hostile volumes that are good yet."""
    handles = {}
    for name in names:
        cluster.volume(name)
        uri = daemon.qbd("map", "--export", f"x/{name}", "-c", str(hostile)).succeeded().out.strip()
        handles[name] = nbd.NBD()
        handles[name].connect_uri(uri)
        handles[name].pwrite(b"w" * 4096, 4096)
    return handles


class Flight:
    """Reads and writes of a volume that are under way."""

    def __init__(self, handle, count=4):
        self.handle = handle
        self.cookies = []
        self.errors = []
        self.pending = count * 2
        self.seconds = None
        self.began = time.monotonic()
        for number in range(count):
            handle.aio_pread(nbd.Buffer(65536), number * 65536, completion=self._completed)
            data = nbd.Buffer.from_bytearray(bytearray(b"n" * 65536))
            handle.aio_pwrite(data, MiB + number * 65536, completion=self._completed)

    def _completed(self, error):
        self.errors.append(error.value)
        self.seconds = time.monotonic() - self.began
        # Retired: one more completion would not be counted, but libnbd tells of an answer to nothing it asked.
        return 1

    def landed(self):
        while self.handle.poll(0) > 0:
            pass
        return len(self.errors) == self.pending


def landed(flights, seconds):
    wait_for(lambda: all([flight.landed() for flight in flights.values()]), "all I/O is completed", seconds, pause=0.02)


@pytest.mark.deadline(180)
def test_hostile_stores():
    with surroundings() as (daemon, cluster, hostile, bystanders):
        handles = mapped(daemon, cluster, hostile, STORES)
        resident = []
        for turn in range(3):
            counts = {name: volume.connected for name, volume in cluster.volumes.items()}
            spent = Spent(daemon)
            for name, volume in cluster.volumes.items():
                volume.store = STORES[name][0]
                cluster.disconnect(volume)
            flights = {name: Flight(handle) for name, handle in handles.items()}
            landed(flights, IO_TIMEOUT + 10)
            elapsed = time.monotonic() - spent.began
            used = spent.seconds()
            for name, flight in flights.items():
                assert set(flight.errors) == {5}, f"{name}: instead of EIO {flight.errors}"
                assert flight.seconds > IO_TIMEOUT * 0.9, f"{name}: given up after {flight.seconds:.2f} s"
                assert used[f"qbd:x/{name}"[:15]] < 0.2 * elapsed * SLOWNESS + 0.1, f"{name} spins: {used}"
                tries = cluster.volumes[name].connected - counts[name]
                assert tries <= 12 * elapsed + 4, f"{name}: {tries} connections in {elapsed:.1f} s"
            for bystander in bystanders:
                bystander.assert_unharmed()
            # What is in flight goes on within a second of the store being good again.
            flights = {name: Flight(handle) for name, handle in handles.items()}
            for volume in cluster.volumes.values():
                volume.store = good
                cluster.disconnect(volume)
            well = time.monotonic()
            landed(flights, 10)
            for name, flight in flights.items():
                assert set(flight.errors) == {0}, f"{name}: {flight.errors}"
                late = flight.began + flight.seconds - well
                assert late < 2 * SLOWNESS, f"{name}: goes on {late:.2f} s after its store is good again"
            for name, handle in handles.items():
                assert handle.pread(65536, MiB) == b"n" * 65536
            resident.append(daemon.resident())
        assert resident[-1] < resident[0] + (96 if SANITIZER else 24) * MiB, f"memory grows: {resident}"
        overlaps = {name: volume.overlaps for name, volume in cluster.volumes.items() if volume.overlaps}
        assert not overlaps, f"connected again before the last connection was closed: {overlaps}"
        log = daemon.log().splitlines()
        for name, (_, words) in STORES.items():
            lines = [line for line in log if re.search(rf"x/{name}\b", line)]
            assert any(re.search(words, line) for line in lines), f"{name}: the log does not say {words!r}:\n" + "\n".join(lines)
            assert any("not done after 1 s" in line for line in lines), "\n".join(lines)
            assert len(lines) < 60, f"{name} fills the log:\n" + "\n".join(lines)
        for handle in handles.values():
            handle.shutdown()


@pytest.mark.deadline(180)
def test_hostile_conductors_when_mapping():
    with surroundings() as (daemon, cluster, hostile, bystanders):
        def refused(name, conductor):
            cluster.volume(name).conductor = conductor
            began = time.monotonic()
            result = daemon.qbd("map", "--export", f"x/{name}", "-c", str(hostile))
            assert result.status != 0, f"{name}: {result}"
            result.failed(result.status, "conductor")
            assert result.err.rstrip("\n").isprintable(), f"{name}: {result.err!r}"
            assert len(result.err) < 1500, f"{name}: {result.err!r}"
            assert time.monotonic() - began < 10 * SLOWNESS, f"{name}: {result}"

        for name, conductor in {**CONDUCTORS, **SLOW_CONDUCTORS}.items():
            refused(name, conductor)
        for bystander in bystanders:
            bystander.assert_unharmed()
        # An answer may have 8 MiB. What is freed is the system's again a moment later, but for what a sanitizer keeps.
        limit = daemon.resident() + 128 * MiB if SANITIZER else 40 * MiB
        for _ in range(8):
            refused("shard100k", CONDUCTORS["shard100k"])
            refused("endless", SLOW_CONDUCTORS["endless"])
        wait_for(lambda: daemon.resident() < limit, "memory is given back")
        assert "  x/" not in daemon.qbd("list").out
        # It listens to a conductor that has come to its senses.
        cluster.volumes["noise"].conductor = None
        handle = nbd.NBD()
        handle.connect_uri(daemon.qbd("map", "--export", "x/noise", "-c", str(hostile)).succeeded().out.strip())
        assert handle.pread(512, 0) == bytes(512)
        handle.shutdown()


@pytest.mark.deadline(180)
def test_hostile_conductors_of_mapped_volumes():
    """The stores do without the conductor."""
    bad = {**CONDUCTORS, **SLOW_CONDUCTORS}
    with surroundings() as (daemon, cluster, hostile, bystanders):
        hostile.write_text(cluster.configuration(io_timeout=20))
        handles = mapped(daemon, cluster, hostile, bad)
        spent = Spent(daemon)
        for name, volume in cluster.volumes.items():
            volume.conductor = bad[name]
        # Some at a time: not the conductor's client is to be measured but what its answers do.
        for first in range(0, len(bad), 8):
            some = list(bad)[first : first + 8]
            for name in some:
                cluster.disconnect(cluster.volumes[name])
            flights = {name: Flight(handles[name]) for name in some}
            landed(flights, 19)
            for name, flight in flights.items():
                assert set(flight.errors) == {0}, f"{name}: {flight.errors}"
                assert flight.seconds < 5 * SLOWNESS, f"{name}: {flight.seconds:.2f} s"
        elapsed = time.monotonic() - spent.began
        for name, used in spent.seconds().items():
            if name.startswith("qbd:x/"):
                assert used < 0.2 * elapsed * SLOWNESS + 0.1, f"{name} spins: {used:.2f} s"
        for bystander in bystanders:
            bystander.assert_unharmed()
        for handle in handles.values():
            handle.shutdown()


def test_the_primary_is_found_among_the_stores_that_are_named():
    """The conductor names the same two stores all the time, the first of them first, whichever is the primary."""
    with surroundings(stores=2) as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=20))
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        bad = STORES["primary"][0]
        for primary in (1, 0, 1, 0):
            away = cluster.addresses[1 - primary]

            async def serve(volume, hello, reader, writer, address):
                await (bad if address == away else good)(volume, hello, reader, writer, address)

            volume.store = serve
            cluster.disconnect(volume)
            flight = Flight(handle)
            landed({"v": flight}, 10)
            assert set(flight.errors) == {0}
            assert flight.seconds < 3 * SLOWNESS, f"{flight.seconds:.2f} s"
        handle.shutdown()


LATE = {
    # The connection is given up at half of io_timeout: name: (behaviour of the first of two stores, io_timeout, seconds)
    "lost": (until_good(STORES["silent"][0]), 4, (1.9, 3.5)),
    "drip": (until_good(dripping_reply), 4, (1.9, 3.5)),
    # The next address of the shard has it.
    "next": (STORES["silent"][0], 4, (1.9, 3.5)),
}


@pytest.mark.parametrize("name", LATE)
def test_a_late_answer_is_asked_for_again(name):
    bad, io_timeout, (least, most) = LATE[name]
    with surroundings(stores=2) as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=io_timeout))
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        volume.store = at(bad, cluster.addresses[0])
        cluster.disconnect(volume)
        flight = Flight(handle)
        landed({"v": flight}, 10)
        assert set(flight.errors) == {0}
        assert least < flight.seconds < most * SLOWNESS, f"{flight.seconds:.2f} s"
        assert volume.overlaps == 0
        assert "no answer to a request within 2000 ms" in daemon.log()
        handle.shutdown()


@pytest.mark.parametrize("bad, conn_timeout", ((STORES["silent"][0], 1), (swallowing_reads, 20)), ids=("silent", "reads"))
def test_what_is_in_flight_follows_its_shard(bad, conn_timeout):
    """The conductor knows of another store, and no answer comes from the one that has the requests. It is asked when
    they are late, or when that store says so to some."""
    with surroundings(stores=2) as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=20, conn_timeout=conn_timeout))
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        volume.store = at(bad, cluster.addresses[0])
        cluster.disconnect(volume)
        flight = Flight(handle)
        wait_for(lambda: volume.writers, "it is connected")
        volume.layout = lambda _, original=volume.layout: original(cluster.addresses[1])
        landed({"v": flight}, 19)
        assert set(flight.errors) == {0}
        assert flight.seconds < 4 * SLOWNESS, f"{flight.seconds:.2f} s"
        assert volume.overlaps == 0
        handle.shutdown()


def test_a_store_without_room_for_another_connection():
    """It is not left for another store, and keeps the connections that it has room for."""
    with surroundings(stores=2) as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=20, connections_per_store=4))
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        seen = set()
        room = with_room_for(2)

        async def serve(volume, hello, reader, writer, address):
            seen.add(address)
            await room(volume, hello, reader, writer, address)

        volume.store = serve
        cluster.disconnect(volume)
        before, began = volume.connected, time.monotonic()
        verify(daemon.uri("x/v"), 3, "--size=48M")
        elapsed = time.monotonic() - began
        assert seen == {cluster.addresses[0]}
        tries = volume.connected - before
        # Two lanes are there, and two try again every five seconds; one with a write under way ends those that are there.
        assert tries <= 4 + 6 * (elapsed / 5 + 1), f"{tries} connections in {elapsed:.1f} s"
        assert "the store closed the connection before its first answer" in daemon.log()
        assert daemon.json("info", "x/v")["counters"]["errors"] == 0
        # When there is no room at all, the requests wait for it.
        volume.store = STORES["full"][0]
        cluster.disconnect(volume)
        flight = Flight(handle)
        wait_for(lambda: "no room" in daemon.json("info", "x/v").get("waits", ""), "info says that I/O waits for room")
        volume.store = serve
        landed({"v": flight}, 10)
        assert set(flight.errors) == {0} and seen == {cluster.addresses[0]}
        handle.shutdown()


def test_answers_after_which_time_helps():
    """Codes without REOPEN that say that a store cannot do it now, and one that says that data is not with it."""
    codes = (0x05, 0x06, 0x07, 0x09, 0x82, 0xC3, 0xC5, 0xC7, 0xC8, 0xC9, 0xCE, 0xCF)
    with surroundings() as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=20))
        stores = {f"c{code:x}": refusing_once(code, code) for code in codes}
        stores |= {"degraded": degraded, "nodata": refusing_once(DEGRADE, opcodes=[READ]), "untidy": untidy}
        handles = mapped(daemon, cluster, hostile, stores)
        opened = {name: volume.opened for name, volume in cluster.volumes.items()}
        for name, volume in cluster.volumes.items():
            volume.store = stores[name]
            cluster.disconnect(volume)
        flights = {name: Flight(handle) for name, handle in handles.items()}
        landed(flights, 19)
        for name, flight in flights.items():
            assert set(flight.errors) == {0}, f"{name}: {flight.errors}"
            assert flight.seconds < 5 * SLOWNESS, f"{name}: {flight.seconds:.2f} s"
            assert handles[name].pread(65536, MiB) == b"n" * 65536, name
            asked = cluster.volumes[name].opened - opened[name]
            assert asked <= 10 * SLOWNESS, f"{name}: the conductor was asked {asked} times"
        assert "answered INTERNAL" in daemon.log() and "answered SUCCESS, DEGRADE" in daemon.log()
        opened = cluster.volumes["degraded"].opened
        for _ in range(20):
            handles["degraded"].pwrite(b"d" * 512, 0)
        assert cluster.volumes["degraded"].opened == opened, "once is enough"
        for code, errno in ((0x01, 5), (0x02, 5), (0x80, 5), (0xC1, 28), (0xC4, 5), (0xC6, 5)):
            volume = cluster.volumes["untidy"]
            volume.store = refusing_once(code)
            cluster.disconnect(volume)
            flight = Flight(handles["untidy"])
            landed({"untidy": flight}, 10)
            assert set(flight.errors) == {errno}, f"{code:x}: {flight.errors}"
            assert flight.seconds < 5 * SLOWNESS
        for handle in handles.values():
            handle.shutdown()


def test_a_conductor_that_is_not_ready_yet():
    """When a volume is mapped."""
    ready_soon = {
        "status": changed(ret_code=2, reason="Volume:x:v in status (ERROR) can't be opened"),
        "prepare": changed(ret_code=2, reason="Failed to prepare volume v on store:192.0.2.1, for:busy"),
        "dies": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n{"),
        "silent": saying(),
        "reset": CONDUCTORS["reset"],
        "starting": saying(http("", "503 Service Unavailable")),
    }
    with surroundings(open_volume_timeout=20) as (daemon, cluster, hostile, _):
        for name, conductor in ready_soon.items():
            volume = cluster.volume(name)

            async def twice(answer, writer, volume=volume, conductor=conductor):
                if volume.opened > 2:
                    writer.write(http(json.dumps(answer)))
                else:
                    await conductor(answer, writer)

            volume.conductor = twice
            daemon.qbd("map", "--export", f"x/{name}", "-c", str(hostile)).succeeded()
            assert volume.opened == 3, f"{name}: opened {volume.opened} times"
        volume = cluster.volume("none")
        volume.conductor = changed(ret_code=2, reason="Volume:x:none not exists")
        daemon.qbd("map", "--export", "x/none", "-c", str(hostile)).failed(2, "not exists")
        volume.conductor = changed(ret_code=1, reason=None)
        daemon.qbd("map", "--export", "x/none@s", "-c", str(hostile)).failed(2, "there is no snapshot 's'")


def test_a_volume_that_its_conductor_makes_larger_without_shards():
    with surroundings() as (daemon, cluster, hostile, _):
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        # Another host has grown it.
        volume.size = 4 * SIZE
        daemon.qbd("resize", "x/v", "-k", "128M", "-c", str(hostile)).failed(22, "can only grow")
        assert volume.updates == [], "a volume shrinks that another host has grown"
        daemon.qbd("resize", "x/v", "--to-store-size", "-c", str(hostile)).succeeded()
        # A conductor that does nothing.
        volume.update = lambda size: None
        daemon.qbd("resize", "x/v", "-k", "1G", "-c", str(hostile)).failed(121, str(GiB), str(4 * SIZE))
        # One that would do it by half is not asked.
        volume.update = lambda size: setattr(volume, "size", size)
        daemon.qbd("resize", "x/v", "-k", "100G", "-c", str(hostile)).failed(95, "its shards hold 68719476736", "copy it")
        assert volume.updates == [GiB]
        # Another client asks all the same: what there is of it is served, also anew.
        volume.size = 100 * GiB
        daemon.qbd("resize", "x/v", "--to-store-size", "-c", str(hostile)).succeeded()
        for _ in range(2):
            assert handle.pread(4096, 4096) == b"w" * 4096
            handle.shutdown()
            daemon.qbd("unmap", "x/v").succeeded()
            handle = nbd.NBD()
            handle.connect_uri(daemon.qbd("map", "--export", "x/v", "-c", str(hostile)).succeeded().out.strip())
            assert handle.get_size() == 64 * GiB
        assert "shards for" in daemon.log() and "the rest is not served" in daemon.log()
        # One that is not mapped.
        cluster.volume("w")
        daemon.qbd("resize", "x/w", "-k", "100G", "-c", str(hostile)).failed(95, "its shards hold 68719476736")
        handle.shutdown()


def test_a_conductor_that_names_other_stores_every_time():
    """Connections to stores that serve nothing any more are given up."""
    with surroundings(stores=24) as (daemon, cluster, hostile, _):
        hostile.write_text(cluster.configuration(io_timeout=20))
        handle = mapped(daemon, cluster, hostile, ["v"])["v"]
        volume = cluster.volumes["v"]
        before = daemon.descriptors()

        def layout(_, original=volume.layout):
            return original(cluster.addresses[volume.opened % len(cluster.addresses)])

        volume.layout = layout
        for _ in range(40):
            # As long as no store takes it, the conductor is asked.
            volume.store = STORES["full"][0]
            cluster.disconnect(volume)
            opened = volume.opened
            flight = Flight(handle, 1)
            wait_for(lambda: volume.opened > opened, "the conductor is asked")
            volume.store = good
            landed({"v": flight}, 10)
            assert set(flight.errors) == {0}
        assert volume.overlaps == 0
        assert daemon.descriptors() <= before + 4, "connections stay"
        handle.shutdown()


def test_the_load_finds_a_store_that_lies():
    """The check of the check."""
    with surroundings() as (daemon, cluster, hostile, _):
        volume = cluster.volume("v")
        uri = daemon.qbd("map", "--export", "x/v", "-c", str(hostile)).succeeded().out.strip()
        verify(uri, 1, "--size=48M")
        volume.store = lying
        cluster.disconnect(volume)
        with pytest.raises(AssertionError, match="verify"):
            verify(uri, 10, "--size=48M")
