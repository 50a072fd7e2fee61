"""A pool's disk that fails or is full: no flush claims what it cannot know, and what lost nothing goes on."""

import contextlib
import errno
import fcntl
import re
import struct
import threading

import nbd
import pytest

from harness import KiB, MiB, wait_for
from machine import SCRATCH, mapped_disk, mounted, sh

FIBMAP = 1
BLOCK = 4096


def export(daemon, volume):
    daemon.qbd("map", "--export", volume).succeeded()
    return daemon.uri(volume)


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def failure(call, *arguments):
    """The errno a request fails with, 0 when it does not."""
    try:
        call(*arguments)
        return 0
    except nbd.Error as error:
        return error.errnum


def first_block(pool):
    """Where on the disk the first block of volume `a` is written to. Asking for it synchronises the file."""
    head = re.search(r"^head = 0x([0-9a-f]+)$", (pool / "a.volume").read_text(), re.MULTILINE)
    with open(pool / (f"@{head[1]:0>16}.raw" if head else "a.raw"), "rb") as file:
        (block,) = struct.unpack("i", fcntl.ioctl(file, FIBMAP, struct.pack("i", 0)))
    assert block, "the volume should have its first block"
    return block


class Disk:
    """A disk with a file system for a pool, one block of which can be made to fail."""

    SECTORS = 256 << 11

    def __init__(self, loop, pool):
        self.loop = loop
        self.pool = pool

    def stop_and_fail(self, block):
        """Stops answering; from `go_on` on, this block fails."""
        bad, size = block * BLOCK // 512, BLOCK // 512
        after = bad + size
        self.load(
            f"0 {bad} linear {self.loop} 0\n{bad} {size} error\n"
            f"{after} {self.SECTORS - after} linear {self.loop} {after}\n"
        )

    def mend(self):
        self.load(f"0 {self.SECTORS} linear {self.loop} 0\n")
        self.go_on()

    def load(self, table):
        sh("dmsetup", "suspend", "--nolockfs", "test-disk")
        file = SCRATCH / "table"
        file.write_text(table)
        sh("dmsetup", "load", "test-disk", file)

    def go_on(self):
        sh("dmsetup", "resume", "test-disk")


@pytest.fixture
def disk():
    with mapped_disk("disk", Disk.SECTORS * 512, "-b", BLOCK) as (loop, where):
        yield Disk(loop, where / "pool")


@pytest.mark.parametrize("with_snapshots", [False, True], ids=["plain", "snapshots"])
def test_every_flush_tells_of_a_lost_write(disk, new_daemon, with_snapshots):
    """The kernel tells it once to an open file, and two clients flush at the same time."""
    daemon = new_daemon(pool_path=disk.pool).start()
    daemon.create("disk/a", "64M")
    if with_snapshots:
        daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    uri = export(daemon, "disk/a")
    clients = [connect(uri) for _ in range(3)]
    clients[0].pwrite(b"a" * 64 * KiB, 0)
    clients[0].flush()
    block = first_block(disk.pool)
    clients[0].pwrite(b"b" * BLOCK, 0)
    disk.stop_and_fail(block)
    results = {}
    threads = [
        threading.Thread(target=lambda index=index: results.update({index: failure(clients[index].flush)}))
        for index in range(len(clients))
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: daemon.json("info", "disk/a")["counters"]["in_flight"] == len(clients), "all of them flush")
    disk.go_on()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(len(clients)), errno.EIO)
    # What was lost stays lost.
    disk.mend()
    assert daemon.json("info", "disk/a")["health"] == "failed"
    assert failure(clients[1].flush) == errno.EIO
    assert failure(clients[1].pwrite, b"c" * BLOCK, MiB, nbd.CMD_FLAG_FUA) == errno.EIO
    assert failure(clients[1].pwrite, b"c" * BLOCK, MiB) == 0
    for client in clients:
        client.shutdown()
    daemon.qbd("unmap", "disk/a").succeeded()
    again = connect(export(daemon, "disk/a"))
    again.pwrite(b"d" * BLOCK, 0)
    again.flush()
    again.shutdown()


@pytest.fixture
def small():
    """A file system that is soon full."""
    with mounted("none", "-t", "tmpfs", "-o", "size=32M", name="small") as path:
        yield path


@contextlib.contextmanager
def filled(path):
    """Not a byte is free."""
    filler = path / "filler"
    with open(filler, "wb", buffering=0) as file:
        with pytest.raises(OSError) as refused:
            while True:
                file.write(b"f" * BLOCK)
        assert refused.value.errno == errno.ENOSPC
    yield
    filler.unlink()


@pytest.mark.parametrize("with_snapshots", [False, True], ids=["plain", "snapshots"])
def test_full_file_system_costs_what_it_refuses_alone(small, new_daemon, with_snapshots):
    daemon = new_daemon(pool_path=small / "pool").start()
    daemon.create("disk/a", "64M")
    if with_snapshots:
        daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    client = connect(export(daemon, "disk/a"))
    client.pwrite(b"a" * 64 * KiB, 0)
    with filled(small):
        assert failure(client.pwrite, b"b" * 64 * KiB, 16 * MiB, nbd.CMD_FLAG_FUA) == errno.ENOSPC
        assert failure(client.zero, 64 * KiB, 17 * MiB, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE) == errno.ENOSPC
        # Also with snapshots: that the first cluster counts was written down with it.
        assert failure(client.flush) == 0
        assert client.pread(64 * KiB, 0) == b"a" * 64 * KiB
        assert daemon.json("info", "disk/a")["health"] == "degraded"
    client.flush()
    client.pwrite(b"b" * 64 * KiB, 16 * MiB, nbd.CMD_FLAG_FUA)
    wait_for(lambda: daemon.json("info", "disk/a")["health"] in ("idle", "active"), "it is well again")
    client.shutdown()
    # What was flushed counts without a clean end.
    daemon.kill()
    daemon.start()
    client = connect(export(daemon, "disk/a"))
    assert client.pread(64 * KiB, 0) == b"a" * 64 * KiB
    assert client.pread(64 * KiB, 16 * MiB) == b"b" * 64 * KiB
    client.shutdown()
